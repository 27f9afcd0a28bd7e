//! Stacks in the kernel window: small pages that are shown one by one.
//!
//! Kernels have the stack of each task in a few small pages that lie in no order, and a good part of what their code accesses is its stack. Such a page is shown when a vCPU first
//! accesses it that has its stack there. It is always writable, and goes when its frame becomes a special one or one with code.

use std::collections::hash_map::Values;
use std::collections::{HashMap, HashSet};

use hospes_translate::layout::window_address;
use hospes_units::{Gfn, Gpa, PAGE_SIZE};
use rustix::mm::ProtFlags;

use super::extent::{Asker, Extent, Roof};
use super::{
    HOPELESS, KernelWindow, PIECES, PIECES_TO_COME, REGION_BITS, State, reserve, take_out,
};

/// Most pages. Where there would be more the window is closed, and what is still in use comes back.
const PAGES: usize = 8192;
/// Most regions of 2 MiB that pages were shown in since it was last closed: the host keeps its page tables for them until then.
const TOUCHED: usize = 2048;
/// Most entries of top tables that they rely on.
const ROOFS: usize = 16;

#[derive(Debug, Default)]
pub(super) struct Stacks {
    /// By where they are shown.
    pages: HashMap<u64, Extent>,
    /// Where frames are shown.
    frames: HashMap<Gfn, Vec<u64>>,
    /// What the pages rely on, and perhaps more.
    roofs: Vec<Roof>,
    /// Regions in which pages were shown since the window was last closed.
    touched: HashSet<u64>,
}

impl Stacks {
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    pub fn iter(&self) -> Values<'_, u64, Extent> {
        self.pages.values()
    }

    /// What is shown at a page of the monitor's.
    pub fn at(&self, host: u64) -> Option<&Extent> {
        self.pages.get(&(host & !(PAGE_SIZE - 1)))
    }

    pub fn roofs(&self) -> &[Roof] {
        &self.roofs
    }

    fn add(&mut self, page: Extent) {
        let host = page.host();
        self.pages.insert(host, page);
        let places = self.frames.entry(Gpa(page.gpa).gfn()).or_default();
        places.push(host);
        let roof = Roof::of(&page);
        if !self.roofs.iter_mut().any(|r| r.cover(&roof)) {
            self.roofs.push(roof);
        }
    }

    fn remove(&mut self, host: u64) -> Option<Extent> {
        let page = self.pages.remove(&host)?;
        let gfn = Gpa(page.gpa).gfn();
        if let Some(places) = self.frames.get_mut(&gfn) {
            places.retain(|&at| at != host);
            if places.is_empty() {
                self.frames.remove(&gfn);
            }
        }
        if self.pages.is_empty() {
            self.roofs.clear();
        }
        Some(page)
    }

    pub fn is_untouched(&self) -> bool {
        self.touched.is_empty()
    }

    fn is_full(&self) -> bool {
        self.pages.len() >= PAGES || self.touched.len() >= TOUCHED || self.roofs.len() >= ROOFS
    }
}

impl State {
    fn remove_stack(&mut self, host: u64) {
        if let Some(page) = self.stacks.remove(host) {
            take_out(&page);
        }
    }

    /// Takes the pages away that show a frame.
    pub(super) fn remove_stack_frame(&mut self, gfn: Gfn) {
        for host in self.stacks.frames.get(&gfn).cloned().unwrap_or_default() {
            self.remove_stack(host);
        }
    }

    /// Takes away what is not what the tables say any more: the page of an address, or any.
    pub(super) fn check_stacks(&mut self, asker: &Asker<'_>, address: Option<u64>) {
        let changed = |e: &&Extent| !asker.confirms(e);
        let gone: Vec<u64> = match address {
            Some(gva) => {
                let page = self.stacks.at(window_address(gva));
                page.into_iter().filter(changed).map(Extent::host).collect()
            }
            None => {
                let pages = self.stacks.iter();
                pages.filter(changed).map(Extent::host).collect()
            }
        };
        for host in gone {
            self.remove_stack(host);
        }
    }
}

impl KernelWindow {
    /// Shows a page of the stack that the vCPU uses, if the address is one of its.
    pub(super) fn show_stack(&self, state: &mut State, asker: &Asker<'_>, gva: u64) -> bool {
        let Some(page) = asker.stack_page(gva) else {
            return false;
        };
        let (host, gfn) = (page.host(), Gpa(page.gpa).gfn());
        if state.stack_disagreements >= HOPELESS
            || state.stacks.at(host).is_some()
            || state.extents.iter().any(|e| e.overlaps(host, PAGE_SIZE))
            || asker.pages.contains(gfn)
        {
            return false;
        }
        let Some(offset) = asker.memory.ram_offset(gfn, 1) else {
            return false;
        };
        if !*state.reserved.get_or_insert_with(reserve) {
            return false;
        }
        if state.stacks.is_full() || state.pieces() > PIECES - PIECES_TO_COME {
            state.close();
        }
        let roofs = state.stacks.roofs.clone();
        state.stacks.add(page);
        state.stacks.touched.insert(host >> REGION_BITS);
        self.note(state);
        let agreed = self.agreed(asker, &page);
        let confirmed = asker.confirms(&page);
        state.stack_disagreements += u32::from(confirmed && !agreed);
        // Those that are placed from here on are hidden by who has placed them, and frames that get code by who marks them.
        self.hide_specials(state, asker.memory);
        let shown = confirmed
            && agreed
            && state.stacks.at(host).is_some()
            && !asker.memory.is_special(gfn)
            && !asker.pages.contains(gfn)
            && state.map(
                &page,
                asker.memory,
                offset,
                ProtFlags::READ | ProtFlags::WRITE,
            );
        if shown {
            state.writers.remove(&asker.cpu.rip);
        } else if state.stacks.remove(host).is_some() && state.stacks.len() != 0 {
            state.stacks.roofs = roofs;
        }
        self.note(state);
        shown
    }
}
