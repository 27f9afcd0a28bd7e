//! When the code cache is emptied though it has room.
//!
//! What is executed at a time is spread among all that was ever translated: most of the code of a kernel and of the programs it starts runs once. Processors' caches
//! and TLBs hold a working set that lies close together and not one that is spread, so after a time in which much was translated the cache is emptied: what is still
//! executed comes back side by side, in the order of its execution, and soon nothing has to be translated any more.

use std::time::{Duration, Instant};

use crate::blocks::Blocks;

/// How long at least the translator has to be quiet.
const WINDOW: Duration = Duration::from_millis(500);
/// Most bytes that it makes meanwhile.
const QUIET: usize = 256 << 10;
/// Fewest bytes that are worth it.
const LEAST: usize = 16 << 20;

#[derive(Debug)]
pub(crate) struct Compaction {
    since: Instant,
    /// Bytes that were in use then.
    used: usize,
    /// What was in use when the translator was quiet again after the cache had been emptied; `None` until then.
    settled: Option<usize>,
    /// Bytes that were in use when the cache was last emptied.
    thrown: usize,
    /// All has to be made anew, whatever is in use.
    wanted: bool,
}

impl Compaction {
    pub fn new(now: Instant) -> Compaction {
        Compaction {
            since: now,
            used: 0,
            settled: Some(0),
            thrown: 0,
            wanted: false,
        }
    }

    /// Whether the cache, of which so many bytes are in use, is to be emptied before the next block is made.
    pub fn is_due(&mut self, now: Instant, used: usize) -> bool {
        if self.wanted {
            return true;
        }
        if now.saturating_duration_since(self.since) < WINDOW {
            return false;
        }
        let made = used.saturating_sub(self.used);
        (self.since, self.used) = (now, used);
        if made > QUIET {
            return false;
        }
        let settled = *self.settled.get_or_insert(used);
        // Where half of it has come back, what runs now and then needs it: only much more than that is worth another time.
        let in_vain = (self.thrown / 2..2 * self.thrown).contains(&used);
        used >= (2 * settled).max(LEAST) && !in_vain
    }

    /// The cache has been emptied.
    pub fn emptied(&mut self, now: Instant) {
        self.thrown = self.used;
        self.wanted = false;
        (self.since, self.used, self.settled) = (now, 0, None);
    }
}

impl Blocks {
    /// Has all of it be made anew, before the next block is.
    pub fn want_empty_cache(&mut self) {
        self.compaction.wanted = true;
    }

    /// Whether all of it is better made anew.
    pub fn is_compaction_due(&mut self) -> bool {
        let used = self.space.used();
        self.compaction.is_due(Instant::now(), used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: usize = 1 << 20;

    #[test]
    fn cache_is_emptied_when_much_was_translated_and_little_is() {
        let start = Instant::now();
        let at = |n| start + WINDOW * n;
        let mut compaction = Compaction::new(start);
        assert!(!compaction.is_due(at(1), 40 * MB), "a program starts");
        assert!(!compaction.is_due(at(1) + WINDOW / 2, 40 * MB), "too soon");
        assert!(compaction.is_due(at(2), 40 * MB + QUIET));
        compaction.emptied(at(2));
        assert!(
            !compaction.is_due(at(3), 20 * MB),
            "what is needed comes back"
        );
        for n in 4..100 {
            assert!(!compaction.is_due(at(n), 20 * MB), "that is all needed");
        }
        assert!(!compaction.is_due(at(100), 79 * MB));
        assert!(!compaction.is_due(at(101), 79 * MB), "not twice as much");
        assert!(!compaction.is_due(at(102), 81 * MB));
        assert!(compaction.is_due(at(103), 81 * MB));
    }

    #[test]
    fn what_comes_back_each_time_stays() {
        let start = Instant::now();
        let mut compaction = Compaction::new(start);
        let (mut used, mut emptied, mut windows) = (0, 0, 0);
        for _ in 0..20 {
            // The same program every few seconds: nothing of it has to be translated again as long as it is there.
            let wanted = 40 * MB;
            while used < wanted {
                used += 8 * MB;
                windows += 1;
                assert!(!compaction.is_due(start + WINDOW * windows, used));
            }
            for _ in 0..4 {
                windows += 1;
                if compaction.is_due(start + WINDOW * windows, used) {
                    compaction.emptied(start + WINDOW * windows);
                    (used, emptied) = (0, emptied + 1);
                }
            }
        }
        assert_eq!(emptied, 1);
    }

    #[test]
    fn little_code_is_left_where_it_is() {
        let start = Instant::now();
        let mut compaction = Compaction::new(start);
        for n in 1..100 {
            assert!(!compaction.is_due(start + WINDOW * n, LEAST - 1));
        }
    }
}
