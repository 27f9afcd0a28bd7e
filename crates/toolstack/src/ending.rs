//! A domain that is to end for good: its guest is asked to shut down, and nothing comes behind it. One that is still being made is given up at once.
//!
//! A command may ask for that, which destroys the domain itself when it has waited long enough, or a signal to the process (SIGTERM), after
//! which the guest gets some time. So does systemd end what was started in a session, when the host shuts down.

use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use hospes_sys::Termination;
use hospes_units::DomId;

use crate::hub::ConsoleHub;
use crate::instance::{FAREWELL, Instance, lock};
use crate::log::log;
use crate::machine::MachineError;
use crate::process::answer;
use crate::protocol::{Launched, ShutdownKind};
use crate::registry::Registry;

/// What a domain is that can be given up before it is there.
pub(crate) struct Unmade {
    pub domid: DomId,
    pub registry: Registry,
    pub hub: Arc<ConsoleHub>,
}

#[derive(Default)]
enum Phase {
    /// Nothing has an id yet.
    #[default]
    Begun,
    /// The machine is being built, which may take any time.
    Building(Unmade),
    /// The present domain id, with what it takes until its guest may start; an ended one's memory is not kept.
    Built(Weak<Instance>),
    Ready(Weak<Instance>),
}

#[derive(Default)]
struct State {
    asked: bool,
    /// Whether there has been a domain, of which the command has heard that asked for it.
    lived: bool,
    phase: Phase,
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
            if self.give_up() {
                continue;
            }
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

    /// Ends a domain that is still being made; false where it is there. While its machine is built nothing can be asked to stop, so the process ends where it
    /// stands, and lets go of all that it has.
    fn give_up(&self) -> bool {
        let mut state = lock(&self.state);
        // Held until the end of the process: the domain cannot come to be there meanwhile.
        let State { lived, phase, .. } = &*state;
        let unmade = match phase {
            Phase::Begun => None,
            Phase::Building(unmade) => Some(unmade),
            Phase::Built(instance) => {
                let instance = instance.upgrade();
                state.asked = true;
                drop(state);
                log!("The process has been asked to end before the domain was ready");
                if let Some(instance) = instance {
                    instance.destroy();
                }
                return true;
            }
            Phase::Ready(_) => return false,
        };
        log!("The process has been asked to end before the domain was there: it does so now");
        if let Some(unmade) = unmade {
            if let Err(fault) = unmade.registry.forget(unmade.domid) {
                log!("{fault}");
            }
            unmade.hub.close(FAREWELL);
        }
        let status = match lived {
            true => 0,
            false => {
                answer(&Launched::Error {
                    message: "the domain was destroyed before it was there".into(),
                });
                1
            }
        };
        std::process::exit(status)
    }

    fn instance(&self) -> Option<Arc<Instance>> {
        match &lock(&self.state).phase {
            Phase::Ready(instance) => instance.upgrade(),
            _ => None,
        }
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

    /// A machine is about to be built; false where the domain is to end.
    pub(crate) fn set_building(&self, unmade: Unmade) -> bool {
        let mut state = lock(&self.state);
        state.phase = Phase::Building(unmade);
        !state.asked
    }

    /// Its machine is there.
    pub(crate) fn set_built(&self, instance: &Arc<Instance>) {
        lock(&self.state).phase = Phase::Built(Arc::downgrade(instance));
    }

    /// Makes known the present domain id, whose guest has not started yet. It never does where the domain is to end.
    pub(crate) fn set_ready(&self, instance: &Arc<Instance>) {
        let asked = {
            let mut state = lock(&self.state);
            state.phase = Phase::Ready(Arc::downgrade(instance));
            state.lived = true;
            state.asked
        };
        if asked {
            instance.destroy();
        }
    }
}
