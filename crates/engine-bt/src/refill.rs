//! The page walk in emitted code: a data access that missed the TLB comes back without the monitor, which would have to save the vector registers first.
//!
//! It does what [`crate::exec::walk()`] and `BtHost::insert` do where nothing is out of the ordinary: four levels, RAM, all accessed bits set, and for an access that
//! writes a dirty page without code that needs not be noted first. Anything else, faults among it, is given up and left to them; nothing has changed then.
//!
//! While it runs the registers that it uses are in the frame, so that a kick can send it to the way out from any point (`signal.rs`); a TLB entry that is half written
//! matches nothing.

use std::mem::offset_of;

use hospes_engine::{CpuState, Msrs, cr};
use hospes_translate::asm::{Asm, Pos, RAX, RBX, RCX, RDI, RDX, RSI, cc};
use hospes_translate::layout::{
    MISS_ANY_WRITE, MISS_MASKED, MISS_SIZE, MISS_WRITE, TLB_ENTRIES, TLB_ENTRY_BYTES, TLB_INVALID,
    TlbEntry,
};

use crate::exec::walk::{A, ADDR, D, G, P, PS, RSVD_ADDR, RW, US};
use crate::filled::{Filled, LARGE_KNOWN, Memory};
use crate::frame::{Frame, LAYOUT};
use crate::signal::Detour;
use crate::tlb::{GLOBAL, LARGE, LARGE_BITS};

/// What the walk uses; all of it is in the frame meanwhile.
const USED: [u8; 9] = [RAX, RCX, RDX, RBX, RSI, RDI, 8, 9, 10];
const R8: u8 = 8;
const R9: u8 = 9;
const R10: u8 = 10;

const TARGET: i32 = offset_of!(Frame, target) as i32;
const TURN_BACK: i32 = offset_of!(Frame, turn_back) as i32;
const CR0: i32 = (offset_of!(Frame, cpu) + offset_of!(CpuState, cr0)) as i32;
const CR4: i32 = (offset_of!(Frame, cpu) + offset_of!(CpuState, cr4)) as i32;
const EFER: i32 =
    (offset_of!(Frame, cpu) + offset_of!(CpuState, msr) + offset_of!(Msrs, efer)) as i32;
const LAST_SITE: i32 = offset_of!(Frame, last_miss) as i32;
const LAST_PAGE: i32 = LAST_SITE + 8;
const MEMORY: usize = offset_of!(Frame, memory);
const BASE: i32 = (MEMORY + offset_of!(Memory, base)) as i32;
const LOW_BYTES: i32 = (MEMORY + offset_of!(Memory, low_bytes)) as i32;
const HIGH_START: i32 = (MEMORY + offset_of!(Memory, high_start)) as i32;
const HIGH_BYTES: i32 = (MEMORY + offset_of!(Memory, high_bytes)) as i32;
const CODE_PAGES: i32 = (MEMORY + offset_of!(Memory, code_pages)) as i32;
const UNNOTED: i32 = (MEMORY + offset_of!(Memory, unnoted)) as i32;
const CODE_CACHE: i32 = (MEMORY + offset_of!(Memory, code_cache)) as i32;

const fn filled(list: usize) -> i32 {
    (offset_of!(Frame, filled) + list * size_of::<Filled>()) as i32
}

const fn large(table: usize, n: usize) -> i32 {
    (offset_of!(Frame, large_known) + (table * LARGE_KNOWN + n) * 8) as i32
}

/// Assembles it; what is given up goes to `leave` with the flags saved. Gives the ways in, for each TLB: with the flags in the host's register, and in the frame.
pub(crate) fn assemble(a: &mut Asm, leave: i64) -> ([[i64; 2]; 3], Detour) {
    let mut mem = [[0; 2]; 3];
    let mut bodies = Vec::new();
    for ways in &mut mem {
        a.align(16, 0);
        ways[0] = a.pos() as i64;
        a.store(slot(RAX), RAX);
        a.flags_to_ax();
        a.store16(LAYOUT.flags, RAX);
        let both = a.jmp();
        ways[1] = a.pos() as i64;
        a.store(slot(RAX), RAX);
        let here = a.pos() as i64;
        a.patch_rel32(both, here);
        for r in USED.into_iter().skip(1) {
            a.store(slot(r), r);
        }
        bodies.push(a.jmp());
    }
    a.align(16, 0);
    let failed = a.pos();
    for r in USED {
        a.load(r, slot(r));
    }
    let out = a.jmp();
    a.patch_rel32(out, leave);
    let begin = a.pos();
    for (table, from) in bodies.into_iter().enumerate() {
        a.align(16, 0);
        let here = a.pos() as i64;
        a.patch_rel32(from, here);
        let mut walk = Walk {
            a,
            table,
            failures: Vec::new(),
        };
        walk.emit();
        let failures = walk.failures;
        for at in failures {
            a.patch_rel32(at, failed as i64);
        }
    }
    let code = begin..a.pos();
    (mem, Detour { code, failed })
}

fn slot(r: u8) -> i32 {
    LAYOUT.gpr + 8 * i32::from(r)
}

struct Walk<'a> {
    a: &'a mut Asm,
    table: usize,
    failures: Vec<Pos>,
}

impl Walk<'_> {
    fn give_up(&mut self, condition: u8) {
        let at = self.a.jcc(condition);
        self.failures.push(at);
    }

    fn here(&mut self, jump: Pos) {
        let here = self.a.pos() as i64;
        self.a.patch_rel32(jump, here);
    }

    /// Gives up where not all of these bits are set in 32 bits of the frame. Changes RAX.
    fn need(&mut self, offset: i32, bits: u64) {
        self.a.load32(RAX, offset);
        self.a.not(RAX);
        self.a.and_imm32(RAX, bits as u32 as i32);
        self.give_up(cc::NZ);
    }

    fn emit(&mut self) {
        self.a.cmp_mem8(TURN_BACK, 0);
        self.give_up(cc::NE);
        self.need(CR0, cr::CR0_PG | cr::CR0_WP);
        self.need(CR4, cr::CR4_PGE);
        self.need(EFER, cr::EFER_LMA | cr::EFER_NXE);
        self.access();
        // RDI: page. RSI: what is asked of it. R8: mask of an entry's address. RDX: entry. RBX: what all entries have in common, R9: what any has.
        self.a.mov_imm(R8, ADDR);
        self.a.load(RDX, LAYOUT.cr3);
        self.level(39);
        self.a.mov32(RAX, RDX);
        self.a.and_imm32(RAX, PS as i32);
        self.give_up(cc::NZ);
        self.a.mov(RBX, RDX);
        self.a.mov(R9, RDX);
        self.level(30);
        let gigabyte = self.large_page();
        self.level(21);
        let megabytes = self.large_page();
        self.level(12);
        self.all_of_them();
        self.a.mov(RCX, RDX);
        self.a.mov_imm(R9, 0);
        let small = self.a.jmp();
        self.here(gigabyte);
        self.large_leaf(30);
        let other = self.a.jmp();
        self.here(megabytes);
        self.large_leaf(21);
        self.here(other);
        self.here(small);
        self.insert();
        self.go_back();
    }

    /// The access that missed: in one page, canonical, without a mask, and not one that evicts another of its instruction.
    fn access(&mut self) {
        let a = &mut *self.a;
        a.load(RDI, LAYOUT.exit_ea);
        a.load32(RSI, LAYOUT.exit_info);
        a.mov32(RAX, RDI);
        a.and_imm32(RAX, 0xfff);
        a.mov32(RCX, RSI);
        a.and_imm32(RCX, (MISS_SIZE | MISS_MASKED) as i32);
        a.lea(true, RAX, Some(RAX), Some((RCX, 1)), 0);
        a.cmp_imm(RAX, 0x1000);
        self.give_up(cc::A);
        let a = &mut *self.a;
        // The upper 17 bits are all equal.
        a.mov(RAX, RDI);
        a.sar(RAX, 47);
        a.lea(true, RAX, Some(RAX), None, 1);
        a.cmp_imm(RAX, 1);
        self.give_up(cc::A);
        let a = &mut *self.a;
        a.shr(RDI, 12);
        a.shl(RDI, 12);
        a.load32(RAX, LAYOUT.exit_arg);
        a.load32(RCX, LAST_SITE);
        a.mov(RDX, RAX);
        a.xor(RDX, RCX);
        let elsewhere = a.jcc(cc::NZ);
        a.load(RCX, LAST_PAGE);
        a.xor(RCX, RDI);
        let same = a.jcc(cc::Z);
        a.and_imm32(RCX, ((TLB_ENTRIES - 1) << 12) as i32);
        self.give_up(cc::Z);
        self.here(elsewhere);
        self.here(same);
        let a = &mut *self.a;
        a.store32(LAST_SITE, RAX);
        a.store(LAST_PAGE, RDI);
    }

    /// RDX, an address of guest memory with other bits around it, becomes that of the host. Changes RAX.
    fn host_address(&mut self) {
        let a = &mut *self.a;
        a.cmp_mem(RDX, LOW_BYTES);
        let low = a.jcc(cc::B);
        a.mov(RAX, RDX);
        a.sub_mem(RAX, HIGH_START);
        a.cmp_mem(RAX, HIGH_BYTES);
        self.give_up(cc::AE);
        self.here(low);
        self.a.add_mem(RDX, BASE);
    }

    /// Goes from the table that RDX points to, to its entry for these bits of the address.
    fn level(&mut self, shift: u8) {
        self.a.and(RDX, R8);
        self.host_address();
        let a = &mut *self.a;
        a.mov(RAX, RDI);
        a.shr(RAX, shift - 3);
        a.and_imm32(RAX, 0xff8);
        a.lea(true, RDX, Some(RDX), Some((RAX, 1)), 0);
        a.load_at(true, RDX, RDX, 0);
        if shift != 39 {
            a.and(RBX, RDX);
            a.or(R9, RDX);
        }
    }

    /// Jumps where the entry is that of a large page, if it is one at all.
    fn large_page(&mut self) -> Pos {
        self.a.mov32(RAX, RDX);
        self.a.and_imm32(RAX, PS as i32);
        self.a.jcc(cc::NZ)
    }

    /// Looks at what the entries allow: present, accessed, nothing reserved, and the privilege is the one that this TLB is for.
    fn all_of_them(&mut self) {
        let (user, want) = match self.table {
            0 => (US, P | A | US),
            // User pages are the other TLB's, or none's.
            1 => (US, P | A),
            _ => (0, P | A),
        };
        let a = &mut *self.a;
        a.mov32(RAX, RBX);
        a.and_imm32(RAX, (P | A | user) as i32);
        a.cmp_imm(RAX, want as i32);
        self.give_up(cc::NE);
        let a = &mut *self.a;
        a.mov_imm(RAX, RSVD_ADDR);
        a.and(RAX, R9);
        self.give_up(cc::NZ);
    }

    /// RDX is the entry of a large page: it becomes that of the 4 KiB around the access.
    fn large_leaf(&mut self, shift: u8) {
        self.all_of_them();
        let a = &mut *self.a;
        let below = (1u32 << shift) - 1;
        // Bit 12 is another.
        a.mov32(RAX, RDX);
        a.and_imm32(RAX, (below & !0x1fff) as i32);
        self.give_up(cc::NZ);
        let a = &mut *self.a;
        a.mov(RCX, RDX);
        a.shr(RDX, shift);
        a.shl(RDX, shift);
        a.mov32(RAX, RDI);
        a.and_imm32(RAX, below as i32);
        a.or(RDX, RAX);
        a.mov_imm(R9, LARGE);
        // The monitor must know where large pages are before one is used.
        a.mov(RAX, RDI);
        a.shr(RAX, LARGE_BITS as u8);
        let mut known = Vec::new();
        for n in 0..LARGE_KNOWN {
            a.cmp_mem(RAX, large(self.table, n));
            known.push(a.jcc(cc::E));
        }
        let unknown = a.jmp();
        self.failures.push(unknown);
        for at in known {
            self.here(at);
        }
    }

    /// RDX: the page's address and other bits. RCX: the last entry. RBX: what all allow. R9: the marks of such a page.
    fn insert(&mut self) {
        let a = &mut *self.a;
        a.and(RDX, R8);
        a.mov(R10, RDX);
        self.host_address();
        let a = &mut *self.a;
        // The write tag, in R8, unless the page has code, has to be noted before it is written, is clean or must not be written.
        a.mov_imm(R8, TLB_INVALID);
        a.shr(R10, 12);
        let [code, unnoted] = [CODE_PAGES, UNNOTED].map(|bitmap| {
            a.mov(RAX, R10);
            a.shr(RAX, 5);
            a.shl(RAX, 2);
            a.add_mem(RAX, bitmap);
            a.load_at(false, RAX, RAX, 0);
            a.bt32(RAX, R10);
            a.jcc(cc::B)
        });
        a.mov32(RAX, RCX);
        a.and_imm32(RAX, D as i32);
        let clean = a.jcc(cc::Z);
        a.and_imm32(RBX, RW as i32);
        let fixed = a.jcc(cc::Z);
        a.mov(R8, RDI);
        for at in [code, unnoted, clean, fixed] {
            self.here(at);
        }
        let a = &mut *self.a;
        a.and_imm32(RSI, (MISS_WRITE | MISS_ANY_WRITE) as i32);
        let reads = a.jcc(cc::Z);
        a.mov(RAX, R8);
        a.xor(RAX, RDI);
        self.give_up(cc::NZ);
        self.here(reads);
        let a = &mut *self.a;
        a.lea(true, R9, Some(R9), Some((R10, 1)), 0);
        let table = LAYOUT.tlb[self.table];
        a.mov(RAX, RDI);
        a.shr(RAX, 12);
        a.and_imm32(RAX, (TLB_ENTRIES - 1) as i32);
        // The first entry has another tag that matches nothing.
        self.give_up(cc::Z);
        let a = &mut *self.a;
        a.mov_imm(RBX, filled(self.table) as u64);
        a.and_imm32(RCX, G as i32);
        let local = a.jcc(cc::Z);
        a.mov_imm(RSI, GLOBAL);
        a.or(R9, RSI);
        if self.table != 0 {
            a.mov_imm(RBX, filled(self.table + 2) as u64);
        }
        self.here(local);
        let a = &mut *self.a;
        let (count, list) = (offset_of!(Filled, count), offset_of!(Filled, list));
        a.load_mem_base(RSI, RBX, count as i32);
        a.cmp_imm(RSI, TLB_ENTRIES as i32 - 1);
        let full = a.jcc(cc::A);
        a.lea(true, RCX, Some(RBX), Some((RSI, 2)), 0);
        a.store16_mem_base(RCX, list as i32, RAX);
        a.lea(true, RSI, Some(RSI), None, 1);
        a.store_mem_base(RBX, count as i32, RSI);
        self.here(full);
        let a = &mut *self.a;
        a.shl32(RAX, TLB_ENTRY_BYTES.trailing_zeros() as u8);
        a.mov_imm(RCX, TLB_INVALID);
        let field = |offset: usize| table + offset as i32;
        a.store_mem_base(RAX, field(offset_of!(TlbEntry, read)), RCX);
        a.store_mem_base(RAX, field(offset_of!(TlbEntry, write)), RCX);
        a.store_mem_base(RAX, field(offset_of!(TlbEntry, host)), RDX);
        a.store_mem_base(RAX, field(offset_of!(TlbEntry, gfn)), R9);
        a.store_mem_base(RAX, field(offset_of!(TlbEntry, read)), RDI);
        a.store_mem_base(RAX, field(offset_of!(TlbEntry, write)), R8);
    }

    /// Goes back to the instruction.
    fn go_back(&mut self) {
        let a = &mut *self.a;
        a.load32(RAX, LAYOUT.exit_arg);
        a.add_mem(RAX, CODE_CACHE);
        a.store(TARGET, RAX);
        a.load_u16(RAX, LAYOUT.flags);
        a.flags_from_ax();
        for r in USED {
            a.load(r, slot(r));
        }
        a.jmp_mem(TARGET);
    }
}
