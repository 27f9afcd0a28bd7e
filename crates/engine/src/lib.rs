//! The interface between a domain and what executes its instructions. No implementation lives here.
//!
//! An engine runs vCPUs until something happens that it does not own: a hypercall, a port access, a halt. The guest
//! state is one plain structure, [`CpuState`], which every engine loads and stores; saved state, migration and tests
//! use nothing else.
#![forbid(unsafe_code)]

mod state;

use std::fmt;
use std::sync::Arc;

use hospes_memory::FrameSet;
use hospes_units::{Gpa, Gva, VcpuId};

pub use state::*;

/// Why [`Vcpu::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// VMCALL or VMMCALL at any privilege level; RIP is already behind the instruction. The caller reads the arguments from the registers
    /// and puts the result into RAX.
    Hypercall,
    /// IN or OUT of `size` bytes (1, 2, 4); RIP is already behind the instruction. For an OUT the value is in `value`. For an IN the
    /// caller puts the result into the low `size` bytes of RAX (a 4-byte IN zero-extends).
    PortIo {
        port: u16,
        size: u8,
        write: bool,
        value: u32,
    },
    /// A write to an MSR that belongs to the domain and not to the CPU; RIP is already behind the instruction.
    MsrWrite { index: u32, value: u64 },
    /// HLT with nothing to deliver; RIP is already behind the instruction. With interrupts off nothing but an INIT or NMI wakes it again.
    Halt { interrupts_enabled: bool },
    /// PAUSE loops or a hint that the vCPU is spinning.
    Yield,
    /// Triple fault, with the RIP of the instruction that caused it.
    Shutdown { rip: u64 },
    /// [`VcpuControl::kick`] was called.
    Kicked,
}

/// An engine failure that is not the guest's doing; the domain cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the host lacks {what}, which the {engine} engine needs: {why}")]
    Host {
        engine: &'static str,
        what: String,
        why: String,
    },
    #[error("internal error of the {engine} engine at guest address {rip:#x}: {what}")]
    Internal {
        engine: &'static str,
        rip: u64,
        what: String,
    },
}

/// A virtual address that the guest's page tables do not map for the access wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtFault {
    pub gva: Gva,
}

impl fmt::Display for VirtFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest address {} is not mapped", self.gva)
    }
}

/// One virtual machine: its memory is given at creation, its vCPUs are made here.
pub trait Vm: Send + Sync {
    /// Creates a vCPU; each number once.
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>, EngineError>;

    /// Tells the engine that the monitor has written (or is about to show something else at) this range of guest memory: translated code and
    /// cached translations of it are dropped before this returns. It is noted in the memory's log of written frames.
    fn mark_written(&self, gpa: Gpa, len: u64);

    /// Begins a round of the memory's log of written frames, with the first one the log: gives the frames that were written in the round before, none in the first.
    /// From when this returns, every frame that a vCPU writes is noted in the new round; what one has written unnoted is in frames given here, which are to be
    /// read after this. One thread at a time begins and ends rounds.
    fn begin_round(&self) -> FrameSet;

    /// Ends the last round, and the log.
    fn end_rounds(&self);
}

/// One virtual CPU, owned by the thread that runs it.
pub trait Vcpu: Send {
    /// Runs the guest until something happens that the engine does not handle itself.
    fn run(&mut self) -> Result<Exit, EngineError>;

    /// The state, exact between two calls of [`Vcpu::run`]; the XSAVE image in it only after [`Vcpu::fetch_fpu`].
    fn state(&mut self) -> &mut CpuState;

    /// Brings the XSAVE image in [`Vcpu::state`] up to date.
    fn fetch_fpu(&mut self);

    /// Must be called after changing anything but general registers, RIP and RFLAGS through [`Vcpu::state`]; the XSAVE image counts only if it was fetched
    /// before, or before the first run.
    fn state_changed(&mut self);

    /// Sets what the engine calls where it goes to and fro between this thread and another so often that finding each a host CPU would take longer than
    /// all else. To be set once, before the first run.
    fn set_stay(&mut self, _stay: Stay) {}

    /// The part that other threads may use.
    fn control(&self) -> Arc<dyn VcpuControl>;

    /// Copies from the guest's current address space, as the kernel (CPL 0) sees it.
    fn read_virt(&mut self, gva: Gva, buf: &mut [u8]) -> Result<(), VirtFault>;

    /// Copies into the guest's current address space, as the kernel (CPL 0) sees it.
    fn write_virt(&mut self, gva: Gva, buf: &[u8]) -> Result<(), VirtFault>;

    /// Guest physical address behind a virtual one, as the kernel sees it.
    fn translate(&mut self, gva: Gva) -> Option<Gpa>;
}

/// Keeps the calling thread, which is the vCPU's, on the host CPU where it is (true), or lets it go again; may be called too often.
pub type Stay = Arc<dyn Fn(bool) + Send + Sync>;

/// Wakes the thread of a vCPU that sleeps outside the engine; may be called from any thread, at any time, too often.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// What other threads may do to a vCPU. All methods return at once.
pub trait VcpuControl: Send + Sync {
    /// Sets what the engine calls when [`VcpuControl::has_wakeup`] becomes true while the vCPU is outside [`Vcpu::run`]: vCPUs interrupt one
    /// another inside the engine, and the thread of the other one may be asleep. To be set once, before the vCPU first runs.
    fn set_waker(&self, waker: Waker);

    /// Makes [`Vcpu::run`] return [`Exit::Kicked`] soon; sticky while the vCPU is not running.
    fn kick(&self);

    /// Raises a fixed, edge-triggered interrupt in the vCPU's local APIC; false where the APIC is disabled by software and the interrupt is
    /// lost.
    fn raise_interrupt(&self, vector: u8) -> bool;

    /// Asserts or withdraws an interrupt that is injected once, as soon as interrupts are enabled, without the local APIC. Whoever has a
    /// level-like cause asserts it again as long as the guest has not seen to it.
    fn set_callback_line(&self, vector: Option<u8>);

    /// Raises an NMI.
    fn raise_nmi(&self);

    /// True where something waits that would end a HLT now: an interrupt where they are enabled, an NMI, an INIT or start-up interrupt, a kick.
    /// May be true without cause once, never again and again without [`Vcpu::run`] between.
    fn has_wakeup(&self, interrupts_enabled: bool) -> bool;

    /// Host CPU time, ns, that the vCPU has used outside of its thread.
    fn time_elsewhere_ns(&self) -> u64 {
        0
    }

    /// Time, ns, that the vCPU has waited for a host CPU outside of its thread.
    fn wait_elsewhere_ns(&self) -> u64 {
        0
    }

    /// The vCPU's thread has been given other host CPUs, another priority or another group: what the engine runs for it elsewhere follows.
    fn place_changed(&self) {}
}
