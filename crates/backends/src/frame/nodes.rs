//! A device's directories in the xenstore, as libxl makes them.

use hospes_store::{NewNode, Perms, domain_path};
use hospes_units::DomId;
use hospes_xen_abi::xenbus::XenbusState;

use super::DeviceId;

/// A node inside a device's directory: its name and its value.
pub type Node = (String, String);

/// What a device's directories hold beside what all have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceNodes {
    pub front: Vec<Node>,
    pub back: Vec<Node>,
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
}

impl Paths {
    pub fn new(domid: DomId, id: DeviceId) -> Paths {
        let (kind, devid) = (id.kind.name(), id.devid);
        let host = domain_path(DomId::HOST);
        let relative = format!("backend/{kind}/{domid}/{devid}");
        Paths {
            front: format!("{}/device/{kind}/{devid}", domain_path(domid)),
            error: format!("{host}/error/{relative}/error"),
            back: format!("{host}/{relative}"),
            tools: format!("/libxl/{domid}/device/{kind}/{devid}"),
        }
    }

    /// Everything a new device needs, parents first.
    pub fn make(&self, domid: DomId, nodes: &DeviceNodes, features: &[Node]) -> Vec<NewNode> {
        let number = |state: XenbusState| state.number().to_string();
        let own = |list: &[Node]| list.to_vec();
        let node = |name: &str, value: String| (name.to_owned(), value);
        let mut front = vec![
            node("backend", self.back.clone()),
            node("backend-id", DomId::HOST.to_string()),
            node("state", number(XenbusState::Initialising)),
        ];
        front.extend(own(&nodes.front));
        let mut back = vec![
            node("frontend", self.front.clone()),
            node("frontend-id", domid.to_string()),
            node("online", "1".to_owned()),
        ];
        back.extend(own(&nodes.back));
        let mut tools = back.clone();
        tools[2] = node("backend", self.back.clone());
        back.extend(own(features));
        back.push(node("state", number(XenbusState::InitWait)));

        let readable = Perms::read_only(domid);
        let mut guest = Perms::owned(domid);
        guest.exceptions = Perms::read_only(DomId::HOST).exceptions;
        let host_only = Perms::owned(DomId::HOST);
        let mut all = Vec::new();
        for (directory, perms, nodes) in [
            (&self.tools, &host_only, tools),
            (&self.back, &readable, back),
            (&self.front, &guest, front),
        ] {
            all.push(NewNode::new(directory.clone(), "", perms));
            all.extend(
                nodes
                    .into_iter()
                    .map(|(name, value)| NewNode::new(format!("{directory}/{name}"), value, perms)),
            );
        }
        all
    }
}
