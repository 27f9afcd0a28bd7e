//! Making taps and putting them on bridges.

use std::os::fd::OwnedFd;
use std::{fs, io};

use crate::netlink::{Change, Link, Netlink};
use crate::{Error, sys};

/// Opens a tap with the first of `names` that is free; it has `queues` queues and goes with the last of their descriptors.
pub fn open(
    netlink: &Netlink,
    names: &[String],
    queues: u32,
) -> Result<(String, Vec<OwnedFd>), Error> {
    let mut last = None;
    for name in names {
        match open_named(name, queues) {
            Ok(fds) => return Ok((name.clone(), fds)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = Some(error),
            Err(source) if source.kind() == io::ErrorKind::InvalidInput => {
                return Err(Error::BadName(name.clone()));
            }
            Err(source) => {
                return Err(Error::Tap {
                    name: name.clone(),
                    source,
                });
            }
        }
    }
    let name = names.first().cloned().unwrap_or_default();
    let taken = matches!(netlink.link(&name), Ok(Some(_)));
    match last {
        Some(source) if !taken => Err(Error::Tap { name, source }),
        _ => Err(Error::NameTaken(name)),
    }
}

fn open_named(name: &str, queues: u32) -> io::Result<Vec<OwnedFd>> {
    let mut fds = vec![sys::open_tap(name, true)?];
    while fds.len() < queues as usize {
        match sys::open_tap(name, false) {
            Ok(fd) => fds.push(fd),
            // A kernel without multi-queue taps: one queue works as well, only slower.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(fds)
}

/// Sets a tap's MTU, puts it on a bridge and switches it on.
pub fn put(netlink: &Netlink, name: &str, bridge: Option<&Link>, mtu: u32) -> Result<(), Error> {
    let failed = |source| Error::Kernel {
        what: format!("set up the interface {name}"),
        source,
    };
    let link = netlink
        .link(name)
        .map_err(failed)?
        .ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    // On an interface that no bridge has, a guest could tell the host its routes and addresses. A host without IPv6 has no such setting.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "0");
    // The far end of the wire is the guest; the near end's address must not be the guest's, and a high one never becomes the bridge's.
    let change = Change {
        up: Some(true),
        mtu: Some(mtu),
        mac: Some([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]),
        master: bridge.map(|bridge| bridge.index),
        ..Change::default()
    };
    netlink.change(link.index, &change).map_err(failed)
}
