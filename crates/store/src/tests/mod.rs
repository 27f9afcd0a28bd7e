//! A store as guests and tools use it, by messages.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use hospes_units::DomId;
use proptest::prelude::*;

use crate::wire::{self, kind};
use crate::*;

mod limits;
mod records;
mod restriction;
mod watches;

struct Client {
    conn: ConnId,
    wakes: Arc<AtomicU32>,
}

fn client(store: &mut Store, domid: u16) -> Client {
    let wakes = Arc::new(AtomicU32::new(0));
    let counter = wakes.clone();
    let waker = Arc::new(move || {
        counter.fetch_add(1, SeqCst);
    });
    let conn = store.connect(DomId(domid), waker);
    Client { conn, wakes }
}

fn populated() -> Store {
    let mut store = Store::default();
    let entry = DomainEntry {
        domid: DomId(5),
        uuid: "u-5".into(),
        name: "guest".into(),
        memory_kib: 262_144,
        memory_max_kib: 524_288,
        vcpus: 2,
        console_port: 2,
        console_ring: 0xfefff,
        store_port: 1,
        store_ring: 0xfeffc,
    };
    store.add_domain(DomId(5), "u-5", "guest").unwrap();
    store.write_all(&entry.nodes()).unwrap();
    store.introduce(DomId(5));
    store
}

fn put(store: &mut Store, path: &str, value: &str, perms: &Perms) {
    store
        .write_all(&[NewNode::new(path, value, perms)])
        .unwrap();
}

/// All messages that wait: type and payload.
fn drain(store: &mut Store, c: &Client) -> Vec<(u32, String)> {
    let mut bytes = Vec::new();
    let mut buf = [0; 7];
    loop {
        match store.output(c.conn, &mut buf) {
            0 => break,
            n => bytes.extend(&buf[..n]),
        }
    }
    let mut got = Vec::new();
    while let Some(m) = wire::decode(&mut bytes).unwrap() {
        got.push((m.kind, String::from_utf8_lossy(&m.payload).into_owned()));
    }
    assert!(bytes.is_empty());
    got
}

/// One request; the first message that comes back.
fn ask(store: &mut Store, c: &Client, kind: u32, tx: u32, payload: &str) -> Result<String, String> {
    let events_before = drain(store, c);
    assert!(
        events_before.iter().all(|m| m.0 == kind::WATCH_EVENT),
        "{events_before:?}"
    );
    store
        .input(c.conn, &wire::encode(kind, 9, tx, payload.as_bytes()))
        .unwrap();
    let mut buf = vec![0; 20000];
    let mut n = 0;
    // Fetch only the reply, so that events stay.
    while n < 16 {
        n += store.output(c.conn, &mut buf[n..16]);
    }
    let len = u32::from_le_bytes(buf[12..16].try_into().unwrap()) as usize;
    store.output(c.conn, &mut buf[16..16 + len]);
    let text = String::from_utf8_lossy(&buf[16..16 + len]).into_owned();
    match u32::from_le_bytes(buf[0..4].try_into().unwrap()) {
        kind::ERROR => Err(text.trim_end_matches('\0').to_owned()),
        k => {
            assert_eq!(k, kind);
            Ok(text)
        }
    }
}

fn events(store: &mut Store, c: &Client) -> Vec<String> {
    drain(store, c)
        .into_iter()
        .map(|(k, text)| {
            assert_eq!(k, kind::WATCH_EVENT);
            text.replace('\0', " ").trim_end().to_owned()
        })
        .collect()
}

fn transaction(store: &mut Store, client: &Client) -> u32 {
    let id = ask(store, client, kind::TRANSACTION_START, 0, "\0").unwrap();
    id.trim_end_matches('\0').parse().unwrap()
}

#[test]
fn read_and_write_as_a_guest() {
    let mut s = populated();
    let g = client(&mut s, 5);
    assert_eq!(ask(&mut s, &g, kind::READ, 0, "domid\0"), Ok("5".into()));
    assert_eq!(
        ask(&mut s, &g, kind::READ, 0, "/local/domain/5/name\0"),
        Ok("guest".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::READ, 0, "nothing\0"),
        Err("ENOENT".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::WRITE, 0, "name\0x"),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::WRITE, 0, "data/a/b\0va\0lue"),
        Ok("OK\0".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::READ, 0, "data/a/b\0"),
        Ok("va\0lue".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::GET_PERMS, 0, "data/a\0"),
        Ok("n5\0".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::GET_PERMS, 0, "name\0"),
        Ok("n0\0r5\0".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::DIRECTORY, 0, "cpu\0"),
        Ok("0\x001\0".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::READ, 0, "console/tty\0"),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::READ, 0, "domid"),
        Err("EINVAL".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::READ, 0, "domid\0x\0"),
        Err("EINVAL".into())
    );
    assert!(g.wakes.load(SeqCst) >= 12);
}

#[test]
fn other_guests_see_nothing_and_change_nothing() {
    let mut s = populated();
    let o = client(&mut s, 6);
    for path in ["/local/domain/5/name\0", "/local/domain/5/data\0"] {
        assert_eq!(ask(&mut s, &o, kind::READ, 0, path), Err("EACCES".into()));
    }
    assert_eq!(
        ask(&mut s, &o, kind::WRITE, 0, "/local/domain/5/data/x\0y"),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &o, kind::RM, 0, "/local/domain/5/data\0"),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &o, kind::WRITE, 0, "/x\0y"),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &o, kind::IS_DOMAIN_INTRODUCED, 0, "5\0"),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &o, kind::GET_DOMAIN_PATH, 0, "7\0"),
        Ok("/local/domain/7\0".into())
    );
    assert_eq!(
        ask(&mut s, &o, kind::CONTROL, 0, "help\0"),
        Err("EACCES".into())
    );
    assert_eq!(ask(&mut s, &o, 20, 0, "\0"), Err("ENOSYS".into()));
}

#[test]
fn remove_is_recursive_and_tolerates_absence() {
    let mut s = populated();
    let g = client(&mut s, 5);
    ask(&mut s, &g, kind::WRITE, 0, "data/a/b/c\0v").unwrap();
    assert_eq!(ask(&mut s, &g, kind::RM, 0, "data/a\0"), Ok("OK\0".into()));
    assert_eq!(
        ask(&mut s, &g, kind::READ, 0, "data/a/b/c\0"),
        Err("ENOENT".into())
    );
    assert_eq!(ask(&mut s, &g, kind::RM, 0, "data/a\0"), Ok("OK\0".into()));
    assert_eq!(
        ask(&mut s, &g, kind::RM, 0, "data/a/b\0"),
        Err("ENOENT".into())
    );
    let dom0 = client(&mut s, 0);
    assert_eq!(ask(&mut s, &dom0, kind::RM, 0, "/\0"), Err("EINVAL".into()));
}

#[test]
fn remove_domain_takes_the_path_it_names_too() {
    let mut s = populated();
    // Another has its UUID now, and it has a new one.
    s.add_domain(DomId(7), "u-5", "guest").unwrap();
    s.write_all(&identity_nodes(DomId(5), "u-9", "kept"))
        .unwrap();
    assert_eq!(s.read("/vm/u-5/name"), Ok(b"guest".to_vec()));
    assert_eq!(s.read("/vm/u-9/name"), Ok(b"kept".to_vec()));
    s.remove_domain(DomId(5));
    assert_eq!(s.read("/vm/u-9"), Err(Error::NoEntry));
    assert_eq!(s.read("/vm/u-5/name"), Ok(b"guest".to_vec()));
}

#[test]
fn add_domain_again_starts_empty() {
    let mut s = populated();
    s.add_domain(DomId(7), "u-5", "seven").unwrap();
    s.add_domain(DomId(5), "u-6", "five").unwrap();
    assert_eq!(s.read("/local/domain/5/data"), Err(Error::NoEntry));
    assert_eq!(s.read("/vm/u-6/name"), Ok(b"five".to_vec()));
    // The UUID is that of domain 7 as well.
    assert_eq!(s.read("/vm/u-5/name"), Ok(b"seven".to_vec()));
    assert_eq!(s.add_domain(DomId(8), "u 8", "eight"), Err(Error::Invalid));
    assert!(!s.domains().any(|domid| domid == DomId(8)));
    s.remove_domain(DomId(7));
    assert_eq!(s.read("/vm/u-5"), Err(Error::NoEntry));
}

#[test]
fn transaction_is_invisible_until_its_end() {
    let mut s = populated();
    let g = client(&mut s, 5);
    ask(&mut s, &g, kind::WATCH, 0, "data\0t\0").unwrap();
    events(&mut s, &g);
    let id = ask(&mut s, &g, kind::TRANSACTION_START, 0, "\0").unwrap();
    let id: u32 = id.trim_end_matches('\0').parse().unwrap();
    ask(&mut s, &g, kind::WRITE, id, "data/x\0one").unwrap();
    ask(&mut s, &g, kind::WRITE, id, "data/x\0two").unwrap();
    assert_eq!(
        ask(&mut s, &g, kind::READ, id, "data/x\0"),
        Ok("two".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::READ, 0, "data/x\0"),
        Err("ENOENT".into())
    );
    assert!(events(&mut s, &g).is_empty());
    assert_eq!(
        ask(&mut s, &g, kind::TRANSACTION_START, id, "\0"),
        Err("EBUSY".into())
    );
    ask(&mut s, &g, kind::TRANSACTION_END, id, "T\0").unwrap();
    assert_eq!(events(&mut s, &g), ["data/x t"]);
    assert_eq!(s.read("/local/domain/5/data/x").unwrap(), b"two");
    assert_eq!(
        ask(&mut s, &g, kind::TRANSACTION_END, id, "T\0"),
        Err("ENOENT".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::READ, 77, "data/x\0"),
        Err("ENOENT".into())
    );
}

#[test]
fn transaction_with_a_conflict_changes_nothing() {
    let mut s = populated();
    let g = client(&mut s, 5);
    let start = |s: &mut Store| -> u32 {
        ask(s, &g, kind::TRANSACTION_START, 0, "\0")
            .unwrap()
            .trim_end_matches('\0')
            .parse()
            .unwrap()
    };
    let id = start(&mut s);
    ask(&mut s, &g, kind::READ, id, "control/shutdown\0").unwrap();
    ask(&mut s, &g, kind::WRITE, id, "data/x\0mine").unwrap();
    s.write("/local/domain/5/control/shutdown", b"reboot")
        .unwrap();
    assert_eq!(
        ask(&mut s, &g, kind::TRANSACTION_END, id, "T\0"),
        Err("EAGAIN".into())
    );
    assert!(s.read("/local/domain/5/data/x").is_err());
    let id = start(&mut s);
    ask(&mut s, &g, kind::WRITE, id, "data/x\0mine").unwrap();
    s.write("/local/domain/5/attr", b"elsewhere").unwrap();
    assert!(ask(&mut s, &g, kind::TRANSACTION_END, id, "T\0").is_ok());
    let id = start(&mut s);
    ask(&mut s, &g, kind::RM, id, "data/x\0").unwrap();
    ask(&mut s, &g, kind::TRANSACTION_END, id, "F\0").unwrap();
    assert_eq!(s.read("/local/domain/5/data/x").unwrap(), b"mine");
}

#[test]
fn reset_watches_drops_watches_and_transactions() {
    let mut s = populated();
    let g = client(&mut s, 5);
    ask(&mut s, &g, kind::WATCH, 0, "data\0t\0").unwrap();
    ask(&mut s, &g, kind::TRANSACTION_START, 0, "\0").unwrap();
    events(&mut s, &g);
    ask(&mut s, &g, kind::RESET_WATCHES, 0, "\0").unwrap();
    s.write("/local/domain/5/data", b"x").unwrap();
    assert!(events(&mut s, &g).is_empty());
    assert_eq!(
        ask(&mut s, &g, kind::TRANSACTION_END, 1, "T\0"),
        Err("ENOENT".into())
    );
}

#[test]
fn set_perms_only_by_the_owner() {
    let mut s = populated();
    let g = client(&mut s, 5);
    assert_eq!(
        ask(&mut s, &g, kind::SET_PERMS, 0, "data\0n5\0r0\0r9\0"),
        Ok("OK\0".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::SET_PERMS, 0, "name\0b5\0"),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::SET_PERMS, 0, "data\0n6\0"),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::SET_PERMS, 0, "data\0q6\0"),
        Err("EINVAL".into())
    );
    assert_eq!(
        ask(
            &mut s,
            &g,
            kind::SET_PERMS,
            0,
            "data\0n5\0r1\0r2\0r3\0r4\0r6\0"
        ),
        Err("ENOSPC".into())
    );
    let o = client(&mut s, 9);
    assert_eq!(
        ask(&mut s, &o, kind::READ, 0, "/local/domain/5/data\0"),
        Ok("".into())
    );
}

#[test]
fn monitor_connection_gets_events_as_values() {
    let mut s = populated();
    let conn = s.connect(DomId::HOST, Arc::new(|| {}));
    s.watch(conn, "/local/domain/5/device", "blk").unwrap();
    let g = client(&mut s, 5);
    assert_eq!(s.next_event(conn).unwrap().token, "blk");
    assert_eq!(s.next_event(conn), None);
    ask(&mut s, &g, kind::WRITE, 0, "data/x\0").unwrap();
    assert_eq!(s.next_event(conn), None);
    s.write("/local/domain/5/device/vif/0/state", b"3").unwrap();
    let event = s.next_event(conn).unwrap();
    assert_eq!(event.path, "/local/domain/5/device/vif/0/state");
    assert_eq!(s.read_text(&event.path).as_deref(), Some("3"));
    s.unwatch(conn, "/local/domain/5/device", "blk").unwrap();
    s.write("/local/domain/5/device/vif/0/state", b"4").unwrap();
    assert_eq!(s.next_event(conn), None);
}

proptest! {
    #[test]
    fn any_bytes_are_survived(data in prop::collection::vec(any::<u8>(), 0..4000)) {
        fuzz_requests(&data);
    }

    #[test]
    fn any_requests_are_survived(requests in prop::collection::vec((0u32..28, 0u32..4, "[a-c/@0-9T]{0,6}\0?[a-z0-9]{0,4}\0?"), 0..60), split in 1usize..40) {
        let bytes: Vec<u8> = requests.iter().flat_map(|(k, tx, p)| wire::encode(*k, 1, *tx, p.as_bytes())).collect();
        let mut s = populated();
        let g = client(&mut s, 5);
        for chunk in bytes.chunks(split) {
            prop_assert_eq!(s.input(g.conn, chunk), Ok(()));
        }
        let answers = drain(&mut s, &g).into_iter().filter(|m| m.0 != kind::WATCH_EVENT).count();
        prop_assert_eq!(answers, requests.len());
    }

    /// Against a model: a map from path to value, where writes make parents and removals take children.
    #[test]
    fn tree_agrees_with_a_map(ops in prop::collection::vec((0u8..4, prop::collection::vec("[a-c]", 1..4), any::<u8>()), 0..80)) {
        let mut s = Store::default();
        let mut model: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for (op, parts, value) in ops {
            let path = format!("/{}", parts.join("/"));
            let make = |model: &mut BTreeMap<String, Vec<u8>>| {
                for end in 1..=parts.len() {
                    model.entry(format!("/{}", parts[..end].join("/"))).or_default();
                }
            };
            match op {
                0 | 1 => {
                    s.write(&path, &[value]).unwrap();
                    make(&mut model);
                    model.insert(path, vec![value]);
                }
                2 => {
                    s.mkdir(&path).unwrap();
                    make(&mut model);
                }
                _ => {
                    let parent = path::split(&path).unwrap().0;
                    let there = parent == "/" || model.contains_key(parent);
                    prop_assert_eq!(s.remove(&path).is_ok(), there);
                    model.retain(|p, _| !path::is_within(p, &path));
                }
            }
        }
        let mut found = BTreeMap::new();
        let mut todo = vec!["/".to_owned()];
        while let Some(at) = todo.pop() {
            for name in s.list(&at).unwrap() {
                let child = path::join(&at, &name);
                found.insert(child.clone(), s.read(&child).unwrap());
                todo.push(child);
            }
        }
        prop_assert_eq!(found, model);
    }
}
