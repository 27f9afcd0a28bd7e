//! Disks: requests of `public/io/blkif.h` on one side, an image on the other.
//!
//! Data goes between the guest's pages and the host's storage without a copy. Each queue of the guest has a ring, a thread and a queue of the image;
//! a thread takes all requests there are, starts them together, and tells the guest of their ends together.
//!
//! Refuses: the 32-bit layout of requests, persistent grants (without them the guest does not copy either), secure discards.
//!
//! Invariants: each request taken is answered once; a flush is answered after the image's flush; a read is answered after the engine has been told of
//! the memory written.
//! Limits: [`MAX_QUEUES`] queues, rings of 16 pages, [`MAX_INDIRECT_SEGMENTS`] segments in a request.

mod connect;
mod fuzz;
mod parse;
mod queue;
mod stats;
#[cfg(test)]
mod tests;
mod thread;

use std::sync::Arc;

use hospes_image::{Image, Status};
use hospes_xen_abi::blkif;

use crate::frame::{Backend, ConnectError, Frontend, Log, Monitor, Node};

pub use fuzz::fuzz_request;

use stats::Stats;
use thread::QueueThread;

/// Most queues of one disk.
pub const MAX_QUEUES: u32 = 4;
/// Most segments, so most pages, of one request.
pub const MAX_INDIRECT_SEGMENTS: usize = 256;
/// The largest ring is of 2^4 pages.
pub const MAX_RING_PAGE_ORDER: u32 = 4;

/// A disk of a guest.
pub struct Block {
    image: Arc<dyn Image>,
    cdrom: bool,
    max_queues: u32,
    log: Log,
    stats: Arc<Stats>,
    queues: Vec<QueueThread>,
}

impl Block {
    /// A disk on an image, for a domain with so many vCPUs.
    pub fn new(image: Arc<dyn Image>, cdrom: bool, vcpus: u32, log: Log) -> Block {
        Block {
            image,
            cdrom,
            max_queues: vcpus.clamp(1, MAX_QUEUES),
            log,
            stats: Arc::default(),
            queues: Vec::new(),
        }
    }

    /// What the guest reads of the disk when it connects, and again when its size changes.
    fn properties(&self) -> Vec<Node> {
        let geometry = self.image.geometry();
        let mut info = 0;
        if self.cdrom {
            info |= blkif::INFO_CDROM | blkif::INFO_REMOVABLE;
        }
        if geometry.read_only {
            info |= blkif::INFO_READONLY;
        }
        let sectors = geometry.bytes / blkif::SECTOR_BYTES;
        vec![
            node("sectors", sectors),
            node("info", info),
            node("sector-size", geometry.sector_bytes),
            node("physical-sector-size", geometry.physical_sector_bytes),
        ]
    }
}

fn node(name: &str, value: impl ToString) -> Node {
    (name.to_owned(), value.to_string())
}

impl Backend for Block {
    fn features(&self) -> Vec<Node> {
        let mut nodes = vec![
            node("feature-flush-cache", 1),
            node("feature-persistent", 0),
            node("feature-max-indirect-segments", MAX_INDIRECT_SEGMENTS),
            node("multi-queue-max-queues", self.max_queues),
            node("max-ring-page-order", MAX_RING_PAGE_ORDER),
        ];
        let geometry = self.image.geometry();
        if let Some(granularity) = geometry.discard
            && !geometry.read_only
        {
            nodes.extend([
                node("feature-discard", 1),
                node("discard-granularity", granularity),
                node("discard-alignment", 0),
                node("discard-secure", 0),
            ]);
        }
        nodes
    }

    fn connect(&mut self, front: &Frontend<'_>) -> Result<Vec<Node>, ConnectError> {
        self.queues = self.start_queues(front)?;
        Ok(self.properties())
    }

    fn abandon(&mut self) {
        for queue in &self.queues {
            queue.abandon();
        }
    }

    fn disconnect(&mut self) {
        for queue in &self.queues {
            queue.stop();
        }
        // Dropping one waits for its thread.
        self.queues.clear();
    }

    fn renewed(&mut self) -> Vec<Node> {
        self.properties()
    }

    fn monitor(&self) -> Arc<dyn Monitor> {
        Arc::new(DiskMonitor {
            image: Arc::downgrade(&self.image),
            stats: Arc::clone(&self.stats),
        })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.disconnect();
    }
}

/// Does not keep the image open.
struct DiskMonitor {
    image: std::sync::Weak<dyn Image>,
    stats: Arc<Stats>,
}

impl Monitor for DiskMonitor {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.stats.counters()
    }

    fn trouble(&self) -> Option<String> {
        match self.image.upgrade()?.status() {
            Status::Good => None,
            Status::Held(why) => Some(why),
        }
    }
}
