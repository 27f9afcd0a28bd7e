//! What a queue's thread sleeps on, beside the file descriptors of its device.
//!
//! Those who wake it (vCPU threads, when the guest sends an event) pay for a system call only when it really sleeps.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

const AWAKE: u32 = 0;
const CALLED: u32 = 1;
const ASLEEP: u32 = 2;

/// A call to one thread; calling it twice wakes once.
#[derive(Debug)]
pub struct Wake {
    fd: OwnedFd,
    state: AtomicU32,
}

impl Wake {
    pub fn new() -> Result<Wake, Errno> {
        Ok(Wake {
            fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            state: AtomicU32::new(AWAKE),
        })
    }

    /// Wakes the thread, or keeps it from sleeping the next time.
    pub fn call(&self) {
        if self.state.load(SeqCst) != CALLED && self.state.swap(CALLED, SeqCst) == ASLEEP {
            // Fails only when it is full of calls already.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Sleeps until a call, until one of `others` can be read, or for `most`; comes back at once where a call came since the last sleep. Only the
    /// owning thread sleeps here.
    pub fn sleep(&self, others: &[BorrowedFd<'_>], most: Option<Duration>) {
        if self
            .state
            .compare_exchange(AWAKE, ASLEEP, SeqCst, SeqCst)
            .is_ok()
        {
            let mut fds = vec![PollFd::new(&self.fd, PollFlags::IN)];
            fds.extend(others.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
            // An interrupted sleep is a short one.
            let most = most.map(|most| Timespec {
                tv_sec: most.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: most.subsec_nanos().into(),
            });
            let _ = poll(&mut fds, most.as_ref());
            if fds[0].revents().contains(PollFlags::IN) {
                let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
            }
        }
        self.state.store(AWAKE, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32};

    use super::*;

    #[test]
    fn call_before_sleep_keeps_it_from_sleeping() {
        let wake = Wake::new().unwrap();
        wake.call();
        wake.call();
        wake.sleep(&[], None);
    }

    #[test]
    fn call_wakes_a_sleeper_each_time() {
        let wake = Arc::new(Wake::new().unwrap());
        let (sent, stop) = (
            Arc::new(AtomicU32::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let seen = Arc::new(AtomicU32::new(0));
        let sleeper = {
            let (wake, sent, seen, stop) = (wake.clone(), sent.clone(), seen.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(SeqCst) {
                    seen.store(sent.load(SeqCst), SeqCst);
                    wake.sleep(&[], None);
                }
            })
        };
        for round in 1..=1000 {
            sent.store(round, SeqCst);
            wake.call();
            while seen.load(SeqCst) != round {
                std::thread::yield_now();
            }
        }
        stop.store(true, SeqCst);
        wake.call();
        sleeper.join().unwrap();
    }

    #[test]
    fn sleep_ends_when_another_descriptor_can_be_read() {
        use std::os::fd::AsFd;
        let wake = Wake::new().unwrap();
        let other = eventfd(1, EventfdFlags::NONBLOCK).unwrap();
        wake.sleep(&[other.as_fd()], None);
    }
}
