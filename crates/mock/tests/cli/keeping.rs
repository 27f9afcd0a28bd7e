//! Domains that are saved with the host's end and restored with its start.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::common::{Bench, until};

/// A bench with the directories of configurations and of saved domains, of which the second is not there yet.
struct Host {
    bench: Bench,
    auto: String,
    save: String,
}

impl Host {
    fn new() -> Host {
        let bench = Bench::new();
        let [auto, save] =
            ["auto", "var/save"].map(|directory| bench.path(directory).display().to_string());
        fs::create_dir(&auto).expect("writable");
        Host { bench, auto, save }
    }

    /// A domain that is started with the host, and runs.
    fn runs(&self, name: &str) {
        let kernel = self.bench.path("kernel").display().to_string();
        let text = format!("name='{name}'; type='pvh'; memory=64; kernel='{kernel}'\n");
        fs::write(format!("{}/{name}.cfg", self.auto), text).expect("writable");
        self.bench.create(name, &[]);
        self.bench.tell(name, &format!("I am {name}"));
    }

    fn stop(&self, status: i32) -> String {
        let line = ["domains", "stop", "--timeout", "5", "--save", &self.save];
        self.bench.fails(status, &line)
    }

    fn start(&self, status: i32) -> String {
        let line = ["domains", "start", "--dir", &self.auto];
        let line = [&line[..], &["--restore", &self.save]].concat();
        self.bench.fails(status, &line)
    }

    fn file(&self, name: &str) -> PathBuf {
        PathBuf::from(&self.save).join(name)
    }

    fn files(&self) -> Vec<String> {
        let listing = fs::read_dir(&self.save).expect("there");
        let names = listing.map(|item| item.expect("readable").file_name());
        let mut names: Vec<String> = names
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// How often the guest was restored with what it had heard.
    fn restored(&self, name: &str) -> usize {
        let log = self.bench.log(&format!("{name}.console.log"));
        log.matches(&format!("restored: I am {name}")).count()
    }

    fn state(&self, name: &str) -> Option<String> {
        self.bench.row(name).map(|row| row[4].clone())
    }
}

#[test]
fn saved_domains_go_on_and_the_others_are_started() {
    let host = Host::new();
    host.runs("one");
    host.runs("two");
    host.bench.create("ended", &["on_crash='preserve'"]);
    host.bench.tell("ended", "hello");
    host.bench.ok(&["rename", "two", "zwei"]);
    let mut console = host.bench.spawn(&["console", "ended"]);
    console.expect("mock guest ready");
    console.send("crash\n");
    until("it has crashed", || {
        host.state("ended").as_deref() == Some("---sc-")
    });
    host.stop(0);
    assert_eq!(host.bench.ok(&["vm-list"]).lines().count(), 2);
    assert_eq!(host.files(), ["one", "zwei"]);
    let mode = |path: &PathBuf| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(&host.file("one")), 0o600);
    assert_eq!(mode(&host.file("")), 0o700);
    let said = host.start(0);
    assert!(
        said.contains("one.cfg: domain one runs already")
            && said.contains("two.cfg: started")
            && said.contains("save/zwei: restored"),
        "{said}"
    );
    until("both go on", || {
        (
            host.restored("one"),
            host.bench
                .log("zwei.console.log")
                .contains("restored: I am two"),
        ) == (1, true)
    });
    assert_eq!(host.state("one").as_deref(), Some("-b----"));
    assert_eq!(host.files(), [""; 0]);
    host.start(0);
    assert_eq!(host.bench.ok(&["vm-list"]).lines().count(), 5);
}

#[test]
fn domain_that_cannot_be_saved_is_shut_down_and_the_others_are_saved() {
    let host = Host::new();
    host.runs("one");
    host.runs("two");
    host.bench.create(".dot", &[]);
    host.bench.tell("one", "broken");
    let said = host.stop(1);
    assert!(
        said.contains("Domain 1 (one) is not saved and has to be shut down")
            && said.contains("Domain 3 (.dot) is not saved and has to be shut down")
            && said.contains("Domain 1 has been shut down, reason code 0")
            && said.contains("not all domains could be saved"),
        "{said}"
    );
    assert_eq!(host.bench.ok(&["vm-list"]).lines().count(), 2);
    assert_eq!(host.files(), ["two"]);
    let said = host.start(0);
    assert!(
        said.contains("one.cfg: started") && said.contains("save/two: restored"),
        "{said}"
    );
    // Nothing can be written there.
    fs::remove_dir(&host.save).expect("empty");
    fs::write(&host.save, "").expect("writable");
    let said = host.stop(1);
    assert!(
        said.contains(
            "The domains are not saved and have to be shut down: cannot make the directory"
        ),
        "{said}"
    );
    assert_eq!(host.bench.ok(&["vm-list"]).lines().count(), 2);
    let said = host.start(1);
    assert!(said.contains("cannot list"), "{said}");
    assert_eq!(host.bench.ok(&["vm-list"]).lines().count(), 2);
}

#[test]
fn domain_that_cannot_be_restored_keeps_its_file_and_is_not_started() {
    let host = Host::new();
    for name in ["half", "none", "whole"] {
        host.runs(name);
    }
    host.stop(0);
    let whole = fs::read(host.file("half")).expect("there");
    fs::write(host.file("half"), &whole[..whole.len() - 1]).expect("writable");
    fs::write(host.file("none"), "not a saved domain").expect("writable");
    for _ in 0..2 {
        let said = host.start(1);
        for name in ["half", "none"] {
            assert!(
                said.contains(&format!("save/{name}: not restored: "))
                    && said.contains(&format!("{name}.cfg: domain {name} is not started")),
                "{said}"
            );
        }
        assert!(said.contains("2 domains could not be started"), "{said}");
        assert_eq!(host.files(), ["half", "none"]);
        assert_eq!(host.bench.ok(&["vm-list"]).lines().count(), 3);
    }
    fs::write(host.file("half"), whole).expect("writable");
    host.start(1);
    until("it goes on", || host.restored("half") == 1);
    assert_eq!(host.files(), ["none"]);
}

#[test]
fn state_of_a_domain_that_has_run_since_is_never_restored() {
    let host = Host::new();
    host.runs("one");
    host.stop(0);
    let state = fs::read(host.file("one")).expect("there");
    // Restored by hand, which leaves the file.
    host.bench
        .ok(&["restore", &host.file("one").display().to_string()]);
    let said = host.start(0);
    assert!(
        said.contains("has run since it was saved") && said.contains("save/.one.old"),
        "{said}"
    );
    assert_eq!(host.files(), [".one.old"]);
    assert_eq!(fs::read(host.file(".one.old")).expect("there"), state);
    // The domain cannot be saved in its place.
    fs::rename(host.file(".one.old"), host.file("one")).expect("writable");
    host.bench.ok(&["pause", "one"]);
    let said = host.stop(1);
    assert!(
        said.contains("it is paused") && said.contains("has run since it was saved"),
        "{said}"
    );
    assert_eq!(host.files(), [".one.old"]);
    let said = host.start(0);
    assert!(said.contains("one.cfg: started"), "{said}");
    assert_eq!(host.restored("one"), 1);
    // What is saved takes its place.
    fs::rename(host.file(".one.old"), host.file("one")).expect("writable");
    host.bench.tell("one", "I am one again");
    host.stop(0);
    assert_eq!(host.files(), ["one"]);
    assert!(fs::read(host.file("one")).expect("there") != state);
}
