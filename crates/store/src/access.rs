//! How the monitor's own code reaches the store, wherever it is: in the same process or in one of its own.
//!
//! All of it has the rights of domain 0. Calls block until they are done and may come from any thread.

use std::fmt;
use std::sync::Arc;

use crate::{DomainEntry, Error, Perms, ProtocolError, Waker};

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

/// A guest's connection to the store, as the bytes that its ring carries.
pub trait GuestLink: Send {
    /// Takes bytes of requests, split anywhere. After an error nothing more is understood until a reset.
    fn input(&mut self, bytes: &[u8]) -> Result<(), ProtocolError>;

    /// Moves bytes of replies and events into `buf`; returns how many.
    fn output(&mut self, buf: &mut [u8]) -> usize;

    /// Whether requests may come: false while too many replies wait to be fetched.
    fn accepts_input(&mut self) -> bool;

    /// The guest starts over: watches, transactions and half-sent messages are forgotten.
    fn reset(&mut self);
}

/// The store as a domain needs it.
pub trait DomainStore: Send + Sync {
    fn access(&self) -> Arc<dyn StoreAccess>;

    /// Enters a domain with its nodes, introduces it to those who watch for domains, and opens its guest's connection, which has the guest's rights
    /// only. `waker` is called when the connection has something to fetch; it must only wake somebody. When the membership is dropped, the
    /// domain's nodes are removed with it: its home, those of its devices in other domains and what the tools keep about it.
    fn add_domain(
        &self,
        entry: &DomainEntry,
        waker: Waker,
    ) -> Result<(Box<dyn GuestLink>, Membership), Error>;
}

macro_rules! guard {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub struct $name {
            end: Option<Box<dyn FnOnce() + Send + Sync>>,
        }

        impl $name {
            /// `end` is called when this is dropped.
            pub fn new(end: impl FnOnce() + Send + Sync + 'static) -> $name {
                $name {
                    end: Some(Box::new(end)),
                }
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                if let Some(end) = self.end.take() {
                    end();
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    };
}

guard!(
    /// A watch; dropping it ends it.
    Watch
);
guard!(
    /// That the store knows a domain; dropping it takes the domain out of the store.
    Membership
);
