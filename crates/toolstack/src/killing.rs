//! The ends of domains that do not answer: of one that is still being made and cannot be asked yet, and of one whose process is stopped or hangs.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use hospes_sys::process_stat;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};

use crate::client::{ANSWER_PATIENCE, Host, ask, connect, done};
use crate::each::check_keeper_goes_on;
use crate::error::{Error, Result};
use crate::protocol::Request;
use crate::registry::{Entry, is_locked};

/// How often it is looked whether a process has ended.
const MOMENT: Duration = Duration::from_millis(5);

impl Host {
    /// Ends a domain that has no sockets yet: its process gives it up when it is asked to end. One that is there meanwhile is destroyed as any other.
    pub(crate) fn end_unmade(&self, entry: &Entry) -> Result<()> {
        let process = holder(entry)?;
        signal(entry, &process, Signal::TERM)?;
        let deadline = Instant::now() + ANSWER_PATIENCE;
        while is_locked(&entry.dir) && Instant::now() < deadline {
            let answer = check_keeper_goes_on(entry)
                .and_then(|()| ask(entry, &Request::Destroy, Duration::ZERO, ANSWER_PATIENCE));
            match answer.and_then(done) {
                Err(Error::Unmade { .. }) => thread::sleep(MOMENT),
                // It opens its sockets just now.
                Err(Error::Unreachable { source, .. })
                    if source.kind() == ErrorKind::ConnectionRefused =>
                {
                    thread::sleep(MOMENT);
                }
                Err(Error::Unreachable { .. } | Error::Stopped { .. }) => break,
                answer => return answer,
            }
        }
        self.kill_process(entry, &process)
    }

    /// Kills a domain process. Its socket says which it is, so that no other can be hit; before it has one, the lock that it holds does.
    pub(crate) fn kill(&self, entry: &Entry) -> Result<()> {
        let process = match connect(entry, "control.sock", Duration::ZERO) {
            Ok(stream) => {
                let peer = rustix::net::sockopt::socket_peercred(&stream)
                    .and_then(|peer| pidfd_open(peer.pid, PidfdFlags::empty()));
                peer.map_err(|fault| unreachable(entry, fault.into()))?
            }
            Err(Error::Unmade { .. }) => holder(entry)?,
            Err(fault) => return Err(fault),
        };
        self.kill_process(entry, &process)
    }

    fn kill_process(&self, entry: &Entry, process: &OwnedFd) -> Result<()> {
        if is_locked(&entry.dir) {
            kill_machine(entry);
            signal(entry, process, Signal::KILL)?;
        }
        let deadline = Instant::now() + ANSWER_PATIENCE;
        while is_locked(&entry.dir) {
            if Instant::now() >= deadline {
                return Err(unreachable(entry, ErrorKind::TimedOut.into()));
            }
            thread::sleep(MOMENT);
        }
        // Removes what it left.
        self.entries().map(drop)
    }
}

/// Ends the machine process and what it has started, which a guest that has broken out may have kept from ending with the domain process.
fn kill_machine(entry: &Entry) {
    let machine = entry.record.machine;
    let is_its_child = |pid: &u32| {
        let parent = process_stat(*pid).and_then(|stat| stat.split(' ').nth(1)?.parse().ok());
        parent == Some(entry.record.pid)
    };
    let pid = machine
        .filter(is_its_child)
        .and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    if let Some(pid) = pid {
        // One that has ended just now is what is wanted.
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

/// Does nothing where the process has ended.
fn signal(entry: &Entry, process: &OwnedFd, signal: Signal) -> Result<()> {
    match pidfd_send_signal(process, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(fault) => Err(unreachable(entry, fault.into())),
    }
}

fn unreachable(entry: &Entry, source: io::Error) -> Error {
    Error::Unreachable {
        domid: entry.domid,
        source,
    }
}

/// The process that the record names, where it has the domain's lock open: by now, or seen from here, the number may mean another.
fn holder(entry: &Entry) -> Result<OwnedFd> {
    let unknown = |source: io::Error| unreachable(entry, source);
    let pid = entry.record.pid;
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let gone = || Error::Gone { domid: entry.domid };
    // Taken before the look: from then on the number cannot come to mean another process.
    let process = pidfd_open(number.ok_or_else(gone)?, PidfdFlags::empty());
    let holds = process.is_ok()
        && has_open(pid, &entry.dir.join("lock")).map_err(|fault| match is_locked(&entry.dir) {
            true => unknown(fault),
            false => gone(),
        })?;
    match process {
        Ok(process) if holds => Ok(process),
        _ if !is_locked(&entry.dir) => Err(gone()),
        _ => Err(unknown(io::Error::other(format!(
            "its process is not to be seen from here as {pid}"
        )))),
    }
}

/// Whether a process has this file open.
fn has_open(pid: u32, path: &Path) -> io::Result<bool> {
    let wanted = fs::metadata(path)?;
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // It may be closed by now.
        if let Ok(file) = fs::metadata(descriptor?.path())
            && (file.dev(), file.ino()) == (wanted.dev(), wanted.ino())
        {
            return Ok(true);
        }
    }
    Ok(false)
}
