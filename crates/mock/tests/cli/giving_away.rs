//! Domains that move, at the moment when they change hands.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use crate::common::{Bench, said, until};
use crate::migrating::{Mover, bench_with, names, receive};

/// A running domain that starts again after a crash, whose end nobody is told of yet.
fn lingering() -> (Bench, PathBuf) {
    let bench = Bench::new();
    bench.create("one", &["on_crash='restart'"]);
    bench.tell("one", "hello");
    let lingering = bench.path("kernel.lingering");
    fs::write(&lingering, "").expect("writable");
    (bench, lingering)
}

fn crash(bench: &Bench, name: &str) {
    let mut console = bench.spawn(&["console", name]);
    console.send("crash\n");
    until("it has crashed", || said(bench, "lingers") > 0);
}

#[test]
fn domain_that_has_ended_is_not_given_away() {
    let (bench, lingering) = lingering();
    let mut mover = Mover::new(&bench, 1);
    mover.configuration();
    mover.rest();
    crash(&bench, "one");
    mover.say("\"give-away\"");
    let answer = mover.hear();
    assert!(answer.contains("it has ended meanwhile"), "{answer}");
    fs::remove_file(&lingering).expect("it was there");
    until("it starts again here", || {
        bench
            .row("one")
            .is_some_and(|row| row[1] == "2" && row[4] == "-b----")
    });
    assert_eq!(names(&bench), ["one"]);
    assert_eq!(said(&bench, "taken again"), 0, "the next start has it");
    drop(mover);
    // One that is destroyed as well.
    let mut mover = Mover::new(&bench, 2);
    mover.configuration();
    mover.rest();
    fs::write(&lingering, "").expect("writable");
    let mut destroying = bench.spawn(&["destroy", "one"]);
    until("it is destroyed", || said(&bench, "lingers") > 1);
    mover.say("\"give-away\"");
    let answer = mover.hear();
    assert!(answer.contains("it has ended meanwhile"), "{answer}");
    fs::remove_file(&lingering).expect("it was there");
    assert_eq!(destroying.wait(), Some(0));
    assert!(names(&bench).is_empty());
}

#[test]
fn domain_that_ends_when_it_was_given_away_does_not_start_again() {
    for held in [false, true] {
        let (bench, lingering) = lingering();
        let mut mover = Mover::new(&bench, 1);
        mover.configuration();
        mover.rest();
        mover.say("\"give-away\"");
        assert!(mover.hear().contains("done"));
        if held {
            drop(mover);
            until("it is held", || {
                bench
                    .row("one--migratedaway")
                    .is_some_and(|row| row[4] == "--p---")
            });
        }
        crash(&bench, "one--migratedaway");
        fs::remove_file(&lingering).expect("it was there");
        until("it has ended", || {
            bench.log("one.log").contains("Exiting now")
        });
        assert!(names(&bench).is_empty());
    }
}

#[test]
fn what_cannot_be_shown_stops_no_guest() {
    let bench = bench_with("hello");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let full = fs::OpenOptions::new().write(true).open("/dev/full");
    for (id, nowhere) in [(2, Stdio::from(writer)), (3, full.expect("there").into())] {
        let mut command = bench.command();
        command.args(["migrate", "--debug", "-s", "", "one", &receive()]);
        let status = command.stderr(nowhere).status();
        assert_eq!(status.expect("it runs").code(), Some(0));
        assert_eq!(names(&bench), ["one"]);
        let row = bench.row("one").expect("it runs");
        assert_eq!((&row[1][..], &row[4][..]), (&id.to_string()[..], "-b----"));
    }
    bench.ok(&["destroy", "one"]);
}

#[test]
fn change_that_had_to_wait_is_not_made_to_a_domain_that_leaves() {
    let bench = bench_with("hello");
    let taken = bench.path("kernel.taken");
    fs::write(&taken, "").expect("writable");
    let moment = || std::thread::sleep(Duration::from_millis(200));
    let mut attaching = bench.spawn(&["block-attach", "one", "/img/slow,raw,xvdb,w"]);
    moment();
    let changes = [
        &["rename", "one", "two"][..],
        &["mem-set", "one", "32"],
        &["network-attach", "one"],
    ];
    let mut waiting: Vec<_> = changes.iter().map(|change| bench.spawn(change)).collect();
    moment();
    let before = std::thread::scope(|scope| {
        // It is answered when it has the domain for itself.
        let moving = scope.spawn(|| {
            let mut mover = Mover::new(&bench, 1);
            mover.configuration();
            mover
        });
        moment();
        fs::remove_file(&taken).expect("it was there");
        moving.join().expect("no panic")
    });
    assert_eq!(attaching.wait(), Some(0));
    for (change, command) in changes.iter().zip(&mut waiting) {
        assert_eq!(command.wait(), Some(1), "{change:?}");
    }
    assert_eq!(names(&bench), ["one"]);
    assert_eq!(said(&bench, "memory 32"), 0);
    drop(before);
}

#[test]
fn guest_that_ends_by_itself_is_said_to_have_done_so() {
    for (line, on, sentence) in [
        ("reboot", "restart", "it has started again as domain"),
        ("poweroff", "destroy", "the domain has ended here as well"),
        ("poweroff", "preserve", "the domain has shut down here"),
    ] {
        let bench = Bench::new();
        bench.create("one", &[&format!("on_{line}='{on}'")]);
        bench.tell("one", "hello");
        let (begun, gate) = (bench.path("begun"), bench.path("gate"));
        // Before the other side says that it would take it.
        let command = format!(
            "touch {}; until test -e {}; do sleep 0.05; done; {}",
            begun.display(),
            gate.display(),
            receive()
        );
        let fault = std::thread::scope(|scope| {
            let moving = scope.spawn(|| bench.fails(1, &["migrate", "-s", "", "one", &command]));
            until("it is to move", || begun.exists());
            let mut console = bench.spawn(&["console", "one"]);
            console.send(&format!("{line}\n"));
            until("it has ended", || {
                bench.log("one.log").contains("has shut down")
            });
            fs::write(&gate, "").expect("writable");
            moving.join().expect("no panic")
        });
        assert!(fault.contains(sentence), "{line}, {on}: {fault}");
    }
}
