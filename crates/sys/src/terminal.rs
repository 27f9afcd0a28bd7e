//! A terminal that passes every key on, and gets its settings back whatever ends the program that asked for it.

use std::ffi::c_int;
use std::io::{self, stdin};
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Settings that standard input is to have in the end; null while it has them.
static SETTINGS: AtomicPtr<libc::termios> = AtomicPtr::new(ptr::null_mut());
/// Signals that end a program whose terminal is waited for by others.
const ENDS: [c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// Standard input as a raw terminal, until this is dropped or a signal ends the program.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// Makes standard input raw where it is a terminal. There is one such value at a time.
    pub fn enter() -> io::Result<Raw> {
        use std::io::IsTerminal;
        if !stdin().is_terminal() {
            return Ok(Raw(()));
        }
        // SAFETY: all-zero settings are valid to be overwritten, and these calls write or read one such structure.
        unsafe {
            let mut settings: libc::termios = mem::zeroed();
            if libc::tcgetattr(0, &mut settings) != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut raw = settings;
            libc::cfmakeraw(&mut raw);
            // A handler may look at them at any time, so they are never freed.
            SETTINGS.store(Box::leak(Box::new(settings)), Ordering::SeqCst);
            for signal in ENDS {
                end_by(signal)?;
            }
            if libc::tcsetattr(0, libc::TCSANOW, &raw) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Raw(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        give_back();
    }
}

/// Gives standard input its settings back. May be called in a handler.
fn give_back() {
    let settings = SETTINGS.swap(ptr::null_mut(), Ordering::SeqCst);
    if !settings.is_null() {
        // SAFETY: what was stored there is never freed. There is nobody to tell where this fails.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, settings) };
    }
}

/// Has a signal end the program as it did, but with the terminal given back; one that is ignored stays so.
fn end_by(signal: c_int) -> io::Result<()> {
    // SAFETY: all-zero actions are valid, and the handler does nothing but what is safe in one.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        let mut before: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
        // Among them SIGTTOU, which would stop a program of the background here.
        libc::sigfillset(&mut action.sa_mask);
        if libc::sigaction(signal, ptr::null(), &mut before) != 0
            || before.sa_sigaction != libc::SIG_IGN
                && libc::sigaction(signal, &action, ptr::null_mut()) != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn handle(signal: c_int) {
    give_back();
    // SAFETY: raise(3) may be called in a handler. The signal comes again, now with its default action, as soon as this handler has ended.
    unsafe { libc::raise(signal) };
}
