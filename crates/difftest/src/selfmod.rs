//! Programs that change their own code: the next instruction, one in a loop, the target of a jump, through the same address or another.

use iced_x86::{Code, Instruction, MemoryOperand, Register};

use crate::blocks::{Writer, any_window};
use crate::forms::Level;
use crate::layout::*;
use crate::operands::gpr;
use crate::program::{Flavour, Program, What};
use crate::rng::Rng;
use crate::single::place;

/// A random program that changes itself.
pub fn generate(flavour: Flavour, level: Level, rng: &mut Rng) -> Option<Program> {
    let base = any_window(flavour, rng);
    generate_at(base, flavour, level, rng)
}

/// The same in a window.
pub fn generate_at(base: u64, flavour: Flavour, level: Level, rng: &mut Rng) -> Option<Program> {
    let mut w = Writer::new(base, flavour, level, PATCHABLE, rng);
    // The stack pointer stays where it is, and code in the loop is changed once in each round.
    let rounds = w.rng.range(1, 5) as u32;
    let counter = Register::MM7;
    w.emit(Instruction::with2(Code::Mov_r32_imm32, gpr(0, 4), rounds));
    w.emit(Instruction::with2(Code::Movd_mm_rm32, counter, gpr(0, 4)));
    let top = w.program.next_id();
    for _ in 0..w.rng.range(1, 5) {
        for _ in 0..w.rng.below(3) {
            w.plain_integer();
        }
        w.change();
    }
    w.plain_integer();
    // The counter lives where no other instruction here goes.
    w.emit(Instruction::with2(Code::Movd_rm32_mm, gpr(0, 4), counter));
    w.emit(Instruction::with2(Code::Sub_rm32_imm8, gpr(0, 4), 1u32));
    w.emit(Instruction::with2(Code::Movd_mm_rm32, counter, gpr(0, 4)));
    let jump = w.pick(Code::Jg_rel32_64, Code::Jg_rel32_32);
    w.program.push(What::Branch(jump, top));
    let Writer {
        mut program, rng, ..
    } = w;
    place(&mut program, rng);
    Some(program)
}

impl Writer<'_> {
    fn plain_integer(&mut self) {
        let (a, b) = (self.rng.pick(&[0u8, 1, 2]), self.rng.pick(&[0u8, 1, 2]));
        let code = self.rng.pick(&[
            Code::Add_r32_rm32,
            Code::Xor_r32_rm32,
            Code::Adc_r32_rm32,
            Code::Imul_r32_rm32,
            Code::Cmp_r32_rm32,
        ]);
        self.emit(Instruction::with2(code, gpr(a, 4), gpr(b, 4)));
    }

    /// An instruction that is changed, and the store that changes it, before or behind.
    fn change(&mut self) {
        let before = self.rng.one_in(2);
        // The store's item and those between come first, so the target's number is known.
        let between = self.rng.below(3) as u32;
        let id = self.program.next_id();
        let target = if before { id + 1 + between } else { id };
        let kind = self.rng.below(5);
        if before {
            self.store(target, kind);
            for _ in 0..between {
                self.plain_integer();
            }
            self.victim(kind);
        } else {
            self.victim(kind);
            for _ in 0..between {
                self.plain_integer();
            }
            self.store(target, kind);
        }
    }

    fn victim(&mut self, kind: u64) {
        let r = self.rng.below(3) as u8;
        let bytes = match kind {
            // MOV r32, imm32; ADD EAX, imm32.
            0 | 1 => vec![0xb8 + r, 1, 2, 3, 4],
            2 => vec![0x05, 9, 0, 0, 0],
            // INC r32.
            3 => vec![0xff, 0xc0 + r],
            // A jump over none of three LEAs that count up.
            _ => vec![0xeb, 0, 0x8d, 0x40, 1, 0x8d, 0x49, 1, 0x8d, 0x52, 1],
        };
        self.program.push(What::Bytes(bytes));
    }

    fn store(&mut self, target: u32, kind: u64) {
        let alias = if self.rng.one_in(4) {
            ALIAS - PATCHABLE
        } else {
            0
        };
        let offset = match kind {
            0..=2 => self.rng.range(1, 5),
            _ => 1,
        };
        let to = if self.program.flavour == Flavour::User32 {
            MemoryOperand::with_displ(0, 4)
        } else {
            MemoryOperand::with_base_displ_size(Register::RIP, 0, 8)
        };
        let i = match kind {
            0 if self.rng.one_in(2) => {
                // All four bytes of the immediate.
                let i = Instruction::with2(Code::Mov_rm32_r32, to, gpr(1, 4));
                let i = i.expect("memory and register");
                self.program.push(What::AddressOf(i, target, 1 + alias));
                return;
            }
            0 => Instruction::with2(Code::Mov_rm8_r8, to, Register::CL),
            1 => Instruction::with2(Code::Add_rm8_imm8, to, self.rng.below(256) as u32),
            2 => {
                let mut i = Instruction::with2(Code::Xor_rm8_imm8, to, 0x55u32);
                if let Ok(i) = &mut i {
                    i.set_has_lock_prefix(true);
                }
                i
            }
            // INC becomes DEC and back.
            3 => Instruction::with2(Code::Xor_rm8_imm8, to, 8u32),
            _ => Instruction::with2(Code::Mov_rm8_imm8, to, self.rng.pick(&[0u32, 3, 6, 9])),
        };
        let i = i.expect("operands that fit");
        self.program
            .push(What::AddressOf(i, target, offset + alias));
    }
}
