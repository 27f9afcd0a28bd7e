//! How much memory a domain has and may have, and that it takes no more from the host than that.
//!
//! A guest takes memory by touching it, and nothing asks before. One whose memory map lists more than it may have is expected to give the rest back
//! as soon as it runs, and not to touch what it gave back. A thread looks whether that is so: what was written into frames that were given back is
//! thrown away, and a guest that has more for another reason is ended, as Xen ends one that it has no page left for.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hospes_units::PAGE_SIZE;
use hospes_xen::Xen;

use crate::run::{EndReason, Run};
use crate::signal::Signal;
use crate::{Domain, RequestError, host_memory, lock};

/// Least memory that a guest is asked to go down to, in KiB: the least that a configuration can give one.
const LEAST_KIB: u64 = 8 << 10;
/// How often a guest is looked at that could take more than it may have: the sooner the less is left to it, and often enough that it stays within the
/// host's reserve.
const LOOK: Duration = Duration::from_millis(20);
const LOOK_LONGEST: Duration = Duration::from_millis(100);
/// What a guest may take in a millisecond, in bytes: the host has to clear it.
const RATE_BYTES: u64 = 4 << 20;
/// What the host may use beyond the guest's pages, in bytes: the pages that are not RAM, and the rest of huge pages.
const SLACK_BYTES: u64 = 32 << 20;

const PAGE_KIB: u64 = PAGE_SIZE / 1024;

/// What a domain's memory is to be.
#[derive(Debug)]
pub struct MemoryUse {
    /// Held while it is changed. What the guest may have, in KiB, where that was set apart from what it is to have.
    most_kib: Mutex<Option<u64>>,
    target_kib: AtomicU64,
    /// What it is about to be allowed, while the host is asked for it.
    asked_pages: AtomicU64,
    /// Wakes the thread that looks.
    pub changed: Arc<Signal>,
}

impl MemoryUse {
    pub fn new(target_kib: u64) -> MemoryUse {
        MemoryUse {
            most_kib: Mutex::default(),
            target_kib: AtomicU64::new(target_kib),
            asked_pages: AtomicU64::new(0),
            changed: Arc::default(),
        }
    }

    /// What the guest may have, in KiB, where that was set apart.
    pub fn most_kib(&self) -> Option<u64> {
        *lock(&self.most_kib)
    }
}

impl Domain {
    /// Memory that the guest does not use yet and may take at any time, in KiB.
    pub fn promised_kib(&self) -> u64 {
        let asked = self.memory_use.asked_pages.load(SeqCst);
        let claimed = self.xen.claimed_pages().max(asked);
        (claimed * PAGE_KIB).saturating_sub(self.xen.memory().used_bytes() / 1024)
    }

    /// Asks the guest to have this much memory, and lets it have no more than that. `promised` tells what the host has promised to other domains,
    /// in bytes. A guest that has ended needs nothing of the host.
    pub fn set_memory_target(
        &self,
        kib: u64,
        promised: &dyn Fn() -> u64,
    ) -> Result<(), RequestError> {
        let mut most_kib = lock(&self.memory_use.most_kib);
        if kib > self.spec.memory_max_bytes / 1024 {
            return Err(RequestError::MemoryAboveMax {
                max_mib: self.spec.memory_max_bytes >> 20,
            });
        }
        if kib < LEAST_KIB {
            return Err(RequestError::MemoryTooLittle {
                least_mib: LEAST_KIB >> 10,
            });
        }
        let pages = kib / PAGE_KIB;
        self.grow(pages, promised, || {
            let path = hospes_store::domain_path(self.spec.domid) + "/memory/target";
            self.xen.set_target_pages(pages);
            self.memory_use.target_kib.store(kib, SeqCst);
            *most_kib = None;
            self.store.write(&path, kib.to_string().as_bytes())
        })
    }

    /// Lets the guest have this much memory, of which it is not told.
    pub fn set_memory_max(&self, kib: u64, promised: &dyn Fn() -> u64) -> Result<(), RequestError> {
        let mut most_kib = lock(&self.memory_use.most_kib);
        let target_kib = self.memory_use.target_kib.load(SeqCst);
        if kib < target_kib {
            return Err(RequestError::MemoryBelowTarget { target_kib });
        }
        let pages = kib / PAGE_KIB;
        self.grow(pages, promised, || {
            self.xen.set_limit_pages(pages);
            *most_kib = Some(kib);
            Ok(())
        })
    }

    /// Makes a change after which the guest may have so many pages; refuses it where the host cannot give them.
    fn grow(
        &self,
        pages: u64,
        promised: &dyn Fn() -> u64,
        change: impl FnOnce() -> Result<(), hospes_store::Error>,
    ) -> Result<(), RequestError> {
        let claim = self.xen.claim_with(pages);
        if claim > self.xen.claimed_pages() && !self.run.has_ended() {
            // First it is promised: of two domains that ask at the same time one at least sees what the other is about to have.
            self.memory_use.asked_pages.store(claim, SeqCst);
            let used = self.xen.memory().used_bytes();
            let room = host_memory::room((claim * PAGE_SIZE).saturating_sub(used), promised());
            if let Err(shortage) = room {
                self.memory_use.asked_pages.store(0, SeqCst);
                return Err(shortage.into());
            }
        }
        let done = change();
        self.memory_use.asked_pages.store(0, SeqCst);
        self.memory_use.changed.set();
        Ok(done?)
    }
}

/// Looks, until the domain has ended, whether it takes more memory than it may have. `max_pages` is what its memory map lists.
pub fn watch(xen: &Xen, run: &Run, changed: &Signal, max_pages: u64) {
    while !run.has_ended() {
        // One that may have all that its map lists cannot take more.
        if xen.claimed_pages() >= max_pages {
            changed.wait();
        } else {
            let left = Duration::from_millis(left_bytes(xen).unwrap_or(0) / RATE_BYTES);
            changed.wait_for(left.clamp(LOOK, LOOK_LONGEST));
        }
        if left_bytes(xen).is_some() {
            continue;
        }
        xen.discard_ballooned();
        if left_bytes(xen).is_none() {
            let has_mib = (xen.claimed_pages() * PAGE_SIZE) >> 20;
            run.end(EndReason::Crash(format!(
                "it has touched more than the {has_mib} MiB of memory that it has, and its balloon driver has not given the rest back: raise `memory' or lower `maxmem'"
            )));
        }
    }
}

/// What the guest may still take; `None` where it has too much.
fn left_bytes(xen: &Xen) -> Option<u64> {
    let may = xen.claimed_pages() * PAGE_SIZE + SLACK_BYTES;
    may.checked_sub(xen.memory().used_bytes())
}
