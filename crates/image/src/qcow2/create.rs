//! New images.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::header::{Compression, Header};
use crate::error::ImageError;

/// 64 KiB, which tools of others choose too.
const CLUSTER_BITS: u32 = 16;
/// Refcounts of 16 bits.
const REFCOUNT_ORDER: u32 = 4;

/// Makes an image of `bytes` bytes; the file must not exist yet.
pub(crate) fn create(path: &Path, bytes: u64) -> Result<(), ImageError> {
    make(path, bytes, None)
}

/// Makes an image that starts as `backing`, whose path is relative to the directory of the image, and records only what changes.
pub(crate) fn create_overlay(
    path: &Path,
    bytes: u64,
    backing: &str,
    backing_format: &str,
) -> Result<(), ImageError> {
    make(path, bytes, Some((backing, backing_format)))
}

fn make(path: &Path, bytes: u64, backing: Option<(&str, &str)>) -> Result<(), ImageError> {
    let impossible = |reason: String| ImageError::format(path, reason);
    if bytes == 0 || !bytes.is_multiple_of(512) || bytes > i64::MAX as u64 {
        return Err(impossible(format!(
            "a disk of {bytes} bytes is not possible: give a multiple of 512"
        )));
    }
    let l1_entries = Header::l1_entries_for(CLUSTER_BITS, bytes)
        .ok_or_else(|| impossible(format!("a disk of {bytes} bytes is too large")))?;
    let cluster_bytes = 1usize << CLUSTER_BITS;
    let clusters = 3 + (l1_entries as usize * 8).div_ceil(cluster_bytes);
    let header = Header {
        version: 3,
        cluster_bits: CLUSTER_BITS,
        bytes,
        l1_entries,
        l1_offset: 3 * cluster_bytes as u64,
        refcount_table_offset: cluster_bytes as u64,
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshots_offset: 0,
        dirty: false,
        corrupt: false,
        autoclear: 0,
        refcount_order: REFCOUNT_ORDER,
        compression: Compression::Deflate,
        backing: backing.map(|(name, _)| name.to_owned()),
        backing_format: backing.map(|(_, format)| format.to_owned()),
    };
    let first = header.encode_new().map_err(impossible)?;
    let block_offset = 2 * cluster_bytes as u64;
    let counts: Vec<u8> = (0..clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
    write_new(path, |file| {
        file.set_len((clusters * cluster_bytes) as u64)?;
        file.write_all_at(&block_offset.to_be_bytes(), cluster_bytes as u64)?;
        file.write_all_at(&counts, block_offset)?;
        // The header last: before it the file is no image.
        file.sync_data()?;
        file.write_all(&first)
    })
}

/// Writes a file that must not exist; removes it if that fails.
pub(crate) fn write_new(
    path: &Path,
    write: impl FnOnce(&mut File) -> std::io::Result<()>,
) -> Result<(), ImageError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(ImageError::host(path, "create it"))?;
    let written = write(&mut file)
        .and_then(|()| file.sync_all())
        .and_then(|()| {
            let directory = path
                .parent()
                .filter(|directory| !directory.as_os_str().is_empty());
            File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
        });
    written.map_err(|error| {
        let _ = std::fs::remove_file(path);
        ImageError::host(path, "write it")(error)
    })
}
