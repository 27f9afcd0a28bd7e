//! Which addresses the NAT network has: chosen so that they clash with nothing the host reaches, and stable where nothing speaks against it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::netlink::Route;

/// Length of the prefix of the IPv4 network.
pub const PREFIX_V4: u8 = 24;
/// Length of the prefix of the IPv6 network.
pub const PREFIX_V6: u8 = 64;
/// The gateway's last octet; guests have 2 to 254.
const GATEWAY: u8 = 1;
/// Hosts that a network has room for beside the gateway.
pub const GUESTS_MAX: usize = 253;

/// Two networks share an address.
fn overlaps(a: Ipv4Addr, a_prefix: u8, b: Ipv4Addr, b_prefix: u8) -> bool {
    let prefix = u32::from(a_prefix.min(b_prefix).min(32));
    let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
    (a.to_bits() ^ b.to_bits()) & mask == 0
}

/// The gateway of the first network of 10.107.0.0/16, then of 10.64.0.0/10, 172.16.0.0/12 and 192.168.0.0/16, that clashes with none of `taken`;
/// `preferred` comes first. A default route clashes with nothing.
pub fn choose_v4(taken: &[Route], preferred: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
    let near = (0..=255).map(|c| Ipv4Addr::new(10, 107, c, GATEWAY));
    let far = (64..=127).map(|b| [10, b]);
    let other = (16..=31).map(|b| [172, b]).chain([[192, 168]]);
    let far = far
        .chain(other)
        .flat_map(|[a, b]| (0..=255).map(move |c| Ipv4Addr::new(a, b, c, GATEWAY)));
    preferred
        .into_iter()
        .chain(near)
        .chain(far)
        .find(|gateway| {
            taken.iter().all(|route| match route.address {
                IpAddr::V4(address) if !route.is_default() => {
                    !overlaps(*gateway, PREFIX_V4, address, route.prefix)
                }
                _ => true,
            })
        })
}

/// FNV-1a: the same on every machine and in every version.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The gateway's address in a unique local network (RFC 4193) that follows from what identifies the host and the network.
pub fn choose_v6(host: &str, index: u32) -> Ipv6Addr {
    let global_id = hash(host.as_bytes()).to_be_bytes();
    let mut bytes = [0; 16];
    bytes[0] = 0xfd;
    bytes[1..6].copy_from_slice(&global_id[..5]);
    bytes[6..8].copy_from_slice(&(index as u16).to_be_bytes());
    bytes[15] = GATEWAY;
    bytes.into()
}

/// The network of a gateway's address.
pub fn network_v6(gateway: Ipv6Addr) -> Ipv6Addr {
    let mut network = gateway.segments();
    network[4..].fill(0);
    network.into()
}

/// The address of the link that follows from a MAC address (RFC 4291, appendix A).
pub fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.map(u16::from);
    let host = [(a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f];
    Ipv6Addr::new(0xfe80, 0, 0, 0, host[0], host[1], host[2], host[3])
}

/// The bridge's own MAC address: fixed, so that guests keep their neighbour entries when ports come and go.
pub fn bridge_mac(host: &str, index: u32) -> [u8; 6] {
    let id = hash(format!("{host} {index}").as_bytes()).to_be_bytes();
    [0x02, 0x16, 0x3e, id[0], id[1], id[2]]
}

/// The first and the last address that guests may have.
pub fn guests(gateway: Ipv4Addr) -> (Ipv4Addr, Ipv4Addr) {
    let [a, b, c, first] = gateway.octets();
    let last = first + GUESTS_MAX as u8;
    (
        Ipv4Addr::new(a, b, c, first + 1),
        Ipv4Addr::new(a, b, c, last),
    )
}

/// The guest address for a MAC: the one it had, else one that follows from the MAC, else the next free one.
pub fn assign(
    gateway: Ipv4Addr,
    had: &BTreeMap<String, Ipv4Addr>,
    mac: [u8; 6],
) -> Option<Ipv4Addr> {
    let [a, b, c, _] = gateway.octets();
    let in_network = |ip: &Ipv4Addr| ip.octets()[..3] == [a, b, c];
    if let Some(ip) = had.get(&mac_text(mac)).filter(|ip| in_network(ip)) {
        return Some(*ip);
    }
    let start = hash(&mac) % GUESTS_MAX as u64;
    (0..GUESTS_MAX as u64)
        .map(|step| {
            let host = 2 + (start + step) % GUESTS_MAX as u64;
            Ipv4Addr::new(a, b, c, host as u8)
        })
        .find(|ip| !had.values().any(|other| other == ip))
}

/// A MAC address in its usual form, lower case.
pub fn mac_text(mac: [u8; 6]) -> String {
    let pairs: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    pairs.join(":")
}

/// What of a domain's name can be a DNS label; `None` where nothing is left.
pub fn host_name(domain: &str, devid: u32) -> Option<String> {
    let letters: String = domain
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    let label = letters.trim_matches('-');
    let label = label[..label.len().min(56)].trim_end_matches('-');
    match (label.is_empty(), devid) {
        (true, _) => None,
        (false, 0) => Some(label.to_owned()),
        (false, devid) => Some(format!("{label}-{devid}")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn route(address: [u8; 4], prefix: u8) -> Route {
        Route {
            address: Ipv4Addr::from(address).into(),
            prefix,
            interface: 1,
        }
    }

    #[test]
    fn choose_avoids_what_the_host_reaches() {
        let first = Ipv4Addr::new(10, 107, 0, 1);
        assert_eq!(choose_v4(&[route([0; 4], 0)], None), Some(first));
        let taken = [route([10, 107, 0, 128], 25), route([10, 107, 1, 7], 32)];
        assert_eq!(
            choose_v4(&taken, Some(first)),
            Some(Ipv4Addr::new(10, 107, 2, 1))
        );
        assert_eq!(
            choose_v4(&[route([10, 107, 0, 0], 16)], None),
            Some(Ipv4Addr::new(10, 64, 0, 1))
        );
        // A VPN that takes everything, in two halves, and one that takes what is private.
        let halves = [route([0; 4], 1), route([128, 0, 0, 0], 1)];
        assert_eq!(choose_v4(&halves, None), Some(first));
        let mut private = vec![route([10, 0, 0, 0], 8)];
        for next in [[172, 16, 0, 1], [192, 168, 0, 1]] {
            assert_eq!(choose_v4(&private, None), Some(Ipv4Addr::from(next)));
            private.push(route(next, 12));
        }
        assert_eq!(choose_v4(&private, None), None);
    }

    #[test]
    fn assign_is_stable_and_never_gives_an_address_twice() {
        let gateway = Ipv4Addr::new(10, 107, 0, 1);
        let mut had = BTreeMap::new();
        for n in 0..GUESTS_MAX {
            let mac = [0, 0x16, 0x3e, 0, (n >> 8) as u8, n as u8];
            let ip = assign(gateway, &had, mac).unwrap();
            assert!(ip != gateway && !had.values().any(|other| *other == ip));
            had.insert(mac_text(mac), ip);
            assert_eq!(assign(gateway, &had, mac), Some(ip));
        }
        assert_eq!(assign(gateway, &had, [9; 6]), None);
    }

    #[test]
    fn host_name_is_a_label() {
        assert_eq!(host_name("Web_1", 0).as_deref(), Some("web-1"));
        assert_eq!(host_name("web", 2).as_deref(), Some("web-2"));
        assert_eq!(host_name("é", 0), None);
    }

    proptest! {
        #[test]
        fn host_name_of_anything_is_a_label(name in any::<String>(), devid: u32) {
            if let Some(label) = host_name(&name, devid) {
                prop_assert!(label.len() <= 67 && !label.starts_with('-'));
                prop_assert!(label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'));
            }
        }
    }
}
