//! A flag to sleep on.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::lock;

#[derive(Debug, Default)]
struct State {
    set: bool,
    /// The thread sleeps: only then does setting the flag take a call of the host.
    sleeps: bool,
}

/// Set by anybody, taken by one thread; setting it twice wakes once.
#[derive(Debug, Default)]
pub struct Signal {
    state: Mutex<State>,
    changed: Condvar,
}

impl Signal {
    pub fn set(&self) {
        let mut state = lock(&self.state);
        let wake = state.sleeps && !state.set;
        state.set = true;
        // Who wakes up wants the lock.
        drop(state);
        if wake {
            self.changed.notify_one();
        }
    }

    /// Sleeps until the flag is set, and takes it.
    pub fn wait(&self) {
        let mut state = lock(&self.state);
        state.sleeps = true;
        while !state.set {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *state = State::default();
    }
}
