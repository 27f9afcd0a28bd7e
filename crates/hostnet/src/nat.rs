//! The NAT network that all domains share: made by the first that uses it, removed after the last.
//!
//! Under the run directory `net/` has: `lock`, held while anything is changed; `network.json`, what was made; `addresses.json`, which MAC has which
//! address; `users/<interface>`, one file for each device, locked by the domain process that has it for as long as that process lives. A user's file
//! that nobody has locked is a leftover. Whoever comes next removes it, and the whole network with it if no user is left: another domain, or the
//! process of the xenstore, which notices that a domain was killed.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::dnsmasq::{self, Host, Service};
use crate::netlink::{Change, Link, Netlink};
use crate::{Error, nft, subnet, tap};

/// NAT networks of different run directories that one host has room for.
const NETWORKS_MAX: u32 = 16;
const FORWARD_V4: &str = "/proc/sys/net/ipv4/ip_forward";
const FORWARD_V6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
const MTU: u32 = 1500;
/// Held while a network is made, for whatever run directory.
const MAKING: &str = "/run/hospes-network.lock";

/// What was made on the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Network {
    bridge: String,
    index: u32,
    gateway_v4: Ipv4Addr,
    /// `None` where the host has IPv6 switched off.
    gateway_v6: Option<Ipv6Addr>,
    mtu: u32,
    /// The network namespace that it is in, by its inode.
    #[serde(default)]
    namespace: u64,
}

impl Network {
    /// Whether it is in another network namespace, in which this process can do nothing.
    fn is_elsewhere(&self) -> bool {
        self.namespace != namespace()
    }

    /// Its bridge among the host's interfaces; another of that name is somebody else's.
    fn bridge_in<'a>(&self, links: &'a [Link], directory: &Path) -> Option<&'a Link> {
        links
            .iter()
            .find(|link| link.name == self.bridge && Path::new(&link.alias) == directory)
    }
}

/// A device that is to join.
#[derive(Debug)]
pub struct Member<'a> {
    pub domain: &'a str,
    pub devid: u32,
    pub mac: [u8; 6],
    /// The address that it is to have.
    pub ip: Option<Ipv4Addr>,
    /// Names for its interface, the first free one is taken.
    pub names: &'a [String],
    pub mtu: Option<u32>,
    pub queues: u32,
}

/// A device on the network. Dropping it leaves; the last one removes the network.
#[derive(Debug)]
pub struct Membership {
    directory: PathBuf,
    user: PathBuf,
    _locked: File,
}

/// What a member got.
#[derive(Debug)]
pub struct Joined {
    pub membership: Membership,
    pub queues: Vec<OwnedFd>,
    pub interface: String,
    pub bridge: String,
    pub mtu: u32,
    pub ip: Ipv4Addr,
    pub network_v6: Option<(Ipv6Addr, u8)>,
    pub host_v6: Vec<Ipv6Addr>,
}

#[derive(Debug, Serialize, Deserialize)]
struct User {
    mac: String,
    ip: Ipv4Addr,
    name: Option<String>,
    /// By which its file is called.
    #[serde(skip)]
    interface: String,
}

fn state(path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::State {
        path: path.clone(),
        source,
    }
}

/// Takes the lock under which the network is changed; it is free again when the file is dropped.
fn take_lock(directory: &Path) -> Result<File, Error> {
    let users = directory.join("users");
    fs::create_dir_all(&users).map_err(state(&users))?;
    let path = directory.join("lock");
    let file = File::create(&path).map_err(state(&path))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)
        .map_err(|error| state(&path)(error.into()))?;
    Ok(file)
}

/// Keeps networks of other run directories from being made at once, which would choose the same name and the same addresses. `None` where the host has no
/// place for the lock: then they may.
fn take_host_lock() -> Option<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(MAKING).ok()?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive).ok()?;
    Some(file)
}

/// A file of ours that cannot be read or understood counts as missing: it is a leftover of another version.
fn load<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn save<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let text = serde_json::to_vec(value).map_err(|error| state(path)(error.into()))?;
    let new = path.with_extension("new");
    fs::write(&new, text).map_err(state(&new))?;
    fs::rename(&new, path).map_err(state(path))
}

/// The users that live; the files of others are removed.
fn live_users(directory: &Path) -> Result<Vec<User>, Error> {
    let path = directory.join("users");
    let mut users = Vec::new();
    for entry in fs::read_dir(&path).map_err(state(&path))? {
        let path = entry.map_err(state(&path))?.path();
        let Ok(file) = File::open(&path) else {
            continue;
        };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_file(&path);
        } else if let Some(user) = load::<User>(&path) {
            let name = path.file_name().unwrap_or_default();
            users.push(User {
                interface: name.to_string_lossy().into_owned(),
                ..user
            });
        }
    }
    Ok(users)
}

/// What tells this host from others.
fn host_id() -> String {
    fs::read_to_string("/etc/machine-id").unwrap_or_default()
}

/// Puts a device on the network, which is made if it does not exist.
pub fn join(run_directory: &Path, member: &Member<'_>) -> Result<Joined, Error> {
    let directory = run_directory.join("net");
    let _lock = take_lock(&directory)?;
    let netlink = Netlink::open().map_err(|source| Error::Kernel {
        what: "open a netlink socket".into(),
        source,
    })?;
    let mut users = live_users(&directory)?;
    let network = prepare(&directory, &netlink, &users)?;
    let joined = add(&directory, &netlink, &network, member, &mut users);
    if joined.is_err() && live_users(&directory)?.is_empty() {
        remove(&directory, &netlink);
    }
    joined
}

fn add(
    directory: &Path,
    netlink: &Netlink,
    network: &Network,
    member: &Member<'_>,
    users: &mut Vec<User>,
) -> Result<Joined, Error> {
    let mac = subnet::mac_text(member.mac);
    if users.iter().any(|user| user.mac == mac) {
        return Err(Error::MacInUse { mac });
    }
    let addresses = directory.join("addresses.json");
    let mut had: BTreeMap<String, Ipv4Addr> = load(&addresses).unwrap_or_default();
    if let Some(ip) = member.ip {
        check_wanted(ip, network.gateway_v4, users)?;
        // Whose it was is not here now, and gets another the next time.
        had.retain(|_, other| *other != ip);
        had.insert(mac.clone(), ip);
    }
    if subnet::assign(network.gateway_v4, &had, member.mac).is_none() {
        had.retain(|mac, _| users.iter().any(|user| user.mac == *mac));
    }
    let ip = subnet::assign(network.gateway_v4, &had, member.mac).ok_or(Error::NoAddress)?;
    had.insert(mac.clone(), ip);
    save(&addresses, &had)?;

    let bridge = netlink
        .link(&network.bridge)
        .ok()
        .flatten()
        .ok_or_else(|| Error::NoBridge(network.bridge.clone()))?;
    let mtu = member.mtu.unwrap_or(network.mtu);
    let (interface, queues) = tap::open(netlink, member.names, member.queues)?;
    tap::put(netlink, &interface, Some(&bridge), mtu)?;
    let mut host_v6 = netlink
        .addresses_v6(bridge.index)
        .map_err(|source| Error::Kernel {
            what: "read the addresses".into(),
            source,
        })?;
    // The kernel gives it once a port is up.
    host_v6.push(subnet::link_local(bridge.mac));

    let path = directory.join("users").join(&interface);
    let user = User {
        mac,
        ip,
        name: subnet::host_name(member.domain, member.devid),
        interface: interface.clone(),
    };
    // A name belongs to one device; a second domain that wants it goes without.
    let user = User {
        name: user.name.filter(|name| {
            name != "host" && !users.iter().any(|other| other.name.as_ref() == Some(name))
        }),
        ..user
    };
    save(&path, &user)?;
    let locked = File::open(&path).map_err(state(&path))?;
    rustix::fs::flock(&locked, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| state(&path)(error.into()))?;
    users.push(user);
    if let Err(error) = serve(directory, network, users) {
        let _ = fs::remove_file(&path);
        return Err(error);
    }
    Ok(Joined {
        membership: Membership {
            directory: directory.to_owned(),
            user: path,
            _locked: locked,
        },
        queues,
        interface,
        bridge: network.bridge.clone(),
        mtu,
        ip,
        network_v6: network
            .gateway_v6
            .map(|gateway| (subnet::network_v6(gateway), subnet::PREFIX_V6)),
        host_v6,
    })
}

/// Whether a guest can have the address that it is to have.
fn check_wanted(ip: Ipv4Addr, gateway: Ipv4Addr, users: &[User]) -> Result<(), Error> {
    let (first, last) = subnet::guests(gateway);
    if !(first..=last).contains(&ip) {
        return Err(Error::NotOfNetwork { ip, first, last });
    }
    match users.iter().any(|user| user.ip == ip) {
        true => Err(Error::IpInUse { ip }),
        false => Ok(()),
    }
}

/// Has dnsmasq know these users.
fn serve(directory: &Path, network: &Network, users: &[User]) -> Result<(), Error> {
    let hosts: Vec<Host> = users
        .iter()
        .map(|user| Host {
            mac: user.mac.clone(),
            ip: user.ip,
            name: user.name.clone(),
        })
        .collect();
    dnsmasq::restart(&mut Service {
        directory,
        bridge: &network.bridge,
        gateway_v4: network.gateway_v4,
        gateway_v6: network.gateway_v6,
        routes_v6: forwards(FORWARD_V6),
        mtu: network.mtu,
        hosts: &hosts,
        dns: true,
    })
}

fn forwards(path: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|value| value.trim() == "1")
}

/// The network, made anew where nobody uses it or somebody has deleted its bridge.
fn prepare(directory: &Path, netlink: &Netlink, users: &[User]) -> Result<Network, Error> {
    let path = directory.join("network.json");
    let old: Option<Network> = load(&path);
    let kernel = |what: &str| {
        let what = what.to_owned();
        move |source| Error::Kernel { what, source }
    };
    if let (false, Some(network)) = (users.is_empty(), &old) {
        if network.is_elsewhere() {
            return Err(Error::OtherNamespace {
                directory: directory.to_owned(),
            });
        }
        let links = netlink.links().map_err(kernel("read the interfaces"))?;
        if network.bridge_in(&links, directory).is_some() {
            route(network)?;
            return Ok(network.clone());
        }
    }
    remove(directory, netlink);
    let _making = take_host_lock();
    let mut taken = netlink.routes().map_err(kernel("read the routes"))?;
    taken.extend(netlink.addresses().map_err(kernel("read the addresses"))?);
    let links = netlink.links().map_err(kernel("read the interfaces"))?;
    let gateway_v4 = subnet::choose_v4(&taken, old.map(|n| n.gateway_v4)).ok_or(Error::NoSubnet)?;
    let index = free_index(netlink, &links, directory)?;
    let uplink_mtu = taken
        .iter()
        .filter(|route| route.is_default())
        .filter_map(|route| links.iter().find(|link| link.index == route.interface))
        .map(|link| link.mtu)
        .min();
    let mut network = Network {
        bridge: format!("hospes{index}"),
        index,
        gateway_v4,
        gateway_v6: Some(subnet::choose_v6(&host_id(), index)),
        mtu: uplink_mtu.unwrap_or(MTU).clamp(576, MTU),
        namespace: namespace(),
    };
    // Written down before it is made: what is made halfway is a leftover too.
    save(&path, &network)?;
    let made = make(directory, netlink, &mut network)
        .and_then(|()| put_back(directory, netlink, &network, users));
    if let Err(error) = made {
        remove(directory, netlink);
        return Err(error);
    }
    save(&path, &network)?;
    Ok(network)
}

/// Gives a network that was made anew to those who had the one before: their interfaces, and their addresses and names.
fn put_back(
    directory: &Path,
    netlink: &Netlink,
    network: &Network,
    users: &[User],
) -> Result<(), Error> {
    if users.is_empty() {
        return Ok(());
    }
    let kernel = |source| Error::Kernel {
        what: format!("put the guests' interfaces on {}", network.bridge),
        source,
    };
    let links = netlink.links().map_err(kernel)?;
    let bridge = network.bridge_in(&links, directory);
    let bridge = bridge.ok_or_else(|| Error::NoBridge(network.bridge.clone()))?;
    let change = Change {
        master: Some(bridge.index),
        ..Change::default()
    };
    // One that has another bridge by now was put there by somebody.
    let is_left =
        |link: &&Link| link.master == 0 && users.iter().any(|user| user.interface == link.name);
    for link in links.iter().filter(is_left) {
        match netlink.change(link.index, &change) {
            // It went with its process a moment ago.
            Err(fault) if fault.raw_os_error() == Some(libc::ENODEV) => {}
            done => done.map_err(kernel)?,
        }
    }
    serve(directory, network, users)
}

/// The number of a bridge that nobody has; one that was made for a run directory that is gone is removed, and so is one whose maker was killed before it
/// said for which it is. Under the host's lock.
fn free_index(netlink: &Netlink, links: &[Link], directory: &Path) -> Result<u32, Error> {
    for index in 0..NETWORKS_MAX {
        let name = format!("hospes{index}");
        let Some(link) = links.iter().find(|link| link.name == name) else {
            return Ok(index);
        };
        let owner = Path::new(&link.alias);
        let is_left = match link.alias.is_empty() {
            true => link.mac == subnet::bridge_mac(&host_id(), index),
            false => owner == directory || owner.is_absolute() && !owner.exists(),
        };
        if link.kind == "bridge" && is_left {
            if owner.is_absolute() {
                dnsmasq::stop_all(owner);
            }
            // Without the program there are no rules either.
            let _ = nft::unload(&name);
            if netlink.delete(link.index).is_ok() {
                return Ok(index);
            }
        }
    }
    Err(Error::NoBridgeName)
}

fn make(directory: &Path, netlink: &Netlink, network: &mut Network) -> Result<(), Error> {
    let kernel = |what: String| move |source| Error::Kernel { what, source };
    let bridge = network.bridge.clone();
    let mac = subnet::bridge_mac(&host_id(), network.index);
    netlink
        .create(&bridge, "bridge", mac)
        .map_err(kernel(format!("make the bridge {bridge}")))?;
    let link = netlink.link(&bridge).ok().flatten();
    let link = link.ok_or_else(|| Error::NoBridge(bridge.clone()))?;
    // Its address of the link follows from its MAC address then, and it takes none from its own router's advertisements: so it is known what no guest
    // may claim. A host without IPv6 has none of these.
    for (setting, value) in [("addr_gen_mode", "0"), ("accept_ra", "0")] {
        let path = format!("/proc/sys/net/ipv6/conf/{bridge}/{setting}");
        let _ = fs::write(path, value);
    }
    let change = Change {
        up: Some(true),
        mtu: Some(network.mtu),
        alias: Some(&directory.display().to_string()),
        ..Change::default()
    };
    netlink
        .change(link.index, &change)
        .map_err(kernel(format!("set up the bridge {bridge}")))?;
    netlink
        .add_address(link.index, network.gateway_v4.into(), subnet::PREFIX_V4)
        .map_err(kernel(format!("give {bridge} its address")))?;
    network.gateway_v6 = network.gateway_v6.filter(|gateway| {
        netlink
            .add_address(link.index, (*gateway).into(), subnet::PREFIX_V6)
            .is_ok()
    });
    route(network)
}

/// Has the host forward for the network, and for nobody who comes uninvited. Whoever reloads the host's firewall or its settings undoes it, so that it is
/// done for each device that joins. Forwarding stays on afterwards: others may have come to need it who found it on.
fn route(network: &Network) -> Result<(), Error> {
    nft::load(&nft::Rules {
        bridge: &network.bridge,
        gateway_v4: network.gateway_v4,
        gateway_v6: network.gateway_v6.filter(|_| forwards(FORWARD_V6)),
    })?;
    if forwards(FORWARD_V4) {
        return Ok(());
    }
    fs::write(FORWARD_V4, "1").map_err(|source| Error::Kernel {
        what: "switch on net.ipv4.ip_forward".into(),
        source,
    })
}

/// Removes everything that `network.json` names, where it is in this network namespace. What fails is already gone, or somebody's who changed it meanwhile.
fn remove(directory: &Path, netlink: &Netlink) {
    let path = directory.join("network.json");
    let network: Option<Network> = load(&path);
    if network.as_ref().is_some_and(Network::is_elsewhere) {
        return;
    }
    dnsmasq::stop(directory);
    let Some(network) = network else {
        return;
    };
    if let Ok(links) = netlink.links() {
        let ours = network.bridge_in(&links, directory);
        if let Some(link) = ours {
            let _ = netlink.delete(link.index);
        }
        // Where somebody has deleted the bridge its rules are there still; another of that name has its own.
        if ours.is_some() || links.iter().all(|link| link.name != network.bridge) {
            let _ = nft::unload(&network.bridge);
        }
    }
    let _ = fs::remove_file(path);
}

/// The network namespace of this thread, by its inode; 0 where that cannot be seen.
fn namespace() -> u64 {
    fs::metadata("/proc/thread-self/ns/net").map_or(0, |metadata| metadata.ino())
}

/// Removes what killed processes left of the network of a run directory. Does nothing while a domain uses it, or in another network namespace than
/// that of the network.
pub fn sweep(run_directory: &Path) -> Result<(), Error> {
    let directory = run_directory.join("net");
    let path = directory.join("network.json");
    if !path.exists() {
        return Ok(());
    }
    let _lock = take_lock(&directory)?;
    if load::<Network>(&path).is_some_and(|network| network.is_elsewhere()) {
        return Ok(());
    }
    if live_users(&directory)?.is_empty()
        && let Ok(netlink) = Netlink::open()
    {
        remove(&directory, &netlink);
    }
    Ok(())
}

impl Drop for Membership {
    fn drop(&mut self) {
        let Ok(_lock) = take_lock(&self.directory) else {
            return;
        };
        let _ = fs::remove_file(&self.user);
        if live_users(&self.directory).is_ok_and(|users| users.is_empty())
            && let Ok(netlink) = Netlink::open()
        {
            remove(&self.directory, &netlink);
        }
    }
}
