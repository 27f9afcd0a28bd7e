//! Pages that the guest and the monitor use at the same time.
//!
//! Words that both sides modify are atomics; bytes that only one side may write at a time are copied. Nothing hands out references to
//! plain guest bytes, so a hostile guest can make the monitor read nonsense but not break a promise of the language.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

use hospes_units::{Gfn, Gpa, PAGE_SIZE};

use crate::{GuestMemory, MemoryError};

const BYTES: usize = PAGE_SIZE as usize;

/// A page frame that stays mapped as long as this value lives. As it is written at any time, a frame of RAM counts as written all that time.
#[derive(Clone, Debug)]
pub struct Page {
    ptr: NonNull<u8>,
    /// Keeps the mapping behind `ptr`.
    _hold: Arc<Hold>,
}

#[derive(Debug)]
struct Hold {
    memory: Arc<GuestMemory>,
    /// `None` where no guest frame is meant.
    gfn: Option<Gfn>,
}

impl Hold {
    fn new(memory: &Arc<GuestMemory>, gfn: Option<Gfn>) -> Arc<Hold> {
        if let Some(gfn) = gfn {
            memory.log().hold(gfn);
        }
        Arc::new(Hold {
            memory: Arc::clone(memory),
            gfn,
        })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(gfn) = self.gfn {
            self.memory.log().release(gfn);
        }
    }
}

// SAFETY: the page is reached only through atomics and raw copies, see the module's comment.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// The page a guest frame shows. It stays memory even where the frame is given something else to show later.
    ///
    /// Fails where the frame is not backed.
    pub fn of_frame(memory: &Arc<GuestMemory>, gfn: Gfn) -> Result<Page, MemoryError> {
        let ptr = memory
            .page(gfn)
            .and_then(NonNull::new)
            .ok_or(MemoryError::NotMemory {
                gpa: gfn.gpa(),
                len: PAGE_SIZE,
            })?;
        Ok(Page {
            ptr,
            _hold: Hold::new(memory, Some(gfn)),
        })
    }

    /// A new zeroed page that no guest frame shows yet, and its offset in the memory file.
    pub fn new_special(memory: &Arc<GuestMemory>) -> Result<(Page, u64), MemoryError> {
        let offset = memory.new_special_page()?;
        let ptr = memory.map_special_for_monitor(offset)?;
        let ptr = NonNull::new(ptr).ok_or(MemoryError::NotMemory {
            gpa: Gpa(0),
            len: PAGE_SIZE,
        })?;
        Ok((
            Page {
                ptr,
                _hold: Hold::new(memory, None),
            },
            offset,
        ))
    }

    fn at(&self, offset: usize, len: usize, align: usize) -> *mut u8 {
        assert!(
            offset <= BYTES - len && offset.is_multiple_of(align),
            "offset {offset} of {len} bytes does not lie in a page"
        );
        // SAFETY: the offset was just checked to lie in the page.
        unsafe { self.ptr.as_ptr().add(offset) }
    }

    /// The byte at `offset`; panics outside the page.
    pub fn u8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: the address is valid for as long as `self`; every access in the monitor is atomic, and what the guest does at the
        // same time is atomic on this architecture.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1, 1)) }
    }

    /// The word at `offset`; panics outside the page or where it is not aligned.
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `u8`, and `at` checked the alignment: pages are aligned to 4096.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4, 4).cast()) }
    }

    /// The word at `offset`; panics outside the page or where it is not aligned.
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `u32`.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8, 8).cast()) }
    }

    /// Copies bytes out; panics outside the page.
    pub fn read(&self, offset: usize, buf: &mut [u8]) {
        let p = self.at(offset, buf.len(), 1);
        // SAFETY: `at` checked the range; `buf` is memory of ours, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), buf.len()) }
    }

    /// Copies bytes in; panics outside the page.
    pub fn write(&self, offset: usize, buf: &[u8]) {
        let p = self.at(offset, buf.len(), 1);
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), p, buf.len()) }
    }
}

/// A structure of 8-byte words in guest memory that may lie across two pages.
#[derive(Clone, Debug)]
pub struct Area {
    first: Page,
    offset: usize,
    second: Option<Page>,
}

impl Area {
    /// An area inside one page; panics where `offset` is not 8-byte aligned.
    pub fn in_page(page: Page, offset: usize) -> Area {
        assert!(offset.is_multiple_of(8) && offset < BYTES);
        Area {
            first: page,
            offset,
            second: None,
        }
    }

    /// An area that goes on at the start of `second`.
    pub fn across(first: Page, offset: usize, second: Page) -> Area {
        Area {
            second: Some(second),
            ..Area::in_page(first, offset)
        }
    }

    fn locate(&self, byte: usize) -> (&Page, usize) {
        let at = self.offset + byte;
        match &self.second {
            Some(second) if at >= BYTES => (second, at - BYTES),
            _ => (&self.first, at),
        }
    }

    /// The byte `byte` bytes into the area; panics outside its pages, as all below.
    pub fn u8(&self, byte: usize) -> &AtomicU8 {
        let (page, at) = self.locate(byte);
        page.u8(at)
    }

    pub fn u32(&self, byte: usize) -> &AtomicU32 {
        let (page, at) = self.locate(byte);
        page.u32(at)
    }

    pub fn u64(&self, byte: usize) -> &AtomicU64 {
        let (page, at) = self.locate(byte);
        page.u64(at)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::Range;

    fn memory() -> Arc<GuestMemory> {
        Arc::new(
            GuestMemory::new(&[Range {
                start: 0,
                end: 0x4000,
            }])
            .unwrap(),
        )
    }

    #[test]
    fn write_word_shows_in_guest_memory() {
        let m = memory();
        let page = Page::of_frame(&m, Gfn(1)).unwrap();
        page.u64(8).store(0x1122, Relaxed);
        assert_eq!(m.read_obj::<u64>(Gpa(0x1008)).unwrap(), 0x1122);
        assert!(Page::of_frame(&m, Gfn(4)).is_err());
    }

    #[test]
    fn locate_word_across_pages_lands_on_the_second() {
        let m = memory();
        let area = Area::across(
            Page::of_frame(&m, Gfn(1)).unwrap(),
            4096 - 8,
            Page::of_frame(&m, Gfn(3)).unwrap(),
        );
        area.u64(0).store(1, Relaxed);
        area.u64(8).store(2, Relaxed);
        assert_eq!(m.read_obj::<u64>(Gpa(0x1ff8)).unwrap(), 1);
        assert_eq!(m.read_obj::<u64>(Gpa(0x3000)).unwrap(), 2);
    }

    #[test]
    #[should_panic(expected = "does not lie in a page")]
    fn read_word_beyond_the_page_panics() {
        let m = memory();
        Page::of_frame(&m, Gfn(1)).unwrap().u64(4096);
    }
}
