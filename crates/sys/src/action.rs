//! What a signal does to this process.

use std::ffi::c_int;
use std::{io, mem, ptr};

/// Whether a signal is ignored, as under nohup.
pub(crate) fn is_ignored(signal: c_int) -> io::Result<bool> {
    // SAFETY: an all-zero sigaction is valid, and the call writes no more than one; it changes nothing.
    let (result, action) = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        let result = libc::sigaction(signal, ptr::null(), &mut action);
        (result, action)
    };
    if result == 0 {
        Ok(action.sa_sigaction == libc::SIG_IGN)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Has a signal call a function that does nothing but what is safe in a handler. It comes to run with all signals blocked, on the thread's alternate stack where it has one.
pub(crate) fn handle(signal: c_int, handler: extern "C" fn(c_int), flags: c_int) -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid, and so is this one.
    let result = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK | flags;
        libc::sigfillset(&mut action.sa_mask);
        libc::sigaction(signal, &action, ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Has this process ignore what asks it to end: SIGTERM, SIGINT, SIGHUP and SIGQUIT. Programs that it starts inherit that.
pub fn ignore_termination() -> io::Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: to ignore a signal runs no code of ours.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
