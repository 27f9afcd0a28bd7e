//! Why a domain cannot be made, or does not take a request.

use hospes_builder::BuildError;
use hospes_cpuid::CpuidError;
use hospes_engine::EngineError;
use hospes_memory::MemoryError;
use hospes_units::VcpuId;
use hospes_xen::{EventError, XenError};

use crate::host_memory::Shortage;
use crate::saved::RestoreError;
use crate::share::ShareError;
use crate::{AttachError, EndReason};

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error(
        "Domain {name} cannot have its memory: {shortage}: stop another domain or lower `memory`"
    )]
    HostMemory { name: String, shortage: Shortage },
    #[error(
        "a domain cannot start with {memory_mib} MiB of memory where it has {max_mib} MiB at most: raise `maxmem` or lower `memory`"
    )]
    MemoryAboveMax { memory_mib: u64, max_mib: u64 },
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("cannot set up the domain's memory: {0}")]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Xen(#[from] XenError),
    #[error("cannot connect the domain's console and store: {0}")]
    Event(#[from] EventError),
    #[error("cannot fill the domain's store: {0}")]
    Store(#[from] hospes_store::Error),
    #[error("{0}")]
    Device(#[from] AttachError),
    #[error("cannot start a thread of the domain: {0}")]
    Thread(std::io::Error),
    #[error("cannot give up what the domain's process has no use for: {0}")]
    Confine(String),
}

#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("the domain has ended already ({0})")]
    Ended(EndReason),
    #[error("requests of device {0} wait ({1}): see to that first")]
    Held(String, String),
    #[error("its state cannot be written as text: {0}")]
    Text(serde_json::Error),
    #[error("the domain has no vCPU {id}: its last one is {last}")]
    NoVcpu { id: VcpuId, last: u32 },
    #[error(
        "{online} vCPUs cannot be online: the domain has {max} at most by its configuration (`maxvcpus', or `vcpus' without it), and at least 1 is online"
    )]
    Vcpus { online: u32, max: u32 },
    #[error(
        "memory_dynamic_max must be less than or equal to memory_static_max, which is {max_mib} MiB by the domain's configuration (`maxmem', or `memory' without it)"
    )]
    MemoryAboveMax { max_mib: u64 },
    #[error("a domain has {least_mib} MiB of memory at least")]
    MemoryTooLittle { least_mib: u64 },
    #[error(
        "memory_static_max must be greater than or equal to memory_dynamic_max, which is {target_kib} KiB: see mem-set"
    )]
    MemoryBelowTarget { target_kib: u64 },
    #[error("{0}: stop another domain, or take memory away from one with mem-set")]
    HostMemory(#[from] Shortage),
    #[error(
        "the guest has not suspended itself within {seconds} s, and goes on: does its kernel have a driver for it (feature-suspend in its part of the store)?"
    )]
    NoSuspend { seconds: u64 },
    #[error(
        "the guest has not acknowledged the request within {seconds} s, and may still follow it: unpause it where it is paused, see by its console whether it hangs or shuts down already, or destroy it"
    )]
    Unacknowledged { seconds: u64 },
    #[error("it is being suspended already: try again when that has ended")]
    Suspending,
    #[error("it is paused, and only a guest that runs can suspend itself: unpause it first")]
    Paused,
    #[error("the request was taken back, and the guest goes on")]
    TakenBack,
    #[error("the weight of a domain is 1 to 65535")]
    Weight,
    #[error(
        "a cap of {cap} is out of range: the domain has {vcpus} vCPU{plural}, so it is 0 to {max}",
        plural = if *vcpus == 1 { "" } else { "s" },
        max = vcpus * 100
    )]
    Cap { cap: u16, vcpus: u32 },
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error("the host does not let vCPU {id} run on these CPUs: {source}")]
    Affinity { id: VcpuId, source: std::io::Error },
    #[error("cannot write the request into the domain's store: {0}")]
    Store(#[from] hospes_store::Error),
}
