//! What a guest may send: on a network that it shares with others it is to speak for itself only.

use std::net::Ipv4Addr;
use std::ops::Range;

use super::headers::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Layers, PROTOCOL_ICMPV6, PROTOCOL_UDP, Transport,
};

/// The limits of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The only source address of its frames.
    pub mac: [u8; 6],
    /// The only IPv4 addresses that it may claim, with the length of their prefixes. Where they are given, only IP and ARP pass, and no answers of a
    /// DHCP server or of a router: these have their place on the host.
    pub ip: Option<Vec<(Ipv4Addr, u8)>>,
}

/// Ports of DHCP: a server's and a client's.
const DHCP: (u16, u16) = (67, 68);
const DHCPV6: (u16, u16) = (547, 546);
const UDP_BYTES: usize = 8;
/// Fields of a DHCP message (RFC 2131, 2): the length of the hardware address, the relay's address, the hardware address.
const HLEN: usize = 2;
const GIADDR: Range<usize> = 24..28;
const CHADDR: Range<usize> = 28..34;
const ROUTER_ADVERTISEMENT: u8 = 134;
const REDIRECT: u8 = 137;

impl Guard {
    /// Whether a frame that begins with `head` may pass.
    pub fn permits(&self, head: &[u8], layers: &Layers) -> bool {
        if head.get(6..12) != Some(&self.mac[..]) {
            return false;
        }
        let Some(networks) = &self.ip else {
            return true;
        };
        // Behind a tag nobody looks for what is checked here.
        if layers.network != super::headers::ETHERNET_BYTES {
            return false;
        }
        let owns = |at: usize| {
            let bytes = head
                .get(at..at + 4)
                .and_then(|b| <[u8; 4]>::try_from(b).ok());
            bytes.is_some_and(|bytes| {
                let address = u32::from_be_bytes(bytes);
                let inside = |(network, prefix): &(Ipv4Addr, u8)| {
                    let mask = u32::MAX
                        .checked_shl(32 - u32::from(*prefix).min(32))
                        .unwrap_or(0);
                    (address ^ network.to_bits()) & mask == 0
                };
                address == 0 || networks.iter().any(inside)
            })
        };
        match layers.ethertype {
            ETHERTYPE_IPV4 => owns(layers.network + 12) && !self.serves(head, layers),
            ETHERTYPE_ARP => {
                head.get(layers.network + 8..layers.network + 14) == Some(&self.mac[..])
                    && owns(layers.network + 14)
            }
            ETHERTYPE_IPV6 => layers.transport.is_some() && !self.serves(head, layers),
            _ => false,
        }
    }

    /// Whether a packet to a DHCP server is whole and about the device itself: a server gives addresses and takes them back by `chaddr`, not by the
    /// frame's source, and where `giaddr` is set it answers to there. All of these lie in the part that is at most 116 bytes into the frame.
    fn asks_for_itself(&self, head: &[u8], transport: &Transport) -> bool {
        let Some(message) = head.get(transport.at + UDP_BYTES..) else {
            return false;
        };
        !transport.fragment
            && message.get(HLEN) == Some(&6)
            && message.get(GIADDR) == Some(&[0; 4][..])
            && message.get(CHADDR) == Some(&self.mac[..])
    }

    /// Whether it is a packet of a DHCP server or a router, a message to a DHCP server in another's name, or a part of one that cannot be told.
    fn serves(&self, head: &[u8], layers: &Layers) -> bool {
        let Some(transport) = layers.transport else {
            return true;
        };
        match transport.protocol {
            // Without its first part nobody takes the others.
            PROTOCOL_UDP if !transport.later => {
                let (server, client) = match layers.ethertype {
                    ETHERTYPE_IPV4 => DHCP,
                    _ => DHCPV6,
                };
                let Some((source, destination)) = ports(head, &transport) else {
                    return true;
                };
                // Clients look at the destination only.
                source == server
                    || destination == client
                    || (destination, layers.ethertype) == (DHCP.0, ETHERTYPE_IPV4)
                        && !self.asks_for_itself(head, &transport)
            }
            PROTOCOL_ICMPV6 => {
                let kind = head.get(transport.at).copied();
                transport.fragment
                    || kind.is_none_or(|kind| kind == ROUTER_ADVERTISEMENT || kind == REDIRECT)
            }
            _ => false,
        }
    }
}

/// The source and the destination of a UDP packet.
fn ports(head: &[u8], transport: &Transport) -> Option<(u16, u16)> {
    let bytes = head.get(transport.at..)?.first_chunk::<4>()?;
    let [a, b, c, d] = *bytes;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

#[cfg(test)]
mod tests {
    use super::super::headers::{PROTOCOL_TCP, parse, samples};
    use super::*;

    const MAC: [u8; 6] = [0, 0x16, 0x3e, 1, 2, 3];

    fn permits(guard: &Guard, frame: &[u8]) -> bool {
        guard.permits(frame, &parse(frame).unwrap())
    }

    fn own(ip: [u8; 4], prefix: u8) -> Guard {
        Guard {
            mac: MAC,
            ip: Some(vec![(ip.into(), prefix)]),
        }
    }

    #[test]
    fn permits_only_its_own_addresses() {
        let frame = samples::ipv4(MAC, PROTOCOL_TCP, b"x");
        assert!(permits(&own([10, 0, 0, 2], 32), &frame));
        assert!(permits(&own([10, 0, 0, 0], 24), &frame));
        assert!(permits(&own([9, 9, 9, 9], 0), &frame));
        assert!(!permits(&own([10, 0, 0, 3], 32), &frame));
        assert!(!permits(
            &Guard {
                mac: [2; 6],
                ip: None
            },
            &frame
        ));
        assert!(permits(&Guard { mac: MAC, ip: None }, &frame));
    }

    fn set_ports(frame: &mut [u8], at: usize, source: u16, destination: u16) {
        frame[at..at + 2].copy_from_slice(&source.to_be_bytes());
        frame[at + 2..at + 4].copy_from_slice(&destination.to_be_bytes());
    }

    #[test]
    fn permits_no_servers() {
        let own = own([10, 0, 0, 2], 32);
        let mut frame = samples::ipv4(MAC, PROTOCOL_UDP, b"x");
        set_ports(&mut frame, 34, 68, 6767);
        assert!(permits(&own, &frame));
        for (source, destination) in [(67, 6868), (6767, 68)] {
            set_ports(&mut frame, 34, source, destination);
            frame[20..22].copy_from_slice(&[0, 0]);
            assert!(!permits(&own, &frame));
            // The first of several parts, and a later one, which has no port.
            frame[20..22].copy_from_slice(&0x2000u16.to_be_bytes());
            assert!(!permits(&own, &frame));
            frame[20..22].copy_from_slice(&0x2001u16.to_be_bytes());
            assert!(permits(&own, &frame));
        }
        // An IPv6 packet of UDP, whole and as the first of several parts.
        for fragment in [false, true] {
            let at = if fragment { 62 } else { 54 };
            let mut frame = vec![0; at + 8];
            frame[6..12].copy_from_slice(&MAC);
            frame[12..14].copy_from_slice(&[0x86, 0xdd]);
            frame[14] = 0x60;
            frame[20] = PROTOCOL_UDP;
            if fragment {
                frame[20] = 44;
                frame[54] = PROTOCOL_UDP;
                frame[57] = 1;
            }
            for (source, destination, passes) in [
                (546, 547, true),
                (547, 5460, false),
                (6767, 546, false),
                (6767, 68, true),
            ] {
                set_ports(&mut frame, at, source, destination);
                assert_eq!(permits(&own, &frame), passes);
            }
        }
        let mut frame = vec![0; 14 + 40 + 8];
        frame[6..12].copy_from_slice(&MAC);
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14] = 0x60;
        frame[20] = PROTOCOL_ICMPV6;
        frame[54] = 135;
        assert!(permits(&own, &frame));
        frame[54] = ROUTER_ADVERTISEMENT;
        assert!(!permits(&own, &frame));
    }

    #[test]
    fn permits_dhcp_for_itself() {
        let own = own([10, 0, 0, 2], 32);
        let mut message = [0; 240];
        message[..3].copy_from_slice(&[1, 1, 6]);
        message[CHADDR].copy_from_slice(&MAC);
        let mut frame = samples::ipv4(MAC, PROTOCOL_UDP, &message);
        set_ports(&mut frame, 34, 68, 67);
        assert!(permits(&own, &frame));
        // Behind the longest IP header too it lies in what is looked at.
        let mut long = frame.clone();
        long.splice(34..34, [1; 40]);
        long[14] = 0x4f;
        assert!(permits(&own, &long[..116]));
        long[74 + 8 + CHADDR.end - 1] ^= 1;
        assert!(!permits(&own, &long));
        // Another's address, a relay's, a length that makes it another's; cut short, or one of several parts.
        for at in [CHADDR.start, CHADDR.end - 1, GIADDR.start, HLEN] {
            let mut frame = frame.clone();
            frame[42 + at] ^= 2;
            assert!(!permits(&own, &frame), "{at}");
        }
        assert!(!permits(&own, &frame[..42 + CHADDR.end - 1]));
        frame[20] = 0x20;
        assert!(!permits(&own, &frame));
    }

    #[test]
    fn permits_arp_for_itself() {
        let own = own([10, 0, 0, 2], 32);
        let mut frame = vec![0; 42];
        frame[6..12].copy_from_slice(&MAC);
        frame[12..14].copy_from_slice(&[8, 6]);
        frame[22..28].copy_from_slice(&MAC);
        frame[28..32].copy_from_slice(&[10, 0, 0, 2]);
        assert!(permits(&own, &frame));
        frame[31] = 1;
        assert!(!permits(&own, &frame));
        frame[31] = 2;
        frame[27] ^= 1;
        assert!(!permits(&own, &frame));
    }
}
