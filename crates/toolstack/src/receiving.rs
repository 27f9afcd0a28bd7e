//! Moving a domain to another host: the side of the command there where it comes to.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hospes_config::{EventAction, EventActions};
use hospes_migration::Reader;

use crate::client::Host;
use crate::error::{Error, Result};
use crate::handover::{Answer, MoveOptions, MoveWatcher, Order, Patient, Side};
use crate::launch::{self, Starting, unknown};
use crate::migrating::{DOMAIN_PATIENCE, PEER_PATIENCE};
use crate::protocol::{self, Arrival, Launched};
use crate::saving::{BUFFER, SavedConfig};

/// How long the other side may say nothing: longer than a guest may take to suspend itself.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long it may take, when the domain is here, to give it away. A command that gives it away and then hears nothing finds this over when it says that nobody
/// knows where the domain runs: it starts no more behind that.
const ORDER_PATIENCE: Duration = Duration::from_secs(45);
const _: () = assert!(
    ORDER_PATIENCE.as_secs() > DOMAIN_PATIENCE.as_secs()
        && ORDER_PATIENCE.as_secs() < PEER_PATIENCE.as_secs()
);

/// What -e of the commands makes of the actions for an end: nobody waits for it.
pub const UNATTENDED: EventActions = EventActions {
    poweroff: EventAction::Preserve,
    reboot: EventAction::Preserve,
    watchdog: EventAction::Preserve,
    crash: EventAction::Preserve,
    soft_reset: EventAction::Preserve,
};

impl Host {
    /// Takes a domain that [`Host::migrate`] sends from another host by `from`, to which `to` leads back. After an error it does not run here.
    pub fn receive(
        &self,
        from: File,
        mut to: File,
        options: MoveOptions,
        watcher: &mut dyn MoveWatcher,
    ) -> Result<()> {
        let received = self.receive_from(from, &mut to, options, watcher);
        if let Err(fault) = &received {
            let message = fault.to_string();
            // Where the other side has gone nobody has to hear it.
            let _ = protocol::send(&mut to, &Answer::Failed { message });
        }
        received
    }

    fn receive_from(
        &self,
        from: File,
        to: &mut File,
        own: MoveOptions,
        watcher: &mut dyn MoveWatcher,
    ) -> Result<()> {
        let mut from = BufReader::with_capacity(
            BUFFER,
            Patient {
                inner: from,
                patience: Some(PATIENCE),
            },
        );
        let greeted = to.write_all(Side::Target.banner().as_bytes());
        greeted.map_err(gone)?;
        Side::Source.await_banner(&mut from)?;
        let told: MoveOptions = next(&mut from)?;
        if told.debug {
            watcher.show_details();
        }
        let (_, text) = Reader::new(&mut from).map_err(Error::Passed)?;
        let mut saved = SavedConfig::read(&text).map_err(|why| {
            Error::Protocol(format!(
                "the domain's configuration is not understood ({why})"
            ))
        })?;
        if own.unattended || told.unattended {
            saved.config.on = UNATTENDED;
        }
        self.check_room()?;
        let passport = saved.passport.unwrap_or_default();
        let name = protocol::incoming_name(&saved.config.name);
        hospes_config::check_name(&name)
            .map_err(|why| Error::Migration(format!("the domain cannot come here: {why}")))?;
        let starting = launch::receive(self.paths(), saved.config, saved.next, passport)?;
        let mut newcomer = Newcomer(Some(starting));
        match newcomer.answer()? {
            Launched::Accepted => {}
            other => return Err(unknown(&other)),
        }
        send(to, &Answer::Accepted)?;
        watcher.detail(&format!("migration target: {name} may come"));
        newcomer.take_in(&mut from, watcher)?;
        watcher.detail("migration target: all of it is here");
        match newcomer.answer()? {
            Launched::Domain { .. } => {}
            other => return Err(unknown(&other)),
        }
        watcher.step("migration target: Transfer complete, requesting permission to start domain.");
        let ready = Instant::now();
        send(to, &Answer::Ready)?;
        let Order::Start = order(&mut from, ready, ORDER_PATIENCE)?;
        let paused = own.paused || told.paused;
        let note = newcomer.arrive(Arrival { paused })?;
        // It is here, whether the other side hears of it or not.
        let heard = send(to, &Answer::Running { note });
        watcher.step("migration target: Got permission, starting domain.");
        heard?;
        watcher.step("migration target: Domain started successfully.");
        Ok(())
    }
}

fn gone(source: io::Error) -> Error {
    Error::Migration(format!("the other side cannot be reached: {source}"))
}

fn send(to: &mut File, answer: &Answer) -> Result<()> {
    protocol::send(to, answer)?.map_err(gone)
}

fn next<T: serde::de::DeserializeOwned>(from: &mut impl io::BufRead) -> Result<T> {
    understood(protocol::read_line(from)?.map_err(gone)?)
}

fn understood<T: serde::de::DeserializeOwned>(line: Option<Vec<u8>>) -> Result<T> {
    let line = line.ok_or_else(|| {
        Error::Migration(
            "the other side has gone before the domain was here: it does not run here".into(),
        )
    })?;
    protocol::decode(&line)
}

/// Waits for the order, so long at most since the other side could know that it is awaited. One that was said in time and is seen too late, by a process that was
/// stopped for one, counts as little.
fn order<T: io::Read + AsFd>(
    from: &mut BufReader<Patient<T>>,
    since: Instant,
    patience: Duration,
) -> Result<Order> {
    from.get_mut().patience = Some(patience);
    let line = protocol::read_line(from)?;
    let is_timeout = |fault: &io::Error| fault.kind() == ErrorKind::TimedOut;
    if since.elapsed() > patience || line.as_ref().is_err_and(is_timeout) {
        return Err(Error::Migration(format!(
            "the other side has not given the domain away within {} seconds: it does not run here",
            patience.as_secs()
        )));
    }
    understood(line.map_err(gone)?)
}

/// The process of the domain that comes. It has ended when this is dropped before the domain has arrived: nothing here is in the way of the other side then.
struct Newcomer(Option<Starting>);

impl Newcomer {
    fn process(&mut self) -> Result<&mut Starting> {
        let gone = || Error::Protocol("the domain process has ended".into());
        self.0.as_mut().ok_or_else(gone)
    }

    fn answer(&mut self) -> Result<Launched> {
        self.process()?.answer()
    }

    /// Passes the rest of the stream on.
    fn take_in(&mut self, from: &mut impl io::Read, watcher: &mut dyn MoveWatcher) -> Result<()> {
        let mut reader = Reader::continued(from);
        let mut feed = |to: &mut dyn Write| {
            let to = io::BufWriter::with_capacity(BUFFER, to);
            reader
                .pass_on(to, |pages| watcher.pages(pages))
                .map_err(Error::Passed)
        };
        self.process()?.feed(&mut feed)
    }

    fn arrive(mut self, arrival: Arrival) -> Result<Option<String>> {
        let mut starting = self
            .0
            .take()
            .ok_or_else(|| Error::Protocol("the domain process has ended".into()))?;
        starting.say(&arrival)?;
        match starting.answer()? {
            Launched::Arrived { note } => Ok(note),
            other => Err(unknown(&other)),
        }
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        if let Some(starting) = self.0.take() {
            starting.abandon();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patient(from: io::PipeReader) -> BufReader<Patient<io::PipeReader>> {
        BufReader::new(Patient {
            inner: from,
            patience: Some(PATIENCE),
        })
    }

    #[test]
    fn order_that_does_not_come_in_time_does_not_count() {
        let (now, moment) = (Instant::now(), Duration::from_millis(20));
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let mut from = patient(reader);
        let mut refused = |since, patience| {
            let fault = order(&mut from, since, patience).expect_err("it is too late");
            fault.to_string()
        };
        let late = refused(now, moment);
        assert!(late.contains("not given the domain away within"), "{late}");
        let mut say = || protocol::send(&mut writer, &Order::Start).expect("it is short");
        say().expect("it is read");
        let late = refused(now, moment);
        assert!(late.contains("not given the domain away within"), "{late}");
        say().expect("it is read");
        let Order::Start = order(&mut from, Instant::now(), ORDER_PATIENCE).expect("it was said");
        drop(writer);
        let gone = order(&mut from, now, ORDER_PATIENCE).expect_err("nothing more was said");
        assert!(gone.to_string().contains("has gone"), "{gone}");
    }
}
