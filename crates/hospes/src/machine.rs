//! Domains as the tool stack's machines.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hospes_config::{CpuLevel, DiskConfig, DomainConfig, FeatureWish, Pinning, VifConfig};
use hospes_domain::frame::Kind;
use hospes_domain::{
    Domain, DomainSpec, EndReason, EngineFactory, Level, Live, LivePolicy, Share, ShutdownKind,
    VifSpec, Wish,
};
use hospes_migration::Reader;
use hospes_sandbox::Keep;
use hospes_toolstack::{
    self as toolstack, Affinity, Asker, DeviceKind, LiveRound, Machine, MachineError, MachineInfo,
    MachineSpec, Piece, SaveStream, SavedStream, Traffic, VcpuInfo, Waiting,
};
use hospes_units::VcpuId;

use crate::devices;
use crate::host::Host;
use crate::keeper::{Chains, HostKeeper};
use crate::vifs;

/// Makes domains on the engine that suits this host, each in a process of its own.
#[derive(Debug, Default)]
pub struct Domains {
    /// What lies below the images of the domain that this process keeps.
    chains: Arc<Chains>,
}

impl toolstack::Program for Domains {
    fn keeper(
        &self,
        spec: &MachineSpec<'_>,
        process: u32,
    ) -> Result<Arc<dyn toolstack::Keeper>, MachineError> {
        let keeper = HostKeeper::new(spec, process, &self.chains)?;
        Ok(Arc::new(keeper))
    }

    fn build(
        &self,
        spec: &MachineSpec<'_>,
        saved: Option<SavedStream>,
        console: Box<dyn Write + Send>,
        asker: Asker,
    ) -> Result<Arc<dyn Machine>, MachineError> {
        make(spec, saved, console, Host::new(asker))
    }

    fn admit(&self, spec: &MachineSpec<'_>, passport: &str) -> Result<(), MachineError> {
        let config = spec.config;
        for disk in &config.disks {
            if let Some(disk) = devices::disk_spec(disk)?
                && let Err(fault) = std::fs::metadata(&disk.target)
            {
                return Err(format!(
                    "the disk {} cannot be opened there: {fault}; make it reachable by that path, or give another configuration with -C",
                    disk.target.display()
                )
                .into());
            }
        }
        for vif in &config.vifs {
            vifs::check(vif)?;
        }
        placements(config).map_err(|fault| {
            format!("{fault}; give another configuration with -C, which has CPUs of that host")
        })?;
        let wishes: Vec<_> = config.cpuid.iter().map(wish).collect();
        let host = hospes_domain::Host {
            name: &config.name,
            vcpus: config.maxvcpus,
            level: level(config),
            wishes: &wishes,
            memory_bytes: config.memory_kib() << 10,
            promised_bytes: spec.promised.bytes(),
        };
        Ok(host.admits(passport)?)
    }

    fn sweep(&self, run: &Path) -> Result<(), MachineError> {
        Ok(hospes_hostnet::sweep(run)?)
    }
}

/// Makes a domain, new or as it was saved.
fn make(
    spec: &MachineSpec<'_>,
    saved: Option<SavedStream>,
    console: Box<dyn Write + Send>,
    host: Host,
) -> Result<Arc<dyn Machine>, MachineError> {
    let config = spec.config;
    let mut disks = Vec::new();
    for disk in &config.disks {
        disks.extend(devices::disk_spec(disk)?);
    }
    let plug = |vifs: &[VifConfig]| -> Result<(Vec<VifSpec>, Vec<u64>), MachineError> {
        let (mut specs, mut scripts) = (Vec::new(), Vec::new());
        for vif in vifs {
            let (spec, script) = host.plug(vif)?;
            specs.push(spec);
            scripts.extend(script);
        }
        Ok((specs, scripts))
    };
    // One that comes back is plugged in when it is all there: until then another process may have what its interfaces stand for.
    let (vifs, mut scripts) = match saved {
        None => plug(&config.vifs)?,
        Some(_) => Default::default(),
    };
    let direct = config.engine_direct;
    let promised = spec.promised.clone();
    let boot = BootFiles::open(config);
    let prepared = Rc::new(Cell::new(None));
    let filled = Rc::clone(&prepared);
    let spec = DomainSpec {
        domid: spec.domid,
        uuid: *spec.uuid.as_bytes(),
        name: config.name.clone(),
        kernel: config.kernel.clone(),
        ramdisk: config.ramdisk.clone(),
        cmdline: config.cmdline.clone(),
        memory_bytes: config.memory_kib() << 10,
        memory_max_bytes: config.memory_max_kib() << 10,
        promised: Box::new(move || promised.bytes()),
        vcpus: config.maxvcpus,
        level: level(config),
        wishes: config.cpuid.iter().map(wish).collect(),
        // A saved domain stays on hosts like this one, and its time is not the TSC's but Xen's. On AMD's processors Linux takes a TSC for constant only
        // where it is told so, and else measures the speed of each further vCPU for a tenth of a second, wrongly on a busy host.
        nomigrate: true,
        store: Arc::new(spec.store.clone()),
        console,
        disks,
        vifs,
        log: Arc::new(toolstack::log_line),
        open: Box::new(move |path| boot.get(path)),
        confine: Box::new(move |memory| {
            let machine = hospes_engines::prepare(memory).map_err(|fault| fault.to_string())?;
            filled.set(Some(machine));
            let keep = Keep {
                read: &[PathBuf::from("/proc"), PathBuf::from("/sys/devices/system")],
                user: Some(toolstack::machine_user(std::process::id())),
            };
            let walls = hospes_sandbox::confine(&keep).map_err(|fault| fault.to_string())?;
            toolstack::log_line(&format!("The machine process is confined: {walls}"));
            Ok(())
        }),
        files: Arc::new(host.clone()),
        scheduler: Arc::new(host.clone()),
    };
    let engine: EngineFactory<'_> = Box::new(move |memory, cpuid, vcpus| {
        let prepared = match prepared.take() {
            Some(prepared) => prepared,
            None => hospes_engines::prepare(&memory)?,
        };
        hospes_engines::create_vm(memory, cpuid, vcpus, direct, prepared)
    });
    let domain = match saved {
        Some(saved) => {
            let saved = Box::new(saved.into_inner()) as Box<dyn Read + Send>;
            let domain = Domain::restore(spec, Reader::continued(saved), engine)?;
            let (vifs, late) = plug(&config.vifs)?;
            scripts = late;
            for vif in vifs {
                domain.attach_vif(vif)?;
            }
            domain
        }
        None => Domain::create(spec, engine)?,
    };
    if config.vcpus < config.maxvcpus {
        domain.set_vcpus(config.vcpus)?;
    }
    place(&domain, config)?;
    let scheduling = &config.scheduling;
    domain.set_share(Share {
        weight: scheduling.weight.unwrap_or(Share::default().weight),
        cap: scheduling.cap.unwrap_or(Share::default().cap),
    })?;
    Ok(Arc::new(Running {
        domain,
        host,
        live: Mutex::default(),
        scripts,
    }))
}

/// Kernel and ramdisk, opened with the rights of the user, and read without any.
struct BootFiles(Vec<(PathBuf, io::Result<File>)>);

impl BootFiles {
    fn open(config: &DomainConfig) -> BootFiles {
        let paths = std::iter::once(&config.kernel).chain(&config.ramdisk);
        BootFiles(paths.map(|path| (path.clone(), File::open(path))).collect())
    }

    fn get(&self, path: &Path) -> io::Result<File> {
        match self.0.iter().find(|(opened, _)| opened == path) {
            Some((_, Ok(file))) => file.try_clone(),
            Some((_, Err(fault))) => Err(match fault.raw_os_error() {
                Some(number) => io::Error::from_raw_os_error(number),
                None => fault.kind().into(),
            }),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

fn level(config: &DomainConfig) -> Level {
    match config.cpu_level {
        CpuLevel::V3 => Level::V3,
        CpuLevel::V4 => Level::V4,
    }
}

/// A wish of the configuration as the feature model takes it.
fn wish((name, wish): &(String, FeatureWish)) -> (String, Wish) {
    let wish = match wish {
        FeatureWish::Hide => Wish::Hide,
        FeatureWish::Show => Wish::Show,
        FeatureWish::Host => Wish::Host,
    };
    (name.clone(), wish)
}

/// The host CPUs that a vCPU has to run on, and those that it prefers, where the configuration has any.
type Placement = (VcpuId, Option<Affinity>, Option<Affinity>);

/// The host CPUs of the configuration, for each vCPU that has some.
fn placements(config: &DomainConfig) -> Result<Vec<Placement>, MachineError> {
    let pinning = &config.scheduling;
    if pinning.cpus == Pinning::None && pinning.cpus_soft == Pinning::None {
        return Ok(Vec::new());
    }
    let host = toolstack::host_cpus();
    let placement = |vcpu| {
        let meaning = |pinning: &Pinning| {
            let list = pinning.of(vcpu);
            list.map(|list| toolstack::resolve(list, &host)).transpose()
        };
        let (hard, soft) = (meaning(&pinning.cpus)?, meaning(&pinning.cpus_soft)?);
        Ok((VcpuId(vcpu), hard, soft))
    };
    (0..config.maxvcpus).map(placement).collect()
}

/// Gives the vCPUs the host CPUs of the configuration.
fn place(domain: &Domain, config: &DomainConfig) -> Result<(), MachineError> {
    for (vcpu, hard, soft) in placements(config)? {
        domain.pin(Some(vcpu), hard.as_ref(), soft.as_ref())?;
    }
    Ok(())
}

struct Running {
    domain: Domain,
    host: Host,
    live: Mutex<Option<Live>>,
    /// Of the interfaces that it is made with, by their numbers.
    scripts: Vec<u64>,
}

impl Running {
    /// What was sent of a guest that runs, until it is saved. A thread that panicked while holding it left a value that is valid.
    fn live(&self) -> MutexGuard<'_, Option<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine for Running {
    fn make_ready(&self) -> Result<(), MachineError> {
        self.host.bring_online(self.scripts.iter().copied())
    }

    fn unpause(&self) {
        self.domain.unpause();
    }

    fn pause(&self) {
        self.domain.pause();
    }

    fn request_shutdown(&self, kind: toolstack::ShutdownKind) -> Result<(), MachineError> {
        let kind = match kind {
            toolstack::ShutdownKind::Poweroff => ShutdownKind::PowerOff,
            toolstack::ShutdownKind::Reboot => ShutdownKind::Reboot,
        };
        Ok(self.domain.request_shutdown(kind)?)
    }

    fn wait_acknowledged(&self, given_up: &dyn Fn() -> bool) -> Result<(), MachineError> {
        Ok(self.domain.wait_acknowledged(given_up)?)
    }

    fn destroy(&self) {
        self.domain.destroy();
    }

    fn leave(&self) {
        self.domain.leave();
    }

    fn give_up_devices(&self) {
        self.domain.give_up_devices();
    }

    fn wait(&self) -> toolstack::EndReason {
        let reason = self.domain.wait();
        // One that is preserved, or started again under another id, must not hold its address on the network.
        self.domain.detach_vifs();
        match reason {
            EndReason::PowerOff => toolstack::EndReason::Poweroff,
            EndReason::Reboot => toolstack::EndReason::Reboot,
            EndReason::Suspend => toolstack::EndReason::Suspend,
            EndReason::Crash(cause) => toolstack::EndReason::Crash(cause),
            EndReason::Watchdog => toolstack::EndReason::Watchdog,
            EndReason::Destroyed => toolstack::EndReason::Destroyed,
        }
    }

    fn info(&self) -> MachineInfo {
        let info = self.domain.info();
        MachineInfo {
            memory_kib: info.memory_kib,
            promised_kib: self.domain.promised_kib(),
            vcpus_online: info.vcpus_online,
            cpu_time_ns: info.cpu_time_ns,
            running: info.state.running,
            blocked: info.state.blocked,
            paused: info.state.paused,
        }
    }

    fn traffic(&self) -> Traffic {
        let devices = self.domain.devices();
        let counters = devices
            .iter()
            .map(|device| (device.id.kind, &device.counters[..]));
        devices::traffic(counters)
    }

    fn waiting(&self) -> Vec<Waiting> {
        let devices = self.domain.devices().into_iter();
        let troubled = devices.filter_map(|device| {
            Some(Waiting {
                kind: match device.id.kind {
                    Kind::Vbd => DeviceKind::Disk,
                    Kind::Vif => DeviceKind::Vif,
                },
                devid: device.id.devid,
                why: device.trouble?,
            })
        });
        troubled.collect()
    }

    fn send_sysrq(&self, key: char) -> Result<(), MachineError> {
        Ok(self.domain.send_sysrq(key)?)
    }

    fn trigger(&self, trigger: toolstack::Trigger, vcpu: u32) -> Result<(), MachineError> {
        match trigger {
            toolstack::Trigger::Nmi if self.domain.raise_nmi(VcpuId(vcpu)) => Ok(()),
            toolstack::Trigger::Nmi => {
                Err(format!("there is no vCPU {vcpu}: see the list of vCPUs").into())
            }
            // Neither has Xen's own PVH guest.
            toolstack::Trigger::Power | toolstack::Trigger::Sleep => {
                Err("a PVH domain has no ACPI buttons: use shutdown or pause".into())
            }
            other => Err(format!(
                "a PVH domain cannot be sent {}: nmi is the trigger it has",
                other.as_str()
            )
            .into()),
        }
    }

    fn vcpus(&self) -> Vec<VcpuInfo> {
        let text = |affinity: &Affinity| affinity.as_ref().map(ToString::to_string);
        let vcpus = self.domain.vcpus().into_iter();
        vcpus
            .map(|v| VcpuInfo {
                vcpu: v.id.0,
                online: v.online,
                running: v.running,
                blocked: v.blocked,
                host_cpu: v.host_cpu,
                time_ns: v.time_ns,
                hard: text(&v.hard),
                soft: text(&v.soft),
            })
            .collect()
    }

    fn pin(
        &self,
        vcpu: Option<u32>,
        hard: Option<&Affinity>,
        soft: Option<&Affinity>,
    ) -> Result<(), MachineError> {
        Ok(self.domain.pin(vcpu.map(VcpuId), hard, soft)?)
    }

    fn share(&self) -> toolstack::Share {
        let Share { weight, cap } = self.domain.share();
        toolstack::Share { weight, cap }
    }

    fn set_share(&self, share: toolstack::Share) -> Result<(), MachineError> {
        let toolstack::Share { weight, cap } = share;
        Ok(self.domain.set_share(Share { weight, cap })?)
    }

    fn set_vcpus(&self, online: u32) -> Result<(), MachineError> {
        Ok(self.domain.set_vcpus(online)?)
    }

    fn set_memory_target(&self, kib: u64, promised: &dyn Fn() -> u64) -> Result<(), MachineError> {
        Ok(self.domain.set_memory_target(kib, promised)?)
    }

    fn set_memory_max(&self, kib: u64, promised: &dyn Fn() -> u64) -> Result<(), MachineError> {
        Ok(self.domain.set_memory_max(kib, promised)?)
    }

    fn attach_disk(&self, disk: &DiskConfig) -> Result<(), MachineError> {
        match devices::disk_spec(disk)? {
            Some(disk) => Ok(self.domain.attach_disk(&disk)?),
            None => Err("an empty drive cannot be attached: give the path of an image".into()),
        }
    }

    fn attach_vif(&self, vif: &VifConfig) -> Result<(), MachineError> {
        // The guest connects as soon as it sees the device.
        Ok(self.domain.attach_vif(self.host.plug_ready(vif)?)?)
    }

    fn detach_device(&self, kind: DeviceKind, devid: u32, force: bool) -> Result<(), MachineError> {
        Ok(self.domain.detach(devices::kind(kind), devid, force)?)
    }

    fn resize_disk(&self, devid: u32, bytes: u64) -> Result<(), MachineError> {
        Ok(self.domain.resize_disk(devid, bytes)?)
    }

    fn change_medium(&self, disk: &DiskConfig) -> Result<(), MachineError> {
        // To a PVH guest a drive is its medium: another medium is another disk in the same place.
        let medium = devices::disk_spec(disk)?;
        Ok(self
            .domain
            .replace_disk(disk.vdev.number, medium.as_ref())?)
    }

    fn dump_core(&self, piece: Piece<'_>) -> Result<u64, MachineError> {
        Ok(self.domain.dump_core(piece)?)
    }

    fn describe(&self) -> String {
        devices::describe(&self.info(), &self.domain.devices())
    }

    fn suspend(&self, given_up: &dyn Fn() -> bool) -> Result<(), MachineError> {
        Ok(self.domain.suspend(given_up)?)
    }

    fn is_suspended(&self) -> bool {
        self.domain.is_suspended()
    }

    fn has_ended(&self) -> bool {
        self.domain.end_reason().is_some()
    }

    fn send_live(
        &self,
        to: &mut SaveStream<'_>,
        progress: &mut dyn FnMut(LiveRound),
        given_up: &dyn Fn() -> bool,
    ) -> Result<(), MachineError> {
        let policy = LivePolicy::default();
        let live = self.domain.send_live(to, policy, progress, given_up)?;
        *self.live() = Some(live);
        Ok(())
    }

    fn forget_live(&self) {
        *self.live() = None;
    }

    fn save(&self, to: &mut SaveStream<'_>) -> Result<(), MachineError> {
        let live = self.live().take();
        Ok(self.domain.save(to, live)?)
    }

    fn resume(&self) {
        self.domain.resume();
    }

    fn passport(&self) -> Result<String, MachineError> {
        Ok(self.domain.passport()?)
    }

    fn let_go(&self) -> Result<(), MachineError> {
        Ok(self.domain.let_go_of_devices()?)
    }

    fn take_again(&self) -> Result<(), MachineError> {
        Ok(self.domain.take_devices_again()?)
    }

    fn end_saved(&self) -> bool {
        self.domain.end_saved()
    }

    fn console_input(&self, bytes: &[u8]) -> usize {
        self.domain.console().write_input(bytes)
    }
}
