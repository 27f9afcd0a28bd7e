//! A file or block device of the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;

use crate::error::{ImageError, is_full};
use crate::lock::{HAS_IT, Lock, Target, identity_of, recorded_holder};
use crate::storage::{ALIGNMENT, Aligned, Storage, copy_from, copy_to, fill_zero, part};
use crate::types::Buffer;

/// `preadv` takes no more buffers at once (`IOV_MAX`).
const BUFFERS_MAX: usize = 1024;

/// Alignment that direct I/O on a file needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of addresses.
    pub(crate) memory: u32,
    /// Of offsets and lengths.
    pub(crate) offset: u32,
}

/// How a file is opened.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    /// It is not written, and others may read it too.
    pub(crate) read_only: bool,
    /// Past the page cache, if the host can do that in units of `unit` bytes.
    pub(crate) direct: bool,
    pub(crate) unit: u32,
}

/// An open file. Reads and writes go past the host's page cache where that is possible and asked for.
pub(crate) struct HostFile {
    cached: File,
    direct: Option<(File, Alignment)>,
    block: bool,
    had: AtomicU64,
    _lock: Option<Lock>,
    /// After a failed `fdatasync` the host has forgotten which pages it could not write: no later one can be believed.
    sync_failed: AtomicBool,
}

impl HostFile {
    /// Opens `path`, with direct I/O where `direct` asks for it and the host has it for units of `unit` bytes.
    ///
    /// A block device that is to be written is opened exclusively: a mounted one is refused. The file is locked, and `lock_owner`
    /// written down for others; without one, it is not locked and must not be trusted to stay as it is.
    pub(crate) fn open(
        path: &Path,
        access: Access,
        lock_owner: Option<&str>,
    ) -> Result<HostFile, ImageError> {
        let Access {
            read_only,
            direct,
            unit,
        } = access;
        let kind = std::fs::metadata(path).map_err(ImageError::host(path, "open it"))?;
        let block = kind.file_type().is_block_device();
        if !block && !kind.is_file() {
            return Err(ImageError::NotADisk {
                path: path.to_owned(),
                what: if kind.is_dir() {
                    "a directory"
                } else {
                    "no kind of disk"
                },
            });
        }
        let exclusive = if block && !read_only { libc::O_EXCL } else { 0 };
        let cached = options(read_only, exclusive).open(path).map_err(|error| {
            if block && error.raw_os_error() == Some(libc::EBUSY) {
                let (holder, advice) = match recorded_holder(identity_of(&kind)) {
                    Some(holder) if lock_owner == Some(&holder) => (holder, HAS_IT),
                    Some(holder) => (holder, "shut it down or attach it read-only to both"),
                    None => (
                        "the host, which has it mounted or in use".to_owned(),
                        "unmount it first",
                    ),
                };
                return ImageError::Locked {
                    path: path.to_owned(),
                    holder,
                    advice,
                };
            }
            ImageError::host(path, "open it")(error)
        })?;
        let opened = cached
            .metadata()
            .map_err(ImageError::host(path, "look at it"))?;
        let identity = identity_of(&opened);
        let direct = if direct {
            open_direct(path, read_only, identity, unit)
        } else {
            None
        };
        let target = Target {
            path,
            fd: cached.as_fd(),
            data: direct.as_ref().map(|(file, _)| file.as_fd()),
            identity,
        };
        let lock = lock_owner
            .map(|owner| target.lock(!read_only, owner))
            .transpose()?;
        let file = HostFile {
            cached,
            direct,
            block,
            had: AtomicU64::new(0),
            _lock: lock,
            sync_failed: AtomicBool::new(false),
        };
        file.reached(file.len().map_err(ImageError::host(path, "get its size"))?);
        Ok(file)
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

    /// The descriptor for data, and the alignment it needs.
    pub(crate) fn data_fd(&self) -> (BorrowedFd<'_>, Option<Alignment>) {
        match &self.direct {
            Some((file, alignment)) => (file.as_fd(), Some(*alignment)),
            None => (self.cached.as_fd(), None),
        }
    }

    /// What the host's storage writes at once, in bytes.
    pub(crate) fn physical_sector_bytes(&self) -> u32 {
        let reported = if self.block {
            // BLKPBSZGET, by its device in sysfs.
            sysfs_number(self.device_number(), "queue/physical_block_size")
        } else {
            self.cached.metadata().ok().map(|m| m.blksize())
        };
        reported
            .and_then(|bytes| u32::try_from(bytes).ok())
            .filter(|bytes| bytes.is_power_of_two())
            .map_or(4096, |bytes| bytes.clamp(512, 4096))
    }

    /// Granularity of discards in bytes, `None` if there are none.
    pub(crate) fn discard_granularity(&self) -> Option<u32> {
        if !self.block {
            return Some(self.physical_sector_bytes());
        }
        let device = self.device_number();
        sysfs_number(device, "queue/discard_max_bytes").filter(|bytes| *bytes > 0)?;
        sysfs_number(device, "queue/discard_granularity")
            .and_then(|bytes| u32::try_from(bytes).ok())
            .filter(|bytes| *bytes >= 512)
    }

    fn device_number(&self) -> (u32, u32) {
        let device = self.cached.metadata().map_or(0, |m| m.rdev());
        (libc::major(device), libc::minor(device))
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
        if let Err(error) = &result
            && !(is_full(error) && self.direct.is_some())
        {
            self.sync_failed.store(true, Ordering::Release);
        }
        // Without room at this point cached pages are lost: the guest must hear of it.
        result.map_err(|error| {
            if is_full(&error) && self.direct.is_none() {
                io::Error::from_raw_os_error(libc::EIO)
            } else {
                error
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

fn options(read_only: bool, flags: i32) -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(!read_only)
        .custom_flags(flags | libc::O_CLOEXEC);
    options
}

/// A second descriptor without the page cache; `None` where the host has no such thing for units of `unit` bytes.
fn open_direct(
    path: &Path,
    read_only: bool,
    identity: (u64, u64),
    unit: u32,
) -> Option<(File, Alignment)> {
    let file = options(read_only, libc::O_DIRECT).open(path).ok()?;
    let opened = file.metadata().ok()?;
    if identity_of(&opened) != identity {
        return None;
    }
    let alignment = direct_alignment(file.as_fd()).or_else(|| probe_alignment(&file))?;
    (unit.is_multiple_of(alignment.offset) && alignment.memory as usize <= ALIGNMENT)
        .then_some((file, alignment))
}

/// What `statx` says of direct I/O (since Linux 6.1).
fn direct_alignment(fd: BorrowedFd<'_>) -> Option<Alignment> {
    // SAFETY: statx is a plain structure of integers.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the path is an empty C string, and `answer` outlives the call.
    let result = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut answer,
        )
    };
    (result == 0
        && answer.stx_mask & libc::STATX_DIOALIGN != 0
        && answer.stx_dio_offset_align.is_power_of_two()
        && answer.stx_dio_mem_align.is_power_of_two())
    .then_some(Alignment {
        memory: answer.stx_dio_mem_align,
        offset: answer.stx_dio_offset_align,
    })
}

/// Older hosts: tries a read of each size.
fn probe_alignment(file: &File) -> Option<Alignment> {
    let mut bytes = Aligned::new(ALIGNMENT);
    [512u32, 4096].into_iter().find_map(|offset| {
        let range = &mut bytes[..offset as usize];
        retry_on_intr(|| rustix::io::pread(file, &mut *range, u64::from(offset))).ok()?;
        Some(Alignment {
            memory: offset,
            offset,
        })
    })
}

/// The sectors that a block device counts in, where guests can do so, too; 512 for anything else.
pub(crate) fn device_sector_bytes(path: &Path) -> u32 {
    let device = std::fs::metadata(path)
        .ok()
        .filter(|metadata| metadata.file_type().is_block_device())
        .map(|metadata| (libc::major(metadata.rdev()), libc::minor(metadata.rdev())));
    device
        .and_then(|device| sysfs_number(device, "queue/logical_block_size"))
        .map_or(512, |bytes| if bytes == 4096 { 4096 } else { 512 })
}

/// A number below a block device's directory in sysfs; a partition's queue is its disk's.
fn sysfs_number((major, minor): (u32, u32), name: &str) -> Option<u64> {
    let directory = format!("/sys/dev/block/{major}:{minor}");
    [
        format!("{directory}/{name}"),
        format!("{directory}/../{name}"),
    ]
    .iter()
    .find_map(|path| std::fs::read_to_string(path).ok())?
    .trim()
    .parse()
    .ok()
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
        self.had.fetch_min(bytes, Ordering::AcqRel);
        self.cached.set_len(bytes)?;
        self.reached(bytes);
        Ok(())
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
