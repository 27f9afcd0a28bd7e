//! Debian guests from the archive: a disk image with its kernel, its initial root file system and a configuration file.
//!
//! What it is for: `hospes image debian`, and everything in this repository that needs a full guest. [`build`] drives
//! mmdebstrap(1), which does its work as root or in a user name space, and mke2fs(8), which writes the file system without
//! mounting one. [`seed`] makes the small disk that cloud-init reads (NoCloud).
//!
//! What it refuses: to write over files that exist without being told to, images that nobody could log into, and names
//! that Debian would not take.
//!
//! Invariants: nothing appears under its final name before it is complete. The same recipe on the same state of the archive
//! gives the same bytes, passwords aside. Programs of the host run in the new root; nothing of the host's own
//! configuration is changed. A request to end the process ends the programs too, and leaves nothing behind. Where root may make name spaces,
//! mounts and programs cannot outlive this process, however it ends.
//!
//! Limits: one file system without a partition table, amd64 alone; the host needs the packages mmdebstrap and e2fsprogs,
//! for qcow2 qemu-utils, and for users other than root uidmap.
#![forbid(unsafe_code)]

mod configuration;
mod maker;
mod mirror;
mod program;
mod recipe;
pub mod seed;
mod work;

pub use maker::{BuildError, Made, Progress, build};
pub use recipe::{Format, Kernel, Recipe, RecipeError, parse_size};
