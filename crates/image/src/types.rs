//! What a disk's image looks like to the back end that serves it.

use std::os::fd::BorrowedFd;

use crate::error::{ImageError, IoError};

/// Size and abilities of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk, a multiple of `sector_bytes`.
    pub bytes: u64,
    /// Unit of offsets and lengths of requests: 512 or 4096.
    pub sector_bytes: u32,
    /// What the host's storage writes at once; at least `sector_bytes`.
    pub physical_sector_bytes: u32,
    /// Writes and discards fail.
    pub read_only: bool,
    /// Granularity of discards in bytes; `None` where the image has no discard.
    pub discard: Option<u32>,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fills the buffers from the image.
    Read,
    /// Writes the buffers to the image.
    Write,
    /// Makes every write durable that was completed before this request was submitted. Has no range and no buffers.
    Flush,
    /// Gives the range back to the host: it reads as zeros or as before. Has no buffers.
    Discard,
}

/// A piece of memory of the guest, or of anybody who makes requests. Laid out like `struct iovec`.
///
/// Whoever puts a buffer into a [`Request`] vouches for it: it is mapped, and for a read writable, from the submission to the
/// completion of the request or the drop of the queue, which waits for what is in flight. The memory may change meanwhile.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Buffer {
    /// First byte.
    pub host: *mut u8,
    /// Bytes.
    pub len: usize,
}

// SAFETY: a buffer is an address and a length; what is there is accessed by system calls and raw copies only, never by references,
// so that a thread more or less makes no difference.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Comes back in the completion; need not be unique.
    pub id: u64,
    /// What to do.
    pub op: Op,
    /// Where it starts, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; for reads and writes the sum of the buffers.
    pub bytes: u64,
    /// Memory to read into or write from.
    pub buffers: Vec<Buffer>,
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// Of the request.
    pub id: u64,
    /// How it ended.
    pub result: Result<(), IoError>,
}

/// Whether requests make progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// They do.
    Good,
    /// The host has no room: writes wait and are tried again every second. A sentence for the user.
    Held(String),
}

/// A queue of requests to an image, owned by one thread. Requests are carried out in any order, also those to the same place.
///
/// Dropping it waits for requests that the host is carrying out and forgets the others.
pub trait Queue: Send {
    /// Takes a request. A bad one (out of range, not aligned, a write to a read-only image) completes with an error.
    fn submit(&mut self, request: Request);
    /// Starts everything submitted so far; without it a request may wait for ever.
    fn flush_submissions(&mut self);
    /// Appends the completions there are and clears the event; during a silence an event that no completion set may stay.
    fn completions(&mut self, out: &mut Vec<Completion>);
    /// Whether completions wait, without a call of the host; `None` where only the event tells, or where the other methods may wait for
    /// somebody. What has another reason for [`Queue::completions`] shows by the event alone.
    fn peek(&mut self) -> Option<bool> {
        None
    }
    /// Keeps completions that [`Queue::peek`] shows from setting the event, or has them set it again. Who ends the silence looks once
    /// more, and again a little later: a completion at that moment may set no event and show only then.
    fn silence(&mut self, _silent: bool) {}
    /// Readable when completions wait, or when the queue wants [`Queue::completions`] called for another reason.
    fn event_fd(&self) -> BorrowedFd<'_>;
}

/// An open image: locked, and shared by its queues.
pub trait Image: Send + Sync {
    /// Current size and abilities.
    fn geometry(&self) -> Geometry;
    /// A new queue.
    fn queue(&self) -> Result<Box<dyn Queue>, ImageError>;
    /// Grows or shrinks the disk to `bytes`; without a change of `bytes` it reads the size of a block device again.
    fn resize(&self, bytes: u64) -> Result<(), ImageError>;
    /// Whether requests make progress.
    fn status(&self) -> Status;
}

impl Request {
    /// Whether the request can be carried out on a disk of this geometry.
    pub(crate) fn check(&self, geometry: &Geometry) -> Result<(), IoError> {
        if self.op == Op::Flush {
            return Ok(());
        }
        if geometry.read_only && self.op != Op::Read {
            return Err(IoError::ReadOnly);
        }
        let sector = u64::from(geometry.sector_bytes);
        if !self.offset.is_multiple_of(sector) || !self.bytes.is_multiple_of(sector) {
            return Err(IoError::Unaligned {
                sector_bytes: geometry.sector_bytes,
            });
        }
        match self.offset.checked_add(self.bytes) {
            Some(end) if end <= geometry.bytes => {}
            _ => return Err(IoError::OutOfRange),
        }
        if self.op == Op::Discard {
            return match geometry.discard {
                Some(_) => Ok(()),
                None => Err(IoError::NoDiscard),
            };
        }
        let mut sum = 0u64;
        for buffer in &self.buffers {
            sum = sum.saturating_add(buffer.len as u64);
        }
        if sum == self.bytes {
            Ok(())
        } else {
            Err(IoError::BufferLength)
        }
    }
}
