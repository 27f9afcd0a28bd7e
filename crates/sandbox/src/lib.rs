//! Takes from the calling process what it does not need, for good: files, the network, other processes, other users' rights, and most of the kernel's system calls.
//!
//! Five walls, each of which holds where another is missing. Landlock: no files but those for reading that the caller names, no TCP, no signal and no abstract socket to
//! anybody outside. A filter of system calls, a list of what is allowed ([`confine`] says what is not). No capabilities, none to be had by executing a file. As root, a user
//! id that owns nothing, and a network namespace that leads nowhere. Descriptors that are open stay usable for what they were opened for: what is given to a confined process is how it is meant to reach the host.
//!
//! What stays possible. `kill` and pidfds, because processes of direct execution are ended with them: Landlock (6 and later) and the own user id say whom that reaches. CPU sets and
//! priorities of other processes of the same user, where it has no id of its own. io_uring makes its requests past the filter: it can make sockets, of which Landlock refuses TCP
//! (4 and later), connecting to a path (9) and UDP (10); before these, datagrams go anywhere where the host's networks could not be left, and connections to the paths that the file system lets the user write to. Threads and processes
//! can be made without number, and memory taken: limits are for the one who starts the process. Whoever keeps `/proc` reads there what it shows to everybody.
//!
//! Refuses: to decide what a process needs to read or who it becomes, and to go on where it has other threads, which would stay outside. A kernel without one of the walls is no error: [`Walls`] tells.

mod calls;
mod files;
mod rights;

use std::fmt;
use std::path::PathBuf;

/// What a process keeps.
#[derive(Clone, Copy, Debug)]
pub struct Keep<'a> {
    /// Files and directories that may be read, each directory with what is beneath it. Where nothing is, nothing is allowed.
    pub read: &'a [PathBuf],
    /// User and group to become where the process may change them, as root may. `None` stays.
    pub user: Option<u32>,
}

/// What holds now. Its text is a list for a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walls {
    /// Version of Landlock's interface that was used; 0 where the kernel has none.
    pub landlock_abi: u32,
    /// Whether system calls are filtered.
    pub seccomp: bool,
    /// Whether no network of the host is to be reached, whatever makes a socket: only who has CAP_SYS_ADMIN can see to that.
    pub networkless: bool,
    /// The user and group that the process has become.
    pub user: Option<u32>,
    /// The user that the kernel did not let it become, and the error's number: a user namespace has no such id.
    pub user_refused: Option<(u32, i32)>,
    /// Whether no file that it executes could bring capabilities back even without `no_new_privs`: only who has CAP_SETPCAP can see to that.
    pub bounded: bool,
}

impl fmt::Display for Walls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.landlock_abi {
            0 => write!(f, "no Landlock")?,
            version => write!(f, "Landlock {version}")?,
        }
        let calls = if self.seccomp { "" } else { "not " };
        write!(f, ", system calls {calls}filtered, no capabilities")?;
        if self.networkless {
            write!(f, ", no network")?;
        }
        match (self.user, self.user_refused) {
            (Some(user), _) => write!(f, ", user {user}"),
            (None, Some((user, number))) => {
                let why = std::io::Error::from_raw_os_error(number);
                write!(f, ", not user {user}: {why}")
            }
            (None, None) => write!(f, ", the same user"),
        }
    }
}

/// Why a process is not confined. Some of the walls may stand all the same: it should end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Landlock holds for the calling thread and its children alone.
    #[error("a process with {0} threads cannot be confined: do it before the first is started")]
    Threads(usize),
    /// A system call failed that works on every kernel.
    #[error("could not {0}: {1}")]
    Rights(&'static str, #[source] std::io::Error),
    /// The kernel has Landlock and did not take the rules.
    #[error("Landlock did not take the rules: {0}")]
    Files(#[from] landlock::RulesetError),
    /// The list of system calls could not be made into a filter.
    #[error("no filter of system calls: {0}")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel filters system calls and did not take the filter.
    #[error("the kernel did not take the filter of system calls: {0}")]
    Seccomp(#[source] std::io::Error),
}

/// Confines the process, which has one thread, and all that it starts from now on. Nothing of it can be taken back.
///
/// Refused from then on, most with ENOSYS, whose callers know another way or do without: to make, bind, connect or listen on sockets (but for pairs of Unix streams),
/// to open files for writing, to change names, owners and modes, to execute files by name, all of mounts and namespaces, BPF, performance counters, keys, modules,
/// other users' ids, the clocks, and to trace or reach into processes that do not ask for it themselves. A process that becomes another user is dumpable afterwards
/// as it was before, so that what `/proc` shows of it and of its children is its own; it hears of its parent's end as it did before.
///
/// # Errors
/// For what no kernel without a wall explains, see [`Error`].
pub fn confine(keep: &Keep<'_>) -> Result<Walls, Error> {
    match rights::threads() {
        Some(1) | None => {}
        Some(threads) => return Err(Error::Threads(threads)),
    }
    rights::no_new_privileges()?;
    let landlock_abi = files::restrict(keep.read)?;
    let networkless = rights::leave_networks();
    let bounded = rights::bound();
    let (user, user_refused) = match keep.user.map(rights::become_user).transpose()? {
        Some(rights::Became::Own(user)) => (Some(user), None),
        Some(rights::Became::Refused(user, number)) => (None, Some((user, number))),
        Some(rights::Became::Same) | None => (None, None),
    };
    rights::drop_capabilities()?;
    let seccomp = calls::filter()?;
    Ok(Walls {
        landlock_abi,
        seccomp,
        networkless,
        user,
        user_refused,
        bounded,
    })
}
