//! Event channels of the 2-level interface: who is at the other end of each port.

use hospes_engine::Vcpu;
use hospes_units::{DomId, Port};
use hospes_xen_abi::shared::PORTS_2LEVEL;
use hospes_xen_abi::{DOMID_SELF, Errno, event};

use crate::guest::{Reply, read, write};
use crate::hostport::Listener;
use crate::{Xen, lock};

/// Why a back end cannot use a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    #[error("event channel {0} of the guest is not one that waits for a back end")]
    NotUnbound(Port),
    #[error("the guest has no free event channel")]
    NoFreePort,
}

/// What a port is.
#[derive(Clone)]
pub(crate) enum State {
    Free,
    /// The guest waits for this domain to connect.
    Unbound {
        remote: DomId,
    },
    /// Connected to a back end of the monitor; the number tells one connection of the port from the next.
    Host {
        listener: Listener,
        connection: u64,
    },
    Virq(u32),
    Ipi,
}

#[derive(Clone)]
struct Entry {
    state: State,
    vcpu: u32,
}

/// All ports of a domain.
pub(crate) struct Ports {
    /// By number; 0 is never used. Grows to what was needed at once.
    entries: Vec<Entry>,
    /// For each vCPU, the port of each virtual interrupt; 0 where there is none.
    virqs: Vec<[u32; event::NR_VIRQS as usize]>,
    connections: u64,
}

impl Ports {
    pub fn new(vcpus: usize) -> Ports {
        Ports {
            entries: vec![Entry {
                state: State::Free,
                vcpu: 0,
            }],
            virqs: vec![[0; event::NR_VIRQS as usize]; vcpus],
            connections: 0,
        }
    }

    fn allocate(&mut self, state: State, vcpu: u32) -> Result<u32, Errno> {
        let entry = Entry { state, vcpu };
        let free = self.entries[1..]
            .iter()
            .position(|e| matches!(e.state, State::Free));
        if let Some(i) = free {
            self.entries[i + 1] = entry;
            return Ok(i as u32 + 1);
        }
        if self.entries.len() == PORTS_2LEVEL {
            return Err(Errno::NoSpc);
        }
        self.entries.push(entry);
        Ok(self.entries.len() as u32 - 1)
    }

    /// An entry in use.
    fn get(&mut self, port: u32) -> Result<&mut Entry, Errno> {
        match self.entries.get_mut(port as usize) {
            Some(e) if !matches!(e.state, State::Free) => Ok(e),
            _ => Err(Errno::Inval),
        }
    }

    fn close(&mut self, port: u32) -> Result<(), Errno> {
        let entry = self.get(port)?;
        let (state, vcpu) = (
            std::mem::replace(&mut entry.state, State::Free),
            entry.vcpu as usize,
        );
        entry.vcpu = 0;
        if let State::Virq(virq) = state {
            let home = if virq_is_per_vcpu(virq) { vcpu } else { 0 };
            self.virqs[home][virq as usize] = 0;
        }
        Ok(())
    }

    /// Connects a back end to a port that the guest left unbound for it; returns the connection's number.
    pub fn connect(&mut self, port: Port, listener: Listener) -> Result<u64, EventError> {
        self.connections += 1;
        let connection = self.connections;
        match self.entries.get_mut(port.0 as usize) {
            Some(e)
                if matches!(
                    e.state,
                    State::Unbound {
                        remote: DomId::HOST
                    }
                ) =>
            {
                e.state = State::Host {
                    listener,
                    connection,
                };
                Ok(connection)
            }
            _ => Err(EventError::NotUnbound(port)),
        }
    }

    /// Allocates a port for a back end.
    pub fn allocate_for_host(&mut self) -> Result<Port, EventError> {
        self.allocate(
            State::Unbound {
                remote: DomId::HOST,
            },
            0,
        )
        .map(Port)
        .map_err(|_| EventError::NoFreePort)
    }

    /// The vCPU a back end's event goes to; `None` where the guest closed the port.
    pub fn target(&self, port: Port, connection: u64) -> Option<usize> {
        match self.entries.get(port.0 as usize) {
            Some(Entry {
                state: State::Host { connection: c, .. },
                vcpu,
            }) if *c == connection => Some(*vcpu as usize),
            _ => None,
        }
    }

    /// The back end leaves; the port waits for another.
    pub fn disconnect(&mut self, port: Port, connection: u64) {
        if self.target(port, connection).is_some() {
            self.entries[port.0 as usize].state = State::Unbound {
                remote: DomId::HOST,
            };
        }
    }

    pub fn is_for_host(&self, port: Port) -> bool {
        let entry = self.entries.get(port.0 as usize);
        entry.is_some_and(|entry| match entry.state {
            State::Host { .. } => true,
            State::Unbound { remote } => remote == DomId::HOST,
            _ => false,
        })
    }

    pub fn virq_port(&self, id: usize, virq: u32) -> Option<u32> {
        match self.virqs[id][virq as usize] {
            0 => None,
            port => Some(port),
        }
    }
}

/// Whether each vCPU has this virtual interrupt for itself; the others go to vCPU 0.
fn virq_is_per_vcpu(virq: u32) -> bool {
    matches!(
        virq,
        event::VIRQ_TIMER | event::VIRQ_DEBUG | event::VIRQ_XENOPROF | event::VIRQ_XENPMU
    )
}

impl Xen {
    pub(crate) fn event_channel_op(
        &self,
        vcpu: &mut dyn Vcpu,
        op: u64,
        arg: u64,
    ) -> Result<Reply, Errno> {
        match op {
            event::ALLOC_UNBOUND => {
                let mut a: event::AllocUnbound = read(vcpu, arg)?;
                self.check_self(a.dom)?;
                let remote = match a.remote_dom {
                    DOMID_SELF => self.config.domid,
                    dom => DomId(dom),
                };
                a.port = lock(&self.ports).allocate(State::Unbound { remote }, 0)?;
                self.finish(vcpu, arg, &a, a.port)
            }
            event::BIND_VIRQ => {
                let mut a: event::BindVirq = read(vcpu, arg)?;
                a.port = self.bind_virq(a.virq, a.vcpu)?;
                self.finish(vcpu, arg, &a, a.port)
            }
            event::BIND_IPI => {
                let mut a: event::BindIpi = read(vcpu, arg)?;
                self.vcpu_number(u64::from(a.vcpu))?;
                a.port = lock(&self.ports).allocate(State::Ipi, a.vcpu)?;
                self.finish(vcpu, arg, &a, a.port)
            }
            event::CLOSE => {
                let port: u32 = read(vcpu, arg)?;
                let mut ports = lock(&self.ports);
                ports.close(port)?;
                // Before anybody else can have the port.
                self.clear_pending(port);
                drop(ports);
                Ok(Reply::OK)
            }
            event::SEND => self.send(read(vcpu, arg)?),
            event::BIND_VCPU => {
                let a: event::BindVcpu = read(vcpu, arg)?;
                self.bind_vcpu(a.port, a.vcpu)
            }
            event::UNMASK => {
                let port: u32 = read(vcpu, arg)?;
                let id = lock(&self.ports).get(port)?.vcpu;
                self.unmask(port, id as usize);
                Ok(Reply::OK)
            }
            event::STATUS => {
                let mut a: event::Status = read(vcpu, arg)?;
                self.check_self(a.dom)?;
                self.status(&mut a)?;
                write(vcpu, arg, &a)?;
                Ok(Reply::OK)
            }
            _ => Err(Errno::NoSys),
        }
    }

    /// Gives a new port to the guest; takes it back where that fails, since the guest could never close it.
    fn finish<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &self,
        vcpu: &mut dyn Vcpu,
        arg: u64,
        value: &T,
        port: u32,
    ) -> Result<Reply, Errno> {
        if let Err(fault) = write(vcpu, arg, value) {
            let _ = lock(&self.ports).close(port);
            return Err(fault);
        }
        Ok(Reply::OK)
    }

    fn bind_virq(&self, virq: u32, vcpu: u32) -> Result<u32, Errno> {
        if virq >= event::NR_VIRQS {
            return Err(Errno::Inval);
        }
        let id = self.vcpu_number(u64::from(vcpu))?;
        if !virq_is_per_vcpu(virq) && id != 0 {
            return Err(Errno::Inval);
        }
        let mut ports = lock(&self.ports);
        if ports.virq_port(id, virq).is_some() {
            return Err(Errno::Exist);
        }
        let port = ports.allocate(State::Virq(virq), vcpu)?;
        ports.virqs[id][virq as usize] = port;
        Ok(port)
    }

    fn send(&self, port: u32) -> Result<Reply, Errno> {
        let listener = {
            let mut ports = lock(&self.ports);
            let entry = ports.get(port)?;
            match &entry.state {
                State::Ipi => {
                    let id = entry.vcpu as usize;
                    drop(ports);
                    self.post(port, id);
                    return Ok(Reply::OK);
                }
                State::Host { listener, .. } => listener.clone(),
                // Nobody has connected yet: as in Xen the event is lost and the send succeeds.
                State::Unbound { .. } => return Ok(Reply::OK),
                _ => return Err(Errno::Inval),
            }
        };
        listener();
        Ok(Reply::OK)
    }

    fn bind_vcpu(&self, port: u32, vcpu: u32) -> Result<Reply, Errno> {
        self.vcpu_number(u64::from(vcpu))?;
        let mut ports = lock(&self.ports);
        let entry = ports.get(port)?;
        match entry.state {
            State::Unbound { .. } | State::Host { .. } => {}
            State::Virq(virq) if !virq_is_per_vcpu(virq) => {}
            _ => return Err(Errno::Inval),
        }
        // The table of virtual interrupts stays with vCPU 0, where global ones are looked for.
        entry.vcpu = vcpu;
        Ok(Reply::OK)
    }

    fn status(&self, a: &mut event::Status) -> Result<(), Errno> {
        let mut ports = lock(&self.ports);
        if a.port as usize >= PORTS_2LEVEL {
            return Err(Errno::Inval);
        }
        let entry = ports.entries.get_mut(a.port as usize);
        (a.vcpu, a.u, a.u2) = (entry.as_ref().map_or(0, |e| e.vcpu), 0, 0);
        a.status = match entry.map(|e| &e.state) {
            None | Some(State::Free) => event::STATUS_CLOSED,
            Some(State::Unbound { remote }) => {
                a.u = u32::from(remote.0);
                event::STATUS_UNBOUND
            }
            Some(State::Host { .. }) => {
                a.u = u32::from(DomId::HOST.0);
                a.u2 = a.port;
                event::STATUS_INTERDOMAIN
            }
            Some(State::Virq(virq)) => {
                a.u = *virq;
                event::STATUS_VIRQ
            }
            Some(State::Ipi) => event::STATUS_IPI,
        };
        Ok(())
    }

    /// Raises a virtual interrupt of a vCPU; nothing happens where the guest has not bound it.
    pub(crate) fn post_virq(&self, id: usize, virq: u32) {
        let port = lock(&self.ports).virq_port(id, virq);
        if let Some(port) = port {
            self.post(port, id);
        }
    }

    /// Has every vCPU's kernel print its state, where it listens (`xl debug-keys` and the like).
    pub fn send_debug_virq(&self) {
        for id in 0..self.vcpus.len() {
            self.post_virq(id, event::VIRQ_DEBUG);
        }
    }

    /// Checks a vCPU number that came from the guest.
    pub(crate) fn vcpu_number(&self, vcpu: u64) -> Result<usize, Errno> {
        usize::try_from(vcpu)
            .ok()
            .filter(|v| *v < self.vcpus.len())
            .ok_or(Errno::NoEnt)
    }
}
