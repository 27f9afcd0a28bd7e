//! Connections that are restricted to what belongs to one domain.

use super::*;

const OTHER: &str = "u-6";

/// Domains 5 and 6, which have a device each, and a connection restricted to 5.
fn restricted() -> (Store, Client) {
    let mut store = populated();
    store.add_domain(DomId(6), OTHER, "six").unwrap();
    // As `populated`, with less.
    store.add_domain(DomId(5), "u-5", "five").unwrap();
    for domid in [5, 6, 55] {
        for root in ["/local/domain/0/backend/vbd", "/libxl", "/local/domain"] {
            store.write(&format!("{root}/{domid}/x"), b"v").unwrap();
        }
    }
    let conn = store.connect_restricted(DomId(5), "u-5", "five", Arc::new(|| {}));
    let wakes = Arc::default();
    (
        store,
        Client {
            conn: conn.unwrap(),
            wakes,
        },
    )
}

fn denied() -> Result<String, String> {
    Err("EACCES".into())
}

#[test]
fn restricted_connection_reaches_what_is_its_domains() {
    let (mut s, c) = restricted();
    for root in [
        "/local/domain/5/x",
        "/local/domain/0/backend/vbd/5",
        "/local/domain/0/backend/vif/5/0/feature-x",
        "/local/domain/0/error/backend/vbd/5",
        "/libxl/5",
    ] {
        for path in [root.to_owned(), format!("{root}/a/b")] {
            ask(&mut s, &c, kind::WATCH, 0, &format!("{path}\0t\0")).unwrap();
            ask(&mut s, &c, kind::WRITE, 0, &format!("{path}\0v")).unwrap();
            assert_eq!(
                ask(&mut s, &c, kind::READ, 0, &format!("{path}\0")),
                Ok("v".into())
            );
            let perms = format!("{path}\0n0\0r5\0");
            ask(&mut s, &c, kind::SET_PERMS, 0, &perms).unwrap();
            let got = ask(&mut s, &c, kind::GET_PERMS, 0, &format!("{path}\0"));
            assert_eq!(got, Ok("n0\0r5\0".into()));
            ask(&mut s, &c, kind::DIRECTORY, 0, &format!("{path}\0")).unwrap();
            ask(&mut s, &c, kind::MKDIR, 0, &format!("{path}/m\0")).unwrap();
            ask(&mut s, &c, kind::RM, 0, &format!("{path}\0")).unwrap();
            assert_eq!(s.read(&path), Err(Error::NoEntry));
            ask(&mut s, &c, kind::UNWATCH, 0, &format!("{path}\0t\0")).unwrap();
        }
    }
}

/// Every change of each of these paths, in a transaction or without, is refused.
fn refuses_changes(s: &mut Store, c: &Client, paths: &[String]) {
    let before = s.snapshot();
    let open = transaction(s, c);
    for path in paths {
        for id in [0, open] {
            for (request, rest) in [
                (kind::WRITE, "mine"),
                (kind::MKDIR, ""),
                (kind::RM, ""),
                (kind::SET_PERMS, "b5\0"),
            ] {
                let got = ask(s, c, request, id, &format!("{path}\0{rest}"));
                assert_eq!(got, denied(), "{request} {path}");
            }
        }
    }
    ask(s, c, kind::TRANSACTION_END, open, "T\0").unwrap();
    assert_eq!(s.snapshot(), before);
}

#[test]
fn restricted_connection_does_not_change_who_its_domain_is() {
    let (mut s, c) = restricted();
    let mut paths = Vec::new();
    for node in identity_nodes(DomId(5), "u-5", "five") {
        // They and what might be below them.
        let below = node.path != "/local/domain/5";
        paths.extend(below.then(|| format!("{}/x", node.path)));
        paths.push(node.path);
    }
    refuses_changes(&mut s, &c, &paths);
    // It sees them, and the guest does.
    let g = client(&mut s, 5);
    for client in [&c, &g] {
        let name = ask(&mut s, client, kind::READ, 0, "/local/domain/5/name\0");
        assert_eq!(name, Ok("five".into()));
        let name = ask(&mut s, client, kind::READ, 0, "/vm/u-5/name\0");
        assert_eq!(name, Ok("five".into()));
    }
    // What it enters anew is what it was last.
    s.write("/local/domain/5/name", b"renamed").unwrap();
    let entered = s.may_enter(c.conn, DomId(5));
    assert_eq!(entered, Ok(("u-5".into(), "renamed".into())));
    s.remove_domain(DomId(5));
    let entered = s.may_enter(c.conn, DomId(5));
    assert_eq!(entered, Ok(("u-5".into(), "five".into())));
}

/// What Xen's scripts read of an interface, and what they write.
const OF_SCRIPTS: [&str; 14] = [
    "frontend",
    "frontend-id",
    "handle",
    "mac",
    "mtu",
    "type",
    "script",
    "bridge",
    "vifname",
    "gatewaydev",
    "ip",
    "rate",
    "hotplug-status",
    "hotplug-error",
];

#[test]
fn restricted_connection_changes_nothing_that_scripts_read() {
    let (mut s, c) = restricted();
    let all = "/local/domain/0/backend/vif/5";
    let own = format!("{all}/0");
    let guests = Perms::read_only(DomId(5));
    s.write_all(&[NewNode::new(&own, "", &guests)]).unwrap();
    for name in &OF_SCRIPTS[..7] {
        let node = NewNode::new(format!("{own}/{name}"), "told", &guests);
        s.write_all(&[node]).unwrap();
    }
    let mut paths = vec![all.to_owned(), own.clone(), format!("{all}/1")];
    for name in OF_SCRIPTS {
        paths.push(format!("{own}/{name}"));
        paths.push(format!("{own}/{name}/below"));
        paths.push(format!("{all}/1/{name}"));
    }
    paths.extend(["/state", "/feature-x"].map(|end| format!("{own}/mac{end}")));
    refuses_changes(&mut s, &c, &paths);
    // It sees them, and says how it serves the interface.
    let mac = format!("{own}/mac");
    let got = ask(&mut s, &c, kind::READ, 0, &format!("{mac}\0"));
    assert_eq!(got, Ok("told".into()));
    ask(&mut s, &c, kind::WATCH, 0, &format!("{own}\0t\0")).unwrap();
    for name in ["state", "online", "feature-sg", "multi-queue-max-queues"] {
        let path = format!("{own}/{name}");
        ask(&mut s, &c, kind::WRITE, 0, &format!("{path}\x001")).unwrap();
        let perms = format!("{path}\0n0\0r5\0");
        ask(&mut s, &c, kind::SET_PERMS, 0, &perms).unwrap();
        ask(&mut s, &c, kind::RM, 0, &format!("{path}\0")).unwrap();
    }
    // Nor with the domain.
    s.remove_domain_restricted(DomId(5));
    assert_eq!(s.read(&mac), Ok(b"told".to_vec()));
    assert_eq!(s.read("/local/domain/5"), Err(Error::NoEntry));
    s.remove_domain(DomId(5));
    assert_eq!(s.read(all), Err(Error::NoEntry));
}

#[test]
fn restricted_connection_reaches_nothing_else() {
    let (mut s, c) = restricted();
    let before = s.snapshot();
    let open = transaction(&mut s, &c);
    for path in [
        "/",
        "/local",
        "/local/domain",
        "/local/domain/6",
        "/local/domain/6/x",
        "/local/domain/55",
        "/local/domain/55/x",
        "/local/domain/05/x",
        "/local/domain/5-x",
        "/local/domain/0",
        "/local/domain/0/name",
        "/local/domain/0/backend",
        "/local/domain/0/backend/vbd",
        "/local/domain/0/backend/vbd/6",
        "/local/domain/0/backend/vbd/55/x",
        "/local/domain/0/backend/new/5",
        "/local/domain/0/backend/5",
        "/local/domain/6/backend/vbd/5",
        "/libxl",
        "/libxl/6/x",
        "/libxl/55/x",
        "/vm",
        "/vm/u-6",
        "/vm/u-6/name",
        "/vm/u-55",
        "/vm/u",
        "/tool/xenstored",
        // Relative to the home of domain 0.
        "name",
        "backend/vbd/6/x",
    ] {
        for (request, rest) in [
            (kind::READ, ""),
            (kind::DIRECTORY, ""),
            (kind::DIRECTORY_PART, "0\0"),
            (kind::GET_PERMS, ""),
            (kind::WRITE, "mine"),
            (kind::MKDIR, ""),
            (kind::RM, ""),
            (kind::SET_PERMS, "n0\0b5\0"),
            (kind::WATCH, "t\0"),
        ] {
            for id in [0, open] {
                let got = ask(&mut s, &c, request, id, &format!("{path}\0{rest}"));
                assert_eq!(got, denied(), "{request} {path}");
            }
        }
    }
    // What has dots is no path at all, nor is what has empty names.
    for path in [
        "/local/domain/5/../6/x",
        "/local/domain/5/./x",
        "/local/domain//6",
        "/libxl/5/",
    ] {
        let got = ask(&mut s, &c, kind::WRITE, 0, &format!("{path}\0mine"));
        assert_eq!(got, Err("EINVAL".into()), "{path}");
    }
    for (request, payload) in [
        (kind::WATCH, "@introduceDomain\0t\0"),
        (kind::WATCH, "@releaseDomain\0t\0"),
        (kind::GET_PERMS, "@releaseDomain\0"),
        (kind::SET_PERMS, "@releaseDomain\0n5\0"),
        (kind::CONTROL, "quota\0set\0nodes\x005\0"),
        (kind::INTRODUCE, "x\x001\x002\0"),
        (kind::INTRODUCE, "9\x001\x002\0"),
        (kind::RELEASE, "5\0"),
        (kind::RELEASE, "6\0"),
        (kind::RESUME, "6\0"),
        (kind::SET_TARGET, "5\x006\0"),
        (kind::IS_DOMAIN_INTRODUCED, "6\0"),
        (kind::GET_DOMAIN_PATH, "6\0"),
        (99, "\0"),
    ] {
        assert_eq!(ask(&mut s, &c, request, 0, payload), denied(), "{request}");
    }
    ask(&mut s, &c, kind::TRANSACTION_END, open, "T\0").unwrap();
    assert_eq!(s.snapshot(), before);
}

#[test]
fn restricted_connection_introduces_its_domain_once() {
    let (mut s, c) = restricted();
    let host = client(&mut s, 0);
    ask(&mut s, &host, kind::WATCH, 0, "@introduceDomain\0t\0").unwrap();
    events(&mut s, &host);
    let introduce = "5\x001\x002\0";
    for heard in [&["@introduceDomain t"][..], &[]] {
        ask(&mut s, &c, kind::INTRODUCE, 0, introduce).unwrap();
        assert_eq!(events(&mut s, &host), heard);
    }
    s.change_uuid(DomId(5), "u-away").unwrap();
    assert_eq!(ask(&mut s, &c, kind::INTRODUCE, 0, introduce), denied());
    s.add_domain(DomId(5), "u-5", "five").unwrap();
    s.end_restricted(DomId(5));
    assert_eq!(ask(&mut s, &c, kind::INTRODUCE, 0, introduce), denied());
    assert!(events(&mut s, &host).is_empty());
}

#[test]
fn restricted_connection_gives_nodes_to_no_other_domain() {
    let (mut s, c) = restricted();
    let perms = |list: &str| format!("/local/domain/5/x\0{list}");
    assert_eq!(
        ask(&mut s, &c, kind::SET_PERMS, 0, &perms("n6\0")),
        denied()
    );
    let many = "r1\0".repeat(5);
    let got = ask(
        &mut s,
        &c,
        kind::SET_PERMS,
        0,
        &perms(&format!("n5\0{many}")),
    );
    assert_eq!(got, Err("ENOSPC".into()));
    ask(&mut s, &c, kind::SET_PERMS, 0, &perms("n5\0r0\0")).unwrap();
}

#[test]
fn restricted_connection_does_not_fill_the_store() {
    let (mut s, c) = restricted();
    let most = crate::restriction::QUOTA;
    let room = Err("ENOSPC".to_owned());
    let number = |i: usize| format!("/local/domain/5/{}/{i}\0", i % 64);
    let mut made = 0;
    while ask(&mut s, &c, kind::MKDIR, 0, &number(made)).is_ok() {
        made += 1;
        assert!(made < most.nodes);
    }
    assert_eq!(ask(&mut s, &c, kind::MKDIR, 0, &number(made)), room);
    let id = transaction(&mut s, &c);
    ask(&mut s, &c, kind::MKDIR, id, &number(made)).unwrap();
    assert_eq!(ask(&mut s, &c, kind::TRANSACTION_END, id, "T\0"), room);
    // What is there can still be changed, and room be made.
    ask(&mut s, &c, kind::WRITE, 0, "/local/domain/5/x\0w").unwrap();
    ask(&mut s, &c, kind::RM, 0, "/local/domain/5/1\0").unwrap();
    ask(&mut s, &c, kind::MKDIR, 0, &number(made)).unwrap();

    for i in 0..most.watches {
        ask(
            &mut s,
            &c,
            kind::WATCH,
            0,
            &format!("/local/domain/5\0{i}\0"),
        )
        .unwrap();
    }
    assert_eq!(
        ask(&mut s, &c, kind::WATCH, 0, "/local/domain/5\0t\0"),
        room
    );
    ask(&mut s, &c, kind::RESET_WATCHES, 0, "\0").unwrap();
    let open: Vec<u32> = (0..most.transactions)
        .map(|_| transaction(&mut s, &c))
        .collect();
    assert_eq!(ask(&mut s, &c, kind::TRANSACTION_START, 0, "\0"), room);
    let value = "x".repeat(3000);
    let mut held = 0;
    let mut write = |i: usize| {
        let payload = format!("/local/domain/5/t/{i}\0{value}");
        ask(&mut s, &c, kind::WRITE, open[i % open.len()], &payload)
    };
    while write(held).is_ok() {
        held += 1;
        assert!(held * value.len() < 2 * most.transaction_bytes);
    }
    assert_eq!(write(held), room);
}

#[test]
fn events_of_a_restricted_connection_are_bounded() {
    let (mut s, c) = restricted();
    ask(&mut s, &c, kind::WATCH, 0, "/local/domain/5\0t\0").unwrap();
    for i in 0..crate::restriction::QUOTA.events {
        assert!(!s.is_overrun(c.conn));
        s.write(&format!("/local/domain/5/{i}"), b"").unwrap();
    }
    s.write("/local/domain/5/last", b"").unwrap();
    assert!(s.is_overrun(c.conn));
}

#[test]
fn uuid_that_was_given_up_is_out_of_reach() {
    let (mut s, c) = restricted();
    let name = "/vm/u-5/name\0";
    ask(&mut s, &c, kind::WATCH, 0, "/vm/u-5\0t\0").unwrap();
    assert_eq!(ask(&mut s, &c, kind::READ, 0, name), Ok("five".into()));
    assert!(s.may_enter(c.conn, DomId(5)).is_ok());

    s.change_uuid(DomId(5), "u-away").unwrap();
    assert_eq!(s.read("/vm/u-5"), Err(Error::NoEntry));
    s.add_domain(DomId(7), "u-5", "seven").unwrap();
    assert_eq!(ask(&mut s, &c, kind::READ, 0, name), denied());
    assert_eq!(s.may_enter(c.conn, DomId(5)), Err(Error::Access));
    // Whatever is said of the domain.
    s.write("/local/domain/5/vm", b"/vm/u-5").unwrap();
    assert_eq!(ask(&mut s, &c, kind::READ, 0, name), denied());
    while s.next_message(c.conn).is_some() {}
    s.write("/vm/u-5/name", b"eight").unwrap();
    assert!(!s.has_output(c.conn));
    s.remove_domain(DomId(5));
    assert_eq!(s.read("/vm/u-5/name"), Ok(b"eight".to_vec()));

    assert_eq!(s.change_uuid(DomId(9), "u-9"), Err(Error::NoEntry));
    assert_eq!(s.change_uuid(DomId(7), "u/9"), Err(Error::Invalid));
}

#[test]
fn uuid_that_comes_back_is_in_reach_again() {
    let (mut s, c) = restricted();
    s.change_uuid(DomId(5), "u-away").unwrap();
    s.change_uuid(DomId(5), "u-5").unwrap();
    s.write("/vm/u-5/name", b"five").unwrap();
    let name = ask(&mut s, &c, kind::READ, 0, "/vm/u-5/name\0");
    assert_eq!(name, Ok("five".into()));
    let restored = {
        let mut next = Store::default();
        assert!(s.snapshot().iter().all(|record| next.restore(record)));
        next
    };
    assert_eq!(restored.snapshot(), s.snapshot());
}

#[test]
fn nothing_inside_anothers_path_goes_with_a_domain() {
    let (mut s, c) = restricted();
    for named in [
        "/vm/u-6/name",
        "/vm/u-6",
        "/vm/u-6/",
        "/vm/../libxl",
        "/vm/",
        "/vm",
    ] {
        s.write("/local/domain/5/vm", named.as_bytes()).unwrap();
        s.remove_domain(DomId(5));
        assert_eq!(s.read("/vm/u-6/name"), Ok(b"six".to_vec()), "{named}");
        s.add_domain(DomId(5), "u-5", "five").unwrap();
    }
    ask(
        &mut s,
        &c,
        kind::WRITE,
        0,
        "/local/domain/0/error/backend/vbd/5/e\0v",
    )
    .unwrap();
    s.remove_domain(DomId(5));
    assert_eq!(
        s.read("/local/domain/0/error/backend/vbd/5"),
        Err(Error::NoEntry)
    );
}

#[test]
fn restriction_ends_with_its_domain() {
    let (mut s, c) = restricted();
    ask(&mut s, &c, kind::WATCH, 0, "/local/domain/5\0t\0").unwrap();
    assert_eq!(s.restricted_to(c.conn), Ok(Some(DomId(5))));
    s.end_restricted(DomId(6));
    ask(&mut s, &c, kind::READ, 0, "/local/domain/5/x\0").unwrap();
    s.end_restricted(DomId(5));
    assert_eq!(
        ask(&mut s, &c, kind::READ, 0, "/local/domain/5/x\0"),
        denied()
    );
    assert_eq!(s.restricted_to(c.conn), Err(Error::Access));
    s.release(DomId(5));
    assert_eq!(s.may_enter(c.conn, DomId(5)), Err(Error::Access));
    s.reset(c.conn);
    assert_eq!(
        ask(&mut s, &c, kind::READ, 0, "/local/domain/5/x\0"),
        denied()
    );
}

#[test]
fn restriction_is_to_one_domain_that_is_not_the_hosts() {
    let mut s = Store::default();
    for (domid, uuid) in [
        (0, "u"),
        (5, ""),
        (5, "a/b"),
        (5, ".."),
        (5, &"u".repeat(65)[..]),
    ] {
        let conn = s.connect_restricted(DomId(domid), uuid, "n", Arc::new(|| {}));
        assert_eq!(conn, Err(Error::Invalid), "{domid} {uuid}");
    }
    let c = s
        .connect_restricted(DomId(5), "u", "n", Arc::new(|| {}))
        .unwrap();
    assert_eq!(s.may_enter(c, DomId(6)), Err(Error::Access));
    let plain = client(&mut s, 0);
    assert_eq!(s.may_enter(plain.conn, DomId(6)), Err(Error::Access));
    assert_eq!(s.restricted_to(plain.conn), Ok(None));
}
