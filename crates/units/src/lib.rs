//! Units of the project: addresses, page counts, domain and port numbers, sets of host CPUs as types of their own.
//!
//! No arithmetic mixes two kinds of address. Limits: addresses are 64 bits wide; a page is 4 KiB.
#![forbid(unsafe_code)]

mod cpuset;

use std::fmt;

pub use cpuset::{CpuSet, CpuSetError, HOST_CPUS_MAX};

/// Bytes in a page frame.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($repr:ty), $fmt:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub $repr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $fmt, self.0)
            }
        }
    };
}

number!(
    /// Guest physical address, in bytes.
    Gpa(u64), "{:#x}"
);
number!(
    /// Guest virtual (linear) address, in bytes.
    Gva(u64), "{:#x}"
);
number!(
    /// Guest frame number: a guest physical address divided by [`PAGE_SIZE`].
    Gfn(u64), "{:#x}"
);
number!(
    /// Domain number. 0 is the host.
    DomId(u16), "{}"
);
number!(
    /// Event channel port of one domain. 0 is never valid.
    Port(u32), "{}"
);
number!(
    /// Index into a domain's grant table.
    GrantRef(u32), "{}"
);
number!(
    /// Number of a virtual CPU inside its domain.
    VcpuId(u32), "{}"
);

impl DomId {
    /// The host, called Domain-0.
    pub const HOST: DomId = DomId(0);
    /// The caller itself, in hypercalls (`DOMID_SELF`).
    pub const SELF: DomId = DomId(0x7ff0);
}

impl Gpa {
    /// The frame this address lies in.
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }

    /// Offset inside its page, in bytes.
    pub const fn page_offset(self) -> u64 {
        self.0 & (PAGE_SIZE - 1)
    }

    /// The address `bytes` further on; `None` where it would wrap.
    pub fn checked_add(self, bytes: u64) -> Option<Gpa> {
        self.0.checked_add(bytes).map(Gpa)
    }
}

impl Gfn {
    /// First byte of the frame.
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

impl Gva {
    /// First byte of the page this address lies in.
    pub const fn page(self) -> Gva {
        Gva(self.0 & !(PAGE_SIZE - 1))
    }

    /// Offset inside its page, in bytes.
    pub const fn page_offset(self) -> u64 {
        self.0 & (PAGE_SIZE - 1)
    }
}
