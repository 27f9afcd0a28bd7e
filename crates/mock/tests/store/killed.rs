//! The store process killed while everybody uses it: what was acknowledged stays, each request happens once, no event is lost.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use hospes_store::wire::kind;
use hospes_store::{Error, NewNode, Perms, StoreAccess};
use hospes_units::DomId;

use crate::common::{Bench, Guest, wait_until};

/// Operations of each writer, and how often the process is killed at least.
const ROUNDS: u32 = 300;
const KILLS: u32 = 12;

fn give_data(client: &dyn StoreAccess, domid: u16) {
    let path = format!("/local/domain/{domid}/data");
    let node = NewNode::new(path, "0", &Perms::owned(DomId(domid)));
    client.write_all(&[node]).expect("a node");
}

/// Writes through one connection of domain 0 and holds every acknowledged value against what is read.
fn write_as_host(bench: &Bench, name: &str) {
    let client = bench.client();
    for round in 0..ROUNDS {
        let (a, b) = (format!("/storm/{name}/a"), format!("/storm/{name}/b"));
        let value = round.to_string();
        if round % 3 == 0 {
            let node = |path: &str| NewNode {
                path: path.to_owned(),
                value: value.clone().into_bytes(),
                perms: None,
            };
            client.write_all(&[node(&a), node(&b)]).expect("written");
            assert_eq!(client.read_text(&b), Some(value.clone()));
        } else {
            client.write(&a, value.as_bytes()).expect("written");
        }
        assert_eq!(client.read_text(&a), Some(value));
        let short = format!("/storm/{name}/short-{round}");
        client.mkdir(&short).expect("made");
        client.remove(&short).expect("removed");
        assert_eq!(client.read(&short), Err(Error::NoEntry));
    }
}

/// Counts in transactions: one that happened twice or not at all would show.
fn count_as_guest(guest: &mut Guest) {
    let mut committed = 0;
    while committed < ROUNDS {
        let id = guest.ask(kind::TRANSACTION_START, "\0").expect("an id");
        let id = id.trim_end_matches('\0').parse().expect("a number");
        let count = guest.ask_in(kind::READ, id, "data\0").expect("a count");
        assert_eq!(count, committed.to_string());
        let next = format!("data\0{}", committed + 1);
        guest.ask_in(kind::WRITE, id, &next).expect("written");
        match guest.ask_in(kind::TRANSACTION_END, id, "T\0") {
            Ok(_) => committed += 1,
            Err(again) => assert_eq!(again, "EAGAIN"),
        }
    }
    assert_eq!(guest.ask(kind::READ, "data\0"), Ok(ROUNDS.to_string()));
}

/// Makes nodes that must not be there and removes nodes that must: a request carried out twice would be refused.
fn watch_and_unwatch_as_guest(guest: &mut Guest) {
    for round in 0..ROUNDS {
        let watch = format!("data\0{round}\0");
        assert_eq!(guest.ask(kind::WATCH, &watch), Ok("OK\0".to_owned()));
        assert_eq!(guest.ask(kind::UNWATCH, &watch), Ok("OK\0".to_owned()));
        assert_eq!(guest.ask(kind::UNWATCH, &watch), Err("ENOENT".to_owned()));
    }
}

#[test]
fn storm_with_kills_loses_and_repeats_nothing() {
    let bench = Bench::new();
    let client = bench.client();
    let mut guests = [1, 2, 3].map(|domid| Guest::new(&bench, &client, domid));
    for domid in [1, 2, 3] {
        give_data(&client, domid);
    }
    let [counter, watcher, listener] = &mut guests;
    listener.ask(kind::WATCH, "data\0t\0").expect("a watch");
    let heard = Arc::new(Mutex::new(BTreeSet::new()));
    let hears = Arc::clone(&heard);
    let _watch = client
        .watch(
            "/storm/last",
            Arc::new(move |path: &str| {
                hears.lock().expect("no panics").insert(path.to_owned());
            }),
        )
        .expect("a watch");
    let done = AtomicBool::new(false);
    let mut kills = 0;
    thread::scope(|scope| {
        let bench = &bench;
        let workers = [
            scope.spawn(move || write_as_host(bench, "one")),
            scope.spawn(move || write_as_host(bench, "two")),
            scope.spawn(move || count_as_guest(counter)),
            scope.spawn(move || watch_and_unwatch_as_guest(watcher)),
            // Each path is written once: its event comes from this write or not at all.
            scope.spawn(|| {
                for round in 0..ROUNDS {
                    let path = format!("/local/domain/3/data/{round}");
                    let node = NewNode::new(path, "", &Perms::owned(DomId(3)));
                    client.write_all(&[node]).expect("a node");
                }
            }),
        ];
        let done = &done;
        let killer = scope.spawn(move || {
            let mut kills = 0;
            while !done.load(SeqCst) || kills < KILLS {
                kills += u32::from(bench.kill_store());
                thread::sleep(Duration::from_millis(30));
            }
            kills
        });
        let results: Vec<_> = workers.into_iter().map(|w| w.join()).collect();
        done.store(true, SeqCst);
        kills = killer.join().expect("the killer ends");
        for result in results {
            result.expect("the worker found nothing wrong");
        }
    });
    assert!(kills >= KILLS);
    // Every path was told, and nothing that was not written.
    let expected: BTreeSet<String> = (0..ROUNDS)
        .map(|round| format!("data/{round}\0t\0"))
        .chain(["data\0t\0".to_owned()])
        .collect();
    wait_until("all events have come", || {
        listener.fetch();
        listener.events.iter().cloned().collect::<BTreeSet<_>>() == expected
    });
    client.write("/storm/last", b"").expect("written");
    wait_until("the host's watch is told", || {
        heard.lock().expect("no panics").contains("/storm/last")
    });
    for name in ["one", "two"] {
        let last = client.read_text(&format!("/storm/{name}/a"));
        assert_eq!(last, Some((ROUNDS - 1).to_string()));
        assert_eq!(
            client.list(&format!("/storm/{name}")).expect("there"),
            ["a", "b"]
        );
    }
}

#[test]
fn open_transaction_ends_with_eagain_after_a_kill() {
    let bench = Bench::new();
    let client = bench.client();
    let mut guest = Guest::new(&bench, &client, 1);
    give_data(&client, 1);
    let id = guest.ask(kind::TRANSACTION_START, "\0").expect("an id");
    let id = id.trim_end_matches('\0').parse().expect("a number");
    guest.ask_in(kind::WRITE, id, "data\0new").expect("written");
    assert!(bench.kill_store());
    assert_eq!(guest.ask_in(kind::READ, id, "data\0"), Ok("0".to_owned()));
    let ended = guest.ask_in(kind::TRANSACTION_END, id, "T\0");
    assert_eq!(ended, Err("EAGAIN".to_owned()));
    assert_eq!(guest.ask(kind::READ, "data\0"), Ok("0".to_owned()));
}

#[test]
fn watch_of_a_guest_outlives_the_process() {
    let bench = Bench::new();
    let client = bench.client();
    let mut guest = Guest::new(&bench, &client, 1);
    give_data(&client, 1);
    guest.ask(kind::WATCH, "data\0t\0").expect("a watch");
    wait_until("the first event comes", || {
        guest.fetch();
        !guest.events.is_empty()
    });
    guest.events.clear();
    assert!(bench.kill_store());
    client.write("/local/domain/1/data", b"x").expect("written");
    wait_until("the guest is told", || {
        guest.fetch();
        guest.events == ["data\0t\0"]
    });
}

#[test]
fn journal_that_cannot_be_read_is_kept() {
    let bench = Bench::new();
    bench.put_journal(b"of another version");
    let client = bench.client();
    client.write("/tool/x", b"v").expect("written");
    assert!(bench.kill_store());
    assert_eq!(client.read_text("/tool/x").as_deref(), Some("v"));
    // What follows the last whole step is dropped.
    bench.append_to_journal(b"half a step");
    assert!(bench.kill_store());
    assert_eq!(client.read_text("/tool/x").as_deref(), Some("v"));
    assert_eq!(bench.unreadable_journal(), b"of another version");
}

#[test]
fn journal_is_compacted_and_complete() {
    let bench = Bench::new();
    let client = bench.client();
    let mut guest = Guest::new(&bench, &client, 1);
    give_data(&client, 1);
    let value = "x".repeat(1900);
    for round in 0..1500 {
        let payload = format!("data\0{round} {value}");
        guest.ask(kind::WRITE, &payload).expect("written");
    }
    assert!(bench.kill_store());
    let kept = client.read_text("/local/domain/1/data").expect("there");
    assert_eq!(kept, format!("1499 {value}"));
    assert!(bench.journal_bytes() < 2 << 20, "{}", bench.journal_bytes());
}
