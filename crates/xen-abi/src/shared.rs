//! The shared info page, the per-vCPU information, time and runstate areas (`public/xen.h`, `public/vcpu.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

/// vCPUs whose `vcpu_info` lies inside the shared info page; others must register their own.
pub const LEGACY_VCPUS: usize = 32;
/// Event channel ports of the 2-level interface on a 64-bit guest.
pub const PORTS_2LEVEL: usize = 4096;

/// One way of computing time from the TSC: nanoseconds = `system_time` + ((tsc - `tsc_timestamp`) shifted by `tsc_shift`) *
/// `tsc_to_system_mul` / 2^32. Written with `version` odd.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VcpuTimeInfo {
    pub version: u32,
    pub pad0: u32,
    pub tsc_timestamp: u64,
    /// Nanoseconds since the domain's epoch.
    pub system_time: u64,
    pub tsc_to_system_mul: u32,
    /// Left shift; negative for right.
    pub tsc_shift: i8,
    pub flags: u8,
    pub pad1: [u8; 2],
}

/// All vCPUs' TSCs agree, and so do their time areas.
pub const PVCLOCK_TSC_STABLE: u8 = 1 << 0;
/// The domain was paused; cleared by the guest.
pub const PVCLOCK_GUEST_STOPPED: u8 = 1 << 1;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VcpuInfo {
    pub evtchn_upcall_pending: u8,
    /// Unused outside PV.
    pub evtchn_upcall_mask: u8,
    pub pad: [u8; 6],
    pub evtchn_pending_sel: u64,
    pub arch: [u64; 2],
    pub time: VcpuTimeInfo,
}

/// Offsets inside [`VcpuInfo`].
pub const VI_UPCALL_PENDING: usize = core::mem::offset_of!(VcpuInfo, evtchn_upcall_pending);
pub const VI_PENDING_SEL: usize = core::mem::offset_of!(VcpuInfo, evtchn_pending_sel);
pub const VI_TIME: usize = core::mem::offset_of!(VcpuInfo, time);

/// The used start of the shared info page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SharedInfo {
    pub vcpu_info: [VcpuInfo; LEGACY_VCPUS],
    pub evtchn_pending: [u64; 64],
    pub evtchn_mask: [u64; 64],
    pub wc_version: u32,
    /// UTC at system time 0: seconds (low half) and nanoseconds.
    pub wc_sec: u32,
    pub wc_nsec: u32,
    pub wc_sec_hi: u32,
    pub arch: [u8; 48],
}

/// Offsets inside [`SharedInfo`].
pub const SI_PENDING: usize = core::mem::offset_of!(SharedInfo, evtchn_pending);
pub const SI_MASK: usize = core::mem::offset_of!(SharedInfo, evtchn_mask);
pub const SI_WC_VERSION: usize = core::mem::offset_of!(SharedInfo, wc_version);

/// What a vCPU is doing, as the guest's scheduler accounts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Runstate {
    Running = 0,
    /// Wants to run, but the host runs something else: stolen time.
    Runnable = 1,
    Blocked = 2,
    #[default]
    Offline = 3,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RunstateInfo {
    pub state: u32,
    pub pad: u32,
    /// System time of the last change; see [`RUNSTATE_UPDATE`].
    pub state_entry_time: u64,
    /// Nanoseconds spent in each [`Runstate`].
    pub time: [u64; 4],
}

/// Set in `state_entry_time` while the area is being written, where the guest asked for that.
pub const RUNSTATE_UPDATE: u64 = 1 << 63;

assert_size!(VcpuTimeInfo: 32, VcpuInfo: 64, SharedInfo: 3136, RunstateInfo: 48);
const _: () = assert!(SI_PENDING == 2048 && SI_MASK == 2560 && SI_WC_VERSION == 3072);
const _: () = assert!(VI_PENDING_SEL == 8 && VI_TIME == 32);
