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

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use hospes_image::{Image, Status};
use hospes_xen_abi::blkif;

use crate::frame::{Backend, ConnectError, Frontend, Log, Monitor, Node};
use crate::lock;

pub use fuzz::fuzz_request;

use stats::Stats;
use thread::QueueThread;

/// Most queues of one disk.
pub const MAX_QUEUES: u32 = 4;
/// Most segments, so most pages, of one request.
pub const MAX_INDIRECT_SEGMENTS: usize = 256;
/// The largest ring is of 2^4 pages.
pub const MAX_RING_PAGE_ORDER: u32 = 4;

/// How often it is looked whether queues are idle, or an image is closed.
const LOOK: Duration = Duration::from_millis(1);
/// How long the host may take to make durable what was written, and to close the image after that.
const DURABLE: Duration = Duration::from_secs(60);

/// Opens the image of a disk anew.
pub type Reopen = Box<dyn FnMut() -> Result<Arc<dyn Image>, String> + Send>;

/// An image that others may look at for a moment; `None` once it is to be closed.
type Seen = Arc<Mutex<Option<Weak<dyn Image>>>>;

/// A disk of a guest.
pub struct Block {
    /// `None` while it is let go.
    image: Option<Arc<dyn Image>>,
    /// The same, for others.
    seen: Seen,
    reopen: Option<Reopen>,
    cdrom: bool,
    max_queues: u32,
    log: Log,
    stats: Arc<Stats>,
    /// The changes that were there when all was made durable last.
    durable: Option<u64>,
    queues: Vec<QueueThread>,
}

impl Block {
    /// A disk on an image, for a domain with so many vCPUs.
    pub fn new(image: Arc<dyn Image>, cdrom: bool, vcpus: u32, log: Log) -> Block {
        Block {
            seen: Arc::new(Mutex::new(Some(Arc::downgrade(&image)))),
            image: Some(image),
            reopen: None,
            cdrom,
            max_queues: vcpus.clamp(1, MAX_QUEUES),
            log,
            stats: Arc::default(),
            durable: None,
            queues: Vec::new(),
        }
    }

    /// The same where the image can be let go of for a while, as `reopen` opens it again.
    pub fn with_reopen(mut self, reopen: Reopen) -> Block {
        self.reopen = Some(reopen);
        self
    }

    fn image(&self) -> Result<&Arc<dyn Image>, ConnectError> {
        self.image
            .as_ref()
            .ok_or_else(|| ConnectError::Host("its image is not open".to_owned()))
    }

    /// [`Backend::flush`]. Does nothing where nothing has changed since the last time.
    fn flush_until(&mut self, deadline: Instant) -> Result<(), String> {
        let Some(image) = &self.image else {
            return Ok(());
        };
        // What is done meanwhile counts as not durable.
        let changes = Some(self.stats.changes());
        if self.durable != changes {
            hospes_image::flush(&**image, deadline).map_err(|fault| fault.to_string())?;
            self.durable = changes;
        }
        Ok(())
    }

    /// What the guest reads of the disk when it connects, and again when its size changes.
    fn properties(&self) -> Vec<Node> {
        let Some(image) = &self.image else {
            return Vec::new();
        };
        let geometry = image.geometry();
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
        let geometry = self.image.as_ref().map(|image| image.geometry());
        if let Some(geometry) = geometry
            && let Some(granularity) = geometry.discard
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

    fn settle(&mut self, deadline: Instant) -> Result<(), String> {
        while !self.queues.iter().all(QueueThread::is_idle) {
            let status = self.image.as_ref().map(|image| image.status());
            if let Some(Status::Held(why)) = status {
                return Err(why);
            }
            if Instant::now() >= deadline {
                return Err("the host takes too long".to_owned());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), String> {
        self.flush_until(Instant::now() + DURABLE)
    }

    fn let_go(&mut self) -> Result<(), String> {
        if self.reopen.is_none() {
            return Err("it could not be opened again".to_owned());
        }
        // Only this opening knows what is not durable yet, and that it may be lost.
        let deadline = Instant::now() + DURABLE;
        self.flush_until(deadline)?;
        while let Some(image) = &self.image {
            let mut seen = lock(&self.seen);
            // Whoever just looks at it would else be the one to close it, some time later.
            if Arc::strong_count(image) == 1 {
                *seen = None;
                drop(seen);
                self.image = None;
                break;
            }
            drop(seen);
            if Instant::now() >= deadline {
                return Err("its image stays open".to_owned());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn take_again(&mut self) -> Result<(), String> {
        if self.image.is_none()
            && let Some(reopen) = &mut self.reopen
        {
            let image = reopen()?;
            *lock(&self.seen) = Some(Arc::downgrade(&image));
            self.image = Some(image);
            self.durable = None;
        }
        Ok(())
    }

    fn renewed(&mut self) -> Vec<Node> {
        // A new size is a change of the image.
        self.durable = None;
        self.properties()
    }

    fn monitor(&self) -> Arc<dyn Monitor> {
        Arc::new(DiskMonitor {
            image: Arc::clone(&self.seen),
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
    image: Seen,
    stats: Arc<Stats>,
}

impl Monitor for DiskMonitor {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.stats.counters()
    }

    fn trouble(&self) -> Option<String> {
        let image = lock(&self.image).as_ref()?.upgrade();
        match image?.status() {
            Status::Good => None,
            Status::Held(why) => Some(why),
        }
    }
}
