//! From the nodes that a guest wrote to running queues.

use std::sync::Arc;

use hospes_ring::BackRing;
use hospes_units::GrantRef;

use super::queue::Serve;
use super::thread::{QueueThread, Shared};
use super::{Block, MAX_RING_PAGE_ORDER};
use crate::frame::{ConnectError, Frontend, RingPages};

impl Block {
    /// Starts all queues or none.
    pub(super) fn start_queues(
        &self,
        front: &Frontend<'_>,
    ) -> Result<Vec<QueueThread>, ConnectError> {
        if let Some(protocol) = front.text("protocol")
            && protocol != "x86_64-abi"
        {
            return Err(ConnectError::BadNode {
                node: "protocol".to_owned(),
                value: protocol.chars().take(40).collect(),
                allowed: "x86_64-abi".to_owned(),
            });
        }
        let count = front
            .optional("multi-queue-num-queues", 1, self.max_queues)?
            .unwrap_or(1);
        let order = front
            .optional("ring-page-order", 0, MAX_RING_PAGE_ORDER)?
            .unwrap_or(0);
        let mut serves = Vec::new();
        for number in 0..count {
            // One queue has its nodes in the device's own directory.
            let directory = match count {
                1 => String::new(),
                _ => format!("queue-{number}/"),
            };
            serves.push(self.queue(front, &directory, order)?);
        }
        let mut queues = Vec::new();
        for (number, (shared, serve)) in serves.into_iter().enumerate() {
            queues.push(QueueThread::start(number, shared, serve)?);
        }
        Ok(queues)
    }

    fn queue(
        &self,
        front: &Frontend<'_>,
        directory: &str,
        order: u32,
    ) -> Result<(Arc<Shared>, Serve), ConnectError> {
        let host = |what: &dyn std::fmt::Display| ConnectError::Host(what.to_string());
        let ring = BackRing::attach(ring_pages(front, directory, order)?)
            .ok_or(ConnectError::RingTooSmall)?;
        ring.waiting()?;
        let shared = Shared::new()?;
        let image = self.image()?;
        let queue = image.queue().map_err(|e| host(&e))?;
        // Last: from here on the guest's events count.
        let port = front.listen(&format!("{directory}event-channel"), shared.listener())?;
        let serve = Serve::new(
            ring,
            port,
            queue,
            Arc::clone(image),
            Arc::clone(front.xen()),
            Arc::clone(&self.stats),
            front.alarm(),
            self.log.clone(),
        );
        Ok((shared, serve))
    }
}

/// A ring of one page may be named either way.
fn ring_pages(
    front: &Frontend<'_>,
    directory: &str,
    order: u32,
) -> Result<RingPages, ConnectError> {
    let name = |i: u32| format!("{directory}ring-ref{i}");
    if order == 0 && front.text(&name(0)).is_none() {
        return front.ring(&format!("{directory}ring-ref"));
    }
    let grefs: Result<Vec<GrantRef>, ConnectError> = (0..1 << order)
        .map(|i| front.number(&name(i), 0, u32::MAX).map(GrantRef))
        .collect();
    front.map(&grefs?)
}
