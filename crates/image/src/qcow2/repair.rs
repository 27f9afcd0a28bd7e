//! Counting anew: for images that were not closed by a program that counts lazily.

use std::collections::HashMap;

use super::Qcow2;
use super::entry::{L1Entry, L2Entry};
use super::meta::Meta;
use super::refcounts::damaged;
use super::snapshots;
use crate::error::IoError;

/// References an image may have to be repaired here.
const REFERENCES_MAX: usize = 1 << 24;

/// Clusters, used or not, that its file may have.
const CLUSTERS_MAX: u64 = 1 << 26;

fn too_large() -> IoError {
    damaged("it was not closed and is too large to be repaired here: run qemu-img check -r all")
}

struct Count {
    references: HashMap<u64, u64>,
    total: usize,
}

impl Count {
    fn add(&mut self, clusters: std::ops::Range<u64>) -> Result<(), IoError> {
        for cluster in clusters {
            *self.references.entry(cluster).or_default() += 1;
            self.total += 1;
            if self.total > REFERENCES_MAX {
                return Err(too_large());
            }
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Makes the refcounts right and clears the mark that says they may not be.
    pub(crate) fn repair(&self) -> Result<(), IoError> {
        let mut guard = self.meta();
        let meta = &mut *guard;
        let mut count = Count {
            references: HashMap::new(),
            total: 0,
        };
        let bits = self.cluster_bits;
        let spread = |offset: u64, bytes: u64| offset >> bits..(offset + bytes).div_ceil(1 << bits);
        count.add(0..1)?;
        let table_clusters = meta.refcounts.table_clusters();
        count.add(spread(meta.refcounts.table_offset, table_clusters << bits))?;
        for offset in &meta.refcounts.table {
            if *offset != 0 {
                count.add(spread(*offset, 1))?;
            }
        }
        count.add(spread(meta.header.l1_offset, meta.l1.len() as u64 * 8))?;
        let l1 = meta.l1.clone();
        count_tables(meta, &l1, &mut count)?;
        let (snapshots, bytes) = snapshots::read(&*self.storage, &meta.header).map_err(damaged)?;
        if meta.header.snapshots > 0 {
            count.add(spread(meta.header.snapshots_offset, bytes))?;
        }
        for snapshot in snapshots {
            let bytes = u64::from(snapshot.l1_entries) * 8;
            count.add(spread(snapshot.l1_offset, bytes))?;
            let l1 = read_entries(meta, snapshot.l1_offset, bytes as usize)?;
            count_tables(meta, &l1, &mut count)?;
        }
        let mut references: Vec<(u64, u64)> = count.references.into_iter().collect();
        references.sort_unstable();
        let behind = references.last().map_or(0, |(last, _)| last + 1);
        // A block device has no end that says what is free, and a count of 0 does not yet.
        meta.refcounts.free_from(behind);
        let end = meta.refcounts.counted().min(meta.refcounts.bound());
        if end.max(behind) > CLUSTERS_MAX {
            return Err(too_large());
        }
        let mut rest = references.iter().peekable();
        for cluster in 0..end {
            let wanted = rest
                .next_if(|(at, _)| *at == cluster)
                .map_or(0, |(_, count)| *count);
            if meta.refcounts.is_counted(cluster)? && meta.refcounts.get(cluster)? != wanted {
                meta.refcounts.set(cluster, wanted)?;
            }
        }
        // Only now: this makes blocks, which nothing has referred to above.
        for (cluster, wanted) in references {
            if meta.refcounts.get(cluster)? != wanted {
                meta.refcounts.set(cluster, wanted)?;
            }
        }
        meta.header.dirty = false;
        Ok(())
    }
}

fn read_entries(meta: &Meta, offset: u64, bytes: usize) -> Result<Vec<u64>, IoError> {
    let mut raw = vec![0; bytes];
    meta.storage.read_bytes(&mut raw, offset)?;
    Ok(raw
        .chunks_exact(8)
        .map(|entry| u64::from_be_bytes(entry.try_into().expect("8 bytes")))
        .collect())
}

fn count_tables(meta: &Meta, l1: &[u64], count: &mut Count) -> Result<(), IoError> {
    let (bits, version) = (meta.header.cluster_bits, meta.header.version);
    let bound = meta.refcounts.bound();
    for raw in l1 {
        let offset = L1Entry::decode(*raw).offset;
        if offset == 0 {
            continue;
        }
        if offset >> bits >= bound {
            return Err(damaged(format!("an L2 table is said to be at {offset:#x}")));
        }
        count.add(offset >> bits..(offset >> bits) + 1)?;
        for raw in read_entries(meta, offset, 1 << bits)? {
            let (offset, bytes) = match L2Entry::decode(raw, bits, version) {
                L2Entry::Unallocated | L2Entry::Zero { reserved: None } => continue,
                L2Entry::Zero {
                    reserved: Some(offset),
                }
                | L2Entry::Data { offset, .. } => (offset, 1),
                L2Entry::Compressed { offset, bytes } => (offset, bytes),
            };
            if offset >> bits >= bound {
                return Err(damaged(format!("data is said to be at {offset:#x}")));
            }
            count.add(offset >> bits..((offset + bytes - 1) >> bits) + 1)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "repair_tests.rs"]
mod tests;
