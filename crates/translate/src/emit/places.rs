//! What is emitted of guest addresses and of positions in the code cache, with a note of where it stands.

use iced_x86::Register;

use super::Work;
use crate::asm::Pos;
use crate::insn::{Insn, Kind};
use crate::relocate::{self, Place, PlaceKind};

/// Whether an instruction has an operand that another address of the code changes in other ways than by the distance: one at an absolute address may have its
/// check in common with one that moves.
pub(super) fn stays(insn: &Insn) -> bool {
    if !insn.has_memory_operand() {
        return false;
    }
    let i = &insn.instr;
    let segment = matches!(i.memory_segment(), Register::FS | Register::GS);
    match i.memory_base() {
        Register::EIP => true,
        Register::RIP if insn.kind == Kind::Lea => i.op0_register().size() != 8,
        Register::RIP => segment,
        Register::None => i.memory_index() == Register::None && !segment && insn.kind != Kind::Lea,
        _ => false,
    }
}

impl Work<'_> {
    /// Position in the code cache of a position in the block.
    pub(super) fn position(&self, at: Pos) -> u32 {
        self.place.position(self.hot, at)
    }

    pub(super) fn note_place(&mut self, at: Pos, kind: PlaceKind) {
        if self.movable {
            self.out.places.push(Place::new(at, kind));
        }
    }

    /// Notes that the last `bytes` emitted are such a place.
    pub(super) fn place_behind(&mut self, bytes: usize, kind: PlaceKind) {
        if self.movable {
            self.note_place(self.asm.pos() - bytes, kind);
        }
    }

    pub(super) fn place_behind_if(&mut self, condition: bool, bytes: usize, kind: PlaceKind) {
        if condition {
            self.place_behind(bytes, kind);
        }
    }

    /// Loads a guest address that moves with the code.
    pub(super) fn mov_address(&mut self, reg: u8, address: u64) {
        self.mov_constant(reg, address, true);
    }

    pub(super) fn mov_constant(&mut self, reg: u8, value: u64, moves: bool) {
        debug_assert!(!(self.movable && moves) || relocate::is_long(value));
        self.asm.mov_imm(reg, value);
        self.place_behind_if(moves, 8, PlaceKind::Address);
    }

    /// Stores a guest address that moves with the code in the frame.
    pub(super) fn store_address(&mut self, offset: i32, address: u64) {
        debug_assert!(!self.movable || relocate::is_long(address));
        self.asm.store_imm64(offset, address);
        self.place_behind(relocate::HALVES_BYTES, PlaceKind::Halves);
    }

    /// Stores the position in the code cache of a position in the block in the frame.
    pub(super) fn store_position(&mut self, offset: i32, at: Pos) {
        self.asm.store_imm32(offset, self.position(at));
        let kind = if at < self.hot {
            PlaceKind::Position
        } else {
            PlaceKind::ColdPosition
        };
        self.place_behind(4, kind);
    }
}
