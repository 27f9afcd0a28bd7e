//! Requests that wait because the host has no room.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use crate::types::Status;

/// How long a held request waits before it is tried again.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Counts the held requests of an image.
pub(crate) struct Hold {
    path: PathBuf,
    held: Mutex<u64>,
}

impl Hold {
    pub(crate) fn new(path: PathBuf) -> Hold {
        Hold {
            path,
            held: Mutex::new(0),
        }
    }

    /// A request starts to wait.
    pub(crate) fn enter(&self) {
        *self.held.lock().expect("not poisoned") += 1;
    }

    /// It waits no more.
    pub(crate) fn leave(&self) {
        *self.held.lock().expect("not poisoned") -= 1;
    }

    pub(crate) fn status(&self) -> Status {
        match *self.held.lock().expect("not poisoned") {
            0 => Status::Good,
            count => Status::Held(format!(
                "the host's file system with {} is full: {count} write{} of the guest wait{}; make room and they go on by themselves within seconds",
                self.path.display(),
                if count == 1 { "" } else { "s" },
                if count == 1 { "s" } else { "" },
            )),
        }
    }
}
