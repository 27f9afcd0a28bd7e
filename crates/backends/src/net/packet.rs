//! One packet of the guest: its slots in the transmit ring, and what is asked of the host.
//!
//! A packet's first slot says how long it is altogether; extra slots may follow it, then one slot for each further piece (`public/io/netif.h`).

use hospes_ring::{BackRing, Broken, SharedMemory};
use hospes_xen_abi::netif::{
    self, ExtraInfo, GSO_TYPE_TCPV4, GSO_TYPE_TCPV6, MAX_TX_SLOTS, TX_CSUM_BLANK,
    TX_DATA_VALIDATED, TX_EXTRA_INFO, TX_MORE_DATA, TxRequest, TxResponse,
};
use zerocopy::{FromBytes, IntoBytes};

use super::headers::{self, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Layers};
use super::memory::PAGE;
use super::vnet::{self, VnetHeader};

/// The transmit ring.
pub type TxRing<M> = BackRing<M, TxRequest, TxResponse>;

/// Extra slots of one packet; there are five types.
const EXTRAS_MAX: usize = 5;

/// Why a packet is none. A fault of the guest: the packet is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    #[error("a packet has more than {MAX_TX_SLOTS} pieces")]
    TooManySlots,
    #[error("a piece of a packet crosses the end of its page")]
    CrossesPage,
    #[error("a packet's length is not that of its pieces")]
    BadLength,
    #[error("an extra slot of a packet is of an unknown type")]
    BadExtra,
    #[error("a packet's segmentation does not fit its headers")]
    BadSegmentation,
    #[error("a packet's checksum is to be filled in, but it has none")]
    NoChecksum,
}

/// Why a ring cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TxFault {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("the guest's transmit ring ends within a packet")]
    Incomplete,
}

/// A piece of a packet in a page of the guest; it lies within the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    pub gref: u32,
    pub offset: usize,
    pub len: usize,
}

/// Segmentation that is left to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    pub v6: bool,
    /// Bytes of payload of a segment.
    pub size: u16,
}

/// A packet as it was taken from the ring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    pub pieces: Vec<Piece>,
    /// Bytes in all.
    pub len: usize,
    /// The checksum field holds the pseudo header's sum only.
    pub checksum_blank: bool,
    pub data_validated: bool,
    pub segmentation: Option<Segmentation>,
    /// The ids of its slots in their order; `None` for an extra.
    slots: Vec<Option<u16>>,
    pub error: Option<PacketError>,
}

impl Packet {
    /// Takes the next packet off a ring; wrong ones too, as their slots are to be answered.
    pub fn take<M: SharedMemory>(ring: &mut TxRing<M>) -> Result<Option<Packet>, TxFault> {
        let Some(first) = ring.take()? else {
            return Ok(None);
        };
        let mut packet = Packet {
            len: usize::from(first.size),
            checksum_blank: first.flags & TX_CSUM_BLANK != 0,
            data_validated: first.flags & (TX_DATA_VALIDATED | TX_CSUM_BLANK) != 0,
            slots: vec![Some(first.id)],
            ..Packet::default()
        };
        let mut more = first.flags & TX_EXTRA_INFO != 0;
        while more {
            let slot = ring.take()?.ok_or(TxFault::Incomplete)?;
            packet.slots.push(None);
            more = packet.extra(&slot);
        }
        let mut requests = vec![first];
        let mut last = first;
        while last.flags & TX_MORE_DATA != 0 {
            last = ring.take()?.ok_or(TxFault::Incomplete)?;
            packet.slots.push(Some(last.id));
            if requests.len() < MAX_TX_SLOTS {
                requests.push(last);
            } else {
                packet.fail(PacketError::TooManySlots);
            }
        }
        packet.add_pieces(&requests);
        Ok(Some(packet))
    }

    fn fail(&mut self, error: PacketError) {
        self.error.get_or_insert(error);
    }

    /// Reads an extra slot; whether another follows.
    fn extra(&mut self, slot: &TxRequest) -> bool {
        let Ok((extra, _)) = ExtraInfo::read_from_prefix(slot.as_bytes()) else {
            return false;
        };
        match (extra.kind, extra.gso_type) {
            (netif::EXTRA_TYPE_GSO, GSO_TYPE_TCPV4 | GSO_TYPE_TCPV6) if extra.gso_size > 0 => {
                self.segmentation = Some(Segmentation {
                    v6: extra.gso_type == GSO_TYPE_TCPV6,
                    size: extra.gso_size,
                });
            }
            (netif::EXTRA_TYPE_GSO, _) => self.fail(PacketError::BadSegmentation),
            _ => self.fail(PacketError::BadExtra),
        }
        let more = extra.flags & netif::EXTRA_FLAG_MORE != 0;
        if more && self.slots.len() > EXTRAS_MAX {
            // The rest is read as data; the packet is refused in any case.
            self.fail(PacketError::BadExtra);
            return false;
        }
        more
    }

    fn add_pieces(&mut self, requests: &[TxRequest]) {
        let later: usize = requests[1..].iter().map(|r| usize::from(r.size)).sum();
        let Some(first) = self.len.checked_sub(later) else {
            return self.fail(PacketError::BadLength);
        };
        if self.len < headers::ETHERNET_BYTES {
            return self.fail(PacketError::BadLength);
        }
        for (index, request) in requests.iter().enumerate() {
            let piece = Piece {
                gref: request.gref,
                offset: usize::from(request.offset),
                len: if index == 0 {
                    first
                } else {
                    usize::from(request.size)
                },
            };
            if piece.offset + piece.len > PAGE {
                return self.fail(PacketError::CrossesPage);
            }
            self.pieces.push(piece);
        }
    }

    /// Answers its slots.
    pub fn answer<M: SharedMemory>(&self, ring: &mut TxRing<M>, status: i16) {
        for slot in &self.slots {
            ring.answer(&match slot {
                Some(id) => TxResponse { id: *id, status },
                None => TxResponse {
                    id: 0,
                    status: netif::STATUS_NULL,
                },
            });
        }
    }

    /// What the host is asked to do, from the packet's first bytes; a checksum field that a segmented packet has not prepared is prepared in them.
    pub fn vnet_header(&self, head: &mut [u8], layers: &Layers) -> Result<VnetHeader, PacketError> {
        let mut header = VnetHeader::default();
        if !self.checksum_blank && self.segmentation.is_none() {
            if self.data_validated {
                header.flags = vnet::DATA_VALID;
            }
            return Ok(header);
        }
        let transport = layers.transport.ok_or(PacketError::NoChecksum)?;
        let offset = transport.checksum_offset().ok_or(PacketError::NoChecksum)?;
        if transport.fragment || transport.at + offset + 2 > self.len {
            return Err(PacketError::NoChecksum);
        }
        header.flags = vnet::NEEDS_CSUM;
        header.csum_start = transport.at as u16;
        header.csum_offset = offset as u16;
        let Some(segmentation) = self.segmentation else {
            return Ok(header);
        };
        let tcp_bytes = transport.tcp_bytes(head);
        let wanted = if segmentation.v6 {
            ETHERTYPE_IPV6
        } else {
            ETHERTYPE_IPV4
        };
        let (true, Some(tcp_bytes)) = (layers.ethertype == wanted, tcp_bytes) else {
            return Err(PacketError::BadSegmentation);
        };
        if !self.checksum_blank {
            let sum = headers::pseudo_sum(head, layers, &transport, self.len - transport.at)
                .ok_or(PacketError::NoChecksum)?;
            let field = transport.at + offset;
            head[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        }
        header.hdr_len = (transport.at + tcp_bytes) as u16;
        // One that needs no cutting is an ordinary packet.
        if self.len > usize::from(header.hdr_len) + usize::from(segmentation.size) {
            header.gso_size = segmentation.size;
            header.gso_type = if segmentation.v6 {
                vnet::GSO_TCPV6
            } else {
                vnet::GSO_TCPV4
            };
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use hospes_ring::{FrontRing, LocalMemory};
    use proptest::prelude::*;

    use super::super::headers::{PROTOCOL_TCP, parse, samples};
    use super::*;

    type Front = FrontRing<LocalMemory, TxRequest, TxResponse>;

    fn rings() -> (Front, TxRing<LocalMemory>) {
        let memory = LocalMemory::new(4096);
        let front = Front::new(memory.clone()).unwrap();
        (front, TxRing::attach(memory).unwrap())
    }

    fn put(front: &mut Front, requests: &[TxRequest]) {
        for request in requests {
            assert!(front.put(request));
        }
        let _ = front.publish();
    }

    fn request(flags: u16, offset: u16, size: u16) -> TxRequest {
        TxRequest {
            gref: 8,
            offset,
            flags,
            id: 5,
            size,
        }
    }

    fn extra(extra: ExtraInfo) -> TxRequest {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(extra.as_bytes());
        TxRequest::read_from_bytes(&bytes).unwrap()
    }

    #[test]
    fn take_puts_pieces_and_extras_together() {
        let (mut front, mut ring) = rings();
        let gso = ExtraInfo {
            kind: netif::EXTRA_TYPE_GSO,
            gso_size: 1448,
            gso_type: GSO_TYPE_TCPV4,
            ..ExtraInfo::default()
        };
        let first = request(TX_CSUM_BLANK | TX_EXTRA_INFO | TX_MORE_DATA, 100, 6000);
        put(
            &mut front,
            &[
                first,
                extra(gso),
                request(TX_MORE_DATA, 0, 4096),
                request(0, 7, 1000),
            ],
        );
        let packet = Packet::take(&mut ring).unwrap().unwrap();
        assert_eq!(packet.error, None);
        assert_eq!(
            packet.segmentation,
            Some(Segmentation {
                v6: false,
                size: 1448
            })
        );
        let lens: Vec<_> = packet.pieces.iter().map(|p| (p.offset, p.len)).collect();
        assert_eq!(lens, [(100, 904), (0, 4096), (7, 1000)]);
        packet.answer(&mut ring, netif::STATUS_OKAY);
        assert!(ring.publish());
        let answers: Vec<_> = std::iter::from_fn(|| front.take())
            .map(|a| a.status)
            .collect();
        assert_eq!(answers, [0, 1, 0, 0]);
        assert!(Packet::take(&mut ring).unwrap().is_none());
    }

    #[test]
    fn take_refuses_wrong_packets_and_answers_them() {
        let cases: [(&[TxRequest], PacketError); 5] = [
            (&[request(0, 0, 13)], PacketError::BadLength),
            (
                &[request(TX_MORE_DATA, 0, 100), request(0, 0, 101)],
                PacketError::BadLength,
            ),
            (&[request(0, 4000, 97)], PacketError::CrossesPage),
            (
                &[request(TX_MORE_DATA, 0, 9000); 30],
                PacketError::TooManySlots,
            ),
            (
                &[
                    request(TX_EXTRA_INFO, 0, 100),
                    extra(ExtraInfo {
                        kind: 9,
                        ..ExtraInfo::default()
                    }),
                ],
                PacketError::BadExtra,
            ),
        ];
        for (requests, error) in cases {
            let (mut front, mut ring) = rings();
            let mut requests = requests.to_vec();
            if requests.len() == 30 {
                requests[29].flags = 0;
            }
            put(&mut front, &requests);
            let packet = Packet::take(&mut ring).unwrap().unwrap();
            assert_eq!(packet.error, Some(error));
            packet.answer(&mut ring, netif::STATUS_ERROR);
            assert_eq!(ring.open(), 0);
        }
    }

    #[test]
    fn take_of_a_packet_without_an_end_is_a_fault() {
        let (mut front, mut ring) = rings();
        put(&mut front, &[request(TX_MORE_DATA, 0, 100)]);
        assert_eq!(Packet::take(&mut ring), Err(TxFault::Incomplete));
    }

    fn packet(len: usize) -> Packet {
        Packet {
            len,
            ..Packet::default()
        }
    }

    #[test]
    fn vnet_header_points_at_the_checksum() {
        let mut frame = samples::ipv4([2; 6], PROTOCOL_TCP, &[0; 3000]);
        let layers = parse(&frame).unwrap();
        let len = frame.len();
        let blank = Packet {
            checksum_blank: true,
            ..packet(len)
        };
        let header = blank.vnet_header(&mut frame, &layers).unwrap();
        assert_eq!(
            (header.flags, header.csum_start, header.csum_offset),
            (vnet::NEEDS_CSUM, 34, 16)
        );
        assert_eq!(header.gso_type, vnet::GSO_NONE);

        let cut = Packet {
            segmentation: Some(Segmentation {
                v6: false,
                size: 1448,
            }),
            ..packet(len)
        };
        let before = frame.clone();
        frame[50..52].fill(0);
        let header = cut.vnet_header(&mut frame, &layers).unwrap();
        assert_eq!(
            (header.gso_type, header.gso_size, header.hdr_len),
            (vnet::GSO_TCPV4, 1448, 54)
        );
        // The field that was not prepared is now.
        assert_eq!(frame, before);

        let wrong = Packet {
            segmentation: Some(Segmentation {
                v6: true,
                size: 1448,
            }),
            ..packet(len)
        };
        assert_eq!(
            wrong.vnet_header(&mut frame, &layers),
            Err(PacketError::BadSegmentation)
        );
        frame[23] = 1;
        let layers = parse(&frame).unwrap();
        assert_eq!(
            blank.vnet_header(&mut frame, &layers),
            Err(PacketError::NoChecksum)
        );
    }

    proptest! {
        #[test]
        fn take_survives_any_slots(slots in prop::collection::vec(any::<[u8; 12]>(), 1..200)) {
            let (mut front, mut ring) = rings();
            let requests: Vec<_> = slots.iter().map(|s| TxRequest::read_from_bytes(s).unwrap()).collect();
            put(&mut front, &requests);
            while let Ok(Some(packet)) = Packet::take(&mut ring) {
                if packet.error.is_none() {
                    prop_assert_eq!(packet.pieces.iter().map(|p| p.len).sum::<usize>(), packet.len);
                    prop_assert!(packet.pieces.iter().all(|p| p.offset + p.len <= PAGE));
                    prop_assert!(packet.pieces.len() <= MAX_TX_SLOTS);
                }
                packet.answer(&mut ring, netif::STATUS_OKAY);
            }
        }

        #[test]
        fn vnet_header_stays_inside_the_packet(mut frame in prop::collection::vec(any::<u8>(), 14..300), v6: bool, blank: bool, size in 1u16.., kind in 0..2) {
            if frame.len() > 24 {
                let (a, b, c) = if kind == 0 { (8, 0, 0x45) } else { (0x86, 0xdd, 0x60) };
                (frame[12], frame[13], frame[14]) = (a, b, c);
            }
            let layers = parse(&frame).unwrap();
            let len = frame.len();
            let packet = Packet { checksum_blank: blank, segmentation: Some(Segmentation { v6, size }), ..packet(len) };
            if let Ok(header) = packet.vnet_header(&mut frame, &layers) {
                prop_assert!(usize::from(header.csum_start + header.csum_offset) + 2 <= len);
                prop_assert!(usize::from(header.hdr_len) <= len);
            }
        }
    }
}
