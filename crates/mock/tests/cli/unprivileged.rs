//! A user without any privilege. Run by root the program is started as one; others are one.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::until;

/// Neither a user that owns anything nor, for sure, root.
const UID: u32 = 65534;

struct User {
    home: PathBuf,
    root: bool,
}

impl User {
    /// `test` is a word that no other test has.
    fn new(test: &str) -> User {
        let home = format!("hospes-user-{test}-{}", std::process::id());
        let home = std::env::temp_dir().join(home);
        let user = User {
            root: rustix::process::geteuid().is_root(),
            home,
        };
        for directory in ["", "run"] {
            let path = user.home.join(directory);
            std::fs::create_dir_all(&path).expect("temporary directory");
            let private = std::fs::Permissions::from_mode(0o700);
            std::fs::set_permissions(&path, private).expect("ours");
        }
        std::fs::write(user.home.join("kernel"), "no kernel").expect("writable");
        // The build directory may be closed to others.
        std::fs::copy(env!("CARGO_BIN_EXE_hospes-mock"), user.program()).expect("writable");
        if user.root {
            for path in ["", "run", "kernel", "hospes"] {
                chown(user.home.join(path), Some(UID), Some(UID)).expect("root may");
            }
        }
        user
    }

    fn program(&self) -> PathBuf {
        self.home.join("hospes")
    }

    fn command(&self) -> Command {
        let mut command = if self.root {
            let mut command = Command::new("setpriv");
            let (uid, gid) = (format!("--reuid={UID}"), format!("--regid={UID}"));
            command.args([
                &uid,
                &gid,
                "--clear-groups",
                "--bounding-set=-all",
                "--no-new-privs",
            ]);
            command.arg(self.program());
            command
        } else {
            Command::new(self.program())
        };
        command
            .current_dir(&self.home)
            .env_remove("HOSPES_RUN_DIR")
            .env_remove("HOSPES_LOG_DIR")
            .env_remove("XDG_STATE_HOME")
            .env("XDG_RUNTIME_DIR", self.home.join("run"))
            .env("HOME", &self.home)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let output = self.command().args(arguments).output();
        output.expect("setpriv of util-linux is there")
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.run(&["destroy", "mine"]);
        let _ = std::fs::remove_dir_all(&self.home);
    }
}

#[test]
fn user_without_privileges_has_domains_of_his_own() {
    let user = User::new("own");
    user.ok(&[
        "create",
        "-q",
        "/dev/null",
        "name='mine'; type='pvh'; kernel='kernel'; memory=64; vif=['type=user']",
    ]);
    assert!(user.ok(&["list"]).contains("\nmine "));
    assert!(
        user.ok(&["list", "-l", "mine"])
            .contains("\"nictype\": \"user\"")
    );
    let log = user.home.join(".local/state/hospes/mine.console.log");
    until("the guest has printed", || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("mock guest ready"))
    });
    for path in [".local/state/hospes", "run/hospes"] {
        assert_eq!(mode(&user.home.join(path)), 0o700, "{path}");
    }
    user.ok(&["shutdown", "-w", "mine"]);
    until("it is gone", || !user.ok(&["list"]).contains("\nmine "));
}

#[test]
fn directories_of_others_are_named_with_what_to_do() {
    let user = User::new("foreign");
    let closed = user.home.join("closed");
    std::fs::create_dir(&closed).expect("new");
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o000)).expect("ours");
    let create = [
        "create",
        "-q",
        "/dev/null",
        "name='mine'; type='pvh'; kernel='kernel'; memory=64",
    ];
    let inside = closed.join("run").display().to_string();
    for (variable, directory, command, expected) in [
        (
            "HOSPES_RUN_DIR",
            "/",
            &["list"][..],
            "belongs to the user root",
        ),
        (
            "HOSPES_RUN_DIR",
            "/",
            &["destroy", "x"],
            "belongs to the user root",
        ),
        ("HOSPES_RUN_DIR", "/", &create, "belongs to the user root"),
        ("HOSPES_LOG_DIR", "/", &create, "belongs to the user root"),
        (
            "HOSPES_RUN_DIR",
            &inside,
            &["list"],
            "cannot reach the directory",
        ),
        (
            "HOSPES_RUN_DIR",
            &inside,
            &create,
            "cannot reach the directory",
        ),
    ] {
        let output = user
            .command()
            .args(command)
            .env(variable, directory)
            .output();
        let output = output.expect("setpriv of util-linux is there");
        assert!(!output.status.success(), "{command:?}");
        let said = String::from_utf8(output.stderr).expect("text");
        for part in [expected, directory, variable, "a directory of your own"] {
            assert!(said.contains(part), "{command:?} lacks {part}: {said}");
        }
    }
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o700)).expect("ours");
}

fn mode(path: &Path) -> u32 {
    let metadata = std::fs::metadata(path).expect("there");
    metadata.permissions().mode() & 0o777
}
