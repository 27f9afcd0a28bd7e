//! The guest's half of a device, as a back end sees it while it connects.

use std::sync::{Arc, Mutex};

use hospes_memory::Page;
use hospes_store::StoreAccess;
use hospes_units::{GrantRef, Port};
use hospes_xen::{Access, HostPort, Listener, Xen};

use super::{Alarm, ConnectError, RingPages, Wake};
use crate::lock;

/// Characters of a guest's value that are shown in an error.
const SHOWN: usize = 40;

/// The guest's directory and what it leads to. Each node may change at any time: it is to be read once.
pub struct Frontend<'a> {
    pub(crate) store: &'a dyn StoreAccess,
    pub(crate) xen: &'a Arc<Xen>,
    pub(crate) path: &'a str,
    pub(crate) alarm: Alarm,
    /// Event channels that were connected.
    pub(crate) ports: Mutex<Vec<Port>>,
}

impl Frontend<'_> {
    /// The domain's Xen side.
    pub fn xen(&self) -> &Arc<Xen> {
        self.xen
    }

    /// For queues that find their ring broken.
    pub fn alarm(&self) -> Alarm {
        self.alarm.clone()
    }

    /// A node's value; `None` where there is no such node.
    pub fn text(&self, node: &str) -> Option<String> {
        self.store.read_text(&format!("{}/{node}", self.path))
    }

    /// A number from `least` to `most`; `None` where there is no such node.
    pub fn optional(&self, node: &str, least: u32, most: u32) -> Result<Option<u32>, ConnectError> {
        let Some(text) = self.text(node) else {
            return Ok(None);
        };
        match text.trim().parse() {
            Ok(value) if (least..=most).contains(&value) => Ok(Some(value)),
            _ => Err(ConnectError::BadNode {
                node: node.to_owned(),
                value: text.chars().take(SHOWN).collect(),
                allowed: format!("a number from {least} to {most}"),
            }),
        }
    }

    /// As [`Frontend::optional`], for a node that has to be there.
    pub fn number(&self, node: &str, least: u32, most: u32) -> Result<u32, ConnectError> {
        self.optional(node, least, most)?
            .ok_or_else(|| ConnectError::Missing(node.to_owned()))
    }

    /// Whether the guest says 1.
    pub fn flag(&self, node: &str) -> Result<bool, ConnectError> {
        Ok(self.optional(node, 0, u32::MAX)?.is_some_and(|v| v != 0))
    }

    /// The pages that a node's grant names (`ring-ref`, or `tx-ring-ref`).
    pub fn ring(&self, node: &str) -> Result<RingPages, ConnectError> {
        self.map(&[GrantRef(self.number(node, 0, u32::MAX)?)])
    }

    /// The pages of a ring.
    pub fn map(&self, grefs: &[GrantRef]) -> Result<RingPages, ConnectError> {
        let mut pages = Vec::with_capacity(grefs.len());
        for gref in grefs {
            let gpa = self.xen.grant_page(*gref, Access::Write)?;
            let page = Page::of_frame(self.xen.memory(), gpa.gfn());
            pages.push(page.map_err(|_| ConnectError::NotMemory(*gref))?);
        }
        RingPages::new(pages).ok_or(ConnectError::RingTooSmall)
    }

    /// Connects the event channel that a node names; the guest's events call `wake`.
    pub fn bind(&self, node: &str, wake: &Arc<Wake>) -> Result<HostPort, ConnectError> {
        let wake = Arc::clone(wake);
        self.listen(node, Arc::new(move || wake.call()))
    }

    /// Connects the event channel that a node names; `listener` hears of the guest's events.
    pub fn listen(&self, node: &str, listener: Listener) -> Result<HostPort, ConnectError> {
        let port = Port(self.number(node, 1, u32::MAX)?);
        let connected = self.xen.connect_port(port, listener);
        lock(&self.ports).push(port);
        connected.map_err(|e| ConnectError::Port(port, e))
    }
}
