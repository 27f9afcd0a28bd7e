//! Layouts and numbers of Xen's public guest interface, as a 64-bit PVH guest sees them.
//!
//! Plain data only: nothing here reads guest memory or decides anything. All integers are little endian. Every
//! structure carries its padding as a field, so that writing one never leaks bytes of the monitor, and has its size asserted at
//! compile time. Source: the public headers of Xen 4.17 (`xen/include/public`).
#![no_std]
#![forbid(unsafe_code)]

pub mod blkif;
pub mod event;
pub mod grant;
pub mod hvm;
pub mod hypercall;
pub mod memory;
pub mod netif;
pub mod ring;
pub mod sched;
pub mod shared;
pub mod vcpu;
pub mod version;
pub mod xenbus;

/// Asserts the size of a layout, in bytes, at compile time.
macro_rules! assert_size {
    ($($ty:ty: $size:expr),+ $(,)?) => {
        $(const _: () = assert!(core::mem::size_of::<$ty>() == $size);)+
    };
}
pub(crate) use assert_size;

/// Error numbers of the interface; a hypercall returns the negated value (`public/errno.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub enum Errno {
    Perm = 1,
    NoEnt = 2,
    Srch = 3,
    TooBig = 7,
    Again = 11,
    NoMem = 12,
    Fault = 14,
    Busy = 16,
    Exist = 17,
    Inval = 22,
    NoSpc = 28,
    NoSys = 38,
    NoData = 61,
    Time = 62,
    OpNotSupp = 95,
}

impl Errno {
    /// The value a hypercall leaves in RAX.
    pub const fn as_rax(self) -> u64 {
        (-(self as i64)) as u64
    }
}

/// `DOMID_SELF`: the caller.
pub const DOMID_SELF: u16 = 0x7ff0;
