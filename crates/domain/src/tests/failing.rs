//! A store that can be out of order.

use hospes_store::{Error, NewNode, Perms, StoreAccess, Watch, WatchListener};

use super::*;

/// A store that fails with so many of the next requests.
pub(super) struct Failing {
    pub below: Arc<dyn StoreAccess>,
    /// Devices that are entered.
    pub devices: Arc<AtomicU32>,
    pub reads: Arc<AtomicU32>,
}

/// Whether this one fails.
fn fails(left: &AtomicU32) -> bool {
    left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1))
        .is_ok()
}

impl StoreAccess for Failing {
    fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        match fails(&self.reads) {
            true => Err(Error::Unreachable),
            false => self.below.read(path),
        }
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
        match fails(&self.devices) {
            true => Err(Error::Invalid),
            false => self.below.write_all(nodes),
        }
    }

    fn watch(&self, path: &str, listener: WatchListener) -> Result<Watch, Error> {
        self.below.watch(path, listener)
    }
}
