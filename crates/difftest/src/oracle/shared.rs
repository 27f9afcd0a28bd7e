//! The memory that the oracle's two processes share.

use std::sync::atomic::AtomicU32;

use crate::layout::IMAGE_BYTES;
use crate::state::XSAVE_BYTES;

/// Cases handed over at a time.
pub const BATCH: usize = 32;
pub const PATCHES: usize = 4;
pub const PATCH_BYTES: usize = 3072;

/// Registers as both directions carry them.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct RawRegs {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub cs: u64,
    pub xsave: [u8; XSAVE_BYTES],
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct RawPatch {
    /// Position in the backing pages.
    pub at: u32,
    pub len: u32,
    pub bytes: [u8; PATCH_BYTES],
}

#[repr(C)]
pub struct RawCase {
    pub regs: RawRegs,
    pub patches: [RawPatch; PATCHES],
}

#[repr(C)]
pub struct RawResult {
    pub regs: RawRegs,
    pub signal: u64,
    pub trap: u64,
    pub error: u64,
    pub cr2: u64,
    /// Ticks of the time-stamp counter that the case took, with whatever came between.
    pub ticks: u64,
    pub memory: [u8; IMAGE_BYTES],
}

#[repr(C)]
pub struct Shared {
    /// Counts up to start a batch.
    pub submitted: AtomicU32,
    /// Follows `submitted` when the batch is done. Before the first it is [`READY`] or an error number with the top bit set.
    pub completed: AtomicU32,
    pub count: u32,
    /// Bytes of the XSAVE image that go in and out.
    pub image_bytes: u32,
    pub base: [u8; IMAGE_BYTES],
    pub cases: [RawCase; BATCH],
    pub results: [RawResult; BATCH],
}

pub const READY: u32 = 0x4000_0000;
pub const FAILED: u32 = 0x8000_0000;
