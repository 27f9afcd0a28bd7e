//! How the other host of a migration is reached, and by what name the program is called there.

use std::fs;

use crate::migrating::{PROGRAM, bench_with};

#[test]
fn other_host_is_reached_by_ssh_or_what_stands_for_it() {
    let bench = bench_with("hello");
    let ssh = bench.path("ssh").display().to_string();
    // Prints what a login prints, and runs what it is told on the host.
    let script = format!(
        "#!/bin/sh\necho Welcome; printf 'last login: never'; echo \"$@\" >{ssh}.log; shift 3; exec {PROGRAM} \"$@\"\n"
    );
    fs::write(&ssh, script).expect("writable");
    bench.ok(&["migrate", "-s", &format!("sh {ssh} -v"), "one", "there"]);
    let log = fs::read_to_string(bench.path("ssh.log")).expect("it ran");
    assert_eq!(log, "-v there hospes migrate-receive\n");
    bench.fails(2, &["migrate", "-D", "one", "there"]);
    bench.fails(2, &["migrate", "one"]);
    let fault = bench.fails(2, &["migrate", "--", "one", "-oProxyCommand=x"]);
    assert!(fault.contains("no name of a host"), "{fault}");
    bench.ok(&["destroy", "one"]);
}

#[test]
fn other_host_has_it_as_hospes_whatever_it_is_called_here() {
    let bench = bench_with("hello");
    // What is called xl here, and hospes there, and the other way round.
    let programs = ["there", "elsewhere"].map(|host| bench.path(host));
    for (bin, name) in programs.iter().zip(["hospes", "xl"]) {
        fs::create_dir(bin).expect("writable");
        std::os::unix::fs::symlink(PROGRAM, bin.join(name)).expect("free");
    }
    let ssh = format!(
        "#!/bin/sh\nPATH={}/$1; shift; exec \"$@\"\n",
        bench.path("").display()
    );
    fs::write(bench.path("ssh"), ssh).expect("writable");
    let ssh = format!("sh {}", bench.path("ssh").display());
    let xl = || {
        let mut command = bench.command_of(&programs[1].join("xl"));
        command.arg("migrate");
        command
    };
    let done = xl().args(["-s", &ssh, "one", "there"]).output();
    let done = done.expect("it can be started");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    let fault = bench.fails(1, &["migrate", "-s", &ssh, "one", "elsewhere"]);
    for part in [
        "whether it is installed there as hospes",
        "the domain goes on here",
    ] {
        assert!(fault.contains(part), "{fault}");
    }
    let whole = format!("{ssh} elsewhere xl migrate-receive");
    bench.ok(&["migrate", "-s", "", "one", &whole]);
    assert_eq!(bench.row("one").expect("it runs")[1], "3");
    bench.ok(&["destroy", "one"]);
}
