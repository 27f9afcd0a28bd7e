//! Network interfaces: requests of `public/io/netif.h` on one side, frames on a tap or a stream on the other.
//!
//! Frames go between the guest's pages and the descriptor without a copy, but for a sent packet's first bytes: these are checked, and what was checked is
//! what is sent. Checksums and segmentation pass from one side to the other as they are wherever both can; where the wire cannot, checksums are filled in
//! here. Each queue of the guest has its pair of rings, a queue of the tap and a thread.
//!
//! Refuses: page flipping (`request-rx-copy` is needed), multicast control, the control ring.
//!
//! Invariants: each slot taken is answered once, in order; a direction that cannot go on never keeps the other or another queue from going on;
//! a frame is given to the guest after the engine has been told of the memory written. A buffer is looked up when the guest posts it: a guest that ends
//! the grant before it gets the buffer back has its own page written.
//! Limits: [`MAX_QUEUES`] queues, rings of one page, 18 slots and 64 KiB for a packet.

mod connect;
mod fuzz;
pub mod guard;
pub mod headers;
mod link;
mod memory;
mod mend;
mod packet;
mod queue;
pub mod rate;
mod receive;
mod stats;
#[cfg(test)]
mod tests;
mod transmit;
pub mod vnet;

use std::any::Any;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::frame::{Backend, ConnectError, Frontend, Log, Monitor, Node};

use link::Link;
use queue::QueueThread;
use rate::Limit;
use stats::Stats;

pub use fuzz::fuzz_packets;
pub use guard::Guard;
pub use link::Wire;
pub use mend::Renew;
pub use rate::Rate;

/// Most queues of one interface.
pub const MAX_QUEUES: u32 = 8;

/// What an interface is made of.
pub struct NetConfig {
    pub wire: Wire,
    /// Not blocking, one for each queue that the guest may have, at least one; a stream has one.
    pub queues: Vec<OwnedFd>,
    /// Bytes of the longest packet that is not to be cut.
    pub mtu: u32,
    /// Limit of what the guest sends, one for all queues.
    pub rate: Option<Rate>,
    /// What the guest may send; everything without one.
    pub guard: Option<Guard>,
    /// Called when the interface goes, while its nodes and the descriptors are still there.
    pub leave: Option<Box<dyn FnOnce() + Send>>,
    /// Where a stream that breaks can be had anew.
    pub renew: Option<Renew>,
    /// Plugs the interface in anew where it has been let go of for a while.
    pub again: Option<Again>,
    /// Dropped after the descriptors.
    pub keep: Box<dyn Any + Send>,
    pub log: Log,
}

/// See [`NetConfig::again`].
pub type Again = Box<dyn FnMut() -> Result<NetConfig, String> + Send>;

impl fmt::Debug for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "NetConfig({:?}, {} queues)",
            self.wire,
            self.queues.len()
        )
    }
}

/// A network interface of a guest.
pub struct Net {
    wire: Wire,
    mtu: u32,
    limit: Option<Arc<Limit>>,
    guard: Option<Guard>,
    log: Log,
    stats: Arc<Stats>,
    max_queues: u32,
    queues: Vec<QueueThread>,
    /// Those that no queue uses.
    links: Vec<Link>,
    leave: Option<Box<dyn FnOnce() + Send>>,
    renew: Option<Renew>,
    again: Option<Again>,
    /// `None` while it is let go.
    keep: Option<Box<dyn Any + Send>>,
}

impl Net {
    pub fn new(config: NetConfig) -> Net {
        let links = links(config.queues, config.wire);
        Net {
            wire: config.wire,
            mtu: config.mtu,
            limit: config.rate.map(|rate| Limit::new(rate, Instant::now())),
            guard: config.guard,
            log: config.log,
            stats: Arc::default(),
            max_queues: links.len() as u32,
            queues: Vec::new(),
            links,
            leave: config.leave,
            renew: config.renew,
            again: config.again,
            keep: Some(config.keep),
        }
    }
}

fn links(queues: Vec<OwnedFd>, wire: Wire) -> Vec<Link> {
    let queues = queues.into_iter().take(MAX_QUEUES as usize);
    queues.map(|fd| Link::new(fd, wire)).collect()
}

impl Backend for Net {
    fn features(&self) -> Vec<Node> {
        let segmentation = u32::from(self.wire == Wire::Frames);
        [
            ("feature-rx-copy", 1),
            ("feature-rx-flip", 0),
            ("feature-sg", 1),
            ("feature-gso-tcpv4", segmentation),
            ("feature-gso-tcpv6", segmentation),
            ("feature-ipv6-csum-offload", 1),
            ("feature-split-event-channels", 1),
            ("multi-queue-max-queues", self.max_queues),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_string()))
        .to_vec()
    }

    fn connect(&mut self, front: &Frontend<'_>) -> Result<Vec<Node>, ConnectError> {
        self.start_queues(front)?;
        Ok(Vec::new())
    }

    fn disconnect(&mut self) {
        for queue in &self.queues {
            queue.stop();
        }
        self.links
            .extend(self.queues.drain(..).filter_map(QueueThread::join));
    }

    fn let_go(&mut self) -> Result<(), String> {
        // A network of its own is in nobody's way, and connections through it would not outlive it.
        if self.again.is_some() && self.keep.is_some() {
            self.leave();
            self.links.clear();
            self.keep = None;
        }
        Ok(())
    }

    fn take_again(&mut self) -> Result<(), String> {
        if self.keep.is_none()
            && let Some(again) = &mut self.again
        {
            let new = again()?;
            self.links = links(new.queues, new.wire);
            self.guard = new.guard;
            self.leave = new.leave;
            self.keep = Some(new.keep);
        }
        Ok(())
    }

    fn leave(&mut self) {
        if let Some(leave) = self.leave.take() {
            leave();
        }
    }

    fn monitor(&self) -> Arc<dyn Monitor> {
        Arc::clone(&self.stats) as Arc<dyn Monitor>
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.disconnect();
        // The frame has not called where it could not even start the device.
        self.leave();
    }
}
