//! Hypercall numbers and the hypercall page (`public/xen.h`).

pub const MEMORY_OP: u64 = 12;
pub const XEN_VERSION: u64 = 17;
pub const CONSOLE_IO: u64 = 18;
pub const GRANT_TABLE_OP: u64 = 20;
pub const VM_ASSIST: u64 = 21;
pub const VCPU_OP: u64 = 24;
pub const SCHED_OP: u64 = 29;
pub const EVENT_CHANNEL_OP: u64 = 32;
pub const HVM_OP: u64 = 34;

/// The one stub of the hypercall page that only a PV guest could use.
pub const IRET: u64 = 23;

/// MSR that a guest writes the address of its hypercall page to (leaf base+2, EBX).
pub const PAGE_MSR: u32 = 0x4000_0000;
/// Bytes of one stub in the hypercall page; its 4096 bytes hold 128 of them.
pub const PAGE_STUB_BYTES: usize = 32;

/// `CONSOLEIO_*`: first argument of [`CONSOLE_IO`].
pub const CONSOLEIO_WRITE: u64 = 0;
pub const CONSOLEIO_READ: u64 = 1;

/// `VMASST_CMD_*`: first argument of [`VM_ASSIST`].
pub const VMASST_ENABLE: u64 = 0;
pub const VMASST_DISABLE: u64 = 1;
/// Bit 63 of a runstate area's entry time is set while the area is being written.
pub const VMASST_RUNSTATE_UPDATE_FLAG: u64 = 5;
