//! The process of a machine, with all that it starts.
//!
//! A guest that has broken out can start processes, which have the descriptors of its images and networks. They are in the process group of the machine process, which its
//! filter of system calls lets none of them leave, and end with it.

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

/// The leader of its group, until it has been reaped.
pub(super) struct Process {
    child: Child,
    status: Option<ExitStatus>,
}

impl Process {
    /// Of the environment it gets what is meant for it: the rest may hold what the user would not tell a guest.
    pub(super) fn start(command: &mut Command) -> io::Result<Process> {
        let is_meant = |name: &OsStr| {
            let name = name.as_encoded_bytes();
            name.starts_with(b"HOSPES_") || name == b"RUST_BACKTRACE"
        };
        let meant = std::env::vars_os().filter(|(name, _)| is_meant(name));
        command.env_clear().envs(meant);
        Ok(Process {
            child: command.process_group(0).spawn()?,
            status: None,
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, where it did.
    pub(super) fn poll(&mut self) -> Option<ExitStatus> {
        let now = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        if self.status.is_none()
            && let Some(pid) = self.pid()
            && let Ok(Some(_)) = waitid(WaitId::Pid(pid), now)
        {
            self.kill();
        }
        self.status
    }

    /// Ends it, and what it has started.
    pub(super) fn kill(&mut self) {
        if self.status.is_some() {
            return;
        }
        // Before it is reaped: from then on its number, which is the group's, may be another's.
        if let Some(pid) = self.pid() {
            // Where all have ended there is nothing to kill.
            let _ = kill_process_group(pid, Signal::KILL);
        }
        self.status = self.child.wait().ok();
    }

    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(self.child.id() as i32)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{ChildStdout, Stdio};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    /// A process that starts another, and what both have open.
    fn start(script: &str) -> (Process, ChildStdout) {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::piped());
        let mut process = Process::start(&mut command).unwrap();
        let mut output = process.child.stdout.take().unwrap();
        let mut line = [0; 8];
        io::Read::read_exact(&mut output, &mut line).unwrap();
        assert_eq!(&line, b"started\n");
        (process, output)
    }

    /// Nobody has it open any more.
    fn is_closed(output: &ChildStdout) -> bool {
        let long = Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        let mut output = [PollFd::new(output, PollFlags::IN)];
        poll(&mut output, Some(&long)).unwrap() == 1
    }

    #[test]
    fn what_the_user_has_in_the_environment_stays_there() {
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        let (mut process, mut output) = start("echo started; env");
        let mut said = String::new();
        io::Read::read_to_string(&mut output, &mut said).unwrap();
        process.kill();
        assert!(!said.contains("CARGO"), "{said}");
    }

    #[test]
    fn what_a_process_has_started_ends_with_it() {
        let (mut process, output) = start("sleep 1000 & echo started; wait");
        assert!(process.poll().is_none());
        process.kill();
        assert!(is_closed(&output), "its child lives on");
        let (mut process, output) = start("sleep 1000 & echo started");
        while process.poll().is_none() {
            std::thread::yield_now();
        }
        assert!(is_closed(&output), "its child lives on");
    }
}
