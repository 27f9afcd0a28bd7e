//! From a path to an image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::ImageError;
use crate::files::{Access, Facts, Files, HostFiles, Identity, Opened, open_here};
use crate::host::HostFile;
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

/// How what is below an image is opened. The host's page cache is used: images often share it.
const BELOW: Access = Access {
    read_only: true,
    direct: false,
    unit: Some(512),
};

/// Opens and locks an image, and what is below it.
///
/// # Errors
/// It is not there or no disk, is in use, breaks its format or needs what is not supported.
pub fn open(spec: &OpenSpec) -> Result<Arc<dyn Image>, ImageError> {
    open_with(spec, &HostFiles).map(|(image, _)| image)
}

/// [`open`] with all files opened by `files`. What is said of a file is of the image's own, not of one below it.
///
/// # Errors
/// As of [`open`], and those of `files`.
pub fn open_with(
    spec: &OpenSpec,
    files: &dyn Files,
) -> Result<(Arc<dyn Image>, Facts), ImageError> {
    #[cfg(feature = "power-cut")]
    if !spec.read_only {
        return open_on(spec, files, crate::powercut::from_environment);
    }
    open_on(spec, files, Ok)
}

/// The files below an image, the next one first, as the headers name them now: what [`open_with`] opens for reading besides the image itself. No
/// file is locked. Who may write the image may change what its header names.
///
/// # Errors
/// One of them is not there or no disk, breaks its format or needs what is not supported.
pub fn backing_chain(path: &Path, format: Format) -> Result<Vec<PathBuf>, ImageError> {
    let mut paths = Vec::new();
    if format == Format::Raw {
        return Ok(paths);
    }
    let open = |path: &Path| open_here(path, BELOW, None);
    let opened = open(path)?;
    let mut chain = Chain {
        seen: vec![opened.facts.identity],
    };
    let mut at = Link {
        path: path.to_owned(),
        file: HostFile::new(path, opened)?,
        format,
    };
    while is_qcow2(&at.path, &at.file, at.format)? {
        let header = read_header(&at.path, &at.file)?;
        let Some(below) = chain.below(&at.path, &header, open)? else {
            break;
        };
        paths.push(below.path.clone());
        at = below;
    }
    Ok(paths)
}

/// [`open_with`] with something between the image and its file.
pub(crate) fn open_on(
    spec: &OpenSpec,
    files: &dyn Files,
    layer: impl FnOnce(Arc<dyn Storage>) -> std::io::Result<Arc<dyn Storage>>,
) -> Result<(Arc<dyn Image>, Facts), ImageError> {
    let path = &*spec.path;
    let unit = match (spec.sector_bytes, spec.format) {
        (Some(bytes), _) => Some(bytes),
        (None, Format::Raw) => None,
        (None, _) => Some(512),
    };
    if let Some(sector_bytes) = unit.filter(|bytes| !matches!(bytes, 512 | 4096)) {
        return Err(ImageError::SectorSize {
            path: path.to_owned(),
            sector_bytes,
        });
    }
    let access = Access {
        read_only: spec.read_only,
        direct: spec.direct,
        unit,
    };
    let opened = files.open(path, access, &spec.lock_owner)?;
    let facts = opened.facts;
    let file = HostFile::new(path, opened)?;
    let sector_bytes = unit.unwrap_or(facts.logical_sector_bytes);
    let physical_sector_bytes = facts.physical_sector_bytes;
    let discard = facts.discard_granularity.filter(|_| spec.discard);
    let storage = layer(Arc::new(file)).map_err(ImageError::host(path, "open it"))?;
    if !is_qcow2(path, &*storage, spec.format)? {
        let options = RawOptions {
            sector_bytes,
            physical_sector_bytes,
            read_only: spec.read_only,
            discard,
        };
        return Ok((Arc::new(Raw::new(path, storage, options)?), facts));
    }
    let header = read_header(path, &*storage)?;
    let mut chain = Chain {
        seen: vec![facts.identity],
    };
    let open = |path: &Path| files.open(path, BELOW, &spec.lock_owner);
    let backing = chain.open(path, &header, &open)?;
    let options = qcow2::Options {
        read_only: spec.read_only,
        discard: spec.discard,
        sector_bytes,
        physical_sector_bytes,
        fixed: facts.is_block,
    };
    let image = Qcow2::open(path, storage, header, backing, options)?;
    Ok((Arc::new(Qcow2Image(Arc::new(image))), facts))
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

/// Images below each other.
struct Chain {
    seen: Vec<Identity>,
}

/// A file below an image.
struct Link {
    path: PathBuf,
    file: HostFile,
    format: Format,
}

impl Chain {
    /// Opens what the header of the image at `path` names as its backing file.
    fn below(
        &mut self,
        path: &Path,
        header: &Header,
        open: impl Fn(&Path) -> Result<Opened, ImageError>,
    ) -> Result<Option<Link>, ImageError> {
        let Some(name) = &header.backing else {
            return Ok(None);
        };
        let below = backing_path(path, name)?;
        if self.seen.len() == DEPTH_MAX {
            return Err(ImageError::format(
                path,
                format!("more than {DEPTH_MAX} images lie below each other"),
            ));
        }
        let on_top = || {
            ImageError::format(
                path,
                format!("its backing file '{name}' is an image on top of it"),
            )
        };
        let opened = open(&below).map_err(|error| {
            let report = error.report();
            // The image that names it is the one to mend, and the one that the user knows.
            if let Some(host) = report.host {
                let below = below.display();
                let reason = format!("its backing file {below} cannot be opened: {host}");
                return ImageError::format(path, reason);
            }
            // The image on top has its locks already.
            if report.locked.is_some_and(|file| self.seen.contains(&file)) {
                return on_top();
            }
            error
        })?;
        if self.seen.contains(&opened.facts.identity) {
            return Err(on_top());
        }
        self.seen.push(opened.facts.identity);
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
        let file = HostFile::new(&below, opened)?;
        Ok(Some(Link {
            path: below,
            file,
            format,
        }))
    }

    /// [`Chain::below`] and all that is below that.
    fn open(
        &mut self,
        path: &Path,
        header: &Header,
        open: &impl Fn(&Path) -> Result<Opened, ImageError>,
    ) -> Result<Option<Arc<dyn Source>>, ImageError> {
        let Some(link) = self.below(path, header, open)? else {
            return Ok(None);
        };
        let (below, format) = (link.path, link.format);
        let fixed = link.file.is_block();
        let storage: Arc<dyn Storage> = Arc::new(link.file);
        if !is_qcow2(&below, &*storage, format)? {
            let bytes = storage
                .len()
                .map_err(ImageError::host(&below, "get its size"))?;
            return Ok(Some(Arc::new(RawSource { storage, bytes })));
        }
        let header = read_header(&below, &*storage)?;
        let backing = self.open(&below, &header, open)?;
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
