//! The binary-translation engine: runs x86-64 guests on x86-64 hosts without hardware virtualisation.
//!
//! Three layers: [`exec`] executes single instructions exactly, in any mode; `hospes-translate` turns whole blocks into host code; the rest of this crate keeps the
//! translated code, runs it and decides which of the two takes the next instruction.
//!
//! Invariants
//! * A block is found by guest physical address, virtual address and mode. Direct jumps between blocks stay inside one guest page, but for those of kernel
//!   code whose mapping is watched (`links.rs`); all others go through per-vCPU jump caches, which are reset with the TLB.
//! * A frame from which code was translated is marked before its bytes are read; every store to it, on any vCPU, takes the slow path and drops the blocks
//!   that overlap.
//! * A vCPU that is not inside translated code looks at its requests before it goes back, so whoever posts one needs to wait only for vCPUs that are inside.
//! * Code memory is written through one mapping and executed through another.
//! * A vCPU is run by one thread only. That thread's GS base is the vCPU's frame and its x87 state is the guest's.
//!
//! Limits: guests get x86-64-v3 at most; the host needs AVX2, BMI2 and user-mode signals.

mod blocks;
mod cache;
mod chains;
mod compaction;
mod control;
mod copies;
mod direct;
pub mod exec;
mod filled;
mod flat;
mod fpu;
mod frame;
mod host;
mod jumps;
mod kernel_window;
mod links;
mod lookup;
mod miss;
mod pages;
mod parked;
mod past;
mod positions;
mod refill;
mod signal;
mod space;
mod stubs;
mod tlb;
mod vcpu;
mod vm;
mod window;

pub use kernel_window::can_have_kernel_window;
pub use vm::{BtVm, CodeCache, Execution, Options, Processor};
