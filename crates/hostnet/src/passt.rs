//! User-mode networks: one passt process for each device, without privileges.
//!
//! passt is a whole network in one process: it answers DHCP, DNS and neighbour discovery and turns the guest's connections into its own sockets'. The
//! descriptor is a stream of Ethernet frames, each after its length in 4 bytes, most significant first; there is no header for offloads.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags};

use crate::Error;
use crate::tools;

const PACKAGE: &str = "passt";
/// Lets a burst of the largest frames wait in the socket.
const BUFFER_BYTES: usize = 1 << 20;
/// How long passt takes at most to find out that the host has no network for it.
const PROBATION: Duration = Duration::from_millis(100);
/// Bytes of what it said that are looked at.
const SAID_MAX: u64 = 4096;

/// A passt process; ends with this value.
#[derive(Debug)]
pub struct Passt(Child);

/// Starts passt; the descriptor is the device's end of the wire.
pub fn start(mtu: u32) -> Result<(Passt, OwnedFd), Error> {
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
    let said = rustix::fs::memfd_create("passt", MemfdFlags::CLOEXEC)
        .map_err(|error| failed(error.to_string()))?;
    let mut said = File::from(said);
    let errors = said
        .try_clone()
        .map_err(|error| failed(error.to_string()))?;
    let child = Command::new(&program)
        .args(["--foreground", "--quiet", "--mtu", &mtu.to_string()])
        .args(["--fd", &theirs.as_raw_fd().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let mut passt = Passt(child);
    if passt.has_ended() {
        let mut text = String::new();
        // What it said is a help to the user; without it the error stays the same.
        let _ = said.seek(SeekFrom::Start(0));
        let _ = said.take(SAID_MAX).read_to_string(&mut text);
        let last = text.lines().rev().find(|line| !line.contains("syslog"));
        return Err(failed(format!(
            "it ended at once: {}",
            last.unwrap_or("without a word")
        )));
    }
    Ok((passt, ours))
}

impl Passt {
    /// Whether it ends within the time in which it finds out that it cannot work here.
    fn has_ended(&mut self) -> bool {
        let Ok(id) = i32::try_from(self.0.id()) else {
            return false;
        };
        let most = Timespec {
            tv_sec: 0,
            tv_nsec: PROBATION.as_nanos() as i64,
        };
        if let Some(id) = Pid::from_raw(id)
            && let Ok(process) = rustix::process::pidfd_open(id, PidfdFlags::empty())
        {
            // An interrupted wait is a short one: what is asked below counts.
            let _ = rustix::event::poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&most));
        }
        matches!(self.0.try_wait(), Ok(Some(_)))
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It has ended by itself if its socket was closed before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
