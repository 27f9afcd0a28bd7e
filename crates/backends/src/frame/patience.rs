//! How long a thread that waits stays awake for what it waits for.
//!
//! Sending a thread to sleep and waking it again takes longer than a fast disk, a guest's next request or a neighbour on the network does. A
//! thread whose last waits were short stays awake for the next one; the first long wait ends that, so one that has nothing to do sleeps. While it
//! is awake it lets others have its CPU all the time, and where they take much of it, it sleeps as well: the host wakes a sleeper at once, but
//! lets one that gave way wait for its turn.

use std::time::{Duration, Instant};

/// The longest wait that is sat out awake, and the first.
const MOST: Duration = Duration::from_micros(200);
const FIRST: Duration = Duration::from_micros(25);
/// Giving way that took longer than this gave the CPU to somebody.
const GAP: Duration = Duration::from_micros(20);
/// How much time others may take, and how long the thread sleeps at each wait after that.
const LOST_MOST: Duration = Duration::from_millis(5);
const REST: Duration = Duration::from_millis(50);

/// The window of one kind of wait of one thread.
#[derive(Debug, Default)]
pub struct Patience {
    window: Duration,
    /// What others took while the thread was awake for something.
    lost: Duration,
    resting_since: Option<Instant>,
}

impl Patience {
    /// Stays awake until `done`, for as long as the window is; whether it was. The wait began at `start`.
    pub fn sit_out(&mut self, start: Instant, mut done: impl FnMut() -> bool) -> bool {
        let mut now = start;
        while now.saturating_duration_since(start) < self.window {
            if done() {
                return true;
            }
            std::thread::yield_now();
            let after = Instant::now();
            self.gave_way(after - now, after);
            now = after;
        }
        false
    }

    /// Learns how long a wait took that ended at `now`, with sleep or without.
    pub fn waited(&mut self, time: Duration, now: Instant) {
        if time > MOST {
            self.window = Duration::ZERO;
        } else if time > self.window && !self.is_resting(now) {
            self.window = (self.window * 2).clamp(FIRST, MOST);
        }
    }

    fn gave_way(&mut self, time: Duration, now: Instant) {
        if time < GAP {
            return;
        }
        self.lost += time;
        if self.lost > LOST_MOST {
            self.lost = Duration::ZERO;
            self.window = Duration::ZERO;
            self.resting_since = Some(now);
        }
    }

    fn is_resting(&mut self, now: Instant) -> bool {
        let resting = self
            .resting_since
            .is_some_and(|since| now.saturating_duration_since(since) < REST);
        if !resting {
            self.resting_since = None;
        }
        resting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    #[test]
    fn window_grows_with_short_waits_and_closes_at_a_long_one() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        for window in [25, 50, 100, 200, 200] {
            patience.waited(us(199), now);
            assert_eq!(patience.window, us(window));
        }
        // What the window holds already needs no larger one.
        patience.waited(us(5), now);
        assert_eq!(patience.window, us(200));
        patience.waited(us(201), now);
        assert_eq!(patience.window, us(0));
    }

    #[test]
    fn window_stays_closed_for_a_while_where_others_take_the_cpu() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        patience.waited(us(10), now);
        patience.gave_way(us(19), now);
        patience.gave_way(us(5000), now);
        assert_eq!(patience.window, us(25));
        patience.gave_way(us(20), now);
        assert_eq!(patience.window, us(0));
        patience.waited(us(10), now + REST / 2);
        assert_eq!(patience.window, us(0));
        patience.waited(us(10), now + REST);
        assert_eq!(patience.window, us(25));
    }

    #[test]
    fn sit_out_sees_what_it_waits_for_and_does_not_wait_without_a_window() {
        let mut patience = Patience::default();
        assert!(!patience.sit_out(Instant::now(), || panic!("nobody is awake")));
        patience.window = Duration::from_secs(3600);
        let mut looks = 0;
        assert!(patience.sit_out(Instant::now(), || {
            looks += 1;
            looks == 3
        }));
    }
}
