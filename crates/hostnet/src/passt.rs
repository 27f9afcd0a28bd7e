//! User-mode networks: one passt process for each device, without privileges.
//!
//! passt is a whole network in one process: it answers DHCP, DNS and neighbour discovery and turns the guest's connections into its own sockets'. The
//! descriptor is a stream of Ethernet frames, each after its length in 4 bytes, most significant first; there is no header for offloads.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::Error;
use crate::tools;

const PACKAGE: &str = "passt";
/// Lets a burst of the largest frames wait in the socket.
const BUFFER_BYTES: usize = 1 << 20;
/// How long passt takes at most to find out that the host has no network for it.
const PROBATION: Duration = Duration::from_millis(100);

/// The passt process of a device; ends with this value.
#[derive(Debug)]
pub struct Passt {
    mtu: u32,
    process: Mutex<Process>,
}

/// Ends with this value.
#[derive(Debug)]
struct Process(Child);

impl Passt {
    /// Starts passt; the descriptor is the device's end of the wire.
    pub fn start(mtu: u32) -> Result<(Passt, OwnedFd), Error> {
        let (process, fd) = start(mtu)?;
        let process = Mutex::new(process);
        Ok((Passt { mtu, process }, fd))
    }

    /// Starts another in its place, with a wire of its own.
    pub fn restart(&self) -> Result<OwnedFd, Error> {
        let (process, fd) = start(self.mtu)?;
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = process;
        Ok(fd)
    }
}

fn start(mtu: u32) -> Result<(Process, OwnedFd), Error> {
    start_program(&tools::need("passt", PACKAGE)?, mtu)
}

fn start_program(program: &Path, mtu: u32) -> Result<(Process, OwnedFd), Error> {
    let failed = |why: String| Error::Tool {
        program: program.display().to_string(),
        why,
    };
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| failed(error.to_string()))?;
    for end in [&ours, &theirs] {
        // Only speed depends on it, and the host may allow less.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(end, BUFFER_BYTES);
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(end, BUFFER_BYTES);
    }
    rustix::io::ioctl_fionbio(&ours, true).map_err(|error| failed(error.to_string()))?;
    let said = tools::Said::new().map_err(|error| failed(error.to_string()))?;
    let errors = said.output().map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(program);
    command
        .args(["--foreground", "--quiet", "--mtu", &mtu.to_string()])
        .args(["--fd", &theirs.as_raw_fd().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors);
    // Nobody but this child may have its end: where another one had it too, nobody would hear that this one is gone.
    let keep_open = move || Ok(rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?);
    // SAFETY: the closure only makes a system call.
    unsafe { command.pre_exec(keep_open) };
    let child = command.spawn().map_err(|error| failed(error.to_string()))?;
    // With it goes this process's own descriptor of the child's end.
    drop(command);
    let mut passt = Process(child);
    // It finds out within this time that it cannot work here.
    let ended = tools::wait_for(&mut passt.0, PROBATION);
    let said = said.text();
    if matches!(ended, Ok(Some(_))) {
        let last = said.lines().rev().find(|line| !line.contains("syslog"));
        return Err(failed(format!(
            "it ended at once: {}",
            last.unwrap_or("without a word")
        )));
    }
    Ok((passt, ours))
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended by itself if its socket was closed before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use rustix::io::Errno;

    use super::*;

    /// A program that takes its descriptors and does nothing, in a directory that goes with the value.
    struct Idle(PathBuf);

    impl Idle {
        fn new() -> Idle {
            let directory =
                std::env::temp_dir().join(format!("hospes-passt-{}", std::process::id()));
            std::fs::create_dir_all(&directory).unwrap();
            let program = directory.join("passt");
            std::fs::write(&program, "#!/bin/sh\nexec sleep 1000\n").unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            Idle(directory)
        }

        fn start(&self) -> (Process, OwnedFd) {
            start_program(&self.0.join("passt"), 1500).unwrap()
        }
    }

    impl Drop for Idle {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn sockets(pid: u32) -> usize {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let is_socket = |entry: &io::Result<std::fs::DirEntry>| {
            let target = std::fs::read_link(entry.as_ref().unwrap().path()).unwrap();
            target.to_string_lossy().starts_with("socket:")
        };
        descriptors.filter(is_socket).count()
    }

    #[test]
    fn those_that_start_at_once_have_their_own_ends_alone() {
        let idle = Idle::new();
        for _ in 0..8 {
            let started: Vec<_> = std::thread::scope(|scope| {
                let starting: Vec<_> = (0..8).map(|_| scope.spawn(|| idle.start())).collect();
                let started = starting.into_iter().map(|thread| thread.join().unwrap());
                started.collect()
            });
            for (process, wire) in started {
                assert_eq!(sockets(process.0.id()), 1);
                // The wire ends with its process, whoever else lives.
                drop(process);
                let read = rustix::io::read(&wire, &mut [0; 1]);
                assert!(matches!(read, Ok(0) | Err(Errno::CONNRESET)), "{read:?}");
            }
        }
    }
}
