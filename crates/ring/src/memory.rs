//! The bytes of a ring.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// Memory that two sides use at the same time. Offsets are below [`SharedMemory::bytes`]; implementations may panic beyond.
pub trait SharedMemory {
    /// Size of the ring, with its header.
    fn bytes(&self) -> usize;

    /// An index of the header: `offset` is a multiple of 4, below [`crate::HEADER_BYTES`].
    fn word(&self, offset: usize) -> &AtomicU32;

    /// Copies bytes out. The other side may change them meanwhile: what is read may be any mixture.
    fn read(&self, offset: usize, buf: &mut [u8]);

    /// Copies bytes in.
    fn write(&self, offset: usize, buf: &[u8]);
}

/// A ring in memory of our own, for tests; clones share it.
#[derive(Clone, Debug)]
pub struct LocalMemory(Arc<[AtomicU32]>);

impl LocalMemory {
    /// Zeroed memory; `bytes` is a multiple of 4.
    pub fn new(bytes: usize) -> LocalMemory {
        LocalMemory((0..bytes / 4).map(|_| AtomicU32::new(0)).collect())
    }
}

impl SharedMemory for LocalMemory {
    fn bytes(&self) -> usize {
        self.0.len() * 4
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        &self.0[offset / 4]
    }

    fn read(&self, offset: usize, buf: &mut [u8]) {
        for (i, byte) in buf.iter_mut().enumerate() {
            let at = offset + i;
            *byte = self.0[at / 4].load(Relaxed).to_le_bytes()[at % 4];
        }
    }

    fn write(&self, offset: usize, buf: &[u8]) {
        for (i, byte) in buf.iter().enumerate() {
            let at = offset + i;
            let mut word = self.0[at / 4].load(Relaxed).to_le_bytes();
            word[at % 4] = *byte;
            self.0[at / 4].store(u32::from_le_bytes(word), Relaxed);
        }
    }
}
