//! What the devices of a domain have carried.

use serde::{Deserialize, Serialize};

/// The devices of a domain, all of a kind together, and what they have carried since they were made. Directions are the guest's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub vifs: u32,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub disks: u32,
    /// Requests that were done.
    pub reads: u64,
    pub writes: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
}
