//! A device's directories in the xenstore, as libxl makes them.

use hospes_store::{NewNode, Perms, domain_path};
use hospes_units::DomId;
use hospes_xen_abi::xenbus::XenbusState;

use super::{DeviceId, Kind};

/// A node inside a device's directory: its name and its value.
pub type Node = (String, String);

/// What a device's directories hold beside what all have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceNodes {
    pub front: Vec<Node>,
    pub back: Vec<Node>,
    /// Whether the directory of the back end is somebody else's, who makes it with what is in `back` and removes it: [`back_directory`].
    pub kept: bool,
}

/// The directory of a back end as it is before the back end says how it serves the device, parents first.
pub fn back_directory(domid: DomId, id: DeviceId, nodes: &[Node]) -> Vec<NewNode> {
    let paths = Paths::new(domid, id, true);
    let mut all = paths.identity(domid);
    all.extend_from_slice(nodes);
    in_directory(&paths.back, &Perms::read_only(domid), all)
}

/// Where a back end's directory is.
pub fn back_path(domid: DomId, id: DeviceId) -> String {
    format!("{}/{}", back_paths(domid, id.kind), id.devid)
}

/// Where those of all of a domain's devices of a kind are.
pub fn back_paths(domid: DomId, kind: Kind) -> String {
    format!(
        "{}/backend/{}/{domid}",
        domain_path(DomId::HOST),
        kind.name()
    )
}

/// A directory and what is in it.
fn in_directory(directory: &str, perms: &Perms, nodes: Vec<Node>) -> Vec<NewNode> {
    let own = NewNode::new(directory, "", perms);
    let nodes = below(directory, perms, nodes);
    std::iter::once(own).chain(nodes).collect()
}

/// What is in a directory.
fn below(directory: &str, perms: &Perms, nodes: Vec<Node>) -> impl Iterator<Item = NewNode> {
    nodes
        .into_iter()
        .map(move |(name, value)| NewNode::new(format!("{directory}/{name}"), value, perms))
}

fn node(name: &str, value: impl Into<String>) -> Node {
    (name.to_owned(), value.into())
}

/// Where a device's directories are.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    pub front: String,
    pub back: String,
    /// What only tools read: they trust nothing below the guest's own directory.
    pub tools: String,
    /// Where errors are told, as Linux' back ends do.
    pub error: String,
    /// As in [`DeviceNodes`].
    pub kept: bool,
}

impl Paths {
    pub fn new(domid: DomId, id: DeviceId, kept: bool) -> Paths {
        let (kind, devid) = (id.kind.name(), id.devid);
        let host = domain_path(DomId::HOST);
        let relative = format!("backend/{kind}/{domid}/{devid}");
        Paths {
            front: format!("{}/device/{kind}/{devid}", domain_path(domid)),
            error: format!("{host}/error/{relative}/error"),
            back: back_path(domid, id),
            tools: format!("/libxl/{domid}/device/{kind}/{devid}"),
            kept,
        }
    }

    /// The directories that go with the device.
    pub fn own(&self) -> impl Iterator<Item = &String> {
        let back = (!self.kept).then_some(&self.back);
        [&self.front, &self.tools].into_iter().chain(back)
    }

    /// Whose back end it is.
    fn identity(&self, domid: DomId) -> Vec<Node> {
        vec![
            node("frontend", self.front.clone()),
            node("frontend-id", domid.to_string()),
        ]
    }

    /// Everything a new device needs, parents first.
    pub fn make(&self, domid: DomId, nodes: &DeviceNodes, features: &[Node]) -> Vec<NewNode> {
        let number = |state: XenbusState| state.number().to_string();
        let readable = Perms::read_only(domid);
        let mut guest = Perms::owned(domid);
        guest.exceptions = Perms::read_only(DomId::HOST).exceptions;

        let mut front = vec![
            node("backend", &self.back),
            node("backend-id", DomId::HOST.to_string()),
            node("state", number(XenbusState::Initialising)),
        ];
        front.extend_from_slice(&nodes.front);
        let mut service = vec![node("online", "1")];
        service.extend_from_slice(features);
        service.push(node("state", number(XenbusState::InitWait)));
        let mut tools = self.identity(domid);
        tools.push(node("backend", &self.back));
        tools.extend_from_slice(&nodes.back);

        let mut all = in_directory(&self.tools, &Perms::owned(DomId::HOST), tools);
        if !self.kept {
            let mut back = self.identity(domid);
            back.extend_from_slice(&nodes.back);
            all.extend(in_directory(&self.back, &readable, back));
        }
        all.extend(below(&self.back, &readable, service));
        all.extend(in_directory(&self.front, &guest, front));
        all
    }
}
