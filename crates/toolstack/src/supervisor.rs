//! One domain id from the machine's creation to its end, and what comes behind it: nothing, a new machine, or a domain
//! kept to be looked at.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hospes_config::{DomainConfig, EventAction, EventActions, Uuid};
use hospes_store_server::{Place, StoreClient};
use hospes_units::DomId;

use crate::apart::{self, Program};
use crate::clock::Utc;
use crate::dumping;
use crate::ending::{Ending, Unmade};
use crate::error::{Error, Result};
use crate::hub::ConsoleHub;
use crate::instance::{ChangeError, FAREWELL, Instance};
use crate::launch;
use crate::log::log;
use crate::machine::{MachineError, MachineSpec, SavedStream};
use crate::paths::Paths;
use crate::protocol::{EndReason, Launch, incoming_name};
use crate::registry::{Entry, Record, Registry, Slot};
use crate::server::Server;
use crate::standing::Standing;
use crate::state::Promised;
use crate::store;

/// A domain that ended sooner than this after its start is restarted only then, so that one that cannot start does not
/// take the whole host's time. xl waits as long before every restart.
const RESTART_INTERVAL: Duration = Duration::from_secs(2);

/// What is to be done with a domain that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    End,
    Restart,
    RenameRestart,
    Preserve,
}

/// The action for an end, and what comes behind it.
fn choose(reason: &EndReason, on: &EventActions) -> (Option<EventAction>, Next) {
    let action = match reason {
        EndReason::Poweroff => on.poweroff,
        EndReason::Reboot => on.reboot,
        EndReason::Crash(_) => on.crash,
        EndReason::Watchdog => on.watchdog,
        EndReason::SoftReset => on.soft_reset,
        EndReason::Destroyed => return (None, Next::End),
        // Its state is all that is left of a suspended guest.
        EndReason::Suspend => return (None, Next::Preserve),
    };
    let next = match action {
        EventAction::Destroy | EventAction::CoredumpDestroy => Next::End,
        EventAction::Restart | EventAction::CoredumpRestart | EventAction::SoftReset => {
            Next::Restart
        }
        EventAction::RenameRestart => Next::RenameRestart,
        EventAction::Preserve => Next::Preserve,
    };
    (Some(action), next)
}

/// Does what needs the lock of the registry. However long another has it, the domain does not end for that.
fn insist<T>(given_up: impl Fn() -> bool, attempt: impl Fn() -> Result<T>) -> Result<T> {
    let mut told = false;
    loop {
        match attempt() {
            Err(fault @ Error::Locked { .. }) if !given_up() => {
                if !std::mem::replace(&mut told, true) {
                    log!("The domain waits until it can be written down: {fault}");
                }
            }
            outcome => return outcome,
        }
    }
}

/// Why there is no domain.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Registry(#[from] crate::error::Error),
    #[error("{0}")]
    Machine(MachineError),
    /// A command has destroyed it before it was there; with what that cut short.
    #[error("{0}")]
    Destroyed(MachineError),
}

/// The domain of this process, through all its restarts.
pub(crate) struct Supervisor<'a> {
    program: &'a dyn Program,
    store: StoreClient,
    place: Place,
    paths: Paths,
    registry: Registry,
    hub: Arc<ConsoleHub>,
    ending: Arc<Ending>,
    /// At the first start; later the record has it.
    config: DomainConfig,
    uuid: Uuid,
}

/// What belongs to the present domain id.
pub(crate) struct Current {
    slot: Slot,
    server: Server,
    instance: Arc<Instance>,
    started: Instant,
}

impl Current {
    pub(crate) fn domid(&self) -> DomId {
        self.slot.domid()
    }

    pub(crate) fn unpause(&self) {
        self.instance.machine().unpause();
    }
}

impl StartError {
    /// Whether the domain's name, and with it the log of that name, is another's.
    pub(crate) fn is_of_name(&self) -> bool {
        matches!(self, StartError::Registry(Error::NameTaken { .. }))
    }
}

impl<'a> Supervisor<'a> {
    pub(crate) fn new(
        program: &'a dyn Program,
        paths: Paths,
        hub: Arc<ConsoleHub>,
        ending: Arc<Ending>,
        config: DomainConfig,
        uuid: Uuid,
        store: StoreClient,
    ) -> Supervisor<'a> {
        Supervisor {
            program,
            store,
            place: store::place(&paths),
            registry: Registry::new(&paths),
            paths,
            hub,
            ending,
            config,
            uuid,
        }
    }

    /// Creates the domain, or restores it, paused. `next` is what it is started with the next time, where that is something else.
    pub(crate) fn start(
        &self,
        saved: Option<SavedStream>,
        next: Option<DomainConfig>,
    ) -> std::result::Result<Current, StartError> {
        let record = Record {
            next,
            ..Record::new(&self.config, self.uuid)
        };
        let slot = self.registry.allocate(&record)?;
        let slot = self.begin(slot)?;
        self.start_in(slot, record, saved, Standing::Here)
    }

    /// From here on the domain can be given up before it is there.
    fn begin(&self, slot: Slot) -> std::result::Result<Slot, StartError> {
        let unmade = Unmade {
            domid: slot.domid(),
            registry: self.registry.clone(),
            hub: self.hub.clone(),
        };
        match self.ending.set_building(unmade) {
            true => Ok(slot),
            false => {
                self.release(slot);
                Err(StartError::Destroyed("it is to end for good".into()))
            }
        }
    }

    /// The same for a domain that comes from another host and shows `passport`: `accepted` is called when it may, before the stream is read. It gets its name and UUID by
    /// [`Supervisor::arrive`], for on this host the domain may still be what it comes from.
    pub(crate) fn receive(
        &self,
        saved: SavedStream,
        next: Option<DomainConfig>,
        passport: &str,
        accepted: &dyn Fn(),
    ) -> std::result::Result<Current, StartError> {
        let entries = self.registry.entries()?.into_iter();
        let same = |entry: &Entry| entry.record.name == self.config.name;
        let mut others = entries.filter(|entry| entry.record.uuid != self.uuid);
        if let Some(other) = others.find(same) {
            let name = other.record.name;
            let domid = other.domid;
            return Err(Error::NameTaken { name, domid }.into());
        }
        let record = Record {
            next,
            name: incoming_name(&self.config.name),
            ..Record::new(&self.config, launch::random_uuid()?)
        };
        let slot = self.registry.allocate(&record)?;
        let slot = self.begin(slot)?;
        match self.admit(&slot, passport) {
            Ok(()) => accepted(),
            Err(fault) => {
                self.release(slot);
                return Err(fault);
            }
        }
        self.start_in(slot, record, Some(saved), Standing::Arriving)
    }

    fn admit(&self, slot: &Slot, passport: &str) -> std::result::Result<(), StartError> {
        let spec = self.spec(slot, &self.config);
        let admitted = self.program.admit(&spec, passport);
        admitted.map_err(StartError::Machine)
    }

    /// Makes a domain that has come from another host this one's. Returns what the user should know; an error where a command has destroyed it.
    pub(crate) fn arrive(&self, current: &Current) -> Result<Option<String>> {
        let instance = &current.instance;
        if instance.is_destroyed() {
            return Err(Error::Gone {
                domid: current.domid(),
            });
        }
        // The guest is nobody else's any more: it runs whatever its name is.
        let settled = instance.settle_in(&self.config.name, self.uuid);
        instance.set_standing(Standing::Here);
        Ok(settled.err().map(|fault| {
            let name = incoming_name(&self.config.name);
            format!("it is called {name} here, for it cannot have its own name: {fault}")
        }))
    }

    fn start_in(
        &self,
        slot: Slot,
        record: Record,
        saved: Option<SavedStream>,
        standing: Standing,
    ) -> std::result::Result<Current, StartError> {
        let (server, instance) = match self.build(&slot, record, saved, standing) {
            Ok(built) => built,
            Err(fault) => {
                self.release(slot);
                return Err(fault);
            }
        };
        self.ending.set_built(&instance);
        let ready = instance.machine().make_ready();
        let current = Current {
            slot,
            server,
            instance,
            started: Instant::now(),
        };
        match ready {
            Ok(()) => {
                self.ending.set_ready(&current.instance);
                Ok(current)
            }
            Err(fault) => {
                let destroyed = current.instance.is_destroyed();
                self.take_out(current);
                Err(match destroyed {
                    true => StartError::Destroyed(fault),
                    false => StartError::Machine(fault),
                })
            }
        }
    }

    fn build(
        &self,
        slot: &Slot,
        mut record: Record,
        saved: Option<SavedStream>,
        standing: Standing,
    ) -> std::result::Result<(Server, Arc<Instance>), StartError> {
        let spec = self.spec(slot, &record.config);
        let (place, console) = (self.place.clone(), self.hub.writer());
        // What looks at a kernel or a saved stream is known before it does.
        let mut started = |process| {
            let machine = Some(process);
            let known = Record {
                machine,
                ..record.clone()
            };
            let given_up = || self.ending.is_asked();
            insist(given_up, || self.registry.update(slot.domid(), &known))
        };
        let machine = apart::start(self.program, &spec, place, saved, console, &mut started);
        let machine = Arc::new(machine.map_err(StartError::Machine)?);
        record.machine = Some(machine.process());
        self.hub.connect(Some(machine.clone()));
        let instance = Arc::new(Instance::new(
            slot.domid(),
            self.registry.clone(),
            record,
            machine,
            self.hub.clone(),
        ));
        instance.set_standing(standing);
        let server = Server::start(slot.dir(), &instance, &self.hub, &self.ending)?;
        Ok((server, instance))
    }

    fn spec<'b>(&'b self, slot: &Slot, config: &'b DomainConfig) -> MachineSpec<'b> {
        MachineSpec {
            domid: slot.domid(),
            uuid: self.uuid,
            config,
            promised: Promised::to_others_than(slot.domid(), &self.registry),
            store: &self.store,
        }
    }

    fn release(&self, slot: Slot) {
        if let Err(fault) = self.registry.release(slot) {
            log!("{fault}");
        }
    }

    /// Ends a domain that has just been started, because nobody will know of it.
    pub(crate) fn abandon(&self, current: Current) {
        self.end(current);
    }

    /// Lives through the domain and all that come behind it. An error where it was to start again and could not.
    pub(crate) fn run(&self, mut current: Current) -> std::result::Result<(), StartError> {
        loop {
            let domid = current.domid();
            log!(
                "Waiting for domain {} (domid {domid}) to die [pid {}]",
                current.instance.config().name,
                std::process::id()
            );
            let reason = current.instance.machine().wait();
            current.instance.hang_up();
            self.report(domid, &reason);
            let (mut action, mut next) = choose(&reason, &current.instance.config().on);
            // What comes behind it would be a second copy.
            if current.instance.is_given_away() {
                log!("The domain was given away to another host: nothing comes behind it here");
                (action, next) = (None, Next::End);
            }
            if let Some(action) = action {
                log!(
                    "Action for shutdown reason code {} is {}",
                    reason.code().unwrap_or(0),
                    action.as_str()
                );
            }
            if reason != EndReason::Destroyed {
                current.instance.update(|progress| {
                    progress.shutdown = Some(reason);
                    progress.returns = matches!(next, Next::Restart | Next::RenameRestart);
                    progress.leaves = next == Next::End;
                });
                // Whoever hears of it finds the domain as it is now.
                self.store.shut_down(domid);
            }
            if matches!(
                action,
                Some(EventAction::CoredumpDestroy | EventAction::CoredumpRestart)
            ) {
                self.dump_core(&current.instance);
            }
            if self.ending.is_asked() {
                log!("The domain is to end for good: nothing comes behind it");
                break self.end(current);
            }
            if next == Next::RenameRestart {
                // A command that comes while the domain still has its name means all of it.
                if self.rest(&current) {
                    break self.end(current);
                }
                next = self.rename_and_restart(&current);
            }
            match next {
                Next::Preserve | Next::RenameRestart => {
                    current.instance.wait_destroy(None);
                    break self.end(current);
                }
                Next::End => break self.end(current),
                Next::Restart => {}
            }
            if self.rest(&current) {
                break self.end(current);
            }
            log!("Rebooting now");
            current = match self.restart(current) {
                Ok(Some(current)) => current,
                Ok(None) => break,
                Err(fault) => {
                    log!("The domain cannot be restarted: {fault}");
                    self.close();
                    return Err(fault);
                }
            };
            current.unpause();
        }
        Ok(())
    }

    /// Waits until the domain may start again; true where a command destroys it before.
    fn rest(&self, current: &Current) -> bool {
        let rest = RESTART_INTERVAL.saturating_sub(current.started.elapsed());
        current.instance.wait_destroy(Some(rest))
    }

    fn report(&self, domid: DomId, reason: &EndReason) {
        match (reason, reason.code()) {
            (EndReason::Crash(cause), Some(code)) => {
                log!(
                    "Domain {domid} has shut down, reason code {code}: the guest crashed: {cause}"
                );
            }
            (_, Some(code)) => log!("Domain {domid} has shut down, reason code {code}"),
            (_, None) => log!("Domain {domid} has been destroyed"),
        }
    }

    /// Writes the core file of a guest that has ended. Whether it can or not, what is to happen with the domain happens.
    fn dump_core(&self, instance: &Instance) {
        let path = self.paths.core(&instance.config().name);
        log!("Dumping core to {}", path.display());
        let dumped = self.paths.create_dump().map_err(MachineError::from);
        let given_up = || instance.is_destroyed();
        let dumped = dumped.and_then(|()| dumping::dump(instance.machine(), &path, &given_up));
        match dumped {
            Ok(()) => log!("The core is dumped"),
            Err(fault) => log!("The core is not dumped: {fault}"),
        }
    }

    /// A new machine with a new id in the same process; who watches the console keeps doing so. `None` where a command
    /// has destroyed the domain in the last moment.
    fn restart(&self, current: Current) -> std::result::Result<Option<Current>, StartError> {
        let Current {
            slot,
            server,
            instance,
            ..
        } = current;
        server.stop();
        self.hub.connect(None);
        instance.machine().leave();
        instance.hand_on();
        let (slot, record) = self.replace(slot, &instance)?;
        if !instance.succeed(slot.domid()) {
            self.finish(slot, &instance);
            self.close();
            log!("Done. Exiting now");
            return Ok(None);
        }
        instance.wait_heard();
        // The old machine's memory has to be free before the new one asks for its own.
        drop(instance);
        let started = self.begin(slot);
        let started = started.and_then(|slot| self.start_in(slot, record, None, Standing::Here));
        match started {
            Err(StartError::Destroyed(fault)) => {
                log!("The domain was destroyed before it had started again: {fault}");
                self.close();
                Ok(None)
            }
            started => started.map(Some),
        }
    }

    fn replace(&self, old: Slot, instance: &Instance) -> Result<(Slot, Record)> {
        let next = |record: Record| Record::new(&record.next_config(), self.uuid);
        insist(
            || self.is_to_end(instance),
            || self.registry.replace(&old, next),
        )
    }

    /// Whether nothing is to come behind a domain, whatever its configuration says.
    fn is_to_end(&self, instance: &Instance) -> bool {
        instance.is_destroyed() || self.ending.is_asked()
    }

    /// Gives the ended domain another name and starts a new one in a process of its own.
    fn rename_and_restart(&self, current: &Current) -> Next {
        // The memory that it has not used is its successor's.
        current.instance.update(|progress| progress.returns = false);
        let successor = self.try_rename_and_restart(current);
        match &successor {
            Ok(domid) => log!("The domain goes on as domain {domid}"),
            // As in xl, the old domain is left in place.
            Err(fault) => log!("The domain cannot be renamed and restarted: {fault}"),
        }
        if successor.is_ok() || !current.instance.is_destroyed() {
            current.instance.update(|progress| {
                progress.successor = Some(successor.map_err(|fault| fault.to_string()));
            });
        }
        Next::Preserve
    }

    fn try_rename_and_restart(&self, current: &Current) -> std::result::Result<DomId, ChangeError> {
        let suffix = Utc::now().name_suffix();
        let instance = &current.instance;
        let uuid = launch::random_uuid()?;
        let become_another = || match instance.become_another(&suffix, uuid) {
            Err(ChangeError::Registry(fault)) => Err(fault),
            outcome => Ok(outcome),
        };
        let config = insist(|| self.is_to_end(instance), become_another)??;
        if current.instance.wait_destroy(Some(Duration::ZERO)) {
            return Err(Error::Gone {
                domid: current.domid(),
            }
            .into());
        }
        // The new domain has the same disks, and no two may write one.
        current.instance.machine().give_up_devices();
        let launch = Launch {
            config: DomainConfig {
                uuid: Some(self.uuid),
                ..config
            },
            paused: false,
            restore: false,
            next: None,
            passport: None,
            paths: self.paths.clone(),
        };
        Ok(launch::start_process(&launch)?.domid)
    }

    /// Ends the present domain id, and with it the process.
    fn end(&self, current: Current) {
        self.take_out(current);
        self.close();
        log!("Done. Exiting now");
    }

    /// Ends a domain id, and lets those hear of it who wait for that.
    fn take_out(&self, current: Current) {
        let Current {
            slot,
            server,
            instance,
            ..
        } = current;
        self.hub.connect(None);
        instance.machine().leave();
        server.stop();
        self.finish(slot, &instance);
    }

    /// What is left to do when the machine is gone and nothing comes behind it.
    fn finish(&self, slot: Slot, instance: &Instance) {
        self.release(slot);
        instance.update(|progress| progress.gone = Some(None));
        instance.wait_heard();
    }

    fn close(&self) {
        self.hub.close(FAREWELL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choose_follows_the_actions() {
        let on = EventActions {
            poweroff: EventAction::Preserve,
            reboot: EventAction::Restart,
            watchdog: EventAction::CoredumpRestart,
            crash: EventAction::CoredumpDestroy,
            soft_reset: EventAction::RenameRestart,
        };
        let cases = [
            (EndReason::Poweroff, Next::Preserve),
            (EndReason::Reboot, Next::Restart),
            (EndReason::Watchdog, Next::Restart),
            (EndReason::Crash("x".into()), Next::End),
            (EndReason::SoftReset, Next::RenameRestart),
            (EndReason::Suspend, Next::Preserve),
            (EndReason::Destroyed, Next::End),
        ];
        for (reason, next) in cases {
            assert_eq!(choose(&reason, &on).1, next, "{reason:?}");
        }
    }
}
