//! From a path to an image.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::ImageError;
use crate::host::{Access, HostFile};
use crate::raw::{Raw, RawOptions};
use crate::types::Image;

/// How the disk lies in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As it is.
    #[default]
    Raw,
    /// As QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// qcow2 if the file starts like one, else raw.
    ///
    /// Only for images that no guest has ever written as raw ones: a guest can write the header of a qcow2 image that names any
    /// file of the host as its backing file to the start of its raw disk.
    Auto,
}

/// What to open, and how.
#[derive(Clone, Debug, Default)]
pub struct OpenSpec {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// How the disk lies in it.
    pub format: Format,
    /// Writes are refused, and other readers are no obstacle.
    pub read_only: bool,
    /// Go past the host's page cache where the host can do that; where it cannot, the page cache is used. The sensible choice for
    /// disks of guests, which have a cache of their own.
    pub direct: bool,
    /// Whether the guest may give space back.
    pub discard: bool,
    /// 512 or 4096; `None` means 512, which every guest understands.
    pub sector_bytes: Option<u32>,
    /// Who uses it, for the messages others get: `domain 3 (web)`.
    pub lock_owner: String,
}

/// Opens and locks an image.
///
/// # Errors
/// It is not there or no disk, is in use, breaks its format or needs what is not supported.
pub fn open(spec: &OpenSpec) -> Result<Arc<dyn Image>, ImageError> {
    let sector_bytes = spec.sector_bytes.unwrap_or(512);
    if !matches!(sector_bytes, 512 | 4096) {
        return Err(ImageError::SectorSize {
            path: spec.path.clone(),
            sector_bytes,
        });
    }
    if spec.format == Format::Qcow2 {
        return Err(ImageError::format(
            &spec.path,
            "qcow2 images are not supported: convert it to a raw one with qemu-img convert",
        ));
    }
    let access = Access {
        read_only: spec.read_only,
        direct: spec.direct,
        unit: sector_bytes,
    };
    let file = HostFile::open(&spec.path, access, &spec.lock_owner)?;
    let options = RawOptions {
        sector_bytes,
        physical_sector_bytes: file.physical_sector_bytes(),
        read_only: spec.read_only,
        discard: file.discard_granularity().filter(|_| spec.discard),
    };
    Ok(Arc::new(Raw::new(&spec.path, Arc::new(file), options)?))
}
