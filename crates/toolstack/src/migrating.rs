//! Moving a domain to another host: the side of the command there where it runs.

use std::io::{self, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hospes_config::{DomainConfig, Uuid};
use hospes_migration::{Reader, StreamError, Writer};
use hospes_units::DomId;

use crate::client::{Host, done, read_reply, unexpected};
use crate::each;
use crate::error::{Error, Result};
use crate::handover::{Answer, MoveOptions, MoveWatcher, Order, Patient, Side, clean};
use crate::launch;
use crate::protocol::{self, MoveStep, Reply, Request};
use crate::saving::{BUFFER, SavedConfig};

/// How long an answer of the domain may take.
pub(crate) const DOMAIN_PATIENCE: Duration = Duration::from_secs(30);
/// How long the other side may take for an answer, and to read what it is sent: the guest may stand still meanwhile.
pub(crate) const PEER_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to end when it is told no more.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// How long a domain may take that was not migrated to go on.
const RETURN_PATIENCE: Duration = Duration::from_secs(40);
/// How long one that has shut down may take to end, or to start again.
const NEXT_PATIENCE: Duration = Duration::from_secs(4);
const LOOK: Duration = Duration::from_millis(20);

impl Host {
    /// Moves a domain to where `transport` leads: a command whose standard input and output are those of [`Host::receive`] on the other host. After an error the
    /// domain goes on here, or is held, as the sentence says.
    pub fn migrate(
        &self,
        who: &str,
        config: Option<DomainConfig>,
        transport: Command,
        options: MoveOptions,
        watcher: &mut dyn MoveWatcher,
    ) -> Result<()> {
        let config = config
            .map(|mut config| launch::resolve(&mut config).map(|()| Box::new(config)))
            .transpose()?;
        let (domid, stream) = self.ask_to_save(who, &Request::Migrate { config })?;
        let uuid = self.find(&domid.to_string())?.record.uuid;
        let mut own = Own::new(domid, &stream)?;
        let text = own.begin()?;
        let saved = SavedConfig::read(&text).map_err(Error::Protocol)?;
        let incoming = protocol::incoming_name(&saved.config.name);
        watcher.detail("the domain can be moved");
        let mut peer = match Peer::start(transport) {
            Ok(peer) => peer,
            Err(fault) => return Err(Error::Spawn(fault)),
        };
        let sent = send(&mut own, &mut peer, &text, options, watcher).and_then(|()| {
            watcher.step("migration sender: Giving target permission to start.");
            own.step(&MoveStep::GiveAway)
        });
        if let Err(fault) = sent {
            // First the other side, which may have what the domain needs to go on.
            peer.end();
            drop(own);
            drop(stream);
            let why = fault.to_string();
            let why = why.trim_end_matches('.');
            return Err(Error::Migration(format!(
                "{why}; {}",
                self.fate(domid, uuid)
            )));
        }
        // Until it has started nothing is shown: who reads that slowly would hold the guest up.
        let running = peer.start_guest();
        let note = match running {
            Ok(note) => note,
            Err(fault) => {
                let why = fault.to_string();
                // Where the domain does not hear it, the end of the connection says the same.
                let _ = own.step(&MoveStep::Unsure(why.clone()));
                peer.end();
                let name = self.name_of(domid);
                return Err(Error::MigrationUnsure {
                    name,
                    incoming,
                    why,
                });
            }
        };
        watcher.step("migration sender: Target reports successful startup.");
        if let Some(note) = note {
            watcher.step(&format!("migration target: {note}"));
        }
        let ended = own.step(&MoveStep::Ended);
        peer.end();
        match ended {
            Ok(()) | Err(Error::Gone { .. }) => Ok(()),
            // By itself, when it was given away.
            Err(_) if self.ends(domid) => Ok(()),
            Err(fault) => Err(Error::Migration(format!(
                "the domain runs on the other host, and what is left of it here has not ended ({fault}): `hospes destroy {}`",
                self.name_of(domid)
            ))),
        }
    }

    /// What became of a domain that was not given away.
    fn fate(&self, domid: DomId, uuid: Uuid) -> String {
        let begun = Instant::now();
        let deadline = begun + RETURN_PATIENCE;
        loop {
            let Ok(entry) = self.find(&domid.to_string()) else {
                let mut entries = self.entries().unwrap_or_default().into_iter();
                return match entries.find(|entry| entry.record.uuid == uuid) {
                    Some(entry) => format!("it has started again as domain {}", entry.domid),
                    None => "the domain has ended here as well".into(),
                };
            };
            match self.infos(vec![entry]).pop() {
                // Perhaps it is about to end, or to start again.
                Some((_, each::Answer::Told(info))) if info.shutdown.is_some() || info.dying => {
                    if begun.elapsed() >= NEXT_PATIENCE {
                        return "the domain has shut down here".into();
                    }
                    thread::sleep(LOOK);
                }
                Some((_, each::Answer::Told(info))) if !info.moving => {
                    let goes_on = || "the domain goes on here".into();
                    return info.held.unwrap_or_else(goes_on);
                }
                // `None` is one that ends just now.
                _ if Instant::now() < deadline => thread::sleep(LOOK),
                _ => return "the domain does not go on yet: see its log".into(),
            }
        }
    }

    /// Whether a domain ends soon.
    fn ends(&self, domid: DomId) -> bool {
        let deadline = Instant::now() + END_PATIENCE;
        while self.find(&domid.to_string()).is_ok() {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(LOOK);
        }
        true
    }

    fn name_of(&self, domid: DomId) -> String {
        let entry = self.find(&domid.to_string());
        entry.map_or_else(|_| domid.to_string(), |entry| entry.record.name)
    }
}

/// All up to the moment when the other side has the whole domain and waits.
fn send(
    own: &mut Own<'_>,
    peer: &mut Peer,
    text: &[u8],
    options: MoveOptions,
    watcher: &mut dyn MoveWatcher,
) -> Result<()> {
    peer.greet(options)?;
    watcher.detail("the other side has answered");
    let begun = Writer::new(&mut peer.to, text).and_then(|mut writer| writer.flush());
    begun.map_err(|fault| peer.why(&fault))?;
    match peer.answer()? {
        Answer::Accepted => {}
        other => return Err(unknown(&other)),
    }
    watcher.step("migration target: Ready to receive domain.");
    own.say(&MoveStep::Send)?;
    let to = io::BufWriter::with_capacity(BUFFER, &mut peer.to);
    let passed = Reader::continued(&mut own.from).pass_on(to, |pages| watcher.pages(pages));
    match passed {
        Ok(()) => {}
        Err(StreamError::Write(fault)) => return Err(peer.why(&fault)),
        Err(StreamError::Truncated) => return Err(Error::Gone { domid: own.domid }),
        Err(fault) => return Err(Error::Migration(fault.to_string())),
    }
    watcher.detail("all of the domain is sent, and it has let go of its devices");
    match peer.answer()? {
        Answer::Ready => {}
        other => return Err(unknown(&other)),
    }
    watcher.step("migration sender: Target has acknowledged transfer.");
    Ok(())
}

fn unknown(answer: &Answer) -> Error {
    Error::Protocol(format!("the other side says {answer:?}"))
}

/// The domain that is to move.
struct Own<'a> {
    domid: DomId,
    stream: &'a UnixStream,
    from: BufReader<&'a UnixStream>,
}

impl<'a> Own<'a> {
    fn new(domid: DomId, stream: &'a UnixStream) -> Result<Own<'a>> {
        Ok(Own {
            domid,
            stream,
            from: BufReader::with_capacity(BUFFER, stream),
        })
    }

    fn fault(&self) -> impl Fn(io::Error) -> Error + use<> {
        let domid = self.domid;
        move |source| Error::Unreachable { domid, source }
    }

    fn be_patient(&self, time: Option<Duration>) -> Result<()> {
        self.stream.set_read_timeout(time).map_err(self.fault())
    }

    /// The text of its configuration, when it is ready to be moved.
    fn begin(&mut self) -> Result<Vec<u8>> {
        self.be_patient(Some(DOMAIN_PATIENCE))?;
        match read_reply(self.domid, &mut self.from)? {
            Reply::Saving => {}
            reply => return Err(unexpected(&reply)),
        }
        let begun = Reader::new(&mut self.from);
        let (_, text) = begun.map_err(|fault| Error::Migration(fault.to_string()))?;
        // From here on it takes as long as the guest does.
        self.be_patient(None)?;
        Ok(text)
    }

    fn say(&self, step: &MoveStep) -> Result<()> {
        protocol::send(self.stream, step)?.map_err(self.fault())
    }

    /// Says something that is answered with done.
    fn step(&mut self, step: &MoveStep) -> Result<()> {
        self.say(step)?;
        self.be_patient(Some(DOMAIN_PATIENCE))?;
        done(read_reply(self.domid, &mut self.from)?)
    }
}

/// The command that leads to the other host.
struct Peer {
    child: Child,
    to: Patient<ChildStdin>,
    from: BufReader<Patient<ChildStdout>>,
}

impl Peer {
    fn start(mut transport: Command) -> io::Result<Peer> {
        let mut child = transport
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(ErrorKind::BrokenPipe.into());
        };
        rustix::io::ioctl_fionbio(&to, true)?;
        let to = Patient {
            inner: to,
            patience: Some(PEER_PATIENCE),
        };
        // Somebody may have to give a password first.
        let from = BufReader::new(Patient {
            inner: from,
            patience: None,
        });
        Ok(Peer { child, to, from })
    }

    fn greet(&mut self, options: MoveOptions) -> Result<()> {
        Side::Target.await_banner(&mut self.from)?;
        self.from.get_mut().patience = Some(PEER_PATIENCE);
        let greeted = self.to.write_all(Side::Source.banner().as_bytes());
        greeted.map_err(|fault| self.why(&fault))?;
        self.say(&options)
    }

    fn say(&mut self, what: &impl serde::Serialize) -> Result<()> {
        protocol::send(&mut self.to, what)?.map_err(|fault| self.why(&fault))
    }

    /// The next answer, where it is no failure.
    fn answer(&mut self) -> Result<Answer> {
        let broken = |why: &str| {
            Error::Migration(format!("the connection to the other side is broken: {why}"))
        };
        let line = protocol::read_line(&mut self.from)?;
        let line = line.map_err(|fault| match fault.kind() {
            ErrorKind::TimedOut => broken("it does not answer"),
            _ => broken(&fault.to_string()),
        })?;
        let line = line.ok_or_else(|| broken("it has ended"))?;
        match protocol::decode(&line)? {
            Answer::Failed { message } => Err(Error::Migration(format!(
                "the other side says: {}",
                clean(&message)
            ))),
            answer => Ok(answer),
        }
    }

    /// Why it cannot be written to: what it says itself, where it does.
    fn why(&mut self, fault: &io::Error) -> Error {
        self.from.get_mut().patience = Some(END_PATIENCE);
        match (self.answer(), fault.kind()) {
            (Err(told), ErrorKind::BrokenPipe) => told,
            (_, ErrorKind::TimedOut) => Error::Migration("the other side reads no more".into()),
            _ => Error::Migration(format!("the other side cannot be reached: {fault}")),
        }
    }

    /// Gives the domain away, and hears whether it runs; with what the user should know. After an error nobody knows.
    fn start_guest(&mut self) -> Result<Option<String>> {
        self.say(&Order::Start)?;
        match self.answer()? {
            Answer::Running { note } => Ok(note.map(|note| clean(&note))),
            other => Err(unknown(&other)),
        }
    }

    /// Says no more, and waits a while for the end.
    fn end(self) {
        let Peer {
            mut child,
            to,
            from,
        } = self;
        drop((to, from));
        let deadline = Instant::now() + END_PATIENCE;
        while Instant::now() < deadline {
            match child.try_wait() {
                Ok(None) => thread::sleep(LOOK),
                _ => return,
            }
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}
