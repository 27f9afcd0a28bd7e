//! The keeper of a machine process: opens and plugs in for it what its domain is to have, and nothing else.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hospes_config::VifConfig;
use hospes_domain::{DiskSpec, HostScheduler, Scheduler, ShareGroup, VifFacts, nice_of};
use hospes_hostnet::{Action, Guard, Script, Wire};
use hospes_image::{Access, Files, HostFiles, Keep, backing_chain};
use hospes_store::{DomainStore, StoreAccess};
use hospes_toolstack::{self as toolstack, Device, DeviceKind, MachineError, MachineSpec};
use hospes_units::DomId;
use serde::Serialize;
use serde_json::Value;

use crate::devices;
use crate::vifs::Plug;
use crate::wants::{Done, Opened, Plugged, Want};

/// Most files that are open for one machine process: as many as all disks with all that may be below them have.
const FILES_MAX: usize = 4096;
/// Most refusals that are logged.
const REFUSALS_MAX: u32 = 100;
/// Most characters of what was asked for that are said.
const REFUSAL_MAX: usize = 512;

/// The files below each image, as they were when the operator named it. A guest that has broken out may have changed what the image says since, and
/// must not have another file for that when the domain starts again.
#[derive(Debug, Default)]
pub struct Chains(Mutex<BTreeMap<PathBuf, Vec<PathBuf>>>);

impl Chains {
    /// Those below the image of a domain that starts.
    fn of(&self, disk: &DiskSpec) -> Result<Vec<PathBuf>, MachineError> {
        let known = lock(&self.0).get(&disk.target).cloned();
        known.map_or_else(|| self.look(disk), Ok)
    }

    /// Those below an image that the operator has just named.
    fn look(&self, disk: &DiskSpec) -> Result<Vec<PathBuf>, MachineError> {
        let below = backing_chain(&disk.target, disk.format)?;
        lock(&self.0).insert(disk.target.clone(), below.clone());
        Ok(below)
    }
}

/// A thread that panicked while holding a lock left a value that is valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a machine process gets of the host.
pub struct HostKeeper {
    domid: DomId,
    /// With the rights that the machine process does not have.
    store: Arc<dyn StoreAccess>,
    /// For whom files are locked.
    owner: String,
    plug: Plug,
    scheduler: Scheduler,
    chains: Arc<Chains>,
    vcpus: u32,
    /// The nice value that a process has of which nothing is said.
    nice: i32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Files of disks, by the disk's number, and whether each may be written.
    disks: BTreeMap<u32, Vec<(PathBuf, bool)>>,
    vifs: BTreeMap<u32, VifConfig>,
    files: BTreeMap<u64, Keep>,
    ports: BTreeMap<u64, Arc<Interface>>,
    group: Option<Box<dyn ShareGroup>>,
    /// The share that the domain is to have, and the one before.
    shares: Vec<toolstack::Share>,
    last_id: u64,
}

/// An interface that is plugged in.
struct Interface {
    devid: u32,
    guard: Guard,
    hook: Hook,
}

/// The script of an interface, where it has one. It is run once for each stage, however often a machine process asks.
struct Hook {
    script: Option<Script>,
    stage: Mutex<Stage>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd)]
enum Stage {
    #[default]
    New,
    Online,
    Offline,
}

/// Whether the next stage begins now.
fn begins(stage: &mut Stage, next: Stage) -> bool {
    let begins = *stage < next;
    if begins {
        *stage = next;
    }
    begins
}

impl Hook {
    fn online(&self) -> Result<(), MachineError> {
        if !begins(&mut lock(&self.stage), Stage::Online) {
            return Err("the interface was made ready before".into());
        }
        match &self.script {
            Some(script) => Ok(script.run(Action::Online)?),
            None => Ok(()),
        }
    }

    /// Returns when it is over, whoever has begun it.
    fn offline(&self) {
        let mut stage = lock(&self.stage);
        if let (Some(script), true) = (&self.script, begins(&mut stage, Stage::Offline))
            && let Err(error) = script.run(Action::Offline)
        {
            toolstack::log_line(&error.to_string());
        }
    }
}

impl HostKeeper {
    /// For the machine process with this number.
    pub fn new(
        spec: &MachineSpec<'_>,
        process: u32,
        chains: &Arc<Chains>,
    ) -> Result<HostKeeper, MachineError> {
        let (domid, config) = (spec.domid, spec.config);
        let keeper = HostKeeper {
            domid,
            store: spec.store.access(),
            owner: format!("domain {domid} ({})", config.name),
            plug: Plug::new(domid, config)?,
            scheduler: Scheduler::of(process),
            chains: Arc::clone(chains),
            vcpus: config.maxvcpus,
            nice: rustix::process::getpriority_process(None).unwrap_or(0),
            state: Mutex::default(),
        };
        // A killed domain that had the number may have left some.
        keeper.forget_vifs(None);
        let share = toolstack::Share {
            weight: config
                .scheduling
                .weight
                .unwrap_or(toolstack::Share::DEFAULT.weight),
            cap: config
                .scheduling
                .cap
                .unwrap_or(toolstack::Share::DEFAULT.cap),
        };
        keeper.state().shares = vec![share, toolstack::Share::DEFAULT];
        for disk in &config.disks {
            if let Some(disk) = devices::disk_spec(disk)? {
                let below = chains.of(&disk)?;
                keeper.permit_disk(&disk, below);
            }
        }
        for vif in &config.vifs {
            keeper.permit_vif(vif);
        }
        Ok(keeper)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn permit_disk(&self, disk: &DiskSpec, below: Vec<PathBuf>) {
        let mut files = vec![(disk.target.clone(), !disk.read_only && !disk.cdrom)];
        files.extend(below.into_iter().map(|path| (path, false)));
        let mut state = self.state();
        state.disks.entry(disk.devid).or_default().extend(files);
    }

    fn permit_vif(&self, vif: &VifConfig) {
        let devid = vif.devid.unwrap_or(0);
        self.state().vifs.insert(devid, vif.clone());
    }

    fn open(&self, path: &Path, access: Access) -> Result<(Value, Vec<OwnedFd>), MachineError> {
        let is_permitted = self
            .state()
            .disks
            .values()
            .flatten()
            .any(|(file, writable)| file == path && (access.read_only || *writable));
        if !is_permitted {
            return Err(refused(&format!("the file {}", path.display())));
        }
        let opened = match HostFiles.open(path, access, &self.owner) {
            Ok(opened) => opened,
            Err(fault) => return answer(&Opened::Refused(fault.report()), Vec::new()),
        };
        let (facts, descriptors, keep) = opened.parts();
        let mut state = self.state();
        if state.files.len() >= FILES_MAX {
            return Err(refused("so many files"));
        }
        let id = state.next_id();
        state.files.insert(id, keep);
        answer(&Opened::Here { id, facts }, descriptors)
    }

    fn plug_in(&self, devid: u32) -> Result<(Value, Vec<OwnedFd>), MachineError> {
        let vif = {
            let state = self.state();
            let is_used = state.ports.values().any(|port| port.devid == devid);
            let vif = state.vifs.get(&devid).filter(|_| !is_used);
            vif.cloned()
                .ok_or_else(|| refused(&format!("network interface {devid}")))?
        };
        let plugged = self.plug.one(&vif)?;
        let port = plugged.port;
        let id = self.state().next_id();
        let told = Plugged {
            id,
            mac: plugged.mac,
            interface: port.interface,
            bridge: port.bridge,
            mtu: port.mtu,
            is_stream: port.wire == Wire::Stream,
            script: plugged
                .script
                .as_ref()
                .map(|script| script.program().display().to_string()),
            guard: plugged.guard.map(Into::into),
            renews: port.guard.renewal().is_some(),
            returns: plugged.returns,
        };
        self.store
            .write_all(&told.facts(&vif).directory(self.domid))
            .map_err(|fault| format!("Network interface {devid}: the xenstore: {fault}"))?;
        let interface = Interface {
            devid,
            guard: port.guard,
            hook: Hook {
                script: plugged.script,
                stage: Mutex::default(),
            },
        };
        self.state().ports.insert(id, Arc::new(interface));
        answer(&told, port.queues)
    }

    /// Removes what scripts read of an interface, or of all. It goes with the domain where the store does not answer.
    fn forget_vifs(&self, devid: Option<u32>) {
        let path = match devid {
            Some(devid) => VifFacts::path(self.domid, devid),
            None => VifFacts::paths(self.domid),
        };
        let _ = self.store.remove(&path);
    }

    fn port(&self, id: u64) -> Result<Arc<Interface>, MachineError> {
        let port = self.state().ports.get(&id).cloned();
        port.ok_or_else(|| refused("an interface that is not there"))
    }

    fn group(&self, threads: &[i32]) -> io::Result<()> {
        let group = self.scheduler.group(threads)?;
        self.state().group = Some(group);
        Ok(())
    }

    fn set_share(&self, weight: u16, cap: u16, vcpus: u32) -> io::Result<()> {
        let state = self.state();
        let share = toolstack::Share { weight, cap };
        match &state.group {
            Some(group) if state.shares.contains(&share) && vcpus == self.vcpus => {
                group.set(weight, cap, vcpus)
            }
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Whether a nice value is no better than what a share of the domain's makes of `from`.
    fn is_its_own(&self, nice: i32, from: i32) -> bool {
        let state = self.state();
        let values = state
            .shares
            .iter()
            .map(|share| from + nice_of(share.weight));
        let best = values.min();
        best.is_some_and(|best| nice >= best.max(-20))
    }

    fn renice(&self, threads: &[i32], nice: i32) -> io::Result<()> {
        match self.is_its_own(nice, self.nice) {
            true => self.scheduler.renice(threads, nice),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn renice_session(&self, nice: i32) -> io::Result<()> {
        match self.is_its_own(nice, 0) {
            true => self.scheduler.renice_session(nice),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl State {
    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

/// Whoever hears it has no right to what it asked for. It may ask for anything, as often as it likes: the log has the beginning of that.
fn refused(what: &str) -> MachineError {
    static SAID: AtomicU32 = AtomicU32::new(0);
    let plain = |c: char| match c.is_control() {
        true => char::REPLACEMENT_CHARACTER,
        false => c,
    };
    let what: String = what.chars().take(REFUSAL_MAX).map(plain).collect();
    let why =
        format!("the domain is not to have {what}: its machine process asked for it all the same");
    let is_said = |said: u32| (said < REFUSALS_MAX).then_some(said + 1);
    if SAID.fetch_update(Relaxed, Relaxed, is_said).is_ok() {
        toolstack::log_line(&why);
    }
    why.into()
}

fn answer(
    what: &impl Serialize,
    descriptors: Vec<OwnedFd>,
) -> Result<(Value, Vec<OwnedFd>), MachineError> {
    Ok((serde_json::to_value(what)?, descriptors))
}

fn done(result: io::Result<()>) -> Result<(Value, Vec<OwnedFd>), MachineError> {
    let number = |fault: io::Error| {
        let number = fault.raw_os_error();
        number.unwrap_or(rustix::io::Errno::NOENT.raw_os_error())
    };
    let done: Done = result.map_err(number);
    answer(&done, Vec::new())
}

impl toolstack::Keeper for HostKeeper {
    fn answer(&self, ask: Value) -> Result<(Value, Vec<OwnedFd>), MachineError> {
        match serde_json::from_value(ask)? {
            Want::Open { path, access } => return self.open(&path, access),
            Want::Closed(id) => {
                // What takes time is done when others may ask again.
                let file = self.state().files.remove(&id);
                drop(file);
            }
            Want::Plug(devid) => return self.plug_in(devid),
            Want::Online(id) => self.port(id)?.hook.online()?,
            Want::Offline(id) => self.port(id)?.hook.offline(),
            Want::Renew(id) => {
                let port = self.port(id)?;
                let renewal = port.guard.renewal().ok_or("this network has no other")?;
                return answer(&(), vec![renewal()?]);
            }
            Want::Unplugged(id) => {
                let port = self.state().ports.remove(&id);
                // Whether it was said before or not: nobody could run it later.
                if let Some(port) = port {
                    port.hook.offline();
                }
            }
            Want::Group(threads) => return done(self.group(&threads)),
            Want::Share(weight, cap, vcpus) => return done(self.set_share(weight, cap, vcpus)),
            Want::Ungroup => self.state().group = None,
            Want::Renice(threads, nice) => return done(self.renice(&threads, nice)),
            Want::ReniceSession(nice) => return done(self.renice_session(nice)),
        }
        answer(&(), Vec::new())
    }

    fn permit(&self, device: Device<'_>) -> Result<(), MachineError> {
        match device {
            Device::Disk(disk) => {
                if let Some(disk) = devices::disk_spec(disk)? {
                    let below = self.chains.look(&disk)?;
                    self.permit_disk(&disk, below);
                }
            }
            Device::Vif(vif) => self.permit_vif(vif),
        }
        Ok(())
    }

    fn revoke(&self, kind: DeviceKind, devid: u32) {
        let mut state = self.state();
        match kind {
            DeviceKind::Disk => drop(state.disks.remove(&devid)),
            DeviceKind::Vif => {
                state.vifs.remove(&devid);
                // What a machine process has not given back is taken from it, while its script still has its nodes.
                let ports = std::mem::take(&mut state.ports).into_iter();
                let (left, others): (BTreeMap<_, _>, _) =
                    ports.partition(|(_, port)| port.devid == devid);
                state.ports = others;
                drop(state);
                for port in left.values() {
                    port.hook.offline();
                }
                self.forget_vifs(Some(devid));
            }
        }
    }

    fn share(&self, share: toolstack::Share) {
        let mut state = self.state();
        state.shares.insert(0, share);
        state.shares.truncate(2);
    }

    fn hurry(&self) {
        self.plug.hurry();
    }

    fn release(&self) {
        let state = std::mem::take(&mut *self.state());
        for port in state.ports.values() {
            port.hook.offline();
        }
        self.forget_vifs(None);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use hospes_hostnet::Haste;

    use super::*;

    #[test]
    fn refusals_are_short_and_plain() {
        let said = refused(&format!("the file \u{1b}{}", "x".repeat(1 << 20))).to_string();
        assert!(said.len() < 2 * REFUSAL_MAX, "{}", said.len());
        assert!(said.contains("the file \u{fffd}x"), "{said}");
    }

    #[test]
    fn scripts_run_once_however_often_they_are_asked_for() {
        let dir = std::env::temp_dir().join(format!("hospes-hook-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (program, said) = (dir.join("script"), dir.join("said"));
        let text = format!("#!/bin/sh\necho $1 >> {}\n", said.display());
        std::fs::write(&program, text).unwrap();
        let runs = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(&program, runs).unwrap();
        let program = program.to_str().unwrap();
        let script = Script::new(
            program,
            "path",
            "vif1.0",
            None,
            None,
            &Haste::default(),
            &dir,
        );
        let hook = Hook {
            script: Some(script),
            stage: Mutex::default(),
        };
        hook.online().unwrap();
        hook.online().unwrap_err();
        hook.offline();
        hook.offline();
        hook.online().unwrap_err();
        assert_eq!(std::fs::read_to_string(&said).unwrap(), "online\noffline\n");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
