//! What a guest may and may not do by way of its ring.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use hospes_store::wire::kind;
use hospes_store::{NewNode, Perms, StoreAccess};
use hospes_units::DomId;

use crate::common::{Bench, GIVE_UP, Guest, entry};

fn denied() -> Result<String, String> {
    Err("EACCES".to_owned())
}

#[test]
fn guest_reaches_its_own_nodes_only() {
    let bench = Bench::new();
    let client = bench.client();
    let mut one = Guest::new(&bench, &client, 1);
    let _two = Guest::new(&bench, &client, 2);
    for (domid, path) in [(1, "/local/domain/1/data"), (2, "/local/domain/2/data")] {
        let node = NewNode::new(path, "v", &Perms::owned(DomId(domid)));
        client.write_all(&[node]).expect("a node");
    }
    assert_eq!(one.ask(kind::READ, "data\0"), Ok("v".to_owned()));
    assert_eq!(one.ask(kind::WRITE, "data/x\0new"), Ok("OK\0".to_owned()));
    let other = "/local/domain/2/data";
    for (kind, payload) in [
        (kind::READ, format!("{other}\0")),
        (kind::WRITE, format!("{other}\0mine")),
        (kind::MKDIR, format!("{other}/x\0")),
        (kind::RM, format!("{other}\0")),
        (kind::SET_PERMS, format!("{other}\0b1\0")),
        (kind::GET_PERMS, format!("{other}\0")),
        (kind::DIRECTORY, "/local/domain\0".to_owned()),
        (kind::DIRECTORY, "/\0".to_owned()),
        (kind::WRITE, "/tool/x\0y".to_owned()),
        (kind::CONTROL, "quota\0".to_owned()),
        (kind::INTRODUCE, "9\x001\x002\0".to_owned()),
        (kind::RELEASE, "2\0".to_owned()),
        (kind::RESUME, "2\0".to_owned()),
        (kind::SET_TARGET, "1\x002\0".to_owned()),
        (kind::IS_DOMAIN_INTRODUCED, "2\0".to_owned()),
    ] {
        assert_eq!(one.ask(kind, &payload), denied(), "{kind} {payload:?}");
    }
    one.ask(kind::WATCH, "/local/domain/2\0t\0")
        .expect("a watch");
    client.write(other, b"secret").expect("written");
    client
        .write("/local/domain/1/data", b"last")
        .expect("written");
    assert_eq!(one.ask(kind::READ, "data\0"), Ok("last".to_owned()));
    assert_eq!(one.events, ["/local/domain/2\0t\0"]);
}

#[test]
fn domain_is_introduced_when_its_nodes_are_there() {
    let bench = Bench::new();
    let client = bench.client();
    let (sender, told) = channel();
    let watches = ["@introduceDomain", "/local/domain/1"].map(|path| {
        let sender = Mutex::new(sender.clone());
        let listener = move |path: &str| {
            let sender = sender.lock().expect("no panics");
            sender.send(path.to_owned()).expect("heard");
        };
        client.watch(path, Arc::new(listener)).expect("a watch")
    });
    let next = || told.recv_timeout(GIVE_UP).expect("an event");
    assert_eq!([next(), next()], ["@introduceDomain", "/local/domain/1"]);
    let guest = Guest::new(&bench, &client, 1);
    let nodes: Vec<String> = std::iter::from_fn(|| Some(next()))
        .take_while(|path| path != "@introduceDomain")
        .collect();
    let last = entry(1).nodes().pop().expect("nodes");
    assert!(nodes.contains(&"/local/domain/1/store/port".to_owned()));
    assert_eq!(client.read(&last.path), Ok(last.value));
    drop(guest);
    drop(watches);
}

/// The messages between the store process and its clients are not a guest's to send.
#[test]
fn guest_cannot_speak_for_its_monitor() {
    let bench = Bench::new();
    let client = bench.client();
    let mut one = Guest::new(&bench, &client, 1);
    let mut two = Guest::new(&bench, &client, 2);
    let node = NewNode::new("/local/domain/2/data", "v", &Perms::owned(DomId(2)));
    client.write_all(&[node]).expect("a node");
    for internal in 0x4853_0000..0x4853_0010 {
        let said = one.ask(internal, "2\x001\0u\0\0");
        assert_eq!(said, Err("ENOSYS".to_owned()), "{internal:#x}");
    }
    for kind in [20, 23, 26, 0xffff, u32::MAX] {
        assert_eq!(one.ask(kind, "\0"), Err("ENOSYS".to_owned()), "{kind:#x}");
    }
    assert_eq!(two.ask(kind::READ, "data\0"), Ok("v".to_owned()));
}

#[test]
fn reset_forgets_what_the_guest_did_before() {
    let bench = Bench::new();
    let client = bench.client();
    let mut guest = Guest::new(&bench, &client, 1);
    let node = NewNode::new("/local/domain/1/data", "v", &Perms::owned(DomId(1)));
    client.write_all(&[node]).expect("a node");
    guest.ask(kind::WATCH, "data\0t\0").expect("a watch");
    let transaction = guest.ask(kind::TRANSACTION_START, "\0").expect("an id");
    let transaction = transaction
        .trim_end_matches('\0')
        .parse()
        .expect("a number");
    // Half a message, then a new kernel.
    guest
        .link()
        .input(b"half a header")
        .expect("no message yet");
    guest.link().reset();
    guest.events.clear();
    client.write("/local/domain/1/data", b"w").expect("written");
    assert_eq!(guest.ask(kind::READ, "data\0"), Ok("w".to_owned()));
    let ended = guest.ask_in(kind::TRANSACTION_END, transaction, "T\0");
    assert_eq!(ended, Err("ENOENT".to_owned()));
    assert!(guest.events.is_empty(), "{:?}", guest.events);
    guest.ask(kind::WATCH, "data\0t\0").expect("a new watch");
}

/// A guest that asks for everything and reads nothing costs a bounded amount of memory, and nobody else waits for it.
#[test]
fn flood_is_bounded_and_others_are_served() {
    let bench = Bench::new();
    let client = bench.client();
    let mut flooder = Guest::new(&bench, &client, 1);
    let mut neighbour = Guest::new(&bench, &client, 2);
    let perms = |domid| Perms::owned(DomId(domid));
    let nodes = [1, 2].map(|d| NewNode::new(format!("/local/domain/{d}/data"), "", &perms(d)));
    client.write_all(&nodes).expect("nodes");
    let value = "x".repeat(2000);
    let mut refused = 0;
    for i in 0..1100 {
        let payload = format!("data/{}/{i}\0{value}", i % 50);
        refused += u32::from(flooder.ask(kind::WRITE, &payload) == Err("ENOSPC".to_owned()));
    }
    assert!(refused > 50, "{refused}");
    assert_eq!(
        flooder.ask(kind::WRITE, &format!("data\0{value}{value}")),
        Err("ENOSPC".to_owned())
    );
    flooder.ask(kind::WATCH, "data\0t\0").expect("a watch");
    // From here on it reads nothing.
    let mut sent = 0;
    while flooder.link().accepts_input() {
        flooder.send(kind::READ, 0, "data/1/1\0");
        sent += 1;
        assert!(sent < 1000);
    }
    for i in 0..5000 {
        let path = format!("/local/domain/1/data/{}/storm-{i}", i % 50);
        let node = NewNode::new(path, "", &perms(1));
        client.write_all(&[node]).expect("a node");
    }
    assert_eq!(neighbour.ask(kind::WRITE, "data\0v"), Ok("OK\0".to_owned()));
    let pid = bench.store_pid().expect("it runs").as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .and_then(|l| l.trim().strip_suffix(" kB")?.trim().parse().ok())
        .expect("a size");
    assert!(kib < 64 << 10, "the store process uses {kib} KiB");
}
