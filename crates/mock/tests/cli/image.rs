//! `image debian` around the program that makes the packages' root, which is a script here.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Output, Stdio};

use crate::common::{Bench, until};

/// Runs `image debian` with this script as mmdebstrap.
fn image(bench: &Bench, script: &str, arguments: &[&str]) -> Output {
    command(bench, script, arguments)
        .output()
        .expect("the program can be started")
}

fn command(bench: &Bench, script: &str, arguments: &[&str]) -> std::process::Command {
    let tools = bench.path("tools");
    fs::create_dir_all(&tools).expect("writable");
    // Beside, then renamed: one that is being written cannot be executed.
    let (new, program) = (bench.path("new"), tools.join("mmdebstrap"));
    fs::write(&new, format!("#!/bin/sh\n{script}\n")).expect("writable");
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("ours");
    fs::rename(&new, &program).expect("ours");
    let mut command = bench.command();
    command
        .args(["image", "debian"])
        .args(arguments)
        .env("PATH", format!("{}:/usr/bin:/bin", tools.display()))
        .stdin(Stdio::null());
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const WORKS: &str = "echo fine; echo disk >$IMAGE; echo kernel >$KERNEL; echo initrd >$INITRD";
const FAILS: &str = "echo this went wrong; exit 1";

#[test]
fn image_debian_leaves_other_files_alone() {
    let bench = Bench::new();
    fs::create_dir(bench.path("images")).expect("writable");
    let path = |name: &str| bench.path("images").join(name);
    let image_path = path("web.img").display().to_string();
    fs::write(path("web.log"), "another's").expect("writable");
    let output = image(&bench, FAILS, &[&image_path]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("this went wrong"),
        "{}",
        said(&output)
    );
    assert!(said(&output).contains("web.1.log"), "{}", said(&output));
    let log = fs::read_to_string(path("web.1.log")).expect("kept");
    assert_eq!(log, "this went wrong\n");
    let output = image(&bench, WORKS, &[&image_path]);
    assert!(output.status.success(), "{}", said(&output));
    let content = |name| fs::read_to_string(path(name)).expect("there");
    assert_eq!(content("web.log"), "another's");
    assert_eq!(content("web.vmlinuz"), "kernel\n");
    let mut names: Vec<_> = fs::read_dir(bench.path("images"))
        .expect("there")
        .map(|entry| entry.expect("there").file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "web.1.log",
            "web.cfg",
            "web.img",
            "web.initrd",
            "web.log",
            "web.vmlinuz"
        ]
    );
    let wrong = path("web.log").display().to_string();
    let output = image(&bench, WORKS, &["--force", &wrong]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert_eq!(content("web.log"), "another's");
}

#[test]
fn image_debian_twice_at_once_is_refused() {
    let bench = Bench::new();
    let path = bench.path("web.img").display().to_string();
    let (began, go) = (bench.path("began"), bench.path("go"));
    let waits = format!(
        "touch {}; while [ ! -e {} ]; do sleep 0.05; done; {WORKS}",
        began.display(),
        go.display()
    );
    let mut first = command(&bench, &waits, &[&path]).spawn().expect("started");
    until("the first has begun", || began.exists());
    let output = image(&bench, WORKS, &["--force", &path]);
    fs::write(go, "").expect("writable");
    assert!(first.wait().expect("a child").success());
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("another image is being made in"),
        "{}",
        said(&output)
    );
    // The disk keeps its size.
    assert_eq!(fs::metadata(path).expect("made").len() % 4096, 5);
}

#[test]
fn image_debian_forced_refuses_an_image_in_use() {
    let bench = Bench::new();
    let path = bench.path("web.img");
    fs::write(&path, [7; 8192]).expect("writable");
    let held = hospes_image::open(&hospes_image::OpenSpec {
        path: path.clone(),
        format: hospes_image::Format::Raw,
        read_only: true,
        direct: false,
        discard: false,
        sector_bytes: None,
        lock_owner: "domain 3 (web)".into(),
    })
    .expect("an image");
    let text = path.display().to_string();
    let output = image(&bench, WORKS, &["--force", &text]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("is in use"), "{}", said(&output));
    assert_eq!(fs::read(&path).expect("there"), [7; 8192]);
    drop(held);
    let output = image(&bench, WORKS, &["--force", &text]);
    assert!(output.status.success(), "{}", said(&output));
}
