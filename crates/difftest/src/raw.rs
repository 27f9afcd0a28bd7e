//! Instructions from random bytes: prefixes that mean nothing, that contradict each other or that come twice, and encodings no assembler would choose.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};

use crate::forms::{self, Level, Use};
use crate::layout::*;
use crate::program::{Flavour, Program, What};
use crate::rng::Rng;
use crate::single::{aligned_alike, place};
use crate::state::Regs;

/// A program with one instruction; `None` where the bytes are none that is tested.
pub fn generate(flavour: Flavour, level: Level, rng: &mut Rng) -> Option<Program> {
    let long = flavour != Flavour::User32;
    let mut bytes = Vec::new();
    for _ in 0..rng.below(4) {
        bytes.push(rng.pick(&[0x66, 0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x3e, 0x26, 0x36, 0xf0]));
    }
    if long && rng.one_in(3) {
        bytes.push(0x40 | rng.below(16) as u8);
    }
    match rng.below(6) {
        _ if level == Level::V4 && !rng.one_in(4) => {
            bytes.clear();
            // Reserved bits mostly as they must be.
            let (p0, p1) = (rng.bits() as u8, rng.bits() as u8);
            let (set, clear) = if rng.one_in(8) { (0, 0) } else { (4, 8) };
            bytes.extend([0x62, p0 & !clear, p1 | set, rng.bits() as u8]);
        }
        0 | 1 => {}
        2 => bytes.push(0x0f),
        3 => bytes.extend([0x0f, 0x38]),
        4 => bytes.extend([0x0f, 0x3a]),
        _ => {
            bytes.clear();
            let map = rng.range(1, 4) as u8;
            // VEX.W means nothing to general registers of 32-bit code, or makes the encoding undefined: it depends on the vendor.
            let second = rng.bits() as u8 & if long { 0xff } else { 0x7f };
            bytes.extend([0xc4, rng.bits() as u8 & 0xe0 | map, second]);
        }
    }
    for _ in 0..10 {
        bytes.push(rng.bits() as u8);
    }
    let base = if long && rng.one_in(2) { HIGH } else { LOW };
    let start = base + CODE + 0x100;
    let mut decoder = Decoder::with_ip(flavour.bits(), &bytes, start, DecoderOptions::NONE);
    let i = decoder.decode();
    bytes.truncate(i.len());
    let used = forms::classify(i.code(), level);
    if i.is_invalid() || used == Use::No || used == Use::Alone && flavour == Flavour::Kernel64 {
        return None;
    }
    // With REX.B, F3 90 exchanges registers; the decoder takes it for PAUSE, and no compiler makes it.
    if i.mnemonic() == Mnemonic::Pause && bytes.len() > 2 {
        return None;
    }
    let mut regs = Regs::random(level, rng);
    regs.gpr[4] = base + STACK + PAGE;
    regs.gpr[1] &= 0xff;
    for r in [6, 7] {
        regs.gpr[r] = base + DATA + 64 + rng.below(3 * PAGE);
    }
    aim(&i, &mut regs, base + DATA + 64 + rng.below(3 * PAGE))?;
    if !aligned_alike(&i) {
        regs.rflags &= !(1 << 18);
    }
    let mut program = Program::new(flavour, start, regs);
    program.push(What::Bytes(bytes));
    let relative = i.is_ip_rel_memory_operand();
    if !relative {
        place(&mut program, rng);
    }
    Some(program)
}

/// Sets the registers of a memory operand so that it lies at an address. `None` where they cannot.
fn aim(i: &Instruction, regs: &mut Regs, target: u64) -> Option<()> {
    if !(0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory) {
        return Some(());
    }
    let (base, index) = (i.memory_base(), i.memory_index());
    if i.is_vsib() || base.full_register() == index.full_register() {
        return None;
    }
    if base.is_gpr() {
        let scaled = if index.is_gpr() {
            regs.gpr[index.number()] &= 0xfff;
            regs.gpr[index.number()] * u64::from(i.memory_index_scale())
        } else {
            0
        };
        let to = target
            .wrapping_sub(i.memory_displacement64())
            .wrapping_sub(scaled);
        regs.gpr[base.number()] = to;
    }
    Some(())
}
