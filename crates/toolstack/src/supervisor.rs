//! One domain id from the machine's creation to its end, and what comes behind it: nothing, a new machine, or a domain
//! kept to be looked at.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hospes_config::{DomainConfig, EventAction, EventActions, Uuid};
use hospes_units::DomId;

use crate::clock::Utc;
use crate::error::Result;
use crate::hub::ConsoleHub;
use crate::launch;
use crate::machine::{Machine, MachineError, MachineFactory, MachineSpec};
use crate::paths::Paths;
use crate::protocol::{DomainInfo, EndReason, Ended, Launch, Until};
use crate::registry::{Record, Registry, Slot};
use crate::server::Server;

/// A domain that ended sooner than this after its start is restarted only then, so that one that cannot start does not
/// take the whole host's time. xl waits as long before every restart.
const RESTART_INTERVAL: Duration = Duration::from_secs(2);
/// How long commands that wait for the end, and readers of the console, get to hear of it.
const FAREWELL: Duration = Duration::from_secs(2);

/// A line in the domain's log, which standard error is.
macro_rules! log {
    ($($text:tt)*) => {
        eprintln!("{} {}", $crate::clock::Utc::now(), format_args!($($text)*))
    };
}
pub(crate) use log;

#[derive(Debug, Default)]
struct Progress {
    shutdown: Option<EndReason>,
    /// The domain's id is free; with the id that took its place.
    gone: Option<Option<DomId>>,
    destroy: bool,
    /// Connections that have still to report the end.
    waiting: usize,
}

/// One domain id.
pub(crate) struct Instance {
    pub(crate) domid: DomId,
    record: Mutex<Record>,
    machine: Arc<dyn Machine>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Instance {
    pub(crate) fn machine(&self) -> &dyn Machine {
        &*self.machine
    }

    pub(crate) fn info(&self) -> DomainInfo {
        let machine = self.machine.info();
        let (shutdown, dying) = {
            let progress = lock(&self.progress);
            (
                progress.shutdown.clone(),
                progress.destroy || progress.gone.is_some(),
            )
        };
        let record = lock(&self.record);
        let alive = shutdown.is_none();
        DomainInfo {
            domid: self.domid.0,
            name: record.name.clone(),
            uuid: record.uuid,
            memory_kib: machine.memory_kib,
            vcpus_online: machine.vcpus_online,
            cpu_time_ns: machine.cpu_time_ns,
            running: alive && machine.running,
            blocked: alive && machine.blocked,
            paused: machine.paused,
            shutdown,
            dying,
        }
    }

    pub(crate) fn has_shut_down(&self) -> bool {
        lock(&self.progress).shutdown.is_some()
    }

    /// Ends the domain for good, whatever its configuration says.
    pub(crate) fn destroy(&self) {
        lock(&self.progress).destroy = true;
        self.changed.notify_all();
        self.machine.destroy();
    }

    /// Announces a connection that will wait; [`Instance::forget_waiting`] takes it back.
    pub(crate) fn add_waiting(&self) {
        lock(&self.progress).waiting += 1;
    }

    pub(crate) fn forget_waiting(&self) {
        lock(&self.progress).waiting -= 1;
        self.changed.notify_all();
    }

    /// Waits a moment for the end; `None` where it has not come.
    pub(crate) fn wait_moment(&self, until: Until, moment: Duration) -> Option<Ended> {
        let mut progress = lock(&self.progress);
        if progress.ended(until).is_none() {
            progress = self
                .changed
                .wait_timeout(progress, moment)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        progress.ended(until)
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut lock(&self.progress));
        self.changed.notify_all();
    }

    /// Waits until a command destroys the domain or, where one is given, for a time; true where it was destroyed.
    fn wait_destroy(&self, time: Option<Duration>) -> bool {
        let deadline = time.map(|time| Instant::now() + time);
        let mut progress = lock(&self.progress);
        while !progress.destroy {
            progress = match deadline {
                None => self
                    .changed
                    .wait(progress)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.changed
                        .wait_timeout(progress, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
        true
    }

    /// Lets those who wait for the end hear of it.
    fn wait_heard(&self) {
        let deadline = Instant::now() + FAREWELL;
        let mut progress = lock(&self.progress);
        while progress.waiting > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            progress = self
                .changed
                .wait_timeout(progress, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Progress {
    fn ended(&self, until: Until) -> Option<Ended> {
        let done = self.gone.is_some() || (until == Until::Shutdown && self.shutdown.is_some());
        done.then(|| Ended {
            reason: self.shutdown.clone(),
            dead: self.gone.is_some(),
            next: self.gone.flatten().map(|domid| domid.0),
        })
    }
}

/// What is to be done with a domain that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    End,
    Restart,
    RenameRestart,
    Preserve,
}

/// The action for an end. A core dump cannot be written yet; the rest of such an action is done.
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

/// Why there is no domain.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Registry(#[from] crate::error::Error),
    #[error("{0}")]
    Machine(MachineError),
}

/// The domain of this process, through all its restarts.
pub(crate) struct Supervisor<'a> {
    factory: &'a dyn MachineFactory,
    paths: Paths,
    registry: Registry,
    hub: Arc<ConsoleHub>,
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
        self.instance.machine.unpause();
    }
}

impl<'a> Supervisor<'a> {
    pub(crate) fn new(
        factory: &'a dyn MachineFactory,
        paths: Paths,
        hub: Arc<ConsoleHub>,
        config: DomainConfig,
        uuid: Uuid,
    ) -> Supervisor<'a> {
        Supervisor {
            factory,
            registry: Registry::new(&paths),
            paths,
            hub,
            config,
            uuid,
        }
    }

    /// Creates the domain, paused.
    pub(crate) fn start(&self) -> std::result::Result<Current, StartError> {
        let slot = self
            .registry
            .allocate(&Record::new(&self.config, self.uuid))?;
        self.start_in(slot)
    }

    fn start_in(&self, slot: Slot) -> std::result::Result<Current, StartError> {
        match self.build(&slot) {
            Ok((server, instance)) => Ok(Current {
                slot,
                server,
                instance,
                started: Instant::now(),
            }),
            Err(fault) => {
                self.release(slot);
                Err(fault)
            }
        }
    }

    fn build(&self, slot: &Slot) -> std::result::Result<(Server, Arc<Instance>), StartError> {
        let spec = MachineSpec {
            domid: slot.domid(),
            uuid: self.uuid,
            config: &self.config,
            promised_bytes: self.registry.promised_bytes(slot.domid())?,
        };
        let machine = self
            .factory
            .create(&spec, self.hub.writer())
            .map_err(StartError::Machine)?;
        self.hub.connect(Some(machine.clone()));
        let instance = Arc::new(Instance {
            domid: slot.domid(),
            record: Mutex::new(Record::new(&self.config, self.uuid)),
            machine,
            progress: Mutex::default(),
            changed: Condvar::new(),
        });
        let server = Server::start(slot.dir(), &instance, &self.hub)?;
        Ok((server, instance))
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

    /// Lives through the domain and all that come behind it.
    pub(crate) fn run(&self, mut current: Current) {
        loop {
            let domid = current.domid();
            log!(
                "Waiting for domain {} (domid {domid}) to die [pid {}]",
                self.config.name,
                std::process::id()
            );
            let reason = current.instance.machine.wait();
            self.report(domid, &reason);
            let (action, mut next) = choose(&reason, &self.config.on);
            if let Some(action) = action {
                log!(
                    "Action for shutdown reason code {} is {}",
                    reason.code().unwrap_or(0),
                    action.as_str()
                );
                if matches!(
                    action,
                    EventAction::CoredumpDestroy | EventAction::CoredumpRestart
                ) {
                    log!("Core dumps are not supported yet: none is written");
                }
            }
            if reason != EndReason::Destroyed {
                current
                    .instance
                    .update(|progress| progress.shutdown = Some(reason));
            }
            if next == Next::RenameRestart {
                next = self.rename_and_restart(&current);
            }
            match next {
                Next::Preserve | Next::RenameRestart => {
                    current.instance.wait_destroy(None);
                    return self.end(current);
                }
                Next::End => return self.end(current),
                Next::Restart => {}
            }
            let rest = RESTART_INTERVAL.saturating_sub(current.started.elapsed());
            if current.instance.wait_destroy(Some(rest)) {
                return self.end(current);
            }
            log!("Rebooting now");
            current = match self.restart(current) {
                Ok(current) => current,
                Err(fault) => {
                    log!("The domain cannot be restarted: {fault}");
                    return self.close();
                }
            };
            current.unpause();
        }
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

    /// A new machine with a new id in the same process; who watches the console keeps doing so.
    fn restart(&self, current: Current) -> std::result::Result<Current, StartError> {
        let Current {
            slot,
            server,
            instance,
            ..
        } = current;
        server.stop();
        self.hub.connect(None);
        instance.machine.destroy();
        let slot = self
            .registry
            .replace(slot, &Record::new(&self.config, self.uuid))?;
        instance.update(|progress| progress.gone = Some(Some(slot.domid())));
        instance.wait_heard();
        // The old machine's memory has to be free before the new one asks for its own.
        drop(instance);
        self.start_in(slot)
    }

    /// Gives the ended domain another name and starts a new one in a process of its own.
    fn rename_and_restart(&self, current: &Current) -> Next {
        match self.try_rename_and_restart(current) {
            Ok(domid) => log!("Domain {} goes on as domain {domid}", self.config.name),
            // As in xl, the old domain is left in place.
            Err(fault) => log!("The domain cannot be renamed and restarted: {fault}"),
        }
        Next::Preserve
    }

    fn try_rename_and_restart(&self, current: &Current) -> Result<DomId> {
        let name = format!("{}{}", self.config.name, Utc::now().name_suffix());
        log!(
            "Preserving domain {} {} as {name}",
            current.domid(),
            self.config.name
        );
        let mut record = Record::new(&self.config, launch::random_uuid()?);
        record.name = name;
        self.registry.update(&current.slot, &record)?;
        *lock(&current.instance.record) = record;
        let launch = Launch {
            config: DomainConfig {
                uuid: Some(self.uuid),
                ..self.config.clone()
            },
            paused: false,
            run: self.paths.run.clone(),
            log: self.paths.log.clone(),
        };
        Ok(launch::start_process(&launch)?.domid)
    }

    /// Ends the present domain id, and with it the process.
    fn end(&self, current: Current) {
        let Current {
            slot,
            server,
            instance,
            ..
        } = current;
        self.hub.connect(None);
        instance.machine.destroy();
        server.stop();
        self.release(slot);
        instance.update(|progress| progress.gone = Some(None));
        self.close();
        instance.wait_heard();
        log!("Done. Exiting now");
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
