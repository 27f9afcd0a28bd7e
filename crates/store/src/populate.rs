//! The part of the tree that the tools write for a new PVH guest, as libxl does, and its removal.

use hospes_units::DomId;

use crate::access::NewNode;
use crate::node::Perms;
use crate::record::{Record, Stage};
use crate::restriction::scripted_path;
use crate::{Error, Known, Store, path};

/// What the tree says of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainEntry {
    pub domid: DomId,
    /// In its usual text form.
    pub uuid: String,
    pub name: String,
    /// What the guest is to have, in KiB.
    pub memory_kib: u64,
    /// RAM in KiB: exactly what the memory map lists, for the guest's balloon counts from there.
    pub memory_max_kib: u64,
    pub vcpus: u32,
    pub console_port: u32,
    pub console_ring: u64,
    pub store_port: u32,
    pub store_ring: u64,
}

/// A domain's home, without a slash at the end.
pub fn domain_path(domid: DomId) -> String {
    path::home(domid).trim_end_matches('/').to_owned()
}

/// Below a domain's home, what says who it is.
pub(crate) const IDENTITY: [&str; 3] = ["vm", "name", "domid"];

/// What says who a domain is.
pub fn identity_nodes(domid: DomId, uuid: &str, name: &str) -> Vec<NewNode> {
    let home = domain_path(domid);
    let vm = format!("/vm/{uuid}");
    let read_only = Perms::read_only(domid);
    [
        (vm.clone(), ""),
        (format!("{vm}/name"), name),
        (format!("{vm}/uuid"), uuid),
        (home.clone(), ""),
        (format!("{home}/vm"), vm.as_str()),
        (format!("{home}/name"), name),
        (format!("{home}/domid"), &domid.to_string()),
    ]
    .map(|(path, value)| NewNode::new(path, value, &read_only))
    .into()
}

impl DomainEntry {
    /// The nodes of a new domain beside [`identity_nodes`], which come with its entry.
    pub fn nodes(&self) -> Vec<NewNode> {
        let home = domain_path(self.domid);
        let tools = format!("/libxl/{}", self.domid);
        let read_only = Perms::read_only(self.domid);
        let mut nodes = Vec::new();
        for (path, value) in [
            (format!("{home}/cpu"), String::new()),
            (format!("{home}/memory"), String::new()),
            (
                format!("{home}/memory/static-max"),
                self.memory_max_kib.to_string(),
            ),
            (format!("{home}/memory/target"), self.memory_kib.to_string()),
            (format!("{home}/memory/videoram"), "0".to_owned()),
            (format!("{home}/device"), String::new()),
            (format!("{home}/control"), String::new()),
            (
                format!("{home}/control/platform-feature-multiprocessor-suspend"),
                "1".to_owned(),
            ),
            (
                format!("{home}/control/platform-feature-xs_reset_watches"),
                "1".to_owned(),
            ),
            (format!("{home}/store"), String::new()),
            (format!("{home}/store/port"), self.store_port.to_string()),
            (
                format!("{home}/store/ring-ref"),
                self.store_ring.to_string(),
            ),
        ] {
            nodes.push(NewNode::new(path, value, &read_only));
        }
        for cpu in 0..self.vcpus {
            nodes.push(NewNode::new(format!("{home}/cpu/{cpu}"), "", &read_only));
            let path = format!("{home}/cpu/{cpu}/availability");
            nodes.push(NewNode::new(path, "online", &read_only));
        }
        let guest = Perms::owned(self.domid);
        for name in [
            "control/shutdown",
            "control/feature-poweroff",
            "control/feature-reboot",
            "control/feature-suspend",
            "control/sysrq",
            "device/suspend/event-channel",
            "data",
            "drivers",
            "feature",
            "attr",
            "error",
        ] {
            nodes.push(NewNode::new(format!("{home}/{name}"), "", &guest));
        }
        // Only the tools look at these; a guest that could write "tty" would choose what they open.
        let hidden = Perms::owned(DomId::HOST);
        for (path, value) in [
            (
                format!("{home}/console/ring-ref"),
                self.console_ring.to_string(),
            ),
            (
                format!("{home}/console/port"),
                self.console_port.to_string(),
            ),
            (format!("{home}/console/type"), "hospes".to_owned()),
            (format!("{home}/console/limit"), "1048576".to_owned()),
            (format!("{home}/console/output"), "pty".to_owned()),
            (format!("{home}/console/tty"), String::new()),
            (tools.clone(), String::new()),
            (format!("{tools}/type"), "pvh".to_owned()),
        ] {
            nodes.push(NewNode::new(path, value, &hidden));
        }
        nodes
    }
}

/// The nodes of domain 0 itself, as a Xen host has them after its start.
pub fn host_nodes() -> Vec<NewNode> {
    let home = domain_path(DomId::HOST);
    let hidden = Perms::owned(DomId::HOST);
    vec![
        NewNode::new("/tool/xenstored", "", &hidden),
        NewNode::new("/local/domain", "", &hidden),
        NewNode::new(&home, "", &hidden),
        NewNode::new(format!("{home}/domid"), "0", &hidden),
        NewNode::new(format!("{home}/name"), "Domain-0", &hidden),
        NewNode::new(format!("{home}/backend"), "", &hidden),
        NewNode::new("/vm", "", &hidden),
        NewNode::new("/libxl", "", &hidden),
    ]
}

impl Store {
    /// Makes a domain known with its UUID and name, and writes what says so. What an earlier domain with this id left goes first. It is introduced
    /// when all its nodes are there ([`Store::introduce`]).
    pub fn add_domain(&mut self, domid: DomId, uuid: &str, name: &str) -> Result<(), Error> {
        if self.domains.contains_key(&domid) {
            self.remove_domain(domid);
        }
        self.write_all(&identity_nodes(domid, uuid, name))?;
        self.know(domid, Some(uuid.to_owned()), Stage::Entered);
        Ok(())
    }

    /// Removes a domain: its home, its devices in the domains that serve them, and what the tools keep about it.
    pub fn remove_domain(&mut self, domid: DomId) {
        self.remove_all_but(domid, None);
    }

    /// The same for a connection that is restricted to the domain: what it may not change stays, for whoever has made it.
    pub fn remove_domain_restricted(&mut self, domid: DomId) {
        self.remove_all_but(domid, Some(&scripted_path(domid)));
    }

    fn remove_all_but(&mut self, domid: DomId, kept: Option<&str>) {
        let mut gone = vec![domain_path(domid), format!("/libxl/{domid}")];
        gone.extend(self.own_vms(domid));
        for server in self.list("/local/domain").unwrap_or_default() {
            for directory in ["backend", "error/backend"] {
                let backends = format!("/local/domain/{server}/{directory}");
                for kind in self.list(&backends).unwrap_or_default() {
                    gone.push(format!("{backends}/{kind}/{domid}"));
                }
            }
        }
        gone.retain(|path| Some(&path[..]) != kept);
        for path in gone {
            // Absent ones are as they should be.
            if self.read(&path).is_ok() {
                let _ = self.remove(&path);
            }
        }
        self.forget_grants(domid);
        self.release(domid);
    }

    /// The paths by UUID that are a domain's alone: the one it was made known with, and the one it names now.
    fn own_vms(&self, domid: DomId) -> Vec<String> {
        // Somebody may have written there what he likes, a path inside another's for one.
        let is_whole = |vm: &String| path::split(vm).is_some_and(|(parent, _)| parent == "/vm");
        self.vms(domid)
            .filter(is_whole)
            .filter(|vm| !self.is_anothers_vm(domid, vm))
            .collect()
    }

    fn vms(&self, domid: DomId) -> impl Iterator<Item = String> + '_ {
        let named = self.read_text(&format!("{}/vm", domain_path(domid)));
        let known = self.uuid_of(domid).into_iter();
        known.map(|uuid| format!("/vm/{uuid}")).chain(named)
    }

    /// Whether a path by UUID belongs to a domain other than this one.
    pub(crate) fn is_anothers_vm(&self, domid: DomId, vm: &str) -> bool {
        let mut others = self.domains.keys().filter(|id| **id != domid);
        others.any(|id| self.vms(*id).any(|own| own == vm))
    }

    /// Takes a removed domain off the permissions of the nodes that stay: its id may be another's later.
    fn forget_grants(&mut self, domid: DomId) {
        let named: Vec<(String, Perms)> = self
            .tree
            .nodes()
            .filter(|(_, node)| node.perms.mentions(domid))
            .map(|(path, node)| (path.clone(), node.perms.without(domid)))
            .collect();
        for (path, perms) in named {
            // The node is there and domain 0 may do this.
            let _ = self.set_perms(&path, perms);
        }
    }

    /// Takes a domain that goes off the permissions to hear of domains.
    fn forget_special_grants(&mut self, domid: DomId) {
        for path in path::SPECIALS {
            if let Some(perms) = self.tree.special_perms(path).cloned()
                && perms.mentions(domid)
            {
                self.tree.set_special_perms(path, perms.without(domid));
            }
        }
    }

    /// Tells everybody who watches for it that a domain has come. Does nothing where that was told before.
    pub fn introduce(&mut self, domid: DomId) {
        if !self.is_introduced(domid) {
            let uuid = self.uuid_of(domid).cloned();
            self.know(domid, uuid, Stage::Introduced);
            self.fire(&[self.tree.special_change(path::INTRODUCE_DOMAIN)]);
        }
    }

    /// Tells everybody who watches for it that a domain has shut down or crashed, or has suspended itself. Does nothing where that was told
    /// before and the domain has not gone on since ([`Store::resume`]), nor with one that was not introduced.
    pub fn shut_down(&mut self, domid: DomId) {
        if self.pass(domid, Stage::Introduced, Stage::ShutDown) {
            self.fire(&[self.tree.special_change(path::RELEASE_DOMAIN)]);
        }
    }

    /// A domain that had shut down goes on: when it shuts down again, that is told again.
    pub fn resume(&mut self, domid: DomId) {
        self.pass(domid, Stage::ShutDown, Stage::Introduced);
    }

    /// Whether a domain passes from one stage to another: not where it was not there.
    fn pass(&mut self, domid: DomId, from: Stage, to: Stage) -> bool {
        let known = self.domains.get(&domid).filter(|known| known.stage == from);
        let Some(uuid) = known.map(|known| known.uuid.clone()) else {
            return false;
        };
        self.know(domid, uuid, to);
        true
    }

    pub(crate) fn is_introduced(&self, domid: DomId) -> bool {
        let known = self.domains.get(&domid);
        known.is_some_and(|known| known.stage != Stage::Entered)
    }

    /// The UUID by which a domain is known.
    pub(crate) fn uuid_of(&self, domid: DomId) -> Option<&String> {
        self.domains.get(&domid)?.uuid.as_ref()
    }

    pub(crate) fn know(&mut self, domid: DomId, uuid: Option<String>, stage: Stage) {
        let known = Known {
            uuid: uuid.clone(),
            stage,
        };
        self.domains.insert(domid, known);
        self.tree.record(|| Record::Domain { domid, uuid, stage });
    }

    /// Tells everybody who watches for it that a domain has gone, whether it had shut down before or not.
    pub fn release(&mut self, domid: DomId) {
        self.forget_target(domid);
        self.forget_special_grants(domid);
        if let Some(known) = self.domains.remove(&domid) {
            self.tree.record(|| Record::NoDomain { domid });
            // Of one that did not become whole nobody has heard.
            if known.stage == Stage::Entered {
                return;
            }
            self.fire(&[self.tree.special_change(path::RELEASE_DOMAIN)]);
        }
    }

    pub(crate) fn set_target(&mut self, domid: DomId, target: DomId) {
        self.targets.insert(domid, target);
        self.tree.record(|| Record::Target { domid, target });
    }

    pub(crate) fn forget_target(&mut self, domid: DomId) {
        self.targets.retain(|d, t| *d != domid && *t != domid);
    }

    /// The domains that are known.
    pub fn domains(&self) -> impl Iterator<Item = DomId> + '_ {
        self.domains.keys().copied()
    }
}
