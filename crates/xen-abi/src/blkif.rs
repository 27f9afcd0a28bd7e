//! Block devices: requests and responses of the 64-bit protocol (`public/io/blkif.h`).
//!
//! Sectors are of 512 bytes here whatever the device's own sector size is.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

pub const OP_READ: u8 = 0;
pub const OP_WRITE: u8 = 1;
/// A write after everything before it and before everything behind it, on stable storage when it is answered.
pub const OP_WRITE_BARRIER: u8 = 2;
pub const OP_FLUSH_DISKCACHE: u8 = 3;
pub const OP_DISCARD: u8 = 5;
pub const OP_INDIRECT: u8 = 6;

pub const STATUS_OKAY: i16 = 0;
pub const STATUS_ERROR: i16 = -1;
pub const STATUS_NOT_SUPPORTED: i16 = -2;

/// Bytes of a sector of the protocol.
pub const SECTOR_BYTES: u64 = 512;
/// Segments of a direct request, at most.
pub const MAX_SEGMENTS: usize = 11;
/// Pages of segments of an indirect request, at most.
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Segments in one such page.
pub const SEGMENTS_PER_PAGE: usize = 512;

/// Bit of a discard's flags: the data must not be recoverable.
pub const DISCARD_SECURE: u8 = 1;

/// Bits of a disk's `info` node.
pub const INFO_CDROM: u32 = 1;
pub const INFO_REMOVABLE: u32 = 2;
pub const INFO_READONLY: u32 = 4;

/// A part of one page.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Segment {
    pub gref: u32,
    /// First and last sector in the page, 0 to 7, both included.
    pub first_sect: u8,
    pub last_sect: u8,
    pub pad: u16,
}

/// READ, WRITE, WRITE_BARRIER and FLUSH_DISKCACHE; what every request's slot can be read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    pub operation: u8,
    pub nr_segments: u8,
    pub handle: u16,
    pub pad: u32,
    pub id: u64,
    pub sector_number: u64,
    pub segments: [Segment; MAX_SEGMENTS],
}

/// DISCARD, in the same slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Discard {
    pub operation: u8,
    pub flag: u8,
    pub handle: u16,
    pub pad: u32,
    pub id: u64,
    pub sector_number: u64,
    pub nr_sectors: u64,
    pub rest: [u64; 10],
}

/// INDIRECT, in the same slot: the segments lie in pages of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Indirect {
    pub operation: u8,
    pub indirect_op: u8,
    pub nr_segments: u16,
    pub pad0: u32,
    pub id: u64,
    pub sector_number: u64,
    pub handle: u16,
    pub pad1: u16,
    pub grefs: [u32; MAX_INDIRECT_PAGES],
    pub rest: [u32; 13],
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Response {
    /// As in the request.
    pub id: u64,
    /// As in the request; for an indirect one, its `indirect_op`.
    pub operation: u8,
    pub pad0: u8,
    pub status: i16,
    pub pad1: u32,
}

assert_size!(Segment: 8, Request: 112, Discard: 112, Indirect: 112, Response: 16);
