//! A domain that is to end for good: its guest is asked to shut down, and nothing comes behind it.
//!
//! A command may ask for that, which destroys the domain itself when it has waited long enough, or a signal to the process (SIGTERM), after
//! which the guest gets some time. So does systemd end what was started in a session, when the host shuts down.

use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use hospes_sys::Termination;

use crate::instance::{Instance, lock};
use crate::log::log;
use crate::machine::MachineError;
use crate::protocol::ShutdownKind;

#[derive(Default)]
struct State {
    asked: bool,
    /// The present domain id; an ended one's memory is not kept.
    instance: Weak<Instance>,
}

/// That the domain is to end, and what comes behind it not to begin.
pub(crate) struct Ending {
    /// How long the guest may take.
    patience: Duration,
    state: Mutex<State>,
}

impl Ending {
    pub(crate) fn new(patience: Duration) -> Arc<Ending> {
        Arc::new(Ending {
            patience,
            state: Mutex::default(),
        })
    }

    /// Obeys the requests that the process gets, in a thread.
    pub(crate) fn listen(self: &Arc<Self>) {
        match Termination::catch() {
            Ok(termination) => {
                let ending = self.clone();
                thread::spawn(move || ending.obey(&termination));
            }
            Err(fault) => log!("a request to end the process will end the domain: {fault}"),
        }
    }

    fn obey(&self, termination: &Termination) {
        // Without requests there is nothing to do; a fault in waiting for them would come again.
        while let Ok(true) = termination.wait(None) {
            log!("The process has been asked to end: the guest is to shut down");
            if let Err(fault) = self.ask(ShutdownKind::Poweroff) {
                log!("The guest cannot be asked, so the domain is destroyed: {fault}");
            }
            match termination.wait(Some(Instant::now() + self.patience)) {
                Ok(false) => log!(
                    "The guest has not shut down within {} seconds: the domain is destroyed",
                    self.patience.as_secs()
                ),
                _ => log!("The process has been asked to end again: the domain is destroyed"),
            }
            if let Some(instance) = self.instance() {
                instance.destroy();
            }
        }
    }

    fn instance(&self) -> Option<Arc<Instance>> {
        lock(&self.state).instance.upgrade()
    }

    /// Asks the guest. A domain whose guest has ended, or cannot be asked, is destroyed.
    pub(crate) fn ask(&self, kind: ShutdownKind) -> Result<(), MachineError> {
        lock(&self.state).asked = true;
        // One that is being built is met when it is there.
        let Some(instance) = self.instance() else {
            return Ok(());
        };
        if instance.has_shut_down() {
            instance.destroy();
            return Ok(());
        }
        // One that is paused, or about to be saved, cannot follow.
        let awake = instance.wake().inspect_err(|_| instance.destroy())?;
        if !awake {
            return Ok(());
        }
        instance
            .machine()
            .request_shutdown(kind)
            .inspect_err(|_| instance.destroy())
    }

    /// The domain is to end for good. To be looked at when the end of the present domain id is known to all: one that has ended before
    /// is destroyed.
    pub(crate) fn is_asked(&self) -> bool {
        lock(&self.state).asked
    }

    /// Makes known the present domain id, whose guest has not started yet. It never does where the domain is to end.
    pub(crate) fn set_instance(&self, instance: &Arc<Instance>) {
        let asked = {
            let mut state = lock(&self.state);
            state.instance = Arc::downgrade(instance);
            state.asked
        };
        if asked {
            instance.destroy();
        }
    }
}
