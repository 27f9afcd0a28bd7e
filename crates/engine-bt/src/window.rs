//! Host address space for accesses that cross pages: two pages of guest memory shown side by side, and pages with nothing behind them.

use std::ptr;

use hospes_units::PAGE_SIZE;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};

use crate::exec::HOLES_MEMORY;

const PAGE: usize = PAGE_SIZE as usize;

/// Address space of two pages, for atomic accesses from one to the other.
#[derive(Debug)]
pub struct Window(*mut u8);

// SAFETY: the mapping belongs to this value alone and is the same for all threads of the process.
unsafe impl Send for Window {}

impl Window {
    pub fn new() -> Result<Window, rustix::io::Errno> {
        // SAFETY: a new anonymous mapping overlaps nothing.
        let p = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                2 * PAGE,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )
        }?;
        Ok(Window(p.cast()))
    }

    /// Shows two pages of guest memory, until the next call. `first` and `second` are where they are mapped, shared.
    pub fn show(&mut self, first: *mut u8, second: *mut u8) -> Result<*mut u8, rustix::io::Errno> {
        for (page, place) in [(first, self.0), (second, self.0.wrapping_add(PAGE))] {
            // SAFETY: an old size of 0 makes another mapping of the same shared page and leaves the old one; the place is inside the window.
            unsafe {
                rustix::mm::mremap_fixed(page.cast(), 0, PAGE, MremapFlags::MAYMOVE, place.cast())
            }?;
        }
        Ok(self.0)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the address space was reserved in `new`, and what is shown in it is used only while it is borrowed.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), 2 * PAGE) };
    }
}

/// Address space of four pages, of which only number [`HOLES_MEMORY`] is memory.
#[derive(Debug)]
pub struct Holes(*mut u8);

// SAFETY: the mapping belongs to this value alone and is the same for all threads of the process.
unsafe impl Send for Holes {}

impl Holes {
    pub fn new() -> Result<Holes, rustix::io::Errno> {
        // SAFETY: a new anonymous mapping overlaps nothing.
        let p = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                4 * PAGE,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )
        }?;
        let holes = Holes(p.cast());
        let memory = holes.0.wrapping_add(HOLES_MEMORY * PAGE);
        // SAFETY: the page lies in the mapping just made.
        unsafe {
            rustix::mm::mprotect(
                memory.cast(),
                PAGE,
                rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
            )
        }?;
        Ok(holes)
    }

    /// Address of the first of the four.
    pub fn start(&self) -> *mut u8 {
        self.0
    }
}

impl Drop for Holes {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and is used only while it is borrowed.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), 4 * PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use hospes_memory::{GuestMemory, Range};
    use hospes_units::{Gfn, Gpa};

    use super::*;

    #[test]
    fn pages_shown_are_those_of_the_guest() {
        let memory = GuestMemory::new(&[Range {
            start: 0,
            end: 64 * PAGE_SIZE,
        }])
        .unwrap();
        let page = |gfn| memory.page(Gfn(gfn)).unwrap();
        let mut window = Window::new().unwrap();
        for (first, second) in [(9, 3), (0, 63), (5, 5)] {
            let shown = window.show(page(first), page(second)).unwrap();
            let word = u64::from_le_bytes([first as u8; 8]) ^ second;
            // SAFETY: the window shows two pages; the word lies across their border.
            unsafe { shown.add(PAGE - 4).cast::<u64>().write_unaligned(word) };
            let mut bytes = [0; 8];
            memory
                .read(Gpa(first * PAGE_SIZE + PAGE_SIZE - 4), &mut bytes[..4])
                .unwrap();
            memory
                .read(Gpa(second * PAGE_SIZE), &mut bytes[4..])
                .unwrap();
            assert_eq!(u64::from_le_bytes(bytes), word);
        }
    }
}
