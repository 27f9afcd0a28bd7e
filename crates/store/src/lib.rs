//! The xenstore: a small tree of values through which a domain, its devices and the tools find each other.
//!
//! A pure state machine: bytes of requests go in by [`Store::input`], bytes of replies and watch events come out by [`Store::output`]; sockets,
//! rings and threads are the caller's. What the monitor itself does to the tree goes through plain methods with the rights of
//! domain 0 ([`Store::write`] and its neighbours). Wire format and meaning: `docs/misc/xenstore.txt` and `public/io/xs_wire.h` of Xen.
//!
//! Transactions see a copy of each node made when they first touch it, and commit only if none of those nodes has changed since.
//!
//! What has to survive the process that holds it comes out as [`Record`]s and goes in again by [`Store::restore`].
//!
//! Refuses: watch depths, control commands that belong to xenstored's own insides (logs, live update).
//!
//! Invariants: every node but the root has a parent that lists it; a guest's requests cost bounded memory (see [`Quota`]); a message that breaks the
//! format ends its connection and nothing else.
//! Limits: 4096 bytes of payload, paths of 3072 bytes (2048 relative).
#![forbid(unsafe_code)]

pub mod access;
mod connection;
mod control;
mod local;
mod node;
mod outbox;
mod path;
mod populate;
mod quota;
mod record;
mod request;
mod restriction;
mod transaction;
mod tree;
mod watch;
pub mod wire;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use hospes_units::DomId;

pub use access::{DomainStore, GuestLink, Membership, NewNode, StoreAccess, Watch, WatchListener};
pub use local::LocalStore;
pub use node::{Access, Perm, Perms};
pub use outbox::{Message, Outbox};
pub use populate::{DomainEntry, domain_path, host_nodes, identity_nodes};
pub use quota::Quota;
pub use record::{Record, Stage};
pub use request::fuzz_requests;
pub use tree::Error;
pub use watch::WatchEvent;
pub use wire::{HEADER_BYTES, PAYLOAD_MAX, ProtocolError, Request};

use connection::Connection;
use transaction::Transaction;
use tree::{Caller, Tree};

/// A connection to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnId(u32);

/// Called when a connection has something to fetch; it must only wake somebody.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A domain that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    /// `None` where a tool has introduced it.
    uuid: Option<String>,
    stage: Stage,
}

/// The store.
pub struct Store {
    tree: Tree,
    connections: BTreeMap<ConnId, Connection>,
    next_connection: u32,
    /// The domains that are known.
    domains: BTreeMap<DomId, Known>,
    /// Domains that have the rights of another as well.
    targets: BTreeMap<DomId, DomId>,
    quota: Quota,
    /// What administrators asked to have logged.
    notices: Vec<String>,
}

impl Default for Store {
    fn default() -> Self {
        Store::new(Quota::default())
    }
}

impl Store {
    /// An empty store: a root that only domain 0 may write.
    pub fn new(quota: Quota) -> Store {
        Store {
            tree: Tree::new(),
            connections: BTreeMap::new(),
            next_connection: 1,
            domains: BTreeMap::new(),
            targets: BTreeMap::new(),
            quota,
            notices: Vec::new(),
        }
    }

    /// Opens a connection for a domain; domain 0 may do everything.
    pub fn connect(&mut self, domid: DomId, waker: Waker) -> ConnId {
        let id = ConnId(self.next_connection);
        self.next_connection += 1;
        self.connections.insert(id, Connection::new(domid, waker));
        id
    }

    /// Closes a connection with its watches and transactions.
    pub fn disconnect(&mut self, conn: ConnId) {
        self.connections.remove(&conn);
    }

    /// Takes bytes of requests, split anywhere, and carries out those that are complete. After an error the connection understands nothing more.
    pub fn input(&mut self, conn: ConnId, bytes: &[u8]) -> Result<(), ProtocolError> {
        match self.connections.get_mut(&conn) {
            Some(c) => c.receive(bytes),
            None => return Err(ProtocolError::Closed),
        }
        while let Some(connection) = self.connections.get_mut(&conn) {
            match connection.next_request()? {
                Some(request) => self.handle(conn, request),
                None => break,
            }
        }
        Ok(())
    }

    /// Carries out one request that was decoded already.
    pub fn request(&mut self, conn: ConnId, request: Request) {
        self.handle(conn, request);
    }

    /// Takes the next whole reply or event.
    pub fn next_message(&mut self, conn: ConnId) -> Option<Message> {
        self.connections.get_mut(&conn)?.next_message()
    }

    /// Moves bytes of replies and events into `buf`; returns how many.
    pub fn output(&mut self, conn: ConnId, buf: &mut [u8]) -> usize {
        self.connections.get_mut(&conn).map_or(0, |c| c.fetch(buf))
    }

    /// Whether there is something to fetch.
    pub fn has_output(&self, conn: ConnId) -> bool {
        self.connections
            .get(&conn)
            .is_some_and(Connection::has_output)
    }

    /// Whether a connection should be given more requests: not while it leaves too many replies unfetched.
    pub fn accepts_input(&self, conn: ConnId) -> bool {
        self.connections
            .get(&conn)
            .is_some_and(|c| c.unfetched_replies() < self.quota.outstanding)
    }

    /// Whether a connection of domain 0 let so many events wait that some were lost: it has to be closed.
    pub fn is_overrun(&self, conn: ConnId) -> bool {
        self.connections
            .get(&conn)
            .is_some_and(Connection::is_overrun)
    }

    /// Forgets everything about a connection but that it exists: a guest's new kernel starts over.
    pub fn reset(&mut self, conn: ConnId) {
        if let Some(c) = self.connections.get_mut(&conn) {
            c.reset();
        }
    }

    /// Fetches the next watch event of a connection that makes no requests by messages.
    pub fn next_event(&mut self, conn: ConnId) -> Option<WatchEvent> {
        self.connections.get_mut(&conn)?.next_event()
    }

    /// Watches a path and what is below it for a connection of the monitor; the first event comes at once.
    pub fn watch(&mut self, conn: ConnId, path: &str, token: &str) -> Result<(), Error> {
        self.add_watch(conn, path, token)?;
        self.send_first_event(conn, path, token);
        Ok(())
    }

    /// Ends a watch set by [`Store::watch`].
    pub fn unwatch(&mut self, conn: ConnId, path: &str, token: &str) -> Result<(), Error> {
        self.remove_watch(conn, path, token)
    }

    /// A node's value, with the rights of domain 0.
    pub fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        let path = path::absolute(path, DomId::HOST)?;
        Ok(self.tree.get(&path).ok_or(Error::NoEntry)?.value.clone())
    }

    /// A node's value as text; `None` where there is no such node or it is no text.
    pub fn read_text(&self, path: &str) -> Option<String> {
        String::from_utf8(self.read(path).ok()?).ok()
    }

    /// Names of a node's children.
    pub fn list(&self, path: &str) -> Result<Vec<String>, Error> {
        let path = path::absolute(path, DomId::HOST)?;
        let node = self.tree.get(&path).ok_or(Error::NoEntry)?;
        Ok(node.children.iter().cloned().collect())
    }

    /// Writes a node, making it and its parents where needed.
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), Error> {
        self.change(path, |tree, caller, path| tree.write(caller, path, value))
    }

    /// Makes a node without a value, where it does not exist.
    pub fn mkdir(&mut self, path: &str) -> Result<(), Error> {
        self.change(path, |tree, caller, path| tree.mkdir(caller, path))
    }

    /// Removes a node and all below it; nothing happens where only its parent exists.
    pub fn remove(&mut self, path: &str) -> Result<(), Error> {
        self.change(path, |tree, caller, path| tree.remove(caller, path))
    }

    /// Sets who may use a node.
    pub fn set_perms(&mut self, path: &str, perms: Perms) -> Result<(), Error> {
        self.change(path, |tree, caller, path| {
            tree.set_perms(caller, path, perms)
        })
    }

    /// Writes all nodes or none.
    pub fn write_all(&mut self, nodes: &[NewNode]) -> Result<(), Error> {
        let caller = Caller::host(&self.quota);
        let mut transaction = Transaction::default();
        let mut view = tree::View::Overlay(&self.tree, &mut transaction.overlay);
        for node in nodes {
            let path = path::absolute(&node.path, DomId::HOST)?;
            view.write(&caller, &path, &node.value)?;
            if let Some(perms) = &node.perms {
                view.set_perms(&caller, &path, perms.clone())?;
            }
        }
        let changes = transaction.commit(&mut self.tree, &caller)?;
        self.fire(&changes);
        Ok(())
    }

    fn change(
        &mut self,
        path: &str,
        op: impl FnOnce(&mut tree::View<'_>, &Caller, &str) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let path = path::absolute(path, DomId::HOST)?;
        let caller = Caller::host(&self.quota);
        let mut changes = Vec::new();
        let result = op(
            &mut tree::View::Direct(&mut self.tree, &mut changes),
            &caller,
            &path,
        );
        self.fire(&changes);
        result
    }
}
