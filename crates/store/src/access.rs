//! How the monitor's own code reaches the store, wherever it is: in the same process or in one of its own.
//!
//! All of it has the rights of domain 0. Calls block until they are done and may come from any thread.

use std::fmt;
use std::sync::Arc;

use crate::{Error, Perms};

/// Called with the path that changed: the watched one or one below it. The watched path itself means that anything below it may have
/// changed: so it is when the watch begins and after the store was restarted. Called from a thread of the store's client, which has to
/// come back soon and must not use the store.
pub type WatchListener = Arc<dyn Fn(&str) + Send + Sync>;

/// A node to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewNode {
    /// Absolute.
    pub path: String,
    pub value: Vec<u8>,
    /// `None` leaves those of a node that exists; a new one gets its parent's.
    pub perms: Option<Perms>,
}

impl NewNode {
    pub fn new(path: impl Into<String>, value: impl Into<Vec<u8>>, perms: &Perms) -> NewNode {
        NewNode {
            path: path.into(),
            value: value.into(),
            perms: Some(perms.clone()),
        }
    }
}

/// The store with the rights of domain 0. Paths are absolute.
pub trait StoreAccess: Send + Sync {
    /// A node's value; [`Error::NoEntry`] where there is no such node.
    fn read(&self, path: &str) -> Result<Vec<u8>, Error>;

    /// Writes a node, making it and its parents where needed.
    fn write(&self, path: &str, value: &[u8]) -> Result<(), Error>;

    /// Makes a node without a value, where it does not exist.
    fn mkdir(&self, path: &str) -> Result<(), Error>;

    /// Removes a node and all below it; nothing happens where only its parent exists.
    fn remove(&self, path: &str) -> Result<(), Error>;

    /// Names of a node's children.
    fn list(&self, path: &str) -> Result<Vec<String>, Error>;

    /// Sets who may use a node.
    fn set_perms(&self, path: &str, perms: &Perms) -> Result<(), Error>;

    /// Writes all nodes or none; nobody sees a part of them.
    fn write_all(&self, nodes: &[NewNode]) -> Result<(), Error>;

    /// Calls `listener` at once and then for each change of a node and of what is below it, until the watch is dropped.
    fn watch(&self, path: &str, listener: WatchListener) -> Result<Watch, Error>;

    /// A node's value as text; `None` where there is no such node, it is no text or the store is out of reach.
    fn read_text(&self, path: &str) -> Option<String> {
        String::from_utf8(self.read(path).ok()?).ok()
    }
}

/// A watch; dropping it ends it.
pub struct Watch {
    end: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Watch {
    /// `end` is called when the watch is dropped.
    pub fn new(end: impl FnOnce() + Send + Sync + 'static) -> Watch {
        Watch {
            end: Some(Box::new(end)),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            end();
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}
