//! Where the store process of a run-time directory is, and how one is started.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hospes_store::{Error, wire};
use hospes_units::DomId;
use rustix::fs::{FlockOperation, flock};

use crate::bell::PATIENCE;
use crate::protocol::{self, LEAVE, RESTRICT, VERSION};

/// How often it is looked whether a process that leaves is gone.
const LOOK: Duration = Duration::from_millis(10);

/// Starts a store process and returns when it listens, or has given up because another does.
pub type Starter = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// The way to the store process. What a client needs of the host beside its connection is here, so that a process that has no access to
/// files and sockets can have it from another.
pub trait Connector: fmt::Debug + Send + Sync {
    /// A new connection to the store process, which is started where there is none. It is called again, after a pause, where it fails.
    fn connect(&self) -> io::Result<UnixStream>;

    /// Why the store process cannot be had, or not for changes, where that is known: it waits for room on the file system, or is of another version.
    fn trouble(&self) -> Option<Error>;
}

/// The directory `<run>/xenstored` with the socket, the lock and the journal of a store process, and the way to start one.
#[derive(Clone)]
pub struct Place {
    dir: PathBuf,
    starter: Starter,
}

impl Place {
    /// The place for a run-time directory.
    pub fn new(run: &Path, starter: Starter) -> Place {
        Place {
            dir: run.join("xenstored"),
            starter,
        }
    }

    /// A starter that runs a command, which becomes the store process: it has to write a line to its standard output when it listens.
    pub fn starter(command: impl Fn() -> io::Result<Command> + Send + Sync + 'static) -> Starter {
        Arc::new(move || {
            let mut child = command()?
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()?;
            if let Some(mut stdout) = child.stdout.take() {
                // A line, or the end.
                let _ = stdout.read(&mut [0; 16])?;
            }
            // Somebody has to take note of its end.
            thread::spawn(move || child.wait());
            Ok(())
        })
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("socket")
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.dir.join("journal")
    }

    fn connect_or_start(&self) -> io::Result<UnixStream> {
        if let Some(stream) = self.connect_running()? {
            return Ok(stream);
        }
        // When it was killed all its clients come here at once: one of them starts another.
        self.make_dir()?;
        let starting = open_lock(&self.dir.join("starting"))?;
        flock(&starting, FlockOperation::LockExclusive)?;
        if let Some(stream) = self.connect_running()? {
            return Ok(stream);
        }
        (self.starter)()?;
        let started = self.connect_running()?;
        started.ok_or_else(|| io::ErrorKind::ConnectionRefused.into())
    }

    /// A connection, to be passed on, that has domain 0's rights for what belongs to one domain, and no other rights; the store process is started
    /// where there is none. `uuid` and `name` are what the domain has now. Fails where the store process does not answer for half a minute, and where the domain
    /// has many connections already.
    pub fn connect_restricted(
        &self,
        domid: DomId,
        uuid: &str,
        name: &str,
    ) -> io::Result<UnixStream> {
        let mut stream = self.connect_or_start()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let restriction = protocol::restriction(domid, uuid, name);
        let request = wire::encode(RESTRICT, 0, 0, &restriction);
        stream.write_all(&request)?;
        let answer = protocol::read_answer(&stream)?;
        if answer.kind != RESTRICT {
            let error = protocol::error_of(&answer);
            return Err(io::Error::other(format!(
                "the store does not restrict a connection to domain {domid}: {error}"
            )));
        }
        stream.set_read_timeout(None)?;
        Ok(stream)
    }

    /// A connection to the store process if there is one. One of another version is asked to leave; it fails where that stays.
    fn connect_running(&self) -> io::Result<Option<UnixStream>> {
        let Ok(mut stream) = UnixStream::connect(self.socket()) else {
            return Ok(None);
        };
        if self.is_of_this_version() {
            return Ok(Some(stream));
        }
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&wire::encode(LEAVE, 0, 0, b""))?;
        if protocol::read_answer(&stream)?.kind != LEAVE {
            return Err(io::Error::other(Error::OtherVersion));
        }
        let deadline = Instant::now() + PATIENCE;
        while self.lock()?.is_none() {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(LOOK);
        }
        Ok(None)
    }

    fn version(&self) -> PathBuf {
        self.dir.join("version")
    }

    /// Whether the process that listens, or listened last, is of this version.
    fn is_of_this_version(&self) -> bool {
        fs::read_to_string(self.version()).is_ok_and(|v| v == VERSION.to_string())
    }

    /// Writes down of which version the process is that is about to listen.
    pub(crate) fn note_version(&self) -> io::Result<()> {
        let new = self.dir.join("version.new");
        fs::write(&new, VERSION.to_string())?;
        fs::rename(&new, self.version())
    }

    fn make_dir(&self) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
    }

    /// Makes the directory and takes its lock, for as long as the file lives; `None` where another process has it.
    pub(crate) fn lock(&self) -> io::Result<Option<File>> {
        self.make_dir()?;
        let file = open_lock(&self.dir.join("lock"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(fault) => Err(fault.into()),
        }
    }

    /// Lets tools that look for a store at `public` find this one, unless they find another there.
    pub fn publish(&self, public: &Path) -> io::Result<()> {
        let socket = self.socket();
        match fs::read_link(public) {
            Ok(target) if target == socket => return Ok(()),
            // A link that leads nowhere was left by somebody.
            Ok(_) if !public.exists() => fs::remove_file(public)?,
            _ => {}
        }
        if let Some(dir) = public.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        }
        match std::os::unix::fs::symlink(&socket, public) {
            Err(fault) if fault.kind() != io::ErrorKind::AlreadyExists => Err(fault),
            _ => Ok(()),
        }
    }
}

/// Less than this is left for the next step of the journal, or a record of a domain, in bytes.
const ROOM_LEAST: u64 = 64 << 10;

/// Whether the file system with a directory has no room for what is to be written down.
pub fn is_full(directory: &Path) -> bool {
    // One without blocks, or that nobody can ask, is not known to be full.
    rustix::fs::statvfs(directory)
        .is_ok_and(|fs| fs.f_blocks > 0 && fs.f_bavail.saturating_mul(fs.f_frsize) < ROOM_LEAST)
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
}

impl Connector for Place {
    fn connect(&self) -> io::Result<UnixStream> {
        self.connect_or_start()
    }

    fn trouble(&self) -> Option<Error> {
        if is_full(&self.dir) {
            return Some(Error::Full);
        }
        let is_another = self.socket().exists() && !self.is_of_this_version();
        is_another.then_some(Error::OtherVersion)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Place({})", self.dir.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publish_replaces_only_links_that_lead_nowhere() {
        let dir = std::env::temp_dir().join(format!("hospes-publish-{}", std::process::id()));
        let place = Place::new(&dir, Arc::new(|| Ok(())));
        let held = place.lock().unwrap();
        assert!(held.is_some() && place.lock().unwrap().is_none());
        let public = dir.join("public/socket");
        place.publish(&public).unwrap();
        place.publish(&public).unwrap();
        assert_eq!(fs::read_link(&public).unwrap(), place.socket());
        fs::remove_file(&public).unwrap();
        std::os::unix::fs::symlink("/nowhere/at/all", &public).unwrap();
        place.publish(&public).unwrap();
        assert_eq!(fs::read_link(&public).unwrap(), place.socket());
        fs::remove_file(&public).unwrap();
        fs::write(&public, "another's").unwrap();
        place.publish(&public).unwrap();
        assert!(fs::read_link(&public).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
