//! Domains in files: what becomes of the domain, the file and the configuration.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime};

use crate::common::{Bench, until, until_said};

/// A running domain that has heard a line, and the path of a file for it.
fn bench_with(line: &str) -> (Bench, String) {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.tell("one", line);
    let path = bench.path("saved").display().to_string();
    (bench, path)
}

/// Names in the bench's directory, of files that may be left by a save.
fn files(bench: &Bench) -> Vec<String> {
    let entries = fs::read_dir(bench.path("")).expect("readable");
    let names = entries.map(|entry| entry.expect("readable").file_name());
    let mut names: Vec<String> = names
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| name.contains("saved"))
        .collect();
    names.sort();
    names
}

fn config(bench: &Bench) -> serde_json::Value {
    let list = bench.ok(&["list", "-l", "one"]);
    let json: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    json[0]["config"].clone()
}

#[test]
fn saved_domain_ends_and_goes_on_from_its_file_with_what_it_had() {
    let (bench, path) = bench_with("hello");
    bench.ok(&["block-attach", "one", "/img/b,qcow2,xvdb,r"]);
    bench.ok(&["mem-set", "one", "32"]);
    let before = config(&bench);
    bench.ok(&["save", "one", &path]);
    assert_eq!(bench.row("one"), None);
    let mode = fs::metadata(&path).expect("it is there").permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    assert_eq!(files(&bench), ["saved"]);
    bench.ok(&["restore", &path]);
    assert_eq!(config(&bench), before);
    let row = bench.row("one").expect("it runs");
    assert_eq!((&row[1][..], &row[4][..]), ("2", "-b----"));
    until_said(&bench, "restored: hello", 1);
    let refused = bench.fails(1, &["restore", &path]);
    assert!(refused.contains("\"one\" exists already"), "{refused}");
    assert!(!bench.log("one.log").contains("exists already"));
    bench.ok(&["destroy", "one"]);
    // The file stays as it is.
    bench.ok(&["restore", "-p", &path]);
    let row = bench.row("one").expect("it is there");
    assert_eq!(row[4], "--p---");
    bench.ok(&["destroy", "one"]);
}

#[test]
fn restored_domain_is_attended_as_a_created_one() {
    let (bench, path) = bench_with("hello");
    let saved = bench.run(&["save", "-D", "one", &path]);
    let note = String::from_utf8_lossy(&saved.stderr).into_owned();
    assert_eq!(saved.status.code(), Some(0), "{note}");
    assert!(note.contains("-D is ignored"), "{note}");
    let mut console = bench.spawn(&["restore", "-c", &path]);
    console.expect("restored: hello");
    console.send("again\n");
    console.expect("echo: again");
    console.send("poweroff\n");
    assert_eq!(console.wait(), Some(0));
    let mut console = bench.spawn(&["restore", "-c", "-p", &path]);
    console.expect("restored: hello");
    assert_eq!(bench.row("one").expect("it is there")[4], "--p---");
    bench.ok(&["destroy", "one"]);
    assert_eq!(console.wait(), Some(0));
    let mut foreground = bench.spawn(&["restore", "-F", &path]);
    until("the domain is there", || bench.row("one").is_some());
    assert!(foreground.child.try_wait().expect("a child").is_none());
    bench.ok(&["shutdown", "one"]);
    assert_eq!(foreground.wait(), Some(0));
    assert_eq!(bench.row("one"), None);
}

#[test]
fn checkpoint_lets_the_domain_go_on() {
    let (bench, path) = bench_with("hello");
    bench.ok(&["save", "-c", "one", &path]);
    let row = bench.row("one").expect("it runs");
    assert_eq!((&row[1][..], &row[4][..]), ("1", "-b----"));
    until_said(&bench, "suspended", 1);
    until_said(&bench, "resumed", 1);
    bench.ok(&["save", "-p", "one", &path]);
    assert_eq!(bench.row("one").expect("it is there")[4], "--p---");
    let refused = bench.fails(1, &["save", "one", &path]);
    assert!(refused.contains("it is paused"), "{refused}");
    bench.ok(&["unpause", "one"]);
    bench.ok(&["save", "-c", "-p", "one", &path]);
    assert_eq!(bench.row("one").expect("it is there")[4], "--p---");
    bench.ok(&["unpause", "one"]);
    // What is no file is written as it is.
    bench.ok(&["save", "-c", "one", "/dev/null"]);
    bench.ok(&["destroy", "one"]);
}

#[test]
fn save_that_fails_leaves_domain_and_file_as_they_were() {
    let (bench, path) = bench_with("hello");
    bench.ok(&["save", "-c", "one", &path]);
    let before = fs::read(&path).expect("it is there");
    bench.tell("one", "broken");
    let fault = bench.fails(1, &["save", "one", &path]);
    assert!(fault.contains("its log says why"), "{fault}");
    assert_eq!(fs::read(&path).expect("it is there"), before);
    assert_eq!(files(&bench), ["saved"]);
    until_said(&bench, "resumed", 2);
    // The guest does not stop for what cannot be written.
    let nowhere = bench.path("nowhere/saved").display().to_string();
    let fault = bench.fails(1, &["save", "one", &nowhere]);
    assert!(fault.contains("cannot write"), "{fault}");
    bench.fails(1, &["save", "two", &path]);
    for directory in ["", "/", "x/.."] {
        bench.fails(1, &["save", "one", directory]);
    }
    until_said(&bench, "suspended", 2);
    assert_eq!(files(&bench), ["saved"]);
    bench.ok(&["destroy", "one"]);
}

#[test]
fn command_that_dies_before_it_has_the_file_lets_the_domain_go_on() {
    let (bench, _) = bench_with("hello");
    let socket = bench.domain_dir(1).join("control.sock");
    let mut stream = UnixStream::connect(socket).expect("it listens");
    let request = r#"{"version":1,"body":{"op":"save","config":null}}"#;
    writeln!(stream, "{request}").expect("it reads");
    let mut reply = String::new();
    let mut reader = BufReader::new(stream);
    reader.read_line(&mut reply).expect("text");
    assert!(reply.contains("saving"), "{reply}");
    // Meanwhile it stays as it is, and nobody has to wait to hear that.
    for command in [
        &["rename", "one", "two"][..],
        &["mem-set", "one", "32"],
        &["block-attach", "one", "/img/b,,xvdb"],
        &["save", "one", "/dev/null"],
    ] {
        let refused = bench.fails(1, command);
        assert!(refused.contains("it is being saved"), "{refused}");
    }
    drop(reader);
    until_said(&bench, "resumed", 1);
    assert!(bench.row("one").is_some());
    bench.ok(&["destroy", "one"]);
}

#[test]
fn restored_domain_has_what_others_leave_when_all_of_it_is_there() {
    // Two thirds of the host each.
    const LARGE: &str = "memory=700000";
    let bench = Bench::new();
    bench.create("one", &[LARGE]);
    bench.tell("one", "hello");
    let path = bench.path("saved").display().to_string();
    bench.ok(&["save", "one", &path]);
    let whole = fs::read(&path).expect("it is there");
    let pipe = bench.path("pipe").display().to_string();
    let made = Command::new("mkfifo").arg(&pipe).status().expect("it runs");
    assert!(made.success());
    for comes_meanwhile in [false, true] {
        if !comes_meanwhile {
            bench.create("other", &[LARGE]);
        }
        let done = thread::scope(|scope| {
            let command = scope.spawn(|| bench.run(&["restore", &pipe]));
            let mut feed = File::create(&pipe).expect("it reads");
            let (first, last) = whole.split_at(whole.len() - 2000);
            feed.write_all(first).expect("it reads");
            until("it begins", || bench.row("one").is_some());
            match comes_meanwhile {
                true => bench.create("other", &[LARGE]),
                false => drop(bench.ok(&["destroy", "other"])),
            }
            feed.write_all(last).expect("it reads");
            drop(feed);
            command.join().expect("no panic")
        });
        let fault = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.success(), !comes_meanwhile, "{fault}");
        assert_eq!(fault.contains("others may take"), comes_meanwhile);
        let name = if comes_meanwhile { "other" } else { "one" };
        bench.ok(&["destroy", name]);
    }
}

#[test]
fn restore_of_what_is_no_saved_domain_is_refused_and_leaves_nothing() {
    let (bench, path) = bench_with("hello");
    bench.ok(&["save", "one", &path]);
    let whole = fs::read(&path).expect("it is there");
    let middle = whole.len() - 2000;
    let cases: [(&str, Vec<u8>, &str); 4] = [
        ("short", whole[..middle].to_vec(), "it ends too soon"),
        ("empty", Vec::new(), "this is no saved domain"),
        (
            "other",
            b"name='one'\n".repeat(99),
            "this is no saved domain",
        ),
        (
            "changed",
            {
                let mut changed = whole.clone();
                changed[middle] ^= 1;
                changed
            },
            "it is damaged: the checksum",
        ),
    ];
    for (name, bytes, why) in cases {
        let path = bench.path(name).display().to_string();
        fs::write(&path, bytes).expect("writable");
        let fault = bench.fails(1, &["restore", &path]);
        assert!(fault.contains(why) && fault.contains(&path), "{fault}");
        assert_eq!(fault.matches(why).count(), 1, "{fault}");
        assert_eq!(bench.row("one"), None);
    }
    let fault = bench.fails(1, &["restore", "/nowhere"]);
    assert!(
        fault.contains("cannot open /nowhere: No such file or directory (os error 2)\n"),
        "{fault}"
    );
    bench.ok(&["restore", &path]);
    bench.ok(&["destroy", "one"]);
}

#[test]
fn other_configurations_are_taken_at_either_end() {
    let (bench, path) = bench_with("hello");
    let file = |name: &str| {
        let kernel = bench.path("kernel").display().to_string();
        let text = format!("name='{name}'\ntype='pvh'\nmemory=64\nkernel='{kernel}'\n");
        let path = bench.path(&format!("{name}.cfg")).display().to_string();
        fs::write(&path, text).expect("writable");
        path
    };
    bench.ok(&["save", "-c", "one", &path, &file("two")]);
    bench.ok(&["destroy", "one"]);
    bench.ok(&["restore", &path]);
    assert!(bench.row("two").is_some() && bench.row("one").is_none());
    bench.ok(&["destroy", "two"]);
    bench.ok(&["restore", "-e", &file("one"), &path]);
    assert!(bench.row("one").is_some());
    bench.ok(&["destroy", "one"]);
    let bad = bench.path("bad.cfg").display().to_string();
    fs::write(&bad, "name=").expect("writable");
    let fault = bench.fails(1, &["restore", &bad, &path]);
    assert!(fault.contains("no domain was restored"), "{fault}");
}

#[test]
fn configuration_of_the_next_start_is_saved_too() {
    let (bench, path) = bench_with("hello");
    let kernel = bench.path("kernel").display().to_string();
    bench.ok(&[
        "config-update",
        "one",
        "/dev/null",
        &format!("name='one'; type='pvh'; memory=96; kernel='{kernel}'"),
    ]);
    bench.ok(&["save", "one", &path]);
    bench.ok(&["restore", &path]);
    assert_eq!(bench.row("one").expect("it runs")[2], "64");
    bench.ok(&["reboot", "one"]);
    until("the next start", || {
        bench.row("one").is_some_and(|row| row[2] == "96")
    });
    bench.ok(&["destroy", "one"]);
}

#[test]
fn restore_warns_of_disks_that_are_not_as_they_were() {
    let bench = Bench::new();
    let written = |path: &Path, seconds_ago| {
        let file = fs::OpenOptions::new().write(true).open(path);
        let time = SystemTime::now() - Duration::from_secs(seconds_ago);
        file.expect("there").set_modified(time).expect("a file");
    };
    let images = ["raw", "qcow2", "cd"].map(|name| bench.path(name));
    for image in &images {
        fs::write(image, [0; 512]).expect("writable");
        written(image, 1000);
    }
    let [raw, qcow2, cd] = images.each_ref().map(|image| image.display());
    bench.create(
        "one",
        &[&format!(
            "disk=['{raw},,xvda', '{qcow2},qcow2,xvdb', '{cd},,xvdc,r']"
        )],
    );
    let path = bench.path("saved");
    let file = path.display().to_string();
    bench.ok(&["save", "one", &file]);
    let warned = || {
        let done = bench.run(&["restore", "-p", &file]);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{said}");
        bench.ok(&["destroy", "one"]);
        let lines = said.lines().filter(|line| line.contains("WARNING"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(warned(), Vec::<String>::new());
    // Closing it may have made it longer; the other is not the guest's to write.
    fs::write(&images[1], [0; 1024]).expect("writable");
    fs::write(&images[2], [0; 1024]).expect("writable");
    assert_eq!(warned(), Vec::<String>::new());
    fs::write(&images[0], [0; 1024]).expect("writable");
    let said = warned();
    assert_eq!(said.len(), 1, "{said:?}");
    let sizes = "raw has 1024 bytes, and it had 512 when the domain was saved";
    assert!(said[0].contains(sizes), "{said:?}");
    // An older copy, and one that was written long after.
    fs::write(&images[0], [0; 512]).expect("writable");
    written(&images[0], 2000);
    written(&path, 100);
    let said = warned();
    assert_eq!(said.len(), 2, "{said:?}");
    for (line, name) in said.iter().zip(["raw", "qcow2"]) {
        assert!(
            line.contains(&format!("{name} was written last at ")),
            "{line}"
        );
    }
}

/// A domain that is saved with this disk; what is warned of where it is restored with another.
fn warnings(bench: &Bench, saved_with: &str, restored_with: &str) -> Vec<String> {
    bench.create("one", &[&format!("disk=['{saved_with}']")]);
    let file = bench.path("saved").display().to_string();
    bench.ok(&["save", "one", &file]);
    let kernel = bench.path("kernel").display().to_string();
    let other = bench.path("other.cfg");
    let text =
        format!("name='one'; type='pvh'; memory=64; kernel='{kernel}'; disk=['{restored_with}']");
    fs::write(&other, text).expect("writable");
    let done = bench.run(&["restore", "-p", &other.display().to_string(), &file]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    bench.ok(&["destroy", "one"]);
    let lines = said.lines().filter(|line| line.contains("WARNING"));
    lines.map(str::to_owned).collect()
}

#[test]
fn restore_warns_of_other_disks_in_the_place_of_those_that_were() {
    let bench = Bench::new();
    let image = |name: &str, bytes: usize, seconds_ago| {
        let path = bench.path(name);
        fs::write(&path, vec![0; bytes]).expect("writable");
        let time = SystemTime::now() - Duration::from_secs(seconds_ago);
        let file = fs::OpenOptions::new().write(true).open(&path);
        file.expect("there").set_modified(time).expect("a file");
        path.display().to_string()
    };
    let own = image("own", 512, 1000);
    let copy = image("copy", 512, 0);
    let old = image("old", 512, 2000);
    let long = image("long", 1024, 1000);
    let sizes = format!("{long} has 1024 bytes, and {own} of the saved domain had 512");
    let times = format!("{old} was written last at ");
    for (disk, expected) in [
        (format!("{own},,xvda"), None),
        (format!("{copy},,xvda"), None),
        (format!("{copy},,xvdb"), None),
        (format!("{old},,xvda"), Some(&times)),
        (format!("{long},,xvda"), Some(&sizes)),
        // Another form of the same has another size.
        (format!("{long},qcow2,xvda"), None),
    ] {
        let said = warnings(&bench, &format!("{own},,xvda"), &disk);
        assert_eq!(
            said.len(),
            usize::from(expected.is_some()),
            "{disk}: {said:?}"
        );
        if let Some(expected) = expected {
            assert!(said[0].contains(expected), "{disk}: {said:?}");
        }
    }
}

#[test]
fn restore_warns_of_block_devices_of_another_size() {
    let bench = Bench::new();
    let (small, large) = (LoopDevice::new(&bench, 1), LoopDevice::new(&bench, 2));
    let (Some(small), Some(large)) = (small, large) else {
        eprintln!("not tried, as there are no loop devices to be had");
        return;
    };
    let disk = |device: &LoopDevice| format!("{},,xvda", device.0);
    assert_eq!(
        warnings(&bench, &disk(&small), &disk(&small)),
        Vec::<String>::new()
    );
    let said = warnings(&bench, &disk(&small), &disk(&large));
    let expected = format!(
        "{} has 2097152 bytes, and {} of the saved domain had 1048576",
        large.0, small.0
    );
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains(&expected), "{said:?}");
}

/// A block device of its own for a test.
struct LoopDevice(String);

impl LoopDevice {
    fn new(bench: &Bench, mib: u64) -> Option<LoopDevice> {
        let path = bench.path(&format!("loop{mib}"));
        let file = fs::File::create(&path).expect("writable");
        file.set_len(mib << 20).expect("room");
        let mut losetup = std::process::Command::new("losetup");
        let made = losetup.args(["-f", "--show"]).arg(path).output().ok()?;
        let device = String::from_utf8(made.stdout).ok()?;
        made.status
            .success()
            .then(|| LoopDevice(device.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let mut losetup = std::process::Command::new("losetup");
        let _ = losetup.args(["-d", &self.0]).status();
    }
}
