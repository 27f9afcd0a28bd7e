//! Watches, and who hears of which change: as in Xen since XSA-115.

use super::*;

fn read_only() -> Perms {
    Perms::read_only(DomId(5))
}

fn hidden() -> Perms {
    Perms::owned(DomId::HOST)
}

/// A store in which domain 5 watches two directories, one of which it may read.
fn watched() -> (Store, Client) {
    let mut s = populated();
    put(&mut s, "/open", "", &read_only());
    put(&mut s, "/closed", "", &hidden());
    let g = client(&mut s, 5);
    for path in ["/open", "/closed"] {
        ask(&mut s, &g, kind::WATCH, 0, &format!("{path}\0t\0")).unwrap();
    }
    events(&mut s, &g);
    (s, g)
}

#[test]
fn watch_gives_the_first_event_and_then_changes() {
    let mut s = populated();
    let g = client(&mut s, 5);
    ask(&mut s, &g, kind::WATCH, 0, "control/shutdown\0tok\0").unwrap();
    assert_eq!(events(&mut s, &g), ["control/shutdown tok"]);
    assert_eq!(
        ask(&mut s, &g, kind::WATCH, 0, "control/shutdown\0tok\0"),
        Err("EEXIST".into())
    );
    s.write("/local/domain/5/control/shutdown", b"poweroff")
        .unwrap();
    assert_eq!(events(&mut s, &g), ["control/shutdown tok"]);
    ask(&mut s, &g, kind::WATCH, 0, "/local/domain/5/device\0d\0").unwrap();
    assert_eq!(events(&mut s, &g), ["/local/domain/5/device d"]);
    let state = "/local/domain/5/device/vbd/1/state";
    put(&mut s, state, "1", &Perms::owned(DomId(5)));
    assert_eq!(events(&mut s, &g), ["/local/domain/5/device/vbd/1/state d"]);
    ask(&mut s, &g, kind::UNWATCH, 0, "control/shutdown\0tok\0").unwrap();
    assert_eq!(
        ask(&mut s, &g, kind::UNWATCH, 0, "control/shutdown\0tok\0"),
        Err("ENOENT".into())
    );
    s.write("/local/domain/5/control/shutdown", b"").unwrap();
    assert!(events(&mut s, &g).is_empty());
}

#[test]
fn watch_below_a_removed_node_hears_of_it() {
    let mut s = populated();
    let g = client(&mut s, 5);
    ask(&mut s, &g, kind::WRITE, 0, "data/a/b\0v").unwrap();
    ask(&mut s, &g, kind::WATCH, 0, "data/a/b\0t\0").unwrap();
    ask(&mut s, &g, kind::WATCH, 0, "data\0u\0").unwrap();
    events(&mut s, &g);
    s.remove("/local/domain/5/data/a").unwrap();
    assert_eq!(events(&mut s, &g), ["data/a/b t", "data/a u"]);
}

#[test]
fn special_watches_are_for_domain_0() {
    let mut s = populated();
    let (g, h) = (client(&mut s, 5), client(&mut s, 0));
    for c in [&g, &h] {
        ask(&mut s, c, kind::WATCH, 0, "@releaseDomain\0t\0").unwrap();
        assert_eq!(events(&mut s, c), ["@releaseDomain t"]);
    }
    let backend = "/local/domain/0/backend/vbd/5/51712/state";
    put(&mut s, backend, "2", &Perms::read_only(DomId(5)));
    put(&mut s, "/shared", "", &Perms::read_only(DomId(5)));
    s.remove_domain(DomId(5));
    assert!(events(&mut s, &g).is_empty());
    assert_eq!(events(&mut s, &h), ["@releaseDomain t"]);
    assert_eq!(
        ask(&mut s, &h, kind::IS_DOMAIN_INTRODUCED, 0, "5\0"),
        Ok("F\0".into())
    );
    for gone in [
        "/local/domain/5",
        "/vm/u-5",
        "/libxl/5",
        "/local/domain/0/backend/vbd/5",
    ] {
        assert_eq!(s.read(gone), Err(Error::NoEntry), "{gone}");
    }
    assert_eq!(
        ask(&mut s, &h, kind::GET_PERMS, 0, "/shared\0"),
        Ok("n0\0".into())
    );
}

#[test]
fn node_that_becomes_unreadable_or_readable_is_heard_of() {
    let (mut s, g) = watched();
    put(&mut s, "/closed/n", "", &read_only());
    assert_eq!(events(&mut s, &g), ["/closed/n t"]);
    s.set_perms("/closed/n", hidden()).unwrap();
    assert_eq!(events(&mut s, &g), ["/closed/n t"]);
    s.write("/closed/n", b"v").unwrap();
    s.set_perms("/closed/n", hidden()).unwrap();
    assert!(events(&mut s, &g).is_empty());
    s.set_perms("/closed/n", read_only()).unwrap();
    assert_eq!(events(&mut s, &g), ["/closed/n t"]);

    let host = client(&mut s, 0);
    let id = transaction(&mut s, &host);
    for perms in ["r0", "n0"] {
        let payload = format!("/closed/n\0{perms}\0");
        ask(&mut s, &host, kind::SET_PERMS, id, &payload).unwrap();
    }
    ask(&mut s, &host, kind::TRANSACTION_END, id, "T\0").unwrap();
    assert_eq!(events(&mut s, &g), ["/closed/n t"]);
}

#[test]
fn unreadable_node_is_heard_of_where_its_parent_is_readable() {
    let (mut s, g) = watched();
    s.write("/open/n", b"").unwrap();
    s.set_perms("/open/n", hidden()).unwrap();
    events(&mut s, &g);
    s.write("/open/n", b"v").unwrap();
    assert_eq!(events(&mut s, &g), ["/open/n t"]);
    s.write("/open/n/below", b"").unwrap();
    s.write("/open/n/below", b"v").unwrap();
    assert!(events(&mut s, &g).is_empty());
    s.remove("/open/n").unwrap();
    assert_eq!(events(&mut s, &g), ["/open/n t"]);
}

#[test]
fn node_that_goes_is_heard_of_by_its_permissions_or_its_parents() {
    let (mut s, g) = watched();
    put(&mut s, "/closed/a", "", &read_only());
    put(&mut s, "/closed/a/b", "", &hidden());
    put(&mut s, "/closed/a/b/c", "", &hidden());
    for path in ["/closed/a/b", "/closed/a/b/c"] {
        ask(&mut s, &g, kind::WATCH, 0, &format!("{path}\0u\0")).unwrap();
    }
    events(&mut s, &g);
    s.remove("/closed/a").unwrap();
    assert_eq!(events(&mut s, &g), ["/closed/a/b u", "/closed/a t"]);
}

#[test]
fn node_that_goes_in_a_transaction_is_heard_of_by_its_own_permissions() {
    let (mut s, g) = watched();
    s.write("/open/hidden", b"").unwrap();
    s.set_perms("/open/hidden", hidden()).unwrap();
    put(&mut s, "/closed/seen", "", &read_only());
    events(&mut s, &g);
    let host = client(&mut s, 0);
    ask(&mut s, &host, kind::WATCH, 0, "/open\0t\0").unwrap();
    events(&mut s, &host);
    let id = transaction(&mut s, &host);
    for path in ["/open/hidden", "/closed/seen"] {
        ask(&mut s, &host, kind::RM, id, &format!("{path}\0")).unwrap();
    }
    // What comes and goes within it was never there.
    ask(&mut s, &host, kind::MKDIR, id, "/open/passing\0").unwrap();
    ask(&mut s, &host, kind::RM, id, "/open/passing\0").unwrap();
    ask(&mut s, &host, kind::TRANSACTION_END, id, "T\0").unwrap();
    assert_eq!(events(&mut s, &g), ["/closed/seen t"]);
    assert_eq!(events(&mut s, &host), ["/open/hidden t"]);
}

#[test]
fn node_that_goes_and_comes_back_in_a_transaction_is_heard_of_once() {
    let (mut s, g) = watched();
    put(&mut s, "/open/a/b", "", &read_only());
    ask(&mut s, &g, kind::WATCH, 0, "/open/a/b\0u\0").unwrap();
    events(&mut s, &g);
    let host = client(&mut s, 0);
    let id = transaction(&mut s, &host);
    ask(&mut s, &host, kind::RM, id, "/open/a\0").unwrap();
    ask(&mut s, &host, kind::WRITE, id, "/open/a/b\0v").unwrap();
    ask(&mut s, &host, kind::TRANSACTION_END, id, "T\0").unwrap();
    let heard = ["/open/a/b t", "/open/a/b u", "/open/a t"];
    assert_eq!(events(&mut s, &g), heard);
}

#[test]
fn domain_is_heard_of_when_it_is_introduced() {
    let mut s = populated();
    let h = client(&mut s, 0);
    for path in ["@introduceDomain", "@releaseDomain"] {
        ask(&mut s, &h, kind::WATCH, 0, &format!("{path}\0t\0")).unwrap();
    }
    events(&mut s, &h);
    let is_introduced = |s: &mut Store| ask(s, &h, kind::IS_DOMAIN_INTRODUCED, 0, "7\0").unwrap();
    s.add_domain(DomId(7), "u-7", "seven").unwrap();
    assert!(events(&mut s, &h).is_empty());
    assert_eq!(is_introduced(&mut s), "F\0");
    let mut restored = Store::default();
    assert!(s.snapshot().iter().all(|record| restored.restore(record)));
    assert_eq!(restored.snapshot(), s.snapshot());
    s.introduce(DomId(7));
    s.introduce(DomId(7));
    assert_eq!(events(&mut s, &h), ["@introduceDomain t"]);
    assert_eq!(is_introduced(&mut s), "T\0");
    s.remove_domain(DomId(7));
    assert_eq!(events(&mut s, &h), ["@releaseDomain t"]);
    // One that has ended before is nobody's business.
    s.add_domain(DomId(7), "u-7", "seven").unwrap();
    s.remove_domain(DomId(7));
    assert!(events(&mut s, &h).is_empty());
}

#[test]
fn domain_that_shuts_down_is_heard_of_and_once_more_when_it_goes() {
    let mut s = populated();
    let h = client(&mut s, 0);
    ask(&mut s, &h, kind::WATCH, 0, "@releaseDomain\0t\0").unwrap();
    events(&mut s, &h);
    let heard = ["@releaseDomain t"];
    s.shut_down(DomId(5));
    assert_eq!(events(&mut s, &h), heard);
    let mut restored = Store::default();
    assert!(s.snapshot().iter().all(|record| restored.restore(record)));
    assert_eq!(restored.snapshot(), s.snapshot());
    s.shut_down(DomId(5));
    assert!(events(&mut s, &h).is_empty());
    let introduced = ask(&mut s, &h, kind::IS_DOMAIN_INTRODUCED, 0, "5\0");
    assert_eq!(introduced, Ok("T\0".into()));
    // A domain that was suspended and goes on may shut down again.
    ask(&mut s, &h, kind::RESUME, 0, "5\0").unwrap();
    assert!(events(&mut s, &h).is_empty());
    s.shut_down(DomId(5));
    assert_eq!(events(&mut s, &h), heard);
    s.remove_domain(DomId(5));
    assert_eq!(events(&mut s, &h), heard);
    s.add_domain(DomId(7), "u-7", "seven").unwrap();
    s.shut_down(DomId(7));
    s.shut_down(DomId(8));
    assert!(events(&mut s, &h).is_empty());
}

#[test]
fn special_watches_are_for_those_whom_domain_0_lets_have_them() {
    let mut s = populated();
    s.start_recording();
    let (g, h) = (client(&mut s, 5), client(&mut s, 0));
    let perms = |list: &str| format!("@releaseDomain\0{list}");
    let get = "@releaseDomain\0";
    ask(&mut s, &g, kind::WATCH, 0, "@releaseDomain\0t\0").unwrap();
    events(&mut s, &g);
    assert_eq!(ask(&mut s, &h, kind::GET_PERMS, 0, get), Ok("n0\0".into()));
    let denied = Err("EACCES".to_owned());
    assert_eq!(ask(&mut s, &g, kind::GET_PERMS, 0, get), denied);
    assert_eq!(
        ask(&mut s, &g, kind::SET_PERMS, 0, &perms("n0\0r5\0")),
        denied
    );
    ask(&mut s, &h, kind::SET_PERMS, 0, &perms("n0\0r5\0")).unwrap();
    assert_eq!(
        ask(&mut s, &g, kind::GET_PERMS, 0, get),
        Ok("n0\0r5\0".into())
    );
    // To be told is not to say who else is.
    assert_eq!(ask(&mut s, &g, kind::SET_PERMS, 0, &perms("b5\0")), denied);
    s.introduce(DomId(6));
    assert!(events(&mut s, &g).is_empty());
    s.release(DomId(6));
    assert_eq!(events(&mut s, &g), ["@releaseDomain t"]);
    let mut restored = Store::default();
    assert!(s.snapshot().iter().all(|record| restored.restore(record)));
    assert_eq!(restored.snapshot(), s.snapshot());
    let allowed = Record::Node {
        path: "@releaseDomain".into(),
        value: Vec::new(),
        perms: Perms::read_only(DomId(5)),
    };
    assert!(s.take_records().contains(&allowed) && s.snapshot().contains(&allowed));
    // Whoever gets the number next has to be let in anew.
    s.remove_domain(DomId(5));
    assert!(events(&mut s, &g).is_empty());
    assert_eq!(ask(&mut s, &h, kind::GET_PERMS, 0, get), Ok("n0\0".into()));
    // Its owner may set them as well.
    ask(&mut s, &h, kind::SET_PERMS, 0, &perms("n6\0")).unwrap();
    let o = client(&mut s, 6);
    let many = perms(&format!("n6\0{}", "r1\0".repeat(5)));
    assert_eq!(
        ask(&mut s, &o, kind::SET_PERMS, 0, &many),
        Err("ENOSPC".into())
    );
    ask(&mut s, &o, kind::SET_PERMS, 0, &perms("r6\0")).unwrap();
    for path in ["@releaseDomain", "@introduceDomain", "@other"] {
        let bad = ask(&mut s, &h, kind::SET_PERMS, 0, &format!("{path}\0x0\0"));
        assert_eq!(bad, Err("EINVAL".into()));
        let read = ask(&mut s, &h, kind::READ, 0, &format!("{path}\0"));
        assert_eq!(read, Err("EINVAL".into()));
    }
}
