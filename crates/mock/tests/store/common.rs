//! A run-time directory of its own for every test, the store process in it, and guests' ends of connections.

use std::fs::{File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hospes_store::wire::{self, kind};
use hospes_store::{DomainEntry, DomainStore, Error, GuestLink, Membership};
use hospes_store_server::{Connector, Place, StoreClient};
use hospes_units::DomId;
use rustix::fs::{FlockOperation, flock};

/// After so long a test gives up: no measure of anything.
pub const GIVE_UP: Duration = Duration::from_secs(120);

pub struct Bench {
    dir: PathBuf,
}

impl Bench {
    pub fn new() -> Bench {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hospes-store-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(dir.join("run/domains")).expect("temporary directory");
        std::fs::write(dir.join("kernel"), "no kernel").expect("writable");
        Bench { dir }
    }

    /// The program.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hospes-mock"));
        command
            .env("HOSPES_RUN_DIR", self.dir.join("run"))
            .env("HOSPES_LOG_DIR", self.dir.join("log"));
        command
    }

    pub fn hospes(&self, arguments: &[&str]) {
        let output = self.command().args(arguments).output().expect("starts");
        assert!(output.status.success(), "{output:?}");
    }

    pub fn create(&self, name: &str) {
        self.create_with(name, "");
    }

    /// With more of a configuration.
    pub fn create_with(&self, name: &str, more: &str) {
        let kernel = format!("kernel='{}'", self.dir.join("kernel").display());
        let name = format!("name='{name}'; type='pvh'; memory=64; {more}");
        self.hospes(&["create", "-q", "/dev/null", &name, &kernel]);
    }

    /// The process of a domain.
    pub fn pid(&self, domid: u16) -> rustix::process::Pid {
        let dir = self.dir.join(format!("run/domains/{domid}"));
        pid_in(&dir).expect("a record with a pid")
    }

    pub fn place(&self) -> Place {
        let mut template = self.command();
        template.arg("__store").stderr(Stdio::inherit());
        let template = Mutex::new(template);
        Place::new(
            &self.dir.join("run"),
            Arc::new(move || {
                let mut command = template.lock().expect("no panics");
                let mut child = command
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .spawn()?;
                if let Some(mut stdout) = child.stdout.take() {
                    let _ = std::io::Read::read(&mut stdout, &mut [0; 16])?;
                }
                std::thread::spawn(move || child.wait());
                Ok(())
            }),
        )
    }

    pub fn client(&self) -> StoreClient {
        StoreClient::new(self.place()).expect("a client")
    }

    /// A client that is restricted to a domain, as [`Guest::new`] makes it.
    pub fn restricted(&self, domid: u16) -> StoreClient {
        let keeper = Keeper {
            place: self.place(),
            domid: DomId(domid),
        };
        StoreClient::new(keeper).expect("a client")
    }

    /// The store process, if there is one.
    pub fn store_pid(&self) -> Option<rustix::process::Pid> {
        let stream = UnixStream::connect(self.place().socket()).ok()?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
        Some(peer.pid)
    }

    /// Kills the store process; whether there was one.
    pub fn kill_store(&self) -> bool {
        self.store_pid().is_some_and(|pid| {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok()
        })
    }

    /// Has the store process that runs be taken for one of another version.
    pub fn make_store_another(&self) {
        let version = self.dir.join("run/xenstored/version");
        assert!(version.exists());
        std::fs::write(version, "another").expect("writable");
    }

    /// Where a file may be made.
    pub fn file(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn journal(&self) -> PathBuf {
        self.dir.join("run/xenstored/journal")
    }

    pub fn journal_bytes(&self) -> u64 {
        std::fs::metadata(self.journal()).expect("there").len()
    }

    pub fn put_journal(&self, bytes: &[u8]) {
        let path = self.journal();
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("writable");
        std::fs::write(path, bytes).expect("writable");
    }

    pub fn append_to_journal(&self, bytes: &[u8]) {
        let mut file = OpenOptions::new()
            .append(true)
            .open(self.journal())
            .expect("there");
        std::io::Write::write_all(&mut file, bytes).expect("writable");
    }

    pub fn unreadable_journal(&self) -> Vec<u8> {
        std::fs::read(self.journal().with_extension("unreadable")).expect("there")
    }

    /// One of Debian's tools, `xenstore-NAME`.
    pub fn tool(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(format!("xenstore-{name}"));
        command
            .args(arguments)
            .env("XENSTORED_PATH", self.place().socket());
        command
    }

    pub fn run_tool(&self, name: &str, arguments: &[&str]) -> Output {
        self.tool(name, arguments)
            .output()
            .expect("xenstore-utils is installed: guests/install.sh test")
    }

    /// A tool that has to succeed; what it prints.
    pub fn told(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.run_tool(name, arguments);
        assert!(output.status.success(), "{name} {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }
}

/// Connects for whoever serves a domain.
#[derive(Debug)]
struct Keeper {
    place: Place,
    domid: DomId,
}

impl Connector for Keeper {
    fn connect(&self) -> std::io::Result<UnixStream> {
        let DomainEntry { uuid, name, .. } = entry(self.domid.0);
        self.place.connect_restricted(self.domid, &uuid, &name)
    }

    fn trouble(&self) -> Option<Error> {
        self.place.trouble()
    }
}

/// The UUID that [`Guest::new`] gives a domain.
pub fn uuid(domid: u16) -> String {
    format!("00000000-0000-0000-0000-0000000000{domid:02}")
}

/// What [`Guest::new`] enters.
pub fn entry(domid: u16) -> DomainEntry {
    DomainEntry {
        domid: DomId(domid),
        uuid: uuid(domid),
        name: format!("guest-{domid}"),
        memory_kib: 262_144,
        memory_max_kib: 524_288,
        // As many as there may be.
        vcpus: 128,
        console_port: 2,
        console_ring: 0xfefff,
        store_port: 1,
        store_ring: 0xfeffc,
    }
}

/// Whether a living process holds the lock of a domain's directory.
fn is_locked(dir: &Path) -> bool {
    let Ok(lock) = OpenOptions::new().write(true).open(dir.join("lock")) else {
        return false;
    };
    flock(&lock, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
}

/// The process of the domain with this directory.
fn pid_in(dir: &Path) -> Option<rustix::process::Pid> {
    let text = std::fs::read(dir.join("domain.json")).ok()?;
    let record: serde_json::Value = serde_json::from_slice(&text).ok()?;
    let pid = i32::try_from(record["pid"].as_i64()?).ok()?;
    rustix::process::Pid::from_raw(pid)
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Domain processes first: they would start another store process.
        let domains = std::fs::read_dir(self.dir.join("run/domains"));
        for domain in domains.into_iter().flatten().flatten() {
            // One that has ended may have left its number to another.
            if let Some(pid) = pid_in(&domain.path())
                && is_locked(&domain.path())
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        self.kill_store();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Waits until something holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + GIVE_UP;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} has not come true");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A guest with a ring of its own, and the lock by which its process is known to live.
pub struct Guest {
    link: Box<dyn GuestLink>,
    woken: Receiver<()>,
    input: Vec<u8>,
    next_id: u32,
    pub events: Vec<String>,
    _membership: Membership,
    _lock: File,
}

pub type Reply = Result<String, String>;

impl Guest {
    pub fn new(bench: &Bench, client: &StoreClient, domid: u16) -> Guest {
        let dir = bench.dir.join(format!("run/domains/{domid}"));
        // Whoever clears up after killed domains takes away a directory whose lock is free.
        let unseen = bench.dir.join(format!("run/domain{domid}"));
        std::fs::create_dir_all(&unseen).expect("writable");
        std::fs::create_dir_all(dir.parent().expect("it has one")).expect("writable");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(unseen.join("lock"))
            .expect("writable");
        flock(&lock, FlockOperation::LockExclusive).expect("a lock");
        // What an earlier guest of this number has left.
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::rename(&unseen, &dir).expect("no other of this number");
        let (waker, woken) = channel();
        let waker = Mutex::new(waker);
        let wake = move || {
            let _ = waker.lock().expect("no panics").send(());
        };
        let (link, membership) = client
            .add_domain(&entry(domid), Arc::new(wake))
            .expect("a domain");
        Guest {
            link,
            woken,
            input: Vec::new(),
            next_id: 7,
            events: Vec::new(),
            _membership: membership,
            _lock: lock,
        }
    }

    /// Sends a request without waiting.
    pub fn send(&mut self, kind: u32, transaction: u32, payload: &str) {
        self.next_id += 1;
        let bytes = wire::encode(kind, self.next_id, transaction, payload.as_bytes());
        let (a, b) = bytes.split_at(bytes.len() / 2);
        self.link.input(a).expect("a good message");
        self.link.input(b).expect("a good message");
    }

    /// Fetches what has come: the reply to request `next_id`, if it is among it.
    pub fn fetch(&mut self) -> Option<Reply> {
        let mut reply = None;
        let mut buf = [0; 100];
        loop {
            match self.link.output(&mut buf) {
                0 => break,
                count => self.input.extend(&buf[..count]),
            }
        }
        while let Some(message) = wire::decode(&mut self.input).expect("good messages") {
            let text = String::from_utf8(message.payload).expect("text");
            if message.kind == kind::WATCH_EVENT {
                assert_eq!((message.id, message.transaction), (0, 0));
                self.events.push(text);
                continue;
            }
            assert_eq!(message.id, self.next_id, "replies are to the last request");
            assert!(reply.is_none(), "one reply to each request");
            reply = Some(match message.kind {
                kind::ERROR => Err(text.trim_end_matches('\0').to_owned()),
                _ => Ok(text),
            });
        }
        reply
    }

    pub fn ask_in(&mut self, kind: u32, transaction: u32, payload: &str) -> Reply {
        self.send(kind, transaction, payload);
        let deadline = Instant::now() + GIVE_UP;
        loop {
            if let Some(reply) = self.fetch() {
                return reply;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no reply to request {kind}");
            let _ = self
                .woken
                .recv_timeout(left.min(Duration::from_millis(200)));
        }
    }

    pub fn ask(&mut self, kind: u32, payload: &str) -> Reply {
        self.ask_in(kind, 0, payload)
    }

    pub fn link(&mut self) -> &mut dyn GuestLink {
        &mut *self.link
    }
}
