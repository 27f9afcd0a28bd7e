//! Whether a domain's vCPUs run: paused, ended, and what each of them does.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use hospes_engine::{CpuState, VcpuControl};
use hospes_units::VcpuId;
use hospes_xen::Host;

use crate::console::Console;
use crate::lock;
use crate::portrait::Portrait;
use crate::signal::Signal;
use crate::suspend::{Gate, Suspension};

/// Why a domain ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndReason {
    PowerOff,
    Reboot,
    Suspend,
    /// What happened, for the user.
    Crash(String),
    Watchdog,
    Destroyed,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EndReason::PowerOff => f.write_str("powered off"),
            EndReason::Reboot => f.write_str("rebooted"),
            EndReason::Suspend => f.write_str("suspended"),
            EndReason::Crash(what) => write!(f, "crashed: {what}"),
            EndReason::Watchdog => f.write_str("its watchdog expired"),
            EndReason::Destroyed => f.write_str("destroyed"),
        }
    }
}

/// What a vCPU's thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Activity {
    /// Executes guest code, or may at any moment.
    Running,
    /// Halted until an interrupt.
    Blocked,
    /// Halted without interrupts, or taken down: only another vCPU brings it back.
    Down,
    /// Held because the domain is paused.
    Held,
    /// Held because the domain has used up its limit.
    Limited,
}

impl Activity {
    fn from_u8(value: u8) -> Activity {
        match value {
            0 => Activity::Running,
            1 => Activity::Blocked,
            2 => Activity::Down,
            3 => Activity::Held,
            _ => Activity::Limited,
        }
    }
}

struct Slot {
    signal: Arc<Signal>,
    control: OnceLock<Arc<dyn VcpuControl>>,
    activity: AtomicU8,
    /// Whether it was down before it was held.
    down: AtomicBool,
    /// Where it is down: whether the guest took it down by a hypercall, and only another brings it back.
    taken_down: AtomicBool,
}

/// The switchboard between a domain's owner, its vCPU threads and its Xen side.
pub struct Run {
    slots: Vec<Slot>,
    paused: AtomicBool,
    has_run: AtomicBool,
    ended: AtomicBool,
    /// The vCPUs have used up what the domain's limit gives them.
    limited: AtomicBool,
    /// vCPU threads that have not returned.
    threads: AtomicUsize,
    life: Mutex<Life>,
    changed: Condvar,
    suspension: Suspension,
    portrait: Portrait,
    /// Closed by the threads of the guest's rings while they write into them.
    rings: Gate,
    console: Arc<Console>,
    /// What threads sleep on that are to hear of the end.
    on_end: Mutex<Vec<Arc<Signal>>>,
}

#[derive(Default)]
struct Life {
    end: Option<EndReason>,
    finished: bool,
}

impl Run {
    pub fn new(vcpus: u32, console: Arc<Console>) -> Run {
        let slot = |id| Slot {
            signal: Arc::default(),
            control: OnceLock::new(),
            activity: AtomicU8::new(Activity::Held as u8),
            // All but the first wait for the guest to start them.
            down: AtomicBool::new(id != 0),
            taken_down: AtomicBool::new(false),
        };
        Run {
            slots: (0..vcpus).map(slot).collect(),
            paused: AtomicBool::new(true),
            has_run: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            limited: AtomicBool::new(false),
            threads: AtomicUsize::new(0),
            life: Mutex::new(Life::default()),
            changed: Condvar::new(),
            suspension: Suspension::default(),
            portrait: Portrait::new(vcpus),
            rings: Gate::default(),
            console,
            on_end: Mutex::default(),
        }
    }

    /// Adds what a thread sleeps on that is to be woken when the domain ends.
    pub fn on_end(&self, signal: Arc<Signal>) {
        lock(&self.on_end).push(signal);
    }

    pub fn attach(&self, id: VcpuId, control: Arc<dyn VcpuControl>) {
        let slot = &self.slots[id.0 as usize];
        let signal = Arc::clone(&slot.signal);
        control.set_waker(Arc::new(move || signal.set()));
        let _ = slot.control.set(control);
    }

    /// The vCPUs' threads have other host CPUs, priorities or groups.
    pub fn place_changed(&self) {
        for slot in &self.slots {
            if let Some(control) = slot.control.get() {
                control.place_changed();
            }
        }
    }

    /// Raises an NMI at a vCPU; false where there is no such vCPU.
    pub fn raise_nmi(&self, id: VcpuId) -> bool {
        let slot = self.slots.get(id.0 as usize);
        let control = slot.and_then(|slot| slot.control.get());
        control.map(|control| control.raise_nmi()).is_some()
    }

    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(SeqCst)
    }

    /// Whether the vCPUs are held, for the owner's sake or the guest's.
    pub fn is_held(&self) -> bool {
        self.is_paused() || self.suspension.is_held()
    }

    pub fn suspension(&self) -> &Suspension {
        &self.suspension
    }

    pub fn portrait(&self) -> &Portrait {
        &self.portrait
    }

    /// The states of all vCPUs, by number, as [`Portrait::take`] gives them.
    pub fn vcpu_states(&self) -> Vec<Option<CpuState>> {
        self.portrait.take(|| self.look())
    }

    pub fn rings(&self) -> &Gate {
        &self.rings
    }

    /// What a vCPU of a restored domain did, before its thread starts.
    pub fn restore(&self, id: VcpuId, up: bool, waits_for_start: bool) {
        let slot = &self.slots[id.0 as usize];
        slot.down.store(!up || waits_for_start, SeqCst);
        slot.taken_down.store(!up, SeqCst);
    }

    /// Has all vCPUs look at what they are to do: that they are held, or their states wanted.
    pub fn look(&self) {
        self.stop_running();
    }

    /// Has them see that a suspended guest goes on.
    pub fn go_on(&self) {
        self.wake_all();
    }

    pub fn has_ended(&self) -> bool {
        self.ended.load(SeqCst)
    }

    /// Whether the vCPUs are held for the domain's limit.
    pub fn is_limited(&self) -> bool {
        self.limited.load(SeqCst)
    }

    /// Holds the vCPUs for the domain's limit, or lets them go.
    pub fn set_limited(&self, limited: bool) {
        if self.limited.swap(limited, SeqCst) == limited {
            return;
        }
        if limited {
            self.kick_running();
        } else {
            self.wake_all();
        }
    }

    /// Whether it was ever unpaused.
    pub fn has_run(&self) -> bool {
        self.has_run.load(SeqCst)
    }

    pub fn unpause(&self) {
        self.has_run.store(true, SeqCst);
        self.paused.store(false, SeqCst);
        // Taking the lock orders this after a waiter's look at the flag.
        drop(lock(&self.life));
        self.changed.notify_all();
        self.wake_all();
    }

    /// Holds the vCPUs; returns when none of them executes guest code, or when the domain has ended or is unpaused meanwhile.
    pub fn pause(&self) {
        self.paused.store(true, SeqCst);
        self.stop_running();
        let mut life = lock(&self.life);
        while self.is_paused()
            && !self.has_ended()
            && self.activities().contains(&Activity::Running)
        {
            life = self
                .changed
                .wait(life)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the domain; the first reason counts.
    pub fn end(&self, reason: EndReason) {
        let mut life = lock(&self.life);
        if life.end.is_some() {
            return;
        }
        life.end = Some(reason);
        self.ended.store(true, SeqCst);
        drop(life);
        self.stop_running();
        self.changed.notify_all();
        for signal in lock(&self.on_end).iter() {
            signal.set();
        }
        if self.threads.load(SeqCst) == 0 {
            self.console.close();
        }
    }

    pub fn end_reason(&self) -> Option<EndReason> {
        lock(&self.life).end.clone()
    }

    pub fn is_finished(&self) -> bool {
        lock(&self.life).finished
    }

    pub fn wait_finished(&self) -> EndReason {
        let mut life = lock(&self.life);
        loop {
            match &life.end {
                Some(reason) if life.finished => return reason.clone(),
                _ => {
                    life = self
                        .changed
                        .wait(life)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// The console has taken the guest's last output.
    pub fn set_finished(&self) {
        lock(&self.life).finished = true;
        self.changed.notify_all();
    }

    pub fn thread_starts(&self) {
        self.threads.fetch_add(1, SeqCst);
    }

    pub fn thread_ends(&self) {
        if self.threads.fetch_sub(1, SeqCst) == 1 && self.has_ended() {
            self.console.close();
        }
    }

    /// Has those vCPUs that execute guest code look at what they may do.
    fn kick_running(&self) {
        for slot in &self.slots {
            if Activity::from_u8(slot.activity.load(SeqCst)) == Activity::Running
                && let Some(control) = slot.control.get()
            {
                control.kick();
            }
        }
    }

    fn stop_running(&self) {
        for slot in &self.slots {
            if let Some(control) = slot.control.get() {
                control.kick();
            }
            slot.signal.set();
        }
    }

    fn wake_all(&self) {
        for slot in &self.slots {
            slot.signal.set();
        }
    }

    /// What a vCPU sleeps on.
    pub fn signal(&self, id: VcpuId) -> &Signal {
        &self.slots[id.0 as usize].signal
    }

    /// Notes what a vCPU does from now on. After Running its thread looks at the pause and end flags again before it runs: those who set
    /// them look at the activity after that.
    pub fn set_activity(&self, id: VcpuId, activity: Activity) {
        let slot = &self.slots[id.0 as usize];
        if activity != Activity::Held {
            slot.down.store(activity == Activity::Down, SeqCst);
        }
        slot.activity.store(activity as u8, SeqCst);
        if activity != Activity::Running && (self.is_held() || self.has_ended()) {
            // Taking the lock orders this after a waiter's look at the activities.
            drop(lock(&self.life));
            self.changed.notify_all();
        }
    }

    pub fn activities(&self) -> Vec<Activity> {
        self.slots
            .iter()
            .map(|s| Activity::from_u8(s.activity.load(SeqCst)))
            .collect()
    }

    /// Notes that a vCPU is down: taken down by a hypercall, or halted without interrupts.
    pub fn set_down(&self, id: VcpuId, taken_down: bool) {
        self.slots[id.0 as usize]
            .taken_down
            .store(taken_down, SeqCst);
        self.set_activity(id, Activity::Down);
    }

    /// Whether no vCPU is left that could wake another. `is_up` is what the guest's hypercalls have left of a vCPU.
    pub fn all_down(&self, is_up: impl Fn(VcpuId) -> bool) -> bool {
        (0..).zip(&self.slots).all(|(id, s)| {
            // One that has been called back but whose thread has not noticed yet counts as up. To one that was taken down interrupts and
            // kicks mean nothing.
            let called_back = match s.taken_down.load(SeqCst) {
                true => is_up(VcpuId(id)),
                false => s.control.get().is_some_and(|c| c.has_wakeup(false)),
            };
            s.down.load(SeqCst) && !called_back
        })
    }

    /// Whether the guest runs on a vCPU.
    pub fn is_online(&self, id: VcpuId) -> bool {
        !self.slots[id.0 as usize].down.load(SeqCst)
    }

    /// vCPUs that are not down.
    pub fn online(&self) -> u32 {
        self.slots.iter().filter(|s| !s.down.load(SeqCst)).count() as u32
    }
}

impl Host for Run {
    fn wake(&self, vcpu: VcpuId) {
        if let Some(slot) = self.slots.get(vcpu.0 as usize) {
            slot.signal.set();
        }
    }

    fn console_write(&self, bytes: &[u8]) {
        self.console.output(bytes);
    }

    fn watchdog_expired(&self) -> bool {
        let counts = !self.suspension.is_held();
        if counts {
            self.end(EndReason::Watchdog);
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn pause_returns_when_the_domain_is_unpaused_meanwhile() {
        let run = Arc::new(Run::new(
            1,
            Arc::new(Console::new(Box::new(std::io::sink()))),
        ));
        run.unpause();
        run.set_activity(VcpuId(0), Activity::Running);
        let pausing = std::thread::spawn({
            let run = Arc::clone(&run);
            move || run.pause()
        });
        while !run.is_paused() {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(10));
        run.unpause();
        // The vCPU has not stopped at all.
        while !pausing.is_finished() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn vcpu_that_is_just_brought_up_counts_as_up() {
        let run = Run::new(2, Arc::new(Console::new(Box::new(std::io::sink()))));
        run.set_down(VcpuId(0), false);
        assert!(run.all_down(|_| true), "both have halted");
        run.set_down(VcpuId(1), true);
        assert!(run.all_down(|id| id == VcpuId(0)));
        // Its thread has not noticed yet.
        assert!(!run.all_down(|_| true));
    }
}
