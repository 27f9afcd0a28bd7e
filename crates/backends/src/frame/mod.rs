//! What all back ends share.
//!
//! A kind of device implements [`Backend`]; the [`Bus`] of a domain keeps its devices. Each has a thread that follows the guest's half: it
//! reads the guest's `state` when the store says that it changed, asks [`state::step`] what that means, and does it.

mod bus;
mod device;
mod frontend;
mod nodes;
mod pages;
pub mod state;
mod wake;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use hospes_ring::Broken;
use hospes_units::{GrantRef, Port};
use hospes_xen::{EventError, GrantError};

pub use bus::{Bus, DeviceError, DeviceInfo};
pub use frontend::Frontend;
pub use nodes::{DeviceNodes, Node, back_directory, back_path, back_paths};
pub use pages::RingPages;
pub use wake::Wake;

/// Takes a line for the domain's log.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// Tells the frame, from any thread, that a guest broke the rules in a way that requests cannot be answered any more: the device is closed, and
/// the reason logged.
pub type Alarm = Arc<dyn Fn(String) + Send + Sync>;

/// Kinds of devices, as the xenstore calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Vbd,
    Vif,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Vbd => "vbd",
            Kind::Vif => "vif",
        }
    }
}

/// A device of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    pub kind: Kind,
    /// The number of its directory: `virtual-device` of a disk, `handle` of a network interface.
    pub devid: u32,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.name(), self.devid)
    }
}

/// One kind of device, between the frame and what the device stands for. All calls come from the device's own thread, one at a time.
pub trait Backend: Send {
    /// What the back end can do, as nodes of its directory: the guest reads them before it connects.
    fn features(&self) -> Vec<Node>;

    /// Connects to a guest's half that is ready, and starts the queues; returns the nodes that the guest reads once the state is Connected. After an
    /// error nothing is left of the attempt.
    fn connect(&mut self, front: &Frontend<'_>) -> Result<Vec<Node>, ConnectError>;

    /// Stops the queues and waits for what they have in flight. The guest's memory is not touched afterwards. Does nothing without a connection.
    fn disconnect(&mut self);

    /// The guest loses the device: what it still waits for is to be answered, with an error where it cannot be carried out now. Comes before [`Backend::disconnect`].
    fn abandon(&mut self) {}

    /// Waits until nothing is in flight, to a guest that sends nothing meanwhile, or until `deadline`. The error is why it takes longer, as a sentence.
    fn settle(&mut self, _deadline: Instant) -> Result<(), String> {
        Ok(())
    }

    /// Makes durable what was written to the thing behind the device, while nothing is in flight. The error is why it is not, as a sentence.
    fn flush(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// Lets go of the thing behind the device, without a connection: what was written to it is durable when this returns, and another process may have it. After
    /// an error it may be gone or not. The device is to be connected again only after [`Backend::take_again`].
    fn let_go(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// Takes the thing behind the device again where it has been let go of.
    fn take_again(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// Nodes to be written again because the thing behind the device changed, with the state after them; empty where the device has no such.
    fn renewed(&mut self) -> Vec<Node> {
        Vec::new()
    }

    /// The device is about to go, for good: what is to see its nodes and the thing behind it is to look now. Comes once, without a connection.
    fn leave(&mut self) {}

    /// What other threads may see of the device.
    fn monitor(&self) -> Arc<dyn Monitor>;
}

/// A device's numbers.
pub trait Monitor: Send + Sync {
    /// Counters since the device was made, with their names.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// Why requests wait although the guest did nothing wrong, as a sentence for the user.
    fn trouble(&self) -> Option<String> {
        None
    }
}

/// Why a guest's half cannot be connected: a fault of the guest, or of the host where it says so.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("the guest has not written `{0}`")]
    Missing(String),
    #[error("the guest wrote `{value}` to `{node}`, which is not {allowed}")]
    BadNode {
        node: String,
        value: String,
        allowed: String,
    },
    #[error("a ring page cannot be used: {0}")]
    Grant(#[from] GrantError),
    #[error("ring page {0} is not memory")]
    NotMemory(GrantRef),
    #[error("the ring is too small")]
    RingTooSmall,
    #[error("event channel {0} cannot be connected: {1}")]
    Port(Port, EventError),
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("the host cannot serve the device: {0}")]
    Host(String),
}
