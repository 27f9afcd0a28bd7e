//! Programs of the host that networks need, and processes of ours that are to end.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::Error;

/// How long a daemon has to end before it is killed.
const END: Duration = Duration::from_secs(2);

/// Where a program lies: in `PATH`, or where administrators' programs are although the user's `PATH` leaves them out.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}

/// A program, or the sentence that names its Debian package.
pub fn need(program: &'static str, package: &'static str) -> Result<PathBuf, Error> {
    find(program).ok_or(Error::NoTool { program, package })
}

/// Runs a program to its end with `input`; what it says on its error output is the error.
pub fn run<S: AsRef<OsStr>>(program: &Path, arguments: &[S], input: &str) -> Result<(), Error> {
    run_with(program, arguments, input, &[])
}

/// As [`run`], with more variables in the environment.
pub fn run_with<S: AsRef<OsStr>>(
    program: &Path,
    arguments: &[S],
    input: &str,
    environment: &[(&str, &str)],
) -> Result<(), Error> {
    let failed = |why: String| Error::Tool {
        program: program.display().to_string(),
        why,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A program that does not read its input says why by itself.
        let _ = pipe.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    Err(failed(match said.is_empty() {
        true => output.status.to_string(),
        false => said.chars().take(300).collect(),
    }))
}

/// Ends the process `pid` if `is_ours` says so of its command line, and waits until it is gone.
pub fn end_process(pid: i32, is_ours: impl Fn(&str) -> bool) -> io::Result<()> {
    let Some(id) = Pid::from_raw(pid) else {
        return Ok(());
    };
    // The descriptor is taken before the look at the command line: from then on the number cannot come to mean another process.
    let Ok(process) = rustix::process::pidfd_open(id, PidfdFlags::empty()) else {
        return Ok(());
    };
    let command_line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if !is_ours(&String::from_utf8_lossy(&command_line)) {
        return Ok(());
    }
    for signal in [Signal::TERM, Signal::KILL] {
        if rustix::process::pidfd_send_signal(&process, signal).is_err() {
            return Ok(());
        }
        let most = Timespec {
            tv_sec: END.as_secs() as i64,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        if rustix::event::poll(&mut fds, Some(&most))? > 0 {
            return Ok(());
        }
    }
    Ok(())
}
