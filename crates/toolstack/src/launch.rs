//! Starting a domain process.
//!
//! The program starts itself anew with a hidden subcommand. The process gets a [`Launch`] on its standard input and
//! answers with a [`Launched`] on its standard output before it goes on alone; standard error is its log.

use std::io::{BufReader, ErrorKind, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

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
    log: PathBuf,
}

impl Created {
    /// Waits for the end of the domain process; an error where it was killed and did not come to its end.
    pub fn wait_process(mut self) -> Result<()> {
        let status = self.process.wait().map_err(Error::Spawn)?;
        if status.success() {
            return Ok(());
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
        run: paths.run.clone(),
        log: paths.log.clone(),
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
        run: paths.run.clone(),
        log: paths.log.clone(),
    };
    start(&launch, Some(feed))
}

/// Starts a domain process and waits for its answer.
pub(crate) fn start_process(launch: &Launch) -> Result<Created> {
    start(launch, None)
}

fn start(launch: &Launch, feed: Option<Feed<'_>>) -> Result<Created> {
    let paths = Paths {
        run: launch.run.clone(),
        log: launch.log.clone(),
    };
    let log_path = paths.domain_log(&launch.config.name);
    // Moves a log that has become too long out of the way.
    LogFile::open(&log_path, LOG_MAX_BYTES)
        .and_then(|mut log| log.append(b""))
        .map_err(at("cannot open the log", &log_path))?;
    let log = open_append(&log_path).map_err(at("cannot open the log", &log_path))?;
    // The name by which the process was started may mean another program by now.
    let mut child = Command::new("/proc/self/exe")
        .arg0(
            std::env::args_os()
                .next()
                .unwrap_or_else(|| "hospes".into()),
        )
        .arg(DOMAIN_SUBCOMMAND)
        .arg(&launch.config.name)
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
    let fed = feed.map_or(Ok(()), |feed| feed(&mut stdin));
    drop(stdin);
    if let Err(fault) = fed
        && !is_broken_pipe(&fault)
    {
        // What the process has to say of it would be that its input has ended.
        child.wait().map_err(Error::Spawn)?;
        return Err(fault);
    }
    let line = protocol::read_line(&mut BufReader::new(stdout))?.map_err(Error::Spawn)?;
    let Some(line) = line else {
        let status = child.wait().map_err(Error::Spawn)?;
        return Err(Error::ProcessDied {
            status,
            log: log_path,
        });
    };
    match protocol::decode(&line)? {
        Launched::Domain { domid } => Ok(Created {
            domid: DomId(domid),
            process: child,
            log: log_path,
        }),
        Launched::Error { message } => {
            child.wait().map_err(Error::Spawn)?;
            Err(Error::Create { message })
        }
    }
}

/// Whether nobody reads any more what is written.
fn is_broken_pipe(fault: &Error) -> bool {
    use hospes_migration::StreamError::Write;
    matches!(fault, Error::SavedFile { source: Write(source), .. } if source.kind() == ErrorKind::BrokenPipe)
}
