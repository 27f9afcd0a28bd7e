//! How much of the host's CPUs a domain gets: its weight against others, and a limit.
//!
//! Both are the business of the host's scheduler, told through a control group. Where none can be made (no right to, no controller) the
//! weight becomes the nice value of the vCPU threads, a quarter more for each step, and a thread of the domain keeps the limit by holding the
//! vCPUs when they have used up theirs.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use hospes_units::VcpuId;
use hospes_xen::Xen;
use rustix::process::Pid;

use crate::cgroup::Group;
use crate::lock;
use crate::run::Run;

/// A domain's share of the host's CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// 1 to 65535; a domain with twice the weight gets twice as much where there is not enough for all.
    pub weight: u16,
    /// Most time in percent of one CPU; 0 for no limit.
    pub cap: u16,
}

impl Default for Share {
    fn default() -> Share {
        Share {
            weight: 256,
            cap: 0,
        }
    }
}

/// How long the limit's thread lets the vCPUs run before it looks, and how much unused time they may save up.
const LOOK: Duration = Duration::from_millis(2);
const SAVED_NS: i64 = 10_000_000;

/// Sets a domain's share and keeps it.
#[derive(Debug)]
pub struct Sharing {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    share: Share,
    group: Option<Group>,
    limiter: Option<Limiter>,
}

impl Sharing {
    pub fn new() -> Sharing {
        Sharing {
            state: Mutex::default(),
        }
    }

    pub fn get(&self) -> Share {
        lock(&self.state).share
    }

    /// Changes the share of the domain with these vCPU threads. Fails where neither the host's scheduler nor the domain itself can do it.
    pub fn set(
        &self,
        share: Share,
        threads: &[Pid],
        xen: &Arc<Xen>,
        run: &Arc<Run>,
    ) -> Result<(), std::io::Error> {
        let mut state = lock(&self.state);
        if share == state.share {
            return Ok(());
        }
        if state.group.is_none() && state.limiter.is_none() {
            let numbers: Vec<i32> = threads.iter().map(|t| t.as_raw_nonzero().get()).collect();
            state.group = Group::new(&numbers).ok();
        }
        let vcpus = threads.len() as u32;
        let by_group = state
            .group
            .as_ref()
            .is_some_and(|group| group.set(share.weight, share.cap, vcpus).is_ok());
        if !by_group {
            state.group = None;
            let nice = nice_of(share.weight);
            for thread in threads {
                rustix::process::setpriority_process(Some(*thread), nice)?;
            }
            state.limiter = None;
            if share.cap != 0 {
                let threads = threads.len() as u32;
                state.limiter = Some(Limiter::start(share.cap, threads, xen, run)?);
            }
        }
        state.share = share;
        Ok(())
    }

    /// Ends the limit: the domain ends, and nothing may be held back any more.
    pub fn end(&self) {
        lock(&self.state).limiter = None;
    }
}

/// The nice value whose weight in Linux's scheduler is nearest, each step being a factor of 1.25.
fn nice_of(weight: u16) -> i32 {
    let steps = (f64::from(weight) / 256.0).ln() / 1.25f64.ln();
    (-steps.round()).clamp(-20.0, 19.0) as i32
}

/// The thread that keeps a limit.
#[derive(Debug)]
struct Limiter {
    stop: Arc<(AtomicBool, Mutex<()>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Limiter {
    fn start(
        cap: u16,
        vcpus: u32,
        xen: &Arc<Xen>,
        run: &Arc<Run>,
    ) -> Result<Limiter, std::io::Error> {
        let stop = Arc::new((AtomicBool::new(false), Mutex::new(()), Condvar::new()));
        let (seen, xen, run) = (Arc::clone(&stop), Arc::clone(xen), Arc::clone(run));
        let thread = std::thread::Builder::new()
            .name("limit".to_owned())
            .spawn(move || {
                let mut account = Account::new(cap, xen.system_time_ns(), used(&xen, vcpus));
                while !seen.0.load(SeqCst) && !run.has_ended() {
                    let wait = account.update(xen.system_time_ns(), used(&xen, vcpus));
                    run.set_limited(wait.is_some());
                    let guard = lock(&seen.1);
                    if !seen.0.load(SeqCst) {
                        drop(
                            seen.2
                                .wait_timeout(guard, wait.unwrap_or(LOOK))
                                .unwrap_or_else(PoisonError::into_inner),
                        );
                    }
                }
                run.set_limited(false);
            })?;
        Ok(Limiter {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Limiter {
    fn drop(&mut self) {
        self.stop.0.store(true, SeqCst);
        drop(lock(&self.stop.1));
        self.stop.2.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// CPU time of all vCPUs, ns.
fn used(xen: &Xen, vcpus: u32) -> u64 {
    (0..vcpus).map(|id| xen.vcpu_time_ns(VcpuId(id))).sum()
}

/// Time that the vCPUs may use: it grows with the clock and shrinks as they run.
#[derive(Debug)]
struct Account {
    cap: u16,
    now: u64,
    used: u64,
    left: i64,
}

impl Account {
    fn new(cap: u16, now: u64, used: u64) -> Account {
        Account {
            cap,
            now,
            used,
            left: 0,
        }
    }

    /// Books what has passed and was used since the last time; how long the vCPUs have to be held, if they have.
    fn update(&mut self, now: u64, used: u64) -> Option<Duration> {
        let passed = now.saturating_sub(self.now);
        let earned = (u128::from(passed) * u128::from(self.cap) / 100) as i64;
        let spent = used.saturating_sub(self.used) as i64;
        self.left = self.left.saturating_add(earned).min(SAVED_NS) - spent;
        (self.now, self.used) = (now, used);
        let debt = u64::try_from(-self.left).ok().filter(|debt| *debt > 0)?;
        Some(Duration::from_nanos(debt * 100 / u64::from(self.cap) + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nice_follows_the_weight() {
        for (weight, nice) in [
            (256, 0),
            (512, -3),
            (128, 3),
            (1, 19),
            (65535, -20),
            (320, -1),
        ] {
            assert_eq!(nice_of(weight), nice, "{weight}");
        }
    }

    #[test]
    fn account_holds_a_busy_guest_to_its_limit() {
        // Two vCPUs that always run when they may, limited to half a CPU.
        let (mut now, mut used) = (0u64, 0u64);
        let mut account = Account::new(50, now, used);
        while now < 10_000_000_000 {
            match account.update(now, used) {
                Some(wait) => now += wait.as_nanos() as u64,
                None => {
                    now += LOOK.as_nanos() as u64;
                    used += 2 * LOOK.as_nanos() as u64;
                }
            }
        }
        let percent = used * 100 / now;
        assert!((49..=51).contains(&percent), "{percent} %");
    }

    #[test]
    fn account_saves_up_no_more_than_a_moment() {
        let mut account = Account::new(100, 0, 0);
        assert_eq!(account.update(3_600_000_000_000, 0), None);
        assert_eq!(account.left, SAVED_NS);
    }
}
