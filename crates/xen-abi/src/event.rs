//! Event channel operations (`public/event_channel.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert_size;

pub const BIND_INTERDOMAIN: u64 = 0;
pub const BIND_VIRQ: u64 = 1;
pub const CLOSE: u64 = 3;
pub const SEND: u64 = 4;
pub const STATUS: u64 = 5;
pub const ALLOC_UNBOUND: u64 = 6;
pub const BIND_IPI: u64 = 7;
pub const BIND_VCPU: u64 = 8;
pub const UNMASK: u64 = 9;

/// Virtual interrupts (`public/xen.h`).
pub const VIRQ_TIMER: u32 = 0;
pub const VIRQ_DEBUG: u32 = 1;
pub const VIRQ_XENOPROF: u32 = 7;
pub const VIRQ_XENPMU: u32 = 13;
/// Virtual interrupts there are.
pub const NR_VIRQS: u32 = 24;

/// `evtchn_status.status`.
pub const STATUS_CLOSED: u32 = 0;
pub const STATUS_UNBOUND: u32 = 1;
pub const STATUS_INTERDOMAIN: u32 = 2;
pub const STATUS_VIRQ: u32 = 4;
pub const STATUS_IPI: u32 = 5;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AllocUnbound {
    pub dom: u16,
    pub remote_dom: u16,
    /// Out.
    pub port: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindVirq {
    pub virq: u32,
    pub vcpu: u32,
    /// Out.
    pub port: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindIpi {
    pub vcpu: u32,
    /// Out.
    pub port: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindVcpu {
    pub port: u32,
    pub vcpu: u32,
}

/// `evtchn_status`; `u` is the remote domain (and port in [`Self::u2`]), or the virtual interrupt, by `status`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Status {
    pub dom: u16,
    pub pad: u16,
    pub port: u32,
    pub status: u32,
    pub vcpu: u32,
    pub u: u32,
    pub u2: u32,
}

assert_size!(AllocUnbound: 8, BindVirq: 12, BindIpi: 8, BindVcpu: 8, Status: 24);
