//! Running the programs that make an image, so that they end when this process is asked to end, or ends.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use hospes_sys::Termination;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::maker::BuildError;

/// Lines of a failed program that its error shows.
const TAIL_LINES: usize = 12;
/// For a program that is asked to end, and for one that is killed.
const PATIENCE: Duration = Duration::from_secs(20);
const PATIENCE_KILLED: Duration = Duration::from_secs(5);

/// Runs a program in a mount and a PID name space of its own: nothing that it mounts is seen outside, and when the first process in there ends,
/// all end, and the mounts with them. That process ends with its parent, and the parent with this process.
const ENCLOSE: [&str; 13] = [
    "setpriv",
    "--pdeathsig",
    "KILL",
    "--",
    "unshare",
    "--mount",
    "--propagation",
    "private",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--",
];

/// A program with its arguments.
pub(crate) struct Program {
    name: &'static str,
    pub command: Command,
    /// Whether it is in name spaces of its own, so that it can be killed and leaves nothing but files.
    pub enclosed: bool,
}

impl Program {
    pub fn new(name: &'static str) -> Program {
        Program {
            name,
            command: Command::new(name),
            enclosed: false,
        }
    }

    /// One that is enclosed where this process is root's and may do so. Of an ordinary user's programs those that mount have to make name spaces
    /// themselves.
    pub fn enclosed(name: &'static str) -> Program {
        let command = || {
            let mut command = Command::new(ENCLOSE[0]);
            command.args(&ENCLOSE[1..]);
            command
        };
        let possible = rustix::process::geteuid().is_root()
            && command()
                .arg("true")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success());
        if !possible {
            return Program::new(name);
        }
        let mut command = command();
        command.arg(name);
        Program {
            name,
            command,
            enclosed: true,
        }
    }
}

/// What all programs of an image have in common.
pub(crate) struct Runner<'a> {
    /// What they write goes there.
    pub log: &'a Path,
    pub termination: &'a Termination,
}

impl Runner<'_> {
    /// Runs a program to its end. What it writes goes to the log and, line by line, to `line`.
    pub fn run(&self, program: Program, line: impl FnMut(&str)) -> Result<(), BuildError> {
        let Program {
            name,
            mut command,
            enclosed,
        } = program;
        let failed = |fault| BuildError::Start {
            program: name.into(),
            fault,
        };
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log)
            .map_err(|fault| BuildError::file("write", self.log, fault))?;
        let (reader, writer) = io::pipe().map_err(failed)?;
        let copy = writer.try_clone().map_err(failed)?;
        // A group of its own: the terminal's signals come to this process alone, which passes them on.
        command
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(copy)
            .process_group(0);
        let child = command.spawn().map_err(|fault| match fault.kind() {
            io::ErrorKind::NotFound => BuildError::missing(name),
            _ => failed(fault),
        })?;
        // It holds the writing ends: the reader would wait for ours for ever.
        drop(command);
        let mut running = Running {
            child,
            enclosed,
            killed: false,
            deadline: None,
        };
        let mut output = Output {
            log,
            line,
            tail: VecDeque::new(),
            unfinished: Vec::new(),
        };
        let read = self.read(&reader, &mut running, &mut output);
        if read.is_err() {
            running.kill();
        }
        let status = running.child.wait().map_err(failed)?;
        read.map_err(|fault| BuildError::file("write", self.log, fault))?;
        if running.deadline.is_some() {
            return Err(BuildError::Interrupted);
        }
        succeeded(status, name, output.tail)
    }

    /// Reads until nobody writes any more, or programs that were killed have had their time.
    fn read(
        &self,
        mut reader: &PipeReader,
        running: &mut Running,
        output: &mut Output<impl FnMut(&str)>,
    ) -> io::Result<()> {
        let mut bytes = [0; 4096];
        loop {
            let left = running.deadline.map(|deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                Timespec {
                    tv_sec: left.as_secs() as i64,
                    tv_nsec: i64::from(left.subsec_nanos()),
                }
            });
            let mut descriptors = [
                PollFd::from_borrowed_fd(self.termination.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(reader.as_fd(), PollFlags::IN),
            ];
            match poll(&mut descriptors, left.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?,
            };
            let [asked, readable] = descriptors.map(|descriptor| !descriptor.revents().is_empty());
            let overdue = running
                .deadline
                .is_some_and(|until| Instant::now() >= until);
            if overdue && running.killed {
                return Ok(());
            }
            if asked {
                self.termination.wait(Some(Instant::now()))?;
            }
            if asked || overdue {
                running.end();
            }
            if readable {
                let length = reader.read(&mut bytes)?;
                output.take(&bytes[..length])?;
                if length == 0 {
                    return Ok(());
                }
            }
        }
    }
}

/// A program that runs, the first of a process group.
struct Running {
    child: Child,
    enclosed: bool,
    killed: bool,
    /// When patience is at its end, once it has to end.
    deadline: Option<Instant>,
}

impl Running {
    /// The first time it is asked to end, so that it can clear up, unless nothing is to be cleared up; then it is killed.
    fn end(&mut self) {
        if self.enclosed || self.deadline.is_some() {
            return self.kill();
        }
        self.signal(Signal::TERM);
        self.deadline = Some(Instant::now() + PATIENCE);
    }

    fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.killed = true;
        self.deadline = Some(Instant::now() + PATIENCE_KILLED);
    }

    fn signal(&self, signal: Signal) {
        // It has not been waited for, so its number is no other's; a group without processes is what is wanted.
        let _ = kill_process_group(Pid::from_child(&self.child), signal);
    }
}

/// What a program has written.
struct Output<F> {
    log: File,
    line: F,
    tail: VecDeque<String>,
    /// The beginning of a line.
    unfinished: Vec<u8>,
}

impl<F: FnMut(&str)> Output<F> {
    /// Takes what comes next; nothing is the end.
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.log.write_all(bytes)?;
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.unfinished.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                self.end_line();
            }
        }
        if bytes.is_empty() && !self.unfinished.is_empty() {
            self.end_line();
        }
        Ok(())
    }

    fn end_line(&mut self) {
        let text = String::from_utf8_lossy(&self.unfinished);
        let text = text.trim_end();
        (self.line)(text);
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(text.to_string());
        self.unfinished.clear();
    }
}

fn succeeded(status: ExitStatus, program: &str, tail: VecDeque<String>) -> Result<(), BuildError> {
    if status.success() {
        return Ok(());
    }
    let tail: Vec<String> = tail.into();
    Err(BuildError::Program {
        program: program.into(),
        status,
        tail: tail.join("\n"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn run_failed_program_shows_its_last_lines() {
        let directory = std::env::temp_dir().join(format!("hospes-debian-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let log = directory.join("log");
        let runner = Runner {
            log: &log,
            termination: &Termination::catch_not_ignored().unwrap(),
        };
        let mut lines = Vec::new();
        let mut program = Program::new("sh");
        program
            .command
            .args(["-c", "echo one; printf two >&2; exit 3"]);
        let fault = runner
            .run(program, |line| lines.push(line.to_string()))
            .unwrap_err();
        assert_eq!(lines, ["one", "two"]);
        assert!(fault.to_string().contains("one\ntwo"), "{fault}");
        assert_eq!(fs::read_to_string(&log).unwrap(), "one\ntwo");
        let fault = runner.run(Program::new("mmdebstrap-is-not-here"), |_| {});
        assert!(matches!(fault, Err(BuildError::Missing { .. })));
        fs::remove_dir_all(&directory).unwrap();
    }
}
