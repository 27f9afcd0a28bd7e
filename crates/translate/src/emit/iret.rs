//! IRET of 64-bit kernel code, to user code or to the kernel, where the segments are the flat ones that SYSCALL and SYSRET use, too.
//!
//! Everything is looked at before anything changes. Whatever is not as a 64-bit kernel usually has it goes to the engine, which executes the whole instruction.

use crate::asm::{RAX, RBX, RCX, RDX, RSP, cc};
use crate::emit::memory::Address;
use crate::emit::system::{FIXED, IF, STATUS_BITS};
use crate::emit::{ColdKind, Flags, Resume, Work, bit};
use crate::insn::{Insn, STATUS};
use crate::layout::{Mode, TLB_ENTRIES, TLB_ENTRY_BYTES};

const NT: u32 = 1 << 14;
/// It says something to instruction breakpoints alone, and with those nothing is translated.
const RF: u32 = 1 << 16;
/// What IRET pops: RIP, CS, RFLAGS, RSP, SS.
const FRAME_BYTES: u32 = 40;
/// Bytes of the descriptor table that are looked at.
const TABLE_BYTES: i32 = 64;
const PAGE: i32 = 4096;
/// Bit 7 of a segment's rights, present, in the 32 bits that begin with its selector.
const PRESENT: u32 = 1 << 23;
/// ES, DS, FS, GS.
const DATA_SEGMENTS: [usize; 4] = [0, 3, 4, 5];
const SS: usize = 2;
const SCRATCH: u16 = 1 << RAX | 1 << RBX | 1 << RCX | 1 << RDX;

/// A flat segment as its descriptor must be: then it is what the frame has for SYSCALL or SYSRET.
struct Flat {
    descriptor: u64,
    /// Low bits of its selector: privilege level, and the global table.
    low: i32,
}

const KERNEL_CODE: Flat = Flat {
    descriptor: 0x00af_9b00_0000_ffff,
    low: 0,
};
const KERNEL_STACK: Flat = Flat {
    descriptor: 0x00cf_9300_0000_ffff,
    low: 0,
};
const USER_CODE: Flat = Flat {
    descriptor: 0x00af_fb00_0000_ffff,
    low: 3,
};
const USER_STACK: Flat = Flat {
    descriptor: 0x00cf_f300_0000_ffff,
    low: 3,
};

impl Work<'_> {
    /// RAX is the host address of what is popped; RCX that of the descriptor table; RDX and RBX are for short use.
    pub(super) fn iret(&mut self, i: usize, insn: &Insn) {
        let offset = insn.offset;
        let l = self.layout;
        self.save_flags(i, STATUS);
        self.unspill(!SCRATCH);
        for r in [RAX, RBX, RCX, RDX] {
            if self.spilled & bit(r) == 0 {
                self.spill(r);
            }
        }
        self.asm.mov(RAX, RSP);
        let popped = self.check(i, Address::Pair(RAX, RDX), FRAME_BYTES, false, 0);
        debug_assert_eq!(popped, RAX);
        self.asm.test_mem_imm32(l.rest_flags, NT);
        self.otherwise(cc::NZ, offset);
        self.asm.cmp_mem8(l.nmi_blocked, 0);
        self.otherwise(cc::NE, offset);
        self.descriptor_table(offset);

        self.asm.load_at(true, RDX, RAX, 16);
        self.asm
            .and_imm32(RDX, !(STATUS_BITS | IF | FIXED | RF) as i32);
        self.otherwise(cc::NZ, offset);
        // Canonical: the upper 17 bits are all equal.
        self.asm.load_at(true, RDX, RAX, 0);
        self.asm.sar(RDX, 47);
        self.asm.lea(true, RDX, Some(RDX), None, 1);
        self.asm.cmp_imm(RDX, 1);
        self.otherwise(cc::A, offset);

        self.asm.load_at(false, RDX, RAX, 8);
        self.differs(l.sysret_cs_ss[0]);
        let kernel = self.asm.jcc(cc::NZ);
        for n in DATA_SEGMENTS {
            // The processor empties those that user code may not have.
            self.asm.test_mem_imm32(l.selectors[n], PRESENT);
            self.otherwise(cc::NZ, offset);
        }
        self.is_flat(&USER_CODE, offset);
        self.asm.load_at(false, RDX, RAX, 32);
        self.differs(l.sysret_cs_ss[1]);
        self.otherwise(cc::NZ, offset);
        self.is_flat(&USER_STACK, offset);
        self.return_to(Mode(self.mode.0 | Mode::USER), 2);

        self.looked_at(kernel, offset);
        self.differs(l.syscall_cs_ss[0]);
        self.otherwise(cc::NZ, offset);
        self.is_flat(&KERNEL_CODE, offset);
        self.asm.load_at(false, RDX, RAX, 32);
        self.asm.test(RDX, RDX);
        let some = self.asm.jcc(cc::NZ);
        // None, as an interruption of user code leaves it.
        self.asm.load_u16(RBX, l.selectors[SS]);
        self.asm.test(RBX, RBX);
        self.otherwise(cc::NZ, offset);
        self.return_to(self.mode, 1);

        self.looked_at(some, offset);
        self.differs(l.syscall_cs_ss[1]);
        self.otherwise(cc::NZ, offset);
        self.is_flat(&KERNEL_STACK, offset);
        self.return_to(self.mode, 2);
    }

    /// What is not as usual is the engine's.
    fn otherwise(&mut self, cond: u8, offset: u16) {
        self.cold_jump(cond, ColdKind::Step { offset });
    }

    /// Goes on at a jump from where nothing has changed yet.
    fn looked_at(&mut self, jump: usize, offset: u16) {
        let here = self.asm.pos() as i64;
        self.asm.patch_rel32(jump, here);
        self.spilled = SCRATCH;
        self.flags = Flags::Saved;
        self.resume = Resume::Offset(offset);
        self.note();
    }

    /// The host address of the global descriptor table, for RCX. An implicit access: the kernel's table without AC has just what those may read.
    fn descriptor_table(&mut self, offset: u16) {
        let l = self.layout;
        let table = l.tlb[Mode(0).table()];
        self.asm.load_u16(RDX, l.gdt + 8);
        self.asm.cmp_imm(RDX, TABLE_BYTES - 1);
        self.otherwise(cc::B, offset);
        self.asm.load(RCX, l.gdt);
        self.asm.rorx(RDX, RCX, 7);
        self.asm
            .and_imm32(RDX, ((TLB_ENTRIES - 1) * TLB_ENTRY_BYTES) as i32);
        self.asm.xor_mem_base(RCX, RDX, table);
        self.asm.cmp_imm(RCX, PAGE - TABLE_BYTES);
        self.otherwise(cc::A, offset);
        self.asm.add_mem_base(RCX, RDX, table + 16);
    }

    /// Sets ZF where the selector in RDX is that of a segment in the frame.
    fn differs(&mut self, segment: i32) {
        self.asm.load_u16(RBX, segment + 12);
        self.asm.xor(RBX, RDX);
    }

    /// Makes sure that the selector in RDX stands for this segment.
    fn is_flat(&mut self, flat: &Flat, offset: u16) {
        self.asm.lea(true, RDX, Some(RDX), None, -flat.low);
        self.asm.mov32(RBX, RDX);
        self.asm.and_imm32(RBX, 7);
        self.otherwise(cc::NZ, offset);
        self.asm.cmp_imm(RDX, TABLE_BYTES - 8);
        self.otherwise(cc::A, offset);
        self.asm.lea(true, RDX, Some(RCX), Some((RDX, 1)), 0);
        self.asm.load_at(true, RDX, RDX, 0);
        self.asm.mov_imm(RBX, flat.descriptor);
        self.asm.xor(RBX, RDX);
        self.otherwise(cc::NZ, offset);
    }

    /// Everything is as usual: RIP, RFLAGS, RSP and the first `segments` of CS and SS change.
    fn return_to(&mut self, to: Mode, segments: usize) {
        let l = self.layout;
        let from = if to.has(Mode::USER) {
            l.sysret_cs_ss
        } else {
            l.syscall_cs_ss
        };
        self.asm.load_at(true, RCX, RAX, 0);
        self.asm.load_at(true, RDX, RAX, 16);
        self.asm.load_at(true, RBX, RAX, 24);
        self.begin_busy();
        self.asm.mov(RSP, RBX);
        self.take_flags(RDX, RAX);
        self.asm.store_imm64(l.rest_flags, u64::from(FIXED));
        self.copy_segments(&l.cs_ss[..segments], &from[..segments], RDX);
        self.unspill(bit(RAX) | bit(RBX));
        self.change_level(to, true);
    }
}
