//! What of a guest's address space an address-space process has mapped: a cache of translations, as a TLB is one.
//!
//! What flushes a TLB marks entries as stale; before the process runs again they are compared with the guest's tables, and only what differs is changed. Each table of
//! 512 entries is kept as it was seen, so that comparing one that is the same costs no look at its entries.

use std::collections::{BTreeMap, BTreeSet};

use hospes_memory::{FrameSet, GuestMemory};
use hospes_units::Gfn;

use super::process::Process;
use super::stub::Call;
use super::tables::{Mapping, Table};
use crate::pages::CodePages;

pub const READ: u8 = libc::PROT_READ as u8;
pub const WRITE: u8 = libc::PROT_WRITE as u8;
pub const EXEC: u8 = libc::PROT_EXEC as u8;

/// A page as it is, or may be, mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    pub gfn: Gfn,
    /// Its place in the memory file, in bytes.
    pub offset: u64,
    pub prot: u8,
}

/// Pages whose translations stand in one table.
#[derive(Debug)]
struct Region {
    /// The table, where nothing has been mapped since its entries were compared.
    table: Option<Table>,
    /// The entries as they were then.
    entries: Box<[u64; 512]>,
    pages: Box<[Option<Page>; 512]>,
    mapped: u16,
}

impl Region {
    /// Compares the region with this number with the guest's tables; adds what differs.
    fn compare(&mut self, n: u64, facts: &Facts, changed: &mut Vec<(u64, Page, Option<Page>)>) {
        let mut now = [0u64; 512];
        let table = Table::of(facts.memory, facts.cr3, n);
        let read = table.is_some_and(|t| t.read(facts.memory, &mut now));
        if !read {
            now.fill(0);
        }
        let same_table = table.is_some() && table == self.table;
        if same_table && now == *self.entries {
            return;
        }
        for (i, old) in self.pages.iter().enumerate() {
            let Some(old) = *old else { continue };
            if same_table && now[i] == self.entries[i] {
                continue;
            }
            let m = table
                .filter(|_| read)
                .and_then(|t| t.mapping_by(now[i], i as u64));
            let left = facts.now(old, m);
            if left != Some(old) {
                changed.push((n << 9 | i as u64, old, left));
            }
        }
        self.table = table;
        *self.entries = now;
    }
}

/// By page number: address / 4096.
#[derive(Debug, Default)]
pub struct Mirror {
    /// By page number / 512.
    regions: BTreeMap<u64, Region>,
    /// Pages that are mapped executable.
    executable: BTreeSet<u64>,
    /// Frames that are mapped writable somewhere, or were.
    writable: FrameSet,
    /// Mappings made, and taken away, since the last clearing: each adds two at most.
    ranges: usize,
    all_stale: bool,
    /// Regions of which a page was flushed: which size it had is not known, and a large page is one.
    stale: Vec<u64>,
    marks_seen: u64,
    exec_seen: u64,
    /// Round of the log of written frames.
    round_seen: u64,
}

/// Whether one mapping serves both of two pages, the second as well as the first.
pub fn goes_on((at, page): &(u64, Page), (next, p): &(u64, Page)) -> bool {
    *next == at + 1 && p.prot == page.prot && p.offset == page.offset + 4096
}

/// Regions remembered as stale before all are.
const STALE_MAX: usize = 256;

/// What decides about mappings beside the guest's tables.
pub struct Facts<'a> {
    pub memory: &'a GuestMemory,
    pub code: &'a CodePages,
    pub cr3: u64,
}

impl Facts<'_> {
    /// What is left of a mapping now; `None` where nothing is.
    fn now(&self, old: Page, m: Option<Mapping>) -> Option<Page> {
        // Where the guest has cleared the accessed bit, the next access has to set it again.
        let m = m.filter(|m| m.accessed)?;
        if m.gfn != old.gfn || self.memory.fd_offset(m.gfn) != Some(old.offset) {
            return None;
        }
        let mut prot = old.prot;
        if !(m.writable && m.dirty) || self.code.contains(m.gfn) {
            prot &= !WRITE;
        }
        if prot & EXEC != 0 && !(m.executable && self.code.is_direct(m.gfn)) {
            // It may be writable now: it is mapped again when it is needed.
            return None;
        }
        Some(Page { prot, ..old })
    }
}

impl Mirror {
    pub fn get(&self, page: u64) -> Option<Page> {
        self.regions.get(&(page >> 9))?.pages[(page & 511) as usize]
    }

    pub fn ranges(&self) -> usize {
        self.ranges
    }

    /// The process has nothing mapped any more.
    pub fn clear(&mut self) {
        *self = Mirror {
            marks_seen: self.marks_seen,
            exec_seen: self.exec_seen,
            round_seen: self.round_seen,
            ..Mirror::default()
        };
    }

    pub fn flush_all(&mut self) {
        self.all_stale = true;
        self.stale.clear();
    }

    pub fn flush_page(&mut self, page: u64) {
        let region = page >> 9;
        if self.all_stale || self.stale.contains(&region) {
            return;
        }
        if self.stale.len() == STALE_MAX {
            self.flush_all();
        } else {
            self.stale.push(region);
        }
    }

    fn put(&mut self, at: u64, page: Page) {
        if page.prot & EXEC != 0 {
            self.executable.insert(at);
        } else {
            self.executable.remove(&at);
        }
        if page.prot & WRITE != 0 {
            self.writable.insert(page.gfn);
        }
        let region = self.regions.entry(at >> 9).or_insert_with(|| Region {
            table: None,
            entries: Box::new([0; 512]),
            pages: Box::new([None; 512]),
            mapped: 0,
        });
        region.table = None;
        let slot = &mut region.pages[(at & 511) as usize];
        region.mapped += u16::from(slot.is_none());
        *slot = Some(page);
    }

    /// Adds pages in ascending order, in place of what was there. Gives the calls that map them.
    pub fn add(&mut self, process: &Process, new: &[(u64, Page)]) -> Vec<Call> {
        let mut calls = Vec::new();
        let mut from = 0;
        for i in 0..new.len() {
            let (at, page) = new[i];
            self.put(at, page);
            if !new.get(i + 1).is_some_and(|next| goes_on(&new[i], next)) {
                let (start, first) = new[from];
                let bytes = (i + 1 - from) as u64 * 4096;
                calls.push(process.map_call(start << 12, bytes, first.prot.into(), first.offset));
                from = i + 1;
            }
        }
        self.ranges += calls.len();
        calls
    }

    /// Whether something was flushed, or code written, since the last refresh.
    pub fn is_stale(&self, facts: &Facts) -> bool {
        self.all_stale || !self.stale.is_empty() || self.exec_seen != facts.code.direct_changes()
    }

    /// Compares what is stale with the guest's tables, and gives the calls that change what differs.
    pub fn refresh(&mut self, process: &Process, facts: &Facts) -> Vec<Call> {
        let (marks, changes) = (facts.code.marks(), facts.code.direct_changes());
        let (marked, exec) = (self.marks_seen != marks, self.exec_seen != changes);
        let log = facts.memory.log();
        let round = log.rounds();
        let new_round = self.round_seen != round;
        if !(self.all_stale || marked || exec || new_round || !self.stale.is_empty()) {
            return Vec::new();
        }
        let mut changed = Vec::new();
        if self.all_stale {
            for (&n, region) in &mut self.regions {
                region.compare(n, facts, &mut changed);
            }
        } else {
            for n in std::mem::take(&mut self.stale) {
                if let Some(region) = self.regions.get_mut(&n) {
                    region.compare(n, facts, &mut changed);
                }
            }
        }
        let marked = marked
            && facts
                .code
                .marked_since(self.marks_seen, |gfn| self.writable.contains(gfn));
        if marked || new_round {
            for (at, old) in self.iter().filter(|(_, p)| p.prot & WRITE != 0) {
                if facts.code.contains(old.gfn) || log.must_note(old.gfn) {
                    let prot = old.prot & !WRITE;
                    changed.push((at, old, Some(Page { prot, ..old })));
                }
            }
        }
        if exec {
            // One that was written and looked at again since may need other breakpoints.
            let written = facts.code.dropped_since(self.exec_seen);
            let kept = |gfn| {
                let written = written.as_ref();
                written.is_some_and(|w| w.binary_search(&gfn).is_err())
            };
            for &at in &self.executable {
                if let Some(old) = self.get(at).filter(|p| !kept(p.gfn)) {
                    changed.push((at, old, None));
                }
            }
        }
        self.stale.clear();
        self.all_stale = false;
        self.marks_seen = marks;
        self.exec_seen = changes;
        self.round_seen = round;
        self.apply(process, changed)
    }

    fn iter(&self) -> impl Iterator<Item = (u64, Page)> {
        self.regions.iter().flat_map(|(&n, region)| {
            let pages = region.pages.iter().enumerate();
            pages.filter_map(move |(i, p)| p.map(|p| (n << 9 | i as u64, p)))
        })
    }

    /// Takes over what has changed: at a page, from what it was, to what is left of it.
    fn apply(
        &mut self,
        process: &Process,
        mut changed: Vec<(u64, Page, Option<Page>)>,
    ) -> Vec<Call> {
        // What was found for several reasons keeps the least.
        changed.sort_unstable_by_key(|&(at, _, left)| (at, left.map(|p| p.prot)));
        changed.dedup_by_key(|&mut (at, ..)| at);
        let mut calls: Vec<Call> = Vec::new();
        // Each may leave a mapping in two pieces.
        for &(at, ..) in changed.iter().filter(|(_, _, left)| left.is_none()) {
            self.remove(at);
            match calls.last_mut() {
                Some(last) if last[1] + last[2] == at << 12 => last[2] += 4096,
                _ => calls.push(Process::unmap_call(at << 12, 4096)),
            }
        }
        self.ranges += calls.len();
        let less: Vec<(u64, Page)> = changed
            .iter()
            .filter_map(|&(at, old, left)| left.filter(|p| *p != old).map(|p| (at, p)))
            .collect();
        calls.extend(self.add(process, &less));
        calls
    }

    /// Takes a page out; gives the call that does so.
    pub fn take_out(&mut self, at: u64) -> Call {
        self.remove(at);
        self.ranges += 1;
        Process::unmap_call(at << 12, 4096)
    }

    /// Takes all pages out that are executable; gives the calls that do so.
    pub fn take_out_code(&mut self) -> Vec<Call> {
        let pages = std::mem::take(&mut self.executable);
        pages.iter().map(|&at| self.take_out(at)).collect()
    }

    fn remove(&mut self, at: u64) {
        self.executable.remove(&at);
        let Some(region) = self.regions.get_mut(&(at >> 9)) else {
            return;
        };
        let slot = &mut region.pages[(at & 511) as usize];
        region.mapped -= u16::from(slot.is_some());
        *slot = None;
        if region.mapped == 0 {
            self.regions.remove(&(at >> 9));
        }
    }
}

#[cfg(test)]
mod tests;
