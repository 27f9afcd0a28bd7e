//! Differential tests of the binary-translation engine: the host's processor is the oracle.
//!
//! A case is a piece of user code with its registers and memory. It runs natively in a process of its own ([`oracle`]) and in a guest ([`guest`]): translated
//! with a cold and with a warm TLB, and interpreted. Afterwards everything that code can see is [compared](compare): registers, flags, x87 and vector state,
//! memory, and for exceptions the vector, error code, RIP and CR2.
//!
//! The generators make single instructions of every form ([`single`]) and from random bytes ([`raw`]), loads and stores of the whole vector state ([`saved`]), random blocks ([`blocks`], and [`grouped`] of accesses that share a check) and code that changes itself ([`selfmod`]) from a seed.
//! `HOSPES_DIFF_SECONDS=n` runs each for n seconds in place of a fixed number of cases, `HOSPES_DIFF_SEED=s` takes other seeds, `HOSPES_DIFF_TRACE=1` prints every
//! case before it runs.
//!
//! [`smp`] runs programs on several vCPUs at once, and [`kernel`] a guest with privileged code, without the oracle.
//!
//! Not tested here: what needs privilege or devices, and instructions whose answer is the machine's own (CPUID, RDTSC, RDRAND).

pub mod blocks;
pub mod compare;
pub mod engine;
pub mod forms;
pub mod grouped;
pub mod guest;
pub mod kernel;
pub mod layout;
pub mod operands;
pub mod oracle;
pub mod program;
pub mod raw;
pub mod rng;
pub mod runner;
pub mod saved;
pub mod selfmod;
pub mod single;
pub mod smp;
pub mod state;
