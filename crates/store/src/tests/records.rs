//! What is recorded, and what comes back of it.

use super::*;

fn restored(records: &[Record]) -> Store {
    let mut store = Store::default();
    for record in records {
        assert!(store.restore(record), "{record:?}");
    }
    store
}

#[test]
fn set_target_gives_the_rights_of_another() {
    let mut s = populated();
    s.start_recording();
    let (stub, host) = (client(&mut s, 6), client(&mut s, 0));
    let node = "/local/domain/5/data\0";
    assert_eq!(
        ask(&mut s, &stub, kind::READ, 0, node),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &host, kind::SET_TARGET, 0, "6\x005\0"),
        Err("ENOENT".into())
    );
    assert_eq!(
        ask(&mut s, &stub, kind::SET_TARGET, 0, "6\x005\0"),
        Err("EACCES".into())
    );
    ask(&mut s, &host, kind::INTRODUCE, 0, "6\x001\x002\0").unwrap();
    ask(&mut s, &host, kind::SET_TARGET, 0, "6\x005\0").unwrap();
    assert!(ask(&mut s, &stub, kind::READ, 0, node).is_ok());
    assert!(s.take_records().contains(&Record::Target {
        domid: DomId(6),
        target: DomId(5)
    }));
    assert_eq!(restored(&s.snapshot()).snapshot(), s.snapshot());
    assert_eq!(
        ask(&mut s, &host, kind::RELEASE, 0, "5\0"),
        Err("EBUSY".into())
    );
    ask(&mut s, &host, kind::RELEASE, 0, "6\0").unwrap();
    assert_eq!(
        ask(&mut s, &stub, kind::READ, 0, node),
        Err("EACCES".into())
    );
    assert_eq!(
        ask(&mut s, &host, kind::RELEASE, 0, "6\0"),
        Err("ENOENT".into())
    );
}

#[test]
fn reopened_transaction_works_and_ends_with_eagain() {
    let mut s = populated();
    let g = client(&mut s, 5);
    s.reopen_transaction(g.conn, 1);
    s.reopen_transaction(g.conn, 0);
    assert!(ask(&mut s, &g, kind::READ, 1, "domid\0").is_ok());
    ask(&mut s, &g, kind::WRITE, 1, "data/x\0v").unwrap();
    let fresh = ask(&mut s, &g, kind::TRANSACTION_START, 0, "\0").unwrap();
    assert_eq!(fresh, "2\0");
    assert_eq!(
        ask(&mut s, &g, kind::TRANSACTION_END, 1, "T\0"),
        Err("EAGAIN".into())
    );
    assert_eq!(
        ask(&mut s, &g, kind::READ, 0, "data/x\0"),
        Err("ENOENT".into())
    );
}

#[test]
fn restore_refuses_what_has_no_parent() {
    let mut s = Store::default();
    for path in ["/a/b", "a", "/a//b", "@x"] {
        let record = Record::Node {
            path: path.into(),
            value: Vec::new(),
            perms: Perms::owned(DomId::HOST),
        };
        assert!(!s.restore(&record), "{path}");
    }
    assert!(s.restore(&Record::NoNode { path: "/a".into() }));
}

proptest! {
    /// Whatever was done, a snapshot and the records after it lead to the same tree as the operations did.
    #[test]
    fn records_repeat_what_was_done(
        before in operations(),
        after in operations(),
    ) {
        let mut s = populated();
        let clients = [client(&mut s, 5), client(&mut s, 0)];
        perform(&mut s, &clients, &before);
        let snapshot = s.snapshot();
        s.start_recording();
        perform(&mut s, &clients, &after);
        let mut records = snapshot;
        records.extend(s.take_records());
        let copy = restored(&records);
        prop_assert_eq!(copy.snapshot(), s.snapshot());
        for node in s.snapshot() {
            if let Record::Node { path, .. } = node {
                prop_assert_eq!(copy.list(&path), s.list(&path));
            }
        }
        prop_assert_eq!(copy.tree.owned_by(DomId(5)), s.tree.owned_by(DomId(5)));
    }
}

type Operation = (bool, u8, u32, Vec<String>, u8);

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let parts = prop::collection::vec("[a-c]", 1..4);
    prop::collection::vec((any::<bool>(), 0u8..8, 0u32..3, parts, any::<u8>()), 0..60)
}

/// Operations by messages, some of them inside transactions that may fail.
fn perform(s: &mut Store, clients: &[Client; 2], operations: &[Operation]) {
    for (host, op, transaction, parts, value) in operations {
        let c = &clients[usize::from(*host)];
        let path = format!("/local/domain/5/data/{}", parts.join("/"));
        let (kind, payload) = match op {
            0 | 1 => (kind::WRITE, format!("{path}\0{value}")),
            2 => (kind::MKDIR, format!("{path}\0")),
            3 => (kind::RM, format!("{path}\0")),
            4 => (kind::SET_PERMS, format!("{path}\0n5\0r{value}\0")),
            5 => (kind::TRANSACTION_START, "\0".to_owned()),
            6 => (kind::TRANSACTION_END, "T\0".to_owned()),
            _ if *host && *value < 20 => {
                s.add_domain(DomId(5), "again", "more").unwrap();
                continue;
            }
            _ => (kind::TRANSACTION_END, "F\0".to_owned()),
        };
        let _ = ask(s, c, kind, *transaction, &payload);
    }
}
