//! The per-vCPU frame: what translated code reaches through the GS base.

use std::mem::offset_of;
use std::sync::atomic::AtomicU8;

use hospes_engine::{CpuState, Msrs, Segment};
use hospes_translate::layout::{
    FrameLayout, KERNEL_JUMPS, TLB_ENTRIES, TlbEntry, USER_JUMPS, WINDOW_MASK, jump_mask,
};

use crate::filled::{Filled, LARGE_KNOWN, Memory, NO_REGION};
use crate::fpu::Wide;

/// Vector registers, each in a cache line.
#[repr(C, align(64))]
pub struct Vectors(pub [[u8; 64]; 32]);
/// Entries of each second jump cache; a power of two.
pub const SECOND_ENTRIES: usize = 16384;
/// How far the page number is shifted onto the offset in the page.
pub const SECOND_SPREAD: u8 = 14;

/// A jump target that lost its place in the first cache, perhaps. All zero where there is none.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SecondEntry {
    pub pc: u64,
    /// Host address of the block's entry that verifies its own address.
    pub address: u64,
}

impl SecondEntry {
    pub const EMPTY: SecondEntry = SecondEntry { pc: 0, address: 0 };
}

/// Index in a second jump cache. The targets of one page have indices that differ in the lowest ten bits only. Those that share an entry of the first cache have
/// different ones: a call that returns to the last instruction of a page but one has two, in turn.
pub const fn second_index(pc: u64) -> usize {
    ((pc ^ pc >> SECOND_SPREAD) >> 2 ^ pc & 3) as usize & (SECOND_ENTRIES - 1)
}

/// The last data access that missed the TLB.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct LastMiss {
    /// Position in the code cache where it is repeated.
    pub site: u32,
    /// Guest virtual address of its page.
    pub page: u64,
}

/// State of one vCPU as the translated code sees it. General registers live in `cpu.gpr` while the monitor runs.
#[repr(C, align(4096))]
pub struct Frame {
    pub cpu: CpuState,
    /// AL = OF, AH = SF ZF AF PF CF, as LAHF and SETO leave them.
    pub flags: u16,
    pub irq_pending: u8,
    /// Guest state is between two instructions': a kick only sets `turn_back`.
    pub busy: u8,
    /// IF and AC in their places in RFLAGS.
    pub interrupt_flag: u32,
    pub ac_flag: u32,
    /// RFLAGS but for the status flags, IF and AC.
    pub rest_flags: u64,
    /// What the jump caches of user and kernel code hold: mode bits without AC.
    pub jump_bases: [u32; 2],
    /// What SYSCALL and SYSRET load CS and SS with.
    pub syscall_cs_ss: [Segment; 2],
    pub sysret_cs_ss: [Segment; 2],
    /// Set by the signal handler: the entry code turns back.
    pub turn_back: AtomicU8,
    pub exit_arg: u32,
    pub exit_info: u32,
    pub exit_ea: u64,
    pub exit_chain: u32,
    /// Host addresses that a repeated instruction needs in registers.
    pub held: [u64; 16],
    pub jump_masks: [u64; 3],
    pub window_mask: u64,
    pub operand: u64,
    /// How many more times PAUSE is executed in place.
    pub pauses_left: u32,
    /// How often user code has entered its kernel by itself; wraps.
    pub kernel_visits: u32,
    /// Where the entry code jumps to.
    pub target: u64,
    pub host_rsp: u64,
    pub host_mxcsr: u32,
    pub guest_mxcsr: u32,
    /// Registers at an interruption, in hardware order, and EFLAGS.
    pub raw: [u64; 16],
    pub raw_flags: u64,
    pub raw_pc: u64,
    pub raw_signal: i32,
    /// Number of the processor exception behind the signal, if any.
    pub raw_trap: i32,
    /// The guest's vector registers while the monitor runs. Domains without AVX-512 have the lower halves of the first sixteen.
    pub vectors: Vectors,
    pub masks: [u64; 8],
    /// Where the XSAVE image has the AVX-512 state, in domains that have it.
    pub wide: Option<Wide>,
    /// CR2 at an interruption.
    pub raw_address: u64,
    pub user_jumps: [u64; USER_JUMPS],
    pub kernel_jumps: [[u64; KERNEL_JUMPS]; 2],
    pub tlb: [[TlbEntry; TLB_ENTRIES]; 3],
    /// Which of their entries are filled: one list each, and for kernel code another of what is global.
    pub filled: [Filled; 5],
    /// For each TLB, gigabytes of address space in which large pages are known to stand behind entries.
    pub large_known: [[u64; LARGE_KNOWN]; 3],
    pub memory: Memory,
    pub last_miss: LastMiss,
    /// Where a jump that finds nothing in the caches of user code and of kernel code looks next.
    pub second: [[SecondEntry; SECOND_ENTRIES]; 2],
}

impl Frame {
    /// A jump cache by its number: user code's, the kernel's, the kernel's with AC set.
    pub fn jumps(&mut self, table: usize) -> &mut [u64] {
        match table {
            0 => &mut self.user_jumps,
            _ => &mut self.kernel_jumps[table - 1],
        }
    }
}

/// Offsets of the frame's fields for the translator.
pub const LAYOUT: FrameLayout = {
    const fn pair(first: usize, step: usize) -> [i32; 2] {
        [first as i32, (first + step) as i32]
    }
    let segs = offset_of!(Frame, cpu) + offset_of!(CpuState, seg);
    let seg = segs + offset_of!(Segment, base);
    let selector = (segs + offset_of!(Segment, selector)) as i32;
    assert!(offset_of!(Segment, selector) == 12 && offset_of!(Segment, attr) == 14);
    let msr = offset_of!(Frame, cpu) + offset_of!(CpuState, msr);
    let kernel_jumps = offset_of!(Frame, kernel_jumps);
    let masks = offset_of!(Frame, jump_masks) as i32;
    let tlb = offset_of!(Frame, tlb);
    let jump_bytes = KERNEL_JUMPS * 8;
    let tlb_bytes = TLB_ENTRIES * size_of::<TlbEntry>();
    let segment = size_of::<Segment>();
    FrameLayout {
        gpr: (offset_of!(Frame, cpu) + offset_of!(CpuState, gpr)) as i32,
        rip: (offset_of!(Frame, cpu) + offset_of!(CpuState, rip)) as i32,
        flags: offset_of!(Frame, flags) as i32,
        interrupt_flag: offset_of!(Frame, interrupt_flag) as i32,
        ac_flag: offset_of!(Frame, ac_flag) as i32,
        cr2: (offset_of!(Frame, cpu) + offset_of!(CpuState, cr2)) as i32,
        cr3: (offset_of!(Frame, cpu) + offset_of!(CpuState, cr3)) as i32,
        rest_flags: offset_of!(Frame, rest_flags) as i32,
        busy: offset_of!(Frame, busy) as i32,
        turn_back: offset_of!(Frame, turn_back) as i32,
        jump_bases: pair(offset_of!(Frame, jump_bases), 4),
        selectors: [
            selector,
            selector + segment as i32,
            selector + 2 * segment as i32,
            selector + 3 * segment as i32,
            selector + 4 * segment as i32,
            selector + 5 * segment as i32,
        ],
        gdt: (offset_of!(Frame, cpu) + offset_of!(CpuState, gdtr)) as i32,
        nmi_blocked: (offset_of!(Frame, cpu) + offset_of!(CpuState, nmi_blocked)) as i32,
        cs_ss: pair(segs + segment, segment),
        syscall_cs_ss: pair(offset_of!(Frame, syscall_cs_ss), segment),
        sysret_cs_ss: pair(offset_of!(Frame, sysret_cs_ss), segment),
        lstar: (msr + offset_of!(Msrs, lstar)) as i32,
        sfmask: (msr + offset_of!(Msrs, sfmask)) as i32,
        kernel_gs_base: (msr + offset_of!(Msrs, kernel_gs_base)) as i32,
        tsc_aux: (msr + offset_of!(Msrs, tsc_aux)) as i32,
        irq_pending: offset_of!(Frame, irq_pending) as i32,
        interrupt_shadow: (offset_of!(Frame, cpu) + offset_of!(CpuState, interrupt_shadow)) as i32,
        seg_base: [
            seg as i32,
            (seg + segment) as i32,
            (seg + 2 * segment) as i32,
            (seg + 3 * segment) as i32,
            (seg + 4 * segment) as i32,
            (seg + 5 * segment) as i32,
        ],
        exit_arg: offset_of!(Frame, exit_arg) as i32,
        exit_ea: offset_of!(Frame, exit_ea) as i32,
        exit_info: offset_of!(Frame, exit_info) as i32,
        exit_chain: offset_of!(Frame, exit_chain) as i32,
        held: offset_of!(Frame, held) as i32,
        tlb: [
            tlb as i32,
            (tlb + tlb_bytes) as i32,
            (tlb + 2 * tlb_bytes) as i32,
        ],
        jumps: [
            offset_of!(Frame, user_jumps) as i32,
            kernel_jumps as i32,
            (kernel_jumps + jump_bytes) as i32,
        ],
        jump_masks: [masks, masks + 8, masks + 16],
        window_mask: offset_of!(Frame, window_mask) as i32,
        operand: offset_of!(Frame, operand) as i32,
        pauses_left: offset_of!(Frame, pauses_left) as i32,
        kernel_visits: offset_of!(Frame, kernel_visits) as i32,
    }
};

/// What a frame takes of the address space: whole huge pages.
const BYTES: usize = size_of::<Frame>().next_multiple_of(hospes_memory::HUGE_PAGE as usize);

/// A frame in memory of its own, at an address that never changes.
#[derive(Debug)]
pub struct FrameBox(*mut Frame);

// SAFETY: the frame is owned by this value alone; the pointer moves with it between threads.
unsafe impl Send for FrameBox {}

impl FrameBox {
    pub fn new(miss: [u64; 3], wide: Option<Wide>) -> Result<FrameBox, rustix::io::Errno> {
        use rustix::mm::{Advice, MprotectFlags};
        let p = hospes_memory::reserve(BYTES as u64)?;
        // SAFETY: the reservation was just made, and nobody else knows it.
        let p = unsafe {
            rustix::mm::mprotect(p.cast(), BYTES, MprotectFlags::READ | MprotectFlags::WRITE)?;
            // Every access of translated code looks into one of the tables. A host without huge pages does without.
            let _ = rustix::mm::madvise(p.cast(), BYTES, Advice::LinuxHugepage);
            p.cast::<Frame>()
        };
        // SAFETY: the field lies in the mapping and has no valid value yet.
        unsafe { (&raw mut (*p).wide).write(wide) };
        // SAFETY: the mapping is zero-filled, which is valid for every other field but the activity enum, for which 0 is `Running`; bools are false.
        let frame = unsafe { &mut *p };
        frame.cpu = CpuState::default();
        frame.jump_masks = [0, 1, 2].map(jump_mask);
        frame.window_mask = WINDOW_MASK;
        frame.host_mxcsr = 0x1f80;
        frame.guest_mxcsr = 0x1f80;
        for (table, miss) in miss.into_iter().enumerate() {
            frame.jumps(table).fill(miss);
        }
        for table in &mut frame.tlb {
            table.fill(TlbEntry::INVALID);
        }
        for known in &mut frame.large_known {
            known.fill(NO_REGION);
        }
        Ok(FrameBox(p))
    }

    pub fn as_ptr(&self) -> *mut Frame {
        self.0
    }
}

impl std::ops::Deref for FrameBox {
    type Target = Frame;

    fn deref(&self) -> &Frame {
        // SAFETY: the mapping lives as long as `self`; translated code changes it only inside `enter`, which no reference is held across.
        unsafe { &*self.0 }
    }
}

impl std::ops::DerefMut for FrameBox {
    fn deref_mut(&mut self) -> &mut Frame {
        // SAFETY: as for `deref`, and `self` is borrowed mutably.
        unsafe { &mut *self.0 }
    }
}

impl Drop for FrameBox {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and nobody else knows it.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), BYTES) };
    }
}
