//! Decoding a block, and looking ahead into what follows it.

use super::{LOOKAHEAD, MAX_INSTRUCTIONS, Translator, decode};
use crate::block::Request;
use crate::insn::{Insn, Kind, STATUS};
use crate::layout::Mode;

impl Translator {
    /// Decodes a block into an empty list. True if its last instruction ends it.
    pub(super) fn decode_block(&mut self, request: &Request<'_>, insns: &mut Vec<Insn>) -> bool {
        self.cut = false;
        let mut decoder = decode(request.bytes, request.pc, request.mode, self.amd);
        let mut mode = request.mode;
        let most = if request.crossing {
            1
        } else {
            MAX_INSTRUCTIONS
        };
        while insns.len() < most && decoder.can_decode() {
            let offset = decoder.position() as u16;
            let instr = decoder.decode();
            if instr.is_invalid() {
                let cut = decoder.last_error() == iced_x86::DecoderError::NoMoreBytes;
                if cut || !insns.is_empty() {
                    self.cut = cut;
                    break;
                }
            }
            let insn = Insn::new(instr, offset, mode, &mut self.factory);
            match insn.kind {
                Kind::Stac => mode.0 |= Mode::AC,
                Kind::Clac => mode.0 &= !Mode::AC,
                _ => {}
            }
            let ends = !matches!(
                insn.kind,
                Kind::Copy
                    | Kind::Mem
                    | Kind::Lea
                    | Kind::Nop
                    | Kind::Push
                    | Kind::Pop
                    | Kind::Leave
                    | Kind::Jcc(_)
                    | Kind::Stac
                    | Kind::Clac
                    | Kind::Cli
                    | Kind::Sti
                    | Kind::ReadSegBase
                    | Kind::ReadControl
                    | Kind::ReadSelector
                    | Kind::StoreSelector
                    | Kind::BitString
                    | Kind::WriteSegBase
                    | Kind::Jrcxz(_)
                    | Kind::String
                    | Kind::Cld
                    | Kind::Pause
                    | Kind::Rdtscp
                    | Kind::Pushf
                    | Kind::Popf
                    | Kind::Swapgs
            );
            insns.push(insn);
            if ends {
                return true;
            }
        }
        // Its shadow ends with the next instruction, so the two are not parted.
        match insns.last_mut() {
            Some(last) if last.kind == Kind::Sti => {
                last.kind = Kind::Step;
                self.cut = false;
                true
            }
            _ => false,
        }
    }

    /// Status flags that code at a target in the same page may read before it writes them. Bytes looked at join the block's extent.
    pub(super) fn flags_live_at(
        &self,
        request: &Request<'_>,
        target: u64,
        extent: &mut (u16, u16),
    ) -> u32 {
        if target < request.pc || target - request.pc >= request.bytes.len() as u64 {
            return STATUS;
        }
        let start = (target - request.pc) as usize;
        let mut decoder = decode(&request.bytes[start..], target, request.mode, self.amd);
        let mut undecided = STATUS;
        for _ in 0..LOOKAHEAD {
            if !decoder.can_decode() {
                return STATUS;
            }
            let instr = decoder.decode();
            let insn = Insn::without_registers(instr, 0, request.mode);
            if insn.flags_read & undecided != 0 {
                return STATUS;
            }
            if !matches!(
                insn.kind,
                Kind::Copy
                    | Kind::Mem
                    | Kind::Lea
                    | Kind::Nop
                    | Kind::Push
                    | Kind::Pop
                    | Kind::Leave
            ) {
                return STATUS;
            }
            undecided &= !insn.flags_killed;
            if undecided == 0 {
                extent.1 = extent.1.max((start + decoder.position()) as u16);
                return 0;
            }
        }
        STATUS
    }
}
