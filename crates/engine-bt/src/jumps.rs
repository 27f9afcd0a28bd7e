//! Where code is, by virtual address: the jump caches of the frame, and beside each a table the monitor can read back.

use hospes_translate::Mode;
use hospes_translate::layout::{jump_entries, jump_index};
use hospes_units::PAGE_SIZE;

use crate::exec;
use crate::frame::{Frame, SECOND_ENTRIES, SecondEntry, second_index};
use crate::lookup::MAX_INSTRUCTION;
use crate::tlb::LARGE_BITS;

/// A jump target: its address, the position of its block's direct entry, and the mode of its code.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub pc: u64,
    pub direct: u32,
    pub mode: Mode,
}

/// The jump targets of user code, taken out of the tables.
#[derive(Default)]
pub(crate) struct UserJumps {
    /// The mode, without AC, that they are for.
    base: u32,
    /// Gigabytes of address space in which code lies in large pages.
    large: Vec<u64>,
    list: Vec<UserJump>,
}

struct UserJump {
    index: u16,
    entry: Entry,
    address: u64,
}

impl UserJumps {
    /// Forgets them all.
    pub fn clear(&mut self) {
        self.list.clear();
    }
}

/// Entries of a second cache in which the targets of one page are.
const SECOND_OF_PAGE: usize = PAGE_SIZE as usize / 4;
const _: () = assert!(SECOND_ENTRIES <= 1 << 16);
/// Entries remembered for a flush one by one; with more, the whole table is reset.
const LIST_MAX: usize = 4096;

/// What one jump cache of the frame holds. Memory that is all zero stands for nothing: what is not used takes none.
struct Table {
    pcs: Vec<u64>,
    /// Position of the direct entry in the lower half, the mode and [`Table::THERE`] in the upper one.
    rest: Vec<u64>,
}

impl Table {
    const THERE: u64 = 1 << 63;

    fn new(entries: usize) -> Table {
        Table {
            pcs: vec![0; entries],
            rest: vec![0; entries],
        }
    }

    fn get(&self, n: usize) -> Option<Entry> {
        let rest = self.rest[n];
        (rest != 0).then(|| Entry {
            pc: self.pcs[n],
            direct: rest as u32,
            mode: Mode((rest >> 32) as u16),
        })
    }

    fn set(&mut self, n: usize, entry: Entry) {
        self.pcs[n] = entry.pc;
        self.rest[n] = Table::THERE | u64::from(entry.mode.0) << 32 | u64::from(entry.direct);
    }

    fn take(&mut self, n: usize) -> Option<Entry> {
        let entry = self.get(n);
        self.rest[n] = 0;
        entry
    }

    fn clear(&mut self) {
        self.rest.fill(0);
    }
}

/// A set of guest pages that may hold more than was put into it.
struct PageSet(Box<[u64; PageSet::WORDS]>);

impl PageSet {
    const WORDS: usize = 256;

    fn place(gva: u64) -> (usize, u64) {
        let page = gva / PAGE_SIZE;
        let n = (page ^ page >> 14) as usize % (PageSet::WORDS * 64);
        (n / 64, 1 << (n % 64))
    }

    fn insert(&mut self, gva: u64) {
        let (word, bit) = PageSet::place(gva);
        self.0[word] |= bit;
    }

    fn may_have(&self, gva: u64) -> bool {
        let (word, bit) = PageSet::place(gva);
        self.0[word] & bit != 0
    }
}

impl Default for PageSet {
    fn default() -> PageSet {
        PageSet(Box::new([0; PageSet::WORDS]))
    }
}

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
    miss: [u64; 3],
    tables: [Table; 3],
    filled: [Vec<u16>; 3],
    /// The same for the second caches.
    second: [Vec<u16>; 2],
    /// Pages that have targets, for each cache.
    pages: [PageSet; 3],
    /// Those of them with targets whose instruction may end in the next page.
    ends: [PageSet; 3],
    /// Some kernel entry came from a mapping that does not survive address-space switches.
    kernel_local: bool,
    /// Some user entry came from a global mapping.
    user_global: bool,
    /// Gigabytes of address space with code in large pages.
    large: Vec<u64>,
}

impl Jumps {
    pub fn new(miss: [u64; 3]) -> Jumps {
        Jumps {
            miss,
            tables: [0, 1, 2].map(|table| Table::new(jump_entries(table))),
            filled: Default::default(),
            second: Default::default(),
            pages: Default::default(),
            ends: Default::default(),
            kernel_local: false,
            user_global: false,
            large: Vec::new(),
        }
    }

    /// Position of the direct entry for `pc`, if it is known.
    pub fn get(&self, table: usize, mode: Mode, pc: u64) -> Option<u32> {
        let e = self.tables[table].get(jump_index(table, pc))?;
        (e.pc == pc && e.mode == mode).then_some(e.direct)
    }

    /// Adds a target. `address` is what the frame's cache jumps to.
    pub fn add(&mut self, frame: &mut Frame, entry: Entry, address: u64, mapping: Mapping) {
        let Entry { pc, mode, .. } = entry;
        let table = mode.table();
        self.enter_mode(frame, mode);
        let n = jump_index(table, pc);
        self.tables[table].set(n, entry);
        frame.jumps(table)[n] = address;
        if self.filled[table].len() < LIST_MAX {
            self.filled[table].push(n as u16);
        }
        self.add_second(frame, table, pc, address);
        self.note(table, pc, mapping);
    }

    /// The same where nothing has jumped to yet: only free entries are used.
    pub fn offer(&mut self, frame: &mut Frame, entry: Entry, address: u64, mapping: Mapping) {
        let Entry { pc, mode, .. } = entry;
        let table = mode.table();
        self.enter_mode(frame, mode);
        if self.tables[table].get(jump_index(table, pc)).is_none() {
            return self.add(frame, entry, address, mapping);
        }
        let second = frame.second.get(table).map(|s| s[second_index(pc)].address);
        if second == Some(SecondEntry::EMPTY.address) {
            self.add_second(frame, table, pc, address);
            self.note(table, pc, mapping);
        }
    }

    /// Whether no target is known in the page around `pc`.
    pub fn is_new(&self, mode: Mode, pc: u64) -> bool {
        !self.pages[mode.table()].may_have(pc)
    }

    /// Notes what decides when a target must be forgotten.
    fn note(&mut self, table: usize, pc: u64, mapping: Mapping) {
        self.note_page(table, pc);
        self.kernel_local |= table != 0 && !mapping.global;
        self.user_global |= table == 0 && mapping.global;
        let region = pc >> LARGE_BITS;
        if mapping.large && !self.large.contains(&region) {
            self.large.push(region);
        }
    }

    fn note_page(&mut self, table: usize, pc: u64) {
        self.pages[table].insert(pc);
        if pc % PAGE_SIZE > PAGE_SIZE - MAX_INSTRUCTION as u64 {
            self.ends[table].insert(pc);
        }
    }

    fn add_second(&mut self, frame: &mut Frame, table: usize, pc: u64, address: u64) {
        if let Some(list) = self.second.get_mut(table) {
            let n = second_index(pc);
            frame.second[table][n] = SecondEntry { pc, address };
            if list.len() < LIST_MAX {
                list.push(n as u16);
            }
        }
    }

    fn flush(&mut self, frame: &mut Frame, table: usize) {
        if self.filled[table].len() >= LIST_MAX {
            self.tables[table].clear();
            frame.jumps(table).fill(self.miss[table]);
        } else {
            let jumps = frame.jumps(table);
            for &n in &self.filled[table] {
                self.tables[table].take(usize::from(n));
                jumps[usize::from(n)] = self.miss[table];
            }
        }
        self.filled[table].clear();
        self.flush_second(frame, table);
        if table == 0 {
            self.user_global = false;
        }
    }

    fn flush_second(&mut self, frame: &mut Frame, table: usize) {
        for set in [&mut self.pages[table], &mut self.ends[table]] {
            set.0.fill(0);
        }
        let Some(list) = self.second.get_mut(table) else {
            return;
        };
        let entries = &mut frame.second[table];
        if list.len() >= LIST_MAX {
            entries.fill(SecondEntry::EMPTY);
        } else {
            for &n in &*list {
                entries[usize::from(n)] = SecondEntry::EMPTY;
            }
        }
        list.clear();
    }

    /// Takes out the targets of user code, if they are at most so many and none outlives its address space.
    pub fn take_user(&mut self, frame: &mut Frame, most: usize) -> UserJumps {
        let mut taken = UserJumps::default();
        if self.user_global || self.filled[0].len() > most {
            return taken;
        }
        taken.base = frame.jump_bases[0];
        taken.large.clone_from(&self.large);
        taken.list.reserve_exact(self.filled[0].len());
        for &index in &self.filled[0] {
            let n = usize::from(index);
            let address = std::mem::replace(&mut frame.user_jumps[n], self.miss[0]);
            if let Some(entry) = self.tables[0].take(n) {
                taken.list.push(UserJump {
                    index,
                    entry,
                    address,
                });
            }
        }
        self.filled[0].clear();
        self.flush_second(frame, 0);
        taken
    }

    /// Puts targets of user code back into tables that hold none, if they are for the present mode.
    pub fn put_user(&mut self, frame: &mut Frame, jumps: &UserJumps) {
        if jumps.base != frame.jump_bases[0] {
            return;
        }
        for j in &jumps.list {
            let n = usize::from(j.index);
            self.tables[0].set(n, j.entry);
            frame.user_jumps[n] = j.address;
            self.filled[0].push(j.index);
            self.note_page(0, j.entry.pc);
            self.add_second(frame, 0, j.entry.pc, j.address);
        }
        for &region in &jumps.large {
            if !self.large.contains(&region) {
                self.large.push(region);
            }
        }
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

    /// Forgets an entry if it is one of those.
    fn forget_at(
        &mut self,
        frame: &mut Frame,
        table: usize,
        n: usize,
        which: impl Fn(Entry) -> bool,
    ) {
        if self.tables[table].get(n).is_some_and(which) {
            self.tables[table].take(n);
            frame.jumps(table)[n] = self.miss[table];
        }
    }

    /// Forgets the target at one address.
    pub fn forget(&mut self, frame: &mut Frame, pc: u64) {
        for table in 0..3 {
            self.forget_at(frame, table, jump_index(table, pc), |e| e.pc == pc);
        }
        for second in &mut frame.second {
            let e = &mut second[second_index(pc)];
            if e.pc == pc {
                *e = SecondEntry::EMPTY;
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
        let before = page.wrapping_sub(1);
        if self.ends.iter().any(|set| set.may_have(before)) {
            for back in 1..MAX_INSTRUCTION as u64 {
                self.forget(frame, page.wrapping_sub(back));
            }
        }
        let second = second_index(page) & !(SECOND_OF_PAGE - 1);
        for table in 0..3 {
            if !self.pages[table].may_have(page) {
                continue;
            }
            let first = jump_index(table, page);
            let last = jump_index(table, page + (PAGE_SIZE - 1));
            for n in first..=last {
                self.forget_at(frame, table, n, |e| e.pc & !(PAGE_SIZE - 1) == page);
            }
            if let Some(entries) = frame.second.get_mut(table) {
                for e in &mut entries[second..second + SECOND_OF_PAGE] {
                    if e.pc & !(PAGE_SIZE - 1) == page {
                        *e = SecondEntry::EMPTY;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::FrameBox;

    const MISS: [u64; 3] = [11, 12, 13];
    const LOCAL: Mapping = Mapping {
        global: false,
        large: false,
    };

    fn tables() -> (Jumps, FrameBox) {
        (Jumps::new(MISS), FrameBox::new(MISS, None).unwrap())
    }

    /// What the emitted code would find: in the first cache, in the second.
    fn found(frame: &mut Frame, table: usize, pc: u64) -> (u64, Option<u64>) {
        let e = frame.second[table][second_index(pc)];
        let second = (e.pc == pc && e.address != 0).then_some(e.address);
        (frame.jumps(table)[jump_index(table, pc)], second)
    }

    fn entry(mode: Mode, pc: u64, direct: u32) -> Entry {
        Entry { pc, direct, mode }
    }

    #[test]
    fn add_of_a_rival_keeps_both_in_the_second_cache() {
        for (a, b) in [
            (0xffff_ffff_8100_0040, 0xffff_ffff_8101_0040),
            // In the last four bytes of a page; the second goes on in the next.
            (0xffff_ffff_8100_0ffc, 0xffff_ffff_8100_0fff),
        ] {
            let (mut jumps, mut frame) = tables();
            let mode = Mode(Mode::LONG);
            assert_eq!(jump_index(1, a), jump_index(1, b));
            jumps.add(&mut frame, entry(mode, a, 1), 100, LOCAL);
            jumps.add(&mut frame, entry(mode, b, 2), 200, LOCAL);
            assert_eq!(found(&mut frame, 1, a), (200, Some(100)));
            assert_eq!(found(&mut frame, 1, b), (200, Some(200)));
            jumps.forget(&mut frame, a);
            assert_eq!(found(&mut frame, 1, a), (200, None));
        }
    }

    #[test]
    fn offer_takes_free_entries_only() {
        let (mut jumps, mut frame) = tables();
        let mode = Mode(Mode::LONG | Mode::USER);
        let (a, b) = (0x40_0040, 0x44_0040);
        assert_eq!(jump_index(0, a), jump_index(0, b));
        assert!(jumps.is_new(mode, a));
        jumps.offer(&mut frame, entry(mode, a, 1), 100, LOCAL);
        assert_eq!(found(&mut frame, 0, a), (100, Some(100)));
        jumps.offer(&mut frame, entry(mode, b, 2), 200, LOCAL);
        assert_eq!(found(&mut frame, 0, b), (100, Some(200)));
        jumps.offer(&mut frame, entry(mode, a, 3), 300, LOCAL);
        assert_eq!(found(&mut frame, 0, a), (100, Some(100)));
        assert!(!jumps.is_new(mode, b + 1));
        jumps.flush_page(&mut frame, b);
        assert_eq!(found(&mut frame, 0, b), (100, None));
    }

    #[test]
    fn flush_page_forgets_targets_of_that_page_only() {
        let (mut jumps, mut frame) = tables();
        let mode = Mode(Mode::LONG | Mode::USER);
        // The first crosses into the page that is flushed.
        let pcs = [0x40_0ffe, 0x40_1000, 0x40_1fff, 0x40_2000, 0x40_0ff0];
        for (n, pc) in pcs.into_iter().enumerate() {
            jumps.add(&mut frame, entry(mode, pc, 0), 100 + n as u64, LOCAL);
        }
        jumps.flush_page(&mut frame, 0x40_1234);
        let left = pcs.map(|pc| found(&mut frame, 0, pc).1);
        assert_eq!(left, [None, None, None, Some(103), Some(104)]);
        assert_eq!(found(&mut frame, 0, pcs[1]).0, MISS[0]);
    }

    #[test]
    fn flush_page_forgets_what_may_end_there() {
        let mode = Mode(Mode::LONG | Mode::USER);
        // Instructions have up to 15 bytes.
        for (pc, stays) in [(0x40_0ff1, true), (0x40_0ff2, false), (0x40_0fff, false)] {
            for parked in [false, true] {
                let (mut jumps, mut frame) = tables();
                jumps.add(&mut frame, entry(mode, pc, 0), 100, LOCAL);
                if parked {
                    let taken = jumps.take_user(&mut frame, 10);
                    jumps.put_user(&mut frame, &taken);
                }
                jumps.flush_page(&mut frame, 0x40_1000);
                let left = stays.then_some(100);
                assert_eq!(found(&mut frame, 0, pc), (left.unwrap_or(MISS[0]), left));
            }
        }
    }

    #[test]
    fn take_user_leaves_nothing_and_put_user_brings_it_back() {
        let (mut jumps, mut frame) = tables();
        let mode = Mode(Mode::LONG | Mode::USER);
        jumps.add(&mut frame, entry(mode, 0x40_1000, 0), 100, LOCAL);
        let taken = jumps.take_user(&mut frame, 10);
        assert_eq!(found(&mut frame, 0, 0x40_1000), (MISS[0], None));
        jumps.put_user(&mut frame, &taken);
        assert_eq!(found(&mut frame, 0, 0x40_1000), (100, Some(100)));
        jumps.flush_all(&mut frame);
        assert_eq!(found(&mut frame, 0, 0x40_1000), (MISS[0], None));
    }
}
