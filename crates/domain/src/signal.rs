//! A flag to sleep on.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::lock;

/// Set by anybody, taken by one thread; setting it twice wakes once.
#[derive(Debug, Default)]
pub struct Signal {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    pub fn set(&self) {
        let mut set = lock(&self.set);
        if !*set {
            *set = true;
            self.changed.notify_one();
        }
    }

    /// Sleeps until the flag is set, and takes it.
    pub fn wait(&self) {
        let mut set = lock(&self.set);
        while !*set {
            set = self
                .changed
                .wait(set)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *set = false;
    }

    /// Sleeps until the flag is set, and takes it, or until the time has passed.
    pub fn wait_for(&self, time: Duration) {
        let (mut set, _) = self
            .changed
            .wait_timeout_while(lock(&self.set), time, |set| !*set)
            .unwrap_or_else(PoisonError::into_inner);
        *set = false;
    }
}
