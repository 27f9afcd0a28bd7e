//! The filter: which system calls the kernel still carries out.
//!
//! What is not listed gives ENOSYS, as if the kernel did not know it: the C library then goes another way (`clone` for `clone3`, whose flags no filter can see).
//! The kernel remembers which numbers are allowed whatever their arguments and does not run the filter for them; those with conditions take up to 0.1 µs more.

use std::collections::BTreeMap;
use std::io;

use libc::{c_long, c_ulong};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

use crate::Error;

/// Allowed with any arguments: they change or show the process itself, or use what it has open.
const PLAIN: &[c_long] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munmap,
    libc::SYS_memfd_create,
    libc::SYS_membarrier,
    // Open files.
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    // Names, of which Landlock lets the process open those that it keeps.
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    // Waiting, and what is waited for.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    // Sockets that are connected.
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    // Time and chance.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_time,
    // Threads, and who it is.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpgid,
    libc::SYS_getpgrp,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getpriority,
    libc::SYS_getrusage,
    libc::SYS_getsid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_rseq,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getattr,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sysinfo,
    libc::SYS_times,
    libc::SYS_uname,
    // Signals and children; whom they reach is for Landlock and the user id to say.
    libc::SYS_kill,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_wait4,
    libc::SYS_waitid,
];

/// Allowed with one of these values in an argument, of which the lower half is compared: the kernel takes no more of it, or fails with the rest.
const ONE_OF: &[(c_long, u8, &[c_ulong])] = &[
    (
        libc::SYS_arch_prctl,
        0,
        // ARCH_SET_GS, ARCH_SET_FS, ARCH_GET_FS, ARCH_GET_GS.
        &[0x1001, 0x1002, 0x1003, 0x1004],
    ),
    (
        libc::SYS_fcntl,
        1,
        &[
            libc::F_ADD_SEALS as c_ulong,
            libc::F_DUPFD as c_ulong,
            libc::F_DUPFD_CLOEXEC as c_ulong,
            libc::F_GETFD as c_ulong,
            libc::F_GETFL as c_ulong,
            libc::F_GET_SEALS as c_ulong,
            libc::F_OFD_GETLK as c_ulong,
            libc::F_OFD_SETLK as c_ulong,
            libc::F_SETFD as c_ulong,
            libc::F_SETFL as c_ulong,
        ],
    ),
    (libc::SYS_getsockopt, 1, &[libc::SOL_SOCKET as c_ulong]),
    (
        libc::SYS_ioctl,
        1,
        &[
            // BLKDISCARD of linux/fs.h.
            0x1277,
            libc::FIOCLEX,
            libc::FIONBIO,
            libc::FIONREAD,
            libc::TCGETS,
            libc::TUNSETOFFLOAD,
            libc::TUNSETQUEUE,
        ],
    ),
    (
        libc::SYS_prctl,
        0,
        &[
            libc::PR_GET_NAME as c_ulong,
            libc::PR_GET_PDEATHSIG as c_ulong,
            libc::PR_GET_TIMERSLACK as c_ulong,
            libc::PR_SET_NAME as c_ulong,
            libc::PR_SET_NO_NEW_PRIVS as c_ulong,
            libc::PR_SET_TIMERSLACK as c_ulong,
            libc::PR_SET_VMA as c_ulong,
        ],
    ),
    // The process itself.
    (libc::SYS_prlimit64, 0, &[0]),
    // Not PTRACE_ATTACH nor PTRACE_SEIZE: who is traced has asked for it.
    (
        libc::SYS_ptrace,
        0,
        &[
            libc::PTRACE_TRACEME as c_ulong,
            libc::PTRACE_CONT as c_ulong,
            libc::PTRACE_SYSEMU as c_ulong,
            libc::PTRACE_GETREGS as c_ulong,
            libc::PTRACE_SETREGS as c_ulong,
            libc::PTRACE_GETREGSET as c_ulong,
            libc::PTRACE_SETREGSET as c_ulong,
            libc::PTRACE_POKEUSER as c_ulong,
            libc::PTRACE_GETSIGINFO as c_ulong,
            libc::PTRACE_SETOPTIONS as c_ulong,
        ],
    ),
    (libc::SYS_setpriority, 0, &[libc::PRIO_PROCESS as c_ulong]),
];

/// Makes the process's calls pass the filter; false where the kernel has none.
pub(crate) fn filter() -> Result<bool, Error> {
    if !available() {
        return Ok(false);
    }
    let program = program(std::process::id())?;
    let program: Vec<libc::sock_filter> = program
        .iter()
        .map(|op| libc::sock_filter {
            code: op.code,
            jt: op.jt,
            jf: op.jf,
            k: op.k,
        })
        .collect();
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // With a filter and without the second flag, kernels before 5.16 switch on a slow mitigation of speculative stores, for guest code as well.
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the program and its instructions live for the call, which copies them.
    match unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) } {
        0 => Ok(true),
        thread if thread > 0 => Err(Error::Seccomp(io::Error::other(format!(
            "thread {thread} has another filter"
        )))),
        _ => Err(Error::Seccomp(io::Error::last_os_error())),
    }
}

/// Whether the kernel has filters, and lets this process have one.
fn available() -> bool {
    let action: u32 = libc::SECCOMP_RET_ERRNO;
    let ask = libc::SECCOMP_GET_ACTION_AVAIL;
    // SAFETY: the kernel reads one number, which lives for the call.
    unsafe { libc::syscall(libc::SYS_seccomp, ask, 0, &raw const action) == 0 }
}

fn is(argument: u8, operation: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operation, value)
}

/// The filter of the process with this id.
fn program(process: u32) -> Result<BpfProgram, BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        PLAIN.iter().map(|call| (*call, Vec::new())).collect();
    for (call, argument, values) in ONE_OF {
        let one = |value: &c_ulong| SeccompRule::new(vec![is(*argument, Eq, *value)?]);
        let rule = values.iter().map(one).collect::<Result<_, _>>()?;
        rules.insert(*call, rule);
    }
    let mut allow = |call, conditions| {
        let rule = SeccompRule::new(conditions)?;
        rules.entry(call).or_default().push(rule);
        Ok::<_, BackendError>(())
    };
    // Threads and processes, none with a namespace of its own.
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    allow(
        libc::SYS_clone,
        vec![is(0, MaskedEq(namespaces as u64), 0)?],
    )?;
    // Open files, of which Landlock lets it have those made in memory.
    let by_descriptor = libc::AT_EMPTY_PATH as u64;
    allow(
        libc::SYS_execveat,
        vec![is(4, MaskedEq(by_descriptor), by_descriptor)?],
    )?;
    let writing = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC;
    allow(
        libc::SYS_openat,
        vec![is(2, MaskedEq(writing as u64), libc::O_RDONLY as u64)?],
    )?;
    // It may end with its parent and not outlive it.
    let parents_end = is(0, Eq, libc::PR_SET_PDEATHSIG as u64)?;
    let killed = is(1, Eq, libc::SIGKILL as u64)?;
    allow(libc::SYS_prctl, vec![parents_end, killed])?;
    // A filter more only ever refuses more, and no flag asks for a descriptor of it.
    let more = u64::from(libc::SECCOMP_SET_MODE_FILTER);
    allow(libc::SYS_seccomp, vec![is(0, Eq, more)?, is(1, Eq, 0)?])?;
    // To whom it is connected, not to an address.
    let any = SeccompCmpArgLen::Qword;
    let nowhere = SeccompCondition::new(4, any, Eq, 0)?;
    allow(libc::SYS_sendto, vec![nowhere])?;
    for option in [
        libc::SO_PASSCRED,
        libc::SO_RCVBUF,
        libc::SO_RCVTIMEO,
        libc::SO_SNDBUF,
        libc::SO_SNDTIMEO,
    ] {
        let level = is(1, Eq, libc::SOL_SOCKET as u64)?;
        allow(libc::SYS_setsockopt, vec![level, is(2, Eq, option as u64)?])?;
    }
    // Datagrams could be sent to any path: streams and sequences of packets are for the pair alone.
    let kind = !(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u32;
    for connected in [libc::SOCK_STREAM, libc::SOCK_SEQPACKET] {
        let unix = is(0, Eq, libc::AF_UNIX as u64)?;
        let connected = is(1, MaskedEq(kind.into()), connected as u64)?;
        allow(libc::SYS_socketpair, vec![unix, connected])?;
    }
    // Its own threads.
    allow(libc::SYS_tgkill, vec![is(0, Eq, process.into())?])?;

    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(
        rules,
        unknown.clone(),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    let mut program = other_interfaces(unknown);
    program.extend(BpfProgram::try_from(filter)?);
    Ok(program)
}

/// Calls by another interface than that of 64 bits get `action`: the library's own way is to kill the process, and guest code that makes one
/// in a process of direct execution is to be stopped and not killed.
fn other_interfaces(action: SeccompAction) -> BpfProgram {
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    let op = |code: u32, yes, k| sock_filter {
        code: code as u16,
        jt: yes,
        jf: 0,
        k,
    };
    let architecture = std::mem::offset_of!(libc::seccomp_data, arch) as u32;
    vec![
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, architecture),
        op(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            AUDIT_ARCH_X86_64,
        ),
        op(libc::BPF_RET | libc::BPF_K, 0, action.into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_listed_twice() {
        let conditions = ONE_OF.iter().map(|(call, ..)| *call);
        let mut calls: Vec<_> = PLAIN.iter().copied().chain(conditions).collect();
        let listed = calls.len();
        calls.sort_unstable();
        calls.dedup();
        assert_eq!(calls.len(), listed);
    }
}
