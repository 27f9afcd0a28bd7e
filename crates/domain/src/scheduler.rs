//! What a domain's share of the CPUs is had from: the host's scheduler, of which not every process may ask it.

use std::fmt::Debug;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, getpid, getsid, setpriority_process};

use crate::cgroup::Group;

/// The nice value of the process's session is in `/proc/PID/autogroup`. Whoever is not root may write it every tenth of a second only.
const AUTOGROUP_TRIES: u32 = 20;
const AUTOGROUP_WAIT: Duration = Duration::from_millis(20);

/// Asks the host's scheduler for one process, whose threads are given by their numbers.
pub trait HostScheduler: Debug + Send + Sync {
    /// Puts threads into a control group of their own, which is gone when it is dropped.
    fn group(&self, threads: &[i32]) -> io::Result<Box<dyn ShareGroup>>;

    /// Gives threads a nice value.
    fn renice(&self, threads: &[i32], nice: i32) -> io::Result<()>;

    /// Gives the process's session, where it has one of its own or is in that of who asks, a nice value against other sessions.
    fn renice_session(&self, nice: i32) -> io::Result<()>;
}

/// Threads that have a share of their own.
pub trait ShareGroup: Debug + Send + Sync {
    /// Sets the weight as Xen has it and the limit in percent of one CPU, 0 for none, of a domain with so many vCPUs.
    fn set(&self, weight: u16, cap: u16, vcpus: u32) -> io::Result<()>;
}

/// By this process's own rights.
#[derive(Debug)]
pub struct Scheduler {
    process: u32,
}

impl Scheduler {
    /// For this process or another, with this number.
    pub fn of(process: u32) -> Scheduler {
        Scheduler { process }
    }

    /// Threads that are the process's.
    fn check(&self, threads: &[i32]) -> io::Result<()> {
        let tasks = format!("/proc/{}/task", self.process);
        let tasks = Path::new(&tasks);
        let is_own = |thread: &i32| tasks.join(thread.to_string()).is_dir();
        match threads.iter().all(is_own) {
            true => Ok(()),
            false => Err(ErrorKind::NotFound.into()),
        }
    }
}

impl HostScheduler for Scheduler {
    fn group(&self, threads: &[i32]) -> io::Result<Box<dyn ShareGroup>> {
        self.check(threads)?;
        Ok(Box::new(Group::new(self.process, threads)?))
    }

    fn renice(&self, threads: &[i32], nice: i32) -> io::Result<()> {
        self.check(threads)?;
        for thread in threads {
            let thread = Pid::from_raw(*thread).ok_or(ErrorKind::NotFound)?;
            setpriority_process(Some(thread), nice)?;
        }
        Ok(())
    }

    fn renice_session(&self, nice: i32) -> io::Result<()> {
        let process = Pid::from_raw(self.process as i32);
        match getsid(process) {
            // Its own, or that of its keeper, where nothing else runs.
            Ok(session) if Some(session) == process || session == getpid() => {
                let path = format!("/proc/{}/autogroup", session.as_raw_nonzero());
                write_autogroup(Path::new(&path), nice)
            }
            _ => Ok(()),
        }
    }
}

impl ShareGroup for Group {
    fn set(&self, weight: u16, cap: u16, vcpus: u32) -> io::Result<()> {
        Group::set(self, weight, cap, vcpus)
    }
}

/// Fine where there is no such file: the kernel knows no groups of sessions then.
fn write_autogroup(path: &Path, nice: i32) -> io::Result<()> {
    let mut file = match fs::File::options().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let mut tries = 0..AUTOGROUP_TRIES;
    loop {
        match file.write_all(nice.to_string().as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries.next().is_some() => {
                std::thread::sleep(AUTOGROUP_WAIT);
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_gets_its_nice_value_where_sessions_are_groups() {
        let path = std::env::temp_dir().join(format!("hospes-autogroup-{}", std::process::id()));
        write_autogroup(&path, 3).unwrap();
        assert!(!path.exists(), "the kernel knows none");
        fs::write(&path, "").unwrap();
        write_autogroup(&path, 3).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "3");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn threads_of_others_are_refused() {
        let scheduler = Scheduler::of(std::process::id());
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        scheduler.check(&[own]).unwrap();
        let fault = scheduler.check(&[own, 1]).unwrap_err();
        assert_eq!(fault.kind(), ErrorKind::NotFound);
    }
}
