//! One device: its directories, its phase, and the thread that follows the guest's half.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hospes_store::{Error, StoreAccess, Watch};
use hospes_units::{DomId, Port};
use hospes_xen::Xen;
use hospes_xen_abi::xenbus::XenbusState;

use super::nodes::Paths;
use super::state::{Action, Phase, step};
use super::{Alarm, Backend, ConnectError, DeviceId, Frontend, Log, Node};
use crate::lock;

/// How a device is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Leave {
    /// The guest is asked to let go first.
    Orderly,
    /// At once.
    Forced,
}

/// What the thread is to look at.
#[derive(Debug, Default)]
struct Mail {
    /// The guest had its time to let go: the device stays where it has not begun.
    stay: bool,
    front: bool,
    alarm: Option<String>,
    renew: bool,
    leave: Option<Leave>,
    errand: Option<Errand>,
}

/// What a suspended guest's device does for a while. A new one takes the place of one that nobody has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Errand {
    /// See [`Backend::settle`].
    Settle(Instant),
    /// See [`Backend::flush`].
    Flush,
    /// Stop, and see [`Backend::let_go`].
    LetGo,
    /// Take all again and go on.
    TakeAgain,
}

#[derive(Debug)]
struct Inbox {
    mail: Mail,
    phase: Phase,
    /// The event channels of the last connection.
    ports: Vec<Port>,
    /// How the last errand ended.
    done: Option<Result<(), String>>,
    gone: bool,
}

/// What a device's thread and the others know of each other.
#[derive(Debug)]
pub(crate) struct Mailbox {
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

impl Mailbox {
    pub fn new() -> Arc<Mailbox> {
        Arc::new(Mailbox {
            inbox: Mutex::new(Inbox {
                mail: Mail::default(),
                phase: Phase::Waiting,
                ports: Vec::new(),
                done: None,
                gone: false,
            }),
            changed: Condvar::new(),
        })
    }

    fn post(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut lock(&self.inbox).mail);
        self.changed.notify_all();
    }

    /// The guest's half may have changed.
    pub fn front_changed(&self) {
        self.post(|mail| mail.front = true);
    }

    pub fn renew(&self) {
        self.post(|mail| mail.renew = true);
    }

    /// Has the device do something and waits for it; one that is gone has nothing to do. One thread at a time.
    pub fn run(&self, errand: Errand) -> Result<(), String> {
        let mut inbox = lock(&self.inbox);
        inbox.done = None;
        inbox.mail.errand = Some(errand);
        self.changed.notify_all();
        let waits = |inbox: &mut Inbox| !inbox.gone && inbox.done.is_none();
        let mut inbox = self
            .changed
            .wait_while(inbox, waits)
            .unwrap_or_else(PoisonError::into_inner);
        inbox.done.take().unwrap_or(Ok(()))
    }

    fn ran(&self, result: Result<(), String>) {
        lock(&self.inbox).done = Some(result);
        self.changed.notify_all();
    }

    pub fn leave(&self, how: Leave) {
        self.post(|mail| mail.leave = mail.leave.max(Some(how)));
    }

    /// Takes back [`Leave::Orderly`] where the guest has not begun to let go.
    pub fn stay(&self) {
        self.post(|mail| mail.stay = true);
    }

    pub fn phase(&self) -> Phase {
        lock(&self.inbox).phase
    }

    /// The guest's event channels of the device's last connection.
    pub fn ports(&self) -> Vec<Port> {
        lock(&self.inbox).ports.clone()
    }

    /// Waits until the device is gone, or for `most`; says whether it is.
    pub fn wait_gone(&self, most: Option<Duration>) -> bool {
        let inbox = lock(&self.inbox);
        let stays = |inbox: &mut Inbox| !inbox.gone;
        let Some(most) = most else {
            drop(self.changed.wait_while(inbox, stays));
            return true;
        };
        let (inbox, _) = self
            .changed
            .wait_timeout_while(inbox, most, stays)
            .unwrap_or_else(PoisonError::into_inner);
        inbox.gone
    }

    fn alarm(self: &Arc<Self>) -> Alarm {
        let mailbox = Arc::clone(self);
        Arc::new(move |reason| {
            mailbox.post(|mail| {
                mail.alarm.get_or_insert(reason);
            });
        })
    }

    /// Sleeps until there is mail, and takes it.
    fn wait(&self) -> Mail {
        let mut inbox = lock(&self.inbox);
        loop {
            let mail = &mut inbox.mail;
            let wanted = mail.alarm.is_some() || mail.leave.is_some() || mail.errand.is_some();
            if mail.front || mail.renew || mail.stay || wanted {
                return std::mem::take(mail);
            }
            inbox = self
                .changed
                .wait(inbox)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The device as its thread has it.
pub(crate) struct Device {
    pub id: DeviceId,
    pub domid: DomId,
    pub paths: Paths,
    pub store: Arc<dyn StoreAccess>,
    pub xen: Arc<Xen>,
    pub log: Log,
    pub backend: Box<dyn Backend>,
    pub mailbox: Arc<Mailbox>,
    /// Calls [`Mailbox::front_changed`].
    pub _watch: Watch,
    pub phase: Phase,
    /// The queues run.
    pub connected: bool,
    /// What it stands for may be another process's: nothing is followed.
    pub let_go: bool,
    pub leaving: bool,
    /// The store could not take the last state; it is written again at the next occasion.
    pub unshown: bool,
    /// How often the guest broke the rules.
    pub failures: u64,
}

/// Says that the device is gone even where its thread panics.
struct Gone(Arc<Mailbox>);

impl Drop for Gone {
    fn drop(&mut self) {
        lock(&self.0.inbox).gone = true;
        self.0.changed.notify_all();
    }
}

impl Device {
    /// Follows the guest's half until the device is removed.
    pub fn main(mut self) {
        let gone = Gone(Arc::clone(&self.mailbox));
        while self.live(self.mailbox.wait()) {}
        self.remove();
        // What the device stands for is free again before anybody hears that it has gone.
        drop(self);
        drop(gone);
    }

    /// Acts on mail; false where the device is to be removed.
    fn live(&mut self, mail: Mail) -> bool {
        match mail.leave {
            Some(Leave::Forced) => return false,
            Some(Leave::Orderly) => self.start_leaving(),
            None if mail.stay => self.stop_leaving(),
            None => {}
        }
        if let Some(errand) = mail.errand {
            let result = self.obey(errand);
            self.mailbox.ran(result);
        }
        if let Some(reason) = mail.alarm
            && matches!(self.phase, Phase::Connected | Phase::Closing)
        {
            self.disconnect();
            self.fail(&reason);
        }
        if self.let_go {
            return true;
        }
        if self.unshown {
            self.show();
        }
        if mail.renew {
            self.renew();
        }
        self.follow()
    }

    /// Acts on the state of the guest's half until there is nothing to do; false where the device is to be removed.
    fn follow(&mut self) -> bool {
        loop {
            let front = match self.store.read(&format!("{}/state", self.paths.front)) {
                Ok(value) => XenbusState::parse(&String::from_utf8_lossy(&value)),
                Err(Error::NoEntry) => XenbusState::Unknown,
                // The watch tells when the store is there again.
                Err(_) => return true,
            };
            match step(self.phase, front, self.leaving) {
                Action::Nothing => return true,
                Action::Remove => return false,
                Action::Connect => self.connect(),
                Action::Go(phase) => {
                    if phase != Phase::Closing {
                        self.disconnect();
                    }
                    self.go(phase);
                }
            }
        }
    }

    fn obey(&mut self, errand: Errand) -> Result<(), String> {
        match errand {
            Errand::Settle(deadline) => self.backend.settle(deadline),
            Errand::Flush => self.backend.flush(),
            Errand::LetGo => {
                self.let_go = true;
                self.backend.disconnect();
                self.backend.let_go()
            }
            Errand::TakeAgain => {
                if !self.let_go {
                    return Ok(());
                }
                self.backend.take_again()?;
                if self.connected {
                    // The rings are as they were left.
                    let nodes = self.attach().map_err(|fault| fault.to_string())?;
                    if self.phase == Phase::Connected {
                        // The guest is told once more: an interface announces itself where it is now.
                        self.write(&nodes);
                        self.show();
                    }
                }
                self.let_go = false;
                Ok(())
            }
        }
    }

    fn disconnect(&mut self) {
        self.backend.disconnect();
        self.connected = false;
    }

    fn connect(&mut self) {
        match self.attach() {
            Ok(nodes) => {
                self.connected = true;
                self.write(&nodes);
                self.go(Phase::Connected);
            }
            Err(fault) => self.fail(&fault.to_string()),
        }
    }

    fn attach(&mut self) -> Result<Vec<Node>, ConnectError> {
        let front = Frontend {
            store: &*self.store,
            xen: &self.xen,
            path: &self.paths.front,
            alarm: self.mailbox.alarm(),
            ports: Mutex::default(),
        };
        let connected = self.backend.connect(&front);
        lock(&self.mailbox.inbox).ports = std::mem::take(&mut *lock(&front.ports));
        connected
    }

    /// The guest broke the rules: it is told to close.
    fn fail(&mut self, reason: &str) {
        self.failures += 1;
        // A guest that does it again and again does not fill the log.
        if self.failures.is_power_of_two() {
            (self.log)(&format!(
                "Device {} of domain {} is closed (so far {} times): {reason}",
                self.id, self.domid, self.failures
            ));
        }
        let _ = self.store.write(&self.paths.error, reason.as_bytes());
        self.go(Phase::Closing);
    }

    fn start_leaving(&mut self) {
        if std::mem::replace(&mut self.leaving, true) {
            return;
        }
        self.write(&[("online".to_owned(), "0".to_owned())]);
        if self.phase == Phase::Connected {
            self.go(Phase::Closing);
        }
    }

    fn stop_leaving(&mut self) {
        let connected = XenbusState::Connected.number().to_string();
        let untouched = self
            .store
            .read(&format!("{}/state", self.paths.front))
            .is_ok_and(|state| state == connected.as_bytes());
        if self.leaving && self.phase == Phase::Closing && untouched {
            self.leaving = false;
            self.write(&[("online".to_owned(), "1".to_owned())]);
            self.go(Phase::Connected);
        }
    }

    /// The thing behind the device changed: its nodes are written again, and the state, for which the guest watches.
    fn renew(&mut self) {
        let nodes = self.backend.renewed();
        if !nodes.is_empty() && self.phase == Phase::Connected {
            self.write(&nodes);
            self.show();
        }
    }

    fn go(&mut self, phase: Phase) {
        self.phase = phase;
        self.show();
        lock(&self.mailbox.inbox).phase = phase;
        self.mailbox.changed.notify_all();
    }

    fn show(&mut self) {
        let number = self.phase.state().number().to_string();
        let done = self
            .store
            .write(&format!("{}/state", self.paths.back), number.as_bytes());
        self.unshown = done.is_err();
        self.report(done);
    }

    fn write(&self, nodes: &[Node]) {
        for (name, value) in nodes {
            self.report(
                self.store
                    .write(&format!("{}/{name}", self.paths.back), value.as_bytes()),
            );
        }
    }

    fn report(&self, done: Result<(), Error>) {
        if let Err(fault) = done {
            (self.log)(&format!(
                "The xenstore does not take the state of device {} of domain {}: {fault}",
                self.id, self.domid
            ));
        }
    }

    fn remove(&mut self) {
        if self.leaving {
            self.backend.abandon();
        }
        self.backend.disconnect();
        self.backend.leave();
        if self.paths.kept {
            // The guest's driver, which sees its directory go, waits for this or for the end of the other one.
            self.go(Phase::Closed);
        }
        for path in self.paths.own() {
            match self.store.remove(path) {
                Ok(()) | Err(Error::NoEntry) => {}
                failed => self.report(failed),
            }
        }
    }
}
