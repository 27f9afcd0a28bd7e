//! New images, and what is known of existing ones.

use std::path::Path;

use crate::error::ImageError;
use crate::files::Access;
use crate::host::HostFile;
use crate::open::{Format, OpenSpec, open};
use crate::qcow2::{self, read_header, write_new};
use crate::storage::Storage;

/// What [`info`] says of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// How the disk lies in the file: raw or qcow2.
    pub format: Format,
    /// Size of the disk.
    pub bytes: u64,
    /// What the file takes of the host's storage, in bytes.
    pub host_bytes: u64,
    /// Bytes of a cluster; only of qcow2.
    pub cluster_bytes: Option<u64>,
    /// What it is on top of, as its header names it.
    pub backing: Option<String>,
    /// Internal snapshots in it.
    pub snapshots: u32,
    /// It is marked as corrupt.
    pub corrupt: bool,
}

/// Makes a raw image of `bytes` zeros, which take no space yet.
///
/// # Errors
/// It exists already, or the host cannot make it.
pub fn create_raw(path: &Path, bytes: u64) -> Result<(), ImageError> {
    if bytes == 0 || !bytes.is_multiple_of(512) {
        return Err(ImageError::format(
            path,
            format!("a disk of {bytes} bytes is not possible: give a multiple of 512"),
        ));
    }
    write_new(path, |file| file.set_len(bytes))
}

/// Makes a qcow2 image of `bytes` zeros.
///
/// # Errors
/// It exists already, or the host cannot make it.
pub fn create_qcow2(path: &Path, bytes: u64) -> Result<(), ImageError> {
    qcow2::create(path, bytes)
}

/// Makes a qcow2 image at `path` that starts as the image `backing` and records only what is written to it. `backing` is taken from the
/// directory of `path` unless it is absolute, and must not be written from then on. `format` Auto is resolved and recorded.
///
/// # Errors
/// It exists already, the host cannot make it, or the backing file cannot be opened.
pub fn create_overlay(path: &Path, backing: &Path, format: Format) -> Result<(), ImageError> {
    let name = backing.to_str().ok_or_else(|| {
        ImageError::format(path, "the path of its backing file is not UTF-8".to_owned())
    })?;
    let below = qcow2::backing_path(path, name)?;
    let image = open(&OpenSpec {
        path: below.clone(),
        format,
        read_only: true,
        lock_owner: format!("the making of {}", path.display()),
        ..OpenSpec::default()
    })?;
    let format = match format {
        Format::Auto => info(&below)?.format,
        known => known,
    };
    let format = match format {
        Format::Qcow2 => "qcow2",
        Format::Raw | Format::Auto => "raw",
    };
    qcow2::create_overlay(path, image.geometry().bytes, name, format)
}

/// Looks at an image, also at one in use.
///
/// # Errors
/// It is not there, or what looks like qcow2 breaks its format.
pub fn info(path: &Path) -> Result<Info, ImageError> {
    let access = Access {
        read_only: true,
        direct: false,
        unit: Some(512),
    };
    let file = HostFile::open(path, access, None)?;
    let host_bytes = {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(path).map_err(ImageError::host(path, "look at it"))?;
        metadata.blocks() * 512
    };
    let mut magic = [0; 4];
    file.read_bytes(&mut magic, 0)
        .map_err(ImageError::host(path, "read it"))?;
    if magic != qcow2::MAGIC {
        let bytes = file.len().map_err(ImageError::host(path, "get its size"))?;
        return Ok(Info {
            format: Format::Raw,
            bytes,
            host_bytes,
            cluster_bytes: None,
            backing: None,
            snapshots: 0,
            corrupt: false,
        });
    }
    let header = read_header(path, &file)?;
    Ok(Info {
        format: Format::Qcow2,
        bytes: header.bytes,
        host_bytes,
        cluster_bytes: Some(header.cluster_bytes()),
        backing: header.backing,
        snapshots: header.snapshots,
        corrupt: header.corrupt,
    })
}
