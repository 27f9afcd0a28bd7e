//! The directory in which unfinished files lie, and what the programs that make an image say.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

use crate::maker::{BuildError, Progress};

/// The shell that mmdebstrap uses knows single-digit descriptors alone: ours are out of their way.
const DESCRIPTOR_MIN: i32 = 20;
/// Names for a log that are tried.
const LOGS_MAX: usize = 100;
/// Names for a directory of temporary files that are tried.
const TEMPORARY_MAX: usize = 100;
/// The link to the directory of temporary files.
const TEMPORARY: &str = "temporary";
/// How often it is tried to remove what programs that are ending may still write to, and the time between.
const REMOVALS: usize = 50;
const REMOVAL_PAUSE: Duration = Duration::from_millis(100);

/// A directory beside the image for what is not finished, and the program's log. It goes when this goes; what a killed run left in it is
/// removed first.
///
/// Its lock is held as long: another run for the same files finds it and leaves them alone. It is named as the files beside the image are.
pub(crate) struct Unfinished {
    pub path: PathBuf,
    _lock: OwnedFd,
}

impl Unfinished {
    pub fn create(output: &Path) -> Result<Unfinished, BuildError> {
        let stem = output.file_stem().unwrap_or_default().to_string_lossy();
        let path = output.with_file_name(format!(".{stem}.unfinished"));
        let failed = |fault| BuildError::file("make the directory", &path, fault);
        loop {
            // Files in it are open to everyone for a while: see `writable`.
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Err(fault) if fault.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed(fault));
                }
                _ => {}
            }
            let lock = match open_directory(&path) {
                Ok(directory) => directory,
                // Another run has just ended.
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(failed(errno.into())),
            };
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(BuildError::Busy { path }),
                Err(errno) => return Err(failed(errno.into())),
            }
            let locked = rustix::fs::fstat(&lock).map_err(|errno| failed(errno.into()))?;
            match fs::symlink_metadata(&path) {
                Ok(there) if (there.dev(), there.ino()) == (locked.st_dev, locked.st_ino) => {}
                // Another run has removed it before the lock was free.
                _ => continue,
            }
            if locked.st_uid != rustix::process::geteuid().as_raw() {
                return Err(failed(io::Error::other(
                    "it is there and another user's: remove it",
                )));
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).map_err(failed)?;
            empty(&path).map_err(failed)?;
            return Ok(Unfinished { path, _lock: lock });
        }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A directory for temporary files where those of other programs are, which goes with this one. Other users may reach it: apt fetches as one.
    ///
    /// Nothing may be mounted in it where this process sees it: what is in it is removed.
    pub fn temporary(&self) -> Result<PathBuf, BuildError> {
        let place = std::env::temp_dir();
        let failed = |fault| BuildError::file("make a directory in", &place, fault);
        let place = std::path::absolute(&place).map_err(failed)?;
        for n in 0..TEMPORARY_MAX {
            let path = place.join(format!("hospes-image.{}.{n}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Err(fault) if fault.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(failed)?,
            }
            // Not before it is known to be ours: what is linked is removed.
            symlink(&path, self.file(TEMPORARY))
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
                .map_err(failed)?;
            return Ok(path);
        }
        Err(failed(io::ErrorKind::AlreadyExists.into()))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        for _ in 0..REMOVALS {
            let removed =
                remove_temporary(&self.path).and_then(|()| fs::remove_dir_all(&self.path));
            if removed.is_ok() {
                return;
            }
            thread::sleep(REMOVAL_PAUSE);
        }
    }
}

/// Removes the directory that [`Unfinished::temporary`] has linked in `directory`.
fn remove_temporary(directory: &Path) -> io::Result<()> {
    let Ok(path) = fs::read_link(directory.join(TEMPORARY)) else {
        return Ok(());
    };
    match fs::symlink_metadata(&path) {
        // A restart of the machine may have emptied the place, and its name be another's since.
        Ok(there) if there.is_dir() && there.uid() == rustix::process::geteuid().as_raw() => {
            fs::remove_dir_all(&path)
        }
        _ => Ok(()),
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

fn empty(directory: &Path) -> io::Result<()> {
    remove_temporary(directory)?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A new file of `bytes` bytes that a child can write by the name of its descriptor: returns the descriptor, which children
/// inherit while it is open, and that name.
///
/// In a user name space the child is another user: it may not reach the file's directory, but it may open the descriptor's
/// name again where the file's mode lets everyone. The directory keeps everyone else away.
pub(crate) fn writable(path: &Path, bytes: u64) -> Result<(OwnedFd, String), BuildError> {
    let failed = |fault| BuildError::file("make", path, fault);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(failed)?;
    file.set_len(bytes).map_err(failed)?;
    file.set_permissions(fs::Permissions::from_mode(0o666))
        .map_err(failed)?;
    let inherited = fcntl_dupfd_cloexec(&file, DESCRIPTOR_MIN)
        .and_then(|copy| fcntl_setfd(&copy, FdFlags::empty()).map(|()| copy))
        .map_err(|errno| failed(errno.into()))?;
    let name = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&inherited)
    );
    Ok((inherited, name))
}

/// What mmdebstrap and its hooks say, as progress.
pub(crate) fn translate(line: &str, packages: usize, progress: &mut dyn FnMut(Progress<'_>)) {
    if let Some(step) = line.strip_prefix("STEP ") {
        return progress(Progress::Step(step));
    }
    let Some(said) = line.strip_prefix("I: ") else {
        return progress(Progress::Detail(line));
    };
    match said {
        _ if said.starts_with("running apt-get update") => {
            progress(Progress::Step("fetching the package lists"));
        }
        _ if said.starts_with("downloading packages") => {
            progress(Progress::Step("downloading the base system"));
        }
        _ if said.starts_with("installing essential") => {
            progress(Progress::Step("installing the base system"));
        }
        _ if said.starts_with("installing remaining") => {
            let step = format!("downloading and installing {packages} packages and what they need");
            progress(Progress::Step(&step));
        }
        _ => progress(Progress::Detail(said)),
    }
}

/// Copies a log to where it can be read, under the first free of the names `web.log`, `web.1.log`, `web.2.log`...; `None` where nothing was
/// written to it, or it cannot be kept.
pub(crate) fn keep_log(log: &Path, image: &Path) -> Option<PathBuf> {
    let mut from = File::open(log).ok()?;
    if from.metadata().ok()?.len() == 0 {
        return None;
    }
    let names = std::iter::once("log".to_string()).chain((1..).map(|n| format!("{n}.log")));
    for name in names.take(LOGS_MAX) {
        let path = image.with_extension(name);
        match File::create_new(&path) {
            Ok(mut to) => return io::copy(&mut from, &mut to).is_ok().then_some(path),
            Err(fault) if fault.kind() == io::ErrorKind::AlreadyExists => {}
            Err(_) => return None,
        }
    }
    None
}

/// Puts a finished file in its place, readable by whom the user's mask allows, and makes it durable.
pub(crate) fn finish(from: &Path, to: &Path) -> Result<(), BuildError> {
    let failed = |fault| BuildError::file("write", to, fault);
    let mask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(mask);
    let mode = 0o666 & !mask.bits();
    fs::set_permissions(from, fs::Permissions::from_mode(mode)).map_err(failed)?;
    File::open(from)
        .and_then(|file| file.sync_all())
        .map_err(failed)?;
    fs::rename(from, to).map_err(failed)?;
    // The name is in the directory.
    let directory = to.parent().unwrap_or(Path::new("/"));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn said(line: &str) -> String {
        let mut text = String::new();
        translate(line, 3, &mut |progress| {
            text = match progress {
                Progress::Step(step) => format!("step {step}"),
                Progress::Detail(detail) => format!("detail {detail}"),
            }
        });
        text
    }

    #[test]
    fn translate_steps_and_details() {
        assert_eq!(said("STEP writing it"), "step writing it");
        assert_eq!(
            said("I: running apt-get update..."),
            "step fetching the package lists"
        );
        assert_eq!(said("Setting up dash (1)"), "detail Setting up dash (1)");
        assert!(said("I: installing remaining packages").contains("3 packages"));
    }

    #[test]
    fn writable_child_writes_by_name_and_directory_goes() {
        let output =
            std::env::temp_dir().join(format!("hospes-writable-{}.img", std::process::id()));
        let unfinished = Unfinished::create(&output).unwrap();
        let (file, name) = writable(&unfinished.file("disk"), 4096).unwrap();
        let status = Command::new("sh")
            .args(["-c", "printf hello >\"$0\"", &name])
            .status();
        assert!(status.unwrap().success());
        drop(file);
        assert_eq!(fs::read(unfinished.file("disk")).unwrap(), b"hello");
        let path = unfinished.path.clone();
        drop(unfinished);
        assert!(!path.exists());
    }

    /// A directory of its own for a test.
    fn scratch(test: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("hospes-{test}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        path
    }

    #[test]
    fn unfinished_is_of_one_run_and_empty() {
        let directory = scratch("unfinished");
        let output = directory.join("web.img");
        // What a killed run has left.
        fs::create_dir_all(directory.join(".web.unfinished/sub")).unwrap();
        fs::write(directory.join(".web.unfinished/disk"), "half").unwrap();
        let first = Unfinished::create(&output).unwrap();
        assert_eq!(fs::read_dir(&first.path).unwrap().count(), 0);
        fs::write(first.file("disk"), "half").unwrap();
        for other in [&output, &directory.join("web.qcow2")] {
            let fault = Unfinished::create(other).err().unwrap().to_string();
            assert!(fault.contains("another image is being made in"), "{fault}");
        }
        Unfinished::create(&directory.join("db.img")).unwrap();
        assert_eq!(fs::read(first.file("disk")).unwrap(), b"half");
        drop(first);
        Unfinished::create(&output).unwrap();
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn temporary_goes_with_unfinished_and_after_a_killed_run() {
        let directory = scratch("temporary");
        let output = directory.join("web.img");
        let unfinished = Unfinished::create(&output).unwrap();
        let first = unfinished.temporary().unwrap();
        fs::create_dir(first.join("tree")).unwrap();
        assert_eq!(fs::metadata(&first).unwrap().mode() & 0o777, 0o755);
        drop(unfinished);
        assert!(!first.exists());
        // As if it had been killed.
        let unfinished = std::mem::ManuallyDrop::new(Unfinished::create(&output).unwrap());
        let second = unfinished.temporary().unwrap();
        fs::write(second.join("half"), "").unwrap();
        rustix::fs::flock(&unfinished._lock, FlockOperation::Unlock).unwrap();
        let unfinished = Unfinished::create(&output).unwrap();
        assert!(!second.exists());
        assert_eq!(fs::read_dir(&unfinished.path).unwrap().count(), 0);
        drop(unfinished);
        fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn unfinished_of_runs_that_come_and_go_is_never_shared() {
        let directory = scratch("come-and-go");
        let output = directory.join("web.img");
        let run = || {
            for _ in 0..300 {
                match Unfinished::create(&output) {
                    Ok(unfinished) => drop(File::create_new(unfinished.file("disk")).unwrap()),
                    Err(fault) => assert!(matches!(fault, BuildError::Busy { .. }), "{fault}"),
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(run);
            }
        });
        fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn keep_log_takes_no_name_of_another_file() {
        let directory = scratch("keep-log");
        let (log, image) = (directory.join("log"), directory.join("web.img"));
        assert_eq!(keep_log(&log, &image), None);
        fs::write(&log, "").unwrap();
        assert_eq!(keep_log(&log, &image), None);
        fs::write(&log, "said").unwrap();
        for name in ["web.log", "web.1.log", "web.2.log"] {
            assert_eq!(keep_log(&log, &image), Some(directory.join(name)));
            fs::write(directory.join(name), "another's").unwrap();
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
