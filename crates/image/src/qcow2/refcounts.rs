//! Which clusters of the file are in use, and finding free ones.
//!
//! Counts in memory are ahead of the file's: an increment reaches the file before anything there refers to the cluster, a decrement is
//! made only when nothing there does any more. So a power cut leaves clusters that nobody uses, never ones that two use.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::cache::{Cache, Dirty, Table};
use crate::error::IoError;
use crate::storage::Storage;

/// Blocks of refcounts kept in memory: at 64 KiB clusters 16 MiB, for images of half a terabyte.
const BLOCKS: usize = 256;
/// Bits of an entry of the table that are not an offset.
const RESERVED: u64 = 0x1ff;

pub(crate) fn damaged(what: impl Into<String>) -> IoError {
    IoError::Damaged(what.into())
}

/// Allocated clusters, by number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) cluster: u64,
    pub(crate) count: u64,
    /// They read as zeros.
    pub(crate) fresh: bool,
}

/// The refcounts of an image.
pub(crate) struct Refcounts {
    storage: Arc<dyn Storage>,
    cluster_bits: u32,
    order: u32,
    /// Offsets of blocks; 0 where there is none.
    pub(crate) table: Vec<u64>,
    pub(crate) table_offset: u64,
    pub(crate) table_dirty: Dirty,
    /// The table was copied to a new place, which nothing in the file refers to yet.
    pub(crate) table_moved: bool,
    pub(crate) blocks: Cache,
    /// No cluster from here on was ever used.
    end: u64,
    /// All clusters in front are in use.
    hint: u64,
    /// What was never used reads as zeros.
    sparse: bool,
    /// Clusters there can be at most: those of a block device, but for a last one that is cut off.
    limit: u64,
    /// Clusters of the file when it was opened.
    clusters: u64,
    /// Clusters of metadata, which an entry of a damaged or hostile image may name as data.
    pub(crate) protected: HashSet<u64>,
    /// Clusters of a table that was moved: to be freed once nothing in the file refers to them.
    pub(crate) retired: Vec<u64>,
}

/// What [`Refcounts::new`] wants to know.
pub(crate) struct Place {
    pub(crate) cluster_bits: u32,
    pub(crate) order: u32,
    pub(crate) table_offset: u64,
    pub(crate) table_clusters: u32,
    pub(crate) file_bytes: u64,
    /// The file cannot grow.
    pub(crate) fixed: bool,
}

impl Refcounts {
    /// Reads the table.
    pub(crate) fn new(storage: Arc<dyn Storage>, place: &Place) -> Result<Refcounts, IoError> {
        let bytes = (place.table_clusters as usize) << place.cluster_bits;
        if place.table_offset.saturating_add(bytes as u64)
            > place.file_bytes.next_multiple_of(1 << place.cluster_bits)
        {
            return Err(damaged("its refcount table lies behind its end"));
        }
        let mut raw = vec![0; bytes];
        storage.read_bytes(&mut raw, place.table_offset)?;
        let table: Vec<u64> = raw
            .chunks_exact(8)
            .map(|entry| u64::from_be_bytes(entry.try_into().expect("8 bytes")) & !RESERVED)
            .collect();
        let end = place.file_bytes.div_ceil(1 << place.cluster_bits);
        let mut protected: HashSet<u64> = table
            .iter()
            .filter(|offset| **offset != 0)
            .map(|offset| offset >> place.cluster_bits)
            .collect();
        let start = place.table_offset >> place.cluster_bits;
        protected.extend(start..start + u64::from(place.table_clusters));
        Ok(Refcounts {
            storage,
            cluster_bits: place.cluster_bits,
            order: place.order,
            table,
            table_offset: place.table_offset,
            table_dirty: Dirty::default(),
            table_moved: false,
            blocks: Cache::new(BLOCKS),
            end: if place.fixed { 0 } else { end },
            hint: 0,
            sparse: !place.fixed,
            limit: match place.fixed {
                true => place.file_bytes >> place.cluster_bits,
                false => u64::MAX,
            },
            clusters: end,
            protected,
            retired: Vec::new(),
        })
    }

    fn block_entries(&self) -> u64 {
        (8 << self.cluster_bits) >> self.order
    }

    fn place(&self, cluster: u64) -> (usize, usize) {
        let entries = self.block_entries();
        ((cluster / entries) as usize, (cluster % entries) as usize)
    }

    /// Clusters of the table.
    pub(crate) fn table_clusters(&self) -> u64 {
        (self.table.len() as u64 * 8) >> self.cluster_bits
    }

    /// Whether data may be at these clusters: within the file, and no metadata.
    pub(crate) fn may_be_data(&self, clusters: Range<u64>) -> bool {
        clusters.end <= self.bound()
            && clusters
                .clone()
                .all(|cluster| !self.protected.contains(&cluster))
    }

    /// No cluster of the image can be here or behind.
    pub(crate) fn bound(&self) -> u64 {
        if self.sparse { self.end } else { self.clusters }
    }

    /// No cluster from here on has a count.
    pub(crate) fn counted(&self) -> u64 {
        let blocks = self.table.iter().rposition(|offset| *offset != 0);
        blocks.map_or(0, |last| (last as u64 + 1) * self.block_entries())
    }

    /// Says that nothing from here on is in use, whatever is counted.
    pub(crate) fn free_from(&mut self, cluster: u64) {
        self.end = self.end.max(cluster);
    }

    /// Whether the count of a cluster has a place.
    pub(crate) fn is_counted(&mut self, cluster: u64) -> Result<bool, IoError> {
        let (index, _) = self.place(cluster);
        Ok(self.block(index)?.is_some())
    }

    fn block(&mut self, index: usize) -> Result<Option<&mut Table>, IoError> {
        let offset = match self.table.get(index) {
            None | Some(0) => return Ok(None),
            Some(offset) => *offset,
        };
        if self.blocks.get(index).is_none() {
            let cluster_bytes = 1u64 << self.cluster_bits;
            if offset % cluster_bytes != 0 || offset >> self.cluster_bits >= self.bound() {
                return Err(damaged(format!(
                    "its refcount block {index} is at {offset:#x}"
                )));
            }
            let mut bytes = vec![0; cluster_bytes as usize].into_boxed_slice();
            self.storage.load(&mut bytes, offset)?;
            self.blocks.insert(index, Table::loaded(offset, bytes));
        }
        Ok(self.blocks.get(index))
    }

    /// How often the cluster is referred to.
    pub(crate) fn get(&mut self, cluster: u64) -> Result<u64, IoError> {
        let (index, entry) = self.place(cluster);
        let order = self.order;
        Ok(self
            .block(index)?
            .map_or(0, |block| read_count(&block.bytes, entry, order)))
    }

    /// Sets a count whose block exists.
    fn put(&mut self, cluster: u64, count: u64) -> Result<(), IoError> {
        let (index, entry) = self.place(cluster);
        let order = self.order;
        if count > u64::MAX >> (64 - (1 << order)) {
            return Err(damaged(format!(
                "cluster {cluster} is used {count} times, which its refcounts cannot say"
            )));
        }
        let block = self
            .block(index)?
            .ok_or_else(|| damaged(format!("it has no refcount block {index}")))?;
        let at = write_count(&mut block.bytes, entry, order, count);
        block.dirty.mark(at);
        Ok(())
    }

    /// Sets a count, with a new block if there is none.
    pub(crate) fn set(&mut self, cluster: u64, count: u64) -> Result<(), IoError> {
        let (index, _) = self.place(cluster);
        if self.block(index)?.is_none() {
            let place = self.end;
            self.make_block(index, place)?;
        }
        self.put(cluster, count)
    }

    /// Whether a cluster that loses `references` becomes free. Metadata does not: the entry that named it lies.
    pub(crate) fn becomes_free(&mut self, cluster: u64, references: u64) -> Result<bool, IoError> {
        Ok(!self.protected.contains(&cluster) && (1..=references).contains(&self.get(cluster)?))
    }

    /// One reference less.
    pub(crate) fn release(&mut self, cluster: u64) -> Result<(), IoError> {
        let count = self.get(cluster)?;
        if count == 0 || (count == 1 && self.protected.contains(&cluster)) {
            return Ok(());
        }
        self.put(cluster, count - 1)?;
        if count == 1 {
            self.hint = self.hint.min(cluster);
        }
        Ok(())
    }

    fn check_room(&self, clusters: Range<u64>) -> Result<(), IoError> {
        if clusters.end > self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC).into());
        }
        Ok(())
    }

    /// Makes block `index` at or after cluster `from`, which with all behind it is free.
    fn make_block(&mut self, index: usize, from: u64) -> Result<(), IoError> {
        if index >= self.table.len() {
            self.grow_table(index)?;
            if self.table.get(index).is_some_and(|offset| *offset != 0) {
                return Ok(());
            }
        }
        // A block lies in the part of the file that it counts, or where the counting block exists.
        let mut at = from.max(self.end);
        while self.block(self.place(at).0)?.is_some() && self.get(at)? != 0 {
            at += 1;
        }
        let (home, _) = self.place(at);
        if home != index && self.block(home)?.is_none() {
            self.make_block(home, at)?;
            return self.make_block(index, self.end);
        }
        self.check_room(at..at + 1)?;
        let bytes = vec![0; 1 << self.cluster_bits].into_boxed_slice();
        let offset = at << self.cluster_bits;
        self.blocks.insert(index, Table::new(offset, bytes));
        self.table[index] = offset;
        self.table_dirty.mark(index * 8);
        self.protected.insert(at);
        self.end = self.end.max(at + 1);
        self.put(at, 1)
    }

    /// Moves the table to a larger place, with room for `index` at least.
    fn grow_table(&mut self, index: usize) -> Result<(), IoError> {
        let entries_per_cluster = 1usize << (self.cluster_bits - 3);
        let old = self.table_offset >> self.cluster_bits;
        let old_clusters = self.table_clusters();
        let entries = (index + 1 + self.table.len() / 2 + entries_per_cluster)
            .next_multiple_of(entries_per_cluster);
        if entries * 8 > 8 << 20 {
            return Err(damaged(
                "its refcount table cannot become larger: use larger clusters",
            ));
        }
        let before = self.table.len();
        self.table.resize(entries, 0);
        let place = match self.alloc_exact(self.table_clusters()) {
            Ok(place) => place,
            Err(fault) => {
                self.cut_table(before);
                return Err(fault);
            }
        };
        self.protected.extend(place..place + self.table_clusters());
        self.table_offset = place << self.cluster_bits;
        self.table_moved = true;
        self.retire(old..old + old_clusters);
        Ok(())
    }

    /// Takes back what [`Refcounts::grow_table`] added: behind its present place the table would overwrite what is there.
    fn cut_table(&mut self, entries: usize) {
        for index in entries..self.table.len() {
            if self.blocks.remove(index).is_some() {
                let place = self.table[index] >> self.cluster_bits;
                self.retire(place..place + 1);
            }
        }
        self.table.truncate(entries);
        self.table_dirty.truncate(entries * 8);
    }

    /// Gives up the place of a table, which nothing will refer to after the next flush.
    pub(crate) fn retire(&mut self, clusters: Range<u64>) {
        for cluster in clusters {
            self.protected.remove(&cluster);
            self.retired.push(cluster);
        }
    }

    /// Allocates up to `wanted` clusters in a row, at least one.
    pub(crate) fn alloc(&mut self, wanted: u64) -> Result<Extent, IoError> {
        loop {
            let mut start = self.hint;
            while start < self.end && self.get(start)? != 0 {
                start += 1;
            }
            while self.get(start)? != 0 {
                start += 1;
            }
            self.hint = start;
            self.check_room(start..start + 1)?;
            let (index, entry) = self.place(start);
            if self.block(index)?.is_none() {
                self.make_block(index, start)?;
                continue;
            }
            let most = wanted.min(self.block_entries() - entry as u64);
            let fresh = self.sparse && start >= self.end;
            let mut count = 0;
            while count < most
                && start + count < self.limit
                && self.get(start + count)? == 0
                && (self.sparse && start + count >= self.end) == fresh
            {
                if self.protected.contains(&(start + count)) {
                    return Err(damaged(format!(
                        "its metadata at cluster {} is not counted",
                        start + count
                    )));
                }
                count += 1;
            }
            for cluster in start..start + count {
                self.put(cluster, 1)?;
            }
            self.hint = start + count;
            self.end = self.end.max(start + count);
            return Ok(Extent {
                cluster: start,
                count,
                fresh,
            });
        }
    }

    /// Allocates `count` clusters in a row behind everything else.
    pub(crate) fn alloc_exact(&mut self, count: u64) -> Result<u64, IoError> {
        'place: loop {
            let start = if self.sparse {
                self.end
            } else {
                self.first_behind()?
            };
            self.check_room(start..start + count)?;
            for cluster in start..start + count {
                let (index, _) = self.place(cluster);
                if self.block(index)?.is_none() {
                    self.make_block(index, start)?;
                    continue 'place;
                }
                if self.get(cluster)? != 0 {
                    self.end = self.end.max(cluster + 1);
                    continue 'place;
                }
            }
            for cluster in start..start + count {
                self.put(cluster, 1)?;
            }
            self.end = start + count;
            return Ok(start);
        }
    }

    /// On a block device: the first cluster behind all that are in use.
    fn first_behind(&mut self) -> Result<u64, IoError> {
        let entries = self.block_entries();
        let last = self.table.iter().rposition(|offset| *offset != 0);
        let Some(last) = last else {
            return Ok(self.end);
        };
        let first = last as u64 * entries;
        for cluster in (first..first + entries).rev() {
            if self.get(cluster)? != 0 {
                return Ok(self.end.max(cluster + 1));
            }
        }
        Ok(self.end.max(first))
    }
}

fn read_count(bytes: &[u8], entry: usize, order: u32) -> u64 {
    if order < 3 {
        let bits = 1usize << order;
        let at = entry * bits;
        return u64::from(bytes[at / 8] >> (at % 8)) & ((1 << bits) - 1);
    }
    let width = 1usize << (order - 3);
    bytes[entry * width..(entry + 1) * width]
        .iter()
        .fold(0, |count, byte| count << 8 | u64::from(*byte))
}

/// Returns the place of the first changed byte; all of them are in one sector.
fn write_count(bytes: &mut [u8], entry: usize, order: u32, count: u64) -> usize {
    if order < 3 {
        let bits = 1usize << order;
        let at = entry * bits;
        let mask = ((1u16 << bits) - 1) as u8;
        let count = count.min(u64::from(mask)) as u8;
        let byte = &mut bytes[at / 8];
        *byte = (*byte & !(mask << (at % 8))) | count << (at % 8);
        return at / 8;
    }
    let width = 1usize << (order - 3);
    let at = entry * width;
    bytes[at..at + width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::fuzz::Memory;

    const CLUSTER_BITS: u32 = 9;
    /// What a table of one cluster counts with blocks of one cluster: 64 blocks of 256 counts.
    const COUNTED: u64 = 64 * 256;

    /// The counts of a device of so many clusters, all that the table can count in use: the table is cluster 1, its blocks are those behind.
    fn full(clusters: u64) -> Refcounts {
        full_of(clusters << CLUSTER_BITS)
    }

    fn full_of(file_bytes: u64) -> Refcounts {
        let storage = Arc::new(Memory::default());
        let cluster_bytes = 1u64 << CLUSTER_BITS;
        let table: Vec<u8> = (2..66u64)
            .flat_map(|cluster| (cluster << CLUSTER_BITS).to_be_bytes())
            .collect();
        storage.write_bytes(&table, cluster_bytes).unwrap();
        let ones = [0, 1].repeat(64 * cluster_bytes as usize / 2);
        storage.write_bytes(&ones, 2 * cluster_bytes).unwrap();
        let place = Place {
            cluster_bits: CLUSTER_BITS,
            order: 4,
            table_offset: cluster_bytes,
            table_clusters: 1,
            file_bytes,
            fixed: true,
        };
        Refcounts::new(storage, &place).unwrap()
    }

    #[test]
    fn table_without_room_to_grow_stays_as_it_is() {
        // The larger table takes three clusters, and the block that counts them one.
        let mut counts = full(COUNTED + 3);
        for _ in 0..2 {
            let fault = counts.alloc(1).unwrap_err();
            assert!(
                matches!(fault, IoError::Host(ref e) if e.raw_os_error() == Some(libc::ENOSPC)),
                "{fault}"
            );
            assert_eq!((counts.table.len(), counts.table_moved), (64, false));
            assert!(counts.table_dirty.is_clean());
            assert!(counts.blocks.iter_mut().all(|(index, _)| index < 64));
        }
    }

    #[test]
    fn count_that_has_no_room_is_refused() {
        let mut counts = full(COUNTED);
        counts.set(5, 0xffff).unwrap();
        assert!(matches!(counts.set(5, 0x10000), Err(IoError::Damaged(_))));
        assert_eq!(counts.get(5).unwrap(), 0xffff);
    }

    #[test]
    fn cluster_that_the_end_of_a_device_cuts_off_is_not_taken() {
        let mut counts = full_of(((COUNTED + 8) << CLUSTER_BITS) - 100);
        while counts.alloc(1).is_ok() {}
        assert_eq!(counts.get(COUNTED + 6).unwrap(), 1);
        assert_eq!(counts.get(COUNTED + 7).unwrap(), 0);
    }

    #[test]
    fn table_with_room_grows() {
        let mut counts = full(COUNTED + 5);
        let extent = counts.alloc(1).unwrap();
        assert_eq!((extent.cluster, extent.count), (COUNTED + 4, 1));
        assert_eq!((counts.table.len(), counts.table_moved), (192, true));
        assert_eq!(counts.table_offset >> CLUSTER_BITS, COUNTED + 1);
    }
}
