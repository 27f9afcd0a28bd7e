//! Privileged and system instructions that are frequent enough to be emitted in place.
//!
//! Where several words of guest state change together, `busy` is set meanwhile: a kick then only leaves a mark, which is looked at behind the last change.

use crate::asm::{RCX, RDX, cc};
use crate::emit::memory::Address;
use crate::emit::{ColdKind, Flags, Resume, Work, bit};
use crate::insn::{Insn, gpr};
use crate::layout::Mode;

pub(super) const STATUS_BITS: u32 = 0x8d5;
pub(super) const IF: u32 = 1 << 9;
pub(super) const FIXED: u32 = 2;
/// TF, DF, IOPL, NT, AC and ID: a POPF that changes one of them is the engine's.
const SPECIAL: i32 = 0x100 | 0x400 | 0x3000 | 0x4000 | 0x4_0000 | 0x20_0000;
/// SF, ZF, AF, PF and CF, where LAHF puts them.
const STATUS_IN_AH: i32 = 0xd5;
/// What SYSRET takes from R11.
const SYSRET_FLAGS: u32 = 0x3c_7fd7;
const R11: u8 = 11;

impl Work<'_> {
    pub(super) fn cld(&mut self, i: usize) {
        self.save_flags(i, self.live_before(i));
        self.asm.and_mem_imm32(self.layout.rest_flags, !0x400);
    }

    /// The last of a number of PAUSEs is the engine's.
    pub(super) fn pause(&mut self, i: usize, insn: &Insn) {
        self.save_flags(i, self.live_before(i));
        self.asm.bytes(&[0xf3, 0x90]);
        self.asm.dec_mem32(self.layout.pauses_left);
        self.cold_jump(
            cc::E,
            ColdKind::Step {
                offset: insn.offset,
            },
        );
    }

    pub(super) fn rdtscp(&mut self) {
        self.asm.bytes(&[0x0f, 0x01, 0xf9]);
        self.asm.load32(RCX, self.layout.tsc_aux);
        self.spilled &= !(bit(0) | bit(RCX) | bit(RDX));
    }

    pub(super) fn read_control(&mut self, insn: &Insn) {
        let from = if insn.instr.op1_register() == iced_x86::Register::CR2 {
            self.layout.cr2
        } else {
            self.layout.cr3
        };
        let dst = gpr(insn.instr.op0_register()).expect("a general register");
        self.asm.load(dst, from);
        self.spilled &= !bit(dst);
    }

    pub(super) fn read_selector(&mut self, insn: &Insn) {
        let n = insn.instr.op1_register() as usize - iced_x86::Register::ES as usize;
        let dst = gpr(insn.instr.op0_register()).expect("a general register");
        if insn.instr.op0_register().size() == 2 {
            self.unspill(bit(dst));
            self.asm.load16(dst, self.layout.selectors[n]);
        } else {
            self.asm.load_u16(dst, self.layout.selectors[n]);
            self.spilled &= !bit(dst);
        }
    }

    pub(super) fn store_selector(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        self.save_flags(i, self.live_before(i));
        let n = insn.instr.op1_register() as usize - iced_x86::Register::ES as usize;
        let s = self.operand(i, 2, true, insn.reads);
        let v = self.scratch(i, insn.reads | bit(s.reg));
        self.asm.load_u16(v, self.layout.selectors[n]);
        self.asm.store16_at(s.reg, v);
    }

    pub(super) fn write_seg_base(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        self.save_flags(i, self.live_before(i));
        let r = gpr(insn.instr.op0_register()).expect("a general register");
        let which = if insn.instr.mnemonic() == iced_x86::Mnemonic::Wrfsbase {
            4
        } else {
            5
        };
        let t = self.scratch(i, insn.reads);
        // Canonical: the upper 17 bits are all equal.
        self.asm.mov(t, r);
        self.asm.sar(t, 47);
        self.asm.lea(true, t, Some(t), None, 1);
        self.asm.cmp_imm(t, 1);
        self.cold_jump(
            cc::A,
            ColdKind::Step {
                offset: insn.offset,
            },
        );
        self.asm.store(self.layout.seg_base[which], r);
    }

    /// A bit string in memory: the register's upper bits, signed, select the word.
    pub(super) fn bit_string(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        self.save_flags(i, self.live_before(i));
        let restore = self.flags == Flags::Saved && self.needs_host_flags(i);
        let avoid = insn.reads | if restore { bit(0) } else { 0 };
        let number = insn.instr.op1_register();
        let r = gpr(number).expect("a general register");
        let bytes = number.size() as u8;
        let write = insn.instr.mnemonic() != iced_x86::Mnemonic::Bt;
        let s = match self.address_of(i, &insn.instr, avoid, None, 0) {
            Address::Constant { ea, relative } => {
                let s = self.scratch(i, avoid);
                self.mov_constant(s, ea, relative);
                s
            }
            Address::Register(s) | Address::Pair(s, _) => s,
        };
        let b = self.scratch(i, avoid | bit(s));
        if bytes == 8 {
            self.asm.mov(b, r);
            self.asm.sar(b, 6);
        } else {
            self.asm.movsxd(b, r);
            self.asm.sar(b, 5);
        }
        self.asm.lea(true, s, Some(s), Some((b, bytes)), 0);
        self.check(i, Address::Pair(s, b), u32::from(bytes), write, avoid);
        self.asm.mov32(b, r);
        self.asm.and_imm32(b, i32::from(bytes) * 8 - 1);
        if restore {
            self.restore_flags();
        }
        let mut copy = insn.instr;
        super::redirect(&mut copy, s, 0);
        copy.set_op1_register(if bytes == 8 {
            super::reg64(b)
        } else {
            super::reg32(b)
        });
        if super::encode_into(self.encoder, &mut self.asm, copy).is_none() {
            return self.step(insn);
        }
        self.flags_after(i);
    }

    /// Puts RFLAGS together in `v`; the status flags must be saved. Changes `t` and the host's flags.
    fn flags_image(&mut self, v: u8, t: u8) {
        let l = self.layout;
        self.asm.load_u8(v, l.flags + 1);
        self.asm.load_u8(t, l.flags);
        self.asm.shl32(t, 11);
        self.asm.or32(v, t);
        self.asm.or_mem32(v, l.interrupt_flag);
        self.asm.or_mem32(v, l.ac_flag);
        self.asm.or_mem(v, l.rest_flags);
    }

    /// Takes the status flags and IF from the image in `v` into the frame. Changes `t`.
    pub(super) fn take_flags(&mut self, v: u8, t: u8) {
        let l = self.layout;
        self.asm.mov32(t, v);
        self.asm.and_imm32(t, STATUS_IN_AH);
        self.asm.store8(l.flags + 1, t);
        self.asm.mov32(t, v);
        self.asm.shr(t, 11);
        self.asm.and_imm32(t, 1);
        self.asm.store8(l.flags, t);
        self.asm.mov32(t, v);
        self.asm.and_imm32(t, IF as i32);
        self.asm.store32(l.interrupt_flag, t);
    }

    pub(super) fn pushf(&mut self, i: usize) {
        self.save_flags(i, crate::insn::STATUS);
        let v = self.scratch(i, 0);
        let t = self.scratch(i, bit(v));
        self.flags_image(v, t);
        let s = self.stack_slot(i, true, bit(v));
        self.asm.store_at(true, s.reg, s.disp, v);
        self.adjust_rsp(-8);
    }

    pub(super) fn popf(&mut self, i: usize, insn: &Insn) {
        let s = self.stack_slot(i, false, 0).reg;
        let t = self.scratch(i, bit(s));
        let next = insn.offset + u16::from(insn.len);
        self.asm.load_at(true, s, s, 0);
        self.asm.mov(t, s);
        self.asm.xor_mem(t, self.layout.rest_flags);
        self.asm.and_imm32(t, SPECIAL);
        self.cold_jump(
            cc::NZ,
            ColdKind::Step {
                offset: insn.offset,
            },
        );
        // Up to the change of RSP this can be repeated: it stores the same again.
        self.take_flags(s, t);
        self.flags = Flags::Saved;
        self.adjust_rsp(8);
        self.resume = Resume::Offset(next);
        self.note();
        self.asm.cmp_mem8(self.layout.irq_pending, 0);
        let next = self.next_pc(insn);
        self.cold_jump(cc::NE, ColdKind::Leave { next });
    }

    pub(super) fn begin_busy(&mut self) {
        self.asm.store_imm8(self.layout.busy, 1);
    }

    pub(super) fn swapgs(&mut self, i: usize, insn: &Insn) {
        self.save_flags(i, self.live_before(i));
        let a = self.scratch(i, 0);
        let b = self.scratch(i, bit(a));
        let l = self.layout;
        self.asm.load(a, l.seg_base[5]);
        self.asm.load(b, l.kernel_gs_base);
        self.begin_busy();
        self.asm.store(l.seg_base[5], b);
        self.asm.store(l.kernel_gs_base, a);
        self.asm.store_imm8(l.busy, 0);
        self.resume = Resume::Offset(insn.offset + u16::from(insn.len));
        self.note();
        self.asm.cmp_mem8(l.turn_back, 0);
        let next = self.next_pc(insn);
        self.cold_jump(cc::NE, ColdKind::Leave { next });
    }

    pub(super) fn copy_segments(&mut self, to: &[i32], from: &[i32], t: u8) {
        for (to, from) in to.iter().zip(from) {
            for half in [0, 8] {
                self.asm.load(t, from + half);
                self.asm.store(to + half, t);
            }
        }
    }

    /// Ends a change of privilege: RIP is in RCX and goes to the frame; RCX, RDX and the flags are in the frame. `may_enable`: interrupts may be on now.
    pub(super) fn change_level(&mut self, to: Mode, may_enable: bool) {
        let l = self.layout;
        self.asm.store(l.rip, RCX);
        self.resume = Resume::RipInFrame;
        self.note();
        self.asm.store_imm8(l.busy, 0);
        self.asm.cmp_mem8(l.turn_back, 0);
        self.cold_jump(cc::NE, ColdKind::LeaveWithRip);
        if may_enable {
            self.asm.cmp_mem8(l.irq_pending, 0);
            self.cold_jump(cc::NE, ColdKind::LeaveWithRip);
        }
        let kernel = !to.has(Mode::USER) as usize;
        self.asm
            .cmp_mem_imm32(l.jump_bases[kernel], u32::from(to.0));
        self.cold_jump(cc::NE, ColdKind::LeaveWithRip);
        self.asm.pext_mem(RDX, RCX, l.jump_masks[to.table()]);
        self.asm.jmp_mem_index8(RDX, l.jumps[to.table()]);
    }

    pub(super) fn syscall(&mut self, i: usize, insn: &Insn) {
        self.save_flags(i, crate::insn::STATUS);
        self.unspill(!(bit(RCX) | bit(RDX)));
        for r in [RCX, RDX] {
            if self.spilled & bit(r) == 0 {
                self.spill(r);
            }
        }
        let l = self.layout;
        self.flags_image(RCX, RDX);
        self.begin_busy();
        self.asm.inc_mem32(l.kernel_visits);
        self.asm.mov(R11, RCX);
        self.store_address(self.slot(RCX), self.next_pc(insn));
        // SFMASK is known to clear the status flags, IF and AC.
        self.asm.store_imm16(l.flags, (FIXED << 8) as u16);
        self.asm.store_imm32(l.interrupt_flag, 0);
        self.asm.store_imm32(l.ac_flag, 0);
        self.asm.load(RCX, l.sfmask);
        self.asm.not(RCX);
        self.asm.and_mem(RCX, l.rest_flags);
        self.asm.store(l.rest_flags, RCX);
        self.copy_segments(&l.cs_ss, &l.syscall_cs_ss, RDX);
        self.asm.load(RCX, l.lstar);
        let to = Mode(self.mode.0 & !Mode::USER & !Mode::AC);
        self.change_level(to, false);
    }

    pub(super) fn sysret(&mut self, insn: &Insn) {
        let offset = insn.offset;
        self.unspill(bit(RCX) | bit(R11));
        // The old flags are lost either way.
        self.flags = Flags::Host;
        self.unspill(!bit(RDX));
        if self.spilled & bit(RDX) == 0 {
            self.spill(RDX);
        }
        let l = self.layout;
        self.asm.mov(RDX, RCX);
        self.asm.shr(RDX, 47);
        self.cold_jump(cc::NZ, ColdKind::Step { offset });
        self.asm.mov32(RDX, R11);
        self.asm
            .and_imm32(RDX, (SYSRET_FLAGS & !(STATUS_BITS | IF | FIXED)) as i32);
        self.cold_jump(cc::NZ, ColdKind::Step { offset });
        self.begin_busy();
        self.take_flags(R11, RDX);
        self.flags = Flags::Saved;
        self.asm.store_imm32(l.ac_flag, 0);
        self.asm.store_imm64(l.rest_flags, u64::from(FIXED));
        self.copy_segments(&l.cs_ss, &l.sysret_cs_ss, RDX);
        self.spill(RCX);
        let to = Mode(self.mode.0 & !Mode::AC | Mode::USER);
        self.change_level(to, true);
    }
}
