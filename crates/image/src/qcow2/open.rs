//! From a file to an open image.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex};

use super::entry::L1Entry;
use super::header::{FIELDS_BYTES, Header};
use super::meta::Meta;
use super::refcounts::{Place, Refcounts};
use super::{Qcow2, Source, snapshots};
use crate::error::{ImageError, IoError};
use crate::hold::Hold;
use crate::storage::Storage;

/// How an image is shown and used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub(crate) read_only: bool,
    pub(crate) discard: bool,
    pub(crate) sector_bytes: u32,
    pub(crate) physical_sector_bytes: u32,
    /// The file cannot grow: a block device.
    pub(crate) fixed: bool,
}

/// Reads and checks the header.
pub(crate) fn read_header(path: &Path, storage: &dyn Storage) -> Result<Header, ImageError> {
    // As large as the largest cluster: names and extensions are in the first.
    let file_bytes = storage
        .len()
        .map_err(ImageError::host(path, "get its size"))?;
    let mut first = vec![0; file_bytes.min(2 << 20) as usize];
    storage
        .read_bytes(&mut first, 0)
        .map_err(ImageError::host(path, "read it"))?;
    Header::parse(&first).map_err(|reason| ImageError::format(path, reason))
}

impl Qcow2 {
    /// Opens the image in `storage` on top of `backing`, which the header names.
    pub(crate) fn open(
        path: &Path,
        storage: Arc<dyn Storage>,
        header: Header,
        backing: Option<Arc<dyn Source>>,
        options: Options,
    ) -> Result<Qcow2, ImageError> {
        let broken = |reason: String| ImageError::format(path, reason);
        if header.corrupt && !options.read_only {
            return Err(broken(
                "it is marked as corrupt: repair it with qemu-img check -r all, or attach it read-only".to_owned(),
            ));
        }
        let file_bytes = storage
            .len()
            .map_err(ImageError::host(path, "get its size"))?;
        let l1_bytes = u64::from(header.l1_entries) * 8;
        let file_end = file_bytes.next_multiple_of(header.cluster_bytes());
        if header.l1_offset + l1_bytes > file_end {
            return Err(broken("its L1 table lies behind its end".to_owned()));
        }
        let mut raw = vec![0; l1_bytes as usize];
        storage
            .read_bytes(&mut raw, header.l1_offset)
            .map_err(ImageError::host(path, "read its L1 table"))?;
        let l1 = raw
            .chunks_exact(8)
            .map(|entry| u64::from_be_bytes(entry.try_into().expect("8 bytes")))
            .collect::<Vec<_>>();
        let place = Place {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table_offset: header.refcount_table_offset,
            table_clusters: header.refcount_table_clusters,
            file_bytes,
            fixed: options.fixed,
        };
        let mut refcounts =
            Refcounts::new(storage.clone(), &place).map_err(|error| into_image(path, error))?;
        protect(&mut refcounts, &*storage, &header, &l1).map_err(broken)?;
        let mut first_sector = [0; FIELDS_BYTES];
        storage
            .read_bytes(&mut first_sector, 0)
            .map_err(ImageError::host(path, "read it"))?;
        let needs_repair = header.dirty && !options.read_only;
        let clear = header.autoclear != 0 && !options.read_only;
        let mut meta = Meta::new(storage.clone(), header.clone(), first_sector, l1, refcounts);
        if clear {
            meta.header.autoclear = 0;
        }
        let image = Qcow2 {
            path: path.to_owned(),
            backing,
            meta: Mutex::new(meta),
            allocated: Condvar::new(),
            flushing: Mutex::new(()),
            bytes: AtomicU64::new(header.bytes),
            cluster_bits: header.cluster_bits,
            compression: header.compression,
            options,
            hold: Arc::new(Hold::new(path.to_owned())),
            storage,
        };
        if needs_repair {
            image.repair().map_err(|error| into_image(path, error))?;
        }
        if clear || needs_repair {
            image.flush().map_err(|error| into_image(path, error))?;
        }
        Ok(image)
    }
}

pub(crate) fn into_image(path: &Path, error: IoError) -> ImageError {
    match error {
        IoError::Host(source) => ImageError::host(path, "read or write its tables")(source),
        other => ImageError::format(path, other.to_string()),
    }
}

/// Tells the allocator where metadata is.
fn protect(
    refcounts: &mut Refcounts,
    storage: &dyn Storage,
    header: &Header,
    l1: &[u64],
) -> Result<(), String> {
    let bits = header.cluster_bits;
    let (snapshots, table_bytes) = snapshots::read(storage, header)?;
    let mut cover = |offset: u64, bytes: u64| {
        let first = offset >> bits;
        let last = (offset + bytes).div_ceil(1 << bits);
        refcounts.protected.extend(first..last);
    };
    cover(0, 1);
    cover(header.l1_offset, u64::from(header.l1_entries) * 8);
    if header.snapshots > 0 {
        cover(header.snapshots_offset, table_bytes);
    }
    for snapshot in snapshots {
        cover(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
    }
    for raw in l1 {
        let offset = L1Entry::decode(*raw).offset;
        if offset != 0 {
            cover(offset, 1);
        }
    }
    Ok(())
}

/// Where a backing file named in an image at `path` is.
///
/// # Errors
/// It is no local path.
pub(crate) fn backing_path(path: &Path, name: &str) -> Result<PathBuf, ImageError> {
    let local = name.strip_prefix("file:").unwrap_or(name);
    let scheme = local
        .split_once(':')
        .is_some_and(|(scheme, _)| !scheme.is_empty() && !scheme.contains('/'));
    if scheme || local.is_empty() {
        return Err(ImageError::format(
            path,
            format!(
                "its backing file '{name}' is not a local path, which is all that is supported"
            ),
        ));
    }
    let directory = path.parent().unwrap_or(Path::new(""));
    Ok(directory.join(local))
}
