//! Which address spaces are worth running natively.
//!
//! Entering and leaving a process costs some microseconds, and mapping what it needs some more, so it pays only where user code runs long enough between two visits to its kernel. A timer
//! interrupt that finds the vCPU in user code which has hardly visited its kernel since the last one is the sign to try. From then on each burst has a value: the time that the translator would have
//! taken, less the time it took. When bursts have lost a few milliseconds, the attempt ends. What it was worth as a whole decides how soon the next one is made, in this address space and in others that run the same program.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hospes_units::Gfn;

/// Translated, user code takes up to so many times as long: interpreters, and code that is executed seldom. Compute loops take 2 to 3 times, but stop too seldom for that to matter.
const TRANSLATED: i64 = 8;
/// The same of a short burst among others: much of what it takes beyond [`STOP`] is caches that the switch has left cold, which the translator would have found warm.
const TRANSLATED_SHORT: i64 = 2;
/// Up to so much user code for each stop a burst is short.
const SHORT: Duration = Duration::from_micros(26);
/// A mean below that says that bursts are short.
const MEAN_OF_SHORT: Duration = Duration::from_micros(12);
/// What one burst counts at most in that mean, and what the mean begins with.
const MOST_IN_MEAN: Duration = Duration::from_micros(100);
const FIRST_MEAN: Duration = Duration::from_micros(30);
/// The mean is of about so many bursts.
const MEAN_OF: i64 = 64;
/// Of the time of native execution, what each stop takes, with all that makes one slow now and then. What a run took beyond that is user code for sure; with less, stops would be taken
/// for user code, eight times.
pub const STOP: Duration = Duration::from_micros(14);
/// With visits to the kernel more often than that, native execution hardly pays.
const QUIET: Duration = Duration::from_micros(60);
/// What an interrupt counts at most: one without any such visit before it says more than many that found just enough quiet.
const MOST_QUIET: u32 = 8;
/// Interrupts that follow each other more quickly count as one.
const TICK: Duration = Duration::from_millis(1);
/// Time without an interrupt in user code that counts at most: the rest may have been sleep.
const MOST_TICK: Duration = Duration::from_millis(8);
/// What bursts may lose, ns, before any was worth its cost.
const HOPE: i64 = 1_200_000;
/// What they may lose at most since the attempt was worth most, ns. Programs have phases, and another attempt takes ticks until it begins and pages that are mapped anew.
const CREDIT: i64 = 3_000_000;
/// What a burst counts for at least, ns: the first ones have to map all that the program needs.
const LEAST: i64 = -200_000;
/// What it costs when an interrupt finds code that must stay translated, ns.
const STAYED: i64 = 400_000;
/// What interrupts in user code have to count together before the first attempt.
const FIRST_TICKS: u32 = 2;
/// The same for a program to which attempts were worth their cost.
const GOOD_TICKS: u32 = 1;
/// Most ticks between attempts where all of them together were worth their cost, and where not.
const MOST_GOOD_TICKS: u32 = 8;
const MOST_TICKS: u32 = 128;
/// Of what one address space has learnt, what others of the same program begin with at most.
const MOST_INHERITED: u32 = 32;
/// Address spaces, and programs, remembered.
const REMEMBERED: usize = 512;

/// What a burst was.
#[derive(Clone, Copy, Debug, Default)]
pub struct Burst {
    /// In the process, as far as it had a host CPU: guest code, and switches there and back, without mapping calls.
    pub native: Duration,
    /// From the decision to run natively to the state being the vCPU's again, without waiting for a host CPU.
    pub whole: Duration,
    /// Times the process stopped.
    pub stops: u32,
}

fn ns(d: Duration) -> i64 {
    i64::try_from(d.as_nanos()).unwrap_or(i64::MAX / 16)
}

impl Burst {
    /// User code, ns.
    fn user(&self) -> i64 {
        (ns(self.native) - ns(STOP) * i64::from(self.stops)).max(0)
    }

    /// The same for each stop.
    fn user_of_stop(&self) -> i64 {
        self.user() / i64::from(self.stops.max(1))
    }

    /// The time it has saved, ns. `mean`: of user code for each stop, ns, in bursts like this one.
    fn value(&self, mean: i64) -> i64 {
        let is_short = mean < ns(MEAN_OF_SHORT) && self.user_of_stop() < ns(SHORT);
        let times = if is_short {
            TRANSLATED_SHORT
        } else {
            TRANSLATED
        };
        times * self.user() - ns(self.whole)
    }
}

#[derive(Clone, Copy, Debug)]
struct Heat {
    /// Something by which the program that runs there is known again.
    program: Option<Gfn>,
    hot: bool,
    ticks: u32,
    /// Ticks until the next attempt.
    wait: u32,
    /// What bursts may lose from now on, ns.
    credit: i64,
    /// Of all bursts since it became hot, ns.
    total: i64,
    /// Of all attempts before, ns.
    before: i64,
    /// User code for each stop of late, ns.
    mean: i64,
}

impl Heat {
    /// The attempt has ended.
    fn end(&mut self) {
        self.hot = false;
        self.ticks = 0;
        self.before = self.before.saturating_add(self.total);
        self.wait = if self.total > 0 {
            GOOD_TICKS
        } else if self.before > 0 {
            (self.wait * 2).min(MOST_GOOD_TICKS)
        } else {
            (self.wait.max(FIRST_TICKS) * 4).min(MOST_TICKS)
        };
    }
}

#[derive(Debug)]
pub struct Policy {
    /// By root of the address space's tables.
    heats: HashMap<u64, Heat>,
    /// Ticks until an attempt, by program.
    programs: HashMap<Gfn, u32>,
    always: bool,
    /// When an interrupt last counted, how many visits there had been, and in which address space.
    last: Option<(Instant, u32, u64)>,
}

impl Policy {
    /// `always`: every address space is hot.
    pub fn new(always: bool) -> Policy {
        Policy {
            heats: HashMap::new(),
            programs: HashMap::new(),
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
        if let Some(mut heat) = self.heats.remove(&root)
            && heat.hot
        {
            heat.end();
            self.learn(heat);
        }
    }

    /// Others that run the same program begin with what this one has come to.
    fn learn(&mut self, heat: Heat) {
        let Some(program) = heat.program else {
            return;
        };
        if self.programs.len() >= REMEMBERED {
            self.programs.clear();
        }
        let wait = if heat.before > 0 {
            GOOD_TICKS
        } else {
            heat.wait.min(MOST_INHERITED)
        };
        self.programs.insert(program, wait);
    }

    /// How far user code has gone on by itself since the last interrupt that counted: how many times as long between two visits as [`QUIET`] asks, or 0.
    fn quiet(&mut self, root: u64, now: Instant, visits: u32) -> u32 {
        let Some((then, before, other)) = self.last else {
            self.last = Some((now, visits, root));
            return 1;
        };
        let passed = now.saturating_duration_since(then);
        if passed < TICK {
            return 0;
        }
        self.last = Some((now, visits, root));
        let made = visits.wrapping_sub(before).max(1);
        let times = passed.min(MOST_TICK).as_nanos() / QUIET.as_nanos() / u128::from(made);
        // Of the time since one in another address space nobody knows how much was this one's.
        (times as u32).min(if other == root { MOST_QUIET } else { 1 })
    }

    /// An interrupt found the vCPU in user code, which had visited its kernel so many times by then. `program` gives something that all address spaces of one program share. True if
    /// the address space becomes one to run natively.
    pub fn tick(
        &mut self,
        root: u64,
        now: Instant,
        visits: u32,
        program: impl FnOnce() -> Option<Gfn>,
    ) -> bool {
        let quiet = self.quiet(root, now, visits);
        if quiet == 0 {
            return false;
        }
        if self.heats.len() >= REMEMBERED && !self.heats.contains_key(&root) {
            self.heats.clear();
        }
        let programs = &self.programs;
        let heat = self.heats.entry(root).or_insert_with(|| {
            let program = program();
            let known = program.and_then(|p| programs.get(&p));
            Heat {
                program,
                hot: false,
                ticks: 0,
                wait: known.copied().unwrap_or(FIRST_TICKS),
                credit: HOPE,
                total: 0,
                before: 0,
                mean: ns(FIRST_MEAN),
            }
        });
        heat.ticks += quiet;
        let becomes = !heat.hot && heat.ticks >= heat.wait;
        if becomes {
            heat.hot = true;
            heat.ticks = 0;
            heat.credit = HOPE;
            heat.total = 0;
            heat.mean = ns(FIRST_MEAN);
        }
        becomes
    }

    /// A burst has ended.
    pub fn burst(&mut self, root: u64, burst: Burst) {
        let Some(heat) = self.heats.get_mut(&root) else {
            return;
        };
        heat.mean += (burst.user_of_stop().min(ns(MOST_IN_MEAN)) - heat.mean) / MEAN_OF;
        let value = burst.value(heat.mean);
        self.count(root, value, value.max(LEAST));
    }

    /// An interrupt found a hot address space in code that has to stay translated, which is slow there.
    pub fn stayed(&mut self, root: u64) {
        self.count(root, -STAYED, -STAYED);
    }

    fn count(&mut self, root: u64, value: i64, counted: i64) {
        let Some(heat) = self.heats.get_mut(&root).filter(|h| h.hot) else {
            return;
        };
        heat.total = heat.total.saturating_add(value);
        heat.credit = (heat.credit + counted).min(CREDIT);
        if heat.credit < 0 {
            heat.end();
            let heat = *heat;
            self.learn(heat);
        }
    }

    /// The address space cannot be run natively for now.
    pub fn give_up(&mut self, root: u64) {
        if let Some(heat) = self.heats.get_mut(&root) {
            heat.hot = false;
            heat.ticks = 0;
            heat.wait = MOST_TICKS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_millis(4);
    /// Visits in a period that leave just enough quiet.
    const BARELY_QUIET: u32 = 60;
    /// A page fault of the program.
    const SHORT: Burst = Burst {
        native: Duration::from_micros(11),
        whole: Duration::from_micros(40),
        stops: 1,
    };
    const LONG: Burst = Burst {
        native: Duration::from_micros(1000),
        whole: Duration::from_micros(1020),
        stops: 1,
    };
    /// Much of it went into mapping what the program needs.
    const WARM_UP: Burst = Burst {
        native: Duration::from_micros(300),
        whole: Duration::from_micros(4000),
        stops: 15,
    };

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

        fn tick_of(&mut self, program: u64, root: u64, visits: u32) -> bool {
            self.now += PERIOD;
            self.visits = self.visits.wrapping_add(visits);
            let program = || Some(Gfn(program));
            self.policy.tick(root, self.now, self.visits, program)
        }

        /// Every address space has a program of its own.
        fn tick(&mut self, root: u64, visits: u32) -> bool {
            self.tick_of(root, root, visits)
        }

        /// Ticks until it becomes hot.
        fn heat_of(&mut self, program: u64, root: u64) -> u32 {
            1 + (0..1000)
                .take_while(|_| !self.tick_of(program, root, BARELY_QUIET))
                .count() as u32
        }

        fn heat(&mut self, root: u64) -> u32 {
            self.heat_of(root, root)
        }

        /// Bursts of a kind until it cools.
        fn cool(&mut self, root: u64, burst: Burst) -> u32 {
            for n in 0..1000 {
                if !self.policy.is_hot(root) {
                    return n;
                }
                self.policy.burst(root, burst);
            }
            panic!("it stays hot");
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
            guest.cool(1, SHORT);
        }
        assert_eq!(attempts, [2, 8, 32, 128, 128]);
    }

    #[test]
    fn bursts_that_are_short_all_the_time_cool() {
        // What a server's system calls looked like: nearly all of it is the switches, and one in four found cold caches.
        let quick = Burst {
            native: Duration::from_micros(13),
            whole: Duration::from_micros(16),
            stops: 1,
        };
        let cold = Burst {
            native: Duration::from_micros(26),
            whole: Duration::from_micros(29),
            stops: 1,
        };
        let mut guest = Guest::new();
        guest.heat(1);
        let all = [quick, cold, quick, quick];
        assert!(
            all.iter().cycle().take(3000).any(|burst| {
                guest.policy.burst(1, *burst);
                !guest.policy.is_hot(1)
            }),
            "it stays hot"
        );
        // Among longer ones the same are worth something: a compiler's page faults.
        guest.heat(2);
        let mixed = [quick, cold, LONG, cold];
        for burst in mixed.iter().cycle().take(3000) {
            guest.policy.burst(2, *burst);
            assert!(guest.policy.is_hot(2));
        }
    }

    #[test]
    fn attempts_that_paid_are_made_again_at_once() {
        let mut guest = Guest::new();
        for _ in 0..3 {
            guest.heat(1);
            guest.cool(1, SHORT);
        }
        assert_eq!(guest.heat(1), 128);
        for _ in 0..20 {
            guest.policy.burst(1, LONG);
        }
        guest.cool(1, SHORT);
        let mut attempts = Vec::new();
        for _ in 0..6 {
            attempts.push(guest.heat(1));
            guest.cool(1, SHORT);
        }
        // As long as all of them together have paid.
        assert_eq!(attempts, [1, 2, 4, 8, 8, 8]);
    }

    #[test]
    fn pages_that_are_needed_first_do_not_cool() {
        let mut guest = Guest::new();
        guest.heat(1);
        for _ in 0..5 {
            guest.policy.burst(1, WARM_UP);
        }
        assert!(guest.policy.is_hot(1));
        // All the time is another matter.
        assert!(guest.cool(1, WARM_UP) < 50);
    }

    #[test]
    fn programs_are_known_again() {
        let (mut guest, good, bad) = (Guest::new(), 100, 200);
        assert_eq!((guest.heat_of(good, 1), guest.heat_of(bad, 2)), (2, 2));
        guest.policy.burst(1, LONG);
        // It ends before it has cooled.
        guest.policy.forget(1);
        guest.cool(2, SHORT);
        assert_eq!(guest.heat_of(good, 3), GOOD_TICKS);
        assert_eq!(guest.heat_of(bad, 4), 8);
        guest.policy.burst(4, SHORT);
        guest.policy.forget(4);
        assert_eq!(guest.heat_of(bad, 5), MOST_INHERITED);
        guest.cool(5, SHORT);
        assert_eq!(guest.heat_of(bad, 6), MOST_INHERITED);
        for _ in 0..10 {
            guest.policy.burst(6, LONG);
        }
        guest.cool(6, SHORT);
        assert_eq!(guest.heat_of(bad, 7), GOOD_TICKS);
    }

    #[test]
    fn busy_kernels_do_not_count() {
        let mut guest = Guest::new();
        guest.tick(1, 0);
        for _ in 0..100 {
            assert!(!guest.tick(1, 80));
        }
        assert!(guest.tick(1, 40));
    }

    #[test]
    fn longer_quiet_counts_more() {
        for (visits, ticks) in [(60, 128), (30, 64), (10, 22), (8, 16), (0, 16)] {
            let mut guest = Guest::new();
            for _ in 0..4 {
                guest.heat(1);
                guest.cool(1, SHORT);
            }
            let waited = 1 + (0..1000).take_while(|_| !guest.tick(1, visits)).count();
            assert_eq!(waited, ticks, "{visits} visits in a period");
        }
        let mut guest = Guest::new();
        assert!(!guest.tick(1, 0) && !guest.tick(2, 0) && guest.tick(1, 0));
    }

    #[test]
    fn interrupts_in_quick_succession_count_once() {
        let mut guest = Guest::new();
        guest.tick(1, 0);
        for _ in 0..100 {
            assert!(!guest.policy.tick(1, guest.now, guest.visits, || None));
        }
        assert!(guest.tick(1, 0));
    }

    #[test]
    fn another_program_begins_anew() {
        let mut guest = Guest::new();
        for _ in 0..3 {
            guest.heat(1);
            guest.cool(1, SHORT);
        }
        assert!(guest.policy.knows(1));
        guest.policy.forget(1);
        assert!(!guest.policy.knows(1));
        assert_eq!(guest.heat_of(2, 1), 2);
    }

    #[test]
    fn code_that_stays_translated_cools() {
        let mut guest = Guest::new();
        guest.heat(1);
        for _ in 0..100 {
            guest.policy.burst(1, LONG);
        }
        for _ in 0..5 {
            assert!(guest.policy.is_hot(1));
            guest.policy.stayed(1);
        }
        for _ in 0..5 {
            guest.policy.stayed(1);
        }
        assert!(!guest.policy.is_hot(1));
    }

    #[test]
    fn phases_of_short_bursts_do_not_cool() {
        let mut guest = Guest::new();
        guest.heat(1);
        for _ in 0..10 {
            for _ in 0..3 {
                guest.policy.burst(1, LONG);
            }
            for _ in 0..60 {
                guest.policy.burst(1, SHORT);
            }
            assert!(guest.policy.is_hot(1));
        }
        // Whatever it has been worth before.
        assert!(guest.cool(1, SHORT) < 200);
    }
}
