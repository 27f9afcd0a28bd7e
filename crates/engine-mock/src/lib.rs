//! A machine without an engine, for tests of what stands above one: a vCPU that is registers and flat memory, and controls that record what they are told.
//!
//! Refuses: to execute anything. Limits: virtual addresses are physical ones.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hospes_engine::{CpuState, EngineError, Exit, Vcpu, VcpuControl, VirtFault, Vm, Waker};
use hospes_memory::{FrameSet, GuestMemory};
use hospes_units::{Gfn, Gpa, Gva, PAGE_SIZE, VcpuId};

/// Takes a lock; a thread that panicked while holding it left data that is valid, if old.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a vCPU was told.
#[derive(Debug, Default)]
pub struct Control {
    pub interrupts: Mutex<Vec<u8>>,
    pub lapic_off: AtomicBool,
    pub line: Mutex<Option<u8>>,
    pub kicks: AtomicU32,
    pub nmis: AtomicU32,
}

impl VcpuControl for Control {
    fn set_waker(&self, _: Waker) {}

    fn kick(&self) {
        self.kicks.fetch_add(1, SeqCst);
    }

    fn raise_interrupt(&self, vector: u8) -> bool {
        if self.lapic_off.load(SeqCst) {
            return false;
        }
        lock(&self.interrupts).push(vector);
        true
    }

    fn set_callback_line(&self, vector: Option<u8>) {
        *lock(&self.line) = vector;
    }

    fn raise_nmi(&self) {
        self.nmis.fetch_add(1, SeqCst);
    }

    fn has_wakeup(&self, interrupts_enabled: bool) -> bool {
        interrupts_enabled && !lock(&self.interrupts).is_empty()
    }
}

/// A vCPU whose virtual addresses are physical ones.
#[derive(Debug)]
pub struct FlatVcpu {
    pub state: CpuState,
    pub control: Arc<Control>,
    pub memory: Arc<GuestMemory>,
}

impl Vcpu for FlatVcpu {
    fn run(&mut self) -> Result<Exit, EngineError> {
        Ok(Exit::Kicked)
    }

    fn fetch_fpu(&mut self) {}

    fn state(&mut self) -> &mut CpuState {
        &mut self.state
    }

    fn state_changed(&mut self) {}

    fn control(&self) -> Arc<dyn VcpuControl> {
        self.control.clone()
    }

    fn read_virt(&mut self, gva: Gva, buf: &mut [u8]) -> Result<(), VirtFault> {
        self.memory
            .read(Gpa(gva.0), buf)
            .map_err(|_| VirtFault { gva })
    }

    fn write_virt(&mut self, gva: Gva, buf: &[u8]) -> Result<(), VirtFault> {
        self.memory
            .write(Gpa(gva.0), buf)
            .map_err(|_| VirtFault { gva })
    }

    fn translate(&mut self, gva: Gva) -> Option<Gpa> {
        self.memory
            .is_backed(Gpa(gva.0).gfn())
            .then_some(Gpa(gva.0))
    }
}

/// Makes no vCPUs; records what it is told to have been written, as address and bytes. Rounds of the log have that and nothing else.
#[derive(Debug, Default)]
pub struct RecordingVm {
    pub written: Mutex<Vec<(Gpa, u64)>>,
    /// How many of them are of rounds that have ended; `None` while there is no log.
    pub ended: Mutex<Option<usize>>,
}

impl Vm for RecordingVm {
    fn create_vcpu(&self, _: VcpuId) -> Result<Box<dyn Vcpu>, EngineError> {
        Err(EngineError::Host {
            engine: "recording",
            what: "a processor".into(),
            why: "it runs nothing".into(),
        })
    }

    fn mark_written(&self, gpa: Gpa, len: u64) {
        lock(&self.written).push((gpa, len));
    }

    fn begin_round(&self) -> FrameSet {
        let written = lock(&self.written);
        let mut frames = FrameSet::default();
        if let Some(ended) = lock(&self.ended).replace(written.len()) {
            for (gpa, len) in &written[ended..] {
                let last = (gpa.0 + len.max(&1) - 1) / PAGE_SIZE;
                (gpa.gfn().0..=last).for_each(|gfn| {
                    frames.insert(Gfn(gfn));
                });
            }
        }
        frames
    }

    fn end_rounds(&self) {
        *lock(&self.ended) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_has_what_was_marked_in_the_one_before() {
        let vm = RecordingVm::default();
        vm.mark_written(Gpa(0), 1);
        assert!(vm.begin_round().is_empty());
        vm.mark_written(Gpa(0x1fff), 2);
        let frames: Vec<u64> = vm.begin_round().runs().flatten().collect();
        assert_eq!(frames, [1, 2]);
        assert!(vm.begin_round().is_empty());
        vm.end_rounds();
        assert!(vm.begin_round().is_empty());
    }
}
