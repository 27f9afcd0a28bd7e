//! Images of disks: files and block devices of the host behind one interface of queues with requests.
//!
//! A back end opens an [`Image`], makes a [`Queue`] for each of its own, and does not know the format or how the host carries
//! requests out. Formats do not know what a ring of the guest looks like.
//!
//! Refuses: network protocols, directories, and images that somebody else writes.
//!
//! Invariants: a flush completes only after an `fdatasync` that began when every write completed before it was in the file;
//! a full host file system never becomes an error of the guest, its writes wait (see [`Status`]); the memory of a request is not
//! touched after its completion or the drop of its queue.
//! Limits: sectors of 512 or 4096 bytes.

mod error;
mod files;
mod flush;
mod hold;
mod host;
mod lock;
mod loops;
mod make;
mod open;
#[cfg(any(test, feature = "power-cut"))]
mod powercut;
mod qcow2;
mod raw;
mod storage;
mod threads;
mod types;
mod uring;

#[cfg(test)]
mod testing;

pub use error::{FlushError, ImageError, IoError, Report};
pub use files::{Access, Alignment, Facts, Files, HostFiles, Identity, Keep, Opened};
pub use flush::flush;
pub use make::{Info, create_overlay, create_qcow2, create_raw, info};
pub use open::{Format, OpenSpec, backing_chain, open, open_with};
#[doc(hidden)]
pub use qcow2::fuzz_qcow2;
pub use types::{Buffer, Completion, Geometry, Image, Op, Queue, Request, Status};
