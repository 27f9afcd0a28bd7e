//! Connections that are restricted to one domain: all that a domain's life needs, and nothing of another's.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use hospes_store::wire::{self, kind};
use hospes_store::{DomainStore, Error, NewNode, Perms, StoreAccess, identity_nodes};
use hospes_store_server::Place;
use hospes_units::DomId;

use crate::common::{Bench, Guest, entry, uuid, wait_until};

/// Messages beyond Xen's protocol.
const HELLO: u32 = 0x4853_0001;
const REMOVE: u32 = 0x4853_0004;
const RESTRICT: u32 = 0x4853_0005;
const IDENTIFY: u32 = 0x4853_0006;
const SHUT_DOWN: u32 = 0x4853_0007;

fn restrict(place: &Place, domid: u16) -> std::io::Result<UnixStream> {
    place.connect_restricted(DomId(domid), &uuid(domid), "name")
}

fn connect(bench: &Bench) -> UnixStream {
    // There is a store process from here on.
    let _ = bench.client().list("/");
    UnixStream::connect(bench.place().socket()).expect("a connection")
}

/// One request on a connection; the answer's text, or the name of the error.
fn ask(mut stream: &UnixStream, kind: u32, payload: &[u8]) -> Result<String, String> {
    stream
        .write_all(&wire::encode(kind, 1, 0, payload))
        .expect("sent");
    let mut header = [0; 16];
    stream.read_exact(&mut header).expect("an answer");
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let mut payload = vec![0; word(12) as usize];
    stream.read_exact(&mut payload).expect("an answer");
    let text = String::from_utf8(payload).expect("text");
    match word(0) {
        kind::ERROR => Err(text.trim_end_matches('\0').to_owned()),
        _ => Ok(text),
    }
}

fn ok() -> Result<String, String> {
    Ok("OK\0".to_owned())
}

fn denied() -> Result<String, String> {
    Err("EACCES".to_owned())
}

fn pair(domid: u16, text: &str) -> Vec<u8> {
    wire::join([domid.to_string(), text.to_owned()])
}

fn hello(session: u64, domid: u16) -> Vec<u8> {
    wire::join([
        session.to_string(),
        domid.to_string(),
        uuid(domid),
        "another".to_owned(),
        String::new(),
    ])
}

/// The nodes of a disk, as back ends make them.
fn disk(domid: u16) -> [String; 3] {
    [
        format!("/libxl/{domid}/device/vbd/51712"),
        format!("/local/domain/0/backend/vbd/{domid}/51712"),
        format!("/local/domain/{domid}/device/vbd/51712"),
    ]
}

#[test]
fn domain_lives_by_a_restricted_connection() {
    let bench = Bench::new();
    let host = bench.client();
    let client = bench.restricted(1);
    let mut guest = Guest::new(&bench, &client, 1);
    let roots = disk(1);
    let perms = Perms::read_only(DomId(1));
    let nodes = roots
        .each_ref()
        .map(|root| NewNode::new(format!("{root}/state"), "1", &perms));
    client.write_all(&nodes).expect("a device");
    let state = format!("{}/state", roots[2]);
    client
        .set_perms(&state, &Perms::owned(DomId(1)))
        .expect("the guest's");
    let heard = Arc::new(Mutex::new(0));
    let hears = Arc::clone(&heard);
    let count = move || *hears.lock().expect("no panics");
    let listener = Arc::new(move |_: &str| *heard.lock().expect("no panics") += 1);
    let watch = client.watch(&state, listener).expect("a watch");
    wait_until("the watch begins", || count() > 0);
    let before = count();
    assert_eq!(guest.ask(kind::WRITE, "device/vbd/51712/state\x003"), ok());
    wait_until("the watch tells", || count() > before);
    assert_eq!(client.read_text(&state).as_deref(), Some("3"));
    assert_eq!(client.list(&roots[1]), Ok(vec!["state".to_owned()]));
    client
        .write("/local/domain/1/control/shutdown", b"poweroff")
        .expect("asked");
    client.mkdir("/local/domain/1/more").expect("made");
    let error = "/local/domain/0/error/backend/vbd/1/51712/error";
    client.write(error, b"why").expect("told");
    let names = ["/local/domain/1/name", &format!("/vm/{}/name", uuid(1))];
    for name in names {
        assert_eq!(client.write(name, b"new"), Err(Error::Access));
        assert_eq!(client.read_text(name).as_deref(), Some("guest-1"));
    }
    host.change_identity(DomId(1), &uuid(1), "new")
        .expect("renamed");
    assert!(
        names
            .iter()
            .all(|name| client.read(name) == Ok(b"new".to_vec()))
    );
    drop(watch);
    for root in &roots {
        client.remove(root).expect("removed");
        assert_eq!(host.read(root), Err(Error::NoEntry));
    }
    drop(guest);
    let vm = format!("/vm/{}", uuid(1));
    for path in ["/local/domain/1", "/libxl/1", error, &vm] {
        assert_eq!(host.read(path), Err(Error::NoEntry), "{path}");
    }
}

#[test]
fn what_scripts_read_outlives_its_restricted_connection() {
    let bench = Bench::new();
    let host = bench.client();
    let place = bench.place();
    let restricted = || restrict(&place, 1).expect("one");
    let bridge = "/local/domain/0/backend/vif/1/0/bridge";
    let write = [bridge.as_bytes(), b"\0other"].concat();
    let first = restricted();
    assert_eq!(ask(&first, HELLO, &hello(11, 1)), ok());
    host.write(bridge, b"br0").expect("an interface");
    let tools = restricted();
    assert_eq!(ask(&tools, kind::WRITE, &write), denied());
    // Another session takes the place of the first, and then the domain is taken out.
    let second = restricted();
    assert_eq!(ask(&second, HELLO, &hello(12, 1)), ok());
    assert_eq!(host.read_text(bridge).as_deref(), Some("br0"));
    assert_eq!(ask(&tools, REMOVE, &pair(1, "12")), ok());
    assert_eq!(host.read_text(bridge).as_deref(), Some("br0"));
    assert_eq!(ask(&tools, kind::WRITE, &write), denied());
    // Whoever has domain 0's rights removes them with the domain.
    let third = restricted();
    assert_eq!(ask(&third, HELLO, &hello(13, 1)), ok());
    let removed = ask(&connect(&bench), REMOVE, &pair(1, "13"));
    assert_eq!(removed, ok());
    assert_eq!(host.read(bridge), Err(Error::NoEntry));
}

#[test]
fn restricted_domain_outlives_the_process() {
    let bench = Bench::new();
    let host = bench.client();
    let client = bench.restricted(1);
    let mut guest = Guest::new(&bench, &client, 1);
    guest.ask(kind::WATCH, "data\0t\0").expect("a watch");
    for round in 0..20 {
        assert!(bench.kill_store());
        let payload = format!("data\0{round}");
        assert_eq!(guest.ask(kind::WRITE, &payload), ok());
        let path = "/local/domain/1/more";
        client.write(path, payload.as_bytes()).expect("written");
        client.write_all(&entry(1).nodes()[..8]).expect("written");
        assert_eq!(client.write("/local/domain/2/x", b""), Err(Error::Access));
    }
    assert_eq!(
        host.read_text("/local/domain/1/data").as_deref(),
        Some("19")
    );
    assert!(bench.kill_store());
    drop(guest);
    assert_eq!(host.read("/local/domain/1"), Err(Error::NoEntry));
}

#[test]
fn restricted_client_reaches_no_other_domain() {
    let bench = Bench::new();
    let host = bench.client();
    let client = bench.restricted(1);
    let _one = Guest::new(&bench, &client, 1);
    let mut two = Guest::new(&bench, &host, 2);
    for root in disk(2) {
        host.write(&root, b"v").expect("a device");
    }
    let vm = format!("/vm/{}/name", uuid(2));
    let home = [
        "/local/domain/2/name".to_owned(),
        "/local/domain/10/x".to_owned(),
        vm,
    ];
    for path in home.iter().chain(&disk(2)) {
        let before = host.read(path);
        let listener = Arc::new(|_: &str| ());
        let node = |path: &str| NewNode::new(path, "mine", &Perms::owned(DomId(1)));
        let both = [node("/local/domain/1/both"), node(path)];
        assert_eq!(client.read(path), Err(Error::Access));
        assert_eq!(client.list(path), Err(Error::Access));
        assert_eq!(client.write(path, b"mine"), Err(Error::Access));
        assert_eq!(client.mkdir(path), Err(Error::Access));
        assert_eq!(client.remove(path), Err(Error::Access));
        assert_eq!(
            client.set_perms(path, &Perms::owned(DomId(1))),
            Err(Error::Access)
        );
        assert_eq!(client.write_all(&both), Err(Error::Access));
        assert_eq!(client.watch(path, listener).map(drop), Err(Error::Access));
        assert_eq!(host.read(path), before, "{path}");
        assert_eq!(host.read("/local/domain/1/both"), Err(Error::NoEntry));
    }
    let added = client.add_domain(&entry(2), Arc::new(|| ())).map(drop);
    assert_eq!(added, Err(Error::Access));
    let identity = client.change_identity(DomId(1), &uuid(3), "three");
    assert_eq!(identity, Err(Error::Access));
    assert_eq!(two.ask(kind::READ, "name\0"), Ok("guest-2".to_owned()));
}

#[test]
fn restriction_comes_first_and_stays() {
    let bench = Bench::new();
    let host = bench.client();
    host.write("/local/domain/2/x", b"v").expect("written");
    let other = b"/local/domain/2/x\0";

    let late = connect(&bench);
    assert_eq!(ask(&late, kind::READ, other), Ok("v".to_owned()));
    let restrict = |stream, domid: u16, uuid: &str| {
        let payload = wire::join([&domid.to_string(), uuid, "name"]);
        ask(stream, RESTRICT, &payload)
    };
    assert_eq!(restrict(&late, 1, "u"), denied());

    let early = connect(&bench);
    assert_eq!(restrict(&early, 1, "u"), ok());
    for domid in [2, 1, 0] {
        assert!(restrict(&early, domid, "u").is_err());
        assert!(ask(&early, RESTRICT, &pair(domid, "u")).is_err());
        assert_eq!(ask(&early, HELLO, &hello(5, 2)), denied());
    }
    assert_eq!(ask(&early, kind::READ, other), denied());
    assert_eq!(restrict(&early, 2, "u"), denied());
    assert_eq!(ask(&early, kind::READ, other), denied());
    assert_eq!(ask(&early, IDENTIFY, &pair(1, "v")), denied());
    assert_eq!(ask(&early, SHUT_DOWN, b"2\0"), denied());
    assert_eq!(ask(&early, kind::INTRODUCE, b"2\x001\x002\0"), denied());
    // A session is opened by what comes first or not at all.
    assert_eq!(ask(&early, HELLO, &hello(5, 1)), denied());

    let guest = bench
        .place()
        .connect_restricted(DomId(3), "u", "name")
        .expect("one");
    assert_eq!(ask(&guest, HELLO, &hello(7, 3)), ok());
    assert_eq!(restrict(&guest, 2, "u"), denied());
    // Whatever it has called itself.
    assert_eq!(
        host.read_text("/local/domain/3/name").as_deref(),
        Some("name")
    );
    assert_eq!(ask(&guest, kind::READ, other), denied());

    for (domid, uuid) in [(0, "u"), (1, "u/v"), (1, "")] {
        let result = bench.place().connect_restricted(DomId(domid), uuid, "name");
        assert!(result.is_err(), "{domid} {uuid}");
    }
}

#[test]
fn sessions_of_others_cannot_be_ended_or_taken() {
    let bench = Bench::new();
    let place = bench.place();
    let two = restrict(&place, 2).expect("one");
    assert_eq!(ask(&two, HELLO, &hello(22, 2)), ok());
    let one = restrict(&place, 1).expect("one");
    // With its own number and the other's session, and with the other's number.
    assert_eq!(ask(&one, HELLO, &hello(22, 1)), denied());
    assert_eq!(ask(&one, HELLO, &hello(22, 2)), denied());
    assert_eq!(ask(&one, HELLO, &hello(23, 2)), denied());
    assert_eq!(ask(&one, HELLO, &hello(11, 1)), ok());
    let tools = restrict(&place, 1).expect("one");
    assert_eq!(ask(&tools, REMOVE, &pair(2, "22")), denied());
    // Of a session that is not the domain's nothing is removed.
    assert_eq!(ask(&tools, REMOVE, &pair(1, "22")), ok());
    let home = b"/local/domain/1/data\0";
    assert_eq!(ask(&tools, kind::MKDIR, home), ok());
    assert!(ask(&two, kind::TRANSACTION_START, b"\0").is_ok());
    assert!(ask(&one, kind::TRANSACTION_START, b"\0").is_ok());
    assert_eq!(ask(&tools, REMOVE, &pair(1, "11")), ok());
    assert_eq!(ask(&tools, kind::MKDIR, home), denied());
    // The other connections of the domain have been closed, and not those of others.
    let mut one = one;
    assert_eq!(one.read(&mut [0; 1]).expect("the end"), 0);
    assert!(ask(&two, kind::TRANSACTION_START, b"\0").is_ok());
}

#[test]
fn identity_that_was_given_up_is_not_had_back() {
    let bench = Bench::new();
    let host = bench.client();
    let client = bench.restricted(1);
    let _one = Guest::new(&bench, &client, 1);
    let name = format!("/vm/{}/name", uuid(1));
    assert_eq!(client.read_text(&name).as_deref(), Some("guest-1"));
    host.change_identity(DomId(1), &uuid(9), "away")
        .expect("another's");
    assert_eq!(host.read(&name), Err(Error::NoEntry));
    assert_eq!(
        host.read_text("/local/domain/1/name").as_deref(),
        Some("away")
    );
    host.write_all(&identity_nodes(DomId(2), &uuid(1), "second"))
        .expect("written");
    assert_eq!(client.read(&name), Err(Error::Access));
    host.write("/local/domain/1/vm", format!("/vm/{}", uuid(1)).as_bytes())
        .expect("written");
    assert_eq!(client.read(&name), Err(Error::Access));
    let added = client.add_domain(&entry(1), Arc::new(|| ())).map(drop);
    assert_eq!(added, Err(Error::Access));
    // The next process knows.
    assert!(bench.kill_store());
    assert_eq!(client.read(&name), Err(Error::Access));
    assert_eq!(host.read_text(&name).as_deref(), Some("second"));
    host.change_identity(DomId(1), &uuid(1), "first")
        .expect("its own again");
    assert_eq!(client.read_text(&name).as_deref(), Some("first"));
}

#[test]
fn one_domain_does_not_take_all_connections() {
    let bench = Bench::new();
    let place = bench.place();
    let connect = |domid: u16| restrict(&place, domid);
    let mut held = Vec::new();
    while let Ok(stream) = connect(1) {
        held.push(stream);
        assert!(held.len() < 100);
    }
    assert!(held.len() >= 2);
    assert!(connect(2).is_ok());
    held.pop();
    wait_until("there is room", || {
        thread::sleep(Duration::from_millis(5));
        connect(1).is_ok()
    });
}
