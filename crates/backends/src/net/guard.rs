//! What a guest may send: on a network that it shares with others it is to speak for itself only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use super::headers::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Layers, PROTOCOL_ICMPV6, PROTOCOL_UDP, Transport,
};

/// The limits of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The only source address of its frames.
    pub mac: [u8; 6],
    /// The only addresses that it may claim, with the length of their prefixes; IPv6 addresses of the link alone may always be claimed. Where they are
    /// given, only IP and ARP pass, and no answers of a DHCP server or of a router: these have their place on the host.
    pub ip: Option<Vec<(IpAddr, u8)>>,
    /// Addresses of the host on the same link, which it may not claim although they lie in `ip` or belong to the link.
    pub host_v6: Vec<Ipv6Addr>,
}

/// Ports of DHCP: a server's and a client's.
const DHCP: (u16, u16) = (67, 68);
const DHCPV6: (u16, u16) = (547, 546);
const UDP_BYTES: usize = 8;
/// Fields of a DHCP message (RFC 2131, 2): the length of the hardware address, the relay's address, the hardware address.
const HLEN: usize = 2;
const GIADDR: Range<usize> = 24..28;
const CHADDR: Range<usize> = 28..34;
const IPV6_BYTES: usize = 40;
/// Messages of neighbour discovery (RFC 4861, 4), where a solicitation's and an advertisement's target lies, and the options that name a MAC.
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const TARGET: usize = 8;
const LINK_LAYER_ADDRESSES: [u8; 2] = [1, 2];

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
            ipv4_at(head, at).is_some_and(|ip| ip.is_unspecified() || covers(networks, ip.into()))
        };
        match layers.ethertype {
            ETHERTYPE_IPV4 => owns(layers.network + 12) && !self.serves(head, layers),
            ETHERTYPE_ARP => {
                head.get(layers.network + 8..layers.network + 14) == Some(&self.mac[..])
                    && owns(layers.network + 14)
            }
            ETHERTYPE_IPV6 => {
                let Some(source) = ipv6_at(head, layers.network + 8) else {
                    return false;
                };
                (source.is_unspecified() || self.owns_v6(networks, source))
                    && !self.serves(head, layers)
                    && self.is_its_own_neighbour(networks, source, head, layers)
            }
            _ => false,
        }
    }

    fn owns_v6(&self, networks: &[(IpAddr, u8)], address: Ipv6Addr) -> bool {
        !self.host_v6.contains(&address)
            && (address.is_unicast_link_local() || covers(networks, address.into()))
    }

    /// Whether a packet of neighbour discovery says nothing about the address of another, and names no MAC but the device's. One that is longer than what
    /// can be looked at is none that anybody sends.
    fn is_its_own_neighbour(
        &self,
        networks: &[(IpAddr, u8)],
        source: Ipv6Addr,
        head: &[u8],
        layers: &Layers,
    ) -> bool {
        let Some(transport) = layers.transport else {
            return false;
        };
        let kind = head.get(transport.at).copied();
        let (PROTOCOL_ICMPV6, Some(kind)) = (transport.protocol, kind) else {
            return true;
        };
        let target = ipv6_at(head, transport.at + TARGET);
        let owns_target = target.is_some_and(|target| self.owns_v6(networks, target));
        let (claims, fixed) = match kind {
            ROUTER_SOLICITATION => (false, TARGET),
            // From nobody: it asks whether the address is free, and takes it.
            NEIGHBOUR_SOLICITATION => (source.is_unspecified(), TARGET + 16),
            NEIGHBOUR_ADVERTISEMENT => (true, TARGET + 16),
            _ => return true,
        };
        let Some(payload) = head.get(layers.network + 4..layers.network + 6) else {
            return false;
        };
        let payload = usize::from(u16::from_be_bytes([payload[0], payload[1]]));
        let options = head.get(transport.at + fixed..layers.network + IPV6_BYTES + payload);
        (!claims || owns_target) && options.is_some_and(|options| self.names_itself(options))
    }

    /// Whether options of neighbour discovery are whole and name no MAC but the device's.
    fn names_itself(&self, mut options: &[u8]) -> bool {
        while let [kind, words, ..] = options {
            let (option, rest) = match options.split_at_checked(usize::from(*words) * 8) {
                Some((option, rest)) if !option.is_empty() => (option, rest),
                _ => return false,
            };
            if LINK_LAYER_ADDRESSES.contains(kind) && option[2..] != self.mac {
                return false;
            }
            options = rest;
        }
        options.is_empty()
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

/// Whether an address lies in one of the networks.
fn covers(networks: &[(IpAddr, u8)], address: IpAddr) -> bool {
    networks.iter().any(|network| match (network, address) {
        ((IpAddr::V4(network), prefix), IpAddr::V4(address)) => {
            let other = (address.to_bits() ^ network.to_bits()).leading_zeros();
            other >= u32::from(*prefix).min(32)
        }
        ((IpAddr::V6(network), prefix), IpAddr::V6(address)) => {
            let other = (address.to_bits() ^ network.to_bits()).leading_zeros();
            other >= u32::from(*prefix).min(128)
        }
        _ => false,
    })
}

fn ipv4_at(head: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some((*head.get(at..)?.first_chunk::<4>()?).into())
}

fn ipv6_at(head: &[u8], at: usize) -> Option<Ipv6Addr> {
    Some((*head.get(at..)?.first_chunk::<16>()?).into())
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
            ip: Some(vec![(IpAddr::from(ip), prefix)]),
            host_v6: Vec::new(),
        }
    }

    #[test]
    fn permits_only_its_own_addresses() {
        let frame = samples::ipv4(MAC, PROTOCOL_TCP, b"x");
        assert!(permits(&own([10, 0, 0, 2], 32), &frame));
        assert!(permits(&own([10, 0, 0, 0], 24), &frame));
        assert!(permits(&own([9, 9, 9, 9], 0), &frame));
        assert!(!permits(&own([10, 0, 0, 3], 32), &frame));
        for (mac, passes) in [([2; 6], false), (MAC, true)] {
            let guard = Guard {
                mac,
                ip: None,
                host_v6: Vec::new(),
            };
            assert_eq!(permits(&guard, &frame), passes);
        }
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
            frame[22..24].copy_from_slice(&[0xfe, 0x80]);
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
        for (kind, passes) in [
            (128, true),
            (ROUTER_ADVERTISEMENT, false),
            (REDIRECT, false),
        ] {
            let message = [&[kind, 0, 0, 0][..], &[0; 36]].concat();
            assert_eq!(permits(&own, &icmpv6("fe80::1", &message)), passes);
        }
    }

    fn icmpv6(source: &str, message: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 14 + 40];
        frame[6..12].copy_from_slice(&MAC);
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14] = 0x60;
        frame[19] = message.len() as u8;
        frame[20] = PROTOCOL_ICMPV6;
        frame[22..38].copy_from_slice(&source.parse::<Ipv6Addr>().unwrap().octets());
        frame.extend(message);
        frame
    }

    /// A message of neighbour discovery about `target`, where it has one, with an option that names `mac`.
    fn neighbour(kind: u8, target: Option<&str>, option: Option<(u8, [u8; 6])>) -> Vec<u8> {
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        if let Some(target) = target {
            message.extend(target.parse::<Ipv6Addr>().unwrap().octets());
        }
        if let Some((option, mac)) = option {
            message.extend([option, 1]);
            message.extend(mac);
        }
        message
    }

    fn own_v6() -> Guard {
        Guard {
            ip: Some(vec![("fd00::".parse().unwrap(), 64)]),
            host_v6: vec!["fd00::1".parse().unwrap(), "fe80::1".parse().unwrap()],
            ..own([10, 0, 0, 2], 32)
        }
    }

    #[test]
    fn permits_only_its_own_ipv6_addresses() {
        let guard = own_v6();
        for (source, passes) in [
            ("::", true),
            ("fe80::2", true),
            ("fd00::2", true),
            ("fe80::1", false),
            ("fd00::1", false),
            ("fd00:0:0:1::2", false),
            ("2001:db8::2", false),
        ] {
            let echo = icmpv6(source, &[128; 8]);
            assert_eq!(permits(&guard, &echo), passes, "{source}");
        }
        // None of them, where only IPv4 addresses are named, but those of the link.
        let other = own([10, 0, 0, 2], 32);
        assert!(permits(&other, &icmpv6("fe80::2", &[128; 8])));
        assert!(!permits(&other, &icmpv6("fd00::2", &[128; 8])));
        let one = Guard {
            ip: Some(vec![("fd00::2".parse().unwrap(), 128)]),
            ..own_v6()
        };
        assert!(permits(&one, &icmpv6("fd00::2", &[128; 8])));
        assert!(!permits(&one, &icmpv6("fd00::3", &[128; 8])));
        let all = Guard {
            ip: Some(vec![("::".parse().unwrap(), 0)]),
            ..own_v6()
        };
        assert!(permits(&all, &icmpv6("2001:db8::2", &[128; 8])));
    }

    #[test]
    fn permits_neighbour_discovery_for_itself() {
        let guard = own_v6();
        let (asks, says) = (NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT);
        let own_mac = |option| Some((option, MAC));
        for (source, kind, target, option, passes) in [
            // Whose is the host's address? Is this one free?
            ("fd00::2", asks, Some("fd00::1"), own_mac(1), true),
            ("::", asks, Some("fd00::2"), None, true),
            ("::", asks, Some("fe80::2"), None, true),
            ("fd00::2", says, Some("fd00::2"), own_mac(2), true),
            ("fe80::2", says, Some("fd00::2"), None, true),
            ("fe80::2", ROUTER_SOLICITATION, None, own_mac(1), true),
            // The host's address, and another's.
            ("::", asks, Some("fd00::1"), None, false),
            ("::", asks, Some("fe80::1"), None, false),
            ("fd00::2", says, Some("fd00::1"), own_mac(2), false),
            ("fd00::2", says, Some("fe80::1"), None, false),
            ("fd00::2", says, Some("2001:db8::1"), own_mac(2), false),
            // Another's MAC address.
            ("fd00::2", asks, Some("fd00::3"), Some((1, [2; 6])), false),
            ("fd00::2", says, Some("fd00::2"), Some((2, [2; 6])), false),
            (
                "fe80::2",
                ROUTER_SOLICITATION,
                None,
                Some((1, [2; 6])),
                false,
            ),
        ] {
            let frame = icmpv6(source, &neighbour(kind, target, option));
            assert_eq!(
                permits(&guard, &frame),
                passes,
                "{source} {kind} {target:?}"
            );
        }
        // Options behind another one count as well; what is cut short or has no length is none.
        let message = neighbour(says, Some("fd00::2"), own_mac(2));
        let behind = |more: &[u8]| icmpv6("fd00::2", &[&message, more].concat());
        assert!(permits(&guard, &behind(&[14, 1, 0, 0, 0, 0, 0, 0])));
        assert!(!permits(&guard, &behind(&[2, 1, 0, 0, 0, 0, 0, 0])));
        assert!(!permits(&guard, &behind(&[14, 0, 0, 0, 0, 0, 0, 0])));
        assert!(!permits(&guard, &behind(&[14, 2, 0, 0, 0, 0, 0, 0])));
        assert!(!permits(&guard, &behind(&[14])));
        // What lies behind the packet's end is none of it.
        let mut padded = behind(&[]);
        padded.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        assert!(permits(&guard, &padded));
        padded[19] += 9;
        assert!(!permits(&guard, &padded));
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
