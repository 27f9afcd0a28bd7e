//! One domain: memory, kernel, Xen side, vCPU threads, console and store, from creation to its end.
//!
//! Which engine executes the guest is the caller's choice, given as an [`EngineFactory`]. A domain is made paused. It ends when the guest powers
//! off, reboots, suspends or crashes, when its engine fails, or when it is destroyed; after that nothing of it runs any more and only
//! [`Domain::info`] and the console's history remain.
//!
//! Refuses: a second life. A reboot is a new domain with the same configuration, made by the caller.
//!
//! Invariants: the first reason to end wins; guest code runs only while the domain is neither paused nor ended; the guest's last output is in the
//! console before [`Domain::wait`] returns; a panic in a vCPU's thread ends the domain and nothing else.
//! Limits: 128 vCPUs.
#![forbid(unsafe_code)]

mod cgroup;
mod console;
mod core_dump;
mod create;
mod devices;
mod error;
mod halt_poll;
mod host_memory;
mod live;
mod memory;
mod pages;
mod passport;
mod placement;
mod portrait;
mod requests;
mod run;
mod saved;
mod scheduler;
mod services;
mod share;
mod signal;
mod suspend;
mod vcpu;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use hospes_backends::frame::{DeviceInfo, Kind, Log};
use hospes_cpuid::CpuidTable;
pub use hospes_cpuid::{Level, Wish};
use hospes_engine::{EngineError, Vm};
use hospes_image::Files;
use hospes_memory::GuestMemory;
use hospes_store::{DomainStore, Membership, StoreAccess};
use hospes_units::{DomId, VcpuId};
use hospes_xen::{ClockThread, Xen};

pub use console::{Console, Subscription};
pub use core_dump::{DumpError, Piece};
pub use devices::{AttachError, DiskSpec, VifFacts, VifSpec};
pub use error::{CreateError, RequestError};
pub use hospes_backends::{frame, net};
pub use hospes_image::Format as ImageFormat;
pub use live::{Live, LivePolicy};
pub use passport::Host;
pub use placement::Affinity;
pub use run::EndReason;
pub use saved::{RestoreError, SaveError, SaveStream, SavedStream};

use devices::Devices;
pub use scheduler::{HostScheduler, Scheduler, ShareGroup};
pub use share::{Share, ShareError, nice_of};

use memory::MemoryUse;
use placement::Placement;
use run::{Activity, Run};
use share::Sharing;

/// Makes the engine's virtual machine for a new domain: its memory, its CPUID and the number of its vCPUs.
pub type EngineFactory<'a> =
    Box<dyn FnOnce(Arc<GuestMemory>, CpuidTable, u32) -> Result<Arc<dyn Vm>, EngineError> + 'a>;

/// See [`DomainSpec::open`].
pub type OpenFile = Box<dyn Fn(&Path) -> io::Result<File>>;

/// See [`DomainSpec::confine`].
pub type Confine = Box<dyn Fn(&GuestMemory) -> Result<(), String>>;

/// What to make.
pub struct DomainSpec {
    pub domid: DomId,
    pub uuid: [u8; 16],
    pub name: String,
    pub kernel: PathBuf,
    pub ramdisk: Option<PathBuf>,
    pub cmdline: String,
    /// Memory that the guest may use at first; counted in whole pages.
    pub memory_bytes: u64,
    /// RAM in its memory map, the most that it can ever have: a multiple of 4096, the same or more.
    pub memory_max_bytes: u64,
    /// Memory of the host that is free and yet spoken for, in bytes: asked whenever it counts, for to restore a domain may take long.
    pub promised: Box<dyn Fn() -> u64 + Send + Sync>,
    pub vcpus: u32,
    /// Instruction set of the vCPUs.
    pub level: Level,
    /// Features by name that are to differ from those of the level.
    pub wishes: Vec<(String, Wish)>,
    /// The domain is never saved or moved, so that it may be told what is true of this host alone.
    pub nomigrate: bool,
    /// Where the domain is entered; it is taken out when it is dropped.
    pub store: Arc<dyn DomainStore>,
    /// Gets all console output, from a thread that does nothing else; may block for a while, but the guest waits when it does.
    pub console: Box<dyn Write + Send>,
    /// Opens the images of disks.
    pub files: Arc<dyn Files>,
    pub disks: Vec<DiskSpec>,
    pub vifs: Vec<VifSpec>,
    /// Gets a line now and then about the domain's devices.
    pub log: Log,
    /// Opens kernel and ramdisk for reading.
    pub open: OpenFile,
    /// Called when the guest's memory is there, and before anything of the guest's is looked at or a thread is started. What it says
    /// is why the domain cannot be made.
    pub confine: Confine,
    /// What the domain's share of the host's CPUs is had from.
    pub scheduler: Arc<dyn HostScheduler>,
}

/// What the guest is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownKind {
    PowerOff,
    Halt,
    Reboot,
}

/// A domain at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    pub domid: DomId,
    pub uuid: [u8; 16],
    pub name: String,
    pub vcpus: u32,
    /// vCPUs that the guest runs on.
    pub vcpus_online: u32,
    /// Memory the guest has now, and the most it may have, in KiB.
    pub memory_kib: u64,
    pub memory_max_kib: u64,
    /// Host CPU time of all vCPUs, ns.
    pub cpu_time_ns: u64,
    pub state: DomainState,
}

/// One vCPU at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuInfo {
    pub id: VcpuId,
    /// The guest runs on it.
    pub online: bool,
    pub running: bool,
    /// It waits for an interrupt.
    pub blocked: bool,
    /// The host CPU it runs on, or last ran on.
    pub host_cpu: Option<u32>,
    /// Host CPU time, ns.
    pub time_ns: u64,
    /// Host CPUs it may run on.
    pub hard: Affinity,
    /// Host CPUs it prefers.
    pub soft: Affinity,
}

/// The flags of a domain as `xl list` shows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainState {
    pub running: bool,
    pub blocked: bool,
    pub paused: bool,
    pub shutdown: bool,
    pub crashed: bool,
    pub dying: bool,
}

impl fmt::Display for DomainState {
    /// Six characters, `rbpscd`, with a dash for what does not hold.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (flag, letter) in [
            (self.running, 'r'),
            (self.blocked, 'b'),
            (self.paused, 'p'),
            (self.shutdown, 's'),
            (self.crashed, 'c'),
            (self.dying, 'd'),
        ] {
            write!(f, "{}", if flag { letter } else { '-' })?;
        }
        Ok(())
    }
}

/// A domain.
pub struct Domain {
    spec: Identity,
    processor: CpuidTable,
    xen: Arc<Xen>,
    store: Arc<dyn StoreAccess>,
    run: Arc<Run>,
    devices: Devices,
    placement: Arc<Placement>,
    sharing: Sharing,
    memory_use: MemoryUse,
    console: Arc<Console>,
    threads: Vec<JoinHandle<()>>,
    clock: Option<ClockThread>,
    /// `None` once it has left.
    membership: Mutex<Option<Membership>>,
    /// Set while the guest's memory is being sent.
    sending: Arc<AtomicBool>,
}

/// What stays of the specification.
#[derive(Clone, Debug)]
struct Identity {
    domid: DomId,
    uuid: [u8; 16],
    name: String,
    memory_max_bytes: u64,
    vcpus: u32,
}

/// Takes a lock; a thread that panicked while holding it left data that is valid, if old.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Domain {
    /// Makes a domain, paused before its first instruction. The error is a sentence for the user.
    pub fn create(spec: DomainSpec, engine: EngineFactory<'_>) -> Result<Domain, CreateError> {
        create::create(spec, None, engine)
    }

    /// Makes a domain, paused, that goes on where another was saved, on devices of its own. Its kernel, ramdisk and command line are those of the next start.
    pub fn restore(
        spec: DomainSpec,
        saved: SavedStream,
        engine: EngineFactory<'_>,
    ) -> Result<Domain, CreateError> {
        create::create(spec, Some(saved), engine)
    }

    /// Lets the guest run.
    pub fn unpause(&self) {
        if !self.run.is_paused() {
            return;
        }
        // A kernel is told of a pause only once it runs: before that it has no watchdog to calm.
        if self.run.has_run() {
            self.xen.mark_stopped();
        }
        self.run.unpause();
    }

    /// Stops the guest where it is; when this returns, no vCPU executes guest code, unless somebody has unpaused it meanwhile.
    pub fn pause(&self) {
        self.run.pause();
    }

    /// Raises a non-maskable interrupt at a vCPU; false where the domain has no such vCPU.
    pub fn raise_nmi(&self, vcpu: VcpuId) -> bool {
        self.run.raise_nmi(vcpu)
    }

    /// Ends the domain, whatever it does. Does nothing to one that has ended.
    pub fn destroy(&self) {
        self.run.end(EndReason::Destroyed);
    }

    /// Takes the domain out of the host, after ending it if that has not happened: its devices and its part of the store are gone when this
    /// returns.
    pub fn leave(&self) {
        self.destroy();
        self.run.wait_finished();
        self.let_go();
    }

    fn let_go(&self) {
        // What serves the domain's devices ends first.
        self.give_up_devices();
        drop(lock(&self.membership).take());
    }

    /// Gives up the devices of a domain that has ended and is kept to be looked at.
    pub fn give_up_devices(&self) {
        self.devices.close();
    }

    /// Lets go of the disks and networks of a suspended guest, for a domain elsewhere that has them next: all that the guest has written is durable when this returns.
    /// Whatever it returns, the guest must not go on before [`Domain::take_devices_again`].
    pub fn let_go_of_devices(&self) -> Result<(), AttachError> {
        self.devices.let_go()
    }

    /// Takes all again that was let go of. After an error the guest must not go on, and this may be called again.
    pub fn take_devices_again(&self) -> Result<(), AttachError> {
        self.devices.take_again()
    }

    /// Blocks until the domain has ended and its last output is in the console; from then on returns the same reason at once.
    pub fn wait(&self) -> EndReason {
        self.run.wait_finished()
    }

    /// Why it ended, if it did.
    pub fn end_reason(&self) -> Option<EndReason> {
        self.run.end_reason()
    }

    pub fn info(&self) -> DomainInfo {
        let ids = || (0..self.spec.vcpus).map(VcpuId);
        let activities: Vec<Activity> = self.run.activities();
        let end = self.run.end_reason();
        let finished = self.run.is_finished();
        let crashed = matches!(end, Some(EndReason::Crash(_) | EndReason::Watchdog));
        let alive = end.is_none();
        let paused = alive && self.run.is_paused();
        let runs = |a: &Activity| matches!(a, Activity::Running | Activity::Limited);
        let running = alive && !paused && activities.iter().any(runs);
        DomainInfo {
            domid: self.spec.domid,
            uuid: self.spec.uuid,
            name: self.spec.name.clone(),
            vcpus: self.spec.vcpus,
            vcpus_online: self.run.online(),
            memory_kib: self.xen.current_pages() * 4,
            memory_max_kib: self.spec.memory_max_bytes / 1024,
            cpu_time_ns: ids().map(|id| self.xen.vcpu_time_ns(id)).sum(),
            state: DomainState {
                running,
                blocked: alive && !paused && !running,
                paused,
                shutdown: matches!(
                    end,
                    Some(EndReason::PowerOff | EndReason::Reboot | EndReason::Suspend)
                ),
                crashed,
                dying: end == Some(EndReason::Destroyed) && !finished,
            },
        }
    }

    /// All vCPUs, those that the guest does not use too.
    pub fn vcpus(&self) -> Vec<VcpuInfo> {
        let activities = self.run.activities();
        let alive = self.run.end_reason().is_none();
        let infos = activities.into_iter().enumerate().map(|(n, activity)| {
            let id = VcpuId(n as u32);
            let (hard, soft) = self.placement.affinity(id);
            VcpuInfo {
                id,
                online: self.run.is_online(id),
                running: alive && activity == Activity::Running,
                blocked: alive && activity == Activity::Blocked,
                host_cpu: self.placement.host_cpu(id),
                time_ns: self.xen.vcpu_time_ns(id),
                hard,
                soft,
            }
        });
        infos.collect()
    }

    /// Changes which host CPUs one vCPU, or all, may run on (`hard`) and prefer (`soft`); what is `None` stays. When all are changed and the
    /// host refuses, some may have been.
    pub fn pin(
        &self,
        vcpu: Option<VcpuId>,
        hard: Option<&Affinity>,
        soft: Option<&Affinity>,
    ) -> Result<(), RequestError> {
        if let Some(reason) = self.run.end_reason() {
            return Err(RequestError::Ended(reason));
        }
        let all = 0..self.spec.vcpus;
        let which = match vcpu {
            None => all,
            Some(VcpuId(id)) if all.contains(&id) => id..id + 1,
            Some(id) => {
                return Err(RequestError::NoVcpu {
                    id,
                    last: all.end - 1,
                });
            }
        };
        for id in which.map(VcpuId) {
            self.placement
                .set(id, hard, soft)
                .map_err(|source| RequestError::Affinity { id, source })?;
        }
        self.run.place_changed();
        Ok(())
    }

    /// The domain's share of the host's CPUs.
    pub fn share(&self) -> Share {
        self.sharing.get()
    }

    /// Changes the domain's share of the host's CPUs.
    pub fn set_share(&self, share: Share) -> Result<(), RequestError> {
        if let Some(reason) = self.run.end_reason() {
            return Err(RequestError::Ended(reason));
        }
        if share.weight == 0 {
            return Err(RequestError::Weight);
        }
        let vcpus = self.spec.vcpus;
        if u32::from(share.cap) > vcpus * 100 {
            return Err(RequestError::Cap {
                cap: share.cap,
                vcpus,
            });
        }
        let threads = self.placement.threads();
        self.sharing.set(share, &threads, &self.xen, &self.run)?;
        self.run.place_changed();
        Ok(())
    }

    /// Asks the guest to use its first `online` vCPUs, 1 to all. A guest takes vCPUs away by itself; one that is to come back may have to be
    /// brought online inside the guest too.
    pub fn set_vcpus(&self, online: u32) -> Result<(), RequestError> {
        if let Some(reason) = self.run.end_reason() {
            return Err(RequestError::Ended(reason));
        }
        if online == 0 || online > self.spec.vcpus {
            return Err(RequestError::Vcpus {
                online,
                max: self.spec.vcpus,
            });
        }
        let home = hospes_store::domain_path(self.spec.domid);
        for id in 0..self.spec.vcpus {
            let word = if id < online { "online" } else { "offline" };
            self.store
                .write(&format!("{home}/cpu/{id}/availability"), word.as_bytes())?;
        }
        Ok(())
    }

    /// Adds a disk; the guest takes it when it likes. The image is locked until the disk is detached or the domain dropped.
    pub fn attach_disk(&self, disk: &DiskSpec) -> Result<(), AttachError> {
        self.devices.attach_disk(disk)
    }

    /// Puts another disk in the place of the one with this number, or none; both are read-only. After an error but [`AttachError::Emptied`] the first is still there, or
    /// there again.
    pub fn replace_disk(&self, devid: u32, other: Option<&DiskSpec>) -> Result<(), AttachError> {
        self.devices.replace_disk(devid, other)
    }

    /// Adds a network interface; the guest takes it when it likes.
    pub fn attach_vif(&self, vif: VifSpec) -> Result<(), AttachError> {
        self.devices.attach_vif(vif)
    }

    /// Takes all network interfaces away at once: a domain that has ended leaves its place on the network to those that follow.
    pub fn detach_vifs(&self) {
        self.devices.detach_vifs();
    }

    /// Takes a device away once the guest has let go of it, or at once with `force`. Where the guest does not let go within seconds, a disk stays and this fails; another
    /// device goes. When this succeeds, what the device stood for is free.
    pub fn detach(&self, kind: Kind, devid: u32, force: bool) -> Result<(), AttachError> {
        self.devices.detach(frame::DeviceId { kind, devid }, force)
    }

    /// Changes the size of a disk, in bytes, and tells the guest.
    pub fn resize_disk(&self, devid: u32, bytes: u64) -> Result<(), AttachError> {
        self.devices.resize_disk(devid, bytes)
    }

    /// The devices with their counters.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        self.devices.list()
    }

    /// The guest's console.
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// The store with the rights of domain 0, for back ends and tools.
    pub fn store(&self) -> &Arc<dyn StoreAccess> {
        &self.store
    }

    /// The domain's Xen side, for back ends.
    pub fn xen(&self) -> &Arc<Xen> {
        &self.xen
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        self.destroy();
        self.sharing.end();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // One that was not made to its end has no console that could finish.
        self.let_go();
        self.clock = None;
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain({}, {:?})", self.spec.domid, self.spec.name)
    }
}
