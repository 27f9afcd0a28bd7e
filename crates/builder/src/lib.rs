//! Fills a new domain's memory so that a PVH kernel can start: kernel, initial ramdisk, start information, ACPI tables.
//!
//! The kernel is a bzImage with any payload compression that Linux offers, or an ELF image, itself packed or not. Its
//! own decompressor and real-mode code are never run: the payload is unpacked here and placed by physical address.
//! The interface is xen-project's PVH boot protocol.
//!
//! What it refuses: kernels without a PVH entry note, images that unpack to more than the domain can hold (or 1 GiB),
//! images whose checksums or sizes do not agree with themselves.
//!
//! Invariants: an image is hostile input, no byte of it panics this crate; unpacked bytes go straight into guest memory
//! and are never all held a second time; nothing is written outside of what [`Layout::backed`] lists.
//! Limits: command line [`CMDLINE_LENGTH_MAX`] characters, [`MAX_VCPUS`] virtual CPUs, one ramdisk.
#![forbid(unsafe_code)]

mod acpi;
mod build;
mod bzimage;
mod cpu;
mod elf;
mod error;
mod fuzz;
mod layout;
mod load;
mod place;
mod start_info;
#[cfg(test)]
mod testing;
mod unpack;

pub use acpi::{MAX_VCPUS, POWER_OFF_REQUEST, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, apic_id};
pub use build::{Boot, BuildSpec, CMDLINE_LENGTH_MAX, Open, build};
pub use cpu::{ap_cpu_state, bsp_cpu_state};
pub use error::{BuildError, ImageError};
pub use fuzz::fuzz_kernel;
pub use layout::*;
pub use start_info::{MemmapEntry, MemmapType, Module, StartInfo};
