//! Domains that are kept under another name while a new one takes their place.

use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use crate::common::{Bench, Control, Session, until};

/// Has the guest end in this way, on its console.
fn end(bench: &Bench, name: &str, line: &str) -> Session {
    let mut console = bench.spawn(&["console", name]);
    console.send(&format!("{line}\n"));
    console
}

fn until_id(bench: &Bench, name: &str, id: &str) {
    until("the new domain is there", || {
        bench.row(name).is_some_and(|row| row[1] == id)
    });
}

/// Whether somebody is connected to a domain's control socket.
fn is_connected_to(bench: &Bench, id: u32) -> bool {
    const CONNECTED: &str = "03";
    let socket = bench.domain_dir(id).join("control.sock");
    let sockets = std::fs::read_to_string("/proc/net/unix").expect("Linux has it");
    sockets.lines().any(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        columns.get(5) == Some(&CONNECTED) && columns.get(7) == socket.to_str().as_ref()
    })
}

/// A command that creates a domain and stays with it.
fn foreground(bench: &Bench, name: &str) -> Child {
    let mut command = bench.command();
    command.args(bench.creation(name, &["-q", "-F"]));
    command.arg("on_crash='rename-restart'");
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    let foreground = command.spawn().expect("the program can be started");
    until("it runs", || {
        bench.row(name).is_some_and(|row| row[4] == "-b----")
    });
    foreground
}

/// Its exit status and what it said.
fn outcome(mut foreground: Child) -> (Option<i32>, String) {
    until("the command ends", || {
        foreground.try_wait().expect("a child").is_some()
    });
    let ended = foreground.wait_with_output().expect("a child");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    (ended.status.code(), said)
}

#[test]
fn end_renamed_keeps_the_old_domain_under_another_name() {
    let bench = Bench::new();
    bench.create("twin", &["on_crash='rename-restart'"]);
    let mut console = bench.spawn(&["console", "twin"]);
    console.expect("mock guest ready");
    console.send("crash\n");
    until("the new domain is there", || {
        bench.row("twin").is_some_and(|row| row[1] == "2")
    });
    let table = bench.ok(&["list"]);
    let old = table
        .lines()
        .find(|line| line.starts_with("twin-2"))
        .expect("kept");
    let columns: Vec<&str> = old.split_whitespace().collect();
    assert_eq!((columns[1], columns[4]), ("1", "---sc-"));
    assert_ne!(bench.pid(1), bench.pid(2));
}

#[test]
fn end_renamed_rests_before_the_new_domain_starts() {
    let bench = Bench::new();
    bench.create("twin", &["on_poweroff='rename-restart'"]);
    bench.ok(&["shutdown", "twin"]);
    until("a request meets the rest", || {
        let asked = bench.run(&["reboot", "twin"]);
        String::from_utf8_lossy(&asked.stderr).contains("is about to start again")
    });
    // It means all of it.
    bench.ok(&["destroy", "twin"]);
    assert_eq!(bench.ok(&["list"]).lines().count(), 2);
}

#[test]
fn create_foreground_follows_the_new_domain() {
    let bench = Bench::new();
    let foreground = foreground(&bench, "twin");
    let _console = end(&bench, "twin", "crash");
    until_id(&bench, "twin", "2");
    // It goes on as any other.
    bench.ok(&["reboot", "twin"]);
    // One that ends before the command has found it counts as lost.
    until("the command has found it", || is_connected_to(&bench, 3));
    bench.ok(&["shutdown", "-w", "-w", "twin"]);
    let (status, said) = outcome(foreground);
    assert_eq!(status, Some(0), "{said}");
    let table = bench.ok(&["list"]);
    assert!(table.lines().any(|line| line.starts_with("twin-2")));
}

#[test]
fn create_foreground_fails_where_no_domain_takes_its_place() {
    // The first time, or when the one that has come behind it is to start again.
    for (line, last) in [("crash", "domain 1 "), ("reboot", "domain 3 ")] {
        let bench = Bench::new();
        let foreground = foreground(&bench, "twin");
        let _kept = (line == "reboot").then(|| {
            let console = end(&bench, "twin", "crash");
            until_id(&bench, "twin", "2");
            console
        });
        std::fs::rename(bench.path("kernel"), bench.path("away")).expect("there");
        let _console = end(&bench, "twin", line);
        let (status, said) = outcome(foreground);
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains(last), "{last:?} in {said}");
        let table = bench.ok(&["list"]);
        assert!(table.lines().any(|line| line.starts_with("twin-2")));
    }
}

#[test]
fn change_that_waits_while_the_domain_gets_another_name_is_refused() {
    let bench = Bench::new();
    bench.create("twin", &["on_crash='rename-restart'"]);
    let mut console = bench.spawn(&["console", "twin"]);
    console.expect("mock guest ready");
    let mut control = Control::open(&bench, 1);
    control.send(r#"{"op":"info"}"#);
    assert!(control.answer().contains("info"));
    let registry = bench.hold_registry();
    console.send("crash\n");
    until("it is about to get its name", || {
        bench.log("twin.log").contains("Preserving domain 1")
    });
    control.send(r#"{"op":"rename","name":"other"}"#);
    // It is read and waits, of which nothing is to be seen.
    thread::sleep(Duration::from_secs(1));
    drop(registry);
    let answer = control.answer();
    assert!(answer.contains("about to start again"), "{answer}");
    until_id(&bench, "twin", "2");
    let table = bench.ok(&["list"]);
    assert!(table.lines().any(|line| line.starts_with("twin-2")));
}

#[test]
fn end_renamed_waits_for_the_registry_however_long_it_is_held() {
    let bench = Bench::new();
    bench.create("twin", &["on_crash='rename-restart'"]);
    let mut console = bench.spawn(&["console", "twin"]);
    console.expect("mock guest ready");
    let registry = bench.hold_registry();
    console.send("crash\n");
    until("it has not got the registry", || {
        let log = bench.log("twin.log");
        ["waits until it can be written down", "cannot be renamed"]
            .iter()
            .any(|line| log.contains(line))
    });
    drop(registry);
    until_id(&bench, "twin", "2");
}
