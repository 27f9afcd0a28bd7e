//! A mirror of 4-level tables with one page of entries, for the addresses from 0 on.

use std::os::fd::AsRawFd;

use hospes_memory::Range;
use hospes_units::Gpa;

use super::*;

const TOP: u64 = 0x1000;
const ENTRIES: u64 = 0x4000;
/// Present, writable, user, accessed, dirty.
const ALL: u64 = 0x67;
const CLEAN: u64 = 0x27;
const READ_ONLY: u64 = 0x65;

struct Bench {
    memory: GuestMemory,
    code: CodePages,
    process: Process,
    mirror: Mirror,
}

impl Bench {
    fn new() -> Bench {
        let range = Range {
            start: 0,
            end: 1 << 20,
        };
        let memory = GuestMemory::new(&[range]).unwrap();
        let process = Process::new(memory.fd().as_raw_fd()).unwrap();
        for table in [TOP, 0x2000, 0x3000] {
            memory
                .write_obj(Gpa(table), &((table + 0x1000) | ALL))
                .unwrap();
        }
        Bench {
            memory,
            code: CodePages::new(256),
            process,
            mirror: Mirror::default(),
        }
    }

    /// Points a page at a frame.
    fn set(&self, page: u64, gfn: u64, flags: u64) {
        let entry = gfn << 12 | flags;
        self.memory
            .write_obj(Gpa(ENTRIES + 8 * page), &entry)
            .unwrap();
    }

    /// Sets entries and maps what they say.
    fn map(&mut self, pages: &[(u64, u64, u8)]) -> Vec<Call> {
        let new: Vec<(u64, Page)> = pages
            .iter()
            .map(|&(at, gfn, prot)| (at, page(gfn, prot)))
            .collect();
        for &(at, gfn, prot) in pages {
            self.set(at, gfn, if prot & WRITE != 0 { ALL } else { READ_ONLY });
        }
        let calls = self.mirror.add(&self.process, &new);
        self.process.batch(&calls).unwrap();
        calls
    }

    fn refresh(&mut self) -> usize {
        let facts = Facts {
            memory: &self.memory,
            code: &self.code,
            cr3: TOP,
        };
        let calls = self.mirror.refresh(&self.process, &facts);
        self.process.batch(&calls).unwrap();
        calls.len()
    }
}

fn page(n: u64, prot: u8) -> Page {
    Page {
        gfn: Gfn(n),
        offset: n * 4096,
        prot,
    }
}

const BOTH: u8 = READ | WRITE;

#[test]
fn add_joins_what_is_contiguous_on_both_sides() {
    let calls = Bench::new().map(&[(16, 4, READ), (17, 5, READ), (18, 6, BOTH), (20, 7, BOTH)]);
    assert_eq!(calls.len(), 3);
    assert_eq!((calls[0][1], calls[0][2]), (16 << 12, 8192));
}

#[test]
fn refresh_removes_what_is_gone_and_lowers_rights() {
    let mut bench = Bench::new();
    bench.map(&[
        (20, 20, BOTH),
        (21, 21, BOTH),
        (22, 22, BOTH),
        (23, 23, BOTH),
    ]);
    bench.set(20, 20, 0);
    bench.set(21, 21, CLEAN);
    bench.set(23, 33, ALL);
    assert_eq!(bench.refresh(), 0, "nothing was flushed");
    bench.mirror.flush_all();
    assert_eq!(bench.refresh(), 3);
    assert_eq!(bench.mirror.get(20), None);
    assert_eq!(bench.mirror.get(21), Some(page(21, READ)));
    assert_eq!(bench.mirror.get(22), Some(page(22, BOTH)));
    assert_eq!(bench.mirror.get(23), None);
}

#[test]
fn refresh_sees_an_entry_that_is_again_what_it_was_at_the_last_comparison() {
    let mut bench = Bench::new();
    bench.set(20, 20, CLEAN);
    bench.map(&[(21, 21, BOTH)]);
    bench.mirror.flush_all();
    bench.refresh();
    bench.map(&[(20, 20, BOTH)]);
    bench.set(20, 20, CLEAN);
    bench.mirror.flush_all();
    assert_eq!(bench.refresh(), 1);
    assert_eq!(bench.mirror.get(20), Some(page(20, READ)));
}

#[test]
fn refresh_sees_another_table() {
    let mut bench = Bench::new();
    bench.map(&[(20, 20, BOTH)]);
    bench.mirror.flush_all();
    assert_eq!(bench.refresh(), 0);
    // Empty entries in another place, then no table at all.
    for entry in [0x5000 | ALL, 0] {
        bench.map(&[(20, 20, BOTH)]);
        bench.memory.write_obj(Gpa(0x3000), &entry).unwrap();
        bench.mirror.flush_all();
        assert_eq!(bench.refresh(), 1);
        assert_eq!(bench.mirror.get(20), None);
    }
}

#[test]
fn refresh_takes_the_right_to_write_what_has_become_code() {
    let mut bench = Bench::new();
    bench.map(&[(20, 20, BOTH), (21, 21, BOTH)]);
    bench.refresh();
    let mut blocks = crate::blocks::Blocks::new(0, 1 << 20);
    assert!(blocks.mark(&bench.code, Gfn(200)));
    assert_eq!(bench.refresh(), 0);
    assert!(blocks.mark(&bench.code, Gfn(20)));
    assert_eq!(bench.refresh(), 1);
    assert_eq!(bench.mirror.get(20), Some(page(20, READ)));
    assert_eq!(bench.mirror.get(21), Some(page(21, BOTH)));
    // More marks than are remembered.
    for n in 0..10_000 {
        if n % 200 == 0 {
            blocks.clear(&bench.code);
        }
        blocks.mark(&bench.code, Gfn(30 + n % 200));
    }
    assert!(blocks.mark(&bench.code, Gfn(21)));
    assert_eq!(bench.refresh(), 1);
    assert_eq!(bench.mirror.get(21), Some(page(21, READ)));
}

#[test]
fn refresh_drops_executable_pages_that_were_written() {
    let mut bench = Bench::new();
    bench.code.mark_direct(Gfn(20));
    bench.map(&[(20, 20, READ | EXEC), (21, 21, READ)]);
    assert_eq!(bench.refresh(), 0);
    crate::blocks::Blocks::new(0, 1 << 20).clear(&bench.code);
    assert_eq!(bench.refresh(), 1);
    assert_eq!(bench.mirror.get(20), None);
    assert_eq!(bench.mirror.get(21), Some(page(21, READ)));
}

#[test]
fn refresh_drops_executable_pages_that_were_written_and_looked_at_again() {
    let mut bench = Bench::new();
    bench.code.mark_direct(Gfn(20));
    bench.map(&[(20, 20, READ | EXEC), (21, 21, READ)]);
    assert_eq!(bench.refresh(), 0);
    bench.code.drop_direct(Gfn(20));
    bench.code.mark_direct(Gfn(20));
    assert_eq!(bench.refresh(), 1);
    assert_eq!(bench.mirror.get(20), None);
    // More than are remembered.
    bench.map(&[(20, 20, READ | EXEC)]);
    for _ in 0..10_000 {
        bench.code.mark_direct(Gfn(30));
        bench.code.drop_direct(Gfn(30));
    }
    assert_eq!(bench.refresh(), 1);
    assert_eq!(bench.mirror.get(20), None);
}

#[test]
fn refresh_removes_what_has_to_be_marked_as_accessed_again() {
    const ACCESSED: u64 = 0x20;
    let mut bench = Bench::new();
    bench.map(&[(20, 20, BOTH)]);
    bench.set(20, 20, ALL & !ACCESSED);
    bench.mirror.flush_page(20);
    assert_eq!(bench.refresh(), 1);
    assert_eq!(bench.mirror.get(20), None);
}

#[test]
fn flush_page_of_a_large_page_compares_all_of_it() {
    const LARGE: u64 = 0x80;
    let mut bench = Bench::new();
    bench.map(&[(20, 20, BOTH), (21, 21, BOTH)]);
    let entry = Gpa(0x3000);
    bench.memory.write_obj(entry, &(ALL | LARGE)).unwrap();
    bench.mirror.flush_all();
    assert_eq!(bench.refresh(), 0, "it is the same memory");
    bench.memory.write_obj(entry, &(READ_ONLY | LARGE)).unwrap();
    bench.mirror.flush_page(0);
    assert_eq!(bench.refresh(), 1);
    assert_eq!(bench.mirror.get(20), Some(page(20, READ)));
    assert_eq!(bench.mirror.get(21), Some(page(21, READ)));
    bench.memory.write_obj(entry, &0u64).unwrap();
    bench.mirror.flush_page(99);
    bench.mirror.flush_page(512);
    assert_eq!(bench.refresh(), 1);
    assert_eq!(bench.mirror.get(20), None);
    assert_eq!(bench.mirror.get(21), None);
}

#[test]
fn flush_page_leaves_other_tables_alone() {
    let mut bench = Bench::new();
    bench.map(&[(20, 20, READ)]);
    bench.set(20, 20, 0);
    bench.mirror.flush_page(512 + 20);
    assert_eq!(bench.refresh(), 0);
    assert_eq!(bench.mirror.get(20), Some(page(20, READ)));
}
