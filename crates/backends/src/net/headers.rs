//! The headers at the start of a frame: Ethernet, VLAN tags, IP with its options and extensions, TCP and UDP. Frames come from a hostile guest: nothing is
//! read beyond what is there, and the walk through extensions is bounded.

/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;
pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_ARP: u16 = 0x0806;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
pub const PROTOCOL_TCP: u8 = 6;
pub const PROTOCOL_UDP: u8 = 17;
pub const PROTOCOL_ICMPV6: u8 = 58;

/// VLAN tags and IPv6 extensions that are followed.
const TAGS_MAX: usize = 2;
const EXTENSIONS_MAX: usize = 8;

/// Where a frame's headers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// Behind any VLAN tags.
    pub ethertype: u16,
    /// Where the network header begins, in bytes from the start of the frame.
    pub network: usize,
    pub transport: Option<Transport>,
}

/// The header behind IP's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    pub at: usize,
    pub protocol: u8,
    /// Part of a datagram, of which the first has not all data.
    pub fragment: bool,
    /// A later part, which has no such header.
    pub later: bool,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Whether an Ethernet header has a VLAN tag behind it.
pub fn is_tagged(head: &[u8]) -> bool {
    u16_at(head, 12).is_some_and(is_tag)
}

fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, 0x8100 | 0x88a8)
}

/// Finds the headers in a frame's first bytes; `None` where there is not even an Ethernet header. `transport` is `None` where the frame is not IP, or its
/// IP header is wrong or longer than what is there.
pub fn parse(head: &[u8]) -> Option<Layers> {
    let mut network = ETHERNET_BYTES;
    let mut ethertype = u16_at(head, 12)?;
    for _ in 0..TAGS_MAX {
        if !is_tag(ethertype) {
            break;
        }
        ethertype = u16_at(head, network + 2)?;
        network += 4;
    }
    let transport = match ethertype {
        ETHERTYPE_IPV4 => ipv4(head, network),
        ETHERTYPE_IPV6 => ipv6(head, network),
        _ => None,
    };
    Some(Layers {
        ethertype,
        network,
        transport,
    })
}

fn ipv4(head: &[u8], network: usize) -> Option<Transport> {
    let first = *head.get(network)?;
    let bytes = usize::from(first & 15) * 4;
    if first >> 4 != 4 || bytes < 20 || head.len() < network + bytes {
        return None;
    }
    Some(Transport {
        at: network + bytes,
        protocol: head[network + 9],
        fragment: u16_at(head, network + 6)? & 0x3fff != 0,
        later: u16_at(head, network + 6)? & 0x1fff != 0,
    })
}

fn ipv6(head: &[u8], network: usize) -> Option<Transport> {
    if head.len() < network + 40 || head[network] >> 4 != 6 {
        return None;
    }
    let (mut at, mut protocol) = (network + 40, head[network + 6]);
    let (mut fragment, mut later) = (false, false);
    for _ in 0..EXTENSIONS_MAX {
        let bytes = match protocol {
            // Hop-by-hop and destination options, routing.
            0 | 43 | 60 => usize::from(*head.get(at + 1)?) * 8 + 8,
            44 => {
                fragment |= u16_at(head, at + 2)? & 0xfff9 != 0;
                later |= u16_at(head, at + 2)? & 0xfff8 != 0;
                8
            }
            51 => usize::from(*head.get(at + 1)?) * 4 + 8,
            _ => {
                return Some(Transport {
                    at,
                    protocol,
                    fragment,
                    later,
                });
            }
        };
        protocol = *head.get(at)?;
        at += bytes;
    }
    None
}

impl Transport {
    /// Where in the transport header the checksum lies; `None` where it has none that can be left blank.
    pub fn checksum_offset(&self) -> Option<usize> {
        match self.protocol {
            PROTOCOL_TCP => Some(16),
            PROTOCOL_UDP => Some(6),
            _ => None,
        }
    }

    /// Bytes of a TCP header that is there whole.
    pub fn tcp_bytes(&self, head: &[u8]) -> Option<usize> {
        let bytes = usize::from(*head.get(self.at + 12)? >> 4) * 4;
        (self.protocol == PROTOCOL_TCP && bytes >= 20 && self.at + bytes <= head.len())
            .then_some(bytes)
    }
}

/// Adds bytes to a ones' complement sum, as big-endian words; an odd last byte counts as its word's first.
pub fn sum(bytes: &[u8], start: u64) -> u64 {
    let mut words = bytes.chunks_exact(4);
    let mut total = start;
    for word in words.by_ref() {
        total += u64::from(u32::from_be_bytes(word.try_into().expect("four bytes")));
    }
    let mut rest = words.remainder().chunks_exact(2);
    for word in rest.by_ref() {
        total += u64::from(u16::from_be_bytes([word[0], word[1]]));
    }
    if let [last] = rest.remainder() {
        total += u64::from(*last) << 8;
    }
    total
}

/// Folds a sum to 16 bits.
pub fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total >> 16) + (total & 0xffff);
    }
    total as u16
}

/// The sum of the pseudo header of a TCP or UDP packet, folded: what a blank checksum field holds (RFC 9293, 3.1; RFC 8200, 8.1). `len` is the bytes of the
/// transport header and its data.
pub fn pseudo_sum(head: &[u8], layers: &Layers, transport: &Transport, len: usize) -> Option<u16> {
    let addresses = match layers.ethertype {
        ETHERTYPE_IPV4 => head.get(layers.network + 12..layers.network + 20)?,
        _ => head.get(layers.network + 8..layers.network + 40)?,
    };
    Some(fold(sum(
        addresses,
        u64::from(transport.protocol) + len as u64,
    )))
}

/// Fills in a blank checksum of a whole frame: the field holds the sum of the pseudo header. False where there is none to fill in.
pub fn fill_checksum(frame: &mut [u8]) -> bool {
    let Some(transport) = parse(frame).and_then(|layers| layers.transport) else {
        return false;
    };
    let Some(field) = transport.checksum_offset().map(|o| transport.at + o) else {
        return false;
    };
    if transport.fragment || field + 2 > frame.len() {
        return false;
    }
    // Padding behind a short packet is zeros or counts, by the sender's mistake, in what the receiver checks as well; lengths are the IP header's business.
    let end = ip_end(frame).unwrap_or(frame.len());
    if end < field + 2 {
        return false;
    }
    let checksum = match !fold(sum(&frame[transport.at..end], 0)) {
        0 if transport.protocol == PROTOCOL_UDP => 0xffff,
        checksum => checksum,
    };
    frame[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    true
}

/// Where the IP packet in a frame ends, by its own header.
fn ip_end(frame: &[u8]) -> Option<usize> {
    let layers = parse(frame)?;
    let end = match layers.ethertype {
        ETHERTYPE_IPV4 => layers.network + usize::from(u16_at(frame, layers.network + 2)?),
        ETHERTYPE_IPV6 => layers.network + 40 + usize::from(u16_at(frame, layers.network + 4)?),
        _ => return None,
    };
    (end <= frame.len()).then_some(end)
}

#[cfg(test)]
pub mod samples {
    //! Frames for tests.

    /// A TCP or UDP packet over IPv4 with `data`, its checksum blank (the pseudo header's sum).
    pub fn ipv4(source: [u8; 6], protocol: u8, data: &[u8]) -> Vec<u8> {
        let header = if protocol == super::PROTOCOL_TCP {
            20
        } else {
            8
        };
        let mut frame = vec![0; 14 + 20 + header];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&source);
        frame[12] = 8;
        frame[14] = 0x45;
        let total = (20 + header + data.len()) as u16;
        frame[16..18].copy_from_slice(&total.to_be_bytes());
        frame[22] = 64;
        frame[23] = protocol;
        frame[26..30].copy_from_slice(&[10, 0, 0, 2]);
        frame[30..34].copy_from_slice(&[10, 0, 0, 1]);
        if protocol == super::PROTOCOL_TCP {
            frame[46] = 5 << 4;
        } else {
            let len = (8 + data.len()) as u16;
            frame[38..40].copy_from_slice(&len.to_be_bytes());
        }
        frame.extend(data);
        let layers = super::parse(&frame).unwrap();
        let transport = layers.transport.unwrap();
        let len = frame.len() - transport.at;
        let blank = super::pseudo_sum(&frame, &layers, &transport, len).unwrap();
        let field = transport.at + transport.checksum_offset().unwrap();
        frame[field..field + 2].copy_from_slice(&blank.to_be_bytes());
        frame
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parse_walks_tags_options_and_extensions() {
        let mut frame = vec![0; 80];
        frame[12..14].copy_from_slice(&[0x81, 0]);
        frame[16..18].copy_from_slice(&[8, 0]);
        frame[18] = 0x46;
        frame[18 + 9] = PROTOCOL_UDP;
        let transport = parse(&frame).unwrap().transport.unwrap();
        assert_eq!((transport.at, transport.protocol), (42, PROTOCOL_UDP));

        let mut frame = vec![0; 100];
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14] = 0x60;
        frame[14 + 6] = 0;
        frame[54] = 44;
        frame[62] = PROTOCOL_TCP;
        frame[65] = 1;
        let transport = parse(&frame).unwrap().transport.unwrap();
        let expected = Transport {
            at: 70,
            protocol: PROTOCOL_TCP,
            fragment: true,
            later: false,
        };
        assert_eq!(transport, expected);
    }

    #[test]
    fn parse_of_headers_that_are_cut_short_finds_nothing() {
        assert_eq!(parse(&[0; 13]), None);
        let frame = samples::ipv4([2; 6], PROTOCOL_TCP, b"");
        for len in 14..34 {
            assert_eq!(parse(&frame[..len]).unwrap().transport, None);
        }
    }

    /// The checksum of a known packet, computed by hand in RFC 1071's way.
    #[test]
    fn fill_checksum_gives_what_a_receiver_checks() {
        for (protocol, data) in [
            (PROTOCOL_TCP, &b"hello world"[..]),
            (PROTOCOL_UDP, b"odd"),
            (PROTOCOL_UDP, b""),
        ] {
            let mut frame = samples::ipv4([2; 6], protocol, data);
            assert!(fill_checksum(&mut frame));
            let layers = parse(&frame).unwrap();
            let transport = layers.transport.unwrap();
            let pseudo = pseudo_sum(&frame, &layers, &transport, frame.len() - 34).unwrap();
            assert_eq!(fold(sum(&frame[34..], pseudo.into())), 0xffff);
        }
    }

    fn slow_sum(bytes: &[u8]) -> u16 {
        let mut total = 0u32;
        for pair in bytes.chunks(2) {
            total += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    proptest! {
        #[test]
        fn sum_is_that_of_the_words(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(fold(sum(&bytes, 0)), slow_sum(&bytes));
        }

        #[test]
        fn parse_survives_any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0..3u8) {
            if bytes.len() > 20 {
                let (a, b) = [(8, 0), (0x86, 0xdd), (0x81, 0)][usize::from(kind)];
                (bytes[12], bytes[13]) = (a, b);
            }
            if let Some(layers) = parse(&bytes) {
                prop_assert!(layers.network <= bytes.len() + 4);
                if let Some(transport) = layers.transport {
                    let _ = transport.tcp_bytes(&bytes);
                    let _ = pseudo_sum(&bytes, &layers, &transport, 100);
                }
            }
            fill_checksum(&mut bytes);
        }
    }
}
