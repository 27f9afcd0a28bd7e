//! The few rtnetlink messages that taps and bridges need, as plain bytes.
//!
//! Requests are built and replies taken apart by pure functions; [`Netlink`] sends one request and waits for its answer. The kernel is trusted to
//! answer, not to answer in a shape we know: whatever is cut short is left out. Layouts: rtnetlink(7), `linux/if_link.h`, `linux/rtnetlink.h`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Message types, flags and attributes by their names in the kernel's headers.
mod nl {
    pub const NLMSG_ERROR: u16 = 2;
    pub const NLMSG_DONE: u16 = 3;
    pub const RTM_NEWLINK: u16 = 16;
    pub const RTM_DELLINK: u16 = 17;
    pub const RTM_GETLINK: u16 = 18;
    pub const RTM_NEWADDR: u16 = 20;
    pub const RTM_GETADDR: u16 = 22;
    pub const RTM_NEWROUTE: u16 = 24;
    pub const RTM_GETROUTE: u16 = 26;
    pub const REQUEST: u16 = 1;
    pub const ACK: u16 = 4;
    pub const DUMP: u16 = 0x300;
    pub const CREATE_EXCL: u16 = 0x600;
    pub const IFF_UP: u32 = 1;
    pub const IFLA_ADDRESS: u16 = 1;
    pub const IFLA_IFNAME: u16 = 3;
    pub const IFLA_MTU: u16 = 4;
    pub const IFLA_MASTER: u16 = 10;
    pub const IFLA_LINKINFO: u16 = 18;
    pub const IFLA_INFO_KIND: u16 = 1;
    pub const IFLA_IFALIAS: u16 = 20;
    pub const IFA_ADDRESS: u16 = 1;
    pub const IFA_LOCAL: u16 = 2;
    pub const IFA_FLAGS: u16 = 8;
    pub const IFA_F_NODAD: u32 = 2;
    pub const RTA_DST: u16 = 1;
    pub const RTA_OIF: u16 = 4;
    pub const NESTED: u16 = 0x8000;
    pub const TYPE_MASK: u16 = 0x3fff;
}

const HEADER_BYTES: usize = 16;

/// An interface of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mtu: u32,
    /// `bridge`, `tun` and so on; empty for those without a kind.
    pub kind: String,
    /// Index of the bridge it is a port of, 0 for none.
    pub master: u32,
    pub alias: String,
    pub mac: [u8; 6],
}

/// A network that the host reaches: `address/prefix` through an interface (0 where the route names none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub address: IpAddr,
    pub prefix: u8,
    pub interface: u32,
}

impl Route {
    /// Whether it stands for everything that has no route of its own: VPNs make such routes of two halves of the address space or more parts.
    pub fn is_default(&self) -> bool {
        self.prefix < 8
    }
}

/// What is to change at an interface; `None` leaves it.
#[derive(Clone, Debug, Default)]
pub struct Change<'a> {
    pub up: Option<bool>,
    /// 0 takes it off its bridge.
    pub master: Option<u32>,
    pub mtu: Option<u32>,
    pub mac: Option<[u8; 6]>,
    pub alias: Option<&'a str>,
}

/// A request under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Message {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(nl::REQUEST | flags).to_ne_bytes());
        Message(bytes)
    }

    /// `struct ifinfomsg`.
    fn link(mut self, index: u32, flags: u32, change: u32) -> Message {
        self.0.extend([0; 4]);
        self.0.extend(index.to_ne_bytes());
        self.0.extend(flags.to_ne_bytes());
        self.0.extend(change.to_ne_bytes());
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Message {
        self.0.extend((value.len() as u16 + 4).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn text(self, kind: u16, value: &str) -> Message {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    fn finish(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The attributes in `bytes`, as (type, value).
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & nl::TYPE_MASK;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

fn address(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into()),
        _ => None,
    }
}

/// The body of an RTM_NEWLINK message.
fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(body, 4)?,
        ..Link::default()
    };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            nl::IFLA_IFNAME => link.name = text(value),
            nl::IFLA_MTU => link.mtu = u32_at(value, 0)?,
            nl::IFLA_MASTER => link.master = u32_at(value, 0)?,
            nl::IFLA_IFALIAS => link.alias = text(value),
            nl::IFLA_ADDRESS => link.mac = value.try_into().unwrap_or_default(),
            nl::IFLA_LINKINFO => {
                let info = attributes(value).find(|(kind, _)| *kind == nl::IFLA_INFO_KIND);
                link.kind = info.map(|(_, value)| text(value)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

/// The body of an RTM_NEWROUTE message; unicast routes only.
fn parse_route(body: &[u8]) -> Option<Route> {
    let (family, prefix, kind) = (*body.first()?, *body.get(1)?, *body.get(7)?);
    let mut route = Route {
        address: match i32::from(family) {
            libc::AF_INET => Ipv4Addr::UNSPECIFIED.into(),
            libc::AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        },
        prefix,
        interface: 0,
    };
    for (attribute, value) in attributes(body.get(12..)?) {
        match attribute {
            nl::RTA_DST => route.address = address(value)?,
            nl::RTA_OIF => route.interface = u32_at(value, 0)?,
            _ => {}
        }
    }
    (kind == libc::RTN_UNICAST).then_some(route)
}

/// The body of an RTM_NEWADDR message.
fn parse_address(body: &[u8]) -> Option<Route> {
    let mut found = None;
    for (kind, value) in attributes(body.get(8..)?) {
        match kind {
            nl::IFA_LOCAL => found = address(value),
            nl::IFA_ADDRESS if found.is_none() => found = address(value),
            _ => {}
        }
    }
    Some(Route {
        address: found?,
        prefix: *body.get(1)?,
        interface: u32_at(body, 4)?,
    })
}

/// One datagram's messages: (type, body). Ends at the first that is cut short.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u32_at(bytes, 0)? as usize;
        let kind = u16_at(bytes, 4)?;
        let body = bytes.get(HEADER_BYTES..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, body))
    })
}

/// A connection to the kernel's routing tables, in the network namespace of the thread that made it.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    pub fn open() -> io::Result<Netlink> {
        // NETLINK_ROUTE is protocol 0, which rustix writes as none.
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(Netlink(fd))
    }

    /// Sends a request and gives the bodies of what is answered to `each`, until the kernel says that it is done.
    fn ask(&self, request: &[u8], mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        rustix::net::send(&self.0, request, SendFlags::empty())?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let (count, _) = rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::empty())?;
            for (kind, body) in messages(&buffer[..count]) {
                match kind {
                    nl::NLMSG_DONE => return Ok(()),
                    nl::NLMSG_ERROR => {
                        return match u32_at(body, 0).unwrap_or(0) as i32 {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    _ => each(kind, body),
                }
            }
        }
    }

    fn dump<T>(
        &self,
        request: u16,
        answer: u16,
        header: &[u8],
        parse: fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut message = Message::new(request, nl::DUMP);
        message.0.extend(header);
        let mut found = Vec::new();
        self.ask(&message.finish(), |kind, body| {
            if kind == answer {
                found.extend(parse(body));
            }
        })?;
        Ok(found)
    }

    /// All interfaces.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        self.dump(nl::RTM_GETLINK, nl::RTM_NEWLINK, &[0; 16], parse_link)
    }

    pub fn link(&self, name: &str) -> io::Result<Option<Link>> {
        Ok(self.links()?.into_iter().find(|link| link.name == name))
    }

    /// All routes to single machines and networks, of both families and all tables.
    pub fn routes(&self) -> io::Result<Vec<Route>> {
        self.dump(nl::RTM_GETROUTE, nl::RTM_NEWROUTE, &[0; 12], parse_route)
    }

    /// All addresses of the host with the length of their networks' prefixes.
    pub fn addresses(&self) -> io::Result<Vec<Route>> {
        self.dump(nl::RTM_GETADDR, nl::RTM_NEWADDR, &[0; 8], parse_address)
    }

    /// The IPv6 addresses of an interface.
    pub fn addresses_v6(&self, index: u32) -> io::Result<Vec<Ipv6Addr>> {
        let mut all = self.addresses()?;
        all.retain(|address| address.interface == index);
        let v6 = all.into_iter().filter_map(|found| match found.address {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        });
        Ok(v6.collect())
    }

    /// Makes an interface of a kind that needs no further data, such as a bridge, with this address. Fails where the name is taken.
    pub fn create(&self, name: &str, kind: &str, mac: [u8; 6]) -> io::Result<()> {
        let info = Message(Vec::new()).attribute(nl::IFLA_INFO_KIND, kind.as_bytes());
        let request = Message::new(nl::RTM_NEWLINK, nl::ACK | nl::CREATE_EXCL)
            .link(0, 0, 0)
            .text(nl::IFLA_IFNAME, name)
            .attribute(nl::IFLA_ADDRESS, &mac)
            .attribute(nl::IFLA_LINKINFO | nl::NESTED, &info.0);
        self.ask(&request.finish(), |_, _| {})
    }

    pub fn change(&self, index: u32, change: &Change<'_>) -> io::Result<()> {
        let (flags, mask) = match change.up {
            Some(up) => (if up { nl::IFF_UP } else { 0 }, nl::IFF_UP),
            None => (0, 0),
        };
        let mut request = Message::new(nl::RTM_NEWLINK, nl::ACK).link(index, flags, mask);
        if let Some(mac) = change.mac {
            request = request.attribute(nl::IFLA_ADDRESS, &mac);
        }
        if let Some(mtu) = change.mtu {
            request = request.attribute(nl::IFLA_MTU, &mtu.to_ne_bytes());
        }
        if let Some(alias) = change.alias {
            request = request.attribute(nl::IFLA_IFALIAS, alias.as_bytes());
        }
        if let Some(master) = change.master {
            request = request.attribute(nl::IFLA_MASTER, &master.to_ne_bytes());
        }
        self.ask(&request.finish(), |_, _| {})
    }

    pub fn delete(&self, index: u32) -> io::Result<()> {
        let request = Message::new(nl::RTM_DELLINK, nl::ACK).link(index, 0, 0);
        self.ask(&request.finish(), |_, _| {})
    }

    pub fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut request = Message::new(nl::RTM_NEWADDR, nl::ACK | nl::CREATE_EXCL);
        let (family, bytes) = match address {
            IpAddr::V4(a) => (libc::AF_INET, a.octets().to_vec()),
            IpAddr::V6(a) => (libc::AF_INET6, a.octets().to_vec()),
        };
        request.0.extend([family as u8, prefix, 0, 0]);
        request.0.extend(index.to_ne_bytes());
        let request = request
            .attribute(nl::IFA_LOCAL, &bytes)
            .attribute(nl::IFA_ADDRESS, &bytes)
            .attribute(nl::IFA_FLAGS, &nl::IFA_F_NODAD.to_ne_bytes());
        self.ask(&request.finish(), |_, _| {})
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parse_link_finds_what_was_written() {
        let info = Message(Vec::new()).attribute(nl::IFLA_INFO_KIND, b"bridge");
        let message = Message::new(nl::RTM_NEWLINK, 0)
            .link(7, 0, 0)
            .text(nl::IFLA_IFNAME, "br0")
            .attribute(nl::IFLA_MTU, &1400u32.to_ne_bytes())
            .attribute(nl::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 9])
            .attribute(nl::IFLA_LINKINFO | nl::NESTED, &info.0)
            .finish();
        let (kind, body) = messages(&message).next().unwrap();
        assert_eq!(kind, nl::RTM_NEWLINK);
        let link = parse_link(body).unwrap();
        assert_eq!((link.index, link.mtu), (7, 1400));
        assert_eq!((link.name.as_str(), link.kind.as_str()), ("br0", "bridge"));
        assert_eq!(link.mac, [2, 0, 0, 0, 0, 9]);
    }

    #[test]
    fn links_of_this_machine_have_a_loop_back() {
        let links = Netlink::open().unwrap().links().unwrap();
        assert!(
            links
                .iter()
                .any(|link| link.name == "lo" && link.index == 1)
        );
    }

    proptest! {
        #[test]
        fn parsers_survive_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            for (_, body) in messages(&bytes) {
                prop_assert!(body.len() <= bytes.len());
            }
            let _ = (parse_link(&bytes), parse_route(&bytes), parse_address(&bytes));
        }
    }
}
