//! Code off the hot path: what happens when a check fails or a jump leaves.

use super::{ColdKind, Flags, Tag, Work};
use crate::block::{ChainSite, Resume};
use crate::insn::{Kind, STATUS};
use crate::layout::Mode;

impl Work<'_> {
    pub(super) fn cold_paths(&mut self) {
        for cold in std::mem::take(&mut self.cold) {
            let here = self.asm.pos() as i64;
            self.spilled = cold.spilled;
            self.flags = cold.flags;
            self.resume = cold.resume;
            match cold.kind {
                ColdKind::Mem {
                    reg,
                    tag,
                    info,
                    site,
                } => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    match tag {
                        Tag::Indexed { index, offset } => {
                            self.asm.xor_mem_base(reg, index, offset);
                        }
                        Tag::Fixed { offset } => self.asm.xor_mem(reg, offset),
                    }
                    self.asm.store(self.layout.exit_ea, reg);
                    self.unspill(!0);
                    self.asm.store_imm32(self.layout.exit_arg, site);
                    self.asm.store_imm32(self.layout.exit_info, info);
                    self.jmp_stub(self.stubs.mem);
                }
                ColdKind::Chain { target } => {
                    self.note();
                    let site = if cold.spilled == 0 {
                        // The hot jump itself is what will be connected.
                        self.asm.patch_rel32(cold.from, here);
                        cold.from
                    } else {
                        self.asm.patch_rel32(cold.from, here);
                        self.unspill(!0);
                        self.asm.align(4, 3);
                        let at = self.asm.jmp();
                        let next = self.asm.pos() as i64;
                        self.asm.patch_rel32(at, next);
                        at
                    };
                    self.asm
                        .store_imm32(self.layout.exit_arg, (self.cache_pos + site as i64) as u32);
                    self.jmp_stub(self.stubs.chain);
                    self.out.chains.push(ChainSite {
                        at: site as u16,
                        target: (target & 0xfff) as u16,
                        mode: self.mode_at(cold.resume),
                    });
                }
                ColdKind::Far { target } => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    self.mode = self.mode_at(cold.resume);
                    self.far_save_flags(STATUS);
                    self.far_tail(Some(target), 0);
                }
                ColdKind::Leave { next } => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    self.unspill(!0);
                    self.asm.store_imm64(self.layout.rip, next);
                    self.jmp_stub(self.stubs.lookup);
                }
                ColdKind::LeaveWithRip => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    self.unspill(!0);
                    self.jmp_stub(self.stubs.lookup);
                }
                ColdKind::Step { offset } => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    self.step_at(offset);
                }
            }
        }
        // Reached when the block has been thrown away.
        self.spilled = 0;
        self.flags = Flags::Host;
        self.resume = Resume::Offset(0);
        self.note();
        self.out.stale_stub = self.asm.pos() as u32;
        self.asm.store_imm64(self.layout.rip, self.pc);
        self.jmp_stub(self.stubs.lookup);
    }

    /// The mode in force at a point of this block: STAC and CLAC change it on the way.
    pub(super) fn mode_at(&self, resume: Resume) -> Mode {
        let mut mode = self.initial;
        let upto = match resume {
            Resume::Offset(o) | Resume::OffsetInShadow(o) => o,
            Resume::RipInFrame => u16::MAX,
        };
        for insn in &self.insns {
            if insn.offset >= upto {
                break;
            }
            match insn.kind {
                Kind::Stac => mode.0 |= Mode::AC,
                Kind::Clac => mode.0 &= !Mode::AC,
                _ => {}
            }
        }
        mode
    }
}
