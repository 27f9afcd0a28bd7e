//! The machine without a guest.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hospes_config::{DiskConfig, VifConfig};
use hospes_store::{DomainEntry, DomainStore, GuestLink, Membership};
use hospes_toolstack::{
    Affinity, DeviceKind, EndReason, Machine, MachineError, MachineInfo, MachineSpec, Piece,
    SaveStream, Share, ShutdownKind, Traffic, Trigger, VcpuInfo,
};

/// What the host of these domains has.
pub const HOST_BYTES: u64 = 1 << 40;
/// How long it takes at most until the end of one that lingers is known.
const LINGER: Duration = Duration::from_secs(20);

struct State {
    console: Box<dyn Write + Send>,
    line: Vec<u8>,
    started: bool,
    paused: bool,
    ready: bool,
    /// What it was asked for before it was ready to start: no guest ends before.
    asked: Option<EndReason>,
    end: Option<EndReason>,
    /// The last line that was no command.
    heard: String,
    suspended: bool,
    let_go: bool,
    /// A disk that is not given back.
    stuck: Option<u32>,
    online: u32,
    memory_kib: u64,
    share: Share,
    affinities: Vec<(Affinity, Affinity)>,
}

struct Mock {
    /// That the store knows of it.
    membership: Mutex<Option<(Box<dyn GuestLink>, Membership)>>,
    state: Mutex<State>,
    changed: Condvar,
    memory_max_kib: u64,
    deaf: bool,
    /// It takes its time to shut down, until it is told to on its console.
    slow: bool,
    /// While there is such a file others have its devices.
    taken: PathBuf,
    /// While there is such a file nobody is told of its end.
    lingering: PathBuf,
    /// While there is such a file it does not leave.
    staying: PathBuf,
    /// While there is such a file it is not ready to start.
    unready: PathBuf,
    /// While there is such a file it does not acknowledge what it is asked.
    unheard: PathBuf,
}

impl Mock {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, state: &mut State, reason: EndReason) {
        state.end.get_or_insert(reason);
        if self.lingers() {
            say(state, "lingers");
        }
        self.changed.notify_all();
    }

    fn lingers(&self) -> bool {
        self.lingering.exists()
    }

    fn obey(&self, state: &mut State) {
        let line = String::from_utf8_lossy(&std::mem::take(&mut state.line)).into_owned();
        let reason = match line.as_str() {
            "poweroff" => EndReason::Poweroff,
            "reboot" => EndReason::Reboot,
            "crash" => EndReason::Crash("asked to".into()),
            "watchdog" => EndReason::Watchdog,
            "suspend" => EndReason::Suspend,
            "flood" => {
                for _ in 0..4096 {
                    say(state, &"x".repeat(1023));
                }
                return say(state, "flooded");
            }
            other => {
                state.heard = other.into();
                return say(state, &format!("echo: {other}"));
            }
        };
        self.end(state, reason);
    }
}

/// Waits while something is so, at most as long as one lingers.
fn wait_while(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + LINGER;
    while is_so() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn say(state: &mut State, line: &str) {
    // The sink of the tool stack does not fail.
    let _ = writeln!(state.console, "{line}");
}

impl Machine for Mock {
    fn make_ready(&self) -> Result<(), MachineError> {
        wait_while(|| self.unready.exists() && !self.has_ended());
        match self.has_ended() {
            true => Err("it has ended before it was ready".into()),
            false => {
                let mut state = self.lock();
                state.ready = true;
                if let Some(reason) = state.asked.take() {
                    self.end(&mut state, reason);
                }
                Ok(())
            }
        }
    }

    fn unpause(&self) {
        let mut state = self.lock();
        state.paused = false;
        if !std::mem::replace(&mut state.started, true) {
            say(&mut state, "mock guest ready");
        }
    }

    fn pause(&self) {
        self.lock().paused = true;
    }

    fn request_shutdown(&self, kind: ShutdownKind) -> Result<(), MachineError> {
        let mut state = self.lock();
        if self.deaf {
            say(&mut state, "I hear nothing");
            return Ok(());
        }
        if self.slow {
            say(&mut state, "I shall");
            return Ok(());
        }
        let reason = match kind {
            ShutdownKind::Poweroff => EndReason::Poweroff,
            ShutdownKind::Reboot => EndReason::Reboot,
        };
        match state.ready {
            true => self.end(&mut state, reason),
            false => state.asked = Some(reason),
        }
        Ok(())
    }

    fn wait_acknowledged(&self, given_up: &dyn Fn() -> bool) -> Result<(), MachineError> {
        wait_while(|| self.unheard.exists() && !self.has_ended() && !given_up());
        match self.deaf {
            true => Err("the guest hears nothing".into()),
            false => Ok(()),
        }
    }

    fn destroy(&self) {
        self.end(&mut self.lock(), EndReason::Destroyed);
    }

    fn leave(&self) {
        self.destroy();
        wait_while(|| self.staying.exists());
        let membership = self.membership.lock();
        membership.unwrap_or_else(PoisonError::into_inner).take();
    }

    fn wait(&self) -> EndReason {
        let mut state = self.lock();
        let reason = loop {
            if let Some(reason) = &state.end {
                break reason.clone();
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        wait_while(|| self.lingers());
        reason
    }

    fn has_ended(&self) -> bool {
        self.lock().end.is_some()
    }

    fn info(&self) -> MachineInfo {
        let state = self.lock();
        MachineInfo {
            memory_kib: state.memory_kib,
            // It never touches any.
            promised_kib: state.memory_kib,
            vcpus_online: state.online,
            cpu_time_ns: 1_500_000_000,
            running: false,
            blocked: !state.paused,
            paused: state.paused,
        }
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            vifs: 1,
            sent_bytes: 2048,
            received_bytes: 4096,
            disks: 2,
            reads: 3,
            writes: 5,
            read_bytes: 512 * 7,
            written_bytes: 512 * 11,
        }
    }

    fn attach_disk(&self, disk: &DiskConfig) -> Result<(), MachineError> {
        let name = disk.target.as_ref().and_then(|target| target.file_name());
        if name == Some("bad".as_ref()) {
            return Err("the image is bad".into());
        }
        if name == Some("slow".as_ref()) {
            wait_while(|| self.taken.exists());
        }
        let mut state = self.lock();
        if name == Some("stuck".as_ref()) {
            state.stuck = Some(disk.vdev.number);
        }
        say(&mut state, &format!("attached disk {}", disk.vdev));
        Ok(())
    }

    fn attach_vif(&self, vif: &VifConfig) -> Result<(), MachineError> {
        let line = format!("attached vif {}", vif.devid.unwrap_or(u32::MAX));
        say(&mut self.lock(), &line);
        Ok(())
    }

    fn detach_device(&self, kind: DeviceKind, devid: u32, force: bool) -> Result<(), MachineError> {
        let mut state = self.lock();
        if state.stuck == Some(devid) && !force {
            return Err("the guest does not let go of the device: use --force".into());
        }
        say(&mut state, &format!("detached {kind:?} {devid}"));
        Ok(())
    }

    fn resize_disk(&self, devid: u32, bytes: u64) -> Result<(), MachineError> {
        say(&mut self.lock(), &format!("resized {devid} to {bytes}"));
        Ok(())
    }

    fn change_medium(&self, disk: &DiskConfig) -> Result<(), MachineError> {
        let what = match &disk.target {
            Some(target) => format!("medium {}", target.display()),
            None => "no medium".into(),
        };
        say(&mut self.lock(), &what);
        Ok(())
    }

    fn send_sysrq(&self, key: char) -> Result<(), MachineError> {
        say(&mut self.lock(), &format!("sysrq {key}"));
        Ok(())
    }

    fn trigger(&self, trigger: Trigger, vcpu: u32) -> Result<(), MachineError> {
        if trigger != Trigger::Nmi {
            return Err(format!("no {} here", trigger.as_str()).into());
        }
        say(&mut self.lock(), &format!("nmi at vCPU {vcpu}"));
        Ok(())
    }

    fn vcpus(&self) -> Vec<VcpuInfo> {
        let state = self.lock();
        let text = |affinity: &Affinity| affinity.as_ref().map(ToString::to_string);
        let vcpu = |(n, (hard, soft)): (usize, &(Affinity, Affinity))| VcpuInfo {
            vcpu: n as u32,
            online: (n as u32) < state.online,
            running: false,
            blocked: !state.paused,
            host_cpu: Some(0),
            time_ns: 1_500_000_000,
            hard: text(hard),
            soft: text(soft),
        };
        state.affinities.iter().enumerate().map(vcpu).collect()
    }

    fn pin(
        &self,
        vcpu: Option<u32>,
        hard: Option<&Affinity>,
        soft: Option<&Affinity>,
    ) -> Result<(), MachineError> {
        let mut state = self.lock();
        let last = state.affinities.len() - 1;
        if vcpu.is_some_and(|vcpu| vcpu as usize > last) {
            return Err(format!("its last vCPU is {last}").into());
        }
        for (n, place) in state.affinities.iter_mut().enumerate() {
            if vcpu.is_none_or(|vcpu| vcpu as usize == n) {
                place.0 = hard.unwrap_or(&place.0).clone();
                place.1 = soft.unwrap_or(&place.1).clone();
            }
        }
        Ok(())
    }

    fn share(&self) -> Share {
        self.lock().share
    }

    fn set_share(&self, share: Share) -> Result<(), MachineError> {
        let mut state = self.lock();
        check(share, state.affinities.len())?;
        state.share = share;
        Ok(())
    }

    fn set_vcpus(&self, online: u32) -> Result<(), MachineError> {
        let mut state = self.lock();
        let most = state.affinities.len();
        if online == 0 || online as usize > most {
            return Err(format!("it has 1 to {most} vCPUs").into());
        }
        state.online = online;
        Ok(())
    }

    fn set_memory_target(&self, kib: u64, promised: &dyn Fn() -> u64) -> Result<(), MachineError> {
        if kib > self.memory_max_kib {
            return Err(format!("it has {} KiB at most", self.memory_max_kib).into());
        }
        let others = promised();
        let mut state = self.lock();
        if kib > state.memory_kib && others.saturating_add(kib << 10) > HOST_BYTES {
            return Err(format!("others may take {others} bytes of the host").into());
        }
        state.memory_kib = kib;
        say(&mut state, &format!("memory {kib}"));
        Ok(())
    }

    fn set_memory_max(&self, kib: u64, _: &dyn Fn() -> u64) -> Result<(), MachineError> {
        let mut state = self.lock();
        if kib < state.memory_kib {
            return Err(format!("it is to have {} KiB", state.memory_kib).into());
        }
        say(&mut state, &format!("memory at most {kib}"));
        Ok(())
    }

    fn suspend(&self, _: &dyn Fn() -> bool) -> Result<(), MachineError> {
        let mut state = self.lock();
        if state.paused {
            return Err("it is paused".into());
        }
        state.suspended = true;
        say(&mut state, "suspended");
        Ok(())
    }

    fn is_suspended(&self) -> bool {
        let state = self.lock();
        state.suspended && state.end.is_none()
    }

    fn save(&self, to: &mut SaveStream<'_>) -> Result<(), MachineError> {
        let heard = self.lock().heard.clone();
        if heard == "broken" {
            return Err("it is broken".into());
        }
        to.pages(7, &[7; 4096])?;
        Ok(to.machine(heard.as_bytes())?)
    }

    fn dump_core(&self, piece: Piece<'_>) -> Result<u64, MachineError> {
        let heard = self.lock().heard.clone();
        piece(0, heard.as_bytes())?;
        if heard == "broken" {
            return Err("it is broken".into());
        }
        piece(1 << 20, &[7; 4096])?;
        Ok(2 << 20)
    }

    fn resume(&self) {
        let mut state = self.lock();
        assert!(!state.let_go, "it would run without its devices");
        if std::mem::take(&mut state.suspended) {
            say(&mut state, "resumed");
        }
    }

    fn passport(&self) -> Result<String, MachineError> {
        let state = self.lock();
        match state.paused {
            true => Err("it is paused".into()),
            false => Ok(state.heard.clone()),
        }
    }

    fn let_go(&self) -> Result<(), MachineError> {
        let mut state = self.lock();
        state.let_go = true;
        say(&mut state, "let go");
        match &state.heard[..] {
            "clings" => return Err("the disk fails".into()),
            "restless" => {
                state.suspended = false;
                say(&mut state, "resumed");
            }
            _ => {}
        }
        Ok(())
    }

    fn take_again(&self) -> Result<(), MachineError> {
        let mut state = self.lock();
        if state.let_go && self.taken.exists() {
            return Err("the disk is taken".into());
        }
        if std::mem::take(&mut state.let_go) {
            say(&mut state, "taken again");
        }
        Ok(())
    }

    fn end_saved(&self) -> bool {
        let mut state = self.lock();
        let held = state.suspended;
        if held {
            self.end(&mut state, EndReason::Destroyed);
        }
        held
    }

    fn console_input(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        for byte in bytes {
            match byte {
                b'\n' | b'\r' => self.obey(&mut state),
                _ => state.line.push(*byte),
            }
        }
        bytes.len()
    }
}

pub fn make(
    spec: &MachineSpec<'_>,
    heard: String,
    console: Box<dyn Write + Send>,
) -> Result<Arc<dyn Machine>, MachineError> {
    let scheduling = &spec.config.scheduling;
    let share = Share {
        weight: scheduling.weight.unwrap_or(Share::DEFAULT.weight),
        cap: scheduling.cap.unwrap_or(Share::DEFAULT.cap),
    };
    check(share, spec.config.maxvcpus as usize)?;
    let unbuilt = spec.config.kernel.with_extension("unbuilt");
    wait_while(|| unbuilt.exists());
    let membership = enter(spec)?;
    Ok(Arc::new(Mock {
        membership: Mutex::new(Some(membership)),
        state: Mutex::new(State {
            console,
            line: Vec::new(),
            started: false,
            ready: false,
            asked: None,
            paused: true,
            end: None,
            heard,
            suspended: false,
            let_go: false,
            stuck: None,
            online: spec.config.vcpus,
            memory_kib: spec.config.memory_kib(),
            share,
            affinities: vec![(None, None); spec.config.maxvcpus as usize],
        }),
        changed: Condvar::new(),
        memory_max_kib: spec.config.memory_max_kib(),
        deaf: spec.config.cmdline.contains("deaf"),
        slow: spec.config.cmdline.contains("slow"),
        taken: spec.config.kernel.with_extension("taken"),
        lingering: spec.config.kernel.with_extension("lingering"),
        staying: spec.config.kernel.with_extension("staying"),
        unready: spec.config.kernel.with_extension("unready"),
        unheard: spec.config.kernel.with_extension("unheard"),
    }))
}

/// Refuses what a real domain with so many vCPUs refuses.
fn check(share: Share, vcpus: usize) -> Result<(), MachineError> {
    let most = vcpus * 100;
    if usize::from(share.cap) > most {
        return Err(format!("a cap of {} is out of range: it is 0 to {most}", share.cap).into());
    }
    Ok(())
}

/// Enters the domain into the store, as a real one is.
fn enter(spec: &MachineSpec<'_>) -> Result<(Box<dyn GuestLink>, Membership), MachineError> {
    let entry = DomainEntry {
        domid: spec.domid,
        uuid: spec.uuid.to_string(),
        name: spec.config.name.clone(),
        memory_kib: spec.config.memory_kib(),
        memory_max_kib: spec.config.memory_max_kib(),
        vcpus: spec.config.maxvcpus,
        console_port: 2,
        console_ring: 0xfefff,
        store_port: 1,
        store_ring: 0xfeffc,
    };
    Ok(spec.store.add_domain(&entry, Arc::new(|| {}))?)
}
