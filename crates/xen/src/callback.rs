//! The domain-wide upcall vector of older kernels: level-like, without the local APIC.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::Xen;

/// The vector; 0 while there is none.
#[derive(Debug, Default)]
pub(crate) struct Callback(AtomicU8);

impl Callback {
    pub fn vector(&self) -> u8 {
        self.0.load(Ordering::SeqCst)
    }
}

impl Xen {
    /// Sets the vector, or removes it by 0, and asserts it where an upcall already waits.
    pub(crate) fn set_callback_vector(&self, vector: u8) {
        self.callback.0.store(vector, Ordering::SeqCst);
        for id in 0..self.vcpus.len() {
            match vector {
                0 => self.set_line(id, None),
                _ => self.raise_if_waiting(id),
            }
        }
    }

    pub(crate) fn set_line(&self, id: usize, vector: Option<u8>) {
        if let Some(control) = self.vcpus[id].control.get() {
            control.set_callback_line(vector);
        }
    }

    /// Withdraws the line of a vCPU that has taken its upcall.
    pub(crate) fn callback_withdraw(&self, id: usize) {
        let slot = &self.vcpus[id];
        if self.callback.vector() != 0
            && slot.upcall_vector.load(Ordering::SeqCst) == 0
            && !self.upcall_waits(id)
        {
            self.set_line(id, None);
            // One that has come since the look was wiped with the line.
            self.raise_if_waiting(id);
        }
    }
}
