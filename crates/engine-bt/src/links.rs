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
use std::ops::RangeInclusive;
use std::sync::atomic::Ordering;

use hospes_engine::{CpuState, cr};
use hospes_memory::GuestMemory;
use hospes_units::{Gfn, Gpa, Gva};

use crate::blocks::{Block, Blocks, page_of};
use crate::cache::CodeMemory;
use crate::chains::Leaving;
use crate::exec::walk::{A, ADDR, P};
use crate::exec::{Access, walk};
use crate::host::BtHost;
use crate::kernel_window;
use crate::vcpu::BtVcpu;
use crate::vm::Translations;

/// Which entry of the top table kernel code is mapped through.
const ENTRY: u64 = 511;

/// Jumps to pages that are not global, and more than there are others, or changes of the tables, after which a guest's kernel is taken for one that maps itself in
/// several ways, as those do that keep user code's tables apart: the rest of its code goes through the cache, to which the translator knows a shorter way.
const HOPELESS: u32 = 64;

/// What connected jumps rely on.
#[derive(Debug, Default)]
pub(crate) struct Links {
    /// Pages that they lead to, by virtual address.
    pages: BTreeMap<u64, Linked>,
    /// Jumps that could not be connected and go through the cache instead.
    refused: Vec<Leaving>,
    /// For some of them that was so at that time only.
    try_again: bool,
    /// Jumps to pages that are not global.
    not_global: u32,
    /// How often other tables were loaded while some were connected.
    taken_apart: u32,
    /// Nothing is connected any more.
    given_up: bool,
}

#[derive(Debug)]
struct Linked {
    gfn: Gfn,
    /// Positions of the jumps' displacements.
    sites: Vec<u32>,
}

/// Whether a jump may be connected.
#[derive(PartialEq, Eq)]
enum Verdict {
    Yes,
    NotNow,
    NotGlobal,
    Never,
}

impl Blocks {
    /// Takes the connected jumps to one virtual page apart.
    pub fn unlink_page(&mut self, code: &CodeMemory, page: u64) {
        let linked = self.links.pages.remove(&page);
        for site in linked.into_iter().flat_map(|l| l.sites) {
            self.tables.disconnect(code, site);
        }
    }

    /// Takes the jumps to all pages in a range apart for which `keep` does not hold.
    fn retain_links(
        &mut self,
        code: &CodeMemory,
        range: RangeInclusive<u64>,
        mut keep: impl FnMut(u64, Gfn) -> bool,
    ) {
        let pages = self.links.pages.range(range);
        let lost: Vec<u64> = pages
            .filter(|(page, linked)| !keep(**page, linked.gfn))
            .map(|(page, _)| *page)
            .collect();
        for page in lost {
            self.unlink_page(code, page);
        }
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

/// Frames behind addresses that are asked for in ascending order: walks once for each large page.
struct Lookup<'a> {
    cpu: &'a CpuState,
    memory: &'a GuestMemory,
    /// The last page found: its address, size and frame.
    last: Option<(u64, u64, u64)>,
}

impl Lookup<'_> {
    /// The frame of kernel code at an address, where it is in a global page or the processor has none.
    fn gfn(&mut self, address: u64) -> Option<Gfn> {
        if let Some((page, size, gpa)) = self.last
            && address - page < size
        {
            return Some(Gpa(gpa + (address - page)).gfn());
        }
        self.last = None;
        let t = walk(self.cpu, self.memory, Gva(address), Access::exec(false)).ok()?;
        if t.user || !t.global && self.cpu.cr4 & cr::CR4_PGE != 0 {
            return None;
        }
        let size = 1 << t.page_bits;
        self.last = Some((address & !(size - 1), size, t.gpa.0 & !(size - 1)));
        Some(t.gpa.gfn())
    }
}

impl Translations {
    fn give_up_links(&mut self) {
        self.blocks.links.given_up = true;
        self.translator.kernel_links = false;
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

    /// CR3 has been loaded, or what it leads to may have changed.
    pub(crate) fn follow_tables(&mut self) {
        self.control.set_root(kernel_window::root(&self.frame.cpu));
        self.with_asker(|window, asker| window.follow_root(asker));
        let entry = kernel_entry(&self.shared.memory, &self.frame.cpu);
        if entry == self.control.kernel_entry() {
            return;
        }
        // Who connects jumps looks at this after it has noted what they rely on.
        self.control.set_kernel_entry(entry);
        let linked = self.shared.linked.load(Ordering::SeqCst);
        if entry != 0 && linked != 0 && entry != linked {
            let mut t = self.shared.translations.lock().expect("translations");
            let links = &mut t.blocks.links;
            links.taken_apart += u32::from(!links.pages.is_empty());
            if links.taken_apart >= HOPELESS {
                t.give_up_links();
            }
            t.blocks
                .retain_links(&self.shared.code, 0..=u64::MAX, |_, _| false);
            self.shared.linked.store(0, Ordering::SeqCst);
        }
    }

    /// Global pages of these addresses may have changed, of the small ones only that of `address`, if there is one: takes jumps apart whose target is not where it was.
    pub(crate) fn check_links(&mut self, range: RangeInclusive<u64>, address: Option<u64>) {
        self.with_asker(|window, asker| window.check(asker, range.clone(), address));
        if self.control.kernel_entry() == 0 {
            return;
        }
        let shared = &self.shared;
        let mut t = shared.translations.lock().expect("translations");
        let links = &mut t.blocks.links;
        if links.try_again && self.frame.cpu.cr4 & cr::CR4_PGE != 0 {
            links.try_again = false;
            for exit in std::mem::take(&mut links.refused) {
                let to = shared.stubs.chain[usize::from(exit.flags_saved)];
                shared.code.patch_jump(exit.at as usize, to as usize);
            }
        }
        let mut lookup = self.lookup();
        t.blocks.retain_links(&shared.code, range, |page, gfn| {
            lookup.gfn(page) == Some(gfn)
        });
    }

    /// The caller has the tables.
    fn may_link(&self, links: &Links, block: &Block) -> Verdict {
        if links.given_up || block.second_gfn().is_some() {
            return Verdict::Never;
        }
        let entry = kernel_entry(&self.shared.memory, &self.frame.cpu);
        let before = self.shared.linked.load(Ordering::SeqCst);
        if self.frame.cpu.cr4 & cr::CR4_PGE == 0
            || entry == 0
            || entry != self.control.kernel_entry()
            || before != 0 && before != entry
        {
            return Verdict::NotNow;
        }
        match self.lookup().gfn(block.key.pc) {
            None => return Verdict::NotGlobal,
            Some(gfn) if gfn != block.key.gpa.gfn() => return Verdict::NotNow,
            Some(_) => {}
        }
        // Only who has the tables changes it.
        self.shared.linked.store(entry, Ordering::SeqCst);
        let controls = self.shared.controls.read().expect("vCPU list");
        let mut entries = controls.iter().map(|(_, c)| c.kernel_entry());
        if entries.all(|other| other == 0 || other == entry) {
            return Verdict::Yes;
        }
        self.shared.linked.store(before, Ordering::SeqCst);
        Verdict::NotNow
    }
}

impl BtVcpu {
    /// Connects a jump of kernel code to another page with its target, or else has it go through the jump cache.
    pub(crate) fn link(&mut self, t: &mut Translations, site: u32, exit: Leaving, target: &Block) {
        let shared = &self.host.shared;
        let verdict = self.host.may_link(&t.blocks.links, target);
        if verdict == Verdict::Yes {
            let to = if exit.flags_saved {
                target.saved()
            } else {
                target.direct()
            };
            let (page, gfn) = (page_of(target.key.pc), target.key.gpa.gfn());
            let known = t.blocks.links.pages.get(&page);
            if known.is_some_and(|l| l.gfn != gfn) {
                t.blocks.unlink_page(&shared.code, page);
            }
            shared.code.patch_jump(site as usize, to as usize);
            let linked = t.blocks.links.pages.entry(page).or_insert_with(|| Linked {
                gfn,
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
        let links = &mut t.blocks.links;
        links.refused.push(exit);
        match verdict {
            Verdict::NotNow => links.try_again = true,
            Verdict::NotGlobal => {
                links.not_global += 1;
                if links.not_global as usize >= links.pages.len() + HOPELESS as usize {
                    t.give_up_links();
                }
            }
            Verdict::Yes | Verdict::Never => {}
        }
    }
}
