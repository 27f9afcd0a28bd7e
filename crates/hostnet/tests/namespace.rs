//! The host's side of networks, tried in network namespaces of the tests' own: the machine's network is never touched. Without root there is nothing
//! to try, and the tests say so.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hospes_hostnet::{Error, Network, Port, Request, Wire, mac_text, open, random_mac, sweep};
use rustix::thread::UnshareFlags;

/// Runs `test` in a thread with a network of its own, with a directory that is removed afterwards.
fn alone(name: &str, test: impl FnOnce(&Path) + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("{name}: not tried, as making networks needs root");
        return;
    }
    let directory: PathBuf =
        std::env::temp_dir().join(format!("hospes-hostnet-{}-{name}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let result = std::thread::spawn({
        let directory = directory.clone();
        move || {
            // SAFETY: a new network namespace concerns this thread alone and no memory or descriptor that it has.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            test(&directory);
        }
    })
    .join();
    fs::remove_dir_all(&directory).unwrap();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

fn request(directory: &Path, domid: u32, network: Network) -> Request<'_> {
    Request {
        run_directory: directory,
        domid,
        devid: 0,
        domain: "web",
        mac: random_mac(),
        network,
        ip: None,
        vifname: None,
        mtu: None,
        queues: 2,
    }
}

/// What a command of the host prints, in the network of this thread.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn dnsmasq_runs(directory: &Path) -> bool {
    let pid = fs::read_to_string(directory.join("net/dnsmasq.pid")).unwrap_or_default();
    fs::read_to_string(format!("/proc/{}/cmdline", pid.trim()))
        .is_ok_and(|line| line.contains("dnsmasq"))
}

const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

fn forwarding() -> String {
    fs::read_to_string(FORWARDING).unwrap().trim().to_owned()
}

fn join(directory: &Path, domid: u32) -> Port {
    open(&request(directory, domid, Network::Nat)).unwrap()
}

#[test]
fn nat_lives_as_long_as_its_users() {
    alone("lives", |directory| {
        fs::write(FORWARDING, "0").unwrap();
        let first = join(directory, 1);
        assert_eq!(first.wire, Wire::Tap);
        assert_eq!(first.queues.len(), 2);
        assert_eq!(first.interface.as_deref(), Some("vif1.0"));
        assert_eq!(first.bridge.as_deref(), Some("hospes0"));
        assert_eq!(forwarding(), "1");
        let second = join(directory, 2);
        assert_ne!(first.ip, second.ip);
        assert!(dnsmasq_runs(directory));
        let configuration = fs::read_to_string(directory.join("net/dnsmasq.conf")).unwrap();
        for port in [&first, &second] {
            assert!(configuration.contains(&port.ip.unwrap().to_string()));
        }
        assert!(output("nft", &["list", "tables"]).contains("inet hospes0"));
        // All that the host has there are known when a guest comes, before the kernel gives the address of the link; router advertisements give none.
        let all = ["-6", "-o", "address", "show", "hospes0"];
        let start = Instant::now();
        while !output("ip", &all).contains("fe80") && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let routed = fs::read_to_string("/proc/sys/net/ipv6/conf/hospes0/accept_ra").unwrap();
        assert_eq!(routed.trim(), "0");
        let addresses = output("ip", &all);
        let addresses: Vec<Ipv6Addr> = addresses
            .split_whitespace()
            .filter_map(|word| word.split_once('/')?.0.parse().ok())
            .collect();
        assert!(addresses.len() == 2 && addresses.iter().all(|a| first.host_v6.contains(a)));
        let (network, prefix) = first.network_v6.unwrap();
        assert!(prefix == 64 && addresses[0].segments()[..4] == network.segments()[..4]);
        drop(first);
        assert!(output("ip", &["-br", "link"]).contains("hospes0"));
        assert!(dnsmasq_runs(directory));
        drop(second);
        let links = output("ip", &["-br", "link"]);
        assert!(
            !links.contains("hospes") && !links.contains("vif"),
            "{links}"
        );
        assert!(!output("nft", &["list", "tables"]).contains("hospes"));
        assert!(!dnsmasq_runs(directory));
        // Others may need it by now.
        assert_eq!(forwarding(), "1");
    });
}

#[test]
fn nat_comes_back_with_the_next_device() {
    alone("reload", |directory| {
        let _first = join(directory, 1);
        let rules = output("nft", &["list", "table", "inet", "hospes0"]);
        output("nft", &["flush", "ruleset"]);
        fs::write(FORWARDING, "0").unwrap();
        let _second = join(directory, 2);
        assert!(rules.contains("masquerade"), "{rules}");
        assert_eq!(output("nft", &["list", "table", "inet", "hospes0"]), rules);
        assert_eq!(forwarding(), "1");
        // What is there already does not come twice.
        let _third = join(directory, 3);
        assert_eq!(output("nft", &["list", "table", "inet", "hospes0"]), rules);
    });
}

/// The bridge that an interface is on.
fn bridge_of(interface: &str) -> String {
    let link = output("ip", &["-o", "link", "show", interface]);
    let (_, behind) = link.split_once(" master ").unwrap_or_default();
    behind.split(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn nat_takes_living_guests_back_where_its_bridge_was_deleted() {
    alone("deleted", |directory| {
        let first = request(directory, 1, Network::Nat);
        let port = open(&first).unwrap();
        let _moved = join(directory, 2);
        output("ip", &["link", "del", "hospes0"]);
        output("ip", &["link", "add", "br0", "type", "bridge"]);
        output("ip", &["link", "set", "vif2.0", "master", "br0"]);
        assert_eq!(bridge_of("vif1.0"), "");
        // One that is refused leaves the others what they have, too.
        let refused = open(&Request {
            domid: 3,
            ..first.clone()
        });
        assert!(
            matches!(refused, Err(Error::MacInUse { .. })),
            "{refused:?}"
        );
        assert_eq!(bridge_of("vif1.0"), "hospes0");
        let expected = Some((port.ip.unwrap(), "web".to_owned()));
        assert_eq!(offered(&port, first.mac), expected);
        let _third = join(directory, 3);
        assert_eq!(bridge_of("vif3.0"), "hospes0");
        // Where somebody has put it meanwhile.
        assert_eq!(bridge_of("vif2.0"), "br0");
    });
}

#[test]
fn nat_belongs_to_one_network_namespace() {
    alone("namespaces", |directory| {
        let port = join(directory, 1);
        let elsewhere = directory.to_owned();
        let elsewhere = std::thread::spawn(move || {
            // SAFETY: as in `alone`.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            let refused = open(&request(&elsewhere, 2, Network::Nat));
            sweep(&elsewhere).unwrap();
            (refused, output("ip", &["-br", "link"]))
        });
        let (refused, links) = elsewhere.join().unwrap();
        assert!(
            matches!(refused, Err(Error::OtherNamespace { .. })),
            "{refused:?}"
        );
        assert!(!links.contains("hospes"), "{links}");
        assert!(dnsmasq_runs(directory));
        let _second = join(directory, 2);
        assert_eq!(bridge_of("vif2.0"), "hospes0");
        drop(port);
    });
}

#[test]
fn nat_leaves_other_networks_alone() {
    alone("clash", |directory| {
        output("ip", &["link", "add", "hospes0", "type", "bridge"]);
        output("ip", &["link", "add", "other", "type", "bridge"]);
        output("ip", &["address", "add", "10.107.0.7/23", "dev", "other"]);
        let port = join(directory, 1);
        assert_eq!(port.bridge.as_deref(), Some("hospes1"));
        assert_eq!(port.ip.unwrap().octets()[..3], [10, 107, 2]);
        drop(port);
        assert!(output("ip", &["-br", "link"]).contains("hospes0"));
    });
}

#[test]
fn nat_keeps_the_address_of_a_mac() {
    alone("stable", |directory| {
        let mut first = request(directory, 1, Network::Nat);
        let port = open(&first).unwrap();
        let ip = port.ip;
        let again = open(&Request {
            domid: 2,
            ..first.clone()
        });
        assert!(matches!(again, Err(Error::MacInUse { .. })), "{again:?}");
        drop(port);
        first.domid = 3;
        let port = open(&first).unwrap();
        assert_eq!(port.ip, ip);
        let addresses = fs::read_to_string(directory.join("net/addresses.json")).unwrap();
        assert!(addresses.contains(&mac_text(first.mac)));
    });
}

#[test]
fn nat_gives_the_address_that_is_wanted() {
    alone("wanted", |directory| {
        let other = join(directory, 1);
        let past = join(directory, 2);
        let wanted = past.ip;
        drop(past);
        let first = Request {
            ip: wanted,
            ..request(directory, 3, Network::Nat)
        };
        let port = open(&first).unwrap();
        assert_eq!(port.ip, wanted);
        assert_eq!(offered(&port, first.mac).map(|(ip, _)| ip), wanted);
        let asks_for = |ip| {
            open(&Request {
                ip,
                ..request(directory, 4, Network::Nat)
            })
        };
        for ip in [wanted, other.ip] {
            let refused = asks_for(ip);
            assert!(matches!(refused, Err(Error::IpInUse { .. })), "{refused:?}");
        }
        for ip in [
            [10, 107, 0, 0],
            [10, 107, 0, 1],
            [10, 107, 0, 255],
            [10, 0, 0, 2],
        ] {
            let refused = asks_for(Some(ip.into())).unwrap_err();
            let said = refused.to_string();
            assert!(said.contains("10.107.0.2 to 10.107.0.254"), "{said}");
        }
        drop(port);
        assert_eq!(asks_for(wanted).unwrap().ip, wanted);
    });
}

/// What the network's DHCP server offers to the device, asked through its tap: an address, and a name where there is one.
fn offered(port: &Port, mac: [u8; 6]) -> Option<(Ipv4Addr, String)> {
    let mut message = [0; 247];
    message[..3].copy_from_slice(&[1, 1, 6]);
    message[28..34].copy_from_slice(&mac);
    // Discovers, and asks for its name.
    message[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63, 53, 1, 1, 55, 1, 12, 255]);
    let mut packet = [0; 10 + 14 + 28].to_vec();
    packet[10..16].fill(0xff);
    packet[16..22].copy_from_slice(&mac);
    packet[22..24].copy_from_slice(&[8, 0]);
    // From nobody to everybody, 275 bytes, with the checksum of just that.
    packet[24..34].copy_from_slice(&[0x45, 0, 1, 19, 0, 0, 0, 0, 64, 17]);
    packet[34..36].copy_from_slice(&[0x79, 0xdb]);
    packet[40..44].fill(0xff);
    packet[44..50].copy_from_slice(&[0, 68, 0, 67, 0, 255]);
    packet.extend(message);
    let mut answer = [0; 2000];
    for _ in 0..5 {
        rustix::io::write(&port.queues[0], &packet).unwrap();
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(2) {
            for queue in &port.queues {
                let Ok(count) = rustix::io::read(queue, &mut answer) else {
                    continue;
                };
                let answer = &answer[10..count];
                if answer.len() > 282 && answer[12..14] == [8, 0] && answer[36..38] == [0, 68] {
                    let ip = <[u8; 4]>::try_from(&answer[58..62]).unwrap();
                    return Some((ip.into(), name_in(&answer[282..])));
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    None
}

/// The name in the options of DHCP.
fn name_in(mut options: &[u8]) -> String {
    while let [kind, len, rest @ ..] = options {
        let (value, rest) = rest.split_at(usize::from(*len).min(rest.len()));
        match *kind {
            12 => return String::from_utf8(value.to_vec()).unwrap(),
            255 => break,
            _ => options = rest,
        }
    }
    String::new()
}

#[test]
fn nat_gives_any_name() {
    alone("names", |directory| {
        for (domid, name) in (1..).zip(["web", "ignore", "infinite", "12h", "80"]) {
            let request = Request {
                domain: name,
                ..request(directory, domid, Network::Nat)
            };
            let port = open(&request).unwrap();
            let expected = Some((port.ip.unwrap(), name.to_owned()));
            assert_eq!(offered(&port, request.mac), expected);
        }
    });
}

/// Refuses configurations with certain names: when it is to look at them, or when it is to start with them.
const DNSMASQ: &str = r#"#!/bin/sh
what=start
for argument; do
    case $argument in --conf-file=*) file=${argument#*=} ;; --test) what=test ;; esac
done
grep -q "refuse-$what" "$file" && echo no way >&2 && exit 1
PATH=/usr/sbin:/sbin:/usr/bin:/bin
exec dnsmasq "$@"
"#;

#[test]
fn nat_keeps_its_names_where_a_device_is_refused() {
    alone("refused", |directory| {
        let program = directory.join("dnsmasq");
        fs::write(&program, DNSMASQ).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let path = std::env::var("PATH").unwrap();
        // SAFETY: variables are read by Rust's library alone, which has a lock for them; other tests that see it find the same dnsmasq behind it.
        unsafe { std::env::set_var("PATH", format!("{}:{path}", directory.display())) };
        let first = request(directory, 1, Network::Nat);
        let port = open(&first).unwrap();
        for (domid, domain) in [(2, "refuse-test"), (3, "refuse-start")] {
            let error = open(&Request {
                domain,
                ..request(directory, domid, Network::Nat)
            });
            assert!(error.unwrap_err().to_string().contains("no way"));
            assert!(dnsmasq_runs(directory), "{domain}");
            let expected = Some((port.ip.unwrap(), "web".to_owned()));
            assert_eq!(offered(&port, first.mac), expected);
        }
    });
}

#[test]
fn nat_forgets_the_leases_of_forgotten_macs() {
    alone("leases", |directory| {
        let net = directory.join("net");
        fs::create_dir_all(&net).unwrap();
        let (mut addresses, mut leases) = (Vec::new(), String::new());
        for n in 2..=254 {
            let (mac, ip) = (mac_text([2, 0, 0, 0, 0, n]), Ipv4Addr::new(10, 107, 0, n));
            addresses.push(format!("\"{mac}\":\"{ip}\""));
            leases.push_str(&format!("4000000000 {mac} {ip} * *\n"));
        }
        fs::write(
            net.join("addresses.json"),
            format!("{{{}}}", addresses.join(",")),
        )
        .unwrap();
        fs::write(net.join("leases"), leases).unwrap();
        for domid in 1..=2 {
            let request = request(directory, domid, Network::Nat);
            let port = open(&request).unwrap();
            let lease = offered(&port, request.mac).map(|(ip, _)| ip);
            assert_eq!(lease, port.ip);
        }
    });
}

#[test]
fn leftovers_of_the_killed_go_with_the_next() {
    alone("killed", |directory| {
        // A process that is killed neither drops nor unlocks; what it leaves is the same as what is left here: its files without a lock.
        let port = join(directory, 1);
        let users = directory.join("net/users");
        let left = fs::read(users.join("vif1.0")).unwrap();
        drop(port);
        let port = join(directory, 2);
        fs::write(users.join("vif1.0"), &left).unwrap();
        // The file of one that lives is taken from it, as if it had been killed; its guard finds nothing to remove later.
        let own = fs::read(users.join("vif2.0")).unwrap();
        fs::remove_file(users.join("vif2.0")).unwrap();
        fs::write(users.join("vif2.0"), &own).unwrap();
        assert!(dnsmasq_runs(directory));
        sweep(directory).unwrap();
        assert!(!output("ip", &["-br", "link"]).contains("hospes"));
        assert!(!dnsmasq_runs(directory));
        assert_eq!(fs::read_dir(&users).unwrap().count(), 0);
        drop(port);
    });
}

#[test]
fn leftovers_go_where_somebody_has_deleted_the_bridge() {
    alone("rules", |directory| {
        let port = join(directory, 1);
        output("ip", &["link", "del", "hospes0"]);
        drop(port);
        assert!(!output("nft", &["list", "tables"]).contains("hospes"));
        assert!(!dnsmasq_runs(directory));
    });
}

#[test]
fn leftovers_of_who_was_killed_before_the_bridge_had_its_owner_go() {
    alone("halfway", |directory| {
        let port = join(directory, 1);
        output("ip", &["link", "set", "hospes0", "alias", ""]);
        drop(port);
        assert!(output("ip", &["-br", "link"]).contains("hospes0"));
        let port = join(directory, 2);
        assert_eq!(port.bridge.as_deref(), Some("hospes0"));
    });
}

#[test]
fn leftovers_of_a_run_directory_that_is_gone_go_with_the_next() {
    alone("gone", |directory| {
        let [first, second] = ["first", "second"].map(|name| directory.join(name));
        let left = join(&first, 1);
        let pid = fs::read_to_string(first.join("net/dnsmasq.pid")).unwrap();
        fs::remove_dir_all(&first).unwrap();
        let port = join(&second, 2);
        assert_eq!(port.bridge.as_deref(), Some("hospes0"));
        let running = fs::read_to_string(format!("/proc/{}/cmdline", pid.trim()));
        assert!(!running.unwrap_or_default().contains("dnsmasq"));
        assert!(dnsmasq_runs(&second));
        drop(left);
    });
}

#[test]
fn nat_networks_that_are_made_at_once_are_different_ones() {
    alone("at-once", |directory| {
        for round in 0..3 {
            let ports: Vec<Port> = std::thread::scope(|scope| {
                let joining: Vec<_> = (0..4)
                    .map(|n| {
                        let directory = directory.join(format!("{round}-{n}"));
                        scope.spawn(move || join(&directory, n))
                    })
                    .collect();
                joining.into_iter().map(|t| t.join().unwrap()).collect()
            });
            let distinct = |of: fn(&Port) -> String| {
                let found: BTreeSet<String> = ports.iter().map(of).collect();
                assert_eq!(found.len(), ports.len(), "{found:?}");
            };
            distinct(|port| port.bridge.clone().unwrap());
            distinct(|port| format!("{:?}", &port.ip.unwrap().octets()[..3]));
            distinct(|port| format!("{:?}", port.network_v6));
        }
    });
}

#[test]
fn tap_takes_no_routes_of_its_guest() {
    alone("routes", |directory| {
        for (domid, network) in [(1, Network::Script), (2, Network::Nat)] {
            let port = open(&request(directory, domid, network)).unwrap();
            let interface = port.interface.as_deref().unwrap();
            let setting = format!("/proc/sys/net/ipv6/conf/{interface}/accept_ra");
            assert_eq!(fs::read_to_string(setting).unwrap().trim(), "0");
        }
    });
}

#[test]
fn bridge_takes_the_tap_and_gives_its_mtu() {
    alone("bridge", |directory| {
        output(
            "ip",
            &["link", "add", "br0", "mtu", "9000", "type", "bridge"],
        );
        let port = open(&request(directory, 4, Network::Bridge("br0".into()))).unwrap();
        assert_eq!(port.mtu, 9000);
        let link = output("ip", &["-d", "link", "show", "vif4.0"]);
        assert!(
            link.contains("master br0") && link.contains("mtu 9000"),
            "{link}"
        );
        let taken = Request {
            vifname: Some("vif4.0"),
            ..request(directory, 5, Network::Bridge("br0".into()))
        };
        assert!(matches!(open(&taken), Err(Error::NameTaken(_))));
        let other = open(&request(directory, 4, Network::Script)).unwrap();
        assert_eq!(other.interface.as_deref(), Some("vif4.0-1"));
        drop(port);
        assert!(!output("ip", &["-br", "link"]).contains("vif4.0 "));
        for (bridge, found) in [("nowhere", true), ("lo", false)] {
            match open(&request(directory, 6, Network::Bridge(bridge.into()))) {
                Err(Error::NoBridge(_)) => assert!(found),
                Err(Error::NotBridge(_)) => assert!(!found),
                other => panic!("{other:?}"),
            }
        }
    });
}

#[test]
fn user_mode_says_what_is_missing() {
    alone("user", |directory| {
        // No network to the outside at all.
        let error = open(&request(directory, 1, Network::User)).unwrap_err();
        assert!(
            matches!(error, Error::Tool { .. } | Error::NoTool { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("passt"), "{error}");
    });
}
