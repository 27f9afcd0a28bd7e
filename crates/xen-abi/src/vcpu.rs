//! vCPU operations (`public/vcpu.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

pub const UP: u64 = 1;
pub const DOWN: u64 = 2;
pub const IS_UP: u64 = 3;
pub const GET_RUNSTATE_INFO: u64 = 4;
pub const REGISTER_RUNSTATE_AREA: u64 = 5;
pub const SET_PERIODIC_TIMER: u64 = 6;
pub const STOP_PERIODIC_TIMER: u64 = 7;
pub const SET_SINGLESHOT_TIMER: u64 = 8;
pub const STOP_SINGLESHOT_TIMER: u64 = 9;
pub const REGISTER_VCPU_INFO: u64 = 10;
pub const SEND_NMI: u64 = 11;
pub const REGISTER_TIME_AREA: u64 = 13;

/// In [`SetSingleshot::flags`]: fail with ETIME where the deadline has passed.
pub const SINGLESHOT_FUTURE: u32 = 1;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegisterVcpuInfo {
    pub gfn: u64,
    /// Bytes from the start of the frame.
    pub offset: u32,
    pub pad: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetSingleshot {
    /// Absolute system time, ns.
    pub timeout_abs_ns: u64,
    pub flags: u32,
    pub pad: u32,
}

/// Shortest period of a periodic timer, in ns.
pub const PERIODIC_MIN_NS: u64 = 1_000_000;

assert_size!(RegisterVcpuInfo: 16, SetSingleshot: 16);
