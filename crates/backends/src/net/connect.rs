//! From the nodes that a guest wrote to running queues.

use std::sync::Arc;

use hospes_ring::BackRing;

use super::link::{Link, Offloads};
use super::memory::DomainPages;
use super::mend::Mend;
use super::queue::{QueueThread, Serve};
use super::receive::{Receive, Shape};
use super::transmit::Transmit;
use super::{Net, Wire};
use crate::frame::{ConnectError, Frontend, RingPages, Wake};

/// A queue without its wire.
type Half = (
    Transmit<RingPages, DomainPages>,
    Receive<RingPages, DomainPages>,
    Ports,
);

struct Ports {
    wake: Arc<Wake>,
    transmit: hospes_xen::HostPort,
    receive: Option<hospes_xen::HostPort>,
}

impl Net {
    /// Starts all queues or none.
    pub(super) fn start_queues(&mut self, front: &Frontend<'_>) -> Result<(), ConnectError> {
        if !front.flag("request-rx-copy")? {
            return Err(ConnectError::BadNode {
                node: "request-rx-copy".to_owned(),
                value: "0".to_owned(),
                allowed: "1: pages are copied, not flipped".to_owned(),
            });
        }
        let count = front
            .optional("multi-queue-num-queues", 1, self.max_queues)?
            .unwrap_or(1);
        if self.links.len() < count as usize {
            return Err(ConnectError::Host(
                "a queue of the interface has failed".to_owned(),
            ));
        }
        let (shape, offloads) = self.shape(front)?;
        let mut halves = Vec::new();
        for number in 0..count {
            // One queue has its nodes in the device's own directory.
            let directory = match count {
                1 => String::new(),
                _ => format!("queue-{number}/"),
            };
            halves.push(self.half(front, &directory, shape, number)?);
        }
        let host = |fault: std::io::Error| ConnectError::Host(fault.to_string());
        for (number, link) in self.links.iter().enumerate() {
            link.set_attached(number < count as usize).map_err(host)?;
        }
        if let Some(link) = self.links.first() {
            link.set_offloads(offloads).map_err(host)?;
        }
        let links: Vec<Link> = self.links.drain(..count as usize).collect();
        for (number, ((transmit, receive, ports), link)) in
            halves.into_iter().zip(links).enumerate()
        {
            let serve = Serve {
                transmit,
                receive,
                link,
                wake: ports.wake,
                transmit_port: Some(ports.transmit),
                receive_port: ports.receive,
                alarm: front.alarm(),
                mend: Mend::new(
                    self.renew.clone(),
                    Arc::clone(&self.stats),
                    Arc::clone(&self.log),
                ),
            };
            // A wire whose thread cannot be started is lost, and with it the device; the host is out of threads.
            let queue = QueueThread::start(format!("vif-queue-{number}"), serve)?;
            self.queues.push(queue);
        }
        Ok(())
    }

    /// What the guest takes.
    fn shape(&self, front: &Frontend<'_>) -> Result<(Shape, Offloads), ConnectError> {
        let pieces = front.flag("feature-sg")?;
        // Checksums of IPv4 may be blank unless the guest says no, those of IPv6 if it says yes; a tap knows one switch for both.
        let offloads = Offloads {
            checksum: !front.flag("feature-no-csum-offload")?
                && front.flag("feature-ipv6-csum-offload")?,
            tcpv4: pieces && front.flag("feature-gso-tcpv4")?,
            tcpv6: pieces && front.flag("feature-gso-tcpv6")?,
        };
        let segmented =
            self.wire == Wire::Frames && offloads.checksum && (offloads.tcpv4 || offloads.tcpv6);
        // A stream brings frames of any length whatever the MTU.
        let mtu = match self.wire {
            Wire::Frames => self.mtu,
            Wire::Stream => u32::from(u16::MAX),
        };
        Ok((Shape::new(pieces, segmented, mtu), offloads))
    }

    fn half(
        &self,
        front: &Frontend<'_>,
        directory: &str,
        shape: Shape,
        number: u32,
    ) -> Result<Half, ConnectError> {
        let pages = |node: &str| front.ring(&format!("{directory}{node}"));
        let transmit = BackRing::attach(pages("tx-ring-ref")?).ok_or(ConnectError::RingTooSmall)?;
        let receive = BackRing::attach(pages("rx-ring-ref")?).ok_or(ConnectError::RingTooSmall)?;
        transmit.waiting()?;
        receive.waiting()?;
        let wake = Arc::new(Wake::new().map_err(|e| ConnectError::Host(e.to_string()))?);
        let port = |node: &str| front.bind(&format!("{directory}{node}"), &wake);
        let split = front
            .text(&format!("{directory}event-channel-tx"))
            .is_some();
        let ports = Ports {
            transmit: port(if split {
                "event-channel-tx"
            } else {
                "event-channel"
            })?,
            receive: split.then(|| port("event-channel-rx")).transpose()?,
            wake: Arc::clone(&wake),
        };
        let limit = self.limit.as_ref();
        let credit = limit.map(|limit| limit.credit(number as usize));
        let pages = || DomainPages(Arc::clone(front.xen()));
        let stats = || Arc::clone(&self.stats);
        Ok((
            Transmit::new(transmit, pages(), self.guard.clone(), credit, stats()),
            Receive::new(receive, pages(), shape, stats()),
            ports,
        ))
    }
}
