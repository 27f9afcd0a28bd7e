//! A window on memory that large pages map in order.

use std::sync::atomic::AtomicBool;

use hospes_engine::CpuState;
use hospes_memory::Range;
use hospes_translate::layout::window_address;

use super::*;
use crate::pages::CodePages;

const LARGE: u64 = 2 << 20;
const LINEAR: u64 = 0xffff_8880_0000_0000;
const TOP_BYTES: u64 = 1 << 39;
const ROOT: u64 = 0x1000;
const TABLES: u64 = 0x2000;
const OTHER_ROOT: u64 = 0x1_0000;
const STACK_TABLES: u64 = 0x2_0000;
const STACKS: u64 = 0xffff_c900_0000_0000;
const STACK_SLOT: u64 = STACKS >> 39 & 511;
/// Present, writable, accessed, dirty; and for the last level large and global.
const TABLE: u64 = 0x63;
const PAGE: u64 = TABLE | 0x180;

struct Bench {
    memory: GuestMemory,
    pages: CodePages,
    cpu: CpuState,
    window: KernelWindow,
    /// Of the vCPUs.
    roots: Vec<u64>,
}

impl Bench {
    /// All memory, a gigabyte at most, is mapped behind the first of these entries of the top table from [`LINEAR`] on, and once more behind each of the others.
    fn new(bytes: u64, entries: u64) -> Bench {
        let all = Range {
            start: 0,
            end: bytes,
        };
        let memory = GuestMemory::new(&[all]).unwrap();
        let put = |gpa, entry: u64| memory.write_obj(Gpa(gpa), &entry).unwrap();
        let first = LINEAR >> 39 & 511;
        for slot in first..first + entries {
            put(ROOT + 8 * slot, TABLES | TABLE);
        }
        put(TABLES, (TABLES + 0x1000) | TABLE);
        for n in 0..bytes / LARGE {
            put(TABLES + 0x1000 + 8 * n, (n * LARGE) | PAGE);
        }
        let mut cpu = CpuState {
            cr0: cr::CR0_PE | cr::CR0_PG | cr::CR0_WP,
            cr3: ROOT,
            cr4: cr::CR4_PAE | cr::CR4_PGE,
            ..CpuState::default()
        };
        cpu.msr.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
        Bench {
            memory,
            pages: CodePages::new(bytes / PAGE_SIZE),
            cpu,
            window: KernelWindow::default(),
            roots: vec![ROOT],
        }
    }

    fn show(&self, gva: u64) -> bool {
        self.ask(|window, asker| window.show(asker, gva))
    }

    fn ask<T>(&self, f: impl FnOnce(&KernelWindow, &Asker<'_>) -> T) -> T {
        let roots = |each: &mut dyn FnMut(u64)| self.roots.iter().for_each(|&root| each(root));
        let asker = Asker {
            cpu: &self.cpu,
            memory: &self.memory,
            pages: &self.pages,
            roots: &roots,
        };
        f(&self.window, &asker)
    }

    /// Shows the page of a stack for a vCPU that has its stack there.
    fn show_stack(&mut self, gva: u64) -> bool {
        self.cpu.gpr[4] = gva;
        self.show(gva)
    }

    /// Maps the same 512 frames in each 2 MiB behind an entry of the top table.
    fn map_stacks(&self, root: u64, slot: u64) {
        let put = |gpa, entry: u64| self.memory.write_obj(Gpa(gpa), &entry).unwrap();
        put(root + 8 * slot, STACK_TABLES | TABLE);
        for n in 0..512 {
            put(STACK_TABLES + 8 * n, (STACK_TABLES + 0x1000) | TABLE);
            put(
                STACK_TABLES + 0x1000 + 8 * n,
                (STACK_TABLES + 0x2000) | TABLE,
            );
            put(
                STACK_TABLES + 0x2000 + 8 * n,
                (LARGE + n * PAGE_SIZE) | TABLE | 0x100,
            );
        }
    }
}

/// Whether an address of this process can be read.
fn is_readable(address: u64) -> bool {
    let mut byte = 0u8;
    let [to, from] = [(&raw mut byte).cast(), address as *mut libc::c_void].map(|at| libc::iovec {
        iov_base: at,
        iov_len: 1,
    });
    // SAFETY: the kernel writes one byte that is there, and says so where the other is not.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) };
    read == 1
}

#[test]
fn memory_in_the_place_of_a_special_page_is_never_shown() {
    let bench = Bench::new(2 * LARGE, 1);
    let offset = bench.memory.new_special_page().unwrap();
    bench.memory.place_special(Gfn(700), offset).unwrap();
    if !bench.show(LINEAR) {
        assert!(!can_have_kernel_window());
        return;
    }
    let place = window_address(LINEAR + 700 * PAGE_SIZE);
    assert!(is_readable(place - 1) && is_readable(place + PAGE_SIZE));
    let done = AtomicBool::new(false);
    let times = std::thread::scope(|s| {
        let looks = s.spawn(|| {
            let looks = std::iter::from_fn(|| (!done.load(Ordering::SeqCst)).then_some(place));
            looks.filter(|&at| is_readable(at)).count()
        });
        for _ in 0..20_000 {
            bench.window.shut();
            bench.window.open();
            assert!(bench.show(LINEAR));
        }
        done.store(true, Ordering::SeqCst);
        looks.join().unwrap()
    });
    assert_eq!(times, 0);
}

#[test]
fn mappings_of_the_host_are_few_wherever_code_is() {
    let bytes = 160 * LARGE;
    let bench = Bench::new(bytes, 1);
    if !bench.show(LINEAR) {
        assert!(!can_have_kernel_window());
        return;
    }
    let mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().count()
    };
    let mark_every_other = || {
        let mut most = 0;
        for gfn in (0..bytes / PAGE_SIZE).step_by(2) {
            bench.pages.mark(Gfn(gfn));
            bench.window.protect(&bench.memory, Gfn(gfn));
            if gfn % 1024 == 0 {
                most = most.max(mappings());
            }
        }
        most
    };
    let most = mark_every_other();
    assert!((10_000..52_000).contains(&most), "{most}");
    // It has closed, and is whole when it comes back.
    bench.pages.clear();
    assert!(bench.show(LINEAR));
    assert!(mappings() < 1000);
    // It would begin with too many.
    mark_every_other();
    assert!(!bench.show(LINEAR));
    assert!(mappings() < 1000);
    bench.pages.clear();
    assert!(
        !bench.show(LINEAR + 9 * LARGE),
        "it is tried again and again"
    );
}

#[test]
fn memory_is_shown_a_few_times_over() {
    let bench = Bench::new(2 * LARGE, 12);
    let places = (0..12).map(|n| LINEAR + n * TOP_BYTES);
    let shown = places.filter(|&gva| bench.show(gva)).count();
    if can_have_kernel_window() {
        assert_eq!(shown, 4);
    }
}

#[test]
fn window_closes_where_the_host_has_no_room_for_a_mapping() {
    let bench = Bench::new(2 * LARGE, 2);
    if !bench.show(LINEAR) {
        assert!(!can_have_kernel_window());
        return;
    }
    // Two that lie side by side cannot become one.
    let one = |n: usize| {
        let rights = [ProtFlags::READ, ProtFlags::empty()][n % 2];
        let (anywhere, bytes) = (std::ptr::null_mut(), PAGE_SIZE as usize);
        // SAFETY: a new mapping overlaps nothing.
        unsafe { rustix::mm::mmap_anonymous(anywhere, bytes, rights, MapFlags::PRIVATE) }.ok()
    };
    let mut others = Vec::with_capacity(1 << 20);
    others.extend((0..others.capacity()).map_while(one));
    let closed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let other = bench.show(LINEAR + TOP_BYTES);
        bench.window.shut() && !other
    }));
    for at in others {
        // SAFETY: it was made above, and nobody has used it.
        unsafe { rustix::mm::munmap(at, PAGE_SIZE as usize) }.unwrap();
    }
    assert!(closed.is_ok_and(|any| any));
    assert!(!is_readable(window_address(LINEAR)));
    bench.window.open();
    assert!(bench.show(LINEAR));
}

/// Bytes of this process's page tables.
fn table_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmPTE:"));
    let kib: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib << 10
}

#[test]
fn stacks_all_over_the_address_space_leave_no_page_tables() {
    let mut bench = Bench::new(2 * LARGE, 1);
    bench.map_stacks(ROOT, STACK_SLOT);
    if !can_have_kernel_window() {
        return;
    }
    let before = table_bytes();
    for n in 2..20_000 {
        let stack = STACKS + n * LARGE;
        assert!(bench.show_stack(stack));
        assert!(is_readable(window_address(stack)));
    }
    let more = table_bytes() - before;
    assert!(more < 40 << 20, "{more}");
    let shown = bench.window.shown_bytes();
    assert!(shown <= 2048 * PAGE_SIZE, "{shown}");
}

#[test]
fn top_tables_that_say_something_else_each_time_are_forgotten() {
    let mut bench = Bench::new(2 * LARGE, 1);
    if !can_have_kernel_window() {
        return;
    }
    bench.map_stacks(ROOT, STACK_SLOT);
    for n in 0..200 {
        let entry = STACK_TABLES | TABLE | n << 52;
        let at = Gpa(ROOT + 8 * STACK_SLOT);
        bench.memory.write_obj(at, &entry).unwrap();
        assert!(bench.show_stack(STACKS + (n + 2) * LARGE));
        assert!(bench.window.lock().roofs.len() <= 17);
    }
}

#[test]
fn page_that_tables_disagree_about_takes_nothing_else_away() {
    let mut bench = Bench::new(2 * LARGE, 1);
    if !can_have_kernel_window() {
        return;
    }
    bench.map_stacks(ROOT, STACK_SLOT);
    bench.map_stacks(ROOT, STACK_SLOT + 1);
    let other = Gpa(OTHER_ROOT + 8 * (STACK_SLOT + 1));
    bench.memory.write_obj(other, &(TABLES | TABLE)).unwrap();
    bench.roots.push(OTHER_ROOT);
    assert!(bench.show_stack(STACKS + 2 * LARGE));
    assert!(!bench.show_stack(STACKS + TOP_BYTES + 2 * LARGE));
    bench.ask(|window, asker| window.follow_root(asker));
    bench.cpu.cr3 = OTHER_ROOT;
    bench.ask(|window, asker| window.follow_root(asker));
    assert_eq!(bench.window.shown_bytes(), PAGE_SIZE);
}

#[test]
fn what_lies_between_stacks_is_nobodys() {
    let mut bench = Bench::new(2 * LARGE, 1);
    if !can_have_kernel_window() {
        return;
    }
    bench.map_stacks(ROOT, STACK_SLOT);
    // The second gigabyte behind an entry whose addresses have the same places.
    let rival = STACK_SLOT ^ 1 << 7;
    let put = |gpa, entry: u64| bench.memory.write_obj(Gpa(gpa), &entry).unwrap();
    put(ROOT + 8 * rival, OTHER_ROOT | TABLE);
    put(OTHER_ROOT + 8, (TABLES + 0x1000) | TABLE);
    let gigabyte = 1 << 30;
    assert!(bench.show_stack(STACKS + 2 * LARGE));
    assert!(bench.show_stack(STACKS + 2 * gigabyte));
    assert!(!bench.show_stack(STACKS + gigabyte));
    bench.ask(|window, asker| window.follow_root(asker));
    assert_eq!(bench.window.shown_bytes(), 2 * PAGE_SIZE);
}

#[test]
fn stacks_are_shown_whatever_is_beside_them() {
    let mut bench = Bench::new(2 * LARGE, 1);
    if !can_have_kernel_window() {
        return;
    }
    bench.map_stacks(ROOT, STACK_SLOT);
    let stack = STACKS + 2 * LARGE;
    // A frame with code, one that is not dirty yet, and one that is shown already at another place.
    bench.pages.mark(Gfn((LARGE >> 12) + 1));
    let clean = Gpa(STACK_TABLES + 0x2000 + 16);
    let entry: u64 = bench.memory.read_obj(clean).unwrap();
    bench.memory.write_obj(clean, &(entry & !0x40)).unwrap();
    assert!(bench.show_stack(stack));
    assert!(!bench.show_stack(stack + PAGE_SIZE));
    assert!(!bench.show_stack(stack + 2 * PAGE_SIZE));
    assert!(bench.show_stack(stack + LARGE));
    let fault =
        |bench: &Bench, gva| bench.ask(|window, asker| window.faulted(asker, window_address(gva)));
    assert_eq!(fault(&bench, stack + LARGE + PAGE_SIZE), Verdict::Step);
    assert_eq!(fault(&bench, stack + LARGE + 2 * PAGE_SIZE), Verdict::Step);
    bench.memory.write_obj(clean, &entry).unwrap();
    assert_eq!(fault(&bench, stack + LARGE + 2 * PAGE_SIZE), Verdict::Again);
    // A frame that gets code is shown nowhere.
    bench.pages.mark(Gfn(LARGE >> 12));
    bench.window.protect(&bench.memory, Gfn(LARGE >> 12));
    assert!(!is_readable(window_address(stack)));
    assert!(!is_readable(window_address(stack + LARGE)));
}

#[test]
fn small_pages_are_shown_beside_others() {
    let regions = 4;
    let bench = Bench::new(8 * LARGE, 1);
    if !can_have_kernel_window() {
        return;
    }
    let tables = 6 * LARGE;
    let put = |gpa, entry: u64| bench.memory.write_obj(Gpa(gpa), &entry).unwrap();
    for region in 1..regions {
        let table = tables + region * PAGE_SIZE;
        for n in 0..512 {
            let frame = region * LARGE + n * PAGE_SIZE;
            put(table + 8 * n, frame | TABLE | 0x100);
        }
        put(TABLES + 0x1000 + 8 * region, table | TABLE);
    }
    assert!(bench.show(LINEAR));
    // What is shown at once ends where it is asked for.
    for gva in [2 * LARGE + LARGE / 2, 2 * LARGE + LARGE / 2 + PAGE_SIZE] {
        assert!(bench.show(LINEAR + gva));
    }
    // Less than is worth an extent of its own is left.
    let little = 4 * LARGE - 8 * PAGE_SIZE;
    assert!(bench.show(LINEAR + little - PAGE_SIZE));
    let shown = bench.window.shown_bytes();
    for page in (LARGE..4 * LARGE).step_by(PAGE_SIZE as usize) {
        bench.show(LINEAR + page);
    }
    assert!(bench.window.shown_bytes() >= shown);
    assert!(bench.window.shown_bytes() <= LARGE + 3 * LARGE);
    for page in (LARGE..little).step_by(PAGE_SIZE as usize) {
        assert!(bench.show(LINEAR + page), "{page:x}");
    }
}
