//! Jumps, calls and returns: direct inside a page, through the jump caches otherwise.

use iced_x86::OpKind;

use super::group::STACK;
use super::{Cold, ColdKind, Flags, Work, bit, decode};
use crate::asm::{RAX, RCX, RDX};
use crate::block::Resume;
use crate::insn::{Insn, STATUS, gpr};
use crate::layout::{KERNEL_CODE, Mode, jump_index};
use crate::relocate::PlaceKind;

const PAGE: u32 = 4096;

/// How a direct transfer gets to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// Connected as long as the block lives: the target is in its page.
    Page,
    /// Connected as long as the engine finds the mapping of the target's page unchanged.
    Kernel,
    /// Through the jump cache.
    Cache,
}

impl Work<'_> {
    pub(super) fn reach(&self, target: u64) -> Reach {
        const KIND: u16 = Mode::LONG | Mode::USER | Mode::UNPAGED;
        let other_page = (self.pc ^ target) >> 12 != 0;
        let kernel = self.initial.0 & KIND == Mode::LONG && self.pc.min(target) >= KERNEL_CODE;
        if self.same_page(target) {
            Reach::Page
        } else if self.kernel_links
            && kernel
            && !self.crossing
            && other_page
            && (self.pc ^ target) >> 32 == 0
        {
            Reach::Kernel
        } else {
            Reach::Cache
        }
    }

    /// Whether a target is inside the page of this block, so that a direct chain stays valid as long as the block does.
    /// An instruction that lies in two pages is not: its block depends on both.
    pub(super) fn same_page(&self, target: u64) -> bool {
        if target & 0xfff > 0xff1 && target >= self.pc {
            let start = ((target - self.pc) as usize).min(self.bytes.len());
            let mut decoder = decode(&self.bytes[start..], target, self.mode, self.amd);
            let _ = decoder.decode();
            if decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
                return false;
            }
        }
        !self.crossing && self.pc & !(u64::from(PAGE) - 1) == target & !(u64::from(PAGE) - 1)
    }

    /// Leaves the hot path where `cond` holds.
    pub(super) fn cold_jump(&mut self, cond: u8, kind: ColdKind) {
        let from = self.asm.jcc(cond);
        self.cold.push(Cold {
            from,
            kind,
            spilled: self.spilled,
            flags: self.flags,
            resume: self.resume,
        });
    }

    pub(super) fn jrcxz(&mut self, insn: &Insn, target: u64) {
        self.restore_flags();
        self.unspill(!0);
        let short = insn.instr.mnemonic() == iced_x86::Mnemonic::Jecxz;
        // Behind the two short jumps lies a long one with an aligned displacement.
        self.asm.align(4, if short { 2 } else { 3 });
        self.note();
        if short {
            self.asm.bytes(&[0x67]);
        }
        self.asm.bytes(&[0xe3, 2, 0xeb, 5]);
        let from = self.asm.jmp();
        self.cold.push(Cold {
            from,
            kind: match self.reach(target) {
                Reach::Cache => ColdKind::Far { target },
                reach => ColdKind::Chain { target, reach },
            },
            spilled: 0,
            flags: self.flags,
            resume: self.resume,
        });
    }

    pub(super) fn jcc(&mut self, i: usize, insn: &Insn, target: u64) {
        self.restore_flags();
        let backward = target <= self.pc.wrapping_add(u64::from(insn.offset));
        let reach = self.reach(target);
        let connected = reach != Reach::Cache;
        if backward && connected || i + 1 == self.insns.len() {
            self.unspill(!0);
        }
        let condition = insn.instr.condition_code();
        let code = condition_code(condition);
        if connected && self.spilled == 0 {
            self.asm.align(4, 2);
            self.note();
            let from = self.asm.jcc(code);
            self.cold.push(Cold {
                from,
                kind: ColdKind::Chain { target, reach },
                spilled: 0,
                flags: self.flags,
                resume: self.resume,
            });
            return;
        }
        let from = self.asm.jcc(code);
        self.cold.push(Cold {
            from,
            kind: if connected {
                ColdKind::Chain { target, reach }
            } else {
                ColdKind::Far { target }
            },
            spilled: self.spilled,
            flags: self.flags,
            resume: self.resume,
        });
    }

    /// Ends the block with a transfer to a known address.
    pub(super) fn leave_direct(&mut self, target: u64, live: u32) {
        match self.reach(target) {
            Reach::Page => {
                if live != 0 {
                    self.restore_flags();
                }
                self.flags = Flags::Host;
                self.unspill(!0);
                self.leave_connected(target, Reach::Page);
            }
            Reach::Kernel => {
                self.unspill(!0);
                self.leave_connected(target, Reach::Kernel);
            }
            Reach::Cache => self.leave_far(target, live),
        }
    }

    /// Ends the block with a jump that may be connected; all registers are in place.
    fn leave_connected(&mut self, target: u64, reach: Reach) {
        self.asm.align(4, 3);
        let from = self.asm.jmp();
        self.cold.push(Cold {
            from,
            kind: ColdKind::Chain { target, reach },
            spilled: 0,
            flags: self.flags,
            resume: self.resume,
        });
    }

    /// Ends the block with a transfer to a known address through the jump cache.
    pub(super) fn leave_far(&mut self, target: u64, live: u32) {
        self.far_save_flags(live);
        self.far_tail(Some(target), 0);
    }

    pub(super) fn far_save_flags(&mut self, live: u32) {
        if self.flags == Flags::Saved {
            return;
        }
        if live != 0 {
            if self.spilled & bit(RAX) == 0 {
                self.spill(RAX);
            }
            self.asm.flags_to_ax();
            self.asm.store16(self.layout.flags, RAX);
        }
        self.flags = Flags::Saved;
        self.note();
    }

    /// Ends the block through the jump cache, to `target` or (if none) to the address in RCX, whose own value is spilled. RSP grows by `pop` with the transfer.
    pub(super) fn far_tail(&mut self, target: Option<u64>, pop: i32) {
        debug_assert_eq!(self.flags, Flags::Saved);
        self.unspill(!(bit(RCX) | bit(RDX)));
        for r in [RCX, RDX] {
            if self.spilled & bit(r) == 0 {
                self.spill(r);
            }
        }
        if let Some(target) = target {
            self.mov_address(RCX, target);
        }
        self.asm.store(self.layout.rip, RCX);
        if pop != 0 {
            self.adjust_rsp(pop);
        }
        self.resume = Resume::RipInFrame;
        self.note();
        let number = self.mode.table();
        let table = self.layout.jumps[number];
        match target {
            Some(target) => {
                let index = jump_index(number, target) as i32;
                self.asm.jmp_mem(table + 8 * index);
                self.place_behind(4, PlaceKind::JumpEntry);
            }
            None => {
                let mask = self.layout.jump_masks[number];
                self.asm.pext_mem(RDX, RCX, mask);
                self.asm.jmp_mem_index8(RDX, table);
            }
        }
    }

    pub(super) fn call(&mut self, i: usize, insn: &Insn, target: Option<u64>) {
        let w = self.stack_bytes();
        self.unspill(insn.reads);
        // Everything but a near target known not to read the flags gets them through the frame.
        let live = if target.is_some() {
            self.live_out[i]
        } else {
            STATUS
        };
        if target.is_none() || self.held(i, STACK).is_none() && !self.windowed(i, STACK) {
            self.save_flags(i, live);
        }
        let connected = target.map(|t| (t, self.reach(t)));
        let return_to = self.next_pc(insn);
        let reads = insn.reads;
        let mut keep = 0;
        if target.is_none() {
            self.target_to_rcx(i, insn);
            keep = bit(RCX);
        }
        let s = self.stack_slot(i, true, if target.is_none() { keep } else { reads });
        if return_to as i64 == i64::from(return_to as i32) || !self.long() {
            self.asm
                .store_imm_at(self.long(), s.reg, s.disp, return_to as i32);
        } else {
            let t = self.scratch(i, bit(s.reg) | keep);
            self.mov_address(t, return_to);
            self.asm.store_at(true, s.reg, s.disp, t);
        }
        if let Some((target, reach @ (Reach::Page | Reach::Kernel))) = connected {
            if reach == Reach::Page {
                if live != 0 {
                    self.restore_flags();
                }
                self.flags = Flags::Host;
            }
            self.unspill(!0);
            // From here on the call has happened; the frame knows where it went.
            self.store_address(self.layout.rip, target);
            self.adjust_rsp(-w);
            self.resume = Resume::RipInFrame;
            self.note();
            self.leave_connected(target, reach);
        } else {
            self.far_save_flags(live);
            self.far_tail(target, -w);
        }
    }

    /// Loads the target of an indirect jump or call into RCX, whose own value is spilled then.
    pub(super) fn target_to_rcx(&mut self, i: usize, insn: &Insn) {
        let instr = &insn.instr;
        if instr.op0_kind() == OpKind::Register {
            let r = gpr(instr.op0_register()).expect("a general register");
            if self.spilled & bit(RCX) == 0 {
                self.spill(RCX);
            }
            if r != RCX {
                if self.long() {
                    self.asm.mov(RCX, r);
                } else {
                    self.asm.mov32(RCX, r);
                }
            }
        } else {
            let s = self.operand(i, self.stack_bytes() as u32, false, insn.reads);
            if self.spilled & bit(RCX) == 0 {
                self.spill(RCX);
            }
            self.asm.load_at(self.long(), RCX, s.reg, s.disp);
        }
    }

    pub(super) fn jmp_indirect(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        self.save_flags(i, STATUS);
        self.target_to_rcx(i, insn);
        self.far_tail(None, 0);
    }

    pub(super) fn ret(&mut self, i: usize, insn: &Insn) {
        let w = self.stack_bytes();
        self.save_flags(i, STATUS);
        let s = self.stack_slot(i, false, 0);
        if self.spilled & bit(RCX) == 0 {
            self.spill(RCX);
        }
        self.asm.load_at(self.long(), RCX, s.reg, s.disp);
        let extra = if insn.instr.op_count() == 1 {
            i32::from(insn.instr.immediate16())
        } else {
            0
        };
        self.far_tail(None, w + extra);
    }
}

fn condition_code(condition: iced_x86::ConditionCode) -> u8 {
    use iced_x86::ConditionCode as C;
    match condition {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g | C::None => 15,
    }
}
