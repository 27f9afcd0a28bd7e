//! Where run-time state and logs are kept.

use std::env;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, at};

/// Chooses the directory of run-time state.
pub const RUN_VARIABLE: &str = "HOSPES_RUN_DIR";
/// Where root's run-time state is by default.
pub const DEFAULT_RUN: &str = "/run/hospes";
/// Longest path of a directory of run-time state: what Linux takes as the path of a socket, less the longest below it.
const RUN_BYTES_MAX: usize = 107 - "/domains/32751/control.sock".len();
/// Chooses the directory of logs.
pub const LOG_VARIABLE: &str = "HOSPES_LOG_DIR";

/// Chooses the directory of core files.
pub const DUMP_VARIABLE: &str = "HOSPES_DUMP_DIR";

/// The directories of one user's domains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paths {
    /// Sockets, locks, records: gone after a reboot of the host.
    pub run: PathBuf,
    /// `<name>.log` with the messages of the domain process, `<name>.console.log` with what the guest printed.
    pub log: PathBuf,
    /// `<name>` with the core of the guest that has last crashed, where that is wanted.
    pub dump: PathBuf,
}

impl Paths {
    /// The directories of the calling user: `$HOSPES_RUN_DIR`, else `/run/hospes` for root and
    /// `$XDG_RUNTIME_DIR/hospes` for others; `$HOSPES_LOG_DIR`, else `/var/log/hospes` for root and
    /// `$XDG_STATE_HOME/hospes` (by default `~/.local/state/hospes`) for others; `$HOSPES_DUMP_DIR`, else `/var/lib/hospes/dump` for root and
    /// `dump` in that directory for others.
    pub fn from_environment() -> Result<Paths> {
        let root = rustix::process::geteuid().is_root();
        Paths::choose(root, |name| {
            env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        })
    }

    fn choose(root: bool, variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Paths> {
        let run = match variable(RUN_VARIABLE) {
            Some(path) => path,
            None if root => PathBuf::from(DEFAULT_RUN),
            None => variable("XDG_RUNTIME_DIR")
                .ok_or(Error::NoDirectory {
                    what: "run-time state ($XDG_RUNTIME_DIR is not set)",
                    variable: RUN_VARIABLE,
                })?
                .join("hospes"),
        };
        let state = |what, name| {
            let home = || Some(variable("HOME")?.join(".local/state"));
            let state = variable("XDG_STATE_HOME").or_else(home);
            state
                .map(|state| state.join("hospes"))
                .ok_or(Error::NoDirectory {
                    what,
                    variable: name,
                })
        };
        let log = match variable(LOG_VARIABLE) {
            Some(path) => path,
            None if root => PathBuf::from("/var/log/hospes"),
            None => state("logs ($HOME is not set)", LOG_VARIABLE)?,
        };
        let dump = match variable(DUMP_VARIABLE) {
            Some(path) => path,
            None if root => PathBuf::from("/var/lib/hospes/dump"),
            None => state("core files ($HOME is not set)", DUMP_VARIABLE)?.join("dump"),
        };
        // Domain processes run in another working directory.
        let absolute =
            |path: PathBuf| std::path::absolute(&path).map_err(at("cannot resolve", &path));
        let run = absolute(run)?;
        if run.as_os_str().len() > RUN_BYTES_MAX {
            return Err(Error::RunTooLong {
                path: run,
                most: RUN_BYTES_MAX,
                variable: RUN_VARIABLE,
            });
        }
        Ok(Paths {
            run,
            log: absolute(log)?,
            dump: absolute(dump)?,
        })
    }

    /// Makes the directories, readable by the user alone.
    pub fn create(&self) -> Result<()> {
        make_private(&self.run, RUN_VARIABLE)?;
        make_private(&self.log, LOG_VARIABLE)
    }

    /// Whether there is the directory of run-time state, in which the calling user may look: root in everybody's, others in their own.
    pub(crate) fn has_run(&self) -> Result<bool> {
        let metadata = match fs::metadata(&self.run) {
            Ok(metadata) => metadata,
            Err(fault) if fault.kind() == ErrorKind::NotFound => return Ok(false),
            Err(fault) => return Err(unreached("cannot look at", &self.run, RUN_VARIABLE, fault)),
        };
        let owner = User(metadata.uid());
        if owner != User::of_this_process() && !rustix::process::geteuid().is_root() {
            return Err(foreign(&self.run, owner, RUN_VARIABLE));
        }
        Ok(true)
    }

    /// Makes the directory of core files, readable by the user alone.
    pub fn create_dump(&self) -> Result<()> {
        make_private(&self.dump, DUMP_VARIABLE)
    }

    /// The core of a domain that has crashed.
    pub fn core(&self, name: &str) -> PathBuf {
        self.dump.join(name)
    }

    /// Messages of the domain process.
    pub fn domain_log(&self, name: &str) -> PathBuf {
        self.log.join(format!("{name}.log"))
    }

    /// What the guest printed.
    pub fn console_log(&self, name: &str) -> PathBuf {
        self.log.join(format!("{name}.console.log"))
    }
}

/// A user of the host, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User(u32);

impl User {
    fn of_this_process() -> User {
        User(rustix::process::geteuid().as_raw())
    }

    fn name(self) -> Option<String> {
        let users = fs::read_to_string("/etc/passwd").ok()?;
        let mut users = users.lines().map(|user| user.split(':'));
        users.find_map(|mut user| {
            let name = user.next()?;
            (user.nth(1)?.parse() == Ok(self.0)).then(|| name.to_owned())
        })
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "the user {name}"),
            None => write!(f, "the user with the id {}", self.0),
        }
    }
}

/// A directory another user could write to would let him put sockets in the place of ours.
fn make_private(path: &Path, variable: &'static str) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|fault| unreached("cannot make the directory", path, variable, fault))?;
    let metadata =
        fs::metadata(path).map_err(|fault| unreached("cannot look at", path, variable, fault))?;
    let (owner, user) = (User(metadata.uid()), User::of_this_process());
    if owner != user {
        return Err(foreign(path, owner, variable));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(Error::Open {
            path: path.to_path_buf(),
            mode: metadata.mode() & 0o777,
            variable,
        });
    }
    Ok(())
}

fn foreign(path: &Path, owner: User, variable: &'static str) -> Error {
    Error::Foreign {
        path: path.to_path_buf(),
        owner,
        user: User::of_this_process(),
        variable,
    }
}

fn unreached(what: &'static str, path: &Path, variable: &'static str, fault: io::Error) -> Error {
    match fault.kind() {
        ErrorKind::PermissionDenied => Error::OutOfReach {
            path: path.to_path_buf(),
            user: User::of_this_process(),
            source: fault,
            variable,
        },
        _ => at(what, path)(fault),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(root: bool, variables: &[(&str, &str)]) -> Result<Paths> {
        Paths::choose(root, |name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| PathBuf::from(value))
        })
    }

    #[test]
    fn choose_follows_user_and_variables() {
        type Case = (
            bool,
            &'static [(&'static str, &'static str)],
            [&'static str; 3],
        );
        const ROOT: [&str; 3] = ["/run/hospes", "/var/log/hospes", "/var/lib/hospes/dump"];
        let cases: &[Case] = &[
            (true, &[], ROOT),
            (true, &[("HOSPES_RUN_DIR", "/r")], ["/r", ROOT[1], ROOT[2]]),
            (true, &[("HOSPES_LOG_DIR", "/l")], [ROOT[0], "/l", ROOT[2]]),
            (true, &[("HOSPES_DUMP_DIR", "/d")], [ROOT[0], ROOT[1], "/d"]),
            (
                false,
                &[("XDG_RUNTIME_DIR", "/run/user/7"), ("HOME", "/h")],
                [
                    "/run/user/7/hospes",
                    "/h/.local/state/hospes",
                    "/h/.local/state/hospes/dump",
                ],
            ),
            (
                false,
                &[("XDG_RUNTIME_DIR", "/x"), ("XDG_STATE_HOME", "/s")],
                ["/x/hospes", "/s/hospes", "/s/hospes/dump"],
            ),
        ];
        for (root, variables, expected) in cases {
            let paths = choose(*root, variables).expect("all are known");
            let [run, log, dump] = expected.map(PathBuf::from);
            assert_eq!(paths, Paths { run, log, dump });
        }
    }

    #[test]
    fn choose_leaves_room_for_the_paths_of_sockets() {
        let long = |bytes: usize| format!("/{}", "r".repeat(bytes - 1));
        let named = |path: String| choose(true, &[("HOSPES_RUN_DIR", path.as_str())]);
        let run = named(long(80)).expect("short enough").run;
        let socket = run.join("domains/32751/control.sock");
        std::os::unix::net::SocketAddr::from_pathname(socket).expect("short enough");
        let error = named(long(81)).expect_err("too long").to_string();
        assert!(
            error.contains("80 bytes") && error.contains("HOSPES_RUN_DIR"),
            "{error}"
        );
    }

    #[test]
    fn choose_without_variables_names_the_one_to_set() {
        let error = choose(false, &[("HOME", "/h")]).expect_err("no run-time directory");
        assert!(error.to_string().contains("HOSPES_RUN_DIR"), "{error}");
        let error = choose(false, &[("XDG_RUNTIME_DIR", "/x")]).expect_err("no home");
        assert!(error.to_string().contains("HOSPES_LOG_DIR"), "{error}");
    }
}
