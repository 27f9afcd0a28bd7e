//! Delivering events: the bits of the 2-level interface and the interrupt that tells of them.
//!
//! All changes are locked operations on guest memory, as the guest changes the same words. An interrupt sent to a local APIC that is still
//! disabled by software is lost while "upcall pending" stays set, and the guest would never be interrupted again; therefore the
//! interrupt is sent whenever an event comes and "upcall pending" is set, not only when it becomes set. Edges too many do no harm.

use std::sync::atomic::Ordering::SeqCst;

use hospes_units::VcpuId;
use hospes_xen_abi::shared::{SI_MASK, SI_PENDING, VI_PENDING_SEL, VI_UPCALL_PENDING};

use crate::Xen;

impl Xen {
    /// Makes a port pending that is bound to vCPU `id`, and tells the vCPU unless the port is masked.
    pub(crate) fn post(&self, port: u32, id: usize) {
        let (word, bit) = word_and_bit(port);
        let was_pending = self.shared.u64(SI_PENDING + word).fetch_or(bit, SeqCst) & bit != 0;
        if self.shared.u64(SI_MASK + word).load(SeqCst) & bit == 0 {
            if was_pending {
                self.raise_if_waiting(id);
            } else {
                self.mark_selected(id, 1 << (word / 8));
            }
        }
        if self.pollers.load(SeqCst) > 0 {
            self.wake_pollers(port);
        }
    }

    /// Clears a port's mask and delivers what waits behind it.
    pub(crate) fn unmask(&self, port: u32, id: usize) {
        let (word, bit) = word_and_bit(port);
        self.shared.u64(SI_MASK + word).fetch_and(!bit, SeqCst);
        self.show_again(port, id);
    }

    /// Has a vCPU look at an event that waits on a port and is not masked.
    pub(crate) fn show_again(&self, port: u32, id: usize) {
        let (word, bit) = word_and_bit(port);
        let masked = self.shared.u64(SI_MASK + word).load(SeqCst) & bit != 0;
        if self.is_pending(port) && !masked {
            self.mark_selected(id, 1 << (word / 8));
        }
    }

    pub(crate) fn is_pending(&self, port: u32) -> bool {
        let (word, bit) = word_and_bit(port);
        self.shared.u64(SI_PENDING + word).load(SeqCst) & bit != 0
    }

    pub(crate) fn clear_pending(&self, port: u32) {
        let (word, bit) = word_and_bit(port);
        self.shared.u64(SI_PENDING + word).fetch_and(!bit, SeqCst);
    }

    /// Sets bits of the selector, so that the guest looks at those words, and sends the upcall.
    pub(crate) fn mark_selected(&self, id: usize, selector: u64) {
        let info = self.vcpus[id].info();
        info.u64(VI_PENDING_SEL).fetch_or(selector, SeqCst);
        info.u8(VI_UPCALL_PENDING).swap(1, SeqCst);
        self.interrupt(id);
    }

    /// Sends the upcall where one waits and the last attempt was lost.
    pub(crate) fn raise_again(&self, id: usize) {
        if self.vcpus[id].upcall_lost.load(SeqCst) {
            self.raise_if_waiting(id);
        }
    }

    /// Sends the upcall where one waits.
    pub(crate) fn raise_if_waiting(&self, id: usize) {
        if self.upcall_waits(id) {
            self.interrupt(id);
        }
    }

    pub(crate) fn upcall_waits(&self, id: usize) -> bool {
        self.vcpus[id].info().u8(VI_UPCALL_PENDING).load(SeqCst) != 0
    }

    fn interrupt(&self, id: usize) {
        let slot = &self.vcpus[id];
        let taken = match (slot.control.get(), slot.upcall_vector.load(SeqCst)) {
            (None, _) => false,
            (Some(control), 0) => match self.callback.vector() {
                0 => false,
                vector => {
                    control.set_callback_line(Some(vector));
                    true
                }
            },
            (Some(control), vector) => control.raise_interrupt(vector),
        };
        slot.upcall_lost.store(!taken, SeqCst);
        self.host.wake(VcpuId(id as u32));
    }
}

/// Byte offset of a port's word inside the pending or mask array, and its bit.
fn word_and_bit(port: u32) -> (usize, u64) {
    ((port / 64) as usize * 8, 1 << (port % 64))
}
