//! Files that one process opens and another uses.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Mutex;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::*;
use crate::testing::{Directory, flush, read, spec, write};
use crate::{
    Format, OpenSpec, Report, backing_chain, create_overlay, create_qcow2, open, open_with,
};

/// Opens files as another process would, and passes them through a socket.
#[derive(Default)]
struct Passing {
    /// What that process has of the files that are in use.
    keeps: Mutex<Vec<Keep>>,
}

impl Files for Passing {
    fn open(&self, path: &Path, access: Access, owner: &str) -> Result<Opened, ImageError> {
        let access = passed(&access);
        let opened = HostFiles.open(path, access, owner).map_err(|error| {
            let report: Report = passed(&error.report());
            ImageError::from(report)
        })?;
        let (facts, descriptors, keep) = opened.parts();
        self.keeps.lock().unwrap().push(keep);
        let count = descriptors.len();
        let (facts, descriptors) = through_socket(&facts, descriptors);
        assert_eq!(descriptors.len(), count);
        Opened::from_parts(facts, descriptors, Box::new(()))
            .map_err(ImageError::host(path, "open it"))
    }
}

fn passed<T: Serialize + for<'a> Deserialize<'a>>(value: &T) -> T {
    serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
}

/// The sender has closed its descriptors when this returns.
fn through_socket(facts: &Facts, descriptors: Vec<OwnedFd>) -> (Facts, Vec<OwnedFd>) {
    let (near, far) = UnixStream::pair().unwrap();
    let text = serde_json::to_vec(facts).unwrap();
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    sendmsg(
        &near,
        &[IoSlice::new(&text)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    drop(descriptors);
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let count = recvmsg(&far, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)
        .unwrap()
        .bytes;
    let mut received = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            received.extend(descriptors);
        }
    }
    (serde_json::from_slice(&bytes[..count]).unwrap(), received)
}

fn wanted(path: &Path, format: Format, owner: &str) -> OpenSpec {
    OpenSpec {
        lock_owner: owner.to_owned(),
        ..spec(path, format)
    }
}

fn sentence(result: Result<impl Sized, ImageError>) -> String {
    result.err().expect("it is refused").to_string()
}

#[test]
fn passed_files_keep_their_locks_until_the_image_is_closed() {
    let directory = Directory::new();
    let (base, top) = (directory.file("base.raw", 1 << 20), directory.join("top"));
    create_overlay(&top, &base, Format::Raw).unwrap();
    let files = Passing::default();
    let web = wanted(&top, Format::Qcow2, "domain 3 (web)");
    let (image, facts) = open_with(&web, &files).unwrap();
    let metadata = std::fs::metadata(&top).unwrap();
    assert_eq!(facts.identity, (metadata.dev(), metadata.ino()));
    assert_eq!(facts.device(), None);
    let mut queue = image.queue().unwrap();
    write(&mut *queue, 4096, &[5; 4096]).unwrap();
    flush(&mut *queue).unwrap();
    assert_eq!(read(&mut *queue, 4096, 4096).unwrap(), [5; 4096]);

    let other = |path, format| open(&wanted(path, format, "domain 4 (db)"));
    for (path, format) in [(&top, Format::Qcow2), (&base, Format::Raw)] {
        let refused = sentence(other(path, format));
        assert!(refused.contains("locked by domain 3 (web)"), "{refused}");
    }
    // The other process may end first, and what is under way is still protected.
    files.keeps.lock().unwrap().clear();
    for (path, format) in [(&top, Format::Qcow2), (&base, Format::Raw)] {
        let refused = sentence(other(path, format));
        assert!(refused.contains("is locked by"), "{refused}");
    }
    drop((queue, image));
    drop(other(&top, Format::Qcow2).unwrap());
    other(&base, Format::Raw).unwrap();
}

#[test]
fn a_closed_image_is_free_even_where_a_copy_of_its_descriptor_is_left() {
    let directory = Directory::new();
    let path = directory.file("a.img", 1 << 20);
    let access = Access {
        read_only: false,
        direct: true,
        unit: None,
    };
    let opened = HostFiles.open(&path, access, "domain 3 (web)").unwrap();
    let _left = opened.cached.try_clone().unwrap();
    let file = crate::host::HostFile::new(&path, opened).unwrap();
    assert!(open(&spec(&path, Format::Raw)).is_err());
    drop(file);
    open(&spec(&path, Format::Raw)).unwrap();
}

#[test]
fn errors_of_another_process_read_the_same() {
    let directory = Directory::new();
    let path = |name| directory.join(name);
    let (used, gone) = (directory.file("used.img", 8192), path("gone.img"));
    let (top, looped) = (path("top.qcow2"), path("loop.qcow2"));
    let _used = open(&spec(&used, Format::Raw)).unwrap();
    let gone_below = directory.file("gone-below.img", 8192);
    create_overlay(&top, &gone_below, Format::Raw).unwrap();
    std::fs::remove_file(&gone_below).unwrap();
    create_qcow2(&looped, 1 << 20).unwrap();
    rebase(&looped, &looped);
    for (path, format, want) in [
        (&gone, Format::Raw, "cannot open it: No such file"),
        (&directory.join(""), Format::Raw, "is a directory"),
        (&used, Format::Raw, "the image already"),
        (&top, Format::Qcow2, "gone-below.img cannot be opened: No"),
        (&looped, Format::Qcow2, "is an image on top of it"),
    ] {
        let spec = spec(path, format);
        let here = sentence(open(&spec));
        assert!(here.contains(want), "{here}");
        assert_eq!(sentence(open_with(&spec, &Passing::default())), here);
    }
}

#[test]
fn from_parts_refuses_what_does_not_fit() {
    let directory = Directory::new();
    let (path, other) = (directory.file("a", 4096), directory.file("b", 4096));
    let facts = facts_of(&std::fs::metadata(&path).unwrap());
    let with_direct = Facts {
        alignment: Some(Alignment {
            memory: 512,
            offset: 512,
        }),
        ..facts
    };
    let opened = |facts, paths: &[&Path]| {
        let descriptor = |path: &&Path| OwnedFd::from(File::open(path).unwrap());
        let descriptors = paths.iter().map(descriptor).collect();
        Opened::from_parts(facts, descriptors, Box::new(())).map(drop)
    };
    opened(facts, &[&path]).unwrap();
    opened(with_direct, &[&path, &path]).unwrap();
    for (facts, count) in [(facts, 0), (facts, 2), (facts, 3)]
        .into_iter()
        .chain([0, 1, 3, 4].map(|count| (with_direct, count)))
    {
        let error = opened(facts, &vec![&*path; count]).unwrap_err().to_string();
        assert!(error.contains("number of descriptors"), "{count}: {error}");
    }
    assert!(opened(facts, &[&other]).is_err());
    assert!(opened(with_direct, &[&path, &other]).is_err());
    for odd in [
        Facts {
            is_block: true,
            ..facts
        },
        Facts {
            logical_sector_bytes: 0,
            ..facts
        },
        Facts {
            physical_sector_bytes: 513,
            ..facts
        },
        Facts {
            discard_granularity: Some(0),
            ..facts
        },
    ] {
        assert!(opened(odd, &[&path]).is_err(), "{odd:?}");
    }
    for (memory, offset) in [(0, 512), (512, 0), (1 << 20, 512), (512, 513)] {
        let odd = Facts {
            alignment: Some(Alignment { memory, offset }),
            ..facts
        };
        assert!(opened(odd, &[&path, &path]).is_err(), "{odd:?}");
    }
}

/// Has the header of an image name this backing file, whatever that is.
fn rebase(path: &Path, below: &Path) {
    let output = Command::new("qemu-img")
        .args(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([below, path])
        .output()
        .expect("qemu-img of qemu-utils runs");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn backing_chain_is_what_opening_opens() {
    /// Notes what is opened.
    #[derive(Default)]
    struct Noting(Mutex<Vec<std::path::PathBuf>>);

    impl Files for Noting {
        fn open(&self, path: &Path, access: Access, owner: &str) -> Result<Opened, ImageError> {
            self.0.lock().unwrap().push(path.to_owned());
            HostFiles.open(path, access, owner)
        }
    }

    let directory = Directory::new();
    let path = |name| directory.join(name);
    let (base, middle, top) = (path("base.raw"), path("middle"), path("top"));
    directory.file("base.raw", 1 << 20);
    create_overlay(&middle, Path::new("base.raw"), Format::Raw).unwrap();
    create_overlay(&top, &middle, Format::Qcow2).unwrap();
    for (path, format) in [
        (&top, Format::Qcow2),
        (&top, Format::Auto),
        (&top, Format::Raw),
        (&middle, Format::Qcow2),
        (&base, Format::Auto),
    ] {
        let files = Noting::default();
        // It takes no locks, and so does not mind those of others.
        let _image = open_with(&spec(path, format), &files).unwrap();
        let opened = files.0.into_inner().unwrap();
        assert_eq!(backing_chain(path, format).unwrap(), opened[1..]);
    }
    assert_eq!(backing_chain(&top, Format::Qcow2).unwrap(), [middle, base]);
}

#[test]
fn backing_chain_refuses_as_opening_does() {
    let directory = Directory::new();
    let path = |name: &str| directory.join(name);
    let (looped, under) = (path("loop.qcow2"), path("under.qcow2"));
    create_qcow2(&looped, 1 << 20).unwrap();
    create_overlay(&under, &looped, Format::Qcow2).unwrap();
    rebase(&looped, &under);
    let mut deep = path("0.qcow2");
    create_qcow2(&deep, 1 << 20).unwrap();
    for depth in 1..64 {
        let next = path(&format!("{depth}.qcow2"));
        create_overlay(&next, &deep, Format::Qcow2).unwrap();
        deep = next;
    }
    assert_eq!(backing_chain(&deep, Format::Qcow2).unwrap().len(), 63);
    let (deeper, orphan) = (path("deeper.qcow2"), path("orphan.qcow2"));
    for (image, below) in [(&deeper, &deep), (&orphan, &path("gone"))] {
        create_qcow2(image, 1 << 20).unwrap();
        rebase(image, below);
    }
    for (image, want) in [
        (&looped, "is an image on top of it"),
        (&deeper, "more than 64 images"),
        (&orphan, "gone cannot be opened: No such file"),
        (&directory.file("no.qcow2", 1 << 20), "qcow2"),
    ] {
        let refused = sentence(backing_chain(image, Format::Qcow2));
        assert!(refused.contains(want), "{refused}");
        assert_eq!(sentence(open(&spec(image, Format::Qcow2))), refused);
    }
}

#[test]
fn devices_that_the_host_has_mounted_or_built_upon_are_known() {
    let directory = Directory::new();
    let devices = directory.join("block");
    for holders in ["8:2/holders/dm-0", "8:3/holders"] {
        std::fs::create_dir_all(devices.join(holders)).unwrap();
    }
    let mounts = "22 1 8:16 / / rw,relatime shared:1 - ext4 /dev/sdb rw\n\
                  35 22 0:31 /8:1 /mnt/8:4 rw - tmpfs 8:5 rw\n";
    let used = |number: &&str| is_used(number, mounts, &devices);
    let all = ["8:16", "8:2", "8:1", "8:3", "8:4", "8:5", "22:1", "0:31"];
    let found: Vec<_> = all.into_iter().filter(used).collect();
    assert_eq!(found, ["8:16", "8:2", "0:31"]);
}

#[test]
fn mounted_device_is_refused() {
    let directory = Directory::new();
    let path = directory.file("a.img", 4 << 20);
    let run = |program: &str, arguments: &[&Path]| {
        let output = std::process::Command::new(program).args(arguments).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    };
    // Not every host lets tests have this.
    let Some(node) = run("losetup", &["-f".as_ref(), "--show".as_ref(), &path]) else {
        return;
    };
    let (device, mount) = (Path::new(&node), directory.join("mount"));
    std::fs::create_dir(&mount).unwrap();
    let mounted = run("mkfs.ext4", &["-q".as_ref(), device])
        .and_then(|_| run("mount", &[device, &mount]))
        .is_some();
    let number = std::fs::metadata(device).unwrap().rdev();
    let used = is_used_by_host(number);
    let refused = crate::open(&spec(device, crate::Format::Raw));
    let unmounted = !mounted || run("umount", &[&mount]).is_some();
    let free = is_used_by_host(number);
    run("losetup", &["-d".as_ref(), device]).unwrap();
    assert!(unmounted && !free && used == mounted);
    if mounted {
        let sentence = refused.err().expect("it is refused").to_string();
        assert!(
            sentence.contains("the host, which has it mounted"),
            "{sentence}"
        );
    }
}
