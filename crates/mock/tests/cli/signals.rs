//! A domain process that is asked to end, as by systemd when the host shuts down.

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Bench, until};

fn signal(bench: &Bench, id: u32, signal: Signal) {
    let pid = Pid::from_raw(bench.pid(id)).expect("a pid");
    kill_process(pid, signal).expect("it lives");
}

/// Waits until the domain has taken itself out of the host: no command has a part in it.
fn ends(bench: &Bench, id: u32) {
    until("the domain has ended", || !bench.domain_dir(id).exists());
}

fn wait_log(bench: &Bench, name: &str, line: &str) {
    until(&format!("{name} has {line:?}"), || {
        bench.log(name).contains(line)
    });
}

#[test]
fn term_shuts_the_guest_down_for_good() {
    for request in [Signal::TERM, Signal::INT] {
        let bench = Bench::new();
        bench.create("one", &["on_poweroff='restart'"]);
        signal(&bench, 1, request);
        ends(&bench, 1);
        wait_log(&bench, "one.log", "Done. Exiting now");
        let log = bench.log("one.log");
        assert!(
            log.contains("Domain 1 has shut down, reason code 0"),
            "{log}"
        );
        assert_eq!(bench.row("one"), None);
        assert!(!bench.domain_dir(2).exists(), "it has come back: {log}");
    }
}

#[test]
fn term_destroys_a_deaf_guest_after_its_time() {
    let bench = Bench::new();
    bench.create("one", &["extra='deaf'"]);
    // The session it was started from is gone: that is no request.
    signal(&bench, 1, Signal::HUP);
    signal(&bench, 1, Signal::TERM);
    wait_log(&bench, "one.console.log", "I hear nothing");
    assert_eq!(bench.row("one").expect("it has time")[1], "1");
    ends(&bench, 1);
    wait_log(&bench, "one.log", "Done. Exiting now");
    let log = bench.log("one.log");
    assert!(log.contains("has not shut down within 2 seconds"), "{log}");
    assert!(log.contains("Domain 1 has been destroyed"), "{log}");
}

#[test]
fn term_again_destroys_the_domain_at_once() {
    let bench = Bench::new();
    bench.create("one", &["extra='deaf'"]);
    signal(&bench, 1, Signal::TERM);
    wait_log(&bench, "one.console.log", "I hear nothing");
    signal(&bench, 1, Signal::TERM);
    ends(&bench, 1);
    let log = bench.log("one.log");
    assert!(log.contains("asked to end again"), "{log}");
    assert!(!log.contains("within 2 seconds"), "{log}");
}

#[test]
fn term_ends_paused_and_preserved_domains_too() {
    let bench = Bench::new();
    let mut arguments = bench.creation("paused", &["-p", "-q"]);
    arguments.push("on_poweroff='preserve'".into());
    bench.ok(&arguments);
    bench.create("kept", &["on_poweroff='preserve'"]);
    bench.ok(&["shutdown", "-w", "kept"]);
    for id in [1, 2] {
        signal(&bench, id, Signal::TERM);
        ends(&bench, id);
    }
    let log = bench.log("paused.log");
    assert!(
        log.contains("Domain 1 has shut down, reason code 0"),
        "{log}"
    );
}

#[test]
fn term_between_two_starts_keeps_the_domain_from_coming_back() {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.ok(&["reboot", "one"]);
    // Whether it is waiting or being built.
    wait_log(&bench, "one.log", "Action for shutdown reason code 1");
    signal(&bench, 1, Signal::TERM);
    wait_log(&bench, "one.log", "Done. Exiting now");
    assert_eq!(bench.row("one"), None);
}
