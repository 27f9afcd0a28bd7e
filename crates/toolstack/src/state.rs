//! The state of domains, by what they say themselves and, where they do not answer, by what is seen from outside.

use std::time::Duration;

use hospes_units::DomId;

use crate::each::{Answer, infos};
use crate::error::Result;
use crate::protocol::DomainInfo;
use crate::registry::{Entry, Registry};

/// How long all answers together may take where somebody waits for their sum.
const SUM_PATIENCE: Duration = Duration::from_millis(500);

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
            moving: false,
            held: None,
        }
    }
}

/// Memory that the domains but `except` have not used yet and still may, in bytes.
pub(crate) fn promised_bytes(registry: &Registry, except: DomId) -> Result<u64> {
    let mut others = registry.entries()?;
    others.retain(|entry| entry.domid != except);
    let answers = infos(others, SUM_PATIENCE).into_iter();
    let promised = answers.map(|(entry, answer)| match answer {
        Answer::Told(info) => info.promised_kib << 10,
        Answer::NotYet | Answer::Silent(_) => entry.promised_bytes(),
    });
    Ok(promised.sum())
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use hospes_config::Uuid;

    use super::*;
    use crate::paths::Paths;
    use crate::protocol::{self, Reply, Request};
    use crate::registry::testing::record;

    #[test]
    fn promised_bytes_counts_what_others_have_not_used() {
        let run = std::env::temp_dir().join(format!("hospes-promised-{}", std::process::id()));
        std::fs::create_dir_all(&run).expect("temporary directory");
        let log = run.join("log");
        let registry = Registry::new(&Paths {
            run: run.clone(),
            log,
        });
        let first = registry.allocate(&record("a", 1)).expect("free");
        let mut second = record("b", 1);
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
