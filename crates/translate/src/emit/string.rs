//! MOVS and STOS, as far as each side lies in one page: the processor's own string instruction on host addresses. Repeated ones go on page by page.

use iced_x86::Mnemonic;

use super::memory::Address;
use super::{ColdKind, Resume, Work, bit, ones};
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
        let moved = bit(RDI) | if moves { bit(RSI) } else { 0 };
        let again = self.asm.pos() as i64;
        for r in ones(moved & !self.spilled) {
            // The slot holds the guest's value from here on; so does the register until the very move.
            self.asm.store(self.slot(r), r);
        }
        if repeated {
            self.asm.test(RCX, RCX);
            empty = Some(self.asm.jcc(cc::Z));
        }
        let checked = if repeated { 1 } else { size };
        if moves {
            self.asm.mov(src, RSI);
            self.check_with(i, src, t, checked, false);
        }
        self.asm.mov(dst, RDI);
        self.check_with(i, dst, t, checked, true);
        if repeated {
            self.asm.store(self.slot(RCX), RCX);
            self.spilled |= bit(RCX);
            self.note();
            self.up_to_page_end(t, moves, size, offset);
        }
        self.asm.store_imm8(self.layout.busy, 1);
        // A false TLB hit faults at the very move: then the registers hold host addresses.
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
        if repeated {
            self.asm.load(RCX, self.slot(RCX));
            self.asm.sub(RCX, t);
            self.spilled &= !bit(RCX);
        }
        self.spilled &= !moved;
        self.asm.store_imm8(self.layout.busy, 0);
        let next = self.next_pc(insn);
        if let Some(empty) = empty {
            self.note();
            self.asm.test(RCX, RCX);
            let done = self.asm.jcc(cc::Z);
            self.asm.cmp_mem8(self.layout.turn_back, 0);
            let here = next.wrapping_sub(u64::from(insn.len));
            self.cold_jump(cc::NE, ColdKind::Leave { next: here });
            let back = self.asm.jmp();
            self.asm.patch_rel32(back, again);
            let here = self.asm.pos() as i64;
            self.asm.patch_rel32(empty, here);
            self.asm.patch_rel32(done, here);
        }
        self.resume = Resume::Offset(offset + u16::from(insn.len));
        self.note();
        self.asm.cmp_mem8(self.layout.turn_back, 0);
        self.cold_jump(cc::NE, ColdKind::Leave { next });
    }

    /// Makes RCX, whose slot has what is left, the number of elements up to the end of a page on either side; `t` as well. The engine does one that lies in two.
    fn up_to_page_end(&mut self, t: u8, moves: bool, size: u32, offset: u16) {
        let shift = size.trailing_zeros() as u8;
        self.elements_in_page(t, RDI, shift);
        self.asm.cmp(t, RCX);
        self.asm.cmova(t, RCX);
        if moves {
            self.elements_in_page(RCX, RSI, shift);
            self.asm.cmp(t, RCX);
            self.asm.cmova(t, RCX);
        }
        if shift != 0 {
            self.asm.test(t, t);
            self.cold_jump(cc::Z, ColdKind::Step { offset });
        }
        self.asm.mov(RCX, t);
    }

    /// Elements from an address on that lie wholly in its page.
    fn elements_in_page(&mut self, into: u8, address: u8, shift: u8) {
        self.asm.mov(into, address);
        self.asm.not(into);
        self.asm.and_imm32(into, PAGE - 1);
        self.asm.lea(true, into, Some(into), None, 1);
        if shift != 0 {
            self.asm.shr(into, shift);
        }
    }

    /// Turns the guest address in `s` into a host address, with `t` as the other scratch register.
    fn check_with(&mut self, i: usize, s: u8, t: u8, size: u32, write: bool) {
        let got = self.check(i, Address::Pair(s, t), size, write, 0);
        debug_assert_eq!(got, s);
    }
}
