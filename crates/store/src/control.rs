//! CONTROL: what an administrator may ask of the store itself (`xenstore-control`).

use hospes_units::DomId;

use crate::quota::Quota;
use crate::tree::Error;
use crate::wire::{self, PAYLOAD_MAX, Request};
use crate::{ConnId, Store};

const HELP: &str = "Supported commands:\ncheck\nhelp\nmemreport\nprint <text>\nquota [set <name> <value>|<domid>]\n";

/// Names of the limits that can be seen and set, as xenstored calls them where it has them.
const LIMITS: [(&str, &str); 8] = [
    ("nodes", "nodes a domain may own"),
    ("watches", "watches of a domain"),
    ("transactions", "open transactions of a domain"),
    ("transaction-nodes", "nodes one transaction may touch"),
    ("transaction-bytes", "bytes of a domain's open transactions"),
    ("node-size", "bytes of one node"),
    ("node-permissions", "entries of a node's permissions"),
    ("outstanding", "replies a domain may leave unread"),
];

fn limit<'a>(quota: &'a mut Quota, name: &str) -> Option<&'a mut usize> {
    Some(match name {
        "nodes" => &mut quota.nodes,
        "watches" => &mut quota.watches,
        "transactions" => &mut quota.transactions,
        "transaction-nodes" => &mut quota.transaction_nodes,
        "transaction-bytes" => &mut quota.transaction_bytes,
        "node-size" => &mut quota.node_bytes,
        "node-permissions" => &mut quota.perms,
        "outstanding" => &mut quota.outstanding,
        _ => return None,
    })
}

impl Store {
    pub(crate) fn on_control(&mut self, conn: ConnId, request: &Request) -> Result<Vec<u8>, Error> {
        let privileged = self
            .connections
            .get(&conn)
            .is_some_and(|c| c.domid == DomId::HOST);
        if !privileged {
            return Err(Error::Access);
        }
        let arguments = wire::strings(&request.payload).ok_or(Error::Invalid)?;
        match arguments[..] {
            ["help"] => Ok(wire::join([HELP])),
            // The tree's invariants hold by construction; what is told is that the store answers.
            ["check"] => Ok(wire::join(["OK"])),
            ["print", text] => {
                self.notices.push(text.chars().take(PAYLOAD_MAX).collect());
                Ok(wire::join(["OK"]))
            }
            ["memreport"] => Ok(wire::join([self.memory_report()])),
            ["quota"] => {
                let mut quota = self.quota;
                let mut text = String::from("Quota settings:\n");
                for (name, meaning) in LIMITS {
                    let value = limit(&mut quota, name).map_or(0, |v| *v);
                    text += &format!("{name:<20}: {value:>8} {meaning}\n");
                }
                Ok(wire::join([text]))
            }
            ["quota", "set", name, value] => {
                let value: usize = value.parse().map_err(|_| Error::Invalid)?;
                // A guest that may have nothing outstanding would never be answered.
                if name == "outstanding" && value == 0 {
                    return Err(Error::Invalid);
                }
                *limit(&mut self.quota, name).ok_or(Error::Invalid)? = value;
                Ok(wire::join(["OK"]))
            }
            ["quota", domid] => {
                let domid = DomId(domid.parse().map_err(|_| Error::Invalid)?);
                Ok(wire::join([self.usage(domid)]))
            }
            _ => Err(Error::Invalid),
        }
    }

    fn usage(&self, domid: DomId) -> String {
        let own = || self.connections.values().filter(|c| c.domid == domid);
        let watches: usize = own().map(|c| c.watches.len()).sum();
        let transactions: usize = own().map(|c| c.transactions.len()).sum();
        let outstanding: usize = own().map(|c| c.unfetched_replies()).sum();
        format!(
            "Domain {domid}:\nnodes               : {:>8}\nwatches             : {watches:>8}\ntransactions        : {transactions:>8}\noutstanding         : {outstanding:>8}\n",
            self.tree.owned_by(domid)
        )
    }

    fn memory_report(&self) -> String {
        let (mut nodes, mut bytes) = (0, 0);
        for (path, node) in self.tree.nodes() {
            nodes += 1;
            bytes += path.len() + node.bytes();
        }
        format!(
            "nodes               : {nodes:>8}\nbytes of nodes      : {bytes:>8}\nconnections         : {:>8}\ndomains             : {:>8}\n",
            self.connections.len(),
            self.domains.len()
        )
    }

    /// Takes what administrators asked to have logged.
    pub fn take_notices(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notices)
    }
}
