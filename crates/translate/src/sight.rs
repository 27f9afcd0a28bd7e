//! What is known, when a block of kernel code is translated, of the memory that it will access.
//!
//! An access to memory that the kernel window shows needs no check: one instruction makes the host address of the guest's, and what is not there faults. Which accesses those will be is
//! guessed, from the registers with which the block is about to be entered and from what has faulted before.

use std::fmt;

/// What a translation may know of its accesses.
#[derive(Clone, Copy)]
pub struct Sight<'a> {
    /// General registers at the block's start.
    pub gpr: &'a [u64; 16],
    pub gs_base: u64,
    /// Whether the window shows a guest address.
    pub shows: &'a dyn Fn(u64) -> bool,
    /// It shows something.
    pub open: bool,
    /// Of the block's page, one bit for each byte: where an instruction begins that accesses other memory.
    pub elsewhere: Option<&'a [u64; 64]>,
}

impl fmt::Debug for Sight<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sight").finish_non_exhaustive()
    }
}

impl Sight<'_> {
    /// Whether the instruction at an address of the page accesses other memory.
    pub(crate) fn is_elsewhere(&self, pc: u64) -> bool {
        let at = pc as usize & 0xfff;
        self.elsewhere
            .is_some_and(|bits| bits[at / 64] >> (at % 64) & 1 != 0)
    }
}
