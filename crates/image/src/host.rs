//! A file or block device of the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;

use crate::error::{ImageError, is_full};
use crate::files::{Access, Alignment, Keep, Opened, open_here};
use crate::lock::unlock;
use crate::storage::{Aligned, Storage, copy_from, copy_to, fill_zero, part};
use crate::types::Buffer;

/// `preadv` takes no more buffers at once (`IOV_MAX`).
const BUFFERS_MAX: usize = 1024;

/// An open file. Reads and writes go past the host's page cache where that is possible and asked for.
pub(crate) struct HostFile {
    cached: File,
    direct: Option<(File, Alignment)>,
    block: bool,
    had: AtomicU64,
    /// Something was written to the page cache, also where most goes past it.
    cache_written: AtomicBool,
    _keep: Keep,
    /// After a failed `fdatasync` the host has forgotten which pages it could not write: no later one can be believed.
    sync_failed: AtomicBool,
    /// Held by the one `fdatasync` of [`Storage::sync`] at a time: of several that wait for the same pages the host tells one alone that they are lost.
    syncing: Mutex<()>,
}

impl Drop for HostFile {
    fn drop(&mut self) {
        // Closing is not enough: a child that has not yet become its program, or a request that ends in the background, may still hold the file open.
        unlock(self.cached.as_fd());
        if let Some((file, _)) = &self.direct {
            unlock(file.as_fd());
        }
    }
}

impl HostFile {
    /// The file that was opened at `path`, which is for sentences alone.
    pub(crate) fn new(path: &Path, opened: Opened) -> Result<HostFile, ImageError> {
        let file = HostFile {
            cached: opened.cached,
            direct: opened.direct.zip(opened.facts.alignment),
            block: opened.facts.is_block,
            had: AtomicU64::new(0),
            cache_written: AtomicBool::new(false),
            _keep: opened.keep,
            sync_failed: AtomicBool::new(false),
            syncing: Mutex::new(()),
        };
        file.reached(file.len().map_err(ImageError::host(path, "get its size"))?);
        Ok(file)
    }

    /// Opens `path` here; see [`open_here`].
    pub(crate) fn open(
        path: &Path,
        access: Access,
        lock_owner: Option<&str>,
    ) -> Result<HostFile, ImageError> {
        HostFile::new(path, open_here(path, access, lock_owner)?)
    }

    /// A write up to here is done.
    pub(crate) fn reached(&self, end: u64) {
        if self.had.load(Ordering::Acquire) < end {
            self.had.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// Whether it is a block device.
    pub(crate) fn is_block(&self) -> bool {
        self.block
    }

    /// Whether the page cache may have something of it that was written. It is to be synced by [`Storage::sync`] then, and nothing else.
    pub(crate) fn is_cached(&self) -> bool {
        self.direct.is_none() || self.cache_written.load(Ordering::Acquire)
    }

    /// The descriptor for data, and the alignment it needs.
    pub(crate) fn data_fd(&self) -> (BorrowedFd<'_>, Option<Alignment>) {
        match &self.direct {
            Some((file, alignment)) => (file.as_fd(), Some(*alignment)),
            None => (self.cached.as_fd(), None),
        }
    }

    /// The way a request goes: descriptor, and whether its memory has to be copied to an aligned place.
    fn way(&self, buffers: &[Buffer], offset: u64) -> (BorrowedFd<'_>, bool) {
        let Some((file, alignment)) = &self.direct else {
            return (self.cached.as_fd(), false);
        };
        let bytes: u64 = buffers.iter().map(|b| b.len as u64).sum();
        let unit = u64::from(alignment.offset);
        if !offset.is_multiple_of(unit) || !bytes.is_multiple_of(unit) {
            return (self.cached.as_fd(), false);
        }
        (file.as_fd(), !fits(buffers, *alignment))
    }

    /// Remembers a failed sync; see [`HostFile::sync_failed`].
    pub(crate) fn note_sync(&self, result: io::Result<()>) -> io::Result<()> {
        if self.sync_failed.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        result.map_err(|error| {
            // Without room at this point cached pages are lost: the guest must hear of it.
            let cached = self.is_cached();
            let waits = is_full(&error) && !cached;
            if !waits {
                self.sync_failed.store(true, Ordering::Release);
            }
            match is_full(&error) && cached {
                true => io::Error::from_raw_os_error(libc::EIO),
                false => error,
            }
        })
    }
}

/// Whether the memory of `buffers` suits `alignment`.
pub(crate) fn fits(buffers: &[Buffer], alignment: Alignment) -> bool {
    let memory = alignment.memory as usize;
    buffers
        .iter()
        .all(|b| (b.host as usize).is_multiple_of(memory) && b.len.is_multiple_of(memory))
}

impl Storage for HostFile {
    fn read(&self, buffers: &[Buffer], offset: u64) -> io::Result<u64> {
        self.transfer(buffers, offset, Direction::Read)
    }

    fn write(&self, buffers: &[Buffer], offset: u64) -> io::Result<()> {
        let bytes = self.transfer(buffers, offset, Direction::Write)?;
        self.reached(offset + bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // One that failed is noted before the next begins.
        let _one = self.syncing.lock().expect("no thread panics with it");
        let result = retry_on_intr(|| rustix::fs::fdatasync(&self.cached));
        self.note_sync(result.map_err(io::Error::from))
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let result = if self.block {
            discard_block(self.cached.as_fd(), offset, bytes)
        } else {
            retry_on_intr(|| rustix::fs::fallocate(&self.cached, flags, offset, bytes))
                .map_err(io::Error::from)
        };
        discarded(result)
    }

    fn len(&self) -> io::Result<u64> {
        if self.block {
            // The end of a block device is where a seek to its end arrives.
            rustix::fs::seek(&self.cached, rustix::fs::SeekFrom::End(0)).map_err(io::Error::from)
        } else {
            Ok(self.cached.metadata()?.len())
        }
    }

    fn had(&self) -> u64 {
        self.had.load(Ordering::Acquire)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let had = self.had.fetch_min(bytes, Ordering::AcqRel);
        let set = self.cached.set_len(bytes);
        self.reached(if set.is_ok() { bytes } else { had });
        set
    }

    fn host_file(self: Arc<Self>) -> Option<Arc<HostFile>> {
        Some(self)
    }
}

/// A host that cannot discard has done what a discard promises: nothing.
pub(crate) fn discarded(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        other => other,
    }
}

fn discard_block(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<()> {
    /// `BLKDISCARD`, `_IO(0x12, 119)` of linux/fs.h; takes two numbers: start and length.
    const BLKDISCARD: libc::c_ulong = 0x1277;
    let range = [offset, bytes];
    loop {
        // SAFETY: the descriptor is open and `range` has the two numbers that the call reads.
        if unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD, range.as_ptr()) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

impl HostFile {
    /// Reads or writes everything, however often the host does less than asked. Returns how many bytes there were.
    fn transfer(&self, buffers: &[Buffer], offset: u64, direction: Direction) -> io::Result<u64> {
        let bytes: u64 = buffers.iter().map(|b| b.len as u64).sum();
        let mut done = 0u64;
        while done < bytes {
            let rest = part(buffers, done, bytes - done);
            // After a short transfer the rest may be fit for the page cache only.
            let (fd, copy) = self.way(&rest, offset + done);
            if direction == Direction::Write && fd.as_raw_fd() == self.cached.as_raw_fd() {
                self.cache_written.store(true, Ordering::Release);
            }
            let count = if copy {
                copied(fd, &rest, offset + done, direction)
            } else {
                call(fd, &rest, offset + done, direction)
            };
            match count {
                Ok(0) if direction == Direction::Read => {
                    fill_zero(&rest);
                    return Ok(done);
                }
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

/// One call with an aligned copy of `buffers`.
fn copied(
    fd: BorrowedFd<'_>,
    buffers: &[Buffer],
    offset: u64,
    direction: Direction,
) -> io::Result<u64> {
    let mut bytes = Aligned::new(buffers.iter().map(|b| b.len).sum());
    if direction == Direction::Write {
        copy_from(buffers, &mut bytes);
    }
    let count = call(fd, &[Buffer::of(&mut bytes)], offset, direction)?;
    if direction == Direction::Read {
        copy_to(buffers, &bytes[..count as usize]);
    }
    Ok(count)
}

/// One call; bytes done.
fn call(
    fd: BorrowedFd<'_>,
    buffers: &[Buffer],
    offset: u64,
    direction: Direction,
) -> io::Result<u64> {
    let count = buffers.len().min(BUFFERS_MAX) as i32;
    let vector = buffers.as_ptr().cast::<libc::iovec>();
    let position = offset as libc::off_t;
    // SAFETY: `Buffer` is laid out like iovec, `count` of them are there, and who made the request vouches for their memory.
    let result = unsafe {
        match direction {
            Direction::Read => libc::preadv(fd.as_raw_fd(), vector, count, position),
            Direction::Write => libc::pwritev(fd.as_raw_fd(), vector, count, position),
        }
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::files::{Facts, HostFiles};
    use crate::hold::Hold;
    use crate::open::open_on;
    use crate::testing::{Directory, flush, spec, write};
    use crate::threads::Event;
    use crate::types::{Op, Queue, Request};
    use crate::uring::{End, start};
    use crate::{Format, OpenSpec, create_qcow2};

    #[test]
    fn sync_without_room_fails_for_good_where_something_went_through_the_page_cache() {
        let directory = Directory::new();
        let path = directory.file("a.img", 8192);
        let access = Access {
            read_only: false,
            direct: true,
            unit: Some(512),
        };
        let file = HostFile::open(&path, access, None).unwrap();
        let sync = |result| {
            let noted = file.note_sync(result);
            noted.err().and_then(|error| error.raw_os_error())
        };
        let full = || Err(io::Error::from_raw_os_error(libc::ENOSPC));
        if file.direct.is_some() {
            // What was to be written is with who wanted that still.
            assert_eq!(sync(full()), Some(libc::ENOSPC));
            assert_eq!(sync(Ok(())), None);
        }
        file.write_bytes(&[1; 100], 3).unwrap();
        assert_eq!(sync(full()), Some(libc::EIO));
        assert_eq!(sync(Ok(())), Some(libc::EIO));
    }

    #[test]
    fn qcow2_past_the_page_cache_is_written_past_it_as_a_whole() {
        let directory = Directory::new();
        let path = directory.join("a.qcow2");
        create_qcow2(&path, 1 << 30).unwrap();
        let mut file = None;
        let opened = open_on(&spec(&path, Format::Qcow2), &HostFiles, |storage| {
            file = storage.clone().host_file();
            Ok(storage)
        });
        let ((image, _), file) = (opened.unwrap(), file.unwrap());
        if file.direct.is_none() {
            return;
        }
        let mut queue = image.queue().unwrap();
        for bytes in [4 << 30, 40 << 40] {
            image.resize(bytes).unwrap();
            write(&mut *queue, bytes - 4096, &[7; 4096]).unwrap();
            flush(&mut *queue).unwrap();
        }
        assert!(!file.is_cached());
    }

    #[test]
    fn flush_beside_a_sync_that_fails_fails_too() {
        let directory = Directory::new();
        let (raw, qcow2) = (directory.file("a.img", 1 << 20), directory.join("a.qcow2"));
        create_qcow2(&qcow2, 1 << 20).unwrap();
        for (path, format) in [(raw, Format::Raw), (qcow2, Format::Qcow2)] {
            let cached = OpenSpec {
                direct: false,
                ..spec(&path, format)
            };
            let mut file = None;
            let opened = open_on(&cached, &HostFiles, |storage| {
                file = storage.clone().host_file();
                Ok(storage)
            });
            let ((image, _), file) = (opened.unwrap(), file.unwrap());
            let other = file.syncing.lock().unwrap();
            thread::scope(|scope| {
                let flushed = scope.spawn(|| flush(&mut *image.queue().unwrap()));
                // Long enough for one that does not wait.
                for _ in 0..20 {
                    if !flushed.is_finished() {
                        thread::sleep(Duration::from_millis(10));
                    }
                }
                let error = io::Error::from_raw_os_error(libc::EIO);
                assert!(file.note_sync(Err(error)).is_err());
                drop(other);
                assert!(flushed.join().unwrap().is_err(), "{format:?}");
            });
        }
    }

    #[test]
    fn sync_that_fails_after_its_queue_was_dropped_is_not_forgotten() {
        // Nothing can be synced there.
        let path = Path::new("/dev/null");
        let facts = Facts {
            is_block: false,
            identity: (0, 0),
            logical_sector_bytes: 512,
            physical_sector_bytes: 512,
            discard_granularity: None,
            alignment: None,
        };
        let opened = Opened {
            cached: File::open(path).unwrap(),
            direct: None,
            facts,
            keep: Box::new(()),
        };
        let file = Arc::new(HostFile::new(path, opened).unwrap());
        let storage: Arc<dyn Storage> = file.clone();
        let hold = Arc::new(Hold::new(path.to_owned()));
        let event = Event::new().unwrap();
        let mut ring = start(&storage, &hold, &event, End::Cut).expect("the host has io_uring");
        ring.submit(Request {
            id: 0,
            op: Op::Flush,
            offset: 0,
            bytes: 0,
            buffers: Vec::new(),
        });
        ring.flush_submissions();
        drop(ring);
        assert!(file.note_sync(Ok(())).is_err());
    }
}
