//! The code around translated code: the way in, and the ways out.
//!
//! `enter` is called as a C function with the host address to go to; it comes back with the [`ExitKind`] in EAX. Between, all general registers, the
//! flags, MXCSR and YMM0-15 (in domains with AVX-512: ZMM0-31 and K0-7) are the guest's, and RSP is the guest's stack pointer. x87 state is always the guest's on a vCPU thread: the monitor uses none.

use std::mem::offset_of;

use hospes_translate::Stubs;
use hospes_translate::asm::{Asm, RAX, RBP, RBX, RCX, RDI, RDX, RSP, cc};

use crate::frame::{Frame, LAYOUT, SECOND_ENTRIES, SECOND_SPREAD, SecondEntry};
use crate::refill;
use crate::signal::Detour;

/// Why translated code came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ExitKind {
    /// RIP is in the frame; look for its block.
    Lookup = 0,
    /// `exit_arg` is the position of a jump to connect.
    Chain = 1,
    /// A data access missed the TLB: `exit_arg` is the position to come back to.
    Mem = 2,
    /// The instruction at RIP is for the engine to execute.
    Step = 3,
    /// A single native instruction is done.
    Native = 4,
    /// A signal arrived at `raw_pc`.
    Signal = 5,
    /// The entry code turned back before anything happened.
    TurnedBack = 6,
}

impl ExitKind {
    fn from(n: u32) -> ExitKind {
        match n {
            0 => ExitKind::Lookup,
            1 => ExitKind::Chain,
            2 => ExitKind::Mem,
            3 => ExitKind::Step,
            4 => ExitKind::Native,
            5 => ExitKind::Signal,
            _ => ExitKind::TurnedBack,
        }
    }
}

/// Where the pieces are, in bytes from the cache's start.
#[derive(Clone, Debug, Default)]
pub struct EntryPoints {
    pub enter: usize,
    /// First byte of its check of `turn_back`: a kick from here on changes where it goes.
    pub enter_checked: usize,
    pub enter_end: usize,
    /// Expects an exit kind in EAX and the general registers saved already.
    pub leave: usize,
    pub turned_back: usize,
    /// The look-up in the second jump caches.
    pub second: Detour,
    /// The page walk.
    pub refill: Detour,
    /// A jump to the address in RIP through the jump cache, from where the registers are in place: for kernel code without and with AC, each with the flags in the
    /// host's register and in the frame.
    pub through_cache: [[usize; 2]; 2],
    pub cached: Detour,
}

const TARGET: i32 = offset_of!(Frame, target) as i32;
const HOST_RSP: i32 = offset_of!(Frame, host_rsp) as i32;
const HOST_MXCSR: i32 = offset_of!(Frame, host_mxcsr) as i32;
const GUEST_MXCSR: i32 = offset_of!(Frame, guest_mxcsr) as i32;
const TURN_BACK: i32 = offset_of!(Frame, turn_back) as i32;
const VECTORS: i32 = offset_of!(Frame, vectors) as i32;
const MASKS: i32 = offset_of!(Frame, masks) as i32;
const CALLEE_SAVED: [u8; 6] = [RBX, RBP, 12, 13, 14, 15];

fn gpr(n: u8) -> i32 {
    LAYOUT.gpr + 8 * i32::from(n)
}

/// Puts the guest's vector and mask registers into the frame.
fn store_vectors(a: &mut Asm, wide: bool) {
    for n in 0..if wide { 32 } else { 16 } {
        let at = VECTORS + 64 * i32::from(n);
        if wide {
            a.store_zmm(at, n);
        } else {
            a.store_ymm(at, n);
        }
    }
    for k in 0..if wide { 8 } else { 0 } {
        a.store_mask(MASKS + 8 * i32::from(k), k);
    }
}

/// The reverse of [`store_vectors`].
fn load_vectors(a: &mut Asm, wide: bool) {
    for n in 0..if wide { 32 } else { 16 } {
        let at = VECTORS + 64 * i32::from(n);
        if wide {
            a.load_zmm(n, at);
        } else {
            a.load_ymm(n, at);
        }
    }
    for k in 0..if wide { 8 } else { 0 } {
        a.load_mask(k, MASKS + 8 * i32::from(k));
    }
}

/// Assembles the stubs for the start of the code cache; `wide` for guests with AVX-512.
pub fn assemble(wide: bool) -> (Vec<u8>, Stubs, EntryPoints) {
    let mut a = Asm::default();
    let mut points = EntryPoints::default();
    let mut stubs = Stubs::default();

    points.leave = a.pos();
    store_vectors(&mut a, wide);
    a.stmxcsr(GUEST_MXCSR);
    a.ldmxcsr(HOST_MXCSR);
    a.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
    a.load(RSP, HOST_RSP);
    for &r in CALLEE_SAVED.iter().rev() {
        a.pop(r);
    }
    a.bytes(&[0xc3]);

    points.turned_back = a.pos();
    a.mov_imm(RAX, ExitKind::TurnedBack as u64);
    // Nothing of the guest is in the registers yet, or all of it is still in the frame as well; the vector registers may be half loaded,
    // so they must not be stored.
    a.ldmxcsr(HOST_MXCSR);
    a.bytes(&[0xc5, 0xf8, 0x77]);
    a.load(RSP, HOST_RSP);
    for &r in CALLEE_SAVED.iter().rev() {
        a.pop(r);
    }
    a.bytes(&[0xc3]);

    a.align(16, 0);
    points.enter = a.pos();
    for &r in &CALLEE_SAVED {
        a.push(r);
    }
    a.store(HOST_RSP, RSP);
    a.store(TARGET, RDI);
    // From the look at `turn_back` on, as what it has seen may be old when the jump is made.
    points.enter_checked = a.pos();
    a.cmp_mem8(TURN_BACK, 0);
    let back = a.jcc(cc::NE);
    a.patch_rel32(back, points.turned_back as i64);
    load_vectors(&mut a, wide);
    a.ldmxcsr(GUEST_MXCSR);
    a.load_u16(RAX, LAYOUT.flags);
    a.flags_from_ax();
    for n in 0..16u8 {
        a.load(n, gpr(n));
    }
    a.jmp_mem(TARGET);
    points.enter_end = a.pos();

    let exit = |a: &mut Asm, kind: ExitKind, save_flags: bool| -> i64 {
        a.align(16, 0);
        let at = a.pos() as i64;
        a.store(gpr(RAX), RAX);
        if save_flags {
            a.flags_to_ax();
            a.store16(LAYOUT.flags, RAX);
        }
        for n in RCX..16 {
            a.store(gpr(n), n);
        }
        a.mov_imm(RAX, kind as u64);
        let j = a.jmp();
        a.patch_rel32(j, points.leave as i64);
        at
    };
    for (i, save) in [(0, true), (1, false)] {
        stubs.lookup[i] = exit(&mut a, ExitKind::Lookup, save);
        stubs.chain[i] = exit(&mut a, ExitKind::Chain, save);
        stubs.step[i] = exit(&mut a, ExitKind::Step, save);
    }
    stubs.native = exit(&mut a, ExitKind::Native, true);
    let missed = exit(&mut a, ExitKind::Mem, false);
    (stubs.mem, points.refill) = refill::assemble(&mut a, missed);

    a.align(16, 0);
    points.second.failed = a.pos();
    a.load(RCX, gpr(RCX));
    a.load(RDX, gpr(RDX));
    let j = a.jmp();
    a.patch_rel32(j, stubs.lookup[1]);
    let begin = a.pos();
    stubs.jump_miss = [0, 1, 2].map(|table| second_look_up(&mut a, table, points.second.failed));
    points.second.code = begin..a.pos();
    through_cache(&mut a, &mut points);

    (a.buf, stubs, points)
}

/// Assembles the jumps through a cache. A kick before the look at `turn_back` is seen there; one behind it goes to the way out.
fn through_cache(a: &mut Asm, points: &mut EntryPoints) {
    let mut bodies = Vec::new();
    for ways in &mut points.through_cache {
        a.align(16, 0);
        ways[0] = a.pos();
        a.store(gpr(RAX), RAX);
        a.flags_to_ax();
        a.store16(LAYOUT.flags, RAX);
        a.load(RAX, gpr(RAX));
        ways[1] = a.pos();
        a.store(gpr(RCX), RCX);
        a.store(gpr(RDX), RDX);
        bodies.push(a.jmp());
    }
    let begin = a.pos();
    for (table, from) in (1..).zip(bodies) {
        let here = a.pos() as i64;
        a.patch_rel32(from, here);
        a.cmp_mem8(TURN_BACK, 0);
        let back = a.jcc(cc::NE);
        a.patch_rel32(back, points.second.failed as i64);
        a.load(RCX, LAYOUT.rip);
        a.pext_mem(RDX, RCX, LAYOUT.jump_masks[table]);
        a.jmp_mem_index8(RDX, LAYOUT.jumps[table]);
    }
    points.cached = Detour {
        code: begin..a.pos(),
        failed: points.second.failed,
    };
}

/// Assembles what a miss of a jump cache comes to. Changes RCX, RDX and the flags only, which are in the frame.
fn second_look_up(a: &mut Asm, table: usize, failed: usize) -> i64 {
    const PC: i32 = offset_of!(SecondEntry, pc) as i32;
    const ADDRESS: i32 = offset_of!(SecondEntry, address) as i32;
    const TABLE_BYTES: usize = SECOND_ENTRIES * size_of::<SecondEntry>();
    const { assert!(size_of::<SecondEntry>() == 16) };
    let Some(table) = (table < 2).then(|| offset_of!(Frame, second) + table * TABLE_BYTES) else {
        return failed as i64;
    };
    a.align(16, 0);
    let at = a.pos() as i64;
    a.load(RCX, LAYOUT.rip);
    a.mov(RDX, RCX);
    a.shr(RDX, SECOND_SPREAD);
    a.xor(RDX, RCX);
    // The index of `second_index`, times 16.
    a.shl32(RDX, 2);
    a.and_imm32(
        RDX,
        ((SECOND_ENTRIES - 1) * size_of::<SecondEntry>()) as i32,
    );
    a.and_imm32(RCX, 3);
    a.shl32(RCX, 4);
    a.xor(RDX, RCX);
    a.load(RCX, LAYOUT.rip);
    a.cmp_mem_base(RCX, RDX, table as i32 + PC);
    let other = a.jcc(cc::NE);
    a.load_mem_base(RDX, RDX, table as i32 + ADDRESS);
    // An empty entry has the program counter 0.
    a.test(RDX, RDX);
    let empty = a.jcc(cc::E);
    a.jmp_reg(RDX);
    a.patch_rel32(other, failed as i64);
    a.patch_rel32(empty, failed as i64);
    at
}

/// Calls the entry code.
///
/// # Safety
/// The GS base of this thread is the frame; `enter` is the address of the entry stub in an executable mapping; `target` is the address of translated
/// code whose expectations of the frame hold; the signal handlers are installed on an alternate stack.
pub unsafe fn enter(enter: usize, target: usize) -> ExitKind {
    let kind: u64;
    // SAFETY: by the caller's promise. The stub saves and restores the callee-saved registers; all others, vector and mask registers
    // included, are clobbered by the C calling convention given here.
    unsafe {
        std::arch::asm!(
            "call {enter}",
            enter = in(reg) enter,
            in("rdi") target,
            lateout("rax") kind,
            clobber_abi("C"),
        );
    }
    ExitKind::from(kind as u32)
}
