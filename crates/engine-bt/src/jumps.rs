//! Where code is, by virtual address: the jump caches of the frame, and beside each a table the monitor can read back.

use hospes_translate::Mode;
use hospes_translate::layout::{JUMP_ENTRIES, jump_index};
use hospes_units::PAGE_SIZE;

use crate::exec;
use crate::frame::Frame;
use crate::host::LARGE_BITS;

#[derive(Clone, Copy)]
struct Entry {
    pc: u64,
    direct: u32,
    mode: Mode,
}

/// Entries remembered for a flush one by one; with more, the whole table is reset.
const LIST_MAX: usize = 4096;

/// No code lies at an address that is not canonical.
const NOWHERE: Entry = Entry {
    pc: 0x8000_0000_0000_0000,
    direct: 0,
    mode: Mode(0),
};

/// What of a code page's mapping decides when a jump to it must be forgotten.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    /// Survives address-space switches.
    pub global: bool,
    /// Is larger than 4 KiB.
    pub large: bool,
}

impl Mapping {
    pub fn of(t: &exec::Translation) -> Mapping {
        Mapping {
            global: t.global,
            large: t.page_bits > 12,
        }
    }

    /// For code that depends on both.
    pub fn and(self, other: Mapping) -> Mapping {
        Mapping {
            global: self.global && other.global,
            large: self.large || other.large,
        }
    }
}

/// The monitor's side of a vCPU's jump caches. Invariant: wherever a cache of the frame does not hold `miss`, the entry here says what it holds.
pub(crate) struct Jumps {
    miss: u64,
    tables: [Box<[Entry]>; 3],
    filled: [Vec<u16>; 3],
    /// Some kernel entry came from a mapping that does not survive address-space switches.
    kernel_local: bool,
    /// Gigabytes of address space with code in large pages.
    large: Vec<u64>,
}

impl Jumps {
    pub fn new(miss: u64) -> Jumps {
        let table = || vec![NOWHERE; JUMP_ENTRIES].into_boxed_slice();
        Jumps {
            miss,
            tables: [table(), table(), table()],
            filled: Default::default(),
            kernel_local: false,
            large: Vec::new(),
        }
    }

    /// Position of the direct entry for `pc`, if it is known.
    pub fn get(&self, table: usize, mode: Mode, pc: u64) -> Option<u32> {
        let e = &self.tables[table][jump_index(pc)];
        (e.pc == pc && e.mode == mode).then_some(e.direct)
    }

    /// Adds a target. `address` is what the frame's cache jumps to.
    pub fn add(
        &mut self,
        frame: &mut Frame,
        mode: Mode,
        pc: u64,
        direct: u32,
        address: u64,
        mapping: Mapping,
    ) {
        let table = mode.table();
        self.enter_mode(frame, mode);
        let n = jump_index(pc);
        self.tables[table][n] = Entry { pc, direct, mode };
        frame.jumps[table][n] = address;
        if self.filled[table].len() < LIST_MAX {
            self.filled[table].push(n as u16);
        }
        self.kernel_local |= table != 0 && !mapping.global;
        let region = pc >> LARGE_BITS;
        if mapping.large && !self.large.contains(&region) {
            self.large.push(region);
        }
    }

    fn flush(&mut self, frame: &mut Frame, table: usize) {
        if self.filled[table].len() >= LIST_MAX {
            self.tables[table].fill(NOWHERE);
            frame.jumps[table].fill(self.miss);
        } else {
            for &n in &self.filled[table] {
                self.tables[table][usize::from(n)] = NOWHERE;
                frame.jumps[table][usize::from(n)] = self.miss;
            }
        }
        self.filled[table].clear();
    }

    pub fn flush_all(&mut self, frame: &mut Frame) {
        for table in 0..3 {
            self.flush(frame, table);
        }
        self.kernel_local = false;
        self.large.clear();
    }

    /// Forgets what an address-space switch may change.
    pub fn flush_local(&mut self, frame: &mut Frame) {
        self.flush(frame, 0);
        if self.kernel_local {
            self.flush_all(frame);
        }
    }

    /// Called when code of this mode is about to run: targets of another mode must not be reached from it.
    pub fn enter_mode(&mut self, frame: &mut Frame, mode: Mode) {
        let kernel = !mode.has(Mode::USER);
        let base = u32::from(mode.0 & !Mode::AC);
        if frame.jump_bases[usize::from(kernel)] != base {
            frame.jump_bases[usize::from(kernel)] = base;
            if kernel {
                self.flush(frame, 1);
                self.flush(frame, 2);
            } else {
                self.flush(frame, 0);
            }
        }
    }

    /// Forgets the target at one address.
    pub fn forget(&mut self, frame: &mut Frame, pc: u64) {
        let n = jump_index(pc);
        for table in 0..3 {
            if self.tables[table][n].pc == pc {
                self.tables[table][n] = NOWHERE;
                frame.jumps[table][n] = self.miss;
            }
        }
    }

    /// Forgets the targets in the page around `gva`.
    pub fn flush_page(&mut self, frame: &mut Frame, gva: u64) {
        if self.large.contains(&(gva >> LARGE_BITS)) {
            // How much of the gigabyte the forgotten translation covered is not known.
            return self.flush_all(frame);
        }
        let page = gva & !(PAGE_SIZE - 1);
        // Instructions that begin in the page before may end in this one.
        for back in 1..15 {
            self.forget(frame, page.wrapping_sub(back));
        }
        let first = jump_index(page);
        let last = jump_index(page + PAGE_SIZE - 1);
        for table in 0..3 {
            for n in first..=last {
                if self.tables[table][n].pc & !(PAGE_SIZE - 1) == page {
                    self.tables[table][n] = NOWHERE;
                    frame.jumps[table][n] = self.miss;
                }
            }
        }
    }
}
