//! Sessions and their journal without sockets.

use proptest::prelude::*;

use super::*;
use crate::entry::tests::entry;

fn hello(session: u64, domid: u16) -> Hello {
    Hello {
        session,
        domid: DomId(domid),
        uuid: format!("uuid-{domid}"),
        name: format!("name-{domid}"),
        seen: None,
        transactions: Vec::new(),
    }
}

fn request(kind: u32, id: u32, transaction: u32, payload: &str) -> Request {
    Request {
        kind,
        id,
        transaction,
        payload: payload.as_bytes().to_vec(),
    }
}

/// All that a core has, but for answers: those to requests that changed nothing are not written down.
fn contents(core: &Core) -> Vec<Entry> {
    let mut entries = core.snapshot();
    entries.retain(|e| !matches!(e, Entry::Done { .. }));
    entries
}

fn restored(journal: &[Vec<Entry>]) -> Core {
    let mut core = Core::new();
    for step in journal {
        assert!(core.restore(step), "{step:?}");
    }
    core.begin();
    core
}

/// A guest with one node and a watch on it, and the journal so far.
fn guest() -> (Core, Vec<Vec<Entry>>) {
    let mut core = restored(&[]);
    let mut journal = vec![core.snapshot()];
    core.hello(&hello(1, 5)).expect("a session");
    let host = core.connect_host();
    let mut steps = vec![core.take_step()];
    let data = "/local/domain/5/data\0";
    core.host_request(host, request(kind::WRITE, 0, 0, &format!("{data}v")));
    steps.push(core.take_step());
    core.host_request(host, request(kind::SET_PERMS, 0, 0, &format!("{data}n5\0")));
    steps.push(core.take_step());
    core.guest_request(1, request(kind::WATCH, 1, 0, "data\0t\0"));
    steps.push(core.take_step());
    journal.extend(steps);
    (core, journal)
}

#[test]
fn repeated_request_is_answered_and_not_done_again() {
    let (mut core, mut journal) = guest();
    assert!(core.guest_output(1).is_some());
    let watch = request(kind::WATCH, 2, 0, "data/x\0u\0");
    core.guest_request(1, watch.clone());
    journal.push(core.take_step());
    let first = core.guest_output(1);
    // In the same process, and in the next.
    core.guest_request(1, watch.clone());
    assert_eq!(
        (core.guest_output(1), core.take_step()),
        (first.clone(), vec![])
    );
    let mut next = restored(&journal);
    next.hello(&hello(1, 5)).expect("the session");
    next.guest_request(1, watch);
    assert_eq!((next.guest_output(1), next.take_step()), (first, vec![]));
}

#[test]
fn transaction_that_ended_unheard_leaves_room_for_others() {
    let ends = [
        request(kind::TRANSACTION_END, 4, 1, "T\0"),
        request(kind::RESET_WATCHES, 4, 0, "\0"),
    ];
    for end in ends {
        let (mut core, mut journal) = guest();
        core.guest_request(1, request(kind::TRANSACTION_START, 2, 0, "\0"));
        core.guest_request(1, request(kind::WRITE, 3, 1, "data/x\0v"));
        core.guest_request(1, end.clone());
        journal.push(core.take_step());
        // Neither the next process's nor this one's answer has arrived before.
        let mut next = restored(&journal);
        for core in [&mut next, &mut core] {
            let mut hello = hello(1, 5);
            hello.transactions = vec![1];
            core.hello(&hello).expect("the session");
            core.guest_request(1, end.clone());
            let answer = core.guest_output(1).expect("an answer");
            assert_eq!(&answer[HEADER_BYTES..], OK);
            for number in 5..15 {
                core.guest_request(1, request(kind::TRANSACTION_START, number, 0, "\0"));
                let answer = core.guest_output(1).expect("an answer");
                assert!(!is_error(&answer), "{}", number - 5);
            }
        }
    }
}

#[test]
fn watches_beyond_the_default_limit_are_restored() {
    let (mut core, _) = guest();
    core.hello(&hello(2, 6)).expect("a session");
    let host = core.connect_host();
    let raise = "quota\0set\0watches\x00300\0";
    core.host_request(host, request(kind::CONTROL, 0, 0, raise));
    for number in 0..200 {
        let payload = format!("data\0{number}\0");
        core.guest_request(1, request(kind::WATCH, 2 + number, 0, &payload));
    }
    core.guest_request(2, request(kind::WATCH, 1, 0, "data\0t\0"));
    let watches = |core: &Core| {
        let entries = contents(core).into_iter();
        entries.filter(|e| matches!(e, Entry::Watch { .. })).count()
    };
    assert_eq!(watches(&core), 202);
    let next = restored(&[core.snapshot()]);
    assert_eq!(contents(&next), contents(&core));
}

#[test]
fn entry_that_does_not_fit_takes_nothing_else_with_it() {
    let (mut core, _) = guest();
    core.hello(&hello(2, 6)).expect("a session");
    core.guest_request(2, request(kind::WATCH, 1, 0, "data\0t\0"));
    let mut step = core.snapshot();
    let first = |e: &Entry| matches!(e, Entry::Session { .. });
    let at = step.iter().position(first).expect("a session");
    step.insert(at, Entry::NoWatches { session: 9 });
    let mut next = Core::new();
    assert!(!next.restore(&step));
    assert_eq!(contents(&next), contents(&core));
}

#[test]
fn event_that_comes_before_the_guest_is_back_is_not_merged_away() {
    let (mut core, mut journal) = guest();
    journal.push(core.take_step());
    let mut next = restored(&journal);
    let host = next.connect_host();
    let write = request(kind::WRITE, 0, 0, "/local/domain/5/data\0w");
    next.host_request(host, write);
    // The watch's first event, number 1, had arrived.
    let mut hello = hello(1, 5);
    hello.seen = Some(1);
    next.hello(&hello).expect("the session");
    let event = next.guest_output(1).expect("an event");
    assert_eq!(&event[HEADER_BYTES..], b"data\0t\0");
    assert_eq!(next.guest_output(1), None);
}

#[test]
fn hello_of_another_session_takes_the_domain_over_empty() {
    let (mut core, _) = guest();
    core.hello(&hello(2, 5)).expect("a session");
    assert_eq!(core.sessions().collect::<Vec<_>>(), [(2, DomId(5))]);
    assert!(core.store.read("/local/domain/5/data").is_err());
    assert_eq!(core.hello(&hello(2, 6)), Err(Error::Access));
    assert_eq!(core.hello(&hello(3, 0)), Err(Error::Invalid));
    core.remove(Rights::All, DomId(6), 2);
    assert_eq!(core.sessions().count(), 1);
    core.remove(Rights::All, DomId(5), 2);
    assert_eq!(core.sessions().count(), 0);
}

#[test]
fn restricted_hello_is_for_its_domain_and_uuid() {
    let (mut core, _) = guest();
    core.hello(&hello(2, 6)).expect("a session");
    let conn = core
        .connect_restricted(DomId(5), "mine", "its")
        .expect("one");
    let before = contents(&core);
    // Another domain, and a session of another domain.
    assert_eq!(
        core.hello_restricted(conn, &hello(3, 6)),
        Err(Error::Access)
    );
    assert_eq!(
        core.hello_restricted(conn, &hello(2, 6)),
        Err(Error::Access)
    );
    assert_eq!(
        core.hello_restricted(conn, &hello(2, 5)),
        Err(Error::Access)
    );
    // A new session, while the domain is known by another UUID.
    assert_eq!(
        core.hello_restricted(conn, &hello(3, 5)),
        Err(Error::Access)
    );
    assert_eq!(contents(&core), before);
    // The session that stands, whatever the domain's UUID was when it began.
    core.hello_restricted(conn, &hello(1, 5))
        .expect("the session");
    assert!(core.remove(Rights::All, DomId(5), 1) && !core.remove(Rights::All, DomId(5), 1));
    // A new one is known by the UUID of the restriction.
    let conn = core
        .connect_restricted(DomId(5), "mine", "its")
        .expect("one");
    core.hello_restricted(conn, &hello(3, 5))
        .expect("a session");
    let known = Entry::Store(hospes_store::Record::Domain {
        domid: DomId(5),
        uuid: Some("mine".to_owned()),
        stage: hospes_store::Stage::Entered,
    });
    assert!(contents(&core).contains(&known));
    let name = core.store.read_text("/local/domain/5/name");
    assert_eq!(name.as_deref(), Some("its"));
}

#[test]
fn restriction_ends_with_the_session_and_not_with_a_new_one() {
    let (mut core, _) = guest();
    let [conn, other] = [0, 1].map(|_| {
        core.connect_restricted(DomId(5), "uuid-5", "name-5")
            .expect("one")
    });
    core.hello_restricted(conn, &hello(3, 5))
        .expect("a session");
    assert_eq!(core.restricted_to(other), Ok(Some(DomId(5))));
    core.remove(Rights::All, DomId(5), 3);
    assert_eq!(core.restricted_to(other), Err(Error::Access));
    assert_eq!(
        core.hello_restricted(other, &hello(4, 5)),
        Err(Error::Access)
    );
}

#[test]
fn new_uuid_is_in_the_journal() {
    let (mut core, mut journal) = guest();
    core.take_step();
    core.change_uuid(DomId(5), "another").expect("it is known");
    journal.push(core.take_step());
    assert_eq!(contents(&restored(&journal)), contents(&core));
    assert_eq!(core.change_uuid(DomId(6), "another"), Err(Error::NoEntry));
}

/// What is not domain 5's: nodes, domains that are known, sessions, watches and events.
fn of_others(core: &Core) -> Vec<Entry> {
    let own = [
        "/local/domain/5",
        "/local/domain/0/backend/vbd/5",
        "/local/domain/0/backend/vif/5",
        "/local/domain/0/error/backend/vbd/5",
        "/local/domain/0/error/backend/vif/5",
        "/libxl/5",
        "/vm/uuid-5",
    ];
    // Directories that all domains share come with the first.
    let shared = [
        "/local/domain/0/backend/vif",
        "/local/domain/0/error",
        "/local/domain/0/error/backend",
        "/local/domain/0/error/backend/vbd",
        "/local/domain/0/error/backend/vif",
    ];
    let is_own = |path: &str| {
        let rests = own.iter().filter_map(|root| path.strip_prefix(root));
        let mut within = rests.map(|rest| rest.is_empty() || rest.starts_with('/'));
        within.any(|is| is) || shared.contains(&path)
    };
    let mut entries = contents(core);
    entries.retain(|e| match e {
        Entry::Store(hospes_store::Record::Node { path, .. }) => !is_own(path),
        Entry::Store(hospes_store::Record::Domain { domid, .. }) => *domid != DomId(5),
        Entry::Session { session, .. }
        | Entry::Watch { session, .. }
        | Entry::Event { session, .. } => *session == 2,
        _ => true,
    });
    entries
}

type Operation = (u8, u8, u32, String, u8);

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    prop::collection::vec(
        (0u8..3, 0u8..9, 0u32..3, "[a-c](/[a-c])?", any::<u8>()),
        0..60,
    )
}

proptest! {
    /// Whatever was done, the journal leads to the same store, sessions, watches and events.
    #[test]
    fn journal_leads_to_the_same_contents(operations in operations()) {
        let (mut core, mut journal) = guest();
        core.hello(&hello(2, 6)).expect("a session");
        journal.push(core.take_step());
        let host = core.connect_host();
        for (number, (who, op, tx, name, value)) in operations.into_iter().enumerate() {
            let path = format!("/local/domain/5/data/{name}");
            let (kind, payload) = match op {
                0 | 1 => (kind::WRITE, format!("{path}\0{value}")),
                2 => (kind::RM, format!("{path}\0")),
                3 => (kind::WATCH, format!("{path}\0{}\0", value % 4)),
                4 => (kind::UNWATCH, format!("{path}\0{}\0", value % 4)),
                5 => (kind::TRANSACTION_START, "\0".to_owned()),
                6 => (kind::TRANSACTION_END, "T\0".to_owned()),
                7 if value < 60 => (RESET, "\0".to_owned()),
                7 => (kind::READ, format!("{path}\0")),
                _ => (kind::RESET_WATCHES, "\0".to_owned()),
            };
            let r = request(kind, number as u32 + 10, tx, &payload);
            match who {
                0 if kind != RESET => core.host_request(host, r),
                0 => drop(core.remove(Rights::All, DomId(6), 2)),
                who => core.guest_request(u64::from(who), r),
            }
            journal.push(core.take_step());
            while core.host_output(host, &mut [0; 4096]) > 0 {}
        }
        prop_assert_eq!(contents(&restored(&journal)), contents(&core));
        prop_assert_eq!(contents(&restored(&[core.snapshot()])), contents(&core));
    }

    /// Whatever is asked on connections that are restricted to a domain, nothing of another changes.
    #[test]
    fn restricted_requests_change_nothing_of_others(
        requests in prop::collection::vec(
            (
                0u32..24,
                0u32..3,
                "(/local/domain/|/local/domain/0/backend/vbd/|/local/domain/0/error/backend/vif/|/libxl/|/vm/uuid-|/vm/|/|@|)[05-6]{0,2}(/[a-z@.-]{0,4}|/vm|/\\.\\./6)?",
                "(n0|n5|b6|n6|T|F|t|/vm/uuid-6|/vm/uuid-6/name)?",
                any::<bool>(),
            ),
            0..80,
        ),
        hellos in prop::collection::vec((1u64..4, 4u16..8), 0..4),
    ) {
        let (mut core, _) = guest();
        core.hello(&hello(2, 6)).expect("a session");
        let host = core.connect_host();
        for path in ["/local/domain/0/backend/vbd/6/a", "/libxl/6/a", "/local/domain/6/a", "/vm/uuid-6/name"] {
            core.host_request(host, request(kind::WRITE, 0, 0, &format!("{path}\0v")));
        }
        core.guest_request(2, request(kind::WATCH, 1, 0, "/local/domain/6\0t\0"));
        let before = of_others(&core);
        let connect = |core: &mut Core| core.connect_restricted(DomId(5), "uuid-5", "name-5").expect("one");
        let conn = connect(&mut core);
        for (number, (kind, tx, path, rest, ended)) in requests.into_iter().enumerate() {
            let end = if ended { "\0" } else { "" };
            let payload = format!("{path}\0{rest}{end}");
            core.host_request(conn, request(kind, number as u32, tx, &payload));
            while core.host_output(conn, &mut [0; 4096]) > 0 {}
        }
        for (session, domid) in hellos {
            let conn = connect(&mut core);
            let _ = core.hello_restricted(conn, &hello(session, domid));
        }
        prop_assert_eq!(of_others(&core), before.clone());
        // Nor does it when the domain goes.
        let session = core.sessions().find(|(_, domid)| *domid == DomId(5));
        if let Some((session, _)) = session {
            core.remove(Rights::All, DomId(5), session);
        }
        let nodes = |entries: Vec<Entry>| {
            let nodes = entries.into_iter().filter(|e| matches!(e, Entry::Store(_)));
            nodes.collect::<Vec<_>>()
        };
        prop_assert_eq!(nodes(of_others(&core)), nodes(before));
    }

    #[test]
    fn any_step_is_survived(steps in prop::collection::vec(entry(), 0..20)) {
        let mut bytes = Vec::new();
        for e in &steps {
            crate::entry::encode(e, &mut bytes);
        }
        crate::fuzz_journal(&bytes);
    }
}
