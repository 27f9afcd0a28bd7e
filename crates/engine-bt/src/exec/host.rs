//! What the instruction semantics need from the engine around them.

use hospes_engine::{CpuState, Exit};
use hospes_memory::GuestMemory;
use hospes_units::{Gpa, Gva};
use iced_x86::Instruction;

use super::decoded::Decoded;
use super::walk::{Access, PageFault, walk};

/// Whose manual the processor follows where the two differ. Hygon counts as AMD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    Intel,
    Amd,
}

/// Which cached translations of this vCPU a guest action makes invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbFlush {
    /// Everything, global entries and all PCIDs included.
    All,
    /// Everything but global entries, in all PCIDs.
    NonGlobal,
    /// One page of the current PCID, global entries of that page included.
    Page(Gva),
    /// All non-global entries of one PCID.
    Pcid(u16),
    /// One page of one PCID; global entries may stay.
    PageOfPcid { pcid: u16, gva: Gva },
    /// CR3 names another address space; entries tagged with its PCID stay valid (bit 63 was set).
    Switch,
}

/// The memory operand of an instruction that runs natively: host memory that stands in for the guest's.
///
/// `ptr` is valid for reads and writes of `len` bytes during the call, and equals the guest address modulo 64, so that the
/// processor itself finds misaligned operands. It points to guest memory itself, or to a private copy where the operand
/// crosses a page or is not backed by memory.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    pub ptr: *mut u8,
    pub len: usize,
}

/// The exception that a natively run instruction raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NativeFault {
    /// #DE
    Divide,
    /// #MF
    X87,
    /// #XM
    Simd,
    /// #UD: the host does not have the instruction, or it cannot be encoded.
    Undefined,
    /// #GP: a misaligned operand.
    Protection,
    /// The operand lies where the host has no memory, at this host address. For operands in [`Host::holes`] only.
    Missing(u64),
}

/// Four pages of host address space, of which only the third is memory.
pub const HOLES_MEMORY: usize = 2;

/// Destination shorthand of an inter-processor interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    None,
    Oneself,
    All,
    Others,
}

/// What an inter-processor interrupt does at its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Sets the vector in the target's IRR.
    Fixed,
    /// As `Fixed`, to one of the targets.
    LowestPriority,
    Smi,
    Nmi,
    Init,
    /// Start-up: execution begins at physical address `vector << 12` in real mode.
    Startup,
}

/// An inter-processor interrupt, decoded from the ICR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// APIC id, or a logical destination if `logical`; 0xffff_ffff means everyone.
    pub dest: u32,
    pub logical: bool,
    pub delivery: Delivery,
    pub vector: u8,
    pub shorthand: Shorthand,
}

/// The engine as the semantics see it. Called on the vCPU's own thread.
pub trait Host {
    fn memory(&self) -> &GuestMemory;

    fn vendor(&self) -> Vendor;

    /// The CPU has written this physical range: whatever was translated from it is dropped before this returns. Called after the write, so that
    /// who translates the range at the same time either reads the new bytes or is found here.
    /// The range lies in one page. Called for every write, so it must be cheap for pages without code.
    fn written(&mut self, gpa: Gpa, len: usize);

    /// Memory in which the pages of both addresses are neighbours, at the first address: for atomic accesses to both. `None` where that
    /// cannot be had.
    fn neighbours(&mut self, _first: Gpa, _second: Gpa) -> Option<*mut u8> {
        None
    }

    /// Four pages at which instructions can be tried whose operand is partly missing: only number [`HOLES_MEMORY`] is memory. `None` where that cannot
    /// be had.
    fn holes(&mut self) -> Option<*mut u8> {
        None
    }

    /// Drops cached translations. `cpu` already holds the new control registers.
    fn tlb_flush(&mut self, cpu: &CpuState, what: TlbFlush);

    /// Runs one instruction on the host CPU with the general registers, status flags, DF and x87/SSE/AVX state of `cpu`, and stores them
    /// back. RIP is left alone. On a fault nothing of `cpu` changes but the sticky exception flags of MXCSR and the x87 status word.
    ///
    /// The x87 instruction and data pointers in `cpu.xsave` must never be host addresses.
    fn run_native(
        &mut self,
        cpu: &mut CpuState,
        instr: &Instruction,
        operand: Option<Operand>,
    ) -> Result<(), NativeFault>;

    /// EAX, EBX, ECX, EDX as this guest sees them; `cpu` for what mirrors CR4 and XCR0.
    fn cpuid(&self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4];

    /// The host's time-stamp counter.
    fn host_tsc(&self) -> u64;

    /// Sends an interrupt to other vCPUs (or oneself, for anything but a fixed one).
    fn send_ipi(&mut self, ipi: Ipi);

    /// Value of IA32_ARCH_CAPABILITIES where CPUID offers it.
    fn arch_capabilities(&self) -> u64 {
        0
    }

    /// An MSR that is not known here; `None` raises #GP.
    fn read_msr(&mut self, _cpu: &CpuState, _index: u32) -> Option<u64> {
        None
    }

    /// An MSR that is not known here; `None` raises #GP.
    fn write_msr(&mut self, _cpu: &mut CpuState, _index: u32, _value: u64) -> Option<()> {
        None
    }

    /// Makes `cpu.xsave` current, before it is looked at. x87 and vector state may live elsewhere between.
    fn load_fpu(&mut self, _cpu: &mut CpuState) {}

    /// Makes `cpu.xsave` the state the guest goes on with, after it was changed.
    fn store_fpu(&mut self, _cpu: &mut CpuState) {}

    /// Whether these components are all of the x87 and vector state: where they are all replaced, `cpu.xsave` need not be current before.
    fn is_all_fpu(&self, _components: u64) -> bool {
        false
    }

    /// Where decoded instructions are kept; the host's vendor must stay what it is.
    fn decoded(&mut self) -> Option<&mut Decoded> {
        None
    }

    /// The guest has enabled or disabled its local APIC by software: whether it takes interrupts from now on.
    fn set_apic_enabled(&mut self, _on: bool) {}

    /// Guest physical address behind a linear one. A TLB may stand in front of [`walk`].
    fn translate(&mut self, cpu: &CpuState, gva: Gva, access: Access) -> Result<Gpa, PageFault> {
        walk(cpu, self.memory(), gva, access).map(|t| t.gpa)
    }
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The vCPU goes on at `cpu.rip`.
    Continue,
    /// Somebody else has to do something first; the state is that after the instruction.
    Exit(Exit),
}

/// A guest exception, with what the processor reports along with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    pub vector: u8,
    pub error_code: Option<u32>,
    /// New value of CR2, for page faults.
    pub cr2: Option<u64>,
}

/// Exception vectors.
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

impl Exception {
    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Exception {
        Exception {
            vector,
            error_code: None,
            cr2: None,
        }
    }

    /// An exception with an error code.
    pub const fn coded(vector: u8, code: u32) -> Exception {
        Exception {
            vector,
            error_code: Some(code),
            cr2: None,
        }
    }

    pub const fn ud() -> Exception {
        Self::plain(vector::UD)
    }

    pub const fn nm() -> Exception {
        Self::plain(vector::NM)
    }

    pub const fn gp(code: u32) -> Exception {
        Self::coded(vector::GP, code)
    }

    pub const fn ss(code: u32) -> Exception {
        Self::coded(vector::SS, code)
    }

    pub const fn np(code: u32) -> Exception {
        Self::coded(vector::NP, code)
    }

    pub const fn ts(code: u32) -> Exception {
        Self::coded(vector::TS, code)
    }

    /// A page fault at a linear address.
    pub const fn page(gva: u64, fault: PageFault) -> Exception {
        Exception {
            vector: vector::PF,
            error_code: Some(fault.error_code),
            cr2: Some(gva),
        }
    }
}

impl From<NativeFault> for Exception {
    /// Simd becomes #XM; the caller makes it #UD where CR4.OSXMMEXCPT is clear.
    fn from(f: NativeFault) -> Exception {
        match f {
            NativeFault::Divide => Exception::plain(vector::DE),
            NativeFault::X87 => Exception::plain(vector::MF),
            NativeFault::Simd => Exception::plain(vector::XM),
            NativeFault::Undefined => Exception::ud(),
            NativeFault::Protection | NativeFault::Missing(_) => Exception::gp(0),
        }
    }
}
