//! From decoded instructions to host code.
//!
//! Invariants
//! * At every guest instruction boundary each general register is in its host register, or in its frame slot if the side table says so; likewise the
//!   flags, unless they are dead (overwritten before anything reads them).
//! * The host code of one instruction changes guest state only at its last step, or in steps that may be repeated from the instruction's start with
//!   the same result. So an interruption anywhere can be taken at the instruction's start.
//! * Code reached through a jump cache finds RCX and RDX and the flags in the frame; code reached directly finds all in the host's registers.

mod ahead;
mod cold;
mod control;
mod encode;
mod entries;
mod group;
mod iret;
mod memory;
mod places;
mod registers;
mod string;
mod system;
#[cfg(test)]
mod tests;
mod window;

use std::mem;

use iced_x86::{Decoder, DecoderOptions, Encoder, InstructionInfoFactory, Register};

use crate::asm::{Asm, Pos, cc};
use crate::block::{Placement, Request, Resume, Translation};
use crate::insn::{Insn, Kind, STATUS, gpr};
use crate::layout::*;
use crate::relocate;
use control::Reach;
use encode::{encode_into, redirect, reg32, reg64};

/// Instructions in one block at most.
const MAX_INSTRUCTIONS: usize = 48;
/// Bytes of host code that most blocks fit in.
const CODE_ROOM: usize = 1024;
/// How far in front of its direct entry a block has the one for flags in the frame, where that does not bring them back.
const SAVED_DIVERTS: u32 = 8;
/// Instructions looked at in a successor to see whether it needs the flags.
const LOOKAHEAD: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flags {
    /// In the host's register; perhaps dead.
    Host,
    /// In the frame.
    Saved,
}

enum ColdKind {
    /// A data access that missed: the missed address is `reg` after a second xor with the tag that `tag` addresses.
    Mem {
        reg: u8,
        tag: Tag,
        size: u32,
        write: bool,
        masked: bool,
        start: Start,
    },
    /// A group's check that failed. What follows from this instruction on is done without groups, unless the engine has just filled the TLB.
    Group {
        reg: u8,
        tag: Tag,
        span: u32,
        /// The access that stands first writes; one of the group does.
        write: bool,
        any_write: bool,
        start: Start,
        target: u64,
    },
    /// A jump that may be connected, inside the page or to another.
    Chain { target: u64, reach: Reach },
    /// A taken conditional jump out of the page.
    Far { target: u64 },
    /// The engine has to look at its requests before the instruction at `next`.
    Leave { next: u64 },
    /// The same behind an STI.
    LeaveInShadow { next: u64 },
    /// The same, with the next instruction's address in the frame.
    LeaveWithRip,
    /// The engine executes the instruction at this offset.
    Step { offset: u16 },
}

#[derive(Clone, Copy)]
enum Tag {
    Indexed { index: u8, offset: i32 },
    Fixed { offset: i32, relative: bool },
}

/// The beginning of an instruction, to go back to when an access of it can be repeated.
#[derive(Clone, Copy)]
struct Start {
    /// Position in the block.
    site: u32,
    spilled: u16,
    flags: Flags,
    resume: Resume,
    /// Registers that hold the host addresses of groups.
    held: u16,
}

struct Cold {
    from: Pos,
    kind: ColdKind,
    spilled: u16,
    flags: Flags,
    resume: Resume,
}

/// Translates blocks; keeps what is worth reusing between them.
pub struct Translator {
    layout: FrameLayout,
    stubs: Stubs,
    factory: InstructionInfoFactory,
    encoder: Encoder,
    snippet_encoder: Encoder,
    /// The last block decoded ended in front of an instruction that crosses the page.
    cut: bool,
    /// Jumps from one page of kernel code to another may be connected.
    pub kernel_links: bool,
    /// The guest's processor is AMD's, which takes near branches with an operand-size prefix for 16-bit ones.
    pub amd: bool,
    room: Room,
    /// Empty, with the room of one that is no longer needed.
    spare: Translation,
}

/// Lists of the last block, emptied: to be filled again without asking for memory.
#[derive(Default)]
struct Room {
    insns: Vec<Insn>,
    live_out: Vec<u32>,
    accesses: Vec<[Option<group::Access>; 2]>,
    families: Vec<group::Family>,
    groups: Vec<group::Group>,
    cold: Vec<Cold>,
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator").finish_non_exhaustive()
    }
}

struct Work<'a> {
    asm: Asm,
    layout: &'a FrameLayout,
    stubs: &'a Stubs,
    encoder: &'a mut Encoder,
    insns: Vec<Insn>,
    live_out: Vec<u32>,
    pc: u64,
    place: Placement,
    /// Bytes of the hot part, once it is complete.
    hot: usize,
    /// Mode at the block's first instruction, and at the present one.
    initial: Mode,
    mode: Mode,
    /// The mode changes on the way.
    changes_ac: bool,
    /// Guest bytes from `pc` on.
    bytes: &'a [u8],
    /// The block is one instruction that lies in two pages.
    crossing: bool,
    /// No groups: the code is for where a group's check has failed.
    single: bool,
    accesses: Vec<[Option<group::Access>; 2]>,
    groups: Vec<group::Group>,
    start: Start,
    spilled: u16,
    /// Registers whose frame slots have what they have.
    clean: u16,
    flags: Flags,
    resume: Resume,
    out: Translation,
    cold: Vec<Cold>,
    /// The places that a copy for another address differs in are being noted.
    movable: bool,
    kernel_links: bool,
    amd: bool,
}

fn bit(reg: u8) -> u16 {
    1 << reg
}

/// The registers of a mask, ascending.
fn ones(mut mask: u16) -> impl Iterator<Item = u8> {
    std::iter::from_fn(move || {
        let reg = mask.trailing_zeros();
        mask &= mask.checked_sub(1)?;
        Some(reg as u8)
    })
}

fn decode(bytes: &[u8], pc: u64, mode: Mode, amd: bool) -> Decoder<'_> {
    let bits = if mode.has(Mode::LONG) { 64 } else { 32 };
    let options = if amd {
        DecoderOptions::AMD
    } else {
        DecoderOptions::NONE
    };
    Decoder::with_ip(bits, bytes, pc, options)
}

impl Translator {
    pub fn new(layout: FrameLayout, stubs: Stubs) -> Translator {
        Translator {
            layout,
            stubs,
            factory: InstructionInfoFactory::new(),
            encoder: Encoder::new(64),
            snippet_encoder: Encoder::new(64),
            cut: false,
            kernel_links: true,
            amd: false,
            room: Room::default(),
            spare: Translation::default(),
        }
    }

    /// Takes back the room of a translation that is no longer needed, for the next one.
    pub fn reuse(&mut self, mut done: Translation) {
        done.code.clear();
        done.side.clear();
        done.chains.clear();
        done.places.clear();
        done.diverts.clear();
        self.spare = done;
    }

    /// Translates the code at `request.pc`. `None` where not even one instruction lies inside the given bytes: it crosses the page.
    pub fn translate(&mut self, request: &Request<'_>) -> Option<Translation> {
        let Room {
            mut insns,
            mut live_out,
            mut accesses,
            mut families,
            groups,
            cold,
        } = mem::take(&mut self.room);
        let ended = self.decode_block(request, &mut insns);
        if insns.is_empty() {
            return None;
        }
        let last = insns.last().expect("not empty");
        let end = last.offset + u16::from(last.len);
        let mut extent = (0u16, end);
        live_out.resize(insns.len(), 0);
        let mut live = STATUS;
        for (i, insn) in insns.iter().enumerate().rev() {
            let target_live = match insn.kind {
                Kind::Jmp(t) | Kind::Jcc(t) | Kind::Jrcxz(t) | Kind::Call(t) => {
                    self.flags_live_at(request, t, &mut extent)
                }
                _ => 0,
            };
            live = match insn.kind {
                Kind::Jmp(_) | Kind::Call(_) => target_live,
                Kind::Jcc(_) | Kind::Jrcxz(_) if i + 1 == insns.len() => STATUS,
                Kind::Jcc(_) | Kind::Jrcxz(_) => live | target_live,
                Kind::Ret | Kind::JmpIndirect | Kind::CallIndirect | Kind::Step => STATUS,
                Kind::Syscall | Kind::Iret => STATUS,
                Kind::Sysret => 0,
                _ => live,
            };
            live_out[i] = live;
            live = (live & !insn.flags_killed) | insn.flags_read;
        }
        let live_in = live;
        let single = request.mode.has(Mode::SINGLE);
        let mode = Mode(request.mode.0 & !Mode::SINGLE);
        let movable = relocate::movable(request) && !insns.iter().any(places::stays);
        let changes_ac = insns
            .iter()
            .any(|i| matches!(i.kind, Kind::Stac | Kind::Clac));
        let sight = request
            .sight
            .filter(|_| mode.has(Mode::LONG) && mode.table() == KERNEL_TABLE);
        group::survey(
            &insns,
            mode.has(Mode::LONG),
            &mut families,
            &mut accesses,
            sight,
            request.pc,
        );
        let Translation {
            mut code,
            side,
            chains,
            places,
            diverts,
            ..
        } = mem::take(&mut self.spare);
        code.reserve(CODE_ROOM);
        let mut work = Work {
            asm: Asm { buf: code },
            layout: &self.layout,
            stubs: &self.stubs,
            encoder: &mut self.encoder,
            insns,
            live_out,
            pc: request.pc,
            place: request.place,
            hot: usize::MAX,
            initial: mode,
            mode,
            changes_ac,
            bytes: request.bytes,
            crossing: request.crossing,
            single: single || request.crossing,
            accesses,
            groups,
            start: Start {
                site: 0,
                spilled: 0,
                flags: Flags::Host,
                resume: Resume::Offset(0),
                held: 0,
            },
            spilled: 0,
            clean: 0,
            flags: Flags::Host,
            resume: Resume::RipInFrame,
            out: Translation {
                extent_before: extent.0,
                extent: extent.1,
                side,
                chains,
                places,
                diverts,
                ..Translation::default()
            },
            cold,
            movable,
            kernel_links: self.kernel_links,
            amd: self.amd,
        };
        work.entry(live_in, request.connected);
        work.body(ended, self.cut || request.crossing);
        work.side_exits();
        work.cold_paths(request.connected);
        let Work {
            asm,
            mut insns,
            mut live_out,
            mut accesses,
            mut groups,
            cold,
            mut out,
            ..
        } = work;
        out.code = asm.buf;
        insns.clear();
        live_out.clear();
        accesses.clear();
        families.clear();
        groups.clear();
        self.room = Room {
            insns,
            live_out,
            accesses,
            families,
            groups,
            cold,
        };
        Some(out)
    }
}

impl Work<'_> {
    fn long(&self) -> bool {
        self.mode.has(Mode::LONG)
    }

    fn body(&mut self, ended: bool, checked_end: bool) {
        // Whichever way it was entered.
        self.clean = 0;
        for i in 0..self.insns.len() {
            let insn = self.insns[i];
            self.resume = match (i.checked_sub(1).map(|p| self.insns[p].kind), insn.offset) {
                (Some(Kind::Sti), offset) => Resume::OffsetInShadow(offset),
                (_, offset) => Resume::Offset(offset),
            };
            self.end_groups(i);
            self.note();
            self.start = Start {
                site: self.site_start(),
                spilled: self.spilled,
                flags: self.flags,
                resume: self.resume,
                held: self.pinned(),
            };
            self.instruction(i, &insn);
            self.clean &= !(insn.writes | insn.changes);
            debug_assert_eq!(self.pinned() & !self.spilled, 0);
        }
        if !ended {
            let last = self.insns[self.insns.len() - 1];
            let next = last.offset + u16::from(last.len);
            self.resume = Resume::Offset(next);
            self.note();
            let target = self.wrap(self.pc.wrapping_add(u64::from(next)));
            if checked_end {
                // What follows depends on the mapping of another page: go there through the jump cache.
                self.leave_far(target, STATUS);
            } else {
                self.leave_direct(target, STATUS);
            }
        }
        self.out.instructions = self.insns.len() as u16;
    }

    fn wrap(&self, target: u64) -> u64 {
        if self.long() {
            target
        } else {
            target & 0xffff_ffff
        }
    }

    fn next_pc(&self, insn: &Insn) -> u64 {
        self.wrap(
            self.pc
                .wrapping_add(u64::from(insn.offset) + u64::from(insn.len)),
        )
    }

    fn instruction(&mut self, i: usize, insn: &Insn) {
        match insn.kind {
            Kind::Nop => {}
            Kind::Copy => self.copy(i, insn),
            Kind::Lea => self.lea(i, insn),
            Kind::Mem => self.mem(i, insn),
            Kind::Push => self.push(i, insn),
            Kind::Pop => self.pop(i, insn),
            Kind::Leave => self.leave(i, insn),
            Kind::Jmp(target) => self.leave_direct(target, self.live_out[i]),
            Kind::Jcc(target) => self.jcc(i, insn, target),
            Kind::Call(target) => self.call(i, insn, Some(target)),
            Kind::CallIndirect => self.call(i, insn, None),
            Kind::JmpIndirect => self.jmp_indirect(i, insn),
            Kind::Ret => self.ret(i, insn),
            Kind::Stac => {
                self.asm.store_imm32(self.layout.ac_flag, 1 << 18);
                self.mode.0 |= Mode::AC;
            }
            Kind::Clac => {
                self.asm.store_imm32(self.layout.ac_flag, 0);
                self.mode.0 &= !Mode::AC;
            }
            Kind::Cli => self.asm.store_imm32(self.layout.interrupt_flag, 0),
            Kind::String => self.string(i, insn),
            Kind::Cld => self.cld(i),
            Kind::Pause => self.pause(i, insn),
            Kind::Rdtscp => self.rdtscp(),
            Kind::Pushf => self.pushf(i),
            Kind::Popf => self.popf(i, insn),
            Kind::Swapgs => self.swapgs(i, insn),
            Kind::Syscall => self.syscall(i, insn),
            Kind::Sysret => self.sysret(insn),
            Kind::Iret => self.iret(i, insn),
            Kind::ReadSelector => self.read_selector(insn),
            Kind::ReadControl => self.read_control(insn),
            Kind::StoreSelector => self.store_selector(i, insn),
            Kind::BitString => self.bit_string(i, insn),
            Kind::WriteSegBase => self.write_seg_base(i, insn),
            Kind::Jrcxz(target) => self.jrcxz(insn, target),
            Kind::Sti => self.sti(i, insn),
            Kind::ReadSegBase => {
                let which = if insn.instr.mnemonic() == iced_x86::Mnemonic::Rdfsbase {
                    4
                } else {
                    5
                };
                let dst = gpr(insn.instr.op0_register()).expect("a general register");
                if insn.instr.op0_register().is_gpr64() {
                    self.asm.load(dst, self.layout.seg_base[which]);
                } else {
                    self.asm.load32(dst, self.layout.seg_base[which]);
                }
                self.spilled &= !bit(dst);
            }
            Kind::Step => self.step(insn),
        }
    }

    /// Flags needed by instruction `i` or after it.
    fn live_before(&self, i: usize) -> u32 {
        let insn = &self.insns[i];
        (self.live_out[i] & !insn.flags_killed) | insn.flags_read
    }

    /// Whether the instruction itself must find the flags in the host's register.
    fn needs_host_flags(&self, i: usize) -> bool {
        let insn = &self.insns[i];
        insn.flags_read != 0
            || insn.flags_modified != 0 && self.live_out[i] & !insn.flags_killed != 0
    }

    fn flags_after(&mut self, i: usize) {
        if self.insns[i].flags_modified != 0 {
            self.flags = Flags::Host;
        }
    }

    fn copy(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        if self.needs_host_flags(i) {
            self.restore_flags();
        }
        if !self.emit_plain(insn) {
            self.step(insn);
            return;
        }
        self.spilled &= !insn.writes;
        self.flags_after(i);
    }

    fn emit_plain(&mut self, insn: &Insn) -> bool {
        encode_into(self.encoder, &mut self.asm, insn.instr).is_some()
    }

    fn lea(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        let instr = &insn.instr;
        if instr.is_ip_rel_memory_operand() {
            let dst = gpr(instr.op0_register()).expect("a general register");
            match instr.op0_register().size() {
                8 => self.mov_address(dst, instr.memory_displacement64()),
                4 => self
                    .asm
                    .mov_imm(dst, instr.memory_displacement64() & 0xffff_ffff),
                _ => return self.step(insn),
            }
        } else {
            let mut copy = *instr;
            copy.set_segment_prefix(Register::None);
            if encode_into(self.encoder, &mut self.asm, copy).is_none() {
                return self.step(insn);
            }
        }
        self.spilled &= !insn.writes;
        self.flags_after(i);
    }

    fn sti(&mut self, i: usize, insn: &Insn) {
        self.save_flags(i, self.live_before(i));
        self.asm.store_imm32(self.layout.interrupt_flag, 1 << 9);
        let next = insn.offset + u16::from(insn.len);
        self.resume = Resume::OffsetInShadow(next);
        self.note();
        self.asm.cmp_mem8(self.layout.irq_pending, 0);
        let next = self.next_pc(insn);
        self.cold_jump(cc::NE, ColdKind::LeaveInShadow { next });
    }

    /// Leaves to the engine, which executes this instruction and goes on from there.
    fn step(&mut self, insn: &Insn) {
        self.step_at(insn.offset);
    }

    fn step_at(&mut self, offset: u16) {
        self.unspill(!0);
        let at = self.wrap(self.pc.wrapping_add(u64::from(offset)));
        self.store_address(self.layout.rip, at);
        self.jmp_stub(self.stubs.step);
    }
}
