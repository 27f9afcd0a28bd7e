//! Memory operations: shared pages in the guest's map, the balloon, the memory map.

use std::collections::BTreeSet;
use std::ops::Range;

use hospes_engine::Vcpu;
use hospes_units::{Gfn, Gva, PAGE_SIZE};
use hospes_xen_abi::memory as abi;
use hospes_xen_abi::{Errno, grant};
use zerocopy::IntoBytes;

use crate::guest::{Reply, read, write};
use crate::saved::Balloon;
use crate::{Xen, lock};

/// Different frames in which shared pages may be shown in a domain's life: each costs the host a mapping.
const MAX_PLACES: usize = 1024;
/// Pages after which a long operation lets the vCPU be paused.
const PAGES_PER_CALL: u64 = 1024;
/// Largest extent a guest may ask for: 2 MiB.
const MAX_ORDER: u32 = 9;

/// What changes of the guest's memory. Numbers are pages.
#[derive(Debug)]
pub(crate) struct MemoryState {
    places: BTreeSet<u64>,
    /// One bit a frame, set while the guest has given it back. Grows to the highest such frame.
    ballooned: Vec<u64>,
    /// Bits set in `ballooned`.
    out: u64,
    /// What the memory map lists.
    ram: u64,
    /// Frames of the memory map that the guest still has to give back: it was started with fewer pages than its map lists.
    on_demand: u64,
    /// What it may have: it is given no page back beyond this.
    limit: u64,
}

impl MemoryState {
    pub fn new(ram: u64, pages: u64) -> MemoryState {
        let limit = pages.min(ram);
        MemoryState {
            places: BTreeSet::new(),
            ballooned: Vec::new(),
            out: 0,
            ram,
            on_demand: ram - limit,
            limit,
        }
    }

    /// What the guest has.
    fn current(&self) -> u64 {
        self.ram.saturating_sub(self.out + self.on_demand)
    }

    /// What it has, or may take while this is its limit.
    fn claim(&self, limit: u64) -> u64 {
        self.current().max(limit.min(self.ram))
    }

    fn is_out(&self, gfn: u64) -> bool {
        let word = self.ballooned.get((gfn / 64) as usize);
        word.is_some_and(|word| word & 1 << (gfn % 64) != 0)
    }

    fn flip(&mut self, gfn: u64) {
        let word = (gfn / 64) as usize;
        if self.ballooned.len() <= word {
            self.ballooned.resize(word + 1, 0);
        }
        self.ballooned[word] ^= 1 << (gfn % 64);
    }

    /// Notes a frame as given back.
    fn give(&mut self, gfn: u64) {
        if !self.is_out(gfn) {
            self.flip(gfn);
            self.out += 1;
            self.on_demand = self.on_demand.saturating_sub(1);
        }
    }

    /// Notes frames as taken again, all or, where that would be more than the guest may have, none. One that was never given back is there already.
    fn take(&mut self, frames: Range<u64>) -> bool {
        let more = frames.clone().filter(|&gfn| self.is_out(gfn)).count() as u64;
        if more > 0 && self.current() + more > self.limit {
            return false;
        }
        for gfn in frames {
            if self.is_out(gfn) {
                self.flip(gfn);
            }
        }
        self.out -= more;
        true
    }

    /// What of it is saved with the domain.
    pub(crate) fn balloon(&self) -> Balloon {
        let runs = self.runs_out().into_iter();
        Balloon {
            given_back: runs.map(|run| (run.start, run.end - run.start)).collect(),
            on_demand: self.on_demand,
        }
    }

    /// Takes over what was saved, of frames that are RAM.
    pub(crate) fn restore(&mut self, frames: impl Iterator<Item = Gfn>, on_demand: u64) {
        frames.for_each(|gfn| self.give(gfn.0));
        self.on_demand = on_demand.min(self.ram.saturating_sub(self.out));
    }

    /// All frames that are given back, in runs.
    fn runs_out(&self) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        for (n, word) in (0..).zip(&self.ballooned).filter(|(_, word)| **word != 0) {
            for bit in (0..64).filter(|bit| word & 1 << bit != 0) {
                add_to_runs(&mut runs, n * 64 + bit..n * 64 + bit + 1);
            }
        }
        runs
    }
}

/// Adds frames to the last run where they lie next to it: balloons give and take frames in a row, upwards or downwards, and what they cost the host is by the run.
fn add_to_runs(runs: &mut Vec<Range<u64>>, frames: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == frames.start => last.end = frames.end,
        Some(last) if frames.end == last.start => last.start = frames.start,
        _ => runs.push(frames),
    }
}

impl Xen {
    /// Pages of RAM the guest has now.
    pub fn current_pages(&self) -> u64 {
        lock(&self.memory_state).current()
    }

    /// Pages of RAM the guest has now or may take without asking anybody: as much as the host has promised to it.
    pub fn claimed_pages(&self) -> u64 {
        let state = lock(&self.memory_state);
        state.claim(state.limit)
    }

    /// The same for another limit.
    pub fn claim_with(&self, limit: u64) -> u64 {
        lock(&self.memory_state).claim(limit)
    }

    /// Sets how many pages the guest is to have. What it has already stays until it gives it back.
    pub fn set_target_pages(&self, pages: u64) {
        let mut state = lock(&self.memory_state);
        // What it has not given back yet of a memory map that lists too much it need not give back.
        let more = pages.saturating_sub(state.current());
        state.on_demand = state.on_demand.saturating_sub(more);
        state.limit = pages;
    }

    /// Sets how many pages the guest may have.
    pub fn set_limit_pages(&self, pages: u64) {
        lock(&self.memory_state).limit = pages;
    }

    /// Gives the host back what the guest has written into frames that it had given back before.
    pub fn discard_ballooned(&self) {
        let state = lock(&self.memory_state);
        let runs = state.runs_out();
        // Under the lock: none of them is taken again meanwhile.
        runs.iter().for_each(|run| {
            self.discard(run);
        });
        drop(state);
        runs.iter().for_each(|run| self.mark_run(run));
    }

    pub(crate) fn memory_op(
        &self,
        vcpu: &mut dyn Vcpu,
        cmd: u64,
        arg: u64,
    ) -> Result<Reply, Errno> {
        let start = cmd >> abi::OP_BITS;
        match cmd & ((1 << abi::OP_BITS) - 1) {
            abi::ADD_TO_PHYSMAP => {
                let a: abi::AddToPhysmap = read(vcpu, arg)?;
                self.check_self(a.domid)?;
                self.add_to_physmap(&a)
            }
            op @ (abi::DECREASE_RESERVATION | abi::POPULATE_PHYSMAP) => {
                let a: abi::Reservation = read(vcpu, arg)?;
                self.check_self(a.domid)?;
                self.change_reservation(vcpu, op, &a, start)
            }
            abi::MEMORY_MAP => self.write_memory_map(vcpu, arg),
            abi::MAXIMUM_RAM_PAGE => Ok(Reply::Value(self.max_gfn())),
            abi::MAXIMUM_GPFN => {
                self.check_self(read(vcpu, arg)?)?;
                Ok(Reply::Value(self.max_gfn()))
            }
            abi::CURRENT_RESERVATION => {
                self.check_self(read(vcpu, arg)?)?;
                Ok(Reply::Value(self.current_pages()))
            }
            abi::MAXIMUM_RESERVATION => {
                self.check_self(read(vcpu, arg)?)?;
                Ok(Reply::Value(lock(&self.memory_state).limit))
            }
            _ => Err(Errno::NoSys),
        }
    }

    pub(crate) fn max_gfn(&self) -> u64 {
        self.memory
            .ram()
            .iter()
            .map(|r| r.end.div_ceil(PAGE_SIZE).saturating_sub(1))
            .max()
            .unwrap_or(0)
    }

    fn add_to_physmap(&self, a: &abi::AddToPhysmap) -> Result<Reply, Errno> {
        let offset = match a.space {
            abi::SPACE_SHARED_INFO => {
                if a.idx != 0 {
                    return Err(Errno::Inval);
                }
                self.shared_offset
            }
            abi::SPACE_GRANT_TABLE => {
                let mut grants = lock(&self.grants);
                if a.idx & grant::STATUS_FRAME != 0 || a.idx >= u64::from(grants.max()) {
                    return Err(Errno::Inval);
                }
                grants
                    .frame(&self.memory, a.idx as u32)
                    .map_err(|_| Errno::NoMem)?
            }
            _ => return Err(Errno::NoSys),
        };
        if a.gpfn > u64::MAX >> 12 {
            return Err(Errno::Inval);
        }
        let gfn = Gfn(a.gpfn);
        let mut state = lock(&self.memory_state);
        if !state.places.contains(&gfn.0) && state.places.len() >= MAX_PLACES {
            return Err(Errno::NoMem);
        }
        self.memory
            .place_special(gfn, offset)
            .map_err(|_| Errno::Inval)?;
        state.places.insert(gfn.0);
        drop(state);
        self.vm.mark_written(gfn.gpa(), PAGE_SIZE);
        Ok(Reply::OK)
    }

    /// Gives pages back to the host or takes them again; the result is the number of extents done.
    fn change_reservation(
        &self,
        vcpu: &mut dyn Vcpu,
        op: u64,
        a: &abi::Reservation,
        start: u64,
    ) -> Result<Reply, Errno> {
        if a.order > MAX_ORDER || start > a.nr_extents || a.nr_extents > u64::MAX >> abi::OP_BITS {
            return Err(Errno::Inval);
        }
        let pages = 1u64 << a.order;
        let batch = (PAGES_PER_CALL / pages).max(1);
        let end = a.nr_extents.min(start.saturating_add(batch));
        let mut frames = vec![0u64; (end - start) as usize];
        let at = start
            .checked_mul(8)
            .and_then(|bytes| a.extent_start.checked_add(bytes))
            .ok_or(Errno::Fault)?;
        if vcpu.read_virt(Gva(at), frames.as_mut_bytes()).is_err() {
            // As much as was done in earlier rounds stands.
            return Ok(Reply::Value(start));
        }
        let extents: Vec<Range<u64>> = frames
            .iter()
            .map_while(|&first| {
                let ram = self.memory.is_ram(Gfn(first), pages);
                ram.then(|| first..first + pages)
            })
            .collect();
        let done = match op {
            abi::DECREASE_RESERVATION => self.give_back(&extents),
            _ => self.take_again(&extents),
        };
        if done < frames.len() || end == a.nr_extents {
            return Ok(Reply::Value(start + done as u64));
        }
        Ok(Reply::Continue(op | end << abi::OP_BITS))
    }

    /// The guest gives extents of RAM back; the result is how many.
    fn give_back(&self, extents: &[Range<u64>]) -> usize {
        let mut runs = Vec::new();
        for extent in extents {
            add_to_runs(&mut runs, extent.clone());
        }
        let mut given = 0;
        for run in runs {
            if !self.discard(&run) {
                break;
            }
            self.mark_run(&run);
            given += (run.end - run.start) as usize;
            let mut state = lock(&self.memory_state);
            run.for_each(|gfn| state.give(gfn));
        }
        let pages = extents.first().map_or(1, |e| (e.end - e.start) as usize);
        given / pages
    }

    /// The guest takes extents of RAM, as many as it may have; the result is how many.
    fn take_again(&self, extents: &[Range<u64>]) -> usize {
        let mut runs = Vec::new();
        let mut done = 0;
        let mut state = lock(&self.memory_state);
        for extent in extents {
            if !state.take(extent.clone()) {
                break;
            }
            add_to_runs(&mut runs, extent.clone());
            done += 1;
        }
        drop(state);
        for run in runs {
            // The guest gets empty pages, whatever it wrote there after giving the frames back.
            self.discard(&run);
            self.mark_run(&run);
        }
        done
    }

    /// Gives the memory of frames back to the host.
    fn discard(&self, run: &Range<u64>) -> bool {
        let pages = run.end - run.start;
        self.memory.discard(Gfn(run.start), pages).is_ok()
    }

    fn mark_run(&self, run: &Range<u64>) {
        let bytes = (run.end - run.start) * PAGE_SIZE;
        self.vm.mark_written(Gfn(run.start).gpa(), bytes);
    }

    fn write_memory_map(&self, vcpu: &mut dyn Vcpu, arg: u64) -> Result<Reply, Errno> {
        let mut a: abi::MemoryMap = read(vcpu, arg)?;
        let map = &self.config.memory_map;
        let count = map.len().min(a.nr_entries as usize);
        write(vcpu, a.buffer, &map[..count])?;
        a.nr_entries = count as u32;
        write(vcpu, arg, &a)?;
        Ok(Reply::OK)
    }
}
