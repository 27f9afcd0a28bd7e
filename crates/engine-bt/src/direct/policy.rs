//! Which address spaces are worth running natively.
//!
//! Entering and leaving a process costs some microseconds, so it pays only where user code runs longer than that between two visits to its kernel. A timer interrupt
//! that finds the vCPU in user code is the sign to try; how long the bursts then are decides whether it goes on. One that failed is tried again after ever more interrupts.

use std::collections::HashMap;
use std::time::Duration;

/// Bursts shorter than this on average do not pay.
const WORTH: Duration = Duration::from_micros(60);
/// What an address space is believed to do before it was tried.
const HOPE: Duration = Duration::from_micros(400);
/// Interrupts in user code before the first attempt.
const FIRST_TICKS: u32 = 2;
const MOST_TICKS: u32 = 512;
/// Address spaces remembered.
const SPACES: usize = 512;

#[derive(Clone, Copy, Debug)]
struct Heat {
    hot: bool,
    ticks: u32,
    /// Ticks until the next attempt.
    wait: u32,
    burst: Duration,
}

impl Default for Heat {
    fn default() -> Self {
        Heat {
            hot: false,
            ticks: 0,
            wait: FIRST_TICKS,
            burst: HOPE,
        }
    }
}

#[derive(Debug)]
pub struct Policy {
    /// By root of the address space's tables.
    heats: HashMap<u64, Heat>,
    always: bool,
}

impl Policy {
    /// `always`: every address space is hot.
    pub fn new(always: bool) -> Policy {
        Policy {
            heats: HashMap::new(),
            always,
        }
    }

    pub fn is_hot(&self, root: u64) -> bool {
        self.always || self.heats.get(&root).is_some_and(|h| h.hot)
    }

    /// An interrupt found the vCPU in user code. True if the address space becomes one to run natively.
    pub fn tick(&mut self, root: u64) -> bool {
        if self.heats.len() >= SPACES && !self.heats.contains_key(&root) {
            self.heats.clear();
        }
        let heat = self.heats.entry(root).or_default();
        heat.ticks += 1;
        let becomes = !heat.hot && heat.ticks >= heat.wait;
        if becomes {
            heat.hot = true;
            heat.ticks = 0;
            heat.burst = HOPE;
        }
        becomes
    }

    /// A burst ended after this time of native execution: by an interrupt, or by what the code did.
    pub fn burst(&mut self, root: u64, time: Duration, interrupted: bool) {
        let Some(heat) = self.heats.get_mut(&root) else {
            return;
        };
        if interrupted && time < heat.burst {
            return;
        }
        heat.burst = (heat.burst * 7 + time.min(HOPE * 4)) / 8;
        if heat.burst < WORTH {
            heat.hot = false;
            heat.ticks = 0;
            heat.wait = (heat.wait * 4).min(MOST_TICKS);
        } else if heat.burst > HOPE {
            heat.wait = FIRST_TICKS;
        }
    }

    /// The address space cannot be run natively for now.
    pub fn give_up(&mut self, root: u64) {
        let heat = self.heats.entry(root).or_default();
        heat.hot = false;
        heat.ticks = 0;
        heat.wait = MOST_TICKS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hot(policy: &mut Policy, root: u64) {
        while !policy.tick(root) {}
    }

    #[test]
    fn tick_makes_hot_after_some() {
        let mut policy = Policy::new(false);
        assert!(!policy.tick(1));
        assert!(policy.tick(1));
        assert!(policy.is_hot(1) && !policy.is_hot(2));
    }

    #[test]
    fn short_bursts_cool_and_are_tried_ever_more_rarely() {
        let mut policy = Policy::new(false);
        let mut attempts = Vec::new();
        for _ in 0..3 {
            let mut ticks = 1;
            while !policy.tick(1) {
                ticks += 1;
            }
            attempts.push(ticks);
            while policy.is_hot(1) {
                policy.burst(1, Duration::from_micros(1), false);
            }
        }
        assert_eq!(attempts, [2, 8, 32]);
    }

    #[test]
    fn interrupts_do_not_make_bursts_short() {
        let mut policy = Policy::new(false);
        hot(&mut policy, 1);
        for _ in 0..1000 {
            policy.burst(1, Duration::from_micros(1), true);
        }
        assert!(policy.is_hot(1));
    }
}
