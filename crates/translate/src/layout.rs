//! Where translated code finds the vCPU: byte offsets from the GS base, and the shape of the tables in it.

use std::ops::Range;

/// Entries of each data TLB; a power of two.
pub const TLB_ENTRIES: usize = 4096;
/// Bytes of a [`TlbEntry`].
pub const TLB_ENTRY_BYTES: usize = 32;
/// Entries of the jump cache of user code, and of each of the two of kernel code, most of whose calls are connected instead; powers of two.
pub const USER_JUMPS: usize = 65536;
pub const KERNEL_JUMPS: usize = 16384;
/// Targets lie closely together: with a larger shift neighbours would evict each other.
const JUMP_SHIFT: u32 = 2;

/// From here on the code of kernels lies: in what the last entry of the top table maps.
pub const KERNEL_CODE: u64 = 0xffff_ff80_0000_0000;

/// A page address that is not canonical. An access to it matches all the same: an entry with a good host address at its index needs another one.
pub const TLB_INVALID: u64 = 0x8000_0000_0000_0000;

/// One entry of a data TLB. An access matches where `address ^ tag` is below the page size.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TlbEntry {
    /// Guest virtual page if reads are allowed, else [`TLB_INVALID`].
    pub read: u64,
    /// Guest virtual page if writes are allowed, else [`TLB_INVALID`].
    pub write: u64,
    /// Host address of the page.
    pub host: u64,
    /// Guest frame number of the page, for the monitor's own bookkeeping; bit 63 marks a global page.
    pub gfn: u64,
}

impl TlbEntry {
    /// Matches nothing; a false hit by a non-canonical address reaches a non-canonical host address.
    pub const INVALID: TlbEntry = TlbEntry {
        read: TLB_INVALID,
        write: TLB_INVALID,
        host: TLB_INVALID,
        gfn: 0,
    };
}

/// The missed access writes.
pub const MISS_WRITE: u32 = 1 << 16;
/// The check was for a group of accesses, of which one writes.
pub const MISS_GROUP: u32 = 1 << 17;
pub const MISS_ANY_WRITE: u32 = 1 << 18;
/// The access has a mask: what it leaves out need not be there.
pub const MISS_MASKED: u32 = 1 << 19;
/// The size in bytes.
pub const MISS_SIZE: u32 = 0xffff;

/// Bits of a guest address that, put together, are its place in the kernel window. All but two of those that canonical addresses differ in: see `kernel_window.rs` of the engine.
pub const WINDOW_MASK: u64 = ((1 << WINDOW_LOW_BITS) - 1) | 1 << 44 | 1 << 45 | 1 << 47;
/// The lowest bits of a place, which are those of the address.
pub const WINDOW_LOW_BITS: u32 = 43;
/// Host addresses of the window: the places of the upper half's addresses.
pub const WINDOW: Range<u64> = 1 << 45..1 << 46;
/// Displacements from a place are not larger, either way.
pub const WINDOW_DISPLACEMENT: u64 = 1 << 20;
/// Host addresses that emitted code can reach by way of a place, without those that a process cannot have.
pub const WINDOW_REACH: Range<u64> = 1 << 16..(1 << 46) + (2 << 20);

/// The place in the window of an address of the upper half.
pub const fn window_address(gva: u64) -> u64 {
    gva & ((1 << WINDOW_LOW_BITS) - 1) | (gva >> 44 & 3) << WINDOW_LOW_BITS | WINDOW.start
}

/// Index of the TLB entry for a guest virtual address.
pub const fn tlb_index(gva: u64) -> usize {
    (gva >> 12) as usize & (TLB_ENTRIES - 1)
}

/// Entries of the jump cache with this number, see [`Mode::table`].
pub const fn jump_entries(table: usize) -> usize {
    if table == 0 { USER_JUMPS } else { KERNEL_JUMPS }
}

/// Bits of a guest address that select an entry there.
pub const fn jump_mask(table: usize) -> u64 {
    ((jump_entries(table) as u64) - 1) << JUMP_SHIFT
}

/// Index of the entry for a guest virtual address.
pub const fn jump_index(table: usize, pc: u64) -> usize {
    ((pc & jump_mask(table)) >> JUMP_SHIFT) as usize
}

/// Byte offsets of the frame's fields from the GS base.
#[derive(Clone, Copy, Debug)]
pub struct FrameLayout {
    /// Sixteen 64-bit general registers; at the same time their spill slots.
    pub gpr: i32,
    pub rip: i32,
    /// 16 bits: AL = OF, AH = SF ZF AF PF CF.
    pub flags: i32,
    /// 32 bits: the interrupt flag in its place, bit 9; all others clear.
    pub interrupt_flag: i32,
    /// 32 bits: the alignment-check flag in its place, bit 18; all others clear.
    pub ac_flag: i32,
    /// 64 bits each: control registers.
    pub cr2: i32,
    pub cr3: i32,
    /// 64 bits: RFLAGS but for the status flags, IF and AC, which are clear here.
    pub rest_flags: i32,
    /// Byte: while set, guest state is between two instructions' and a kick only sets `turn_back`.
    pub busy: i32,
    /// Byte: set by a kick.
    pub turn_back: i32,
    /// 32 bits each: [`Mode`] bits, without AC, of what the user's and the kernel's jump caches hold.
    pub jump_bases: [i32; 2],
    /// Selectors of ES, CS, SS, DS, FS, GS; 16 bits each, and behind each 16 bits of rights.
    pub selectors: [i32; 6],
    /// The global descriptor table: base, 64 bits, and limit, 16 bits.
    pub gdt: i32,
    /// Byte: an NMI handler has not ended.
    pub nmi_blocked: i32,
    /// Segment registers CS and SS, 16 bytes each.
    pub cs_ss: [i32; 2],
    /// What SYSCALL loads CS and SS with, and what SYSRET to 64-bit code does.
    pub syscall_cs_ss: [i32; 2],
    pub sysret_cs_ss: [i32; 2],
    /// MSRs: LSTAR, SFMASK, KERNEL_GS_BASE, TSC_AUX.
    pub lstar: i32,
    pub sfmask: i32,
    pub kernel_gs_base: i32,
    pub tsc_aux: i32,
    /// Byte: an interrupt waits for the interrupt flag.
    pub irq_pending: i32,
    /// Byte: no interrupt before the next instruction has been executed.
    pub interrupt_shadow: i32,
    /// Bases of ES, CS, SS, DS, FS, GS; 64 bits each, in encoding order.
    pub seg_base: [i32; 6],
    /// 32 bits: what an exit concerns.
    pub exit_arg: i32,
    /// 64 bits: the guest virtual address of a missed access.
    pub exit_ea: i32,
    /// 32 bits: size of a missed access in bytes, and `MISS_` bits.
    pub exit_info: i32,
    /// 32 bits: for a group, the position of the jump to connect with code that does without.
    pub exit_chain: i32,
    /// Sixteen 64-bit words: host addresses in registers, kept while an access is being repeated.
    pub held: i32,
    /// Data TLBs: user, kernel, kernel with AC set.
    pub tlb: [i32; 3],
    /// Jump caches, for the same three kinds of code.
    pub jumps: [i32; 3],
    /// 64 bits each: their [`jump_mask`].
    pub jump_masks: [i32; 3],
    /// 64 bits: [`WINDOW_MASK`].
    pub window_mask: i32,
    /// 32 bits: how many more times PAUSE is executed before the engine hears that the guest spins.
    pub pauses_left: i32,
    /// 32 bits: counts system calls that translated code has made; wraps.
    pub kernel_visits: i32,
    /// 64 bits: where the native-execution snippet finds its operand.
    pub operand: i32,
}

/// Positions of the shared exit code in the code cache, bytes from its start. Where there are two, the first saves the flags from the host's register, the
/// second finds them saved.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    pub chain: [i64; 2],
    /// A data access that missed the TLB; for each of the three.
    pub mem: [[i64; 2]; 3],
    pub step: [i64; 2],
    pub lookup: [i64; 2],
    pub native: i64,
    /// Transfer whose target the jump cache does not have: RCX and RDX are in their slots, flags saved, RIP in the frame. One for each of the three caches.
    pub jump_miss: [i64; 3],
}

/// What of the CPU's mode translated code depends on; part of a block's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mode(pub u16);

/// Which data TLB and jump cache kernel code uses while it may not access user pages.
pub const KERNEL_TABLE: usize = 1;

impl Mode {
    /// 64-bit code; otherwise 32-bit code with flat segments.
    pub const LONG: u16 = 1;
    /// Privilege level 3.
    pub const USER: u16 = 2;
    /// Kernel accesses to user pages are allowed (EFLAGS.AC under SMAP).
    pub const AC: u16 = 4;
    /// x87, MMX and SSE may be used.
    pub const FPU: u16 = 8;
    /// AVX may be used.
    pub const AVX: u16 = 16;
    /// RDTSC needs no trap and no offset.
    pub const TSC: u16 = 32;
    /// CR4.FSGSBASE.
    pub const FSGSBASE: u16 = 64;
    /// Without paging: addresses are 32-bit physical.
    pub const UNPAGED: u16 = 128;
    /// SYSCALL and SYSRET are on, and SYSCALL clears the status flags, IF, TF, DF, NT and AC.
    pub const SYSCALL: u16 = 256;
    /// In 32-bit code: FS, and GS, is a writable data segment of 4 GiB, wherever it begins.
    pub const FS_DATA: u16 = 512;
    pub const GS_DATA: u16 = 1024;
    /// Not the CPU's: a translation in which each access has a check of its own.
    pub const SINGLE: u16 = 2048;
    /// AVX-512 may be used.
    pub const AVX512: u16 = 4096;

    pub const fn has(self, bit: u16) -> bool {
        self.0 & bit != 0
    }

    /// Which of the three data TLBs and jump caches code in this mode uses.
    pub const fn table(self) -> usize {
        if self.has(Self::USER) {
            0
        } else if self.has(Self::AC) {
            2
        } else {
            KERNEL_TABLE
        }
    }
}
