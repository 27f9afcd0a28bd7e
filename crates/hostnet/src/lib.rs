//! Networks of the host that a domain's network devices are plugged into.
//!
//! [`open`] gives a device its wire: on the NAT network that all domains share (the default for root), on a bridge that the administrator made, on a tap
//! that only a script touches, or on a user-mode network (the default without privileges). What comes back are descriptors for frames and a value that
//! undoes everything when it is dropped. Frames themselves are not this crate's business, and neither is the xenstore.
//!
//! Refuses: to change a bridge or an interface that it did not make; a network on addresses that the host already reaches.
//!
//! Invariants: an interface lives exactly as long as its descriptors; what killed processes leave is removed, and scripts that they waited for are ended, by the next [`open`] or [`sweep`]; one
//! domain process never waits for another but for the moment in which one of them changes the network.
//! Limits: 253 guests on a NAT network, 16 run directories with such a network, IPv4 prefix /24, IPv6 prefix /64. Guests reach the outside with
//! IPv6 only where the host forwards it already: switching that on would make the host deaf to its own routers.

mod dnsmasq;
mod mac;
mod nat;
mod netlink;
mod nft;
mod passt;
mod running;
mod script;
mod subnet;
mod sys;
mod tap;
mod tools;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use mac::{MAC_PREFIX, random_mac};
pub use script::{Action, Haste, Script};
pub use subnet::mac_text;

use netlink::Netlink;
use passt::Passt;

/// MTU where nothing says otherwise, in bytes.
pub const MTU_DEFAULT: u32 = 1500;
/// Most queues that a device may have.
pub const QUEUES_MAX: u32 = 8;

/// Why a device cannot have its network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{program} is not installed: apt-get install {package}")]
    NoTool {
        program: &'static str,
        package: &'static str,
    },
    #[error("{program} failed: {why}")]
    Tool { program: String, why: String },
    #[error("cannot {what}: {source}")]
    Kernel { what: String, source: io::Error },
    #[error(
        "cannot make the interface {name}: {source}; /dev/net/tun and the right to use it (CAP_NET_ADMIN) are needed"
    )]
    Tap { name: String, source: io::Error },
    #[error("an interface {0} exists already: choose another `vifname`")]
    NameTaken(String),
    #[error(
        "{0:?} cannot be the name of an interface: it has 1 to 15 bytes without spaces and slashes"
    )]
    BadName(String),
    #[error(
        "there is no bridge {0}: make it, or leave `bridge` and `script` out for the network that Hospes makes itself"
    )]
    NoBridge(String),
    #[error("the interface {0} is not a bridge")]
    NotBridge(String),
    #[error("the names hospes0 to hospes15 are all taken: remove those bridges that are not used")]
    NoBridgeName,
    #[error(
        "the host has routes to all of 10.64.0.0/10, 172.16.0.0/12 and 192.168.0.0/16: use a bridge of your own with `bridge`"
    )]
    NoSubnet,
    #[error(
        "the NAT network of {directory} is in another network namespace, where domains use it: start this one there, or name another directory by HOSPES_RUN_DIR",
        directory = directory.display()
    )]
    OtherNamespace { directory: PathBuf },
    #[error("the NAT network is full: it has room for 253 devices")]
    NoAddress,
    #[error("the address {ip} is in use on the NAT network: choose another `ip`, or leave it out")]
    IpInUse { ip: Ipv4Addr },
    #[error(
        "the address {ip} is none of the NAT network's for guests, which are {first} to {last}: choose one of those, leave `ip` out, or use a bridge of your own with `bridge`"
    )]
    NotOfNetwork {
        ip: Ipv4Addr,
        first: Ipv4Addr,
        last: Ipv4Addr,
    },
    #[error("the MAC address {mac} is in use on the NAT network: give each device its own")]
    MacInUse { mac: String },
    #[error("cannot use {path}: {source}", path = path.display())]
    State { path: PathBuf, source: io::Error },
}

/// Removes what killed processes left of the networks of a run directory, and ends their scripts. Does nothing to what is in use, nor to a shared network of
/// another network namespace.
pub fn sweep(run_directory: &Path) -> Result<(), Error> {
    running::sweep(run_directory)?;
    nat::sweep(run_directory)
}

/// What a device is plugged into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// The network that all domains share, with addresses, names and a way out.
    Nat,
    /// A bridge that exists.
    Bridge(String),
    /// A tap that a script configures.
    Script,
    /// A network in a process of its own, without privileges.
    User,
}

/// What a device without `bridge` and `script` gets: the shared network where the process may make one, else one of its own.
pub fn default_network() -> Network {
    match rustix::process::geteuid().is_root() {
        true => Network::Nat,
        false => Network::User,
    }
}

/// A device that wants its network.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Where the state of the shared network lies.
    pub run_directory: &'a Path,
    pub domid: u32,
    pub devid: u32,
    /// The domain's name, by which other guests find it.
    pub domain: &'a str,
    pub mac: [u8; 6],
    pub network: Network,
    /// The address that it is to have on the shared network; without one it gets any.
    pub ip: Option<Ipv4Addr>,
    /// The interface's name; without one it is `vif<domid>.<devid>`.
    pub vifname: Option<&'a str>,
    /// In bytes; without one it is the bridge's.
    pub mtu: Option<u32>,
    /// 1 to [`QUEUES_MAX`]; less may be given.
    pub queues: u32,
}

/// How frames look on the descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// One frame a call, after a `virtio_net_hdr` of 10 bytes; offloads are possible.
    Tap,
    /// A stream: each frame after its length in 4 bytes, most significant first.
    Stream,
}

/// A device's end of its network.
#[derive(Debug)]
pub struct Port {
    pub wire: Wire,
    /// One for each queue, not blocking; a stream has one.
    pub queues: Vec<OwnedFd>,
    /// The host's interface; a user-mode network has none.
    pub interface: Option<String>,
    pub bridge: Option<String>,
    pub mtu: u32,
    /// The address that belongs to the device's MAC on the shared network.
    pub ip: Option<Ipv4Addr>,
    /// The IPv6 network of the shared network, with the length of its prefix: guests choose their addresses in it.
    pub network_v6: Option<(Ipv6Addr, u8)>,
    /// IPv6 addresses of the host on the device's bridge.
    pub host_v6: Vec<Ipv6Addr>,
    pub guard: Guard,
}

/// Keeps a port's network; dropped after the descriptors, it removes what was made.
#[derive(Debug)]
pub struct Guard {
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    Nothing,
    Nat { _membership: nat::Membership },
    User(Arc<Passt>),
}

impl Guard {
    /// What gives the device another wire when that of its user-mode network broke; `None` for other networks.
    pub fn renewal(&self) -> Option<impl Fn() -> Result<OwnedFd, Error> + Send + Sync + use<>> {
        match &self.kept {
            Kept::User(process) => {
                let process = Arc::clone(process);
                Some(move || process.restart())
            }
            Kept::Nothing | Kept::Nat { .. } => None,
        }
    }
}

/// Plugs a device in.
pub fn open(request: &Request<'_>) -> Result<Port, Error> {
    let queues = request.queues.clamp(1, QUEUES_MAX);
    let names = match request.vifname {
        Some(name) => vec![name.to_owned()],
        None => {
            // Another run directory may have a domain of the same number.
            let name = format!("vif{}.{}", request.domid, request.devid);
            let more = (1..100).map(|n| format!("{name}-{n}"));
            std::iter::once(name.clone()).chain(more).collect()
        }
    };
    match &request.network {
        Network::Nat => open_nat(request, &names, queues),
        Network::Bridge(bridge) => open_tap(request, &names, queues, Some(bridge)),
        Network::Script => open_tap(request, &names, queues, None),
        Network::User => {
            let mtu = request.mtu.unwrap_or(MTU_DEFAULT);
            let (process, fd) = Passt::start(mtu)?;
            Ok(Port {
                wire: Wire::Stream,
                queues: vec![fd],
                interface: None,
                bridge: None,
                mtu,
                ip: None,
                network_v6: None,
                host_v6: Vec::new(),
                guard: Guard {
                    kept: Kept::User(Arc::new(process)),
                },
            })
        }
    }
}

fn open_nat(request: &Request<'_>, names: &[String], queues: u32) -> Result<Port, Error> {
    let joined = nat::join(
        request.run_directory,
        &nat::Member {
            domain: request.domain,
            devid: request.devid,
            mac: request.mac,
            ip: request.ip,
            names,
            mtu: request.mtu,
            queues,
        },
    )?;
    Ok(Port {
        wire: Wire::Tap,
        queues: joined.queues,
        interface: Some(joined.interface),
        bridge: Some(joined.bridge),
        mtu: joined.mtu,
        ip: Some(joined.ip),
        network_v6: joined.network_v6,
        host_v6: joined.host_v6,
        guard: Guard {
            kept: Kept::Nat {
                _membership: joined.membership,
            },
        },
    })
}

fn open_tap(
    request: &Request<'_>,
    names: &[String],
    queues: u32,
    bridge: Option<&str>,
) -> Result<Port, Error> {
    let kernel = |source| Error::Kernel {
        what: "ask the kernel for its interfaces".to_owned(),
        source,
    };
    let netlink = Netlink::open().map_err(kernel)?;
    let link = match bridge {
        Some(name) => {
            let link = netlink.link(name).map_err(kernel)?;
            let link = link.ok_or_else(|| Error::NoBridge(name.to_owned()))?;
            if link.kind != "bridge" {
                return Err(Error::NotBridge(name.to_owned()));
            }
            Some(link)
        }
        None => None,
    };
    let mtu = request
        .mtu
        .or(link.as_ref().map(|link| link.mtu))
        .unwrap_or(MTU_DEFAULT);
    let (interface, queues) = tap::open(&netlink, names, queues)?;
    tap::put(&netlink, &interface, link.as_ref(), mtu)?;
    let host_v6 = link.map_or(Ok(Vec::new()), |link| netlink.addresses_v6(link.index));
    Ok(Port {
        wire: Wire::Tap,
        queues,
        interface: Some(interface),
        bridge: bridge.map(str::to_owned),
        mtu,
        ip: None,
        network_v6: None,
        host_v6: host_v6.map_err(kernel)?,
        guard: Guard {
            kept: Kept::Nothing,
        },
    })
}
