//! The host's loop devices, which take no lock on the file that they make a block device of.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::lock::identity_of;

/// A loop device on a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LoopDevice {
    pub(crate) node: String,
    pub(crate) read_only: bool,
}

/// The path that a directory of sysfs names as the file behind a loop device.
fn backing_in(device: &Path) -> Option<PathBuf> {
    let mut path = fs::read(device.join("loop/backing_file")).ok()?;
    path.pop_if(|last| *last == b'\n');
    Some(PathBuf::from(OsString::from_vec(path)))
}

/// A loop device on the file with this identity, one that can write first. `sys` is where sysfs is mounted.
pub(crate) fn device_on(sys: &Path, identity: (u64, u64)) -> Option<LoopDevice> {
    let devices = fs::read_dir(sys.join("block")).ok()?.flatten();
    let mut found: Vec<LoopDevice> = devices
        .filter(|device| {
            let backing = backing_in(&device.path()).and_then(|path| fs::metadata(path).ok());
            backing.is_some_and(|file| identity_of(&file) == identity)
        })
        .map(|device| LoopDevice {
            node: format!("/dev/{}", device.file_name().display()),
            read_only: fs::read(device.path().join("ro")).is_ok_and(|ro| ro.starts_with(b"1")),
        })
        .collect();
    found.sort_by_key(|device| device.read_only);
    found.into_iter().next()
}

/// The file behind a loop device, or behind the one that a partition is of.
pub(crate) fn backing_of(sys: &Path, device: u64) -> Option<PathBuf> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let own = fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}"))).ok()?;
    backing_in(&own).or_else(|| backing_in(own.parent()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::Directory;

    /// A sysfs with these loop devices, each with a partition, by name, file and whether it is read-only.
    fn sysfs(directory: &Directory, devices: &[(&str, &Path, bool)]) -> PathBuf {
        let sys = directory.join("sys");
        fs::create_dir_all(sys.join("dev/block")).unwrap();
        fs::create_dir_all(sys.join("block/sda")).unwrap();
        for (n, (name, file, read_only)) in devices.iter().enumerate() {
            let device = sys.join("block").join(name);
            fs::create_dir_all(device.join("loop")).unwrap();
            fs::create_dir_all(device.join(format!("{name}p1"))).unwrap();
            fs::write(
                device.join("loop/backing_file"),
                format!("{}\n", file.display()),
            )
            .unwrap();
            fs::write(device.join("ro"), format!("{}\n", u8::from(*read_only))).unwrap();
            symlink(&device, sys.join(format!("dev/block/7:{n}"))).unwrap();
            symlink(
                device.join(format!("{name}p1")),
                sys.join(format!("dev/block/259:{n}")),
            )
            .unwrap();
        }
        sys
    }

    #[test]
    fn loop_devices_and_their_files_are_found() {
        let directory = Directory::new();
        let [a, b, other] = ["a.img", "b b.img", "c.img"].map(|name| directory.file(name, 4096));
        let sys = sysfs(
            &directory,
            &[
                ("loop0", &a, true),
                ("loop1", &b, true),
                ("loop7", &a, false),
            ],
        );
        let on = |path: &Path| device_on(&sys, identity_of(&fs::metadata(path).unwrap()));
        let device = |node: &str, read_only| {
            let node = node.to_owned();
            Some(LoopDevice { node, read_only })
        };
        assert_eq!(on(&a), device("/dev/loop7", false));
        assert_eq!(on(&b), device("/dev/loop1", true));
        assert_eq!(on(&other), None);
        let backing = |major, minor| backing_of(&sys, rustix::fs::makedev(major, minor));
        assert_eq!(backing(7, 1), Some(b.clone()));
        assert_eq!(backing(259, 2), Some(a));
        assert_eq!(backing(8, 0), None);
    }
}
