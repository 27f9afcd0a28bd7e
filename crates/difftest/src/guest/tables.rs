//! The guest's descriptor tables and page tables.

use hospes_memory::GuestMemory;
use hospes_units::Gpa;

use crate::layout::{PAGE, REGIONS, WINDOWS};

/// Kernel pages lie at this address plus their physical one.
pub const KERNEL: u64 = 0xffff_ffff_8000_0000;

/// Physical addresses.
pub const STUB: u64 = 0x8000;
pub const CONTEXT: u64 = 0x9000;
pub const GDT: u64 = 0xa000;
pub const IDT: u64 = 0xb000;
pub const TSS: u64 = 0xc000;
/// Last page of the stack that every exception switches to.
pub const STACK_TOP: u64 = 0xf000;
const TABLES: u64 = 0x10_0000;
const BACKING: u64 = 0x20_0000;
pub const RAM_BYTES: u64 = 0x40_0000;

pub const GDT_BYTES: u16 = 0x50;
pub const IDT_BYTES: u16 = 32 * 16;
pub const KERNEL_CS: u16 = 0x10;
pub const KERNEL_SS: u16 = 0x18;
pub const USER_SS: u16 = 0x2b;
pub const TSS_SELECTOR: u16 = 0x40;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

/// Physical address of a backing page: neighbours in the window are no neighbours here.
pub fn backing_page(n: usize) -> u64 {
    BACKING + (n as u64 * 7 % 11) * 3 * PAGE
}

fn put(memory: &GuestMemory, gpa: u64, value: u64) {
    memory
        .write(Gpa(gpa), &value.to_le_bytes())
        .expect("tables lie in memory");
}

fn get(memory: &GuestMemory, gpa: u64) -> u64 {
    let mut b = [0; 8];
    memory.read(Gpa(gpa), &mut b).expect("tables lie in memory");
    u64::from_le_bytes(b)
}

struct Tables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Tables<'_> {
    fn page(&mut self) -> u64 {
        self.next += PAGE;
        self.next - PAGE
    }

    fn map(&mut self, root: u64, address: u64, gpa: u64, bits: u64) {
        let mut table = root;
        for level in [39, 30, 21] {
            let entry = table + (address >> level & 511) * 8;
            if get(self.memory, entry) == 0 {
                let new = self.page();
                put(self.memory, entry, new | PRESENT | WRITE | USER);
            }
            table = get(self.memory, entry) & !0xfff & !NO_EXECUTE;
        }
        put(self.memory, table + (address >> 12 & 511) * 8, gpa | bits);
    }

    /// An address space in which the window belongs to the user or to the kernel.
    fn space(&mut self, owner: u64) -> u64 {
        let root = self.page();
        for base in WINDOWS {
            for r in REGIONS {
                for n in 0..r.pages {
                    let mut bits = PRESENT | owner;
                    if r.write {
                        bits |= WRITE;
                    }
                    if !r.exec {
                        bits |= NO_EXECUTE;
                    }
                    let address = base + r.offset + n as u64 * PAGE;
                    self.map(root, address, backing_page(r.backing + n), bits);
                }
            }
        }
        for gpa in (STUB..STACK_TOP + PAGE).step_by(PAGE as usize) {
            let bits = PRESENT | WRITE | GLOBAL;
            self.map(root, KERNEL + gpa, gpa, bits);
        }
        root
    }
}

/// Writes all tables; gives the roots of the user's and the kernel's address space.
pub fn build(memory: &GuestMemory) -> [u64; 2] {
    let mut tables = Tables {
        memory,
        next: TABLES,
    };
    let roots = [tables.space(USER), tables.space(0)];
    let tss = KERNEL + TSS;
    let descriptors = [
        (KERNEL_CS, 0x00af_9b00_0000_ffff),
        (KERNEL_SS, 0x00cf_9300_0000_ffff),
        (0x20, 0x00cf_fb00_0000_ffff),
        (0x28, 0x00cf_f300_0000_ffff),
        (0x30, 0x00af_fb00_0000_ffff),
        (
            TSS_SELECTOR,
            0x0000_8b00_0000_0067 | (tss & 0xff_ffff) << 16 | (tss >> 24 & 0xff) << 56,
        ),
        (TSS_SELECTOR + 8, tss >> 32),
    ];
    for (selector, value) in descriptors {
        put(memory, GDT + u64::from(selector), value);
    }
    for n in [0x04, 0x24] {
        // RSP0 and IST1 are not 8-byte aligned, but `put` does not mind.
        put(memory, TSS + n, KERNEL + STACK_TOP);
    }
    // No I/O permission map.
    put(memory, TSS + 0x60, 0x68 << 48);
    for vector in 0..32u64 {
        let at = KERNEL + STUB + vector * 16;
        let dpl = if vector == 3 || vector == 4 { 3 } else { 0 };
        let kind = 0x8e00 | dpl << 13 | 1;
        let low = at & 0xffff | u64::from(KERNEL_CS) << 16 | kind << 32 | (at >> 16 & 0xffff) << 48;
        put(memory, IDT + vector * 16, low);
        put(memory, IDT + vector * 16 + 8, at >> 32);
    }
    roots
}
