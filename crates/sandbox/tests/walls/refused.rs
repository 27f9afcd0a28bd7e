//! What is refused.

use std::ffi::CString;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::ptr::null;

use hospes_sandbox::Walls;
use io_uring::{IoUring, opcode, squeue, types};

use crate::{Words, confined, forked, has, is_root, keep, result};

const UNKNOWN: i64 = -(libc::ENOSYS as i64);
const NO_ACCESS: i64 = -(libc::EACCES as i64);
const NOT_ALLOWED: i64 = -(libc::EPERM as i64);

/// Asserts that `attempt` gives `wanted` inside of the walls and something else without them; only where the kernel has enough of them.
fn refused(wanted: i64, enough: fn(&Walls) -> bool, attempt: impl Fn() -> i64) {
    if !has(enough) {
        return;
    }
    let free: i64 = forked(|| attempt().to_string()).parse().unwrap();
    let held: i64 = confined(&keep(&[]), |_| attempt().to_string())
        .parse()
        .unwrap();
    assert_eq!(held, wanted, "without walls {free}");
    assert_ne!(free, wanted, "it gives the same without walls");
}

/// Asserts that a system call with these arguments is one that the kernel seems not to know.
fn unknown(call: libc::c_long, arguments: [usize; 5]) {
    let [a, b, c, d, e] = arguments;
    refused(
        UNKNOWN,
        |walls| walls.seccomp,
        // SAFETY: callers pass numbers, or addresses of what lives for the test.
        || result(unsafe { libc::syscall(call, a, b, c, d, e) }),
    );
}

/// Makes one request of a ring of its own and returns its result.
fn by_ring(entry: squeue::Entry) -> i64 {
    let mut ring = IoUring::new(2).unwrap();
    // SAFETY: what the entry points to lives until its completion, which is waited for.
    unsafe { ring.submission().push(&entry).unwrap() };
    ring.submit_and_wait(1).unwrap();
    let result = ring.completion().next().unwrap().result();
    i64::from(result)
}

fn has_rings() -> bool {
    let ring = IoUring::new(2);
    if let Err(fault) = &ring {
        eprintln!("skipped: no io_uring: {fault}");
    }
    ring.is_ok()
}

fn open(path: &str, flags: i32) -> i64 {
    let path = CString::new(path).unwrap();
    // SAFETY: the path is terminated.
    result(unsafe { libc::open(path.as_ptr(), flags, 0o600) }.into())
}

#[test]
fn files_that_are_not_kept() {
    let landlock = |walls: &Walls| walls.landlock_abi > 0;
    refused(NO_ACCESS, landlock, || {
        open("/etc/passwd", libc::O_RDONLY).min(0)
    });
    refused(NO_ACCESS, landlock, || {
        open("/etc", libc::O_RDONLY | libc::O_DIRECTORY).min(0)
    });
}

#[test]
fn files_for_writing() {
    let file = Words::new("writing", "");
    let path = CString::new(file.0.as_os_str().as_bytes()).unwrap();
    let new = std::env::temp_dir().join(format!("hospes-new-{}", std::process::id()));
    let new = CString::new(new.as_os_str().as_bytes()).unwrap();
    let create = libc::O_WRONLY | libc::O_CREAT;
    for (path, flags) in [(&path, libc::O_RDWR), (&new, create)] {
        unknown(
            libc::SYS_openat,
            [
                libc::AT_FDCWD as usize,
                path.as_ptr() as usize,
                flags as usize,
                0o600,
                0,
            ],
        );
        if has_rings() {
            refused(
                NO_ACCESS,
                |walls| walls.landlock_abi > 0,
                || {
                    let here = types::Fd(libc::AT_FDCWD);
                    let entry = opcode::OpenAt::new(here, path.as_ptr())
                        .flags(flags)
                        .mode(0o600);
                    by_ring(entry.build()).min(0)
                },
            );
        }
    }
    let _ = std::fs::remove_file(new.to_str().unwrap());
}

#[test]
fn names_and_owners() {
    let file = Words::new("names", "");
    let path = CString::new(file.0.as_os_str().as_bytes()).unwrap();
    let path = path.as_ptr() as usize;
    unknown(libc::SYS_chmod, [path, 0o600, 0, 0, 0]);
    unknown(libc::SYS_rename, [path, path, 0, 0, 0]);
    unknown(libc::SYS_truncate, [path, 0, 0, 0, 0]);
    unknown(libc::SYS_mkdir, [path, 0o700, 0, 0, 0]);
    unknown(libc::SYS_unlink, [path, 0, 0, 0, 0]);
}

#[test]
fn sockets_by_path() {
    let path = std::env::temp_dir().join(format!("hospes-path-{}", std::process::id()));
    let _listener = UnixListener::bind(&path).unwrap();
    refused(
        UNKNOWN,
        |walls| walls.seccomp,
        || match std::os::unix::net::UnixStream::connect(&path) {
            Ok(_) => 0,
            Err(fault) => -i64::from(fault.raw_os_error().unwrap()),
        },
    );
    std::fs::remove_file(&path).unwrap();
}

/// A port of this machine's own address.
fn on_loopback(port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_be_bytes([127, 0, 0, 1]).to_be(),
        },
        sin_zero: [0; 8],
    }
}

#[test]
fn tcp() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    refused(
        UNKNOWN,
        |walls| walls.seccomp,
        || match std::net::TcpStream::connect(("127.0.0.1", port)) {
            Ok(_) => 0,
            Err(fault) => -i64::from(fault.raw_os_error().unwrap()),
        },
    );
    if !has_rings() {
        return;
    }
    let to = on_loopback(port);
    refused(
        NO_ACCESS,
        |walls| walls.landlock_abi >= 4,
        || {
            let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0);
            let socket = by_ring(socket.build());
            assert!(socket >= 0, "io_uring made no socket: {socket}");
            let bytes = size_of_val(&to) as u32;
            let connect =
                opcode::Connect::new(types::Fd(socket as i32), (&raw const to).cast(), bytes);
            by_ring(connect.build())
        },
    );
}

#[test]
fn networks_by_datagrams() {
    if !has_rings() {
        return;
    }
    let listener = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let to = on_loopback(port);
    refused(
        -i64::from(libc::ENETUNREACH),
        |walls| walls.networkless,
        || {
            let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_DGRAM, 0);
            let socket = by_ring(socket.build());
            assert!(socket >= 0, "io_uring made no socket: {socket}");
            let bytes = size_of_val(&to) as u32;
            let send = opcode::Send::new(types::Fd(socket as i32), b"x".as_ptr(), 1)
                .dest_addr((&raw const to).cast())
                .dest_addr_len(bytes);
            by_ring(send.build())
        },
    );
}

#[test]
fn sockets_but_connected_pairs() {
    let mut pair = [0i32; 2];
    let at = pair.as_mut_ptr() as usize;
    unknown(
        libc::SYS_socketpair,
        [libc::AF_UNIX as usize, libc::SOCK_DGRAM as usize, 0, at, 0],
    );
    unknown(
        libc::SYS_socket,
        [libc::AF_NETLINK as usize, libc::SOCK_RAW as usize, 0, 0, 0],
    );
    unknown(libc::SYS_bind, [0; 5]);
    unknown(libc::SYS_listen, [0; 5]);
    unknown(libc::SYS_accept4, [0; 5]);
}

#[test]
fn files_to_execute() {
    let arguments = [c"true".as_ptr(), null()];
    let at = arguments.as_ptr() as usize;
    let program = c"/bin/true".as_ptr() as usize;
    // Where it is executed nobody is left to say so: without walls the file is one that cannot be.
    unknown(
        libc::SYS_execve,
        [c"/etc/passwd".as_ptr() as usize, at, at + 8, 0, 0],
    );
    let here = libc::AT_FDCWD as usize;
    unknown(
        libc::SYS_execveat,
        [here, c"/etc/passwd".as_ptr() as usize, at, at + 8, 0],
    );
    let gone = confined(&keep(&[]), |walls| {
        // SAFETY: the path and the arguments are terminated.
        let done = result(unsafe { libc::syscall(libc::SYS_execve, program, at, at + 8) });
        format!("{} {done}", walls.seccomp)
    });
    assert!(
        gone.starts_with("false") || gone == format!("true {UNKNOWN}"),
        "{gone}"
    );
}

#[test]
fn files_to_execute_by_a_descriptor() {
    if !has(|walls| walls.landlock_abi > 0) {
        return;
    }
    let program = std::fs::File::open("/bin/true").unwrap();
    let said = confined(&keep(&[]), |_| {
        let arguments = [c"true".as_ptr(), null()];
        let at = arguments.as_ptr();
        // SAFETY: the path and the arguments are terminated.
        let done = unsafe {
            let fd = program.as_raw_fd();
            libc::syscall(
                libc::SYS_execveat,
                fd,
                c"".as_ptr(),
                at,
                at.add(1),
                libc::AT_EMPTY_PATH,
            )
        };
        result(done).to_string()
    });
    assert_eq!(said, NO_ACCESS.to_string());
}

#[test]
fn other_processes() {
    let parent = std::process::id() as usize;
    refused(
        NOT_ALLOWED,
        |walls| walls.landlock_abi >= 6,
        || {
            // SAFETY: a plain system call that sends nothing.
            result(unsafe { libc::kill(parent as i32, 0) }.into())
        },
    );
    unknown(libc::SYS_tgkill, [parent, parent, 0, 0, 0]);
    unknown(libc::SYS_tkill, [parent, 0, 0, 0, 0]);
    let attach = libc::PTRACE_ATTACH as usize;
    unknown(libc::SYS_ptrace, [attach, usize::MAX >> 1, 0, 0, 0]);
    let seize = libc::PTRACE_SEIZE as usize;
    unknown(libc::SYS_ptrace, [seize, usize::MAX >> 1, 0, 0, 0]);
    unknown(libc::SYS_process_vm_readv, [parent, 0, 0, 0, 0]);
    unknown(libc::SYS_process_vm_writev, [parent, 0, 0, 0, 0]);
    unknown(libc::SYS_pidfd_getfd, [0; 5]);
    unknown(
        libc::SYS_prlimit64,
        [parent, libc::RLIMIT_CORE as usize, 0, 0, 0],
    );
    // Nor to outlive the parent, alone or in a group that is not ended with it.
    unknown(
        libc::SYS_prctl,
        [libc::PR_SET_PDEATHSIG as usize, 0, 0, 0, 0],
    );
    unknown(libc::SYS_setpgid, [0; 5]);
    unknown(libc::SYS_setsid, [0; 5]);
}

#[test]
fn mounts_and_namespaces() {
    let text = c"none".as_ptr() as usize;
    unknown(
        libc::SYS_mount,
        [
            text,
            c"/nowhere".as_ptr() as usize,
            c"tmpfs".as_ptr() as usize,
            0,
            0,
        ],
    );
    unknown(libc::SYS_fsopen, [c"tmpfs".as_ptr() as usize, 0, 0, 0, 0]);
    unknown(libc::SYS_unshare, [0; 5]);
    unknown(
        libc::SYS_unshare,
        [libc::CLONE_NEWUSER as usize, 0, 0, 0, 0],
    );
    unknown(libc::SYS_setns, [0; 5]);
    unknown(
        libc::SYS_chroot,
        [c"/nowhere".as_ptr() as usize, 0, 0, 0, 0],
    );
    // Flags that no kernel takes together, so that no child is made without walls either.
    let both = libc::CLONE_NEWUSER | libc::CLONE_FS;
    unknown(libc::SYS_clone, [both as usize, 0, 0, 0, 0]);
    unknown(libc::SYS_clone3, [0; 5]);
}

#[test]
fn more_of_the_kernel() {
    // Arguments that no kernel takes: they do nothing without walls.
    const WRONG: [usize; 5] = [usize::MAX; 5];
    let mut tried = 0;
    for call in [
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_init_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_open_by_handle_at,
        libc::SYS_name_to_handle_at,
        libc::SYS_process_madvise,
        libc::SYS_modify_ldt,
        libc::SYS_capset,
        libc::SYS_setresuid,
        libc::SYS_setgroups,
        libc::SYS_clock_settime,
        libc::SYS_iopl,
        libc::SYS_io_setup,
        libc::SYS_mknod,
        libc::SYS_quotactl,
        libc::SYS_swapon,
        libc::SYS_acct,
    ] {
        let [a, b, c, d, e] = WRONG;
        // SAFETY: no kernel reads from these addresses.
        let free = || result(unsafe { libc::syscall(call, a, b, c, d, e) }).to_string();
        if forked(free) == UNKNOWN.to_string() {
            eprintln!("skipped: this kernel was built without system call {call}");
        } else {
            unknown(call, WRONG);
            tried += 1;
        }
    }
    assert!(tried >= 10, "{tried} of these calls");
    unknown(
        libc::SYS_ioctl,
        [usize::MAX, libc::TIOCSTI as usize, 0, 0, 0],
    );
    unknown(libc::SYS_prctl, [libc::PR_SET_SECCOMP as usize, 0, 0, 0, 0]);
}

#[test]
fn calls_of_32_bits_do_not_kill() {
    const GETPID: i64 = 20;
    let attempt = || {
        let mut value = GETPID;
        // SAFETY: the call takes no arguments and changes nothing but the result.
        unsafe { std::arch::asm!("int 0x80", inout("rax") value, options(nostack)) };
        i64::from(value as i32)
    };
    if std::panic::catch_unwind(|| forked(|| attempt().to_string())).is_err() {
        eprintln!("skipped: this kernel has no calls of 32 bits");
        return;
    }
    refused(UNKNOWN, |walls| walls.seccomp, attempt);
}

#[test]
fn rights_of_root() {
    if !is_root() {
        return;
    }
    let file = Words::new("rights", "");
    // SAFETY: a plain system call.
    let own = |fd| result(unsafe { libc::fchown(fd, 1, 1) }.into());
    let opened = std::fs::File::open(&file.0).unwrap();
    refused(UNKNOWN, |walls| walls.seccomp, || own(opened.as_raw_fd()));
    let read = [std::path::PathBuf::from("/proc")];
    let said = confined(&keep(&read), |_| {
        std::fs::read_to_string("/proc/self/status").unwrap()
    });
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(
            said.contains(&format!("{set}:\t0000000000000000\n")),
            "{said}"
        );
    }
}
