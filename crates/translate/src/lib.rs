//! Translates x86 code to x86 code: decode, classify, emit. A pure function from guest bytes to host bytes and tables.
//!
//! It maps nothing, starts no threads and keeps no blocks: the engine owns the code cache. Guest registers stay in the host registers of the same name; what is not
//! touched is re-emitted as it was. Rewritten are memory operands (a software TLB in front of each), control flow and what is privileged.
//! Refuses: instructions that cross the given bytes' end (the engine executes them alone). Limits: see [`emit`] and [`layout`].
#![forbid(unsafe_code)]

pub mod asm;
pub mod block;
mod class;
pub mod emit;
mod fuzz;
pub mod insn;
pub mod layout;
pub mod relocate;
mod sight;

pub use block::{ChainSite, Divert, Placement, Request, Resume, SideEntry, Translation};
pub use emit::Translator;
pub use fuzz::fuzz_translate;
pub use layout::{FrameLayout, Mode, Stubs, TlbEntry};
pub use relocate::{Move, Place};
pub use sight::Sight;
