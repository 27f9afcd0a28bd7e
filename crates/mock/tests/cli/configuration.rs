//! The configuration of the next start and the name, also in the moment of a restart.

use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{Bench, Control, REBOOT, until};

fn item(bench: &Bench, name: &str) -> Value {
    let list: Value = serde_json::from_str(&bench.ok(&["list", "-l", name])).expect("JSON");
    list[0].clone()
}

/// `config-update` with another memory.
fn update<'a>(options: &[&'a str], kernel: &'a str, memory: &'a str) -> Vec<&'a str> {
    let rest = ["one", "/dev/null", "name='x'", kernel, memory];
    [&["config-update"], options, &rest].concat()
}

#[test]
fn config_update_shows_an_item_of_the_list_that_has_no_id() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let kernel = format!("kernel='{}'", bench.path("kernel").display());
    let uuid = item(&bench, "one")["config"]["c_info"]["uuid"].clone();
    let uuid = format!("uuid='{}'", uuid.as_str().expect("a text"));
    let create = [
        "create",
        "-n",
        "/dev/null",
        "name='x'",
        &kernel,
        "memory=80",
        &uuid,
    ];
    let dry: Value = serde_json::from_str(&bench.ok(&create)).expect("JSON");
    for (global, options) in [(&["-N"][..], &[][..]), (&[], &["-d"])] {
        let update = update(options, &kernel, "memory=80");
        let shown = bench.ok(&[global, &update].concat());
        assert!(
            shown
                .starts_with("{\n    \"domid\": null,\n    \"config\": {\n        \"c_info\": {\n"),
            "{shown}"
        );
        let shown: Value = serde_json::from_str(&shown).expect("JSON");
        assert_eq!(shown, json!({ "domid": null, "config": dry }));
    }
    assert_eq!(bench.ok(&update(&[], &kernel, "memory=96")), "");
}

#[test]
fn create_shows_the_configuration_once_with_the_uuid_of_the_domain() {
    let bench = Bench::new();
    let output = bench.run(&bench.creation("one", &["-q", "-d", "-n"]));
    assert!(output.stderr.is_empty(), "{output:?}");
    serde_json::from_slice::<Value>(&output.stdout).expect("JSON");
    let output = bench.run(&bench.creation("one", &["-q", "-d"]));
    assert!(output.stdout.is_empty(), "{output:?}");
    let shown: Value = serde_json::from_slice(&output.stderr).expect("JSON");
    let made = item(&bench, "one");
    assert_eq!(shown["c_info"], made["config"]["c_info"]);
}

#[test]
fn rename_that_fails_changes_nothing() {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.create("two", &[]);
    for (name, fault) in [("two", "\"two\" exists already"), ("Domain-0", "Domain-0")] {
        let said = bench.fails(1, &["rename", "one", name]);
        assert!(said.contains(fault), "{said}");
        assert_eq!(bench.row("one").expect("it has its name")[1], "1");
        assert_eq!(item(&bench, "one")["config"]["c_info"]["name"], "one");
        assert!(bench.path("log/one.log").exists());
    }
    bench.ok(&["rename", "one", "other"]);
    assert_eq!(bench.row("other").expect("it has another")[1], "1");
}

#[test]
fn change_that_comes_too_late_for_the_next_start_is_asked_of_that() {
    let bench = Bench::new();
    bench.create("one", &["memory=64", "maxmem=128"]);
    let mut control = Control::open(&bench, 1);
    let mut probe = Control::open(&bench, 1);
    // All have been accepted when they are answered.
    let requests = [
        json!({ "op": "rename", "name": "other" }),
        json!({ "op": "set-memory-target", "kib": 80 << 10 }),
        json!({ "op": "update-config", "config": record(&bench)["config"] }),
    ]
    .map(|request| {
        let mut control = Control::open(&bench, 1);
        control.send(r#"{"op":"info"}"#);
        assert!(control.answer().contains("info"));
        (control, request.to_string())
    });
    // The next id cannot be given as long as this is held.
    let registry = bench.hold_registry();
    control.send(REBOOT);
    assert!(control.answer().contains("done"));
    // This is not written down: it is done, or fails, until the configuration of the next start is taken.
    until("the next start is being made", || {
        probe.send(r#"{"op":"set-memory-max","kib":131072}"#);
        probe.answer().is_empty()
    });
    for (mut control, request) in requests {
        control.send(&request);
        assert_eq!(control.answer(), "", "{request}");
    }
    let mut command = bench.spawn(&["mem-set", "one", "96"]);
    drop(registry);
    assert_eq!(command.wait(), Some(0));
    assert_eq!(bench.row("one").expect("it runs again")[1], "2");
    let build = &item(&bench, "one")["config"]["b_info"];
    assert_eq!(build["target_memkb"], 96 << 10);
}

#[test]
fn change_that_waits_for_the_registry_in_a_restart_is_made_or_refused() {
    // Who gets the registry first is left to chance, so there are several.
    let benches = [(); 6].map(|()| {
        let bench = Bench::new();
        bench.create("one", &["vcpus=1", "maxvcpus=2"]);
        let mut config = record(&bench)["config"].clone();
        config["vcpus"] = 2.into();
        let (control, mut rebooting) = (Control::open(&bench, 1), Control::open(&bench, 1));
        let registry = bench.hold_registry();
        control.send(&json!({ "op": "update-config", "config": config }).to_string());
        rebooting.send(REBOOT);
        assert!(rebooting.answer().contains("done"));
        (bench, control, registry)
    });
    for (bench, ..) in &benches {
        until("it starts again", || {
            bench.log("one.log").contains("Rebooting now")
        });
    }
    // From then on it waits for the registry alone.
    thread::sleep(Duration::from_secs(3));
    for (bench, mut control, registry) in benches {
        drop(registry);
        let answer = control.answer();
        until("it runs again", || {
            bench
                .row("one")
                .is_some_and(|row| row[1] == "2" && row[4] == "-b----")
        });
        let record = std::fs::read(bench.domain_dir(2).join("domain.json")).expect("a record");
        let record: Value = serde_json::from_slice(&record).expect("JSON");
        let made = record["config"]["vcpus"] == 2;
        assert_eq!(answer.contains("done"), made, "{answer}");
    }
}

fn record(bench: &Bench) -> Value {
    let text = std::fs::read(bench.domain_dir(1).join("domain.json")).expect("a record");
    serde_json::from_slice(&text).expect("JSON")
}
