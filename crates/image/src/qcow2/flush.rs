//! Metadata into the file, in an order that a power cut may interrupt anywhere.
//!
//! 1. What nothing in the file refers to yet, and counts: new tables, increments. With the data, which is there already.
//! 2. What refers to new refcount blocks.
//! 3. What refers to data and to L2 tables.
//!
//! An `fdatasync` stands between them. A flush writes what there was when it began; changes made meanwhile wait for the next.
//!
//! A flush that fails may have linked what was new to the file, from the step on in which things are linked: the next one takes it for linked.

use super::cache::{Dirty, SECTOR, Table};
use super::header::Header;
use super::meta::Meta;
use crate::storage::Storage;

/// Bytes for a place of the file.
struct Piece {
    offset: u64,
    bytes: Vec<u8>,
}

/// Of a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    First,
    Second,
    Third,
}

/// Everything one flush writes.
#[derive(Default)]
pub(crate) struct Batch {
    first: Vec<Piece>,
    second: Vec<Piece>,
    third: Vec<Piece>,
    /// Headers that the file has after the second and the third step.
    headers: [Option<Header>; 2],
    /// No longer referred to after the third step.
    frees: Vec<u64>,
    // What was marked as written, in case it is not.
    l2: Vec<(usize, Dirty)>,
    blocks: Vec<(usize, Dirty)>,
    l1: Dirty,
    table: Dirty,
    l1_moved: bool,
    table_moved: bool,
}

fn pieces(offset: u64, bytes: &[u8], dirty: &Dirty) -> impl Iterator<Item = Piece> {
    dirty.runs(bytes.len()).into_iter().map(move |run| Piece {
        offset: offset + run.start as u64,
        bytes: bytes[run].to_vec(),
    })
}

fn take(table: &mut Table, unlinked: &mut Vec<Piece>, linked: &mut Vec<Piece>) -> Option<Dirty> {
    if table.dirty.is_clean() {
        return None;
    }
    let dirty = std::mem::take(&mut table.dirty);
    if table.unlinked {
        unlinked.push(Piece {
            offset: table.offset,
            bytes: table.bytes.to_vec(),
        });
    } else {
        linked.extend(pieces(table.offset, &table.bytes, &dirty));
    }
    table.flushing = true;
    Some(dirty)
}

/// A table in whole sectors, which alone go past the host's page cache. What follows the L1 table in its last cluster belongs to nobody.
fn bytes_of(entries: &[u64]) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries
        .iter()
        .flat_map(|entry| entry.to_be_bytes())
        .collect();
    bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    bytes
}

impl Meta {
    /// Takes everything that has to be written, and marks it as written.
    pub(crate) fn batch(&mut self) -> Batch {
        let mut batch = Batch::default();
        for (index, block) in self.refcounts.blocks.iter_mut() {
            let mut linked = Vec::new();
            if let Some(dirty) = take(block, &mut batch.first, &mut linked) {
                batch.blocks.push((index, dirty));
            }
            batch.first.append(&mut linked);
        }
        for (index, table) in self.l2.iter_mut() {
            if let Some(dirty) = take(table, &mut batch.first, &mut batch.third) {
                batch.l2.push((index, dirty));
            }
        }
        batch.table = std::mem::take(&mut self.refcounts.table_dirty);
        batch.table_moved = std::mem::take(&mut self.refcounts.table_moved);
        let table_offset = self.refcounts.table_offset;
        if batch.table_moved {
            batch.first.push(Piece {
                offset: table_offset,
                bytes: bytes_of(&self.refcounts.table),
            });
        } else if !batch.table.is_clean() {
            let bytes = bytes_of(&self.refcounts.table);
            batch
                .second
                .extend(pieces(table_offset, &bytes, &batch.table));
        }
        // Not only where it was moved just now: the flush that was to say so may have failed.
        if self.disk_header.refcount_table_offset != table_offset {
            let mut header = self.disk_header.clone();
            header.refcount_table_offset = table_offset;
            header.refcount_table_clusters = self.refcounts.table_clusters() as u32;
            self.header.refcount_table_offset = header.refcount_table_offset;
            self.header.refcount_table_clusters = header.refcount_table_clusters;
            batch.second.push(self.header_piece(&header));
            batch.headers[0] = Some(header);
        }
        batch.l1 = std::mem::take(&mut self.l1_dirty);
        batch.l1_moved = std::mem::take(&mut self.l1_moved);
        if batch.l1_moved {
            batch.first.push(Piece {
                offset: self.header.l1_offset,
                bytes: bytes_of(&self.l1),
            });
        } else if !batch.l1.is_clean() {
            let bytes = bytes_of(&self.l1);
            let offset = self.header.l1_offset;
            batch.third.extend(pieces(offset, &bytes, &batch.l1));
        }
        let now = batch.headers[0].as_ref().unwrap_or(&self.disk_header);
        if *now != self.header || self.header_unsure {
            batch.third.push(self.header_piece(&self.header));
            batch.headers[1] = Some(self.header.clone());
        }
        batch.frees = std::mem::take(&mut self.frees);
        batch.frees.append(&mut self.refcounts.retired);
        batch
    }

    fn header_piece(&self, header: &Header) -> Piece {
        let mut sector = self.first_sector;
        header.store_fields(&mut sector);
        Piece {
            offset: 0,
            bytes: sector.to_vec(),
        }
    }

    /// After a batch, which failed in a step or in none: what it wrote is in the file, or has to be written again.
    pub(crate) fn settle(&mut self, batch: Batch, failed: Option<Step>) {
        // Whatever may have begun to be linked is in the file as the batch had it.
        let reached = |step| failed.is_none_or(|failed| failed >= step);
        for (index, dirty) in &batch.l2 {
            if let Some(table) = self.l2.get(*index) {
                settle_table(table, dirty, failed.is_none(), reached(Step::Third));
            }
        }
        for (index, dirty) in &batch.blocks {
            if let Some(block) = self.refcounts.blocks.get(*index) {
                settle_table(block, dirty, failed.is_none(), reached(Step::Second));
            }
        }
        if failed.is_none() {
            self.header_unsure = false;
            for header in batch.headers.into_iter().flatten() {
                header.store_fields(&mut self.first_sector);
                self.disk_header = header;
            }
            self.quarantine.push_back((self.time, batch.frees));
            self.time += 1;
        } else {
            let steps = batch.headers.iter().zip([Step::Second, Step::Third]);
            for (_, step) in steps.filter(|(header, _)| header.is_some()) {
                self.header_unsure |= reached(step);
            }
            self.refcounts.table_dirty.merge(&batch.table);
            self.refcounts.table_moved |= batch.table_moved && !reached(Step::Second);
            self.l1_dirty.merge(&batch.l1);
            self.l1_moved |= batch.l1_moved && !reached(Step::Third);
            self.frees.extend(batch.frees);
        }
    }
}

fn settle_table(table: &mut Table, dirty: &Dirty, written: bool, linked: bool) {
    table.flushing = false;
    table.unlinked &= !linked;
    if !written {
        table.dirty.merge(dirty);
    }
}

impl Batch {
    /// Does the writing, and makes durable all that was written before.
    ///
    /// # Errors
    /// The step that failed, and of which anything may be in the file, and why.
    pub(crate) fn carry_out(&self, storage: &dyn Storage) -> Result<(), (Step, std::io::Error)> {
        let steps = [
            (Step::First, &self.first),
            (Step::Second, &self.second),
            (Step::Third, &self.third),
        ];
        for (step, pieces) in steps {
            if step != Step::First && pieces.is_empty() {
                continue;
            }
            pieces
                .iter()
                .try_for_each(|piece| storage.write_bytes(&piece.bytes, piece.offset))
                .and_then(|()| storage.sync())
                .map_err(|error| (step, error))?;
        }
        Ok(())
    }
}

impl Meta {
    /// Nothing has to be written or freed.
    pub(crate) fn is_clean(&mut self) -> bool {
        let written = |table: &Table| table.dirty.is_clean() && !table.flushing;
        self.frees.is_empty()
            && self.refcounts.retired.is_empty()
            && self.refcounts.table_dirty.is_clean()
            && !self.refcounts.table_moved
            && self.l1_dirty.is_clean()
            && !self.l1_moved
            && self.header == self.disk_header
            && !self.header_unsure
            && self.l2.iter_mut().all(|(_, table)| written(table))
            && self
                .refcounts
                .blocks
                .iter_mut()
                .all(|(_, table)| written(table))
    }
}
