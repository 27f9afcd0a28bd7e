//! Files of shared memory for which the host uses huge pages.
//!
//! Whether a memfd gets huge pages is one switch for the whole host (`shmem_enabled`, transhuge.rst of the kernel's administration guide), and it is off unless somebody turns it
//! on. A tmpfs has an option of its own for that (`huge=`, tmpfs(5)), so the file is made in one that is mounted nowhere and lives as long as the file does. Mounting takes
//! CAP_SYS_ADMIN, or a user namespace of one's own, which is left again at once. Where neither is allowed, a memfd does the same more slowly.

use std::ffi::{CStr, CString, c_int, c_void};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::MemfdFlags;

/// Size of a huge page in bytes. A mapping gets them where its address and the offset in the file leave the same remainder.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Makes an empty file of shared memory, with huge pages where the host allows it. The list of a process's mappings shows it as `/memfd:NAME (deleted)`.
pub fn shared_memory_file(name: &str) -> rustix::io::Result<OwnedFd> {
    // As a memfd is shown: who looks for this memory finds it by one name.
    let path = CString::new(format!("memfd:{name}")).map_err(|_| rustix::io::Errno::INVAL)?;
    match on_tmpfs(&path).or_else(|| in_user_namespace(&path)) {
        Some(file) => Ok(file),
        None => small_memory_file(name),
    }
}

/// Makes an empty file of shared memory with the pages that the host gives a memfd.
pub fn small_memory_file(name: &str) -> rustix::io::Result<OwnedFd> {
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
}

fn on_tmpfs(path: &CStr) -> Option<OwnedFd> {
    let fd = open_on_tmpfs(path);
    // SAFETY: a descriptor that was just opened belongs to nobody else.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens a new file on a tmpfs of its own; negative where that is not allowed. Makes system calls only, so that the child below may call it.
fn open_on_tmpfs(path: &CStr) -> c_int {
    const FSOPEN_CLOEXEC: c_int = 1;
    const FSCONFIG_SET_STRING: c_int = 1;
    const FSCONFIG_CMD_CREATE: c_int = 6;
    const FSMOUNT_CLOEXEC: c_int = 1;
    const MOUNT_ATTR_NOSUID_NODEV: c_int = 2 | 4;
    // SAFETY: plain system calls; all strings are terminated, and the descriptors closed here were opened here.
    unsafe {
        let fs = libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) as c_int;
        if fs < 0 {
            return -1;
        }
        let set = |key: &CStr, value: &CStr| {
            let (key, value) = (key.as_ptr(), value.as_ptr());
            libc::syscall(libc::SYS_fsconfig, fs, FSCONFIG_SET_STRING, key, value, 0) >= 0
        };
        let none = std::ptr::null::<libc::c_char>();
        // Not beyond the file's end; and as large as it likes, as a memfd.
        let made = set(c"huge", c"within_size")
            && set(c"size", c"0")
            && libc::syscall(libc::SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, none, none, 0) >= 0;
        let mount = if made {
            let attributes = MOUNT_ATTR_NOSUID_NODEV;
            libc::syscall(libc::SYS_fsmount, fs, FSMOUNT_CLOEXEC, attributes) as c_int
        } else {
            -1
        };
        libc::close(fs);
        if mount < 0 {
            return -1;
        }
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
        let file = libc::openat(mount, path.as_ptr(), flags, 0o600);
        if file >= 0 {
            libc::unlinkat(mount, path.as_ptr(), 0);
        }
        libc::close(mount);
        file
    }
}

struct Request<'a> {
    path: &'a CStr,
    uids: &'a CStr,
    gids: &'a CStr,
    opened: AtomicI32,
}

/// The same in a child that has the table of open files in common with this process, and a user namespace of its own.
fn in_user_namespace(path: &CStr) -> Option<OwnedFd> {
    const STACK: usize = 64 * 1024;
    let id = |id: u32| CString::new(format!("0 {id} 1")).ok();
    let uids = id(rustix::process::geteuid().as_raw())?;
    let gids = id(rustix::process::getegid().as_raw())?;
    let request = Request {
        path,
        uids: &uids,
        gids: &gids,
        opened: AtomicI32::new(-1),
    };
    let mut stack = vec![0u8; STACK];
    // SAFETY: the stack and the request live until the child has ended: with CLONE_VFORK `clone` returns only then. Signals are blocked meanwhile, so that
    // no handler runs in the child. The child makes system calls only.
    let pid = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        let top = stack.as_mut_ptr().add(STACK);
        let top = top.sub(top as usize % 16);
        let flags = libc::CLONE_VM
            | libc::CLONE_VFORK
            | libc::CLONE_FILES
            | libc::CLONE_NEWUSER
            | libc::CLONE_NEWNS;
        let argument = (&raw const request).cast_mut().cast();
        let pid = libc::clone(child, top.cast(), flags, argument);
        libc::pthread_sigmask(libc::SIG_SETMASK, &old, std::ptr::null_mut());
        if pid > 0 {
            let mut status = 0;
            while libc::waitpid(pid, &mut status, libc::__WALL) < 0
                && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
            {
            }
        }
        pid
    };
    let fd = request.opened.load(Ordering::Relaxed);
    // SAFETY: the child opened the descriptor in the table it shares with us, and nobody else knows it.
    (pid > 0 && fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The child's side, in the parent's memory: system calls only.
extern "C" fn child(argument: *mut c_void) -> c_int {
    // SAFETY: the parent passes a `Request` that lives until this process has ended; all else are system calls on plain values.
    unsafe {
        let request = &*argument.cast::<Request<'_>>();
        let put = |path: &CStr, text: &CStr| {
            let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if fd >= 0 {
                libc::write(fd, text.as_ptr().cast(), text.count_bytes());
                libc::close(fd);
            }
        };
        // Files can be made by a user whom the namespace knows.
        put(c"/proc/self/setgroups", c"deny");
        put(c"/proc/self/uid_map", request.uids);
        put(c"/proc/self/gid_map", request.gids);
        let file = open_on_tmpfs(request.path);
        request.opened.store(file, Ordering::Relaxed);
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    fn keeps_what_is_written(fd: OwnedFd) {
        rustix::fs::ftruncate(&fd, 3 * HUGE_PAGE).unwrap();
        let mut file = std::fs::File::from(fd);
        file.write_all(b"kept").unwrap();
        file.rewind().unwrap();
        let mut read = [0; 5];
        file.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"kept\0");
    }

    #[test]
    fn every_kind_of_file_keeps_what_is_written() {
        keeps_what_is_written(shared_memory_file("hospes-test").unwrap());
        keeps_what_is_written(small_memory_file("hospes-test").unwrap());
        let path = c"memfd:hospes-test";
        // Neither is allowed everywhere.
        for file in [on_tmpfs(path), in_user_namespace(path)]
            .into_iter()
            .flatten()
        {
            keeps_what_is_written(file);
        }
    }

    #[test]
    fn a_file_shows_as_a_memfd_and_has_no_name() {
        use std::os::fd::AsRawFd;
        let fd = shared_memory_file("hospes-test").unwrap();
        let shown = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        assert_eq!(shown.to_str(), Some("/memfd:hospes-test (deleted)"));
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_nlink, 0);
    }
}
