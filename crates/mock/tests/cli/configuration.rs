//! The configuration of the next start.

use serde_json::{Value, json};

use crate::common::Bench;

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
