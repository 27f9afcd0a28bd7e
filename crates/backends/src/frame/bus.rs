//! All devices of one domain.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hospes_store::StoreAccess;
use hospes_units::{DomId, Port};
use hospes_xen::Xen;

use super::device::{Device, Errand, Leave, Mailbox};
use super::nodes::Paths;
use super::state::Phase;
use super::{Backend, DeviceId, DeviceNodes, Log, Monitor};
use crate::lock;

/// How long a guest has to let go of a device before it is taken; xl waits as long.
const PATIENCE: Duration = Duration::from_secs(10);
/// And how long where it is taken by force. Linux that is told gives a disk up at once, in use or not; one that finds its disk gone may wait for ever
/// for what it had still to write.
const FORCED_PATIENCE: Duration = Duration::from_secs(1);

/// How long a new device waits for the guest to see that an earlier one of its number has gone: where the guest had connected to that, at most so
/// long.
const NOTICE_MAX: Duration = Duration::from_secs(5);
/// And where it had not, so long, because nothing tells.
const NOTICE: Duration = Duration::from_secs(1);
/// How often it looks.
const NOTICE_LOOK: Duration = Duration::from_millis(5);

/// Why a device cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("the domain has a device {0} already: detach it first or choose another")]
    Exists(DeviceId),
    #[error("the domain has no device {0}")]
    Missing(DeviceId),
    #[error("cannot write the device {0} into the xenstore: {1}")]
    Store(DeviceId, hospes_store::Error),
    #[error("cannot start the thread of device {0}: {1}")]
    Thread(DeviceId, std::io::Error),
    #[error("the domain has ended")]
    Closed,
    #[error(
        "the guest does not let go of device {0}, so it stays: see whether the domain is paused or hangs, or use --force, by which data can be lost that the guest has not written yet"
    )]
    Kept(DeviceId),
    #[error(
        "requests of device {0} wait ({1}), so it stays: see to that first, or use --force, by which the guest loses what it has not written yet"
    )]
    Waits(DeviceId, String),
    #[error("requests of device {0} are not carried out: {1}")]
    Busy(DeviceId, String),
    #[error("what was written to device {0} is not durable: {1}")]
    Flush(DeviceId, String),
    #[error("device {0} is not let go: {1}")]
    LetGo(DeviceId, String),
    #[error("device {0} cannot be had again: {1}")]
    NotAgain(DeviceId, String),
}

/// A device at one moment.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    pub id: DeviceId,
    pub phase: Phase,
    /// When it was made.
    pub since: Instant,
    pub counters: Vec<(&'static str, u64)>,
    /// Why requests wait, as a sentence.
    pub trouble: Option<String>,
}

struct Handle {
    since: Instant,
    mailbox: Arc<Mailbox>,
    monitor: Arc<dyn Monitor>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Handle {
    /// Waits for a thread that is about to end.
    fn join(&self) {
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// A device that has gone.
struct Past {
    since: Instant,
    /// The guest's event channels; it closes them when it sees that the device has gone.
    ports: Vec<Port>,
}

impl Past {
    fn is_noticed(&self, xen: &Xen) -> bool {
        let passed = self.since.elapsed();
        let open = self.ports.iter().any(|port| xen.is_for_host(*port));
        match self.ports.is_empty() {
            true => passed >= NOTICE,
            false => !open || passed >= NOTICE_MAX,
        }
    }
}

/// The devices of a domain. Dropping it closes it.
pub struct Bus {
    domid: DomId,
    store: Arc<dyn StoreAccess>,
    xen: Arc<Xen>,
    log: Log,
    /// `None` once closed.
    devices: Mutex<Option<BTreeMap<DeviceId, Arc<Handle>>>>,
    past: Mutex<BTreeMap<DeviceId, Past>>,
}

impl Bus {
    pub fn new(domid: DomId, store: Arc<dyn StoreAccess>, xen: Arc<Xen>, log: Log) -> Bus {
        Bus {
            domid,
            store,
            xen,
            log,
            devices: Mutex::new(Some(BTreeMap::new())),
            past: Mutex::default(),
        }
    }

    /// Makes a device; the guest sees it when this returns. `backend` is dropped when the device has gone.
    ///
    /// Linux takes a directory that was removed and made again, before it looked, for that of the device it knows, which it has closed: so a device
    /// that had a predecessor waits until the guest has seen that one go.
    pub fn attach(
        &self,
        id: DeviceId,
        nodes: &DeviceNodes,
        backend: Box<dyn Backend>,
    ) -> Result<(), DeviceError> {
        let past = lock(&self.past).remove(&id);
        while past
            .as_ref()
            .is_some_and(|past| !past.is_noticed(&self.xen))
        {
            std::thread::sleep(NOTICE_LOOK);
        }
        let mut devices = lock(&self.devices);
        let devices = devices.as_mut().ok_or(DeviceError::Closed)?;
        if devices.contains_key(&id) {
            return Err(DeviceError::Exists(id));
        }
        let paths = Paths::new(self.domid, id, nodes.kept);
        let store = |fault| DeviceError::Store(id, fault);
        let all = paths.make(self.domid, nodes, &backend.features());
        self.store.write_all(&all).map_err(store)?;
        let mailbox = Mailbox::new();
        let started = self.start(id, &paths, backend, &mailbox);
        match started {
            Ok(handle) => {
                devices.insert(id, Arc::new(handle));
                Ok(())
            }
            Err(fault) => {
                for path in paths.own() {
                    let _ = self.store.remove(path);
                }
                Err(fault)
            }
        }
    }

    fn start(
        &self,
        id: DeviceId,
        paths: &Paths,
        backend: Box<dyn Backend>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<Handle, DeviceError> {
        let listener = {
            let mailbox = Arc::clone(mailbox);
            Arc::new(move |_: &str| mailbox.front_changed())
        };
        let watch = self
            .store
            .watch(&format!("{}/state", paths.front), listener)
            .map_err(|fault| DeviceError::Store(id, fault))?;
        let monitor = backend.monitor();
        let device = Device {
            id,
            domid: self.domid,
            paths: paths.clone(),
            store: Arc::clone(&self.store),
            xen: Arc::clone(&self.xen),
            log: self.log.clone(),
            backend,
            mailbox: Arc::clone(mailbox),
            _watch: watch,
            phase: Phase::Waiting,
            connected: false,
            let_go: false,
            leaving: false,
            unshown: false,
            failures: 0,
        };
        let thread = std::thread::Builder::new()
            .name(format!("{}-{}", id.kind.name(), id.devid))
            .spawn(move || device.main())
            .map_err(|fault| DeviceError::Thread(id, fault))?;
        Ok(Handle {
            since: Instant::now(),
            mailbox: Arc::clone(mailbox),
            monitor,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Takes a device away and returns when what it stood for is free: when the guest has let go of it, or its time is over, which is short by `force`. A disk that the guest does not
    /// let go of stays without `force`, as for xl.
    pub fn detach(&self, id: DeviceId, force: bool) -> Result<(), DeviceError> {
        self.detach_within(id, force, if force { FORCED_PATIENCE } else { PATIENCE })
    }

    pub(crate) fn detach_within(
        &self,
        id: DeviceId,
        force: bool,
        patience: Duration,
    ) -> Result<(), DeviceError> {
        let handle = self.handle(id)?;
        let mailbox = &handle.mailbox;
        let waits = id.kind == super::Kind::Vbd && !force;
        if waits && let Some(why) = handle.monitor.trouble() {
            return Err(DeviceError::Waits(id, why));
        }
        mailbox.leave(Leave::Orderly);
        if !mailbox.wait_gone(Some(patience)) && !force {
            if id.kind == super::Kind::Vbd {
                mailbox.stay();
                return Err(DeviceError::Kept(id));
            }
            (self.log)(&format!(
                "Domain {} does not let go of device {id}: it is taken away",
                self.domid
            ));
        }
        self.take(id, &handle);
        Ok(())
    }

    /// Takes a device away without asking the guest, which may have ended.
    pub fn remove(&self, id: DeviceId) -> Result<(), DeviceError> {
        let handle = self.handle(id)?;
        self.take(id, &handle);
        Ok(())
    }

    fn take(&self, id: DeviceId, handle: &Arc<Handle>) {
        let mailbox = &handle.mailbox;
        mailbox.leave(Leave::Forced);
        mailbox.wait_gone(None);
        handle.join();
        if let Some(devices) = lock(&self.devices).as_mut()
            && devices.get(&id).is_some_and(|h| Arc::ptr_eq(h, handle))
        {
            devices.remove(&id);
            let past = Past {
                since: Instant::now(),
                ports: mailbox.ports(),
            };
            lock(&self.past).insert(id, past);
        }
    }

    /// The thing behind a device changed, its size for one: the guest is told.
    pub fn renew(&self, id: DeviceId) -> Result<(), DeviceError> {
        self.handle(id)?.mailbox.renew();
        Ok(())
    }

    /// Makes durable all that a suspended guest has written, on those devices that are not let go of.
    pub fn flush(&self) -> Result<(), DeviceError> {
        let deadline = Instant::now() + PATIENCE;
        self.run(Errand::Settle(deadline), DeviceError::Busy)?;
        self.run(Errand::Flush, DeviceError::Flush)
    }

    /// Lets go of what the devices of a suspended guest stand for: when this returns all that the guest has written is durable, and another process may have
    /// it. The guest does not see it. After an error some are let go and some are not: [`Bus::take_again`] makes them what they were.
    pub fn let_go(&self) -> Result<(), DeviceError> {
        let deadline = Instant::now() + PATIENCE;
        self.run(Errand::Settle(deadline), DeviceError::Busy)?;
        self.run(Errand::LetGo, DeviceError::LetGo)
    }

    /// Takes again what [`Bus::let_go`] has let go of. After an error the guest must not go on; this may be called again.
    pub fn take_again(&self) -> Result<(), DeviceError> {
        self.run(Errand::TakeAgain, DeviceError::NotAgain)
    }

    fn run(
        &self,
        errand: Errand,
        fault: fn(DeviceId, String) -> DeviceError,
    ) -> Result<(), DeviceError> {
        let devices: Vec<_> = {
            let devices = lock(&self.devices);
            let devices = devices.as_ref().ok_or(DeviceError::Closed)?;
            devices.iter().map(|(id, h)| (*id, h.clone())).collect()
        };
        for (id, handle) in devices {
            handle.mailbox.run(errand).map_err(|why| fault(id, why))?;
        }
        Ok(())
    }

    pub fn list(&self) -> Vec<DeviceInfo> {
        let devices = lock(&self.devices);
        let devices = devices.iter().flatten();
        devices
            .map(|(id, handle)| DeviceInfo {
                id: *id,
                phase: handle.mailbox.phase(),
                since: handle.since,
                counters: handle.monitor.counters(),
                trouble: handle.monitor.trouble(),
            })
            .collect()
    }

    /// Takes all devices away, for good; what is in flight is finished first.
    pub fn close(&self) {
        let devices = lock(&self.devices).take().unwrap_or_default();
        for handle in devices.values() {
            handle.mailbox.leave(Leave::Forced);
        }
        for handle in devices.values() {
            handle.mailbox.wait_gone(None);
            handle.join();
        }
    }

    fn handle(&self, id: DeviceId) -> Result<Arc<Handle>, DeviceError> {
        lock(&self.devices)
            .as_ref()
            .ok_or(DeviceError::Closed)?
            .get(&id)
            .cloned()
            .ok_or(DeviceError::Missing(id))
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.close();
    }
}
