//! Images in QEMU's copy-on-write format, version 2 and 3.
//!
//! Refuses: encryption, external data files, extended L2 entries, backing files that are no local paths, and writing images that are
//! marked as corrupt. Internal snapshots are kept and cannot be taken or shown.
//!
//! Invariants: after a power cut at any time every flushed byte is there and the tables are right but for clusters that nobody uses
//! (see [`flush`] for the order); a cluster gets a new owner only when nothing in the file and no I/O under way uses it as the old one's; metadata
//! is never written as data, whatever the tables of a hostile image say.

mod cache;
mod compress;
mod create;
mod entry;
mod flush;
mod fuzz;
mod header;
mod meta;
mod open;
mod queue;
mod refcounts;
mod repair;
mod resize;
mod snapshots;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

pub(crate) use create::{create, create_overlay, write_new};
pub use fuzz::fuzz_qcow2;
pub(crate) use header::{Header, MAGIC};
pub(crate) use open::{Options, backing_path, read_header};
pub(crate) use queue::Qcow2Image;

use crate::error::IoError;
use crate::hold::Hold;
use crate::storage::{Aligned, Storage, copy_to, fill_zero, part};
use crate::threads::Work;
use crate::types::{Buffer, Geometry, Op, Request};
use header::Compression;
use meta::{Meta, ReadPlan, WritePlan};
use refcounts::Extent;

/// A disk to read from: what is below an image.
pub(crate) trait Source: Send + Sync {
    /// Size in bytes.
    fn bytes(&self) -> u64;
    /// Fills `buffers`, which must lie within the disk.
    fn read_within(&self, buffers: &[Buffer], offset: u64) -> Result<(), IoError>;

    /// Fills `buffers`; there are zeros behind the end.
    fn read_source(&self, buffers: &[Buffer], offset: u64) -> Result<(), IoError> {
        let wanted: u64 = buffers.iter().map(|b| b.len as u64).sum();
        let there = self.bytes().saturating_sub(offset).min(wanted);
        if there > 0 {
            self.read_within(&part(buffers, 0, there), offset)?;
        }
        fill_zero(&part(buffers, there, wanted - there));
        Ok(())
    }
}

/// A raw file as a source.
pub(crate) struct RawSource {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) bytes: u64,
}

impl Source for RawSource {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_within(&self, buffers: &[Buffer], offset: u64) -> Result<(), IoError> {
        self.storage.read_whole(buffers, offset)
    }
}

/// An open qcow2 image, without its queues.
pub(crate) struct Qcow2 {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    backing: Option<Arc<dyn Source>>,
    meta: Mutex<Meta>,
    /// An allocation ended.
    allocated: Condvar,
    /// Held by the one flush at a time.
    flushing: Mutex<()>,
    bytes: AtomicU64,
    cluster_bits: u32,
    compression: Compression,
    options: Options,
    hold: Arc<Hold>,
}

impl Qcow2 {
    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().expect("no thread panics with it")
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            bytes: self.bytes.load(Ordering::Acquire) / u64::from(self.options.sector_bytes)
                * u64::from(self.options.sector_bytes),
            sector_bytes: self.options.sector_bytes,
            physical_sector_bytes: self
                .options
                .physical_sector_bytes
                .max(self.options.sector_bytes),
            read_only: self.options.read_only,
            discard: (self.options.discard && !self.options.read_only)
                .then(|| (1u32 << self.cluster_bits).max(self.options.sector_bytes)),
        }
    }

    fn read(&self, buffers: &[Buffer], offset: u64, bytes: u64) -> Result<(), IoError> {
        let mut done = 0;
        while done < bytes {
            let at = offset + done;
            let plan = self.meta().plan_read(at, bytes - done)?;
            done += match plan {
                ReadPlan::Zeros { bytes } => {
                    fill_zero(&part(buffers, done, bytes));
                    bytes
                }
                ReadPlan::Backing { bytes } => {
                    let buffers = part(buffers, done, bytes);
                    match &self.backing {
                        Some(backing) => backing.read_source(&buffers, at)?,
                        None => fill_zero(&buffers),
                    }
                    bytes
                }
                ReadPlan::Data { host, bytes, token } => {
                    let result = self.storage.read_uncut(&part(buffers, done, bytes), host);
                    self.meta().end_io(token);
                    result?;
                    bytes
                }
                ReadPlan::Compressed {
                    host,
                    stored,
                    token,
                } => {
                    let result = self.decompress(host, stored);
                    self.meta().end_io(token);
                    let cluster = result?;
                    let within = at % self.cluster_bytes();
                    let count = (self.cluster_bytes() - within).min(bytes - done);
                    let wanted = &cluster[within as usize..(within + count) as usize];
                    copy_to(&part(buffers, done, count), wanted);
                    count
                }
            };
        }
        Ok(())
    }

    fn decompress(&self, host: u64, stored: u64) -> Result<Vec<u8>, IoError> {
        let mut raw = vec![0; stored as usize];
        self.storage.load(&mut raw, host)?;
        compress::decompress(self.compression, &raw, self.cluster_bytes() as usize)
    }

    fn write(&self, buffers: &[Buffer], offset: u64, bytes: u64) -> Result<(), IoError> {
        let mut done = 0;
        while done < bytes {
            let mut meta = self.meta();
            let plan = meta.plan_write(offset + done, bytes - done)?;
            match plan {
                WritePlan::Wait => {
                    drop(self.allocated.wait(meta).expect("no thread panics with it"));
                }
                WritePlan::InPlace { host, bytes, token } => {
                    drop(meta);
                    let result = self.storage.write(&part(buffers, done, bytes), host);
                    self.meta().end_io(token);
                    result?;
                    done += bytes;
                }
                WritePlan::Allocated {
                    extent,
                    first,
                    bytes,
                } => {
                    drop(meta);
                    let data = part(buffers, done, bytes);
                    let written = self.fill(extent, first, &data, offset + done, bytes);
                    let mut meta = self.meta();
                    let result = written.and_then(|()| meta.link(first, extent));
                    if result.is_err() {
                        meta.unlink(first, extent);
                    }
                    drop(meta);
                    self.allocated.notify_all();
                    result?;
                    done += bytes;
                }
            }
        }
        Ok(())
    }

    /// Writes new clusters: the data, and around it what the disk had there before.
    fn fill(
        &self,
        extent: Extent,
        first: u64,
        data: &[Buffer],
        offset: u64,
        bytes: u64,
    ) -> Result<(), IoError> {
        let start = first << self.cluster_bits;
        let end = start + (extent.count << self.cluster_bits);
        let mut head = self.around(extent, start, offset)?;
        let mut tail = self.around(extent, offset + bytes, end)?;
        let host = extent.cluster << self.cluster_bits;
        let mut at = host + (offset - start);
        let mut all = Vec::with_capacity(data.len() + 2);
        if let Some(head) = &mut head {
            all.push(Buffer::of(head));
            at = host;
        }
        all.extend_from_slice(data);
        if let Some(tail) = &mut tail {
            all.push(Buffer::of(tail));
        }
        Ok(self.storage.write(&all, at)?)
    }

    /// What the disk has from `from` to `to`, which are in one cluster; `None` if the new cluster has it already.
    fn around(&self, extent: Extent, from: u64, to: u64) -> Result<Option<Aligned>, IoError> {
        if from == to {
            return Ok(None);
        }
        let zero = self.meta().is_zero(from >> self.cluster_bits)?;
        if zero && extent.fresh {
            return Ok(None);
        }
        let mut bytes = Aligned::new((to - from) as usize);
        if !zero {
            // The last cluster may reach behind the end of the disk: there it stays zero.
            let there = self.bytes.load(Ordering::Acquire).clamp(from, to) - from;
            let buffer = Buffer::of(&mut bytes[..there as usize]);
            self.read(&[buffer], from, there)?;
        }
        Ok(Some(bytes))
    }

    fn discard(&self, offset: u64, bytes: u64) -> Result<(), IoError> {
        let first = offset.div_ceil(self.cluster_bytes());
        let end = offset + bytes;
        let last = if end == self.geometry().bytes {
            end.div_ceil(self.cluster_bytes())
        } else {
            end >> self.cluster_bits
        };
        // In pieces, so that others get the lock between them.
        let mut at = first;
        while at < last {
            let next = last.min(at + 4096);
            let mut meta = self.meta();
            while !meta.discard(at..next)? {
                meta = self.allocated.wait(meta).expect("no thread panics with it");
            }
            at = next;
        }
        Ok(())
    }

    /// Everything written before is durable, and can be found.
    pub(crate) fn flush(&self) -> Result<(), IoError> {
        if self.options.read_only {
            return Ok(());
        }
        let _one = self.flushing.lock().expect("no thread panics with it");
        self.flush_alone()
    }

    /// [`Qcow2::flush`] by who holds `flushing`.
    fn flush_alone(&self) -> Result<(), IoError> {
        self.storage.check_uncut()?;
        let batch = self.meta().batch();
        let result = batch.carry_out(&*self.storage);
        let failed = result.as_ref().err().map(|(step, _)| *step);
        self.meta().settle(batch, failed);
        result.map_err(|(_, error)| error)?;
        self.free_drained()
    }

    /// Gives clusters back that nothing uses any more: to the host first, then to the allocator.
    fn free_drained(&self) -> Result<(), IoError> {
        let mut clusters = self.meta().drained();
        if clusters.is_empty() {
            return Ok(());
        }
        clusters.sort_unstable();
        for (start, end) in self.last_references(&clusters)? {
            // Without success the space stays taken in the host, which does no harm.
            let _ = self.storage.discard(
                start << self.cluster_bits,
                (end - start) << self.cluster_bits,
            );
        }
        let mut meta = self.meta();
        for cluster in clusters {
            meta.refcounts.release(cluster)?;
        }
        Ok(())
    }

    /// Runs of those clusters (sorted) that have no reference left when theirs are gone.
    fn last_references(&self, clusters: &[u64]) -> Result<Vec<(u64, u64)>, IoError> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut meta = self.meta();
        for same in clusters.chunk_by(|a, b| a == b) {
            let cluster = same[0];
            if !meta.refcounts.becomes_free(cluster, same.len() as u64)? {
                continue;
            }
            match runs.last_mut() {
                Some((_, end)) if *end == cluster => *end += 1,
                _ => runs.push((cluster, cluster + 1)),
            }
        }
        Ok(runs)
    }

    /// A flush is nothing but an `fdatasync`.
    fn is_clean(meta: &mut Meta) -> bool {
        meta.quarantine.is_empty() && meta.is_clean()
    }
}

impl Source for Qcow2 {
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    fn read_within(&self, buffers: &[Buffer], offset: u64) -> Result<(), IoError> {
        let bytes = buffers.iter().map(|b| b.len as u64).sum();
        self.read(buffers, offset, bytes)
    }
}

impl Work for Qcow2 {
    fn work(&self, request: &Request) -> Result<(), IoError> {
        request.check(&self.geometry())?;
        if matches!(request.op, Op::Write | Op::Discard) {
            self.storage.check_uncut()?;
            if self.meta().is_strained() {
                self.flush()?;
            }
        }
        match request.op {
            Op::Read => self.read(&request.buffers, request.offset, request.bytes),
            Op::Write => self.write(&request.buffers, request.offset, request.bytes),
            Op::Flush => self.flush(),
            Op::Discard => self.discard(request.offset, request.bytes),
        }
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // The second writes the counts of what the first has freed. If the host fails, what was not flushed is lost, as after a power
        // cut; who needed it has flushed.
        let _ = self.flush().and_then(|()| self.flush());
    }
}
