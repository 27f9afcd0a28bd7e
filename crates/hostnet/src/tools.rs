//! Programs of the host that networks need, and processes of ours that are to end.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::Error;

/// How long a daemon has to end before it is killed.
const END: Duration = Duration::from_secs(2);

/// How long a program may take that is to end by itself.
pub const RUN: Duration = Duration::from_secs(30);
/// How often somebody is asked whether a program may go on.
const MOMENT: Duration = Duration::from_millis(100);
/// Bytes of what a program says that are looked at.
const SAID_MAX: usize = 4096;

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

/// What a program says on its error output. It is a file and no pipe, so that whoever inherits it from the program keeps nobody waiting.
pub struct Said(File);

impl Said {
    pub fn new() -> io::Result<Said> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        Ok(Said(rustix::fs::memfd_create("stderr", flags)?.into()))
    }

    /// For the program.
    pub fn output(&self) -> io::Result<Stdio> {
        Ok(self.0.try_clone()?.into())
    }

    /// What was said so far, of which the beginning. Whoever has it still cannot say any more.
    pub fn text(self) -> String {
        // Without either, the error is the same but for its words.
        let _ = rustix::fs::fcntl_add_seals(&self.0, SealFlags::GROW);
        let mut said = vec![0; SAID_MAX];
        let count = self.0.read_at(&mut said, 0).unwrap_or(0);
        String::from_utf8_lossy(&said[..count]).into_owned()
    }
}

/// Waits until a process of ours has ended, or for `most`.
pub fn wait_for(child: &mut Child, most: Duration) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + most;
    let process = rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match rustix::event::poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Why a program that has run for so long is to be killed, where it is.
pub fn over(ran: Duration, most: Duration) -> Option<String> {
    let seconds = most.as_secs();
    (ran >= most).then(|| format!("it did not end within {seconds} seconds and was killed"))
}

/// Runs a program to its end with `input`, in English; what it says on its error output is the error.
pub fn run<S: AsRef<OsStr>>(program: &Path, arguments: &[S], input: &str) -> Result<(), Error> {
    let english = [("LC_ALL", "C")];
    let over = |ran| over(ran, RUN);
    run_with(program, arguments, input, &english, |_| (), over)
}

/// As [`run`] with these variables in the environment. `started` is told the program's process, which leads a group of its own. While it runs `over` is asked now and then, with how long it has: for the reason that it gives the program is killed,
/// with what it started.
pub fn run_with<S: AsRef<OsStr>>(
    program: &Path,
    arguments: &[S],
    input: &str,
    environment: &[(&str, &str)],
    started: impl FnOnce(u32),
    over: impl Fn(Duration) -> Option<String>,
) -> Result<(), Error> {
    let failed = |why: String| Error::Tool {
        program: program.display().to_string(),
        why,
    };
    let start = || {
        let said = Said::new()?;
        let child = Command::new(program)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(said.output()?)
            .process_group(0)
            .spawn()?;
        Ok((child, said))
    };
    let begun = Instant::now();
    let (mut child, said) = start().map_err(|error: io::Error| failed(error.to_string()))?;
    started(child.id());
    if let Some(mut pipe) = child.stdin.take() {
        // A program that does not read its input says why by itself.
        let _ = pipe.write_all(input.as_bytes());
    }
    let mut killed = None;
    let status = loop {
        let status = wait_for(&mut child, MOMENT).map_err(|error| failed(error.to_string()))?;
        if status.is_none() {
            killed = over(begun.elapsed());
        }
        if status.is_some() || killed.is_some() {
            break status;
        }
    };
    if status.is_none() {
        // Either fails only where it has just ended.
        let _ = rustix::process::kill_process_group(Pid::from_child(&child), Signal::KILL);
        let _ = child.wait();
    }
    let said = said.text();
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let said: String = said.chars().take(300).collect();
    let why = match status {
        Some(status) if status.success() => return Ok(()),
        Some(status) if said.is_empty() => status.to_string(),
        Some(_) => said,
        None => {
            let colon = if said.is_empty() { "" } else { ": " };
            format!("{}{colon}{said}", killed.unwrap_or_default())
        }
    };
    Err(failed(why))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(text: &str, most: Duration) -> Result<(), String> {
        let arguments = ["-c", text];
        let over = |ran| over(ran, most);
        run_with(Path::new("/bin/sh"), &arguments, "", &[], |_| (), over).map_err(|e| e.to_string())
    }

    #[test]
    fn run_waits_for_the_program_and_not_for_what_it_leaves() {
        let start = Instant::now();
        shell("sleep 20 &", RUN).unwrap();
        let error = shell("sleep 20 & echo no way >&2; exit 3", RUN).unwrap_err();
        assert_eq!(error, "/bin/sh failed: no way");
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn run_kills_what_does_not_end() {
        let start = Instant::now();
        let error = shell("echo busy >&2; sleep 20; true", Duration::from_secs(1)).unwrap_err();
        let expected = "it did not end within 1 seconds and was killed: busy";
        assert!(error.ends_with(expected), "{error}");
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
