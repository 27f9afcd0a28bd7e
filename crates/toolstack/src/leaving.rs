//! A domain that moves to another host, as its own process sees it ([`crate::protocol::Request::Migrate`]).
//!
//! Invariants: the guest goes on here by itself only before it was given away, and only with its disks and networks taken again; whoever has the stream to
//! its end finds them free. Where that cannot be, or nobody knows what became of the domain, it is held until the user decides.

use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hospes_config::DomainConfig;
use hospes_migration::{LiveRound, Writer};

use crate::busy::Saving;
use crate::ending::Ending;
use crate::instance::{Instance, lock};
use crate::launch;
use crate::log::log;
use crate::machine::Machine;
use crate::protocol::{self, MoveStep, Reply, away_name, incoming_name};
use crate::saving::{Answer, AnyError, BUFFER, SavedConfig};
use crate::standing::Standing;

/// How long the domain waits for what it had let go of: the other side may still be about to end.
const RETURN_PATIENCE: Duration = Duration::from_secs(20);
/// How often it tries.
const RETURN_LOOK: Duration = Duration::from_millis(100);

type StdResult<T> = std::result::Result<T, AnyError>;

/// A domain on its way.
struct Move<'a> {
    stream: &'a UnixStream,
    instance: &'a Instance,
    ending: &'a Ending,
}

/// Answers the request. `None` where the client has left or is told by the end of the connection.
pub(crate) fn answer(
    stream: &UnixStream,
    reader: &mut BufReader<&UnixStream>,
    instance: &Instance,
    ending: &Ending,
    config: Option<DomainConfig>,
    has_left: &dyn Fn() -> bool,
) -> Option<Answer> {
    let refused = |message| Some(Answer::Reply(Reply::Error { message }));
    let Some(changes) = instance.begin_save() else {
        let message = instance.is_fixed();
        return refused(message.unwrap_or_else(|| Instance::SAVING.into()));
    };
    let passport = match instance.machine().passport() {
        Ok(passport) => passport,
        Err(fault) => return refused(fault.to_string()),
    };
    if let Err(fault) = instance.end_client_too(stream) {
        return refused(fault.to_string());
    }
    let away = away_name(&instance.identity().0);
    if let Err(fault) = instance.check_free(&away) {
        return refused(format!("its name here is to be {away}: {fault}"));
    }
    let saved = SavedConfig {
        passport: Some(passport),
        ..SavedConfig::new(instance, config)
    };
    let moving = Move {
        stream,
        instance,
        ending,
    };
    moving.lead(reader, &saved, has_left, changes)
}

/// What was sent live: nobody follows what the guest writes when the move is over.
struct Live<'a>(&'a dyn Machine);

impl Drop for Live<'_> {
    fn drop(&mut self) {
        self.0.forget_live();
    }
}

impl Move<'_> {
    fn lead(
        &self,
        reader: &mut BufReader<&UnixStream>,
        saved: &SavedConfig,
        has_left: &dyn Fn() -> bool,
        changes: Saving<'_>,
    ) -> Option<Answer> {
        let instance = self.instance;
        let mut buffered = io::BufWriter::with_capacity(BUFFER, self.stream);
        let to: &mut dyn Write = &mut buffered;
        let mut writer = match self.begin(reader, saved, to) {
            Ok(writer) => writer,
            // Nothing has happened.
            Err(fault) => {
                log!("The domain is not migrated: {fault}");
                return None;
            }
        };
        let _live = Live(instance.machine());
        if let Err(fault) = self.send_live(&mut writer, has_left) {
            log!("The domain is not migrated: {fault}");
            let _ = writer.fail(&fault.to_string());
            return None;
        }
        changes.is_to_suspend();
        instance.set_standing(Standing::Leaving(None));
        log!("Migrating: the guest is asked to suspend itself");
        if let Err(fault) = instance.machine().suspend(has_left) {
            log!("The domain is not migrated: {fault}");
            instance.stay(self.ending);
            // Who has left does not read it.
            let _ = writer.fail(&fault.to_string());
            return None;
        }
        if let Err(fault) = self.send(&mut writer) {
            log!("The domain is not migrated: {fault}");
            // First of all the guest.
            self.come_back();
            let _ = writer.fail(&fault.to_string());
            return None;
        }
        let given = writer
            .end()
            .map_err(AnyError::from)
            .and_then(|_| self.receive(reader))
            .and_then(|step| match step {
                // The other side has what the guest needs to go on, until the command knows.
                MoveStep::GiveAway => self.give_away().inspect_err(|fault| {
                    let message = fault.to_string();
                    let _ = protocol::send(self.stream, &Reply::Error { message });
                }),
                step => Err(format!("it was not given away, but {step:?}").into()),
            });
        let told = match given {
            Ok(told) => told,
            Err(fault) => {
                log!("The domain is not migrated: {fault}");
                self.come_back();
                return None;
            }
        };
        // From here on it is another host's.
        let verdict = told.and_then(|()| self.receive(reader));
        // With it the client hears of the end.
        drop(changes);
        match verdict {
            Ok(MoveStep::Ended) if instance.machine().end_saved() => {
                log!("The domain has been migrated");
                Some(Answer::Destroy)
            }
            Ok(MoveStep::Unsure(why)) => self.hold(saved, &why),
            Ok(step) => self.hold(saved, &format!("the command said {step:?}")),
            Err(fault) => self.hold(saved, &fault.to_string()),
        }
    }

    /// Sends what the other host is to know before it takes the domain, and waits until it would.
    fn begin<'a>(
        &self,
        reader: &mut BufReader<&UnixStream>,
        saved: &SavedConfig,
        to: &'a mut dyn Write,
    ) -> StdResult<Writer<&'a mut dyn Write>> {
        let text = serde_json::to_vec(saved)?;
        protocol::send(self.stream, &Reply::Saving)??;
        let mut writer = Writer::new(to, &text)?;
        writer.flush()?;
        match self.receive(reader)? {
            MoveStep::Send => Ok(writer),
            step => Err(format!("the command said {step:?}").into()),
        }
    }

    /// Most of the memory, while the guest runs.
    fn send_live(
        &self,
        writer: &mut Writer<&mut dyn Write>,
        has_left: &dyn Fn() -> bool,
    ) -> StdResult<()> {
        let mut progress = |round: LiveRound| {
            log!(
                "Migrating: round {} sent {} pages, {} MB a second so far; {} were written meanwhile",
                round.number,
                round.pages,
                round.bytes_per_s / 1_000_000,
                round.left
            );
        };
        let machine = self.instance.machine();
        machine.send_live(writer, &mut progress, has_left)
    }

    /// What is left of the suspended guest; then its devices are let go of.
    fn send(&self, writer: &mut Writer<&mut dyn Write>) -> StdResult<()> {
        let machine = self.instance.machine();
        machine.save(writer)?;
        machine.let_go()
    }

    /// However long the client takes: it is there or it is not.
    fn receive(&self, reader: &mut BufReader<&UnixStream>) -> StdResult<MoveStep> {
        self.stream.set_read_timeout(None)?;
        let line = protocol::read_line(reader)??;
        let line = line.ok_or("the command that was to move it has gone")?;
        Ok(protocol::decode(&line)?)
    }

    /// Name and UUID are the other domain's, also where that is on this host. Returns whether the command has been told; after an error it is not given away.
    fn give_away(&self) -> StdResult<StdResult<()>> {
        let instance = self.instance;
        // Who learns that the machine has ended looks at this: it has ended before, and is not given away, or it is, and nothing comes behind it here.
        let mut standing = lock(&instance.standing);
        self.check_suspended()?;
        let (name, uuid) = instance.identity();
        let away = (away_name(&name), launch::random_uuid()?);
        let given = instance.be_another(&away.0, away.1);
        let given = given.map_err(|fault| AnyError::from(fault.to_string()));
        // Writing it down took its time.
        let given = given.and_then(|()| self.check_suspended());
        if given.is_err() && instance.be_another(&name, uuid).is_ok() {
            return given.map(Ok);
        }
        *standing = Standing::Leaving(Some((name, uuid)));
        given?;
        let told = protocol::send(self.stream, &Reply::Done);
        Ok(told.map_err(AnyError::from).and_then(|told| Ok(told?)))
    }

    fn check_suspended(&self) -> StdResult<()> {
        let instance = self.instance;
        if instance.is_destroyed() || instance.machine().has_ended() {
            return Err("it has ended meanwhile".into());
        }
        match instance.machine().is_suspended() {
            true => Ok(()),
            false => Err("its guest has gone on meanwhile".into()),
        }
    }

    /// The guest of a domain that was not given away goes on, as soon as all is there that it needs.
    fn come_back(&self) {
        let deadline = Instant::now() + RETURN_PATIENCE;
        let instance = self.instance;
        loop {
            if instance.machine().has_ended() {
                return instance.stay_ended();
            }
            match self.take_again() {
                Ok(()) => {
                    log!("The domain goes on");
                    return instance.stay(self.ending);
                }
                Err(fault) if Instant::now() >= deadline || instance.is_destroyed() => {
                    return instance.hold(format!(
                        "it was not migrated and cannot go on yet: {fault}; `hospes unpause` tries again"
                    ));
                }
                Err(_) => std::thread::sleep(RETURN_LOOK),
            }
        }
    }

    fn take_again(&self) -> StdResult<()> {
        self.instance.machine().take_again()?;
        // A name that could not be given away everywhere.
        let mut standing = lock(&self.instance.standing);
        if let Standing::Leaving(identity) = &mut *standing
            && let Some((name, uuid)) = identity
        {
            let own = self.instance.be_another(name, *uuid);
            own.map_err(|fault| AnyError::from(fault.to_string()))?;
            *identity = None;
        }
        Ok(())
    }

    fn hold(&self, saved: &SavedConfig, why: &str) -> Option<Answer> {
        // There is nothing left that could go on.
        if self.instance.machine().has_ended() {
            return None;
        }
        let incoming = incoming_name(&saved.config.name);
        self.instance.hold(format!(
            "it is not known whether it runs on the other host ({why}): look there; where it does, `hospes destroy` it here, and where it does not, `hospes unpause` it here; where {incoming} is still listed, `hospes destroy` that there first"
        ));
        Some(Answer::Reply(Reply::Done))
    }
}
