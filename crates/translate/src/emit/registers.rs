//! Which registers and flags are where: spills, scratch registers, and the side table that records it.

use super::{Flags, Work, bit, ones};
use crate::asm::{Pos, RAX, RSP};
use crate::block::SideEntry;
use crate::relocate::PlaceKind;

impl Work<'_> {
    pub(super) fn slot(&self, reg: u8) -> i32 {
        self.layout.gpr + 8 * i32::from(reg)
    }

    pub(super) fn rel(&mut self, at: Pos, stub: i64) {
        let here = i64::from(self.position(at));
        self.asm.patch_rel32(at, stub - here + at as i64);
        self.note_place(at, PlaceKind::ToStub);
    }

    /// Points the displacement at `at` to another place in the block.
    pub(super) fn aim(&mut self, at: Pos, target: Pos) {
        let by = i64::from(self.position(target)) - i64::from(self.position(at));
        self.asm.patch_rel32(at, at as i64 + by);
        if (at < self.hot) != (target < self.hot) {
            self.note_place(at, PlaceKind::ToOtherPart);
        }
    }

    pub(super) fn jmp_stub(&mut self, stub: [i64; 2]) {
        let at = self.asm.jmp();
        self.rel(at, stub[(self.flags == Flags::Saved) as usize]);
    }

    /// Records where the guest's state is from here on.
    pub(super) fn note(&mut self) {
        self.note_held(!self.groups.is_empty());
    }

    pub(super) fn note_held(&mut self, held: bool) {
        let saved = self.flags == Flags::Saved;
        let entry = SideEntry::new(self.asm.pos(), self.resume, self.spilled, saved, held);
        match self.out.side.last_mut() {
            Some(last) if last.host == entry.host => *last = entry,
            Some(last) if last.says_the_same(&entry) => {}
            _ => self.out.side.push(entry),
        }
    }

    pub(super) fn spill(&mut self, reg: u8) {
        debug_assert_eq!(self.spilled & bit(reg), 0);
        if self.clean & bit(reg) == 0 {
            self.asm.store(self.slot(reg), reg);
        }
        self.spilled |= bit(reg);
        self.note();
    }

    /// Brings a register's value back. The frame slot stays valid until the register changes, so the order of note and load does not matter.
    pub(super) fn unspill(&mut self, mask: u16) {
        let todo = self.spilled & mask;
        if todo == 0 {
            return;
        }
        for r in ones(todo) {
            self.asm.load(r, self.slot(r));
        }
        self.spilled &= !todo;
        self.clean |= todo;
        self.groups.retain(|g| todo & bit(g.reg) == 0);
        self.note();
    }

    /// A register free for the translator's use, not in `avoid`; its value is in the frame.
    pub(super) fn scratch(&mut self, i: usize, avoid: u16) -> u8 {
        let avoid = avoid | bit(RSP) | self.pinned();
        let low_only = self.insns[i].high_byte;
        let allowed = !avoid & if low_only { 0xff } else { 0xffff };
        let spilled = self.spilled & allowed;
        if spilled != 0 {
            return spilled.trailing_zeros() as u8;
        }
        // A register that is written before it is read costs no reload; one that is not read here may cost it later.
        let (mut left, mut written, mut last) = (allowed, 0, bit(RAX));
        for insn in &self.insns[i..] {
            let (read, changed) = (insn.reads & left, insn.writes & !insn.reads & left);
            written |= changed;
            if read != 0 {
                last = read;
            }
            left &= !(read | changed);
        }
        // One that is in the frame as well costs no store.
        let order = [written & self.clean, written, left & self.clean, left, last];
        let best = order.into_iter().find(|&m| m != 0);
        let best = best.map_or(RAX, |m| m.ilog2() as u8);
        self.spill(best);
        best
    }

    /// Makes sure that flags which are still needed survive the translator's own arithmetic. May use RAX, then leaves it spilled.
    pub(super) fn save_flags(&mut self, i: usize, live: u32) {
        if self.flags == Flags::Saved || live == 0 {
            return;
        }
        let keep_rax = self.spilled & bit(RAX) == 0;
        if keep_rax {
            self.spill(RAX);
        }
        self.asm.flags_to_ax();
        self.asm.store16(self.layout.flags, RAX);
        self.flags = Flags::Saved;
        self.note();
        if keep_rax && self.insns[i].reads & bit(RAX) != 0 {
            self.unspill(bit(RAX));
        }
    }

    /// Brings saved flags back to the host's register. No other register is disturbed.
    pub(super) fn restore_flags(&mut self) {
        if self.flags == Flags::Host {
            return;
        }
        let keep_rax = self.spilled & bit(RAX) == 0;
        if keep_rax {
            self.spill(RAX);
        }
        self.asm.load_u16(RAX, self.layout.flags);
        self.asm.flags_from_ax();
        self.flags = Flags::Host;
        self.note();
        if keep_rax {
            self.unspill(bit(RAX));
        }
    }
}
