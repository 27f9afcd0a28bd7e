//! Signals on vCPU threads: kicks from other threads, and faults of translated code.
//!
//! Translated code runs on the guest's stack pointer, so every handler runs on an alternate stack. Handlers only look where the thread was and
//! rewrite the context to leave the code cache; they take no locks and never unwind.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Once, OnceLock};

use crate::frame::Frame;
use crate::stubs::ExitKind;

/// Shared code that translated code takes on the way to other translated code, and where it goes on if it is given up, at any point of it.
#[derive(Clone, Debug, Default)]
pub struct Detour {
    pub code: std::ops::Range<usize>,
    pub failed: usize,
}

/// What the handler must know of the thread's vCPU; addresses are executable ones.
#[derive(Debug)]
pub struct ThreadInfo {
    pub frame: *mut Frame,
    pub blocks: std::ops::Range<usize>,
    pub enter_checked: std::ops::Range<usize>,
    pub leave: usize,
    pub turned_back: usize,
    pub detours: [Detour; 3],
    pub snippets: std::ops::Range<usize>,
}

thread_local! {
    static CURRENT: Cell<*const ThreadInfo> = const { Cell::new(ptr::null()) };
}

/// This process, as kicks name it: noted by each thread that attaches, so that a kick takes one system call.
static PROCESS: AtomicI32 = AtomicI32::new(0);

pub fn name_process() {
    PROCESS.store(std::process::id() as i32, Ordering::Relaxed);
}

/// The signal that makes a vCPU leave translated code.
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 5
}

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

extern "C" fn handle(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let info = CURRENT.get();
    let kick = signal == kick_signal();
    if info.is_null() {
        if !kick {
            reraise(signal);
        }
        return;
    }
    // SAFETY: the pointer is set to a live value while this thread runs a vCPU, and the kernel passes a valid context.
    let (info, context) = unsafe { (&*info, &mut *context.cast::<libc::ucontext_t>()) };
    let regs = &mut context.uc_mcontext.gregs;
    let pc = regs[libc::REG_RIP as usize] as usize;
    // SAFETY: the frame outlives the vCPU's run; plain fields are touched here only while the thread is inside the code cache.
    let frame = unsafe { &mut *info.frame };
    if kick {
        frame.turn_back.store(1, Ordering::Relaxed);
        if info.enter_checked.contains(&pc) {
            frame.target = info.turned_back as u64;
        }
        for detour in &info.detours {
            if detour.code.contains(&pc) {
                regs[libc::REG_RIP as usize] = detour.failed as i64;
            }
        }
        if frame.busy != 0 {
            // The code looks at `turn_back` as soon as it is through.
            return;
        }
    }
    let in_block = info.blocks.contains(&pc);
    let faulting_snippet = !kick && info.snippets.contains(&pc);
    if in_block || faulting_snippet {
        for (to, from) in frame.raw.iter_mut().zip(REGISTERS) {
            *to = regs[from as usize] as u64;
        }
        frame.raw_flags = regs[libc::REG_EFL as usize] as u64;
        frame.raw_pc = pc as u64;
        frame.raw_signal = signal;
        // Where a string instruction has faulted, nothing is under way any more.
        frame.busy = 0;
        frame.raw_trap = regs[libc::REG_TRAPNO as usize] as i32;
        frame.raw_address = regs[libc::REG_CR2 as usize] as u64;
        regs[libc::REG_RAX as usize] = ExitKind::Signal as i64;
        regs[libc::REG_RIP as usize] = info.leave as i64;
        // The interrupted code's pending-exception state must not hit the exit path: mask nothing here, the exit path loads its own MXCSR.
        return;
    }
    if !kick {
        reraise(signal);
    }
}

const SIGNALS: usize = 65;

/// What the process did with each signal before the first vCPU.
static PREVIOUS: OnceLock<[Option<libc::sigaction>; SIGNALS]> = OnceLock::new();

/// Lets a fault that is not the guest's doing take the course it would take without us, when the instruction is executed again.
fn reraise(signal: i32) {
    let previous = PREVIOUS
        .get()
        .and_then(|all| *all.get(signal as usize)?)
        .unwrap_or_else(|| {
            // SAFETY: an all-zero sigaction is valid: the default action, no flags.
            unsafe { std::mem::zeroed() }
        });
    // SAFETY: the action is one that was installed before, or the default.
    unsafe { libc::sigaction(signal, &previous, ptr::null_mut()) };
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut previous = [None; SIGNALS];
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
            kick_signal(),
        ] {
            // SAFETY: `handle` is async-signal-safe and has the three-argument form that SA_SIGINFO asks for.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handle as extern "C" fn(_, _, _) as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
                libc::sigfillset(&mut action.sa_mask);
                let mut old: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, &action, &mut old) == 0 {
                    previous[signal as usize] = Some(old);
                }
            }
        }
        let _ = PREVIOUS.set(previous);
    });
}

/// An alternate signal stack for the present thread; withdrawn when dropped.
/// A signal begins at the top of the alternate stack wherever the stack pointer is (sigaltstack(2)): that is the guest's, which could point into it.
const SS_AUTODISARM: libc::c_int = 1 << 31;

#[derive(Debug)]
struct AltStack {
    /// A page that nothing can be written to, and the stack behind it.
    base: *mut libc::c_void,
    len: usize,
}

impl AltStack {
    fn new() -> std::io::Result<AltStack> {
        const GUARD: usize = 4096;
        // SAFETY: plain system calls on memory just mapped.
        unsafe {
            let min = libc::getauxval(libc::AT_MINSIGSTKSZ) as usize;
            let size = (min + 64 * 1024).next_multiple_of(4096);
            let len = GUARD + size;
            let base = libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if base == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            let made = AltStack { base, len };
            let stack = libc::stack_t {
                ss_sp: base.byte_add(GUARD),
                ss_flags: SS_AUTODISARM,
                ss_size: size,
            };
            if libc::mprotect(stack.ss_sp, size, libc::PROT_READ | libc::PROT_WRITE) != 0
                || libc::sigaltstack(&stack, ptr::null_mut()) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(made)
        }
    }
}

impl Drop for AltStack {
    fn drop(&mut self) {
        // SAFETY: disables the stack on the thread that set it (the owner never changes threads while attached), then frees it.
        unsafe {
            let off = libc::stack_t {
                ss_sp: ptr::null_mut(),
                ss_flags: libc::SS_DISABLE,
                ss_size: 0,
            };
            libc::sigaltstack(&off, ptr::null_mut());
            libc::munmap(self.base, self.len);
        }
    }
}

/// Ties a vCPU to the present thread: GS base, signal handlers, alternate stack.
#[derive(Debug)]
pub struct Attachment {
    _stack: AltStack,
    info: Box<ThreadInfo>,
    pub tid: i32,
    not_send: std::marker::PhantomData<*const ()>,
}

impl Attachment {
    pub fn new(info: ThreadInfo) -> std::io::Result<Attachment> {
        install();
        name_process();
        let stack = AltStack::new()?;
        let info = Box::new(info);
        const ARCH_SET_GS: i32 = 0x1001;
        // SAFETY: GS is unused by Rust and libc on x86-64 Linux; the base is the frame. `gettid` has no preconditions.
        let tid = unsafe {
            if libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, info.frame) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            libc::syscall(libc::SYS_gettid) as i32
        };
        CURRENT.set(&raw const *info);
        Ok(Attachment {
            _stack: stack,
            info,
            tid,
            not_send: std::marker::PhantomData,
        })
    }

    /// Whether the calling thread is the one that is attached; asked at each entry, so without a system call.
    pub fn is_of_this_thread(&self) -> bool {
        ptr::eq(CURRENT.get(), &raw const *self.info)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        CURRENT.set(ptr::null());
    }
}

/// Sends the kick signal to a thread of this process that is or was attached.
pub fn kick_thread(tid: i32) {
    // SAFETY: a plain system call; a thread that is gone gives an error that does not matter.
    unsafe {
        let process = PROCESS.load(Ordering::Relaxed);
        libc::syscall(libc::SYS_tgkill, process, tid, kick_signal());
    }
}
