//! The state of domains, by what they say themselves and, where they do not answer, by what is seen from outside.

use std::time::Duration;

use hospes_units::DomId;

use crate::client::{LIST_PATIENCE, ask};
use crate::error::{Error, Result};
use crate::protocol::{DomainInfo, Reply, Request};
use crate::registry::{Entry, Registry};

/// How long an answer may take where others wait for the sum of all answers.
const SUM_PATIENCE: Duration = Duration::from_millis(500);

/// The state of a domain; `None` where it has ended.
pub(crate) fn info(entry: &Entry) -> Option<DomainInfo> {
    info_within(entry, LIST_PATIENCE)
}

fn info_within(entry: &Entry, patience: Duration) -> Option<DomainInfo> {
    match ask(entry, &Request::Info, Duration::ZERO, patience) {
        Ok(Reply::Info(info)) => Some(info),
        Err(Error::Gone { .. }) => None,
        _ => Some(entry.as_recorded()),
    }
}

impl Entry {
    /// What the record alone says of a domain's state, and what is seen of its process.
    pub fn as_recorded(&self) -> DomainInfo {
        DomainInfo {
            domid: self.domid.0,
            name: self.record.name.clone(),
            uuid: self.record.uuid,
            memory_kib: self.record.config.memory_kib(),
            promised_kib: self.promised_bytes() >> 10,
            vcpus_online: self.record.config.vcpus,
            cpu_time_ns: 0,
            running: false,
            blocked: false,
            paused: false,
            shutdown: None,
            dying: false,
            waiting: Vec::new(),
        }
    }
}

/// Memory that the domains but `except` have not used yet and still may, in bytes.
pub(crate) fn promised_bytes(registry: &Registry, except: DomId) -> Result<u64> {
    let entries = registry.entries()?.into_iter();
    let others = entries.filter(|entry| entry.domid != except);
    Ok(others
        .map(|entry| info_within(&entry, SUM_PATIENCE).map_or(0, |info| info.promised_kib << 10))
        .sum())
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use hospes_config::{Source, Uuid, load};

    use super::*;
    use crate::paths::Paths;
    use crate::protocol;
    use crate::registry::Record;

    fn record(name: &str) -> Record {
        let text = format!("name='{name}'; type='pvh'; kernel='/k'; memory=64");
        let source = Source {
            name: "test",
            text: &text,
        };
        let config = load(&[source]).0.expect("valid");
        Record::new(&config, Uuid::from_bytes([1; 16]))
    }

    #[test]
    fn promised_bytes_counts_what_others_have_not_used() {
        let run = std::env::temp_dir().join(format!("hospes-promised-{}", std::process::id()));
        std::fs::create_dir_all(&run).expect("temporary directory");
        let log = run.join("log");
        let registry = Registry::new(&Paths {
            run: run.clone(),
            log,
        });
        let first = registry.allocate(&record("a")).expect("free");
        let mut second = record("b");
        second.uuid = Uuid::from_bytes([2; 16]);
        let second_slot = registry.allocate(&second).expect("free");
        // Neither has sockets, and both are of this process, which shares little.
        let of_one = promised_bytes(&registry, first.domid()).expect("list");
        assert!((56 << 20..=64 << 20).contains(&of_one), "{of_one}");
        let of_both = promised_bytes(&registry, DomId::HOST).expect("list");
        assert!(of_both > of_one, "{of_both} {of_one}");
        // What a domain says itself counts more.
        let socket = second_slot.dir().join("control.sock");
        let listener = UnixListener::bind(socket).expect("a fresh directory");
        let mut entries = registry.entries().expect("list");
        let entry = entries.pop().expect("the second");
        let domain = thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a command");
            let line = protocol::read_line(&mut BufReader::new(&stream));
            let line = line.expect("short").expect("open").expect("a request");
            assert_eq!(protocol::decode(&line).ok(), Some(Request::Info));
            let info = DomainInfo {
                promised_kib: 1 << 20,
                ..entry.as_recorded()
            };
            protocol::send(&stream, &Reply::Info(info))
                .expect("short")
                .expect("open");
        });
        let told = promised_bytes(&registry, first.domid()).expect("list");
        assert_eq!(told, 1 << 30);
        domain.join().expect("no panic");
        let _ = std::fs::remove_dir_all(&run);
    }
}
