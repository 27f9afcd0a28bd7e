//! Commands and domains whose processes are stopped.

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Bench, process_fields, until};

fn signal(bench: &Bench, domid: u32, signal: Signal) {
    signal_process(bench.pid(domid), signal);
}

fn signal_process(pid: i32, signal: Signal) {
    let pid = Pid::from_raw(pid).expect("not 0");
    kill_process(pid, signal).expect("its own child");
    until("it has had the signal", || {
        let state = &process_fields(pid.as_raw_nonzero().get())[0];
        (state == "T") == (signal == Signal::STOP)
    });
}

#[test]
fn lists_go_on_without_domains_that_are_stopped() {
    let bench = Bench::new();
    for name in ["one", "two", "three"] {
        bench.create(name, &[]);
    }
    signal(&bench, 1, Signal::STOP);
    signal(&bench, 2, Signal::STOP);
    for (command, rows) in [
        ("list", &["one", "two", "three"][..]),
        ("vcpu-list", &["three"]),
        ("sched-credit2", &["three"]),
    ] {
        let output = bench.run(&[command]);
        assert_eq!(output.status.code(), Some(0), "{command}");
        let table = String::from_utf8(output.stdout).expect("text");
        let names = table
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        let names: Vec<&str> = names
            .filter(|name| ["one", "two", "three"].contains(name))
            .collect();
        assert_eq!(names, rows, "{command}");
        let said = String::from_utf8(output.stderr).expect("text");
        let (first, second) = (bench.pid(1), bench.pid(2));
        assert_eq!(
            said,
            format!(
                "one: domain 1 does not answer: its process {first} is stopped; `kill -CONT {first}` lets it go on\n\
                 two: domain 2 does not answer: its process {second} is stopped; `kill -CONT {second}` lets it go on\n"
            )
        );
    }
    let said = bench.fails(1, &["vcpu-list", "one"]);
    assert!(said.contains("kill -CONT"), "{said}");
    // One that nobody can ask is killed at once.
    bench.ok(&["destroy", "two"]);
    signal(&bench, 1, Signal::CONT);
    assert!(bench.ok(&["vcpu-list", "one"]).contains("one "));
    assert!(bench.row("two").is_none());
}

#[test]
fn domains_whose_machine_process_is_stopped_are_not_waited_for() {
    let bench = Bench::new();
    for name in ["one", "two"] {
        bench.create(name, &[]);
    }
    let (first, second) = (bench.machine(1), bench.machine(2));
    signal_process(first, Signal::STOP);
    signal_process(second, Signal::STOP);
    let hint = format!(
        "domain 1 does not answer: its process {first} is stopped; `kill -CONT {first}` lets it go on"
    );
    let listed = bench.run(&["list"]);
    assert_eq!(listed.status.code(), Some(0));
    let said = String::from_utf8(listed.stderr).expect("text");
    assert!(said.contains(&hint), "{said}");
    let said = bench.fails(1, &["pause", "one"]);
    assert!(said.contains(&hint), "{said}");
    bench.ok(&["destroy", "two"]);
    signal_process(first, Signal::CONT);
    bench.ok(&["pause", "one"]);
    assert!(bench.row("two").is_none());
}
