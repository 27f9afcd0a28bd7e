//! The domain's clock: system time as a function of the TSC, kept on the host's CLOCK_MONOTONIC.
//!
//! The guest reads the host's TSC unscaled and computes time itself, so what is published must be right between two publications: the
//! rate is measured against CLOCK_MONOTONIC again and again (which NTP bends), and the small error found is bent away during
//! the next interval. At each change the new line starts where the old one is: time never goes backwards.
//!
//! Units: nanoseconds and TSC ticks.

use std::collections::VecDeque;
use std::time::Duration;

use hospes_sys::{cpuid, rdtsc};
use rustix::time::{ClockId, clock_gettime};

/// The host's CLOCK_MONOTONIC, in ns.
pub fn monotonic_ns() -> u64 {
    let t = clock_gettime(ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// The host's CLOCK_REALTIME, in ns since 1970.
pub fn realtime_ns() -> u64 {
    let t = clock_gettime(ClockId::Realtime);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// The TSC and CLOCK_MONOTONIC at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub tsc: u64,
    pub monotonic_ns: u64,
}

impl Moment {
    /// Reads both clocks; of several tries the one in which they lie closest together is taken.
    pub fn now() -> Moment {
        let mut best = (u64::MAX, Moment::zero());
        for _ in 0..8 {
            let before = rdtsc();
            let monotonic_ns = monotonic_ns();
            let after = rdtsc();
            let width = after.wrapping_sub(before);
            if width < best.0 {
                let tsc = before.wrapping_add(width / 2);
                best = (width, Moment { tsc, monotonic_ns });
            }
        }
        best.1
    }

    fn zero() -> Moment {
        Moment {
            tsc: 0,
            monotonic_ns: 0,
        }
    }
}

/// A measurement of the TSC's frequency that runs while its owner does something else.
#[derive(Clone, Copy, Debug)]
pub struct Calibration {
    start: Moment,
}

/// The TSC's frequency.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TscRate {
    pub hz: f64,
}

impl TscRate {
    pub fn khz(self) -> u32 {
        (self.hz / 1000.0).round() as u32
    }
}

/// A nominal frequency is believed where it is no further than this from the measured one.
const NOMINAL_TOLERANCE: f64 = 100e-6;

impl Calibration {
    pub fn start() -> Calibration {
        Calibration {
            start: Moment::now(),
        }
    }

    /// Waits until the measurement has lasted `window` (10 ms give about 5 ppm), and decides: the nominal frequency that CPUID gives, where the
    /// measurement agrees, as it carries no noise; else the measured one.
    pub fn finish(self, window: Duration) -> TscRate {
        let due = self.start.monotonic_ns + window.as_nanos() as u64;
        loop {
            let left = due.saturating_sub(monotonic_ns());
            if left == 0 {
                break;
            }
            std::thread::sleep(Duration::from_nanos(left));
        }
        let end = Moment::now();
        let ticks = end.tsc.wrapping_sub(self.start.tsc) as f64;
        let measured = ticks * 1e9 / (end.monotonic_ns - self.start.monotonic_ns) as f64;
        let hz = nominal_hz()
            .filter(|n| (n / measured - 1.0).abs() < NOMINAL_TOLERANCE)
            .unwrap_or(measured);
        TscRate { hz }
    }
}

/// What CPUID says of the TSC's frequency: leaf 0x15, or the timing leaf that hypervisors offer.
fn nominal_hz() -> Option<f64> {
    if cpuid(0, 0)[0] >= 0x15 {
        let [denominator, numerator, crystal_hz, _] = cpuid(0x15, 0);
        if denominator != 0 && numerator != 0 && crystal_hz != 0 {
            return Some(f64::from(crystal_hz) * f64::from(numerator) / f64::from(denominator));
        }
    }
    let under_hypervisor = cpuid(1, 0)[2] & (1 << 31) != 0;
    if under_hypervisor && (0x4000_0010..0x4000_1000).contains(&cpuid(0x4000_0000, 0)[0]) {
        let khz = cpuid(0x4000_0010, 0)[0];
        if khz != 0 {
            return Some(f64::from(khz) * 1000.0);
        }
    }
    None
}

/// System time as a line over the TSC, in the form the guest computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    pub tsc: u64,
    pub system_ns: u64,
    pub mul: u32,
    pub shift: i8,
}

impl Line {
    /// The line through a point with a rate in ns per tick.
    pub fn through(tsc: u64, system_ns: u64, ns_per_tick: f64) -> Line {
        let mut shift = 0i8;
        let mut fraction = ns_per_tick;
        while fraction >= 1.0 && shift < 31 {
            fraction /= 2.0;
            shift += 1;
        }
        while fraction < 0.5 && shift > -31 {
            fraction *= 2.0;
            shift -= 1;
        }
        let mul = (fraction * 4_294_967_296.0).round().min(4_294_967_295.0) as u32;
        Line {
            tsc,
            system_ns,
            mul,
            shift,
        }
    }

    /// System time at a TSC value; before the line's start it is the start's.
    pub fn at(&self, tsc: u64) -> u64 {
        let delta = tsc.wrapping_sub(self.tsc);
        if (delta as i64) < 0 {
            return self.system_ns;
        }
        let delta = if self.shift >= 0 {
            u128::from(delta) << self.shift
        } else {
            u128::from(delta >> -self.shift)
        };
        self.system_ns + ((delta * u128::from(self.mul)) >> 32) as u64
    }
}

/// Moments kept for measuring the rate.
const HISTORY: usize = 16;
/// Most the rate may leave the measured one to remove an error.
const MAX_SLEW: f64 = 500e-6;
/// Errors beyond this come from a host that slept or was starved, ns.
const LARGE_ERROR: i64 = 10_000_000;
const MAX_SLEW_LARGE: f64 = 0.05;

/// Decides the rate at which system time should run so that it stays on CLOCK_MONOTONIC.
#[derive(Debug)]
pub struct Servo {
    history: VecDeque<Moment>,
    /// CLOCK_MONOTONIC at system time 0; may be negative in a restored domain.
    epoch_ns: i64,
    ns_per_tick: f64,
}

/// What [`Servo::step`] wants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Correction {
    pub ns_per_tick: f64,
    /// Forward jump, for a clock that is far behind.
    pub jump_ns: u64,
}

impl Servo {
    /// A servo for a clock that shows `system_ns` at `start`.
    pub fn new(start: Moment, system_ns: u64, rate: TscRate) -> Servo {
        Servo {
            history: VecDeque::from([start]),
            epoch_ns: start.monotonic_ns as i64 - system_ns as i64,
            ns_per_tick: 1e9 / rate.hz,
        }
    }

    /// `system_ns` is what the clock shows at `now`; `interval` is the time until the next step.
    pub fn step(&mut self, now: Moment, system_ns: u64, interval: Duration) -> Correction {
        if let Some(first) = self.history.front() {
            let ticks = now.tsc.wrapping_sub(first.tsc);
            let ns = now.monotonic_ns.saturating_sub(first.monotonic_ns);
            // A short baseline measures the noise of reading the clocks.
            if ns >= 10_000_000 && ticks > 0 && (ticks as i64) > 0 {
                let measured = ns as f64 / ticks as f64;
                if (measured / self.ns_per_tick - 1.0).abs() < 0.01 {
                    self.ns_per_tick = measured;
                    self.history.push_back(now);
                } else {
                    // The TSC or the host's clock jumped: what was measured before says nothing any more.
                    self.history = VecDeque::from([now]);
                }
            }
        }
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
        let error = (now.monotonic_ns as i64 - self.epoch_ns) - system_ns as i64;
        if error > LARGE_ERROR {
            return Correction {
                ns_per_tick: self.ns_per_tick,
                jump_ns: error as u64,
            };
        }
        let limit = if error < -LARGE_ERROR {
            MAX_SLEW_LARGE
        } else {
            MAX_SLEW
        };
        let slew = (error as f64 / (2.0 * interval.as_nanos() as f64)).clamp(-limit, limit);
        Correction {
            ns_per_tick: self.ns_per_tick * (1.0 + slew),
            jump_ns: 0,
        }
    }
}

/// Whether the TSCs of all host CPUs agree, as far as the host's kernel trusts them itself.
pub fn host_tsc_is_stable() -> bool {
    std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        .is_ok_and(|name| name.trim() == "tsc")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn line_keeps_its_rate_and_never_goes_backwards(
            khz in 100_000u32..20_000_000, tsc: u32, ticks in 0u64..1 << 40, more in 0u64..1 << 20,
        ) {
            let rate = 1e6 / f64::from(khz);
            let line = Line::through(u64::from(tsc), 5, rate);
            let at = line.at(u64::from(tsc) + ticks);
            prop_assert!(line.at(u64::from(tsc) + ticks + more) >= at);
            let want = 5.0 + ticks as f64 * rate;
            prop_assert!((at as f64 - want).abs() <= 40.0 + want * 1e-9, "{at} {want}");
            prop_assert!(line.mul >= 1 << 31);
        }
    }

    #[test]
    fn line_before_its_start_stands_still() {
        let line = Line::through(1000, 77, 0.5);
        assert_eq!(line.at(999), 77);
        assert_eq!(line.at(1000), 77);
    }

    /// A host whose TSC runs at `hz` and whose CLOCK_MONOTONIC is bent by `ppm(t)`.
    fn follow(hz: f64, assumed_hz: f64, ppm: impl Fn(u64) -> f64) -> (i64, i64) {
        let start = Moment {
            tsc: 10_000,
            monotonic_ns: 1_000_000,
        };
        let rate = TscRate { hz: assumed_hz };
        let mut servo = Servo::new(start, 0, rate);
        let mut line = Line::through(start.tsc, 0, 1e9 / assumed_hz);
        let (mut now, mut monotonic) = (start, start.monotonic_ns as f64);
        let (mut worst_late, mut last) = (0i64, 0);
        for second in 0..3600 {
            now.tsc += hz as u64;
            monotonic += 1e9 * (1.0 + ppm(second) * 1e-6);
            now.monotonic_ns = monotonic as u64;
            let shown = line.at(now.tsc);
            assert!(shown >= last);
            last = shown;
            let c = servo.step(now, shown, Duration::from_secs(1));
            line = Line::through(now.tsc, shown + c.jump_ns, c.ns_per_tick);
            if second > 60 {
                let error = (now.monotonic_ns - start.monotonic_ns) as i64 - shown as i64;
                worst_late = worst_late.max(error.abs());
            }
        }
        let error = (now.monotonic_ns - start.monotonic_ns) as i64 - last as i64;
        (worst_late, error)
    }

    #[test]
    fn follow_a_badly_calibrated_host_ends_within_a_microsecond() {
        let (worst, end) = follow(2.999e9, 2.9991e9, |_| 0.0);
        assert!(worst < 1000 && end.abs() < 1000, "{worst} {end}");
    }

    #[test]
    fn follow_a_host_bent_by_ntp_stays_within_a_millisecond() {
        let (worst, end) = follow(2.0e9, 2.0e9, |s| if s % 600 < 300 { 80.0 } else { -80.0 });
        assert!(worst < 1_000_000 && end.abs() < 1_000_000, "{worst} {end}");
    }

    #[test]
    fn step_after_the_host_slept_jumps_forward_only() {
        let start = Moment {
            tsc: 0,
            monotonic_ns: 0,
        };
        let mut servo = Servo::new(start, 0, TscRate { hz: 1e9 });
        let now = Moment {
            tsc: 1_000_000_000,
            monotonic_ns: 5_000_000_000,
        };
        let c = servo.step(now, 1_000_000_000, Duration::from_secs(1));
        assert_eq!(c.jump_ns, 4_000_000_000);
        let ahead = servo.step(now, 9_000_000_000, Duration::from_secs(1));
        assert_eq!(ahead.jump_ns, 0);
        assert!(ahead.ns_per_tick < 1.0 && ahead.ns_per_tick > 0.9);
    }

    #[test]
    fn calibrate_gives_a_rate_that_predicts_the_tsc() {
        let rate = Calibration::start().finish(Duration::from_millis(10));
        assert!(rate.hz > 1e8 && rate.hz < 2e10, "{}", rate.hz);
        assert!(rate.khz() > 100_000);
    }
}
