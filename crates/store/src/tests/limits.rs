//! What a connection may not have without bound.

use super::*;

#[test]
fn quotas_end_with_enospc() {
    let mut s = populated();
    let g = client(&mut s, 5);
    let mut last = Ok(String::new());
    let mut made = 0;
    for i in 0..1000 {
        last = ask(
            &mut s,
            &g,
            kind::WRITE,
            0,
            &format!("data/{}/{i}\0", i % 10),
        );
        made += usize::from(last.is_ok());
    }
    assert_eq!(last, Err("ENOSPC".into()));
    assert!((900..1000).contains(&made));
    let id = ask(&mut s, &g, kind::TRANSACTION_START, 0, "\0").unwrap();
    let id = id.trim_end_matches('\0').parse().unwrap();
    assert_eq!(
        ask(&mut s, &g, kind::WRITE, id, "data/more\0"),
        Err("ENOSPC".into())
    );
    ask(&mut s, &g, kind::RM, id, "data/1\0").unwrap();
    assert!(ask(&mut s, &g, kind::WRITE, id, "data/more\0").is_ok());
    ask(&mut s, &g, kind::TRANSACTION_END, id, "T\0").unwrap();
    let big = format!("data/more\0{}", "x".repeat(2045));
    assert_eq!(ask(&mut s, &g, kind::WRITE, 0, &big), Err("ENOSPC".into()));
    for i in 0..128 {
        ask(&mut s, &g, kind::WATCH, 0, &format!("data\0{i}\0")).unwrap();
    }
    assert_eq!(
        ask(&mut s, &g, kind::WATCH, 0, "data\0last\0"),
        Err("ENOSPC".into())
    );
    for _ in 0..10 {
        ask(&mut s, &g, kind::TRANSACTION_START, 0, "\0").unwrap();
    }
    assert_eq!(
        ask(&mut s, &g, kind::TRANSACTION_START, 0, "\0"),
        Err("ENOSPC".into())
    );
}

#[test]
fn event_longer_than_a_message_is_left_out() {
    let mut s = populated();
    let g = client(&mut s, 5);
    let token = "t".repeat(wire::PAYLOAD_MAX - "data/x".len() - 2);
    ask(&mut s, &g, kind::WATCH, 0, &format!("data\0{token}\0")).unwrap();
    assert_eq!(events(&mut s, &g), [format!("data {token}")]);
    ask(&mut s, &g, kind::WRITE, 0, "data/x\0").unwrap();
    assert_eq!(events(&mut s, &g), [format!("data/x {token}")]);
    ask(&mut s, &g, kind::WRITE, 0, "data/xy\0").unwrap();
    assert!(events(&mut s, &g).is_empty());
    ask(&mut s, &g, kind::WRITE, 0, "data/x\0").unwrap();
    assert_eq!(events(&mut s, &g).len(), 1);
}

#[test]
fn directory_part_pages_through_a_large_directory() {
    let mut s = populated();
    let h = client(&mut s, 0);
    let names: Vec<String> = (0..900).map(|i| format!("child-{i:05}")).collect();
    for n in &names {
        s.write(&format!("/big/{n}"), b"").unwrap();
    }
    assert_eq!(
        ask(&mut s, &h, kind::DIRECTORY, 0, "/big\0"),
        Err("E2BIG".into())
    );
    let (mut got, mut offset) = (String::new(), 0);
    loop {
        let part = ask(
            &mut s,
            &h,
            kind::DIRECTORY_PART,
            0,
            &format!("/big\0{offset}\0"),
        )
        .unwrap();
        let (_, names) = part.split_once('\0').unwrap();
        if let Some(last) = names.strip_suffix("\0\0") {
            got += last;
            got += "\0";
            break;
        }
        offset += names.len();
        got += names;
    }
    let want: String = names.iter().map(|n| format!("{n}\0")).collect();
    assert_eq!(got, want);
    assert_eq!(
        ask(&mut s, &h, kind::DIRECTORY_PART, 0, "/big\099999\0"),
        Err("EINVAL".into())
    );
}

#[test]
fn unfetched_events_are_merged_and_bounded() {
    let mut s = populated();
    let g = client(&mut s, 5);
    ask(&mut s, &g, kind::WATCH, 0, "data\0t\0").unwrap();
    events(&mut s, &g);
    for _ in 0..100 {
        s.write("/local/domain/5/data", b"x").unwrap();
    }
    assert_eq!(events(&mut s, &g), ["data t"]);
    for i in 0..1500 {
        let path = format!("/local/domain/5/data/{i}");
        put(&mut s, &path, "", &Perms::owned(DomId(5)));
    }
    assert_eq!(events(&mut s, &g).len(), 1024);
}

#[test]
fn unfetched_replies_stop_input() {
    let mut s = populated();
    let g = client(&mut s, 5);
    for i in 0..20 {
        assert!(s.accepts_input(g.conn), "{i}");
        s.input(g.conn, &wire::encode(kind::READ, i, 0, b"name\0"))
            .unwrap();
    }
    assert!(!s.accepts_input(g.conn));
    assert_eq!(drain(&mut s, &g).len(), 20);
    assert!(s.accepts_input(g.conn));
}

#[test]
fn message_too_long_ends_the_connection() {
    let mut s = populated();
    let g = client(&mut s, 5);
    let mut bad = wire::encode(kind::READ, 1, 0, b"name\0");
    bad[12..16].copy_from_slice(&4097u32.to_le_bytes());
    assert_eq!(
        s.input(g.conn, &bad),
        Err(ProtocolError::TooLong { len: 4097 })
    );
    s.reset(g.conn);
    assert!(ask(&mut s, &g, kind::READ, 0, "name\0").is_ok());
    s.disconnect(g.conn);
    assert_eq!(s.input(g.conn, b"x"), Err(ProtocolError::Closed));
}

#[test]
fn host_connection_that_never_reads_is_overrun() {
    let mut s = populated();
    let h = client(&mut s, 0);
    ask(&mut s, &h, kind::WATCH, 0, "/\0t\0").unwrap();
    for i in 0..17000 {
        assert_eq!(s.is_overrun(h.conn), i > 16383, "{i}");
        s.write(&format!("/flood/{}/{i}", i % 200), b"").unwrap();
    }
    // What was merged or fetched counts nothing.
    let other = client(&mut s, 0);
    ask(&mut s, &other, kind::WATCH, 0, "/\0t\0").unwrap();
    for _ in 0..20000 {
        s.write("/flood/1", b"").unwrap();
    }
    assert!(!s.is_overrun(other.conn));
}

#[test]
fn control_shows_and_sets_quotas() {
    let mut s = populated();
    let (g, h) = (client(&mut s, 5), client(&mut s, 0));
    let control = |s: &mut Store, text: &str| ask(s, &h, kind::CONTROL, 0, text);
    assert!(control(&mut s, "help\0").unwrap().contains("quota"));
    assert!(control(&mut s, "quota\0").unwrap().contains("1000"));
    control(&mut s, "quota\0set\0watches\x001\0").unwrap();
    ask(&mut s, &g, kind::WATCH, 0, "data\0a\0").unwrap();
    assert_eq!(
        ask(&mut s, &g, kind::WATCH, 0, "data\0b\0"),
        Err("ENOSPC".into())
    );
    let usage = control(&mut s, "quota\x005\0").unwrap();
    assert!(usage.contains("watches             :        1"), "{usage}");
    control(&mut s, "print\0hello\0").unwrap();
    assert_eq!(s.take_notices(), ["hello"]);
    for bad in [
        "quota\0set\0nothing\x001\0",
        "quota\0set\0outstanding\x000\0",
        "live-update\0-s\0",
        "help",
    ] {
        assert_eq!(control(&mut s, bad), Err("EINVAL".into()), "{bad}");
    }
    for good in ["check\0", "memreport\0"] {
        assert!(control(&mut s, good).is_ok(), "{good}");
    }
}

fn start(s: &mut Store, g: &Client) -> u32 {
    let id = ask(s, g, kind::TRANSACTION_START, 0, "\0").unwrap();
    id.trim_end_matches('\0').parse().unwrap()
}

#[test]
fn transactions_hold_a_bounded_number_of_bytes() {
    const MOST: usize = 1 << 20;
    let mut s = populated();
    let g = client(&mut s, 5);
    let ids: Vec<u32> = (0..10).map(|_| start(&mut s, &g)).collect();
    let home = "/local/domain/5/";
    let long = "x".repeat(3000);
    let mut held = 0;
    for id in &ids {
        for number in 0..2000 {
            let path = format!("{home}{number}{long}\0");
            match ask(&mut s, &g, kind::READ, *id, &path) {
                Err(e) if e == "ENOENT" => held += path.len(),
                answer => {
                    assert_eq!(answer, Err("ENOSPC".into()));
                    break;
                }
            }
        }
    }
    assert!((MOST / 4..MOST).contains(&held), "{held}");
    // Outside of them, and after the end of one, everything goes on.
    ask(&mut s, &g, kind::WRITE, 0, "data/x\0v").unwrap();
    ask(&mut s, &g, kind::TRANSACTION_END, ids[0], "F\0").unwrap();
    ask(&mut s, &g, kind::WRITE, ids[1], "data/x\0w").unwrap();
    ask(&mut s, &g, kind::TRANSACTION_END, ids[1], "T\0").unwrap();
}

#[test]
fn values_in_transactions_count_for_their_bytes() {
    let mut s = populated();
    let g = client(&mut s, 5);
    let mut held = 0;
    let mut last = Ok(String::new());
    for _ in 0..10 {
        let id = start(&mut s, &g);
        for number in 0..50 {
            ask(&mut s, &g, kind::WRITE, id, &format!("data/{number}\0")).unwrap();
        }
        // Only now they grow.
        for number in 0..50 {
            let value = "v".repeat(2000);
            last = ask(
                &mut s,
                &g,
                kind::WRITE,
                id,
                &format!("data/{number}\0{value}"),
            );
            held += if last.is_ok() { 2000 } else { 0 };
        }
    }
    assert_eq!(last, Err("ENOSPC".into()));
    assert!((800_000..1 << 20).contains(&held), "{held}");
}

#[test]
fn transaction_over_many_ordinary_nodes_commits() {
    let mut s = populated();
    let g = client(&mut s, 5);
    let id = start(&mut s, &g);
    let value = "v".repeat(40);
    for number in 0..950 {
        let node = format!("data/{}/{number}\0{value}", number % 10);
        ask(&mut s, &g, kind::WRITE, id, &node).unwrap();
    }
    ask(&mut s, &g, kind::TRANSACTION_END, id, "T\0").unwrap();
    let id = start(&mut s, &g);
    for number in 0..1000 {
        let _ = ask(
            &mut s,
            &g,
            kind::READ,
            id,
            &format!("data/{}/{number}\0", number % 10),
        );
    }
    ask(&mut s, &g, kind::WRITE, id, "data/1/1\0w").unwrap();
    ask(&mut s, &g, kind::TRANSACTION_END, id, "T\0").unwrap();
}
