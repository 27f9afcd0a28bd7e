//! Turns a form into an instruction with random operands, and arranges the registers so that its memory operand is where it should be.

use iced_x86::{
    Code, EncodingKind, Instruction, MemoryOperand, Mnemonic as M, OpCodeOperandKind as K, OpKind,
    Register, RoundingControl,
};

use crate::layout::*;
use crate::program::Flavour;
use crate::rng::Rng;
use crate::state::Regs;

/// Where a memory operand goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Somewhere in memory that is readable and writable.
    Good,
    /// Anywhere: page ends, memory that is read-only or missing, addresses that are no addresses.
    Any,
}

/// Registers that a block reserves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// Bit mask of registers that hold good data addresses; if not zero, memory operands are based on them.
    pub pointers: u16,
    pub target: Option<Target>,
}

pub struct Builder<'a> {
    pub rng: &'a mut Rng,
    pub regs: &'a mut Regs,
    pub flavour: Flavour,
    pub base: u64,
    pub rules: Rules,
}

pub fn gpr(n: u8, size: usize) -> Register {
    let first = match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    if size == 1 {
        // SPL to DIL stand behind the four high-byte registers.
        return Register::AL
            + if n < 4 {
                u32::from(n)
            } else {
                u32::from(n) + 4
            };
    }
    first + u32::from(n)
}

impl Builder<'_> {
    fn long(&self) -> bool {
        self.flavour.bits() == 64
    }

    fn any_gpr(&mut self, size: usize) -> Register {
        if size == 1 && self.rng.one_in(5) {
            return Register::AH + self.rng.below(4) as u32;
        }
        let n = if self.long() { 16 } else { 8 };
        let mut r = self.rng.below(n) as u8;
        if !self.long() && size == 1 {
            r &= 3;
        }
        if r == 4 && !self.rng.one_in(8) {
            r = 0;
        }
        gpr(r, size)
    }

    fn vector(&mut self, first: Register, code: Code) -> Register {
        let n = match (self.long(), code.encoding()) {
            (false, _) => 8,
            (true, EncodingKind::EVEX) => 32,
            (true, _) => 16,
        };
        first + self.rng.below(n) as u32
    }

    /// An instruction of this form; `None` where it has none in this mode.
    pub fn build(&mut self, code: Code) -> Option<Instruction> {
        let op = code.op_code();
        let mut i = Instruction::default();
        i.set_code(code);
        for n in 0..op.op_count() {
            self.operand(&mut i, n, op.op_kind(n))?;
        }
        self.decorate(&mut i)?;
        if op.can_use_lock_prefix() && i.op0_kind() == OpKind::Memory && self.rng.one_in(3) {
            i.set_has_lock_prefix(true);
        }
        if op.can_use_rep_prefix() && crate::forms::is_string(&i) {
            match self.rng.below(3) {
                0 => i.set_has_rep_prefix(true),
                1 if op.can_use_repne_prefix() => i.set_has_repne_prefix(true),
                _ => {}
            }
        }
        Some(i)
    }

    /// What EVEX adds to an instruction: mask, zeroing, broadcast, rounding.
    fn decorate(&mut self, i: &mut Instruction) -> Option<()> {
        let op = i.code().op_code();
        if op.can_use_op_mask_register() && (op.require_op_mask_register() || !self.rng.one_in(3)) {
            i.set_op_mask(Register::K1 + self.rng.below(7) as u32);
            let stores = i.op0_kind() == OpKind::Memory;
            if op.can_use_zeroing_masking() && !stores && self.rng.one_in(2) {
                i.set_zeroing_masking(true);
            }
        }
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if memory && op.can_broadcast() && self.rng.one_in(3) {
            i.set_is_broadcast(true);
        }
        if !memory && op.can_use_rounding_control() && self.rng.one_in(3) {
            i.set_rounding_control(self.rng.pick(&[
                RoundingControl::RoundToNearest,
                RoundingControl::RoundDown,
                RoundingControl::RoundUp,
                RoundingControl::RoundTowardZero,
            ]));
        } else if !memory && op.can_suppress_all_exceptions() && self.rng.one_in(3) {
            i.set_suppress_all_exceptions(true);
        }
        Some(())
    }

    fn operand(&mut self, i: &mut Instruction, n: u32, kind: K) -> Option<()> {
        let (bank, size) = match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => (Register::AL, 1),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => {
                (Register::AX, 2)
            }
            K::r32_or_mem
            | K::r32_reg
            | K::r32_rm
            | K::r32_opcode
            | K::r32_reg_mem
            | K::r32_vvvv => (Register::EAX, 4),
            K::r64_or_mem
            | K::r64_reg
            | K::r64_rm
            | K::r64_opcode
            | K::r64_reg_mem
            | K::r64_vvvv => (Register::RAX, 8),
            K::mm_or_mem | K::mm_reg | K::mm_rm => (Register::MM0, 0),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                (Register::XMM0, 0)
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                (Register::YMM0, 0)
            }
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => (Register::ZMM0, 0),
            K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => (Register::K0, 0),
            _ => return self.other_operand(i, n, kind),
        };
        let memory = matches!(
            kind,
            K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r64_or_mem
                | K::mm_or_mem
                | K::xmm_or_mem
                | K::ymm_or_mem
                | K::zmm_or_mem
                | K::k_or_mem
        );
        if matches!(kind, K::r16_reg_mem | K::r32_reg_mem | K::r64_reg_mem) {
            return None;
        }
        if memory && !self.rng.one_in(3) {
            return self.memory(i, n);
        }
        let register = match (size, bank) {
            (0, Register::MM0 | Register::K0) => bank + self.rng.below(8) as u32,
            (0, _) => self.vector(bank, i.code()),
            _ => self.any_gpr(size),
        };
        i.set_op_kind(n, OpKind::Register);
        i.set_op_register(n, register);
        Some(())
    }

    fn other_operand(&mut self, i: &mut Instruction, n: u32, kind: K) -> Option<()> {
        let fixed = match kind {
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::dx => Register::DX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::st0 => Register::ST0,
            K::es => Register::ES,
            K::cs => Register::CS,
            K::ss => Register::SS,
            K::ds => Register::DS,
            K::fs => Register::FS,
            K::gs => Register::GS,
            K::sti_opcode => Register::ST0 + self.rng.below(8) as u32,
            K::seg_reg => Register::ES + self.rng.below(6) as u32,
            K::cr_reg => Register::CR0 + self.rng.pick(&[0u32, 2, 3, 4]),
            K::dr_reg => Register::DR0 + self.rng.pick(&[0u32, 6, 7]),
            _ => Register::None,
        };
        if fixed != Register::None {
            i.set_op_kind(n, OpKind::Register);
            i.set_op_register(n, fixed);
            return Some(());
        }
        let v = self.rng.value();
        let wide = self.long() && !self.rng.one_in(4);
        match kind {
            K::mem => return self.memory(i, n),
            K::mem_offs => return self.direct(i, n),
            K::mem_vsib32x | K::mem_vsib64x => return self.gather(i, n, Register::XMM0),
            K::mem_vsib32y | K::mem_vsib64y => return self.gather(i, n, Register::YMM0),
            K::mem_vsib32z | K::mem_vsib64z => return self.gather(i, n, Register::ZMM0),
            K::imm4_m2z => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8((v & 3) as u8);
            }
            K::imm8 => {
                // A second 8-bit immediate (ENTER, EXTRQ) has its own kind.
                if (0..n).any(|k| matches!(i.op_kind(k), OpKind::Immediate8 | OpKind::Immediate16))
                {
                    i.set_op_kind(n, OpKind::Immediate8_2nd);
                    i.set_immediate8_2nd((v & 3) as u8);
                } else {
                    i.set_op_kind(n, OpKind::Immediate8);
                    i.set_immediate8(v as u8);
                }
            }
            K::imm8_const_1 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(1);
            }
            K::imm8sex16 => {
                i.set_op_kind(n, OpKind::Immediate8to16);
                i.set_immediate8to16(i16::from(v as i8));
            }
            K::imm8sex32 => {
                i.set_op_kind(n, OpKind::Immediate8to32);
                i.set_immediate8to32(i32::from(v as i8));
            }
            K::imm8sex64 => {
                i.set_op_kind(n, OpKind::Immediate8to64);
                i.set_immediate8to64(i64::from(v as i8));
            }
            K::imm16 => {
                i.set_op_kind(n, OpKind::Immediate16);
                i.set_immediate16(if i.code().mnemonic() == M::Enter {
                    (v & 0x1ff) as u16
                } else {
                    v as u16
                });
            }
            K::imm32 => {
                i.set_op_kind(n, OpKind::Immediate32);
                i.set_immediate32(v as u32);
            }
            K::imm32sex64 => {
                i.set_op_kind(n, OpKind::Immediate32to64);
                i.set_immediate32to64(i64::from(v as i32));
            }
            K::imm64 => {
                i.set_op_kind(n, OpKind::Immediate64);
                i.set_immediate64(v);
            }
            K::seg_rSI => {
                i.set_op_kind(
                    n,
                    if wide {
                        OpKind::MemorySegRSI
                    } else {
                        OpKind::MemorySegESI
                    },
                );
                self.point(6, wide);
            }
            K::es_rDI => {
                let other = (0..n).any(|k| i.op_kind(k) == OpKind::MemorySegESI);
                let same = (0..n).any(|k| i.op_kind(k) == OpKind::MemorySegRSI);
                let wide = same || wide && !other;
                i.set_op_kind(
                    n,
                    if wide {
                        OpKind::MemoryESRDI
                    } else {
                        OpKind::MemoryESEDI
                    },
                );
                self.point(7, wide);
                self.regs.gpr[1] = match self.rng.below(6) {
                    0 => 0,
                    1 => self.rng.below(6000),
                    _ => self.rng.below(40),
                };
            }
            K::seg_rDI => {
                i.set_op_kind(
                    n,
                    if wide {
                        OpKind::MemorySegRDI
                    } else {
                        OpKind::MemorySegEDI
                    },
                );
                self.point(7, wide);
            }
            K::seg_rBX_al => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(if wide { Register::RBX } else { Register::EBX });
                i.set_memory_index(Register::AL);
                i.set_memory_index_scale(1);
                self.point(3, wide);
            }
            _ => return None,
        }
        Some(())
    }

    /// Makes a register a plain pointer, with noise above where only its low half counts.
    fn point(&mut self, register: usize, wide: bool) {
        let mut at = self.target();
        if !wide && self.long() {
            at = at & 0xffff_ffff | self.rng.bits() << 32;
        }
        self.regs.gpr[register] = at;
    }

    /// An address for a memory operand.
    pub fn target(&mut self) -> u64 {
        let base = self.base;
        let data = base + DATA;
        let good = |rng: &mut Rng| {
            let at = data + 128 + rng.below(4 * PAGE - 320);
            if rng.one_in(3) { at } else { at & !63 }
        };
        if self.rules.target == Some(Target::Good) || !self.rng.one_in(3) {
            return good(self.rng);
        }
        let near = self.rng.below(64);
        match self.rng.below(13) {
            0..=2 => data + PAGE * self.rng.range(1, 4) - near,
            3 => base + READ_ONLY - near,
            4 => base + READ_ONLY + self.rng.below(PAGE - 64),
            5 => base + READ_ONLY + PAGE - near,
            6 => base + READ_ONLY + PAGE + self.rng.below(4 * PAGE),
            7 => data - near,
            8 => base + CODE + self.rng.below(2 * PAGE - 64),
            9 => base + STACK + self.rng.below(2 * PAGE),
            10 => base + PATCHABLE + self.rng.below(2 * PAGE - 64),
            11 if self.long() => self.rng.pick(&[
                0x8000_0000_0000_0000,
                0x1234_5678_9abc_def0,
                0x0000_8000_0000_0000,
                0xffff_7fff_ffff_fff8,
                0xffff_9000_0000_0010,
                0x0000_7fff_ffff_fff9,
                0xfeed_face_cafe_0000,
            ]),
            _ => good(self.rng),
        }
    }

    fn direct(&mut self, i: &mut Instruction, n: u32) -> Option<()> {
        let at = self.target();
        i.set_op_kind(n, OpKind::Memory);
        i.set_memory_displacement64(at);
        i.set_memory_displ_size(if self.long() { 8 } else { 4 });
        Some(())
    }

    fn displacement(&mut self) -> i64 {
        match self.rng.below(3) {
            0 => 0,
            1 => i64::from(self.rng.bits() as i8),
            _ => i64::from(self.rng.bits() as i32 >> self.rng.below(20)),
        }
    }

    /// A general memory operand, with the registers that it is made of set accordingly.
    fn memory(&mut self, i: &mut Instruction, n: u32) -> Option<()> {
        if self.rules.pointers != 0 {
            return self.memory_by_pointer(i, n);
        }
        let target = self.target();
        let wide = self.long() && !self.rng.one_in(8);
        let size = if wide { 8 } else { 4 };
        let mut operand = MemoryOperand::new(
            Register::None,
            Register::None,
            1,
            0,
            1,
            false,
            Register::None,
        );
        let mut left = target;
        if self.long() && self.rng.one_in(8) {
            let segment = self.rng.below(2);
            let offset = self.rng.bits() & 0xfff0 | self.rng.pick(&[0, 0x7fff_0000, 1 << 32]);
            left = if wide { offset } else { offset & 0xffff_ffff };
            let value = target.wrapping_sub(left);
            if (value << 16) as i64 >> 16 != value as i64 {
                return None;
            }
            if segment == 0 {
                self.regs.fs_base = value;
                operand.segment_prefix = Register::FS;
            } else {
                self.regs.gs_base = value;
                operand.segment_prefix = Register::GS;
            }
        }
        let shape = self.rng.below(10);
        if shape == 0 && operand.segment_prefix == Register::None {
            // No register at all: RIP-relative in 64-bit code.
            if self.long() && (left >= 1 << 31 || self.rng.one_in(2)) {
                if left.abs_diff(self.base) > 0x4000_0000 {
                    return None;
                }
                operand.base = Register::RIP;
            }
            operand.displacement = left as i64;
            operand.displ_size = if self.long() { 8 } else { 4 };
            if !self.long() {
                operand.displacement = i64::from(left as i32);
            }
            return self.set_memory(i, n, operand);
        }
        let disp = self.displacement();
        operand.displacement = disp;
        operand.displ_size = match disp {
            0 => u32::from(self.rng.one_in(4)),
            -128..=127 => 1,
            _ => size as u32,
        };
        left = left.wrapping_sub(disp as u64);
        let mut base = self.any_gpr(size);
        if shape < 4 {
            let index = self.any_gpr(size);
            if index.number() == 4 || index == base {
                return None;
            }
            operand.index = index;
            operand.scale = self.rng.pick(&[1, 2, 4, 8]);
            let mut v = match self.rng.below(3) {
                0 => self.rng.bits(),
                1 => self.rng.below(64),
                _ => 0u64.wrapping_sub(self.rng.below(64)),
            };
            if shape == 1 {
                // No base.
                base = Register::None;
                v = left / u64::from(operand.scale);
                operand.displacement += (left % u64::from(operand.scale)) as i64;
                operand.displ_size = size as u32;
                if i32::try_from(operand.displacement).is_err() {
                    return None;
                }
            }
            self.regs.gpr[index.number()] = v;
            left = left.wrapping_sub(v.wrapping_mul(u64::from(operand.scale)));
        }
        operand.base = base;
        if base != Register::None {
            if !wide && self.long() {
                left = left & 0xffff_ffff | self.rng.bits() << 32;
            }
            self.regs.gpr[base.number()] = left;
        }
        self.set_memory(i, n, operand)
    }

    fn memory_by_pointer(&mut self, i: &mut Instruction, n: u32) -> Option<()> {
        let candidates: Vec<u8> = (0..16)
            .filter(|r| self.rules.pointers >> r & 1 != 0)
            .collect();
        let size = if self.long() { 8 } else { 4 };
        let base = gpr(self.rng.pick(&candidates), size);
        let mut disp = match self.rng.below(4) {
            0 => 0,
            1 => i64::from(self.rng.bits() as i8),
            2 => (self.rng.below(256) as i64 - 128) * 8,
            _ => self.rng.below(6000) as i64 - 3000,
        };
        i.set_op_kind(n, OpKind::Memory);
        if i.memory_size().size() >= 16 && !self.rng.one_in(16) {
            disp &= !31;
        }
        let mut operand = MemoryOperand::with_base_displ(base, disp);
        operand.displ_size = match disp {
            0 => 0,
            -128..=127 => 1,
            _ => size as u32,
        };
        if self.rng.one_in(8) && self.long() {
            operand.base = Register::RIP;
            operand.displacement = self.target() as i64;
            operand.displ_size = 8;
        }
        self.set_memory(i, n, operand)
    }

    fn set_memory(&mut self, i: &mut Instruction, n: u32, m: MemoryOperand) -> Option<()> {
        i.set_op_kind(n, OpKind::Memory);
        i.set_memory_base(m.base);
        i.set_memory_index(m.index);
        i.set_memory_index_scale(m.scale);
        i.set_memory_displacement64(m.displacement as u64);
        i.set_memory_displ_size(m.displ_size);
        i.set_segment_prefix(m.segment_prefix);
        Some(())
    }

    /// An operand with an index in each element of a vector register.
    fn gather(&mut self, i: &mut Instruction, n: u32, bank: Register) -> Option<()> {
        let base = self.any_gpr(if self.long() { 8 } else { 4 });
        if base.number() == 4 {
            return None;
        }
        let index = self.vector(bank, i.code());
        let scale = self.rng.pick(&[1u32, 2, 4, 8]);
        let mut at = self.target();
        let words = matches!(
            i.code().op_code().op_kind(n),
            K::mem_vsib32x | K::mem_vsib32y | K::mem_vsib32z
        );
        let element = if words { 4 } else { 8 };
        let lanes = &mut self.regs.fpu.zmm[index.number()][..index.size().max(32)];
        for lane in lanes.chunks_exact_mut(element) {
            let v = (self.rng.below(200) as i64 - 100) as u64;
            lane.copy_from_slice(&v.to_le_bytes()[..element]);
        }
        if self.rng.one_in(2) {
            at = self.base + DATA + 2048;
        }
        self.regs.gpr[base.number()] = at;
        let mut operand = MemoryOperand::with_base_displ(base, 0);
        operand.index = index;
        operand.scale = scale;
        self.set_memory(i, n, operand)
    }
}
