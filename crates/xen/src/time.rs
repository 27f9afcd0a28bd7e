//! Publishing the clock: the time areas of all vCPUs and the wall clock.

use std::sync::Mutex;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use hospes_memory::{Area, Page};
use hospes_sys::rdtsc;
use hospes_xen_abi::shared::{
    PVCLOCK_GUEST_STOPPED, PVCLOCK_TSC_STABLE, SI_WC_VERSION, VcpuTimeInfo,
};

use crate::clock::{Line, Moment, Servo, TscRate, host_tsc_is_stable, realtime_ns};

const OFF_FLAGS: usize = core::mem::offset_of!(VcpuTimeInfo, flags);
/// The wall clock is published again where it is off by more than this, ns.
const WALL_CLOCK_TOLERANCE: u64 = 1_000_000;

/// The clock of one domain and everywhere it is shown.
#[derive(Debug)]
pub(crate) struct Time {
    inner: Mutex<Inner>,
    stable: bool,
}

#[derive(Debug)]
struct Inner {
    line: Line,
    servo: Servo,
    /// Even; the version that all areas carry.
    version: u32,
    /// Time areas inside `vcpu_info`s: they stay for ever.
    areas: Vec<Area>,
    /// The second area of each vCPU, which it may register for its user space.
    user_areas: Vec<Option<Area>>,
    shared: Page,
    /// UTC at system time 0 as published, ns.
    wall_epoch_ns: u64,
}

impl Time {
    /// Starts at `system_ns` now and publishes that; `areas` are the time areas inside the shared info page.
    pub fn new(
        rate: TscRate,
        system_ns: u64,
        shared: Page,
        areas: Vec<Area>,
        vcpus: usize,
    ) -> Time {
        let start = Moment::now();
        let time = Time {
            inner: Mutex::new(Inner {
                line: Line::through(start.tsc, system_ns, 1e9 / rate.hz),
                servo: Servo::new(start, system_ns, rate),
                version: 0,
                areas,
                user_areas: vec![None; vcpus],
                shared,
                wall_epoch_ns: 0,
            }),
            stable: host_tsc_is_stable(),
        };
        let mut inner = time.lock();
        inner.publish(time.stable, |line, _| line);
        inner.publish_wall_clock();
        drop(inner);
        time
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        crate::lock(&self.inner)
    }

    /// System time, ns.
    pub fn now_ns(&self) -> u64 {
        let inner = self.lock();
        inner.line.at(rdtsc())
    }

    /// Compares with the host's clock and publishes a new line that ends the difference; `interval` is the time to the next call.
    pub fn steer(&self, interval: Duration) {
        let now = Moment::now();
        let mut inner = self.lock();
        let shown = inner.line.at(now.tsc);
        let correction = inner.servo.step(now, shown, interval);
        inner.publish(self.stable, |old, tsc| {
            Line::through(
                tsc,
                old.at(tsc) + correction.jump_ns,
                correction.ns_per_tick,
            )
        });
        inner.publish_wall_clock();
    }

    /// Adds a time area that lies in a `vcpu_info`.
    pub fn add_area(&self, area: Area) {
        let mut inner = self.lock();
        inner.show_in(&area, self.stable);
        inner.areas.push(area);
    }

    /// Sets or removes the second area of a vCPU.
    pub fn set_user_area(&self, vcpu: usize, area: Option<Area>) {
        let mut inner = self.lock();
        if let Some(area) = &area {
            inner.show_in(area, self.stable);
        }
        inner.user_areas[vcpu] = area;
    }

    /// Tells the guest that it did not run for a while, so that its watchdogs do not bark.
    pub fn mark_stopped(&self) {
        let inner = self.lock();
        for area in inner.all_areas() {
            area.u8(OFF_FLAGS)
                .fetch_or(PVCLOCK_GUEST_STOPPED, Ordering::SeqCst);
        }
    }
}

impl Inner {
    fn all_areas(&self) -> impl Iterator<Item = &Area> {
        self.areas.iter().chain(self.user_areas.iter().flatten())
    }

    /// Replaces the line. The new one is computed from a TSC value read while no guest can complete a reading with the old one, so
    /// no reading with the old line is later than the start of the new.
    fn publish(&mut self, stable: bool, new: impl FnOnce(Line, u64) -> Line) {
        let odd = self.version.wrapping_add(1);
        for area in self.all_areas() {
            area.u32(0).store(odd, Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
        self.line = new(self.line, rdtsc());
        self.version = odd.wrapping_add(1);
        for area in self.all_areas() {
            write_line(area, &self.line, stable);
            area.u32(0).store(self.version, Ordering::Release);
        }
    }

    fn show_in(&self, area: &Area, stable: bool) {
        area.u32(0)
            .store(self.version.wrapping_sub(1), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        write_line(area, &self.line, stable);
        area.u32(0).store(self.version, Ordering::Release);
    }

    fn publish_wall_clock(&mut self) {
        let epoch = realtime_ns().saturating_sub(self.line.at(rdtsc()));
        if epoch.abs_diff(self.wall_epoch_ns) <= WALL_CLOCK_TOLERANCE {
            return;
        }
        self.wall_epoch_ns = epoch;
        let sec = epoch / 1_000_000_000;
        let word = |i: usize| self.shared.u32(SI_WC_VERSION + 4 * i);
        let odd = word(0).load(Ordering::Relaxed) | 1;
        word(0).store(odd, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        word(1).store(sec as u32, Ordering::Relaxed);
        word(2).store((epoch % 1_000_000_000) as u32, Ordering::Relaxed);
        word(3).store((sec >> 32) as u32, Ordering::Relaxed);
        word(0).store(odd.wrapping_add(1), Ordering::Release);
    }
}

/// Writes all but the version. What the guest left in the "stopped" flag stays: it alone clears it.
fn write_line(area: &Area, line: &Line, stable: bool) {
    let flags = if stable { PVCLOCK_TSC_STABLE } else { 0 };
    let old = area.u8(OFF_FLAGS).load(Ordering::Relaxed) & PVCLOCK_GUEST_STOPPED;
    area.u64(core::mem::offset_of!(VcpuTimeInfo, tsc_timestamp))
        .store(line.tsc, Ordering::Relaxed);
    area.u64(core::mem::offset_of!(VcpuTimeInfo, system_time))
        .store(line.system_ns, Ordering::Relaxed);
    area.u32(core::mem::offset_of!(VcpuTimeInfo, tsc_to_system_mul))
        .store(line.mul, Ordering::Relaxed);
    area.u8(core::mem::offset_of!(VcpuTimeInfo, tsc_shift))
        .store(line.shift as u8, Ordering::Relaxed);
    area.u8(OFF_FLAGS).store(flags | old, Ordering::Relaxed);
}
