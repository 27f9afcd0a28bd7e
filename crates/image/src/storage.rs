//! Bytes below the formats: where an image's file is read and written.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::error::IoError;
use crate::host::HostFile;
use crate::types::Buffer;

/// A file or something that acts like one. All calls block; all may be made by several threads at once.
pub(crate) trait Storage: Send + Sync {
    /// Fills `buffers` from `offset`; past the end there are zeros. Returns how many bytes lie before it.
    fn read(&self, buffers: &[Buffer], offset: u64) -> io::Result<u64>;
    /// Writes all of `buffers` at `offset`, past the end too.
    fn write(&self, buffers: &[Buffer], offset: u64) -> io::Result<()>;
    /// Makes durable what was written before.
    fn sync(&self) -> io::Result<()>;
    /// Gives the range back to the host. It reads as zeros if the storage is a regular file.
    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Size in bytes.
    fn len(&self) -> io::Result<u64>;
    /// A length that it is known to have had, by its opening or by writes that are done; 0 where that is not known.
    fn had(&self) -> u64 {
        0
    }
    /// Changes the size; what is added reads as zeros.
    fn set_len(&self, bytes: u64) -> io::Result<()>;
    /// The file, where requests may go to it without this trait.
    fn host_file(self: Arc<Self>) -> Option<Arc<HostFile>>;

    /// [`Storage::read`] into a slice.
    fn read_bytes(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(&[Buffer::of(bytes)], offset).map(drop)
    }

    /// [`Storage::read`] of what was there when the image was opened.
    fn read_whole(&self, buffers: &[Buffer], offset: u64) -> Result<(), IoError> {
        let wanted: u64 = buffers.iter().map(|b| b.len as u64).sum();
        match self.read(buffers, offset)? {
            there if there < wanted => Err(self.cut(offset + there)),
            _ => Ok(()),
        }
    }

    /// [`Storage::read`] of a file that may still grow: zeros past the end, but not where the host has cut something off.
    fn read_uncut(&self, buffers: &[Buffer], offset: u64) -> Result<(), IoError> {
        let wanted: u64 = buffers.iter().map(|b| b.len as u64).sum();
        // Before the read: it may grow meanwhile.
        let had = self.had();
        match self.read(buffers, offset)? {
            there if there < wanted && offset + there < had => Err(self.cut(offset + there)),
            _ => Ok(()),
        }
    }

    /// [`Storage::read_uncut`] into a slice.
    fn load(&self, bytes: &mut [u8], offset: u64) -> Result<(), IoError> {
        self.read_uncut(&[Buffer::of(bytes)], offset)
    }

    /// Refuses where the host has cut something off, which a write must not replace by a hole.
    fn check_uncut(&self) -> Result<(), IoError> {
        let had = self.had();
        match self.len()? {
            bytes if bytes < had => Err(IoError::Cut { bytes }),
            _ => Ok(()),
        }
    }

    /// There is nothing at byte `missing`.
    fn cut(&self, missing: u64) -> IoError {
        IoError::Cut {
            bytes: self.len().unwrap_or(missing).min(missing),
        }
    }

    /// Refuses what would reach past the end, and so grow a file that the host has cut.
    fn check_end(&self, end: u64) -> Result<(), IoError> {
        match self.len()? {
            bytes if bytes < end => Err(IoError::Cut { bytes }),
            _ => Ok(()),
        }
    }

    /// [`Storage::write`] from a slice.
    fn write_bytes(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // Written from only.
        let buffer = Buffer {
            host: bytes.as_ptr().cast_mut(),
            len: bytes.len(),
        };
        self.write(&[buffer], offset)
    }
}

impl Buffer {
    /// The memory of a slice that outlives the request.
    pub(crate) fn of(bytes: &mut [u8]) -> Buffer {
        Buffer {
            host: bytes.as_mut_ptr(),
            len: bytes.len(),
        }
    }
}

/// The part of `buffers` from byte `skip` on, `bytes` long.
pub(crate) fn part(buffers: &[Buffer], skip: u64, bytes: u64) -> Vec<Buffer> {
    let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut out = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        if left == 0 {
            break;
        }
        if skip >= buffer.len {
            skip -= buffer.len;
            continue;
        }
        let len = (buffer.len - skip).min(left);
        out.push(Buffer {
            host: buffer.host.wrapping_add(skip),
            len,
        });
        left -= len;
        skip = 0;
    }
    out
}

/// Fills all of `buffers` with zeros.
pub(crate) fn fill_zero(buffers: &[Buffer]) {
    for buffer in buffers {
        // SAFETY: who made the request vouches that the buffer is mapped and writable until it completes.
        unsafe { std::ptr::write_bytes(buffer.host, 0, buffer.len) };
    }
}

/// Copies `bytes` into `buffers`; the shorter of the two decides how much.
pub(crate) fn copy_to(buffers: &[Buffer], mut bytes: &[u8]) {
    for buffer in buffers {
        let len = buffer.len.min(bytes.len());
        // SAFETY: who made the request vouches that the buffer is mapped and writable until it completes; it is not our slice.
        unsafe { std::ptr::copy(bytes.as_ptr(), buffer.host, len) };
        bytes = &bytes[len..];
    }
}

/// Copies `buffers` into `bytes`; the shorter of the two decides how much.
pub(crate) fn copy_from(buffers: &[Buffer], mut bytes: &mut [u8]) {
    for buffer in buffers {
        let len = buffer.len.min(bytes.len());
        // SAFETY: who made the request vouches that the buffer is mapped until it completes; it is not our slice.
        unsafe { std::ptr::copy(buffer.host, bytes.as_mut_ptr(), len) };
        bytes = &mut bytes[len..];
    }
}

/// Memory aligned as any direct I/O wants it. Starts as zeros.
pub(crate) struct Aligned {
    start: *mut u8,
    len: usize,
}

/// What [`Aligned`] is aligned to, in bytes.
pub(crate) const ALIGNMENT: usize = 4096;

// SAFETY: it owns its memory like a Vec<u8>.
unsafe impl Send for Aligned {}
// SAFETY: as above.
unsafe impl Sync for Aligned {}

impl Aligned {
    /// `len` bytes of zeros.
    pub(crate) fn new(len: usize) -> Aligned {
        let layout = Aligned::layout(len);
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Aligned { start, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), ALIGNMENT).expect("sizes of buffers are small")
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with the same layout.
        unsafe { dealloc(self.start, Aligned::layout(self.len)) };
    }
}

impl Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` has `len` initialised bytes that only we refer to.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}
