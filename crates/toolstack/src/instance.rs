//! One domain id: its machine, its record, and how far it has come.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use hospes_config::{DiskConfig, DomainConfig, Uuid, Vdev, VifConfig};
use hospes_units::DomId;

use crate::apart::RemoteMachine;
use crate::busy::Line;
use crate::error::{Error, Result};
use crate::hub::ConsoleHub;
use crate::machine::{Machine, MachineError};
use crate::protocol::{DeviceKind, DomainInfo, EndReason, Ended, Until};
use crate::registry::{Record, Registry};
use crate::scheduling::Share;
use crate::standing::Standing;
use crate::state::Promised;

/// How long commands that wait for the end, and readers of the console, get to hear of it.
pub(crate) const FAREWELL: Duration = Duration::from_secs(2);
/// How often it is looked whether a change has been made.
const LOOK: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) shutdown: Option<EndReason>,
    /// It has shut down and is about to start again.
    pub(crate) returns: bool,
    /// It has shut down and is about to be gone.
    pub(crate) leaves: bool,
    /// What comes behind it is being made of its configuration.
    handed_on: bool,
    /// The domain's id is free; with the id that took its place.
    pub(crate) gone: Option<Option<DomId>>,
    /// It is kept, and this one was to take its place; or why there is none.
    pub(crate) successor: Option<std::result::Result<DomId, String>>,
    destroy: bool,
    /// Connections that have still to report the end.
    waiting: usize,
}

/// One domain id.
pub(crate) struct Instance {
    pub(crate) domid: DomId,
    pub(crate) registry: Registry,
    pub(crate) record: Mutex<Record>,
    /// Held while the record and the machine are changed together.
    pub(crate) changes: Mutex<()>,
    pub(crate) saving: AtomicBool,
    /// The guest is to suspend itself, or is suspended, and nothing else is asked of it. Held while something is.
    pub(crate) deaf: Mutex<bool>,
    pub(crate) line: Mutex<Line>,
    pub(crate) standing: Mutex<Standing>,
    pub(crate) machine: Arc<RemoteMachine>,
    pub(crate) hub: Arc<ConsoleHub>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

/// Why a change to a running domain was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    #[error(transparent)]
    Registry(#[from] Error),
    #[error("{0}")]
    Machine(MachineError),
    #[error("{0} is in use already: choose another device")]
    Used(String),
    #[error("there is no {0} to take away: see what is attached by block-list or network-list")]
    Missing(String),
    #[error(
        "there is no CD-ROM drive {0}: `list -l` shows the drives there are; block-attach with devtype=cdrom adds one with a medium"
    )]
    NoDrive(Vdev),
    #[error("{0}")]
    Drive(&'static str),
    #[error("{0}")]
    Moving(&'static str),
    #[error("{0}")]
    Fixed(String),
    #[error(
        "{0}; the device is attached and could not be taken away again ({1}): restart or destroy the domain to be rid of it"
    )]
    Stays(Error, MachineError),
    #[error(
        "{0}; the drive has changed and could not get back what it had ({1}): change its medium once more"
    )]
    Changed(Error, MachineError),
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Instance {
    pub(crate) fn new(
        domid: DomId,
        registry: Registry,
        record: Record,
        machine: Arc<RemoteMachine>,
        hub: Arc<ConsoleHub>,
    ) -> Instance {
        Instance {
            domid,
            registry,
            record: Mutex::new(record),
            changes: Mutex::default(),
            saving: AtomicBool::new(false),
            deaf: Mutex::default(),
            line: Mutex::default(),
            standing: Mutex::default(),
            machine,
            hub,
            progress: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn machine(&self) -> &dyn Machine {
        &*self.machine
    }

    pub(crate) fn info(&self) -> DomainInfo {
        let machine = self.machine.info();
        let (shutdown, returns, dying) = {
            let progress = lock(&self.progress);
            (
                progress.shutdown.clone(),
                progress.returns,
                progress.destroy || progress.gone.is_some(),
            )
        };
        // Whoever has the standing may want the record next.
        let moving = self.is_moving() || self.is_being_saved();
        let held = self.held();
        let record = lock(&self.record);
        let alive = shutdown.is_none();
        // As in xl, of one that is being destroyed no more is told than that.
        let lives = alive && !dying;
        DomainInfo {
            domid: self.domid.0,
            name: record.name.clone(),
            uuid: record.uuid,
            memory_kib: machine.memory_kib,
            // One that has ended takes no more; one that is about to start again wants as much as before.
            promised_kib: if alive || returns {
                machine.promised_kib
            } else {
                0
            },
            vcpus_online: machine.vcpus_online,
            cpu_time_ns: machine.cpu_time_ns,
            running: lives && machine.running,
            blocked: lives && machine.blocked,
            paused: machine.paused && !dying,
            shutdown,
            dying,
            traffic: self.machine.traffic(),
            waiting: self.machine.waiting(),
            moving,
            held,
        }
    }

    /// Whether a command has destroyed it.
    pub(crate) fn is_destroyed(&self) -> bool {
        lock(&self.progress).destroy
    }

    /// Name and UUID that it has now.
    pub(crate) fn identity(&self) -> (String, Uuid) {
        let record = lock(&self.record);
        (record.name.clone(), record.uuid)
    }

    pub(crate) fn has_shut_down(&self) -> bool {
        lock(&self.progress).shutdown.is_some()
    }

    /// What is said to those who want something of a domain that has shut down and is about to start again.
    pub(crate) const RETURNS: &str =
        "it has shut down and is about to start again: try again in a moment";

    /// Whether it has shut down and is about to start again.
    pub(crate) fn returns(&self) -> bool {
        lock(&self.progress).returns
    }

    /// Whether changes come too late for what comes behind it, which is to be asked for them.
    pub(crate) fn has_handed_on(&self) -> bool {
        lock(&self.progress).handed_on
    }

    /// What comes behind it is about to be made of its record: a change that is being made has a while to be written there, and others are refused from here on.
    pub(crate) fn hand_on(&self) {
        self.update(|progress| progress.handed_on = true);
        let deadline = Instant::now() + FAREWELL;
        while matches!(self.changes.try_lock(), Err(TryLockError::WouldBlock))
            && Instant::now() < deadline
        {
            thread::sleep(LOOK);
        }
    }

    /// The configuration with what has changed since the start.
    pub(crate) fn config(&self) -> DomainConfig {
        let record = lock(&self.record);
        DomainConfig {
            name: record.name.clone(),
            ..record.config.clone()
        }
    }

    /// The configuration of the next start.
    pub(crate) fn next_config(&self) -> DomainConfig {
        lock(&self.record).next_config()
    }

    /// The configuration of the next start, where it was set apart.
    pub(crate) fn prepared_config(&self) -> Option<DomainConfig> {
        lock(&self.record).next.clone()
    }

    /// Changes the record, here and in the registry.
    pub(crate) fn set_record(&self, record: Record) -> Result<()> {
        self.registry.update(self.domid, &record)?;
        *lock(&self.record) = record;
        Ok(())
    }

    /// Makes a change to what the domain has, and to what it will have after the next start.
    fn change_config(&self, change: impl Fn(&mut DomainConfig)) -> Result<()> {
        let mut record = lock(&self.record).clone();
        change(&mut record.config);
        record.next.as_mut().map(&change);
        self.set_record(record)
    }

    /// Begins a change that a command wants, and refuses it where the domain was saved or given away while it had to wait, or starts again.
    pub(crate) fn begin_change(&self) -> std::result::Result<MutexGuard<'_, ()>, ChangeError> {
        let (_, uuid) = self.identity();
        let changes = lock(&self.changes);
        // One that is kept by `rename-restart` has left its UUID to the domain that was meant.
        let is_kept = || self.has_shut_down() && self.identity().1 != uuid;
        let returns = || (self.has_handed_on() || is_kept()).then(|| Instance::RETURNS.into());
        match self.is_fixed().or_else(returns) {
            Some(why) => Err(ChangeError::Fixed(why)),
            None => Ok(changes),
        }
    }

    /// Takes another configuration for the next start.
    pub(crate) fn update_config(
        &self,
        config: DomainConfig,
    ) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        let mut record = lock(&self.record).clone();
        record.next = Some(config);
        Ok(self.set_record(record)?)
    }

    /// Changes the share of the host's CPUs, for this domain and what it is restarted as.
    pub(crate) fn set_share(
        &self,
        weight: Option<u16>,
        cap: Option<u16>,
    ) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        let now = self.machine.share();
        let share = Share {
            weight: weight.unwrap_or(now.weight),
            cap: cap.unwrap_or(now.cap),
        };
        self.machine
            .set_share(share)
            .map_err(ChangeError::Machine)?;
        Ok(self.change_config(|config| {
            config.scheduling.weight = Some(share.weight);
            config.scheduling.cap = Some(share.cap);
        })?)
    }

    /// Changes how many vCPUs the guest uses, for this domain and what it is restarted as; the next start may have fewer at most.
    pub(crate) fn set_vcpus(&self, online: u32) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        self.machine
            .set_vcpus(online)
            .map_err(ChangeError::Machine)?;
        Ok(self.change_config(|config| config.vcpus = online.min(config.maxvcpus))?)
    }

    /// Changes how much memory the guest is to have, for this domain and what it is restarted as; the next start may have less at most.
    pub(crate) fn set_memory_target(&self, kib: u64) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        self.machine
            .set_memory_target(kib, &|| self.promised_to_others())
            .map_err(ChangeError::Machine)?;
        Ok(self.change_config(|config| {
            config.target_kib = Some(kib.min(config.memory_max_kib()));
        })?)
    }

    /// Changes how much memory the guest may have. As in xl, the next start does not know of it.
    pub(crate) fn set_memory_max(&self, kib: u64) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        self.machine
            .set_memory_max(kib, &|| self.promised_to_others())
            .map_err(ChangeError::Machine)
    }

    /// What other domains may still take of the host's memory, in bytes.
    fn promised_to_others(&self) -> u64 {
        Promised::to_others_than(self.domid, &self.registry).bytes()
    }

    pub(crate) fn attach_disk(&self, disk: DiskConfig) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        let number = disk.vdev.number;
        let has = |config: &DomainConfig| config.disks.iter().any(|d| d.vdev.number == number);
        if has(&self.config()) {
            return Err(ChangeError::Used(disk.vdev.name));
        }
        self.machine
            .attach_disk(&disk)
            .map_err(ChangeError::Machine)?;
        let written = self.change_config(|config| {
            if !has(config) {
                config.disks.push(disk.clone());
            }
        });
        self.keep_attached(written, DeviceKind::Disk, number)
    }

    pub(crate) fn attach_vif(&self, mut vif: VifConfig) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        let config = self.config();
        let has = |config: &DomainConfig, devid: u32| {
            config.vifs.iter().any(|other| other.devid == Some(devid))
        };
        let devid = match vif.devid {
            Some(devid) if has(&config, devid) => {
                return Err(ChangeError::Used(format!("network interface {devid}")));
            }
            Some(devid) => devid,
            // One more than there are interfaces is enough numbers.
            None => (0..=config.vifs.len() as u32)
                .find(|devid| !has(&config, *devid))
                .unwrap_or(0),
        };
        vif.devid = Some(devid);
        self.machine
            .attach_vif(&vif)
            .map_err(ChangeError::Machine)?;
        let written = self.change_config(|config| {
            if !has(config, devid) {
                config.vifs.push(vif.clone());
            }
        });
        self.keep_attached(written, DeviceKind::Vif, devid)
    }

    /// Takes a device that was just attached away again where it could not be written down: no command would find it.
    fn keep_attached(
        &self,
        written: Result<()>,
        kind: DeviceKind,
        devid: u32,
    ) -> std::result::Result<(), ChangeError> {
        let Err(fault) = written else {
            return Ok(());
        };
        match self.machine.detach_device(kind, devid, true) {
            Ok(()) => Err(fault.into()),
            Err(kept) => Err(ChangeError::Stays(fault, kept)),
        }
    }

    pub(crate) fn detach(
        &self,
        kind: DeviceKind,
        devid: u32,
        force: bool,
    ) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        let config = self.config();
        let there = match kind {
            DeviceKind::Disk => config.disks.iter().any(|disk| disk.vdev.number == devid),
            DeviceKind::Vif => config.vifs.iter().any(|vif| vif.devid == Some(devid)),
        };
        if !there {
            return Err(ChangeError::Missing(match kind {
                DeviceKind::Disk => format!("disk {}", Vdev::of_number(devid)),
                DeviceKind::Vif => format!("network interface {devid}"),
            }));
        }
        self.machine
            .detach_device(kind, devid, force)
            .map_err(ChangeError::Machine)?;
        Ok(self.change_config(|config| match kind {
            DeviceKind::Disk => config.disks.retain(|disk| disk.vdev.number != devid),
            DeviceKind::Vif => config.vifs.retain(|vif| vif.devid != Some(devid)),
        })?)
    }

    /// Makes a disk larger or smaller, in bytes.
    pub(crate) fn resize_disk(
        &self,
        devid: u32,
        bytes: u64,
    ) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        self.machine
            .resize_disk(devid, bytes)
            .map_err(ChangeError::Machine)
    }

    /// Puts another medium into a CD-ROM drive, or none.
    pub(crate) fn change_medium(&self, medium: DiskConfig) -> std::result::Result<(), ChangeError> {
        let _changes = self.begin_change()?;
        let config = self.config();
        let number = medium.vdev.number;
        let drive = config.disks.iter().find(|d| d.vdev.number == number);
        let Some(drive) = drive else {
            return Err(ChangeError::NoDrive(medium.vdev));
        };
        if !drive.cdrom {
            return Err(ChangeError::Drive(
                "this is a disk and no CD-ROM drive: use block-detach and block-attach",
            ));
        }
        let before = drive.clone();
        // As it was called when the domain was made.
        let medium = DiskConfig {
            vdev: drive.vdev.clone(),
            ..medium
        };
        self.machine
            .change_medium(&medium)
            .map_err(ChangeError::Machine)?;
        let written = self.change_config(|config| {
            let disks = config.disks.iter_mut();
            for drive in disks.filter(|d| d.vdev.number == number && d.cdrom) {
                *drive = medium.clone();
            }
        });
        written.map_err(|fault| match self.machine.change_medium(&before) {
            Ok(()) => fault.into(),
            Err(kept) => ChangeError::Changed(fault, kept),
        })
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

    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut lock(&self.progress));
        self.changed.notify_all();
    }

    /// Makes another id the domain's next; false where a command has destroyed it before. One that comes later hears of
    /// that id.
    pub(crate) fn succeed(&self, next: DomId) -> bool {
        let mut progress = lock(&self.progress);
        if progress.destroy {
            return false;
        }
        progress.gone = Some(Some(next));
        self.changed.notify_all();
        true
    }

    /// Waits until a command destroys the domain or, where one is given, for a time; true where it was destroyed.
    pub(crate) fn wait_destroy(&self, time: Option<Duration>) -> bool {
        let progress = lock(&self.progress);
        let stays = |progress: &mut Progress| !progress.destroy;
        let Some(time) = time else {
            drop(self.changed.wait_while(progress, stays));
            return true;
        };
        let (progress, _) = self
            .changed
            .wait_timeout_while(progress, time, stays)
            .unwrap_or_else(PoisonError::into_inner);
        progress.destroy
    }

    /// Lets those who wait for the end hear of it.
    pub(crate) fn wait_heard(&self) {
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
        // One that goes away is waited for until no list shows it.
        let rests = self.shutdown.is_some() && !self.leaves;
        let successor = (self.successor.as_ref()).filter(|_| until == Until::Succession);
        let done =
            self.gone.is_some() || (until == Until::Shutdown && rests) || successor.is_some();
        let kept_for = successor.and_then(|successor| successor.as_ref().ok());
        done.then(|| Ended {
            reason: self.shutdown.clone(),
            dead: self.gone.is_some() && successor.is_none(),
            next: kept_for
                .copied()
                .or(self.gone.flatten())
                .map(|domid| domid.0),
            alone: successor.and_then(|successor| successor.clone().err()),
        })
    }
}
