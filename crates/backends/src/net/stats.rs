//! What a device has carried.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::frame::Monitor;
use crate::lock;

/// Counters since the device was made; directions are the guest's.
#[derive(Debug, Default)]
pub struct Stats {
    pub sent_packets: AtomicU64,
    pub sent_bytes: AtomicU64,
    /// Packets that are no packets, or whose pages the guest does not grant.
    pub sent_errors: AtomicU64,
    /// Packets that the host did not take, or that claimed to be another's.
    pub sent_dropped: AtomicU64,
    pub received_packets: AtomicU64,
    pub received_bytes: AtomicU64,
    /// Packets larger than what the guest has room for.
    pub received_dropped: AtomicU64,
    /// Why nothing is carried, as a sentence.
    trouble: Mutex<Option<String>>,
}

impl Stats {
    /// Whether that is something new.
    pub fn set_trouble(&self, trouble: Option<String>) -> bool {
        let mut old = lock(&self.trouble);
        let new = *old != trouble;
        *old = trouble;
        new
    }
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Relaxed);
}

impl Monitor for Stats {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        [
            ("tx_packets", &self.sent_packets),
            ("tx_bytes", &self.sent_bytes),
            ("tx_errors", &self.sent_errors),
            ("tx_dropped", &self.sent_dropped),
            ("rx_packets", &self.received_packets),
            ("rx_bytes", &self.received_bytes),
            ("rx_dropped", &self.received_dropped),
        ]
        .map(|(name, counter)| (name, counter.load(Relaxed)))
        .to_vec()
    }

    fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }
}
