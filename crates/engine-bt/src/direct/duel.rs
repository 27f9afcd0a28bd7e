//! Whether a program runs faster natively than translated, found out by having it run so and so in turn.
//!
//! What it has done in a turn is how often it has entered its kernel: neither way of running it changes what it does between two visits. So this is for programs that visit it often.

use std::time::Duration;

/// A turn, in host CPU time that the address space takes, with its kernel's.
const TURN: Duration = Duration::from_millis(5);
/// What does not count of a turn when the other way was used before: the caches are cold.
const COLD: Duration = Duration::from_millis(1);
/// Whether each turn is native. The first does not count: what has not been executed for long has to be translated. Each way is in the other's middle, as programs have phases.
const TURNS: [bool; 13] = [
    false, true, false, false, true, true, false, false, true, true, false, false, true,
];
/// After so many turns a clear lead decides, and that is one in percent.
const EARLY: usize = 5;
const CLEAR: u64 = 150;
/// The lead in percent that translated code needs in the end.
const LEAD: u64 = 110;
/// With fewer visits in all native turns there is nothing to compare.
const FEW_VISITS: u64 = 50;

/// What was done in the turns of one way.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    ns: u64,
    visits: u64,
}

impl Tally {
    /// Whether as much was done as the other did, times a lead in percent.
    fn leads(self, other: Tally, percent: u64) -> bool {
        let product = |visits: u64, ns: u64| u128::from(visits) * u128::from(ns);
        product(self.visits, other.ns) * 100 > product(other.visits, self.ns) * u128::from(percent)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Winner {
    Native,
    Translated,
}

#[derive(Clone, Debug, Default)]
pub struct Duel {
    turn: usize,
    /// Of this turn, ns.
    passed: u64,
    native: Tally,
    translated: Tally,
}

impl Duel {
    pub fn is_native(&self) -> bool {
        TURNS[self.turn]
    }

    /// The address space has had so much host CPU time, and has visited its kernel so often.
    pub fn add(&mut self, ns: u64, visits: u32) {
        let is_cold = self.turn == 0 || TURNS[self.turn - 1] != TURNS[self.turn];
        self.passed += ns;
        if self.turn == 0 || is_cold && self.passed <= COLD.as_nanos() as u64 {
            return;
        }
        let tally = match self.is_native() {
            true => &mut self.native,
            false => &mut self.translated,
        };
        tally.ns += ns;
        tally.visits += u64::from(visits);
    }

    /// Goes on to the next turn if this one is over; the winner when that is known.
    pub fn turn(&mut self) -> Option<Winner> {
        if self.passed < TURN.as_nanos() as u64 {
            return None;
        }
        self.passed = 0;
        let done = self.turn + 1;
        let percent = match done {
            EARLY => CLEAR,
            _ if done == TURNS.len() => LEAD,
            _ => {
                self.turn = done;
                return None;
            }
        };
        if self.native.visits >= FEW_VISITS && self.translated.leads(self.native, percent) {
            return Some(Winner::Translated);
        }
        if done == TURNS.len() || self.native.leads(self.translated, percent) {
            return Some(Winner::Native);
        }
        self.turn = done;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A duel of a program that makes so many visits in a millisecond, natively and translated; who wins, and in how many turns.
    fn winner(native: impl Fn(usize) -> u32, translated: impl Fn(usize) -> u32) -> (Winner, usize) {
        let mut duel = Duel::default();
        for _ in 0..1000 {
            let visits = match duel.is_native() {
                true => native(duel.turn),
                false => translated(duel.turn),
            };
            duel.add(1_000_000, visits);
            if let Some(winner) = duel.turn() {
                return (winner, duel.turn + 1);
            }
        }
        panic!("nobody wins");
    }

    #[test]
    fn clear_lead_decides_early() {
        assert_eq!(winner(|_| 100, |_| 40), (Winner::Native, EARLY));
        assert_eq!(winner(|_| 100, |_| 160), (Winner::Translated, EARLY));
    }

    #[test]
    fn translated_code_needs_a_lead() {
        assert_eq!(winner(|_| 100, |_| 105), (Winner::Native, TURNS.len()));
        assert_eq!(winner(|_| 100, |_| 115), (Winner::Translated, TURNS.len()));
        assert_eq!(winner(|_| 100, |_| 90), (Winner::Native, TURNS.len()));
    }

    #[test]
    fn program_that_becomes_slower_in_time_does_not_decide() {
        let slower = |more: u32| move |turn: usize| 400 + more - 20 * turn as u32;
        assert_eq!(winner(slower(0), slower(0)).0, Winner::Native);
        assert_eq!(winner(slower(0), slower(80)).0, Winner::Translated);
    }

    #[test]
    fn cold_caches_do_not_count() {
        let mut duel = Duel::default();
        while duel.turn < 2 {
            duel.add(1_000_000, 1);
            duel.turn();
        }
        assert_eq!(duel.native.visits, 4);
    }

    #[test]
    fn program_that_hardly_visits_its_kernel_stays_native() {
        assert_eq!(winner(|_| 0, |_| 0), (Winner::Native, TURNS.len()));
        assert_eq!(winner(|_| 1, |_| 5).0, Winner::Native);
    }
}
