//! Extents of the kernel window: which stretches of the guest's address space can be shown, and whether they still are what they were.

use hospes_engine::{CpuState, cr};
use hospes_memory::{GuestMemory, Range};
use hospes_translate::layout::{WINDOW_LOW_BITS, window_address};
use hospes_units::{Gfn, Gpa, Gva, PAGE_SIZE};

use crate::exec::walk::{A, ADDR, P};
use crate::exec::{Access, walk};
use crate::pages::CodePages;

/// Where the upper half of the address space begins.
pub(super) const UPPER: u64 = 0xffff_8000_0000_0000;
/// Address bits behind one entry of the top table.
const TOP_BITS: u32 = 39;
/// Number of the stack pointer among the general registers.
const RSP: usize = 4;
/// Smallest extent: anything smaller takes more of the host than it saves.
const LEAST: u64 = 16 * PAGE_SIZE;
/// Largest one of small pages.
const MOST_SMALL: u64 = 2 << 20;
/// No extent lies so near to where two addresses that are neighbours in the window are none in the guest: a displacement could lead from one to the other.
const EDGE: u64 = 2 << 20;

/// Bytes of a stack, at most: so near to the stack pointer an address may be one of the same stack.
const STACK: u64 = 16 << 10;

/// Addresses that are shown. All in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) gva: u64,
    pub(super) gpa: u64,
    pub(super) len: u64,
    pub(super) writable: bool,
    /// It is made of large pages.
    pub(super) large: bool,
    /// The entry of the top table that leads there.
    pub(super) top: u64,
    /// How many mappings of the host it takes, at most.
    pub(super) pieces: usize,
}

impl Extent {
    pub(super) fn slot(&self) -> u64 {
        self.gva >> TOP_BITS & 511
    }

    pub(super) fn host(&self) -> u64 {
        window_address(self.gva)
    }

    /// Whether it shows anything in a range of places.
    pub(super) fn overlaps(&self, first: u64, len: u64) -> bool {
        first < self.host() + self.len && self.host() < first + len
    }

    /// Whether no displacement leads from it to what is no neighbour in the guest.
    fn is_clear(&self) -> bool {
        let low = self.host() & ((1 << WINDOW_LOW_BITS) - 1);
        low >= EDGE && low + self.len + EDGE <= 1 << WINDOW_LOW_BITS
    }

    /// Where it shows a frame, if it does.
    pub(super) fn place(&self, gfn: Gfn) -> Option<u64> {
        let into = gfn.gpa().0.checked_sub(self.gpa)?;
        (into < self.len).then(|| self.host() + into)
    }

    /// Runs of frames for which `takes` holds: host addresses and bytes.
    pub(super) fn runs(&self, takes: impl Fn(Gfn) -> bool) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for into in (0..self.len).step_by(PAGE_SIZE as usize) {
            if !takes(Gpa(self.gpa + into).gfn()) {
                continue;
            }
            let at = self.host() + into;
            match runs.last_mut() {
                Some((first, len)) if *first + *len == at => *len += PAGE_SIZE,
                _ => runs.push((at, PAGE_SIZE)),
            }
        }
        runs
    }
}

/// The page behind an address: its first frame, how large it is, and whether it can be written and is dirty.
struct Leaf {
    gpa: u64,
    size: u64,
    writable: bool,
}

/// Gives each of the vCPUs' top tables: guest physical addresses, 0 for those that have none.
pub(crate) type EachRoot<'a> = dyn Fn(&mut dyn FnMut(u64)) + 'a;

/// What the window has to know of the machine and of the vCPU that asks.
#[derive(Clone, Copy)]
pub(crate) struct Asker<'a> {
    pub cpu: &'a CpuState,
    pub memory: &'a GuestMemory,
    pub pages: &'a CodePages,
    pub roots: &'a EachRoot<'a>,
}

/// The top table that a vCPU's addresses go through; 0 where it has no 4-level paging.
pub(crate) fn root(cpu: &CpuState) -> u64 {
    let paging = cpu.cr0 & cr::CR0_PG != 0 && cpu.msr.efer & cr::EFER_LMA != 0;
    if paging { cpu.cr3 & ADDR } else { 0 }
}

/// An entry of a table; 0 where it is not present.
fn entry(memory: &GuestMemory, table: u64, slot: u64) -> u64 {
    let read = memory.read_obj::<u64>(Gpa(table + 8 * slot));
    read.ok().filter(|e| e & P != 0).map_or(0, |e| e & !A)
}

/// The entries whose addresses have the same places in the window.
fn rivals(slot: u64) -> [u64; 3] {
    [slot ^ 1 << 4, slot ^ 1 << 7, slot ^ 1 << 4 ^ 1 << 7]
}

/// What extents behind one entry of the top table rely on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Roof {
    slot: u64,
    top: u64,
    /// The gigabytes that they lie in, a bit each.
    gigabytes: [u64; 8],
}

impl Roof {
    pub(super) fn of(e: &Extent) -> Roof {
        let mut gigabytes = [0; 8];
        for n in e.gva >> 30..=(e.gva + (e.len - 1)) >> 30 {
            gigabytes[(n & 511) as usize / 64] |= 1 << (n % 64);
        }
        Roof {
            slot: e.slot(),
            top: e.top,
            gigabytes,
        }
    }

    /// Takes in what another covers. False where that is behind another entry.
    pub(super) fn cover(&mut self, other: &Roof) -> bool {
        let same = (self.slot, self.top) == (other.slot, other.top);
        if same {
            for (own, others) in self.gigabytes.iter_mut().zip(other.gigabytes) {
                *own |= others;
            }
        }
        same
    }

    /// Whether a top table has this entry, or none, and nothing that leads to the same places.
    pub(super) fn agrees(&self, memory: &GuestMemory, root: u64) -> bool {
        if root == 0 {
            return true;
        }
        let here = entry(memory, root, self.slot);
        let free = |slot: u64| {
            let top = entry(memory, root, slot);
            let empty = |gigabyte: u64| entry(memory, top & ADDR, gigabyte) == 0;
            let covered = |n: &u64| self.gigabytes[*n as usize / 64] >> (n % 64) & 1 != 0;
            top == 0 || (0..512).filter(covered).all(empty)
        };
        (here == 0 || here == self.top) && rivals(self.slot).into_iter().all(free)
    }
}

impl Asker<'_> {
    /// The page behind an address, if it can be part of an extent.
    fn leaf(&self, ram: &Range, gva: u64) -> Option<Leaf> {
        let t = walk(self.cpu, self.memory, Gva(gva), Access::read(false)).ok()?;
        // While global pages are turned off, every load of CR3 has all extents walked again.
        if t.user || !t.global && self.cpu.cr4 & cr::CR4_PGE != 0 {
            return None;
        }
        let size = 1 << t.page_bits;
        let gpa = t.gpa.0 & !(size - 1);
        (ram.start <= gpa && gpa + size <= ram.end).then_some(Leaf {
            gpa,
            size,
            writable: t.writable && t.dirty,
        })
    }

    fn ram_at(&self, gva: u64) -> Option<Range> {
        let t = walk(self.cpu, self.memory, Gva(gva), Access::read(false)).ok()?;
        let ram = self.memory.ram().iter();
        ram.copied().find(|r| r.start <= t.gpa.0 && t.gpa.0 < r.end)
    }

    /// The largest extent around an address, of pages of one size whose places, of so many bytes, are free.
    pub(super) fn extent(&self, gva: u64, free: impl Fn(u64, u64) -> bool) -> Option<Extent> {
        let ram = self.ram_at(gva)?;
        let leaf = self.leaf(&ram, gva)?;
        let size = leaf.size;
        let most = if size == PAGE_SIZE {
            MOST_SMALL
        } else {
            1 << TOP_BITS
        };
        let same_top = |at: u64| at >> TOP_BITS == gva >> TOP_BITS;
        let fits = |at: u64, gpa: u64| {
            same_top(at)
                && free(window_address(at), size)
                && self
                    .leaf(&ram, at)
                    .is_some_and(|l| l.size == size && l.writable == leaf.writable && l.gpa == gpa)
        };
        let (mut first, mut gpa, mut len) = (gva & !(size - 1), leaf.gpa, size);
        if !free(window_address(first), size) {
            return None;
        }
        while len < most && gpa >= size && fits(first.wrapping_sub(size), gpa - size) {
            (first, gpa, len) = (first - size, gpa - size, len + size);
        }
        while len < most && fits(first.wrapping_add(len), gpa + len) {
            len += size;
        }
        let extent = self.of_pages(first, gpa, len, &leaf);
        (len >= LEAST && extent.is_clear()).then_some(extent)
    }

    /// Whether an address may be one of the stack that the vCPU uses.
    fn is_on_stack(&self, gva: u64) -> bool {
        let lowest = self.cpu.gpr[RSP].wrapping_sub(STACK);
        gva.wrapping_sub(lowest) < 2 * STACK
    }

    /// The small page around an address of that stack.
    pub(super) fn stack_page(&self, gva: u64) -> Option<Extent> {
        if !self.is_on_stack(gva) {
            return None;
        }
        let ram = self.ram_at(gva)?;
        let leaf = self.leaf(&ram, gva)?;
        let page = self.of_pages(gva & !(PAGE_SIZE - 1), leaf.gpa, PAGE_SIZE, &leaf);
        (leaf.size == PAGE_SIZE && leaf.writable && page.is_clear()).then_some(page)
    }

    /// Whether an address is one of that stack, in a page that can be shown when it has been stored to.
    pub(super) fn is_on_new_stack(&self, gva: u64) -> bool {
        let clean = || {
            let walked = walk(self.cpu, self.memory, Gva(gva), Access::read(false));
            walked.is_ok_and(|t| t.writable && !t.dirty)
        };
        let has_code = |page: Extent| self.pages.contains(Gpa(page.gpa).gfn());
        self.is_on_stack(gva) && (clean() || self.stack_page(gva).is_some_and(has_code))
    }

    fn of_pages(&self, gva: u64, gpa: u64, len: u64, leaf: &Leaf) -> Extent {
        Extent {
            gva,
            gpa,
            len,
            writable: leaf.writable,
            large: leaf.size != PAGE_SIZE,
            top: entry(self.memory, root(self.cpu), gva >> TOP_BITS & 511),
            pieces: 0,
        }
    }

    /// Whether the guest's tables still say what an extent shows.
    pub(super) fn confirms(&self, e: &Extent) -> bool {
        let Some(ram) = self.ram_at(e.gva) else {
            return false;
        };
        let mut at = 0;
        while at < e.len {
            let gva = e.gva + at;
            let Some(leaf) = self.leaf(&ram, gva) else {
                return false;
            };
            let into = gva & (leaf.size - 1);
            if leaf.gpa + into != e.gpa + at || e.writable && !leaf.writable {
                return false;
            }
            at += leaf.size - into;
        }
        true
    }
}

/// The four addresses of the upper half whose place in the window it is.
pub(super) fn guest_addresses(host: u64) -> impl Iterator<Item = u64> {
    let low = host & ((1 << WINDOW_LOW_BITS) - 1) | (host >> WINDOW_LOW_BITS & 3) << 44;
    [0, 1 << 43, 1 << 46, 1 << 43 | 1 << 46]
        .into_iter()
        .map(move |bits| UPPER | bits | low)
}
