//! Guests that are asked to shut down, and take their time or do not listen.

use std::process::Stdio;

use crate::common::{Bench, until, until_said};

/// The guest shuts down when it is told to on its console, and not when it is asked to.
const SLOW: &str = "extra='slow'";
const DEAF: &str = "extra='deaf'";

#[test]
fn shutdown_of_a_guest_that_does_not_listen_fails_and_says_so() {
    let bench = Bench::new();
    bench.create("one", &[DEAF]);
    for command in [
        &["shutdown", "one"][..],
        &["shutdown", "-w", "one"],
        &["shutdown", "-F", "one"],
        &["shutdown", "-a", "-w", "-w"],
        &["reboot", "one"],
        &["reboot", "-w", "one"],
    ] {
        let said = bench.fails(1, command);
        assert!(
            said.contains("domain 1 ") && said.contains("hears nothing"),
            "{command:?}: {said}"
        );
    }
    until_said(&bench, "I hear nothing", 6);
    assert_eq!(bench.row("one").expect("listed")[4], "-b----");
}

#[test]
fn shutdown_wait_has_no_end_once_the_guest_has_acknowledged() {
    let bench = Bench::new();
    bench.create("one", &[SLOW]);
    // Without -w that is all that is waited for.
    bench.ok(&["shutdown", "one"]);
    let mut waiting = bench.spawn(&["shutdown", "-w", "one"]);
    until_said(&bench, "I shall", 2);
    assert_eq!(waiting.child.try_wait().expect("a child"), None);
    let mut console = bench.spawn(&["console", "one"]);
    console.send("poweroff\n");
    assert_eq!(waiting.wait(), Some(0));
    assert_eq!(bench.row("one"), None);
}

#[test]
fn shutdown_of_all_asks_all_before_one_is_waited_for() {
    let bench = Bench::new();
    bench.create("one", &[SLOW]);
    bench.create("two", &[SLOW]);
    let unheard = bench.path("kernel.unheard");
    std::fs::write(&unheard, "").expect("writable");
    let mut asking = bench.spawn(&["shutdown", "-a"]);
    for log in ["one.console.log", "two.console.log"] {
        until("it is asked", || bench.log(log).contains("I shall"));
    }
    assert_eq!(asking.child.try_wait().expect("a child"), None);
    std::fs::remove_file(&unheard).expect("there");
    assert_eq!(asking.wait(), Some(0));
}

#[test]
fn shutdown_of_all_waits_for_those_that_listen() {
    let bench = Bench::new();
    bench.create("deaf", &[DEAF]);
    bench.create("slow", &[SLOW]);
    let mut command = bench.command();
    command.args(["shutdown", "-a", "-w"]);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    let waiting = command.spawn().expect("the program can be started");
    until("it is asked", || {
        bench.log("slow.console.log").contains("I shall")
    });
    let mut console = bench.spawn(&["console", "slow"]);
    console.send("poweroff\n");
    let ended = waiting.wait_with_output().expect("a child");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    for part in [
        "hears nothing",
        "Waiting for 1 domains",
        "Domain 2 has been shut down, reason code 0",
    ] {
        assert!(said.contains(part), "{part:?} in {said}");
    }
    assert_eq!(bench.row("slow"), None);
    assert_eq!(bench.row("deaf").expect("listed")[4], "-b----");
}

#[test]
fn shutdown_that_is_given_up_leaves_its_connection_to_others() {
    let bench = Bench::new();
    bench.create("one", &[SLOW]);
    let unheard = bench.path("kernel.unheard");
    std::fs::write(&unheard, "").expect("writable");
    // More than a domain has connections.
    for times in 1..=40 {
        let _asking = bench.spawn(&["shutdown", "one"]);
        until_said(&bench, "I shall", times);
    }
    bench.ok(&["destroy", "one"]);
    assert_eq!(bench.row("one"), None);
}
