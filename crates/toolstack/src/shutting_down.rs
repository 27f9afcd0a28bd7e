//! Asking a guest to shut down or to reboot, and hearing that it has acknowledged that.
//!
//! The guest has a minute for it, as in xl; one that is paused or hangs does not. How long it takes then to shut down is its own business.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use hospes_units::DomId;

use crate::client::{CONNECT_PATIENCE, Host, done, receive, send};
use crate::each::check_goes_on;
use crate::error::Result;
use crate::instance::Instance;
use crate::protocol::{Reply, Request, ShutdownKind};
use crate::registry::Entry;

/// How long the answer may take: longer than the domain process waits for it.
const PATIENCE: Duration = Duration::from_secs(90);

/// A guest that was asked to shut down or to reboot.
#[derive(Debug)]
pub struct Asked {
    domid: DomId,
    stream: UnixStream,
}

impl Asked {
    /// Blocks until the guest has acknowledged it, or has ended; an error where it does not within a minute.
    pub fn wait(self) -> Result<()> {
        receive(self.domid, &self.stream, Some(PATIENCE)).and_then(done)
    }
}

impl Host {
    /// Asks a guest to shut down or to reboot, which [`Asked::wait`] tells whether it has heard.
    pub fn ask_to_shut_down(&self, entry: &Entry, kind: ShutdownKind) -> Result<Asked> {
        check_goes_on(entry)?;
        self.check_room()?;
        let request = Request::Shutdown { kind, last: false };
        let stream = send(entry, &request, CONNECT_PATIENCE)?;
        let domid = entry.domid;
        Ok(Asked { domid, stream })
    }
}

/// Answers [`Request::Shutdown`] on a connection, where something may come behind the domain: the domain's side. `None` where the client has left.
pub(crate) fn answer(
    instance: &Instance,
    kind: ShutdownKind,
    has_left: &dyn Fn() -> bool,
) -> Option<Reply> {
    let machine = instance.machine();
    let heard = match instance.order(|machine| machine.request_shutdown(kind)) {
        Ok(()) => machine
            .wait_acknowledged(has_left)
            .map_err(|fault| fault.to_string()),
        Err(fault) => Err(fault.to_string()),
    };
    match heard {
        Ok(()) => Some(Reply::Done),
        Err(_) if has_left() => None,
        Err(message) => Some(Reply::Error { message }),
    }
}
