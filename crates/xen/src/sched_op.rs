//! Scheduler operations: yield, block, poll, shutdown, watchdogs.

use std::sync::atomic::Ordering::SeqCst;

use hospes_engine::{Activity, Vcpu, rflags};
use hospes_units::{Gva, VcpuId};
use hospes_xen_abi::shared::PORTS_2LEVEL;
use hospes_xen_abi::{Errno, sched};
use zerocopy::IntoBytes;

use crate::guest::{Reply, read};
use crate::timers::Timer;
use crate::{Outcome, ShutdownReason, Xen, lock};

/// What a polling vCPU waits for.
#[derive(Clone, Debug)]
pub(crate) struct PollWait {
    ports: Vec<u32>,
    deadline_ns: Option<u64>,
}

impl Xen {
    pub(crate) fn sched_op(
        &self,
        vcpu: &mut dyn Vcpu,
        id: usize,
        wide: bool,
        cmd: u64,
        arg: u64,
    ) -> Result<Reply, Errno> {
        match cmd {
            sched::YIELD => Ok(Reply::Then(Outcome::Yield)),
            sched::BLOCK => {
                // As STI and HLT: only the engine knows of interrupts that it has taken in and not delivered.
                let state = vcpu.state();
                state.rflags |= rflags::IF;
                state.activity = Activity::Halted;
                vcpu.state_changed();
                Ok(Reply::OK)
            }
            sched::SHUTDOWN => {
                let reason = match read::<u32>(vcpu, arg)? {
                    sched::SHUTDOWN_POWEROFF => ShutdownReason::PowerOff,
                    sched::SHUTDOWN_REBOOT => ShutdownReason::Reboot,
                    sched::SHUTDOWN_SUSPEND => ShutdownReason::Suspend,
                    sched::SHUTDOWN_CRASH => ShutdownReason::Crash,
                    sched::SHUTDOWN_WATCHDOG => ShutdownReason::Watchdog,
                    sched::SHUTDOWN_SOFT_RESET => ShutdownReason::SoftReset,
                    _ => return Err(Errno::Inval),
                };
                Ok(Reply::Then(Outcome::Shutdown(reason)))
            }
            sched::POLL if wide => self.poll(vcpu, id, arg),
            sched::WATCHDOG => self.watchdog(read(vcpu, arg)?),
            _ => Err(Errno::NoSys),
        }
    }

    fn poll(&self, vcpu: &mut dyn Vcpu, id: usize, arg: u64) -> Result<Reply, Errno> {
        let a: sched::Poll = read(vcpu, arg)?;
        if a.nr_ports > sched::POLL_MAX_PORTS {
            return Err(Errno::Inval);
        }
        let mut ports = vec![0u32; a.nr_ports as usize];
        vcpu.read_virt(Gva(a.ports), ports.as_mut_bytes())
            .map_err(|_| Errno::Fault)?;
        if ports.iter().any(|p| *p == 0 || *p as usize >= PORTS_2LEVEL) {
            return Err(Errno::Inval);
        }
        let deadline_ns = (a.timeout != 0).then_some(a.timeout);
        let mut polling = lock(&self.vcpus[id].polling);
        if polling.is_none() {
            self.pollers.fetch_add(1, SeqCst);
        }
        *polling = Some(PollWait { ports, deadline_ns });
        drop(polling);
        if let Some(deadline) = deadline_ns {
            self.timers.set(Timer::Poll(id), deadline);
        }
        Ok(Reply::Then(Outcome::Poll))
    }

    /// Whether a poll has ended: one of its ports is pending, an upcall waits that can be taken, or its time is up. Asked by the vCPU's thread
    /// before it sleeps and each time it was woken.
    pub fn poll_done(&self, id: VcpuId, interrupts_enabled: bool) -> bool {
        let Some(slot) = self.vcpus.get(id.0 as usize) else {
            return true;
        };
        let polling = lock(&slot.polling);
        let Some(wait) = &*polling else { return true };
        interrupts_enabled && self.upcall_waits(id.0 as usize)
            || wait.ports.iter().any(|p| self.is_pending(*p))
            || wait
                .deadline_ns
                .is_some_and(|deadline| deadline <= self.time.now_ns())
    }

    /// The vCPU goes on after a poll, for whatever reason.
    pub fn end_poll(&self, id: VcpuId) {
        let Some(slot) = self.vcpus.get(id.0 as usize) else {
            return;
        };
        let ended = lock(&slot.polling).take();
        if let Some(wait) = ended {
            self.pollers.fetch_sub(1, SeqCst);
            if wait.deadline_ns.is_some() {
                self.timers.cancel(Timer::Poll(id.0 as usize));
            }
        }
    }

    /// Wakes the vCPUs that poll this port.
    pub(crate) fn wake_pollers(&self, port: u32) {
        for (id, slot) in self.vcpus.iter().enumerate() {
            let waits = lock(&slot.polling)
                .as_ref()
                .is_some_and(|wait| wait.ports.contains(&port));
            if waits {
                self.host.wake(VcpuId(id as u32));
            }
        }
    }

    /// Arms, renews or stops a watchdog; returns the number of a new one.
    fn watchdog(&self, a: sched::Watchdog) -> Result<Reply, Errno> {
        let now = self.time.now_ns();
        let timeout = u64::from(a.timeout) * 1_000_000_000;
        match a.id as usize {
            0 if a.timeout == 0 => Err(Errno::Inval),
            0 => match self.timers.set_free_watchdog(now, timeout) {
                Some(number) => Ok(Reply::Value(number as u64 + 1)),
                None => Err(Errno::NoSpc),
            },
            n if n > sched::WATCHDOGS => Err(Errno::Inval),
            n => {
                if a.timeout == 0 {
                    self.timers.cancel(Timer::Watchdog(n - 1));
                } else {
                    self.timers.set_watchdog(n - 1, now, timeout);
                }
                Ok(Reply::OK)
            }
        }
    }
}
