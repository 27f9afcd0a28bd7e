//! The registers of a guest, running or not: each vCPU leaves a copy when it is asked to and goes on where it is not held, and its last one when its thread ends.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, PoisonError};

use hospes_engine::CpuState;
use hospes_units::VcpuId;

use crate::lock;

#[derive(Debug, Default)]
struct Slot {
    state: Option<CpuState>,
    /// The thread has ended.
    gone: bool,
}

impl Slot {
    fn is_there(&self) -> bool {
        self.gone || self.state.is_some()
    }
}

/// Where the vCPUs' copies are left.
#[derive(Debug)]
pub struct Portrait {
    wanted: AtomicBool,
    slots: Mutex<Vec<Slot>>,
    changed: Condvar,
    /// Held by who takes it.
    taker: Mutex<()>,
}

impl Portrait {
    pub fn new(vcpus: u32) -> Portrait {
        Portrait {
            wanted: AtomicBool::new(false),
            slots: Mutex::new((0..vcpus).map(|_| Slot::default()).collect()),
            changed: Condvar::new(),
            taker: Mutex::default(),
        }
    }

    /// Whether this vCPU has still to leave its state.
    pub fn wants(&self, id: VcpuId) -> bool {
        self.wanted.load(SeqCst) && !lock(&self.slots)[id.0 as usize].is_there()
    }

    pub fn leave(&self, id: VcpuId, state: &CpuState) {
        lock(&self.slots)[id.0 as usize].state = Some(state.clone());
        self.changed.notify_all();
    }

    /// The thread of a vCPU ends: what it has left is its last state.
    pub fn thread_ends(&self, id: VcpuId) {
        lock(&self.slots)[id.0 as usize].gone = true;
        self.changed.notify_all();
    }

    /// The states of all vCPUs, by number, after `ask` has made them look whether they are wanted. `None` for one whose thread has ended without leaving any.
    pub fn take(&self, ask: impl FnOnce()) -> Vec<Option<CpuState>> {
        let _taker = lock(&self.taker);
        for slot in lock(&self.slots).iter_mut().filter(|slot| !slot.gone) {
            slot.state = None;
        }
        self.wanted.store(true, SeqCst);
        ask();
        let mut slots = lock(&self.slots);
        while !slots.iter().all(Slot::is_there) {
            slots = self
                .changed
                .wait(slots)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.wanted.store(false, SeqCst);
        slots.iter().map(|slot| slot.state.clone()).collect()
    }
}
