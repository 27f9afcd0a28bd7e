//! The timers of a domain, and the one thread that runs them and steers the clock.

use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use hospes_units::VcpuId;
use hospes_xen_abi::{event, sched};

use crate::{Xen, XenError, lock};

/// Whose timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    /// The one-shot timer of a vCPU.
    Singleshot(usize),
    Periodic(usize),
    /// The end of a vCPU's poll.
    Poll(usize),
    Watchdog(usize),
}

/// No deadline.
const NEVER: u64 = u64::MAX;

/// Deadlines in system time, ns.
#[derive(Debug)]
pub(crate) struct Timers {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    /// Single-shot, periodic and poll timers of all vCPUs, then the watchdogs.
    deadlines: Vec<u64>,
    periods: Vec<u64>,
    /// What the watchdogs were last armed with, ns.
    timeouts: [u64; sched::WATCHDOGS],
    /// When the thread wakes by itself.
    wakes_at: u64,
    stop: bool,
}

impl Timers {
    pub fn new(vcpus: usize) -> Timers {
        Timers {
            inner: Mutex::new(Inner {
                deadlines: vec![NEVER; 3 * vcpus + sched::WATCHDOGS],
                periods: vec![0; vcpus],
                timeouts: [0; sched::WATCHDOGS],
                wakes_at: 0,
                stop: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Arms a timer, in place of what it was set to.
    pub fn set(&self, timer: Timer, deadline_ns: u64) {
        let mut inner = lock(&self.inner);
        let slot = inner.slot(timer);
        inner.deadlines[slot] = deadline_ns;
        self.hurry(&inner, deadline_ns);
    }

    /// Disarms a timer. It may be firing at this moment.
    pub fn cancel(&self, timer: Timer) {
        let mut inner = lock(&self.inner);
        let slot = inner.slot(timer);
        inner.deadlines[slot] = NEVER;
    }

    pub fn set_periodic(&self, id: usize, now: u64, period: u64) {
        let mut inner = lock(&self.inner);
        inner.periods[id] = period;
        let slot = inner.slot(Timer::Periodic(id));
        inner.deadlines[slot] = now.saturating_add(period);
        self.hurry(&inner, inner.deadlines[slot]);
    }

    pub fn stop_periodic(&self, id: usize) {
        self.cancel(Timer::Periodic(id));
    }

    /// Arms or renews a watchdog.
    pub fn set_watchdog(&self, number: usize, now: u64, timeout: u64) {
        self.arm_watchdog(&mut lock(&self.inner), number, now, timeout);
    }

    /// Arms a watchdog that is not in use; returns its number.
    pub fn set_free_watchdog(&self, now: u64, timeout: u64) -> Option<usize> {
        let mut inner = lock(&self.inner);
        let number = (0..sched::WATCHDOGS).find(|n| {
            let slot = inner.slot(Timer::Watchdog(*n));
            inner.deadlines[slot] == NEVER
        })?;
        self.arm_watchdog(&mut inner, number, now, timeout);
        Some(number)
    }

    fn arm_watchdog(&self, inner: &mut Inner, number: usize, now: u64, timeout: u64) {
        let slot = inner.slot(Timer::Watchdog(number));
        inner.timeouts[number] = timeout;
        inner.deadlines[slot] = now.saturating_add(timeout);
        self.hurry(inner, inner.deadlines[slot]);
    }

    fn hurry(&self, inner: &Inner, deadline_ns: u64) {
        if deadline_ns < inner.wakes_at {
            self.changed.notify_one();
        }
    }

    fn stop(&self) {
        lock(&self.inner).stop = true;
        self.changed.notify_one();
    }
}

impl Inner {
    fn slot(&self, timer: Timer) -> usize {
        match timer {
            Timer::Singleshot(id) => 3 * id,
            Timer::Periodic(id) => 3 * id + 1,
            Timer::Poll(id) => 3 * id + 2,
            Timer::Watchdog(n) => 3 * self.periods.len() + n,
        }
    }

    fn timer(&self, slot: usize) -> Timer {
        match (slot / 3, slot % 3) {
            (id, _) if id >= self.periods.len() => Timer::Watchdog(slot - 3 * self.periods.len()),
            (id, 0) => Timer::Singleshot(id),
            (id, 1) => Timer::Periodic(id),
            (id, _) => Timer::Poll(id),
        }
    }

    /// Gives the watchdogs in use their whole time again: the guest could not renew them.
    fn renew_watchdogs(&mut self, now: u64) {
        for number in 0..sched::WATCHDOGS {
            let slot = self.slot(Timer::Watchdog(number));
            if self.deadlines[slot] != NEVER {
                self.deadlines[slot] = now.saturating_add(self.timeouts[number]);
            }
        }
    }

    /// Takes the timers that are due, and tells the earliest deadline of the others.
    fn take_due(&mut self, now: u64, due: &mut Vec<Timer>) -> u64 {
        let mut earliest = NEVER;
        for slot in 0..self.deadlines.len() {
            if self.deadlines[slot] <= now {
                let timer = self.timer(slot);
                due.push(timer);
                self.deadlines[slot] = match timer {
                    // Periods missed while nobody ran are not made up for.
                    Timer::Periodic(id) => now.saturating_add(self.periods[id]),
                    _ => NEVER,
                };
            }
            earliest = earliest.min(self.deadlines[slot]);
        }
        earliest
    }
}

/// How long the clock runs between two corrections: short at first, while its rate is hardly known.
const STEER_FIRST: Duration = Duration::from_millis(20);
const STEER_LAST: Duration = Duration::from_secs(2);

/// A thread that wakes so much later than it wanted, in ns, did not just wait for a CPU: its process was stopped, or the whole host was.
const STOPPED_NS: u64 = 1_000_000_000;

/// The thread of a domain's clock; it ends when this is dropped.
#[derive(Debug)]
pub struct ClockThread {
    xen: Weak<Xen>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for ClockThread {
    fn drop(&mut self) {
        if let Some(xen) = self.xen.upgrade() {
            xen.timers.stop();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Xen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Xen(domain {})", self.config.domid)
    }
}

impl Xen {
    /// Starts the thread that runs the timers and steers the clock. Without it no timer fires.
    pub fn start_clock(self: &Arc<Self>) -> Result<ClockThread, XenError> {
        let xen = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("clock".into())
            .spawn(move || xen.run_clock())
            .map_err(XenError::Thread)?;
        Ok(ClockThread {
            xen: Arc::downgrade(self),
            thread: Some(thread),
        })
    }

    fn run_clock(&self) {
        // Timers would else fire up to 50 us later than asked for. Where that is refused they do.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let mut interval = STEER_FIRST;
        let mut steer_at = self.time.now_ns() + interval.as_nanos() as u64;
        let mut due = Vec::new();
        let mut expected = self.time.now_ns();
        let mut inner = lock(&self.timers.inner);
        loop {
            if inner.stop {
                return;
            }
            let now = self.time.now_ns();
            if now.saturating_sub(expected) > STOPPED_NS {
                // Before any timer fires: the guest's watchdogs run in its timer interrupt.
                self.time.mark_stopped();
                self.note_stopped(now - expected);
                inner.renew_watchdogs(now);
            }
            expected = now;
            let earliest = inner.take_due(now, &mut due);
            if !due.is_empty() || now >= steer_at {
                drop(inner);
                for timer in due.drain(..) {
                    self.fire(timer);
                }
                if now >= steer_at {
                    interval = (interval * 2).min(STEER_LAST);
                    self.time.steer(interval);
                    self.refresh_runstates();
                    steer_at = self.time.now_ns() + interval.as_nanos() as u64;
                }
                inner = lock(&self.timers.inner);
                continue;
            }
            inner.wakes_at = earliest.min(steer_at);
            expected = inner.wakes_at;
            let wait = Duration::from_nanos(inner.wakes_at - now);
            inner = match self.timers.changed.wait_timeout(inner, wait) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
            // While the thread is awake it looks at all deadlines before it sleeps: nobody need wake it.
            inner.wakes_at = 0;
        }
    }

    /// Gives the guest's watchdogs their whole time again: it was held and could not renew them.
    pub fn renew_watchdogs(&self) {
        lock(&self.timers.inner).renew_watchdogs(self.time.now_ns());
    }

    fn fire(&self, timer: Timer) {
        match timer {
            Timer::Singleshot(id) | Timer::Periodic(id) => {
                self.refresh_runstate(VcpuId(id as u32));
                self.post_virq(id, event::VIRQ_TIMER);
            }
            Timer::Poll(id) => self.host.wake(VcpuId(id as u32)),
            Timer::Watchdog(number) => {
                if !self.host.watchdog_expired() {
                    let timeout = lock(&self.timers.inner).timeouts[number];
                    self.timers
                        .set_watchdog(number, self.time.now_ns(), timeout);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use super::*;
    use crate::testing::Machine;

    #[test]
    fn watchdog_begins_anew_after_the_process_was_stopped() {
        let m = Machine::new(1);
        let _clock = m.xen.start_clock().unwrap();
        let timeout = 1_000_000_000;
        m.xen.timers.set_watchdog(0, m.xen.time.now_ns(), timeout);
        // The clock's thread cannot go on without it.
        let inner = lock(&m.xen.timers.inner);
        std::thread::sleep(Duration::from_nanos(timeout + STOPPED_NS * 3 / 2));
        let resumed = m.xen.time.now_ns();
        drop(inner);
        while !m.host.watchdog.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(m.xen.time.now_ns() - resumed >= timeout);
    }
}
