//! Starting a machine process, and answering what it asks.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use hospes_config::Uuid;
use hospes_store_server::{Connector, Place, StoreClient, StoreError};
use hospes_units::DomId;

use super::call::{Answer, Ask, Build, Call, StoreTrouble};
use super::machine::{RemoteMachine, Silence};
use super::process::Process;
use super::wire::{Line, Wire};
use super::{Keeper, Program, speech};
use crate::MACHINE_SUBCOMMAND;
use crate::error::Error;
use crate::instance::lock;
use crate::launch::own_program;
use crate::log::log;
use crate::machine::{MachineError, MachineSpec, SavedStream};
use crate::state::Promised;

/// Most questions that are answered at a time: a machine process has a thread for each device that may ask.
const QUESTIONS_MAX: usize = 64;
/// Bytes of a guest's output that are taken at a time.
const OUTPUT_BYTES: usize = 16 << 10;

/// Builds a machine, as it says at [`Program::build`], in a process of its own, which is given connections to the store at `place`. `started` is told its number before it
/// is told what to build.
pub(crate) fn start(
    program: &dyn Program,
    spec: &MachineSpec<'_>,
    place: Place,
    saved: Option<SavedStream>,
    console: Box<dyn Write + Send>,
    started: &mut dyn FnMut(u32) -> Result<(), Error>,
) -> Result<RemoteMachine, MachineError> {
    let (here, there) = UnixStream::pair()?;
    let mut command = own_program(MACHINE_SUBCOMMAND);
    command
        .arg(&spec.config.name)
        .stdin(OwnedFd::from(there))
        .stdout(Stdio::null());
    let speech = speech::pass_on(&mut command)?;
    let process = Process::start(&mut command).map_err(Error::Spawn)?;
    // Its end of the pipe goes with it.
    drop(command);
    started(process.id())?;
    let keeper = program.keeper(spec, process.id())?;
    let line = Arc::new(Line::keepers(here)?);
    let identity = Arc::new(Identity {
        domid: spec.domid,
        known: Mutex::new((spec.uuid, spec.config.name.clone())),
        store: spec.store.clone(),
    });
    let questions = Questions {
        keeper: Arc::clone(&keeper),
        place,
        promised: spec.promised.clone(),
        identity: Arc::clone(&identity),
    };
    let answering = answer_all(Arc::clone(&line), questions);
    let silence = Arc::new(Silence::default());
    let output = listen(console, Arc::clone(&silence))?;
    let machine = RemoteMachine::new(
        process,
        line,
        keeper,
        identity,
        spec.config.memory_max_kib(),
        silence,
        [answering, speech],
    );
    let saved = saved.map(SavedStream::into_inner);
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![output.as_fd()];
    descriptors.extend(saved.as_ref().map(|saved| saved.rest()));
    let ahead = saved.as_ref().map(|saved| saved.ahead()).unwrap_or(&[]);
    let build = Build {
        domid: spec.domid.0,
        uuid: spec.uuid,
        config: spec.config.clone(),
        ahead: saved.is_some().then_some(ahead.len() as u32),
    };
    let wire = machine.call(&Call::Build(Box::new(build)), &descriptors)?;
    wire.stream().write_all(ahead)?;
    machine.answer::<()>(&wire)?;
    Ok(machine)
}

/// Gives what a guest prints to `console`, in a thread. Returns where it is to be written.
fn listen(mut console: Box<dyn Write + Send>, silence: Arc<Silence>) -> io::Result<UnixStream> {
    let (mut here, there) = UnixStream::pair()?;
    thread::Builder::new()
        .name("output".into())
        .spawn(move || {
            let mut buffer = [0; OUTPUT_BYTES];
            // The sink does not fail.
            while let Ok(bytes @ 1..) = here.read(&mut buffer)
                && console.write_all(&buffer[..bytes]).is_ok()
            {}
            silence.reach();
        })?;
    Ok(there)
}

/// What a machine process may ask.
struct Questions {
    keeper: Arc<dyn Keeper>,
    place: Place,
    promised: Promised,
    identity: Arc<Identity>,
}

/// By what the store knows the domain.
pub(super) struct Identity {
    domid: DomId,
    known: Mutex<(Uuid, String)>,
    store: StoreClient,
}

impl Identity {
    /// The guest has suspended itself.
    pub(super) fn suspend(&self) {
        self.store.shut_down(self.domid);
    }

    /// It goes on.
    pub(super) fn resume(&self) {
        self.store.resume(self.domid);
    }

    /// The domain gets another name, and another UUID where there is one.
    pub(super) fn change(&self, name: &str, uuid: Option<Uuid>) -> Result<(), MachineError> {
        let mut known = lock(&self.known);
        let uuid = uuid.unwrap_or(known.0);
        self.store
            .change_identity(self.domid, &uuid.to_string(), name)?;
        *known = (uuid, name.to_owned());
        Ok(())
    }
}

/// Answers the questions of a machine process, until it is gone or sends what it must not.
fn answer_all(line: Arc<Line>, questions: Questions) -> JoinHandle<()> {
    let questions = Arc::new(questions);
    let under_way = Arc::new(AtomicUsize::new(0));
    thread::spawn(move || {
        loop {
            let (ask, wire) = match line.next::<Ask>() {
                Ok(Some((ask, wire, _))) => (ask, wire),
                Ok(None) => break,
                Err(fault) => {
                    log!("the machine process does not keep to the protocol: {fault}");
                    break;
                }
            };
            if under_way.fetch_add(1, Ordering::Relaxed) >= QUESTIONS_MAX {
                under_way.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (questions, counted) = (Arc::clone(&questions), Arc::clone(&under_way));
            let answered = thread::Builder::new().spawn(move || {
                questions.answer(ask, &wire);
                counted.fetch_sub(1, Ordering::Relaxed);
            });
            if let Err(fault) = answered {
                under_way.fetch_sub(1, Ordering::Relaxed);
                log!("a question of the machine process stays without an answer: {fault}");
            }
        }
        line.close();
    })
}

impl Questions {
    fn answer(&self, ask: Ask, wire: &Wire) {
        let (answer, descriptors): (Answer, Vec<OwnedFd>) = match self.find(ask) {
            Ok((value, descriptors)) => (Ok(value), descriptors),
            Err(fault) => (Err(fault.to_string()), Vec::new()),
        };
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        // A process that is gone needs no answer.
        let _ = wire.send(&answer, &descriptors);
    }

    fn find(&self, ask: Ask) -> Result<(serde_json::Value, Vec<OwnedFd>), MachineError> {
        let none = Vec::new();
        Ok(match ask {
            Ask::Store => {
                let identity = &self.identity;
                let (uuid, name) = &*lock(&identity.known);
                let stream =
                    self.place
                        .connect_restricted(identity.domid, &uuid.to_string(), name)?;
                (serde_json::Value::Null, vec![OwnedFd::from(stream)])
            }
            Ask::StoreTrouble => {
                let trouble = self.place.trouble().map(|trouble| match trouble {
                    StoreError::Full => StoreTrouble::Full,
                    _ => StoreTrouble::OtherVersion,
                });
                (serde_json::to_value(trouble)?, none)
            }
            Ask::Promised => (self.promised.bytes().into(), none),
            Ask::Program(ask) => self.keeper.answer(ask)?,
        })
    }
}
