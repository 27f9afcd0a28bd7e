//! That a domain is being saved or moved, and by whom.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering::SeqCst;

use crate::instance::{ChangeError, Instance, lock};
use crate::log::log;
use crate::machine::{Machine, MachineError};

/// While there is one the domain is being saved.
pub(crate) struct Saving<'a> {
    instance: &'a Instance,
    _changes: MutexGuard<'a, ()>,
}

impl Drop for Saving<'_> {
    fn drop(&mut self) {
        self.instance.let_client_be();
        *lock(&self.instance.deaf) = false;
        self.instance.saving.store(false, SeqCst);
    }
}

impl Saving<'_> {
    /// From here on the guest is asked for nothing else than to suspend itself; what it was asked before is with it.
    pub(crate) fn is_to_suspend(&self) {
        *lock(&self.instance.deaf) = true;
    }
}

/// The connection of the client that gets the domain.
#[derive(Default)]
pub(crate) struct Line {
    client: Option<UnixStream>,
    /// The machine has ended: nobody waits for a client any more.
    ended: bool,
}

fn cut(client: &UnixStream) {
    if let Err(fault) = client.shutdown(Shutdown::Both) {
        log!("a connection cannot be closed: {fault}");
    }
}

impl Instance {
    /// What is said to those who want something of a domain that is being saved.
    pub(crate) const SAVING: &str = "it is being saved or migrated: try again when that has ended";

    /// Keeps the domain's devices and settings as they are; `None` where it is being saved already.
    pub(crate) fn begin_save(&self) -> Option<Saving<'_>> {
        // Whoever holds a domain decides what becomes of it first.
        let free = self.held().is_none() && !self.saving.swap(true, SeqCst);
        free.then(|| Saving {
            instance: self,
            _changes: lock(&self.changes),
        })
    }

    pub(crate) fn is_being_saved(&self) -> bool {
        self.saving.load(SeqCst)
    }

    /// Does at once what a command wants of the guest, or of the threads that run it: also while the domain is sent to another host and the guest runs. One that is to
    /// suspend itself might not see it any more, and nobody carries it to where the guest goes on.
    pub(crate) fn order(
        &self,
        order: impl FnOnce(&dyn Machine) -> Result<(), MachineError>,
    ) -> Result<(), ChangeError> {
        let deaf = lock(&self.deaf);
        let saving = || deaf.then(|| Instance::SAVING.into());
        match self.is_elsewhere().or_else(saving) {
            Some(why) => Err(ChangeError::Fixed(why)),
            None => order(self.machine()).map_err(ChangeError::Machine),
        }
    }

    /// From here on what is read from the client, and written to it, ends with the machine.
    pub(crate) fn end_client_too(&self, client: &UnixStream) -> std::io::Result<()> {
        let client = client.try_clone()?;
        let mut line = lock(&self.line);
        if line.ended {
            cut(&client);
        }
        line.client = Some(client);
        Ok(())
    }

    /// The client is to hear of the machine's end.
    pub(crate) fn let_client_be(&self) {
        lock(&self.line).client = None;
    }

    /// The machine has ended. Who waits for a client keeps its memory, and its settings as they are: that is over too.
    pub(crate) fn hang_up(&self) {
        let mut line = lock(&self.line);
        line.ended = true;
        if let Some(client) = line.client.take() {
            cut(&client);
        }
    }
}
