//! Memory operands and the stack: address, TLB check, access.

use iced_x86::{Instruction, OpKind, Register};

use super::group::{OPERAND, Place, STACK};
use super::{ColdKind, Flags, Tag, Work, bit, encode_into, redirect};
use crate::asm::{RAX, RSP, cc};
use crate::block::Resume;
use crate::insn::{Insn, Kind, gpr};
use crate::layout::{TLB_ENTRIES, TLB_ENTRY_BYTES, tlb_index};
use crate::relocate::PlaceKind;

const PAGE: u32 = 4096;
const RBP: u8 = 5;

#[derive(Clone, Copy)]
pub(super) enum Address {
    Register(u8),
    /// In the first register; the second is free.
    Pair(u8, u8),
    Constant {
        ea: u64,
        /// It was relative to the program counter.
        relative: bool,
    },
}

impl Work<'_> {
    /// The host address of instruction `i`'s memory operand, with a check in front if it needs one. Flags must be saved unless the access is held.
    pub(super) fn operand(&mut self, i: usize, size: u32, write: bool, avoid: u16) -> Place {
        if let Some(place) = self.held(i, OPERAND) {
            return place;
        }
        let instr = self.insns[i].instr;
        self.checked(i, OPERAND, (size, write), avoid, |w, into, by| {
            w.address_of(i, &instr, avoid, into, by)
        })
    }

    /// Saves the flags for the check of an access, if there will be one.
    pub(super) fn save_flags_for(&mut self, i: usize, which: usize) {
        if self.held(i, which).is_none() && !self.windowed(i, which) {
            self.save_flags(i, self.live_before(i));
        }
    }

    /// Computes the operand's guest virtual address, `by` bytes on, into the given register or a scratch one, or finds it constant.
    pub(super) fn address_of(
        &mut self,
        i: usize,
        instr: &Instruction,
        avoid: u16,
        into: Option<u8>,
        by: i32,
    ) -> Address {
        let base = instr.memory_base();
        let index = gpr(instr.memory_index());
        let seg = match instr.memory_segment() {
            Register::FS => Some(4),
            Register::GS => Some(5),
            _ => None,
        };
        let disp = instr
            .memory_displacement64()
            .wrapping_add(i64::from(by) as u64);
        if instr.is_ip_rel_memory_operand() || (base == Register::None && index.is_none()) {
            let constant = if self.long() {
                disp
            } else {
                disp & 0xffff_ffff
            };
            if let Some(seg) = seg {
                let s = into.unwrap_or_else(|| self.scratch(i, avoid));
                self.asm.mov_imm(s, constant);
                self.add_segment(s, seg);
                return Address::Register(s);
            }
            return Address::Constant {
                ea: constant,
                relative: base == Register::RIP,
            };
        }
        let wide = base.size() == 8 || instr.memory_index().size() == 8;
        let s = into.unwrap_or_else(|| self.scratch(i, avoid));
        let index = index.map(|r| (r, instr.memory_index_scale() as u8));
        self.asm.lea(wide, s, gpr(base), index, disp as i32);
        if let Some(seg) = seg {
            self.add_segment(s, seg);
        }
        Address::Register(s)
    }

    pub(super) fn add_segment(&mut self, s: u8, seg: usize) {
        self.asm.add_mem(s, self.layout.seg_base[seg]);
        if !self.long() {
            self.asm.mov32(s, s);
        }
    }

    /// Emits the TLB check of an access; returns the register with the host address.
    pub(super) fn check(
        &mut self,
        i: usize,
        address: Address,
        size: u32,
        write: bool,
        avoid: u16,
    ) -> u8 {
        let start = self.start;
        let masked = self.insns[i].mem.is_some_and(|m| m.masked);
        self.check_as(i, address, (size, write), avoid, None, |reg, tag| {
            ColdKind::Mem {
                reg,
                tag,
                size,
                write,
                masked,
                start,
            }
        })
    }

    /// The same with the failure's consequence, and for a constant address the register to use, chosen by the caller.
    pub(super) fn check_as(
        &mut self,
        i: usize,
        address: Address,
        (size, write): (u32, bool),
        avoid: u16,
        into: Option<u8>,
        failed: impl FnOnce(u8, Tag) -> ColdKind,
    ) -> u8 {
        let table = self.layout.tlb[self.mode.table()];
        let field = if write { 8 } else { 0 };
        let (s, tag, host) = match address {
            Address::Register(s) | Address::Pair(s, _) => {
                let t = match address {
                    Address::Pair(_, t) => t,
                    _ => self.scratch(i, avoid | bit(s)),
                };
                self.asm.rorx(t, s, 7);
                self.asm
                    .and_imm32(t, ((TLB_ENTRIES - 1) * TLB_ENTRY_BYTES) as i32);
                self.asm.xor_mem_base(s, t, table + field);
                let tag = Tag::Indexed {
                    index: t,
                    offset: table + field,
                };
                (s, tag, None)
            }
            Address::Constant { ea, relative } => {
                let s = into.unwrap_or_else(|| self.scratch(i, avoid));
                self.mov_constant(s, ea, relative);
                let offset = table + (tlb_index(ea) * TLB_ENTRY_BYTES) as i32 + field;
                self.asm.xor_mem(s, offset);
                self.place_behind_if(relative, 4, PlaceKind::TlbEntry);
                let host = offset - field + 16;
                (s, Tag::Fixed { offset, relative }, Some((host, relative)))
            }
        };
        self.asm.cmp_imm(s, (PAGE - size) as i32);
        self.cold_jump(cc::A, failed(s, tag));
        match (host, tag) {
            (Some((host, relative)), _) => {
                self.asm.add_mem(s, host);
                self.place_behind_if(relative, 4, PlaceKind::TlbEntry);
            }
            (None, Tag::Indexed { index, .. }) => self.asm.add_mem_base(s, index, table + 16),
            (None, Tag::Fixed { .. }) => unreachable!("a fixed tag has a fixed host slot"),
        }
        s
    }

    /// Position in the block where the instruction that has just been noted can be entered again from outside.
    pub(super) fn site_start(&self) -> u32 {
        self.out
            .host_of_last()
            .expect("the instruction has been noted")
    }

    pub(super) fn mem(&mut self, i: usize, insn: &Insn) {
        let mem = insn.mem.expect("classified by its memory operand");
        self.unspill(insn.reads);
        self.save_flags_for(i, OPERAND);
        let restore = self.flags == Flags::Saved && self.needs_host_flags(i);
        let mut avoid = insn.reads;
        if restore {
            avoid |= bit(RAX);
        }
        // A destination that the instruction only writes may serve as scratch before.
        let s = self.operand(i, mem.size, mem.write, avoid | self.unsafe_writes(insn));
        if restore {
            self.restore_flags();
        }
        let mut copy = insn.instr;
        redirect(&mut copy, s.reg, s.disp);
        if encode_into(self.encoder, &mut self.asm, copy).is_none() {
            return self.step(insn);
        }
        self.spilled &= !insn.writes;
        self.flags_after(i);
    }

    /// Registers written by an instruction that may not hold the operand's address: all but the sole destination of a plain load.
    pub(super) fn unsafe_writes(&self, insn: &Insn) -> u16 {
        if insn.writes.count_ones() == 1 && insn.mem.is_some_and(|m| !m.write) {
            0
        } else {
            insn.writes
        }
    }

    pub(super) fn stack_bytes(&self) -> i32 {
        if self.long() { 8 } else { 4 }
    }

    /// Where the stack slot of an instruction is: a register, and bytes from where it points.
    pub(super) fn stack_access(&self, insn: &Insn) -> (u8, i32) {
        match insn.kind {
            Kind::Leave => (RBP, 0),
            Kind::Pop | Kind::Popf | Kind::Ret => (RSP, 0),
            _ => (RSP, -self.stack_bytes()),
        }
    }

    /// The host address of the stack slot of an instruction, with a check in front if it needs one.
    pub(super) fn stack_slot(&mut self, i: usize, write: bool, avoid: u16) -> Place {
        if let Some(place) = self.held(i, STACK) {
            return place;
        }
        let (base, disp) = self.stack_access(&self.insns[i]);
        let access = (self.stack_bytes() as u32, write);
        self.checked(i, STACK, access, avoid, |work, into, by| {
            let s = into.unwrap_or_else(|| work.scratch(i, avoid));
            work.asm.lea(work.long(), s, Some(base), None, disp + by);
            Address::Register(s)
        })
    }

    pub(super) fn adjust_rsp(&mut self, by: i32) {
        self.asm.lea(self.long(), RSP, Some(RSP), None, by);
    }

    pub(super) fn push(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        self.save_flags_for(i, STACK);
        let w = self.stack_bytes();
        let instr = &insn.instr;
        match instr.op0_kind() {
            OpKind::Register => {
                let r = gpr(instr.op0_register()).expect("a general register");
                let s = self.stack_slot(i, true, insn.reads);
                self.asm.store_at(self.long(), s.reg, s.disp, r);
            }
            OpKind::Memory => {
                self.save_flags_for(i, OPERAND);
                let from = self.operand(i, w as u32, false, insn.reads);
                let v = self.value_scratch(i, from, insn.reads);
                self.asm.load_at(self.long(), v, from.reg, from.disp);
                let s = self.stack_slot(i, true, insn.reads | bit(v));
                self.asm.store_at(self.long(), s.reg, s.disp, v);
            }
            kind => {
                let imm = match kind {
                    OpKind::Immediate8to64 => instr.immediate8to64() as i32,
                    OpKind::Immediate32to64 => instr.immediate32to64() as i32,
                    OpKind::Immediate8to32 => instr.immediate8to32(),
                    _ => instr.immediate32() as i32,
                };
                let s = self.stack_slot(i, true, insn.reads);
                self.asm.store_imm_at(self.long(), s.reg, s.disp, imm);
            }
        }
        self.adjust_rsp(-w);
    }

    /// A register for the value at a place: that of its address, unless a group goes on using it.
    fn value_scratch(&mut self, i: usize, place: Place, avoid: u16) -> u8 {
        if self.pinned() & bit(place.reg) == 0 {
            place.reg
        } else {
            self.scratch(i, avoid)
        }
    }

    pub(super) fn pop(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        self.save_flags_for(i, STACK);
        let r = gpr(insn.instr.op0_register()).expect("a general register");
        let s = self.stack_slot(i, false, insn.reads);
        self.asm.load_at(self.long(), r, s.reg, s.disp);
        if r == RSP {
            return;
        }
        self.spilled &= !bit(r);
        // Before RSP moves the instruction can still be repeated: its slot holds the same value.
        self.note();
        self.adjust_rsp(self.stack_bytes());
    }

    pub(super) fn leave(&mut self, i: usize, insn: &Insn) {
        self.unspill(bit(RSP) | bit(RBP));
        self.save_flags_for(i, STACK);
        let avoid = bit(RSP) | bit(RBP);
        let w = self.stack_bytes();
        let s = self.stack_slot(i, false, avoid);
        let v = self.value_scratch(i, s, avoid);
        self.asm.load_at(self.long(), v, s.reg, s.disp);
        // Once RSP has moved an interrupt overwrites the slot, so that nothing can be repeated: RBP is in the frame by then.
        self.asm.store(self.slot(RBP), v);
        self.asm.lea(self.long(), RSP, Some(RBP), None, w);
        self.spilled |= bit(RBP);
        self.resume = Resume::Offset(insn.offset + u16::from(insn.len));
        self.note();
    }
}
