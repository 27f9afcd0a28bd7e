//! Which entries of the software TLBs have been filled since the last flush, kept in the frame: emitted code adds to it.

use hospes_translate::layout::TLB_ENTRIES;

/// Indices of filled entries, some perhaps more than once. A list that is full says nothing: any entry may be filled.
#[derive(Debug)]
#[repr(C)]
pub struct Filled {
    /// At most [`TLB_ENTRIES`].
    pub count: u64,
    pub list: [u16; TLB_ENTRIES],
}

impl Filled {
    pub fn push(&mut self, n: usize) {
        if let Some(to) = self.list.get_mut(self.count as usize) {
            *to = n as u16;
            self.count += 1;
        }
    }

    pub fn is_full(&self) -> bool {
        self.count as usize >= TLB_ENTRIES
    }

    pub fn clear(&mut self) {
        self.count = 0;
    }

    pub fn list(&self) -> &[u16] {
        &self.list[..(self.count as usize).min(TLB_ENTRIES)]
    }
}

/// Gigabytes of address space in which large pages stand behind some entries of a TLB; each is one that the monitor's own list has, too.
pub const LARGE_KNOWN: usize = 4;
/// No address lies there.
pub const NO_REGION: u64 = u64::MAX;

/// Where the pieces of memory are that a walk in emitted code may touch. What lies elsewhere is left to the monitor.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Memory {
    /// Host address of guest physical address 0.
    pub base: u64,
    /// Bytes of the RAM that begins at 0.
    pub low_bytes: u64,
    /// First address and bytes of the next piece.
    pub high_start: u64,
    pub high_bytes: u64,
    /// Host address of the bitmap of frames with code.
    pub code_pages: u64,
    /// Host address of the bitmap of frames to which a write has to be noted first.
    pub unnoted: u64,
    /// Host address of the code cache.
    pub code_cache: u64,
}
