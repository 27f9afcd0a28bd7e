//! Clusters of metadata in memory: which of their sectors the file does not have yet.

use std::collections::HashMap;

/// Unit in which metadata is written; the host writes a sector wholly or not at all.
pub(crate) const SECTOR: usize = 512;

/// Sectors of a table that have to be written.
#[derive(Clone, Default, Debug)]
pub(crate) struct Dirty(Vec<u64>);

impl Dirty {
    pub(crate) fn mark(&mut self, byte: usize) {
        let sector = byte / SECTOR;
        let word = sector / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (sector % 64);
    }

    pub(crate) fn mark_all(&mut self, bytes: usize) {
        for byte in (0..bytes).step_by(SECTOR) {
            self.mark(byte);
        }
    }

    pub(crate) fn merge(&mut self, other: &Dirty) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            *word |= more;
        }
    }

    /// Forgets the sectors from a byte on that begins one.
    pub(crate) fn truncate(&mut self, bytes: usize) {
        for (number, word) in self.0.iter_mut().enumerate() {
            let kept = (bytes / SECTOR).saturating_sub(number * 64);
            *word &= 1u64
                .checked_shl(kept as u32)
                .map_or(u64::MAX, |bit| bit - 1);
        }
    }

    pub(crate) fn is_clean(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// Runs of dirty sectors as ranges of bytes.
    pub(crate) fn runs(&self, bytes: usize) -> Vec<std::ops::Range<usize>> {
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for sector in 0..self.0.len() * 64 {
            if self.0[sector / 64] & (1 << (sector % 64)) == 0 {
                continue;
            }
            let range = sector * SECTOR..((sector + 1) * SECTOR).min(bytes);
            match runs.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => runs.push(range),
            }
        }
        runs
    }
}

/// A cluster of metadata as it is in the file, or will be.
pub(crate) struct Table {
    /// Where it is in the file.
    pub(crate) offset: u64,
    pub(crate) bytes: Box<[u8]>,
    pub(crate) dirty: Dirty,
    /// Nothing in the file refers to it yet: it may be written at any time.
    pub(crate) unlinked: bool,
    /// A flush is writing what is no longer marked dirty.
    pub(crate) flushing: bool,
    used: u64,
}

impl Table {
    /// A table that is not yet in the file.
    pub(crate) fn new(offset: u64, bytes: Box<[u8]>) -> Table {
        let mut dirty = Dirty::default();
        dirty.mark_all(bytes.len());
        Table {
            offset,
            bytes,
            dirty,
            unlinked: true,
            flushing: false,
            used: 0,
        }
    }

    /// A table as it was read.
    pub(crate) fn loaded(offset: u64, bytes: Box<[u8]>) -> Table {
        Table {
            offset,
            bytes,
            dirty: Dirty::default(),
            unlinked: false,
            flushing: false,
            used: 0,
        }
    }

    /// The `index`-th entry of 8 bytes.
    pub(crate) fn get(&self, index: usize) -> u64 {
        let at = index * 8;
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    pub(crate) fn set(&mut self, index: usize, value: u64) {
        let at = index * 8;
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        self.dirty.mark(at);
    }
}

/// Tables by their index in the table above them.
pub(crate) struct Cache {
    tables: HashMap<usize, Table>,
    limit: usize,
    clock: u64,
}

impl Cache {
    /// Keeps about `limit` tables.
    pub(crate) fn new(limit: usize) -> Cache {
        Cache {
            tables: HashMap::new(),
            limit,
            clock: 0,
        }
    }

    pub(crate) fn get(&mut self, index: usize) -> Option<&mut Table> {
        self.clock += 1;
        let table = self.tables.get_mut(&index)?;
        table.used = self.clock;
        Some(table)
    }

    /// Adds a table, and forgets the one that was longest not used if there are too many.
    pub(crate) fn insert(&mut self, index: usize, mut table: Table) -> &mut Table {
        if self.tables.len() >= self.limit {
            let clean =
                |table: &Table| !table.unlinked && !table.flushing && table.dirty.is_clean();
            let oldest = self
                .tables
                .iter()
                .filter(|(_, table)| clean(table))
                .min_by_key(|(_, table)| table.used)
                .map(|(index, _)| *index);
            if let Some(oldest) = oldest {
                self.tables.remove(&oldest);
            }
        }
        self.clock += 1;
        table.used = self.clock;
        self.tables.entry(index).insert_entry(table).into_mut()
    }

    pub(crate) fn remove(&mut self, index: usize) -> Option<Table> {
        self.tables.remove(&index)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut Table)> {
        self.tables.iter_mut().map(|(index, table)| (*index, table))
    }

    /// Whether so much has to be written that it is time to do it.
    pub(crate) fn is_strained(&self) -> bool {
        let waiting = |table: &&Table| table.unlinked || !table.dirty.is_clean();
        self.tables.len() >= self.limit
            && self.tables.values().filter(waiting).count() > self.limit / 2
    }
}
