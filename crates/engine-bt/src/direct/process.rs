//! An address-space process: an otherwise empty process in which guest user code runs natively, traced by one vCPU's thread.
//!
//! It holds nothing but what is mapped into it from the guest's memory file, and one small area of ours at a random address: a page of code that
//! makes mapping calls, the table of those calls, and a page that the code and we share. No system call of the guest is ever carried out by the host: a filter
//! allows mapping calls alone, and those with a key in the upper halves of two arguments, 64 random bits which the process has in its memory only until it has made the calls and before guest code goes on. It dies with the tracing thread.

mod calls;
mod spawn;

use std::ffi::{c_int, c_void};
use std::io::{Error, Result};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use self::spawn::{Setup, check, kill_and_reap, memfd, ptrace, spawn, wait};
use super::stub::{self, Call, SCRATCH, TABLE_PAGES};

const PAGE: usize = 4096;
const AREA_BYTES: usize = SCRATCH + PAGE;
/// Most calls of one batch.
pub const BATCH_CALLS: usize = TABLE_PAGES * PAGE / size_of::<Call>();

/// The end of what a process may map, with 4-level paging.
pub const USER_END: u64 = 0x7fff_ffff_f000;

/// Breakpoints a process may have: those of the processor.
pub const BREAKPOINTS: usize = 4;
/// `si_code` of a stop behind an INT3.
pub const AFTER_INT3: i32 = 0x80;
/// `si_code` of a stop behind an INT1.
pub const AFTER_INT1: i32 = 1;
/// `si_code` of a stop behind an instruction that was executed with TF set.
pub const AFTER_STEP: i32 = 2;

/// Makes a running process stop; nothing else sends it.
const KICK: i32 = libc::SIGUSR1;

/// Room for the largest XSAVE image of any processor so far.
const XSTATE_ROOM: usize = 16 * 1024;
const NT_X86_XSTATE: usize = 0x202;

pub type Registers = libc::user_regs_struct;

/// Why guest code stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// About to make a system call, by whichever instruction.
    Syscall,
    /// A signal other than a kick: with the address of the fault where it has one.
    Fault {
        signal: i32,
        code: i32,
        address: u64,
    },
    /// Execution of the host's vsyscall page; the process must not go on.
    Vsyscall,
    Kick,
    /// The process is gone.
    Dead,
}

/// An address-space process, stopped unless inside [`Process::run`].
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
    /// Address of the area inside the process.
    base: u64,
    area_fd: OwnedFd,
    /// The area as this process sees it.
    area: *mut u8,
    memory_fd: RawFd,
    template: Registers,
    xstate_bytes: usize,
    /// What mapping calls carry in the upper halves of their third and fifth arguments, where the kernel takes none of it; zero until there is a filter.
    key: [u64; 2],
    /// Calls to be made before guest code runs again.
    queue: Vec<Call>,
    /// The only host CPU that it may run on; where the thread may if there is none.
    cpu: Option<i32>,
    /// Of the last run, the share that such calls took.
    calls_share: f64,
}

// SAFETY: the mapping behind `area` is owned by this value alone. Only the thread that made the process can trace it; in another all calls fail, and dropping it there
// kills and reaps it as well.
unsafe impl Send for Process {}

impl Process {
    /// Starts an empty process traced by the calling thread, into which pages of the memory file can be mapped.
    pub fn new(memory_fd: RawFd) -> Result<Process> {
        let elf = memfd(c"hospes-direct", &stub::elf())?;
        let mut content = stub::code_page();
        content.resize(AREA_BYTES, 0);
        let area_fd = memfd(c"hospes-direct-area", &content)?;
        // SAFETY: a new shared mapping of a file of this size, at an address the kernel chooses.
        let area = unsafe {
            libc::mmap(
                ptr::null_mut(),
                AREA_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                area_fd.as_raw_fd(),
                0,
            )
        };
        if area == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let unmap = || {
            // SAFETY: the mapping was made above and nobody else has it.
            unsafe { libc::munmap(area, AREA_BYTES) };
        };
        let setup = Setup {
            elf: elf.as_raw_fd(),
            area: area_fd.as_raw_fd(),
            memory: memory_fd,
        };
        let pid = spawn(&setup).inspect_err(|_| unmap())?;
        // SAFETY: a plain system call; the result is checked before it is owned.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let pidfd = check(pidfd).inspect_err(|_| {
            kill_and_reap(pid, 0x137f);
            unmap();
        })?;
        // SAFETY: the descriptor was just made for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as RawFd) };
        // SAFETY: an all-zero register structure is valid; it is overwritten at once.
        let template = unsafe { mem::zeroed() };
        let mut process = Process {
            pid,
            pidfd,
            base: 0,
            area_fd,
            area: area.cast(),
            memory_fd,
            template,
            xstate_bytes: 0,
            key: [0; 2],
            queue: Vec::new(),
            cpu: None,
            calls_share: 0.0,
        };
        process.prepare()?;
        Ok(process)
    }

    fn prepare(&mut self) -> Result<()> {
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        ptrace(
            libc::PTRACE_SETOPTIONS,
            self.pid,
            0,
            ptr::without_provenance_mut(options as usize),
        )?;
        self.template = self.registers()?;
        self.xstate_bytes = self.read_xstate(&mut vec![0; XSTATE_ROOM])?;
        self.map_area(stub::FIRST_CALL)?;
        for range in self.foreign_ranges()? {
            self.call_checked(
                self.base + stub::ONE,
                [
                    libc::SYS_munmap as u64,
                    range.start,
                    range.end - range.start,
                    0,
                    0,
                    0,
                    0,
                ],
            )?;
        }
        self.install_filter()
    }

    /// What is mapped and is not the area.
    fn foreign_ranges(&self) -> Result<Vec<std::ops::Range<u64>>> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid))?;
        let parse = |s: &str| u64::from_str_radix(s, 16).ok();
        let ranges = maps.lines().filter_map(|line| {
            let (start, rest) = line.split_once('-')?;
            let range = parse(start)?..parse(rest.split(' ').next()?)?;
            Some(range)
        });
        Ok(ranges
            .filter(|r| r.end <= USER_END && !self.in_area(r.start))
            .collect())
    }

    /// Whether an address of the process lies in the area.
    pub fn in_area(&self, address: u64) -> bool {
        (self.base..self.base + AREA_BYTES as u64).contains(&address)
    }

    /// Registers to begin with: selectors and flags as the host starts programs.
    pub fn template(&self) -> Registers {
        self.template
    }

    /// What a kick is sent through, see [`kick`].
    pub fn kick_fd(&self) -> RawFd {
        self.pidfd.as_raw_fd()
    }

    pub fn registers(&self) -> Result<Registers> {
        let mut regs = self.template;
        ptrace(libc::PTRACE_GETREGS, self.pid, 0, (&raw mut regs).cast())?;
        Ok(regs)
    }

    pub fn set_registers(&self, regs: &Registers) -> Result<()> {
        let p = (&raw const *regs).cast_mut();
        ptrace(libc::PTRACE_SETREGS, self.pid, 0, p.cast())
    }

    /// Fills `buf` from the start of the XSAVE image, which is in the standard format; returns the bytes there are.
    pub fn read_xstate(&self, buf: &mut [u8]) -> Result<usize> {
        let mut vector = libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        };
        let p = (&raw mut vector).cast();
        ptrace(libc::PTRACE_GETREGSET, self.pid, NT_X86_XSTATE, p)?;
        Ok(vector.iov_len)
    }

    /// The register as it is: where all XMM registers are zero, AMD's processors leave it out of what the kernel keeps for a tracer.
    pub fn mxcsr(&self) -> Result<u32> {
        let mut regs = self.template;
        regs.rip = self.base + stub::MXCSR;
        let slot = SCRATCH + stub::MXCSR_SLOT;
        regs.r12 = self.base + slot as u64;
        self.run_stub(&mut regs)?;
        // SAFETY: the word lies in the mapped area; the process that shares it is stopped.
        let value = unsafe { ptr::read_volatile(self.area.add(slot).cast::<u32>()) };
        // Whoever else wrote there, no reserved bit gets any further.
        Ok(value & 0xffff)
    }

    /// Sets x87, SSE and AVX state from an image in the standard format; all other components are in their initial state afterwards.
    pub fn write_xstate(&self, image: &[u8], scratch: &mut Vec<u8>) -> Result<()> {
        scratch.clear();
        scratch.extend_from_slice(image);
        scratch.resize(self.xstate_bytes, 0);
        // Components in their initial state are written as well: MXCSR is set only with them.
        scratch[512] |= 7;
        let mut vector = libc::iovec {
            iov_base: scratch.as_mut_ptr().cast(),
            iov_len: scratch.len(),
        };
        let p = (&raw mut vector).cast();
        ptrace(libc::PTRACE_SETREGSET, self.pid, NT_X86_XSTATE, p)
    }

    /// Makes the calls that are due and lets guest code run until it stops; the registers are its own, before and after. Fails if a call does, with the registers as they were.
    pub fn run(&mut self, regs: &mut Registers) -> Result<Stop> {
        self.calls_share = 0.0;
        if self.queue.is_empty() {
            self.set_registers(regs)?;
            ptrace(libc::PTRACE_SYSEMU, self.pid, 0, ptr::null_mut())?;
            let status = wait(self.pid)?;
            if libc::WIFSTOPPED(status) {
                *regs = self.registers()?;
            }
            return self.stop(status, regs);
        }
        let mut queue = mem::take(&mut self.queue);
        let (first, last) = queue.split_at(queue.len().saturating_sub(BATCH_CALLS));
        let began = tsc();
        self.batch(first)?;
        let stop = self.go(regs, last);
        let (made, ended) = (self.made(), tsc());
        // Guest code can have written there.
        self.calls_share = if (began..ended).contains(&made) {
            (made - began) as f64 / (ended - began) as f64
        } else {
            0.0
        };
        queue.clear();
        self.queue = queue;
        stop
    }

    /// What the status means of a process that has stopped with these registers. They become what they were at a vsyscall, from which the host has returned.
    fn stop(&self, status: c_int, regs: &mut Registers) -> Result<Stop> {
        const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;
        const SYS_SECCOMP: i32 = 1;
        if !libc::WIFSTOPPED(status) {
            return Ok(Stop::Dead);
        }
        Ok(match libc::WSTOPSIG(status) {
            signal if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            KICK => Stop::Kick,
            signal => {
                let (code, address) = self.fault()?;
                match (signal, code) {
                    (libc::SIGSYS, SYS_SECCOMP) if address & !(PAGE as u64 - 1) == VSYSCALL => {
                        regs.rip = address;
                        regs.rsp = regs.rsp.wrapping_sub(8);
                        Stop::Vsyscall
                    }
                    (libc::SIGSYS, SYS_SECCOMP) => Stop::Syscall,
                    _ => Stop::Fault {
                        signal,
                        code,
                        address,
                    },
                }
            }
        })
    }

    /// Keeps the process on the host CPU that this thread is on, or lets it go where the thread may. The thread sleeps while the process runs: where both stay, neither has to be
    /// woken on an idle CPU, which takes several times as long as all else, nor to fill that CPU's caches.
    pub fn follow(&mut self, stay: bool) {
        // SAFETY: an all-zero set is an empty one; the rest are system calls on sets of this size and plain values. Where one is refused the process runs where the host likes.
        unsafe {
            let mut set: libc::cpu_set_t = mem::zeroed();
            let bytes = size_of_val(&set);
            let cpu =
                Some(libc::sched_getcpu()).filter(|c| stay && (0..libc::CPU_SETSIZE).contains(c));
            if cpu == self.cpu {
                return;
            }
            if let Some(cpu) = cpu {
                libc::CPU_SET(cpu as usize, &mut set);
            } else if libc::sched_getaffinity(0, bytes, &mut set) != 0 {
                return;
            }
            libc::sched_setaffinity(self.pid, bytes, &set);
            self.cpu = cpu;
        }
    }

    /// What share of the last run, from 0 to 1, calls took; the rest was guest code.
    pub fn calls_share(&self) -> f64 {
        self.calls_share
    }

    /// Host CPU time the process has used, ns.
    pub fn cpu_time_ns(&self) -> u64 {
        const CPU_TIME_OF_PROCESS: i32 = 2;
        // The kernel's form of a process's clock: the complement of its number, and which clock of it.
        let clock = !self.pid << 3 | CPU_TIME_OF_PROCESS;
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the structure is writable for the call; for a process that is gone the call fails and leaves zeros.
        unsafe { libc::clock_gettime(clock, &mut time) };
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }

    /// Stops before the instructions at these addresses, at most [`BREAKPOINTS`], and at no others.
    pub fn set_breakpoints(&self, addresses: &[u64]) -> Result<()> {
        let register = |n: usize| mem::offset_of!(libc::user, u_debugreg) + 8 * n;
        let poke = |n: usize, value: u64| {
            let value = ptr::without_provenance_mut(value as usize);
            ptrace(libc::PTRACE_POKEUSER, self.pid, register(n), value)
        };
        // While they are off any address may be set.
        poke(7, 0)?;
        let mut enable = 0;
        for (n, &address) in addresses.iter().take(BREAKPOINTS).enumerate() {
            poke(n, address)?;
            enable |= 1 << (2 * n);
        }
        poke(7, enable)
    }

    /// Code and address of the signal the process stopped with.
    fn fault(&self) -> Result<(i32, u64)> {
        // SAFETY: an all-zero siginfo is valid, and the request writes one of this size; the address is read as plain bytes.
        unsafe {
            let mut info: libc::siginfo_t = mem::zeroed();
            ptrace(libc::PTRACE_GETSIGINFO, self.pid, 0, (&raw mut info).cast())?;
            Ok((info.si_code, info.si_addr() as u64))
        }
    }
}

fn tsc() -> u64 {
    // SAFETY: reads a counter that every x86-64 processor has.
    unsafe { core::arch::x86_64::_rdtsc() }
}

impl Drop for Process {
    fn drop(&mut self) {
        kill_and_reap(self.pid, 0x137f);
        // SAFETY: the mapping is ours, and the process that shared it is gone.
        unsafe { libc::munmap(self.area.cast(), AREA_BYTES) };
    }
}

/// Stops a process that runs guest code, or will stop it as soon as it does. From any thread; a descriptor that is closed or another's does no harm.
pub fn kick(fd: RawFd) {
    // SAFETY: a plain system call.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd,
            KICK,
            ptr::null::<c_void>(),
            0,
        )
    };
}

#[cfg(test)]
mod tests;
