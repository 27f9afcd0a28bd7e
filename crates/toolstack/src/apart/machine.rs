//! The keeper's side of a machine in a process of its own.

use std::io;
use std::os::fd::BorrowedFd;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hospes_config::{DiskConfig, Uuid, VifConfig};
use hospes_migration::LiveRound;
use serde::de::DeserializeOwned;

use super::build::Identity;
use super::call::{Back, Call, Cpus};
use super::meanwhile::Meanwhile;
use super::process::Process;
use super::told::{self, Room};
use super::wire::{Line, Wire};
use super::{Device, Keeper, broken};
use crate::instance::lock;
use crate::log::log;
use crate::machine::{Machine, MachineError, MachineInfo, Piece, SaveStream};
use crate::protocol::{DeviceKind, EndReason, ShutdownKind, Trigger, Waiting};
use crate::scheduling::{Affinity, Share, VcpuInfo};
use crate::state::is_stopped;
use crate::traffic::Traffic;

/// How long an answer may take that the process has at hand: a command waits for it no longer than for its own.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take to say whether the guest has acknowledged a request: longer than it waits for the guest.
const ACKNOWLEDGE_PATIENCE: Duration = Duration::from_secs(75);
/// How long the process may take to obey where the domain is destroyed, before it is killed.
const DESTROY_PATIENCE: Duration = Duration::from_secs(8);
/// How long the process of a destroyed domain may be there at all.
const GONE_PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked whether it is.
const GONE_LOOK: Duration = Duration::from_millis(50);
/// How long it may take to end when all is done.
const EXIT_PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked whether it has ended.
const EXIT_LOOK: Duration = Duration::from_millis(2);
/// How long the last words of a guest may take to come.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Whether what the guest prints has all come.
#[derive(Default)]
pub(super) struct Silence {
    reached: Mutex<bool>,
    changed: Condvar,
}

impl Silence {
    pub(super) fn reach(&self) {
        *lock(&self.reached) = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let reached = lock(&self.reached);
        // One that goes on for longer is not waited for.
        drop(
            self.changed
                .wait_timeout_while(reached, LAST_WORDS, |reached| !*reached),
        );
    }
}

/// A machine in a process of its own.
pub(crate) struct RemoteMachine {
    line: Arc<Line>,
    keeper: Arc<dyn Keeper>,
    identity: Arc<Identity>,
    pid: u32,
    process: Arc<Mutex<Process>>,
    end: Mutex<Option<EndReason>>,
    /// The most memory that it may have, in KiB.
    most_kib: AtomicU64,
    silence: Arc<Silence>,
    /// What answers the process's questions, and what logs for it: both end with it.
    threads: Vec<JoinHandle<()>>,
}

impl RemoteMachine {
    pub(super) fn new(
        process: Process,
        line: Arc<Line>,
        keeper: Arc<dyn Keeper>,
        identity: Arc<Identity>,
        most_kib: u64,
        silence: Arc<Silence>,
        threads: [JoinHandle<()>; 2],
    ) -> RemoteMachine {
        RemoteMachine {
            line,
            keeper,
            identity,
            pid: process.id(),
            process: Arc::new(Mutex::new(process)),
            end: Mutex::default(),
            most_kib: most_kib.into(),
            silence,
            threads: threads.into(),
        }
    }

    /// The number of the process.
    pub(crate) fn process(&self) -> u32 {
        self.pid
    }

    /// Tells the guest its new name, which the tool stack has written down already.
    pub(crate) fn rename(&self, name: &str) -> Result<(), MachineError> {
        self.identity.change(name, None)
    }

    /// The same of a machine whose UUID goes to another as well.
    pub(crate) fn become_another(&self, name: &str, uuid: Uuid) -> Result<(), MachineError> {
        self.identity.change(name, Some(uuid))
    }

    /// Begins a call. It ends by itself where the process does.
    pub(super) fn call(
        &self,
        call: &Call,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Wire, MachineError> {
        self.line
            .call(call, descriptors)
            .map_err(|fault| self.lost(fault))
    }

    /// The answer to a call with nothing before it.
    pub(super) fn answer<T: DeserializeOwned>(&self, wire: &Wire) -> Result<T, MachineError> {
        self.answer_with(wire, Meanwhile::none())
    }

    fn answer_with<T: DeserializeOwned>(
        &self,
        wire: &Wire,
        mut meanwhile: Meanwhile<'_, '_>,
    ) -> Result<T, MachineError> {
        let mut buffer = Vec::new();
        loop {
            let (back, _) = wire.expect().map_err(|fault| self.lost(fault))?;
            match back {
                Back::Done(Ok(value)) => return serde_json::from_value(value).map_err(broken),
                Back::Done(Err(message)) => return Err(told::sentence(&message).into()),
                other => {
                    meanwhile.obey(other, wire, &mut buffer, &|fault| self.lost(fault))?;
                }
            }
        }
    }

    fn ask<T: DeserializeOwned>(&self, call: &Call) -> Result<T, MachineError> {
        let wire = self.call(call, &[])?;
        self.answer(&wire)
    }

    /// The same of what takes no time.
    fn ask_soon<T: DeserializeOwned>(&self, call: &Call) -> Result<T, MachineError> {
        let wire = self.call(call, &[])?;
        self.answer(&wire.until(Instant::now() + ANSWER_PATIENCE))
    }

    /// The same, where a process that is gone or does not answer means nothing of it.
    fn ask_or<T: DeserializeOwned>(&self, call: &Call, otherwise: T) -> T {
        self.ask_soon(call).unwrap_or(otherwise)
    }

    /// As [`RemoteMachine::ask`], of a device that the machine gets.
    fn ask_for(
        &self,
        call: &Call,
        device: Device<'_>,
        kind: DeviceKind,
        devid: u32,
    ) -> Result<(), MachineError> {
        self.keeper.permit(device)?;
        self.ask(call)
            .inspect_err(|_| self.keeper.revoke(kind, devid))
    }

    /// What to say of a connection that has ended too soon.
    fn lost(&self, fault: io::Error) -> MachineError {
        match self.ended() {
            Some(status) => died(status).into(),
            None => format!("the domain's machine process does not answer: {fault}").into(),
        }
    }

    /// How the process ended, where it did, or is about to: its end of the sockets goes before it.
    fn ended(&self) -> Option<ExitStatus> {
        let deadline = Instant::now() + EXIT_PATIENCE;
        loop {
            if let Some(status) = self.poll() {
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(EXIT_LOOK);
        }
    }

    /// For what is written of it.
    fn room(&self) -> Room {
        Room::for_once(self.most_kib.load(Ordering::Relaxed))
    }

    fn poll(&self) -> Option<ExitStatus> {
        lock(&self.process).poll()
    }

    fn kill(&self) {
        lock(&self.process).kill();
    }

    /// Destroys the machine by a call that is done soon, or with its process.
    fn insist(&self, call: &Call) {
        let obey = || -> Result<(), MachineError> {
            // One that nobody can ask is killed at once.
            if is_stopped(self.pid) {
                return Err("it is stopped".into());
            }
            let wire = self.call(call, &[])?;
            self.answer(&wire.until(Instant::now() + DESTROY_PATIENCE))
        };
        let done = obey();
        if let Err(fault) = done {
            if self.poll().is_none() {
                log!("The machine process is killed: {fault}");
            }
            lock(&self.end).get_or_insert(EndReason::Destroyed);
            self.kill();
        }
    }
}

/// Sees to it that a process ends soon, whatever it has said and whoever waits for it.
fn see_to_end(process: &Arc<Mutex<Process>>) {
    let process = Arc::clone(process);
    let seeing = thread::Builder::new().name("end".into()).spawn(move || {
        let deadline = Instant::now() + GONE_PATIENCE;
        while lock(&process).poll().is_none() {
            if Instant::now() >= deadline {
                log!("The machine process does not end: it is killed");
                return lock(&process).kill();
            }
            thread::sleep(GONE_LOOK);
        }
    });
    if let Err(fault) = seeing {
        log!(
            "nobody sees to the end of the machine process, the host has no thread for it: {fault}"
        );
    }
}

/// A sentence for the log and for commands.
fn died(status: ExitStatus) -> String {
    format!("the domain's machine process has ended ({status}): the domain's log says more")
}

impl Machine for RemoteMachine {
    fn make_ready(&self) -> Result<(), MachineError> {
        self.ask(&Call::MakeReady)
    }

    fn unpause(&self) {
        self.ask_or(&Call::Unpause, ());
    }

    fn pause(&self) {
        self.ask_or(&Call::Pause, ());
    }

    fn request_shutdown(&self, kind: ShutdownKind) -> Result<(), MachineError> {
        self.ask_soon(&Call::RequestShutdown(kind))
    }

    fn wait_acknowledged(&self, given_up: &dyn Fn() -> bool) -> Result<(), MachineError> {
        let wire = self.call(&Call::WaitAcknowledged, &[])?;
        let given_up = Some(given_up);
        self.answer_with(
            &wire.until(Instant::now() + ACKNOWLEDGE_PATIENCE),
            Meanwhile {
                given_up,
                ..Meanwhile::none()
            },
        )
    }

    fn destroy(&self) {
        self.keeper.hurry();
        self.insist(&Call::Destroy);
        see_to_end(&self.process);
    }

    fn leave(&self) {
        // A process that is gone has none.
        let _ = self.ask::<()>(&Call::Leave);
        self.keeper.release();
    }

    fn give_up_devices(&self) {
        // A process that is gone has none.
        let _ = self.ask::<()>(&Call::GiveUpDevices);
        self.keeper.release();
    }

    fn wait(&self) -> EndReason {
        if let Some(reason) = &*lock(&self.end) {
            return reason.clone();
        }
        let reason = self.ask(&Call::Wait).map(told::end);
        let reason = reason.unwrap_or_else(|fault| {
            // Whatever else it was that went wrong: a guest that nobody hears of does not go on.
            self.kill();
            EndReason::Crash(fault.to_string())
        });
        self.silence.wait();
        lock(&self.end).get_or_insert(reason).clone()
    }

    fn has_ended(&self) -> bool {
        lock(&self.end).is_some() || self.ask(&Call::HasEnded).unwrap_or(true)
    }

    fn info(&self) -> MachineInfo {
        let info = self.ask_or(&Call::Info, MachineInfo::default());
        told::info(info, self.most_kib.load(Ordering::Relaxed))
    }

    fn traffic(&self) -> Traffic {
        self.ask_or(&Call::Traffic, Traffic::default())
    }

    fn waiting(&self) -> Vec<Waiting> {
        told::waiting(self.ask_or(&Call::Waiting, Vec::new()))
    }

    fn attach_disk(&self, disk: &DiskConfig) -> Result<(), MachineError> {
        let call = Call::AttachDisk(Box::new(disk.clone()));
        self.ask_for(
            &call,
            Device::Disk(disk),
            DeviceKind::Disk,
            disk.vdev.number,
        )
    }

    fn attach_vif(&self, vif: &VifConfig) -> Result<(), MachineError> {
        let call = Call::AttachVif(Box::new(vif.clone()));
        let devid = vif.devid.unwrap_or(0);
        self.ask_for(&call, Device::Vif(vif), DeviceKind::Vif, devid)
    }

    fn detach_device(&self, kind: DeviceKind, devid: u32, force: bool) -> Result<(), MachineError> {
        self.ask::<()>(&Call::DetachDevice { kind, devid, force })?;
        self.keeper.revoke(kind, devid);
        Ok(())
    }

    fn resize_disk(&self, devid: u32, bytes: u64) -> Result<(), MachineError> {
        self.ask(&Call::ResizeDisk { devid, bytes })
    }

    fn change_medium(&self, disk: &DiskConfig) -> Result<(), MachineError> {
        let medium = Device::Disk(disk);
        self.keeper.permit(medium)?;
        self.ask::<()>(&Call::ChangeMedium(Box::new(disk.clone())))?;
        // The one before is not its business any more.
        self.keeper.revoke(DeviceKind::Disk, disk.vdev.number);
        self.keeper.permit(medium)
    }

    fn send_sysrq(&self, key: char) -> Result<(), MachineError> {
        self.ask_soon(&Call::SendSysrq(key))
    }

    fn trigger(&self, trigger: Trigger, vcpu: u32) -> Result<(), MachineError> {
        self.ask_soon(&Call::Trigger { trigger, vcpu })
    }

    fn dump_core(&self, piece: Piece<'_>) -> Result<u64, MachineError> {
        let wire = self.call(&Call::DumpCore, &[])?;
        let meanwhile = Meanwhile {
            piece: Some(piece),
            room: self.room(),
            ..Meanwhile::none()
        };
        let size = self.answer_with(&wire, meanwhile)?;
        self.room().check_end(Some(size))?;
        Ok(size)
    }

    fn describe(&self) -> String {
        let said: Result<String, _> = self.ask_soon(&Call::Describe);
        said.map_or_else(|fault| fault.to_string(), |text| told::lines(&text))
    }

    fn vcpus(&self) -> Vec<VcpuInfo> {
        told::vcpus(self.ask_or(&Call::Vcpus, Vec::new()))
    }

    fn pin(
        &self,
        vcpu: Option<u32>,
        hard: Option<&Affinity>,
        soft: Option<&Affinity>,
    ) -> Result<(), MachineError> {
        let (hard, soft) = (hard.map(Cpus::new), soft.map(Cpus::new));
        self.ask_soon(&Call::Pin { vcpu, hard, soft })
    }

    fn share(&self) -> Share {
        self.ask_or(&Call::Share, Share::DEFAULT)
    }

    fn set_share(&self, share: Share) -> Result<(), MachineError> {
        self.keeper.share(share);
        self.ask(&Call::SetShare(share))
    }

    fn set_vcpus(&self, online: u32) -> Result<(), MachineError> {
        self.ask(&Call::SetVcpus(online))
    }

    fn set_memory_target(&self, kib: u64, promised: &dyn Fn() -> u64) -> Result<(), MachineError> {
        let wire = self.call(&Call::SetMemoryTarget(kib), &[])?;
        let promised = Some(promised);
        self.answer_with(
            &wire,
            Meanwhile {
                promised,
                ..Meanwhile::none()
            },
        )
    }

    fn set_memory_max(&self, kib: u64, promised: &dyn Fn() -> u64) -> Result<(), MachineError> {
        let wire = self.call(&Call::SetMemoryMax(kib), &[])?;
        let promised = Some(promised);
        self.answer_with::<()>(
            &wire,
            Meanwhile {
                promised,
                ..Meanwhile::none()
            },
        )?;
        self.most_kib.fetch_max(kib, Ordering::Relaxed);
        Ok(())
    }

    fn suspend(&self, given_up: &dyn Fn() -> bool) -> Result<(), MachineError> {
        let wire = self.call(&Call::Suspend, &[])?;
        let given_up = Some(given_up);
        self.answer_with(
            &wire,
            Meanwhile {
                given_up,
                ..Meanwhile::none()
            },
        )
        .inspect(|()| self.identity.suspend())
    }

    fn is_suspended(&self) -> bool {
        self.ask(&Call::IsSuspended).unwrap_or(false)
    }

    fn send_live(
        &self,
        to: &mut SaveStream<'_>,
        progress: &mut dyn FnMut(LiveRound),
        given_up: &dyn Fn() -> bool,
    ) -> Result<(), MachineError> {
        let wire = self.call(&Call::SendLive, &[])?;
        let meanwhile = Meanwhile {
            progress: Some(progress),
            given_up: Some(given_up),
            to: Some(to),
            ..Meanwhile::none()
        };
        let pages = self.answer_with(&wire, meanwhile)?;
        to.count(pages);
        Ok(())
    }

    fn forget_live(&self) {
        self.ask_or(&Call::ForgetLive, ());
    }

    fn save(&self, to: &mut SaveStream<'_>) -> Result<(), MachineError> {
        let wire = self.call(&Call::Save, &[])?;
        let meanwhile = Meanwhile {
            room: self.room(),
            to: Some(to),
            ..Meanwhile::none()
        };
        let pages = self.answer_with(&wire, meanwhile)?;
        to.count(pages);
        Ok(())
    }

    fn passport(&self) -> Result<String, MachineError> {
        self.ask(&Call::Passport)
    }

    fn let_go(&self) -> Result<(), MachineError> {
        self.ask(&Call::LetGo)
    }

    fn take_again(&self) -> Result<(), MachineError> {
        self.ask(&Call::TakeAgain)
    }

    fn resume(&self) {
        self.ask_or(&Call::Resume, ());
        self.identity.resume();
    }

    fn end_saved(&self) -> bool {
        self.ask(&Call::EndSaved).unwrap_or(false)
    }

    fn console_input(&self, bytes: &[u8]) -> usize {
        let taken = self.ask_or(&Call::ConsoleInput(bytes.into()), bytes.len());
        taken.min(bytes.len())
    }
}

impl Drop for RemoteMachine {
    fn drop(&mut self) {
        self.line.close();
        if self.ended().is_none() {
            log!("The machine process does not end: it is killed");
        }
        self.kill();
        self.keeper.release();
        for thread in self.threads.drain(..) {
            // A panic in it was said already.
            let _ = thread.join();
        }
    }
}
