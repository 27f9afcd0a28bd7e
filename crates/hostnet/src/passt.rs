//! User-mode networks: one passt process for each device, without privileges.
//!
//! passt is a whole network in one process: it answers DHCP, DNS and neighbour discovery and turns the guest's connections into its own sockets'. The
//! descriptor is a stream of Ethernet frames, each after its length in 4 bytes, most significant first; there is no header for offloads.

use std::os::fd::{AsRawFd, OwnedFd};
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
    let program = tools::need("passt", PACKAGE)?;
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
    // The child inherits its end; other children that start in this moment hold it open until they end, which harms nobody.
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty())
        .map_err(|error| failed(error.to_string()))?;
    let said = tools::Said::new().map_err(|error| failed(error.to_string()))?;
    let errors = said.output().map_err(|error| failed(error.to_string()))?;
    let child = Command::new(&program)
        .args(["--foreground", "--quiet", "--mtu", &mtu.to_string()])
        .args(["--fd", &theirs.as_raw_fd().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
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
