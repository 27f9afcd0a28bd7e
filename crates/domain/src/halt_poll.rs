//! How long a vCPU that waits for an interrupt stays awake for it.
//!
//! Sending a thread to sleep and waking it again takes longer than a fast disk or a neighbour on the network does to answer. A vCPU
//! whose last waits were short stays awake for the next one; the first long wait ends that, so one that has nothing to do sleeps.

use std::time::Duration;

/// The longest wait that is sat out awake, and the first.
const MOST: Duration = Duration::from_micros(100);
const FIRST: Duration = Duration::from_micros(20);

/// The window of one vCPU.
#[derive(Debug, Default)]
pub struct HaltPoll {
    window: Duration,
}

impl HaltPoll {
    /// How long to stay awake.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// Learns how long a wait was in the end.
    pub fn waited(&mut self, time: Duration) {
        if time > MOST {
            self.window = Duration::ZERO;
        } else if time > self.window {
            self.window = (self.window * 2).clamp(FIRST, MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_grows_with_short_waits_and_closes_at_a_long_one() {
        let us = Duration::from_micros;
        let mut poll = HaltPoll::default();
        assert_eq!(poll.window(), us(0));
        for window in [20, 40, 80, 100, 100] {
            poll.waited(us(99));
            assert_eq!(poll.window(), us(window));
        }
        // What the window holds already needs no larger one.
        poll.waited(us(5));
        assert_eq!(poll.window(), us(100));
        poll.waited(us(101));
        assert_eq!(poll.window(), us(0));
    }
}
