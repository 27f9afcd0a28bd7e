//! The `xen_version` hypercall (`public/version.h`, `public/features.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

pub const VERSION: u64 = 0;
pub const EXTRAVERSION: u64 = 1;
pub const COMPILE_INFO: u64 = 2;
pub const CAPABILITIES: u64 = 3;
pub const CHANGESET: u64 = 4;
pub const PLATFORM_PARAMETERS: u64 = 5;
pub const GET_FEATURES: u64 = 6;
pub const PAGESIZE: u64 = 7;
pub const GUEST_HANDLE: u64 = 8;
pub const COMMANDLINE: u64 = 9;
pub const BUILD_ID: u64 = 10;

pub const EXTRAVERSION_BYTES: usize = 16;
pub const CAPABILITIES_BYTES: usize = 1024;
pub const CHANGESET_BYTES: usize = 64;
pub const COMMANDLINE_BYTES: usize = 1024;

/// Feature bits of submap 0.
pub const FEATURE_WRITABLE_PAGE_TABLES: u32 = 1 << 0;
pub const FEATURE_AUTO_TRANSLATED_PHYSMAP: u32 = 1 << 2;
pub const FEATURE_HVM_CALLBACK_VECTOR: u32 = 1 << 8;
pub const FEATURE_HVM_SAFE_PVCLOCK: u32 = 1 << 9;
pub const FEATURE_NOT_DIRECT_MAPPED: u32 = 1 << 16;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FeatureInfo {
    pub submap_idx: u32,
    /// Out.
    pub submap: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CompileInfo {
    pub compiler: [u8; 64],
    pub by: [u8; 16],
    pub domain: [u8; 32],
    pub date: [u8; 32],
}

assert_size!(FeatureInfo: 8, CompileInfo: 144);
