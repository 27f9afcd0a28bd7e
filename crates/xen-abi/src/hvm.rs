//! HVM operations and parameters (`public/hvm/hvm_op.h`, `public/hvm/params.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

pub const SET_PARAM: u64 = 0;
pub const GET_PARAM: u64 = 1;
pub const PAGETABLE_DYING: u64 = 9;
pub const SET_EVTCHN_UPCALL_VECTOR: u64 = 23;

pub const PARAM_CALLBACK_IRQ: u32 = 0;
pub const PARAM_STORE_PFN: u32 = 1;
pub const PARAM_STORE_EVTCHN: u32 = 2;
pub const PARAM_CONSOLE_PFN: u32 = 17;
pub const PARAM_CONSOLE_EVTCHN: u32 = 18;

/// Bits 63:56 of [`PARAM_CALLBACK_IRQ`]: the low byte is an interrupt vector.
pub const CALLBACK_TYPE_VECTOR: u64 = 2;
/// Lowest vector a guest may choose for upcalls.
pub const FIRST_VECTOR: u8 = 0x10;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Param {
    pub domid: u16,
    pub pad: u16,
    pub index: u32,
    pub value: u64,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UpcallVector {
    pub vcpu: u32,
    pub vector: u8,
    pub pad: [u8; 3],
}

assert_size!(Param: 16, UpcallVector: 8);
