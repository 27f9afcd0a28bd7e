//! The engine that executes a new domain, and the domain's processor as that engine asks for it.
//!
//! The one place that knows engines by name: what is above it has a [`Vm`] and nothing more, and the engines do not know the
//! feature model. So far there is one engine, the translator.
#![forbid(unsafe_code)]

use std::sync::Arc;

use hospes_cpuid::{CpuidTable, Dynamic, Vendor};
use hospes_engine::{CpuState, EngineError, Vm, cr};
use hospes_engine_bt::{BtVm, CodeCache, Execution, Options, Processor, exec};
use hospes_memory::GuestMemory;
use hospes_units::VcpuId;

/// What of a machine has to be made while its process has rights that it is to give up.
#[derive(Debug)]
pub struct Prepared(CodeCache);

/// Prepares a machine with this memory.
pub fn prepare(memory: &GuestMemory) -> Result<Prepared, EngineError> {
    CodeCache::new(code_bytes(memory.reserved_bytes())).map(Prepared)
}

/// A virtual machine for the given memory, what CPUID shows, the number of vCPUs, and whether long-running user code may be executed natively. Refuses a host that no engine runs on.
pub fn create_vm(
    memory: Arc<GuestMemory>,
    cpuid: CpuidTable,
    vcpus: u32,
    direct: bool,
    prepared: Prepared,
) -> Result<Arc<dyn Vm>, EngineError> {
    let processor = Arc::new(TableProcessor(cpuid));
    let code_bytes = code_bytes(memory.reserved_bytes());
    Ok(Arc::new(BtVm::with_code(
        memory,
        processor,
        vcpus,
        Options {
            execution: if direct {
                Execution::Adaptive
            } else {
                Execution::Translated
            },
            code_bytes,
        },
        prepared.0,
    )?))
}

/// Bytes of the code cache for so much guest memory. A compiler that is started again and again needs more than the least; with several programs' worth of
/// memory there may be several at work.
fn code_bytes(memory_bytes: u64) -> usize {
    (memory_bytes / 4).clamp(128 << 20, 256 << 20) as usize
}

/// A domain's CPUID table as the translator looks it up.
struct TableProcessor(CpuidTable);

impl Processor for TableProcessor {
    fn cpuid(&self, vcpu: VcpuId, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let now = Dynamic {
            vcpu: vcpu.0,
            apic_id: cpu.lapic.id,
            osxsave: cpu.cr4 & cr::CR4_OSXSAVE != 0,
            xcr0: cpu.xcr0,
        };
        self.0.lookup(leaf, subleaf, &now)
    }

    fn vendor(&self) -> exec::Vendor {
        match self.0.vendor() {
            Vendor::Amd => exec::Vendor::Amd,
            Vendor::Intel | Vendor::Other => exec::Vendor::Intel,
        }
    }

    fn arch_capabilities(&self) -> u64 {
        self.0.arch_capabilities().unwrap_or(0)
    }
}
