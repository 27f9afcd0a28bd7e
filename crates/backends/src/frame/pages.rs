//! Ring pages: frames of the guest in the order of the ring, which need not lie side by side.

use std::sync::atomic::AtomicU32;

use hospes_memory::Page;
use hospes_ring::SharedMemory;
use hospes_units::PAGE_SIZE;

const BYTES: usize = PAGE_SIZE as usize;

/// The pages of one ring; at least one.
#[derive(Debug)]
pub struct RingPages(Vec<Page>);

impl RingPages {
    /// `None` for no pages.
    pub fn new(pages: Vec<Page>) -> Option<RingPages> {
        (!pages.is_empty()).then_some(RingPages(pages))
    }

    /// Calls `f` with page, offset in it and range of the buffer, for each page that `offset..offset + len` touches.
    fn each(
        &self,
        offset: usize,
        len: usize,
        mut f: impl FnMut(&Page, usize, std::ops::Range<usize>),
    ) {
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let count = (BYTES - at % BYTES).min(len - done);
            f(&self.0[at / BYTES], at % BYTES, done..done + count);
            done += count;
        }
    }
}

impl SharedMemory for RingPages {
    fn bytes(&self) -> usize {
        self.0.len() * BYTES
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        self.0[0].u32(offset)
    }

    fn read(&self, offset: usize, buf: &mut [u8]) {
        self.each(offset, buf.len(), |page, at, range| {
            page.read(at, &mut buf[range])
        });
    }

    fn write(&self, offset: usize, buf: &[u8]) {
        self.each(offset, buf.len(), |page, at, range| {
            page.write(at, &buf[range])
        });
    }
}
