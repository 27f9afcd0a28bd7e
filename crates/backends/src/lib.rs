//! Back ends: the host's halves of a guest's devices.
//!
//! [`frame`] is what all of them share: the device's two directories in the xenstore, the states through which the halves find each other, ring
//! pages, event channels, a thread for each queue.
//! [`block`] serves disks, [`net`] network interfaces.
//!
//! Refuses: to believe a guest. Its xenstore nodes, grants, rings and requests are copied once and checked; what is wrong gets an error response, or
//! the device is closed and may be connected again; nothing of it panics or reaches beyond the guest's own memory.
//!
//! Invariants: a device's directories appear at once and complete, and go when the device does; queues touch guest memory only between
//! [`frame::Backend::connect`] and [`frame::Backend::disconnect`]; a guest that does nothing costs no processor time.
//! Limits: one thread for each device and one for each of its queues.

pub mod block;
pub mod frame;
pub mod net;

#[cfg(test)]
pub(crate) mod testing;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock; a thread that panicked while holding it left data that is valid, if old.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
