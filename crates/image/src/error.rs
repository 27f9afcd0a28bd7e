//! What can go wrong, as sentences.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files::Identity;

/// Why an image cannot be opened, made or changed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A call of the host failed.
    #[error("Disk {path}: cannot {action}: {source}.")]
    Host {
        /// The image.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("Disk {path} is {what}: give a regular file or a block device.")]
    NotADisk {
        /// The image.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// There is not one whole sector in it.
    #[error("Disk {path} has {bytes} bytes, less than a sector of {sector_bytes}: make it larger.")]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The sector.
        sector_bytes: u32,
    },
    /// A sector size that no disk has.
    #[error("Disk {path}: a sector of {sector_bytes} bytes is not possible: choose 512 or 4096.")]
    SectorSize {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        sector_bytes: u32,
    },
    /// A new size that cannot be.
    #[error("Disk {path} cannot be resized to {bytes} bytes: {reason}.")]
    Resize {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        bytes: u64,
        /// Why not.
        reason: &'static str,
    },
    /// Somebody else uses the image.
    #[error("Disk {path} is locked by {holder}: {advice}.")]
    Locked {
        /// The image.
        path: PathBuf,
        /// Which file that is.
        identity: Identity,
        /// A domain or a process.
        holder: String,
        /// What the user can do.
        advice: &'static str,
    },
    /// The content breaks its format, or uses what is not supported.
    #[error("Disk {path}: {reason}.")]
    Format {
        /// The image.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Another process could not open the image.
    #[error("{}", .0.sentence)]
    Reported(Report),
}

/// An [`ImageError`] on its way to another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    sentence: String,
    /// What the host said, where it was a call of the host that failed.
    pub(crate) host: Option<String>,
    /// The file that somebody else uses.
    pub(crate) locked: Option<Identity>,
}

impl Report {
    /// Of what is no error of this crate's: a sentence for the user.
    pub fn new(sentence: String) -> Report {
        Report {
            sentence,
            host: None,
            locked: None,
        }
    }
}

impl From<Report> for ImageError {
    fn from(report: Report) -> ImageError {
        ImageError::Reported(report)
    }
}

impl ImageError {
    /// For another process, in which it reads the same.
    pub fn report(&self) -> Report {
        let (host, locked) = match self {
            ImageError::Reported(report) => return report.clone(),
            ImageError::Host { source, .. } => (Some(source.to_string()), None),
            ImageError::Locked { identity, .. } => (None, Some(*identity)),
            _ => (None, None),
        };
        Report {
            sentence: self.to_string(),
            host,
            locked,
        }
    }

    /// For `map_err`: a failed call on `path`.
    pub(crate) fn host<'a>(
        path: &'a Path,
        action: &'static str,
    ) -> impl FnOnce(io::Error) -> ImageError + 'a {
        move |source| ImageError::Host {
            path: path.to_owned(),
            action,
            source,
        }
    }

    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> ImageError {
        ImageError::Format {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The host could not do it.
    #[error("the host's storage failed: {0}")]
    Host(#[from] io::Error),
    /// The range goes past the end of the disk.
    #[error("the request goes past the end of the disk")]
    OutOfRange,
    /// The host has made the image shorter than the disk.
    #[error(
        "the image ends after {bytes} bytes: the host has cut it off, and what lay behind is lost"
    )]
    Cut {
        /// Where the image ends now, or ended when it was read.
        bytes: u64,
    },
    /// Offset or length is not a multiple of the sector.
    #[error("the request is not aligned to sectors of {sector_bytes} bytes")]
    Unaligned {
        /// The sector.
        sector_bytes: u32,
    },
    /// The buffers do not add up to the length.
    #[error("the buffers are not as long as the request")]
    BufferLength,
    /// A write or a discard to an image that is attached read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The image has no discard.
    #[error("the disk cannot discard")]
    NoDiscard,
    /// The image's own tables are wrong.
    #[error("the image is damaged: {0}")]
    Damaged(String),
}

/// Why an image cannot be made durable.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// There is no queue for it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It failed.
    #[error("what was written cannot be made durable: {0}")]
    Io(#[from] IoError),
    /// It cannot be waited for.
    #[error("cannot wait for the host's storage: {0}")]
    Poll(io::Error),
    /// The time was over.
    #[error("the host's storage takes too long")]
    Late,
}

/// Whether the host has no room left, which is waited out and never shown to the guest.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}
