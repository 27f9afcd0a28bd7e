//! Instructions that save and load the whole x87 and vector state.
//!
//! What they show of the machine and not of the program is overwritten before it is compared: instruction and data pointers, the mask of MXCSR.

use iced_x86::{Code, Instruction, MemoryOperand, Register};

use crate::forms::Level;
use crate::layout::*;
use crate::program::{Flavour, Program};
use crate::rng::Rng;
use crate::state::{Fpu, Regs, XSAVE_HEADER, image_bytes};

/// Ranges of an image that are not compared, as offset and number of 4-byte words.
type Hidden = &'static [(i64, u32)];

const NONE: Hidden = &[];
const LEGACY: Hidden = &[(8, 4), (28, 1)];
const ENVIRONMENT: Hidden = &[(12, 4)];
const SMALL_ENVIRONMENT: Hidden = &[(6, 2)];

const FORMS: [(Code, Hidden); 19] = [
    (Code::Fxsave_m512byte, LEGACY),
    (Code::Fxsave64_m512byte, LEGACY),
    (Code::Fxrstor_m512byte, NONE),
    (Code::Fxrstor64_m512byte, NONE),
    (Code::Xsave_mem, LEGACY),
    (Code::Xsave64_mem, LEGACY),
    (Code::Xsaveopt_mem, LEGACY),
    (Code::Xsavec_mem, LEGACY),
    (Code::Xsavec64_mem, LEGACY),
    (Code::Xrstor_mem, NONE),
    (Code::Xrstor_mem, NONE),
    (Code::Xrstor64_mem, NONE),
    (Code::Fnstenv_m28byte, ENVIRONMENT),
    (Code::Fnstenv_m14byte, SMALL_ENVIRONMENT),
    (Code::Fldenv_m28byte, NONE),
    (Code::Fldenv_m14byte, NONE),
    (Code::Fnsave_m108byte, ENVIRONMENT),
    (Code::Frstor_m108byte, NONE),
    (Code::Frstor_m94byte, NONE),
];

/// A program with one such instruction.
pub fn generate(flavour: Flavour, level: Level, rng: &mut Rng) -> Option<Program> {
    let (code, hidden) = rng.pick(&FORMS);
    let op = code.op_code();
    let long = flavour != Flavour::User32;
    if !if long { op.mode64() } else { op.mode32() } {
        return None;
    }
    let base = if long && rng.one_in(2) { HIGH } else { LOW };
    let mut regs = Regs::random(level, rng);
    let mut at = base + DATA + 64 * rng.below(200);
    if rng.one_in(8) {
        at += rng.pick(&[1, 4, 8, 16, 32]);
    }
    regs.gpr[3] = at;
    regs.gpr[0] = components(level, rng);
    regs.gpr[2] = 0;
    let mut program = Program::new(flavour, base + CODE + 0x200, regs);
    let pointer = if long { Register::RBX } else { Register::EBX };
    let i = Instruction::with1(code, MemoryOperand::with_base(pointer));
    program.instruction(i.ok()?);
    for &(offset, words) in hidden {
        for n in 0..i64::from(words) {
            let word = MemoryOperand::with_base_displ(pointer, offset + 4 * n);
            program.instruction(Instruction::with2(Code::Mov_rm32_imm32, word, 0u32).ok()?);
        }
    }
    // The opcode lies beside the tags.
    if !hidden.is_empty() && hidden[0] == LEGACY[0] {
        let word = MemoryOperand::with_base_displ(pointer, 6);
        program.instruction(Instruction::with2(Code::Mov_rm16_imm16, word, 0u32).ok()?);
    }
    if at & 63 == 0 {
        program.patches.push((at, image(level, rng)));
    }
    Some(program)
}

/// Some of the components that can be enabled.
fn components(level: Level, rng: &mut Rng) -> u64 {
    rng.bits() & level.xcr0()
}

/// An image to load: valid, or with something in it that must be refused.
fn image(level: Level, rng: &mut Rng) -> Vec<u8> {
    let mut image = Fpu::random(level, rng).to_image().to_vec();
    image.truncate(image_bytes(level));
    image[XSAVE_HEADER] = components(level, rng) as u8;
    match rng.below(16) {
        0 => image[26] = rng.pick(&[1, 4, 0x80]),
        1 => image[XSAVE_HEADER + rng.range(1, 64) as usize] = rng.bits() as u8,
        2 => image[XSAVE_HEADER + 15] = 0x80,
        3 => {
            image[XSAVE_HEADER + 15] = 0x80;
            image[XSAVE_HEADER + 8] = image[XSAVE_HEADER] | components(level, rng) as u8;
        }
        _ => {}
    }
    image
}
