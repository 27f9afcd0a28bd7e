//! What a vCPU remembers of the guest's mappings for data: filling and flushing the software TLBs of the frame.
//!
//! Invariants
//! * The tables hold the current address space; those of others are parked.
//! * An entry allows what a walk allowed at the same privilege, AC included; what changes rights flushes.
//! * A write tag is made only for a frame without code that has been noted in the present round of the log of written frames, if there is one; a new round has
//!   all of them dropped.

use hospes_engine::{CpuState, cr, rflags};
use hospes_translate::layout::{KERNEL_CODE, TLB_INVALID, TlbEntry, tlb_index};
use hospes_units::{Gfn, Gpa, Gva, PAGE_SIZE};

use crate::exec::{Access, PageFault, TlbFlush, Translation, walk};
use crate::filled::NO_REGION;
use crate::host::BtHost;
use crate::parked::{self, Space};

/// Marks of a TLB entry beside its frame number.
pub(crate) const GLOBAL: u64 = 1 << 63;
pub(crate) const LARGE: u64 = 1 << 62;
pub(crate) const MARKS: u64 = GLOBAL | LARGE;
/// The tables behind the lists of filled entries: one list each, and for kernel code another of what is global.
const LISTS: [usize; 5] = [0, 1, 2, 1, 2];
/// log2 of the largest page.
pub(crate) const LARGE_BITS: u32 = 30;

/// A tag for an entry whose host address is good: the address that [`TLB_INVALID`] itself would match has another index.
pub(crate) const fn unmatched(n: usize) -> u64 {
    if n == tlb_index(TLB_INVALID) {
        TLB_INVALID + PAGE_SIZE
    } else {
        TLB_INVALID
    }
}

impl BtHost {
    /// Forgets everything cached of the guest's mappings.
    pub fn flush_all(&mut self) {
        for table in &mut self.frame.tlb {
            table.fill(TlbEntry::INVALID);
        }
        self.direct.flush_all();
        for list in &mut self.frame.filled {
            list.clear();
        }
        for table in 0..3 {
            self.forget_large(table);
        }
        self.parked.clear();
        self.pcid = pcid(&self.frame.cpu);
        self.flush_jumps_all();
        self.follow_tables();
        self.check_links(0..=u64::MAX, None);
    }

    /// CR3 names another address space: what is cached of the old one is put aside, what is still good of the new one comes back.
    fn switch_space(&mut self, pcid: u16, keep: bool) {
        let mut space = Space::default();
        if self.came_back {
            self.take_out(&mut space);
        }
        self.parked.put(self.pcid, space);
        self.flush_local();
        self.pcid = pcid;
        let space = self.parked.take(pcid).filter(|_| keep);
        self.came_back = space.is_some();
        let Some(space) = space else {
            return;
        };
        for (table, saved) in parked::TABLES.into_iter().zip(space.tlb) {
            for (n, e) in saved.entries {
                self.frame.tlb[table][usize::from(n)] = e;
                self.frame.filled[table].push(usize::from(n));
            }
            for region in saved.large {
                self.note_large(table, region);
            }
        }
        self.jumps.put_user(&mut self.frame, &space.jumps);
    }

    fn take_out(&mut self, space: &mut Space) {
        for (table, saved) in parked::TABLES.into_iter().zip(&mut space.tlb) {
            let frame = &mut *self.frame;
            let filled = frame.filled[table].list();
            if filled.len() > parked::ENTRIES {
                continue;
            }
            saved.entries.reserve_exact(filled.len());
            for &n in filled {
                let e = &mut frame.tlb[table][usize::from(n)];
                if e.read != TLB_INVALID && e.gfn & GLOBAL == 0 {
                    let e = std::mem::replace(e, TlbEntry::INVALID);
                    saved.entries.push((n, e));
                }
            }
            saved.large.clone_from(&self.large[table]);
        }
        space.jumps = self.jumps.take_user(&mut self.frame, parked::JUMPS);
    }

    fn flush_local(&mut self) {
        for table in 0..3 {
            if self.frame.filled[table].is_full() {
                self.frame.tlb[table].fill(TlbEntry::INVALID);
                if table != 0 {
                    self.frame.filled[table + 2].clear();
                    self.forget_large(table);
                }
            } else {
                let frame = &mut *self.frame;
                for &n in frame.filled[table].list() {
                    let e = &mut frame.tlb[table][usize::from(n)];
                    if e.gfn & GLOBAL == 0 || table == 0 {
                        *e = TlbEntry::INVALID;
                    }
                }
            }
            self.frame.filled[table].clear();
        }
        self.forget_large(0);
        self.jumps.flush_local(&mut self.frame);
    }

    fn flush_page(&mut self, gva: u64) {
        let page = gva & !(PAGE_SIZE - 1);
        for table in 0..3 {
            let e = &mut self.frame.tlb[table][tlb_index(gva)];
            if e.read == page || e.write == page {
                *e = TlbEntry::INVALID;
            }
            if self.large[table].contains(&(gva >> LARGE_BITS)) {
                // The translation to forget may be that of a large page, of which any 4 KiB piece may be cached. Which size it had is not known; a
                // gigabyte is the largest.
                for e in &mut self.frame.tlb[table] {
                    if e.gfn & LARGE != 0 && (e.read ^ page) >> LARGE_BITS == 0 {
                        *e = TlbEntry::INVALID;
                    }
                }
            }
        }
        self.jumps.flush_page(&mut self.frame, gva);
        // Whatever size the page had.
        let first = gva >> LARGE_BITS << LARGE_BITS;
        let around = first..=(first | ((1 << LARGE_BITS) - 1));
        if gva >= KERNEL_CODE {
            self.follow_tables();
            self.check_links(around, Some(gva));
        } else {
            self.with_asker(|window, asker| window.check(asker, around, Some(gva)));
        }
    }

    /// Makes stores to a frame take the slow path.
    pub fn drop_write_tags(&mut self, gfn: Gfn) {
        self.parked.drop_write_tags(Some(gfn));
        for (list, table) in LISTS.into_iter().enumerate() {
            let drop = |n: usize, e: &mut TlbEntry| {
                if e.gfn & !MARKS == gfn.0 {
                    e.write = unmatched(n);
                }
            };
            let frame = &mut *self.frame;
            let (table, filled) = (&mut frame.tlb[table], &frame.filled[list]);
            if !filled.is_full() {
                let filled = filled.list().iter();
                filled.for_each(|&n| drop(usize::from(n), &mut table[usize::from(n)]));
            } else {
                let all = table.iter_mut().enumerate();
                all.for_each(|(n, e)| drop(n, e));
            }
        }
    }

    pub fn drop_all_write_tags(&mut self) {
        self.parked.drop_write_tags(None);
        for table in &mut self.frame.tlb {
            for (n, e) in table.iter_mut().enumerate() {
                e.write = unmatched(n);
            }
        }
    }

    /// Walks the guest's tables for a missed access and caches the result. False where the access must be executed by the instruction semantics.
    pub fn fill(&mut self, gva: Gva, access: Access) -> Result<bool, PageFault> {
        let cpu = &self.frame.cpu;
        let t = walk(cpu, &self.shared.memory, gva, access)?;
        let table = table(cpu, access);
        Ok(self.insert(table, gva, access, &t))
    }

    /// Caches a translation of a data access. False where its accesses are the instruction semantics' all the same.
    fn insert(&mut self, table: usize, gva: Gva, access: Access, t: &Translation) -> bool {
        let gfn = t.gpa.gfn();
        let Some(host) = self.shared.memory.page(gfn) else {
            return false;
        };
        let code = self.shared.pages.contains(gfn);
        if access.write && code {
            return false;
        }
        let log = self.shared.memory.log();
        let writable = if access.write {
            // Writes through the tag are not seen.
            log.note(gfn.gpa(), PAGE_SIZE);
            true
        } else {
            t.writable && t.dirty && !code && !log.must_note(gfn)
        };
        let page = gva.page().0;
        let n = tlb_index(gva.0);
        let large = t.page_bits > 12;
        self.frame.tlb[table][n] = TlbEntry {
            read: page,
            write: if writable { page } else { unmatched(n) },
            host: host as u64,
            gfn: gfn.0 | if t.global { GLOBAL } else { 0 } | if large { LARGE } else { 0 },
        };
        if large {
            self.note_large(table, gva.0 >> LARGE_BITS);
        }
        let list = if table != 0 && t.global {
            table + 2
        } else {
            table
        };
        self.frame.filled[list].push(n);
        true
    }

    /// Notes that large pages stand behind some entries of a gigabyte of addresses.
    fn note_large(&mut self, table: usize, region: u64) {
        let all = &mut self.large[table];
        if !all.contains(&region) {
            all.push(region);
        }
        let known = &mut self.frame.large_known[table];
        if !known.contains(&region) {
            known.rotate_right(1);
            known[0] = region;
        }
    }

    fn forget_large(&mut self, table: usize) {
        self.large[table].clear();
        self.frame.large_known[table].fill(NO_REGION);
    }

    /// Whether the TLB that code uses now has the page around `ea`, with write access if asked for.
    pub fn cached(&self, ea: u64, user: bool, write: bool) -> bool {
        let page = Gva(ea).page().0;
        let table = table(&self.frame.cpu, Access::read(user));
        let e = &self.frame.tlb[table][tlb_index(ea)];
        e.read == page && (!write || e.write == page)
    }

    /// Guest physical address behind a linear one, remembered for data accesses.
    pub fn data_translation(
        &mut self,
        cpu: &CpuState,
        gva: Gva,
        access: Access,
    ) -> Result<Gpa, PageFault> {
        if access.exec {
            return walk(cpu, &self.shared.memory, gva, access).map(|t| t.gpa);
        }
        let table = table(cpu, access);
        let e = &self.frame.tlb[table][tlb_index(gva.0)];
        let tag = if access.write { e.write } else { e.read };
        if tag == gva.page().0 {
            return Ok(Gpa(Gfn(e.gfn & !MARKS).gpa().0 | gva.page_offset()));
        }
        let t = walk(cpu, &self.shared.memory, gva, access)?;
        self.insert(table, gva, access, &t);
        Ok(t.gpa)
    }

    /// Forgets what a guest's action makes invalid. `cpu` has the new control registers already.
    pub fn flush(&mut self, cpu: &CpuState, what: TlbFlush) {
        let current = pcid(cpu);
        if !matches!(what, TlbFlush::Page(_) | TlbFlush::PageOfPcid { .. }) {
            let visits = self.frame.kernel_visits;
            if self.direct.entered(&self.shared.memory, cpu.cr3, visits) {
                self.flush_jumps_all();
            }
            self.follow_tables();
            if cpu.cr4 & cr::CR4_PGE == 0 && what != TlbFlush::All {
                // Nothing is global.
                self.check_links(0..=u64::MAX, None);
            }
        }
        match what {
            // Processes belong to one address space each.
            TlbFlush::Switch => {}
            TlbFlush::Page(gva) | TlbFlush::PageOfPcid { gva, .. } => self.direct.flush_page(gva),
            TlbFlush::Pcid(pcid) => self.direct.flush_pcid(pcid),
            TlbFlush::All | TlbFlush::NonGlobal => self.direct.flush_all(),
        }
        match what {
            TlbFlush::All => self.flush_all(),
            TlbFlush::NonGlobal => {
                self.parked.clear();
                self.flush_local();
            }
            TlbFlush::Switch if current != self.pcid => self.switch_space(current, true),
            TlbFlush::Switch => self.flush_local(),
            TlbFlush::Pcid(p) if p != current => self.parked.remove(p),
            TlbFlush::Pcid(_) if current != self.pcid => self.switch_space(current, false),
            TlbFlush::Pcid(_) => self.flush_local(),
            TlbFlush::PageOfPcid { pcid, .. } if pcid != current => self.parked.remove(pcid),
            TlbFlush::Page(gva) | TlbFlush::PageOfPcid { gva, .. } => self.flush_page(gva.0),
        }
        self.pcid = current;
    }
}

/// Which TLB holds the translations of such accesses.
fn table(cpu: &CpuState, access: Access) -> usize {
    if access.user {
        0
    } else if cpu.rflags & rflags::AC != 0 && !access.implicit {
        2
    } else {
        1
    }
}

/// The current address space's number; 0 where they have none.
fn pcid(cpu: &CpuState) -> u16 {
    if cpu.cr4 & cr::CR4_PCIDE == 0 {
        0
    } else {
        (cpu.cr3 & 0xfff) as u16
    }
}
