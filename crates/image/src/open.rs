//! From a path to an image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::ImageError;
use crate::host::{Access, HostFile, device_sector_bytes};
use crate::lock::identity_of;
use crate::qcow2::{self, Header, Qcow2, Qcow2Image, RawSource, Source, backing_path, read_header};
use crate::raw::{Raw, RawOptions};
use crate::storage::Storage;
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
    /// 512 or 4096; `None` means that of the block device for a raw disk on one, else 512, which every guest understands.
    pub sector_bytes: Option<u32>,
    /// Who uses it, for the messages others get: `domain 3 (web)`.
    pub lock_owner: String,
}

/// Images below each other at most.
const DEPTH_MAX: usize = 64;

/// Opens and locks an image, and what is below it.
///
/// # Errors
/// It is not there or no disk, is in use, breaks its format or needs what is not supported.
pub fn open(spec: &OpenSpec) -> Result<Arc<dyn Image>, ImageError> {
    #[cfg(feature = "power-cut")]
    if !spec.read_only {
        return open_on(spec, crate::powercut::from_environment);
    }
    open_on(spec, Ok)
}

/// [`open`] with something between the image and its file.
pub(crate) fn open_on(
    spec: &OpenSpec,
    layer: impl FnOnce(Arc<dyn Storage>) -> std::io::Result<Arc<dyn Storage>>,
) -> Result<Arc<dyn Image>, ImageError> {
    let path = &*spec.path;
    let sector_bytes = match (spec.sector_bytes, spec.format) {
        (Some(bytes), _) => bytes,
        (None, Format::Raw) => device_sector_bytes(path),
        (None, _) => 512,
    };
    if !matches!(sector_bytes, 512 | 4096) {
        return Err(ImageError::SectorSize {
            path: path.to_owned(),
            sector_bytes,
        });
    }
    let access = Access {
        read_only: spec.read_only,
        direct: spec.direct,
        unit: sector_bytes,
    };
    let file = HostFile::open(path, access, Some(&spec.lock_owner))?;
    let physical_sector_bytes = file.physical_sector_bytes();
    let discard = file.discard_granularity().filter(|_| spec.discard);
    let fixed = file.is_block();
    let storage = layer(Arc::new(file)).map_err(ImageError::host(path, "open it"))?;
    if !is_qcow2(path, &*storage, spec.format)? {
        let options = RawOptions {
            sector_bytes,
            physical_sector_bytes,
            read_only: spec.read_only,
            discard,
        };
        return Ok(Arc::new(Raw::new(path, storage, options)?));
    }
    let header = read_header(path, &*storage)?;
    let mut chain = Chain {
        owner: &spec.lock_owner,
        seen: vec![identity(path)?],
    };
    let backing = chain.below(path, &header)?;
    let options = qcow2::Options {
        read_only: spec.read_only,
        discard: spec.discard,
        sector_bytes,
        physical_sector_bytes,
        fixed,
    };
    let image = Qcow2::open(path, storage, header, backing, options)?;
    Ok(Arc::new(Qcow2Image(Arc::new(image))))
}

/// Which of the two formats it is. What says it is qcow2 and is not, is found by its header.
fn is_qcow2(path: &Path, storage: &dyn Storage, format: Format) -> Result<bool, ImageError> {
    match format {
        Format::Raw => Ok(false),
        Format::Qcow2 => Ok(true),
        Format::Auto => {
            let mut magic = [0; 4];
            storage
                .read_bytes(&mut magic, 0)
                .map_err(ImageError::host(path, "read it"))?;
            Ok(magic == qcow2::MAGIC)
        }
    }
}

fn identity(path: &Path) -> Result<(u64, u64), ImageError> {
    std::fs::metadata(path)
        .map(|metadata| identity_of(&metadata))
        .map_err(ImageError::host(path, "open it"))
}

/// Images below each other.
struct Chain<'a> {
    owner: &'a str,
    seen: Vec<(u64, u64)>,
}

impl Chain<'_> {
    /// Opens what the header of the image at `path` names as its backing file, for reading. The host's page cache is used: images often share it.
    fn below(
        &mut self,
        path: &Path,
        header: &Header,
    ) -> Result<Option<Arc<dyn Source>>, ImageError> {
        let Some(name) = &header.backing else {
            return Ok(None);
        };
        let below = backing_path(path, name)?;
        // The image that names it is the one to mend, and the one that the user knows.
        let refused = |error| match error {
            ImageError::Host { source, .. } => ImageError::format(
                path,
                format!(
                    "its backing file {} cannot be opened: {source}",
                    below.display()
                ),
            ),
            error => error,
        };
        let identity = identity(&below).map_err(refused)?;
        if self.seen.contains(&identity) {
            return Err(ImageError::format(
                path,
                format!("its backing file '{name}' is an image on top of it"),
            ));
        }
        self.seen.push(identity);
        if self.seen.len() > DEPTH_MAX {
            return Err(ImageError::format(
                path,
                format!("more than {DEPTH_MAX} images lie below each other"),
            ));
        }
        let format = match header.backing_format.as_deref() {
            None => Format::Auto,
            Some("raw" | "file" | "host_device") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => {
                return Err(ImageError::format(
                    path,
                    format!("its backing file has the format '{other}', which is not supported"),
                ));
            }
        };
        let access = Access {
            read_only: true,
            direct: false,
            unit: 512,
        };
        let file = HostFile::open(&below, access, Some(self.owner)).map_err(refused)?;
        let fixed = file.is_block();
        let storage: Arc<dyn Storage> = Arc::new(file);
        if !is_qcow2(&below, &*storage, format)? {
            let bytes = storage
                .len()
                .map_err(ImageError::host(&below, "get its size"))?;
            return Ok(Some(Arc::new(RawSource { storage, bytes })));
        }
        let header = read_header(&below, &*storage)?;
        let backing = self.below(&below, &header)?;
        let options = qcow2::Options {
            read_only: true,
            discard: false,
            sector_bytes: 512,
            physical_sector_bytes: 512,
            fixed,
        };
        let image = Qcow2::open(&below, storage, header, backing, options)?;
        Ok(Some(Arc::new(image)))
    }
}
