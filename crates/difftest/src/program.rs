//! A case before it has addresses: instructions that can be left out one by one, and jumps that know their target by number.

use std::fmt::Write;

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Formatter, Instruction, IntelFormatter, OpKind,
};

use crate::layout::{LOW, WINDOWS, backing};
use crate::state::{NAMES, Regs, hex};

/// Privilege and width of the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    User64,
    /// Compatibility mode.
    User32,
    /// Privilege level 0 in the guest; the oracle still runs it at level 3.
    Kernel64,
}

impl Flavour {
    pub fn bits(self) -> u32 {
        if self == Flavour::User32 { 32 } else { 64 }
    }
}

/// What stands at one place of a program.
#[derive(Clone, Debug)]
pub enum What {
    Instruction(Instruction),
    /// An instruction that is not encoded by the encoder.
    Bytes(Vec<u8>),
    /// A near branch to the item with this number, or what follows it where it was left out.
    Branch(Code, u32),
    /// The instruction's immediate, displacement or RIP-relative address becomes the address of that item plus so many bytes.
    AddressOf(Instruction, u32, u64),
}

#[derive(Clone, Debug)]
pub struct Item {
    /// Ascending.
    pub id: u32,
    pub what: What,
}

/// A case that can still be changed.
#[derive(Clone, Debug)]
pub struct Program {
    pub flavour: Flavour,
    pub items: Vec<Item>,
    /// Address of the first byte.
    pub start: u64,
    pub regs: Regs,
    pub patches: Vec<(u64, Vec<u8>)>,
}

/// A case ready to be run: where it starts, and what differs from the base image.
#[derive(Clone, Debug)]
pub struct Case {
    pub flavour: Flavour,
    pub regs: Regs,
    /// Virtual address and bytes; the first is the code.
    pub patches: Vec<(u64, Vec<u8>)>,
}

/// Window base that an address belongs to.
pub fn window(address: u64) -> u64 {
    let mut highest_first = WINDOWS.into_iter().rev();
    highest_first.find(|&w| address >= w).unwrap_or(LOW)
}

fn set_address(i: &mut Instruction, to: u64) {
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Immediate64 => i.set_immediate64(to),
            OpKind::Immediate32 => i.set_immediate32(to as u32),
            OpKind::Memory => i.set_memory_displacement64(to),
            _ => {}
        }
    }
}

impl Program {
    pub fn new(flavour: Flavour, start: u64, regs: Regs) -> Program {
        Program {
            flavour,
            items: Vec::new(),
            start,
            regs,
            patches: Vec::new(),
        }
    }

    pub fn push(&mut self, what: What) -> u32 {
        let id = self.items.last().map_or(0, |i| i.id + 1);
        self.items.push(Item { id, what });
        id
    }

    pub fn instruction(&mut self, i: Instruction) -> u32 {
        self.push(What::Instruction(i))
    }

    /// Number that the next item will get.
    pub fn next_id(&self) -> u32 {
        self.items.last().map_or(0, |i| i.id + 1)
    }

    /// Encodes the program; INT3 ends it. `None` where an instruction has no encoding.
    pub fn assemble(&self) -> Option<Case> {
        let (mut code, _) = self.encode()?;
        // What lies behind the region's end is missing, and fetching it faults.
        let (_, room) = backing(self.start - window(self.start))?;
        code.truncate(room);
        let mut regs = self.regs.clone();
        regs.rip = self.start;
        regs.cs = if self.flavour == Flavour::User32 {
            0x23
        } else {
            0x33
        };
        if self.flavour == Flavour::User32 {
            for r in &mut regs.gpr {
                *r &= 0xffff_ffff;
            }
        }
        let mut patches = vec![(self.start, code)];
        patches.extend(self.patches.iter().cloned());
        Some(Case {
            flavour: self.flavour,
            regs,
            patches,
        })
    }

    /// The bytes, and where each item begins.
    pub fn encode(&self) -> Option<(Vec<u8>, Vec<usize>)> {
        let bits = self.flavour.bits();
        let mut starts = vec![0; self.items.len() + 1];
        let mut code = Vec::new();
        // The second round knows where everything is; lengths do not depend on it.
        for _ in 0..2 {
            let address = |id: u32| {
                let n = self.items.partition_point(|i| i.id < id);
                self.start + starts[n] as u64
            };
            let mut next = Vec::with_capacity(starts.len());
            let mut encoder = Encoder::new(bits);
            code = Vec::new();
            for item in &self.items {
                next.push(code.len());
                let i = match &item.what {
                    What::Bytes(b) => {
                        code.extend_from_slice(b);
                        continue;
                    }
                    What::Instruction(i) => *i,
                    What::Branch(c, id) => Instruction::with_branch(*c, address(*id)).ok()?,
                    What::AddressOf(i, id, plus) => {
                        let mut i = *i;
                        set_address(&mut i, address(*id) + plus);
                        i
                    }
                };
                encoder.set_buffer(code);
                let done = encoder.encode(&i, self.start + next[next.len() - 1] as u64);
                code = encoder.take_buffer();
                done.ok()?;
            }
            next.push(code.len());
            starts = next;
            code.push(0xcc);
        }
        Some((code, starts))
    }

    /// What a person needs to see of it.
    pub fn describe(&self) -> String {
        let mut out = String::new();
        let Some((code, starts)) = self.encode() else {
            return "cannot be encoded".into();
        };
        let w = &mut out;
        let r = &self.regs;
        writeln!(w, "{:?} code at {:#x}", self.flavour, self.start).expect("string");
        let mut formatter = IntelFormatter::new();
        for range in starts.windows(2) {
            let bytes = &code[range[0]..range[1]];
            let ip = self.start + range[0] as u64;
            let mut text = String::new();
            let mut decoder =
                Decoder::with_ip(self.flavour.bits(), bytes, ip, DecoderOptions::NONE);
            formatter.format(&decoder.decode(), &mut text);
            let spaced: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
            writeln!(w, "  {ip:x}: {:30} {text}", spaced.join(" ")).expect("string");
        }
        for (name, value) in NAMES.iter().zip(r.gpr) {
            write!(w, "  {name}={value:#x}").expect("string");
        }
        writeln!(
            w,
            "\n  rflags={:#x} fs={:#x} gs={:#x} fcw={:#x} fsw={:#x} tags={:#x} mxcsr={:#x}",
            r.rflags, r.fs_base, r.gs_base, r.fpu.fcw, r.fpu.fsw, r.fpu.tags, r.fpu.mxcsr
        )
        .expect("string");
        if uses_vectors(&code, self.flavour.bits()) {
            for (n, z) in r.fpu.zmm.iter().enumerate() {
                writeln!(w, "  zmm{n}={}", hex(z)).expect("string");
            }
            writeln!(w, "  k={:x?}", r.fpu.k).expect("string");
            for (n, s) in r.fpu.st.iter().enumerate() {
                writeln!(w, "  st{n}={}", hex(s)).expect("string");
            }
        }
        for (at, bytes) in &self.patches {
            writeln!(w, "  memory {at:#x}: {}", Hex(bytes)).expect("string");
        }
        out
    }
}

struct Hex<'a>(&'a [u8]);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

fn uses_vectors(code: &[u8], bits: u32) -> bool {
    Decoder::new(bits, code, DecoderOptions::NONE)
        .iter()
        .any(|i| {
            i.is_stack_instruction()
                || (0..i.op_count()).any(|n| {
                    i.op_kind(n) == OpKind::Register
                        && (i.op_register(n).is_vector_register()
                            || i.op_register(n).is_k()
                            || i.op_register(n).is_mm()
                            || i.op_register(n).is_st())
                })
        })
}
