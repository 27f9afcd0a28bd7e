//! The guest's own tables, read without changing them.

use hospes_memory::GuestMemory;
use hospes_units::{Gfn, Gpa};

const ADDRESS: u64 = ((1 << 46) - 1) & !0xfff;
const PRESENT_USER: u64 = 5;
const WRITABLE: u64 = 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// What the guest's tables say of a page that user code may read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub gfn: Gfn,
    pub writable: bool,
    pub dirty: bool,
    pub accessed: bool,
    pub executable: bool,
}

/// Whether at most one entry of the root is in use for user code: a program that is being started has no more than its stack. 4-level tables.
pub fn begins(memory: &GuestMemory, root: u64) -> bool {
    let Ok(entries) = memory.read_obj::<[u64; 256]>(Gpa(root)) else {
        return false;
    };
    entries.iter().filter(|e| **e != 0).take(2).count() <= 1
}

/// The frame of the lowest page that user code may read, 4-level tables: that of the program's file, as a rule, and the same wherever the program runs. A few empty tables are
/// passed over.
pub fn lowest(memory: &GuestMemory, root: u64) -> Option<Gfn> {
    const TABLES: u32 = 16;
    fn within(memory: &GuestMemory, table: u64, level: u32, left: &mut u32) -> Option<Gfn> {
        *left = left.checked_sub(1)?;
        let entries: [u64; 512] = memory.read_obj(Gpa(table)).ok()?;
        let user = if level == 3 { 256 } else { 512 };
        let mut present = entries[..user]
            .iter()
            .filter(|e| *e & PRESENT_USER == PRESENT_USER);
        present.find_map(|entry| {
            if level == 0 || *entry & LARGE != 0 {
                return Some(Gfn((entry & ADDRESS) >> 12));
            }
            within(memory, entry & ADDRESS, level - 1, left)
        })
    }
    within(memory, root & ADDRESS, 3, &mut TABLES.clone())
}

/// Where the translations of 512 neighbouring pages stand, all of them reached through the same entries above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// The page of entries; for a page of 2 MiB its only entry.
    entry: u64,
    large: bool,
    writable: bool,
    executable: bool,
}

impl Table {
    /// By page number / 512; 4-level tables. `None` where user code has no access, or to a page of 1 GiB.
    pub fn of(memory: &GuestMemory, cr3: u64, region: u64) -> Option<Table> {
        let (mut table, mut all, mut any) = (cr3 & ADDRESS, WRITABLE, 0u64);
        for level in (0..3).rev() {
            let slot = table + (region >> (9 * level) & 0x1ff) * 8;
            let entry: u64 = memory.read_obj(Gpa(slot)).ok()?;
            if entry & PRESENT_USER != PRESENT_USER || level == 1 && entry & LARGE != 0 {
                return None;
            }
            all &= entry;
            any |= entry;
            table = entry & ADDRESS;
            if level == 0 {
                let large = entry & LARGE != 0;
                return Some(Table {
                    entry: if large { entry } else { table },
                    large,
                    writable: all & WRITABLE != 0,
                    executable: any & NO_EXECUTE == 0,
                });
            }
        }
        None
    }

    /// Whether it is one page of 2 MiB.
    pub fn is_large(&self) -> bool {
        self.large
    }

    /// Reads the entries; those of a page of 2 MiB are all that page's.
    pub fn read(&self, memory: &GuestMemory, entries: &mut [u64; 512]) -> bool {
        if self.large {
            entries.fill(self.entry);
            return true;
        }
        match memory.read_obj(Gpa(self.entry)) {
            Ok(read) => *entries = read,
            Err(_) => return false,
        }
        true
    }

    /// What stands there of a page, by number.
    pub fn mapping(&self, memory: &GuestMemory, page: u64) -> Option<Mapping> {
        let n = page & 511;
        if self.large {
            return self.mapping_by(self.entry, n);
        }
        let entry: u64 = memory.read_obj(Gpa(self.entry + 8 * n)).ok()?;
        self.mapping_by(entry, n)
    }

    /// What an entry of this table says of the page at this place in it.
    pub fn mapping_by(&self, entry: u64, n: u64) -> Option<Mapping> {
        if entry & PRESENT_USER != PRESENT_USER {
            return None;
        }
        let first = (entry & ADDRESS) >> 12;
        Some(Mapping {
            gfn: Gfn(if self.large { first & !511 | n } else { first }),
            writable: self.writable && entry & WRITABLE != 0,
            dirty: entry & DIRTY != 0,
            accessed: entry & ACCESSED != 0,
            executable: self.executable && entry & NO_EXECUTE == 0,
        })
    }
}

/// What the guest's tables say of one page, by number. `None` where user code has no access.
pub fn look_up(memory: &GuestMemory, cr3: u64, page: u64) -> Option<Mapping> {
    Table::of(memory, cr3, page >> 9)?.mapping(memory, page)
}
