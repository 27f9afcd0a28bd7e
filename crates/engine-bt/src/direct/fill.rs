//! What an address-space process has mapped, brought in step with the guest's tables: what is stale goes, what is missing comes.

use std::io;

use hospes_units::{Gfn, Gpa, Gva, PAGE_SIZE};

use super::mirror::{EXEC, Facts, Page, READ, WRITE, goes_on};
use super::process::{BREAKPOINTS, USER_END};
use super::tables::{Mapping, Table, look_up};
use super::{MOST_RANGES, Space, Suspects, guards, scan};
use crate::blocks::Blocks;
use crate::exec::{self, Access};
use crate::vcpu::BtVcpu;
use crate::vm::Translations;

/// Pages looked at around one that is missing: a power of 2.
const WINDOW: u64 = 64;
/// The same in a large page of the guest, whose pages are all alike: one mapping, for which the host can use a huge page as well.
const LARGE_PAGES: u64 = 512;
/// Most mappings made around one that is missing: each costs a good part of what a fault does.
const RUNS: usize = 12;
/// Pages of code scanned around one that is missing.
const SCANS: u32 = 16;
/// Addresses below are the host's to refuse (vm.mmap_min_addr).
const LOWEST_PAGE: u64 = 16;

/// What became of a fault.
pub enum Filled {
    /// The mapping has changed: try again. So many pages of code with breakpoints were taken out for it; or the write had to be noted, and there is no other reason.
    Mapped { evicted: u32, noted: bool },
    /// The engine executes the instruction.
    Step,
    /// Code that must not be executed natively.
    Excluded,
}

/// What the bytes of a page come to.
fn judged(page: &[u8]) -> Suspects {
    let all = scan::suspects(page);
    if all.len() <= BREAKPOINTS {
        return Suspects::At(all);
    }
    let first = guards::guards(page, &all);
    if first.len() <= BREAKPOINTS {
        return Suspects::Behind(first);
    }
    Suspects::Many
}

/// Of pages in ascending order, those around one that take few mappings; more of what follows it than of what precedes.
fn nearest(list: &[(u64, Page)], page: u64) -> &[(u64, Page)] {
    let starts: Vec<usize> = (0..list.len())
        .filter(|&i| i == 0 || !goes_on(&list[i - 1], &list[i]))
        .collect();
    let here = starts.partition_point(|&i| list[i].0 <= page).max(1) - 1;
    let first = here.saturating_sub(RUNS / 4);
    let end = starts.get(first + RUNS).copied().unwrap_or(list.len());
    list.get(starts.get(first).copied().unwrap_or(0)..end)
        .unwrap_or(list)
}

impl BtVcpu {
    /// Makes the process's mappings agree with what has been flushed.
    pub(super) fn refresh(&mut self, space: &mut Space) -> io::Result<()> {
        let facts = Facts {
            memory: &self.host.shared.memory,
            code: &self.host.shared.pages,
            cr3: self.host.frame.cpu.cr3,
        };
        if space.mirror.is_stale(&facts) {
            space.excluded.clear();
        }
        let calls = space.mirror.refresh(&space.process, &facts);
        let full = space.mirror.ranges() > MOST_RANGES;
        if calls.is_empty() && !full {
            return Ok(());
        }
        if full {
            space.process.unmap_all()?;
            space.mirror.clear();
            space.forget_alone();
        } else {
            space.process.queue(calls);
        }
        let mirror = &space.mirror;
        let before = space.breakpoints.len();
        space
            .breakpoints
            .retain(|at| mirror.get(at >> 12).is_some_and(|p| p.prot & EXEC != 0));
        if space.breakpoints.len() != before {
            space.process.set_breakpoints(&space.breakpoints)?;
        }
        Ok(())
    }

    /// Maps what is missing at an address, and what is like it around. `stepped`: the engine has just made the access.
    pub(super) fn fill(
        &mut self,
        space: &mut Space,
        address: u64,
        rip: u64,
        stepped: bool,
    ) -> io::Result<Filled> {
        let page = address >> 12;
        if address >= USER_END || page < LOWEST_PAGE {
            return Ok(Filled::Step);
        }
        let user_read = Access::read(true);
        let (cpu, memory) = (&self.host.frame.cpu, &self.host.shared.memory);
        // As a page walk of the processor's own would, this marks the page as accessed.
        if exec::walk(cpu, memory, Gva(address), user_read).is_err() {
            return Ok(Filled::Step);
        }
        let Some(here) = look_up(memory, cpu.cr3, page) else {
            return Ok(Filled::Step);
        };
        if space.process.in_area(address) {
            space.process.move_area()?;
        }
        let old = space.mirror.get(page);
        let fetched = page == rip >> 12 || page == (rip + 14) >> 12;
        if old.is_none() && here.writable && !here.dirty && !stepped && !fetched {
            return Ok(Filled::Step);
        }
        let fetched = fetched && !stepped && here.executable;
        if fetched {
            self.end_alone(space, page)?;
        }
        let mut evicted = 0;
        if fetched {
            let Some(pages) = self.may_execute(space, page, here.gfn, rip)? else {
                space.excluded.insert(page);
                return Ok(Filled::Excluded);
            };
            evicted = pages;
        }
        let shared = self.host.shared.clone();
        // What is mapped can be read: it is a write.
        let is_write = old.is_some_and(|o| o.gfn == here.gfn) && !fetched;
        let noted =
            is_write && here.writable && here.dirty && shared.memory.log().must_note(here.gfn);
        if noted {
            shared.memory.log().note(here.gfn.gpa(), PAGE_SIZE);
        }
        let mut guard = shared.translations.lock().expect("translations");
        let Some(mut new) = self.page(&guard.blocks, here) else {
            return Ok(Filled::Step);
        };
        if fetched {
            new.prot = READ | EXEC;
        } else if space.alone.is_some() {
            new.prot &= !EXEC;
        }
        if old.is_some_and(|o| o.gfn == new.gfn && o.prot & new.prot == new.prot) {
            return Ok(Filled::Step);
        }
        let cr3 = self.host.frame.cpu.cr3;
        let large = Table::of(&shared.memory, cr3, page >> 9).is_some_and(|t| t.is_large());
        let window = if large { LARGE_PAGES } else { WINDOW };
        let first = page & !(window - 1);
        let mut list = Vec::new();
        let mut scans = if fetched { SCANS } else { 0 };
        for at in first..first + window {
            if at == page {
                list.push((at, new));
                continue;
            }
            if space.mirror.get(at).is_some() || at < LOWEST_PAGE || space.process.in_area(at << 12)
            {
                continue;
            }
            let Some(m) = look_up(&shared.memory, cr3, at).filter(|m| m.accessed) else {
                continue;
            };
            // Code that nobody writes: it is probably needed soon.
            if scans > 0 && m.executable && !m.writable && guard.blocks.scan(m.gfn).is_none() {
                scans -= 1;
                self.scan(&mut guard, m.gfn);
            }
            if let Some(mut p) = self.page(&guard.blocks, m) {
                if space.alone.is_some() {
                    p.prot &= !EXEC;
                }
                if p.prot & EXEC != 0 {
                    let executed = |at: u64| {
                        let known = list.iter().find(|(n, _)| *n == at).map(|&(_, p)| p);
                        let p = known
                            .or((at == page).then_some(new))
                            .or(space.mirror.get(at));
                        p.filter(|p| p.prot & EXEC != 0).map(|p| p.gfn)
                    };
                    if !self.across(at, p.gfn, executed).is_empty() {
                        p.prot &= !EXEC;
                    }
                }
                list.push((at, p));
            }
        }
        drop(guard);
        let calls = space.mirror.add(&space.process, nearest(&list, page));
        space.process.queue(calls);
        Ok(Filled::Mapped { evicted, noted })
    }

    /// How a page is to be mapped; `None` where it is no memory. Executable only if that needs no breakpoint.
    fn page(&self, blocks: &Blocks, m: Mapping) -> Option<Page> {
        let (pages, memory) = (&self.host.shared.pages, &self.host.shared.memory);
        let offset = memory.fd_offset(m.gfn)?;
        let clean = m.executable && blocks.scan(m.gfn) == Some(&Suspects::At(Vec::new()));
        let mut prot = READ;
        if clean {
            prot |= EXEC;
        } else if m.writable && m.dirty && !pages.contains(m.gfn) && !memory.log().must_note(m.gfn)
        {
            prot |= WRITE;
        }
        Some(Page {
            gfn: m.gfn,
            offset,
            prot,
        })
    }

    /// Sees to it that a page can be executed; `None` where it must not, else how many pages had to give up their breakpoints for it. The instruction at `rip` goes on in it, or begins there.
    fn may_execute(
        &mut self,
        space: &mut Space,
        page: u64,
        gfn: Gfn,
        rip: u64,
    ) -> io::Result<Option<u32>> {
        let shared = self.host.shared.clone();
        let mut guard = shared.translations.lock().expect("translations");
        let suspects = match self.scan(&mut guard, gfn) {
            Suspects::At(suspects) => suspects,
            // Whoever comes from the translator may be past them.
            Suspects::Behind(first) if rip != space.entry && !space.retired.contains(&page) => {
                first
            }
            Suspects::Behind(_) | Suspects::Many => {
                drop(guard);
                let begun = self.begin_alone(space, page, gfn, rip)?;
                return Ok(begun.then_some(0));
            }
        };
        drop(guard);
        let executed = |at: u64| {
            let p = space.mirror.get(at).filter(|p| p.prot & EXEC != 0);
            p.map(|p| p.gfn)
        };
        let mut new = self.across(page, gfn, executed);
        new.extend(suspects.iter().map(|o| page << 12 | u64::from(*o)));
        new.retain(|a| !space.breakpoints.contains(a));
        let mut evicted = 0;
        while space.breakpoints.len() + new.len() > BREAKPOINTS {
            // The oldest is most likely one of the program's start.
            let in_use =
                |at: u64| at == page || at == rip >> 12 || new.iter().any(|n| n >> 12 == at);
            let Some(oldest) = space
                .breakpoints
                .iter()
                .map(|a| a >> 12)
                .find(|&at| !in_use(at))
            else {
                return Ok(None);
            };
            let call = space.mirror.take_out(oldest);
            space.process.queue([call]);
            space.breakpoints.retain(|a| a >> 12 != oldest);
            evicted += 1;
        }
        if !new.is_empty() {
            space.breakpoints.extend(new);
            space.process.set_breakpoints(&space.breakpoints)?;
        }
        Ok(Some(evicted))
    }

    /// A breakpoint has been reached: takes its page out of the process where others stand behind that one. True if so.
    pub(super) fn retire(&mut self, space: &mut Space, rip: u64) -> io::Result<bool> {
        let page = rip >> 12;
        let Some(known) = space.mirror.get(page) else {
            return Ok(false);
        };
        let guard = self.host.shared.translations.lock().expect("translations");
        let behind = matches!(guard.blocks.scan(known.gfn), Some(Suspects::Behind(_)));
        drop(guard);
        if behind {
            space.retired.insert(page);
            self.drop_code(space, page)?;
        }
        Ok(behind)
    }

    /// Takes a page and its breakpoints out of the process.
    pub(super) fn drop_code(&self, space: &mut Space, page: u64) -> io::Result<()> {
        let call = space.mirror.take_out(page);
        space.process.queue([call]);
        space.breakpoints.retain(|a| a >> 12 != page);
        space.process.set_breakpoints(&space.breakpoints)
    }

    /// Addresses of suspects that a page which is to be executed shares with its neighbours; `executed` gives the frames of those that are executed, too. All of them
    /// have been scanned, so that a write to one takes it out of the process.
    fn across(&self, page: u64, gfn: Gfn, executed: impl Fn(u64) -> Option<Gfn>) -> Vec<u64> {
        const LAST: u64 = PAGE_SIZE - scan::SEAM as u64;
        let memory = &self.host.shared.memory;
        let pairs = [
            (page - 1, executed(page - 1), Some(gfn)),
            (page, Some(gfn), executed(page + 1)),
        ];
        let mut found = Vec::new();
        for (at, left, right) in pairs {
            let (Some(left), Some(right)) = (left, right) else {
                continue;
            };
            let (mut last, mut first) = ([0; scan::SEAM], [0; scan::SEAM]);
            let read = memory.read(Gpa(left.gpa().0 + LAST), &mut last);
            if read.and(memory.read(right.gpa(), &mut first)).is_ok() {
                let offsets = scan::across(&last, &first);
                found.extend(offsets.iter().map(|&o| (at << 12) + LAST + u64::from(o)));
            }
        }
        found
    }

    /// What a frame that is to be executed holds; writes to it are noticed from now on.
    fn scan(&mut self, t: &mut Translations, gfn: Gfn) -> Suspects {
        if let Some(known) = t.blocks.scan(gfn) {
            return known.clone();
        }
        let shared = self.host.shared.clone();
        self.mark_code(t, gfn.gpa());
        shared.pages.mark_direct(gfn);
        let mut page = [0; PAGE_SIZE as usize];
        let found = match shared.memory.read(gfn.gpa(), &mut page) {
            Ok(()) => judged(&page),
            Err(_) => Suspects::Many,
        };
        t.blocks.set_scan(gfn, found.clone());
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages from 0 on in frames that follow each other `together` at a time.
    fn pages(count: u64, together: u64) -> Vec<(u64, Page)> {
        let page = |at: u64| Page {
            gfn: Gfn(at),
            offset: (at + at / together * 100) * PAGE_SIZE,
            prot: READ,
        };
        (0..count).map(|at| (at, page(at))).collect()
    }

    fn ends(list: &[(u64, Page)]) -> (u64, u64) {
        (list[0].0, list[list.len() - 1].0)
    }

    #[test]
    fn pages_that_follow_each_other_are_all_taken() {
        assert_eq!(ends(nearest(&pages(64, 64), 40)), (0, 63));
        assert_eq!(ends(nearest(&pages(64, 6), 40)), (18, 63));
    }

    #[test]
    fn of_scattered_pages_the_nearest_are_taken() {
        let before = RUNS as u64 / 4;
        let list = pages(64, 1);
        assert_eq!(
            ends(nearest(&list, 20)),
            (20 - before, 19 - before + RUNS as u64)
        );
        assert_eq!(ends(nearest(&list, 0)), (0, RUNS as u64 - 1));
        assert_eq!(ends(nearest(&list, 63)), (63 - before, 63));
        assert_eq!(ends(nearest(&list[5..6], 5)), (5, 5));
    }
}
