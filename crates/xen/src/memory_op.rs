//! Memory operations: shared pages in the guest's map, the balloon, the memory map.

use std::collections::BTreeSet;

use hospes_engine::Vcpu;
use hospes_units::{Gfn, Gva, PAGE_SIZE};
use hospes_xen_abi::memory as abi;
use hospes_xen_abi::{Errno, grant};
use zerocopy::IntoBytes;

use crate::guest::{Reply, read, write};
use crate::{Xen, lock};

/// Different frames in which shared pages may be shown in a domain's life: each costs the host a mapping.
const MAX_PLACES: usize = 1024;
/// Pages after which a long operation lets the vCPU be paused.
const PAGES_PER_CALL: u64 = 1024;
/// Largest extent a guest may ask for: 2 MiB.
const MAX_ORDER: u32 = 9;

/// What changes of the guest's memory.
#[derive(Debug)]
pub(crate) struct MemoryState {
    places: BTreeSet<u64>,
    /// One bit a frame, set while the guest has given it back. Grows to the highest such frame.
    ballooned: Vec<u64>,
    /// Pages the guest has now, and may have.
    current: u64,
    max: u64,
}

impl MemoryState {
    pub fn new(pages: u64) -> MemoryState {
        MemoryState {
            places: BTreeSet::new(),
            ballooned: Vec::new(),
            current: pages,
            max: pages,
        }
    }

    /// Notes a frame as given back or taken.
    fn set_ballooned(&mut self, gfn: Gfn, out: bool) {
        let (word, bit) = ((gfn.0 / 64) as usize, 1u64 << (gfn.0 % 64));
        if self.ballooned.len() <= word {
            if !out {
                return;
            }
            self.ballooned.resize(word + 1, 0);
        }
        if (self.ballooned[word] & bit != 0) == out {
            return;
        }
        self.ballooned[word] ^= bit;
        self.current = if out {
            self.current.saturating_sub(1)
        } else {
            self.current + 1
        };
    }
}

impl Xen {
    /// Pages of RAM the guest has now.
    pub fn current_pages(&self) -> u64 {
        lock(&self.memory_state).current
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
                Ok(Reply::Value(lock(&self.memory_state).max))
            }
            _ => Err(Errno::NoSys),
        }
    }

    fn max_gfn(&self) -> u64 {
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
        for (i, first) in frames.iter().enumerate() {
            let extent = (0..pages).map(|p| first.checked_add(p).map(Gfn));
            for gfn in extent {
                let done = gfn.is_some_and(|gfn| match op {
                    abi::DECREASE_RESERVATION => self.give_back(gfn),
                    _ => self.take_again(gfn),
                });
                if !done {
                    return Ok(Reply::Value(start + i as u64));
                }
            }
        }
        if end == a.nr_extents {
            return Ok(Reply::Value(end));
        }
        Ok(Reply::Continue(op | end << abi::OP_BITS))
    }

    fn give_back(&self, gfn: Gfn) -> bool {
        if gfn.0 > self.max_gfn() || self.memory.discard(gfn).is_err() {
            return false;
        }
        lock(&self.memory_state).set_ballooned(gfn, true);
        self.vm.mark_written(gfn.gpa(), PAGE_SIZE);
        true
    }

    fn take_again(&self, gfn: Gfn) -> bool {
        if gfn.0 > self.max_gfn() || !self.memory.is_backed(gfn) {
            return false;
        }
        // The guest gets an empty page, whatever it wrote there after giving the frame back.
        if self.memory.discard(gfn).is_err() {
            return false;
        }
        lock(&self.memory_state).set_ballooned(gfn, false);
        self.vm.mark_written(gfn.gpa(), PAGE_SIZE);
        true
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
