//! Both directions of a queue against a guest of the test's own: its pages, its rings, and a socket for the wire.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;

use hospes_ring::{BackRing, FrontRing, LocalMemory};
use hospes_units::GrantRef;
use hospes_xen::{Access, GrantError};
use hospes_xen_abi::netif::{
    self, ExtraInfo, RX_CSUM_BLANK, RX_DATA_VALIDATED, RX_EXTRA_INFO, RX_MORE_DATA, RxRequest,
    RxResponse, TX_CSUM_BLANK, TX_MORE_DATA, TxRequest, TxResponse,
};
use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use zerocopy::{FromBytes, IntoBytes};

use super::guard::Guard;
use super::headers::{self, PROTOCOL_TCP, samples};
use super::link::{Link, Span, Wire};
use super::memory::{GuestPage, GuestPages, PAGE};
use super::rate::{Limit, Rate};
use super::receive::{self, Receive, Shape};
use super::stats::Stats;
use super::transmit::{self, Transmit};
use super::vnet::{self, VnetHeader};

/// Pages that the guest of a test has; grant N is page N, and others do not exist.
#[derive(Clone)]
struct Pages {
    memory: Arc<Vec<u64>>,
    written: Arc<Mutex<Vec<(u64, usize)>>>,
}

impl Pages {
    fn new(count: usize) -> Pages {
        Pages {
            memory: Arc::new(vec![0; count * PAGE / 8]),
            written: Arc::default(),
        }
    }

    fn at(&self, page: usize) -> Span {
        assert!((page + 1) * PAGE <= self.memory.len() * 8);
        let base = self.memory.as_ptr().cast_mut().cast::<u8>();
        // SAFETY: the page lies in the vector, which lives as long as the test; tests reach it through spans only.
        unsafe { Span::new(base.add(page * PAGE), PAGE) }
    }

    fn bytes(&self, page: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.at(page).read(&mut bytes);
        bytes
    }
}

impl GuestPages for Pages {
    fn page(&self, gref: GrantRef, _: Access) -> Result<GuestPage, GrantError> {
        if (gref.0 as usize + 1) * PAGE > self.memory.len() * 8 {
            return Err(GrantError::BadReference(gref));
        }
        Ok(GuestPage {
            gpa: u64::from(gref.0) * PAGE as u64,
            span: self.at(gref.0 as usize),
        })
    }

    fn written(&self, page: &GuestPage, len: usize) {
        self.written.lock().unwrap().push((page.gpa, len));
    }
}

fn wire() -> (Link, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (Link::new(ours, Wire::Frames), theirs)
}

struct Sender {
    front: FrontRing<LocalMemory, TxRequest, TxResponse>,
    transmit: Transmit<LocalMemory, Pages>,
    pages: Pages,
    stats: Arc<Stats>,
}

fn sender(guard: Option<Guard>, rate: Option<Rate>) -> Sender {
    let memory = LocalMemory::new(PAGE);
    let front = FrontRing::new(memory.clone()).unwrap();
    let (pages, stats) = (Pages::new(32), Arc::<Stats>::default());
    let credit = rate.map(|rate| Limit::new(rate, std::time::Instant::now()).credit(0));
    let ring = BackRing::attach(memory).unwrap();
    Sender {
        front,
        transmit: Transmit::new(ring, pages.clone(), guard, credit, Arc::clone(&stats)),
        pages,
        stats,
    }
}

impl Sender {
    /// Queues a frame in pieces of `first` and then `piece` bytes, each in a page of its own.
    fn queue(&mut self, frame: &[u8], first: usize, piece: usize, flags: u16) {
        let (head, tail) = frame.split_at(first.min(frame.len()));
        let parts: Vec<_> = std::iter::once(head).chain(tail.chunks(piece)).collect();
        for (index, part) in parts.iter().enumerate() {
            self.pages.at(index).part(16, PAGE).write(part);
            let more = if index + 1 < parts.len() {
                TX_MORE_DATA
            } else {
                0
            };
            let request = TxRequest {
                gref: index as u32,
                offset: 16,
                flags: more | if index == 0 { flags } else { 0 },
                id: index as u16,
                size: if index == 0 { frame.len() } else { part.len() } as u16,
            };
            assert!(self.front.put(&request));
        }
        let _ = self.front.publish();
    }

    fn answers(&mut self) -> Vec<i16> {
        let _ = self.transmit.ring.publish();
        std::iter::from_fn(|| self.front.take())
            .map(|answer| answer.status)
            .collect()
    }
}

/// A frame on the wire with its header.
fn on_wire(fd: &OwnedFd) -> Option<(VnetHeader, Vec<u8>)> {
    let mut bytes = vec![0; 70_000];
    let count = rustix::io::read(fd, &mut bytes[..]).ok()?;
    let (header, frame) = VnetHeader::read_from_prefix(&bytes[..count]).ok()?;
    Some((header, frame.to_vec()))
}

#[test]
fn transmit_sends_what_the_pieces_hold() {
    let (mut link, far) = wire();
    let mut sender = sender(None, None);
    let data: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
    let frame = samples::ipv4([2; 6], PROTOCOL_TCP, &data);
    // The headers lie in three pieces.
    sender.queue(&frame, 10, 2000, TX_CSUM_BLANK);
    assert_eq!(
        sender.transmit.turn(&mut link).unwrap(),
        transmit::Turn::Idle
    );
    let (header, sent) = on_wire(&far).unwrap();
    assert_eq!(sent, frame);
    assert_eq!(
        (header.flags, header.csum_start, header.csum_offset),
        (vnet::NEEDS_CSUM, 34, 16)
    );
    assert_eq!(sender.answers(), [netif::STATUS_OKAY; 4]);
    assert_eq!(sender.stats.sent_bytes.load(Relaxed), frame.len() as u64);
}

#[test]
fn transmit_answers_what_cannot_be_sent() {
    let (mut link, far) = wire();
    let guard = Guard {
        mac: [2; 6],
        ip: None,
        host_v6: Vec::new(),
    };
    let mut sender = sender(Some(guard), None);
    // Another's address, a page that is not granted, a packet that is none.
    sender.queue(&samples::ipv4([4; 6], PROTOCOL_TCP, b"x"), 100, 100, 0);
    for (gref, size) in [(99, 60), (0, 3)] {
        assert!(sender.front.put(&TxRequest {
            gref,
            size,
            ..TxRequest::default()
        }));
    }
    let _ = sender.front.publish();
    sender.transmit.turn(&mut link).unwrap();
    assert!(on_wire(&far).is_none());
    let expected = [
        netif::STATUS_DROPPED,
        netif::STATUS_ERROR,
        netif::STATUS_ERROR,
    ];
    assert_eq!(sender.answers(), expected);
    assert_eq!(sender.stats.sent_dropped.load(Relaxed), 1);
    assert_eq!(sender.stats.sent_errors.load(Relaxed), 2);
}

#[test]
fn transmit_keeps_a_packet_that_has_no_credit_or_no_room() {
    let (mut link, far) = wire();
    let interval = std::time::Duration::from_secs(3600);
    let mut limited = sender(
        None,
        Some(Rate {
            bytes: 100,
            interval,
        }),
    );
    let frame = samples::ipv4([2; 6], PROTOCOL_TCP, &[0; 46]);
    for _ in 0..2 {
        limited.queue(&frame, 100, 100, 0);
    }
    let turn = limited.transmit.turn(&mut link).unwrap();
    assert!(matches!(turn, transmit::Turn::Until(_)));
    assert!(on_wire(&far).is_some() && on_wire(&far).is_none());
    assert_eq!(limited.answers(), [netif::STATUS_OKAY]);

    let mut sender = sender(None, None);
    let mut sent = 0;
    loop {
        sender.queue(&frame, 100, 100, 0);
        sent += 1;
        if sender.transmit.turn(&mut link).unwrap() == transmit::Turn::Full {
            break;
        }
        sender.answers();
    }
    let arrived = std::iter::from_fn(|| on_wire(&far)).count();
    assert_eq!(arrived, sent - 1);
    assert_eq!(
        sender.transmit.turn(&mut link).unwrap(),
        transmit::Turn::Idle
    );
    assert!(on_wire(&far).is_some());
}

struct Taker {
    front: FrontRing<LocalMemory, RxRequest, RxResponse>,
    receive: Receive<LocalMemory, Pages>,
    pages: Pages,
    stats: Arc<Stats>,
}

fn taker(shape: Shape) -> Taker {
    let memory = LocalMemory::new(PAGE);
    let front = FrontRing::new(memory.clone()).unwrap();
    let (pages, stats) = (Pages::new(64), Arc::<Stats>::default());
    let ring = BackRing::attach(memory).unwrap();
    Taker {
        front,
        receive: Receive::new(ring, pages.clone(), shape, Arc::clone(&stats)),
        pages,
        stats,
    }
}

impl Taker {
    fn post(&mut self, grefs: std::ops::Range<u32>) {
        for gref in grefs {
            let id = gref as u16;
            assert!(self.front.put(&RxRequest { id, pad: 0, gref }));
        }
        let _ = self.front.publish();
    }

    fn answers(&mut self) -> Vec<RxResponse> {
        let _ = self.receive.ring.publish();
        std::iter::from_fn(|| self.front.take()).collect()
    }

    /// The next frame as a guest puts it together, with its first flags and what is to be cut.
    fn frame(
        &self,
        answers: &mut std::vec::IntoIter<RxResponse>,
    ) -> Option<(u16, Option<ExtraInfo>, Vec<u8>)> {
        let mut answer = answers.next()?;
        let flags = answer.flags;
        let extra = (flags & RX_EXTRA_INFO != 0)
            .then(|| ExtraInfo::read_from_bytes(answers.next().unwrap().as_bytes()).unwrap());
        let mut frame = Vec::new();
        loop {
            assert!(answer.offset == 0 && answer.status > 0);
            frame.extend(
                self.pages
                    .bytes(usize::from(answer.id), answer.status as usize),
            );
            if answer.flags & RX_MORE_DATA == 0 {
                return Some((flags, extra, frame));
            }
            answer = answers.next().unwrap();
        }
    }
}

fn send(fd: &OwnedFd, header: VnetHeader, frame: &[u8]) {
    let bytes = [header.as_bytes(), frame].concat();
    assert_eq!(rustix::io::write(fd, &bytes).unwrap(), bytes.len());
}

#[test]
fn receive_waits_for_room_for_the_longest_frame() {
    let (mut link, far) = wire();
    let mut taker = taker(Shape::new(true, true, 1500));
    send(&far, VnetHeader::default(), &[7; 60]);
    taker.post(0..17);
    assert_eq!(
        taker.receive.turn(&mut link).unwrap(),
        receive::Turn::Starved
    );
    taker.post(17..18);
    assert_eq!(
        taker.receive.turn(&mut link).unwrap(),
        receive::Turn::Starved
    );
    let mut answers = taker.answers().into_iter();
    assert_eq!(taker.frame(&mut answers).unwrap().2, [7; 60]);
    assert_eq!(*taker.pages.written.lock().unwrap(), [(0, 60)]);
}

#[test]
fn receive_tells_of_checksums() {
    let (mut link, far) = wire();
    let mut taker = taker(Shape::new(false, false, 1500));
    for flags in [vnet::NEEDS_CSUM, vnet::DATA_VALID, 0] {
        send(
            &far,
            VnetHeader {
                flags,
                ..VnetHeader::default()
            },
            &[1; 60],
        );
    }
    // Too long for one page.
    send(&far, VnetHeader::default(), &[1; 4097]);
    taker.post(0..5);
    assert_eq!(taker.receive.turn(&mut link).unwrap(), receive::Turn::Idle);
    let flags: Vec<_> = taker.answers().iter().map(|a| a.flags).collect();
    assert_eq!(
        flags,
        [RX_CSUM_BLANK | RX_DATA_VALIDATED, RX_DATA_VALIDATED, 0]
    );
    assert_eq!(taker.stats.received_dropped.load(Relaxed), 1);
}

#[test]
fn receive_finishes_what_is_left_to_guests_behind_a_vlan_tag() {
    let (mut link, far) = wire();
    let mut taker = taker(Shape::new(true, true, 9000));
    let data: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
    let mut frame = samples::ipv4([2; 6], PROTOCOL_TCP, &data);
    frame.splice(12..12, [0x81, 0, 0, 5]);
    let header = |gso_type| VnetHeader {
        flags: vnet::NEEDS_CSUM,
        gso_type,
        gso_size: 1400,
        ..VnetHeader::default()
    };
    // One that is to be cut cannot be finished.
    for gso_type in [vnet::GSO_TCPV4, vnet::GSO_NONE] {
        send(&far, header(gso_type), &frame);
    }
    taker.post(0..40);
    assert_eq!(taker.receive.turn(&mut link).unwrap(), receive::Turn::Idle);
    assert!(headers::fill_checksum(&mut frame));
    let mut answers = taker.answers().into_iter();
    assert_eq!(
        taker.frame(&mut answers),
        Some((RX_DATA_VALIDATED | RX_MORE_DATA, None, frame))
    );
    assert!(answers.next().is_none());
    assert_eq!(taker.stats.received_dropped.load(Relaxed), 1);
}

#[test]
fn receive_of_a_buffer_that_is_not_granted_is_a_fault() {
    let (mut link, _far) = wire();
    let mut taker = taker(Shape::new(false, false, 1500));
    taker.post(1000..1001);
    assert!(taker.receive.turn(&mut link).is_err());
}

#[test]
fn receive_notes_a_wire_that_breaks() {
    let (mut link, far) = wire();
    let mut taker = taker(Shape::new(false, false, 1500));
    taker.post(0..2);
    drop(far);
    assert_eq!(
        taker.receive.turn(&mut link).unwrap(),
        receive::Turn::Starved
    );
    assert!(taker.receive.wire_error().is_some() && taker.receive.wire_error().is_none());
    assert!(taker.receive.is_broken());
}

proptest! {
    #[test]
    fn receive_gives_every_frame_as_it_was(
        frames in prop::collection::vec((1usize..65_549, any::<bool>()), 1..6),
        segmented: bool,
    ) {
        let (mut link, far) = wire();
        let mut taker = taker(Shape::new(true, segmented, 65_535));
        let mut posted = 0;
        for (number, (len, cut)) in frames.into_iter().enumerate() {
            let frame: Vec<u8> = (0..len).map(|n| (n / 7 + number) as u8).collect();
            let cut = cut && segmented;
            let header = VnetHeader {
                gso_type: if cut { vnet::GSO_TCPV6 } else { 0 },
                gso_size: if cut { 1400 } else { 0 },
                ..VnetHeader::default()
            };
            send(&far, header, &frame);
            while taker.receive.turn(&mut link).unwrap() == receive::Turn::Starved
                && taker.stats.received_packets.load(Relaxed) <= number as u64
            {
                taker.post(posted % 64..posted % 64 + 1);
                posted += 1;
            }
            let mut answers = taker.answers().into_iter();
            let (_, extra, got) = taker.frame(&mut answers).unwrap();
            prop_assert!(got == frame, "frame {number} of {len} bytes differs");
            prop_assert_eq!(extra.map(|e| (e.gso_type, e.gso_size)), cut.then_some((2, 1400)));
            prop_assert!(answers.next().is_none());
        }
    }

    #[test]
    fn transmit_survives_any_slots(slots in prop::collection::vec(any::<[u8; 12]>(), 1..100), grefs: bool) {
        let (mut link, far) = wire();
        let mut sender = sender(None, None);
        for slot in &slots {
            let mut request = TxRequest::read_from_bytes(slot).unwrap();
            if grefs {
                // Pages that exist, so that more is reached.
                request.gref %= 32;
                request.offset %= 4096;
                request.size %= 4096;
            }
            sender.front.put(&request);
        }
        let _ = sender.front.publish();
        while sender.transmit.turn(&mut link) == Ok(transmit::Turn::Busy) {}
        while on_wire(&far).is_some() {}
        prop_assert!(sender.answers().len() <= slots.len());
    }
}
