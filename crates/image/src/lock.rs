//! Who may use an image at the same time: many readers, or one writer.
//!
//! Locks belong to an open file description and stand on bytes of the file itself, so that they hold between all paths to a file
//! and vanish with their process, but not before the kernel has ended what the process had asked for: each description that requests go through is locked, and a request in a
//! ring keeps its own. The bytes are QEMU's (its block/file-posix.c): byte 100 + n is locked, shared, by who uses permission n, byte 200 + n
//! by who does not share it with others. Shared locks never meet each other; a conflict is found by asking for the lock that would.
//! So its tools refuse an image that a domain writes, and a domain one that they write.
//!
//! The host's loop devices take none, so the file behind one is in use as long as it has it; who is given such a device has the file's locks as well.
//!
//! Such locks do not say who holds them. A file in the run directory does, else the processes that have the file open. Where nobody has it but who dies,
//! or the kernel for the last requests of the dead, it is waited for.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hospes_sys::process_stat;

use crate::error::ImageError;
use crate::files::Identity;
use crate::loops;

const USES: i64 = 100;
const KEEPS: i64 = 200;
/// Permissions by QEMU's numbers.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Directory of the run-time state of all domains, as the tool stack finds it.
fn records() -> Option<PathBuf> {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let run = variable("HOSPES_RUN_DIR").or_else(|| {
        if rustix::process::geteuid().is_root() {
            Some(PathBuf::from("/run/hospes"))
        } else {
            Some(variable("XDG_RUNTIME_DIR")?.join("hospes"))
        }
    })?;
    Some(run.join("locks"))
}

/// Locks, until it is dropped, and the records of who holds them.
pub(crate) struct Lock {
    files: Vec<File>,
    records: Vec<PathBuf>,
}

/// How long somebody who dies may keep a file, and how often it is tried again.
const DEATH_PATIENCE: Duration = Duration::from_secs(5);
const DEATH_LOOK: Duration = Duration::from_millis(10);

/// Tries again while the file is locked by nobody that will keep it.
pub(crate) fn once_let_go<T>(
    attempt: impl FnMut() -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    once_let_go_until(Instant::now() + DEATH_PATIENCE, attempt)
}

fn once_let_go_until<T>(
    deadline: Instant,
    mut attempt: impl FnMut() -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    loop {
        match attempt() {
            Err(ImageError::Locked { identity, .. })
                if holder(identity).is_none() && Instant::now() < deadline =>
            {
                thread::sleep(DEATH_LOOK);
            }
            outcome => return outcome,
        }
    }
}

/// Gives up the locks of an open file description, whoever else has it open.
pub(crate) fn unlock(fd: BorrowedFd<'_>) {
    let _ = call(fd, libc::F_OFD_SETLK, libc::F_UNLCK, 0, 0);
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A child that has not yet become its program may still hold the file open.
        for file in &self.files {
            unlock(file.as_fd());
        }
        for record in &self.records {
            let _ = fs::remove_file(record);
        }
    }
}

/// What is locked.
pub(crate) struct Target<'a> {
    /// For sentences.
    pub(crate) path: &'a Path,
    /// The open file.
    pub(crate) fd: BorrowedFd<'a>,
    /// The same file opened once more, where requests mostly go through that.
    pub(crate) data: Option<BorrowedFd<'a>>,
    /// Of the open file.
    pub(crate) identity: Identity,
}

impl Target<'_> {
    /// Locks for reading or for writing. The locks of the file itself stay with its descriptors, so that they hold as long as somebody works with
    /// those; what is returned holds the others and the records.
    pub(crate) fn lock(&self, write: bool, owner: &str) -> Result<Lock, ImageError> {
        let sys = Path::new("/sys");
        let mut own = once_let_go(|| self.lock_own(write, owner))?;
        let mut lock = Lock {
            files: Vec::new(),
            records: Vec::new(),
        };
        match self.identity {
            (0, device) => {
                if let Some(path) = loops::backing_of(sys, device)
                    && let Ok(file) = File::open(&path)
                    && let Ok(metadata) = file.metadata()
                {
                    let backing = Target {
                        path: &path,
                        fd: file.as_fd(),
                        data: None,
                        identity: identity_of(&metadata),
                    };
                    let mut backings = once_let_go(|| backing.lock_own(write, owner))?;
                    lock.files.append(&mut backings.files);
                    lock.records.extend(backing.record(owner));
                }
            }
            identity => {
                if let Some(device) = loops::device_on(sys, identity)
                    && (write || !device.read_only)
                {
                    return Err(ImageError::Locked {
                        path: self.path.to_owned(),
                        identity,
                        holder: format!("the host's loop device {}", device.node),
                        advice: "unmount what is on it, then detach it with `losetup -d`",
                    });
                }
            }
        }
        lock.records.extend(self.record(owner));
        own.files.clear();
        Ok(lock)
    }

    /// Locks the bytes of this file alone.
    fn lock_own(&self, write: bool, owner: &str) -> Result<Lock, ImageError> {
        let used: &[i64] = if write {
            &[READ, WRITE, RESIZE]
        } else {
            &[READ]
        };
        let kept = [WRITE, RESIZE];
        let bytes = used.iter().map(|n| USES + n);
        let bytes: Vec<i64> = bytes.chain(kept.map(|n| KEEPS + n)).collect();
        let mut lock = Lock {
            files: Vec::new(),
            records: Vec::new(),
        };
        self.add(&mut lock, self.fd, &bytes, write, owner)?;
        let taken = |byte| {
            call(self.fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)
                .map_err(ImageError::host(self.path, "look at its locks"))
        };
        for permission in kept {
            if taken(USES + permission)? {
                return Err(self.conflict(owner, write, true));
            }
        }
        for permission in used {
            if taken(KEEPS + permission)? {
                return Err(self.conflict(owner, write, false));
            }
        }
        // Only now: the second description's own locks would look like somebody else's to the first.
        if let Some(data) = self.data {
            self.add(&mut lock, data, &bytes, write, owner)?;
        }
        Ok(lock)
    }

    /// Locks these bytes by one open file description.
    fn add(
        &self,
        lock: &mut Lock,
        fd: BorrowedFd<'_>,
        bytes: &[i64],
        write: bool,
        owner: &str,
    ) -> Result<(), ImageError> {
        // The same description, which the locks belong to.
        let file = fd
            .try_clone_to_owned()
            .map_err(ImageError::host(self.path, "lock it"))?;
        lock.files.push(File::from(file));
        for byte in bytes {
            match call(fd, libc::F_OFD_SETLK, libc::F_RDLCK, *byte, 1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(self.conflict(owner, write, true));
                }
                Err(error) => return Err(ImageError::host(self.path, "lock it")(error)),
            }
        }
        Ok(())
    }

    /// Writes down who holds the lock. Without it the lock holds all the same.
    fn record(&self, owner: &str) -> Option<PathBuf> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let directory = records()?;
        fs::create_dir_all(&directory).ok()?;
        forget_dead(&directory);
        let pid = std::process::id();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("{}{pid}.{number}", prefix(self.identity)));
        fs::write(&path, owner).ok()?;
        Some(path)
    }

    fn conflict(&self, owner: &str, write: bool, by_writer: bool) -> ImageError {
        let holder = holder(self.identity).unwrap_or_else(|| "another process".to_owned());
        let own = !owner.is_empty() && holder == owner;
        ImageError::Locked {
            path: self.path.to_owned(),
            identity: self.identity,
            holder,
            advice: match (write, by_writer) {
                _ if own => HAS_IT,
                (true, false) => "shut it down or attach it read-only",
                (true, true) => "shut it down or attach it read-only to both",
                (false, _) => "it writes to the disk, so shut it down first",
            },
        }
    }
}

/// What a domain is told that wants an image twice.
pub(crate) const HAS_IT: &str = "it has the image already, as another disk or below one; only disks that are all read-only can share it";

fn prefix(identity: Identity) -> String {
    format!("{:x}-{:x}.", identity.0, identity.1)
}

/// Who has the file, or nobody that will keep it: it is let go of by whoever dies or has died.
fn holder(identity: Identity) -> Option<String> {
    recorded_holder(identity).or_else(|| process_with_file(identity))
}

/// A process other than this one that has the file open.
fn process_with_file(identity: Identity) -> Option<String> {
    let own = std::process::id();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let open = descriptors.flatten().any(|descriptor| {
            fs::metadata(descriptor.path()).is_ok_and(|m| identity_of(&m) == identity)
        });
        if open && pid != own && !is_ending(pid) {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", command.trim()));
        }
    }
    None
}

/// Whether a process has ended, or is about to and cannot do anything about it. It may still have what it had open.
fn is_ending(pid: u32) -> bool {
    /// Of the kernel's flags of a process (its include/linux/sched.h).
    const PF_EXITING: u64 = 4;
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    let (Some(stat), Ok(status)) = (process_stat(pid), status) else {
        return true;
    };
    let mut fields = stat.split(' ');
    let state = fields.next().unwrap_or_default();
    let flags = fields.nth(5).and_then(|flags| flags.parse().ok());
    let pending = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
    };
    let has = |mask: Option<u64>, bit| mask.is_some_and(|mask| mask & bit != 0);
    matches!(state, "Z" | "X")
        || has(flags, PF_EXITING)
        || has(pending("SigPnd:"), SIGKILL)
        || has(pending("ShdPnd:"), SIGKILL)
}

/// Removes the records of processes that ended without doing so.
fn forget_dead(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.split('.').nth(1));
        let pid = pid.map(|pid| pid.parse().is_ok_and(|pid| !is_ending(pid)));
        if pid == Some(false) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Who wrote down that it holds a lock on the file, and still lives.
pub(crate) fn recorded_holder(identity: Identity) -> Option<String> {
    let directory = records()?;
    forget_dead(&directory);
    let prefix = prefix(identity);
    fs::read_dir(&directory)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .find(|owner| !owner.is_empty())
}

/// Tells files apart, and block devices by what they are rather than by their node.
pub(crate) fn identity_of(metadata: &fs::Metadata) -> Identity {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    if metadata.file_type().is_block_device() {
        (0, metadata.rdev())
    } else {
        (metadata.dev(), metadata.ino())
    }
}

/// One lock call on `bytes` bytes, 0 for all from `start` on. Whether somebody else's lock is in the way, where `command` asks for that.
fn call(fd: BorrowedFd<'_>, command: i32, kind: i32, start: i64, bytes: i64) -> io::Result<bool> {
    // SAFETY: flock is a plain structure of integers.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = bytes;
    // SAFETY: the descriptor is open and `lock` outlives the call.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) };
    if result == 0 {
        Ok(i32::from(lock.l_type) != libc::F_UNLCK)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Directory, spec};
    use crate::{Format, OpenSpec, open};
    use std::process::Command;

    fn wanted(path: &Path, read_only: bool, owner: &str) -> OpenSpec {
        OpenSpec {
            read_only,
            lock_owner: owner.to_owned(),
            ..spec(path, Format::Raw)
        }
    }

    fn sentence(result: Result<impl Sized, ImageError>) -> String {
        result.err().expect("it is refused").to_string()
    }

    #[test]
    fn open_by_a_second_writer_names_the_first() {
        let directory = Directory::new();
        let path = directory.file("a.img", 8192);
        let first = open(&wanted(&path, false, "domain 3 (web)")).unwrap();
        let refused = sentence(open(&wanted(&path, false, "domain 4 (db)")));
        assert!(
            refused.ends_with(
                "a.img is locked by domain 3 (web): shut it down or attach it read-only to both."
            ),
            "{refused}"
        );
        let reader = sentence(open(&wanted(&path, true, "domain 4 (db)")));
        assert!(reader.contains("domain 3 (web)"), "{reader}");
        drop(first);
        open(&wanted(&path, false, "domain 4 (db)")).unwrap();
    }

    #[test]
    fn open_a_second_time_by_its_owner_says_so() {
        let directory = Directory::new();
        let path = directory.file("a.img", 8192);
        for (first, second) in [(false, false), (false, true), (true, false)] {
            let _first = open(&wanted(&path, first, "domain 3 (web)")).unwrap();
            let refused = sentence(open(&wanted(&path, second, "domain 3 (web)")));
            assert!(
                refused.contains("a.img is locked by domain 3 (web): it has the image already"),
                "{refused}"
            );
        }
    }

    #[test]
    fn records_of_dead_processes_are_removed() {
        let directory = Directory::new();
        let (dead, own) = (
            format!("1-2.{}.0", i32::MAX),
            format!("1-3.{}.0", std::process::id()),
        );
        for name in [&dead, &own, "other"] {
            directory.file(name, 1);
        }
        super::forget_dead(&directory.join(""));
        let left = [&dead, &own, "other"].map(|name| directory.join(name).exists());
        assert_eq!(left, [false, true, true]);
    }

    #[test]
    fn open_by_readers_is_shared_and_keeps_writers_out() {
        let directory = Directory::new();
        let path = directory.file("a.img", 8192);
        let first = open(&wanted(&path, true, "domain 3 (web)")).unwrap();
        let _second = open(&wanted(&path, true, "domain 4 (db)")).unwrap();
        drop(first);
        let refused = sentence(open(&wanted(&path, false, "domain 5 (mail)")));
        assert!(refused.contains("locked by domain 4 (db): shut it down or attach it read-only."));
    }

    #[test]
    fn lock_of_nobody_that_will_keep_it_is_waited_for() {
        let directory = Directory::new();
        let path = directory.file("a.img", 8192);
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let target = Target {
            path: &path,
            fd: file.as_fd(),
            data: None,
            identity: identity_of(&file.metadata().unwrap()),
        };
        let later = Instant::now() + Duration::from_secs(3600);
        // Without a name, and no other process has it open.
        let mut first = Some(open(&wanted(&path, false, "")).unwrap());
        let mut outcomes = Vec::new();
        once_let_go_until(later, || {
            let lock = target.lock_own(true, "domain 4 (db)");
            outcomes.push(lock.is_ok());
            if outcomes.len() == 3 {
                first.take();
            }
            lock
        })
        .unwrap();
        assert_eq!(outcomes, [false, false, false, true]);
        // With a name: somebody keeps it, and is told of at once.
        let _first = open(&wanted(&path, false, "domain 3 (web)")).unwrap();
        let mut tries = 0;
        let refused = once_let_go_until(later, || {
            tries += 1;
            target.lock_own(true, "domain 4 (db)")
        });
        assert!(sentence(refused).contains("domain 3 (web)"));
        assert_eq!(tries, 1);
    }

    #[test]
    fn killed_process_is_ending() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        assert!(!super::is_ending(child.id()));
        child.kill().unwrap();
        assert!(super::is_ending(child.id()));
        child.wait().unwrap();
        assert!(super::is_ending(child.id()));
        assert!(!super::is_ending(std::process::id()));
    }

    #[test]
    fn open_by_another_path_meets_the_same_lock() {
        let directory = Directory::new();
        let path = directory.file("a.img", 8192);
        let (hard, soft) = (directory.join("hard"), directory.join("soft"));
        std::fs::hard_link(&path, &hard).unwrap();
        std::os::unix::fs::symlink(&path, &soft).unwrap();
        let _first = open(&wanted(&path, false, "domain 3 (web)")).unwrap();
        for other in [hard, soft] {
            assert!(sentence(open(&wanted(&other, false, "x"))).contains("domain 3 (web)"));
        }
    }

    #[test]
    fn every_description_of_an_image_is_locked() {
        let directory = Directory::new();
        use std::os::unix::fs::OpenOptionsExt;
        let path = directory.file("a.img", 1 << 20);
        let _image = open(&wanted(&path, false, "domain 3 (web)")).unwrap();
        let mut with_direct_io = false;
        for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
            if std::fs::read_link(entry.path()).is_ok_and(|target| target == path) {
                let info = Path::new("/proc/self/fdinfo").join(entry.file_name());
                let info = std::fs::read_to_string(info).unwrap();
                assert!(info.contains("OFDLCK"), "{info}");
                let flags = info.lines().find_map(|l| l.strip_prefix("flags:\t"));
                let flags = i32::from_str_radix(flags.unwrap(), 8).unwrap();
                with_direct_io |= flags & libc::O_DIRECT != 0;
            }
        }
        // The temporary directory's file system may have none.
        let direct = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path);
        assert_eq!(with_direct_io, direct.is_ok());
    }

    #[test]
    fn lock_keeps_qemu_out_and_is_kept_out_by_it() {
        let directory = Directory::new();
        let path = directory.file("a.img", 1 << 20);
        let image = open(&wanted(&path, false, "domain 3 (web)")).unwrap();
        let write = ["-f", "raw", "-c", "write 0 4k"];
        let refused = Command::new("qemu-io").args(write).arg(&path).output();
        let refused = refused.expect("qemu-io of qemu-utils runs");
        assert!(!refused.status.success());
        assert!(String::from_utf8_lossy(&refused.stderr).contains("lock"));
        drop(image);

        let mut qemu = Command::new("qemu-io")
            .args(["-f", "raw"])
            .arg(&path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It answers a command once it has opened, and so locked, the image.
        use std::io::{Read, Write};
        let mut input = qemu.stdin.take().unwrap();
        input.write_all(b"length\n").unwrap();
        let mut answer = [0; 1];
        let mut output = qemu.stdout.take().unwrap();
        loop {
            output.read_exact(&mut answer).unwrap();
            if answer[0] == b'M' {
                break;
            }
        }
        let refused = sentence(open(&wanted(&path, false, "x")));
        assert!(refused.contains("(qemu-io)"), "{refused}");
        drop(input);
        qemu.wait().unwrap();
        open(&wanted(&path, false, "x")).unwrap();
    }
}
