//! From the wire to the guest.
//!
//! A frame is read into the guest's buffers at once, before anybody knows how long it is or whether it is to be cut: buffers for the longest have to
//! be there. A frame that is to be cut needs a slot for that after its first; that slot's buffer is left out when the wire may bring such frames, and a
//! long frame that is not to be cut, which is rare, is moved together afterwards.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use hospes_ring::{BackRing, Broken, SharedMemory};
use hospes_units::GrantRef;
use hospes_xen::{Access, GrantError};
use hospes_xen_abi::netif::{
    self, ExtraInfo, GSO_TYPE_TCPV4, GSO_TYPE_TCPV6, RX_CSUM_BLANK, RX_DATA_VALIDATED,
    RX_EXTRA_INFO, RX_MORE_DATA, RxRequest, RxResponse,
};
use zerocopy::{FromBytes, IntoBytes};

use super::headers;
use super::link::{Link, Offloads, Span};
use super::memory::{GuestPage, GuestPages, PAGE};
use super::stats::{Stats, add};
use super::vnet::{self, VnetHeader};

/// The receive ring.
pub type RxRing<M> = BackRing<M, RxRequest, RxResponse>;

/// Frames that are carried before the other direction has its turn.
const BATCH: usize = 64;
/// Pages of the longest frame: 64 KiB, and a page for Ethernet's header.
const LONGEST_PAGES: usize = 17;

/// Why a queue cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RxFault {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("a receive buffer cannot be used: {0}")]
    Buffer(#[from] GrantError),
}

/// What frames the guest takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The wire brings frames that are to be cut.
    pub segmented: bool,
    /// Buffers that the longest frame fills.
    pub pages: usize,
}

impl Shape {
    /// Of a guest that takes frames in pieces or not, and frames to be cut or not, where others have at most `mtu` bytes.
    pub fn new(pieces: bool, segmented: bool, mtu: u32) -> Shape {
        // Ethernet's header and a VLAN tag.
        let longest = mtu as usize + 18;
        Shape {
            segmented: pieces && segmented,
            pages: match (pieces, segmented) {
                (false, _) => 1,
                (true, true) => LONGEST_PAGES,
                (true, false) => longest.div_ceil(PAGE).min(LONGEST_PAGES),
            },
        }
    }

    /// Buffers that have to be there before a frame is read.
    fn buffers(&self) -> usize {
        self.pages + usize::from(self.segmented)
    }

    /// Whether the frame's pages leave out the buffer with this index.
    fn leaves_out(&self, index: usize) -> bool {
        self.segmented && index == 1
    }
}

/// What came of one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// No frame waits.
    Idle,
    /// There may be more.
    Busy,
    /// The guest has to give buffers first.
    Starved,
}

/// A buffer that the guest gave.
struct Buffer {
    id: u16,
    page: GuestPage,
}

/// The receive side of a queue.
pub struct Receive<M, P> {
    pub ring: RxRing<M>,
    pages: P,
    shape: Shape,
    stats: Arc<Stats>,
    /// Taken from the ring and not used yet.
    buffers: VecDeque<Buffer>,
    /// The wire broke: nothing comes any more.
    broken: Option<io::Error>,
}

impl<M: SharedMemory, P: GuestPages> Receive<M, P> {
    pub fn new(ring: RxRing<M>, pages: P, shape: Shape, stats: Arc<Stats>) -> Receive<M, P> {
        Receive {
            ring,
            pages,
            shape,
            stats,
            buffers: VecDeque::new(),
            broken: None,
        }
    }

    /// Gives the guest what waits on the wire, for one turn. The answers are not shown yet.
    pub fn turn(&mut self, link: &mut Link) -> Result<Turn, RxFault> {
        if self.broken.is_some() {
            return Ok(Turn::Starved);
        }
        for _ in 0..BATCH {
            if self.buffers.len() < self.shape.buffers() {
                self.take_buffers()?;
                if self.buffers.len() < self.shape.buffers() {
                    return Ok(Turn::Starved);
                }
            }
            if !self.frame(link) {
                return Ok(match self.broken {
                    None => Turn::Idle,
                    Some(_) => Turn::Starved,
                });
            }
        }
        Ok(Turn::Busy)
    }

    /// Whether the wire broke.
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// There is another wire.
    pub fn mend(&mut self) {
        self.broken = None;
    }

    /// Why nothing comes from the wire any more, once.
    pub fn wire_error(&mut self) -> Option<String> {
        let error = self.broken.as_mut()?;
        let shown = std::mem::replace(error, io::ErrorKind::Other.into());
        (shown.kind() != io::ErrorKind::Other).then(|| shown.to_string())
    }

    fn take_buffers(&mut self) -> Result<(), RxFault> {
        while let Some(request) = self.ring.take()? {
            let page = self.pages.page(GrantRef(request.gref), Access::Write)?;
            self.buffers.push_back(Buffer {
                id: request.id,
                page,
            });
        }
        Ok(())
    }

    /// Carries one frame; false where none waits.
    fn frame(&mut self, link: &mut Link) -> bool {
        let mut spans = [const { None::<Span> }; LONGEST_PAGES];
        let mut into = Vec::with_capacity(LONGEST_PAGES);
        let usable = self
            .buffers
            .iter()
            .enumerate()
            .filter(|(index, _)| !self.shape.leaves_out(*index));
        for (span, (_, buffer)) in spans.iter_mut().take(self.shape.pages).zip(usable) {
            *span = Some(buffer.page.span);
            into.push(buffer.page.span);
        }
        let mut header = VnetHeader::default();
        match link.receive(&mut header, &into) {
            Ok(Some(len)) if len == 0 || len >= self.shape.pages * PAGE => {
                add(&self.stats.received_dropped, 1);
                true
            }
            Ok(Some(len)) => {
                if !is_left_to_guest_with_tag(&header, &into)
                    || finish(link, &mut header, &into, len)
                {
                    self.deliver(&header, len);
                } else {
                    add(&self.stats.received_dropped, 1);
                }
                true
            }
            Ok(None) => false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(error) => {
                self.broken = Some(error);
                false
            }
        }
    }

    /// Answers the buffers that hold a frame of `len` bytes, at least 1.
    fn deliver(&mut self, header: &VnetHeader, len: usize) {
        let mut flags = 0;
        if header.flags & vnet::NEEDS_CSUM != 0 {
            flags |= RX_CSUM_BLANK | RX_DATA_VALIDATED;
        } else if header.flags & vnet::DATA_VALID != 0 {
            flags |= RX_DATA_VALIDATED;
        }
        let gso_type = match header.gso_type & !vnet::GSO_ECN {
            vnet::GSO_TCPV4 => Some(GSO_TYPE_TCPV4),
            vnet::GSO_TCPV6 => Some(GSO_TYPE_TCPV6),
            _ => None,
        };
        let pages = len.div_ceil(PAGE);
        if gso_type.is_none() && self.shape.segmented {
            for index in 1..pages {
                let from = self.buffers[index + 1].page.span;
                self.buffers[index].page.span.copy_from(&from);
            }
        }
        let mut left = len;
        for index in 0..pages {
            let Some(buffer) = self.buffers.pop_front() else {
                return;
            };
            let here = left.min(PAGE);
            left -= here;
            self.pages.written(&buffer.page, here);
            let first = index == 0;
            let mut response = RxResponse {
                id: buffer.id,
                offset: 0,
                flags: if first { flags } else { 0 },
                status: here as i16,
            };
            if left > 0 {
                response.flags |= RX_MORE_DATA;
            }
            match gso_type {
                Some(gso_type) if first => {
                    response.flags |= RX_EXTRA_INFO;
                    self.ring.answer(&response);
                    self.extra(gso_type, header.gso_size);
                }
                _ => self.ring.answer(&response),
            }
        }
        add(&self.stats.received_packets, 1);
        add(&self.stats.received_bytes, len);
    }

    /// Answers the buffer that was left out with what the guest needs to cut the frame.
    fn extra(&mut self, gso_type: u8, gso_size: u16) {
        self.buffers.pop_front();
        let extra = ExtraInfo {
            kind: netif::EXTRA_TYPE_GSO,
            gso_size,
            gso_type,
            ..ExtraInfo::default()
        };
        if let Ok(response) = RxResponse::read_from_bytes(extra.as_bytes()) {
            self.ring.answer(&response);
        }
    }
}

/// Whether the host has left something of a frame to the guest that has a VLAN tag: Linux' front end finishes IP's frames alone and drops others.
fn is_left_to_guest_with_tag(header: &VnetHeader, frame: &[Span]) -> bool {
    let mut head = [0; headers::ETHERNET_BYTES];
    header.flags & vnet::NEEDS_CSUM != 0
        && frame
            .first()
            .is_some_and(|first| first.read(&mut head) == head.len())
        && headers::is_tagged(&head)
}

/// Finishes such a frame of `len` bytes, and has the host finish all from now on, also those without a tag: it makes no difference between them. False for a frame that
/// cannot be finished here, as it has to be cut: TCP sends it again.
fn finish(link: &Link, header: &mut VnetHeader, frame: &[Span], len: usize) -> bool {
    // A host that refuses leaves the next one to the guest as well.
    let _ = link.set_offloads(Offloads::default());
    if header.gso_type != vnet::GSO_NONE {
        return false;
    }
    let mut bytes = vec![0; len];
    let mut at = 0;
    for span in frame {
        at += span.read(&mut bytes[at..]);
    }
    if !headers::fill_checksum(&mut bytes) {
        return false;
    }
    let mut rest = &bytes[..];
    for span in frame {
        rest = &rest[span.write(rest)..];
    }
    header.flags = vnet::DATA_VALID;
    true
}
