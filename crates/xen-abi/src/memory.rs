//! Memory operations (`public/memory.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

pub const DECREASE_RESERVATION: u64 = 1;
pub const MAXIMUM_RAM_PAGE: u64 = 2;
pub const CURRENT_RESERVATION: u64 = 3;
pub const MAXIMUM_RESERVATION: u64 = 4;
pub const POPULATE_PHYSMAP: u64 = 6;
pub const ADD_TO_PHYSMAP: u64 = 7;
pub const MEMORY_MAP: u64 = 9;
pub const MAXIMUM_GPFN: u64 = 14;

/// The operation is in the low bits of the first argument; above them is the extent to continue with.
pub const OP_BITS: u32 = 6;

pub const SPACE_SHARED_INFO: u32 = 0;
pub const SPACE_GRANT_TABLE: u32 = 1;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AddToPhysmap {
    pub domid: u16,
    pub size: u16,
    pub space: u32,
    pub idx: u64,
    pub gpfn: u64,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reservation {
    /// Guest virtual address of an array of u64 frame numbers.
    pub extent_start: u64,
    pub nr_extents: u64,
    /// log2 of the pages in an extent.
    pub order: u32,
    pub mem_flags: u32,
    pub domid: u16,
    pub pad: [u16; 3],
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryMap {
    /// In: entries the buffer holds. Out: entries written.
    pub nr_entries: u32,
    pub pad: u32,
    /// Guest virtual address of an array of [`E820`].
    pub buffer: u64,
}

/// One 20-byte entry of the firmware memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed(4))]
pub struct E820 {
    pub addr: u64,
    pub size: u64,
    /// 1 RAM, 2 reserved, 3 ACPI, 4 NVS.
    pub kind: u32,
}

assert_size!(AddToPhysmap: 24, Reservation: 32, MemoryMap: 16, E820: 20);
