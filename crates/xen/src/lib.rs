//! What Xen does for a guest, without Xen: hypercalls, event channels, grant tables, time.
//!
//! Engine-blind: a vCPU is a [`Vcpu`] and a [`VcpuControl`], nothing more is known of it. The owner of the domain runs the vCPU threads and calls
//! [`Xen::hypercall`] from them; what the guest asks of those threads comes back as an [`Outcome`].
//!
//! Refuses: PV guests, grant maps made by the guest (it hosts no back ends), event channels between two guests, more than 4096 ports
//! (the FIFO interface); all these answer -ENOSYS. Callers in 32-bit code get those calls whose structures do not depend on the width.
//!
//! Invariants: every word that the guest may change at the same time is an atomic; whatever is read from the guest is copied once and
//! checked; no guest value panics. Lock order: ports before a vCPU's own locks; no call-back runs under a lock.
//! Limits: 128 vCPUs, 64 grant frames, 1024 different places for shared pages, 4096 ports.
#![forbid(unsafe_code)]

mod attend;
mod callback;
pub mod clock;
pub mod console;
mod events;
mod fuzz;
mod grants;
mod guest;
mod hostport;
mod hvm_op;
mod memory_op;
mod runstate;
mod saved;
mod sched_op;
mod time;
mod timers;
mod upcall;
mod vcpu;
mod vcpu_op;
mod version_op;
mod xenstore;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hospes_engine::{Vcpu, VcpuControl, Vm, reg};
use hospes_memory::{GuestMemory, MemoryError, Page};
use hospes_units::{DomId, Gfn, Gpa, VcpuId};
use hospes_xen_abi::{Errno, hypercall};

pub use attend::Attended;
pub use clock::{Calibration, TscRate};
pub use console::ConsoleRing;
pub use events::EventError;
pub use fuzz::fuzz_rings;
pub use grants::{Access, GrantError};
pub use hospes_xen_abi::memory::E820;
pub use hostport::{HostPort, Listener};
pub use saved::Balloon;
pub use timers::ClockThread;
pub use xenstore::{ProtocolError, StoreConnection, StoreRing};

use guest::{Call, Reply};

/// Most vCPUs of a domain.
pub const MAX_VCPUS: u32 = 128;

/// Which instruction the stubs of a hypercall page use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrapInstruction {
    /// Intel and all others.
    Vmcall,
    /// AMD and Hygon.
    Vmmcall,
}

/// What the Xen side must know of a new domain.
#[derive(Clone, Debug)]
pub struct Config {
    pub domid: DomId,
    pub uuid: [u8; 16],
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    pub trap: TrapInstruction,
    /// The memory map as the start info gives it.
    pub memory_map: Vec<E820>,
    /// RAM in the memory map, in pages: what the guest's balloon calls its maximum.
    pub ram_pages: u64,
    /// How many of them it may have at first; it has to give the others back.
    pub pages: u64,
    pub store_gfn: Gfn,
    pub console_gfn: Gfn,
    /// Frames of the grant table, at most; Xen's default is 64.
    pub grant_frames: u32,
    pub tsc: TscRate,
    /// System time at which the clock starts, ns: 0 but for a restored domain.
    pub system_time_ns: u64,
}

/// Why a domain's Xen side cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum XenError {
    #[error("a domain has 1 to {MAX_VCPUS} vCPUs, not {0}: change `vcpus` in its configuration")]
    Vcpus(u32),
    #[error("a domain has 1 to {max} grant frames, not {0}", max = grants::MAX_FRAMES)]
    GrantFrames(u32),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("cannot start the thread of the domain's clock: {0}")]
    Thread(std::io::Error),
}

/// Why a guest stops itself (`SCHEDOP_shutdown`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownReason {
    PowerOff,
    Reboot,
    Suspend,
    Crash,
    Watchdog,
    SoftReset,
}

/// What the calling vCPU's thread does after a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Runs on.
    Resume,
    /// Lets other threads run first.
    Yield,
    /// Waits until [`Xen::poll_done`], then calls [`Xen::end_poll`]; may be woken without cause.
    Poll,
    /// Stops until [`Xen::is_up`].
    Down,
    /// Stops all vCPUs.
    Shutdown(ShutdownReason),
}

/// The owner of the domain, as this crate sees it. All methods return at once and may be called from any thread.
pub trait Host: Send + Sync {
    /// Wakes the thread of a vCPU that waits outside the engine, to look at its conditions again.
    fn wake(&self, vcpu: VcpuId);

    /// Bytes the guest writes without its console: early messages and panics.
    fn console_write(&self, bytes: &[u8]);

    /// A watchdog of the guest has expired. False where the guest is held and could not renew it: it gets its whole time again.
    fn watchdog_expired(&self) -> bool;
}

/// The Xen side of one domain.
pub struct Xen {
    config: Config,
    memory: Arc<GuestMemory>,
    vm: Arc<dyn Vm>,
    host: Arc<dyn Host>,
    /// The shared info page, as the monitor sees it.
    shared: Page,
    shared_offset: u64,
    vcpus: Vec<vcpu::VcpuSlot>,
    ports: Mutex<events::Ports>,
    attended: attend::AttendedQueues,
    /// vCPUs that wait in a poll.
    pollers: AtomicU32,
    time: time::Time,
    timers: timers::Timers,
    grants: Mutex<grants::Grants>,
    memory_state: Mutex<memory_op::MemoryState>,
    callback: callback::Callback,
    params: Mutex<hvm_op::Params>,
    /// Runstate areas are marked while they are written.
    runstate_flag: std::sync::atomic::AtomicBool,
}

/// Takes a lock; a thread that panicked while holding it left data that is valid, if old.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Xen {
    /// Makes the Xen side of a domain whose memory exists and whose vCPUs do not run yet. Its clock starts now.
    pub fn new(
        config: Config,
        memory: Arc<GuestMemory>,
        vm: Arc<dyn Vm>,
        host: Arc<dyn Host>,
    ) -> Result<Arc<Xen>, XenError> {
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(XenError::Vcpus(config.vcpus));
        }
        if config.grant_frames == 0 || config.grant_frames > grants::MAX_FRAMES {
            return Err(XenError::GrantFrames(config.grant_frames));
        }
        let (shared, shared_offset) = Page::new_special(&memory)?;
        let (vcpus, time_areas) = vcpu::make_slots(&memory, &shared, config.vcpus)?;
        let time = time::Time::new(
            config.tsc,
            config.system_time_ns,
            shared.clone(),
            time_areas,
            vcpus.len(),
        );
        let now = time.now_ns();
        for slot in &vcpus {
            lock(&slot.run).start(now);
        }
        let grants = grants::Grants::new(&memory, &config)?;
        Ok(Arc::new(Xen {
            ports: Mutex::new(events::Ports::new(vcpus.len())),
            attended: attend::AttendedQueues::default(),
            pollers: AtomicU32::new(0),
            timers: timers::Timers::new(vcpus.len()),
            grants: Mutex::new(grants),
            memory_state: Mutex::new(memory_op::MemoryState::new(config.ram_pages, config.pages)),
            callback: callback::Callback::default(),
            params: Mutex::new(hvm_op::Params::new(&config)),
            runstate_flag: false.into(),
            time,
            vcpus,
            shared,
            shared_offset,
            config,
            memory,
            vm,
            host,
        }))
    }

    /// Introduces a vCPU's control. Events that came before are not lost.
    pub fn attach_vcpu(&self, id: VcpuId, control: Arc<dyn VcpuControl>) {
        if let Some(slot) = self.vcpus.get(id.0 as usize) {
            let _ = slot.control.set(control);
            self.raise_again(id.0 as usize);
        }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// What executes the guest.
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    pub fn domid(&self) -> DomId {
        self.config.domid
    }

    /// System time, ns since the domain's start.
    pub fn system_time_ns(&self) -> u64 {
        self.time.now_ns()
    }

    /// Tells the guest that it was paused, so that its watchdogs stay quiet.
    pub fn mark_stopped(&self) {
        self.time.mark_stopped();
    }

    /// Tells the engine that the monitor changed a range of guest memory: back ends call this after each transfer into the guest.
    pub fn mark_written(&self, gpa: Gpa, len: u64) {
        self.vm.mark_written(gpa, len);
    }

    /// Fills the hypercall page at the address written to MSR 0x40000000: the low 12 bits are the page's index and must be 0. False where
    /// there is no memory or no such page.
    pub fn write_hypercall_page(&self, value: u64) -> bool {
        let gpa = Gpa(value);
        if gpa.page_offset() != 0 {
            return false;
        }
        let trap: [u8; 3] = match self.config.trap {
            TrapInstruction::Vmcall => [0x0f, 0x01, 0xc1],
            TrapInstruction::Vmmcall => [0x0f, 0x01, 0xd9],
        };
        let mut page = [0xcc; hospes_units::PAGE_SIZE as usize];
        for (n, stub) in page
            .chunks_exact_mut(hypercall::PAGE_STUB_BYTES)
            .enumerate()
        {
            if n as u64 == hypercall::IRET {
                stub[..2].copy_from_slice(&[0x0f, 0x0b]);
                continue;
            }
            stub[0] = 0xb8;
            stub[1..5].copy_from_slice(&(n as u32).to_le_bytes());
            stub[5..8].copy_from_slice(&trap);
            stub[8] = 0xc3;
        }
        let done = self.memory.write(gpa, &page).is_ok();
        if done {
            self.vm.mark_written(gpa, page.len() as u64);
        }
        done
    }

    /// Carries out the hypercall whose number and arguments are in the vCPU's registers, and leaves the result in RAX.
    pub fn hypercall(&self, vcpu: &mut dyn Vcpu, id: VcpuId) -> Outcome {
        self.callback_withdraw(id.0 as usize);
        let call = Call::of(vcpu.state());
        let reply = if vcpu.state().cpl() > 0 {
            Err(Errno::Perm)
        } else {
            self.dispatch(&call, vcpu, id.0 as usize)
        };
        self.raise_again(id.0 as usize);
        let (rax, outcome) = match reply {
            Ok(Reply::Value(value)) => (value, Outcome::Resume),
            Ok(Reply::Then(outcome)) => (0, outcome),
            Ok(Reply::Continue(first_argument)) => {
                call.rewind(vcpu, first_argument);
                return Outcome::Resume;
            }
            Err(errno) => (errno.as_rax(), Outcome::Resume),
        };
        vcpu.state().gpr[reg::RAX] = if call.wide { rax } else { rax & 0xffff_ffff };
        outcome
    }

    fn dispatch(&self, call: &Call, vcpu: &mut dyn Vcpu, id: usize) -> Result<Reply, Errno> {
        let [first, second, third, ..] = call.args;
        match call.number {
            hypercall::MEMORY_OP if call.wide => self.memory_op(vcpu, first, second),
            hypercall::XEN_VERSION => self.xen_version(vcpu, first, second),
            hypercall::CONSOLE_IO => self.console_io(vcpu, first, second, third),
            hypercall::GRANT_TABLE_OP => self.grant_table_op(vcpu, first, second, third),
            hypercall::VM_ASSIST => self.vm_assist(first, second),
            hypercall::VCPU_OP if call.wide => self.vcpu_op(vcpu, id, first, second, third),
            hypercall::SCHED_OP => self.sched_op(vcpu, id, call.wide, first, second),
            hypercall::EVENT_CHANNEL_OP => self.event_channel_op(vcpu, first, second),
            hypercall::HVM_OP => self.hvm_op(vcpu, first, second),
            _ => Err(Errno::NoSys),
        }
    }
}
