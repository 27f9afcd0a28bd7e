//! Jumps of kernel code from page to page that are connected like those inside a page.
//!
//! The jump caches follow the guest's mappings by being flushed with the TLB; a connected jump knows nothing of them. But a kernel's own text hardly ever moves, and most of its calls
//! leave the page, so these jumps are connected as well, and what they rely on is watched.
//!
//! Invariants
//! * A jump is connected only where the page of its target is a global one. What flushes global pages, one or all, has the pages of connected jumps looked up again
//!   before the guest goes on, and those that have changed lose their jumps.
//! * Jumps are connected for all vCPUs at once, so all of them must see the same pages: while any are connected, the entry of the top table through which kernel code is
//!   mapped is the same on all vCPUs that have one. A vCPU that loads another takes all of them apart first.
//! * When a block is dropped, jumps to its page are taken apart: they would leave through the stub of the dropped block each time.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use hospes_engine::{CpuState, cr};
use hospes_memory::GuestMemory;
use hospes_units::{Gfn, Gpa, Gva};

use crate::blocks::{Block, Blocks, Leaving, page_of};
use crate::cache::CodeMemory;
use crate::exec::walk::{A, ADDR, P};
use crate::exec::{Access, walk};
use crate::host::BtHost;
use crate::vcpu::BtVcpu;

/// Which entry of the top table kernel code is mapped through.
const ENTRY: u64 = 511;

/// What connected jumps rely on.
#[derive(Debug, Default)]
pub(crate) struct Links {
    /// Pages that they lead to, by virtual address.
    pages: BTreeMap<u64, Linked>,
    /// Jumps that could not be connected and go through the cache instead.
    refused: Vec<Leaving>,
    /// Some were refused when the processor had no global pages yet.
    without_global: bool,
}

#[derive(Debug)]
struct Linked {
    gfn: Gfn,
    /// Positions of the jumps' displacements.
    sites: Vec<u32>,
}

impl Blocks {
    /// Takes the connected jumps to one virtual page apart.
    pub fn unlink_page(&mut self, code: &CodeMemory, page: u64) {
        for site in self
            .links
            .pages
            .remove(&page)
            .into_iter()
            .flat_map(|l| l.sites)
        {
            self.tables.disconnect(code, site);
        }
    }

    /// Takes the jumps to all pages apart for which `keep` does not hold. True if some are left.
    fn retain_links(&mut self, code: &CodeMemory, mut keep: impl FnMut(u64, Gfn) -> bool) -> bool {
        let tables = &self.tables;
        self.links.pages.retain(|&page, linked| {
            let kept = keep(page, linked.gfn);
            if !kept {
                let sites = linked.sites.iter();
                sites.for_each(|&site| tables.disconnect(code, site));
            }
            kept
        });
        !self.links.pages.is_empty()
    }
}

/// The entry by which kernel code is mapped; 0 where there is none, or no 4-level paging.
fn kernel_entry(memory: &GuestMemory, cpu: &CpuState) -> u64 {
    if cpu.cr0 & cr::CR0_PG == 0 || cpu.msr.efer & cr::EFER_LMA == 0 {
        return 0;
    }
    let entry = memory.read_obj::<u64>(Gpa((cpu.cr3 & ADDR) + 8 * ENTRY));
    entry.ok().filter(|e| e & P != 0).map_or(0, |e| e & !A)
}

/// Frames behind addresses that are asked for in ascending order, and global: walks once for each large page.
struct Lookup<'a> {
    cpu: &'a CpuState,
    memory: &'a GuestMemory,
    /// The last page found: its address, size and frame.
    last: Option<(u64, u64, u64)>,
}

impl Lookup<'_> {
    fn gfn(&mut self, address: u64) -> Option<Gfn> {
        if let Some((page, size, gpa)) = self.last
            && address - page < size
        {
            return Some(Gpa(gpa + (address - page)).gfn());
        }
        let t = walk(self.cpu, self.memory, Gva(address), Access::exec(false)).ok()?;
        let size = 1 << t.page_bits;
        self.last = t
            .global
            .then_some((address & !(size - 1), size, t.gpa.0 & !(size - 1)));
        t.global.then_some(t.gpa.gfn())
    }
}

impl BtHost {
    fn lookup(&self) -> Lookup<'_> {
        Lookup {
            cpu: &self.frame.cpu,
            memory: &self.shared.memory,
            last: None,
        }
    }

    /// CR3 has been loaded, or paging has changed.
    pub(crate) fn follow_tables(&mut self) {
        let entry = kernel_entry(&self.shared.memory, &self.frame.cpu);
        if entry == self.control.kernel_entry() {
            return;
        }
        // Who connects jumps looks at this after it has noted what they rely on.
        self.control.set_kernel_entry(entry);
        let linked = self.shared.linked.load(Ordering::SeqCst);
        if entry != 0 && linked != 0 && entry != linked {
            let mut t = self.shared.translations.lock().expect("translations");
            t.blocks.retain_links(&self.shared.code, |_, _| false);
            self.shared.linked.store(0, Ordering::SeqCst);
        }
    }

    /// Global pages may have changed: takes jumps apart whose target is not where it was.
    pub(crate) fn check_links(&mut self) {
        let shared = &self.shared;
        let mut t = shared.translations.lock().expect("translations");
        let links = &mut t.blocks.links;
        if links.without_global && self.frame.cpu.cr4 & cr::CR4_PGE != 0 {
            links.without_global = false;
            for exit in std::mem::take(&mut links.refused) {
                let to = shared.stubs.chain[usize::from(exit.flags_saved)];
                shared.code.patch_jump(exit.at as usize, to as usize);
            }
        }
        let mut lookup = self.lookup();
        let keep = |page: u64, gfn: Gfn| lookup.gfn(page) == Some(gfn);
        if !t.blocks.retain_links(&shared.code, keep) {
            shared.linked.store(0, Ordering::SeqCst);
        }
    }

    /// Whether jumps to this block may be connected. The caller has the tables.
    fn may_link(&self, block: &Block) -> bool {
        let entry = kernel_entry(&self.shared.memory, &self.frame.cpu);
        if entry == 0 || self.lookup().gfn(block.key.pc) != Some(block.key.gpa.gfn()) {
            return false;
        }
        let before = self.shared.linked.swap(entry, Ordering::SeqCst);
        let controls = self.shared.controls.read().expect("vCPU list");
        let same = |entry: u64, other: u64| other == 0 || other == entry;
        let all =
            same(entry, before) && controls.iter().all(|(_, c)| same(entry, c.kernel_entry()));
        if !all {
            self.shared.linked.store(before, Ordering::SeqCst);
        }
        all
    }
}

impl BtVcpu {
    /// Connects a jump of kernel code to another page with its target, or else has it go through the jump cache. The caller has the tables.
    pub(crate) fn link(
        &mut self,
        blocks: &mut Blocks,
        site: u32,
        exit: Leaving,
        target: Option<Block>,
    ) {
        let shared = &self.host.shared;
        if let Some(block) = target.filter(|b| self.host.may_link(b)) {
            let to = if exit.flags_saved {
                block.saved()
            } else {
                block.direct()
            };
            shared.code.patch_jump(site as usize, to as usize);
            let linked = blocks.links.pages.entry(page_of(block.key.pc));
            let linked = linked.or_insert_with(|| Linked {
                gfn: block.key.gpa.gfn(),
                sites: Vec::new(),
            });
            linked.sites.push(site);
            return;
        }
        let Some(table) = self.mode().and_then(|m| m.table().checked_sub(1)) else {
            return;
        };
        let to = shared.points.through_cache[table][usize::from(exit.flags_saved)];
        shared.code.patch_jump(exit.at as usize, to);
        blocks.links.without_global |= self.host.frame.cpu.cr4 & cr::CR4_PGE == 0;
        blocks.links.refused.push(exit);
    }
}
