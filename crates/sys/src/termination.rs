//! Requests to end the process, which come as signals.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::action::{handle, is_ignored};

/// Counts the requests. It is made before the handlers and never closed.
static REQUESTS: OnceLock<OwnedFd> = OnceLock::new();
/// The signal that was the first request, or 0.
static FIRST: AtomicI32 = AtomicI32::new(0);

/// The requests to end that this process gets from now on, which no longer end it by themselves.
#[derive(Debug)]
pub struct Termination(&'static OwnedFd);

impl Termination {
    /// Counts SIGTERM and SIGINT, and passes over SIGHUP, which says no more than that a terminal or a session is gone.
    ///
    /// By handlers and not by a signal mask: programs that this process starts inherit a mask, but no handlers. The handlers may come to run
    /// in any thread, so they use the thread's alternate stack where it has one, and interrupt no system call that can go on.
    pub fn catch() -> io::Result<Termination> {
        let requests = requests()?;
        handle(libc::SIGTERM, count, libc::SA_RESTART)?;
        handle(libc::SIGINT, count, libc::SA_RESTART)?;
        handle(libc::SIGHUP, pass_over, libc::SA_RESTART)?;
        Ok(Termination(requests))
    }

    /// Counts those of SIGTERM, SIGINT and SIGHUP that this process does not ignore: for work of a terminal's, which ends with the session
    /// unless somebody has said otherwise (nohup).
    pub fn catch_not_ignored() -> io::Result<Termination> {
        let requests = requests()?;
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            if !is_ignored(signal)? {
                handle(signal, count, libc::SA_RESTART)?;
            }
        }
        Ok(Termination(requests))
    }

    /// The signal that was the first request of all.
    pub fn first(&self) -> Option<c_int> {
        match FIRST.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(signal),
        }
    }

    /// Ends the process by the signal that was the first request, so that who waits for the process sees why it ended. Returns where there
    /// was none.
    pub fn obey(self) {
        let Some(signal) = self.first() else {
            return;
        };
        // SAFETY: an all-zero sigaction is valid: the default action. The signals that are counted end the process by default.
        unsafe {
            let action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, &action, std::ptr::null_mut());
            libc::raise(signal);
        }
    }

    /// Waits for the next request until then, or for ever; false where none has come.
    pub fn wait(&self, deadline: Option<Instant>) -> io::Result<bool> {
        loop {
            let left = deadline.map(|deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                // Not to ask again and again in the last millisecond.
                left.max(Duration::from_millis(1))
            });
            let left = left.map(|left| Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            });
            let mut descriptors = [PollFd::new(self.0, PollFlags::IN)];
            match poll(&mut descriptors, left.as_ref()) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => {
                    // One request of those that have come.
                    rustix::io::retry_on_intr(|| rustix::io::read(self.0, &mut [0; 8]))?;
                    return Ok(true);
                }
                Err(fault) => return Err(fault.into()),
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(false);
            }
        }
    }
}

/// Readable while there are requests that have not been waited for.
impl AsFd for Termination {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn requests() -> io::Result<&'static OwnedFd> {
    match REQUESTS.get() {
        Some(requests) => Ok(requests),
        None => {
            let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE)?;
            Ok(REQUESTS.get_or_init(|| made))
        }
    }
}

extern "C" fn count(signal: c_int) {
    let _ = FIRST.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
    let Some(requests) = REQUESTS.get() else {
        return;
    };
    let one = 1u64.to_ne_bytes();
    // SAFETY: write(2) may be called in a handler, with a descriptor that is never closed and a buffer of this size. The interrupted code
    // finds its errno as it was.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        libc::write(requests.as_raw_fd(), one.as_ptr().cast(), one.len());
        *errno = before;
    }
}

extern "C" fn pass_over(_signal: c_int) {}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, getpid, kill_process};
    use std::sync::{Mutex, PoisonError};

    /// Handlers are the process's, so one test at a time.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn wait_counts_requests_and_passes_over_the_end_of_the_session() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let termination = Termination::catch().unwrap();
        let soon = || Some(Instant::now() + Duration::from_millis(50));
        let send = |signal| kill_process(getpid(), signal).unwrap();
        send(Signal::HUP);
        assert!(!termination.wait(soon()).unwrap());
        send(Signal::TERM);
        send(Signal::INT);
        assert!(termination.wait(None).unwrap());
        assert!(termination.wait(soon()).unwrap());
        assert!(!termination.wait(soon()).unwrap());
    }

    #[test]
    fn signals_that_are_ignored_stay_ignored() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: no handler; the process is of these tests alone.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let _termination = Termination::catch_not_ignored().unwrap();
        assert!(is_ignored(libc::SIGHUP).unwrap());
        assert!(!is_ignored(libc::SIGTERM).unwrap());
    }

    #[test]
    fn programs_that_are_started_end_by_the_signal() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let _termination = Termination::catch().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        kill_process(pid, Signal::TERM).unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
