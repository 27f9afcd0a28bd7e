//! How an address-space process comes into being and ends: system calls on processes.

use std::ffi::{CStr, c_int, c_void};
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::{mem, ptr};

/// What systemd and terminals send to all processes that belong together: the monitor's own process obeys.
const MEANT_FOR_ALL: [c_int; 5] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGCONT,
];
const ALL_CHILDREN: c_int = libc::__WALL;

pub(super) fn check(result: i64) -> Result<i64> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

pub(super) fn memfd(name: &CStr, bytes: &[u8]) -> Result<OwnedFd> {
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

pub(super) fn random() -> Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer has the given size.
    check(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) } as i64)?;
    Ok(u64::from_le_bytes(bytes))
}

pub(super) struct Setup {
    pub(super) elf: RawFd,
    pub(super) area: RawFd,
    pub(super) memory: RawFd,
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
        // A signal to all processes of a session or a control group would stop guest code at any instruction.
        let mut mask: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut mask);
        for signal in MEANT_FOR_ALL {
            libc::sigaddset(&mut mask, signal);
        }
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
pub(super) fn spawn(setup: &Setup) -> Result<i32> {
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

pub(super) fn wait(pid: i32) -> Result<c_int> {
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

pub(super) fn kill_and_reap(pid: i32, status: c_int) {
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

pub(super) fn ptrace(
    request: libc::c_uint,
    pid: i32,
    addr: usize,
    data: *mut c_void,
) -> Result<()> {
    // SAFETY: callers pass addresses of live buffers of the size that the request asks for.
    check(unsafe { libc::ptrace(request, pid, addr, data) })?;
    Ok(())
}
