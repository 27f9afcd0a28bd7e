//! A terminal that passes every key on, and gets its settings back whatever ends the program that asked for it.

use std::ffi::c_int;
use std::io::{self, IsTerminal, stdin};
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::action::{handle, is_ignored};

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
                if !is_ignored(signal)? {
                    // All others are blocked meanwhile, among them SIGTTOU, which would stop a program of the background there.
                    handle(signal, end, libc::SA_RESETHAND)?;
                }
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

/// Ends the program as the signal would have, but with the terminal given back.
extern "C" fn end(signal: c_int) {
    give_back();
    // SAFETY: raise(3) may be called in a handler. The signal comes again, now with its default action, as soon as this handler has ended.
    unsafe { libc::raise(signal) };
}
