//! What a guest is asked through the store, and whether it has heard it: a guest that takes a word from the node empties that.

use std::time::{Duration, Instant};

use crate::{Domain, RequestError, ShutdownKind};

/// How long a guest may take to acknowledge that it is to shut down, as in xl.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked whether a guest has heard what it was asked.
pub(crate) const LOOK: Duration = Duration::from_millis(5);

/// What a guest is asked that is to suspend itself.
pub(crate) const SUSPEND: &str = "suspend";

impl Domain {
    /// The node that the guest is asked in to shut down or to suspend itself.
    pub(crate) fn shutdown_path(&self) -> String {
        hospes_store::domain_path(self.spec.domid) + "/control/shutdown"
    }

    /// Asks the guest through the store; whether and when it follows is its own business.
    pub fn request_shutdown(&self, kind: ShutdownKind) -> Result<(), RequestError> {
        if let Some(reason) = self.run.end_reason() {
            return Err(RequestError::Ended(reason));
        }
        let word = match kind {
            ShutdownKind::PowerOff => "poweroff",
            ShutdownKind::Halt => "halt",
            ShutdownKind::Reboot => "reboot",
        };
        self.store.write(&self.shutdown_path(), word.as_bytes())?;
        Ok(())
    }

    /// Blocks until the guest has acknowledged the last [`Domain::request_shutdown`], or has ended. Asks `given_up` now and then whether to go on waiting. After an
    /// error the guest is still asked, and may follow at any time.
    pub fn wait_acknowledged(&self, given_up: &dyn Fn() -> bool) -> Result<(), RequestError> {
        let deadline = Instant::now() + PATIENCE;
        let over = || given_up() || self.run.has_ended();
        match self.wait_heard(&self.shutdown_path(), deadline, &over) || self.run.has_ended() {
            true => Ok(()),
            false => Err(RequestError::Unacknowledged {
                seconds: PATIENCE.as_secs(),
            }),
        }
    }

    /// Waits until a guest that was asked to shut down has heard that; false where it has not.
    pub(crate) fn wait_heard(
        &self,
        path: &str,
        deadline: Instant,
        given_up: &dyn Fn() -> bool,
    ) -> bool {
        loop {
            match self.store.read(path) {
                Err(hospes_store::Error::NoEntry) => return true,
                Ok(value) if value.is_empty() || value == SUSPEND.as_bytes() => return true,
                // Where the store cannot be reached nobody knows.
                _ if Instant::now() >= deadline || given_up() => return false,
                _ => std::thread::sleep(LOOK),
            }
        }
    }

    /// Asks the guest's kernel, through the store, for the magic SysRq function of a key.
    pub fn send_sysrq(&self, key: char) -> Result<(), RequestError> {
        if let Some(reason) = self.run.end_reason() {
            return Err(RequestError::Ended(reason));
        }
        let path = hospes_store::domain_path(self.spec.domid) + "/control/sysrq";
        self.store.write(&path, key.to_string().as_bytes())?;
        Ok(())
    }
}
