//! Core files: of a domain that runs, of one that has crashed, and of one that cannot give any.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;

use crate::common::{Bench, Session, until};

/// A domain that has heard a line.
fn bench_with(line: &str, settings: &[&str]) -> (Bench, String) {
    let bench = Bench::new();
    bench.create("one", settings);
    bench.tell("one", line);
    let path = bench.path("core").display().to_string();
    (bench, path)
}

/// What the core file of a guest holds that has heard a line.
fn content(line: &str) -> Vec<u8> {
    let mut bytes = line.as_bytes().to_vec();
    bytes.resize(1 << 20, 0);
    bytes.extend([7; 4096]);
    bytes.resize(2 << 20, 0);
    bytes
}

/// Has the guest end by this line; its console, which is to be kept until it has heard that.
fn end(bench: &Bench, line: &str) -> Session {
    let mut console = bench.spawn(&["console", "one"]);
    console.send(&format!("{line}\n"));
    console
}

#[test]
fn core_is_there_when_it_is_complete_and_the_domain_runs_on() {
    let (bench, path) = bench_with("hello", &[]);
    fs::write(&path, "older").expect("writable");
    let said = bench.fails(0, &["dump-core", "one", &path]);
    assert!(said.contains("Dumped 0 MiB"), "{said}");
    assert!(fs::read(&path).expect("there") == content("hello"));
    let file = fs::metadata(&path).expect("there");
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    assert!(file.blocks() * 512 < 1 << 20, "what is zero takes room");
    assert_eq!(bench.row("one").expect("it runs")[4], "-b----");
    // A pipe has no holes.
    let mut command = bench.command();
    command.args(["dump-core", "one", "/dev/stdout"]);
    let child = command.stdout(Stdio::piped()).spawn();
    let mut child = child.expect("it can be started");
    let mut bytes = Vec::new();
    let pipe = child.stdout.as_mut().expect("piped");
    pipe.read_to_end(&mut bytes).expect("readable");
    assert!(child.wait().expect("a child").success());
    assert!(bytes == content("hello"));
    let log = bench.log("one.log");
    assert_eq!(log.matches("The core is dumped").count(), 2, "{log}");
}

#[test]
fn core_that_cannot_be_had_leaves_the_file_as_it_was() {
    let (bench, path) = bench_with("broken", &[]);
    fs::write(&path, "older").expect("writable");
    let fault = bench.fails(1, &["dump-core", "one", &path]);
    assert!(fault.contains("its log says why"), "{fault}");
    assert!(bench.log("one.log").contains("it is broken"));
    assert_eq!(fs::read(&path).expect("there"), b"older");
    let files = fs::read_dir(bench.path("")).expect("there");
    let mut names = files.map(|file| file.expect("readable").file_name());
    assert!(!names.any(|name| name.as_encoded_bytes().starts_with(b".")));
    let fault = bench.fails(1, &["dump-core", "one", "/nowhere/core"]);
    assert!(
        fault.contains("cannot write /nowhere/core: No such file"),
        "{fault}"
    );
    bench.tell("one", "hello");
    let fault = bench.fails(1, &["dump-core", "one", "/dev/full"]);
    assert!(fault.contains("No space left"), "{fault}");
    assert!(
        bench
            .fails(1, &["dump-core", "two", &path])
            .contains("no such domain")
    );
    assert!(
        bench
            .fails(1, &["dump-core", "0", &path])
            .contains("the host itself")
    );
    bench.fails(2, &["dump-core", "one"]);
    assert_eq!(bench.row("one").expect("it runs")[4], "-b----");
}

#[test]
fn core_of_a_crashed_guest_is_written_before_what_comes_behind_it() {
    for (event, action, goes_on) in [
        ("crash", "coredump-restart", true),
        ("crash", "coredump-destroy", false),
        ("watchdog", "coredump-restart", true),
        ("reboot", "coredump-destroy", false),
    ] {
        let settings = format!("on_{event}='{action}'");
        let (bench, _) = bench_with("hello", &[&settings]);
        let _console = end(&bench, event);
        let core = bench.path("dump/one");
        until("what comes behind it", || match bench.row("one") {
            Some(row) => goes_on && row[1] == "2",
            None => !goes_on,
        });
        assert!(fs::read(&core).expect("there") == content("hello"));
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&core), mode(&bench.path("dump"))), (0o600, 0o700));
        let log = bench.log("one.log");
        assert!(
            log.contains("Dumping core to ") && log.contains("The core is dumped"),
            "{log}"
        );
    }
}

#[test]
fn core_that_cannot_be_written_keeps_nothing_from_its_restart() {
    let (bench, _) = bench_with("hello", &["on_crash='coredump-restart'"]);
    fs::write(bench.path("dump"), "").expect("writable");
    let _console = end(&bench, "crash");
    until("it starts anew", || {
        bench.row("one").is_some_and(|row| row[1] == "2")
    });
    let log = bench.log("one.log");
    assert!(log.contains("The core is not dumped: "), "{log}");
    let (bench, path) = bench_with("hello", &["on_crash='preserve'"]);
    let _console = end(&bench, "crash");
    until("it has crashed", || {
        bench.row("one").is_some_and(|row| row[4] == "---sc-")
    });
    bench.ok(&["dump-core", "one", &path]);
    assert!(fs::read(&path).expect("there") == content("hello"));
    bench.ok(&["destroy", "one"]);
}
