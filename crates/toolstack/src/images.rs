//! Whether the images of a saved domain's disks are as they were: a guest that goes on with others destroys its file systems.
//!
//! A file's size and the time of its last write are all that is looked at, which costs nothing and finds what happens by mistake. Nothing is known of block devices, nor of
//! images by other paths than those that the domain had.

use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hospes_config::{DiskConfig, DiskFormat, DomainConfig};
use serde::{Deserialize, Serialize};

use crate::clock::Utc;

/// How long a domain that has been saved may take to close its images, which then may be written a last time.
const CLOSING: Duration = Duration::from_secs(10);

/// A file that a suspended guest's disk is in.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SavedImage {
    target: PathBuf,
    /// `None` where the file may become longer before it is closed.
    bytes: Option<u64>,
    /// When it was written last, since 1970.
    written: Duration,
}

impl SavedImage {
    /// The images that a guest writes.
    pub(crate) fn all(config: &DomainConfig) -> Vec<SavedImage> {
        config.disks.iter().filter_map(SavedImage::new).collect()
    }

    fn new(disk: &DiskConfig) -> Option<SavedImage> {
        let target = disk.target.as_ref().filter(|_| !disk.read_only)?;
        let file = file(target)?;
        Some(SavedImage {
            target: target.clone(),
            bytes: (disk.format == DiskFormat::Raw).then_some(file.len()),
            written: written(&file)?,
        })
    }

    /// What shows that it is not as the domain left it, which was saved then; a sentence.
    pub(crate) fn change(&self, saved: Option<SystemTime>) -> Option<String> {
        let file = file(&self.target)?;
        let target = self.target.display();
        if let Some(bytes) = self.bytes.filter(|bytes| *bytes != file.len()) {
            let now = file.len();
            return Some(format!(
                "{target} had {bytes} bytes when the domain was saved and has {now}"
            ));
        }
        let now = written(&file)?;
        let saved = saved.and_then(|saved| saved.duration_since(UNIX_EPOCH).ok());
        let differs = now < self.written || saved.is_some_and(|saved| now > saved + CLOSING);
        let [now, then] = [now, self.written].map(|time| Utc::at(time.as_secs()));
        differs.then(|| {
            format!("{target} was written last at {now}, and at {then} when the domain was saved")
        })
    }
}

fn file(target: &Path) -> Option<Metadata> {
    fs::metadata(target).ok().filter(Metadata::is_file)
}

fn written(file: &Metadata) -> Option<Duration> {
    file.modified().ok()?.duration_since(UNIX_EPOCH).ok()
}
