//! The thread of a vCPU: runs the guest and does what its exits ask for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hospes_builder::{POWER_OFF_REQUEST, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};
use hospes_engine::{Exit, Vcpu, VcpuControl, reg, rflags};
use hospes_units::VcpuId;
use hospes_xen::{Outcome, ShutdownReason, Xen};
use hospes_xen_abi::hypercall::PAGE_MSR;
use hospes_xen_abi::shared::Runstate;

use crate::halt_poll::HaltPoll;
use crate::placement::Placement;
use crate::run::{Activity, EndReason, Run};
use crate::suspend::{Suspension, Verdict};

/// Counters and command register of the interval timer, which is not there, and the port that shows one counter's output.
const PIT_PORTS: std::ops::RangeInclusive<u16> = 0x40..=0x43;
const PIT_OUTPUT_PORT: u16 = 0x61;

/// Early messages of guests without a console: QEMU's and Xen's debug port.
const DEBUG_PORT: u16 = 0xe9;

/// How long a vCPU stays awake for a disk that answers promptly.
const ATTEND_MOST: Duration = Duration::from_micros(400);

/// A vCPU and its place in the domain.
pub struct VcpuThread {
    pub id: VcpuId,
    pub vcpu: Box<dyn Vcpu>,
    pub xen: Arc<Xen>,
    pub run: Arc<Run>,
    pub placement: Arc<Placement>,
}

impl VcpuThread {
    /// Runs the vCPU until the domain ends. A panic ends the domain.
    pub fn main(self) {
        let run = Arc::clone(&self.run);
        let id = self.id;
        self.placement.thread_starts(id);
        let mut looping = Loop {
            control: self.vcpu.control(),
            vcpu: self.vcpu,
            id,
            xen: self.xen,
            run: self.run,
            placement: self.placement,
            runstate: Runstate::Offline,
            halt_poll: HaltPoll::default(),
        };
        let outcome = catch_unwind(AssertUnwindSafe(move || looping.run()));
        if outcome.is_err() {
            run.end(EndReason::Crash(format!(
                "internal error in the thread of vCPU {id}"
            )));
        }
        run.set_activity(id, Activity::Held);
        run.portrait().thread_ends(id);
        run.thread_ends();
    }
}

struct Loop {
    id: VcpuId,
    vcpu: Box<dyn Vcpu>,
    control: Arc<dyn VcpuControl>,
    xen: Arc<Xen>,
    run: Arc<Run>,
    placement: Arc<Placement>,
    runstate: Runstate,
    halt_poll: HaltPoll,
}

impl Loop {
    fn run(&mut self) {
        self.xen.vcpu_thread_started(self.id);
        while self.may_run() {
            match self.vcpu.run() {
                Ok(exit) => self.handle(exit),
                Err(error) => self.run.end(EndReason::Crash(error.to_string())),
            }
        }
        self.note(Runstate::Offline);
        self.leave_portrait();
    }

    /// Waits until guest code may run; false at the end of the domain.
    fn may_run(&mut self) -> bool {
        loop {
            if self.run.has_ended() {
                return false;
            }
            if self.run.portrait().wants(self.id) {
                self.leave_portrait();
            }
            if self.run.is_held() {
                self.sleep(Activity::Held, |s| !s.run.is_held());
            } else if !self.xen.is_up(self.id) {
                self.go_down(true, |s| s.xen.is_up(s.id));
            } else if self.run.is_limited() {
                // To the guest as if others had the host's CPUs.
                self.note(Runstate::Runnable);
                self.run.set_activity(self.id, Activity::Limited);
                while self.run.is_limited() && !self.is_called() {
                    self.run.signal(self.id).wait();
                }
            } else {
                self.run.set_activity(self.id, Activity::Running);
                // Who pauses or ends the domain sees this activity, or is seen here; so does who limits it.
                if !self.is_called() && !self.run.is_limited() {
                    self.note(Runstate::Running);
                    return true;
                }
            }
        }
    }

    /// Whether something else is to be done than to execute guest code, or to wait for what the guest waits for.
    fn is_called(&self) -> bool {
        self.is_called_from(false)
    }

    /// The same of a vCPU that may be held.
    fn is_called_from(&self, held: bool) -> bool {
        let run = &self.run;
        run.has_ended() || !held && run.is_held() || run.portrait().wants(self.id)
    }

    fn note(&mut self, runstate: Runstate) {
        if self.runstate != runstate {
            self.runstate = runstate;
            // When it goes on, it is where there is room.
            self.placement.stay(self.id, false);
            self.xen.set_runstate(self.id, runstate);
        }
    }

    /// Leaves a copy of what this vCPU is, to whoever saves the domain or dumps its core.
    fn leave_portrait(&mut self) {
        self.vcpu.fetch_fpu();
        let state = self.vcpu.state();
        self.run.portrait().leave(self.id, state);
    }

    /// The guest has suspended itself.
    fn suspended(&mut self) {
        match self.run.suspension().asked_by(self.id) {
            Verdict::End => self.run.end(EndReason::Suspend),
            Verdict::GoOn => Suspension::set_cancelled(self.vcpu.state()),
            Verdict::Hold => {
                // In case that it goes on here.
                Suspension::set_cancelled(self.vcpu.state());
                self.run.look();
            }
        }
    }

    /// Sleeps until `done`, or until the domain is paused, unpaused or ends.
    fn sleep(&mut self, activity: Activity, done: impl Fn(&Self) -> bool) {
        let held = activity == Activity::Held;
        self.run.set_activity(self.id, activity);
        self.note(match activity {
            Activity::Blocked => Runstate::Blocked,
            // As on Xen: a pause steals no time from one that waits.
            Activity::Held if self.runstate == Runstate::Blocked => Runstate::Blocked,
            _ => Runstate::Offline,
        });
        while !done(self) && !self.is_called_from(held) {
            self.run.signal(self.id).wait();
        }
    }

    /// Sleeps until another vCPU brings this one back, which was taken down or has halted without interrupts. When there is none that could, the
    /// guest has halted for good.
    fn go_down(&mut self, taken_down: bool, back: impl Fn(&Self) -> bool) {
        self.run.set_down(self.id, taken_down);
        if self.run.all_down(|id| self.xen.is_up(id)) {
            self.run.end(EndReason::PowerOff);
            return;
        }
        self.sleep(Activity::Down, back);
    }

    fn handle(&mut self, exit: Exit) {
        match exit {
            Exit::Hypercall => {
                let outcome = self.xen.hypercall(&mut *self.vcpu, self.id);
                self.after_hypercall(outcome);
            }
            Exit::PortIo {
                port,
                size,
                write,
                value,
            } => {
                if write {
                    self.port_write(port, value);
                } else {
                    self.port_read(port, size);
                }
            }
            Exit::MsrWrite { index, value } => {
                if index == PAGE_MSR {
                    self.xen.write_hypercall_page(value);
                }
            }
            Exit::Halt {
                interrupts_enabled: true,
            } => self.block(),
            // Offline until an INIT or NMI.
            Exit::Halt {
                interrupts_enabled: false,
            } => self.go_down(false, |s| s.control.has_wakeup(false)),
            Exit::Yield => std::thread::yield_now(),
            Exit::Shutdown { rip } => self.run.end(EndReason::Crash(format!(
                "vCPU {} stopped with a triple fault at {rip:#x}",
                self.id
            ))),
            Exit::Kicked => {}
        }
    }

    /// Waits for an interrupt: awake for as long as the last waits lasted, where they were short, or a disk will answer soon; else asleep.
    fn block(&mut self) {
        self.xen.set_idle(self.id, true);
        let start = Instant::now();
        let awake = self.halt_poll.window();
        let mut attends = false;
        while !self.control.has_wakeup(true) {
            let expects = self.xen.attend();
            attends |= expects;
            let most = if expects { ATTEND_MOST } else { awake };
            if start.elapsed() >= most || self.run.has_ended() || self.run.is_held() {
                if std::mem::take(&mut attends) {
                    self.xen.leave_attended(expects);
                }
                self.sleep(Activity::Blocked, |s| s.control.has_wakeup(true));
                break;
            }
            std::hint::spin_loop();
        }
        if attends {
            self.xen.leave_attended(false);
        }
        self.halt_poll.waited(start.elapsed());
        self.xen.set_idle(self.id, false);
    }

    fn after_hypercall(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Resume | Outcome::Down => {}
            Outcome::Yield => std::thread::yield_now(),
            Outcome::Poll => {
                // With interrupts disabled, as in the slow path of a spin lock, only the polled ports end the wait.
                let enabled = self.vcpu.state().rflags & rflags::IF != 0;
                self.sleep(Activity::Blocked, |s| {
                    s.xen.poll_done(s.id, enabled) || s.control.has_wakeup(enabled)
                });
                self.xen.end_poll(self.id);
            }
            Outcome::Shutdown(reason) => {
                let end = match reason {
                    ShutdownReason::PowerOff => EndReason::PowerOff,
                    // A new kernel in the same memory would need a fresh domain around it; a reboot is what the user gets instead.
                    ShutdownReason::Reboot | ShutdownReason::SoftReset => EndReason::Reboot,
                    ShutdownReason::Suspend => return self.suspended(),
                    ShutdownReason::Crash => {
                        EndReason::Crash("the guest's kernel reported a crash".to_owned())
                    }
                    ShutdownReason::Watchdog => EndReason::Watchdog,
                };
                self.run.end(end);
            }
        }
    }

    fn port_write(&mut self, port: u16, value: u32) {
        match port {
            DEBUG_PORT => self.run.console().output(&[value as u8]),
            SLEEP_CONTROL_PORT if value as u8 == POWER_OFF_REQUEST => {
                self.run.end(EndReason::PowerOff);
            }
            _ => {}
        }
    }

    /// No device: all ones, as on a bus where nobody answers. A timer that reads as zero is seen to stand still at once; of one that reads as
    /// ones Linux waits for a change, for a tenth of a second.
    fn port_read(&mut self, port: u16, size: u8) {
        let value: u64 = match port {
            SLEEP_STATUS_PORT | SLEEP_CONTROL_PORT | PIT_OUTPUT_PORT => 0,
            port if PIT_PORTS.contains(&port) => 0,
            _ => u64::MAX,
        };
        let rax = &mut self.vcpu.state().gpr[reg::RAX];
        *rax = match size {
            1 => *rax & !0xff | value & 0xff,
            2 => *rax & !0xffff | value & 0xffff,
            _ => value & 0xffff_ffff,
        };
    }
}
