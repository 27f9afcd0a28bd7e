//! Grant tables, version 1 (`public/grant_table.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

pub const QUERY_SIZE: u64 = 6;
pub const SET_VERSION: u64 = 8;
pub const GET_VERSION: u64 = 10;

/// Bits 1:0 of an entry's flags.
pub const TYPE_MASK: u16 = 3;
pub const TYPE_PERMIT_ACCESS: u16 = 1;
pub const FLAG_READONLY: u16 = 1 << 2;

/// References below this are made by the tools: 0 is the console, 1 is xenstore.
pub const RESERVED_ENTRIES: u32 = 8;
pub const REF_CONSOLE: u32 = 0;
pub const REF_XENSTORE: u32 = 1;
pub const ENTRIES_PER_FRAME: u32 = 512;
/// Bit 31 of the index in `add_to_physmap` asks for a status frame, which version 1 lacks.
pub const STATUS_FRAME: u64 = 1 << 31;

/// `GNTST_*`.
pub const STATUS_OKAY: i16 = 0;
pub const STATUS_BAD_DOMAIN: i16 = -2;

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct EntryV1 {
    pub flags: u16,
    /// Who may use the frame.
    pub domid: u16,
    /// Guest frame number.
    pub frame: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct QuerySize {
    pub dom: u16,
    pub pad0: u16,
    pub nr_frames: u32,
    pub max_nr_frames: u32,
    pub status: i16,
    pub pad1: u16,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GetVersion {
    pub dom: u16,
    pub pad: u16,
    pub version: u32,
}

assert_size!(EntryV1: 8, QuerySize: 16, GetVersion: 8);
