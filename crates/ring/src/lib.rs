//! Shared rings: the queues through which a guest's device drivers and the back ends exchange requests and responses.
//!
//! A ring is a few pages of guest memory: a header with free-running u32 indices, then a power of two of slots. A request's slot takes its
//! response later, so at most as many requests are open as there are slots. Layout and protocol: `public/io/ring.h` of Xen. The slots' types are
//! the caller's; memory is behind [`SharedMemory`], so nothing here knows where it comes from.
//!
//! Refuses: to trust the other side. Indices that cannot be are reported as [`Broken`] before any slot is touched; the caller gives such a ring up.
//!
//! Invariants: each request is copied once, and no later change of it is seen; a response is written before the index that shows it; the peer is
//! notified exactly when it asked to be, and asks are looked at after the index is visible, so no event is lost.
//! Limits: a ring has at least one slot and at most 2^16 bytes.
#![forbid(unsafe_code)]

mod back;
mod front;
mod fuzz;
mod memory;

#[cfg(test)]
mod tests;

pub use back::BackRing;
pub use front::FrontRing;
pub use fuzz::fuzz_ring;
pub use memory::{LocalMemory, SharedMemory};

/// Bytes of header before the slots.
pub const HEADER_BYTES: usize = 64;
/// Most bytes of a ring: 16 pages.
pub const MAX_BYTES: usize = 1 << 16;

/// Offsets of the indices.
mod at {
    pub const REQ_PROD: usize = 0;
    pub const REQ_EVENT: usize = 4;
    pub const RSP_PROD: usize = 8;
    pub const RSP_EVENT: usize = 12;
}

/// The other side wrote indices that cannot be: it has queued more requests than there are slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest's ring claims requests up to {produced} while {consumed} are taken and {answered} answered, but it has {slots} slots"
)]
pub struct Broken {
    pub produced: u32,
    pub consumed: u32,
    pub answered: u32,
    pub slots: u32,
}

/// The number of slots of a ring: the largest power of two that fits. 0 where not even one does.
pub fn slots(ring_bytes: usize, slot_bytes: usize) -> u32 {
    match ring_bytes
        .saturating_sub(HEADER_BYTES)
        .checked_div(slot_bytes)
    {
        None | Some(0) => 0,
        Some(fit) => 1 << fit.ilog2(),
    }
}

/// Whether a side that moved its producer index from `old` to `new` has to notify a peer that waits for `event`.
fn crosses(old: u32, new: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}
