//! An address-space process: an otherwise empty process in which guest user code runs natively, traced by one vCPU's thread.
//!
//! It holds nothing but what is mapped into it from the guest's memory file, and one small area of ours at a random address: a page of code that
//! makes mapping calls, the table of those calls, and a page that the code and we share. No system call of the guest is ever carried out by the host: a filter
//! allows mapping calls alone, and those with a key in the upper halves of two arguments, 64 random bits which the process has in its memory only until it has made the calls and before guest code goes on. It dies with the tracing thread.

use std::ffi::{CStr, c_int, c_void};
use std::io::{Error, Result};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use super::stub::{self, Call, SCRATCH, Start, TABLE, TABLE_PAGES};

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

const ALL_CHILDREN: c_int = libc::__WALL;

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
}

// SAFETY: the mapping behind `area` is owned by this value alone. Only the thread that made the process can trace it; in another all calls fail, and dropping it there
// kills and reaps it as well.
unsafe impl Send for Process {}

fn check(result: i64) -> Result<i64> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn memfd(name: &CStr, bytes: &[u8]) -> Result<OwnedFd> {
    const MFD_EXEC: u32 = 0x10;
    // SAFETY: plain system calls; the name is terminated, and each descriptor is owned by what wraps it.
    unsafe {
        let mut fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | MFD_EXEC);
        if fd < 0 {
            // Kernels before 6.3 do not know the flag and need none.
            fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        }
        check(i64::from(fd))?;
        let fd = OwnedFd::from_raw_fd(fd);
        let written = libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len());
        if check(written as i64)? as usize != bytes.len() {
            return Err(Error::from(std::io::ErrorKind::WriteZero));
        }
        Ok(fd)
    }
}

fn random() -> Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer has the given size.
    check(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) } as i64)?;
    Ok(u64::from_le_bytes(bytes))
}

struct Setup {
    elf: RawFd,
    area: RawFd,
    memory: RawFd,
}

/// The child's side, in the parent's memory until it executes the ELF file: system calls only.
extern "C" fn child(arg: *mut c_void) -> c_int {
    // SAFETY: the parent passes a `Setup` that lives until it goes on, which it does after the exec; all else are system calls on plain values.
    unsafe {
        let setup = &*arg.cast::<Setup>();
        libc::syscall(
            libc::SYS_close_range,
            0,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
        libc::fcntl(setup.area, libc::F_SETFD, 0);
        libc::fcntl(setup.memory, libc::F_SETFD, 0);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        libc::setrlimit(libc::RLIMIT_CORE, &none);
        let mut mask: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut mask);
        libc::sigprocmask(libc::SIG_SETMASK, &mask, ptr::null_mut());
        libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
        let argv = [c"hospes-direct".as_ptr(), ptr::null()];
        let envp: [*const libc::c_char; 1] = [ptr::null()];
        libc::syscall(
            libc::SYS_execveat,
            setup.elf,
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        libc::_exit(127)
    }
}

/// Starts the child, stopped at the first instruction of the ELF file.
fn spawn(setup: &Setup) -> Result<i32> {
    const STACK: usize = 64 * 1024;
    let mut stack = vec![0u8; STACK];
    // SAFETY: the stack and the argument live until the child has left this memory: with CLONE_VFORK `clone` returns only then. Signals are blocked
    // meanwhile, so that no handler runs in the child.
    let pid = unsafe {
        let mut all: libc::sigset_t = mem::zeroed();
        let mut old: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        let top = stack.as_mut_ptr().add(STACK);
        let top = top.sub(top as usize % 16);
        let pid = libc::clone(
            child,
            top.cast(),
            libc::CLONE_VM | libc::CLONE_VFORK,
            (&raw const *setup).cast_mut().cast(),
        );
        let fault = Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &old, ptr::null_mut());
        if pid < 0 {
            return Err(fault);
        }
        pid
    };
    match wait(pid)? {
        status if libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP => Ok(pid),
        status => {
            kill_and_reap(pid, status);
            Err(Error::other(
                "an address-space process did not start: is ptrace allowed?",
            ))
        }
    }
}

fn wait(pid: i32) -> Result<c_int> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is writable for the call.
        match unsafe { libc::waitpid(pid, &mut status, ALL_CHILDREN) } {
            -1 => {
                let fault = Error::last_os_error();
                if fault.raw_os_error() != Some(libc::EINTR) {
                    return Err(fault);
                }
            }
            _ => return Ok(status),
        }
    }
}

fn kill_and_reap(pid: i32, status: c_int) {
    if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
        return;
    }
    // SAFETY: the child has not been reaped, so the number is still its own.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    while let Ok(status) = wait(pid) {
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            return;
        }
    }
}

fn ptrace(request: libc::c_uint, pid: i32, addr: usize, data: *mut c_void) -> Result<()> {
    // SAFETY: callers pass addresses of live buffers of the size that the request asks for.
    check(unsafe { libc::ptrace(request, pid, addr, data) })?;
    Ok(())
}

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
        };
        process.prepare()?;
        Ok(process)
    }

    fn prepare(&mut self) -> Result<()> {
        let options =
            libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACESECCOMP;
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

    /// Maps the area at a new random address, by a system-call instruction at `via`.
    fn map_area(&mut self, via: u64) -> Result<()> {
        for _ in 0..16 {
            // Between 4 GiB and 64 TiB.
            let base = (random()? & 0x3fff_ffff_f000) | 1 << 32;
            let map = |offset: usize, bytes: usize, prot: i32, flags: i32| {
                [
                    libc::SYS_mmap as u64,
                    base + offset as u64,
                    bytes as u64,
                    prot as u64,
                    (libc::MAP_SHARED | flags) as u64,
                    self.area_fd.as_raw_fd() as u64,
                    offset as u64,
                ]
            };
            // The whole of it, where nothing else is; then what is not code with other rights, by that code.
            let code = libc::PROT_READ | libc::PROT_EXEC;
            let whole = map(0, AREA_BYTES, code, libc::MAP_FIXED_NOREPLACE);
            if self.call(via, whole)? as u64 != base {
                continue;
            }
            let one = base + stub::ONE;
            let data = libc::PROT_READ | libc::PROT_WRITE;
            let rest = map(TABLE, AREA_BYTES - TABLE, data, libc::MAP_FIXED);
            self.call_checked(one, rest)?;
            self.base = base;
            return Ok(());
        }
        Err(Error::other("no free address in an empty address space"))
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

    /// From here on the process can make mapping calls with the key and no others: they stop it.
    fn install_filter(&mut self) -> Result<()> {
        const LOAD: u64 = 0x20;
        const JUMP_EQUAL: u64 = 0x15;
        const RETURN: u64 = 0x06;
        const X86_64: u64 = 0xc000_003e;
        const ALLOW: u64 = 0x7fff_0000;
        const TRACE: u64 = 0x7ff0_0000;
        // Of struct seccomp_data: the number, the architecture, the upper halves of the third and fifth arguments.
        let [number, architecture, third_argument, fifth_argument] = [0, 4, 36, 52];
        let op = |code: u64, yes: u64, no: u64, k: u64| code | yes << 16 | no << 24 | k << 32;
        let random = random()?;
        let [third, fifth] = [random >> 32, random & 0xffff_ffff];
        let filter = [
            op(LOAD, 0, 0, architecture),
            op(JUMP_EQUAL, 0, 7, X86_64),
            op(LOAD, 0, 0, number),
            op(JUMP_EQUAL, 1, 0, libc::SYS_mmap as u64),
            op(JUMP_EQUAL, 0, 4, libc::SYS_munmap as u64),
            op(LOAD, 0, 0, third_argument),
            op(JUMP_EQUAL, 0, 2, third),
            op(LOAD, 0, 0, fifth_argument),
            op(JUMP_EQUAL, 1, 0, fifth),
            op(RETURN, 0, 0, TRACE),
            op(RETURN, 0, 0, ALLOW),
        ];
        let table = self.base + TABLE as u64;
        self.put(0, &[filter.len() as u64, table + 16]);
        self.put(2, &filter);
        let one = self.base + stub::ONE;
        let no_new = libc::PR_SET_NO_NEW_PRIVS as u64;
        self.call_checked(one, [libc::SYS_prctl as u64, no_new, 1, 0, 0, 0, 0])?;
        let mode = u64::from(libc::SECCOMP_SET_MODE_FILTER);
        self.call_checked(one, [libc::SYS_seccomp as u64, mode, 0, table, 0, 0, 0])?;
        self.put(0, &[0; 2]);
        self.put(2, &[0; 11]);
        self.key = [third << 32, fifth << 32];
        Ok(())
    }

    /// A mapping call with the key.
    fn keyed(&self, mut call: Call) -> Call {
        call[3] |= self.key[0];
        call[5] |= self.key[1];
        call
    }

    /// Writes words into the table of calls.
    fn put(&self, at: usize, words: &[u64]) {
        assert!((at + words.len()) * 8 <= TABLE_PAGES * PAGE);
        // SAFETY: the range lies in the mapped table, which is aligned; the process that shares it is stopped.
        unsafe {
            let table = self.area.add(TABLE).cast::<u64>();
            ptr::copy_nonoverlapping(words.as_ptr(), table.add(at), words.len());
        }
    }

    /// Whether an address of the process lies in the area.
    pub fn in_area(&self, address: u64) -> bool {
        (self.base..self.base + AREA_BYTES as u64).contains(&address)
    }

    /// Moves the area because the guest uses its address.
    pub fn move_area(&mut self) -> Result<()> {
        let old = self.base;
        self.map_area(old + stub::ONE)?;
        let bytes = AREA_BYTES as u64;
        self.call_checked(
            self.base + stub::ONE,
            [libc::SYS_munmap as u64, old, bytes, 0, 0, 0, 0],
        )
    }

    /// A call that maps `bytes` at `offset` of the memory file to `address`, in place of what is there.
    pub fn map_call(&self, address: u64, bytes: u64, prot: i32, offset: u64) -> Call {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        [
            libc::SYS_mmap as u64,
            address,
            bytes,
            prot as u64,
            flags as u64,
            self.memory_fd as u64,
            offset,
        ]
    }

    pub fn unmap_call(address: u64, bytes: u64) -> Call {
        [libc::SYS_munmap as u64, address, bytes, 0, 0, 0, 0]
    }

    /// Has calls made, in order, before guest code runs again.
    pub fn queue(&mut self, calls: impl IntoIterator<Item = Call>) {
        self.queue.extend(calls);
    }

    /// Unmaps everything but the area.
    pub fn unmap_all(&mut self) -> Result<()> {
        self.queue.clear();
        let end = self.base + AREA_BYTES as u64;
        let start = PAGE as u64;
        self.batch(&[
            Self::unmap_call(start, self.base - start),
            Self::unmap_call(end, USER_END - end),
        ])
    }

    fn call_checked(&self, via: u64, call: Call) -> Result<()> {
        let result = self.call(via, call)?;
        if result < 0 {
            return Err(Error::from_raw_os_error(-result as i32));
        }
        Ok(())
    }

    /// Makes one system call through the instruction at `via`.
    fn call(&self, via: u64, call: Call) -> Result<i64> {
        let mut regs = self.template;
        regs.rip = via;
        [
            regs.rax, regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9,
        ] = self.keyed(call);
        Ok(self.run_stub(&mut regs)?.rax as i64)
    }

    /// Makes all these calls in the process at once, in order; fails with the first that does.
    pub fn batch(&self, calls: &[Call]) -> Result<()> {
        for part in calls.chunks(BATCH_CALLS) {
            self.put_calls(part);
            let mut regs = self.template;
            regs.rip = self.base + stub::BATCH;
            regs.r12 = self.base + TABLE as u64;
            regs.r13 = part.len() as u64;
            let after = self.run_stub(&mut regs);
            self.clear_calls(part.len());
            let after = after?;
            if after.r13 != 0 {
                return Err(Error::from_raw_os_error(-(after.rax as i64) as i32));
            }
        }
        Ok(())
    }

    fn put_calls(&self, calls: &[Call]) {
        for (n, call) in calls.iter().enumerate() {
            self.put(n * call.len(), &self.keyed(*call));
        }
    }

    /// What the table says, of guest memory and the key, is none of the guest program's business.
    fn clear_calls(&self, calls: usize) {
        let none: Call = [0; 7];
        for n in 0..calls {
            self.put(n * none.len(), &none);
        }
    }

    fn run_stub(&self, regs: &mut Registers) -> Result<Registers> {
        regs.orig_rax = u64::MAX;
        self.set_registers(regs)?;
        loop {
            ptrace(libc::PTRACE_CONT, self.pid, 0, ptr::null_mut())?;
            let status = wait(self.pid)?;
            if !libc::WIFSTOPPED(status) {
                return Err(Error::other("an address-space process has died"));
            }
            match libc::WSTOPSIG(status) {
                libc::SIGTRAP if status >> 16 == 0 => return self.registers(),
                KICK => {}
                signal => {
                    return Err(Error::other(format!(
                        "an address-space process stopped with signal {signal} while it was prepared"
                    )));
                }
            }
        }
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
        self.batch(first)?;
        let stop = self.go(regs, last);
        queue.clear();
        self.queue = queue;
        stop
    }

    /// Makes calls, and guest code goes on behind them without a stop in between.
    fn go(&self, regs: &mut Registers, calls: &[Call]) -> Result<Stop> {
        let start = Start {
            general: [
                regs.r15, regs.r14, regs.r13, regs.r12, regs.r11, regs.r10, regs.r9, regs.r8,
                regs.rbp, regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.rbx, regs.rax,
            ],
            rip: regs.rip,
            cs: regs.cs,
            rflags: regs.eflags,
            rsp: regs.rsp,
            ss: regs.ss,
            calls: calls.len() as u64,
            words: calls.as_flattened().len() as u64,
        };
        self.put_start(&start);
        self.put_calls(calls);
        let mut through = *regs;
        through.rip = self.base + stub::GO;
        through.eflags = self.template.eflags;
        self.set_registers(&through)?;
        let mut kicked = false;
        loop {
            ptrace(libc::PTRACE_CONT, self.pid, 0, ptr::null_mut())?;
            let status = wait(self.pid)?;
            if !libc::WIFSTOPPED(status) {
                return Ok(Stop::Dead);
            }
            let now = self.registers()?;
            let inside = (self.base..self.base + PAGE as u64).contains(&now.rip.wrapping_sub(1));
            match libc::WSTOPSIG(status) {
                // The calls are made first, for what is mapped is known by them; then it is as if the kick had come before.
                KICK if inside => {
                    kicked = true;
                    let rip = self.base + stub::STOP;
                    self.put_start(&Start { rip, ..start });
                }
                libc::SIGTRAP if kicked && now.rip == self.base + stub::STOP + 1 => {
                    return Ok(Stop::Kick);
                }
                // Not cleared: a call has failed. Else it is guest code that has come here by itself.
                libc::SIGTRAP if inside && self.first_call() != 0 => {
                    self.clear_calls(calls.len());
                    return Err(Error::from_raw_os_error(now.rax.wrapping_neg() as i32));
                }
                _ => {
                    *regs = now;
                    return self.stop(status, regs);
                }
            }
        }
    }

    /// The number of the first call in the table.
    fn first_call(&self) -> u64 {
        // SAFETY: the word lies in the mapped area and is aligned; the process that shares it is stopped.
        unsafe { ptr::read_volatile(self.area.add(TABLE).cast()) }
    }

    fn put_start(&self, start: &Start) {
        // SAFETY: the page lies in the mapped area and is aligned; the process that shares it is stopped.
        unsafe { ptr::write_volatile(self.area.add(SCRATCH).cast(), *start) };
    }

    /// What the status means of a process that has stopped with these registers.
    fn stop(&self, status: c_int, regs: &Registers) -> Result<Stop> {
        const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;
        if !libc::WIFSTOPPED(status) {
            return Ok(Stop::Dead);
        }
        Ok(match libc::WSTOPSIG(status) {
            signal if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            libc::SIGTRAP if status >> 16 != 0 => {
                if regs.rip & !(PAGE as u64 - 1) == VSYSCALL {
                    Stop::Vsyscall
                } else {
                    Stop::Syscall
                }
            }
            KICK => Stop::Kick,
            signal => {
                let (code, address) = self.fault()?;
                Stop::Fault {
                    signal,
                    code,
                    address,
                }
            }
        })
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
