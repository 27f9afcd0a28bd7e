//! Tap devices: the ioctls of `linux/if_tun.h` that no library of ours has.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// Longest name of an interface, in bytes.
pub const NAME_MAX: usize = 15;

/// Bytes of the header before each packet: `struct virtio_net_hdr` as it was before version 1.
pub const VNET_HEADER_BYTES: i32 = 10;

/// `TUN_EXCL`: fails where the interface exists.
const IFF_TUN_EXCL: i32 = 0x8000;

/// Opens one queue of a tap that speaks virtio headers. The first makes the interface, `exclusive`; it goes when the last is closed.
pub fn open_tap(name: &str, exclusive: bool) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() > NAME_MAX || name.contains(['/', '\0', '%', ' ']) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let fd = rustix::fs::open(
        "/dev/net/tun",
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    if exclusive {
        flags |= IFF_TUN_EXCL;
    }
    // SAFETY: all zeros is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open and the request is an `ifreq` with a terminated name, which the kernel reads and writes back.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let bytes = VNET_HEADER_BYTES;
    // SAFETY: the kernel reads one int.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}
