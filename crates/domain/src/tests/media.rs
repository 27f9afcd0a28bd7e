//! Media of a drive, which change places.

use hospes_image::{HostFiles, OpenSpec};
use hospes_store::{Error, NewNode, Perms, StoreAccess, Watch, WatchListener};

use super::*;
use crate::devices::Devices;

/// A store that does not take so many of the next devices.
struct Failing {
    below: Arc<dyn StoreAccess>,
    left: Arc<AtomicU32>,
}

impl StoreAccess for Failing {
    fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        self.below.read(path)
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<(), Error> {
        self.below.write(path, value)
    }

    fn mkdir(&self, path: &str) -> Result<(), Error> {
        self.below.mkdir(path)
    }

    fn remove(&self, path: &str) -> Result<(), Error> {
        self.below.remove(path)
    }

    fn list(&self, path: &str) -> Result<Vec<String>, Error> {
        self.below.list(path)
    }

    fn set_perms(&self, path: &str, perms: &Perms) -> Result<(), Error> {
        self.below.set_perms(path, perms)
    }

    fn write_all(&self, nodes: &[NewNode]) -> Result<(), Error> {
        let left = |left: u32| left.checked_sub(1);
        match self.left.fetch_update(SeqCst, SeqCst, left) {
            Ok(_) => Err(Error::Invalid),
            Err(_) => self.below.write_all(nodes),
        }
    }

    fn watch(&self, path: &str, listener: WatchListener) -> Result<Watch, Error> {
        self.below.watch(path, listener)
    }
}

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
        left: Arc::clone(&left),
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
