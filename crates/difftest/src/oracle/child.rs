//! The oracle's child: everything happens in its signal handler.
//!
//! The end of each case is a signal. The handler takes the registers from the signal frame, puts the next case's registers there and returns, which
//! loads them all at once. It runs with the case's FS base, so it makes system calls by itself and touches no thread-local data.

use std::arch::asm;
use std::arch::x86_64::_rdtsc;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use super::shared::{FAILED, READY, RawRegs, Shared};
use crate::layout::{IMAGE_BYTES, PAGE, REGIONS, WINDOWS};
use crate::state::XSAVE_HEADER;

/// Bytes of the stack on which the handler runs.
const STACK_BYTES: usize = 256 * 1024;

/// Microseconds of processor time between two looks at whether a case still runs.
const TICK_US: i64 = 20_000;

const REGISTERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Bytes of the legacy area that hold registers; the kernel keeps its own marks behind.
const LEGACY_BYTES: usize = 416;

struct Child {
    shared: *mut Shared,
    /// The backing pages in one piece, writable.
    image: *mut u8,
    /// Cases of the batch that have been started.
    started: u32,
    batch: u32,
    /// Started cases over all batches, and what that was at the last tick.
    total: u64,
    total_at_tick: u64,
    /// Time-stamp counter when the present case was started.
    begun: u64,
}

static mut CHILD: Child = Child {
    shared: ptr::null_mut(),
    image: ptr::null_mut(),
    started: 0,
    batch: 0,
    total: 0,
    total_at_tick: 0,
    begun: 0,
};

fn futex(word: &AtomicU32, operation: i64, value: u32) {
    let mut result = libc::SYS_futex;
    // SAFETY: the word is valid and the call changes no memory; a system call clobbers RCX and R11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") word.as_ptr(),
            in("rsi") operation,
            in("rdx") u64::from(value),
            in("r10") 0u64,
            out("rcx") _,
            out("r11") _,
        );
    }
    // Whatever the outcome, the caller looks at the word again.
    let _ = result;
}

/// Clears NT and ID, which a return from a signal does not, and AC, with which the handler must not run.
#[inline(always)]
fn clean_flags() {
    // SAFETY: only flags that no code here depends on are changed; the red zone is left alone.
    unsafe {
        asm!(
            "lea rsp, [rsp - 128]",
            "pushfq",
            "and qword ptr [rsp], {mask}",
            "popfq",
            "lea rsp, [rsp + 128]",
            mask = const !(1i32 << 14 | 1 << 21 | 1 << 18),
        );
    }
}

extern "C" fn handle(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    clean_flags();
    let (fs, gs): (u64, u64);
    // SAFETY: reading the bases needs CR4.FSGSBASE, which the parent has checked. DS and ES are set to the flat user segment that 32-bit code needs.
    unsafe {
        asm!("rdfsbase {0}", "rdgsbase {1}", "mov ds, {2:e}", "mov es, {2:e}", out(reg) fs, out(reg) gs, in(reg) 0x2b);
    }
    // SAFETY: the handler blocks all signals, so it is the only code that uses CHILD; the kernel passes a valid context with an extended state whose
    // standard-format image is at least as long as the parts used here.
    let (fs, gs) = unsafe {
        let child = &raw mut CHILD;
        let child = &mut *child;
        let context = &mut *context.cast::<libc::ucontext_t>();
        let running = child.started > 0;
        if signal == libc::SIGPROF {
            if !running || child.total_at_tick != child.total {
                child.total_at_tick = child.total;
                (fs, gs)
            } else {
                child.save(signal, context, fs, gs);
                child.next(context)
            }
        } else {
            if running {
                child.save(signal, context, fs, gs);
            }
            child.next(context)
        }
    };
    // SAFETY: nothing uses the bases between here and the return to the case.
    unsafe {
        asm!("wrfsbase {0}", "wrgsbase {1}", in(reg) fs, in(reg) gs);
    }
}

impl Child {
    /// Records how the present case ended.
    ///
    /// # Safety
    /// Called by the handler with the context it was given, while a case is running.
    unsafe fn save(&mut self, signal: i32, context: &libc::ucontext_t, fs: u64, gs: u64) {
        let machine = &context.uc_mcontext;
        // SAFETY: by the caller's promise the pointers are valid; the image has IMAGE_BYTES bytes.
        unsafe {
            let result = &raw mut (*self.shared).results[self.started as usize - 1];
            let regs = &raw mut (*result).regs;
            for (n, r) in REGISTERS.iter().enumerate() {
                (*regs).gpr[n] = machine.gregs[*r as usize] as u64;
            }
            (*regs).rip = machine.gregs[libc::REG_RIP as usize] as u64;
            (*regs).rflags = machine.gregs[libc::REG_EFL as usize] as u64;
            (*regs).cs = machine.gregs[libc::REG_CSGSFS as usize] as u64 & 0xffff;
            (*regs).fs_base = fs;
            (*regs).gs_base = gs;
            let image = machine.fpregs.cast::<u8>();
            let bytes = (*self.shared).image_bytes as usize;
            ptr::copy_nonoverlapping(image, (&raw mut (*regs).xsave).cast(), bytes);
            (*result).ticks = _rdtsc().wrapping_sub(self.begun);
            (*result).signal = signal as u64;
            (*result).trap = machine.gregs[libc::REG_TRAPNO as usize] as u64;
            (*result).error = machine.gregs[libc::REG_ERR as usize] as u64;
            (*result).cr2 = machine.gregs[libc::REG_CR2 as usize] as u64;
            ptr::copy_nonoverlapping(self.image, (&raw mut (*result).memory).cast(), IMAGE_BYTES);
        }
    }

    /// Prepares the next case, waiting for it if need be; returns its FS and GS base.
    ///
    /// # Safety
    /// As [`Child::save`].
    unsafe fn next(&mut self, context: &mut libc::ucontext_t) -> (u64, u64) {
        // SAFETY: by the caller's promise the pointers are valid. The parent writes cases only between `completed` and `submitted`.
        unsafe {
            let shared = self.shared;
            if self.started == (*shared).count {
                (*shared).completed.store(
                    if self.batch == 0 { READY } else { self.batch },
                    Ordering::Release,
                );
                futex(&(*shared).completed, i64::from(libc::FUTEX_WAKE), 1);
                loop {
                    let submitted = (*shared).submitted.load(Ordering::Acquire);
                    if submitted != self.batch {
                        self.batch = submitted;
                        break;
                    }
                    futex(&(*shared).submitted, i64::from(libc::FUTEX_WAIT), submitted);
                }
                self.started = 0;
            }
            let case = &raw const (*shared).cases[self.started as usize];
            self.started += 1;
            self.total += 1;
            ptr::copy_nonoverlapping((&raw const (*shared).base).cast(), self.image, IMAGE_BYTES);
            for patch in &(*case).patches {
                let to = self.image.add(patch.at as usize);
                ptr::copy_nonoverlapping(patch.bytes.as_ptr(), to, patch.len as usize);
            }
            load(context, &(*case).regs, (*shared).image_bytes as usize);
            self.begun = _rdtsc();
            ((*case).regs.fs_base, (*case).regs.gs_base)
        }
    }
}

/// Puts a case's registers into a signal frame.
///
/// # Safety
/// The context is one that the kernel gave to the handler; `bytes` is no more than its XSAVE image has.
unsafe fn load(context: &mut libc::ucontext_t, regs: &RawRegs, bytes: usize) {
    let machine = &mut context.uc_mcontext;
    for (n, r) in REGISTERS.iter().enumerate() {
        machine.gregs[*r as usize] = regs.gpr[n] as i64;
    }
    machine.gregs[libc::REG_RIP as usize] = regs.rip as i64;
    machine.gregs[libc::REG_EFL as usize] = regs.rflags as i64;
    machine.gregs[libc::REG_CSGSFS as usize] = 0x2b_0000_0000_0000 | regs.cs as i64;
    // SAFETY: the image is in standard format and has so many bytes (the parent has checked for AVX, or AVX-512).
    unsafe {
        let image = machine.fpregs.cast::<u8>();
        let from = regs.xsave.as_ptr();
        ptr::copy_nonoverlapping(from, image, LEGACY_BYTES);
        let rest = bytes - XSAVE_HEADER;
        ptr::copy_nonoverlapping(from.add(XSAVE_HEADER), image.add(XSAVE_HEADER), rest);
    }
}

fn map(at: u64, len: usize, protection: i32, fd: i32, offset: usize) -> Result<*mut u8, i32> {
    let fixed = if at == 0 {
        0
    } else {
        libc::MAP_FIXED_NOREPLACE
    };
    // SAFETY: either the kernel chooses the address or the call fails rather than replace a mapping.
    let p = unsafe {
        libc::mmap(
            at as *mut libc::c_void,
            len,
            protection,
            libc::MAP_SHARED | libc::MAP_POPULATE | fixed,
            fd,
            offset as i64,
        )
    };
    if p == libc::MAP_FAILED || at != 0 && p as u64 != at {
        return Err(last_error());
    }
    Ok(p.cast())
}

fn last_error() -> i32 {
    // SAFETY: called before the thread's FS base changes, so errno is where libc expects it.
    unsafe { *libc::__errno_location() }
}

fn set_up(shared: *mut Shared, fd: i32) -> Result<(), i32> {
    let all = libc::PROT_READ | libc::PROT_WRITE;
    let image = map(0, IMAGE_BYTES, all, fd, 0)?;
    for base in WINDOWS {
        for r in REGIONS {
            let mut protection = libc::PROT_READ;
            if r.write {
                protection |= libc::PROT_WRITE;
            }
            if r.exec {
                protection |= libc::PROT_EXEC;
            }
            let len = r.pages * PAGE as usize;
            map(
                base + r.offset,
                len,
                protection,
                fd,
                r.backing * PAGE as usize,
            )?;
        }
    }
    // SAFETY: an anonymous mapping at an address the kernel chooses.
    let stack = unsafe {
        libc::mmap(
            ptr::null_mut(),
            STACK_BYTES,
            all,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if stack == libc::MAP_FAILED {
        return Err(last_error());
    }
    // SAFETY: plain system calls with valid arguments; CHILD is not in use before the first signal.
    unsafe {
        let child = &raw mut CHILD;
        let child = &mut *child;
        child.shared = shared;
        child.image = image;
        let stack = libc::stack_t {
            ss_sp: stack,
            ss_flags: 0,
            ss_size: STACK_BYTES,
        };
        if libc::sigaltstack(&stack, ptr::null_mut()) != 0 {
            return Err(last_error());
        }
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
            libc::SIGPROF,
        ] {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as extern "C" fn(_, _, _) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigfillset(&mut action.sa_mask);
            if libc::sigaction(signal, &action, ptr::null_mut()) != 0 {
                return Err(last_error());
            }
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let tick = libc::timeval {
            tv_sec: 0,
            tv_usec: TICK_US,
        };
        let timer = libc::itimerval {
            it_interval: tick,
            it_value: tick,
        };
        if libc::syscall(libc::SYS_setitimer, libc::ITIMER_PROF, &timer, 0usize) != 0 {
            return Err(last_error());
        }
    }
    Ok(())
}

/// Life of the child after the fork: it never returns. Allocates nothing, since other threads may have held the allocator's locks.
pub fn live(shared: *mut Shared, fd: i32) -> ! {
    if let Err(error) = set_up(shared, fd) {
        // SAFETY: the shared memory is mapped.
        unsafe {
            (*shared)
                .completed
                .store(FAILED | error as u32, Ordering::Release);
            futex(&(*shared).completed, i64::from(libc::FUTEX_WAKE), 1);
            libc::_exit(1);
        }
    }
    // SAFETY: the handler is installed; it takes over here for good.
    unsafe {
        asm!("int3", options(noreturn));
    }
}
