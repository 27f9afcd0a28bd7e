//! Which address spaces are worth running natively.
//!
//! Entering and leaving a process costs some microseconds, so it pays only where user code runs longer than that between two visits to its kernel. A timer interrupt
//! that finds the vCPU in user code which has hardly visited its kernel since the last one is the sign to try; how long the bursts then are decides whether it goes on. One
//! that failed at once is tried again after ever more interrupts, and one that paid for itself before it failed as soon as it is quiet again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Bursts shorter than this on average do not pay.
const WORTH: Duration = Duration::from_micros(60);
/// Translated, and with the visits themselves, the same takes about twice as long.
const QUIET: Duration = Duration::from_micros(120);
/// Interrupts that follow each other more quickly count as one.
const TICK: Duration = Duration::from_millis(1);
/// Time without an interrupt in user code that counts at most: the rest may have been sleep.
const MOST_TICK: Duration = Duration::from_millis(8);
/// What an address space is believed to do before it was tried.
const HOPE: Duration = Duration::from_micros(400);
/// Interrupts in user code before the first attempt.
const FIRST_TICKS: u32 = 2;
const MOST_TICKS: u32 = 128;
/// Native execution in which an attempt has paid for itself.
const PAID: Duration = Duration::from_millis(20);
/// Address spaces remembered.
const SPACES: usize = 512;

#[derive(Clone, Copy, Debug)]
struct Heat {
    hot: bool,
    ticks: u32,
    /// Ticks until the next attempt.
    wait: u32,
    burst: Duration,
    /// Native execution since it became hot.
    native: Duration,
}

impl Default for Heat {
    fn default() -> Self {
        Heat {
            hot: false,
            ticks: 0,
            wait: FIRST_TICKS,
            burst: HOPE,
            native: Duration::ZERO,
        }
    }
}

impl Heat {
    fn judge(&mut self) {
        if self.burst < WORTH {
            self.hot = false;
            self.ticks = 0;
            self.wait = if self.native >= PAID {
                FIRST_TICKS
            } else {
                (self.wait * 4).min(MOST_TICKS)
            };
        }
    }
}

#[derive(Debug)]
pub struct Policy {
    /// By root of the address space's tables.
    heats: HashMap<u64, Heat>,
    always: bool,
    /// When an interrupt last counted, and how many visits there had been.
    last: Option<(Instant, u32)>,
}

impl Policy {
    /// `always`: every address space is hot.
    pub fn new(always: bool) -> Policy {
        Policy {
            heats: HashMap::new(),
            always,
            last: None,
        }
    }

    pub fn is_hot(&self, root: u64) -> bool {
        self.always || self.heats.get(&root).is_some_and(|h| h.hot)
    }

    /// Whether something is known of an address space.
    pub fn knows(&self, root: u64) -> bool {
        self.heats.contains_key(&root)
    }

    /// The tables belong to another program now.
    pub fn forget(&mut self, root: u64) {
        self.heats.remove(&root);
    }

    /// Whether user code has mostly gone on by itself since the last interrupt that counted.
    fn is_quiet(&mut self, now: Instant, visits: u32) -> bool {
        let Some((then, before)) = self.last else {
            self.last = Some((now, visits));
            return true;
        };
        let passed = now.saturating_duration_since(then);
        if passed < TICK {
            return false;
        }
        self.last = Some((now, visits));
        passed.min(MOST_TICK) > QUIET.saturating_mul(visits.wrapping_sub(before))
    }

    /// An interrupt found the vCPU in user code, which had visited its kernel so many times by then. True if the address space becomes one to run natively.
    pub fn tick(&mut self, root: u64, now: Instant, visits: u32) -> bool {
        if !self.is_quiet(now, visits) {
            return false;
        }
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
            heat.native = Duration::ZERO;
        }
        becomes
    }

    /// A burst ended after this time of native execution: by an interrupt, or by what the code did.
    pub fn burst(&mut self, root: u64, time: Duration, interrupted: bool) {
        let Some(heat) = self.heats.get_mut(&root) else {
            return;
        };
        heat.native += time;
        if interrupted && time < heat.burst {
            return;
        }
        heat.burst = (heat.burst * 7 + time.min(HOPE * 4)) / 8;
        heat.judge();
    }

    /// An interrupt found a hot address space in code that has to stay translated, which is slow there.
    pub fn stayed(&mut self, root: u64) {
        if let Some(heat) = self.heats.get_mut(&root) {
            heat.burst /= 2;
            heat.judge();
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

    const PERIOD: Duration = Duration::from_millis(4);

    /// A guest whose timer ticks, and so many visits to its kernel in each period.
    struct Guest {
        policy: Policy,
        now: Instant,
        visits: u32,
    }

    impl Guest {
        fn new() -> Guest {
            Guest {
                policy: Policy::new(false),
                now: Instant::now(),
                visits: u32::MAX - 5,
            }
        }

        fn tick(&mut self, root: u64, visits: u32) -> bool {
            self.now += PERIOD;
            self.visits = self.visits.wrapping_add(visits);
            self.policy.tick(root, self.now, self.visits)
        }

        /// Ticks until it becomes hot.
        fn heat(&mut self, root: u64) -> u32 {
            1 + (0..1000).take_while(|_| !self.tick(root, 1)).count() as u32
        }

        fn cool(&mut self, root: u64) {
            while self.policy.is_hot(root) {
                self.policy.burst(root, Duration::from_micros(1), false);
            }
        }
    }

    #[test]
    fn tick_makes_hot_after_some() {
        let mut guest = Guest::new();
        assert!(!guest.tick(1, 0));
        assert!(guest.tick(1, 0));
        assert!(guest.policy.is_hot(1) && !guest.policy.is_hot(2));
    }

    #[test]
    fn short_bursts_cool_and_are_tried_ever_more_rarely() {
        let mut guest = Guest::new();
        let mut attempts = Vec::new();
        for _ in 0..5 {
            attempts.push(guest.heat(1));
            guest.cool(1);
        }
        assert_eq!(attempts, [2, 8, 32, 128, 128]);
    }

    #[test]
    fn attempts_that_paid_are_made_again_soon() {
        let mut guest = Guest::new();
        for _ in 0..3 {
            guest.heat(1);
            guest.cool(1);
        }
        assert_eq!(guest.heat(1), 128);
        for _ in 0..20 {
            guest.policy.burst(1, Duration::from_millis(1), false);
        }
        guest.cool(1);
        assert_eq!(guest.heat(1), 2);
        guest.cool(1);
        assert_eq!(guest.heat(1), 8);
    }

    #[test]
    fn busy_kernels_do_not_count() {
        let mut guest = Guest::new();
        guest.tick(1, 0);
        for _ in 0..100 {
            assert!(!guest.tick(1, 40));
        }
        assert!(guest.tick(1, 20));
    }

    #[test]
    fn interrupts_in_quick_succession_count_once() {
        let mut guest = Guest::new();
        guest.tick(1, 0);
        for _ in 0..100 {
            assert!(!guest.policy.tick(1, guest.now, guest.visits));
        }
        assert!(guest.tick(1, 0));
    }

    #[test]
    fn another_program_begins_anew() {
        let mut guest = Guest::new();
        for _ in 0..3 {
            guest.heat(1);
            guest.cool(1);
        }
        assert!(guest.policy.knows(1));
        guest.policy.forget(1);
        assert!(!guest.policy.knows(1));
        assert_eq!(guest.heat(1), 2);
    }

    #[test]
    fn code_that_stays_translated_cools() {
        let mut guest = Guest::new();
        guest.heat(1);
        for _ in 0..100 {
            guest.policy.burst(1, HOPE * 10, false);
        }
        for _ in 0..5 {
            assert!(guest.policy.is_hot(1));
            guest.policy.stayed(1);
        }
        assert!(!guest.policy.is_hot(1));
    }

    #[test]
    fn interrupts_do_not_make_bursts_short() {
        let mut guest = Guest::new();
        guest.heat(1);
        for _ in 0..1000 {
            guest.policy.burst(1, Duration::from_micros(1), true);
        }
        assert!(guest.policy.is_hot(1));
    }
}
