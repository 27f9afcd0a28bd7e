//! Destroying a domain at the worst moments: success means that it does not come back.

use std::fs::File;
use std::process::{Child, Stdio};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Bench, Control, REBOOT, until};

const DESTROY: &str = r#"{"op":"destroy"}"#;

#[test]
fn destroy_that_comes_while_the_domain_gets_its_next_id_ends_it() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let mut control = Control::open(&bench, 1);
    let mut other = Control::open(&bench, 1);
    // The next id cannot be given as long as this is held.
    let registry = File::open(bench.path("run/lock")).expect("there");
    flock(&registry, FlockOperation::LockExclusive).expect("a file");
    control.send(REBOOT);
    assert!(control.answer().contains("done"));
    until("the domain is about to be restarted", || {
        bench.log("one.log").contains("Rebooting now")
    });
    control.send(DESTROY);
    until("the request is obeyed", || {
        other.send(r#"{"op":"info"}"#);
        other.answer().contains("\"dying\":true")
    });
    drop(registry);
    assert!(control.answer().contains("done"));
    assert_eq!(bench.row("one"), None);
    assert!(!bench.log("one.log").contains("(domid 2)"));
}

#[test]
fn destroy_that_comes_behind_the_next_id_is_not_said_to_be_done() {
    let bench = Bench::new();
    bench.create("one", &[]);
    // Accepted while the domain had its old id, which it keeps alive for a while.
    let mut late = Control::open(&bench, 1);
    let mut waiting = Control::open(&bench, 1);
    waiting.send(r#"{"op":"wait","until":"death"}"#);
    bench.ok(&["reboot", "one"]);
    let ended = waiting.answer();
    assert!(ended.contains("\"next\":2"), "{ended}");
    late.send(DESTROY);
    assert_eq!(late.answer(), "");
    until("the domain is there again", || {
        bench.row("one").is_some_and(|row| row[1] == "2")
    });
    bench.ok(&["destroy", "one"]);
    assert_eq!(bench.row("one"), None);
}

#[test]
fn destroy_with_all_connections_in_use_fails_and_says_why() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let open: Vec<Control> = (0..32).map(|_| Control::open(&bench, 1)).collect();
    for command in ["destroy", "pause", "shutdown"] {
        let said = bench.fails(1, &[command, "one"]);
        assert!(said.contains("32 connections"), "{command}: {said}");
    }
    // It is listed as it was made.
    assert_eq!(bench.row("one").expect("listed")[1..3], ["1", "64"]);
    drop(open);
    until("the connections are free again", || {
        bench.run(&["destroy", "one"]).status.success()
    });
    assert_eq!(bench.row("one"), None);
}

#[test]
fn destroy_that_comes_before_the_domain_is_ready_ends_it() {
    let bench = Bench::new();
    std::fs::write(bench.path("kernel.unready"), "").expect("writable");
    let arguments = bench.creation("one", &["-q"]);
    let creating = bench
        .command()
        .args(&arguments)
        .stderr(Stdio::piped())
        .spawn();
    let creating = creating.expect("the program can be started");
    until("it can be asked", || {
        bench.domain_dir(1).join("control.sock").exists()
    });
    bench.ok(&["destroy", "one"]);
    assert_eq!(bench.row("one"), None);
    let ended = creating.wait_with_output().expect("a child");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(3), "{said}");
    assert!(said.contains("it has ended before it was ready"), "{said}");
}

#[test]
fn destroy_that_comes_before_the_domain_is_ready_to_start_again_ends_it() {
    let bench = Bench::new();
    let mut creating = bench.spawn(&bench.creation("one", &["-q", "-c"]));
    creating.expect("mock guest ready");
    std::fs::write(bench.path("kernel.unready"), "").expect("writable");
    creating.send("reboot\n");
    until("it can be asked", || {
        bench.domain_dir(2).join("control.sock").exists()
    });
    bench.ok(&["destroy", "one"]);
    assert_eq!(bench.row("one"), None);
    // That is what was asked for.
    assert_eq!(creating.wait(), Some(0));
}

/// A command that makes a domain which is not there as long as there is the file `kernel.unbuilt`.
fn making(bench: &Bench, arguments: &[String], domid: u32) -> Child {
    std::fs::write(bench.path("kernel.unbuilt"), "").expect("writable");
    let mut command = bench.command();
    let making = command.args(arguments).stderr(Stdio::piped()).spawn();
    let making = making.expect("the program can be started");
    until("the domain is listed", || {
        bench.domain_dir(domid).join("domain.json").exists()
    });
    making
}

/// What it said, and its exit status.
fn end_of(command: Child) -> (Option<i32>, String) {
    let ended = command.wait_with_output().expect("a child");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    (ended.status.code(), said)
}

#[test]
fn destroy_of_a_domain_that_is_being_made_gives_it_up() {
    let bench = Bench::new();
    let creating = making(&bench, &bench.creation("one", &["-q"]), 1);
    // It has nothing to say yet, and keeps nobody waiting.
    assert_eq!(bench.row("one").expect("listed")[1..3], ["1", "64"]);
    bench.ok(&["destroy", "one"]);
    assert!(!bench.domain_dir(1).exists());
    let (status, said) = end_of(creating);
    assert_eq!(status, Some(3), "{said}");
    let expected = "the domain was destroyed before it was there";
    assert!(said.contains(expected), "{said}");
    let log = bench.log("one.log");
    assert!(!log.contains("killed"), "{log}");
    // Its name is free.
    std::fs::remove_file(bench.path("kernel.unbuilt")).expect("there");
    bench.create("one", &[]);
}

#[test]
fn destroy_of_a_domain_that_is_being_restored_gives_it_up() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let file = bench.path("saved").display().to_string();
    bench.ok(&["save", "one", &file]);
    let arguments = ["restore", &file].map(String::from);
    let restoring = making(&bench, &arguments, 2);
    bench.ok(&["destroy", "2"]);
    assert_eq!(bench.row("one"), None);
    let (status, said) = end_of(restoring);
    assert_ne!(status, Some(0), "{said}");
    assert!(said.contains("destroyed before it was there"), "{said}");
}

#[test]
fn destroy_of_a_domain_that_is_made_anew_is_its_end() {
    let bench = Bench::new();
    let mut creating = bench.spawn(&bench.creation("one", &["-q", "-c"]));
    creating.expect("mock guest ready");
    std::fs::write(bench.path("kernel.unbuilt"), "").expect("writable");
    creating.send("reboot\n");
    until("it has its next id", || {
        bench.domain_dir(2).join("domain.json").exists()
    });
    bench.ok(&["destroy", "one"]);
    assert_eq!(bench.row("one"), None);
    // That is what was asked for.
    assert_eq!(creating.wait(), Some(0));
}

#[test]
fn destroy_kills_a_domain_that_is_being_made_and_is_stopped() {
    let bench = Bench::new();
    let creating = making(&bench, &bench.creation("one", &["-q"]), 1);
    let pid = Pid::from_raw(bench.pid(1)).expect("not 0");
    kill_process(pid, Signal::STOP).expect("its own child");
    bench.ok(&["destroy", "one"]);
    assert!(!bench.domain_dir(1).exists());
    let (status, said) = end_of(creating);
    assert_eq!(status, Some(3), "{said}");
}

#[test]
fn signal_to_a_domain_that_is_being_made_gives_it_up() {
    let bench = Bench::new();
    let creating = making(&bench, &bench.creation("one", &["-q"]), 1);
    let pid = Pid::from_raw(bench.pid(1)).expect("not 0");
    kill_process(pid, Signal::TERM).expect("its own child");
    let (status, said) = end_of(creating);
    assert_eq!(status, Some(3), "{said}");
    assert!(!bench.domain_dir(1).exists());
}

#[test]
fn signal_to_a_domain_that_is_not_ready_ends_it() {
    let bench = Bench::new();
    std::fs::write(bench.path("kernel.unready"), "").expect("writable");
    let mut command = bench.command();
    command.args(bench.creation("one", &["-q"]));
    let creating = command.stderr(Stdio::piped()).spawn().expect("a program");
    until("it can be asked", || {
        bench.domain_dir(1).join("control.sock").exists()
    });
    let pid = Pid::from_raw(bench.pid(1)).expect("not 0");
    kill_process(pid, Signal::TERM).expect("its own child");
    let (status, said) = end_of(creating);
    assert_eq!(status, Some(3), "{said}");
    assert!(said.contains("it has ended before it was ready"), "{said}");
    assert!(!bench.domain_dir(1).exists());
}

#[test]
fn commands_for_a_domain_that_is_being_made_say_so() {
    let bench = Bench::new();
    let creating = making(&bench, &bench.creation("one", &["-q"]), 1);
    let said = bench.fails(1, &["shutdown", "one"]);
    assert!(said.contains("domain 1 is still being made"), "{said}");
    std::fs::remove_file(bench.path("kernel.unbuilt")).expect("there");
    assert_eq!(end_of(creating).0, Some(0));
    bench.ok(&["shutdown", "-w", "one"]);
}
