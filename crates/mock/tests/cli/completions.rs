//! Completion scripts in the shells that read them.

use std::process::Command;

use crate::common::Bench;

/// What fish makes of a line, without the descriptions.
fn completed(bench: &Bench, line: &str) -> Vec<String> {
    let script = bench.path("completions.fish");
    std::fs::write(&script, bench.ok(&["completions", "fish"])).expect("writable");
    let bin = bench.path("bin");
    std::fs::create_dir_all(&bin).expect("writable");
    let _ = std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_hospes-mock"), bin.join("hospes"));
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("fish")
        .arg("--no-config")
        .args([
            "-c",
            "source completions.fish; or exit 1; complete -C $argv",
        ])
        .arg(line)
        .env("PATH", format!("{}:{path}", bin.display()))
        .env("HOME", bench.path("."))
        .env("HOSPES_RUN_DIR", bench.path("run"))
        .env("HOSPES_LOG_DIR", bench.path("log"))
        .current_dir(bench.path("."))
        .output()
        .expect("fish is installed (guests/install.sh test)");
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines()
        .filter_map(|line| line.split('\t').next())
        .map(String::from)
        .collect()
}

#[test]
fn fish_completes_commands_options_and_names() {
    let bench = Bench::new();
    bench.create("we b", &[]);
    bench.create("we$(touch hit)", &[]);
    bench.create("other", &[]);
    assert_eq!(
        completed(&bench, "hospes vcpu-"),
        ["vcpu-list", "vcpu-pin", "vcpu-set"]
    );
    assert_eq!(
        completed(&bench, "hospes image --fo"),
        ["--force", "--format"]
    );
    assert_eq!(
        completed(&bench, "hospes pause we"),
        ["we b", "we$(touch hit)"]
    );
    assert!(!bench.path("hit").exists(), "the name was run");
}
