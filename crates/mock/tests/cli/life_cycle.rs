//! Domains from their creation to their end.

use crate::common::{Bench, process_fields, until};
use hospes_toolstack::machine_user;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).expect("a pid"), signal).expect("it lives");
}

#[test]
fn create_detached_lists_and_destroys() {
    let bench = Bench::new();
    bench.create("one", &["vcpus=2"]);
    let row = bench.row("one").expect("listed");
    assert_eq!(row[1..], ["1", "64", "2", "-b----", "1.5"]);
    assert_eq!(bench.ok(&["domid", "one"]), "1\n");
    assert_eq!(bench.ok(&["domname", "1"]), "one\n");
    bench.ok(&["destroy", "one"]);
    assert_eq!(bench.row("one"), None);
    assert!(!bench.domain_dir(1).exists());
    assert!(bench.log("one.console.log").contains("mock guest ready"));
    assert!(bench.log("one.log").contains("Domain 1 has been destroyed"));
}

#[test]
fn create_detached_leaves_the_session_of_the_terminal() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let session = process_fields(bench.pid(1))[3].clone();
    assert_eq!(session, bench.pid(1).to_string());
}

#[test]
fn create_two_domains_keeps_them_apart() {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.create("two", &["memory=128"]);
    assert_eq!(bench.row("one").expect("listed")[2], "64");
    assert_eq!(bench.row("two").expect("listed")[1..3], ["2", "128"]);
    bench.ok(&["destroy", "1"]);
    assert_eq!(bench.row("one"), None);
    assert_eq!(bench.row("two").expect("listed")[1], "2");
}

#[test]
fn create_used_name_or_uuid_is_refused() {
    let bench = Bench::new();
    let uuid = "uuid='59e1cf6c-6ab9-4879-90e7-adc8d1c63bf5'";
    bench.create("one", &[uuid]);
    let said = bench.fails(3, &bench.creation("one", &[]));
    assert!(said.contains("\"one\" exists already with id 1"), "{said}");
    // The log of that name is that of the domain which has it.
    assert!(!bench.log("one.log").contains("exists already"));
    let mut arguments = bench.creation("two", &[]);
    arguments.push(uuid.into());
    let said = bench.fails(3, &arguments);
    assert!(said.contains("UUID"), "{said}");
    assert_eq!(bench.row("two"), None);
}

#[test]
fn create_that_fails_says_why_and_leaves_nothing() {
    let bench = Bench::new();
    let mut arguments = bench.creation("bad", &[]);
    arguments.push("kernel='/nonexistent'".into());
    let said = bench.fails(3, &arguments);
    assert!(said.contains("Parsing config from /dev/null"), "{said}");
    assert!(
        said.contains("the kernel /nonexistent is no file"),
        "{said}"
    );
    assert_eq!(bench.row("bad"), None);
    assert!(!bench.domain_dir(1).exists());
    // With a disk that is not there xl does not come to the kernel; an empty drive is no such disk.
    for (disk, status) in [
        ("/nonexistent.img,raw,xvda,w", 6),
        ("null,raw,xvda,r", 3),
        (",,xvdc,cdrom", 3),
    ] {
        bench.fails(
            status,
            &[&arguments[..], &[format!("disk=['{disk}']")]].concat(),
        );
    }
}

#[test]
fn create_relative_kernel_is_found_from_where_the_command_runs() {
    let bench = Bench::new();
    std::fs::write(
        bench.path("d.cfg"),
        "name='one'\ntype='pvh'\nmemory=64\nkernel='kernel'\n",
    )
    .expect("writable");
    let status = bench
        .command()
        .args(["create", "-q", "d.cfg"])
        .current_dir(bench.path("."))
        .status()
        .expect("the program can be started");
    assert!(status.success());
    assert!(bench.row("one").is_some());
}

#[test]
fn create_paused_waits_for_unpause() {
    let bench = Bench::new();
    bench.ok(&bench.creation("one", &["-p"]));
    assert_eq!(bench.row("one").expect("listed")[4], "--p---");
    assert_eq!(bench.log("one.console.log"), "");
    bench.ok(&["unpause", "one"]);
    assert_eq!(bench.row("one").expect("listed")[4], "-b----");
    bench.ok(&["pause", "one"]);
    assert_eq!(bench.row("one").expect("listed")[4], "--p---");
}

#[test]
fn create_foreground_returns_when_the_domain_has_ended() {
    let bench = Bench::new();
    let mut foreground = bench.spawn(&bench.creation("one", &["-F", "-q"]));
    until("the domain is there", || bench.row("one").is_some());
    // A reboot is not the end.
    bench.ok(&["reboot", "one"]);
    until("it has rebooted", || {
        bench.row("one").is_some_and(|row| row[1] == "2")
    });
    assert!(foreground.child.try_wait().expect("a child").is_none());
    bench.ok(&["shutdown", "one"]);
    assert_eq!(foreground.wait(), Some(0));
    assert_eq!(bench.row("one"), None);
}

#[test]
fn create_unattended_leaves_the_ended_domain() {
    let bench = Bench::new();
    bench.ok(&bench.creation("one", &["-e", "-q"]));
    bench.ok(&["shutdown", "-w", "one"]);
    assert_eq!(bench.row("one").expect("kept")[4], "---s--");
}

#[test]
fn list_after_sigkill_shows_nothing_and_frees_the_name() {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.create("two", &[]);
    signal(bench.pid(1), Signal::KILL);
    until("the dead domain is gone", || bench.row("one").is_none());
    // Whichever command next finds the process gone for good clears up after it.
    until("its directory is gone", || {
        bench.row("one").is_none() && !bench.domain_dir(1).exists()
    });
    assert!(bench.row("two").is_some());
    bench.create("one", &[]);
    assert_eq!(bench.row("one").expect("listed")[1], "3");
}

#[test]
fn what_a_guest_has_started_ends_with_its_killed_domain() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let bench = Bench::new();
    bench.create("one", &[]);
    // As one that has broken out can; the mock's machine process itself stays root's.
    let user = machine_user(bench.machine(1).cast_unsigned());
    let mut started = Command::new("sleep")
        .arg("1000")
        .uid(user)
        .spawn()
        .expect("a process");
    signal(bench.pid(1), Signal::KILL);
    // No command comes.
    let status = started.wait().expect("a child");
    assert_eq!(status.signal(), Some(Signal::KILL.as_raw()));
    until("its directory is gone", || !bench.domain_dir(1).exists());
}

#[test]
fn destroy_of_a_stopped_process_kills_it() {
    let bench = Bench::new();
    bench.create("one", &[]);
    signal(bench.pid(1), Signal::STOP);
    // The list says what it knows and goes on.
    assert_eq!(
        bench.row("one").expect("listed")[1..5],
        ["1", "64", "1", "------"]
    );
    bench.ok(&["destroy", "one"]);
    assert_eq!(bench.row("one"), None);
    assert!(!bench.domain_dir(1).exists());
}

#[test]
fn domain_that_is_being_destroyed_is_dying_and_nothing_else() {
    for paused in [false, true] {
        let bench = Bench::new();
        bench.create("one", &[]);
        if paused {
            bench.ok(&["pause", "one"]);
        }
        let staying = bench.path("kernel.staying");
        std::fs::write(&staying, "").expect("writable");
        let mut destroying = bench.spawn(&["destroy", "one"]);
        let state = || bench.row("one").expect("it has not left")[4].clone();
        until("it is being destroyed", || state().ends_with('d'));
        assert_eq!(state(), "-----d");
        std::fs::remove_file(&staying).expect("there");
        assert_eq!(destroying.wait(), Some(0));
    }
}

#[test]
fn shutdown_wait_returns_behind_the_end() {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.create("two", &[]);
    let output = bench.run(&["shutdown", "-a", "-w", "-w"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    for line in [
        "Shutting down domain 1",
        "Shutting down domain 2",
        "Waiting for 2 domains",
        "Domain 1 has been shut down, reason code 0",
        "Domain 2 has been shut down, reason code 0",
    ] {
        assert!(said.lines().any(|said| said == line), "{line:?} in {said}");
    }
    assert_eq!((bench.row("one"), bench.row("two")), (None, None));
}

#[test]
fn end_preserved_shows_its_reason_until_destroyed() {
    for (line, state) in [
        ("poweroff", "---s--"),
        ("crash", "---sc-"),
        ("watchdog", "---sw-"),
        ("suspend", "---ss-"),
    ] {
        let bench = Bench::new();
        let preserve = "on_poweroff='preserve'; on_crash='preserve'; on_watchdog='preserve'";
        let mut arguments = bench.creation("kept", &["-c", "-q"]);
        arguments.push(preserve.into());
        let mut console = bench.spawn(&arguments);
        console.expect("mock guest ready");
        console.send(&format!("{line}\n"));
        until("the domain has ended", || {
            bench.row("kept").is_some_and(|row| row[4] == state)
        });
        bench.ok(&["shutdown", "-w", "kept"]);
        bench.ok(&["shutdown", "-a", "-w"]);
        for ask in [&["reboot", "kept"][..], &["sysrq", "kept", "s"]] {
            let said = bench.fails(1, ask);
            assert!(said.contains("shut down already: destroy it"), "{said}");
        }
        bench.ok(&["destroy", "kept"]);
        assert_eq!(bench.row("kept"), None);
        assert_eq!(console.wait(), Some(0));
    }
}

#[test]
fn end_restarted_has_a_new_id_and_the_same_console() {
    let bench = Bench::new();
    let mut arguments = bench.creation("again", &["-c", "-q"]);
    arguments.push("on_crash='restart'".into());
    let mut console = bench.spawn(&arguments);
    for (id, end) in [("1", "reboot"), ("2", "crash"), ("3", "poweroff")] {
        console.expect("mock guest ready");
        assert_eq!(bench.row("again").expect("listed")[1], id);
        console.send(&format!("{end}\n"));
    }
    assert_eq!(console.wait(), Some(0));
    assert_eq!(bench.row("again"), None);
}

#[test]
fn end_restarting_waits_for_who_has_the_registry() {
    let bench = Bench::new();
    bench.create("again", &[]);
    // For longer than a command waits for it.
    let registry = File::open(bench.path("run/lock")).expect("there");
    let mut console = bench.spawn(&["console", "again"]);
    console.expect("mock guest ready");
    flock(&registry, FlockOperation::LockExclusive).expect("a file");
    console.send("reboot\n");
    until("it is said who has it", || {
        bench.log("again.log").contains("has held")
    });
    drop(registry);
    until("it has started again", || {
        bench.row("again").is_some_and(|row| row[1] == "2")
    });
}

#[test]
fn end_restarting_destroyed_does_not_come_back() {
    let bench = Bench::new();
    bench.create("again", &["on_poweroff='restart'"]);
    bench.ok(&["shutdown", "again"]);
    // Whether it is waiting, being built or running again.
    bench.ok(&["destroy", "again"]);
    assert_eq!(bench.row("again"), None);
}

#[test]
fn end_restarting_is_no_end_to_advise_destroying() {
    let bench = Bench::new();
    bench.create("again", &["on_poweroff='restart'"]);
    // Each that is carried out is followed by a rest of up to two seconds.
    until("a shutdown meets the rest before the next start", || {
        let asked = bench.run(&["shutdown", "again"]);
        let said = String::from_utf8_lossy(&asked.stderr);
        assert!(!said.contains("destroy"), "{said}");
        said.contains("is about to start again: try again in a moment")
    });
    bench.ok(&["destroy", "again"]);
}

#[test]
fn list_long_prints_the_configuration() {
    let bench = Bench::new();
    bench.create("one", &["extra='quiet'"]);
    let list: serde_json::Value =
        serde_json::from_str(&bench.ok(&["list", "-l", "one"])).expect("JSON");
    assert_eq!(list[0]["domid"], 1);
    assert_eq!(list[0]["config"]["c_info"]["name"], "one");
    assert_eq!(list[0]["config"]["b_info"]["cmdline"], "quiet");
    let list = bench.ok(&["list", "-l", "0"]);
    let host: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    let (domid, config) = (&host[0]["domid"], &host[0]["config"]);
    assert_eq!(
        (domid.as_u64(), &config["c_info"]["type"]),
        (Some(0), &"pv".into())
    );
    let kib = |key: &str| config["b_info"][key].as_u64().expect("a number");
    assert!(kib("target_memkb") <= kib("max_memkb"), "{list}");
    let said = bench.fails(1, &["list", "nobody"]);
    assert!(
        said.contains("nobody is an invalid domain identifier"),
        "{said}"
    );
    assert!(
        bench
            .ok(&["list"])
            .lines()
            .nth(1)
            .expect("two lines")
            .starts_with("Domain-0 ")
    );
}

#[test]
fn logs_that_cannot_be_written_do_not_end_the_domain() {
    let bench = Bench::new();
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(bench.path("log"))
        .expect("writable");
    for log in ["one.log", "one.console.log", "store.log"] {
        symlink("/dev/full", bench.path("log").join(log)).expect("writable");
    }
    let mut console = bench.spawn(&bench.creation("one", &["-c", "-q"]));
    console.expect("mock guest ready");
    console.send("hello\n");
    console.expect("echo: hello");
    // The log has lines of it too.
    bench.ok(&["debug-keys", "q"]);
    assert_eq!(bench.row("one").expect("it lives")[1], "1");
    bench.ok(&["reboot", "one"]);
    console.expect("mock guest ready");
    console.send("poweroff\n");
    assert_eq!(console.wait(), Some(0));
}

#[test]
fn shutdown_of_all_goes_on_behind_a_domain_that_cannot_be_reached() {
    for command in [
        &["shutdown", "-a", "-w", "-w"][..],
        &["shutdown", "-a"],
        &["domains", "stop"],
    ] {
        let bench = Bench::new();
        bench.create("lost", &[]);
        bench.create("two", &[]);
        bench.create("three", &[]);
        let socket = bench.domain_dir(1).join("control.sock");
        std::fs::remove_file(&socket).expect("there");
        symlink("control.sock", &socket).expect("writable");
        let said = bench.fails(1, command);
        until("the others have ended", || {
            bench.row("two").is_none() && bench.row("three").is_none()
        });
        assert!(said.contains("domain 1 "), "{command:?}: {said}");
        signal(bench.pid(1), Signal::KILL);
    }
}

#[test]
fn shutdown_wait_returns_when_a_domain_that_goes_away_is_gone() {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.create("kept", &["on_poweroff='preserve'"]);
    let staying = bench.path("kernel.staying");
    std::fs::write(&staying, "").expect("writable");
    let mut command = bench.spawn(&["shutdown", "-a", "-w"]);
    for name in ["one", "kept"] {
        until("it has shut down", || {
            bench.row(name).expect("listed")[4] == "---s--"
        });
    }
    // It has had time to hear of that.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(command.child.try_wait().expect("a child"), None);
    std::fs::remove_file(&staying).expect("there");
    assert_eq!(command.wait(), Some(0));
    assert_eq!(bench.row("one"), None);
    assert_eq!(bench.row("kept").expect("kept")[4], "---s--");
}

#[test]
fn create_that_stays_fails_where_the_domain_cannot_start_again() {
    let bench = Bench::new();
    for (options, id) in [
        (&["-q", "-c"][..], 1),
        (&["-q", "-F"], 3),
        (&["-q", "-c", "-F"], 5),
    ] {
        let mut command = bench.command();
        command.args(bench.creation("one", options));
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let staying = command.stderr(Stdio::piped()).spawn();
        let staying = staying.expect("the program can be started");
        until("it runs", || {
            bench.row("one").is_some_and(|row| row[4] == "-b----")
        });
        std::fs::rename(bench.path("kernel"), bench.path("away")).expect("there");
        bench.ok(&["reboot", &id.to_string()]);
        let ended = staying.wait_with_output().expect("a child");
        std::fs::rename(bench.path("away"), bench.path("kernel")).expect("there");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{options:?}: {said}");
        assert!(
            said.contains("started again") && said.contains("is no file"),
            "{options:?}: {said}"
        );
        assert_eq!(bench.row("one"), None);
    }
}
