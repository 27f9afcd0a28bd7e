//! Who opens files: this process, or another that passes their descriptors.

use std::any::Any;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::retry_on_intr;
use serde::{Deserialize, Serialize};

use crate::error::ImageError;
use crate::lock::{HAS_IT, Target, identity_of, once_let_go, recorded_holder};
use crate::storage::{ALIGNMENT, Aligned};

/// Tells files apart: device and inode number, or zero and the device number of a block device.
pub type Identity = (u64, u64);

/// What has to last as long as a file is in use: its drop takes back who was recorded as the holder.
pub type Keep = Box<dyn Any + Send + Sync>;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Access {
    /// It is not written, and others may read it too.
    pub read_only: bool,
    /// Past the page cache, if the host can do that in units of `unit` bytes.
    pub direct: bool,
    /// `None` means the file's logical sector.
    pub unit: Option<u32>,
}

/// Alignment that direct I/O on a file needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alignment {
    /// Of addresses.
    pub memory: u32,
    /// Of offsets and lengths.
    pub offset: u32,
}

/// What is known of an open file that its descriptors do not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// A block device, else a regular file.
    pub is_block: bool,
    /// Which file it is.
    pub identity: Identity,
    /// The sectors that a block device counts in, where guests can do so, too: 512 or 4096; 512 for a regular file.
    pub logical_sector_bytes: u32,
    /// What the host's storage writes at once, in bytes: 512 to 4096.
    pub physical_sector_bytes: u32,
    /// Granularity of discards in bytes, `None` if there are none.
    pub discard_granularity: Option<u32>,
    /// Of direct I/O, `None` if there is none.
    pub alignment: Option<Alignment>,
}

impl Facts {
    /// Number of the block device.
    pub fn device(&self) -> Option<u64> {
        self.is_block.then_some(self.identity.1)
    }

    fn are_possible(&self) -> bool {
        let sector = |bytes: u32| bytes.is_power_of_two() && (512..=4096).contains(&bytes);
        let aligned = |alignment: Alignment| {
            alignment.offset.is_power_of_two()
                && alignment.memory.is_power_of_two()
                && alignment.memory as usize <= ALIGNMENT
        };
        matches!(self.logical_sector_bytes, 512 | 4096)
            && sector(self.physical_sector_bytes)
            && self.discard_granularity.is_none_or(|bytes| bytes >= 512)
            && self.alignment.is_none_or(aligned)
    }
}

/// An open file with its locks, which belong to its open file descriptions and so go with the descriptors.
pub struct Opened {
    pub(crate) cached: File,
    /// The same file past the page cache.
    pub(crate) direct: Option<File>,
    pub(crate) facts: Facts,
    pub(crate) keep: Keep,
}

impl Opened {
    /// What goes to another process, and what stays here until that one has closed the file.
    pub fn parts(self) -> (Facts, Vec<OwnedFd>, Keep) {
        let files = [Some(self.cached), self.direct];
        let descriptors = files.into_iter().flatten().map(OwnedFd::from).collect();
        (self.facts, descriptors, self.keep)
    }

    /// Puts together what [`Opened::parts`] gave.
    ///
    /// # Errors
    /// The facts cannot be true of any file, or not of these descriptors, or there are too few or too many of those.
    pub fn from_parts(facts: Facts, descriptors: Vec<OwnedFd>, keep: Keep) -> io::Result<Opened> {
        let wrong = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if !facts.are_possible() {
            return wrong("what was said of an opened file cannot be");
        }
        let mut files = descriptors.into_iter().map(File::from);
        let (cached, direct) = match (files.next(), files.next(), files.next()) {
            (Some(cached), direct, None) if direct.is_some() == facts.alignment.is_some() => {
                (cached, direct)
            }
            _ => return wrong("an opened file came with a wrong number of descriptors"),
        };
        for file in [Some(&cached), direct.as_ref()].into_iter().flatten() {
            let metadata = file.metadata()?;
            if identity_of(&metadata) != facts.identity
                || metadata.file_type().is_block_device() != facts.is_block
            {
                return wrong("an opened file is not the one that was spoken of");
            }
        }
        Ok(Opened {
            cached,
            direct,
            facts,
            keep,
        })
    }
}

/// Opens and locks files.
pub trait Files: Send + Sync {
    /// Opens one file and locks it, for reading or for writing. `owner` is who uses it, for the messages others get.
    ///
    /// # Errors
    /// It is not there or no disk, is in use, or may not be opened.
    fn open(&self, path: &Path, access: Access, owner: &str) -> Result<Opened, ImageError>;
}

/// The files of the host as this process may open them.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostFiles;

impl Files for HostFiles {
    fn open(&self, path: &Path, access: Access, owner: &str) -> Result<Opened, ImageError> {
        open_here(path, access, Some(owner))
    }
}

/// Opens `path`, with direct I/O where it is asked for and the host has it for units of as many bytes.
///
/// A block device that is to be written is opened exclusively: a mounted one is refused. The file is locked, and `lock_owner`
/// written down for others; without one, it is not locked and must not be trusted to stay as it is.
pub(crate) fn open_here(
    path: &Path,
    access: Access,
    lock_owner: Option<&str>,
) -> Result<Opened, ImageError> {
    let read_only = access.read_only;
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
    let open = || options(read_only, exclusive).open(path);
    let refused = |error: io::Error| {
        if block && error.raw_os_error() == Some(libc::EBUSY) {
            let identity = identity_of(&kind);
            let (holder, advice) = match recorded_holder(identity) {
                Some(holder) if lock_owner == Some(&holder) => (holder, HAS_IT),
                Some(holder) => (holder, "shut it down or attach it read-only to both"),
                None => (
                    "the host, which has it mounted or in use".to_owned(),
                    "unmount it first",
                ),
            };
            return ImageError::Locked {
                path: path.to_owned(),
                identity,
                holder,
                advice,
            };
        }
        ImageError::host(path, "open it")(error)
    };
    // Who is about to end has it no longer than it takes.
    let cached = match block && is_used_by_host(kind.rdev()) {
        true => open().map_err(refused)?,
        false => once_let_go(|| open().map_err(refused))?,
    };
    let opened = cached
        .metadata()
        .map_err(ImageError::host(path, "look at it"))?;
    let mut facts = facts_of(&opened);
    let direct = if access.direct {
        let unit = access.unit.unwrap_or(facts.logical_sector_bytes);
        open_direct(path, read_only, facts.identity, unit)
    } else {
        None
    };
    let target = Target {
        path,
        fd: cached.as_fd(),
        data: direct.as_ref().map(|(file, _)| file.as_fd()),
        identity: facts.identity,
    };
    let keep: Keep = match lock_owner {
        Some(owner) => Box::new(target.lock(!read_only, owner)?),
        None => Box::new(()),
    };
    let (direct, alignment) = direct.unzip();
    facts.alignment = alignment;
    Ok(Opened {
        cached,
        direct,
        facts,
        keep,
    })
}

/// Whether a block device is mounted, or part of another one.
fn is_used_by_host(device: u64) -> bool {
    let number = format!("{}:{}", libc::major(device), libc::minor(device));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    is_used(&number, &mounts, Path::new("/sys/dev/block"))
}

/// Whether the device of this number is in this /proc/PID/mountinfo, or part of another one as this directory of sysfs says.
fn is_used(number: &str, mounts: &str, devices: &Path) -> bool {
    let holders = std::fs::read_dir(devices.join(number).join("holders"));
    mounts
        .lines()
        .any(|mount| mount.split(' ').nth(2) == Some(number))
        || holders.is_ok_and(|mut holders| holders.next().is_some())
}

/// All but the alignment of direct I/O.
fn facts_of(opened: &Metadata) -> Facts {
    let is_block = opened.file_type().is_block_device();
    let queue = |name| {
        let device = (libc::major(opened.rdev()), libc::minor(opened.rdev()));
        sysfs_number(device, name)
    };
    let physical = if is_block {
        // BLKPBSZGET, by its device in sysfs.
        queue("queue/physical_block_size")
    } else {
        Some(opened.blksize())
    };
    let physical_sector_bytes = physical
        .and_then(|bytes| u32::try_from(bytes).ok())
        .filter(|bytes| bytes.is_power_of_two())
        .map_or(4096, |bytes| bytes.clamp(512, 4096));
    let (logical_sector_bytes, discard_granularity) = if is_block {
        let discards = queue("queue/discard_max_bytes").is_some_and(|bytes| bytes > 0);
        let granularity = queue("queue/discard_granularity")
            .and_then(|bytes| u32::try_from(bytes).ok())
            .filter(|bytes| discards && *bytes >= 512);
        let logical = queue("queue/logical_block_size");
        (if logical == Some(4096) { 4096 } else { 512 }, granularity)
    } else {
        (512, Some(physical_sector_bytes))
    };
    Facts {
        is_block,
        identity: identity_of(opened),
        logical_sector_bytes,
        physical_sector_bytes,
        discard_granularity,
        alignment: None,
    }
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

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
