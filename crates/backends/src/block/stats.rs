//! What a disk did so far.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

use hospes_image::Op;

/// Counters of one disk over all its queues and connections.
#[derive(Debug, Default)]
pub struct Stats {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    /// Requests answered with an error.
    errors: AtomicU64,
    /// Events sent to the guest.
    events: AtomicU64,
    /// One of the errors was that the image is shorter than the disk.
    cut: AtomicBool,
}

impl Stats {
    pub fn done(&self, op: Op, bytes: u64) {
        let count = |counter: &AtomicU64, n| counter.fetch_add(n, Relaxed);
        match op {
            Op::Read => {
                count(&self.reads, 1);
                count(&self.read_bytes, bytes);
            }
            Op::Write => {
                count(&self.writes, 1);
                count(&self.written_bytes, bytes);
            }
            Op::Flush => {
                count(&self.flushes, 1);
            }
            Op::Discard => {
                count(&self.discards, 1);
            }
        }
    }

    /// Grows with everything that may have changed the image: of what failed a part may be done.
    pub fn changes(&self) -> u64 {
        let counters = [&self.writes, &self.discards, &self.errors];
        counters.map(|counter| counter.load(Relaxed)).iter().sum()
    }

    /// Returns how many failed so far.
    pub fn failed(&self) -> u64 {
        self.errors.fetch_add(1, Relaxed) + 1
    }

    /// Notes that the image was cut; true the first time.
    pub fn cut(&self) -> bool {
        !self.cut.swap(true, Relaxed)
    }

    pub fn event(&self) {
        self.events.fetch_add(1, Relaxed);
    }

    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        [
            ("reads", &self.reads),
            ("writes", &self.writes),
            ("flushes", &self.flushes),
            ("discards", &self.discards),
            ("read_bytes", &self.read_bytes),
            ("written_bytes", &self.written_bytes),
            ("errors", &self.errors),
            ("events", &self.events),
        ]
        .map(|(name, counter)| (name, counter.load(Relaxed)))
        .to_vec()
    }
}
