//! `image debian` around the program that makes the packages' root, which is a script here.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Output, Stdio};

use rustix::process::{Pid, Signal, geteuid, kill_process, kill_process_group};

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

#[test]
fn image_debian_says_once_and_at_once_what_cannot_be_read() {
    let bench = Bench::new();
    let path = bench.path("web.img").display().to_string();
    let missing = bench.path("missing").display().to_string();
    let nowhere = bench.path("missing/web.img").display().to_string();
    for arguments in [
        &["--ssh-key", &missing, &path] as &[&str],
        &["--cloud-init", "--user-data", &missing, &path],
        &[&nowhere],
    ] {
        let output = image(&bench, "touch $0.began; exit 1", arguments);
        assert_eq!(output.status.code(), Some(1));
        assert!(!bench.path("tools/mmdebstrap.began").exists());
        let said = said(&output);
        assert_eq!(said.matches("No such file").count(), 1, "{said}");
    }
}

#[test]
fn image_debian_takes_public_keys_alone() {
    let bench = Bench::new();
    let path = bench.path("web.img").display().to_string();
    let key = bench.path("key").display().to_string();
    let private = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjE=\n-----END OPENSSH PRIVATE KEY-----\n";
    for wrong in [private, "", "# nobody\n"] {
        fs::write(&key, wrong).expect("writable");
        let script = "touch $0.began; exit 1";
        let output = image(&bench, script, &["--ssh-key", &key, &path]);
        assert_eq!(output.status.code(), Some(1));
        let said = said(&output);
        assert!(said.contains("/key is no public key"), "{said}");
        assert!(!bench.path("tools/mmdebstrap.began").exists());
    }
    fs::write(
        &key,
        "# mine\nssh-ed25519 AAAA me\n\nno-pty,command=\"a b\" ecdsa-sha2-nistp256 BBBB\n",
    )
    .expect("writable");
    let script = format!("{WORKS}; echo \"$SSH_KEYS\" >>$INITRD");
    let output = image(&bench, &script, &["--ssh-key", &key, &path]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let written = fs::read_to_string(bench.path("web.initrd")).expect("made");
    assert!(written.contains("ssh-ed25519 AAAA me"), "{written}");
}

#[test]
fn image_debian_takes_no_empty_password() {
    let bench = Bench::new();
    let path = bench.path("web.img").display().to_string();
    let password = bench.path("password").display().to_string();
    for (text, wrong) in [("", true), ("\nsecret\n", true), ("secret", false)] {
        fs::write(&password, text).expect("writable");
        let script = format!("{WORKS}; echo $PASSWORD >$INITRD");
        let output = image(&bench, &script, &["--root-password-file", &password, &path]);
        let said = said(&output);
        assert_eq!(output.status.success(), !wrong, "{said}");
        assert_eq!(said.contains("/password is empty"), wrong, "{said}");
    }
    let written = fs::read_to_string(bench.path("web.initrd")).expect("made");
    assert_eq!(written, "secret\n");
}

const NOTHING: [&str; 0] = [];

/// What mmdebstrap is like in the middle: a tree with a mount where it may make one, files beside it, and children. A request to end makes it
/// clear up.
const WORKS_LONG: &str = "tree=$(mktemp -d) other=$(mktemp -d)
trap 'umount $tree; rm -rf $tree $other; exit 1' TERM
[ $(id -u) != 0 ] || mount -t tmpfs tree $tree
touch $tree/file $other/file
sleep 600 &
touch $BEGAN
wait";

/// An image that is being made, with temporary files of its own.
struct Making {
    bench: Bench,
    child: Child,
}

impl Making {
    /// Returns when mmdebstrap is in the middle.
    fn begin(prepare: impl FnOnce(&mut std::process::Command)) -> Making {
        Making::begin_with(Bench::new(), WORKS_LONG, prepare)
    }

    /// One whose mmdebstrap is in no name spaces of its own, for root either.
    fn begin_open(script: &str) -> Making {
        let bench = Bench::new();
        let program = bench.path("tools/setpriv");
        fs::create_dir(bench.path("tools")).expect("writable");
        std::os::unix::fs::symlink("/bin/false", program).expect("writable");
        Making::begin_with(bench, script, |_| {})
    }

    fn begin_with(
        bench: Bench,
        script: &str,
        prepare: impl FnOnce(&mut std::process::Command),
    ) -> Making {
        let (temporary, began) = (bench.path("tmp"), bench.path("began"));
        fs::create_dir(&temporary).expect("writable");
        fs::create_dir(bench.path("images")).expect("writable");
        let path = bench.path("images/web.img").display().to_string();
        let mut command = command(&bench, script, &[&path]);
        command
            .env("TMPDIR", &temporary)
            .env("BEGAN", &began)
            .stderr(Stdio::piped());
        prepare(&mut command);
        let child = command.spawn().expect("started");
        until("it is in the middle", || began.exists());
        Making { bench, child }
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    fn end(&mut self) -> Output {
        let status = self.child.wait().expect("a child");
        let mut stderr = Vec::new();
        let mut pipe = self.child.stderr.take().expect("piped");
        std::io::Read::read_to_end(&mut pipe, &mut stderr).expect("text");
        Output {
            status,
            stdout: Vec::new(),
            stderr,
        }
    }

    fn mounts(&self) -> Vec<String> {
        let place = self.bench.path("tmp").display().to_string();
        fs::read_to_string("/proc/self/mounts")
            .expect("there")
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .filter(|path| path.starts_with(&place))
            .map(String::from)
            .collect()
    }

    /// The processes that have this test's mmdebstrap in their PATH.
    fn processes(&self) -> Vec<Pid> {
        let tools = self.bench.path("tools").display().to_string();
        let entries = fs::read_dir("/proc").expect("there").flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid: &i32| {
                let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                String::from_utf8_lossy(&environment).contains(&tools)
            })
            .filter_map(Pid::from_raw)
            .collect()
    }

    fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.bench.path(directory)).expect("there");
        let path = |entry: fs::DirEntry| entry.path().display().to_string();
        entries.map(|entry| path(entry.expect("there"))).collect()
    }

    fn leaves_nothing(&self) {
        assert_eq!(self.processes(), []);
        assert_eq!(self.mounts(), NOTHING);
        assert_eq!(self.names("tmp"), NOTHING);
        assert_eq!(self.names("images"), NOTHING);
    }
}

impl Drop for Making {
    /// What a test that has failed leaves.
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = kill_process(pid, Signal::KILL);
        }
        for path in self.mounts() {
            let _ = std::process::Command::new("umount").arg(path).status();
        }
    }
}

#[test]
fn image_debian_interrupted_leaves_nothing() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut making = Making::begin(|_| {});
        making.send(signal);
        let output = making.end();
        making.leaves_nothing();
        assert_eq!(output.status.signal(), Some(signal.as_raw()));
        assert!(said(&output).contains("interrupted"), "{}", said(&output));
    }
}

#[test]
fn image_debian_interrupted_at_a_terminal_leaves_nothing() {
    use std::os::unix::process::CommandExt;
    let mut making = Making::begin(|command| {
        command.process_group(0);
    });
    // Ctrl-C is for all processes of the group in the foreground.
    kill_process_group(Pid::from_child(&making.child), Signal::INT).expect("it runs");
    let output = making.end();
    making.leaves_nothing();
    assert_eq!(output.status.signal(), Some(Signal::INT.as_raw()));
}

#[test]
fn image_debian_interrupted_lets_mmdebstrap_clear_up() {
    let mut making = Making::begin_open(WORKS_LONG);
    making.send(Signal::INT);
    assert_eq!(making.end().status.signal(), Some(Signal::INT.as_raw()));
    making.leaves_nothing();
}

#[test]
fn image_debian_interrupted_twice_does_not_wait() {
    let deaf = "trap '' TERM; touch $BEGAN; while :; do sleep 0.05; done";
    let mut making = Making::begin_open(deaf);
    let began = std::time::Instant::now();
    making.send(Signal::INT);
    making.send(Signal::TERM);
    assert_eq!(making.end().status.signal(), Some(Signal::INT.as_raw()));
    // mmdebstrap would get 20 seconds.
    assert!(began.elapsed().as_secs() < 10);
    until("it has ended", || making.processes().is_empty());
}

#[test]
fn image_debian_goes_on_under_nohup() {
    let mut making = Making::begin(|command| {
        let mut nohup = std::process::Command::new("sh");
        nohup
            .args(["-c", "trap '' HUP; exec \"$@\"", "sh"])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            nohup.env(name, value.expect("set"));
        }
        nohup.stdin(Stdio::null()).stderr(Stdio::piped());
        *command = nohup;
    });
    making.send(Signal::HUP);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(making.child.try_wait().expect("a child").is_none());
    making.send(Signal::TERM);
    assert_eq!(making.end().status.signal(), Some(Signal::TERM.as_raw()));
    making.leaves_nothing();
}

#[test]
fn image_debian_killed_leaves_no_mounts_and_the_next_clears_up() {
    if !geteuid().is_root() {
        eprintln!("not tried: mounts of the host are root's");
        return;
    }
    let mut making = Making::begin(|_| {});
    making.send(Signal::KILL);
    making.child.wait().expect("a child");
    until("mmdebstrap has ended", || making.processes().is_empty());
    assert_eq!(making.mounts(), NOTHING);
    let path = making.bench.path("images/web.img").display().to_string();
    let output = command(&making.bench, WORKS, &[&path])
        .env("TMPDIR", making.bench.path("tmp"))
        .output()
        .expect("started");
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(making.names("tmp"), NOTHING);
    assert!(!making.bench.path("images/.web.unfinished").exists());
}
