//! One question to several domains, for commands that list them: all are asked before the first answer is waited for, and one that does not
//! answer keeps nobody from hearing of the others.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use crate::client::{Host, LIST_PATIENCE, receive, send, unexpected};
use crate::error::{Error, Result};
use crate::protocol::{DomainInfo, Reply, Request};
use crate::registry::{Entry, is_locked};
use crate::scheduling::{Share, VcpuInfo};
use crate::state::is_stopped;

/// What one of several domains said.
#[derive(Debug)]
pub enum Answer<T> {
    Told(T),
    /// It is being made and has nothing to say.
    NotYet,
    /// It does not answer; why, as far as that is known.
    Silent(Error),
}

/// The domains that were asked, but for those that have ended meanwhile.
pub type Answers<T> = Vec<(Entry, Answer<T>)>;

impl Host {
    /// The states of domains.
    pub fn infos(&self, entries: Vec<Entry>) -> Answers<DomainInfo> {
        infos(entries, LIST_PATIENCE)
    }

    /// The vCPUs of domains.
    pub fn vcpus_of(&self, entries: Vec<Entry>) -> Answers<Vec<VcpuInfo>> {
        ask_each(
            entries,
            &Request::Vcpus,
            LIST_PATIENCE,
            |reply| match reply {
                Reply::Vcpus { vcpus } => Ok(vcpus),
                reply => Err(unexpected(&reply)),
            },
        )
    }

    /// The shares of the host's CPUs that domains have.
    pub fn shares_of(&self, entries: Vec<Entry>) -> Answers<Share> {
        ask_each(
            entries,
            &Request::Share,
            LIST_PATIENCE,
            |reply| match reply {
                Reply::Share(share) => Ok(share),
                reply => Err(unexpected(&reply)),
            },
        )
    }
}

/// Whether a domain's processes can answer at all: those that somebody has stopped are not waited for.
pub(crate) fn check_goes_on(entry: &Entry) -> Result<()> {
    check_keeper_goes_on(entry)?;
    check_process(entry, entry.record.guest_process())
}

/// The same of its domain process alone, which ends a machine process that does not answer.
pub(crate) fn check_keeper_goes_on(entry: &Entry) -> Result<()> {
    check_process(entry, entry.record.pid)
}

fn check_process(entry: &Entry, pid: u32) -> Result<()> {
    match is_stopped(pid) && is_locked(&entry.dir) {
        true => Err(Error::Stopped {
            domid: entry.domid,
            pid,
        }),
        false => Ok(()),
    }
}

/// The states of domains, of which those that have not answered after `patience` are silent.
pub(crate) fn infos(entries: Vec<Entry>, patience: Duration) -> Answers<DomainInfo> {
    ask_each(entries, &Request::Info, patience, |reply| match reply {
        Reply::Info(info) => Ok(*info),
        reply => Err(unexpected(&reply)),
    })
}

fn ask_each<T>(
    entries: Vec<Entry>,
    request: &Request,
    patience: Duration,
    read: impl Fn(Reply) -> Result<T>,
) -> Answers<T> {
    let deadline = Instant::now() + patience;
    let asked: Vec<_> = entries
        .iter()
        .map(|entry| check_goes_on(entry).and_then(|()| send(entry, request, Duration::ZERO)))
        .collect();
    let answered = entries.into_iter().zip(asked).map(|(entry, asked)| {
        // No time at all would mean to wait for ever.
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        let answer = asked.and_then(|stream| receive(entry.domid, &stream, Some(left)));
        (entry, answer.and_then(&read))
    });
    answered
        .filter_map(|(entry, answer)| match answer {
            Ok(told) => Some((entry, Answer::Told(told))),
            // A connection that was lost alone is no end.
            Err(Error::Gone { .. }) if !is_locked(&entry.dir) => None,
            Err(Error::Unmade { .. }) => Some((entry, Answer::NotYet)),
            Err(Error::Unreachable { source, .. })
                if source.kind() == ErrorKind::ConnectionRefused =>
            {
                Some((entry, Answer::NotYet))
            }
            Err(fault) => Some((entry, Answer::Silent(fault))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::testing::{record, registry};
    use std::os::unix::net::UnixListener;

    #[test]
    fn domains_that_do_not_answer_are_waited_for_together() {
        let (registry, directory) = registry("each");
        let slots: Vec<_> = (1..4)
            .map(|number| {
                let record = record(&format!("d{number}"), number);
                registry.allocate(&record).expect("free")
            })
            .collect();
        // The last has no socket yet.
        let _listeners: Vec<_> = slots[..2]
            .iter()
            .map(|slot| UnixListener::bind(slot.dir().join("control.sock")).expect("new"))
            .collect();
        let host = Host::new(directory.paths.clone());
        let begun = Instant::now();
        let answers = host.infos(host.entries().expect("a list"));
        assert!(begun.elapsed() < LIST_PATIENCE * 3 / 2);
        let seen: Vec<_> = answers.iter().map(|(_, answer)| answer).collect();
        assert!(
            matches!(
                seen[..],
                [Answer::Silent(_), Answer::Silent(_), Answer::NotYet]
            ),
            "{seen:?}"
        );
    }

    #[test]
    fn domains_end_with_their_lock_and_not_with_a_connection() {
        let (registry, directory) = registry("each-lost");
        let mut slots: Vec<_> = (1..3)
            .map(|number| {
                let record = record(&format!("d{number}"), number);
                registry.allocate(&record).expect("free")
            })
            .collect();
        for slot in &slots {
            let listener = UnixListener::bind(slot.dir().join("control.sock")).expect("new");
            std::thread::spawn(move || drop(listener.accept()));
        }
        let host = Host::new(directory.paths.clone());
        let entries = host.entries().expect("a list");
        slots.pop();
        let answers = host.infos(entries);
        let seen: Vec<_> = answers
            .iter()
            .map(|(entry, answer)| (entry.domid.0, answer))
            .collect();
        assert!(
            matches!(seen[..], [(1, Answer::Silent(Error::Gone { .. }))]),
            "{seen:?}"
        );
    }
}
