//! The machine process.

use std::io::{self, BufWriter, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use hospes_migration::{LiveRound, Reader, Writer};
use hospes_store_server::{Connector, StoreClient, StoreError};
use hospes_units::DomId;
use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::Value;

use super::Program;
use super::call::{Answer, Ask, Back, Build, Call, StoreTrouble};
use super::wire::{Line, Wire};
use crate::log::log;
use crate::machine::{Machine, MachineError, MachineSpec, SavedInput};
use crate::saving::BUFFER;
use crate::state::Promised;

/// Asks the keeper of this process for what it has no right to.
#[derive(Clone, Debug)]
pub struct Asker(Arc<Line>);

impl Asker {
    fn ask(&self, ask: &Ask) -> Result<(Value, Vec<OwnedFd>), MachineError> {
        let asked = self
            .0
            .call(ask, &[])
            .and_then(|wire| wire.expect::<Answer>());
        let (answer, descriptors) =
            asked.map_err(|fault| format!("the domain's keeper does not answer: {fault}"))?;
        Ok((answer?, descriptors))
    }

    /// Asks what the program's [`Keeper`](super::Keeper) answers. The error is its sentence.
    pub fn program(&self, ask: Value) -> Result<(Value, Vec<OwnedFd>), MachineError> {
        self.ask(&Ask::Program(ask))
    }

    fn number(&self, ask: &Ask) -> Option<u64> {
        self.ask(ask).ok()?.0.as_u64()
    }
}

impl Connector for Asker {
    fn connect(&self) -> io::Result<UnixStream> {
        let (_, descriptors) = self.ask(&Ask::Store).map_err(io::Error::other)?;
        let stream = descriptors.into_iter().next();
        Ok(UnixStream::from(stream.ok_or(io::ErrorKind::InvalidData)?))
    }

    fn trouble(&self) -> Option<StoreError> {
        let (trouble, _) = self.ask(&Ask::StoreTrouble).ok()?;
        Some(match serde_json::from_value::<Option<_>>(trouble).ok()?? {
            StoreTrouble::Full => StoreError::Full,
            StoreTrouble::OtherVersion => StoreError::OtherVersion,
        })
    }
}

/// What the hidden subcommand [`crate::MACHINE_SUBCOMMAND`] does: one machine, until its keeper has no more use for it.
pub fn machine_process(program: &dyn Program) -> ExitCode {
    match begin(program) {
        Ok(Some((machine, line))) => {
            serve(&machine, &line);
            // Nobody is there to say anything to, and the guest is nobody's.
            ExitCode::SUCCESS
        }
        // The keeper knows.
        Ok(None) => ExitCode::FAILURE,
        Err(fault) => {
            log!("{fault}");
            ExitCode::FAILURE
        }
    }
}

type Begun = (Arc<dyn Machine>, Arc<Line>);

/// Builds the machine, and says so or why not.
fn begin(program: &dyn Program) -> Result<Option<Begun>, MachineError> {
    // Without its keeper it has no reason to be; where that is gone already, the line says so.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Meant for the keeper, which knows what is to become of the guest.
    hospes_sys::ignore_termination()?;
    let stdin = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    let line = Arc::new(Line::new(UnixStream::from(stdin)));
    let by_hand = "this subcommand is started by domain processes, not by hand";
    let (build, wire, descriptors) = match line.next::<Call>().map_err(|_| by_hand)? {
        Some((Call::Build(build), wire, descriptors)) => (build, wire, descriptors),
        Some(_) => return Err(by_hand.into()),
        // The domain is not to have what it asks for, which its keeper says.
        None => return Ok(None),
    };
    let asker = Asker(Arc::clone(&line));
    let mut console = None;
    match make(program, *build, &wire, descriptors, &asker, &mut console) {
        Ok(machine) => {
            wire.send(&Back::Done(Ok(Value::Null)), &[])?;
            let spoken = Arc::clone(&machine);
            if let Some(console) = console {
                // What the guest has printed by its end is all that comes.
                thread::Builder::new().spawn(move || {
                    spoken.wait();
                    let _ = console.shutdown(Shutdown::Write);
                })?;
            }
            Ok(Some((machine, line)))
        }
        Err(fault) => {
            wire.send(&Back::Done(Err(fault.to_string())), &[])?;
            Ok(None)
        }
    }
}

fn make(
    program: &dyn Program,
    build: Build,
    wire: &Wire,
    descriptors: Vec<OwnedFd>,
    asker: &Asker,
    output: &mut Option<UnixStream>,
) -> Result<Arc<dyn Machine>, MachineError> {
    let mut descriptors = descriptors.into_iter();
    let console = UnixStream::from(descriptors.next().ok_or("there is no console")?);
    *output = Some(console.try_clone()?);
    let saved = match build.ahead {
        Some(bytes) => {
            let mut ahead = vec![0; bytes as usize];
            wire.stream().read_exact(&mut ahead)?;
            let rest = descriptors.next().ok_or("there is no stream")?;
            Some(Reader::continued(SavedInput::new(ahead, rest)))
        }
        None => None,
    };
    let store = StoreClient::new(asker.clone())?;
    let to_count = asker.clone();
    let spec = MachineSpec {
        domid: DomId(build.domid),
        uuid: build.uuid,
        config: &build.config,
        // Who is not told how much is promised trusts that it is all.
        promised: Promised::by(move || to_count.number(&Ask::Promised).unwrap_or(u64::MAX)),
        store: &store,
    };
    program.build(&spec, saved, Box::new(console), asker.clone())
}

/// Obeys the keeper until it hangs up.
fn serve(machine: &Arc<dyn Machine>, line: &Line) {
    loop {
        let (call, wire) = match line.next::<Call>() {
            Ok(Some((call, wire, _))) => (call, wire),
            Ok(None) => return,
            Err(fault) => return log!("the keeper cannot be understood: {fault}"),
        };
        let machine = Arc::clone(machine);
        let obeyed = thread::Builder::new().name("call".into()).spawn(move || {
            let done = obey(&*machine, call, &wire).map_err(|fault| fault.to_string());
            // A command that has left needs no answer.
            let _ = wire.send(&Back::Done(done), &[]);
        });
        if let Err(fault) = obeyed {
            log!("a call of the keeper's cannot be obeyed, the host has no thread for it: {fault}");
        }
    }
}

/// Carries a call out.
fn obey(machine: &dyn Machine, call: Call, wire: &Wire) -> Result<Value, MachineError> {
    let promised = || ask_back(wire, &Back::Promised).unwrap_or(u64::MAX);
    let given_up = || ask_back(wire, &Back::GivenUp).unwrap_or(true);
    match call {
        Call::Build(_) => return Err("there is a machine already".into()),
        Call::MakeReady => machine.make_ready()?,
        Call::Unpause => machine.unpause(),
        Call::Pause => machine.pause(),
        Call::RequestShutdown(kind) => machine.request_shutdown(kind)?,
        Call::WaitAcknowledged => machine.wait_acknowledged(&given_up)?,
        Call::Destroy => machine.destroy(),
        Call::Leave => machine.leave(),
        Call::GiveUpDevices => machine.give_up_devices(),
        Call::Wait => return Ok(serde_json::to_value(machine.wait())?),
        Call::HasEnded => return Ok(machine.has_ended().into()),
        Call::Info => return Ok(serde_json::to_value(machine.info())?),
        Call::Traffic => return Ok(serde_json::to_value(machine.traffic())?),
        Call::Waiting => return Ok(serde_json::to_value(machine.waiting())?),
        Call::AttachDisk(disk) => machine.attach_disk(&disk)?,
        Call::AttachVif(vif) => machine.attach_vif(&vif)?,
        Call::DetachDevice { kind, devid, force } => machine.detach_device(kind, devid, force)?,
        Call::ResizeDisk { devid, bytes } => machine.resize_disk(devid, bytes)?,
        Call::ChangeMedium(disk) => machine.change_medium(&disk)?,
        Call::SendSysrq(key) => machine.send_sysrq(key)?,
        Call::Trigger { trigger, vcpu } => machine.trigger(trigger, vcpu)?,
        Call::DumpCore => {
            let size = machine.dump_core(&mut |offset, bytes| piece(wire, offset, bytes))?;
            return Ok(size.into());
        }
        Call::Describe => return Ok(machine.describe().into()),
        Call::Vcpus => return Ok(serde_json::to_value(machine.vcpus())?),
        Call::Pin { vcpu, hard, soft } => {
            let hard = hard.map(|cpus| cpus.affinity()).transpose()?;
            let soft = soft.map(|cpus| cpus.affinity()).transpose()?;
            machine.pin(vcpu, hard.as_ref(), soft.as_ref())?;
        }
        Call::Share => return Ok(serde_json::to_value(machine.share())?),
        Call::SetShare(share) => machine.set_share(share)?,
        Call::SetVcpus(online) => machine.set_vcpus(online)?,
        Call::SetMemoryTarget(kib) => machine.set_memory_target(kib, &promised)?,
        Call::SetMemoryMax(kib) => machine.set_memory_max(kib, &promised)?,
        Call::Suspend => machine.suspend(&given_up)?,
        Call::IsSuspended => return Ok(machine.is_suspended().into()),
        Call::SendLive => {
            return stream(wire, |to| {
                let mut progress = |round: LiveRound| {
                    // A keeper that is gone ends this process.
                    let _ = wire.send(&Back::round(round), &[]);
                };
                machine.send_live(to, &mut progress, &given_up)
            });
        }
        Call::ForgetLive => machine.forget_live(),
        Call::Save => return stream(wire, |to| machine.save(to)),
        Call::Passport => return Ok(machine.passport()?.into()),
        Call::LetGo => machine.let_go()?,
        Call::TakeAgain => machine.take_again()?,
        Call::Resume => machine.resume(),
        Call::EndSaved => return Ok(machine.end_saved().into()),
        Call::ConsoleInput(bytes) => return Ok(machine.console_input(&bytes).into()),
    }
    Ok(Value::Null)
}

/// Asks on a call's connection.
fn ask_back<T: serde::de::DeserializeOwned>(wire: &Wire, back: &Back) -> io::Result<T> {
    wire.send(back, &[])?;
    Ok(wire.expect()?.0)
}

/// A piece of a core file.
fn piece(wire: &Wire, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let message = Back::Piece {
        offset,
        bytes: bytes.len() as u32,
    };
    wire.send(&message, &[])?;
    wire.stream().write_all(bytes)?;
    match wire.expect::<Option<String>>()?.0 {
        None => Ok(()),
        Some(fault) => Err(io::Error::other(fault)),
    }
}

/// The part of a stream that a call gives.
struct Part<'a>(&'a Wire);

impl Write for Part<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(BUFFER)];
        self.0.send(&Back::Bytes(bytes.len() as u32), &[])?;
        self.0.stream().write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives a part of the stream of a saved domain; the answer is how many pages it has.
fn stream(
    wire: &Wire,
    give: impl FnOnce(&mut Writer<&mut dyn Write>) -> Result<(), MachineError>,
) -> Result<Value, MachineError> {
    let mut to = BufWriter::with_capacity(BUFFER, Part(wire));
    let mut writer = Writer::continued(&mut to as &mut dyn Write);
    give(&mut writer)?;
    writer.flush()?;
    Ok(writer.pages_written().into())
}
