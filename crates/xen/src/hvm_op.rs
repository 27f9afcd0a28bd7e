//! HVM operations: the parameters and how upcalls are delivered.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;

use hospes_engine::Vcpu;
use hospes_units::Port;
use hospes_xen_abi::{DOMID_SELF, Errno, hvm};

use crate::guest::{Reply, read, write};
use crate::{Config, Xen, lock};

/// The parameters that a PVH guest may read.
#[derive(Debug)]
pub(crate) struct Params(BTreeMap<u32, u64>);

impl Params {
    pub fn new(config: &Config) -> Params {
        Params(BTreeMap::from([
            (hvm::PARAM_CALLBACK_IRQ, 0),
            (hvm::PARAM_STORE_PFN, config.store_gfn.0),
            (hvm::PARAM_STORE_EVTCHN, 0),
            (hvm::PARAM_CONSOLE_PFN, config.console_gfn.0),
            (hvm::PARAM_CONSOLE_EVTCHN, 0),
        ]))
    }
}

impl Xen {
    /// Tells the guest the port of its xenstore connection.
    pub fn set_store_port(&self, port: Port) {
        lock(&self.params)
            .0
            .insert(hvm::PARAM_STORE_EVTCHN, u64::from(port.0));
    }

    /// Tells the guest the port of its console.
    pub fn set_console_port(&self, port: Port) {
        lock(&self.params)
            .0
            .insert(hvm::PARAM_CONSOLE_EVTCHN, u64::from(port.0));
    }

    pub(crate) fn hvm_op(&self, vcpu: &mut dyn Vcpu, op: u64, arg: u64) -> Result<Reply, Errno> {
        match op {
            hvm::SET_PARAM => {
                let p: hvm::Param = read(vcpu, arg)?;
                self.check_self(p.domid)?;
                self.set_param(p.index, p.value)
            }
            hvm::GET_PARAM => {
                let mut p: hvm::Param = read(vcpu, arg)?;
                self.check_self(p.domid)?;
                p.value = *lock(&self.params).0.get(&p.index).ok_or(Errno::Inval)?;
                write(vcpu, arg, &p)?;
                Ok(Reply::OK)
            }
            hvm::SET_EVTCHN_UPCALL_VECTOR => {
                let u: hvm::UpcallVector = read(vcpu, arg)?;
                let id = self.vcpu_number(u64::from(u.vcpu))?;
                if u.vector < hvm::FIRST_VECTOR {
                    return Err(Errno::Inval);
                }
                self.set_line(id, None);
                self.vcpus[id].upcall_vector.store(u.vector, SeqCst);
                self.raise_if_waiting(id);
                Ok(Reply::OK)
            }
            // Success would make the guest call it at the end of each process, for shadow page tables that do not exist.
            hvm::PAGETABLE_DYING => Err(Errno::NoSys),
            _ => Err(Errno::NoSys),
        }
    }

    fn set_param(&self, index: u32, value: u64) -> Result<Reply, Errno> {
        match index {
            hvm::PARAM_CALLBACK_IRQ => {
                // Interrupt lines (types 0 and 1) are accepted and do nothing: there is no controller they could reach, and guests
                // with per-vCPU vectors set them only to please old tools.
                if value >> 56 == hvm::CALLBACK_TYPE_VECTOR {
                    self.set_callback_vector(value as u8);
                }
                lock(&self.params).0.insert(index, value);
                Ok(Reply::OK)
            }
            hvm::PARAM_STORE_PFN
            | hvm::PARAM_STORE_EVTCHN
            | hvm::PARAM_CONSOLE_PFN
            | hvm::PARAM_CONSOLE_EVTCHN => Err(Errno::Perm),
            _ => Err(Errno::Inval),
        }
    }

    /// A guest may only name itself.
    pub(crate) fn check_self(&self, domid: u16) -> Result<(), Errno> {
        if domid == DOMID_SELF || domid == self.config.domid.0 {
            Ok(())
        } else {
            Err(Errno::Perm)
        }
    }
}
