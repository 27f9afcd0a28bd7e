//! From an instruction that has been changed to its bytes.

use iced_x86::{Code, Encoder, Instruction, OpKind, Register};

use super::{Translator, bit};
use crate::asm::{Asm, RAX, RCX, RDX, RSP};
use crate::insn::gpr;

/// Points the instruction's memory operand at `[base + disp]`.
pub(super) fn redirect(instr: &mut Instruction, base: u8, disp: i32) {
    instr.set_segment_prefix(Register::None);
    instr.set_memory_base(reg64(base));
    instr.set_memory_index(Register::None);
    instr.set_memory_index_scale(1);
    instr.set_memory_displacement64(disp as i64 as u64);
    instr.set_memory_displ_size(if disp == 0 { 0 } else { 8 });
    // The forms with a bare address have no base register; the general ones mean the same.
    match instr.code() {
        Code::Mov_AL_moffs8 => instr.set_code(Code::Mov_r8_rm8),
        Code::Mov_AX_moffs16 => instr.set_code(Code::Mov_r16_rm16),
        Code::Mov_EAX_moffs32 => instr.set_code(Code::Mov_r32_rm32),
        Code::Mov_RAX_moffs64 => instr.set_code(Code::Mov_r64_rm64),
        Code::Mov_moffs8_AL => instr.set_code(Code::Mov_rm8_r8),
        Code::Mov_moffs16_AX => instr.set_code(Code::Mov_rm16_r16),
        Code::Mov_moffs32_EAX => instr.set_code(Code::Mov_rm32_r32),
        Code::Mov_moffs64_RAX => instr.set_code(Code::Mov_rm64_r64),
        _ => {}
    }
}

/// Re-encodes for 64-bit mode; 32-bit code's one-byte INC and DEC have no encoding there and take the long form. `None` for what 64-bit mode does
/// not have at all.
pub(super) fn encode_into(
    encoder: &mut Encoder,
    asm: &mut Asm,
    mut instr: Instruction,
) -> Option<()> {
    match instr.code() {
        Code::Inc_r32 => instr.set_code(Code::Inc_rm32),
        Code::Dec_r32 => instr.set_code(Code::Dec_rm32),
        Code::Inc_r16 => instr.set_code(Code::Inc_rm16),
        Code::Dec_r16 => instr.set_code(Code::Dec_rm16),
        _ => {}
    }
    let before = asm.pos();
    encoder.set_buffer(std::mem::take(&mut asm.buf));
    let encoded = encoder.encode(&instr, 0);
    asm.buf = encoder.take_buffer();
    if encoded.is_err() {
        asm.buf.truncate(before);
        return None;
    }
    Some(())
}

impl Translator {
    /// Encodes code that runs one instruction with its memory operand (if any) at the address in the frame's operand slot and then leaves through the
    /// `native` stub. `None` where the instruction has no such form.
    pub fn native_snippet(&mut self, instr: &Instruction, cache_pos: i64) -> Option<Vec<u8>> {
        let mut asm = Asm::default();
        let mut copy = *instr;
        let has_memory = (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory);
        let mut saved = None;
        if has_memory {
            let mut used = bit(RSP);
            for r in self.factory.info(instr).used_registers() {
                if let Some(n) = gpr(r.register()) {
                    used |= bit(n);
                }
            }
            let base = [RAX, RCX, RDX, 3, 6, 7, 5]
                .into_iter()
                .find(|&r| used & bit(r) == 0)?;
            asm.load(base, self.layout.operand);
            redirect(&mut copy, base, 0);
            saved = Some(base);
        }
        encode_into(&mut self.snippet_encoder, &mut asm, copy)?;
        if let Some(base) = saved {
            asm.load(base, self.layout.gpr + 8 * i32::from(base));
        }
        let at = asm.jmp();
        asm.patch_rel32(at, self.stubs.native - cache_pos);
        Some(asm.buf)
    }
}

pub(super) fn reg64(n: u8) -> Register {
    const REGS: [Register; 16] = [
        Register::RAX,
        Register::RCX,
        Register::RDX,
        Register::RBX,
        Register::RSP,
        Register::RBP,
        Register::RSI,
        Register::RDI,
        Register::R8,
        Register::R9,
        Register::R10,
        Register::R11,
        Register::R12,
        Register::R13,
        Register::R14,
        Register::R15,
    ];
    REGS[usize::from(n)]
}

pub(super) fn reg32(n: u8) -> Register {
    const REGS: [Register; 16] = [
        Register::EAX,
        Register::ECX,
        Register::EDX,
        Register::EBX,
        Register::ESP,
        Register::EBP,
        Register::ESI,
        Register::EDI,
        Register::R8D,
        Register::R9D,
        Register::R10D,
        Register::R11D,
        Register::R12D,
        Register::R13D,
        Register::R14D,
        Register::R15D,
    ];
    REGS[usize::from(n)]
}
