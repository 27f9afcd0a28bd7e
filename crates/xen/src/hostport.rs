//! The monitor's end of an event channel.

use std::fmt;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Weak};

use hospes_units::{Port, VcpuId};

use crate::events::EventError;
use crate::{Xen, lock};

/// Called when the guest sends an event; from the vCPU's thread, so it must not wait for anything.
pub type Listener = Arc<dyn Fn() + Send + Sync>;

/// A back end's end of an event channel. Dropping it leaves the port unbound, so that another back end can connect.
pub struct HostPort {
    xen: Weak<Xen>,
    port: Port,
    connection: u64,
}

impl HostPort {
    /// A port that leads nowhere: events are lost.
    pub(crate) fn nowhere() -> HostPort {
        HostPort {
            xen: Weak::new(),
            port: Port(0),
            connection: 0,
        }
    }

    /// The port's number as the guest knows it.
    pub fn port(&self) -> Port {
        self.port
    }

    /// Sends an event to the guest. Does nothing once the guest has closed the port.
    pub fn notify(&self) {
        let Some(xen) = self.xen.upgrade() else {
            return;
        };
        let target = || lock(&xen.ports).target(self.port, self.connection);
        let Some(vcpu) = target() else {
            return;
        };
        xen.post(self.port.0, vcpu);
        // The guest may have given the port to another vCPU meanwhile, and unmasked it before the event was there.
        if let Some(other) = target().filter(|other| *other != vcpu) {
            xen.show_again(self.port.0, other);
        }
    }

    /// Whether the vCPU that gets the events has nothing to do: one that works is interrupted at a cost, one that waits is kept waiting.
    pub fn target_is_idle(&self) -> bool {
        self.xen.upgrade().is_none_or(|xen| {
            let target = lock(&xen.ports).target(self.port, self.connection);
            target.is_none_or(|vcpu| xen.vcpus[vcpu].idle.load(SeqCst))
        })
    }

    /// Whether the guest still has the port open.
    pub fn is_connected(&self) -> bool {
        self.xen.upgrade().is_some_and(|xen| {
            lock(&xen.ports)
                .target(self.port, self.connection)
                .is_some()
        })
    }
}

impl Drop for HostPort {
    fn drop(&mut self) {
        if let Some(xen) = self.xen.upgrade() {
            lock(&xen.ports).disconnect(self.port, self.connection);
        }
    }
}

impl fmt::Debug for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostPort({})", self.port)
    }
}

impl Xen {
    /// Notes whether a vCPU waits for an interrupt.
    pub fn set_idle(&self, vcpu: VcpuId, idle: bool) {
        if let Some(slot) = self.vcpus.get(vcpu.0 as usize) {
            slot.idle.store(idle, SeqCst);
        }
    }

    /// Connects a back end to a port that the guest allocated for it (`event-channel` in a device's xenstore directory).
    pub fn connect_port(
        self: &Arc<Self>,
        port: Port,
        listener: Listener,
    ) -> Result<HostPort, EventError> {
        let connection = lock(&self.ports).connect(port, listener)?;
        Ok(HostPort {
            xen: Arc::downgrade(self),
            port,
            connection,
        })
    }

    /// Whether a port of the guest is connected to a back end or waits for one; false once the guest has closed it.
    pub fn is_for_host(&self, port: Port) -> bool {
        lock(&self.ports).is_for_host(port)
    }

    /// Allocates a port of the guest for a back end and connects it: for the console and xenstore, before the guest runs.
    pub fn allocate_port(self: &Arc<Self>, listener: Listener) -> Result<HostPort, EventError> {
        let port = lock(&self.ports).allocate_for_host()?;
        self.connect_port(port, listener)
    }
}
