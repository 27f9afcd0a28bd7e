//! One instruction at a time: every form, with random operands, in random places.

use iced_x86::{Code, Instruction, Mnemonic, Register};

use crate::forms::{self, Level};
use crate::layout::*;
use crate::operands::{Builder, Rules};
use crate::program::{Flavour, Program};
use crate::rng::Rng;
use crate::state::Regs;

/// A program with one instruction of the given form. `None` where the operands drawn do not go together.
pub fn generate(code: Code, flavour: Flavour, level: Level, rng: &mut Rng) -> Option<Program> {
    let base = if flavour == Flavour::User32 || rng.one_in(2) {
        LOW
    } else {
        HIGH
    };
    let mut regs = Regs::random(level, rng);
    regs.gpr[4] = base + STACK + PAGE + rng.below(64) * 8 - 256;
    if rng.one_in(12) {
        // The stack's ends.
        regs.gpr[4] = base + STACK + rng.pick(&[0, 2 * PAGE]) + rng.below(12);
    }
    let instruction = Builder {
        rng: &mut *rng,
        regs: &mut regs,
        flavour,
        base,
        rules: Rules::default(),
    }
    .build(code)?;
    if flavour == Flavour::User64 && aligned_alike(&instruction) && rng.one_in(40) {
        regs.rflags |= 1 << 18;
    }
    // A gather may be stopped between two elements.
    if flavour != Flavour::Kernel64 && !instruction.is_vsib() && rng.one_in(40) {
        regs.rflags |= 1 << 8;
    }
    if rng.one_in(16) {
        regs.rflags |= 1 << 16;
    }
    let mut program = Program::new(flavour, base + CODE + 0x100, regs);
    if rng.one_in(3) {
        before(&mut program, rng);
    }
    program.instruction(instruction);
    if rng.one_in(3) && forms::loose_flags(code) == 0 {
        after(&mut program, rng);
    }
    place(&mut program, rng);
    Some(program)
}

/// Whether all processors agree on how its memory operand must be aligned where alignment is checked.
pub fn aligned_alike(i: &Instruction) -> bool {
    use Mnemonic as M;
    i.memory_size().size() <= 8
        && !i.is_vsib()
        && i.op_mask() == Register::None
        && !matches!(i.mnemonic(), M::Enter | M::Maskmovq | M::Movsxd)
}

/// Something that gives all flags new values.
fn before(program: &mut Program, rng: &mut Rng) {
    let (a, b) = (rng.below(8) as u32, rng.below(8) as u32);
    let code = rng.pick(&[Code::Cmp_r32_rm32, Code::Test_rm32_r32]);
    let i = Instruction::with2(code, Register::EAX + a, Register::EAX + b);
    program.instruction(i.expect("two registers"));
}

/// Something that reads flags, or makes them unimportant.
fn after(program: &mut Program, rng: &mut Rng) {
    let eax = Register::EAX;
    let i = match rng.below(5) {
        0 => Instruction::with1(Code::Setbe_rm8, Register::AL),
        1 => Instruction::with2(Code::Adc_r32_rm32, eax, Register::EDX),
        2 => Instruction::with2(Code::Cmovl_r32_rm32, eax, Register::EBX),
        3 => Instruction::with2(Code::Xor_r32_rm32, eax, Register::ESI),
        _ => Instruction::with2(Code::Imul_r32_rm32, eax, Register::EDI),
    };
    program.instruction(i.expect("operands that fit"));
}

/// Chooses where the code lies: anywhere in its page, across two pages, or running over the end of the last one.
pub fn place(program: &mut Program, rng: &mut Rng) {
    let base = crate::program::window(program.start);
    let region = base
        + if program.start >= base + PATCHABLE {
            PATCHABLE
        } else {
            CODE
        };
    let Some((code, _)) = program.encode() else {
        return;
    };
    let len = code.len() as u64;
    // RIP-relative operands keep their targets, which are absolute here.
    program.start = match rng.below(8) {
        0 | 1 => region + PAGE - rng.below(len),
        2 => region + 2 * PAGE - rng.below(len),
        _ => region + rng.below(2 * PAGE - len),
    };
}
