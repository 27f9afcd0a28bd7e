//! Images that were not closed, on files and on devices.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::super::tests::{all, check, qcow2, qemu, text};
use super::super::{Options, Qcow2, Qcow2Image, read_header};
use crate::Image;
use crate::files::Access;
use crate::host::HostFile;
use crate::testing::{Directory, flush, read, write};

#[test]
fn open_of_an_image_that_counts_lazily_and_was_not_closed_repairs_it() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    let options = ["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on"];
    qemu("qemu-img", &[&options[..], &[text(&path), "64M"]].concat());
    // Killed after its writes: the dirty bit stays and the counts are missing.
    let killed = Command::new("qemu-io")
        .args(["-c", "write -P 5 1M 2M", "-c", "flush", "-c", "sigraise 9"])
        .arg(&path)
        .status()
        .expect("qemu-io runs");
    assert!(!killed.success());
    let image = qcow2(&path);
    let mut queue = image.queue().unwrap();
    assert_eq!(read(&mut *queue, 1 << 20, 512).unwrap(), [5; 512]);
    write(&mut *queue, 8 << 20, &[6; 65536]).unwrap();
    assert_eq!(read(&mut *queue, 3 << 20, 512).unwrap(), [0; 512]);
    drop((queue, image));
    check(&path);
}

/// An image with small clusters whose program was killed before it had counted what is in it, at the start of a file that has something else behind it. Its
/// refcount table names one block of several.
fn uncounted(path: &Path, bytes: usize) -> Vec<u8> {
    let options = "lazy_refcounts=on,cluster_size=512";
    let options = ["create", "-q", "-f", "qcow2", "-o", options, text(path)];
    qemu("qemu-img", &[&options[..], &["4M"]].concat());
    let killed = Command::new("qemu-io")
        .args(["-c", "write -P 5 0 1M", "-c", "flush", "-c", "sigraise 9"])
        .arg(path)
        .status()
        .expect("qemu-io runs");
    assert!(!killed.success());
    let mut image = std::fs::read(path).unwrap();
    let word = |image: &[u8], at: usize| {
        u64::from_be_bytes(image[at..at + 8].try_into().expect("8 bytes")) as usize
    };
    let table = word(&image, 48);
    let first = word(&image, table);
    image[table + 8..table + 512].fill(0);
    image[first..first + 512].fill(0);
    image.resize(bytes, 0xee);
    std::fs::write(path, &image).unwrap();
    let mut disk = vec![5; 4 << 20];
    disk[1 << 20..].fill(0);
    disk
}

fn repaired(image: Arc<dyn Image>, path: &Path, mut disk: Vec<u8>) {
    let mut queue = image.queue().unwrap();
    assert!(all(&mut *queue, 4 << 20) == disk);
    write(&mut *queue, 2 << 20, &[6; 1 << 16]).unwrap();
    flush(&mut *queue).unwrap();
    disk[2 << 20..][..1 << 16].fill(6);
    assert!(all(&mut *queue, 4 << 20) == disk);
    drop((queue, image));
    check(path);
}

#[test]
fn repair_on_a_device_takes_no_cluster_that_is_in_use() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    let disk = uncounted(&path, 6 << 20);
    let access = Access {
        read_only: false,
        direct: true,
        unit: Some(512),
    };
    let storage = Arc::new(HostFile::open(&path, access, None).unwrap());
    let header = read_header(&path, &*storage).unwrap();
    let options = Options {
        read_only: false,
        discard: true,
        sector_bytes: 512,
        physical_sector_bytes: 512,
        fixed: true,
    };
    let image = Qcow2::open(&path, storage, header, None, options).unwrap();
    repaired(Arc::new(Qcow2Image(Arc::new(image))), &path, disk);
}

/// A loop device, where the host has one.
struct Loop(PathBuf);

impl Loop {
    fn on(path: &Path) -> Option<Loop> {
        let losetup = Command::new("losetup");
        let output = { losetup }
            .args(["-f", "--show", text(path)])
            .output()
            .ok()?;
        let node = String::from_utf8(output.stdout).ok()?;
        output
            .status
            .success()
            .then(|| Loop(PathBuf::from(node.trim())))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn open_of_an_image_on_a_loop_device_repairs_it() {
    let directory = Directory::new();
    let path = directory.join("a.qcow2");
    let disk = uncounted(&path, 6 << 20);
    let Some(device) = Loop::on(&path) else {
        return;
    };
    repaired(qcow2(&device.0), &device.0, disk);
}
