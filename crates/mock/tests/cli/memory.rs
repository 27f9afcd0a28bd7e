//! `mem-set`, `mem-max`, and what the lists say of a domain's memory.

use crate::common::{Bench, until};

fn build(bench: &Bench, name: &str) -> (u64, u64) {
    let text = bench.ok(&["list", "-l", name]);
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let kib = |key: &str| json[0]["config"]["b_info"][key].as_u64().expect("a number");
    (kib("max_memkb"), kib("target_memkb"))
}

fn mib(bench: &Bench, name: &str) -> String {
    bench.row(name).expect("it is there")[2].clone()
}

#[test]
fn mem_set_counts_from_now_on_and_for_the_next_start() {
    let bench = Bench::new();
    bench.create("one", &["memory=64", "maxmem=128"]);
    assert_eq!(mib(&bench, "one"), "64");
    assert_eq!(build(&bench, "one"), (128 << 10, 64 << 10));
    for (size, kib) in [
        ("96", 96 << 10),
        ("0m", 0),
        ("100000k", 100_000),
        ("134217728B", 128 << 10),
        ("112M", 112 << 10),
    ] {
        bench.ok(&["mem-set", "one", size]);
        assert_eq!(build(&bench, "one"), (128 << 10, kib), "{size}");
        assert_eq!(mib(&bench, "one"), (kib >> 10).to_string());
    }
    bench.ok(&["rename", "one", "other"]);
    bench.ok(&["reboot", "other"]);
    until("it runs again", || {
        bench.row("other").is_some_and(|row| row[1] == "2")
    });
    assert_eq!(mib(&bench, "other"), "112");
    // A new configuration has its own, and less at most.
    let kernel = format!("kernel='{}'", bench.path("kernel").display());
    let new = [
        "config-update",
        "other",
        "/dev/null",
        "name='x'",
        &kernel,
        "memory=80",
        "maxmem=100",
    ];
    bench.ok(&new);
    assert_eq!(build(&bench, "other"), (128 << 10, 112 << 10));
    bench.ok(&["mem-set", "other", "120"]);
    bench.ok(&["reboot", "other"]);
    until("it runs again", || {
        bench.row("other").is_some_and(|row| row[1] == "3")
    });
    assert_eq!(build(&bench, "other"), (100 << 10, 100 << 10));
}

#[test]
fn mem_set_and_mem_max_say_what_is_wrong() {
    let bench = Bench::new();
    bench.create("one", &["memory=64", "maxmem=128"]);
    let cases: &[(i32, &[&str], &str)] = &[
        (
            1,
            &["mem-set", "one", "129"],
            "cannot set domid 1 dynamic max memory to : 129: ",
        ),
        (1, &["mem-set", "one", "12x"], "invalid memory size: 12x"),
        (2, &["mem-max", "one", "-5"], "not supported"),
        (1, &["mem-max", "one", "5 m"], "invalid memory size: 5 m"),
        (
            1,
            &["mem-set", "two", "64"],
            "two is an invalid domain identifier",
        ),
        (1, &["mem-max", "0", "64"], "Domain-0 is the host itself"),
        (2, &["mem-set", "one"], "mem-set"),
        (2, &["mem-max"], "mem-max"),
        (1, &["-N", "mem-set", "one", "64"], "-N"),
    ];
    for (status, arguments, part) in cases {
        let said = bench.fails(*status, arguments);
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
    assert_eq!(build(&bench, "one"), (128 << 10, 64 << 10));
    bench.ok(&["mem-max", "one", "1g"]);
    assert_eq!(build(&bench, "one"), (128 << 10, 64 << 10));
    assert!(
        bench
            .log("one.console.log")
            .contains("memory at most 1048576")
    );
}

#[test]
fn mem_set_cannot_take_what_others_were_promised() {
    let bench = Bench::new();
    bench.create("one", &["memory=64", "maxmem=128"]);
    let claims = |bench: &Bench| -> u64 {
        let text = bench.ok(&["info", "outstanding_claims"]);
        text.trim().parse().expect("a number")
    };
    assert_eq!(claims(&bench), 64);
    // All that the host of these domains has.
    bench.create("two", &["memory=1048500"]);
    let said = bench.fails(1, &["mem-set", "one", "100"]);
    assert!(
        said.contains("others may take 1099431936000 bytes"),
        "{said}"
    );
    assert_eq!(
        (mib(&bench, "one").as_str(), claims(&bench)),
        ("64", 1_048_564)
    );
    bench.ok(&["mem-set", "two", "1000"]);
    assert_eq!(claims(&bench), 1064);
    bench.ok(&["mem-set", "one", "100"]);
    assert_eq!(claims(&bench), 1100);
}

#[test]
fn mem_set_of_paused_and_ended_domains_is_taken() {
    let bench = Bench::new();
    bench.create(
        "one",
        &["memory=64", "maxmem=128", "on_poweroff='preserve'"],
    );
    bench.ok(&["pause", "one"]);
    bench.ok(&["mem-set", "one", "80"]);
    assert_eq!(mib(&bench, "one"), "80");
    bench.ok(&["unpause", "one"]);
    bench.ok(&["shutdown", "-w", "one"]);
    bench.ok(&["mem-set", "one", "90"]);
    assert_eq!(build(&bench, "one"), (128 << 10, 90 << 10));
    assert_eq!(bench.ok(&["info", "outstanding_claims"]), "0\n");
    bench.ok(&["destroy", "one"]);
}
