//! Copies of translations for other guest addresses.
//!
//! A program that is started again lies at other virtual addresses, in the same physical pages: its code has been translated before, but for constants that follow
//! from the address. A copy in which these are changed is the translation, bit for bit, that would have been made.
//!
//! Invariants
//! * Both addresses have the same offset in their page and lie in the ranges of [`movable`]: there each constant that moves is so long that its encoding does not
//!   depend on its value.
//! * What a translation was made of besides its address (bytes, mode, place of other code in the page) is the same for both.

use crate::block::{Placement, Request};
use crate::layout::{FrameLayout, Mode, TLB_ENTRIES, TLB_ENTRY_BYTES, jump_entries};

/// What stands at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PlaceKind {
    /// 8 bytes: a guest address.
    Address,
    /// 4 bytes, and 4 more at the end of the next instruction: the halves of a guest address.
    Halves,
    /// 4 bytes: the displacement of something in the data TLB's entry of a guest address.
    TlbEntry,
    /// 4 bytes: the displacement of the jump cache's entry of a guest address.
    JumpEntry,
    /// 4 bytes: the position in the code cache of something in the block's hot part.
    Position,
    /// The same in its cold part.
    ColdPosition,
    /// 4 bytes: the displacement of a jump from one part of the block to the other.
    ToOtherPart,
    /// 4 bytes: the displacement of a jump to a fixed position in the code cache.
    ToStub,
}

/// A place in a translation that holds something else in a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// From the block's start.
    at: u16,
    kind: PlaceKind,
}

impl Place {
    pub(crate) fn new(at: usize, kind: PlaceKind) -> Place {
        Place {
            at: u16::try_from(at).expect("a block is shorter than 64 KiB"),
            kind,
        }
    }
}

/// From the end of one half to the end of the other: an instruction that stores a constant in the frame.
const HALF_STEP: usize = 12;
/// From the beginning of the lower half to the end of the upper one.
pub(crate) const HALVES_BYTES: usize = HALF_STEP + 4;

/// How far the operands of an instruction may be away, and a page.
const REACH: u64 = 1 << 33;
/// End of the addresses of user code.
const USER_END: u64 = 1 << 47;

/// Whether code at this address may be copied to another one of which the same is true.
fn in_range(pc: u64) -> bool {
    (REACH..USER_END - REACH).contains(&pc)
}

/// Whether a constant needs all of eight bytes.
pub(crate) fn is_long(value: u64) -> bool {
    value > u64::from(u32::MAX) && i32::try_from(value as i64).is_err()
}

/// Whether the translation of this may be copied, as far as the request shows.
pub(crate) fn movable(request: &Request<'_>) -> bool {
    const KIND: u16 = Mode::LONG | Mode::USER;
    !request.crossing && request.mode.0 & KIND == KIND && in_range(request.pc)
}

/// From where to where a translation is copied.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    /// Added to guest addresses: a multiple of the page size.
    address: u64,
    /// Added to positions in the code cache, in a block's hot part and in its cold one.
    hot: i32,
    cold: i32,
}

impl Move {
    /// A copy of a translation made for guest address `from` at one place, for guest address `to` at another. `None` where that cannot be.
    pub fn new(from: u64, to: u64, from_place: Placement, to_place: Placement) -> Option<Move> {
        let address = to.wrapping_sub(from);
        (in_range(from) && in_range(to) && address.is_multiple_of(PAGE)).then_some(Move {
            address,
            hot: to_place.hot.wrapping_sub(from_place.hot) as i32,
            cold: to_place.cold.wrapping_sub(from_place.cold) as i32,
        })
    }

    /// Changes what differs in a copy of a translation, which has these two parts and these places.
    pub fn apply(&self, hot: &mut [u8], cold: &mut [u8], places: &[Place], layout: &FrameLayout) {
        let pages = self.address / PAGE;
        let table = Mode(Mode::USER).table();
        for place in places {
            let at = usize::from(place.at);
            let (code, at, own, other) = match at.checked_sub(hot.len()) {
                None => (&mut *hot, at, self.hot, self.cold),
                Some(at) => (&mut *cold, at, self.cold, self.hot),
            };
            match place.kind {
                PlaceKind::Address => change64(code, at, |v| v.wrapping_add(self.address)),
                PlaceKind::Halves => {
                    let (low, high) = (get32(code, at), get32(code, at + HALF_STEP));
                    let v = (u64::from(high) << 32 | u64::from(low)).wrapping_add(self.address);
                    put32(code, at, v as u32);
                    put32(code, at + HALF_STEP, (v >> 32) as u32);
                }
                PlaceKind::TlbEntry => {
                    let by = pages.wrapping_mul(TLB_ENTRY_BYTES as u64);
                    let size = TLB_ENTRIES * TLB_ENTRY_BYTES;
                    change_offset(code, at, layout.tlb[table], by, size);
                }
                PlaceKind::JumpEntry => {
                    let by = pages.wrapping_mul(jump_bytes_of_page());
                    change_offset(code, at, layout.jumps[table], by, 8 * jump_entries(table));
                }
                PlaceKind::Position => change32(code, at, self.hot),
                PlaceKind::ColdPosition => change32(code, at, self.cold),
                PlaceKind::ToOtherPart => change32(code, at, other.wrapping_sub(own)),
                PlaceKind::ToStub => change32(code, at, own.wrapping_neg()),
            }
        }
    }
}

const PAGE: u64 = 4096;

/// Bytes of a jump cache between the entries of addresses that are a page apart.
fn jump_bytes_of_page() -> u64 {
    8 * crate::layout::jump_index(Mode(Mode::USER).table(), PAGE) as u64
}

/// Moves an offset inside a table of `size` bytes, a power of two, that begins at `table`.
fn change_offset(code: &mut [u8], at: usize, table: i32, by: u64, size: usize) {
    let offset = u64::from(get32(code, at).wrapping_sub(table as u32));
    let moved = offset.wrapping_add(by) & (size as u64 - 1);
    put32(code, at, (moved as u32).wrapping_add(table as u32));
}

fn change64(code: &mut [u8], at: usize, f: impl FnOnce(u64) -> u64) {
    let place: &mut [u8; 8] = (&mut code[at..at + 8]).try_into().expect("eight bytes");
    *place = f(u64::from_le_bytes(*place)).to_le_bytes();
}

fn change32(code: &mut [u8], at: usize, by: i32) {
    put32(code, at, get32(code, at).wrapping_add_signed(by));
}

fn get32(code: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(code[at..at + 4].try_into().expect("four bytes"))
}

fn put32(code: &mut [u8], at: usize, v: u32) {
    code[at..at + 4].copy_from_slice(&v.to_le_bytes());
}
