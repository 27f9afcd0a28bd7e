//! Media of a drive, which change places.

use hospes_image::{HostFiles, OpenSpec};

use super::failing::Failing;
use super::*;
use crate::devices::Devices;

/// A medium of 1 MiB in this file.
fn medium(file: &KernelFile) -> DiskSpec {
    std::fs::write(&file.0, vec![0; 1 << 20]).unwrap();
    DiskSpec {
        devid: 51744,
        vdev: "xvdc".to_owned(),
        target: file.0.clone(),
        format: ImageFormat::Raw,
        read_only: true,
        cdrom: true,
        discard: false,
        direct: false,
        trusted: true,
    }
}

#[test]
fn medium_that_cannot_be_attached_leaves_the_one_before_in_the_drive() {
    let d = try_domain(1, 64 << 20, Sink::default(), |_| Ok(Exit::Yield)).unwrap();
    let left = Arc::new(AtomicU32::new(0));
    let store = Arc::new(Failing {
        below: Arc::clone(&d.store),
        devices: Arc::clone(&left),
        reads: Arc::default(),
    });
    let (xen, files) = (Arc::clone(&d.xen), Arc::new(HostFiles));
    let devices = Devices::new(DomId(3), "a", 1, store, xen, files, Arc::new(|_| {}));
    let (first, second) = (KernelFile::new(), KernelFile::new());
    let (one, two) = (medium(&first), medium(&second));
    devices.attach_disk(&one).unwrap();
    let in_drive = || {
        let params = d
            .store
            .read_text("/local/domain/0/backend/vbd/3/51744/params");
        params.map(|params| PathBuf::from(params.trim_start_matches("raw:")))
    };

    left.store(1, SeqCst);
    let fault = devices.replace_disk(51744, Some(&two)).unwrap_err();
    assert!(matches!(fault, AttachError::Device(_)), "{fault}");
    assert_eq!(in_drive(), Some(first.0.clone()));

    left.store(2, SeqCst);
    let fault = devices.replace_disk(51744, Some(&two)).unwrap_err();
    assert!(matches!(fault, AttachError::Emptied { .. }), "{fault}");
    assert!(fault.to_string().contains("the drive is empty"), "{fault}");
    assert_eq!(in_drive(), None);

    devices.replace_disk(51744, Some(&two)).unwrap();
    assert_eq!(in_drive(), Some(second.0.clone()));
    devices.replace_disk(51744, Some(&one)).unwrap();
    // Nobody has the one before any more.
    let writer = OpenSpec {
        path: second.0.clone(),
        ..OpenSpec::default()
    };
    hospes_image::open(&writer).unwrap();
}
