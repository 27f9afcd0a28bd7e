//! Holds the engine's outcome against the oracle's.
//!
//! One deviation is allowed: at an instruction that faults, status flags may differ that the code overwrites before it reads them. The translator lets such
//! flags rot; user code cannot see it, and a kernel that looks at a fault's flags has no use for them.
//!
//! A second one: where an indirect jump, a call or a return leads to an address that is not canonical, the translator raises #GP there and not at the
//! instruction, whose effect on the stack has happened. A check in every indirect transfer costs more than the difference is worth.
//!
//! A third: an instruction with two reasons to fault may name either. And code that a block's own store changes must not turn flags that were dead into
//! live ones; the generator of self-modifying code does not do that.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};

use crate::forms;
use crate::layout::{PAGE, REGIONS, backing};
use crate::program::{Case, Flavour, window};
use crate::state::{Ending, NAMES, Outcome, Regs, hex};

const STATUS: u64 = 0x8d5;
/// Status flags, TF, IF, DF, IOPL, NT, RF, AC, ID.
const FLAGS: u64 = STATUS | 0x700 | 0x7000 | 1 << 16 | 1 << 18 | 1 << 21;
const BREAKPOINT: u8 = 3;

/// What a comparison says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Same,
    /// Status flags differ at a fault, but they are dead.
    DeadFlags,
    /// #GP behind and not at a transfer to an address that is not canonical.
    LateFault,
    /// Of two exceptions that an instruction can raise each side names another one.
    OtherOrder,
    /// The differences, oracle first.
    Different(String),
}

/// Whether the oracle's error code does not say if the page is present: Linux says so of the whole upper half, and the last page of the lower half may be
/// a hypervisor's.
fn unclear(address: u64) -> bool {
    address >> 12 >= 0x7_ffff_ffff
}

/// What the guest must show where the oracle shows this.
fn expected(case: &Case, oracle: &Outcome) -> Outcome {
    let mut want = oracle.clone();
    if let Ending::Exception {
        vector: 14,
        error,
        cr2,
    } = &mut want.ending
    {
        if case.flavour == Flavour::Kernel64 {
            *error &= !4;
        }
        if unclear(*cr2) {
            *error &= !1;
        }
    }
    if case.flavour == Flavour::Kernel64 {
        want.regs.cs = 0x10;
    }
    want
}

/// Compares everything that a guest can see.
pub fn compare(case: &Case, oracle: &Outcome, guest: &Outcome) -> Verdict {
    let mut want = expected(case, oracle);
    let mut got = guest.ending.clone();
    if let Ending::Exception {
        vector: 14,
        error,
        cr2,
    } = &mut got
        && unclear(*cr2)
    {
        *error &= !1;
    }
    if late_fault(case, &want, guest) {
        return Verdict::LateFault;
    }
    let other_order = want.ending != got && other_order(case, &want, guest);
    if other_order {
        want.ending = got.clone();
    }
    let mut out = String::new();
    if want.ending != got {
        let (a, b) = (format!("{:x?}", want.ending), format!("{got:x?}"));
        note(&mut out, "ending", &a, &b);
    }
    compare_registers(&mut out, &want.regs, &guest.regs);
    compare_memory(&mut out, &want.memory, &guest.memory);
    let (a, b) = (&want.regs, &guest.regs);
    let flags = (a.rflags ^ b.rflags) & FLAGS & !undefined(case);
    let fault = matches!(want.ending, Ending::Exception { vector, .. } if vector != BREAKPOINT);
    let harmless = flags & !STATUS == 0 && fault && out.is_empty();
    if flags != 0 && harmless && dead(case, &want, flags) {
        return Verdict::DeadFlags;
    }
    if flags != 0 {
        let show = |r: &Regs| format!("{:#x}", r.rflags & FLAGS);
        note(&mut out, "rflags", &show(a), &show(b));
    }
    if out.is_empty() && other_order {
        Verdict::OtherOrder
    } else if out.is_empty() {
        Verdict::Same
    } else {
        Verdict::Different(out)
    }
}

/// Flags that are undefined behind instructions where that cannot be helped.
fn undefined(case: &Case) -> u64 {
    let mut d = Decoder::with_ip(
        case.flavour.bits(),
        &case.patches[0].1,
        case.regs.rip,
        DecoderOptions::NONE,
    );
    d.iter().fold(0, |m, i| m | forms::loose_flags(i.code()))
}

/// Whether both faulted at an instruction with two reasons to fault of which processors and the engine may name either: a string instruction's two
/// operands, of which the order differs between processors and even from case to case; an x87 exception that is still pending and an operand; elements
/// of a masked operand.
fn other_order(case: &Case, want: &Outcome, guest: &Outcome) -> bool {
    let vector = |o: &Outcome| match o.ending {
        Ending::Exception { vector, .. } => Some(vector),
        _ => None,
    };
    let memory = |v| matches!(v, Some(13 | 14));
    let Some(i) = decode(case, want, want.regs.rip) else {
        return false;
    };
    want.regs.rip == guest.regs.rip
        && memory(vector(guest))
        && match vector(want) {
            Some(16) => (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory),
            // Elements that are chosen: one's address is none, another's page is missing.
            Some(13 | 14) if i.op_mask() != Register::None => vector(want) != vector(guest),
            v => memory(v) && forms::is_string(&i),
        }
}

fn late_fault(case: &Case, want: &Outcome, guest: &Outcome) -> bool {
    let rip = guest.regs.rip;
    let canonical = (rip << 16) as i64 >> 16 == rip as i64;
    let protection = Ending::Exception {
        vector: 13,
        error: 0,
        cr2: 0,
    };
    want.ending == protection
        && guest.ending == protection
        && !canonical
        && decode(case, want, want.regs.rip).is_some_and(|i| {
            matches!(
                i.flow_control(),
                FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return
            )
        })
}

fn note(out: &mut String, what: &str, a: &str, b: &str) {
    writeln!(out, "  {what}: {a} by the processor, {b} by the engine").expect("a string takes it");
}

fn compare_registers(out: &mut String, a: &Regs, b: &Regs) {
    let gpr = NAMES.iter().zip(a.gpr.iter().zip(&b.gpr));
    let mut numbers: Vec<(&str, u64, u64)> = gpr.map(|(n, (x, y))| (*n, *x, *y)).collect();
    numbers.extend([
        ("rip", a.rip, b.rip),
        ("fs base", a.fs_base, b.fs_base),
        ("gs base", a.gs_base, b.gs_base),
        ("cs", a.cs.into(), b.cs.into()),
        ("fcw", a.fpu.fcw.into(), b.fpu.fcw.into()),
        ("fsw", a.fpu.fsw.into(), b.fpu.fsw.into()),
        ("tags", a.fpu.tags.into(), b.fpu.tags.into()),
        ("mxcsr", a.fpu.mxcsr.into(), b.fpu.mxcsr.into()),
    ]);
    for (name, x, y) in numbers {
        if x != y {
            note(out, name, &format!("{x:#x}"), &format!("{y:#x}"));
        }
    }
    for (n, (x, y)) in a.fpu.st.iter().zip(&b.fpu.st).enumerate() {
        if x != y {
            note(out, &format!("st{n}"), &hex(x), &hex(y));
        }
    }
    for (n, (x, y)) in a.fpu.zmm.iter().zip(&b.fpu.zmm).enumerate() {
        if x != y {
            note(out, &format!("zmm{n}"), &hex(x), &hex(y));
        }
    }
    for (n, (x, y)) in a.fpu.k.iter().zip(&b.fpu.k).enumerate() {
        if x != y {
            note(
                out,
                &format!("k{n}"),
                &format!("{x:#x}"),
                &format!("{y:#x}"),
            );
        }
    }
}

fn compare_memory(out: &mut String, a: &[u8], b: &[u8]) {
    let mut differing = a.iter().zip(b).enumerate().filter(|(_, (x, y))| x != y);
    for (at, (x, y)) in differing.by_ref().take(16) {
        let place = format!("byte at window offset {:#x}", offset(at));
        note(out, &place, &format!("{x:02x}"), &format!("{y:02x}"));
    }
    let more = differing.count();
    if more > 0 {
        writeln!(out, "  and {more} more bytes").expect("a string takes it");
    }
}

/// Window offset of a position in the backing pages.
fn offset(at: usize) -> u64 {
    let page = at / PAGE as usize;
    let r = REGIONS
        .iter()
        .find(|r| (r.backing..r.backing + r.pages).contains(&page))
        .expect("every backing page is shown");
    r.offset + (at - r.backing * PAGE as usize) as u64
}

/// Whether the code from the faulting instruction on overwrites these flags, or leaves them undefined, before it reads them, on every path.
fn dead(case: &Case, at: &Outcome, flags: u64) -> bool {
    let mut budget = 200;
    dead_from(case, at, at.regs.rip, flags as u32, &mut budget)
}

fn dead_from(case: &Case, at: &Outcome, mut pc: u64, flags: u32, budget: &mut u32) -> bool {
    let mut left = to_iced(flags);
    while *budget > 0 {
        *budget -= 1;
        let Some(i) = decode(case, at, pc) else {
            return false;
        };
        if i.rflags_read() & left != 0 {
            return false;
        }
        let defined = i.rflags_written() | i.rflags_cleared() | i.rflags_set();
        left &= !(defined | i.rflags_undefined());
        if left == 0 {
            return true;
        }
        pc = match i.flow_control() {
            FlowControl::Next => i.next_ip(),
            FlowControl::UnconditionalBranch | FlowControl::Call if i.near_branch_target() != 0 => {
                i.near_branch_target()
            }
            FlowControl::ConditionalBranch => {
                let rest = from_iced(left);
                return dead_from(case, at, i.near_branch_target(), rest, budget)
                    && dead_from(case, at, i.next_ip(), rest, budget);
            }
            _ => return false,
        };
    }
    false
}

fn decode(case: &Case, at: &Outcome, pc: u64) -> Option<Instruction> {
    let (from, room) = backing(pc.checked_sub(window(pc))?)?;
    let bytes = &at.memory[from..from + room.min(15)];
    let mut d = Decoder::with_ip(case.flavour.bits(), bytes, pc, DecoderOptions::NONE);
    let i = d.decode();
    (!i.is_invalid()).then_some(i)
}

const BITS: [(u32, u32); 6] = [
    (1 << 0, iced_x86::RflagsBits::CF),
    (1 << 2, iced_x86::RflagsBits::PF),
    (1 << 4, iced_x86::RflagsBits::AF),
    (1 << 6, iced_x86::RflagsBits::ZF),
    (1 << 7, iced_x86::RflagsBits::SF),
    (1 << 11, iced_x86::RflagsBits::OF),
];

fn to_iced(flags: u32) -> u32 {
    BITS.iter()
        .filter(|b| flags & b.0 != 0)
        .fold(0, |m, b| m | b.1)
}

fn from_iced(flags: u32) -> u32 {
    BITS.iter()
        .filter(|b| flags & b.1 != 0)
        .fold(0, |m, b| m | b.0)
}
