//! What a confined process cannot do, and what it still can. Every test forks: the child has one thread, confines itself and tries.
//!
//! What has to be refused is tried without walls first, and has to give something else there. A wall that the kernel lacks is skipped with a message.

mod refused;
mod usable;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::path::PathBuf;

use hospes_sandbox::{Keep, Walls, confine};

/// Runs `work` in a child of one thread and returns its words. Panics where it does not come to its end.
fn forked(work: impl FnOnce() -> String) -> String {
    let mut ends = [0; 2];
    // SAFETY: plain system calls; each end is owned by one file in one process. The child takes no lock that a thread of the parent could hold but the allocator's,
    // which the C library readies for it.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        let [mut reader, mut writer] = ends.map(|end| File::from_raw_fd(end));
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            drop(reader);
            let words = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let sent = words.map(|words| writer.write_all(words.as_bytes()).is_ok());
            libc::_exit(i32::from(!sent.unwrap_or(false)));
        }
        drop(writer);
        let mut words = String::new();
        let read = reader.read_to_string(&mut words);
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert!(read.is_ok() && status == 0, "status {status:#x}, {words:?}");
        words
    }
}

/// Runs `work` in a confined child.
fn confined(keep: &Keep<'_>, work: impl FnOnce(&Walls) -> String) -> String {
    forked(|| {
        let walls = confine(keep).unwrap();
        work(&walls)
    })
}

fn keep(read: &[PathBuf]) -> Keep<'_> {
    Keep { read, user: None }
}

/// The kernel's walls, as a confined process is told.
fn walls() -> Walls {
    let words = confined(&keep(&[]), |walls| {
        let Walls {
            landlock_abi,
            seccomp,
            networkless,
            ..
        } = walls;
        format!("{landlock_abi} {seccomp} {networkless}")
    });
    let [landlock, seccomp, networkless] = words.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{words}");
    };
    Walls {
        landlock_abi: landlock.parse().unwrap(),
        seccomp: seccomp.parse().unwrap(),
        networkless: networkless.parse().unwrap(),
        user: None,
        user_refused: None,
        bounded: false,
    }
}

/// Whether the kernel has what `enough` asks for; says so where not.
fn has(enough: impl FnOnce(&Walls) -> bool) -> bool {
    let walls = walls();
    let has = enough(&walls);
    if !has {
        eprintln!("skipped: this kernel lacks the wall ({walls})");
    }
    has
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root has rights to lose");
    }
    root
}

/// What a system call gave: its result, or the error's number with a minus sign.
fn result(returned: i64) -> i64 {
    if returned < 0 {
        -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap())
    } else {
        returned
    }
}

/// A file with these words that is removed again.
struct Words(PathBuf);

impl Words {
    fn new(name: &str, words: &str) -> Words {
        let path = std::env::temp_dir().join(format!("hospes-{name}-{}", std::process::id()));
        std::fs::write(&path, words).unwrap();
        Words(path)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
