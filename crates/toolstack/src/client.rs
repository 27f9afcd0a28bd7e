//! The commands' side: finding domains and asking them.

use std::io::{self, BufRead, BufReader, ErrorKind};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use hospes_config::{CpuList, DiskConfig, DomainConfig, Uuid, VifConfig};
use hospes_store_server::{StoreClient, is_full};
use hospes_units::DomId;

use crate::each::{Answer, check_goes_on, check_keeper_goes_on};
use crate::error::{Error, Result};
use crate::launch::{self, CreateRequest, Created};
use crate::paths::Paths;
use crate::protocol::{self, DomainInfo, Ended, Reply, Request, ShutdownKind, Until};
use crate::registry::{Entry, HOST_NAME, Registry, is_locked};
use crate::scheduling::{Share, VcpuInfo};
use crate::state::promised_bytes;
use crate::store;

/// How long a domain that is being made is waited for.
pub(crate) const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer may take.
pub(crate) const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// The same where the guest has a part in it: longer than the domain process waits for the guest.
const DEVICE_PATIENCE: Duration = Duration::from_secs(60);
/// The same for a list, for all its domains together.
pub(crate) const LIST_PATIENCE: Duration = Duration::from_secs(2);
/// How often a domain is looked up anew that was restarted while it was asked.
const RETRIES: usize = 5;

/// The domains of the calling user on this host.
#[derive(Clone, Debug)]
pub struct Host {
    paths: Paths,
    registry: Registry,
}

/// The end of a domain, waited for. From its making on nothing is missed.
#[derive(Debug)]
pub struct Watch {
    domid: DomId,
    /// `None` where the domain had ended before.
    stream: Option<UnixStream>,
}

impl Watch {
    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// Blocks until it has come.
    pub fn wait(self) -> Result<Ended> {
        match self.wait_told() {
            Err(Error::Gone { .. }) => Ok(LOST),
            ended => ended,
        }
    }

    /// The same; [`Error::Gone`] where the domain process could not say why.
    pub fn wait_told(self) -> Result<Ended> {
        self.receive(None)
    }

    /// Blocks until it has come, or until then; `None` where it has not come.
    pub fn wait_until(self, deadline: Instant) -> Result<Option<Ended>> {
        // No time at all would mean to wait for ever.
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        match self.receive(Some(left)) {
            Ok(ended) => Ok(Some(ended)),
            Err(Error::Gone { .. }) => Ok(Some(LOST)),
            Err(Error::Unreachable { source, .. }) if source.kind() == ErrorKind::TimedOut => {
                Ok(None)
            }
            Err(fault) => Err(fault),
        }
    }

    fn receive(self, patience: Option<Duration>) -> Result<Ended> {
        let domid = self.domid;
        let stream = self.stream.ok_or(Error::Gone { domid })?;
        match receive(domid, &stream, patience)? {
            Reply::Ended(ended) => Ok(ended),
            reply => Err(unexpected(&reply)),
        }
    }
}

/// The end of a domain process that died before it could say why.
const LOST: Ended = Ended {
    reason: None,
    dead: true,
    next: None,
    alone: None,
};

impl Host {
    /// The host with the directories of the calling user.
    pub fn from_environment() -> Result<Host> {
        Ok(Host::new(Paths::from_environment()?))
    }

    pub fn new(paths: Paths) -> Host {
        Host {
            registry: Registry::new(&paths),
            paths,
        }
    }

    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The store with the rights of domain 0. Its process is started with the first request.
    pub fn store(&self) -> Result<StoreClient> {
        store::client(&self.paths).map(StoreClient::hasty)
    }

    /// Creates a domain and returns when it is there. It runs unless it is to be left paused.
    pub fn create(&self, request: CreateRequest) -> Result<Created> {
        self.check_room()?;
        launch::create(&self.paths, request)
    }

    /// Whether there is room for what a change writes down: the store answers nobody before there is.
    pub(crate) fn check_room(&self) -> Result<()> {
        if is_full(&self.paths.run) {
            return Err(Error::Full {
                path: self.paths.run.clone(),
            });
        }
        Ok(())
    }

    /// All domains by id, without the host.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        self.registry.entries()
    }

    /// Memory that the domains have not used yet and still may, in bytes.
    pub fn promised_bytes(&self) -> Result<u64> {
        promised_bytes(&self.registry, DomId::HOST)
    }

    /// The domain with this id (a number) or name.
    pub fn find(&self, who: &str) -> Result<Entry> {
        if who == "0" || who == HOST_NAME {
            return Err(Error::Host);
        }
        let entries = self.entries()?;
        let is_number = !who.is_empty() && who.bytes().all(|byte| byte.is_ascii_digit());
        let found = if is_number {
            let id = who.parse::<u16>().ok();
            entries.into_iter().find(|entry| Some(entry.domid.0) == id)
        } else {
            entries.into_iter().find(|entry| entry.record.name == who)
        };
        found.ok_or_else(|| Error::NoSuchDomain { who: who.into() })
    }

    /// The state of a domain. One that does not answer is described by its record alone; `None` where it has ended.
    pub fn info(&self, entry: &Entry) -> Option<DomainInfo> {
        let answer = self.infos(vec![entry.clone()]).pop()?;
        Some(match answer {
            (_, Answer::Told(info)) => info,
            (entry, Answer::NotYet | Answer::Silent(_)) => entry.as_recorded(),
        })
    }

    pub fn pause(&self, who: &str) -> Result<()> {
        self.ask(who, &Request::Pause)
    }

    pub fn unpause(&self, who: &str) -> Result<()> {
        self.ask(who, &Request::Unpause)
    }

    /// Asks a guest to power off for good: nothing comes behind the domain, whatever its configuration says. One that has ended already is
    /// destroyed, and so is one that cannot be asked, which is an error.
    pub fn shutdown_for_good(&self, who: &str) -> Result<()> {
        let kind = ShutdownKind::Poweroff;
        self.ask(who, &Request::Shutdown { kind, last: true })
    }

    /// Asks a domain for something that is answered with done or an error.
    pub fn ask(&self, who: &str, request: &Request) -> Result<()> {
        self.request(who, request).and_then(done)
    }

    /// Adds a disk; a relative target is one of the calling process.
    pub fn attach_disk(&self, who: &str, mut disk: DiskConfig) -> Result<()> {
        launch::resolve_disk(&mut disk)?;
        self.ask(who, &Request::AttachDisk { disk })
    }

    /// Adds a network interface.
    pub fn attach_vif(&self, who: &str, mut vif: VifConfig) -> Result<()> {
        launch::resolve_vif(&mut vif)?;
        self.ask(who, &Request::AttachVif { vif })
    }

    /// Puts another medium into a CD-ROM drive, or none where there is no target.
    pub fn change_medium(&self, who: &str, mut disk: DiskConfig) -> Result<()> {
        launch::resolve_disk(&mut disk)?;
        self.ask(who, &Request::ChangeMedium { disk })
    }

    /// Gives a domain the configuration it is restarted with.
    pub fn update_config(&self, who: &str, mut config: DomainConfig) -> Result<()> {
        launch::resolve(&mut config)?;
        let config = Box::new(config);
        self.ask(who, &Request::UpdateConfig { config })
    }

    /// All vCPUs of a domain.
    pub fn vcpus(&self, who: &str) -> Result<Vec<VcpuInfo>> {
        match self.request(who, &Request::Vcpus)? {
            Reply::Vcpus { vcpus } => Ok(vcpus),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Changes which host CPUs one vCPU, or all, may run on (`hard`) and prefer (`soft`); what is `None` stays.
    pub fn pin(
        &self,
        who: &str,
        vcpu: Option<u32>,
        hard: Option<CpuList>,
        soft: Option<CpuList>,
    ) -> Result<()> {
        self.request(who, &Request::Pin { vcpu, hard, soft })
            .and_then(done)
    }

    /// A domain's share of the host's CPUs.
    pub fn share(&self, who: &str) -> Result<Share> {
        match self.request(who, &Request::Share)? {
            Reply::Share(share) => Ok(share),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Changes a domain's share of the host's CPUs; what is `None` stays.
    pub fn set_share(&self, who: &str, weight: Option<u16>, cap: Option<u16>) -> Result<()> {
        self.request(who, &Request::SetShare { weight, cap })
            .and_then(done)
    }

    /// Asks a guest to use its first `online` vCPUs.
    pub fn set_vcpus(&self, who: &str, online: u32) -> Result<()> {
        self.request(who, &Request::SetVcpus { online })
            .and_then(done)
    }

    /// Asks a guest to have this much memory.
    pub fn set_memory_target(&self, who: &str, kib: u64) -> Result<()> {
        self.ask(who, &Request::SetMemoryTarget { kib })
    }

    /// Lets a guest have this much memory.
    pub fn set_memory_max(&self, who: &str, kib: u64) -> Result<()> {
        self.ask(who, &Request::SetMemoryMax { kib })
    }

    /// Ends a domain. A domain process that does not answer is killed.
    pub fn destroy(&self, who: &str) -> Result<()> {
        self.destroy_entry(self.find(who)?)
    }

    /// The same for what the domain with this UUID is by now; one that has ended already is destroyed.
    pub fn destroy_uuid(&self, uuid: Uuid) -> Result<()> {
        self.living(uuid)?
            .map_or(Ok(()), |entry| self.destroy_entry(entry))
    }

    fn living(&self, uuid: Uuid) -> Result<Option<Entry>> {
        let mut entries = self.entries()?.into_iter();
        Ok(entries.find(|entry| entry.record.uuid == uuid))
    }

    fn destroy_entry(&self, mut entry: Entry) -> Result<()> {
        for _ in 0..RETRIES {
            let answer = check_keeper_goes_on(&entry).and_then(|()| destroy_answered(&entry));
            let ended = match answer.and_then(done) {
                Err(Error::Unmade { .. }) => self.end_unmade(&entry),
                Err(Error::Unreachable { .. } | Error::Stopped { .. }) => self.kill(&entry),
                ended => ended,
            };
            if !matches!(ended, Err(Error::Gone { .. })) {
                return ended;
            }
            // Through a reboot a domain keeps its UUID, and nothing else for sure. One that was there and lives under no
            // id any more is what was asked for.
            match self.living(entry.record.uuid)? {
                Some(next) => entry = next,
                None => return Ok(()),
            }
        }
        Err(Error::Restless {
            domid: entry.domid,
            tries: RETRIES,
        })
    }

    /// Begins to wait for the end of a domain.
    pub fn watch(&self, domid: DomId, until: Until) -> Result<Watch> {
        let stream = match self.find(&domid.to_string()) {
            Ok(entry) => match send(&entry, &Request::Wait { until }, CONNECT_PATIENCE) {
                Ok(stream) => Some(stream),
                Err(Error::Gone { .. }) => None,
                Err(fault) => return Err(fault),
            },
            Err(Error::NoSuchDomain { .. }) => None,
            Err(fault) => return Err(fault),
        };
        Ok(Watch { domid, stream })
    }

    /// A connection to a domain's console; it begins with the last output.
    pub fn console(&self, who: &str) -> Result<UnixStream> {
        let entry = self.find(who)?;
        connect(&entry, "console.sock", CONNECT_PATIENCE)
    }

    fn request(&self, who: &str, request: &Request) -> Result<Reply> {
        let mut tries = 0;
        loop {
            let entry = self.find(who)?;
            check_goes_on(&entry)?;
            if request.is_written_down() {
                self.check_room()?;
            }
            tries += 1;
            match ask(&entry, request, CONNECT_PATIENCE, patience(request)) {
                // A domain that reboots has its name again under another id.
                Err(Error::Gone { .. }) if tries < RETRIES && entry.record.name == who => {}
                answer => return answer,
            }
        }
    }
}

fn patience(request: &Request) -> Duration {
    match request {
        Request::AttachDisk { .. }
        | Request::AttachVif { .. }
        | Request::DetachDevice { .. }
        | Request::ChangeMedium { .. } => DEVICE_PATIENCE,
        _ => ANSWER_PATIENCE,
    }
}

/// Asks a domain to end. One that is still being made is not waited for; one that has closed its sockets is about to end or to start again by itself.
fn destroy_answered(entry: &Entry) -> Result<Reply> {
    match ask(entry, &Request::Destroy, Duration::ZERO, ANSWER_PATIENCE) {
        Err(Error::Unreachable { source, .. }) if source.kind() == ErrorKind::ConnectionRefused => {
            ask(entry, &Request::Destroy, CONNECT_PATIENCE, ANSWER_PATIENCE)
        }
        answer => answer,
    }
}

/// Connects to one of a domain's sockets; one that is being made opens them in a while.
pub(crate) fn connect(entry: &Entry, socket: &str, patience: Duration) -> Result<UnixStream> {
    let domid = entry.domid;
    let deadline = Instant::now() + patience;
    loop {
        match UnixStream::connect(entry.dir.join(socket)) {
            Ok(stream) => return Ok(stream),
            Err(_) if !is_locked(&entry.dir) => return Err(Error::Gone { domid }),
            Err(fault)
                if matches!(
                    fault.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(5));
            }
            Err(fault) if fault.kind() == ErrorKind::NotFound => {
                return Err(Error::Unmade { domid });
            }
            Err(source) => return Err(Error::Unreachable { domid, source }),
        }
    }
}

/// One request and its answer.
pub(crate) fn ask(
    entry: &Entry,
    request: &Request,
    connecting: Duration,
    answering: Duration,
) -> Result<Reply> {
    let stream = send(entry, request, connecting)?;
    receive(entry.domid, &stream, Some(answering))
}

/// The answer is still to come.
pub(crate) fn send(entry: &Entry, request: &Request, connecting: Duration) -> Result<UnixStream> {
    let stream = connect(entry, "control.sock", connecting)?;
    say(entry.domid, &stream, request)?;
    Ok(stream)
}

fn say(domid: DomId, stream: &UnixStream, request: &Request) -> Result<()> {
    match protocol::send(stream, request)?.map_err(|fault| lost(domid, fault)) {
        // It may have closed with an answer, which can still be read, and not have waited for the request.
        Err(Error::Gone { .. }) => Ok(()),
        said => said,
    }
}

pub(crate) fn receive(
    domid: DomId,
    stream: &UnixStream,
    patience: Option<Duration>,
) -> Result<Reply> {
    let fault = |source: io::Error| lost(domid, source);
    stream.set_read_timeout(patience).map_err(fault)?;
    read_reply(domid, &mut BufReader::new(stream))
}

/// The next reply, where more comes behind it.
pub(crate) fn read_reply(domid: DomId, from: &mut impl BufRead) -> Result<Reply> {
    let line = protocol::read_line(from)?.map_err(|source| lost(domid, source))?;
    match protocol::decode(&line.ok_or(Error::Gone { domid })?)? {
        Reply::Error { message } => Err(Error::Refused { domid, message }),
        reply => Ok(reply),
    }
}

fn lost(domid: DomId, source: io::Error) -> Error {
    match source.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Error::Gone { domid },
        // What a socket calls a time that is over.
        ErrorKind::WouldBlock => Error::Unreachable {
            domid,
            source: ErrorKind::TimedOut.into(),
        },
        _ => Error::Unreachable { domid, source },
    }
}

pub(crate) fn done(reply: Reply) -> Result<()> {
    match reply {
        Reply::Done => Ok(()),
        reply => Err(unexpected(&reply)),
    }
}

pub(crate) fn unexpected(reply: &Reply) -> Error {
    Error::Protocol(format!("the answer belongs to another request: {reply:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::testing::record;
    use std::os::unix::net::UnixListener;

    /// A host without domains, in a directory of its own that goes with it.
    struct TestHost(Host);

    impl std::ops::Deref for TestHost {
        type Target = Host;

        fn deref(&self) -> &Host {
            &self.0
        }
    }

    impl Drop for TestHost {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0.paths.run);
        }
    }

    fn host(test: &str) -> TestHost {
        let run = std::env::temp_dir().join(format!("hospes-client-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&run).expect("temporary directory");
        let [log, dump] = ["log", "dump"].map(|name| run.join(name));
        TestHost(Host::new(Paths { run, log, dump }))
    }

    fn listen(dir: &std::path::Path) -> UnixListener {
        UnixListener::bind(dir.join("control.sock")).expect("a fresh directory")
    }

    fn read(stream: &UnixStream) -> Request {
        let line = protocol::read_line(&mut BufReader::new(stream));
        let line = line.expect("short").expect("open").expect("a request");
        protocol::decode(&line).expect("valid")
    }

    #[test]
    fn destroy_by_number_during_a_reboot_ends_what_the_domain_became() {
        let host = host("reboot");
        let old = host.registry.allocate(&record("a", 1)).expect("free");
        let listener = listen(old.dir());
        let domain = thread::spawn({
            let registry = host.registry.clone();
            move || {
                let (stream, _) = listener.accept().expect("a command");
                // The request comes too late.
                let (new, _) = registry
                    .replace(&old, |record| record)
                    .expect("its own name");
                let listener = self::listen(new.dir());
                drop(stream);
                let (stream, _) = listener.accept().expect("the command again");
                assert_eq!(read(&stream), Request::Destroy);
                registry.release(new).expect("held");
                protocol::send(&stream, &Reply::Done)
                    .expect("short")
                    .expect("open");
            }
        });
        host.destroy("1").expect("a domain that can be destroyed");
        assert_eq!(host.entries().expect("list"), []);
        domain.join().expect("no panic");
    }

    #[test]
    fn destroy_that_is_never_answered_is_an_error() {
        let host = host("silent");
        let slot = host.registry.allocate(&record("a", 1)).expect("free");
        let listener = listen(slot.dir());
        thread::spawn(move || while listener.accept().is_ok() {});
        for who in ["1", "a"] {
            let fault = host.destroy(who).expect_err("it lives");
            assert!(fault.to_string().contains("it still lives"), "{fault}");
        }
        drop(slot);
        host.destroy("a").expect_err("it has died long ago");
    }

    #[test]
    fn ask_that_is_refused_before_it_is_read_says_why() {
        let host = host("refused");
        let slot = host.registry.allocate(&record("a", 1)).expect("free");
        let listener = listen(slot.dir());
        let entry = host.find("a").expect("it lives");
        let stream = UnixStream::connect(entry.dir.join("control.sock")).expect("it listens");
        let (server, _) = listener.accept().expect("a command");
        let message = "not now".to_string();
        protocol::send(&server, &Reply::Error { message })
            .expect("short")
            .expect("open");
        drop(server);
        say(entry.domid, &stream, &Request::Pause).expect("an answer is there");
        let fault = receive(entry.domid, &stream, None).expect_err("refused");
        assert!(fault.to_string().contains("not now"), "{fault}");
    }

    #[test]
    fn destroy_by_uuid_does_not_take_a_name_for_a_number() {
        let host = host("uuid");
        let mut named = record("a", 1);
        named.name = "2".into();
        named.uuid = Uuid::from_bytes([2; 16]);
        let slot = host.registry.allocate(&named).expect("free");
        let other = host.registry.allocate(&record("b", 1)).expect("free");
        assert_eq!((slot.domid(), other.domid()), (DomId(1), DomId(2)));
        let listener = listen(slot.dir());
        let domain = thread::spawn({
            let registry = host.registry.clone();
            move || {
                let (stream, _) = listener.accept().expect("a command");
                assert_eq!(read(&stream), Request::Destroy);
                registry.release(slot).expect("held");
                protocol::send(&stream, &Reply::Done)
                    .expect("short")
                    .expect("open");
            }
        });
        let uuid = named.uuid;
        host.destroy_uuid(uuid).expect("it can be destroyed");
        domain.join().expect("no panic");
        host.destroy_uuid(uuid).expect("it has ended");
        assert_eq!(host.entries().expect("list")[..].len(), 1);
    }
}
