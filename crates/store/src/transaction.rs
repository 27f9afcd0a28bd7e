//! Transactions: the nodes a transaction has touched, as it sees them.

use std::collections::BTreeMap;

use hospes_units::DomId;

use crate::node::{Node, Perms};
use crate::tree::{Caller, Change, Error, Tree};

/// A node as a transaction found it and as it left it.
#[derive(Debug)]
struct Touched {
    /// Its generation and permissions; `None` where it did not exist.
    found: Option<(u64, Perms)>,
    now: Option<Node>,
    changed: bool,
    /// What is to be told at the commit.
    told: Option<Told>,
}

/// That watches are to hear of a node.
#[derive(Clone, Copy, Debug)]
struct Told {
    /// Where among the others.
    order: usize,
    exact: bool,
}

impl Touched {
    /// What it counts for the limit on bytes. The path may be there twice: here, and in the change that is told at the commit.
    fn bytes(&self, path: &str) -> usize {
        let found = self.found.as_ref().map_or(0, |(_, perms)| perms.bytes());
        let now = self.now.as_ref().map_or(0, Node::bytes);
        size_of::<Touched>() + 2 * path.len() + found + now
    }
}

/// What a transaction has touched.
#[derive(Debug, Default)]
pub struct Overlay {
    touched: BTreeMap<String, Touched>,
    /// Of all in `touched`.
    bytes: usize,
    /// How many of them are to be told of.
    told: usize,
}

impl Overlay {
    pub fn get(
        &mut self,
        tree: &Tree,
        caller: &Caller<'_>,
        path: &str,
    ) -> Result<Option<&Node>, Error> {
        if !self.touched.contains_key(path) {
            if caller.is_limited() && self.touched.len() >= caller.quota.transaction_nodes {
                return Err(Error::NoSpace);
            }
            let node = tree.get(path);
            let touched = Touched {
                found: node.map(|n| (n.generation, n.perms.clone())),
                now: node.cloned(),
                changed: false,
                told: None,
            };
            let bytes = touched.bytes(path);
            self.check_room(caller, bytes)?;
            self.bytes += bytes;
            self.touched.insert(path.to_owned(), touched);
        }
        Ok(self.touched.get(path).and_then(|t| t.now.as_ref()))
    }

    /// What it counts for the limit on bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether this many bytes more may be held.
    pub fn check_room(&self, caller: &Caller<'_>, more: usize) -> Result<(), Error> {
        if caller.is_limited() && self.bytes + more > caller.quota.transaction_bytes {
            return Err(Error::NoSpace);
        }
        Ok(())
    }

    /// Changes a node; one that was not asked for before was found absent.
    pub fn put(&mut self, path: &str, node: Option<Node>) {
        if let Some(old) = self.touched.get(path) {
            self.bytes -= old.bytes(path);
        }
        let touched = self.touched.entry(path.to_owned()).or_insert(Touched {
            found: None,
            now: None,
            changed: false,
            told: None,
        });
        touched.now = node;
        touched.changed = true;
        self.bytes += touched.bytes(path);
    }

    /// Has a node told of at the commit, once however often it changes. That it went with its parent is not said where something else happened to it.
    pub fn note(&mut self, path: &str, exact: bool) {
        if let Some(touched) = self.touched.get_mut(path) {
            let order = self.told;
            let told = touched.told.get_or_insert_with(|| {
                self.told += 1;
                Told { order, exact }
            });
            told.exact &= exact;
        }
    }

    /// Nodes a domain would own after the commit.
    pub fn owned_by(&self, tree: &Tree, domid: DomId) -> usize {
        let owns = |owner: Option<DomId>| usize::from(owner == Some(domid));
        let (mut more, mut less) = (0, 0);
        for t in self.touched.values().filter(|t| t.changed) {
            more += owns(t.now.as_ref().map(|n| n.perms.owner));
            less += owns(t.found.as_ref().map(|(_, perms)| perms.owner));
        }
        (tree.owned_by(domid) + more).saturating_sub(less)
    }

    /// Nodes that there would be after the commit and are not before it.
    fn created(&self) -> usize {
        let is_new = |t: &&Touched| t.found.is_none() && t.now.is_some();
        self.touched.values().filter(is_new).count()
    }

    /// Whether every node touched is as it was found.
    fn is_current(&self, tree: &Tree) -> bool {
        self.touched.iter().all(|(path, t)| {
            tree.get(path).map(|n| n.generation) == t.found.as_ref().map(|(found, _)| *found)
        })
    }
}

/// An open transaction.
#[derive(Debug, Default)]
pub struct Transaction {
    pub overlay: Overlay,
    /// What it did before is not known any more.
    pub lost: bool,
}

impl Transaction {
    /// One of which nothing is known but that it was open.
    pub fn lost() -> Transaction {
        Transaction {
            lost: true,
            ..Transaction::default()
        }
    }

    /// Applies everything, or nothing where another change came in between; the changes are to be told then.
    pub fn commit(self, tree: &mut Tree, caller: &Caller<'_>) -> Result<Vec<Change>, Error> {
        if self.lost || !self.overlay.is_current(tree) {
            return Err(Error::Again);
        }
        let after = self.overlay.owned_by(tree, caller.domid);
        if !caller.is_privileged()
            && after > caller.quota.nodes
            && after > tree.owned_by(caller.domid)
        {
            return Err(Error::NoSpace);
        }
        if let Some(reach) = caller.reach {
            reach.check_nodes(tree, self.overlay.created())?;
        }
        let mut told = Vec::with_capacity(self.overlay.told);
        for (path, t) in self.overlay.touched {
            match t.now {
                _ if !t.changed => {}
                Some(node) => tree.put(&path, node),
                None => tree.delete(&path),
            }
            told.extend(t.told.map(|told| (told, path, t.found)));
        }
        told.sort_unstable_by_key(|(told, ..)| told.order);
        let change = |(told, path, found): (Told, String, Option<(u64, Perms)>)| {
            let before = found.map(|(_, perms)| perms);
            Change {
                perms: before
                    .into_iter()
                    .chain(tree.perms_to_hear(&path))
                    .collect(),
                path,
                exact: told.exact,
            }
        };
        Ok(told.into_iter().map(change).collect())
    }
}
