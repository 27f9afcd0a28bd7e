//! A burst of native execution, from the guest's state to the guest's state.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use hospes_engine::{CpuState, EngineError, Exit, Segment, cr, reg, rflags, seg};
use hospes_units::{Gpa, PAGE_SIZE};

use super::fill::Filled;
use super::mirror::Mirror;
use super::policy::{Burst, STOP};
use super::process::{AFTER_INT1, AFTER_INT3, AFTER_STEP, Process, Registers, Stop, USER_END};
use super::tables::{look_up, lowest};
use super::{ROOT, SPACES, Space};
use crate::exec::{self, Step, debug_active};
use crate::fpu;
use crate::vcpu::BtVcpu;
use crate::vm::host_error;

/// Selectors of 64-bit Linux programs, the only ones that native code may be started with.
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;
/// That of 32-bit programs.
const COMPAT_CS: u16 = 0x23;
/// Flags that native code changes.
const OWN_FLAGS: u64 =
    rflags::STATUS | rflags::DF | rflags::TF | rflags::NT | rflags::AC | rflags::ID;
/// Flags that must be clear at the start.
const FORBIDDEN_FLAGS: u64 =
    rflags::TF | rflags::RF | rflags::AC | rflags::NT | rflags::ID | rflags::IOPL | rflags::VM;
/// Instructions that the engine executes within one burst before the translator takes over.
const STEPS: u32 = 64;
/// What the switches to the process and back take of this thread's own time, for each stop.
const SWITCHES: Duration = Duration::from_micros(8);
/// Interrupts for which the thread stays on a host CPU at most.
const STAY_TICKS: u32 = 16;
/// A longer wait for that CPU says that another may be better.
const MOST_WAIT: Duration = Duration::from_micros(200);
/// How long the thread is not kept then: the host takes some tens of ms to even its CPUs out, and while they are all busy no switch wakes an idle one.
const ROAMING: Duration = Duration::from_millis(400);
const XSTATE_SSE: u8 = 2;
/// Components of the XSAVE image that AVX-512 code uses: mask registers, upper halves, registers from 16 on.
const XSTATE_AVX512: u8 = 0xe0;
const PCID: u64 = 0xfff;

/// What a burst has taken so far.
#[derive(Default)]
struct Spent {
    /// In the process.
    time: Duration,
    /// The same without mapping calls.
    native: Duration,
    /// Times it stopped.
    stops: u32,
    /// Instructions that the engine executed in between.
    steps: u32,
    /// Times it stopped for nothing but a write that had to be noted.
    noted: u32,
}

/// Why a burst ended.
enum End {
    /// What the guest's code did: the loop goes on with the state as it is.
    Done,
    /// The translator has to execute what comes next.
    Pass,
    Interrupted,
    Exit(Exit),
    /// The process is of no more use.
    Broken,
    /// Somebody has killed the process, and the guest's registers with it.
    Dead,
}

/// `components`: those of the XSAVE image that the guest's code may use, as bits of XCR0.
fn suits(cpu: &CpuState, components: u64) -> bool {
    const CR4_MUST: u64 = cr::CR4_PAE | cr::CR4_OSFXSR | cr::CR4_OSXSAVE | cr::CR4_FSGSBASE;
    let selector = |s: usize| cpu.seg[s].selector;
    cpu.cpl() == 3
        && cpu.code_bits() == 64
        && selector(seg::CS) == USER_CS
        && selector(seg::SS) == USER_SS
        && [seg::DS, seg::ES]
            .iter()
            .all(|&s| matches!(selector(s), 0 | USER_SS))
        && selector(seg::FS) == 0
        && selector(seg::GS) == 0
        // The host lets a tracer set no others.
        && [seg::FS, seg::GS].iter().all(|&s| cpu.seg[s].base < USER_END)
        && cpu.rflags & FORBIDDEN_FLAGS == 0
        && !cpu.interrupt_shadow
        && !debug_active(cpu)
        && cpu.cr0 & (cr::CR0_TS | cr::CR0_EM | cr::CR0_PG) == cr::CR0_PG
        && cpu.cr4 & (CR4_MUST | cr::CR4_TSD | cr::CR4_LA57) == CR4_MUST
        && cpu.msr.efer & cr::EFER_NXE != 0
        && cpu.xcr0 == components
        && cpu.msr.tsc_offset == 0
        && cpu.rip < USER_END
}

/// A data segment that native code has loaded: the flat ones are alike on host and guest, and the host has no others for an empty process.
fn loaded(selector: u16) -> Segment {
    if selector & !3 == 0 {
        return Segment {
            selector,
            ..Segment::default()
        };
    }
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attr: 0xc0f3,
    }
}

impl BtVcpu {
    /// An interrupt is about to be delivered: if it comes to user code, that may be worth running natively.
    pub(crate) fn direct_tick(&mut self) {
        let host = &mut self.host;
        let direct = &mut host.direct;
        let cpu = &host.frame.cpu;
        if !direct.enabled {
            return;
        }
        direct.ticks = direct.ticks.wrapping_add(1);
        if direct.ticks.is_multiple_of(STAY_TICKS) {
            direct.let_go(Duration::ZERO);
        }
        let root = cpu.cr3 & ROOT;
        let visits = host.frame.kernel_visits;
        if direct.pass(root, visits) | direct.policy.turn() {
            host.flush_jumps_all();
        }
        let direct = &mut host.direct;
        let cpu = &host.frame.cpu;
        if !suits(cpu, direct.components) {
            return;
        }
        if direct.policy.is_hot(root) {
            if direct.excludes(root, cpu.rip) {
                direct.policy.stayed(root);
                direct.want_alone(root, cpu.rip);
            }
            return;
        }
        let program = || lowest(&host.shared.memory, root);
        if direct.policy.tick(root, Instant::now(), visits, program) {
            // From now on every return to user code is to be seen.
            host.flush_jumps_all();
        }
    }

    /// Whether the code at RIP is to run natively now.
    pub(crate) fn direct_ready(&mut self) -> bool {
        let host = &mut self.host;
        let direct = &mut host.direct;
        direct.hold_jumps = false;
        if !direct.enabled {
            return false;
        }
        let cpu = &host.frame.cpu;
        let root = cpu.cr3 & ROOT;
        if cpu.cpl() != 3 || !direct.policy.is_hot(root) {
            return false;
        }
        direct.hold_jumps = true;
        let pass = std::mem::take(&mut direct.pass);
        !pass && suits(cpu, direct.components) && !direct.excludes(root, cpu.rip)
    }

    /// Runs the guest's user code natively until something stops it.
    pub(crate) fn run_direct(&mut self) -> Result<Option<Exit>, EngineError> {
        let start = Instant::now();
        let root = self.host.frame.cpu.cr3 & ROOT;
        let Some(mut space) = self.take_space(root) else {
            self.host.direct.policy.give_up(root);
            return Ok(None);
        };
        let mut spent = Spent::default();
        let end = self.run_space(&mut space, &mut spent).unwrap_or(End::Dead);
        let used_ns = space.process.cpu_time_ns();
        let used = Duration::from_nanos(used_ns.saturating_sub(space.accounted_ns));
        space.accounted_ns = used_ns;
        self.host.direct.native_ns += used.as_nanos() as u64;
        let switches = SWITCHES * spent.stops;
        let waited = spent.time.saturating_sub(used + switches);
        self.host.control.add_direct(used, waited);
        let direct = &mut self.host.direct;
        if waited > MOST_WAIT {
            direct.let_go(ROAMING);
        }
        match end {
            End::Broken => {
                drop(space);
                direct.policy.give_up(root);
                return Ok(None);
            }
            End::Dead => {
                return Err(host_error(
                    "the process that executed user code of the guest",
                    "it has been killed, and the state of that code with it: see whether the host is short of memory, or set engine_direct=0",
                ));
            }
            End::Pass => direct.pass = true,
            _ => {}
        }
        // What the log of written frames costs says nothing about the program.
        let whole = start.elapsed().saturating_sub(waited);
        let burst = Burst {
            native: spent.native.saturating_sub(waited),
            whole: whole.saturating_sub(STOP * spent.noted),
            stops: spent.stops,
        };
        direct.policy.burst(root, burst);
        // Perhaps another one: its time may have been over when it was left.
        let becomes_hot = direct.pass(root, self.host.frame.kernel_visits) | direct.policy.turn();
        if std::mem::take(&mut space.foreign) {
            direct.policy.give_up(root);
        }
        if !space.tainted {
            direct.spaces.push(space);
        }
        if becomes_hot {
            self.host.flush_jumps_all();
        }
        Ok(match end {
            End::Exit(exit) => Some(exit),
            _ => None,
        })
    }

    /// The address space's process, or one that is empty.
    fn take_space(&mut self, root: u64) -> Option<Space> {
        if self.host.control.take_place_changed() {
            // New ones begin where the thread is now.
            self.host.direct.spaces.clear();
        }
        let memory = self.host.shared.memory.fd().as_raw_fd();
        let direct = &mut self.host.direct;
        if let Some(n) = direct.spaces.iter().position(|s| s.root == root) {
            return Some(direct.spaces.remove(n));
        }
        if direct.spaces.len() < SPACES {
            let Ok(process) = Process::new(memory) else {
                // A host that does not allow it now hardly will later.
                direct.enabled = !direct.spaces.is_empty();
                return None;
            };
            return Some(Space {
                root,
                pcid: 0,
                process,
                mirror: Mirror::default(),
                excluded: HashSet::new(),
                retired: HashSet::new(),
                alone: None,
                found: None,
                lone: HashSet::new(),
                poor: HashMap::new(),
                entry: 0,
                breakpoints: Vec::new(),
                accounted_ns: 0,
                vectors: Vec::new(),
                awaited: None,
                tainted: false,
                foreign: false,
            });
        }
        let mut space = direct.spaces.remove(0);
        space.process.unmap_all().ok()?;
        space.mirror.clear();
        space.excluded.clear();
        space.retired.clear();
        space.lone.clear();
        space.poor.clear();
        space.forget_alone();
        space.breakpoints.clear();
        space.process.set_breakpoints(&[]).ok()?;
        space.root = root;
        space.awaited = None;
        Some(space)
    }

    /// Runs until something ends the burst. Whatever fails in preparing the process leaves the guest with the state that it has there.
    fn run_space(&mut self, space: &mut Space, spent: &mut Spent) -> io::Result<End> {
        let Ok(mut regs) = self.load_native(space) else {
            return Ok(End::Broken);
        };
        let end = self.run_from(space, &mut regs, spent);
        space.leave_alone(self.host.frame.cpu.rip);
        if end.is_err() {
            self.store_native(space, &regs)?;
            return Ok(End::Broken);
        }
        end
    }

    fn run_from(
        &mut self,
        space: &mut Space,
        regs: &mut Registers,
        spent: &mut Spent,
    ) -> io::Result<End> {
        let pcid = (self.host.frame.cpu.cr3 & PCID) as u16;
        if space.pcid != pcid {
            space.pcid = pcid;
            space.mirror.flush_all();
        }
        space.entry = regs.rip;
        self.resume_alone(space, regs.rip)?;
        let mut awaited = space.awaited.take();
        loop {
            self.refresh(space)?;
            if let Some(address) = awaited.take()
                && let Filled::Mapped { evicted, .. } =
                    self.fill(space, address, regs.rip, false)?
            {
                spent.steps += evicted;
            }
            if self.host.control.has_requests() {
                self.store_native(space, regs)?;
                return Ok(End::Interrupted);
            }
            let stays = self.host.direct.roam.is_over(Instant::now());
            self.host.direct.stay(stays);
            space.process.follow(stays);
            self.host.control.enter_direct(space.process.kick_fd());
            // Whoever posts a request now sees that we are inside; who did before is seen here.
            let stop = if self.host.control.has_requests() {
                Ok(Stop::Kick)
            } else {
                let start = Instant::now();
                let stop = space.process.run(regs);
                let passed = start.elapsed();
                spent.time += passed;
                spent.native += passed.mul_f64(1.0 - space.process.calls_share());
                spent.stops += 1;
                stop
            };
            self.host.control.leave_direct();
            let stop = stop?;
            if stop == Stop::Dead {
                return Ok(End::Dead);
            }
            match stop {
                Stop::Fault {
                    signal: libc::SIGSEGV,
                    address,
                    ..
                } => match self.fill(space, address, regs.rip, false)? {
                    Filled::Mapped { evicted, noted } => {
                        spent.noted += u32::from(noted);
                        // Code that goes to and fro between such pages costs as much as steps do.
                        spent.steps += evicted;
                        // The fault has set it, and it would pass over a breakpoint just made at this instruction.
                        regs.eflags &= !rflags::RF;
                        continue;
                    }
                    Filled::Step => {}
                    Filled::Excluded => {
                        self.store_native(space, regs)?;
                        // An instruction that only ends in that page would come back to it.
                        let inside = space.stays_translated(regs.rip >> 12);
                        return Ok(if inside { End::Done } else { End::Pass });
                    }
                },
                Stop::Kick => {
                    self.store_native(space, regs)?;
                    return Ok(End::Interrupted);
                }
                Stop::Syscall => {
                    // The processor has done its part of SYSCALL; done again it does the same.
                    regs.rip -= 2;
                    regs.rax = regs.orig_rax;
                    self.store_native(space, regs)?;
                    return Ok(match self.step() {
                        Step::Exit(exit) => End::Exit(exit),
                        Step::Continue => End::Done,
                    });
                }
                Stop::Vsyscall => {
                    if self.called_by_rax(regs.rsp) {
                        // The host has put the number of a system call there.
                        regs.rax = regs.rip;
                    }
                    self.store_native(space, regs)?;
                    self.step();
                    return Ok(End::Broken);
                }
                Stop::Fault {
                    signal: libc::SIGTRAP,
                    code: AFTER_STEP,
                    ..
                } => {
                    self.store_native(space, regs)?;
                    return Ok(match self.single_stepped() {
                        Step::Exit(exit) => End::Exit(exit),
                        Step::Continue => End::Done,
                    });
                }
                Stop::Fault {
                    signal: libc::SIGTRAP,
                    code,
                    ..
                } if matches!(code, AFTER_INT1 | AFTER_INT3) => {
                    regs.rip = self.before_trap(regs.rip, code);
                }
                Stop::Fault { .. } | Stop::Dead => {}
            }
            self.store_native(space, regs)?;
            spent.steps += 1;
            let retired = space.breakpoints.contains(&regs.rip) && self.retire(space, regs.rip)?;
            if let Step::Exit(exit) = self.step() {
                return Ok(End::Exit(exit));
            }
            let missing = match stop {
                Stop::Fault {
                    signal: libc::SIGSEGV,
                    address,
                    ..
                } => Some(address),
                _ => None,
            };
            if !suits(&self.host.frame.cpu, self.host.direct.components) {
                space.awaited = missing;
                return Ok(End::Done);
            }
            if retired {
                return Ok(End::Done);
            }
            if spent.steps >= STEPS {
                return Ok(End::Pass);
            }
            if let Some(address) = missing {
                let rip = self.host.frame.cpu.rip;
                self.fill(space, address, rip, true)?;
            }
            *regs = self.load_native(space)?;
        }
    }

    /// Loads the guest's vector state into the process; gives its registers for it.
    fn load_native(&mut self, space: &mut Space) -> io::Result<Registers> {
        fpu::store(&mut self.host.frame);
        let cpu = &self.host.frame.cpu;
        let (bytes, _) = fpu::extent(self.host.frame.wide);
        let image = &cpu.xsave.0[..bytes];
        if *space.vectors != *image {
            space.vectors.clear();
            space
                .process
                .write_xstate(image, &mut self.host.direct.scratch)?;
        }
        let mut regs = space.process.template();
        let g = &cpu.gpr;
        regs.rax = g[reg::RAX];
        regs.rcx = g[reg::RCX];
        regs.rdx = g[reg::RDX];
        regs.rbx = g[reg::RBX];
        regs.rsp = g[reg::RSP];
        regs.rbp = g[reg::RBP];
        regs.rsi = g[reg::RSI];
        regs.rdi = g[reg::RDI];
        [regs.r8, regs.r9, regs.r10, regs.r11] = [g[8], g[9], g[10], g[11]];
        [regs.r12, regs.r13, regs.r14, regs.r15] = [g[12], g[13], g[14], g[15]];
        regs.orig_rax = u64::MAX;
        regs.rip = cpu.rip;
        regs.eflags = cpu.rflags & OWN_FLAGS | rflags::FIXED | rflags::IF;
        regs.ds = cpu.seg[seg::DS].selector.into();
        regs.es = cpu.seg[seg::ES].selector.into();
        regs.fs_base = cpu.seg[seg::FS].base;
        regs.gs_base = cpu.seg[seg::GS].base;
        Ok(regs)
    }

    /// Takes the registers of the process as the guest's.
    fn store_native(&mut self, space: &mut Space, regs: &Registers) -> io::Result<()> {
        let wide = self.host.frame.wide;
        let cpu = &mut self.host.frame.cpu;
        cpu.gpr = [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ];
        cpu.rip = regs.rip;
        cpu.rflags = cpu.rflags & !OWN_FLAGS | regs.eflags & OWN_FLAGS;
        // A tracer cannot clear this one.
        space.tainted |= regs.eflags & rflags::ID != 0;
        if regs.cs == u64::from(COMPAT_CS) {
            // A far transfer that does not trap: the host has the same segment there.
            cpu.seg[seg::CS] = Segment {
                base: 0,
                limit: u32::MAX,
                selector: COMPAT_CS,
                attr: 0xc0fb,
            };
        }
        for (s, selector) in [
            (seg::DS, regs.ds),
            (seg::ES, regs.es),
            (seg::FS, regs.fs),
            (seg::GS, regs.gs),
        ] {
            let segment = &mut cpu.seg[s];
            if u64::from(segment.selector) != selector {
                *segment = loaded(selector as u16);
            }
        }
        cpu.seg[seg::FS].base = regs.fs_base;
        cpu.seg[seg::GS].base = regs.gs_base;
        let (bytes, components) = fpu::extent(wide);
        let image = &mut cpu.xsave.0;
        space.process.read_xstate(&mut image[..bytes])?;
        if image[512] & XSTATE_SSE == 0 {
            image[24..28].copy_from_slice(&space.process.mxcsr()?.to_le_bytes());
        }
        // What the kernel says of its own format there is not the guest's.
        image[416..512].fill(0);
        space.foreign |= image[512] & XSTATE_AVX512 & !(components as u8) != 0;
        image[512] &= components as u8;
        image[513..576].fill(0);
        // Pointers of the last x87 instruction, which the guest does not see: another program must not find them in the process.
        let pointers = image[6..24].iter().any(|byte| *byte != 0);
        fpu::load(&mut self.host.frame);
        space.vectors.clear();
        if !space.foreign && !pointers {
            // As it will be compared: the processor's image of the same state differs in MXCSR_MASK and in what it says of components in their initial state.
            fpu::store(&mut self.host.frame);
            let image = &self.host.frame.cpu.xsave.0;
            space.vectors.extend_from_slice(&image[..bytes]);
        }
        Ok(())
    }

    /// The program counter of the INT1 or INT3 behind which a trap came.
    fn before_trap(&self, rip: u64, code: i32) -> u64 {
        const INT_N: [Option<u8>; 2] = [Some(0xcd), Some(3)];
        let opcode = if code == AFTER_INT1 { 0xf1 } else { 0xcc };
        let [first, last] = [2, 1].map(|n| self.code_byte(rip.wrapping_sub(n)));
        match (first, last) {
            (_, Some(byte)) if byte == opcode => rip.wrapping_sub(1),
            _ if [first, last] == INT_N && code == AFTER_INT3 => rip.wrapping_sub(2),
            _ => rip,
        }
    }

    /// Whether the return address at the top of the stack stands behind `call rax`.
    fn called_by_rax(&self, rsp: u64) -> bool {
        let mut address = [0; 8];
        for (n, byte) in address.iter_mut().enumerate() {
            let Some(read) = self.code_byte(rsp.wrapping_add(n as u64)) else {
                return false;
            };
            *byte = read;
        }
        let after = u64::from_le_bytes(address);
        [2, 1].map(|n| self.code_byte(after.wrapping_sub(n))) == [Some(0xff), Some(0xd0)]
    }

    fn code_byte(&self, at: u64) -> Option<u8> {
        let memory = &self.host.shared.memory;
        let m = look_up(memory, self.host.frame.cpu.cr3, at >> 12)?;
        let mut byte = [0];
        let gpa = Gpa(m.gfn.gpa().0 + (at & (PAGE_SIZE - 1)));
        memory.read(gpa, &mut byte).ok()?;
        Some(byte[0])
    }

    /// The debug exception behind an instruction that began with TF set.
    fn single_stepped(&mut self) -> Step {
        let cpu = self.host.cpu_ptr();
        // SAFETY: as in `BtVcpu::step`.
        exec::deliver_single_step(unsafe { &mut *cpu }, &mut self.host)
    }
}
