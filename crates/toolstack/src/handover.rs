//! What two hosts say to each other while a domain moves: `hospes migrate` on the one and `hospes migrate-receive` on the other, each by the standard input of
//! the other.
//!
//! | who | says |
//! |---|---|
//! | target | its banner, behind whatever a login prints |
//! | source | its banner, an [`Opening`], then the beginning of the stream of `hospes_migration`: the configuration |
//! | target | [`Answer::Accepted`], where the domain could live there |
//! | source | the rest of the stream; with its end the domain has let go of its disks and networks |
//! | target | [`Answer::Ready`] |
//! | source | [`Order::Start`]: the domain is the target's from here on |
//! | target | [`Answer::Running`] |
//!
//! In place of each answer there may be [`Answer::Failed`]. Either side may break off at any time; before [`Order::Start`] that means that the domain is the
//! source's, and behind it that nobody knows but the target.

use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Version of all that is said.
const VERSION: u32 = 1;
/// Most bytes of what a login may print before the banner.
const NOISE_MAX: u64 = 256 << 10;
/// Most characters of it that are shown.
const SHOWN: usize = 200;

/// How the two sides begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Target,
}

impl Side {
    fn words(self) -> &'static str {
        match self {
            Side::Source => "hospes migration source, version ",
            Side::Target => "hospes migration target, version ",
        }
    }

    /// A line of its own, whatever was printed before.
    pub(crate) fn banner(self) -> String {
        format!("\n{}{VERSION}\n", self.words())
    }

    /// Reads up to the banner of this side.
    pub(crate) fn await_banner(self, from: &mut impl BufRead) -> Result<()> {
        let mut from = from.take(NOISE_MAX);
        let mut last = String::new();
        loop {
            let mut line = Vec::new();
            match from.read_until(b'\n', &mut line) {
                Ok(0) => return Err(Error::Migration(no_banner(&last, from.limit() == 0))),
                Ok(_) => {}
                Err(fault) => return Err(Error::Migration(fault.to_string())),
            }
            let line = clean(&String::from_utf8_lossy(&line));
            if let Some(version) = line.trim().strip_prefix(self.words()) {
                if version.parse() == Ok(VERSION) {
                    return Ok(());
                }
                return Err(Error::Migration(format!(
                    "the other side speaks version {version} of the hand-over, and this one version {VERSION}: install the same hospes on both"
                )));
            }
            if !line.trim().is_empty() {
                last = line;
            }
        }
    }
}

fn no_banner(last: &str, endless: bool) -> String {
    let how = if endless {
        "it prints too much and does not begin"
    } else {
        "it has ended"
    };
    let said = match last.trim() {
        "" => String::new(),
        last => format!(", and the last that it said was: {last}"),
    };
    format!(
        "the other side is no `hospes migrate-receive`: {how}{said}. Look at what stands above, and whether it is installed there as hospes; where it has another name, -s '' takes the whole command"
    )
}

/// A text of the other side as it may be shown on a terminal.
pub(crate) fn clean(text: &str) -> String {
    let text = text.chars().filter(|c| !c.is_control());
    text.take(SHOWN).collect()
}

/// What the source says of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MoveOptions {
    /// Leave the domain paused.
    pub paused: bool,
    /// Do nothing when the guest ends.
    pub unattended: bool,
    /// Say all that happens.
    pub debug: bool,
}

/// What the target says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    Accepted,
    /// The domain is there, and its guest does not run.
    Ready,
    /// It is the target's; with what the user should know.
    Running {
        note: Option<String>,
    },
    Failed {
        message: String,
    },
}

/// What the source says when the target is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    Start,
}

/// Hears how a domain moves.
pub trait MoveWatcher {
    /// So many pages have passed.
    fn pages(&mut self, pages: u64);

    /// A step that the user is to see.
    fn step(&mut self, text: &str);

    /// One that is of interest to who looks for a fault.
    fn detail(&mut self, text: &str);

    /// The other side wants details to be shown.
    fn show_details(&mut self);
}

/// A pipe that is not waited for longer than `patience` at a time.
#[derive(Debug)]
pub(crate) struct Patient<T> {
    pub(crate) inner: T,
    /// `None` is for ever.
    pub(crate) patience: Option<Duration>,
}

impl<T: AsFd> Patient<T> {
    fn wait(&self, flags: PollFlags) -> io::Result<()> {
        wait(self.inner.as_fd(), flags, self.patience)
    }
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags, patience: Option<Duration>) -> io::Result<()> {
    let deadline = patience.map(|patience| Instant::now() + patience);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let time = left.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], time.as_ref()) {
            Ok(0) => return Err(ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl<T: Read + AsFd> Read for Patient<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN)?;
        self.inner.read(buffer)
    }
}

/// The descriptor must not block.
impl<T: Write + AsFd> Write for Patient<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::OUT)?;
            match self.inner.write(bytes) {
                Err(fault) if fault.kind() == ErrorKind::WouldBlock => {}
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> std::result::Result<(), String> {
        let found = Side::Target.await_banner(&mut text.as_bytes());
        found.map_err(|fault| fault.to_string())
    }

    #[test]
    fn banner_is_found_behind_what_a_login_prints() {
        let banner = Side::Target.banner();
        told(&banner).unwrap();
        told(&format!("Welcome!\r\nno newline at the end{banner}")).unwrap();
        let other = told("hospes migration target, version 7\n").unwrap_err();
        assert!(other.contains("version 7"), "{other}");
        let none = told("\x1b[2Jsh: hospes: not found\n").unwrap_err();
        assert!(none.contains("was: [2Jsh: hospes: not found"), "{none}");
        assert!(told("").unwrap_err().contains("it has ended"));
        told(&Side::Source.banner()).unwrap_err();
        let flood = "x".repeat(NOISE_MAX as usize) + &banner;
        assert!(told(&flood).unwrap_err().contains("prints too much"));
    }

    #[test]
    fn pipe_that_nobody_reads_or_writes_ends_the_patience() {
        let (reader, writer) = io::pipe().unwrap();
        let patience = Some(Duration::from_millis(20));
        let mut from = Patient {
            inner: &reader,
            patience,
        };
        let late = from.read(&mut [0]).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::TimedOut);
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let mut to = Patient {
            inner: writer,
            patience,
        };
        let late = to.write_all(&vec![0; 1 << 20]).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::TimedOut);
    }
}
