//! What goes on as before.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use std::{io::Read, io::Write, ptr, thread};

use hospes_sandbox::{Error, Keep, confine};
use io_uring::{IoUring, opcode, types};

use crate::{Words, confined, forked, is_root, keep};

/// A user id that owns nothing.
const NOBODYS: u32 = 4_190_711;

#[test]
fn files_that_are_kept_are_read() {
    let file = Words::new("kept", "words");
    let read = [file.0.clone(), "/proc".into(), "/does/not/exist".into()];
    let said = confined(&keep(&read), |_| {
        let words = std::fs::read_to_string(&file.0).unwrap();
        let own = std::fs::read_to_string("/proc/self/stat").unwrap();
        let id = std::process::id();
        format!(
            "{words} {} {}",
            own.starts_with(&id.to_string()),
            std::fs::read_dir("/proc").is_ok()
        )
    });
    assert_eq!(said, "words true true");
}

#[test]
fn threads_are_confined_and_work() {
    let file = Words::new("threads", "words");
    let said = confined(&keep(&[]), |walls| {
        let (sender, receiver) = mpsc::channel();
        let path = file.0.clone();
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let (sender, path) = (sender.clone(), path.clone());
                let named = thread::Builder::new().name(format!("worker-{n}"));
                named
                    .spawn(move || sender.send(std::fs::read(path).is_ok()).unwrap())
                    .unwrap()
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        drop(sender);
        let opened = receiver.iter().filter(|opened| *opened).count();
        format!("{} {opened}", walls.landlock_abi == 0)
    });
    assert!(["false 0", "true 4"].contains(&said.as_str()), "{said}");
}

#[test]
fn code_made_at_run_time_is_executed() {
    let said = confined(&keep(&[]), |_| {
        // mov eax, 42; ret
        let code = [0xb8u8, 42, 0, 0, 0, 0xc3];
        // SAFETY: a new mapping, which gets a function before it is called.
        let value = unsafe {
            let (rw, rx) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::PROT_READ | libc::PROT_EXEC,
            );
            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let page = libc::mmap(ptr::null_mut(), 4096, rw, kind, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            ptr::copy_nonoverlapping(code.as_ptr(), page.cast(), code.len());
            assert_eq!(libc::mprotect(page, 4096, rx), 0);
            let function: extern "C" fn() -> i32 = std::mem::transmute(page);
            function()
        };
        value.to_string()
    });
    assert_eq!(said, "42");
}

#[test]
fn descriptors_given_are_read_by_rings() {
    if let Err(fault) = IoUring::new(2) {
        eprintln!("skipped: no io_uring: {fault}");
        return;
    }
    let file = Words::new("ring", "words");
    let opened = std::fs::File::open(&file.0).unwrap();
    let said = confined(&keep(&[]), |_| {
        let mut ring = IoUring::new(2).unwrap();
        let mut buffer = [0u8; 5];
        let fd = types::Fd(opened.as_raw_fd());
        let read = opcode::Read::new(fd, buffer.as_mut_ptr(), 5).build();
        // SAFETY: the buffer lives until the completion, which is waited for.
        unsafe { ring.submission().push(&read).unwrap() };
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), 5);
        String::from_utf8(buffer.to_vec()).unwrap()
    });
    assert_eq!(said, "words");
}

#[test]
fn pairs_of_sockets_carry_descriptors() {
    let said = confined(&keep(&[]), |_| {
        let (mut one, mut other) = UnixStream::pair().unwrap();
        let minute = std::time::Duration::from_secs(60);
        other.set_read_timeout(Some(minute)).unwrap();
        one.set_nonblocking(true).unwrap();
        one.write_all(b"words").unwrap();
        rustix::net::send(&one, b"!", rustix::net::SendFlags::NOSIGNAL).unwrap();
        drop(one);
        let mut words = String::new();
        other.read_to_string(&mut words).unwrap();
        words
    });
    assert_eq!(said, "words!");
}

#[test]
fn own_threads_get_signals() {
    let said = confined(&keep(&[]), |_| {
        // SAFETY: plain system calls; the set lives for them.
        let got = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut set, libc::SIGUSR1);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
            let (process, thread) = (libc::getpid(), libc::gettid());
            assert_eq!(
                libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR1),
                0
            );
            let none = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            libc::sigtimedwait(&set, ptr::null_mut(), &none)
        };
        (got == libc::SIGUSR1).to_string()
    });
    assert_eq!(said, "true");
}

/// An ELF file that ends with status 7.
fn program() -> Vec<u8> {
    const LINKED_AT: u64 = 0x10000;
    // mov edi, 7; mov eax, SYS_exit_group; syscall
    let code = [0xbf, 7, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05];
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [LINKED_AT + 120, 64, 0] {
        put(&u64::to_le_bytes(word));
    }
    put(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // One segment, to read and to execute.
    put(&[1, 0, 0, 0, 5, 0, 0, 0]);
    let bytes = 120 + code.len() as u64;
    for word in [0, LINKED_AT, LINKED_AT, bytes, bytes, 4096] {
        put(&u64::to_le_bytes(word));
    }
    put(&code);
    file
}

extern "C" fn traced(fd: *mut libc::c_void) -> i32 {
    // SAFETY: system calls on plain values, as the child of a `vfork` may make them.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        libc::setrlimit(libc::RLIMIT_CORE, &none);
        libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
        let none: [*const libc::c_char; 1] = [ptr::null()];
        let (at, fd) = (none.as_ptr(), fd as usize);
        libc::syscall(
            libc::SYS_execveat,
            fd,
            c"".as_ptr(),
            at,
            at,
            libc::AT_EMPTY_PATH,
        );
        libc::_exit(1)
    }
}

/// Starts the program as direct execution starts its processes, looks at its mappings and lets it end; returns what was seen.
fn trace() -> String {
    let mut stack = vec![0u8; 64 * 1024];
    // SAFETY: the stack lives until the child has left this memory, which `clone` waits for; the requests are made of a child that is stopped.
    unsafe {
        let fd = libc::memfd_create(c"program".as_ptr(), libc::MFD_CLOEXEC);
        let fd = OwnedFd::from_raw_fd(fd);
        rustix::io::write(&fd, &program()).unwrap();
        let top = stack.as_mut_ptr().add(stack.len() - 64);
        let top = top.sub(top as usize % 16);
        let flags = libc::CLONE_VM | libc::CLONE_VFORK;
        let argument = ptr::without_provenance_mut(fd.as_raw_fd() as usize);
        let child = libc::clone(traced, top.cast(), flags, argument);
        assert!(child > 0, "clone: {}", std::io::Error::last_os_error());
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, libc::__WALL), child);
        let stopped = libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP;
        let maps = std::fs::read_to_string(format!("/proc/{child}/maps"));
        let seen = maps.is_ok_and(|maps| maps.contains("memfd:program"));
        let options = libc::PTRACE_O_EXITKILL;
        assert_eq!(
            libc::ptrace(libc::PTRACE_SETOPTIONS, child, 0, options as usize),
            0
        );
        assert_eq!(libc::ptrace(libc::PTRACE_CONT, child, 0, 0), 0);
        assert_eq!(libc::waitpid(child, &mut status, libc::__WALL), child);
        format!(
            "{stopped} {seen} {}",
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7
        )
    }
}

#[test]
fn traced_children_run() {
    let read = [PathBuf::from("/proc")];
    assert_eq!(confined(&keep(&read), |_| trace()), "true true true");
}

#[test]
fn root_becomes_another_user() {
    if !is_root() {
        return;
    }
    let read = [PathBuf::from("/proc")];
    let keep = Keep {
        read: &read,
        user: Some(NOBODYS),
    };
    let said = forked(|| {
        let end = Some(rustix::process::Signal::KILL);
        rustix::process::set_parent_process_death_signal(end).unwrap();
        let walls = confine(&keep).unwrap();
        assert_eq!(walls.user, Some(NOBODYS), "{walls}");
        assert!(walls.bounded);
        assert!(walls.to_string().ends_with(&format!(", user {NOBODYS}")));
        assert_eq!(rustix::process::parent_process_death_signal().unwrap(), end);
        std::fs::read_to_string("/proc/self/status").unwrap()
    });
    let line = |name: &str| {
        let found = said.lines().find_map(|line| line.strip_prefix(name));
        found.unwrap().split_whitespace().collect::<Vec<_>>()
    };
    let id = NOBODYS.to_string();
    assert_eq!(line("Uid:"), [id.as_str(); 4]);
    assert_eq!(line("Gid:"), [id.as_str(); 4]);
    assert!(line("Groups:").is_empty());
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(line(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(line("NoNewPrivs:"), ["1"]);
}

#[test]
fn another_user_traces_its_children_and_owns_what_proc_shows() {
    if !is_root() {
        return;
    }
    let read = [PathBuf::from("/proc")];
    let keep = Keep {
        read: &read,
        user: Some(NOBODYS),
    };
    let said = confined(&keep, |_| {
        let own = std::fs::read_dir("/proc/self/fd").is_ok();
        format!("{own} {}", trace())
    });
    assert_eq!(said, "true true true true");
}

#[test]
fn user_that_a_namespace_does_not_know_is_told() {
    let said = forked(|| {
        let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
        // SAFETY: this process has one thread.
        if unsafe { libc::unshare(libc::CLONE_NEWUSER) } != 0 {
            return "none".to_owned();
        }
        let put = |name, text: String| std::fs::write(format!("/proc/self/{name}"), text);
        let _ = put("setgroups", "deny".into());
        put("uid_map", format!("0 {} 1", user.as_raw())).unwrap();
        put("gid_map", format!("0 {} 1", group.as_raw())).unwrap();
        let walls = confine(&Keep {
            read: &[],
            user: Some(NOBODYS),
        })
        .unwrap();
        assert!(rustix::process::geteuid().is_root() && walls.user.is_none());
        assert!(
            walls
                .to_string()
                .contains(&format!(", not user {NOBODYS}: "))
        );
        format!("{:?}", walls.user_refused.map(|(user, _)| user))
    });
    if said == "none" {
        eprintln!("skipped: no user namespaces");
    } else {
        assert_eq!(said, format!("{:?}", Some(NOBODYS)));
    }
}

#[test]
fn process_with_threads_is_not_confined() {
    let said = forked(|| {
        let (sender, receiver) = mpsc::channel::<()>();
        let waiting = thread::spawn(move || receiver.recv().is_err());
        let fault = confine(&keep(&[])).unwrap_err();
        assert!(matches!(fault, Error::Threads(2)), "{fault}");
        drop(sender);
        waiting.join().unwrap();
        std::fs::read("/etc/passwd").is_ok().to_string()
    });
    assert_eq!(said, "true");
}
