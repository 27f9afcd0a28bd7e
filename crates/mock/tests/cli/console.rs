//! The console through pipes and through a terminal.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};

use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use crate::common::{Bench, until};
use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

#[test]
fn create_console_through_pipes_talks_to_the_guest() {
    let bench = Bench::new();
    let mut console = bench.spawn(&bench.creation("one", &["-c", "-q"]));
    console.expect("mock guest ready\n");
    console.send("hello\n");
    console.expect("echo: hello\n");
    console.send("poweroff\n");
    assert_eq!(console.wait(), Some(0));
    assert_eq!(bench.row("one"), None);
}

#[test]
fn console_at_the_end_of_its_input_goes_on_with_the_output() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let mut silent = bench.spawn(&["console", "one"]);
    silent.expect("mock guest ready");
    silent.stdin = None;
    let mut talking = bench.spawn(&["console", "one"]);
    talking.expect("mock guest ready");
    talking.send("hello\n");
    silent.expect("echo: hello");
    bench.ok(&["destroy", "one"]);
    assert_eq!(silent.wait(), Some(0));
    assert_eq!(talking.wait(), Some(0));
}

#[test]
fn console_leaves_with_its_key_and_the_domain_stays() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let mut console = bench.spawn(&["console", "-t", "pv", "-n", "0", "one"]);
    console.expect("mock guest ready");
    console.send("hello\n\x1dpoweroff\n");
    assert_eq!(console.wait(), Some(0));
    until("what was typed before it has arrived", || {
        bench.log("one.console.log").contains("echo: hello")
    });
    assert!(bench.row("one").is_some());
}

#[test]
fn console_that_is_not_read_does_not_stop_the_guest() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let mut lazy =
        UnixStream::connect(bench.domain_dir(1).join("console.sock")).expect("it listens");
    lazy.write_all(b"flood\n").expect("it listens");
    until("all is printed", || {
        bench.log("one.console.log").contains("flooded")
    });
    let mut console = bench.spawn(&["console", "one"]);
    console.expect("flooded");
    // From now on it reads: what was kept for it comes before the end, what was not is named.
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        lazy.read_to_end(&mut text).expect("readable");
        text
    });
    console.send("poweroff\n");
    assert_eq!(console.wait(), Some(0));
    let text = reader.join().expect("the reader ends");
    let text = String::from_utf8_lossy(&text);
    assert!(text.contains("bytes of output are missing here"));
    assert!(text.contains("flooded"));
}

#[test]
fn console_of_no_domain_or_kind_is_refused() {
    let bench = Bench::new();
    let said = bench.fails(1, &["console", "nobody"]);
    assert!(
        said.contains("nobody is an invalid domain identifier"),
        "{said}"
    );
    bench.create("one", &[]);
    assert!(
        bench
            .fails(1, &["console", "-t", "serial", "one"])
            .contains("no serial console")
    );
    assert!(
        bench
            .fails(1, &["console", "-n", "1", "one"])
            .contains("no console 1")
    );
    bench.fails(1, &["console", "-t", "video", "one"]);
}

/// Both ends of a new terminal.
fn terminal() -> (File, File) {
    let controller =
        openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
    grantpt(&controller).expect("ours");
    unlockpt(&controller).expect("ours");
    let name = ptsname(&controller, Vec::new())
        .expect("a name")
        .into_string()
        .expect("text");
    let user = OpenOptions::new()
        .read(true)
        .write(true)
        .open(name)
        .expect("the other end");
    (File::from(controller), user)
}

fn is_line_mode(terminal: &File) -> bool {
    tcgetattr(terminal)
        .expect("a terminal")
        .local_modes
        .contains(LocalModes::ICANON | LocalModes::ECHO)
}

#[test]
fn create_console_on_a_terminal_is_raw_and_gives_it_back() {
    let bench = Bench::new();
    let (mut controller, user) = terminal();
    let mut child = bench
        .command()
        .args(bench.creation("one", &["-c", "-q"]))
        .stdin(user.try_clone().expect("open"))
        .stdout(user.try_clone().expect("open"))
        .spawn()
        .expect("the program can be started");
    let output = crate::common::read_in_thread(controller.try_clone().expect("open"));
    let mut seen = String::new();
    until("the guest is ready", || {
        seen.extend(output.try_iter());
        seen.contains("mock guest ready")
    });
    assert!(!is_line_mode(&user));
    // Interrupt and end of file belong to the guest.
    controller.write_all(b"a\x03b\x04c\r").expect("it listens");
    until("the guest got every key", || {
        seen.extend(output.try_iter());
        seen.contains("echo: a\x03b\x04c")
    });
    controller.write_all(b"\x1d").expect("it listens");
    let mut status = None;
    until("the command has left", || {
        status = child.try_wait().expect("a child");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(0));
    assert!(is_line_mode(&user));
    drop((controller, user));
    assert!(bench.row("one").is_some());
}

#[test]
fn console_that_a_signal_ends_gives_the_terminal_back() {
    let bench = Bench::new();
    bench.create("one", &[]);
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        let (controller, user) = terminal();
        let mut child = bench
            .command()
            .args(["console", "one"])
            .stdin(user.try_clone().expect("open"))
            .stdout(user.try_clone().expect("open"))
            .spawn()
            .expect("the program can be started");
        until("the terminal is raw", || !is_line_mode(&user));
        kill_process(Pid::from_child(&child), signal).expect("it lives");
        let status = child.wait().expect("a child");
        assert_eq!(status.signal(), Some(signal.as_raw()));
        assert!(is_line_mode(&user));
        drop(controller);
    }
}

#[test]
fn console_waits_for_an_output_that_does_not_block() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::NONBLOCK).expect("a pipe");
    // Full, so that nothing goes into it.
    while rustix::io::write(&writer, &[b'.'; 4096]).is_ok() {}
    let mut child = bench
        .command()
        .args(["console", "one"])
        .stdin(Stdio::piped())
        .stdout(writer)
        .spawn()
        .expect("the program can be started");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(child.try_wait().expect("a child"), None);
    rustix::fs::fcntl_setfl(&reader, OFlags::empty()).expect("a pipe");
    let output = crate::common::read_in_thread(File::from(reader));
    let mut seen = String::new();
    until("the guest is seen", || {
        seen.extend(output.try_iter());
        seen.contains("mock guest ready")
    });
    child.kill().expect("it lives");
    child.wait().expect("a child");
}
