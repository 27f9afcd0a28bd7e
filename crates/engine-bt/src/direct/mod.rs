//! Direct execution: long bursts of guest user code run natively, each guest address space in a process of its own that holds nothing else.
//!
//! The translator stays in charge: it decides every fault. A burst ends with whatever the process stops for; the instruction that stopped it is executed once more by
//! the engine, with the guest's own tables. Memory is the guest's: the process maps pages of the same memory file, as far as the guest's tables allow.
//!
//! Invariants
//! * Nothing of the monitor and no page that guest user code may not reach is mapped in such a process, but for a page of code that makes mapping calls, their table, and a page of registers.
//! * No system call of guest code is carried out by the host: those that the filter lets pass carry a key which is not in the process when guest code runs.
//! * A page is mapped writable only where the guest's entry is dirty, the frame has no translations and a write to it has not to be noted (in the log of written
//!   frames), and executable only where it has been scanned since it was
//!   last written.
//! * Each vCPU has its own processes: they are flushed when its TLB is.
//!
//! Limits: 64-bit code with flat selectors and 4-level paging; without debug registers, single stepping or a shifted TSC. Instructions that the host has and the guest's CPUID does not show are executed; where they use registers that the guest's XCR0 does not
//! cover, the program is back in the translator, which knows no such instructions, from the next burst on.

mod alone;
mod duel;
mod fill;
mod guards;
mod mirror;
mod policy;
pub mod process;
mod run;
mod scan;
mod stub;
mod tables;

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use hospes_engine::Stay;
use hospes_memory::GuestMemory;
use hospes_units::Gva;

use alone::{Alone, Found};
use mirror::Mirror;
use policy::Policy;
use process::Process;

use crate::fpu::{self, Wide};
use crate::vm::Execution;

/// The address of the tables' root in CR3.
const ROOT: u64 = ((1 << 46) - 1) & !0xfff;
/// Address spaces of one vCPU that have a process at a time.
const SPACES: usize = 12;
/// Changes of a process's mappings before it is emptied: each makes two of them at most, and the host's default limit is 65,530.
const MOST_RANGES: usize = 30_000;

/// What a scan of a frame came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Suspects {
    /// At these offsets, few enough for breakpoints.
    At(Vec<u16>),
    /// More than that, but all of them behind these: once one has been reached, the page stays translated.
    Behind(Vec<u16>),
    Many,
}

/// An address space with its process.
#[derive(Debug)]
struct Space {
    root: u64,
    /// The PCID it was last run with.
    pcid: u16,
    process: Process,
    mirror: Mirror,
    /// Pages whose code must stay in the translator.
    excluded: HashSet<u64>,
    /// Pages that stay there for as long as the process is this address space's.
    retired: HashSet<u64>,
    /// The page that is executed while no other is.
    alone: Option<Alone>,
    /// Where interrupts find the program that stays translated there.
    found: Option<Found>,
    /// Those that are to be executed so whenever they are reached.
    lone: HashSet<u64>,
    /// How many interrupts in a row have to find the program in a page for which that has not paid.
    poor: HashMap<u64, u32>,
    /// Where the program went over to the process.
    entry: u64,
    /// Addresses that the process stops before.
    breakpoints: Vec<u64>,
    /// Host CPU time that has been accounted for, ns.
    accounted_ns: u64,
    /// The vector state that the process has, as the vCPU's image shows it; empty if that is not known.
    vectors: Vec<u8>,
    /// Where the guest's kernel was called for a page: what it has put there is mapped before the program goes on.
    awaited: Option<u64>,
    /// The process is in a state that it cannot be brought out of.
    tainted: bool,
    /// The code has used registers that the guest's processor does not have.
    foreign: bool,
}

impl Space {
    fn stays_translated(&self, page: u64) -> bool {
        self.excluded.contains(&page) || self.retired.contains(&page)
    }
}

/// A vCPU's side of direct execution.
pub(crate) struct Direct {
    enabled: bool,
    /// Components of the XSAVE image that the domain's code may use, as bits of XCR0.
    components: u64,
    policy: Policy,
    /// The most recently used is the last.
    spaces: Vec<Space>,
    /// The translator takes what comes next, whatever it is.
    pass: bool,
    /// User code runs in an address space that is run natively: jumps are not remembered, so that each comes back here.
    pub hold_jumps: bool,
    scratch: Vec<u8>,
    /// Keeps the vCPU's thread where it is; none where nobody has given it.
    pub stay: Option<Stay>,
    /// Interrupts.
    ticks: u32,
    roam: Roam,
    /// Host CPU time of all processes so far, ns.
    native_ns: u64,
}

/// Until when, and for one run at least, the vCPU's thread may go to another host CPU.
#[derive(Debug, Default)]
struct Roam(Option<Instant>);

impl Roam {
    fn begin(&mut self, now: Instant, time: Duration) {
        self.0 = Some(now + time);
    }

    /// Whether a run that begins now stays on its CPU.
    fn is_over(&mut self, now: Instant) -> bool {
        let over = self.0.is_none();
        self.0.take_if(|until| *until <= now);
        over
    }
}

impl Direct {
    pub fn new(execution: Execution, wide: Option<Wide>) -> Direct {
        let wanted = matches!(execution, Execution::Adaptive | Execution::Direct);
        Direct {
            enabled: wanted && host_suits(wide),
            components: fpu::extent(wide).1,
            policy: Policy::new(execution == Execution::Direct),
            spaces: Vec::new(),
            pass: false,
            hold_jumps: false,
            scratch: Vec::new(),
            stay: None,
            ticks: 0,
            roam: Roam::default(),
            native_ns: 0,
        }
    }

    /// The host is to have the choice again where the thread runs, for so long.
    fn let_go(&mut self, time: Duration) {
        self.stay(false);
        self.roam.begin(Instant::now(), time);
    }

    /// Keeps the vCPU's thread on the host CPU where it is, or lets it go.
    fn stay(&self, stay: bool) {
        if let Some(keep) = &self.stay {
            keep(stay);
        }
    }

    /// The TLB was flushed for one PCID. An address space that was run with another is flushed when it changes to this one.
    pub fn flush_pcid(&mut self, pcid: u16) {
        for space in self.spaces.iter_mut().filter(|s| s.pcid == pcid) {
            space.mirror.flush_all();
        }
    }

    /// The TLB was flushed: as a whole, or for all that is not global, which user pages need not be.
    pub fn flush_all(&mut self) {
        for space in &mut self.spaces {
            space.mirror.flush_all();
        }
    }

    /// What the policy has to know of the time that passes: the vCPU is in an address space, and has entered its kernel so often by now. True if an address space
    /// becomes one to run natively.
    fn pass(&mut self, root: u64, visits: u32) -> bool {
        self.policy.counts() && {
            let ns = thread_time_ns() + self.native_ns;
            self.policy.pass(root, ns, visits)
        }
    }

    /// CR3 has been loaded. Where a program is about to begin, what is known of the one that had these tables before is worth nothing. True as for [`Direct::pass`].
    pub fn entered(&mut self, memory: &GuestMemory, cr3: u64, visits: u32) -> bool {
        let root = cr3 & ROOT;
        let becomes_hot = self.pass(root, visits);
        if self.enabled && self.policy.knows(root) && tables::begins(memory, root) {
            self.policy.forget(root);
            for space in self.spaces.iter_mut().filter(|s| s.root == root) {
                space.begin_program();
            }
        }
        becomes_hot
    }

    /// Whether the code at an address has to stay in the translator.
    fn excludes(&self, root: u64, rip: u64) -> bool {
        let page = rip >> 12;
        self.spaces
            .iter()
            .any(|s| s.root == root && s.stays_translated(page) && !s.wants_alone(page))
    }

    /// An interrupt found code that has to stay in the translator: where it can be executed alone it is from now on.
    fn want_alone(&mut self, root: u64, rip: u64) {
        if let Some(space) = self.spaces.iter_mut().find(|s| s.root == root) {
            space.want_alone(rip >> 12);
        }
    }

    pub fn flush_page(&mut self, gva: Gva) {
        for space in &mut self.spaces {
            space.mirror.flush_page(gva.0 >> 12);
        }
    }
}

/// Host CPU time of this thread, ns.
fn thread_time_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Whether the host gives user code what guests are told: FS and GS base instructions, and an XSAVE image of the same layout.
fn host_suits(wide: Option<Wide>) -> bool {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: reads a word the kernel passed to the process.
    let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    let same_layout = wide.is_none() || Wide::new(|n| hospes_sys::cpuid(0xd, n)) == Ok(wide);
    capabilities & HWCAP2_FSGSBASE != 0 && same_layout
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roaming_lasts_its_time_and_one_run_at_least() {
        let (mut roam, now, long) = (Roam::default(), Instant::now(), Duration::from_millis(400));
        assert!(roam.is_over(now));
        roam.begin(now, Duration::ZERO);
        assert!(!roam.is_over(now));
        assert!(roam.is_over(now));
        roam.begin(now, long);
        for ms in [0, 100, 399] {
            assert!(!roam.is_over(now + Duration::from_millis(ms)));
        }
        // A burst that waited for its CPU again.
        roam.begin(now + long, long);
        assert!(!roam.is_over(now + long));
        assert!(!roam.is_over(now + 2 * long));
        assert!(roam.is_over(now + 2 * long));
    }
}
