//! Scripts that run, written down in the run directory: one whose domain's process is killed does not go on without it, for nobody would wait for what it does.
//!
//! Each has a file that is locked by the process which started it, for as long as the script runs. A file without a lock is of one that was killed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal};

use crate::Error;

/// Longest file, in bytes: two numbers.
const FILE_MAX: u64 = 64;

/// A script that runs; ends with it.
pub struct Running {
    path: PathBuf,
    /// Holds the lock.
    file: File,
}

impl Running {
    /// To be called before the script is started.
    pub fn begin(run_directory: &Path, interface: &str) -> io::Result<Running> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let directory = directory(run_directory);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{interface}-{}-{number}", std::process::id());
        // It has its name when it is locked.
        let new = directory.join(format!(".{name}"));
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let path = directory.join(name);
        fs::rename(&new, &path)?;
        Ok(Running { path, file })
    }

    /// The script's process, which leads a group of its own.
    pub fn set(&mut self, pid: u32) -> io::Result<()> {
        let start = start_ticks(pid).unwrap_or(0);
        self.file.write_all(format!("{pid} {start}\n").as_bytes())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn directory(run_directory: &Path) -> PathBuf {
    run_directory.join("scripts")
}

/// Kills the scripts of killed processes, with what they started.
pub fn sweep(run_directory: &Path) -> Result<(), Error> {
    let directory = directory(run_directory);
    let fault = |source| Error::State {
        path: directory.clone(),
        source,
    };
    let listing = match fs::read_dir(&directory) {
        Ok(listing) => listing,
        Err(absent) if absent.kind() == ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(fault(source)),
    };
    for item in listing {
        let path = item.map_err(fault)?.path();
        let is_new = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        // It may be gone by now, as its script has ended.
        let Ok(file) = File::open(&path) else {
            continue;
        };
        if is_new || flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let mut text = String::new();
        let _ = (&file).take(FILE_MAX).read_to_string(&mut text);
        let mut numbers = text.split_whitespace().map(str::parse::<u64>);
        if let (Some(Ok(pid)), Some(Ok(start))) = (numbers.next(), numbers.next()) {
            end(pid, start);
        }
        let _ = fs::remove_file(&path);
    }
    Ok(())
}

/// Kills a script whose first process lives; what a script leaves that has ended by itself is meant to stay.
fn end(pid: u64, start: u64) {
    let id = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let Some(id) = id
        && start_ticks(pid as u32) == Some(start)
    {
        // Fails only where it has just ended.
        let _ = rustix::process::kill_process_group(id, Signal::KILL);
    }
}

/// When a process was started, in ticks since the host was: with its number that is one process for ever (proc(5), /proc/PID/stat).
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(19)?.parse().ok()
}
