//! Network interfaces of a configuration, plugged into the host's networks.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use hospes_config::{DomainConfig, VifConfig, VifKind};
use hospes_domain::net::Guard;
use hospes_hostnet::{self as hostnet, Haste, Network, Port, Request, Script};
use hospes_toolstack::{self as toolstack, MachineError, Paths};
use hospes_units::DomId;

/// The bridge that xl takes where none is named.
const XEN_BRIDGE: &str = "xenbr0";
/// More queues do not carry more, but take a thread each.
const QUEUES_MAX: u32 = 4;

/// What the interfaces of one domain have in common.
pub struct Plug {
    domid: DomId,
    domain: String,
    vcpus: u32,
    run_directory: PathBuf,
    /// The socket of the store that the domain is in.
    store: PathBuf,
    haste: Haste,
}

/// An interface that is plugged in.
pub struct Plugged {
    pub port: Port,
    /// To run before the guest connects to it, and when it goes.
    pub script: Option<Script>,
    pub mac: [u8; 6],
    pub guard: Option<Guard>,
    /// Whether it can be plugged in anew where it was let go of: a network in user space is the domain's own, and nobody waits for it.
    pub returns: bool,
}

impl Plug {
    pub fn new(domid: DomId, config: &DomainConfig) -> Result<Plug, MachineError> {
        let paths = Paths::from_environment()?;
        let store = paths.store_socket();
        let run_directory = paths.run;
        // What killed domains left goes also where this one has no interface.
        hostnet::sweep(&run_directory)?;
        Ok(Plug {
            domid,
            domain: config.name.clone(),
            vcpus: config.maxvcpus,
            run_directory,
            store,
            haste: Haste::default(),
        })
    }

    /// The domain is destroyed, and no script is to keep it for long.
    pub fn hurry(&self) {
        self.haste.hurry();
    }

    /// Plugs an interface in; the error is a sentence for the user.
    pub fn one(&self, vif: &VifConfig) -> Result<Plugged, MachineError> {
        let vif = &*without_bridge_script(vif, Script::is_installed);
        let devid = vif.devid.unwrap_or(0);
        if !matches!(vif.backend.as_str(), "" | "0" | "Domain-0") {
            return Err(format!(
                "Network interface {devid}: back ends run in the host only, not in domain {}: leave `backend' out",
                vif.backend
            )
            .into());
        }
        let mac = vif.mac.unwrap_or_else(hostnet::random_mac);
        let network = network(vif);
        if network == Network::User && !vif.ip.is_empty() {
            toolstack::log_line(&format!(
                "Network interface {devid}: `ip` has no effect in a network in user space, where the guest has the host's address"
            ));
        }
        let port = hostnet::open(&Request {
            run_directory: &self.run_directory,
            domid: u32::from(self.domid.0),
            devid,
            domain: &self.domain,
            mac,
            ip: wanted(&network, vif),
            network: network.clone(),
            vifname: vif.vifname.as_deref(),
            mtu: vif.mtu,
            queues: self.vcpus.min(QUEUES_MAX),
        })
        .map_err(|error| format!("Network interface {devid}: {error}"))?;
        let interface = port.interface.as_deref();
        let script = vif
            .script
            .as_deref()
            .zip(interface)
            .map(|(program, interface)| {
                let path = format!("backend/vif/{}/{devid}", self.domid);
                let bridge = vif.bridge.as_deref();
                let netdev = vif.netdev.as_deref();
                let (haste, run) = (&self.haste, &self.run_directory);
                Script::new(program, &path, interface, bridge, netdev, haste, run)
                    .with_store(&self.store)
            });
        let own_v4 = port.ip.map(|ip| (ip.into(), 32));
        let own_v6 = port.network_v6.map(|(ip, prefix)| (ip.into(), prefix));
        let own = own_v4.into_iter().chain(own_v6);
        let guard = guard(&network, vif, mac, own, port.host_v6.clone());
        Ok(Plugged {
            port,
            script,
            mac,
            guard,
            returns: network != Network::User,
        })
    }
}

/// Whether the host has what an interface is to be plugged into.
pub fn check(vif: &VifConfig) -> Result<(), MachineError> {
    let vif = without_bridge_script(vif, Script::is_installed);
    if let Some(script) = &vif.script
        && !Script::is_installed(script)
    {
        return Err(format!(
            "there is no script {script}: install it there, or give another configuration with -C"
        )
        .into());
    }
    let Network::Bridge(bridge) = network(&vif) else {
        return Ok(());
    };
    let path = Path::new("/sys/class/net").join(&bridge).join("bridge");
    if path.is_dir() {
        return Ok(());
    }
    Err(format!(
        "there is no bridge {bridge}: make it there, or give another configuration with -C"
    )
    .into())
}

/// An interface that names Xen's script for bridges where Xen's scripts are not installed is one on the bridge that the script would have put it on.
fn without_bridge_script(vif: &VifConfig, installed: impl Fn(&str) -> bool) -> Cow<'_, VifConfig> {
    match &vif.script {
        Some(script) if Script::is_for_bridges(script) && !installed(script) => {
            let bridge = vif.bridge.clone();
            Cow::Owned(VifConfig {
                script: None,
                bridge: bridge.or_else(|| Some(XEN_BRIDGE.into())),
                ..vif.clone()
            })
        }
        _ => Cow::Borrowed(vif),
    }
}

/// What an interface is plugged into.
fn network(vif: &VifConfig) -> Network {
    match (&vif.bridge, &vif.script, vif.kind) {
        (_, _, VifKind::User) => Network::User,
        (_, Some(_), _) => Network::Script,
        (Some(bridge), None, _) => Network::Bridge(bridge.clone()),
        (None, None, _) => hostnet::default_network(),
    }
}

/// `ip` as addresses with the lengths of their prefixes. On the network of Hospes an address of a host is meant as one, however long the prefix behind it.
fn addresses(network: &Network, vif: &VifConfig) -> Vec<(IpAddr, u8)> {
    let parsed = vif.ip.iter().filter_map(|text| {
        let (address, prefix) = text
            .split_once('/')
            .map_or((text.as_str(), None), |(a, p)| (a, Some(p)));
        let address = address.parse::<IpAddr>().ok()?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.and_then(|p| p.parse().ok()).unwrap_or(whole);
        let is_host = matches!(address, IpAddr::V4(ip) if prefix > 0 && ip.to_bits().trailing_zeros() < u32::from(32 - prefix));
        let prefix = match network {
            Network::Nat if is_host => whole,
            _ => prefix,
        };
        Some((address, prefix))
    });
    parsed.collect()
}

/// The address that the guest is to have on the network of Hospes: the first that is no network's.
fn wanted(network: &Network, vif: &VifConfig) -> Option<Ipv4Addr> {
    if *network != Network::Nat {
        return None;
    }
    let mut all = addresses(network, vif).into_iter();
    all.find_map(|address| match address {
        (IpAddr::V4(ip), 32) => Some(ip),
        _ => None,
    })
}

/// What the guest may send: on networks of ours it speaks for itself only; elsewhere only `ip` limits it, as Xen's scripts do. `ip=0.0.0.0/0` lets
/// everything pass everywhere.
fn guard(
    network: &Network,
    vif: &VifConfig,
    mac: [u8; 6],
    own: impl Iterator<Item = (IpAddr, u8)>,
    host_v6: Vec<Ipv6Addr>,
) -> Option<Guard> {
    let mut networks = addresses(network, vif);
    if networks
        .iter()
        .any(|(ip, prefix)| ip.is_ipv4() && *prefix == 0)
    {
        return None;
    }
    let ip = match network {
        Network::Nat => {
            networks.extend(own);
            Some(networks)
        }
        Network::User => None,
        Network::Bridge(_) | Network::Script if !networks.is_empty() => Some(networks),
        Network::Bridge(_) | Network::Script => return None,
    };
    Some(Guard { mac, ip, host_v6 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xens_script_for_bridges_is_a_bridge_where_it_is_not_installed() {
        let bridge = |name: &str| Network::Bridge(name.into());
        for (spec, installed, expected) in [
            ("script=vif-bridge", false, bridge("xenbr0")),
            ("script=vif-bridge,bridge=br7", false, bridge("br7")),
            (
                "bridge=br7,script=/etc/xen/scripts/vif-bridge",
                false,
                bridge("br7"),
            ),
            ("script=vif-bridge,bridge=br7", true, Network::Script),
            ("script=vif-route", false, Network::Script),
            ("script=/x/vif-bridge", false, Network::Script),
            ("script=vif-bridge,type=user", false, Network::User),
        ] {
            let vif = VifConfig::parse(spec).unwrap();
            let found = network(&without_bridge_script(&vif, |_| installed));
            assert_eq!(found, expected, "{spec} {installed}");
        }
    }

    #[test]
    fn wanted_is_the_first_address_that_is_no_network() {
        for (network, ip, expected) in [
            (Network::Nat, "", None),
            (
                Network::Nat,
                "10.107.0.9 10.107.0.10",
                Some([10, 107, 0, 9]),
            ),
            (Network::Nat, "10.107.0.9/24", Some([10, 107, 0, 9])),
            (
                Network::Nat,
                "fd00::2 0.0.0.0/0 10.0.0.0/8 10.107.0.9/32",
                Some([10, 107, 0, 9]),
            ),
            (Network::Nat, "0.0.0.0/0", None),
            (Network::User, "10.107.0.9", None),
            (Network::Bridge("br0".into()), "10.107.0.9", None),
        ] {
            let vif = VifConfig {
                ip: ip.split_whitespace().map(str::to_owned).collect(),
                ..VifConfig::default()
            };
            let found = wanted(&network, &vif);
            assert_eq!(found, expected.map(Ipv4Addr::from), "{network:?} {ip}");
        }
    }

    #[test]
    fn guard_takes_all_addresses_of_ip() {
        let host_v6: Vec<Ipv6Addr> = vec!["fd00:1::1".parse().unwrap()];
        let own: [(IpAddr, u8); 2] = [
            ([10, 107, 0, 2].into(), 32),
            ("fd00:1::".parse().unwrap(), 64),
        ];
        let bridge = Network::Bridge("br0".into());
        for (network, ip, expected) in [
            (&Network::Nat, "", Some("10.107.0.2/32 fd00:1::/64")),
            (
                &Network::Nat,
                "fd00::2",
                Some("fd00::2/128 10.107.0.2/32 fd00:1::/64"),
            ),
            (
                &Network::Nat,
                "10.107.0.2/24",
                Some("10.107.0.2/32 10.107.0.2/32 fd00:1::/64"),
            ),
            (&Network::Nat, "10.0.0.0/8 0.0.0.0/0", None),
            (&bridge, "", None),
            (&bridge, "fd00::2", Some("fd00::2/128")),
            (&bridge, "10.0.0.2 ::/0", Some("10.0.0.2/32 ::/0")),
            (&Network::Script, "10.0.0.0/8", Some("10.0.0.0/8")),
        ] {
            let vif = VifConfig {
                ip: ip.split_whitespace().map(str::to_owned).collect(),
                ..VifConfig::default()
            };
            let guard = guard(network, &vif, [2; 6], own.into_iter(), host_v6.clone());
            let networks = guard.map(|guard| {
                assert_eq!(guard.host_v6, host_v6);
                let networks = guard.ip.unwrap().into_iter();
                let texts: Vec<_> = networks
                    .map(|(ip, prefix)| format!("{ip}/{prefix}"))
                    .collect();
                texts.join(" ")
            });
            assert_eq!(networks.as_deref(), expected, "{network:?} {ip}");
        }
    }
}
