//! The tree and the operations on it, directly or inside a transaction.

use std::collections::BTreeMap;

use hospes_units::DomId;

use crate::node::{Access, Node, Perms};
use crate::path;
use crate::quota::Quota;
use crate::record::Record;
use crate::restriction::Reach;
use crate::transaction::Overlay;

/// Why a request failed; the wire carries the name (`public/io/xs_wire.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the path or argument is malformed")]
    Invalid,
    #[error("permission is missing")]
    Access,
    #[error("it exists already")]
    Exists,
    #[error("there is no such node")]
    NoEntry,
    #[error("the quota of the domain is used up")]
    NoSpace,
    #[error("the store does not do this")]
    NotImplemented,
    #[error("a transaction is open already")]
    Busy,
    #[error("another change came in between: try again")]
    Again,
    #[error("the answer is too long for one message")]
    TooBig,
    #[error("the store process cannot be reached or started: see `store.log` among the logs")]
    Unreachable,
    #[error(
        "the store process waits, as the file system with its directory is full: make room there"
    )]
    Full,
    #[error(
        "the store process is of another version of hospes, and domains that need it run: shut them down, or save them before and restore them behind the change of versions"
    )]
    OtherVersion,
}

impl Error {
    /// The error with this name on the wire; one that this store does not know is [`Error::Invalid`].
    pub fn from_name(name: &str) -> Error {
        use Error::*;
        let all = [
            Access,
            Exists,
            NoEntry,
            NoSpace,
            NotImplemented,
            Busy,
            Again,
            TooBig,
            Unreachable,
        ];
        all.into_iter()
            .find(|e| e.name() == name)
            .unwrap_or(Invalid)
    }

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Error::Invalid => "EINVAL",
            Error::Access => "EACCES",
            Error::Exists => "EEXIST",
            Error::NoEntry => "ENOENT",
            Error::NoSpace => "ENOSPC",
            Error::NotImplemented => "ENOSYS",
            Error::Busy => "EBUSY",
            Error::Again => "EAGAIN",
            Error::TooBig => "E2BIG",
            // None comes from the store process.
            Error::Unreachable | Error::Full | Error::OtherVersion => "EIO",
        }
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    pub domid: DomId,
    /// Whose rights it has as well.
    pub target: Option<DomId>,
    /// What it may reach; `None` where permissions alone decide.
    pub reach: Option<Reach<'a>>,
    pub quota: &'a Quota,
}

impl<'a> Caller<'a> {
    /// Domain 0.
    pub fn host(quota: &'a Quota) -> Caller<'a> {
        Caller {
            domid: DomId::HOST,
            target: None,
            reach: None,
            quota,
        }
    }

    pub fn is_privileged(&self) -> bool {
        self.domid == DomId::HOST
    }

    /// Whether its transactions are limited.
    pub fn is_limited(&self) -> bool {
        !self.is_privileged() || self.reach.is_some()
    }

    /// Refuses a path that is out of its reach.
    pub fn check_reach(&self, path: &str) -> Result<(), Error> {
        match self.reach {
            Some(reach) if !reach.holds(path) => Err(Error::Access),
            _ => Ok(()),
        }
    }

    /// Refuses a path in its reach that it may only look at.
    pub fn check_change(&self, path: &str) -> Result<(), Error> {
        match self.reach {
            Some(reach) if !reach.may_change(path) => Err(Error::Access),
            _ => Ok(()),
        }
    }

    /// What it may do to a node with these permissions.
    pub fn access(&self, perms: &Perms) -> Access {
        perms.access_with(self.domid, self.target)
    }

    /// Whether it may set these permissions anew.
    pub fn owns(&self, perms: &Perms) -> bool {
        self.is_privileged() || [Some(self.domid), self.target].contains(&Some(perms.owner))
    }

    /// Refuses permissions with more entries than a node of its may have.
    pub fn check_entries(&self, perms: &Perms) -> Result<(), Error> {
        if self.is_limited() && perms.exceptions.len() + 1 > self.quota.perms {
            return Err(Error::NoSpace);
        }
        Ok(())
    }
}

/// Something that watches may want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub path: String,
    /// Of the node as it was or is, and of its parent: whoever may read by one of them hears of the change.
    pub perms: Vec<Perms>,
    /// Only watches of exactly this path hear of it: it went with its parent.
    pub exact: bool,
}

/// All nodes by path.
#[derive(Debug)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
    generation: u64,
    /// Permissions of the paths that are no nodes: who may read is told of what happens there.
    specials: BTreeMap<&'static str, Perms>,
    /// Nodes each guest owns.
    owned: BTreeMap<DomId, usize>,
    /// Changes to be written down; `None` where nobody wants them.
    records: Option<Vec<Record>>,
}

impl Tree {
    pub fn new() -> Tree {
        let root = Node {
            value: Vec::new(),
            children: Default::default(),
            perms: Perms::owned(DomId::HOST),
            generation: 0,
        };
        Tree {
            nodes: BTreeMap::from([("/".to_owned(), root)]),
            specials: path::SPECIALS
                .map(|p| (p, Perms::owned(DomId::HOST)))
                .into(),
            generation: 0,
            owned: BTreeMap::new(),
            records: None,
        }
    }

    pub fn start_recording(&mut self) {
        self.records = Some(Vec::new());
    }

    pub fn take_records(&mut self) -> Vec<Record> {
        self.records
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    pub fn record(&mut self, record: impl FnOnce() -> Record) {
        if let Some(records) = &mut self.records {
            records.push(record());
        }
    }

    /// Adds a name to a node's children, for a node that is restored; false where the parent is not there.
    pub fn add_child(&mut self, parent: &str, name: &str) -> bool {
        self.nodes
            .get_mut(parent)
            .map(|n| n.children.insert(name.to_owned()))
            .is_some()
    }

    pub fn remove_child(&mut self, parent: &str, name: &str) {
        if let Some(parent) = self.nodes.get_mut(parent) {
            parent.children.remove(name);
        }
    }

    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// The permissions by which one hears of what happens to a node: its own and its parent's. None of a node that does not exist.
    pub fn perms_to_hear(&self, path: &str) -> Vec<Perms> {
        let Some(node) = self.get(path) else {
            return Vec::new();
        };
        let parent = path::split(path).and_then(|(parent, _)| self.get(parent));
        let nodes = [Some(node), parent].into_iter().flatten();
        nodes.map(|n| n.perms.clone()).collect()
    }

    /// The paths that are no nodes, and their permissions.
    pub fn specials(&self) -> impl Iterator<Item = (&'static str, &Perms)> {
        self.specials.iter().map(|(path, perms)| (*path, perms))
    }

    pub fn special_perms(&self, path: &str) -> Option<&Perms> {
        self.specials.get(path)
    }

    /// Sets the permissions of a path that is no node; false where there is none like this.
    pub fn set_special_perms(&mut self, path: &str, perms: Perms) -> bool {
        let Some(known) = self.specials.get_mut(path) else {
            return false;
        };
        *known = perms.clone();
        self.record(|| Record::Node {
            path: path.to_owned(),
            value: Vec::new(),
            perms,
        });
        true
    }

    /// That something has happened at a path that is no node.
    pub fn special_change(&self, path: &'static str) -> Change {
        Change {
            path: path.to_owned(),
            perms: self.special_perms(path).cloned().into_iter().collect(),
            exact: true,
        }
    }

    /// All nodes, parents before their children.
    pub fn nodes(&self) -> impl Iterator<Item = (&String, &Node)> {
        self.nodes.iter()
    }

    /// How many nodes there are at a path and below it.
    pub fn count_within(&self, path: &str) -> usize {
        // The character behind the slash.
        let below = (format!("{path}/"), format!("{path}0"));
        let below = self.nodes.range(below.0..below.1).count();
        usize::from(self.nodes.contains_key(path)) + below
    }

    pub fn owned_by(&self, domid: DomId) -> usize {
        self.owned.get(&domid).copied().unwrap_or(0)
    }

    pub fn put(&mut self, path: &str, mut node: Node) {
        self.generation += 1;
        node.generation = self.generation;
        let owner = node.perms.owner;
        // Often only the names of children differ, which are not recorded.
        let differs = |old: &Node| old.value != node.value || old.perms != node.perms;
        if self.records.is_some() && self.nodes.get(path).is_none_or(differs) {
            let (value, perms) = (node.value.clone(), node.perms.clone());
            self.record(|| Record::Node {
                path: path.to_owned(),
                value,
                perms,
            });
        }
        let old = self.nodes.insert(path.to_owned(), node);
        *self.owned.entry(owner).or_default() += 1;
        if let Some(old) = old {
            self.forget_owner(old.perms.owner);
        }
    }

    pub fn delete(&mut self, path: &str) {
        self.generation += 1;
        if let Some(old) = self.nodes.remove(path) {
            self.forget_owner(old.perms.owner);
            self.record(|| Record::NoNode {
                path: path.to_owned(),
            });
        }
    }

    fn forget_owner(&mut self, owner: DomId) {
        if let Some(count) = self.owned.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                self.owned.remove(&owner);
            }
        }
    }
}

/// The tree as one request sees it: itself, or through a transaction.
pub enum View<'a> {
    /// With the changes that are to be told.
    Direct(&'a mut Tree, &'a mut Vec<Change>),
    Overlay(&'a Tree, &'a mut Overlay),
}

impl View<'_> {
    fn get(&mut self, caller: &Caller<'_>, path: &str) -> Result<Option<&Node>, Error> {
        match self {
            View::Direct(tree, _) => Ok(tree.get(path)),
            View::Overlay(tree, overlay) => overlay.get(tree, caller, path),
        }
    }

    /// Refuses to have this many bytes more of nodes' contents in a transaction. What they take the place of is not counted off: near the limit a
    /// little too much is refused.
    fn check_room(&self, caller: &Caller<'_>, bytes: usize) -> Result<(), Error> {
        match self {
            View::Direct(..) => Ok(()),
            View::Overlay(_, overlay) => overlay.check_room(caller, bytes),
        }
    }

    /// Only for paths that were asked for before.
    fn put(&mut self, path: &str, node: Node) {
        match self {
            View::Direct(tree, _) => tree.put(path, node),
            View::Overlay(_, overlay) => overlay.put(path, Some(node)),
        }
    }

    fn delete(&mut self, path: &str) {
        match self {
            View::Direct(tree, _) => tree.delete(path),
            View::Overlay(_, overlay) => overlay.put(path, None),
        }
    }

    fn owned_by(&self, domid: DomId) -> usize {
        match self {
            View::Direct(tree, _) => tree.owned_by(domid),
            View::Overlay(tree, overlay) => overlay.owned_by(tree, domid),
        }
    }

    /// Notes that a node changes, which is there: before it goes, or after all else. `before`: its permissions, where they were others.
    fn note(&mut self, path: &str, before: Option<Perms>, exact: bool) {
        match self {
            View::Direct(tree, changes) => changes.push(Change {
                path: path.to_owned(),
                perms: before.into_iter().chain(tree.perms_to_hear(path)).collect(),
                exact,
            }),
            View::Overlay(_, overlay) => overlay.note(path, exact),
        }
    }

    /// The node, if the caller may read it.
    pub fn readable(&mut self, caller: &Caller<'_>, path: &str) -> Result<&Node, Error> {
        // To a caller that may not read the parent either, a node that does not exist looks like one it may not read.
        if self.get(caller, path)?.is_none() {
            let parent = self.nearest(caller, path)?;
            let may_look = self
                .get(caller, &parent)?
                .is_some_and(|n| caller.access(&n.perms).may_read());
            return Err(if may_look {
                Error::NoEntry
            } else {
                Error::Access
            });
        }
        match self.get(caller, path)? {
            Some(node) if caller.access(&node.perms).may_read() => Ok(node),
            _ => Err(Error::Access),
        }
    }

    /// The nearest ancestor that exists.
    fn nearest(&mut self, caller: &Caller<'_>, path: &str) -> Result<String, Error> {
        let mut at = path;
        while let Some((parent, _)) = path::split(at) {
            if self.get(caller, parent)?.is_some() {
                return Ok(parent.to_owned());
            }
            at = parent;
        }
        Ok("/".to_owned())
    }

    fn check_size(caller: &Caller<'_>, node: &Node) -> Result<(), Error> {
        if !caller.is_privileged() && node.bytes() > caller.quota.node_bytes {
            return Err(Error::NoSpace);
        }
        Ok(())
    }

    /// Makes a node that does not exist, and its parents.
    fn create(&mut self, caller: &Caller<'_>, path: &str, value: &[u8]) -> Result<(), Error> {
        let base = self.nearest(caller, path)?;
        let Some(ancestor) = self.get(caller, &base)?.cloned() else {
            return Err(Error::NoEntry);
        };
        if !caller.access(&ancestor.perms).may_write() {
            return Err(Error::Access);
        }
        let mut perms = ancestor.perms.clone();
        if !caller.is_privileged() {
            perms.owner = caller.domid;
        }
        let names: Vec<&str> = path[base.len()..]
            .split('/')
            .filter(|n| !n.is_empty())
            .collect();
        if !caller.is_privileged() && self.owned_by(caller.domid) + names.len() > caller.quota.nodes
        {
            return Err(Error::NoSpace);
        }
        let mut new = vec![(base.clone(), ancestor)];
        for (i, name) in names.iter().enumerate() {
            let (parent_path, parent) = &mut new[i];
            parent.children.insert((*name).to_owned());
            Self::check_size(caller, parent)?;
            let path = path::join(parent_path, name);
            let last = i + 1 == names.len();
            let node = Node {
                value: if last { value.to_vec() } else { Vec::new() },
                children: Default::default(),
                perms: perms.clone(),
                generation: 0,
            };
            Self::check_size(caller, &node)?;
            new.push((path, node));
        }
        self.check_room(caller, new.iter().map(|(_, node)| node.bytes()).sum())?;
        // Of a transaction they are counted at its end.
        if let (Some(reach), View::Direct(tree, _)) = (caller.reach, &*self) {
            reach.check_nodes(tree, names.len())?;
        }
        for (path, node) in new {
            self.put(&path, node);
        }
        self.note(path, None, false);
        Ok(())
    }

    pub fn write(&mut self, caller: &Caller<'_>, path: &str, value: &[u8]) -> Result<(), Error> {
        let Some(node) = self.get(caller, path)? else {
            return self.create(caller, path, value);
        };
        if !caller.access(&node.perms).may_write() {
            return Err(Error::Access);
        }
        let mut node = node.clone();
        node.value = value.to_vec();
        Self::check_size(caller, &node)?;
        self.check_room(caller, node.bytes())?;
        self.put(path, node);
        self.note(path, None, false);
        Ok(())
    }

    pub fn mkdir(&mut self, caller: &Caller<'_>, path: &str) -> Result<(), Error> {
        match self.get(caller, path)? {
            None => self.create(caller, path, &[]),
            Some(node) if caller.access(&node.perms).may_write() => Ok(()),
            Some(_) => Err(Error::Access),
        }
    }

    pub fn remove(&mut self, caller: &Caller<'_>, path: &str) -> Result<(), Error> {
        let Some((parent_path, name)) = path::split(path) else {
            return Err(Error::Invalid);
        };
        let Some(node) = self.get(caller, path)? else {
            let parent = self.get(caller, parent_path)?.ok_or(Error::NoEntry)?;
            return match caller.access(&parent.perms).may_write() {
                true => Ok(()),
                false => Err(Error::Access),
            };
        };
        if !caller.access(&node.perms).may_write() {
            return Err(Error::Access);
        }
        // Touch all of them first: inside a transaction each may exceed the limit, and then nothing is removed.
        let mut gone = vec![(path.to_owned(), node.clone())];
        let mut next = 0;
        while next < gone.len() {
            let (at, node) = gone[next].clone();
            for child in &node.children {
                let child = path::join(&at, child);
                if let Some(node) = self.get(caller, &child)?.cloned() {
                    gone.push((child, node));
                }
            }
            next += 1;
        }
        let parent = self.get(caller, parent_path)?.cloned();
        // From below, as Xen does: who hears of a node that goes with its parent depends on both.
        for (i, (path, _)) in gone.iter().enumerate().rev() {
            self.note(path, None, i > 0);
            self.delete(path);
        }
        if let Some(mut parent) = parent {
            parent.children.remove(name);
            self.put(parent_path, parent);
        }
        Ok(())
    }

    pub fn set_perms(
        &mut self,
        caller: &Caller<'_>,
        path: &str,
        perms: Perms,
    ) -> Result<(), Error> {
        let mut node = self.readable(caller, path)?.clone();
        if let Some(reach) = caller.reach
            && !reach.may_give_to(perms.owner)
        {
            return Err(Error::Access);
        }
        if !caller.is_privileged()
            && (node.perms.owner != caller.domid || perms.owner != caller.domid)
        {
            return Err(Error::Access);
        }
        caller.check_entries(&perms)?;
        let before = std::mem::replace(&mut node.perms, perms);
        Self::check_size(caller, &node)?;
        self.check_room(caller, node.bytes())?;
        self.put(path, node);
        self.note(path, Some(before), false);
        Ok(())
    }
}
