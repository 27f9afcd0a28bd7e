//! Scheduler operations (`public/sched.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

pub const YIELD: u64 = 0;
pub const BLOCK: u64 = 1;
pub const SHUTDOWN: u64 = 2;
pub const POLL: u64 = 3;
pub const WATCHDOG: u64 = 6;

/// Most ports one poll may name.
pub const POLL_MAX_PORTS: u32 = 128;
/// Watchdog timers of one domain.
pub const WATCHDOGS: usize = 2;

/// `SHUTDOWN_*`.
pub const SHUTDOWN_POWEROFF: u32 = 0;
pub const SHUTDOWN_REBOOT: u32 = 1;
pub const SHUTDOWN_SUSPEND: u32 = 2;
pub const SHUTDOWN_CRASH: u32 = 3;
pub const SHUTDOWN_WATCHDOG: u32 = 4;
pub const SHUTDOWN_SOFT_RESET: u32 = 5;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Poll {
    /// Guest virtual address of an array of u32.
    pub ports: u64,
    pub nr_ports: u32,
    pub pad: u32,
    /// Absolute system time, ns; 0 waits for ever.
    pub timeout: u64,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Watchdog {
    /// 0 asks for a new one.
    pub id: u32,
    /// Seconds; 0 disarms.
    pub timeout: u32,
}

assert_size!(Poll: 24, Watchdog: 8);
