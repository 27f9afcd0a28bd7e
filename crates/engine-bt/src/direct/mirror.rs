//! What of a guest's address space an address-space process has mapped: a cache of translations, as a TLB is one.
//!
//! What flushes a TLB marks entries as stale; before the process runs again they are compared with the guest's tables, and only what differs is changed.

use std::collections::BTreeMap;

use hospes_memory::GuestMemory;
use hospes_units::Gfn;

use super::process::Process;
use super::stub::Call;

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

/// By page number: address / 4096.
#[derive(Debug, Default)]
pub struct Mirror {
    pages: BTreeMap<u64, Page>,
    /// Mappings made since the last clearing: no less than the process has.
    ranges: usize,
    all_stale: bool,
    stale: Vec<u64>,
    rights_stale: bool,
    exec_seen: u64,
}

/// Single pages remembered as stale before all are.
const STALE_MAX: usize = 256;

impl Mirror {
    pub fn get(&self, page: u64) -> Option<Page> {
        self.pages.get(&page).copied()
    }

    pub fn ranges(&self) -> usize {
        self.ranges
    }

    /// The process has nothing mapped any more.
    pub fn clear(&mut self) {
        *self = Mirror::default();
    }

    pub fn flush_all(&mut self) {
        self.all_stale = true;
        self.stale.clear();
    }

    pub fn flush_page(&mut self, page: u64) {
        if self.all_stale {
            return;
        }
        if self.stale.len() == STALE_MAX {
            self.flush_all();
        } else {
            self.stale.push(page);
        }
    }

    /// Some frame has become one with code.
    pub fn flush_rights(&mut self) {
        self.rights_stale = true;
    }

    /// Adds pages in ascending order, in place of what was there. Gives the calls that map them.
    pub fn add(&mut self, process: &Process, new: &[(u64, Page)]) -> Vec<Call> {
        let mut calls = Vec::new();
        let mut from = 0;
        for i in 0..new.len() {
            let (at, page) = new[i];
            self.pages.insert(at, page);
            let goes_on = new.get(i + 1).is_some_and(|&(next, p)| {
                next == at + 1 && p.prot == page.prot && p.offset == page.offset + 4096
            });
            if !goes_on {
                let (start, first) = new[from];
                let bytes = (i + 1 - from) as u64 * 4096;
                calls.push(process.map_call(start << 12, bytes, first.prot.into(), first.offset));
                from = i + 1;
            }
        }
        self.ranges += calls.len();
        calls
    }

    /// Compares what is stale with what `now` says of a page, and gives the calls that change what differs. `exec_changes` is the count behind
    /// which executable pages must be asked for again.
    pub fn refresh(
        &mut self,
        process: &Process,
        exec_changes: u64,
        mut now: impl FnMut(u64, Page) -> Option<Page>,
    ) -> Vec<Call> {
        let exec = self.exec_seen != exec_changes;
        if !(self.all_stale || self.rights_stale || exec || !self.stale.is_empty()) {
            return Vec::new();
        }
        self.exec_seen = exec_changes;
        let suspects: Vec<u64> = if self.all_stale {
            self.pages.keys().copied().collect()
        } else {
            let mut list = std::mem::take(&mut self.stale);
            list.retain(|at| self.pages.contains_key(at));
            if self.rights_stale || exec {
                let by_right = self.pages.iter().filter(|(_, p)| {
                    self.rights_stale && p.prot & WRITE != 0 || exec && p.prot & EXEC != 0
                });
                list.extend(by_right.map(|(at, _)| *at));
            }
            list.sort_unstable();
            list.dedup();
            list
        };
        self.all_stale = false;
        self.rights_stale = false;
        self.stale.clear();
        let (mut gone, mut less) = (Vec::new(), Vec::new());
        for at in suspects {
            let old = self.pages[&at];
            match now(at, old) {
                Some(new) if new.gfn == old.gfn => {
                    let prot = old.prot & new.prot;
                    if prot != old.prot {
                        less.push((at, Page { prot, ..old }));
                    }
                }
                _ => gone.push(at),
            }
        }
        let mut calls = self.unmap(&gone);
        calls.extend(self.add(process, &less));
        calls
    }

    fn unmap(&mut self, pages: &[u64]) -> Vec<Call> {
        let mut calls: Vec<Call> = Vec::new();
        for &at in pages {
            self.pages.remove(&at);
            match calls.last_mut() {
                Some(last) if last[1] + last[2] == at << 12 => last[2] += 4096,
                _ => calls.push(Process::unmap_call(at << 12, 4096)),
            }
        }
        calls
    }
}

/// What the guest's tables say of a page that user code may read.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    pub gfn: Gfn,
    pub writable: bool,
    pub dirty: bool,
    pub accessed: bool,
    pub executable: bool,
}

/// Reads the guest's 4-level tables without changing them. `None` where user code has no access.
pub fn look_up(memory: &GuestMemory, cr3: u64, page: u64) -> Option<Mapping> {
    const ADDRESS: u64 = ((1 << 46) - 1) & !0xfff;
    const PRESENT_USER: u64 = 5;
    let (mut table, mut all, mut any) = (cr3 & ADDRESS, 2u64, 0u64);
    for level in (0..4).rev() {
        let slot = table + (page >> (9 * level) & 0x1ff) * 8;
        let entry: u64 = memory.read_obj(hospes_units::Gpa(slot)).ok()?;
        if entry & PRESENT_USER != PRESENT_USER {
            return None;
        }
        all &= entry;
        any |= entry;
        let large = level > 0 && entry & 1 << 7 != 0;
        if level == 0 || large {
            if large && level == 3 {
                return None;
            }
            let inside = page & ((1 << (9 * level)) - 1);
            let first = (entry & ADDRESS) >> 12 & !((1u64 << (9 * level)) - 1);
            return Some(Mapping {
                gfn: Gfn(first + inside),
                writable: all & 2 != 0,
                dirty: entry & 1 << 6 != 0,
                accessed: entry & 1 << 5 != 0,
                executable: any >> 63 == 0,
            });
        }
        table = entry & ADDRESS;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use hospes_memory::Range;

    use super::*;

    fn page(n: u64, prot: u8) -> Page {
        Page {
            gfn: Gfn(n),
            offset: n * 4096,
            prot,
        }
    }

    fn with_mirror(f: impl FnOnce(&Process, Mirror)) {
        let range = Range {
            start: 0,
            end: 1 << 20,
        };
        let memory = GuestMemory::new(&[range]).unwrap();
        let process = Process::new(memory.fd().as_raw_fd()).unwrap();
        f(&process, Mirror::default());
    }

    #[test]
    fn add_joins_what_is_contiguous_on_both_sides() {
        with_mirror(|process, mut mirror| {
            let new = [
                (16, page(4, READ)),
                (17, page(5, READ)),
                (18, page(6, READ | WRITE)),
                (20, page(7, READ | WRITE)),
            ];
            let calls = mirror.add(process, &new);
            assert_eq!(calls.len(), 3);
            assert_eq!((calls[0][1], calls[0][2]), (16 << 12, 8192));
            process.batch(&calls).unwrap();
        });
    }

    #[test]
    fn refresh_removes_what_is_gone_and_lowers_rights() {
        with_mirror(|process, mut mirror| {
            let both = READ | WRITE;
            mirror.add(
                process,
                &[(1, page(1, both)), (2, page(2, both)), (3, page(3, both))],
            );
            assert!(mirror.refresh(process, 0, |_, p| Some(p)).is_empty());
            mirror.flush_all();
            let calls = mirror.refresh(process, 0, |at, p| match at {
                1 => None,
                2 => Some(Page { prot: READ, ..p }),
                _ => Some(p),
            });
            assert_eq!(calls.len(), 2);
            assert_eq!(mirror.get(1), None);
            assert_eq!(mirror.get(2).unwrap().prot, READ);
            assert_eq!(mirror.get(3).unwrap().prot, both);
        });
    }

    #[test]
    fn refresh_asks_again_for_executable_pages_after_a_change() {
        with_mirror(|process, mut mirror| {
            mirror.add(process, &[(1, page(1, READ | EXEC)), (2, page(2, READ))]);
            let mut asked = Vec::new();
            mirror.refresh(process, 1, |at, p| {
                asked.push(at);
                Some(p)
            });
            assert_eq!(asked, [1]);
        });
    }

    #[test]
    fn flush_page_asks_for_that_page() {
        with_mirror(|process, mut mirror| {
            mirror.add(process, &[(1, page(1, READ)), (2, page(2, READ))]);
            mirror.flush_page(2);
            mirror.flush_page(9);
            let calls = mirror.refresh(process, 0, |_, _| None);
            assert_eq!(calls, [Process::unmap_call(2 << 12, 4096)]);
        });
    }
}
