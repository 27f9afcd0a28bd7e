//! The ways into a block.

use super::{Flags, Work, bit};
use crate::asm::{RAX, RCX, RDX, cc};
use crate::block::Resume;

impl Work<'_> {
    /// The hot ways in. What stands in front of the first instruction is what the jump wants for which the block is made.
    pub(super) fn entry(&mut self, live_in: u32, connected: bool) {
        if !connected {
            self.verified_entry();
            self.asm.align(8, 0);
            self.out.verified_body = self.asm.pos() as u32;
            self.asm.nops(5);
            return;
        }
        self.flags = Flags::Saved;
        self.resume = Resume::Offset(0);
        if live_in != 0 {
            self.note();
            self.out.saved_entry = self.asm.pos() as u32;
            self.restore_flags();
            self.asm.align(8, 0);
        } else {
            // The flags stay in the frame, and have to be looked for there where the block has been thrown away.
            self.asm.align(8, 0);
            self.note();
            self.out.saved_entry = self.asm.pos() as u32;
            self.asm.nops(5);
            // The beginning of a no-operation that ends with the next five bytes, whether these are one of their own or a jump.
            self.asm.bytes(&[0x0f, 0x1f, 0x84]);
            self.flags = Flags::Host;
        }
        self.note();
        self.out.direct_entry = self.asm.pos() as u32;
        self.asm.nops(5);
    }

    /// The other ways in, among the cold parts.
    pub(super) fn other_entries(&mut self, connected: bool) {
        if connected {
            self.verified_entry();
            self.unspill(!0);
            let at = self.asm.jmp();
            self.aim(at, self.out.saved_entry as usize);
            return;
        }
        // As the jump caches' jumps leave it.
        self.flags = Flags::Host;
        self.spilled = 0;
        self.resume = Resume::Offset(0);
        self.note();
        self.out.direct_entry = self.asm.pos() as u32;
        self.spill(RAX);
        self.asm.flags_to_ax();
        self.asm.store16(self.layout.flags, RAX);
        self.flags = Flags::Saved;
        self.note();
        self.unspill(bit(RAX));
        self.out.saved_entry = self.asm.pos() as u32;
        self.spill(RCX);
        self.spill(RDX);
        let at = self.asm.jmp();
        self.aim(at, self.out.verified_body as usize);
    }

    /// The way in for jumps through a cache: is this really the address that the jump wanted? The flags are in the frame.
    fn verified_entry(&mut self) {
        self.out.indirect_entry = self.asm.pos() as u32;
        self.spilled = bit(RCX) | bit(RDX);
        self.flags = Flags::Saved;
        self.resume = Resume::RipInFrame;
        self.note();
        match i32::try_from(self.pc as i64) {
            Ok(imm) => self.asm.cmp_imm(RCX, imm),
            Err(_) => {
                self.mov_address(RDX, self.pc);
                self.asm.cmp(RCX, RDX);
            }
        }
        let at = self.asm.jcc(cc::NE);
        self.rel(at, self.stubs.jump_miss[self.initial.table()]);
        self.resume = Resume::Offset(0);
        self.note();
    }
}
