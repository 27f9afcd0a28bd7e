//! Hypercalls as a guest makes them, on a machine without an engine.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use hospes_engine::{Segment, VcpuControl, Waker, reg, seg};
use hospes_units::{Gfn, Gpa, GrantRef, Port, VcpuId};
use hospes_xen_abi::shared::{
    PVCLOCK_GUEST_STOPPED, Runstate, RunstateInfo, SI_MASK, SI_PENDING, VI_TIME, VcpuTimeInfo,
};
use hospes_xen_abi::{Errno, event, grant, hvm, hypercall as nr, memory, sched, vcpu, version};

use crate::testing::{ARG, Machine};
use crate::{Access, GrantError, Outcome, ShutdownReason, lock};

mod calls;
mod events;
mod memory_map;
mod time;

const INFO_GFN: u64 = 0x20;
const SHARED_GFN: u64 = 0x10;

fn err(e: Errno) -> i64 {
    e.as_rax() as i64
}

/// What Linux does before its first event: shared info, `vcpu_info`, upcall vector; its ports are unmasked.
fn boot(m: &mut Machine) {
    let mut a = memory::AddToPhysmap {
        domid: 0x7ff0,
        gpfn: SHARED_GFN,
        ..Default::default()
    };
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::ADD_TO_PHYSMAP, &mut a),
        0
    );
    for id in 0..m.vcpus.len() as u64 {
        let info = vcpu::RegisterVcpuInfo {
            gfn: INFO_GFN + id,
            offset: 64,
            pad: 0,
        };
        m.xen.memory().write_obj(Gpa(ARG), &info).unwrap();
        assert_eq!(m.call(nr::VCPU_OP, [vcpu::REGISTER_VCPU_INFO, id, ARG]), 0);
        let mut v = hvm::UpcallVector {
            vcpu: id as u32,
            vector: 0xf3,
            pad: [0; 3],
        };
        assert_eq!(
            m.call_with(nr::HVM_OP, hvm::SET_EVTCHN_UPCALL_VECTOR, &mut v),
            0
        );
        take_upcall(m, id as usize);
    }
}

/// The guest's upcall handler: clears the flag and the selector, returns the selector.
fn take_upcall(m: &Machine, id: usize) -> u64 {
    m.interrupts(id);
    let info = (INFO_GFN + id as u64) * 4096 + 64;
    let sel = m.xen.memory().read_obj(Gpa(info + 8)).unwrap();
    m.xen.memory().write(Gpa(info), &[0; 16]).unwrap();
    sel
}

fn shared_word(m: &Machine, offset: usize) -> u64 {
    m.xen
        .memory()
        .read_obj(Gpa(SHARED_GFN * 4096 + offset as u64))
        .unwrap()
}

fn bind_ipi(m: &mut Machine, vcpu: u32) -> u32 {
    let mut a = event::BindIpi { vcpu, port: 0 };
    assert_eq!(
        m.call_with(nr::EVENT_CHANNEL_OP, event::BIND_IPI, &mut a),
        0
    );
    a.port
}

fn bind_virq(m: &mut Machine, virq: u32, vcpu: u32) -> Result<u32, i64> {
    let mut a = event::BindVirq {
        virq,
        vcpu,
        port: 0,
    };
    match m.call_with(nr::EVENT_CHANNEL_OP, event::BIND_VIRQ, &mut a) {
        0 => Ok(a.port),
        e => Err(e),
    }
}

fn port_op(m: &mut Machine, op: u64, mut port: u32) -> i64 {
    m.call_with(nr::EVENT_CHANNEL_OP, op, &mut port)
}
