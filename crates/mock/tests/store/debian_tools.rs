//! Debian's `xenstore-*` against the process.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use hospes_store::wire::{self, kind};
use hospes_store::{HEADER_BYTES, StoreAccess};

use crate::common::{Bench, GIVE_UP, wait_until};

#[test]
fn tools_write_read_list_and_remove() {
    let bench = Bench::new();
    bench.create("web");
    bench.told("write", &["/tool/x", "hello", "/tool/y/z", "deep"]);
    assert_eq!(
        bench.told("read", &["/tool/x", "/tool/y/z"]),
        "hello\ndeep\n"
    );
    assert!(bench.run_tool("exists", &["/tool/x"]).status.success());
    assert!(
        !bench
            .run_tool("exists", &["/tool/nothing"])
            .status
            .success()
    );
    assert!(!bench.run_tool("read", &["/tool/nothing"]).status.success());
    bench.told("chmod", &["/tool/x", "n0", "r5"]);
    let listing = bench.told("ls", &["-fp", "/tool"]);
    assert!(
        listing.contains("/tool/x = \"hello\"   (n0,r5)"),
        "{listing}"
    );
    assert_eq!(bench.told("list", &["/tool"]), "x\nxenstored\ny\n");
    bench.told("rm", &["/tool/y"]);
    assert!(!bench.run_tool("exists", &["/tool/y/z"]).status.success());
    let tree = bench.told("ls", &[]);
    assert!(tree.contains("name = \"web\""), "{tree}");
}

#[test]
fn tools_list_what_does_not_fit_into_a_message() {
    let bench = Bench::new();
    bench.create("web");
    let names: Vec<String> = (0..600).map(|i| format!("a-longer-name-{i:04}")).collect();
    for names in names.chunks(100) {
        let paths = names.iter().map(|n| format!("/tool/many/{n}"));
        let arguments: Vec<String> = paths.flat_map(|p| [p, "v".to_owned()]).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        bench.told("write", &arguments);
    }
    let listed = bench.told("list", &["/tool/many"]);
    assert_eq!(listed.lines().collect::<Vec<_>>(), names);
    let client = bench.client();
    let listed = client.list("/tool/many");
    assert_eq!(listed.expect("there"), names);
}

#[test]
fn watch_tool_hears_of_changes() {
    let bench = Bench::new();
    bench.create("web");
    let mut watch = bench
        .tool("watch", &["-n", "3", "/tool/watched"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("xenstore-utils is installed");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    let mut next = || lines.next().expect("a line").expect("text");
    assert_eq!(next(), "/tool/watched");
    bench.told("write", &["/tool/watched/a", "1"]);
    assert_eq!(next(), "/tool/watched/a");
    bench.told("rm", &["/tool/watched"]);
    assert_eq!(next(), "/tool/watched");
    assert!(watch.wait().expect("ends").success());
}

/// `xenstore-control` itself comes with the programs of one version of Xen.
#[test]
fn control_request_is_answered() {
    let bench = Bench::new();
    bench.create("web");
    let mut stream = UnixStream::connect(bench.place().socket()).expect("it listens");
    for (command, answer) in [("help\0", kind::CONTROL), ("live-update\0", kind::ERROR)] {
        let request = wire::encode(kind::CONTROL, 0, 0, command.as_bytes());
        stream.write_all(&request).expect("sent");
        let mut reply = vec![0; HEADER_BYTES];
        stream.read_exact(&mut reply).expect("a header");
        assert_eq!(reply[..4], answer.to_le_bytes(), "{command:?}");
        let length = u32::from_le_bytes([reply[12], reply[13], reply[14], reply[15]]);
        stream
            .read_exact(&mut vec![0; length as usize])
            .expect("the rest");
    }
}

#[test]
fn domains_come_and_go_with_their_entries() {
    let bench = Bench::new();
    bench.create("a");
    bench.create("b");
    assert_eq!(bench.told("list", &["/local/domain"]), "0\n1\n2\n");
    let vm = bench.told("read", &["/local/domain/1/vm"]);
    let names = ["/local/domain/1/name", &format!("{}/name", vm.trim())];
    assert_eq!(bench.told("read", &names), "a\na\n");
    bench.hospes(&["rename", "a", "c"]);
    assert_eq!(bench.told("read", &names), "c\nc\n");
    bench.told("write", &["/local/domain/0/backend/vbd/1/51712/state", "4"]);
    bench.hospes(&["destroy", "c"]);
    // The command returns when the domain is gone, and so are its entries.
    for gone in [
        vm.trim(),
        "/local/domain/1",
        "/libxl/1",
        "/local/domain/0/backend/vbd/1",
    ] {
        assert!(
            !bench.run_tool("exists", &[gone]).status.success(),
            "{gone}"
        );
    }
    rustix::process::kill_process(bench.pid(2), rustix::process::Signal::KILL).expect("it lives");
    wait_until("the killed domain is out of the store", || {
        bench.told("list", &["/local/domain"]) == "0\n"
    });
}

#[test]
fn watchers_hear_of_a_domain_that_shuts_down() {
    let bench = Bench::new();
    let client = bench.client();
    let (sender, told) = channel();
    let sender = Mutex::new(sender);
    let listener = move |_: &str| sender.lock().expect("no panics").send(()).expect("heard");
    let watch = client.watch("@releaseDomain", Arc::new(listener));
    let hears = |what| told.recv_timeout(GIVE_UP).expect(what);
    hears("the first event");
    bench.create_with("a", "on_poweroff='preserve'");
    for _ in 0..2 {
        bench.hospes(&["save", "-c", "a", &bench.file("saved")]);
        hears("it was suspended");
    }
    bench.hospes(&["shutdown", "a"]);
    hears("it has shut down");
    assert!(client.read("/local/domain/1/name").is_ok());
    bench.hospes(&["destroy", "a"]);
    hears("it is gone");
    drop(watch);
    assert!(told.recv().is_err());
}

#[test]
fn entries_of_a_domain_that_died_with_the_store_are_removed() {
    let bench = Bench::new();
    bench.create("a");
    let store = bench.store_pid().expect("it runs");
    let domain = bench.pid(1);
    rustix::process::kill_process(store, rustix::process::Signal::STOP).expect("it lives");
    rustix::process::kill_process(domain, rustix::process::Signal::KILL).expect("it lives");
    rustix::process::kill_process(store, rustix::process::Signal::KILL).expect("it lives");
    // Starts another.
    let client = bench.client();
    wait_until("the domain is out of the store", || {
        client.list("/local/domain").is_ok_and(|l| l == ["0"])
    });
}
