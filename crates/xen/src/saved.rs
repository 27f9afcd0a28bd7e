//! What of the Xen side outlives a domain that is saved. All else is made anew by its guest, as after a start: event channels, grants, timers, and where the
//! shared pages lie.

use std::sync::atomic::Ordering::SeqCst;

use hospes_units::{Gfn, VcpuId};
use hospes_xen_abi::shared::{PORTS_2LEVEL, SI_MASK};

use crate::{Xen, lock};

/// What a guest has given back of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balloon {
    /// Frames: first ones and numbers, ascending.
    pub given_back: Vec<(u64, u64)>,
    /// Frames that it has still to give back, as it was started with fewer than its memory map lists.
    pub on_demand: u64,
}

impl Xen {
    /// The frames of the guest's xenstore and console rings.
    pub fn ring_frames(&self) -> [Gfn; 2] {
        [self.config.store_gfn, self.config.console_gfn]
    }

    /// What the guest has given back.
    pub fn balloon(&self) -> Balloon {
        lock(&self.memory_state).balloon()
    }

    /// Notes what the guest of a restored domain had given back; frames that it does not have are left out.
    pub fn restore_balloon(&self, balloon: &Balloon) {
        let end = self.max_gfn() + 1;
        let mut next = 0;
        let runs = balloon.given_back.iter().map(|(first, count)| {
            let run = next.max(*first)..first.saturating_add(*count).min(end);
            next = next.max(run.end);
            run.map(Gfn)
        });
        let frames = runs.flatten().filter(|gfn| self.memory.is_ram(*gfn, 1));
        lock(&self.memory_state).restore(frames, balloon.on_demand);
    }

    /// Masks all ports of a restored domain, as they are where a kernel starts: its guest unmasks those that it has kept unmasked. Linux has ports that it
    /// never unmasks (those of its spin locks) and crashes when one is delivered.
    pub fn mask_all_ports(&self) {
        for word in 0..PORTS_2LEVEL / 64 {
            self.shared.u64(SI_MASK + 8 * word).store(u64::MAX, SeqCst);
        }
    }

    /// Whether a vCPU of a restored domain may run, as the guest's hypercalls had left it. To be called before it runs.
    pub fn restore_up(&self, id: VcpuId, up: bool) {
        if let Some(slot) = self.vcpus.get(id.0 as usize) {
            slot.up.store(up, SeqCst);
        }
    }
}
