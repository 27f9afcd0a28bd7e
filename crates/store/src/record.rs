//! What has to outlive the process that holds a store: every change as a record, to be written down and read back.
//!
//! Children are not recorded: a node's path says whose child it is. Neither are transactions: an open one is lost with the process, and
//! its owner is told to try again.

use hospes_units::DomId;

use crate::node::{Node, Perms};
use crate::transaction::Transaction;
use crate::{ConnId, Error, Known, Store, path};

/// Transactions of a connection that are opened again: more than a guest has, unless an administrator lets it.
const REOPENED_MAX: usize = 1024;

/// How far a domain has come, as those know who watch for domains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// They have not been told of it: its nodes may not be there yet.
    Entered,
    Introduced,
    /// They have been told that it has shut down, and it has not gone on since.
    ShutDown,
}

/// A change to the tree or to the domains that are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A node has this value and these permissions; it may be new, and then its parent is there. Also of a path that is no node but has permissions.
    Node {
        path: String,
        value: Vec<u8>,
        perms: Perms,
    },
    /// A node is no more; those below it have records of their own.
    NoNode { path: String },
    /// A domain is known, and so far has it come.
    Domain {
        domid: DomId,
        uuid: Option<String>,
        stage: Stage,
    },
    /// A domain is no longer known.
    NoDomain { domid: DomId },
    /// `domid` may do what `target` may.
    Target { domid: DomId, target: DomId },
}

impl Store {
    /// Begins to record changes; those before are in [`Store::snapshot`].
    pub fn start_recording(&mut self) {
        self.tree.start_recording();
    }

    /// Takes the changes since the last time.
    pub fn take_records(&mut self) -> Vec<Record> {
        self.tree.take_records()
    }

    /// Records that lead from an empty store to this one.
    pub fn snapshot(&self) -> Vec<Record> {
        let nodes = self.tree.nodes().map(|(path, node)| Record::Node {
            path: path.clone(),
            value: node.value.clone(),
            perms: node.perms.clone(),
        });
        let domains = self.domains.iter().map(|(domid, known)| Record::Domain {
            domid: *domid,
            uuid: known.uuid.clone(),
            stage: known.stage,
        });
        let targets = self.targets.iter().map(|(domid, target)| Record::Target {
            domid: *domid,
            target: *target,
        });
        let specials = self.tree.specials().map(|(path, perms)| Record::Node {
            path: path.to_owned(),
            value: Vec::new(),
            perms: perms.clone(),
        });
        let all = nodes.chain(specials).chain(domains).chain(targets);
        all.collect()
    }

    /// Repeats a recorded change, without telling anybody. False where the record cannot follow on those before it.
    pub fn restore(&mut self, record: &Record) -> bool {
        match record {
            Record::Node { path, value, perms } => self.restore_node(path, value, perms),
            Record::NoNode { path } => {
                if let Some((parent, name)) = path::split(path) {
                    self.tree.remove_child(parent, name);
                }
                self.tree.delete(path);
                true
            }
            Record::Domain { domid, uuid, stage } => {
                let (uuid, stage) = (uuid.clone(), *stage);
                self.domains.insert(*domid, Known { uuid, stage });
                true
            }
            Record::NoDomain { domid } => {
                self.domains.remove(domid);
                self.forget_target(*domid);
                true
            }
            Record::Target { domid, target } => {
                self.targets.insert(*domid, *target);
                true
            }
        }
    }

    fn restore_node(&mut self, path: &str, value: &[u8], perms: &Perms) -> bool {
        if self.tree.set_special_perms(path, perms.clone()) {
            return true;
        }
        if path::absolute(path, DomId::HOST).as_deref() != Ok(path) {
            return false;
        }
        if let Some((parent, name)) = path::split(path)
            && !self.tree.add_child(parent, name)
        {
            return false;
        }
        let children = self.tree.get(path).map(|n| n.children.clone());
        self.tree.put(
            path,
            Node {
                value: value.to_vec(),
                children: children.unwrap_or_default(),
                perms: perms.clone(),
                generation: 0,
            },
        );
        true
    }

    /// Sets a watch that was set before the store was restored; no first event follows. The limit may have been another one then.
    pub fn restore_watch(&mut self, conn: ConnId, path: &str, token: &str) -> Result<(), Error> {
        self.add_watch_within(None, conn, path, token)
    }

    /// A connection's watches: paths as they were given, and tokens.
    pub fn watches(&self, conn: ConnId) -> Vec<(String, String)> {
        let connection = self.connections.get(&conn);
        let watches = connection.map_or(&[][..], |c| &c.watches);
        watches
            .iter()
            .map(|w| (w.shown(&w.path).to_owned(), w.token.clone()))
            .collect()
    }

    /// Opens a transaction again that was open before the store was restored: it can be used, but its end is that it has to be tried again.
    /// Does nothing where the connection has a transaction with this number, or very many.
    pub fn reopen_transaction(&mut self, conn: ConnId, id: u32) {
        if let Some(connection) = self.connections.get_mut(&conn)
            && id != 0
            && connection.transactions.len() < REOPENED_MAX
        {
            connection
                .transactions
                .entry(id)
                .or_insert_with(Transaction::lost);
        }
    }

    /// Forgets a transaction that was opened again though it had ended.
    pub fn close_transaction(&mut self, conn: ConnId, id: u32) {
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.transactions.remove(&id);
        }
    }

    /// The same of all that a connection has.
    pub fn close_transactions(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.transactions.clear();
        }
    }
}
