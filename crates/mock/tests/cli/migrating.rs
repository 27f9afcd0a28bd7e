//! Domains that move: to this host, as the other end of a command that stands for ssh.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use hospes_migration::{Reader, Record};

use crate::common::{Bench, said, until, until_said};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_hospes-mock");

/// A running domain that has heard a line.
pub fn bench_with(line: &str) -> Bench {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.tell("one", line);
    bench
}

pub fn receive() -> String {
    format!("{PROGRAM} migrate-receive")
}

/// A receiver whose answers go through a command; with its end the connection ends.
fn cut_back(command: &str) -> String {
    format!("{} | ({command}; kill -9 $$)", receive())
}

/// Passes on all up to the order to start the guest, which comes alone.
const BUT_THE_LAST: &str = r#"perl -e 'while (sysread(STDIN, $b, 65536)) { last if $b =~ /"start"/; syswrite(STDOUT, $b) }'"#;

fn long(bench: &Bench) -> serde_json::Value {
    let list = bench.ok(&["list", "-l", "one"]);
    let json: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    json[0]["config"].clone()
}

/// Names of all domains.
pub fn names(bench: &Bench) -> Vec<String> {
    let table = bench.ok(&["list"]);
    let names = table.lines().skip(2);
    names
        .filter_map(|line| Some(line.split_whitespace().next()?.to_string()))
        .collect()
}

/// A migration by this command of the shell fails, and the guest goes on as it was; what was said. `suspended` is how often it was before.
fn stays(bench: &Bench, command: &str, suspended: usize) -> String {
    let fault = bench.fails(1, &["migrate", "-s", "", "one", command]);
    assert!(
        fault.contains("the domain goes on here"),
        "{command}: {fault}"
    );
    assert_eq!(names(bench), ["one"], "{command}");
    assert_eq!(bench.row("one").expect("it runs")[4], "-b----");
    for what in ["suspended", "resumed"] {
        until_said(bench, what, suspended);
    }
    until("it has taken again what it let go", || {
        said(bench, "taken again") == said(bench, "let go")
    });
    fault
}

#[test]
fn migrated_domain_goes_on_with_what_it_had() {
    let bench = bench_with("hello");
    bench.ok(&["block-attach", "one", "/img/b,qcow2,xvdb,r"]);
    bench.ok(&["mem-set", "one", "32"]);
    let before = long(&bench);
    for id in 2..5 {
        let output = bench.run(&["migrate", "-s", "", "one", &receive()]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{text}");
        for sentence in [
            "migration target: Ready to receive domain.\n",
            "migration sender: Target has acknowledged transfer.\n",
            "migration target: Got permission, starting domain.\n",
            "migration sender: Target reports successful startup.\n",
            "Migration successful.\n",
        ] {
            assert!(text.contains(sentence), "{text}");
        }
        assert_eq!(names(&bench), ["one"]);
        let row = bench.row("one").expect("it runs");
        assert_eq!((&row[1][..], &row[4][..]), (&id.to_string()[..], "-b----"));
        assert_eq!(long(&bench), before);
        until_said(&bench, "restored: hello", 1);
    }
    bench.ok(&["migrate", "-p", "-s", "", "one", &receive()]);
    assert_eq!(bench.row("one").expect("it is there")[4], "--p---");
    let refused = bench.fails(1, &["migrate", "-s", "", "one", &receive()]);
    assert!(refused.contains("it is paused"), "{refused}");
    bench.ok(&["unpause", "one"]);
    let debug = bench.run(&["migrate", "--debug", "-s", "", "one", &receive()]);
    let debug = String::from_utf8_lossy(&debug.stderr).into_owned();
    for sentence in ["it has let go of its devices", "one--incoming may come"] {
        assert!(debug.contains(sentence), "{debug}");
    }
    bench.ok(&["destroy", "one"]);
}

#[test]
fn options_of_xl_are_taken() {
    let bench = bench_with("hello");
    let debug = format!("{} -F -d", receive());
    bench.ok(&["migrate", "--live", "-s", "", "one", &debug]);
    bench.ok(&["migrate", "--live", "-F", "-s", "", "one", &receive()]);
    // As with -e, nothing is done with the guest's end.
    bench.ok(&["shutdown", "-w", "one"]);
    assert_eq!(bench.row("one").expect("kept")[4], "---s--");
    let refused = bench.fails(2, &["migrate-receive", "-r"]);
    assert!(refused.contains("leave -r out"), "{refused}");
}

#[test]
fn configurations_and_their_changes_move_too() {
    let bench = bench_with("hello");
    let kernel = bench.path("kernel").display().to_string();
    let text = |name: &str, memory: u32| {
        format!("name='{name}'; type='pvh'; memory={memory}; kernel='{kernel}'")
    };
    bench.ok(&["config-update", "one", "/dev/null", &text("one", 96)]);
    bench.ok(&["migrate", "-s", "", "one", &receive()]);
    assert_eq!(bench.row("one").expect("it runs")[2], "64");
    bench.ok(&["reboot", "one"]);
    until("the next start", || {
        bench.row("one").is_some_and(|row| row[2] == "96")
    });
    bench.create("two", &[]);
    let file = bench.path("config").display().to_string();
    fs::write(&file, text("two", 96)).expect("writable");
    let taken = bench.fails(1, &["migrate", "-C", &file, "-s", "", "one", &receive()]);
    assert!(taken.contains("\"two\" exists already"), "{taken}");
    fs::write(&file, text("three", 96)).expect("writable");
    bench.ok(&["migrate", "-e", "-C", &file, "-s", "", "one", &receive()]);
    assert_eq!(names(&bench), ["two", "three"]);
    bench.ok(&["shutdown", "three"]);
    until("the domain is kept", || {
        bench.row("three").is_some_and(|row| row[4] == "---s--")
    });
    bench.ok(&["destroy", "three"]);
    bench.ok(&["destroy", "two"]);
}

#[test]
fn what_is_no_receiver_does_not_stop_the_guest() {
    let bench = bench_with("hello");
    for (command, sentence) in [
        ("false", "no `hospes migrate-receive`: it has ended"),
        ("no-such-program", "it has ended"),
        ("echo Welcome", "the last that it said was: Welcome"),
        ("yes", "prints too much"),
        (
            "echo hospes migration target, version 9",
            "speaks version 9",
        ),
        ("echo hospes migration target, version 1", "the other side"),
        (
            "echo hospes migration target, version 1; echo what; cat >/dev/null",
            "not understood",
        ),
    ] {
        let fault = stays(&bench, command, 0);
        assert!(fault.contains(sentence), "{command}: {fault}");
    }
    bench.tell("one", "foreign");
    let fault = stays(&bench, &receive(), 0);
    assert!(
        fault.contains("the other side says: the processor lacks it"),
        "{fault}"
    );
    bench.ok(&["destroy", "one"]);
}

#[test]
fn migration_that_fails_lets_the_guest_go_on() {
    let bench = bench_with("broken");
    let fault = stays(&bench, &receive(), 1);
    assert!(fault.contains("it is broken"), "{fault}");
    bench.tell("one", "clings");
    let fault = stays(&bench, &receive(), 2);
    assert!(fault.contains("the disk fails"), "{fault}");
    bench.tell("one", "unwelcome");
    let fault = stays(&bench, &receive(), 3);
    assert!(fault.contains("there is no place for it"), "{fault}");
    bench.tell("one", "restless");
    let fault = stays(&bench, &receive(), 4);
    assert!(fault.contains("its guest has gone on"), "{fault}");
    bench.tell("one", "hello");
    // Of what is sent the target gets so many bytes, and of what it answers the source.
    let first = |bytes| {
        format!(
            "perl -e '$n = {bytes}; while ($n && ($r = sysread(STDIN, $b, $n))) {{ syswrite(STDOUT, $b); $n -= $r }}'"
        )
    };
    let to = |bytes| format!("{} | {}", first(bytes), receive());
    let back = |bytes| cut_back(&first(bytes));
    for bytes in [0, 30, 200] {
        stays(&bench, &to(bytes), 4);
    }
    for bytes in [0, 20] {
        stays(&bench, &back(bytes), 4);
    }
    stays(&bench, &to(3000), 5);
    // Up to and including the answer that it would take the domain.
    stays(&bench, &cut_back("sed -u /ready/Q"), 6);
    bench.ok(&["migrate", "-s", "", "one", &receive()]);
    bench.ok(&["destroy", "one"]);
}

#[test]
fn domain_that_cannot_be_given_away_goes_on() {
    let bench = bench_with("hello");
    let mut mover = Mover::new(&bench, 1);
    mover.configuration();
    bench.create("one--migratedaway", &[]);
    mover.rest();
    // The other side has the disks until the command knows.
    let taken = bench.path("kernel.taken");
    fs::write(&taken, "").expect("writable");
    mover.say("\"give-away\"");
    let answer = mover.hear();
    assert!(answer.contains("exists already"), "{answer}");
    fs::remove_file(&taken).expect("it was there");
    until_said(&bench, "resumed", 1);
    assert_eq!(bench.row("one").expect("it runs")[4], "-b----");
    drop(mover);
    // Another time it is known before.
    let fault = bench.fails(1, &["migrate", "-s", "", "one", &receive()]);
    assert!(fault.contains("one--migratedaway"), "{fault}");
    until_said(&bench, "suspended", 1);
    bench.ok(&["destroy", "one--migratedaway"]);
    bench.ok(&["destroy", "one"]);
}

#[test]
fn domain_that_runs_there_for_all_anybody_knows_is_held_here() {
    let bench = bench_with("hello");
    // It runs, and the last answer is lost.
    let command = cut_back("sed -u /running/Q");
    let fault = bench.fails(1, &["migrate", "-s", "", "one", &command]);
    assert!(
        fault.contains("it is not known whether the domain runs"),
        "{fault}"
    );
    for advice in [
        "hospes destroy one--migratedaway",
        "hospes destroy one--incoming",
    ] {
        assert!(fault.contains(advice), "{fault}");
    }
    assert_eq!(names(&bench), ["one--migratedaway", "one"]);
    assert_eq!(bench.row("one").expect("it runs")[4], "-b----");
    let held = bench.row("one--migratedaway").expect("it is held");
    assert_eq!(held[4], "--p---");
    let output = bench.run(&["list"]);
    let notes = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        notes.contains("one--migratedaway: it is not known"),
        "{notes}"
    );
    for command in [
        &["mem-set", "one--migratedaway", "32"][..],
        &["save", "one--migratedaway", "/dev/null"],
        &["migrate", "-s", "", "one--migratedaway", "true"],
    ] {
        let refused = bench.fails(1, command);
        assert!(refused.contains("it is not known whether"), "{refused}");
    }
    // Where both are on one host that much is known.
    let refused = bench.fails(1, &["unpause", "one--migratedaway"]);
    assert!(refused.contains("\"one\" exists already"), "{refused}");
    bench.ok(&["destroy", "one--migratedaway"]);
    bench.ok(&["destroy", "one"]);
}

#[test]
fn domain_that_does_not_run_there_goes_on_here_when_the_user_says_so() {
    let bench = bench_with("hello");
    // The target is never told that the domain is its own.
    let command = format!("{BUT_THE_LAST} | {}", receive());
    let fault = bench.fails(1, &["migrate", "-s", "", "one", &command]);
    assert!(
        fault.contains("hospes unpause one--migratedaway"),
        "{fault}"
    );
    until("the target is gone", || {
        names(&bench) == ["one--migratedaway"]
    });
    assert_eq!(said(&bench, "resumed"), 0);
    // It stays held as it is while its devices cannot be had.
    let taken = bench.path("kernel.taken");
    fs::write(&taken, "").expect("writable");
    let refused = bench.fails(1, &["unpause", "one--migratedaway"]);
    assert!(refused.contains("the disk is taken"), "{refused}");
    assert_eq!(names(&bench), ["one--migratedaway"]);
    assert_eq!(said(&bench, "resumed"), 0);
    // Who has them may be about to end.
    let mut unpausing = bench.spawn(&["unpause", "one--migratedaway"]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    fs::remove_file(&taken).expect("it was there");
    assert_eq!(unpausing.wait(), Some(0));
    assert_eq!(names(&bench), ["one"]);
    assert_eq!(bench.row("one").expect("it runs")[4], "-b----");
    until_said(&bench, "resumed", 1);
    bench.ok(&["migrate", "-s", "", "one", &receive()]);
    bench.ok(&["destroy", "one"]);
}

#[test]
fn domain_that_has_not_arrived_does_not_run() {
    let bench = bench_with("hello");
    let gate = bench.path("gate").display().to_string();
    let command = format!(
        "({BUT_THE_LAST}; until test -e {gate}; do sleep 0.05; done) | {}",
        receive()
    );
    let mut migrating = bench.spawn(&["migrate", "-s", "", "one", &command]);
    until("it is all there", || {
        bench.row("one--migratedaway").is_some()
            && bench.domain_dir(2).join("control.sock").exists()
    });
    let refused = bench.fails(1, &["unpause", "one--incoming"]);
    assert!(refused.contains("on its way here"), "{refused}");
    // And one that is given away only runs when it is known to be nowhere else.
    bench.ok(&["unpause", "one--migratedaway"]);
    assert_eq!(said(&bench, "resumed"), 0);
    let process = kill(bench.pid(2));
    assert!(process, "the process lives");
    fs::write(&gate, "").expect("writable");
    assert_eq!(migrating.wait(), Some(1));
    until("it is held", || names(&bench) == ["one--migratedaway"]);
    bench.ok(&["unpause", "one--migratedaway"]);
    until_said(&bench, "resumed", 1);
    bench.ok(&["destroy", "one"]);
}

fn kill(pid: i32) -> bool {
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok()
}

/// A command that moves a domain, as far as it comes.
pub struct Mover(BufReader<UnixStream>);

impl Mover {
    pub fn new(bench: &Bench, id: u32) -> Mover {
        let socket = bench.domain_dir(id).join("control.sock");
        until("it listens", || socket.exists());
        let begin = || {
            let stream = UnixStream::connect(&socket).expect("it listens");
            let mut mover = Mover(BufReader::new(stream));
            mover.say(r#"{"op":"migrate","config":null}"#);
            (mover.hear(), mover)
        };
        let mut begun = begin();
        // What was begun before may not have ended yet.
        until("the domain is free", || {
            let again = begun.0.contains("try again when that has ended");
            if again {
                begun = begin();
            }
            !again
        });
        let (heard, mover) = begun;
        assert!(heard.contains("saving"), "{heard}");
        mover
    }

    pub fn say(&mut self, body: &str) {
        let line = format!("{{\"version\":1,\"body\":{body}}}\n");
        self.0
            .get_mut()
            .write_all(line.as_bytes())
            .expect("it reads");
    }

    pub fn hear(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("text");
        line
    }

    fn skip(&mut self, bytes: usize) {
        self.0.read_exact(&mut vec![0; bytes]).expect("it writes");
    }

    pub fn configuration(&mut self) {
        Reader::new(&mut self.0).expect("it begins");
    }

    pub fn rest(&mut self) {
        self.say("\"send\"");
        let mut reader = Reader::continued(&mut self.0);
        while !matches!(reader.next().expect("it goes on"), Record::End) {}
    }
}

#[test]
fn command_that_is_killed_leaves_one_guest() {
    let bench = bench_with("hello");
    // Before the guest is suspended.
    let free = || {
        let set = |kib| bench.run(&["mem-set", "one", kib]).status.success();
        until("the domain is free", || set("32"));
    };
    Mover::new(&bench, 1).skip(1);
    free();
    let mut early = Mover::new(&bench, 1);
    early.configuration();
    let refused = bench.fails(1, &["mem-set", "one", "32"]);
    assert!(refused.contains("it is being saved"), "{refused}");
    drop(early);
    free();
    assert_eq!(said(&bench, "suspended"), 0);
    // With all of it.
    let mut late = Mover::new(&bench, 1);
    late.configuration();
    late.rest();
    let refused = bench.fails(1, &["unpause", "one"]);
    assert!(refused.contains("it is being migrated"), "{refused}");
    drop(late);
    until_said(&bench, "resumed", 1);
    until_said(&bench, "taken again", 1);
    // When it is given away.
    let mut last = Mover::new(&bench, 1);
    last.configuration();
    last.rest();
    last.say("\"give-away\"");
    assert!(last.hear().contains("done"));
    assert_eq!(names(&bench), ["one--migratedaway"]);
    let refused = bench.fails(1, &["pause", "one--migratedaway"]);
    assert!(refused.contains("it is being migrated"), "{refused}");
    drop(last);
    until("it is held", || {
        bench
            .row("one--migratedaway")
            .is_some_and(|row| row[4] == "--p---")
    });
    until_said(&bench, "resumed", 1);
    bench.ok(&["unpause", "one--migratedaway"]);
    assert_eq!(names(&bench), ["one"]);
    until_said(&bench, "resumed", 2);
    bench.ok(&["destroy", "one"]);
}

#[test]
fn guest_hears_what_it_is_asked_as_long_as_it_runs() {
    let bench = bench_with("hello");
    let mut mover = Mover::new(&bench, 1);
    mover.configuration();
    let orders = [
        &["sysrq", "one", "h"][..],
        &["trigger", "one", "nmi"],
        &["vcpu-pin", "one", "0", "0"],
    ];
    for order in orders {
        bench.ok(order);
    }
    until_said(&bench, "sysrq h", 1);
    until_said(&bench, "nmi at vCPU 0", 1);
    // The configuration is with the other side.
    for change in [
        &["sched-credit", "-d", "one", "-w", "512"][..],
        &["vcpu-set", "one", "1"],
        &["rename", "one", "two"],
    ] {
        let refused = bench.fails(1, change);
        assert!(refused.contains("saved or migrated"), "{refused}");
    }
    mover.rest();
    for order in orders.into_iter().chain([&["reboot", "one"][..]]) {
        let refused = bench.fails(1, order);
        assert!(refused.contains("it is being migrated"), "{refused}");
    }
    drop(mover);
    until_said(&bench, "resumed", 1);
    let list = bench.ok(&["vcpu-list", "one"]);
    let vcpu = list.lines().nth(1).expect("it has one");
    assert!(vcpu.ends_with("0 / all"), "{vcpu}");
    until("it is free", || bench.run(orders[0]).status.success());
    until_said(&bench, "sysrq h", 2);
    assert_eq!(said(&bench, "nmi at vCPU 0"), 1);
    let mut mover = Mover::new(&bench, 1);
    mover.configuration();
    bench.ok(&["shutdown", "one"]);
    until("it ends", || bench.row("one").is_none());
}

#[test]
fn guest_that_ends_waits_for_no_command() {
    let bench = bench_with("hello");
    for id in 1..4 {
        let mut mover = Mover::new(&bench, id);
        mover.configuration();
        // The command is to say that the other host would take it.
        let mut console = bench.spawn(&["console", "one"]);
        console.send("reboot\n");
        let stream = mover.0.get_ref();
        let long = std::time::Duration::from_secs(20);
        stream.set_read_timeout(Some(long)).expect("a time");
        let mut rest = Vec::new();
        mover.0.read_to_end(&mut rest).expect("it ends");
        assert!(rest.is_empty(), "{rest:?}");
        until("the next start", || {
            bench
                .row("one")
                .is_some_and(|row| row[1] == (id + 1).to_string() && row[4] == "-b----")
        });
    }
    bench.ok(&["destroy", "one"]);
}

#[test]
fn domain_whose_disks_are_taken_waits_for_them_and_is_held() {
    let bench = bench_with("clings");
    let taken = bench.path("kernel.taken");
    fs::write(&taken, "").expect("writable");
    let soon = std::thread::spawn({
        let taken = taken.clone();
        move || {
            std::thread::sleep(std::time::Duration::from_secs(1));
            fs::remove_file(taken)
        }
    });
    stays(&bench, &receive(), 1);
    soon.join().expect("no panic").expect("it was there");
    fs::write(&taken, "").expect("writable");
    let fault = bench.fails(1, &["migrate", "-s", "", "one", &receive()]);
    assert!(
        fault.contains("cannot go on yet: the disk is taken"),
        "{fault}"
    );
    assert_eq!(bench.row("one").expect("it is held")[4], "--p---");
    let refused = bench.fails(1, &["unpause", "one"]);
    assert!(refused.contains("the disk is taken"), "{refused}");
    until_said(&bench, "resumed", 1);
    fs::remove_file(&taken).expect("it was there");
    bench.ok(&["unpause", "one"]);
    until_said(&bench, "resumed", 2);
    bench.ok(&["destroy", "one"]);
}

#[test]
fn process_that_is_asked_to_end_does_not_wake_what_is_on_its_way() {
    let bench = bench_with("hello");
    let mut mover = Mover::new(&bench, 1);
    mover.configuration();
    mover.rest();
    let pid = rustix::process::Pid::from_raw(bench.pid(1)).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it lives");
    until("it has heard", || {
        bench.log("one.log").contains("has been asked to end")
    });
    assert_eq!(said(&bench, "resumed"), 0);
    drop(mover);
    // It comes back first, and ends then.
    until("it has ended", || names(&bench).is_empty());
    until_said(&bench, "resumed", 1);
}
