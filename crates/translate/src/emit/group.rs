//! Groups: accesses of one block at known distances from each other share one check.
//!
//! A first pass follows what general registers hold, as "a value at the block's start, plus a constant". Accesses whose addresses differ by a constant are a
//! family. The first access of a family that is met checks for all of those still to come within [`SPAN`] bytes and keeps the host address in a register; the others
//! use it without a check, and so without touching a flag.
//!
//! Invariants
//! * The range of a check lies in one page, and is checked for writing if one of its accesses writes. Where that fails, the rest is done by a translation of the
//!   same code without groups, which makes one access after the other: nothing is done early, nothing is done at all after a fault.
//! * What makes a check obsolete cannot happen between it and the group's last access: the instructions that change mappings or rights end the group
//!   ([`barrier`]), and an interruption leaves the block.
//! * A register that holds a host address counts as spilled. No block is entered where one is in use, but through a resume stub.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::memory::Address;
use super::window::WINDOW_SPAN;
use super::{ColdKind, Work, bit};
use crate::asm::{RAX, RCX, RSP};
use crate::block::Resume;
use crate::insn::{Insn, Kind, gpr};
use crate::sight::Sight;

/// Bytes between the first and the last of a group's accesses. More would make more groups lie across a page boundary.
const SPAN: i64 = 256;
/// Groups in use at a time. Every form must find scratch registers beside them.
const GROUPS: usize = 3;
const RBP: u8 = 5;
const PAGE: i64 = 4096;

/// The memory operand and the stack slot of an instruction, in the order of their accesses.
pub(super) const OPERAND: usize = 0;
pub(super) const STACK: usize = 1;

/// An access: which family, how far from that family's origin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub(super) family: u16,
    pub(super) at: i64,
    pub(super) size: u32,
    pub(super) write: bool,
    /// Through the kernel window.
    pub(super) window: bool,
}

/// A checked range whose host address is in a register.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) family: u16,
    pub(super) low: i64,
    pub(super) high: i64,
    pub(super) write: bool,
    pub(super) reg: u8,
    /// Distance of `low` from where the register points.
    pub(super) plus: i32,
    pub(super) window: bool,
}

/// A host address: what register holds it, and a displacement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) reg: u8,
    pub(super) disp: i32,
}

/// What a register holds: the value with this number, plus a constant.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Value {
    number: u16,
    plus: i64,
}

/// What all addresses of a family have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Registers {
        segment: Option<usize>,
        base: Option<u16>,
        index: Option<(u16, u32)>,
    },
    Page(i64),
}

/// Finds the accesses of a block that may be grouped.
struct Survey<'a> {
    long: bool,
    values: [Value; 16],
    next: u16,
    families: &'a mut Vec<Family>,
    sight: Option<Sight<'a>>,
    pc: u64,
}

/// Instructions that no group outlives: they change rights or segment bases, may take an event, or need low registers.
pub(super) fn barrier(insn: &Insn) -> bool {
    insn.high_byte
        || !matches!(
            insn.kind,
            Kind::Copy
                | Kind::Lea
                | Kind::Mem
                | Kind::Nop
                | Kind::Push
                | Kind::Pop
                | Kind::Leave
                | Kind::Jmp(_)
                | Kind::Jcc(_)
                | Kind::Call(_)
                | Kind::JmpIndirect
                | Kind::CallIndirect
                | Kind::Ret
        )
}

/// Gives the accesses of each instruction, and the families they belong to.
pub(super) fn survey(
    insns: &[Insn],
    long: bool,
    families: &mut Vec<Family>,
    accesses: &mut Vec<[Option<Access>; 2]>,
    sight: Option<Sight<'_>>,
    pc: u64,
) {
    let mut survey = Survey {
        long,
        values: std::array::from_fn(|r| Value {
            number: r as u16,
            plus: 0,
        }),
        next: 16,
        families,
        sight,
        pc,
    };
    for insn in insns {
        accesses.push(survey.accesses(insn));
        survey.step(insn);
    }
}

impl Survey<'_> {
    fn word(&self) -> i64 {
        if self.long { 8 } else { 4 }
    }

    /// A number as wide as an address.
    fn wrap(&self, v: i64) -> i64 {
        if self.long { v } else { i64::from(v as i32) }
    }

    fn access(&mut self, family: Family, at: i64, size: u32, write: bool) -> Access {
        let known = self.families.iter().position(|f| *f == family);
        let family = known.unwrap_or_else(|| {
            self.families.push(family);
            self.families.len() - 1
        });
        Access {
            family: family as u16,
            at: self.wrap(at),
            size,
            write,
            window: false,
        }
    }

    /// Whether such an access will probably be to memory that the window shows.
    fn shown(&self, family: &Family, at: i64) -> bool {
        let Some(sight) = self.sight else {
            return false;
        };
        let (segment, base, index) = match *family {
            Family::Page(_) => return (sight.shows)(at as u64),
            Family::Registers {
                segment,
                base,
                index,
            } => (segment, base, index),
        };
        let segment = match segment {
            None => 0,
            Some(5) => sight.gs_base,
            Some(_) => return false,
        };
        let value = |number: u16| sight.gpr.get(usize::from(number)).copied();
        let base = base.map_or(Some(0), value);
        let index = index.map_or(Some(0), |(n, scale)| {
            Some(value(n)?.wrapping_mul(u64::from(scale)))
        });
        match (base, index) {
            (Some(base), Some(index)) => {
                let known = segment.wrapping_add(base).wrapping_add(index);
                (sight.shows)(known.wrapping_add(at as u64))
            }
            _ => sight.open,
        }
    }

    fn operand(&mut self, instr: &Instruction, size: u32, write: bool) -> Option<Access> {
        let segment = match instr.memory_segment() {
            Register::FS => Some(4),
            Register::GS => Some(5),
            _ => None,
        };
        let disp = instr.memory_displacement64() as i64;
        let (base, index) = (instr.memory_base(), instr.memory_index());
        if instr.is_ip_rel_memory_operand() || base == Register::None && index == Register::None {
            if segment.is_some() {
                let family = Family::Registers {
                    segment,
                    base: None,
                    index: None,
                };
                return Some(self.through(family, disp, size, write));
            }
            let at = if self.long { disp } else { disp & 0xffff_ffff };
            return Some(self.through(Family::Page(at & !(PAGE - 1)), at, size, write));
        }
        let width = self.word() as usize;
        if [base, index]
            .iter()
            .any(|r| *r != Register::None && r.size() != width)
        {
            return None;
        }
        let scale = instr.memory_index_scale();
        let base = gpr(base).map(|r| self.values[usize::from(r)]);
        let index = gpr(index).map(|r| self.values[usize::from(r)]);
        let at = disp
            .wrapping_add(base.map_or(0, |v| v.plus))
            .wrapping_add(index.map_or(0, |v| v.plus.wrapping_mul(i64::from(scale))));
        let family = Family::Registers {
            segment,
            base: base.map(|v| v.number),
            index: index.map(|v| (v.number, scale)),
        };
        Some(self.through(family, at, size, write))
    }

    fn through(&mut self, family: Family, at: i64, size: u32, write: bool) -> Access {
        let window = self.shown(&family, at);
        Access {
            window,
            ..self.access(family, at, size, write)
        }
    }

    fn stack(&mut self, register: u8, disp: i64, write: bool) -> Option<Access> {
        let v = self.values[usize::from(register)];
        let family = Family::Registers {
            segment: None,
            base: Some(v.number),
            index: None,
        };
        let size = self.word() as u32;
        Some(self.through(family, v.plus.wrapping_add(disp), size, write))
    }

    fn accesses(&mut self, insn: &Insn) -> [Option<Access>; 2] {
        let w = self.word();
        let mut operand = None;
        if let Some(mem) = insn.mem {
            operand = match insn.kind {
                // What a mask leaves out must not become dirty.
                Kind::Mem if mem.masked && mem.write => None,
                Kind::Mem => self.operand(&insn.instr, mem.size, mem.write),
                Kind::Push | Kind::CallIndirect | Kind::JmpIndirect => {
                    self.operand(&insn.instr, w as u32, false)
                }
                _ => None,
            };
        }
        if let Some(a) = &mut operand
            && let Some(sight) = self.sight
        {
            let pc = self.pc.wrapping_add(insn.offset.into());
            let masked = insn.mem.is_some_and(|m| m.masked);
            // The segment's base and the displacement are added up in 32 bits.
            let disp = insn.instr.memory_displacement64() as i64;
            let far = insn.instr.has_segment_prefix() && disp.unsigned_abs() >= 1 << 30;
            a.window &= !masked && !far && !sight.is_elsewhere(pc);
        }
        let mut stack = match insn.kind {
            Kind::Push | Kind::Call(_) | Kind::CallIndirect => self.stack(RSP, -w, true),
            Kind::Pop | Kind::Ret => self.stack(RSP, 0, false),
            Kind::Leave => self.stack(RBP, 0, false),
            _ => None,
        };
        if let (Some(a), Some(sight)) = (&mut stack, self.sight) {
            a.window &= !sight.is_elsewhere(self.pc.wrapping_add(insn.offset.into()));
        }
        [operand, stack]
    }

    fn unknown(&mut self) -> Value {
        self.next += 1;
        Value {
            number: self.next - 1,
            plus: 0,
        }
    }

    /// Follows the registers through one instruction.
    fn step(&mut self, insn: &Insn) {
        let (w, rsp, rbp) = (self.word(), usize::from(RSP), usize::from(RBP));
        match insn.kind {
            Kind::Push => self.add(RSP, self.values[rsp], -w),
            Kind::Pop => {
                self.add(RSP, self.values[rsp], w);
                if let Some(r) = gpr(insn.instr.op0_register()) {
                    self.values[usize::from(r)] = self.unknown();
                }
            }
            Kind::Leave => {
                self.add(RSP, self.values[rbp], w);
                self.values[rbp] = self.unknown();
            }
            _ => match self.sum(insn) {
                Some((r, value, plus)) => self.add(r, value, plus),
                None => {
                    for r in 0..16 {
                        if insn.changes & bit(r) != 0 {
                            self.values[usize::from(r)] = self.unknown();
                        }
                    }
                }
            },
        }
    }

    fn add(&mut self, register: u8, value: Value, plus: i64) {
        self.values[usize::from(register)] = Value {
            number: value.number,
            plus: self.wrap(value.plus.wrapping_add(plus)),
        };
    }

    /// The register that becomes another's value plus a constant, if that is all the instruction does to general registers.
    fn sum(&self, insn: &Insn) -> Option<(u8, Value, i64)> {
        use Mnemonic as M;
        let i = &insn.instr;
        let width = self.word() as usize;
        if !matches!(insn.kind, Kind::Copy | Kind::Lea)
            || i.op_count() == 0
            || i.op0_kind() != OpKind::Register
            || !i.op0_register().is_gpr()
            || i.op0_register().size() != width
        {
            return None;
        }
        let r = gpr(i.op0_register())?;
        let own = self.values[usize::from(r)];
        let immediate = || {
            matches!(
                i.op1_kind(),
                OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate32
                    | OpKind::Immediate32to64
            )
            .then(|| i.immediate(1) as i64)
        };
        match i.mnemonic() {
            M::Mov if i.op1_kind() == OpKind::Register && i.op1_register().is_gpr() => {
                let from = gpr(i.op1_register())?;
                Some((r, self.values[usize::from(from)], 0))
            }
            M::Add => Some((r, own, immediate()?)),
            M::Sub => Some((r, own, immediate()?.wrapping_neg())),
            M::Inc => Some((r, own, 1)),
            M::Dec => Some((r, own, -1)),
            M::Lea
                if !i.is_ip_rel_memory_operand()
                    && i.memory_index() == Register::None
                    && i.memory_base().size() == width =>
            {
                let from = gpr(i.memory_base())?;
                let disp = i.memory_displacement64() as i64;
                Some((r, self.values[usize::from(from)], disp))
            }
            _ => None,
        }
    }
}

/// A group that is worth its register.
pub(super) struct Plan {
    pub(super) low: i64,
    pub(super) high: i64,
    pub(super) write: bool,
    pub(super) reg: u8,
}

impl Work<'_> {
    /// Registers that hold host addresses.
    pub(super) fn pinned(&self) -> u16 {
        self.groups.iter().fold(0, |m, g| m | bit(g.reg))
    }

    /// Ends the groups that instruction `i` cannot be executed with.
    pub(super) fn end_groups(&mut self, i: usize) {
        let insn = &self.insns[i];
        if barrier(insn) {
            self.groups.clear();
            return;
        }
        let mut used = insn.reads | insn.writes | insn.changes;
        if matches!(insn.kind, Kind::CallIndirect | Kind::JmpIndirect) {
            used |= bit(RCX);
        }
        self.groups.retain(|g| used & bit(g.reg) == 0);
    }

    /// Where an access of instruction `i` is in the host, if a check before covers it.
    pub(super) fn held(&self, i: usize, which: usize) -> Option<Place> {
        let a = self.accesses[i][which]?;
        self.groups
            .iter()
            .find(|g| {
                g.family == a.family
                    && g.low <= a.at
                    && a.at.saturating_add(a.size.into()) <= g.high
                    && (g.write || !a.write)
                    && g.window == a.window
            })
            .map(|g| Place {
                reg: g.reg,
                disp: (a.at - g.low) as i32 + g.plus,
            })
    }

    /// Emits the check of an access, for its group too if it begins one. `address` computes the guest address, moved by so many bytes, into the given
    /// register or one outside `avoid`.
    pub(super) fn checked(
        &mut self,
        i: usize,
        which: usize,
        (size, write): (u32, bool),
        avoid: u16,
        address: impl FnOnce(&mut Self, Option<u8>, i32) -> Address,
    ) -> Place {
        if self.windowed(i, which) {
            return self.through_window(i, which, avoid, address);
        }
        let Some((a, plan)) = self.plan(i, which, avoid) else {
            let address = address(self, None, 0);
            return Place {
                reg: self.check(i, address, size, write, avoid),
                disp: 0,
            };
        };
        if self.spilled & bit(plan.reg) == 0 {
            self.spill(plan.reg);
        }
        let address = address(self, Some(plan.reg), (plan.low - a.at) as i32);
        let span = (plan.high - plan.low) as u32;
        let target = self.wrap(self.pc.wrapping_add(u64::from(self.insns[i].offset)));
        let start = self.start;
        self.check_as(
            i,
            address,
            (span, plan.write),
            avoid | bit(plan.reg),
            Some(plan.reg),
            |reg, tag| ColdKind::Group {
                reg,
                tag,
                span,
                write,
                any_write: plan.write,
                start,
                target,
            },
        );
        self.groups.push(Group {
            family: a.family,
            low: plan.low,
            high: plan.high,
            write: plan.write,
            reg: plan.reg,
            plus: 0,
            window: a.window,
        });
        Place {
            reg: plan.reg,
            disp: (a.at - plan.low) as i32,
        }
    }

    /// Whether to begin a group with this access, and which.
    pub(super) fn plan(&self, i: usize, which: usize, avoid: u16) -> Option<(Access, Plan)> {
        let a = self.accesses[i][which]?;
        if self.single || self.groups.len() >= GROUPS || barrier(&self.insns[i]) {
            return None;
        }
        // The translation without groups would begin without the shadow.
        if matches!(self.resume, Resume::OffsetInShadow(_)) {
            return None;
        }
        let (mut low, mut high, mut write) = (a.at, a.at.checked_add(a.size.into())?, a.write);
        let most = if self.windowed(i, which) {
            WINDOW_SPAN
        } else {
            SPAN
        };
        let mut second = None;
        let mut last = i;
        for (j, insn) in self.insns.iter().enumerate().skip(i) {
            if j > i && barrier(insn) {
                break;
            }
            for (n, b) in self.accesses[j].iter().enumerate() {
                let Some(b) = b.filter(|b| {
                    b.family == a.family && b.window == a.window && (j, n) > (i, which)
                }) else {
                    continue;
                };
                let l = low.min(b.at);
                let h = high.max(b.at.saturating_add(b.size.into()));
                if h.saturating_sub(l) <= most {
                    (low, high, write) = (l, h, write || b.write);
                    second.get_or_insert(j);
                    last = j;
                }
            }
            if matches!(insn.kind, Kind::Jcc(t) if t <= self.pc.wrapping_add(insn.offset.into())) {
                // A loop is entered again with all registers in place.
                break;
            }
        }
        let second = second?;
        let instr = &self.insns[i].instr;
        let disp = instr.memory_displacement64() as i64;
        if which == OPERAND
            && (instr.memory_base().is_gpr() || instr.memory_index().is_gpr())
            && i32::try_from(disp.wrapping_add(low - a.at)).is_err()
        {
            return None;
        }
        let reg = self.free_until(i, second, last, avoid)?;
        Some((
            a,
            Plan {
                low,
                high,
                write,
                reg,
            },
        ))
    }

    /// A register that nothing needs before instruction `second`, best not before `last` either.
    fn free_until(&self, i: usize, second: usize, last: usize, avoid: u16) -> Option<u8> {
        let insn = &self.insns[i];
        let mut avoid =
            avoid | insn.reads | insn.writes | insn.changes | self.pinned() | bit(RSP) | bit(RAX);
        if insn.kind == Kind::CallIndirect {
            avoid |= bit(RCX);
        }
        let mut best: Option<(usize, u8)> = None;
        for r in (0..16).filter(|&r| avoid & bit(r) == 0) {
            let until = self.insns[i + 1..]
                .iter()
                .position(|n| (n.reads | n.writes | n.changes) & bit(r) != 0)
                .map_or(self.insns.len(), |n| i + 1 + n);
            if second > i && until <= second {
                continue;
            }
            // In front of the last access a register lives as long as it must; of those the ones that are in the frame already come first.
            let there = (self.spilled | self.clean) & bit(r) != 0;
            let worth = 2 * until.min(last + 1) + usize::from(there);
            if best.is_none_or(|(b, _)| worth >= b) {
                best = Some((worth, r));
            }
        }
        best.map(|(_, r)| r)
    }
}
