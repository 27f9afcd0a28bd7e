//! Starting a domain process.
//!
//! The program starts itself anew with a hidden subcommand. The process gets a [`Launch`] on its standard input and
//! answers with a [`Launched`] on its standard output before it goes on alone; standard error is its log.

use std::io::{BufReader, ErrorKind, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use hospes_config::{DiskConfig, DomainConfig, Uuid, VifConfig};
use hospes_units::DomId;

use crate::DOMAIN_SUBCOMMAND;
use crate::error::{Error, Result, at};
use crate::logfile::{LOG_MAX_BYTES, LogFile, open_append};
use crate::paths::Paths;
use crate::protocol::{self, Launch, Launched};

/// A domain to be created.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    pub config: DomainConfig,
    /// Leave the domain paused.
    pub paused: bool,
}

/// A domain that was just created. Its process goes on without this one; as long as both live, this one hears how it ends.
#[derive(Debug)]
pub struct Created {
    pub domid: DomId,
    process: Child,
    /// Where it says at its end what went wrong.
    said: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Created {
    /// Waits for the end of the domain process; an error where it was killed, or where the domain was to start again and could not.
    pub fn wait_process(mut self) -> Result<()> {
        let status = self.process.wait().map_err(Error::Spawn)?;
        if status.success() {
            return Ok(());
        }
        if let Ok(Ok(Some(line))) = protocol::read_line(&mut self.said)
            && let Ok(Launched::Error { message }) = protocol::decode(&line)
        {
            return Err(Error::Create { message });
        }
        Err(Error::ProcessLost {
            domid: self.domid,
            status,
            log: self.log,
        })
    }
}

/// A fresh version 4 UUID.
pub fn random_uuid() -> Result<Uuid> {
    let mut bytes = [0; 16];
    let length = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|fault| {
            at("cannot read random numbers from", Path::new("getrandom(2)"))(fault.into())
        })?;
    // Up to 256 bytes are never given in part.
    debug_assert_eq!(length, bytes.len());
    Ok(Uuid::from_random(bytes))
}

/// Makes a configuration independent of where the command runs, and draws what it leaves open and reboots keep.
pub(crate) fn resolve(config: &mut DomainConfig) -> Result<()> {
    config.kernel =
        std::path::absolute(&config.kernel).map_err(at("cannot resolve", &config.kernel))?;
    if let Some(ramdisk) = &mut config.ramdisk {
        *ramdisk = std::path::absolute(&*ramdisk).map_err(at("cannot resolve", ramdisk))?;
    }
    for disk in &mut config.disks {
        resolve_disk(disk)?;
    }
    for vif in &mut config.vifs {
        resolve_vif(vif)?;
    }
    Ok(())
}

/// A relative target is a file here or, as xl-disk-configuration(5) has it, a device in /dev. What a script makes a disk
/// of is no path.
pub(crate) fn resolve_disk(disk: &mut DiskConfig) -> Result<()> {
    let (Some(target), None) = (&mut disk.target, &disk.script) else {
        return Ok(());
    };
    let here = std::path::absolute(&*target).map_err(at("cannot resolve", target))?;
    let device = Path::new("/dev").join(&*target);
    *target = if !here.exists() && device.exists() {
        device
    } else {
        here
    };
    Ok(())
}

/// An address of Xen's part of the MAC address space, where none is given.
pub(crate) fn resolve_vif(vif: &mut VifConfig) -> Result<()> {
    if vif.mac.is_none() {
        let random = *random_uuid()?.as_bytes();
        vif.mac = Some([0x00, 0x16, 0x3e, random[0] & 0x7f, random[1], random[2]]);
    }
    Ok(())
}

/// Creates a domain and returns when it is there.
pub(crate) fn create(paths: &Paths, request: CreateRequest) -> Result<Created> {
    let mut config = request.config;
    resolve(&mut config)?;
    if config.uuid.is_none() {
        config.uuid = Some(random_uuid()?);
    }
    paths.create()?;
    start_process(&Launch {
        config,
        paused: request.paused,
        restore: false,
        next: None,
        passport: None,
        paths: paths.clone(),
    })
}

/// Writes the stream of a saved domain, from behind its configuration to its end.
pub(crate) type Feed<'a> = &'a mut dyn FnMut(&mut dyn Write) -> Result<()>;

/// Makes a domain of a saved one and returns when it is there.
pub(crate) fn restore(
    paths: &Paths,
    mut config: DomainConfig,
    next: Option<DomainConfig>,
    paused: bool,
    feed: Feed<'_>,
) -> Result<Created> {
    resolve(&mut config)?;
    if config.uuid.is_none() {
        config.uuid = Some(random_uuid()?);
    }
    paths.create()?;
    let launch = Launch {
        config,
        paused,
        restore: true,
        next: next.map(Box::new),
        passport: None,
        paths: paths.clone(),
    };
    start(&launch, Some(feed))
}

/// Begins to make a domain that comes from another host.
pub(crate) fn receive(
    paths: &Paths,
    mut config: DomainConfig,
    next: Option<DomainConfig>,
    passport: String,
) -> Result<Starting> {
    resolve(&mut config)?;
    if config.uuid.is_none() {
        config.uuid = Some(random_uuid()?);
    }
    paths.create()?;
    Starting::new(&Launch {
        config,
        paused: true,
        restore: true,
        next: next.map(Box::new),
        passport: Some(passport),
        paths: paths.clone(),
    })
}

/// A command that runs this program with a hidden subcommand.
pub(crate) fn own_program(subcommand: &str) -> Command {
    // The name by which this process was started may mean another program by now.
    let mut command = Command::new("/proc/self/exe");
    let name = std::env::args_os().next();
    command
        .arg0(name.unwrap_or_else(|| "hospes".into()))
        .arg(subcommand);
    command
}

/// Starts a domain process and waits for its answer.
pub(crate) fn start_process(launch: &Launch) -> Result<Created> {
    start(launch, None)
}

fn start(launch: &Launch, feed: Option<Feed<'_>>) -> Result<Created> {
    let mut starting = Starting::new(launch)?;
    if let Some(feed) = feed {
        starting.feed(feed)?;
    }
    starting.close();
    starting.created()
}

/// A domain process that has still to say what became of it. Without somebody who listens there is no domain.
pub(crate) struct Starting {
    child: Child,
    /// `None` once closed.
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Starting {
    /// Starts the process and tells it what to make.
    pub(crate) fn new(launch: &Launch) -> Result<Starting> {
        let name = launch.first_name();
        let log_path = launch.paths.domain_log(&name);
        // Moves a log that has become too long out of the way.
        LogFile::open(&log_path, LOG_MAX_BYTES)
            .and_then(|mut log| log.append(b""))
            .map_err(at("cannot open the log", &log_path))?;
        let log = open_append(&log_path).map_err(at("cannot open the log", &log_path))?;
        let mut child = own_program(DOMAIN_SUBCOMMAND)
            .arg(&name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(Error::Spawn)?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::Spawn(std::io::ErrorKind::BrokenPipe.into()));
        };
        // Where the process has died already, its exit status says more than the broken pipe.
        let _ = protocol::send(&mut stdin, launch)?;
        Ok(Starting {
            child,
            stdin: Some(stdin),
            stdout: BufReader::new(stdout),
            log: log_path,
        })
    }

    /// Has `feed` write to it. Where the process reads no more, its answer says why.
    pub(crate) fn feed(&mut self, feed: Feed<'_>) -> Result<()> {
        let Some(stdin) = &mut self.stdin else {
            return Ok(());
        };
        match feed(stdin) {
            Err(fault) if !is_broken_pipe(&fault) => {
                // What the process has to say of it would be that its input has ended.
                self.close();
                self.child.wait().map_err(Error::Spawn)?;
                Err(fault)
            }
            _ => Ok(()),
        }
    }

    /// Says one thing more.
    pub(crate) fn say(&mut self, what: &impl serde::Serialize) -> Result<()> {
        match &mut self.stdin {
            // As at the start.
            Some(stdin) => protocol::send(stdin, what).map(drop),
            None => Ok(()),
        }
    }

    /// Says no more.
    pub(crate) fn close(&mut self) {
        self.stdin = None;
    }

    /// The next answer. After an error the process has ended.
    pub(crate) fn answer(&mut self) -> Result<Launched> {
        let line = protocol::read_line(&mut self.stdout)?.map_err(Error::Spawn)?;
        let Some(line) = line else {
            self.close();
            let status = self.child.wait().map_err(Error::Spawn)?;
            return Err(Error::ProcessDied {
                status,
                log: self.log.clone(),
            });
        };
        match protocol::decode(&line)? {
            Launched::Error { message } => {
                self.close();
                self.child.wait().map_err(Error::Spawn)?;
                Err(Error::Create { message })
            }
            answer => Ok(answer),
        }
    }

    /// Waits until a process that is told no more has ended.
    pub(crate) fn abandon(mut self) {
        self.close();
        // Whatever it is that keeps it from ending, nobody here can do anything about it.
        let _ = self.child.wait();
    }

    fn created(mut self) -> Result<Created> {
        match self.answer()? {
            Launched::Domain { domid } => Ok(Created {
                domid: DomId(domid),
                process: self.child,
                said: self.stdout,
                log: self.log,
            }),
            other => Err(unknown(&other)),
        }
    }
}

/// An answer that belongs to something else.
pub(crate) fn unknown(answer: &Launched) -> Error {
    Error::Protocol(format!("the domain process answers {answer:?}"))
}

/// Whether nobody reads any more what is written.
fn is_broken_pipe(fault: &Error) -> bool {
    use hospes_migration::StreamError::Write;
    let (Error::SavedFile { source, .. } | Error::Passed(source)) = fault else {
        return false;
    };
    matches!(source, Write(source) if source.kind() == ErrorKind::BrokenPipe)
}
