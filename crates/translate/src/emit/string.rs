//! MOVS and STOS inside one page on each side: the processor's own string instruction on host addresses.

use iced_x86::Mnemonic;

use super::memory::Address;
use super::{ColdKind, Resume, Work, bit};
use crate::asm::{RCX, RDI, RSI, cc};
use crate::insn::Insn;

const DF: u32 = 1 << 10;
const PAGE: i32 = 4096;

impl Work<'_> {
    pub(super) fn string(&mut self, i: usize, insn: &Insn) {
        use Mnemonic as M;
        let (opcode, size) = match insn.instr.mnemonic() {
            M::Movsb => (0xa4, 1),
            M::Movsw => (0xa5, 2),
            M::Movsd => (0xa5, 4),
            M::Movsq => (0xa5, 8),
            M::Stosb => (0xaa, 1),
            M::Stosw => (0xab, 2),
            M::Stosd => (0xab, 4),
            _ => (0xab, 8),
        };
        let moves = opcode & 0xf < 8;
        let repeated = insn.instr.has_rep_prefix();
        let offset = insn.offset;
        self.unspill(insn.reads | bit(RSI) | bit(RDI) | bit(RCX));
        self.save_flags(i, self.live_before(i));
        let avoid = insn.reads | insn.writes | bit(RSI) | bit(RDI) | bit(RCX);
        self.asm.test_mem_imm32(self.layout.rest_flags, DF);
        self.cold_jump(cc::NZ, ColdKind::Step { offset });
        let mut empty = None;
        let dst = self.scratch(i, avoid);
        let src = if moves {
            self.scratch(i, avoid | bit(dst))
        } else {
            dst
        };
        let t = self.scratch(i, avoid | bit(dst) | bit(src));
        for r in [RDI, RSI] {
            if (r == RDI || moves) && self.spilled & bit(r) == 0 {
                // The slot holds the guest's value from here on; so does the register until the very move.
                self.asm.store(self.slot(r), r);
            }
        }
        if repeated {
            self.asm.test(RCX, RCX);
            empty = Some(self.asm.jcc(cc::Z));
            self.asm.cmp_imm(RCX, PAGE / size);
            self.cold_jump(cc::A, ColdKind::Step { offset });
            for r in [RDI, RSI] {
                if r == RDI || moves {
                    self.asm.lea(true, t, Some(r), Some((RCX, size as u8)), -1);
                    self.asm.xor(t, r);
                    self.asm.cmp_imm(t, PAGE - 1);
                    self.cold_jump(cc::A, ColdKind::Step { offset });
                }
            }
        }
        let checked = if repeated { 1 } else { size as u32 };
        if moves {
            self.asm.mov(src, RSI);
            self.check_with(i, src, t, checked, false);
        }
        self.asm.mov(dst, RDI);
        self.check_with(i, dst, t, checked, true);
        self.asm.store_imm8(self.layout.busy, 1);
        // A false TLB hit faults at the very move: then the registers hold host addresses.
        let moved = bit(RDI) | if moves { bit(RSI) } else { 0 };
        self.spilled |= moved;
        self.note();
        self.asm.mov(RDI, dst);
        if moves {
            self.asm.mov(RSI, src);
        }
        if size == 2 {
            self.asm.bytes(&[0x66])
        }
        if repeated {
            self.asm.bytes(&[0xf3]);
        }
        if size == 8 {
            self.asm.bytes(&[0x48]);
        }
        self.asm.bytes(&[opcode]);
        self.asm.sub(RDI, dst);
        self.asm.add_mem(RDI, self.slot(RDI));
        if moves {
            self.asm.sub(RSI, src);
            self.asm.add_mem(RSI, self.slot(RSI));
        }
        self.spilled &= !moved;
        self.asm.store_imm8(self.layout.busy, 0);
        if let Some(empty) = empty {
            let here = self.asm.pos() as i64;
            self.asm.patch_rel32(empty, here);
        }
        self.resume = Resume::Offset(offset + u16::from(insn.len));
        self.note();
        self.asm.cmp_mem8(self.layout.turn_back, 0);
        let next = self.next_pc(insn);
        self.cold_jump(cc::NE, ColdKind::Leave { next });
    }

    /// Turns the guest address in `s` into a host address, with `t` as the other scratch register.
    fn check_with(&mut self, i: usize, s: u8, t: u8, size: u32, write: bool) {
        let got = self.check(i, Address::Pair(s, t), size, write, 0);
        debug_assert_eq!(got, s);
    }
}
