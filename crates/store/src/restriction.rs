//! Connections of domain 0 that are restricted to what belongs to one domain.
//!
//! Whoever serves a domain needs domain 0's rights for the domain's own nodes and for its devices, and nothing else. What it may reach does not
//! depend on permissions or on what nodes say, for it could change those: only on the domain's number, and on the UUID by which the store
//! knows the domain.

use hospes_units::DomId;

use crate::populate::IDENTITY;
use crate::quota::Quota;
use crate::tree::Tree;
use crate::wire::kind;
use crate::{ConnId, Error, Store, Waker, domain_path, path};

/// The kinds of devices that have a back end. A fixed list: the directories of the kinds are shared by all domains and outlive them.
const DEVICE_KINDS: [&str; 2] = ["vbd", "vif"];

/// The kind of devices whose scripts, which may be root's, read what they are to do in the directory of the back end.
const SCRIPTED_KIND: &str = "vif";

const UUID_MAX: usize = 64;

/// What a restricted connection may use of the store: more than any domain needs, and little enough that the store goes on.
pub(crate) static QUOTA: Quota = Quota {
    // All within its reach, whoever owns them.
    nodes: 8192,
    watches: 1024,
    transactions: 16,
    // Of messages' payloads and of `nodes` follows a bound on the bytes of nodes.
    node_bytes: usize::MAX,
    perms: 5,
    outstanding: 20,
    transaction_nodes: 8192,
    transaction_bytes: 8 << 20,
    events: 1024,
};

/// That a connection is restricted, and to what.
#[derive(Debug)]
pub(crate) struct Restriction {
    pub domid: DomId,
    uuid: String,
    /// What the domain is called when it is entered.
    name: String,
    /// Nothing is in reach any more: the domain has been taken out.
    ended: bool,
    home: String,
    /// What is always the domain's.
    roots: Vec<String>,
    /// Where the back ends of its devices with scripts are.
    scripted: String,
    /// What is the domain's as long as the store knows it by this UUID.
    vm: String,
}

/// What a restricted connection may reach at the moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reach<'a> {
    domid: DomId,
    home: &'a str,
    roots: &'a [String],
    scripted: &'a str,
    vm: Option<&'a str>,
}

impl Restriction {
    fn new(domid: DomId, uuid: &str, name: &str) -> Restriction {
        let host = domain_path(DomId::HOST);
        let mut roots = vec![domain_path(domid), format!("/libxl/{domid}")];
        for kind in DEVICE_KINDS {
            roots.push(format!("{host}/backend/{kind}/{domid}"));
            roots.push(format!("{host}/error/backend/{kind}/{domid}"));
        }
        Restriction {
            domid,
            uuid: uuid.to_owned(),
            name: name.to_owned(),
            ended: false,
            home: domain_path(domid),
            roots,
            scripted: scripted_path(domid),
            vm: vm_path(uuid),
        }
    }

    /// What may be reached where the store knows the domain by this UUID, or does not.
    pub fn reach(&self, is_known: bool) -> Reach<'_> {
        let (roots, vm) = match self.ended {
            true => (&[][..], None),
            false => (&self.roots[..], is_known.then_some(&self.vm[..])),
        };
        Reach {
            domid: self.domid,
            home: &self.home,
            roots,
            scripted: &self.scripted,
            vm,
        }
    }
}

/// What the tools keep by the UUID of a domain.
fn vm_path(uuid: &str) -> String {
    format!("/vm/{uuid}")
}

/// Where the back ends of a domain's devices with scripts are.
pub(crate) fn scripted_path(domid: DomId) -> String {
    let host = domain_path(DomId::HOST);
    format!("{host}/backend/{SCRIPTED_KIND}/{domid}")
}

/// Whether a node of a back end's directory says how it serves the device: scripts have no use for that.
fn is_of_service(name: &str) -> bool {
    matches!(name, "state" | "online" | "multi-queue-max-queues") || name.starts_with("feature-")
}

impl Reach<'_> {
    /// Whether an absolute path is in reach.
    pub fn holds(&self, path: &str) -> bool {
        let mut roots = self.roots.iter().map(String::as_str).chain(self.vm);
        roots.any(|root| path::is_within(path, root))
    }

    /// Whether what is in reach at an absolute path may be changed. Not what says who the domain is, nor what scripts read to know what they are to do, nor the
    /// directories that these are in: whoever could change who may use those, or remove them, could change what is in them.
    pub fn may_change(&self, path: &str) -> bool {
        if path::is_within(path, self.home) {
            let name = path[self.home.len()..].split('/').nth(1);
            return name.is_some_and(|name| !IDENTITY.contains(&name));
        }
        if !path::is_within(path, self.scripted) {
            return self.vm.is_none_or(|vm| !path::is_within(path, vm));
        }
        let mut below = path[self.scripted.len()..].split('/').skip(2);
        below.next().is_some_and(is_of_service)
    }

    /// Whether nodes may be given to a domain: another's would count for its quota.
    pub fn may_give_to(&self, owner: DomId) -> bool {
        owner == DomId::HOST || owner == self.domid
    }

    /// Refuses to have `more` nodes in reach where they would be too many.
    pub fn check_nodes(&self, tree: &Tree, more: usize) -> Result<(), Error> {
        let roots = self.roots.iter().map(String::as_str).chain(self.vm);
        let nodes: usize = roots.map(|root| tree.count_within(root)).sum();
        if more > 0 && nodes + more > QUOTA.nodes {
            return Err(Error::NoSpace);
        }
        Ok(())
    }
}

/// Whether a restricted connection may make a request of this kind at all.
pub(crate) fn allows(request: u32) -> bool {
    matches!(
        request,
        kind::DIRECTORY
            | kind::READ
            | kind::GET_PERMS
            | kind::DIRECTORY_PART
            | kind::WRITE
            | kind::MKDIR
            | kind::RM
            | kind::SET_PERMS
            | kind::WATCH
            | kind::UNWATCH
            | kind::RESET_WATCHES
            | kind::TRANSACTION_START
            | kind::TRANSACTION_END
            | kind::INTRODUCE
    )
}

/// Whether a text can stand for a UUID in a path.
fn is_uuid(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    !text.is_empty() && text.len() <= UUID_MAX && text.bytes().all(legal)
}

impl Store {
    /// Opens a connection that has the rights of domain 0 for what belongs to one domain, and no other rights. A domain that it enters has this UUID and
    /// name.
    pub fn connect_restricted(
        &mut self,
        domid: DomId,
        uuid: &str,
        name: &str,
        waker: Waker,
    ) -> Result<ConnId, Error> {
        if domid == DomId::HOST || !is_uuid(uuid) {
            return Err(Error::Invalid);
        }
        let conn = self.connect(DomId::HOST, waker);
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.restrict(Restriction::new(domid, uuid, name));
        }
        Ok(conn)
    }

    /// Whether a restricted connection may make its domain known, and with which UUID and name. Not where the store knows the domain by another UUID: it has
    /// given this one up. A domain that is known keeps its name, which may be a new one.
    pub fn may_enter(&self, conn: ConnId, domid: DomId) -> Result<(String, String), Error> {
        let connection = self.connections.get(&conn);
        let restriction = connection.and_then(|c| c.restriction.as_deref());
        let restriction = restriction.ok_or(Error::Access)?;
        let known = self.uuid_of(domid);
        let is_its = known.is_none_or(|known| *known == restriction.uuid);
        if restriction.ended || restriction.domid != domid || !is_its {
            return Err(Error::Access);
        }
        let name = known.and_then(|_| self.read_text(&format!("{}/name", restriction.home)));
        let name = name.unwrap_or_else(|| restriction.name.clone());
        Ok((restriction.uuid.clone(), name))
    }

    /// The domain that a connection is restricted to; `None` for one that is not restricted. [`Error::Access`] where its time is over.
    pub fn restricted_to(&self, conn: ConnId) -> Result<Option<DomId>, Error> {
        let connection = self.connections.get(&conn);
        match connection.and_then(|c| c.restriction.as_deref()) {
            Some(restriction) if restriction.ended => Err(Error::Access),
            restriction => Ok(restriction.map(|r| r.domid)),
        }
    }

    /// A domain was taken out: connections that are restricted to it reach nothing from here on.
    pub fn end_restricted(&mut self, domid: DomId) {
        for connection in self.connections.values_mut() {
            if let Some(restriction) = connection.restriction_to(domid) {
                let ended = Restriction {
                    ended: true,
                    ..Restriction::new(domid, &restriction.uuid, &restriction.name)
                };
                connection.restrict(ended);
                connection.watches.clear();
                connection.transactions.clear();
            }
        }
    }

    /// Has the store know a domain by another UUID. What the tools kept by the old one is removed, as another domain may have that from here on, and
    /// connections restricted to the domain do not reach it any more. [`Error::NoEntry`] where the store knows no UUID of the domain.
    pub fn change_uuid(&mut self, domid: DomId, uuid: &str) -> Result<(), Error> {
        if !is_uuid(uuid) {
            return Err(Error::Invalid);
        }
        let known = self.domains.get(&domid).ok_or(Error::NoEntry)?;
        let (own, stage) = (known.uuid.as_ref().ok_or(Error::NoEntry)?, known.stage);
        if own == uuid {
            return Ok(());
        }
        let old = vm_path(own);
        for connection in self.connections.values_mut() {
            if connection.restriction_to(domid).is_some() {
                let watches = &mut connection.watches;
                watches.retain(|watch| !path::is_within(&watch.path, &old));
            }
        }
        if !self.is_anothers_vm(domid, &old) && self.read(&old).is_ok() {
            self.remove(&old)?;
        }
        self.know(domid, Some(uuid.to_owned()), stage);
        Ok(())
    }

    /// Whether a restriction's domain is known by the restriction's UUID.
    pub(crate) fn knows(&self, restriction: &Restriction) -> bool {
        self.uuid_of(restriction.domid) == Some(&restriction.uuid)
    }

    /// Whether a connection may ask for this of a domain: a restricted one introduces its own, while the store knows that by its UUID.
    pub(crate) fn may_manage(&self, conn: ConnId, request: u32, domid: DomId) -> bool {
        let Some(connection) = self.connections.get(&conn) else {
            return false;
        };
        match connection.restriction.as_deref() {
            Some(own) => {
                request == kind::INTRODUCE && own.domid == domid && !own.ended && self.knows(own)
            }
            None => connection.domid == DomId::HOST,
        }
    }
}
