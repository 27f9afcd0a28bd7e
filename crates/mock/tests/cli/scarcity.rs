//! What the host lacks for a while: a domain takes commands again when it is there.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::common::{Bench, until};

/// Long enough for what fails to have been tried.
const WHILE: Duration = Duration::from_millis(300);
/// Less than a thread needs for its stack, and more than messages take, in bytes.
const ROOM: u64 = 1 << 20;

/// Limits a domain's process; its limits before, which it gets back by [`restore`].
fn limit(bench: &Bench, domid: u32, resource: Resource, most: u64) -> Rlimit {
    let new = Rlimit {
        current: Some(most),
        maximum: getrlimit(resource).maximum,
    };
    prlimit(Pid::from_raw(bench.pid(domid)), resource, new).expect("its own child")
}

fn restore(bench: &Bench, domid: u32, resource: Resource, before: Rlimit) {
    prlimit(Pid::from_raw(bench.pid(domid)), resource, before).expect("its own child");
}

/// The address space of a domain's process, in bytes.
fn size(bench: &Bench, domid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", bench.pid(domid)));
    let status = status.expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    kib.and_then(|kib| kib.parse::<u64>().ok())
        .expect("a number")
        << 10
}

#[test]
fn domain_without_a_file_for_a_connection_takes_commands_again() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let before = limit(&bench, 1, Resource::Nofile, 3);
    // The kernel has set a file aside for the connection that was waited for.
    let _first = UnixStream::connect(bench.domain_dir(1).join("control.sock"));
    let mut waiting = bench.spawn(&["pause", "one"]);
    thread::sleep(WHILE);
    assert!(waiting.child.try_wait().expect("a child").is_none());
    restore(&bench, 1, Resource::Nofile, before);
    assert_eq!(waiting.wait(), Some(0));
    assert_eq!(bench.row("one").expect("it runs")[4], "--p---");
}

#[test]
fn domain_without_a_thread_for_a_connection_takes_commands_again() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let before = limit(&bench, 1, Resource::As, size(&bench, 1) + ROOM);
    // Threads that have ended have left their stacks to a few that come behind them.
    let mut served = Vec::new();
    let refused = || {
        bench
            .log("one.log")
            .contains("the host has no thread for it")
    };
    until("a connection gets no thread", || {
        let mut stream =
            UnixStream::connect(bench.domain_dir(1).join("control.sock")).expect("it listens");
        stream.set_read_timeout(Some(WHILE)).expect("a socket");
        match stream.read(&mut [0]) {
            Err(fault) if fault.kind() == ErrorKind::WouldBlock => served.push(stream),
            closed => assert_eq!(closed.expect("closed in order"), 0),
        }
        refused()
    });
    // What was refused takes no place, of which there are 32.
    for _ in 0..40 {
        let stream = UnixStream::connect(bench.domain_dir(1).join("control.sock"));
        let length = stream.and_then(|mut stream| stream.read(&mut [0]));
        assert_eq!(length.expect("it is closed without a word"), 0);
    }
    restore(&bench, 1, Resource::As, before);
    bench.ok(&["pause", "one"]);
    assert_eq!(bench.row("one").expect("it runs")[4], "--p---");
}
