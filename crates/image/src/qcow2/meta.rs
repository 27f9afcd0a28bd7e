//! The tables of an open image, and where its disk's clusters are.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::cache::{Cache, Dirty, Table};
use super::entry::{L1Entry, L2Entry};
use super::header::{FIELDS_BYTES, Header};
use super::refcounts::{Extent, Refcounts, damaged};
use crate::error::IoError;
use crate::storage::Storage;

/// Bytes of L2 tables kept in memory: at 64 KiB clusters enough for a disk of 256 GiB.
const L2_BYTES: usize = 32 << 20;

/// All metadata of an image, behind one lock.
pub(crate) struct Meta {
    pub(crate) storage: Arc<dyn Storage>,
    /// As it shall be.
    pub(crate) header: Header,
    /// As the file has it.
    pub(crate) disk_header: Header,
    /// A flush failed that may have written another to the file.
    pub(crate) header_unsure: bool,
    pub(crate) first_sector: [u8; FIELDS_BYTES],
    pub(crate) l1: Vec<u64>,
    pub(crate) l1_dirty: Dirty,
    /// The L1 table was copied to a new place.
    pub(crate) l1_moved: bool,
    pub(crate) l2: Cache,
    pub(crate) refcounts: Refcounts,
    /// Clusters of the disk that get a place now; whoever else wants to change them waits.
    pub(crate) allocating: Vec<Range<u64>>,
    /// Clusters of the file that tables in memory have one reference less to.
    pub(crate) frees: Vec<u64>,
    /// Those that tables in the file have one reference less to, and which I/O of that time or before may still use.
    pub(crate) quarantine: VecDeque<(u64, Vec<u64>)>,
    /// Data I/O under way, by the time it began.
    under_way: BTreeMap<u64, usize>,
    pub(crate) time: u64,
    /// There is something below unallocated clusters.
    pub(crate) has_backing: bool,
}

/// Proof that data I/O was announced; ended by [`Meta::end_io`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token(u64);

/// Where the next bytes of the disk are.
#[derive(Debug)]
pub(crate) enum ReadPlan {
    Zeros {
        bytes: u64,
    },
    Backing {
        bytes: u64,
    },
    Data {
        host: u64,
        bytes: u64,
        token: Token,
    },
    Compressed {
        host: u64,
        stored: u64,
        token: Token,
    },
}

/// What to do with the next bytes to be written.
#[derive(Debug)]
pub(crate) enum WritePlan {
    /// They have a place.
    InPlace { host: u64, bytes: u64, token: Token },
    /// `extent` is new; the disk's clusters from `first` on are marked as being allocated.
    Allocated {
        extent: Extent,
        first: u64,
        bytes: u64,
    },
    /// Somebody is about to give them a place.
    Wait,
}

impl Meta {
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        header: Header,
        first_sector: [u8; FIELDS_BYTES],
        l1: Vec<u64>,
        refcounts: Refcounts,
    ) -> Meta {
        let tables = (L2_BYTES >> header.cluster_bits).max(16);
        Meta {
            storage,
            has_backing: header.backing.is_some(),
            disk_header: header.clone(),
            header_unsure: false,
            header,
            first_sector,
            l1,
            l1_dirty: Dirty::default(),
            l1_moved: false,
            l2: Cache::new(tables),
            refcounts,
            allocating: Vec::new(),
            frees: Vec::new(),
            quarantine: VecDeque::new(),
            under_way: BTreeMap::new(),
            time: 0,
        }
    }

    fn bits(&self) -> u32 {
        self.header.cluster_bits
    }

    fn place(&self, cluster: u64) -> (usize, usize) {
        let entries = self.header.l2_entries();
        ((cluster / entries) as usize, (cluster % entries) as usize)
    }

    /// Announces data I/O, so that its clusters get no new owner before it has ended.
    pub(crate) fn begin_io(&mut self) -> Token {
        *self.under_way.entry(self.time).or_default() += 1;
        Token(self.time)
    }

    pub(crate) fn end_io(&mut self, token: Token) {
        if let Some(count) = self.under_way.get_mut(&token.0) {
            *count -= 1;
            if *count == 0 {
                self.under_way.remove(&token.0);
            }
        }
    }

    /// Clusters that were in quarantine and that no I/O uses any more.
    pub(crate) fn drained(&mut self) -> Vec<u64> {
        let oldest = self.under_way.keys().next().copied().unwrap_or(u64::MAX);
        let mut out = Vec::new();
        while let Some((time, _)) = self.quarantine.front()
            && *time < oldest
        {
            out.extend(
                self.quarantine
                    .pop_front()
                    .into_iter()
                    .flat_map(|(_, clusters)| clusters),
            );
        }
        out
    }

    /// The L2 table for reading, if there is one.
    fn l2(&mut self, index: usize) -> Result<Option<&mut Table>, IoError> {
        let entry = L1Entry::decode(self.l1.get(index).copied().unwrap_or(0));
        if entry.offset == 0 {
            return Ok(None);
        }
        if self.l2.get(index).is_none() {
            let bytes = self.load_l2(entry.offset)?;
            self.l2.insert(index, Table::loaded(entry.offset, bytes));
        }
        Ok(self.l2.get(index))
    }

    /// Whether looking at the clusters needs no reading.
    pub(crate) fn is_cached(&mut self, cluster: u64) -> bool {
        let (index, _) = self.place(cluster);
        self.l1
            .get(index)
            .is_none_or(|raw| L1Entry::decode(*raw).offset == 0)
            || self.l2.get(index).is_some()
    }

    fn load_l2(&self, offset: u64) -> Result<Box<[u8]>, IoError> {
        let cluster_bytes = self.header.cluster_bytes();
        if !offset.is_multiple_of(cluster_bytes) || offset >> self.bits() >= self.refcounts.bound()
        {
            return Err(damaged(format!("an L2 table is said to be at {offset:#x}")));
        }
        let mut bytes = vec![0; cluster_bytes as usize].into_boxed_slice();
        self.storage.load(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// The L2 table for changes: made if there is none, copied if somebody else refers to it too.
    pub(crate) fn l2_to_change(&mut self, index: usize) -> Result<&mut Table, IoError> {
        let entry = L1Entry::decode(self.l1[index]);
        if entry.offset == 0 || !entry.copied {
            let bytes = if entry.offset == 0 {
                vec![0; self.header.cluster_bytes() as usize].into_boxed_slice()
            } else {
                match self.l2.remove(index) {
                    Some(table) => table.bytes,
                    None => self.load_l2(entry.offset)?,
                }
            };
            let cluster = self.refcounts.alloc(1)?.cluster;
            let offset = cluster << self.bits();
            if entry.offset != 0 {
                self.frees.push(entry.offset >> self.bits());
            }
            self.refcounts.protected.insert(cluster);
            self.l1[index] = L1Entry::own(offset);
            self.l1_dirty.mark(index * 8);
            self.l2.insert(index, Table::new(offset, bytes));
        }
        self.l2(index)?
            .ok_or_else(|| damaged("an L2 table vanished"))
    }

    fn entry(&mut self, cluster: u64) -> Result<L2Entry, IoError> {
        let (bits, version) = (self.bits(), self.header.version);
        let (index, entry) = self.place(cluster);
        Ok(match self.l2(index)? {
            None => L2Entry::Unallocated,
            Some(table) => L2Entry::decode(table.get(entry), bits, version),
        })
    }

    /// Whether a cluster of the disk reads as zeros without looking below.
    pub(crate) fn is_zero(&mut self, cluster: u64) -> Result<bool, IoError> {
        Ok(match self.entry(cluster)? {
            L2Entry::Unallocated => !self.has_backing,
            L2Entry::Zero { .. } => true,
            L2Entry::Data { .. } | L2Entry::Compressed { .. } => false,
        })
    }

    /// Clusters from `cluster` on that share its L2 table, `most` at most.
    fn neighbours(&self, cluster: u64, most: u64) -> u64 {
        let entries = self.header.l2_entries();
        most.min(entries - cluster % entries)
    }

    /// Where the up to `bytes` bytes at `offset` of the disk are; the plan may be for less.
    pub(crate) fn plan_read(&mut self, offset: u64, bytes: u64) -> Result<ReadPlan, IoError> {
        let cluster_bytes = self.header.cluster_bytes();
        let (cluster, within) = (offset >> self.bits(), offset % cluster_bytes);
        let most = self.neighbours(cluster, (within + bytes).div_ceil(cluster_bytes));
        let first = self.entry(cluster)?;
        let mut count = 1;
        while count < most
            && follows(
                first,
                self.entry(cluster + count)?,
                count * cluster_bytes,
                false,
            )
        {
            count += 1;
        }
        let bytes = bytes.min(count * cluster_bytes - within);
        Ok(match first {
            L2Entry::Unallocated if self.has_backing => ReadPlan::Backing { bytes },
            L2Entry::Unallocated | L2Entry::Zero { .. } => ReadPlan::Zeros { bytes },
            L2Entry::Data { offset: host, .. } => {
                if host % cluster_bytes != 0 {
                    return Err(damaged(format!("data is said to be at {host:#x}")));
                }
                ReadPlan::Data {
                    host: host + within,
                    bytes,
                    token: self.begin_io(),
                }
            }
            L2Entry::Compressed {
                offset: host,
                bytes: stored,
            } => ReadPlan::Compressed {
                host,
                stored,
                token: self.begin_io(),
            },
        })
    }

    /// Where the up to `bytes` bytes at `offset` can be written, without any allocation.
    fn in_place(&mut self, offset: u64, bytes: u64) -> Result<Option<(u64, u64)>, IoError> {
        let cluster_bytes = self.header.cluster_bytes();
        let (cluster, within) = (offset >> self.bits(), offset % cluster_bytes);
        let (index, _) = self.place(cluster);
        let own_table = self
            .l1
            .get(index)
            .is_some_and(|raw| L1Entry::decode(*raw).copied);
        let first = self.entry(cluster)?;
        let L2Entry::Data {
            offset: host,
            copied: true,
        } = first
        else {
            return Ok(None);
        };
        if !own_table {
            return Ok(None);
        }
        let most = self.neighbours(cluster, (within + bytes).div_ceil(cluster_bytes));
        let mut count = 1;
        while count < most
            && !self.is_allocating(cluster + count)
            && follows(
                first,
                self.entry(cluster + count)?,
                count * cluster_bytes,
                true,
            )
        {
            count += 1;
        }
        let start = host >> self.bits();
        if host % cluster_bytes != 0 || !self.refcounts.may_be_data(start..start + count) {
            return Err(damaged(format!(
                "data is said to be at {host:#x}, which is not for data"
            )));
        }
        Ok(Some((
            host + within,
            bytes.min(count * cluster_bytes - within),
        )))
    }

    fn is_allocating(&self, cluster: u64) -> bool {
        self.allocating.iter().any(|range| range.contains(&cluster))
    }

    /// The place of all the bytes, if nothing has to be read, made or waited for.
    pub(crate) fn plan_direct(
        &mut self,
        write: bool,
        offset: u64,
        bytes: u64,
    ) -> Option<(u64, Token)> {
        let first = offset >> self.bits();
        if bytes == 0
            || !self.is_cached(first)
            || !self.is_cached((offset + bytes - 1) >> self.bits())
        {
            return None;
        }
        if write {
            if self.is_allocating(first) {
                return None;
            }
            let (host, whole) = self.in_place(offset, bytes).ok()??;
            return (whole == bytes).then(|| (host, self.begin_io()));
        }
        match self.plan_read(offset, bytes).ok()? {
            ReadPlan::Data {
                host,
                bytes: whole,
                token,
            } if whole == bytes => Some((host, token)),
            ReadPlan::Data { token, .. } | ReadPlan::Compressed { token, .. } => {
                self.end_io(token);
                None
            }
            ReadPlan::Zeros { .. } | ReadPlan::Backing { .. } => None,
        }
    }

    /// What to do to write the up to `bytes` bytes at `offset`; the plan may be for less.
    pub(crate) fn plan_write(&mut self, offset: u64, bytes: u64) -> Result<WritePlan, IoError> {
        let cluster_bytes = self.header.cluster_bytes();
        let (cluster, within) = (offset >> self.bits(), offset % cluster_bytes);
        if self.is_allocating(cluster) {
            return Ok(WritePlan::Wait);
        }
        if let Some((host, bytes)) = self.in_place(offset, bytes)? {
            let token = self.begin_io();
            return Ok(WritePlan::InPlace { host, bytes, token });
        }
        let (index, _) = self.place(cluster);
        self.l2_to_change(index)?;
        let most = self.neighbours(cluster, (within + bytes).div_ceil(cluster_bytes));
        let mut count = 1;
        while count < most
            && !self.is_allocating(cluster + count)
            && !matches!(
                self.entry(cluster + count)?,
                L2Entry::Data { copied: true, .. }
            )
        {
            count += 1;
        }
        let extent = self.refcounts.alloc(count)?;
        self.allocating.push(cluster..cluster + extent.count);
        Ok(WritePlan::Allocated {
            extent,
            first: cluster,
            bytes: bytes.min(extent.count * cluster_bytes - within),
        })
    }

    /// An allocation has its data: from now on the disk's clusters are there.
    pub(crate) fn link(&mut self, first: u64, extent: Extent) -> Result<(), IoError> {
        for number in 0..extent.count {
            self.replace(
                first + number,
                L2Entry::own((extent.cluster + number) << self.bits()),
            )?;
        }
        self.end_allocation(first);
        Ok(())
    }

    /// An allocation failed: its clusters, which nothing refers to, are free again.
    pub(crate) fn unlink(&mut self, first: u64, extent: Extent) {
        for number in 0..extent.count {
            // A block that cannot be read now leaves a cluster that nobody uses.
            let _ = self.refcounts.release(extent.cluster + number);
        }
        self.end_allocation(first);
    }

    fn end_allocation(&mut self, first: u64) {
        self.allocating.retain(|range| range.start != first);
    }

    /// Changes an L2 entry; what it referred to will be free when the change is in the file.
    fn replace(&mut self, cluster: u64, raw: u64) -> Result<(), IoError> {
        let (bits, version) = (self.bits(), self.header.version);
        let (index, entry) = self.place(cluster);
        let table = self.l2_to_change(index)?;
        let old = L2Entry::decode(table.get(entry), bits, version);
        table.set(entry, raw);
        match old {
            L2Entry::Unallocated | L2Entry::Zero { reserved: None } => {}
            L2Entry::Zero {
                reserved: Some(offset),
            }
            | L2Entry::Data { offset, .. } => {
                self.frees.push(offset >> bits);
            }
            L2Entry::Compressed { offset, bytes } => {
                self.frees
                    .extend(offset >> bits..=(offset + bytes - 1) >> bits);
            }
        }
        Ok(())
    }

    /// Gives up whole clusters of the disk. False if somebody is about to give one of them a place.
    pub(crate) fn discard(&mut self, clusters: Range<u64>) -> Result<bool, IoError> {
        if clusters.clone().any(|cluster| self.is_allocating(cluster)) {
            return Ok(false);
        }
        let below = match (self.has_backing, self.header.version) {
            (false, _) => 0,
            (true, 2) => return Ok(true),
            (true, _) => L2Entry::ZEROS,
        };
        for cluster in clusters {
            if !matches!(
                self.entry(cluster)?,
                L2Entry::Unallocated | L2Entry::Zero { reserved: None }
            ) {
                self.replace(cluster, below)?;
            }
        }
        Ok(true)
    }

    /// Whether so much waits to be written that it is time to do it.
    pub(crate) fn is_strained(&self) -> bool {
        self.l2.is_strained() || self.refcounts.blocks.is_strained() || self.frees.len() > 1 << 16
    }
}

/// Whether `next`, `distance` bytes after `first`, continues it.
fn follows(first: L2Entry, next: L2Entry, distance: u64, to_write: bool) -> bool {
    match (first, next) {
        (L2Entry::Unallocated, L2Entry::Unallocated)
        | (L2Entry::Zero { .. }, L2Entry::Zero { .. }) => true,
        (L2Entry::Data { offset: a, .. }, L2Entry::Data { offset: b, copied }) => {
            b == a + distance && (copied || !to_write)
        }
        _ => false,
    }
}
