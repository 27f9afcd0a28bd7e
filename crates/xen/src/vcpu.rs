//! What is kept of each vCPU.

use std::sync::atomic::{AtomicBool, AtomicU8};
use std::sync::{Arc, Mutex, OnceLock};

use hospes_engine::VcpuControl;
use hospes_memory::{Area, GuestMemory, MemoryError, Page};
use hospes_xen_abi::shared::{LEGACY_VCPUS, VI_TIME, VcpuInfo};

use crate::runstate::RunstateAccount;
use crate::sched_op::PollWait;

const INFO_BYTES: usize = size_of::<VcpuInfo>();

/// One vCPU.
pub(crate) struct VcpuSlot {
    pub control: OnceLock<Arc<dyn VcpuControl>>,
    /// Its `vcpu_info` until it registers one: in the shared info page, or in a page of its own.
    default_info: Area,
    /// The one it registered; once in the domain's life.
    pub registered_info: OnceLock<Area>,
    /// Local APIC vector of upcalls; 0 before it is set.
    pub upcall_vector: AtomicU8,
    /// The last upcall found the local APIC disabled.
    pub upcall_lost: AtomicBool,
    /// `VCPUOP_up` and `VCPUOP_down`: whether it may run at all.
    pub up: AtomicBool,
    /// It waits for an interrupt.
    pub idle: AtomicBool,
    pub polling: Mutex<Option<PollWait>>,
    pub run: Mutex<RunstateAccount>,
}

impl VcpuSlot {
    /// The `vcpu_info` in use.
    pub fn info(&self) -> &Area {
        self.registered_info.get().unwrap_or(&self.default_info)
    }

    /// Time, ns, that the vCPU has waited for a host CPU outside of its thread.
    pub fn waited_elsewhere(&self) -> u64 {
        self.control.get().map_or(0, |c| c.wait_elsewhere_ns())
    }
}

/// Makes the vCPUs and gives the time areas that are to be filled from the start.
pub(crate) fn make_slots(
    memory: &Arc<GuestMemory>,
    shared: &Page,
    vcpus: u32,
) -> Result<(Vec<VcpuSlot>, Vec<Area>), MemoryError> {
    let mut slots = Vec::new();
    let mut time_areas = Vec::new();
    for id in 0..vcpus as usize {
        let (page, offset) = if id < LEGACY_VCPUS {
            (shared.clone(), id * INFO_BYTES)
        } else {
            (Page::new_special(memory)?.0, 0)
        };
        time_areas.push(Area::in_page(page.clone(), offset + VI_TIME));
        slots.push(VcpuSlot {
            control: OnceLock::new(),
            default_info: Area::in_page(page, offset),
            registered_info: OnceLock::new(),
            upcall_vector: AtomicU8::new(0),
            upcall_lost: AtomicBool::new(false),
            up: AtomicBool::new(true),
            idle: AtomicBool::new(false),
            polling: Mutex::new(None),
            run: Mutex::new(RunstateAccount::default()),
        });
    }
    Ok((slots, time_areas))
}
