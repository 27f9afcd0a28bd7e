//! How a guest suspends itself when it is asked to: it makes a hypercall on one vCPU, all vCPUs are held where they are, and then the guest goes on here, or as
//! another domain.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hospes_engine::{CpuState, reg};
use hospes_units::VcpuId;

use crate::lock;

/// How often who waits for a guest looks whether that still has a purpose.
const MOMENT: Duration = Duration::from_millis(100);

/// What the hypercall returns in a new domain, and in one that goes on after all.
const DONE: u64 = 0;
const CANCELLED: u64 = 1;

/// What becomes of a guest that has suspended itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody asked for it: the domain has ended.
    End,
    /// All vCPUs are held.
    Hold,
    /// Whoever asked for it waits no more: the guest goes on.
    GoOn,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wish {
    #[default]
    None,
    Awaited,
    /// The guest was asked and has not followed in time; it may do so at any moment.
    TooLate,
}

#[derive(Debug, Default)]
struct Inner {
    wish: Wish,
    /// The vCPU whose hypercall it was, where the guest is suspended.
    caller: Option<VcpuId>,
}

/// Where a domain stands between running and suspended.
#[derive(Debug, Default)]
pub struct Suspension {
    held: AtomicBool,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Suspension {
    /// Whether the vCPUs are held because the guest is suspended.
    pub fn is_held(&self) -> bool {
        self.held.load(SeqCst)
    }

    /// The guest is about to be asked. False where that has been done already.
    pub fn begin(&self) -> bool {
        let mut inner = lock(&self.inner);
        let free = inner.wish != Wish::Awaited && !self.is_held();
        if free {
            inner.wish = Wish::Awaited;
        }
        free
    }

    /// The guest's hypercall, on the thread of the vCPU that made it.
    pub fn asked_by(&self, caller: VcpuId) -> Verdict {
        let mut inner = lock(&self.inner);
        match std::mem::take(&mut inner.wish) {
            Wish::None => Verdict::End,
            Wish::TooLate => Verdict::GoOn,
            Wish::Awaited => {
                inner.caller = Some(caller);
                self.held.store(true, SeqCst);
                self.changed.notify_all();
                Verdict::Hold
            }
        }
    }

    /// Prepares the registers of the vCPU whose hypercall it was for going on here.
    pub fn set_cancelled(state: &mut CpuState) {
        state.gpr[reg::RAX] = CANCELLED;
    }

    /// Prepares the registers of the same one for a new domain.
    pub fn set_done(state: &mut CpuState) {
        state.gpr[reg::RAX] = DONE;
    }

    /// Waits until the guest has suspended itself; false where it has not after `patience` or when `given_up` says so. Then one that does it later goes on
    /// at once.
    pub fn wait(&self, patience: Duration, given_up: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + patience;
        let mut inner = lock(&self.inner);
        loop {
            if self.is_held() {
                return true;
            }
            if Instant::now() >= deadline || given_up() {
                inner.wish = Wish::TooLate;
                return false;
            }
            inner = self
                .changed
                .wait_timeout(inner, MOMENT)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The vCPU whose hypercall it was; `None` where the guest is not suspended.
    pub fn caller(&self) -> Option<VcpuId> {
        lock(&self.inner).caller
    }

    /// Does something while the vCPUs stay held; false where they are not.
    pub fn while_held(&self, action: impl FnOnce()) -> bool {
        let _inner = lock(&self.inner);
        let held = self.is_held();
        if held {
            action();
        }
        held
    }

    /// Lets the vCPUs go on; they have still to be woken. False where they were not held.
    pub fn release(&self) -> bool {
        let mut inner = lock(&self.inner);
        inner.caller = None;
        self.held.swap(false, SeqCst)
    }
}

/// Held by a thread while it changes the guest's memory by itself, and by who reads all of it.
#[derive(Debug, Default)]
pub struct Gate(Mutex<()>);

impl Gate {
    pub fn close(&self) -> MutexGuard<'_, ()> {
        lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    #[test]
    fn nobody_asked_ends_the_domain() {
        let s = Suspension::default();
        assert_eq!(s.asked_by(VcpuId(0)), Verdict::End);
    }

    #[test]
    fn too_late_goes_on_once() {
        let s = Suspension::default();
        assert!(s.begin());
        assert!(!s.begin(), "asked already");
        assert!(!s.wait(SHORT, || false));
        assert_eq!(s.asked_by(VcpuId(0)), Verdict::GoOn);
        assert_eq!(s.asked_by(VcpuId(0)), Verdict::End);
    }

    #[test]
    fn second_request_is_awaited_again() {
        let s = Suspension::default();
        assert!(s.begin());
        assert!(!s.wait(Duration::from_secs(60), || true));
        assert!(s.begin());
        assert_eq!(s.asked_by(VcpuId(1)), Verdict::Hold);
        assert!(s.wait(SHORT, || true), "it has come about");
        assert_eq!(s.caller(), Some(VcpuId(1)));
        assert!(s.release());
        assert!(!s.release());
        assert_eq!(s.caller(), None);
    }
}
