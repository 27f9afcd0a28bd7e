//! Which address spaces are worth running natively.
//!
//! Entering and leaving a process costs some microseconds, and mapping what it needs some more, so it pays only where user code runs long enough between two visits to its kernel. A timer
//! interrupt that finds the vCPU in user code which has hardly visited its kernel since the last one is the sign to try. From then on each burst has a value: the time that the translator would have
//! taken, less the time it took. When bursts have lost a few milliseconds, the attempt ends. What it was worth as a whole decides how soon the next one is made, in this address space and in others that run the same program.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hospes_units::Gfn;

use super::duel::{Duel, Winner};

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

/// A mean below that asks which way of running the program is faster, after so many bursts.
const MEAN_IN_DOUBT: Duration = Duration::from_micros(50);
const BURSTS_IN_DOUBT: u32 = 64;
/// How long a program that runs faster natively is not asked again, in time of its bursts: at first, and at most, as it is twice as long each time.
const SETTLED: Duration = Duration::from_millis(500);
const MOST_SETTLED: Duration = Duration::from_secs(8);
/// A program that has so much of the vCPU's time without being met again is not waited for, ns.
const MOST_ELSEWHERE: u64 = 500_000_000;

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
    /// Bursts since it became hot.
    bursts: u32,
    /// For so long it is known to be faster natively, ns, and for so long it was when that was found out.
    settled: i64,
    was_settled: i64,
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

/// An address space whose program runs natively and translated in turn.
#[derive(Debug)]
struct Contest {
    root: u64,
    duel: Duel,
    /// Whether the vCPU is in that address space.
    inside: bool,
    /// The time of the vCPU, ns, and the visits, up to which all is counted.
    counted: Option<(u64, u32)>,
    /// Time in others since it was there, ns.
    elsewhere: u64,
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
    contest: Option<Contest>,
}

impl Policy {
    /// `always`: every address space is hot.
    pub fn new(always: bool) -> Policy {
        Policy {
            heats: HashMap::new(),
            programs: HashMap::new(),
            always,
            last: None,
            contest: None,
        }
    }

    pub fn is_hot(&self, root: u64) -> bool {
        self.always || self.heats.get(&root).is_some_and(|h| h.hot) && !self.is_translated_now(root)
    }

    /// Whether it is translated code's turn there.
    fn is_translated_now(&self, root: u64) -> bool {
        let contest = self.contest.as_ref().filter(|c| c.root == root);
        contest.is_some_and(|c| !c.duel.is_native())
    }

    /// Whether the time that address spaces take is to be counted.
    pub fn counts(&self) -> bool {
        self.contest.is_some()
    }

    /// The vCPU has had so much host CPU time, ns, and so many visits by now, and is in this address space from now on. True if another one
    /// becomes one to run natively, as it is not waited for any longer.
    pub fn pass(&mut self, root: u64, ns: u64, visits: u32) -> bool {
        let Some(contest) = &mut self.contest else {
            return false;
        };
        let (from, before) = contest
            .counted
            .replace((ns, visits))
            .unwrap_or((ns, visits));
        let passed = ns.saturating_sub(from);
        if std::mem::replace(&mut contest.inside, root == contest.root) {
            contest.elsewhere = 0;
            contest.duel.add(passed, visits.wrapping_sub(before));
        } else {
            contest.elsewhere += passed;
        }
        let ended = self.contest.take_if(|c| c.elsewhere > MOST_ELSEWHERE);
        ended.is_some_and(|c| !c.duel.is_native())
    }

    /// A turn may be over. True if an address space becomes one to run natively.
    pub fn turn(&mut self) -> bool {
        let Some(contest) = &mut self.contest else {
            return false;
        };
        let was_native = contest.duel.is_native();
        let Some(winner) = contest.duel.turn() else {
            return !was_native && contest.duel.is_native();
        };
        let root = contest.root;
        self.contest = None;
        let Some(heat) = self.heats.get_mut(&root) else {
            return false;
        };
        match winner {
            Winner::Native => {
                heat.was_settled = (heat.was_settled * 2).clamp(ns(SETTLED), ns(MOST_SETTLED));
                heat.settled = heat.was_settled;
                !was_native
            }
            Winner::Translated => {
                heat.was_settled = 0;
                heat.total = heat.total.min(0);
                heat.before = heat.before.min(0);
                self.end(root);
                false
            }
        }
    }

    /// Whether something is known of an address space.
    pub fn knows(&self, root: u64) -> bool {
        self.heats.contains_key(&root)
    }

    /// The tables belong to another program now.
    pub fn forget(&mut self, root: u64) {
        self.contest.take_if(|c| c.root == root);
        if self.heats.get(&root).is_some_and(|heat| heat.hot) {
            self.end(root);
        }
        self.heats.remove(&root);
    }

    /// The attempt in an address space has ended: others that run the same program begin with what it has come to.
    fn end(&mut self, root: u64) {
        let Some(heat) = self.heats.get_mut(&root) else {
            return;
        };
        heat.end();
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
                bursts: 0,
                settled: 0,
                was_settled: 0,
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
            heat.bursts = 0;
            heat.settled = 0;
        }
        becomes
    }

    /// A burst has ended.
    pub fn burst(&mut self, root: u64, burst: Burst) {
        let Some(heat) = self.heats.get_mut(&root) else {
            return;
        };
        heat.mean += (burst.user_of_stop().min(ns(MOST_IN_MEAN)) - heat.mean) / MEAN_OF;
        heat.bursts = heat.bursts.saturating_add(1);
        heat.settled -= ns(burst.whole);
        if heat.settled > 0 {
            return;
        }
        let is_in_doubt = heat.mean < ns(MEAN_IN_DOUBT) && heat.bursts >= BURSTS_IN_DOUBT;
        let value = burst.value(heat.mean);
        self.count(root, value, value.max(LEAST));
        if is_in_doubt && self.contest.is_none() && self.is_hot(root) && !self.always {
            self.contest = Some(Contest {
                root,
                duel: Duel::default(),
                inside: false,
                counted: None,
                elsewhere: 0,
            });
        }
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
            self.end(root);
            self.contest.take_if(|c| c.root == root);
        }
    }

    /// The address space cannot be run natively for now.
    pub fn give_up(&mut self, root: u64) {
        self.contest.take_if(|c| c.root == root);
        if let Some(heat) = self.heats.get_mut(&root) {
            heat.hot = false;
            heat.ticks = 0;
            heat.wait = MOST_TICKS;
        }
    }
}

#[cfg(test)]
mod tests;
