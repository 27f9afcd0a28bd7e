//! What the guest's CPUID instruction answers: the feature model of a domain.
//!
//! The model is one table, bit by bit, in [`features`]: each bit has a name and says whether the engine implements it,
//! whether the host must have it because the instruction is copied, or why it is hidden. What is not in the table is hidden.
//! A domain's table is made once, from what the host has and what the domain's configuration wants; it never changes,
//! so that a guest can be moved to any host that can make the same one.
//!
//! What it refuses: hosts that lack a bit of the domain's level, by that bit's name.
//!
//! Invariants: looking up is pure and fast (guests execute CPUID in loops); only [`HostCpu::capture`] looks at the machine.
//! Limits: written for the translating engine, where guest page tables and guest branches never reach the hardware.
//! Sources: Intel SDM volume 2 "CPUID", AMD APM volume 3 appendix E, Xen's public/arch-x86/cpuid.h.
#![forbid(unsafe_code)]

mod caches;
mod capabilities;
mod features;
mod host;
mod saved;
mod table;
mod wishes;
mod xen;
mod xsave;

#[cfg(test)]
mod tests;

pub use features::{FEATURES, Feature, Need, Offer, Reg, Word};
pub use host::{Flaw, HostCpu, Vendor};
pub use saved::SavedFeatures;
pub use table::{CpuidError, CpuidTable, Dynamic, Level, Policy};
pub use wishes::{Wish, named};
