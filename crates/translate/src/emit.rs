//! From decoded instructions to host code.
//!
//! Invariants
//! * At every guest instruction boundary each general register is in its host register, or in its frame slot if the side table says so; likewise the
//!   flags, unless they are dead (overwritten before anything reads them).
//! * The host code of one instruction changes guest state only at its last step, or in steps that may be repeated from the instruction's start with
//!   the same result. So an interruption anywhere can be taken at the instruction's start.
//! * Code reached through a jump cache finds RCX and RDX and the flags in the frame; code reached directly finds all in the host's registers.

mod string;
mod system;

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, OpKind, Register,
};

use crate::asm::{Asm, Pos, RAX, RCX, RDX, RSP, cc};
use crate::block::{ChainSite, Request, Resume, SideEntry, Translation};
use crate::insn::{Insn, Kind, STATUS, gpr};
use crate::layout::*;

/// Instructions in one block at most.
const MAX_INSTRUCTIONS: usize = 48;
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
        info: u32,
        site: u32,
    },
    /// A taken conditional jump inside the page.
    Chain { target: u64 },
    /// A taken conditional jump out of the page.
    Far { target: u64 },
    /// The engine has to look at its requests before the instruction at `next`.
    Leave { next: u64 },
    /// The same, with the next instruction's address in the frame.
    LeaveWithRip,
    /// The engine executes the instruction at this offset.
    Step { offset: u16 },
}

#[derive(Clone, Copy)]
enum Tag {
    Indexed { index: u8, offset: i32 },
    Fixed { offset: i32 },
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
    cache_pos: i64,
    /// Mode at the block's first instruction, and at the present one.
    initial: Mode,
    mode: Mode,
    /// Guest bytes from `pc` on.
    bytes: &'a [u8],
    /// The block is one instruction that lies in two pages.
    crossing: bool,
    spilled: u16,
    flags: Flags,
    resume: Resume,
    out: Translation,
    cold: Vec<Cold>,
}

fn bit(reg: u8) -> u16 {
    1 << reg
}

fn decode(bytes: &[u8], pc: u64, mode: Mode) -> Decoder<'_> {
    Decoder::with_ip(
        if mode.has(Mode::LONG) { 64 } else { 32 },
        bytes,
        pc,
        DecoderOptions::NONE,
    )
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
        }
    }

    /// Translates the code at `request.pc`. `None` where not even one instruction lies inside the given bytes: it crosses the page.
    pub fn translate(&mut self, request: &Request<'_>) -> Option<Translation> {
        let (insns, ended) = self.decode_block(request);
        if insns.is_empty() {
            return None;
        }
        let last = insns.last().expect("not empty");
        let end = last.offset + u16::from(last.len);
        let mut extent = (0u16, end);
        let mut live_out = vec![0; insns.len()];
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
                Kind::Syscall => STATUS,
                Kind::Sysret => 0,
                _ => live,
            };
            live_out[i] = live;
            live = (live & !insn.flags_killed) | insn.flags_read;
        }
        let live_in = live;
        let mut work = Work {
            asm: Asm::default(),
            layout: &self.layout,
            stubs: &self.stubs,
            encoder: &mut self.encoder,
            insns,
            live_out,
            pc: request.pc,
            cache_pos: request.cache_pos,
            initial: request.mode,
            mode: request.mode,
            bytes: request.bytes,
            crossing: request.crossing,
            spilled: 0,
            flags: Flags::Host,
            resume: Resume::RipInFrame,
            out: Translation {
                extent_before: extent.0,
                extent: extent.1,
                ..Translation::default()
            },
            cold: Vec::new(),
        };
        work.entry(live_in);
        work.body(ended, self.cut || request.crossing);
        work.cold_paths();
        work.out.code = work.asm.buf;
        Some(work.out)
    }

    fn decode_block(&mut self, request: &Request<'_>) -> (Vec<Insn>, bool) {
        self.cut = false;
        let mut insns = Vec::with_capacity(16);
        let mut decoder = decode(request.bytes, request.pc, request.mode);
        let mut mode = request.mode;
        let most = if request.crossing {
            1
        } else {
            MAX_INSTRUCTIONS
        };
        while insns.len() < most && decoder.can_decode() {
            let offset = decoder.position() as u16;
            let instr = decoder.decode();
            if instr.is_invalid() {
                if decoder.last_error() == iced_x86::DecoderError::NoMoreBytes || !insns.is_empty()
                {
                    break;
                }
            }
            let insn = Insn::new(instr, offset, mode, &mut self.factory);
            match insn.kind {
                Kind::Stac => mode.0 |= Mode::AC,
                Kind::Clac => mode.0 &= !Mode::AC,
                _ => {}
            }
            let ends = !matches!(
                insn.kind,
                Kind::Copy
                    | Kind::Mem
                    | Kind::Lea
                    | Kind::Nop
                    | Kind::Push
                    | Kind::Pop
                    | Kind::Leave
                    | Kind::Jcc(_)
                    | Kind::Stac
                    | Kind::Clac
                    | Kind::Cli
                    | Kind::Sti
                    | Kind::ReadSegBase
                    | Kind::ReadSelector
                    | Kind::StoreSelector
                    | Kind::BitString
                    | Kind::WriteSegBase
                    | Kind::Jrcxz(_)
                    | Kind::String
                    | Kind::Cld
                    | Kind::Rdtscp
                    | Kind::Pushf
                    | Kind::Popf
                    | Kind::Swapgs
            );
            insns.push(insn);
            if ends {
                return (insns, true);
            }
        }
        (insns, false)
    }

    /// Status flags that code at a target in the same page may read before it writes them. Bytes looked at join the block's extent.
    fn flags_live_at(
        &mut self,
        request: &Request<'_>,
        target: u64,
        extent: &mut (u16, u16),
    ) -> u32 {
        if target < request.pc || target - request.pc >= request.bytes.len() as u64 {
            return STATUS;
        }
        let start = (target - request.pc) as usize;
        let mut decoder = decode(&request.bytes[start..], target, request.mode);
        let mut undecided = STATUS;
        for _ in 0..LOOKAHEAD {
            if !decoder.can_decode() {
                return STATUS;
            }
            let instr = decoder.decode();
            let insn = Insn::new(instr, 0, request.mode, &mut self.factory);
            if insn.flags_read & undecided != 0 {
                return STATUS;
            }
            if !matches!(
                insn.kind,
                Kind::Copy
                    | Kind::Mem
                    | Kind::Lea
                    | Kind::Nop
                    | Kind::Push
                    | Kind::Pop
                    | Kind::Leave
            ) {
                return STATUS;
            }
            undecided &= !insn.flags_killed;
            if undecided == 0 {
                extent.1 = extent.1.max((start + decoder.position()) as u16);
                return 0;
            }
        }
        STATUS
    }

    /// Encodes code that runs one instruction with its memory operand (if any) at the address in the frame's operand slot and then leaves through the
    /// `native` stub. `None` where the instruction has no such form.
    pub fn native_snippet(&mut self, instr: &Instruction, cache_pos: i64) -> Option<Vec<u8>> {
        let mut asm = Asm::default();
        let mut copy = *instr;
        let has_memory = (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory);
        let mut saved = None;
        if has_memory {
            let mut used = bit(RSP);
            for r in self.factory.info(instr).used_registers() {
                if let Some(n) = gpr(r.register()) {
                    used |= bit(n);
                }
            }
            let base = [RAX, RCX, RDX, 3, 6, 7, 5]
                .into_iter()
                .find(|&r| used & bit(r) == 0)?;
            asm.load(base, self.layout.operand);
            redirect(&mut copy, base, 0);
            saved = Some(base);
        }
        encode_into(&mut self.snippet_encoder, &mut asm, copy)?;
        if let Some(base) = saved {
            asm.load(base, self.layout.gpr + 8 * i32::from(base));
        }
        let at = asm.jmp();
        asm.patch_rel32(at, self.stubs.native - cache_pos);
        Some(asm.buf)
    }
}

/// Points the instruction's memory operand at `[base + disp]`.
fn redirect(instr: &mut Instruction, base: u8, disp: i32) {
    instr.set_segment_prefix(Register::None);
    instr.set_memory_base(reg64(base));
    instr.set_memory_index(Register::None);
    instr.set_memory_index_scale(1);
    instr.set_memory_displacement64(disp as i64 as u64);
    instr.set_memory_displ_size(if disp == 0 { 0 } else { 8 });
}

/// Re-encodes for 64-bit mode; 32-bit code's one-byte INC and DEC have no encoding there and take the long form.
fn encode_into(encoder: &mut Encoder, asm: &mut Asm, mut instr: Instruction) -> Option<()> {
    match instr.code() {
        Code::Inc_r32 => instr.set_code(Code::Inc_rm32),
        Code::Dec_r32 => instr.set_code(Code::Dec_rm32),
        Code::Inc_r16 => instr.set_code(Code::Inc_rm16),
        Code::Dec_r16 => instr.set_code(Code::Dec_rm16),
        _ => {}
    }
    encoder.set_buffer(std::mem::take(&mut asm.buf));
    let start = encoder.encode(&instr, 0);
    asm.buf = encoder.take_buffer();
    start.ok().map(|_| ())
}

fn reg64(n: u8) -> Register {
    const REGS: [Register; 16] = [
        Register::RAX,
        Register::RCX,
        Register::RDX,
        Register::RBX,
        Register::RSP,
        Register::RBP,
        Register::RSI,
        Register::RDI,
        Register::R8,
        Register::R9,
        Register::R10,
        Register::R11,
        Register::R12,
        Register::R13,
        Register::R14,
        Register::R15,
    ];
    REGS[usize::from(n)]
}

fn reg32(n: u8) -> Register {
    const REGS: [Register; 16] = [
        Register::EAX,
        Register::ECX,
        Register::EDX,
        Register::EBX,
        Register::ESP,
        Register::EBP,
        Register::ESI,
        Register::EDI,
        Register::R8D,
        Register::R9D,
        Register::R10D,
        Register::R11D,
        Register::R12D,
        Register::R13D,
        Register::R14D,
        Register::R15D,
    ];
    REGS[usize::from(n)]
}

impl Work<'_> {
    fn long(&self) -> bool {
        self.mode.has(Mode::LONG)
    }

    fn slot(&self, reg: u8) -> i32 {
        self.layout.gpr + 8 * i32::from(reg)
    }

    fn rel(&mut self, at: Pos, stub: i64) {
        self.asm.patch_rel32(at, stub - self.cache_pos);
    }

    fn jmp_stub(&mut self, stub: [i64; 2]) {
        let at = self.asm.jmp();
        self.rel(at, stub[(self.flags == Flags::Saved) as usize]);
    }

    /// Records where the guest's state is from here on.
    fn note(&mut self) {
        let entry = SideEntry {
            host: self.asm.pos() as u32,
            resume: self.resume,
            spilled: self.spilled,
            flags_saved: self.flags == Flags::Saved,
        };
        match self.out.side.last_mut() {
            Some(last) if last.host == entry.host => *last = entry,
            Some(last)
                if last.resume == entry.resume
                    && last.spilled == entry.spilled
                    && last.flags_saved == entry.flags_saved => {}
            _ => self.out.side.push(entry),
        }
    }

    fn spill(&mut self, reg: u8) {
        debug_assert_eq!(self.spilled & bit(reg), 0);
        self.asm.store(self.slot(reg), reg);
        self.spilled |= bit(reg);
        self.note();
    }

    /// Brings a register's value back. The frame slot stays valid until the register changes, so the order of note and load does not matter.
    fn unspill(&mut self, mask: u16) {
        let todo = self.spilled & mask;
        if todo == 0 {
            return;
        }
        for r in 0..16 {
            if todo & bit(r) != 0 {
                self.asm.load(r, self.slot(r));
            }
        }
        self.spilled &= !todo;
        self.note();
    }

    /// A register free for the translator's use, not in `avoid`; its value is in the frame.
    fn scratch(&mut self, i: usize, avoid: u16) -> u8 {
        let avoid = avoid | bit(RSP);
        let low_only = self.insns[i].high_byte;
        let allowed = |r: u8| avoid & bit(r) == 0 && (!low_only || r < 8);
        if let Some(r) = (0..16).find(|&r| self.spilled & bit(r) != 0 && allowed(r)) {
            return r;
        }
        let mut best = (0usize, RAX);
        for r in 0..16u8 {
            if !allowed(r) {
                continue;
            }
            let mut distance = self.insns.len() + 2;
            for (n, insn) in self.insns[i..].iter().enumerate() {
                if (insn.reads | insn.writes) & bit(r) != 0 {
                    // A register that is written before it is read costs no reload.
                    distance = if insn.reads & bit(r) != 0 {
                        n
                    } else {
                        self.insns.len() + 4
                    };
                    break;
                }
            }
            if distance >= best.0 {
                best = (distance, r);
            }
        }
        self.spill(best.1);
        best.1
    }

    /// Makes sure that flags which are still needed survive the translator's own arithmetic. May use RAX, then leaves it spilled.
    fn save_flags(&mut self, i: usize, live: u32) {
        if self.flags == Flags::Saved || live == 0 {
            return;
        }
        let keep_rax = self.spilled & bit(RAX) == 0;
        if keep_rax {
            self.spill(RAX);
        }
        self.asm.flags_to_ax();
        self.asm.store16(self.layout.flags, RAX);
        self.flags = Flags::Saved;
        self.note();
        if keep_rax && self.insns[i].reads & bit(RAX) != 0 {
            self.unspill(bit(RAX));
        }
    }

    /// Brings saved flags back to the host's register. No other register is disturbed.
    fn restore_flags(&mut self) {
        if self.flags == Flags::Host {
            return;
        }
        let keep_rax = self.spilled & bit(RAX) == 0;
        if keep_rax {
            self.spill(RAX);
        }
        self.asm.load_u16(RAX, self.layout.flags);
        self.asm.flags_from_ax();
        self.flags = Flags::Host;
        self.note();
        if keep_rax {
            self.unspill(bit(RAX));
        }
    }

    fn entry(&mut self, live_in: u32) {
        let pc = self.pc;
        // Indirect entry: is this really the address the jump wanted?
        self.spilled = bit(RCX) | bit(RDX);
        self.flags = Flags::Saved;
        self.resume = Resume::RipInFrame;
        self.note();
        let negative = pc.wrapping_neg() as i64;
        if let Ok(disp) = i32::try_from(negative) {
            self.asm.lea(true, RCX, Some(RCX), None, disp);
        } else {
            self.asm.mov_imm(RDX, negative as u64);
            self.asm.lea(true, RCX, Some(RCX), Some((RDX, 1)), 0);
        }
        self.asm.bytes(&[0xe3, 5]); // jrcxz over the jump
        let at = self.asm.jmp();
        self.rel(at, self.stubs.jump_miss);
        self.resume = Resume::Offset(0);
        self.note();
        self.unspill(bit(RCX) | bit(RDX));
        if live_in != 0 {
            self.restore_flags();
        } else {
            self.flags = Flags::Host;
        }
        self.asm.align(8, 0);
        self.note();
        self.out.direct_entry = self.asm.pos() as u32;
        self.asm.nops(5);
    }

    fn body(&mut self, ended: bool, checked_end: bool) {
        for i in 0..self.insns.len() {
            let insn = self.insns[i];
            self.resume = match (i.checked_sub(1).map(|p| self.insns[p].kind), insn.offset) {
                (Some(Kind::Sti), offset) => Resume::OffsetInShadow(offset),
                (_, offset) => Resume::Offset(offset),
            };
            self.note();
            self.instruction(i, &insn);
        }
        if !ended {
            let last = self.insns[self.insns.len() - 1];
            let next = last.offset + u16::from(last.len);
            self.resume = if last.kind == Kind::Sti {
                Resume::OffsetInShadow(next)
            } else {
                Resume::Offset(next)
            };
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
            Kind::Leave => self.leave(i),
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
            Kind::Rdtscp => self.rdtscp(),
            Kind::Pushf => self.pushf(i),
            Kind::Popf => self.popf(i, insn),
            Kind::Swapgs => self.swapgs(i, insn),
            Kind::Syscall => self.syscall(i, insn),
            Kind::Sysret => self.sysret(insn),
            Kind::ReadSelector => self.read_selector(insn),
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
                8 => self.asm.mov_imm(dst, instr.memory_displacement64()),
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

    /// Emits the check and translation of the address of instruction `i`'s memory operand; its host address is in the register returned.
    fn operand_address(&mut self, i: usize, size: u32, write: bool, avoid: u16) -> u8 {
        let insn = self.insns[i];
        let instr = &insn.instr;
        let ea = self.address_of(i, instr, avoid);
        self.check(i, ea, size, write, avoid)
    }

    /// Computes the operand's guest virtual address into a scratch register, or finds it constant.
    fn address_of(&mut self, i: usize, instr: &Instruction, avoid: u16) -> Address {
        let base = instr.memory_base();
        let index = gpr(instr.memory_index());
        let seg = match instr.memory_segment() {
            Register::FS => Some(4),
            Register::GS => Some(5),
            _ => None,
        };
        let disp = instr.memory_displacement64();
        if instr.is_ip_rel_memory_operand() || (base == Register::None && index.is_none()) {
            let constant = if self.long() {
                disp
            } else {
                disp & 0xffff_ffff
            };
            if let Some(seg) = seg {
                let s = self.scratch(i, avoid);
                self.asm.mov_imm(s, constant);
                self.add_segment(s, seg);
                return Address::Register(s);
            }
            return Address::Constant(constant);
        }
        let wide = base.size() == 8 || instr.memory_index().size() == 8;
        let s = self.scratch(i, avoid);
        let index = index.map(|r| (r, instr.memory_index_scale() as u8));
        self.asm.lea(wide, s, gpr(base), index, disp as i32);
        if let Some(seg) = seg {
            self.add_segment(s, seg);
        }
        Address::Register(s)
    }

    fn add_segment(&mut self, s: u8, seg: usize) {
        self.asm.add_mem(s, self.layout.seg_base[seg]);
        if !self.long() {
            self.asm.mov32(s, s);
        }
    }

    /// Emits the TLB check of an access; returns the register with the host address.
    fn check(&mut self, i: usize, address: Address, size: u32, write: bool, avoid: u16) -> u8 {
        let table = self.layout.tlb[self.mode.table()];
        let field = if write { 8 } else { 0 };
        let site = self.site_start(i);
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
            Address::Constant(ea) => {
                let s = self.scratch(i, avoid);
                self.asm.mov_imm(s, ea);
                let entry = table + (tlb_index(ea) * TLB_ENTRY_BYTES) as i32;
                self.asm.xor_mem(s, entry + field);
                (
                    s,
                    Tag::Fixed {
                        offset: entry + field,
                    },
                    Some(entry + 16),
                )
            }
        };
        self.asm.cmp_imm(s, (PAGE - size) as i32);
        let from = self.asm.jcc(cc::A);
        self.cold.push(Cold {
            from,
            kind: ColdKind::Mem {
                reg: s,
                tag,
                info: size | (write as u32) << 8,
                site,
            },
            spilled: self.spilled,
            flags: self.flags,
            resume: self.resume,
        });
        match (host, tag) {
            (Some(host), _) => self.asm.add_mem(s, host),
            (None, Tag::Indexed { index, .. }) => self.asm.add_mem_base(s, index, table + 16),
            (None, Tag::Fixed { .. }) => unreachable!("a fixed tag has a fixed host slot"),
        }
        s
    }

    /// Position in the code cache where instruction `i` can be entered again from outside.
    fn site_start(&self, i: usize) -> u32 {
        let offset = self.insns[i].offset;
        let host = self
            .out
            .host_of(offset)
            .expect("the instruction has been noted");
        (self.cache_pos + i64::from(host)) as u32
    }

    fn mem(&mut self, i: usize, insn: &Insn) {
        let mem = insn.mem.expect("classified by its memory operand");
        self.unspill(insn.reads);
        let live = self.live_before(i);
        self.save_flags(i, live);
        let restore = self.flags == Flags::Saved && self.needs_host_flags(i);
        let mut avoid = insn.reads;
        if restore {
            avoid |= bit(RAX);
        }
        // A destination that the instruction only writes may serve as scratch before.
        let s = self.operand_address(i, mem.size, mem.write, avoid | self.unsafe_writes(insn));
        if restore {
            self.restore_flags();
        }
        let mut copy = insn.instr;
        redirect(&mut copy, s, 0);
        if encode_into(self.encoder, &mut self.asm, copy).is_none() {
            return self.step(insn);
        }
        self.spilled &= !insn.writes;
        self.flags_after(i);
    }

    /// Registers written by an instruction that may not hold the operand's address: all but the sole destination of a plain load.
    fn unsafe_writes(&self, insn: &Insn) -> u16 {
        if insn.writes.count_ones() == 1 && insn.mem.is_some_and(|m| !m.write) {
            0
        } else {
            insn.writes
        }
    }

    fn stack_bytes(&self) -> i32 {
        if self.long() { 8 } else { 4 }
    }

    /// Emits the check of the stack slot below (`push`) or at (`pop`) the stack pointer.
    fn stack_slot(&mut self, i: usize, write: bool, avoid: u16) -> u8 {
        let s = self.scratch(i, avoid);
        let w = self.stack_bytes();
        self.asm
            .lea(self.long(), s, Some(RSP), None, if write { -w } else { 0 });
        self.check(i, Address::Register(s), w as u32, write, avoid)
    }

    fn adjust_rsp(&mut self, by: i32) {
        self.asm.lea(self.long(), RSP, Some(RSP), None, by);
    }

    fn push(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        self.save_flags(i, self.live_before(i));
        let w = self.stack_bytes();
        let instr = &insn.instr;
        match instr.op0_kind() {
            OpKind::Register => {
                let r = gpr(instr.op0_register()).expect("a general register");
                let s = self.stack_slot(i, true, insn.reads);
                self.asm.store_at(self.long(), s, r);
            }
            OpKind::Memory => {
                let v = self.operand_address(i, w as u32, false, insn.reads);
                self.asm.load_at(self.long(), v, v);
                let s = self.stack_slot(i, true, insn.reads | bit(v));
                self.asm.store_at(self.long(), s, v);
            }
            kind => {
                let imm = match kind {
                    OpKind::Immediate8to64 => instr.immediate8to64() as i32,
                    OpKind::Immediate32to64 => instr.immediate32to64() as i32,
                    OpKind::Immediate8to32 => instr.immediate8to32(),
                    _ => instr.immediate32() as i32,
                };
                let s = self.stack_slot(i, true, insn.reads);
                self.asm.store_imm_at(self.long(), s, 0, imm);
            }
        }
        self.adjust_rsp(-w);
    }

    fn pop(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        self.save_flags(i, self.live_before(i));
        let r = gpr(insn.instr.op0_register()).expect("a general register");
        let s = self.stack_slot(i, false, insn.reads);
        self.asm.load_at(self.long(), r, s);
        if r == RSP {
            return;
        }
        self.spilled &= !bit(r);
        // Before RSP moves the instruction can still be repeated: its slot holds the same value.
        self.note();
        self.adjust_rsp(self.stack_bytes());
    }

    fn leave(&mut self, i: usize) {
        const RBP: u8 = 5;
        self.unspill(bit(RSP) | bit(RBP));
        self.save_flags(i, self.live_before(i));
        let avoid = bit(RSP) | bit(RBP);
        let s = self.scratch(i, avoid);
        self.asm.lea(self.long(), s, Some(RBP), None, 0);
        let w = self.stack_bytes();
        let s = self.check(i, Address::Register(s), w as u32, false, avoid);
        self.asm.load_at(self.long(), s, s);
        self.asm.lea(self.long(), RSP, Some(RBP), None, w);
        // RSP does not matter to LEAVE, so up to here it can be repeated.
        if self.long() {
            self.asm.mov(RBP, s);
        } else {
            self.asm.mov32(RBP, s);
        }
    }

    fn sti(&mut self, i: usize, insn: &Insn) {
        self.save_flags(i, self.live_before(i));
        self.asm.store_imm32(self.layout.interrupt_flag, 1 << 9);
        let next = insn.offset + u16::from(insn.len);
        self.resume = Resume::OffsetInShadow(next);
        self.note();
        self.asm.cmp_mem8(self.layout.irq_pending, 0);
        let from = self.asm.jcc(cc::NE);
        self.cold.push(Cold {
            from,
            kind: ColdKind::Leave {
                next: self.next_pc(insn),
            },
            spilled: self.spilled,
            flags: self.flags,
            resume: self.resume,
        });
    }

    /// Whether a target is inside the page of this block, so that a direct chain stays valid as long as the block does.
    /// An instruction that lies in two pages is not: its block depends on both.
    fn same_page(&self, target: u64) -> bool {
        if target & 0xfff > 0xff1 && target >= self.pc {
            let start = ((target - self.pc) as usize).min(self.bytes.len());
            let mut decoder = decode(&self.bytes[start..], target, self.mode);
            let _ = decoder.decode();
            if decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
                return false;
            }
        }
        !self.crossing && self.pc & !(u64::from(PAGE) - 1) == target & !(u64::from(PAGE) - 1)
    }

    /// Leaves the hot path where `cond` holds.
    fn cold_jump(&mut self, cond: u8, kind: ColdKind) {
        let from = self.asm.jcc(cond);
        self.cold.push(Cold {
            from,
            kind,
            spilled: self.spilled,
            flags: self.flags,
            resume: self.resume,
        });
    }

    fn jrcxz(&mut self, insn: &Insn, target: u64) {
        self.restore_flags();
        self.unspill(!0);
        let short = insn.instr.mnemonic() == iced_x86::Mnemonic::Jecxz;
        // Behind the two short jumps lies a long one with an aligned displacement.
        self.asm.align(4, if short { 2 } else { 3 });
        self.note();
        if short {
            self.asm.bytes(&[0x67]);
        }
        self.asm.bytes(&[0xe3, 2, 0xeb, 5]);
        let from = self.asm.jmp();
        self.cold.push(Cold {
            from,
            kind: if self.same_page(target) {
                ColdKind::Chain { target }
            } else {
                ColdKind::Far { target }
            },
            spilled: 0,
            flags: self.flags,
            resume: self.resume,
        });
    }

    fn jcc(&mut self, i: usize, insn: &Insn, target: u64) {
        self.restore_flags();
        let backward = target <= self.pc.wrapping_add(u64::from(insn.offset));
        let same = self.same_page(target);
        if backward && same || i + 1 == self.insns.len() {
            self.unspill(!0);
        }
        let condition = insn.instr.condition_code();
        let code = condition_code(condition);
        if same && self.spilled == 0 {
            self.asm.align(4, 2);
            self.note();
            let from = self.asm.jcc(code);
            self.cold.push(Cold {
                from,
                kind: ColdKind::Chain { target },
                spilled: 0,
                flags: self.flags,
                resume: self.resume,
            });
            return;
        }
        let from = self.asm.jcc(code);
        self.cold.push(Cold {
            from,
            kind: if same {
                ColdKind::Chain { target }
            } else {
                ColdKind::Far { target }
            },
            spilled: self.spilled,
            flags: self.flags,
            resume: self.resume,
        });
    }

    /// Ends the block with a transfer to a known address.
    fn leave_direct(&mut self, target: u64, live: u32) {
        if self.same_page(target) {
            if live != 0 {
                self.restore_flags();
            }
            self.flags = Flags::Host;
            self.unspill(!0);
            self.asm.align(4, 3);
            let at = self.asm.jmp();
            self.cold.push(Cold {
                from: at,
                kind: ColdKind::Chain { target },
                spilled: 0,
                flags: Flags::Host,
                resume: self.resume,
            });
        } else {
            self.leave_far(target, live);
        }
    }

    /// Ends the block with a transfer to a known address through the jump cache.
    fn leave_far(&mut self, target: u64, live: u32) {
        self.far_save_flags(live);
        self.far_tail(Some(target), 0);
    }

    fn far_save_flags(&mut self, live: u32) {
        if self.flags == Flags::Saved {
            return;
        }
        if live != 0 {
            if self.spilled & bit(RAX) == 0 {
                self.spill(RAX);
            }
            self.asm.flags_to_ax();
            self.asm.store16(self.layout.flags, RAX);
        }
        self.flags = Flags::Saved;
        self.note();
    }

    /// Ends the block through the jump cache, to `target` or (if none) to the address in RCX, whose own value is spilled. RSP grows by `pop` with the transfer.
    fn far_tail(&mut self, target: Option<u64>, pop: i32) {
        debug_assert_eq!(self.flags, Flags::Saved);
        self.unspill(!(bit(RCX) | bit(RDX)));
        for r in [RCX, RDX] {
            if self.spilled & bit(r) == 0 {
                self.spill(r);
            }
        }
        if let Some(target) = target {
            self.asm.mov_imm(RCX, target);
        }
        self.asm.store(self.layout.rip, RCX);
        if pop != 0 {
            self.adjust_rsp(pop);
        }
        self.resume = Resume::RipInFrame;
        self.note();
        let table = self.layout.jumps[self.mode.table()];
        match target {
            Some(target) => self.asm.jmp_mem(table + 8 * jump_index(target) as i32),
            None => {
                self.asm.pext_mem(RDX, RCX, self.layout.jump_mask);
                self.asm.jmp_mem_index8(RDX, table);
            }
        }
    }

    fn call(&mut self, i: usize, insn: &Insn, target: Option<u64>) {
        let w = self.stack_bytes();
        self.unspill(insn.reads);
        // Everything but a near target known not to read the flags gets them through the frame.
        let live = if target.is_some() {
            self.live_out[i]
        } else {
            STATUS
        };
        self.save_flags(i, live);
        let direct = target.filter(|&t| self.same_page(t));
        let return_to = self.next_pc(insn);
        let reads = insn.reads;
        let mut keep = 0;
        if target.is_none() {
            self.target_to_rcx(i, insn);
            keep = bit(RCX);
        }
        let s = self.stack_slot(i, true, if target.is_none() { keep } else { reads });
        if return_to as i64 == i64::from(return_to as i32) || !self.long() {
            self.asm.store_imm_at(self.long(), s, 0, return_to as i32);
        } else {
            let t = self.scratch(i, bit(s) | keep);
            self.asm.mov_imm(t, return_to);
            self.asm.store_at(true, s, t);
        }
        if let Some(target) = direct {
            if live != 0 {
                self.restore_flags();
            }
            self.flags = Flags::Host;
            self.unspill(!0);
            // From here on the call has happened; the frame knows where it went.
            self.asm.store_imm64(self.layout.rip, target);
            self.adjust_rsp(-w);
            self.resume = Resume::RipInFrame;
            self.note();
            self.asm.align(4, 3);
            let at = self.asm.jmp();
            self.cold.push(Cold {
                from: at,
                kind: ColdKind::Chain { target },
                spilled: 0,
                flags: Flags::Host,
                resume: Resume::RipInFrame,
            });
        } else {
            self.far_save_flags(live);
            self.far_tail(target, -w);
        }
    }

    /// Loads the target of an indirect jump or call into RCX, whose own value is spilled then.
    fn target_to_rcx(&mut self, i: usize, insn: &Insn) {
        let instr = &insn.instr;
        if instr.op0_kind() == OpKind::Register {
            let r = gpr(instr.op0_register()).expect("a general register");
            if self.spilled & bit(RCX) == 0 {
                self.spill(RCX);
            }
            if r != RCX {
                if self.long() {
                    self.asm.mov(RCX, r);
                } else {
                    self.asm.mov32(RCX, r);
                }
            }
        } else {
            let s = self.operand_address(i, self.stack_bytes() as u32, false, insn.reads);
            if self.spilled & bit(RCX) == 0 {
                self.spill(RCX);
            }
            self.asm.load_at(self.long(), RCX, s);
        }
    }

    fn jmp_indirect(&mut self, i: usize, insn: &Insn) {
        self.unspill(insn.reads);
        self.save_flags(i, STATUS);
        self.target_to_rcx(i, insn);
        self.far_tail(None, 0);
    }

    fn ret(&mut self, i: usize, insn: &Insn) {
        let w = self.stack_bytes();
        self.save_flags(i, STATUS);
        let s = self.stack_slot(i, false, 0);
        if self.spilled & bit(RCX) == 0 {
            self.spill(RCX);
        }
        self.asm.load_at(self.long(), RCX, s);
        let extra = if insn.instr.op_count() == 1 {
            i32::from(insn.instr.immediate16())
        } else {
            0
        };
        self.far_tail(None, w + extra);
    }

    /// Leaves to the engine, which executes this instruction and goes on from there.
    fn step(&mut self, insn: &Insn) {
        self.step_at(insn.offset);
    }

    fn step_at(&mut self, offset: u16) {
        self.unspill(!0);
        let at = self.wrap(self.pc.wrapping_add(u64::from(offset)));
        self.asm.store_imm64(self.layout.rip, at);
        self.jmp_stub(self.stubs.step);
    }

    fn cold_paths(&mut self) {
        for cold in std::mem::take(&mut self.cold) {
            let here = self.asm.pos() as i64;
            self.spilled = cold.spilled;
            self.flags = cold.flags;
            self.resume = cold.resume;
            match cold.kind {
                ColdKind::Mem {
                    reg,
                    tag,
                    info,
                    site,
                } => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    match tag {
                        Tag::Indexed { index, offset } => {
                            self.asm.xor_mem_base(reg, index, offset);
                        }
                        Tag::Fixed { offset } => self.asm.xor_mem(reg, offset),
                    }
                    self.asm.store(self.layout.exit_ea, reg);
                    self.unspill(!0);
                    self.asm.store_imm32(self.layout.exit_arg, site);
                    self.asm.store_imm32(self.layout.exit_info, info);
                    self.jmp_stub(self.stubs.mem);
                }
                ColdKind::Chain { target } => {
                    self.note();
                    let site = if cold.spilled == 0 {
                        // The hot jump itself is what will be connected.
                        self.asm.patch_rel32(cold.from, here);
                        cold.from
                    } else {
                        self.asm.patch_rel32(cold.from, here);
                        self.unspill(!0);
                        self.asm.align(4, 3);
                        let at = self.asm.jmp();
                        let next = self.asm.pos() as i64;
                        self.asm.patch_rel32(at, next);
                        at
                    };
                    self.asm
                        .store_imm32(self.layout.exit_arg, (self.cache_pos + site as i64) as u32);
                    self.jmp_stub(self.stubs.chain);
                    self.out.chains.push(ChainSite {
                        at: site as u32,
                        target,
                        mode: self.mode_at(cold.resume),
                    });
                }
                ColdKind::Far { target } => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    self.mode = self.mode_at(cold.resume);
                    self.far_save_flags(STATUS);
                    self.far_tail(Some(target), 0);
                }
                ColdKind::Leave { next } => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    self.unspill(!0);
                    self.asm.store_imm64(self.layout.rip, next);
                    self.jmp_stub(self.stubs.lookup);
                }
                ColdKind::LeaveWithRip => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    self.unspill(!0);
                    self.jmp_stub(self.stubs.lookup);
                }
                ColdKind::Step { offset } => {
                    self.asm.patch_rel32(cold.from, here);
                    self.note();
                    self.step_at(offset);
                }
            }
        }
        // Reached when the block has been thrown away.
        self.spilled = 0;
        self.flags = Flags::Host;
        self.resume = Resume::Offset(0);
        self.note();
        self.out.stale_stub = self.asm.pos() as u32;
        self.asm.store_imm64(self.layout.rip, self.pc);
        self.jmp_stub(self.stubs.lookup);
    }

    /// The mode in force at a point of this block: STAC and CLAC change it on the way.
    fn mode_at(&self, resume: Resume) -> Mode {
        let mut mode = self.initial;
        let upto = match resume {
            Resume::Offset(o) | Resume::OffsetInShadow(o) => o,
            Resume::RipInFrame => u16::MAX,
        };
        for insn in &self.insns {
            if insn.offset >= upto {
                break;
            }
            match insn.kind {
                Kind::Stac => mode.0 |= Mode::AC,
                Kind::Clac => mode.0 &= !Mode::AC,
                _ => {}
            }
        }
        mode
    }
}

const PAGE: u32 = 4096;

#[derive(Clone, Copy)]
enum Address {
    Register(u8),
    /// In the first register; the second is free.
    Pair(u8, u8),
    Constant(u64),
}

fn condition_code(condition: iced_x86::ConditionCode) -> u8 {
    use iced_x86::ConditionCode as C;
    match condition {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g | C::None => 15,
    }
}
