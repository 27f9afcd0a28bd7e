//! From the guest to the wire.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use hospes_ring::SharedMemory;
use hospes_units::GrantRef;
use hospes_xen::Access;
use hospes_xen_abi::netif;

use super::guard::Guard;
use super::headers;
use super::link::{Link, SPANS_MAX, Span};
use super::memory::GuestPages;
use super::packet::{Packet, TxFault, TxRing};
use super::rate::Credit;
use super::stats::{Stats, add};

/// A packet's first bytes, which are copied before they are looked at: more than the headers that anybody sends.
const HEAD: usize = 256;
/// Packets that are carried before the other direction has its turn.
const BATCH: usize = 64;

/// What came of one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing is left to do.
    Idle,
    /// There may be more.
    Busy,
    /// A packet waits for credit.
    Until(Instant),
    /// A packet waits for the wire.
    Full,
}

/// The transmit side of a queue.
pub struct Transmit<M, P> {
    pub ring: TxRing<M>,
    pages: P,
    guard: Option<Guard>,
    credit: Option<Credit>,
    stats: Arc<Stats>,
    /// Taken and not carried yet.
    held: Option<Packet>,
}

impl<M: SharedMemory, P: GuestPages> Transmit<M, P> {
    pub fn new(
        ring: TxRing<M>,
        pages: P,
        guard: Option<Guard>,
        credit: Option<Credit>,
        stats: Arc<Stats>,
    ) -> Transmit<M, P> {
        Transmit {
            ring,
            pages,
            guard,
            credit,
            stats,
            held: None,
        }
    }

    /// Carries what the guest has queued, for one turn. The answers are not shown yet.
    pub fn turn(&mut self, link: &mut Link) -> Result<Turn, TxFault> {
        for _ in 0..BATCH {
            let packet = match self.held.take() {
                Some(packet) => packet,
                None => match Packet::take(&mut self.ring)? {
                    Some(packet) => packet,
                    None => return Ok(Turn::Idle),
                },
            };
            if let Some(credit) = &self.credit
                && packet.error.is_none()
                && let Err(next) = credit.pay(packet.len as u64, Instant::now())
            {
                self.held = Some(packet);
                return Ok(Turn::Until(next));
            }
            let status = match self.carry(&packet, link) {
                Ok(status) => status,
                Err(WireIsFull) => {
                    if let Some(credit) = &self.credit {
                        credit.refund(packet.len as u64);
                    }
                    self.held = Some(packet);
                    return Ok(Turn::Full);
                }
            };
            packet.answer(&mut self.ring, status);
        }
        Ok(Turn::Busy)
    }

    /// Carries one packet; the status for its answer.
    fn carry(&self, packet: &Packet, link: &mut Link) -> Result<i16, WireIsFull> {
        let refused = |_| {
            add(&self.stats.sent_errors, 1);
            netif::STATUS_ERROR
        };
        if packet.error.is_some() {
            return Ok(refused(()));
        }
        let mut spans = [const { None::<Span> }; SPANS_MAX];
        for (span, piece) in spans.iter_mut().zip(&packet.pieces) {
            match self.pages.page(GrantRef(piece.gref), Access::Read) {
                Ok(page) => *span = Some(page.span.part(piece.offset, piece.len)),
                Err(_) => return Ok(refused(())),
            }
        }
        let mut head = [0; HEAD];
        let mut rest = Vec::with_capacity(packet.pieces.len());
        let mut filled = 0;
        for span in spans.iter().flatten() {
            let count = span.read(&mut head[filled..]);
            filled += count;
            if count < span.len() {
                rest.push(span.part(count, span.len()));
            }
        }
        let head = &mut head[..filled];
        let Some(layers) = headers::parse(head) else {
            return Ok(refused(()));
        };
        if self
            .guard
            .as_ref()
            .is_some_and(|guard| !guard.permits(head, &layers))
        {
            add(&self.stats.sent_dropped, 1);
            return Ok(netif::STATUS_DROPPED);
        }
        let header = match packet.vnet_header(head, &layers) {
            Ok(header) => header,
            Err(_) => return Ok(refused(())),
        };
        match link.send(&header, head, &rest) {
            Ok(()) => {
                add(&self.stats.sent_packets, 1);
                add(&self.stats.sent_bytes, packet.len);
                Ok(netif::STATUS_OKAY)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(WireIsFull),
            Err(_) => {
                add(&self.stats.sent_dropped, 1);
                Ok(netif::STATUS_DROPPED)
            }
        }
    }
}

/// The packet is to be tried again.
struct WireIsFull;
