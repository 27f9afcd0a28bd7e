//! Sending a guest's memory while the guest runs, in rounds: first all of it, then what was written since the round before began, until what is left is sent in a moment or
//! does not become less. Then the guest is suspended, and what is left is sent with the rest of the domain ([`Domain::save`]).
//!
//! Invariant: whatever ends it, the log of written frames is switched off with [`Live`], and the guest knows nothing of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use hospes_memory::FrameSet;
use hospes_migration::{LiveRound, PAGE_BYTES};
use hospes_xen::Xen;

use crate::pages::{PASSES_MAX, Sent, ram_pages};
use crate::saved::{SaveError, SaveStream};
use crate::{Domain, RequestError};

/// When to go over to what is sent while the guest is suspended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LivePolicy {
    /// When what is left takes less than that.
    pub pause: Duration,
    /// After so many rounds at most.
    pub rounds_max: u32,
}

impl Default for LivePolicy {
    fn default() -> LivePolicy {
        LivePolicy {
            pause: Duration::from_millis(50),
            rounds_max: 30,
        }
    }
}

/// A guest's memory, most of which is on the other side of a stream. The guest runs, and what it writes is logged for as long as this value lives.
#[derive(Debug)]
pub struct Live {
    log: Log,
    sent: Sent,
}

impl Live {
    /// Sends what is left. To be called while no vCPU runs.
    pub(crate) fn rest(mut self, to: &mut SaveStream<'_>) -> Result<Sent, SaveError> {
        let memory = Arc::clone(self.log.xen.memory());
        let frames = self.log.begin_round();
        self.sent.frames(&memory, &frames, to, &|| Ok(()))?;
        Ok(self.sent)
    }
}

/// The right to begin rounds.
struct Log {
    xen: Arc<Xen>,
    taken: Arc<AtomicBool>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").finish_non_exhaustive()
    }
}

impl Log {
    fn take(domain: &Domain) -> Option<Log> {
        let free = !domain.sending.swap(true, SeqCst);
        free.then(|| Log {
            xen: Arc::clone(&domain.xen),
            taken: Arc::clone(&domain.sending),
        })
    }

    fn begin_round(&self) -> FrameSet {
        self.xen.vm().begin_round()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.xen.vm().end_rounds();
        self.taken.store(false, SeqCst);
    }
}

/// Decides whether another round follows.
#[derive(Debug)]
struct Course {
    policy: LivePolicy,
    rounds: u32,
    pages: u64,
    time: Duration,
    /// Rounds, one after the other, that left hardly less than they had begun with.
    stalled: u32,
}

impl Course {
    fn new(policy: LivePolicy) -> Course {
        Course {
            policy,
            rounds: 0,
            pages: 0,
            time: Duration::ZERO,
            stalled: 0,
        }
    }

    /// A round that began with so many frames has sent so many pages, those of them that were not empty here and there, and left so many frames.
    fn round(&mut self, frames: u64, pages: u64, time: Duration, left: u64) -> LiveRound {
        self.rounds += 1;
        self.pages += pages;
        self.time += time;
        self.stalled = if left > frames / 4 * 3 {
            self.stalled + 1
        } else {
            0
        };
        LiveRound {
            number: self.rounds,
            pages,
            bytes_per_s: (self.pages_per_s() * PAGE_BYTES as f64) as u64,
            left,
        }
    }

    fn pages_per_s(&self) -> f64 {
        self.pages as f64 / self.time.as_secs_f64().max(1e-6)
    }

    /// Whether to send what was left in another round.
    fn goes_on(&self, left: u64) -> bool {
        let soon = self.pages_per_s() * self.policy.pause.as_secs_f64();
        left as f64 > soon && self.stalled < 2 && self.rounds < self.policy.rounds_max
    }
}

impl Domain {
    /// Sends the memory of a guest that runs, in rounds, each of which is told to `progress`, until what is left is little enough to be sent while the guest is suspended.
    /// Asks `given_up` now and then whether it is to end. The guest goes on in any case.
    pub fn send_live(
        &self,
        to: &mut SaveStream<'_>,
        policy: LivePolicy,
        progress: &mut dyn FnMut(LiveRound),
        given_up: &dyn Fn() -> bool,
    ) -> Result<Live, SaveError> {
        let go_on = || match self.run.end_reason() {
            Some(reason) => Err(RequestError::Ended(reason).into()),
            // It could not suspend itself in the end.
            None if self.run.is_paused() => Err(RequestError::Paused.into()),
            None if given_up() => Err(RequestError::TakenBack.into()),
            None => Ok(()),
        };
        let log = Log::take(self).ok_or(SaveError::Sending)?;
        let mut live = Live {
            log,
            sent: Sent::default(),
        };
        let memory = self.xen.memory();
        let mut course = Course::new(policy);
        loop {
            let (begun, before) = (Instant::now(), to.pages_written());
            let written = live.log.begin_round();
            let frames = if course.rounds == 0 {
                live.sent.all(memory, to, &go_on)?;
                live.sent.filled()
            } else {
                live.sent.frames(memory, &written, to, &go_on)?;
                written.len()
            };
            let left = memory.log().pages();
            let pages = to.pages_written() - before;
            progress(course.round(frames, pages, begun.elapsed(), left));
            go_on()?;
            // One more, and what is left then, must not be more than the stream may have.
            let room = to.pages_written() <= (PASSES_MAX - 2) * ram_pages(memory);
            if !room || !course.goes_on(left) {
                return Ok(live);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn little_is_left_to_the_pause() {
        let mut course = Course::new(LivePolicy::default());
        let round = course.round(100_000, 100_000, SECOND, 6000);
        assert_eq!((round.number, round.bytes_per_s), (1, 409_600_000));
        assert!(course.goes_on(5001));
        assert!(!course.goes_on(5000));
        assert!(!course.goes_on(0));
    }

    #[test]
    fn guest_that_writes_as_fast_as_is_sent_ends_the_rounds() {
        let mut course = Course::new(LivePolicy::default());
        course.round(100_000, 100_000, SECOND, 60_000);
        assert!(course.goes_on(60_000));
        course.round(60_000, 60_000, SECOND, 50_000);
        assert!(course.goes_on(50_000));
        // Less again, of which many were empty.
        course.round(50_000, 20_000, SECOND, 30_000);
        assert!(course.goes_on(30_000));
        for goes_on in [true, false] {
            course.round(30_000, 30_000, SECOND, 30_000);
            assert_eq!(course.goes_on(30_000), goes_on);
        }
    }

    #[test]
    fn rounds_come_to_an_end() {
        let mut course = Course::new(LivePolicy {
            rounds_max: 3,
            ..LivePolicy::default()
        });
        for goes_on in [true, true, false] {
            course.round(1000, 1000, SECOND, 500);
            assert_eq!(course.goes_on(500), goes_on);
        }
    }

    #[test]
    fn nothing_sent_means_nothing_known() {
        let mut course = Course::new(LivePolicy::default());
        let round = course.round(0, 0, Duration::ZERO, 10);
        assert_eq!(round.bytes_per_s, 0);
        assert!(course.goes_on(10) && !course.goes_on(0));
    }
}
