//! Where the next block has its place in the code cache.
//!
//! What is executed of a block where nothing is amiss lies close to that of others, and apart from the rest of it: together both are too much for a processor's
//! caches and TLBs. So a stretch of the cache is filled with hot parts from its start and with cold ones from its middle.

use hospes_translate::Placement;

/// Parts begin at multiples of this.
const ALIGN: usize = 16;

/// A stretch of the code cache.
#[derive(Debug)]
pub(crate) struct Space {
    start: usize,
    middle: usize,
    end: usize,
    /// Where the next hot part has its place, and the next cold one.
    hot: usize,
    cold: usize,
}

impl Space {
    pub fn new(start: usize, end: usize) -> Space {
        let start = start.next_multiple_of(ALIGN);
        // Both take about the same.
        let middle = (start + (end - start) / 2).next_multiple_of(ALIGN);
        Space {
            start,
            middle,
            end,
            hot: start,
            cold: middle,
        }
    }

    /// Where the cold parts begin.
    pub fn middle(&self) -> u32 {
        self.middle as u32
    }

    /// Whether a position is behind its start.
    pub fn contains(&self, pos: u32) -> bool {
        pos as usize >= self.start
    }

    /// Where the next block has its place; `None` when less than `room` bytes are left for one of its parts.
    pub fn place(&self, room: usize) -> Option<Placement> {
        let fits = self.hot + room <= self.middle && self.cold + room <= self.end;
        fits.then_some(Placement {
            hot: self.hot as u32,
            cold: self.cold as u32,
        })
    }

    /// A block with parts of these lengths lies there now.
    pub fn take(&mut self, hot: usize, cold: usize) {
        self.hot = (self.hot + hot).next_multiple_of(ALIGN);
        self.cold = (self.cold + cold).next_multiple_of(ALIGN);
    }

    /// Bytes that blocks have taken.
    pub fn used(&self) -> usize {
        self.hot - self.start + (self.cold - self.middle)
    }

    pub fn clear(&mut self) {
        self.hot = self.start;
        self.cold = self.middle;
    }
}
