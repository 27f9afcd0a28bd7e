//! Addresses and names for guests: one dnsmasq for each NAT network, bound to its bridge alone.
//!
//! Its whole configuration is one file of ours, without the host's. It is started anew whenever a guest comes: it reads the file before it gives up
//! its privileges, so that neither the file nor its directory has to be open to others. Leases are by MAC and fixed, so nothing is lost by that; what
//! a guest calls itself (client identifiers) is ignored, as it could be what another calls itself.

use std::fmt::Write;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use crate::Error;
use crate::{subnet, tools};

/// The program comes from this package, which starts no service by itself.
const PACKAGE: &str = "dnsmasq-base";
/// The domain in which guests find one another.
pub const DOMAIN: &str = "hospes";

/// A guest's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    pub mac: String,
    pub ip: Ipv4Addr,
    pub name: Option<String>,
}

/// What one network's dnsmasq is told.
#[derive(Debug)]
pub struct Service<'a> {
    pub directory: &'a Path,
    pub bridge: &'a str,
    pub gateway_v4: Ipv4Addr,
    pub gateway_v6: Option<Ipv6Addr>,
    /// Guests may use the host as their way out with IPv6.
    pub routes_v6: bool,
    pub mtu: u32,
    pub hosts: &'a [Host],
    /// False where another program has port 53 of all addresses.
    pub dns: bool,
}

fn configuration_path(directory: &Path) -> PathBuf {
    directory.join("dnsmasq.conf")
}

fn pid_path(directory: &Path) -> PathBuf {
    directory.join("dnsmasq.pid")
}

fn configuration(service: &Service<'_>) -> String {
    let bridge = service.bridge;
    let [a, b, c, _] = service.gateway_v4.octets();
    let mut text = format!(
        "interface={bridge}\nexcept-interface=lo\nbind-interfaces\nport={}\nno-hosts\ndomain-needed\nbogus-priv\n\
         domain={DOMAIN}\nlocal=/{DOMAIN}/\nexpand-hosts\nhost-record=host.{DOMAIN},{}\n\
         dhcp-authoritative\ndhcp-ignore=tag:!known\ndhcp-ignore-clid\ndhcp-ignore-names\ndhcp-range={a}.{b}.{c}.0,static,255.255.255.0,12h\n\
         dhcp-option=option:mtu,{}\ndhcp-leasefile={}\npid-file={}\n",
        if service.dns { 53 } else { 0 },
        service.gateway_v4,
        service.mtu,
        leases_path(service.directory).display(),
        pid_path(service.directory).display(),
    );
    // Writing to a string does not fail.
    if let Some(gateway) = service.gateway_v6 {
        let lifetime = if service.routes_v6 { 1800 } else { 0 };
        let _ = writeln!(
            text,
            "enable-ra\ndhcp-range={},ra-only,64",
            subnet::network_v6(gateway)
        );
        let _ = writeln!(text, "ra-param={bridge},60,{lifetime}");
    }
    for host in service.hosts {
        let _ = write!(text, "dhcp-host={},{}", host.mac, host.ip);
        match &host.name {
            // With the domain it is none of the words and no time, which have another meaning here.
            Some(name) => {
                let _ = writeln!(text, ",{name}.{DOMAIN}");
            }
            None => text.push('\n'),
        }
    }
    text
}

fn leases_path(directory: &Path) -> PathBuf {
    directory.join("leases")
}

/// Forgets the leases that are not those of today's guests: dnsmasq gives nobody an address that is leased to another MAC. Only while none runs.
fn forget_leases(service: &Service<'_>) {
    let path = leases_path(service.directory);
    let Ok(old) = fs::read_to_string(&path) else {
        return;
    };
    // Expiry, MAC, address, name, identifier.
    let is_of = |line: &str, host: &Host| {
        let mut words = line.split(' ').skip(1);
        words.next() == Some(&host.mac) && words.next() == Some(&host.ip.to_string())
    };
    let mut new = String::new();
    for line in old.lines() {
        if service.hosts.iter().any(|host| is_of(line, host)) {
            new.push_str(line);
            new.push('\n');
        }
    }
    if new != old {
        // Where that fails, dnsmasq cannot write the file either, and says so.
        let _ = fs::write(path, new);
    }
}

/// Has dnsmasq read what lies in the configuration's place.
fn start(dnsmasq: &Path, directory: &Path) -> Result<(), Error> {
    tools::run(dnsmasq, &[conf_file(&configuration_path(directory))], "")
}

/// The argument by which dnsmasq reads a file.
fn conf_file(path: &Path) -> String {
    format!("--conf-file={}", path.display())
}

/// Starts dnsmasq with this configuration in place of the one that runs for the directory. After an error that one runs again.
pub fn restart(service: &mut Service<'_>) -> Result<(), Error> {
    let dnsmasq = tools::need("dnsmasq", PACKAGE)?;
    let path = configuration_path(service.directory);
    let new = path.with_extension("new");
    let failed = |path: &Path, source| Error::State {
        path: path.to_owned(),
        source,
    };
    fs::write(&new, configuration(service)).map_err(|error| failed(&new, error))?;
    tools::run(&dnsmasq, &["--test", &conf_file(&new)], "")?;
    let before = fs::read(&path)
        .ok()
        .filter(|_| pid_path(service.directory).exists());
    stop(service.directory);
    forget_leases(service);
    let mut result = fs::rename(&new, &path)
        .map_err(|error| failed(&path, error))
        .and_then(|()| start(&dnsmasq, service.directory));
    if matches!(&result, Err(Error::Tool { why, .. }) if why.contains("in use")) {
        service.dns = false;
        result = fs::write(&path, configuration(service))
            .map_err(|error| failed(&path, error))
            .and_then(|()| start(&dnsmasq, service.directory));
    }
    if let (Err(_), Some(before)) = (&result, before) {
        // The error that counts is the first.
        let _ = fs::write(&path, before);
        let _ = start(&dnsmasq, service.directory);
    }
    result
}

/// Ends the dnsmasq of the directory, if one runs.
pub fn stop(directory: &Path) {
    let path = pid_path(directory);
    let pid = fs::read_to_string(&path).unwrap_or_default();
    let configuration = configuration_path(directory).display().to_string();
    if let Ok(pid) = pid.trim().parse() {
        // A process that does not end keeps its address, and the next one says so.
        let _ = tools::end_process(pid, |line| line.contains(&configuration));
    }
    let _ = fs::remove_file(path);
}

/// Ends every dnsmasq of a directory, also where the directory is gone with the number of the process.
pub fn stop_all(directory: &Path) {
    stop(directory);
    let argument = conf_file(&configuration_path(directory));
    let is_ours = |line: &str| line.split('\0').any(|word| word == argument);
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if let Ok(pid) = entry.file_name().to_string_lossy().parse() {
            // As above.
            let _ = tools::end_process(pid, is_ours);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_knows_each_guest_and_leaves_lo_alone() {
        let hosts = [Host {
            mac: "00:16:3e:00:00:01".into(),
            ip: Ipv4Addr::new(10, 107, 0, 9),
            name: Some("web".into()),
        }];
        let text = configuration(&Service {
            directory: Path::new("/run/x"),
            bridge: "hospes0",
            gateway_v4: Ipv4Addr::new(10, 107, 0, 1),
            gateway_v6: Some("fd00:1:2:3::1".parse().unwrap()),
            routes_v6: false,
            mtu: 1400,
            hosts: &hosts,
            dns: true,
        });
        for line in [
            "interface=hospes0",
            "except-interface=lo",
            "dhcp-ignore-clid",
            "dhcp-range=10.107.0.0,static,255.255.255.0,12h",
            "dhcp-host=00:16:3e:00:00:01,10.107.0.9,web.hospes",
            "dhcp-range=fd00:1:2:3::,ra-only,64",
            "ra-param=hospes0,60,0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
