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

use hospes_store::wire;
use hospes_units::DomId;
use rustix::fs::{FlockOperation, flock};

use crate::client::PATIENCE;
use crate::protocol::{self, RESTRICT};

/// Starts a store process and returns when it listens, or has given up because another does.
pub type Starter = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// The way to the store process. What a client needs of the host beside its connection is here, so that a process that has no access to
/// files and sockets can have it from another.
pub trait Connector: fmt::Debug + Send + Sync {
    /// A new connection to the store process, which is started where there is none. It is called again, after a pause, where it fails.
    fn connect(&self) -> io::Result<UnixStream>;

    /// Whether the store process waits for room on the file system, as it has to with the next change.
    fn is_full(&self) -> bool;
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
        let connect = || UnixStream::connect(self.socket());
        if let Ok(stream) = connect() {
            return Ok(stream);
        }
        // When it was killed all its clients come here at once: one of them starts another.
        self.make_dir()?;
        let starting = open_lock(&self.dir.join("starting"))?;
        flock(&starting, FlockOperation::LockExclusive)?;
        if let Ok(stream) = connect() {
            return Ok(stream);
        }
        (self.starter)()?;
        connect()
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

    /// A connection to the store process if there is one.
    pub fn connect_running(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self.socket())
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

    fn is_full(&self) -> bool {
        is_full(&self.dir)
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
