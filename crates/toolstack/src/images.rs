//! Whether the images of a saved domain's disks are as they were: a guest that goes on with others destroys its file systems.
//!
//! Sizes, and the times when files were written last, are all that is looked at, which costs nothing and finds what happens by mistake. Of a block device the size
//! alone is known: nobody notes when one was written. A file by another path than the one that the domain had may be a copy, which was written later than what it
//! is a copy of, but not before.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hospes_config::{DiskConfig, DiskFormat, DomainConfig};
use serde::{Deserialize, Serialize};

use crate::clock::Utc;
use crate::launch::resolve_disk;

/// How long a domain that has been saved may take to close its images, which then may be written a last time.
const CLOSING: Duration = Duration::from_secs(10);

/// What a suspended guest's disk is in.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SavedImage {
    target: PathBuf,
    /// The disk's number; `None` in files of versions that did not note it.
    #[serde(default)]
    vdev: Option<u32>,
    /// `None` where it may become longer before it is closed.
    bytes: Option<u64>,
    /// When it was written last, since 1970; `None` for a block device.
    written: Option<Duration>,
}

/// What is seen of an image from outside.
struct Seen {
    bytes: u64,
    /// As in [`SavedImage`].
    written: Option<Duration>,
}

impl Seen {
    /// `None` where it is neither file nor block device, or cannot be looked at: to open it for the domain says why.
    fn of(target: &Path) -> Option<Seen> {
        let metadata = fs::metadata(target).ok()?;
        if metadata.is_file() {
            let modified = metadata.modified().ok()?;
            return Some(Seen {
                bytes: metadata.len(),
                written: modified.duration_since(UNIX_EPOCH).ok(),
            });
        }
        if !metadata.file_type().is_block_device() {
            return None;
        }
        let bytes = File::open(target).ok()?.seek(SeekFrom::End(0)).ok()?;
        Some(Seen {
            bytes,
            written: None,
        })
    }
}

impl SavedImage {
    /// The images that a guest writes.
    pub(crate) fn all(config: &DomainConfig) -> Vec<SavedImage> {
        config.disks.iter().filter_map(SavedImage::new).collect()
    }

    fn new(disk: &DiskConfig) -> Option<SavedImage> {
        let target = disk.target.as_ref().filter(|_| !disk.read_only)?;
        let seen = Seen::of(target)?;
        Some(SavedImage {
            target: target.clone(),
            vdev: Some(disk.vdev.number),
            bytes: (disk.format == DiskFormat::Raw).then_some(seen.bytes),
            written: seen.written,
        })
    }

    /// What shows that the disk which a domain of this configuration has in its place is not as the domain left it, which was saved then; a sentence.
    pub(crate) fn change(
        &self,
        config: &DomainConfig,
        saved: Option<SystemTime>,
    ) -> Option<String> {
        let (path, bytes) = match self.vdev {
            None => (self.target.clone(), self.bytes),
            Some(number) => {
                let mut disks = config.disks.iter();
                let mut disk = disks.find(|disk| disk.vdev.number == number)?.clone();
                resolve_disk(&mut disk).ok()?;
                let is_raw = disk.format == DiskFormat::Raw;
                (disk.target?, self.bytes.filter(|_| is_raw))
            }
        };
        let seen = Seen::of(&path)?;
        let target = path.display();
        let is_other = path != self.target;
        let whose = match is_other {
            true => format!("{} of the saved domain", self.target.display()),
            false => "it".to_owned(),
        };
        if let Some(bytes) = bytes.filter(|bytes| *bytes != seen.bytes) {
            let now = seen.bytes;
            return Some(format!(
                "{target} has {now} bytes, and {whose} had {bytes} when the domain was saved"
            ));
        }
        let (now, then) = (seen.written?, self.written?);
        let saved = saved.and_then(|saved| saved.duration_since(UNIX_EPOCH).ok());
        let is_later = !is_other && saved.is_some_and(|saved| now > saved + CLOSING);
        let [at, before] = [now, then].map(|time| Utc::at(time.as_secs()));
        (now < then || is_later).then(|| {
            format!("{target} was written last at {at}, and {whose} at {before} when the domain was saved")
        })
    }
}
