//! The state of domains, by what they say themselves and, where they do not answer, by what is seen from outside.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hospes_sys::process_stat;
use hospes_units::DomId;

use crate::each::{Answer, infos};
use crate::error::Result;
use crate::protocol::DomainInfo;
use crate::registry::{Entry, Registry};
use crate::traffic::Traffic;

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
            cpu_time_ns: cpu_time_ns(self.record.guest_process()).unwrap_or(0),
            running: false,
            blocked: false,
            paused: false,
            shutdown: None,
            dying: false,
            traffic: Traffic {
                vifs: self.record.config.vifs.len() as u32,
                disks: self.record.config.disks.len() as u32,
                ..Traffic::default()
            },
            waiting: Vec::new(),
            moving: false,
            held: None,
        }
    }
}

/// Whether somebody has stopped a process.
pub(crate) fn is_stopped(pid: u32) -> bool {
    process_stat(pid).is_some_and(|stat| stat.starts_with('T'))
}

/// The time that a process has used by itself and in the kernel.
fn cpu_time_ns(pid: u32) -> Option<u64> {
    let stat = process_stat(pid)?;
    // utime and stime are the 14th and the 15th of all columns, of which the state is the 3rd.
    let mut ticks = stat.split(' ').skip(11).map(str::parse::<u64>);
    let (user, system) = (ticks.next()?.ok()?, ticks.next()?.ok()?);
    let ticks_per_s = rustix::param::clock_ticks_per_second().max(1);
    Some(
        user.saturating_add(system)
            .saturating_mul(1_000_000_000 / ticks_per_s),
    )
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

/// What other domains may still take of the host's memory. It is asked anew whenever it counts, for they come, grow and go.
#[derive(Clone)]
pub struct Promised(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Promised {
    pub(crate) fn to_others_than(domid: DomId, registry: &Registry) -> Promised {
        let registry = registry.clone();
        // Where that cannot be found out, all is taken.
        Promised::by(move || promised_bytes(&registry, domid).unwrap_or(u64::MAX))
    }

    /// By somebody who knows.
    pub(crate) fn by(who: impl Fn() -> u64 + Send + Sync + 'static) -> Promised {
        Promised(Arc::new(who))
    }

    /// In bytes.
    pub fn bytes(&self) -> u64 {
        (self.0)()
    }
}

impl fmt::Debug for Promised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Promised")
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::thread;
    use std::time::Instant;

    use hospes_config::Uuid;
    use rustix::fs::MemfdFlags;

    use super::*;
    use crate::protocol::{self, Reply, Request};
    use crate::registry::testing::{record, registry};

    #[test]
    fn recorded_domain_has_used_the_time_of_its_process() {
        let (registry, _directory) = registry("recorded");
        // The domain is of this process.
        let _slot = registry.allocate(&record("a", 1)).expect("free");
        let mut entry = registry
            .entries()
            .expect("list")
            .pop()
            .expect("it is there");
        let begun = Instant::now();
        let used = || entry.as_recorded().cpu_time_ns;
        let before = used();
        while used() < before + 50_000_000 {
            assert!(begun.elapsed() < Duration::from_secs(60), "no time passes");
        }
        entry.record.pid = u32::MAX;
        assert_eq!(entry.as_recorded().cpu_time_ns, 0);
    }

    #[test]
    fn promised_bytes_counts_what_others_have_not_used() {
        let (registry, _directory) = registry("promised");
        let first = registry.allocate(&record("a", 1)).expect("free");
        let mut second = record("b", 1);
        second.uuid = Uuid::from_bytes([2; 16]);
        let second_slot = registry.allocate(&second).expect("free");
        // Neither has sockets, and both are of this process, which has no guest's memory yet.
        let of_one = promised_bytes(&registry, first.domid()).expect("list");
        assert_eq!(of_one, 64 << 20);
        let memory = rustix::fs::memfd_create("hospes-guest", MemfdFlags::CLOEXEC);
        let mut memory = File::from(memory.expect("a file"));
        memory.write_all(&vec![1; 8 << 20]).expect("memory");
        // Twice the same file.
        let _again = memory.try_clone().expect("a descriptor");
        let of_one = promised_bytes(&registry, first.domid()).expect("list");
        assert_eq!(of_one, 56 << 20);
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
            protocol::send(&stream, &Reply::Info(Box::new(info)))
                .expect("short")
                .expect("open");
        });
        let told = promised_bytes(&registry, first.domid()).expect("list");
        assert_eq!(told, 1 << 30);
        domain.join().expect("no panic");
    }
}
