//! How much of the host's CPUs a domain gets: its weight against others, and a limit.
//!
//! Both are the business of the host's scheduler, told through a control group. Where none can be made (no right to, no controller) the
//! weight changes the nice value of the vCPU threads, a quarter more for each step, and a thread of the domain keeps the limit by holding the
//! vCPUs when they have used up theirs. Where the kernel has a group for each session (autogroup), nice values of threads count inside of it only: the
//! session of the domain's process gets the same one.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fs, io};

use hospes_units::VcpuId;
use hospes_xen::Xen;
use rustix::process::{Pid, getpriority_process};

use crate::lock;
use crate::run::Run;
use crate::scheduler::{HostScheduler, ShareGroup};

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

/// Why a share cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error(
        "without a control group, which cannot be made here, a weight of {weight} takes root's rights or a limit on nice of {limit} or more (`ulimit -e`, `LimitNICE=` of systemd) for the domain's process"
    )]
    Nice { weight: u16, limit: i32 },
    #[error(
        "without a control group, which cannot be made here, a cap takes a host whose kernel counts the time that threads run (CONFIG_SCHED_INFO)"
    )]
    Uncounted,
    #[error("the host does not let the domain's share of its CPUs be changed: {0}")]
    Host(#[from] io::Error),
}

/// Time that the calling thread has run, as the limit's thread reads it of the vCPUs' threads.
const TIME: &str = "/proc/thread-self/schedstat";

/// How long the limit's thread lets the vCPUs run before it looks, and how much unused time they may save up.
const LOOK: Duration = Duration::from_millis(2);
const SAVED_NS: i64 = 10_000_000;

/// Sets a domain's share and keeps it.
#[derive(Debug)]
pub struct Sharing {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    scheduler: Arc<dyn HostScheduler>,
    share: Share,
    group: Option<Box<dyn ShareGroup>>,
    limiter: Option<Limiter>,
    /// The nice value that the vCPU threads start with, and the steps that they are away from it.
    nice: i32,
    steps: i32,
}

impl Sharing {
    /// To be made where the vCPU threads are started: they inherit this thread's nice value.
    pub fn new(scheduler: Arc<dyn HostScheduler>) -> Sharing {
        Sharing {
            state: Mutex::new(State {
                scheduler,
                share: Share::default(),
                group: None,
                limiter: None,
                nice: getpriority_process(None).unwrap_or(0),
                steps: 0,
            }),
        }
    }

    pub fn get(&self) -> Share {
        lock(&self.state).share
    }

    /// Changes the share of the domain with these vCPU threads. Fails where neither the host's scheduler nor the domain itself can do it; then
    /// the share is what it was.
    pub fn set(
        &self,
        share: Share,
        threads: &[Pid],
        xen: &Arc<Xen>,
        run: &Arc<Run>,
    ) -> Result<(), ShareError> {
        let mut state = lock(&self.state);
        if share != state.share {
            if !state.set_by_group(share, threads) {
                state.set_by_domain(share, threads, xen, run)?;
            }
            state.share = share;
        }
        Ok(())
    }

    /// Ends the limit: the domain ends, and nothing may be held back any more.
    pub fn end(&self) {
        lock(&self.state).limiter = None;
    }
}

impl State {
    /// False where the host's scheduler does not take it. A domain that does something by itself stays with that.
    fn set_by_group(&mut self, share: Share, threads: &[Pid]) -> bool {
        if self.group.is_none() && self.limiter.is_none() && self.steps == 0 {
            self.group = self.scheduler.group(&numbers(threads)).ok();
        }
        let vcpus = threads.len() as u32;
        let done = self
            .group
            .as_ref()
            .is_some_and(|group| group.set(share.weight, share.cap, vcpus).is_ok());
        if !done {
            self.group = None;
        }
        done
    }

    fn set_by_domain(
        &mut self,
        share: Share,
        threads: &[Pid],
        xen: &Arc<Xen>,
        run: &Arc<Run>,
    ) -> Result<(), ShareError> {
        let vcpus = threads.len() as u32;
        self.limit(share.cap, vcpus, xen, run)?;
        self.prefer(share.weight, threads).inspect_err(|_| {
            let _ = self.limit(self.share.cap, vcpus, xen, run);
        })
    }

    fn limit(
        &mut self,
        cap: u16,
        vcpus: u32,
        xen: &Arc<Xen>,
        run: &Arc<Run>,
    ) -> Result<(), ShareError> {
        let wanted = (cap != 0).then_some(cap);
        if self.limiter.as_ref().map(|limiter| limiter.cap) == wanted {
            return Ok(());
        }
        if cap != 0 && !is_counted(&fs::read_to_string(TIME).unwrap_or_default()) {
            return Err(ShareError::Uncounted);
        }
        self.limiter = None;
        if cap != 0 {
            self.limiter = Some(Limiter::start(cap, vcpus, xen, run)?);
        }
        Ok(())
    }

    /// Changes the threads' nice values, where the weight takes others than they have.
    fn prefer(&mut self, weight: u16, threads: &[Pid]) -> Result<(), ShareError> {
        let steps = nice_of(weight);
        if steps == self.steps {
            return Ok(());
        }
        let refused = |error: io::Error, nice: i32| match error.kind() {
            io::ErrorKind::PermissionDenied => ShareError::Nice {
                weight,
                limit: 20 - nice,
            },
            _ => ShareError::Host(error),
        };
        let nice = (self.nice + steps).clamp(-20, 19);
        let threads = numbers(threads);
        let renice = |nice| self.scheduler.renice(&threads, nice);
        renice(nice).map_err(|error| refused(error, nice))?;
        if let Err(error) = self.scheduler.renice_session(steps) {
            let _ = renice(self.nice + self.steps);
            return Err(refused(error, steps));
        }
        self.steps = steps;
        Ok(())
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // The threads end with the domain; the process may go on with the guest's next start.
        if self.steps != 0 {
            let _ = self.scheduler.renice_session(0);
        }
    }
}

fn numbers(threads: &[Pid]) -> Vec<i32> {
    threads.iter().map(|t| t.as_raw_nonzero().get()).collect()
}

/// The nice value whose weight in Linux's scheduler is nearest, each step being a factor of 1.25.
pub fn nice_of(weight: u16) -> i32 {
    let steps = (f64::from(weight) / 256.0).ln() / 1.25f64.ln();
    (-steps.round()).clamp(-20.0, 19.0) as i32
}

/// The thread that keeps a limit.
#[derive(Debug)]
struct Limiter {
    cap: u16,
    stop: Arc<(AtomicBool, Mutex<()>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Limiter {
    fn start(cap: u16, vcpus: u32, xen: &Arc<Xen>, run: &Arc<Run>) -> io::Result<Limiter> {
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
            cap,
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

/// Whether the host's kernel counts a thread's time, from the `schedstat` of one that runs. A kernel that does not has no such file, or zeros in it;
/// one that does has at least counted that the thread was given a CPU.
fn is_counted(schedstat: &str) -> bool {
    schedstat
        .split_ascii_whitespace()
        .any(|number| number != "0")
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
    use hospes_engine::Exit;
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

    use super::*;
    use crate::scheduler::Scheduler;
    use rustix::process::setpriority_process;

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

    /// A state of a domain without a group, and the calling thread as its only vCPU's; the thread is not allowed what root is.
    fn without_rights(nice: i32) -> (State, Pid) {
        let me = rustix::thread::gettid();
        setpriority_process(Some(me), nice).unwrap();
        let none = CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, none).unwrap();
        (
            Sharing::new(Arc::new(Scheduler::of(std::process::id())))
                .state
                .into_inner()
                .unwrap(),
            me,
        )
    }

    #[test]
    fn nice_is_changed_from_where_it_was_and_only_with_the_weight() {
        std::thread::spawn(|| {
            let (mut state, me) = without_rights(5);
            let nice = || getpriority_process(Some(me)).unwrap();
            state.prefer(256, &[me]).unwrap();
            assert_eq!(nice(), 5);
            state.prefer(128, &[me]).unwrap();
            assert_eq!(nice(), 8);
            let refused = state.prefer(256, &[me]).unwrap_err();
            assert!(
                matches!(
                    refused,
                    ShareError::Nice {
                        weight: 256,
                        limit: 15
                    }
                ),
                "{refused}"
            );
            state.prefer(128, &[me]).unwrap();
            state.prefer(1, &[me]).unwrap();
            assert_eq!(nice(), 19);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn limit_needs_no_rights_and_survives_a_weight_that_is_refused() {
        let domain = crate::tests::domain(|_| Exit::Yield);
        std::thread::spawn(move || {
            let (mut state, me) = without_rights(5);
            let mut set = |weight, cap| {
                let share = Share { weight, cap };
                let done = state.set_by_domain(share, &[me], &domain.xen, &domain.run);
                if done.is_ok() {
                    state.share = share;
                }
                (done.is_ok(), state.limiter.as_ref().map(|l| l.cap))
            };
            assert_eq!(set(256, 50), (true, Some(50)));
            assert_eq!(set(512, 70), (false, Some(50)));
            assert_eq!(set(128, 70), (true, Some(70)));
            assert_eq!(set(256, 0), (false, Some(70)));
            assert_eq!(set(128, 0), (true, None));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn limit_takes_a_kernel_that_counts_time() {
        assert!(is_counted("0 0 1\n"));
        assert!(!is_counted("0 0 0\n"));
        assert!(!is_counted(""));
        assert!(is_counted(&fs::read_to_string(TIME).unwrap()));
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
