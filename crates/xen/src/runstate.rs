//! What each vCPU does and how long: the guest's steal clock and the host's `xl list`.
//!
//! Time in which a vCPU's thread waited for a host CPU is "runnable": the kernel counts it in the thread's `schedstat`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::fence;

use hospes_memory::Area;
use hospes_units::VcpuId;
use hospes_xen_abi::shared::{RUNSTATE_UPDATE, Runstate, RunstateInfo};

use crate::{Xen, lock};

/// `schedstat` is not read more often than this, ns.
const SCHEDSTAT_INTERVAL: u64 = 1_000_000;

const OFF_STATE: usize = core::mem::offset_of!(RunstateInfo, state);
const OFF_ENTRY: usize = core::mem::offset_of!(RunstateInfo, state_entry_time);
const OFF_TIME: usize = core::mem::offset_of!(RunstateInfo, time);

/// The account of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct RunstateAccount {
    state: Runstate,
    /// System time up to which `time` is counted.
    entry: u64,
    time: [u64; 4],
    area: Option<Area>,
    schedstat: Option<Schedstat>,
    /// Time that the vCPU has waited for a host CPU outside of its thread, as far as it is counted, ns.
    elsewhere: u64,
    /// Time in which the whole process was stopped and which is not in `time` yet, ns.
    stopped: u64,
}

#[derive(Debug)]
struct Schedstat {
    file: File,
    read_at: u64,
    /// Nanoseconds on a CPU and waiting for one.
    last: (u64, u64),
}

impl Schedstat {
    fn read(&self) -> Option<(u64, u64)> {
        let mut text = [0; 64];
        let len = self.file.read_at(&mut text, 0).ok()?;
        let mut numbers = std::str::from_utf8(&text[..len])
            .ok()?
            .split_ascii_whitespace()
            .map(str::parse::<u64>);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }
}

impl RunstateAccount {
    pub fn start(&mut self, now: u64) {
        self.entry = now;
    }

    /// Time the vCPU has waited for a host CPU since the last look, ns. `elsewhere`: all of that outside of its thread.
    fn stolen(&mut self, now: u64, elsewhere: u64) -> u64 {
        let outside = elsewhere.saturating_sub(self.elsewhere);
        self.elsewhere = elsewhere;
        outside + std::mem::take(&mut self.stopped) + self.stolen_from_thread(now)
    }

    fn stolen_from_thread(&mut self, now: u64) -> u64 {
        let Some(stat) = &mut self.schedstat else {
            return 0;
        };
        if now.saturating_sub(stat.read_at) < SCHEDSTAT_INTERVAL {
            return 0;
        }
        stat.read_at = now;
        let Some(read) = stat.read() else { return 0 };
        let stolen = read.1.saturating_sub(stat.last.1);
        stat.last = read;
        stolen
    }

    fn change(&mut self, state: Runstate, now: u64, elsewhere: u64, flag: bool) {
        let elapsed = now.saturating_sub(self.entry);
        let stolen = self.stolen(now, elsewhere).min(elapsed);
        self.time[self.state as usize] += elapsed - stolen;
        self.time[Runstate::Runnable as usize] += stolen;
        self.state = state;
        self.entry = self.entry.max(now);
        self.show(flag);
    }

    fn show(&self, flag: bool) {
        let Some(area) = &self.area else { return };
        if flag {
            area.u64(OFF_ENTRY)
                .store(self.entry | RUNSTATE_UPDATE, SeqCst);
            fence(SeqCst);
        }
        area.u32(OFF_STATE).store(self.state as u32, Relaxed);
        for (i, time) in self.time.iter().enumerate() {
            area.u64(OFF_TIME + 8 * i).store(*time, Relaxed);
        }
        // Guests without the flag see from a changed entry time that they read while this was written.
        fence(SeqCst);
        area.u64(OFF_ENTRY).store(self.entry, SeqCst);
    }

    /// The account as the guest may ask for it.
    pub fn info(&self) -> RunstateInfo {
        RunstateInfo {
            state: self.state as u32,
            pad: 0,
            state_entry_time: self.entry,
            time: self.time,
        }
    }

    pub fn set_area(&mut self, area: Area, flag: bool) {
        self.area = Some(area);
        self.show(flag);
    }
}

impl Xen {
    /// To be called by a vCPU's thread when it starts: its waiting for host CPUs is counted from then on.
    pub fn vcpu_thread_started(&self, id: VcpuId) {
        let Some(slot) = self.vcpus.get(id.0 as usize) else {
            return;
        };
        let schedstat = File::open("/proc/thread-self/schedstat")
            .ok()
            .map(|file| Schedstat {
                file,
                read_at: 0,
                last: (0, 0),
            });
        let mut run = lock(&slot.run);
        run.schedstat = schedstat.and_then(|mut s| {
            s.last = s.read()?;
            Some(s)
        });
    }

    /// Notes what a vCPU does from now on. Called by its thread around each wait.
    pub fn set_runstate(&self, id: VcpuId, state: Runstate) {
        let now = self.time.now_ns();
        if let Some(slot) = self.vcpus.get(id.0 as usize) {
            let flag = self.runstate_flag.load(Relaxed);
            lock(&slot.run).change(state, now, slot.waited_elsewhere(), flag);
        }
    }

    /// Brings the accounts of vCPUs that run without a break up to date.
    pub(crate) fn refresh_runstates(&self) {
        for id in 0..self.vcpus.len() {
            self.refresh_runstate(VcpuId(id as u32));
        }
    }

    /// The same for one: its kernel is about to look at the time, and takes what was stolen off what a thread of its own has used.
    pub(crate) fn refresh_runstate(&self, id: VcpuId) {
        let Some(slot) = self.vcpus.get(id.0 as usize) else {
            return;
        };
        let now = self.time.now_ns();
        let flag = self.runstate_flag.load(Relaxed);
        let mut run = lock(&slot.run);
        // A vCPU reads its own account; only with the flag can it tell that another thread is writing.
        if run.state == Runstate::Running && (flag || run.area.is_none()) {
            run.change(Runstate::Running, now, slot.waited_elsewhere(), flag);
        }
    }

    /// The domain's process was stopped for so long: that was stolen from all vCPUs that ran, as a pause is on Xen.
    pub(crate) fn note_stopped(&self, ns: u64) {
        for slot in &self.vcpus {
            let mut run = lock(&slot.run);
            if run.state == Runstate::Running {
                run.stopped += ns;
            }
        }
    }

    /// What a vCPU does now.
    pub fn runstate(&self, id: VcpuId) -> Option<Runstate> {
        self.vcpus
            .get(id.0 as usize)
            .map(|slot| lock(&slot.run).state)
    }

    /// Host CPU time a vCPU has used, ns; 0 where the host's kernel does not count it.
    pub fn vcpu_time_ns(&self, id: VcpuId) -> u64 {
        self.vcpus.get(id.0 as usize).map_or(0, |slot| {
            let elsewhere = slot.control.get().map_or(0, |c| c.time_elsewhere_ns());
            let here = lock(&slot.run).schedstat.as_mut().map_or(0, |stat| {
                // A thread that has ended leaves what was read last.
                if let Some((on_cpu, _)) = stat.read() {
                    stat.last.0 = on_cpu;
                }
                stat.last.0
            });
            here + elsewhere
        })
    }
}
