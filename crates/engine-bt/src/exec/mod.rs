//! The semantics of single instructions: [`step`] executes exactly one, in any mode, as the processor would.
//!
//! Control flow, the stack, strings, segments and everything privileged are done here in Rust. "Ordinary computation" runs on the host CPU
//! through [`Host::run_native`]; here its memory operand is found and checked. Guest exceptions are delivered before `step` returns.
//!
//! Not offered: virtual-8086 mode, hardware task switches, call gates and task gates (#GP), protection keys, shadow stacks, transactional
//! memory, SGX, VMX and SVM (#UD).
//!
//! Invariants:
//! * An instruction that faults has changed nothing but what the manuals say it may: all checks come before the first change.
//! * Nothing the guest does panics.

mod class;
mod cx;
mod debug;
mod decoded;
mod event;
mod far;
mod flow;
mod host;
pub mod lapic;
mod masked;
mod msr;
mod native;
mod segment;
mod simd;
mod string;
mod syscall;
mod system;
pub mod walk;
mod xsave;

#[cfg(test)]
mod tests;

use std::mem;

use hospes_engine::{Activity, CpuState, Exit, rflags, seg};
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind};

use cx::{Cx, Exec, Flow, canonical, mask, sign_extend};
use decoded::Source;
use xsave::Save;

pub use debug::{DR6_RESET, DR7_RESET, debug_active};
pub use decoded::Decoded;
pub use host::{
    Delivery, Exception, HOLES_MEMORY, Host, Ipi, NativeFault, Operand, Shorthand, Step, TlbFlush,
    Vendor, vector,
};
pub use msr::MSR_HYPERCALL_PAGE;
pub use walk::{Access, PHYS_BITS, PageFault, Translation, walk};

/// Longest instruction in bytes.
const MAX_INSTRUCTION: usize = 15;

/// Executes the instruction at `cpu.rip`.
pub fn step<H: Host>(cpu: &mut CpuState, host: &mut H) -> Step {
    let mut cx = Cx::new(cpu, host);
    match cx.instruction_breakpoint().and_then(|()| cx.fetch()) {
        Ok(i) => cx.run(&i),
        Err(e) => cx.raise(e),
    }
}

/// Executes an instruction that was decoded from `cpu.rip` in the current mode.
pub fn step_decoded<H: Host>(cpu: &mut CpuState, host: &mut H, i: &Instruction) -> Step {
    let mut cx = Cx::new(cpu, host);
    match cx.instruction_breakpoint() {
        Ok(()) => cx.run(i),
        Err(e) => cx.raise(e),
    }
}

/// Fetches and decodes the instruction at `cpu.rip`; nothing changes but accessed bits of page tables.
pub fn fetch<H: Host>(cpu: &mut CpuState, host: &mut H) -> Result<Instruction, Exception> {
    Cx::new(cpu, host).fetch()
}

/// Delivers an exception raised by the instruction at `cpu.rip`, through double fault and shutdown if need be.
pub fn deliver_exception<H: Host>(cpu: &mut CpuState, host: &mut H, e: Exception) -> Step {
    Cx::new(cpu, host).raise(e)
}

/// Delivers the debug exception behind an instruction that was executed elsewhere with TF set.
pub fn deliver_single_step<H: Host>(cpu: &mut CpuState, host: &mut H) -> Step {
    cpu.dr[6] |= debug::DR6_BS;
    deliver_exception(cpu, host, Exception::plain(vector::DB))
}

/// Delivers an external interrupt, or with `is_nmi` (vector 2) an NMI. The caller has seen to IF, shadows and the local APIC.
pub fn deliver_interrupt<H: Host>(
    cpu: &mut CpuState,
    host: &mut H,
    vector: u8,
    is_nmi: bool,
) -> Step {
    Cx::new(cpu, host).interrupt(vector, is_nmi)
}

/// 0F 0D, the prefetch hints: AMD processors refuse the forms with a register, Intel's execute them as NOP.
fn is_0f0d(code: Code) -> bool {
    matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    )
}

impl<'a, H: Host> Cx<'a, H> {
    fn new(cpu: &'a mut CpuState, host: &'a mut H) -> Cx<'a, H> {
        Cx {
            next: cpu.rip,
            cpu,
            host,
            watch_hits: 0,
        }
    }

    fn fetch(&mut self) -> Exec<Instruction> {
        let (rip, bits) = (self.cpu.rip, self.cpu.code_bits());
        let cs = self.cpu.seg[seg::CS];
        let (lin, room) = if bits == 64 {
            if !canonical(rip) {
                return Err(Exception::gp(0));
            }
            (rip, MAX_INSTRUCTION)
        } else {
            let Some(room) = u64::from(cs.limit).checked_sub(rip) else {
                return Err(Exception::gp(0));
            };
            (
                cs.base.wrapping_add(rip) & 0xffff_ffff,
                MAX_INSTRUCTION.min(room as usize + 1),
            )
        };
        let mut bytes = [0; MAX_INSTRUCTION];
        let access = Access::exec(self.user());
        let gpa = self.translate(lin, access)?;
        let first = room.min(4096 - (lin & 0xfff) as usize);
        self.phys_read(gpa, &mut bytes[..first]);
        let options = if self.is_amd() {
            DecoderOptions::AMD
        } else {
            DecoderOptions::NONE
        };
        let decode = |bytes: &[u8]| {
            let mut d = Decoder::with_ip(bits, bytes, rip, options);
            let i = d.decode();
            (i, d.last_error())
        };
        let source = Source { rip, bytes };
        let whole = bits == 64 && first == MAX_INSTRUCTION;
        if whole && let Some(i) = self.host.decoded().and_then(|d| d.get(&source)) {
            return Ok(i);
        }
        let (mut i, mut error) = decode(&bytes[..first]);
        if error == DecoderError::NoMoreBytes && first < room {
            let mut next = lin.wrapping_add(first as u64);
            if bits != 64 {
                next &= 0xffff_ffff;
            } else if !canonical(next) {
                return Err(Exception::gp(0));
            }
            let gpa = self.translate(next, access)?;
            self.phys_read(gpa, &mut bytes[first..room]);
            (i, error) = decode(&bytes[..room]);
        }
        match error {
            DecoderError::None => {
                if whole && let Some(d) = self.host.decoded() {
                    d.add(source, i);
                }
                Ok(i)
            }
            // Too long, or it runs over the end of the code segment.
            DecoderError::NoMoreBytes => Err(Exception::gp(0)),
            // The decoder calls an instruction of more than 15 bytes invalid; with 14 it still asks for more.
            _ if room == MAX_INSTRUCTION
                && decode(&bytes[..MAX_INSTRUCTION - 1]).1 == DecoderError::NoMoreBytes =>
            {
                Err(Exception::gp(0))
            }
            _ => Err(Exception::ud()),
        }
    }

    fn run(&mut self, i: &Instruction) -> Step {
        let stepping = self.flag(rflags::TF);
        let width = (self.cpu.code_bits() / 8) as usize;
        self.next = self.cpu.rip.wrapping_add(i.len() as u64) & mask(width);
        let shadowed = mem::replace(&mut self.cpu.interrupt_shadow, false);
        let flow = match self.execute(i) {
            Ok(flow) => flow,
            Err(e) => return self.raise(e),
        };
        let mut trap = stepping;
        let mut exit = None;
        match flow {
            Flow::Next => self.cpu.rip = self.next,
            Flow::Shadow { traps } => {
                self.cpu.rip = self.next;
                // A load of SS directly behind another has none: else user code could do without interrupts for as long as it likes.
                if !(traps && shadowed) {
                    self.cpu.interrupt_shadow = true;
                    trap &= !traps;
                }
            }
            Flow::Exit(e) => {
                self.cpu.rip = self.next;
                exit = Some(e);
            }
            Flow::Jump | Flow::Return | Flow::Again => {}
            Flow::JumpTfAfter => trap = self.flag(rflags::TF),
            Flow::Interrupt => trap = false,
        }
        if !matches!(flow, Flow::Return | Flow::Again) {
            self.cpu.rflags &= !rflags::RF;
        }
        // Whoever answers a hypercall asks in which mode it was made, and the trap would be taken to the kernel's: it comes behind the next instruction.
        let trap = trap && exit != Some(Exit::Hypercall);
        if trap || self.watch_hits != 0 {
            return self.trap(trap, exit);
        }
        exit.map_or(Step::Continue, Step::Exit)
    }

    /// Delivers the debug trap behind an instruction; a port access still reaches its owner, a HLT ends at once.
    #[cold]
    fn trap(&mut self, stepped: bool, exit: Option<Exit>) -> Step {
        let single = if stepped { debug::DR6_BS } else { 0 };
        self.cpu.activity = Activity::Running;
        let e = self.debug_exception(self.watch_hits | single);
        let delivered = self.raise(e);
        match (delivered, exit) {
            (Step::Exit(_), _) | (_, None | Some(Exit::Halt { .. })) => delivered,
            (Step::Continue, Some(exit)) => Step::Exit(exit),
        }
    }

    fn execute(&mut self, i: &Instruction) -> Exec<Flow> {
        use Mnemonic as M;
        match i.mnemonic() {
            M::Mov => self.mov(i),
            M::Lea => {
                let (_, off) = self.mem_ref(i);
                self.set(i.op0_register(), off);
                Ok(Flow::Next)
            }
            M::Movzx | M::Movsx | M::Movsxd => self.mov_extended(i),
            M::Push => self.push_op(i),
            M::Pop => self.pop_op(i),
            M::Call => self.call(i),
            M::Ret => self.ret(i),
            M::Jmp => self.jmp(i),
            M::Jo
            | M::Jno
            | M::Jb
            | M::Jae
            | M::Je
            | M::Jne
            | M::Jbe
            | M::Ja
            | M::Js
            | M::Jns
            | M::Jp
            | M::Jnp
            | M::Jl
            | M::Jge
            | M::Jle
            | M::Jg => self.jcc(i),
            M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg => self.cmov(i),
            M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg => {
                let v = u64::from(flow::condition(self.cpu, i.condition_code()));
                self.write_op(i, 0, 1, v)?;
                Ok(Flow::Next)
            }
            M::Loop => self.loop_cc(i, None),
            M::Loope => self.loop_cc(i, Some(true)),
            M::Loopne => self.loop_cc(i, Some(false)),
            M::Jcxz | M::Jecxz | M::Jrcxz => self.jrcxz(i),
            M::Retf => self.retf(i),
            M::Iret | M::Iretd | M::Iretq => self.iret(match i.code() {
                Code::Iretw => 2,
                Code::Iretd => 4,
                _ => 8,
            }),
            M::Leave => self.leave(i.code()),
            M::Enter => self.enter(i),
            M::Pusha => self.pusha(2),
            M::Pushad => self.pusha(4),
            M::Popa => self.popa(2),
            M::Popad => self.popa(4),
            M::Pushf | M::Pushfd | M::Pushfq => self.pushf(i.code()),
            M::Popf | M::Popfd | M::Popfq => self.popf(i.code()),
            M::Bound => self.bound(i),
            M::Bt | M::Bts | M::Btr | M::Btc => self.bit_test(i),
            M::Reservednop
                if self.is_amd() && is_0f0d(i.code()) && i.op0_kind() == OpKind::Register =>
            {
                Err(Exception::ud())
            }
            M::Nop
            | M::Pause
            | M::Reservednop
            | M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Cldemote => Ok(Flow::Next),
            _ if string::is_string(i.code()) => self.string(i),
            _ => self.execute_rare(i),
        }
    }

    /// Runs what only reads the XSAVE image.
    fn reading_fpu(&mut self, f: impl FnOnce(&mut Self) -> Exec<Flow>) -> Exec<Flow> {
        self.host.load_fpu(self.cpu);
        f(self)
    }

    /// Runs what changes the XSAVE image.
    fn with_fpu(&mut self, f: impl FnOnce(&mut Self) -> Exec<Flow>) -> Exec<Flow> {
        self.host.load_fpu(self.cpu);
        let flow = f(self);
        self.host.store_fpu(self.cpu);
        flow
    }

    fn execute_rare(&mut self, i: &Instruction) -> Exec<Flow> {
        use Mnemonic as M;
        match i.mnemonic() {
            M::Clc => self.flags_op(rflags::CF, false),
            M::Stc => self.flags_op(rflags::CF, true),
            M::Cld => self.flags_op(rflags::DF, false),
            M::Std => self.flags_op(rflags::DF, true),
            M::Cmc => self.flags_op(rflags::CF, !self.flag(rflags::CF)),
            M::Cli => self.cli(),
            M::Sti => self.sti(),
            M::Stac => self.set_ac(true),
            M::Clac => self.set_ac(false),
            M::Lahf => self.ah_flags(false),
            M::Sahf => self.ah_flags(true),
            M::Xlatb => {
                let (s, off) = self.mem_ref(i);
                let v = self.read_mem(s, off, 1)?;
                self.set(iced_x86::Register::AL, v);
                Ok(Flow::Next)
            }
            M::Aaa | M::Aas | M::Aam | M::Aad | M::Daa | M::Das | M::Salc => self.decimal(i),

            M::Int => self.interrupt_instruction(i.immediate8()),
            M::Int3 => self.interrupt_instruction(vector::BP),
            M::Into if self.flag(rflags::OF) => self.interrupt_instruction(vector::OF),
            M::Into => Ok(Flow::Next),
            M::Int1 => {
                self.debug_interrupt()?;
                Ok(Flow::Interrupt)
            }
            M::Syscall => self.syscall(),
            M::Sysret => self.sysret(false),
            M::Sysretq => self.sysret(true),
            M::Sysenter => self.sysenter(),
            M::Sysexit => self.sysexit(false),
            M::Sysexitq => self.sysexit(true),
            M::Vmcall | M::Vmmcall => Ok(Flow::Exit(Exit::Hypercall)),

            M::Hlt => self.hlt(),
            M::In => self.port_io(i, false),
            M::Out => self.port_io(i, true),
            M::Cpuid => self.cpuid(),
            M::Rdtsc => self.rdtsc(false),
            M::Rdtscp => self.rdtsc(true),
            M::Rdpid => self.rdpid(i),
            M::Rdpmc => Err(Exception::gp(0)),
            M::Rdmsr => self.rdmsr(),
            M::Wrmsr => self.wrmsr(),
            M::Swapgs => self.swapgs(),
            M::Rdfsbase => self.read_base(i, seg::FS),
            M::Rdgsbase => self.read_base(i, seg::GS),
            M::Wrfsbase => self.write_base(i, seg::FS),
            M::Wrgsbase => self.write_base(i, seg::GS),
            M::Invlpg => self.invlpg(i),
            M::Invpcid => self.invpcid(i),
            M::Wbinvd | M::Invd | M::Wbnoinvd => self.cache_control(),
            M::Clflush | M::Clflushopt | M::Clwb => self.flush_line(i),
            M::Serialize => self.serialize(),
            M::Clts => self.clts(),
            M::Lmsw => self.lmsw(i),
            M::Smsw => self.smsw(i),

            M::Lgdt | M::Lidt => self.load_table(i),
            M::Sgdt | M::Sidt => self.store_table(i),
            M::Lldt => self.lldt(i),
            M::Sldt => self.sldt(i),
            M::Ltr => self.ltr(i),
            M::Str => self.str(i),
            M::Lar => self.selector_info(i, false),
            M::Lsl => self.selector_info(i, true),
            M::Verr => self.selector_verify(i, false),
            M::Verw => self.selector_verify(i, true),
            M::Arpl => self.arpl(i),
            M::Lds => self.load_far_pointer(i, seg::DS),
            M::Les => self.load_far_pointer(i, seg::ES),
            M::Lfs => self.load_far_pointer(i, seg::FS),
            M::Lgs => self.load_far_pointer(i, seg::GS),
            M::Lss => self.load_far_pointer(i, seg::SS),

            M::Vzeroupper | M::Vzeroall if self.cpu.code_bits() != 64 => {
                self.with_fpu(|cx| cx.zero_vectors(i))
            }
            M::Xsave | M::Xsave64 => self.reading_fpu(|cx| cx.xsave(i, Save::Plain)),
            M::Xsaveopt | M::Xsaveopt64 => self.reading_fpu(|cx| cx.xsave(i, Save::Optimised)),
            M::Xsavec | M::Xsavec64 => self.reading_fpu(|cx| cx.xsave(i, Save::Compact)),
            M::Xrstor | M::Xrstor64 => self.xrstor(i),
            M::Fxsave | M::Fxsave64 => self.reading_fpu(|cx| cx.fxsave(i)),
            M::Fxrstor | M::Fxrstor64 => self.with_fpu(|cx| cx.fxrstor(i)),
            M::Xgetbv => self.reading_fpu(|cx| cx.xgetbv()),
            M::Xsetbv => self.xsetbv(),

            M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
                self.with_fpu(|cx| cx.masked_move(i))
            }
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {
                self.with_fpu(|cx| cx.masked_store_bytes(i))
            }
            M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq => self.with_fpu(|cx| cx.gather(i)),
            M::Vscatterdps
            | M::Vscatterdpd
            | M::Vscatterqps
            | M::Vscatterqpd
            | M::Vpscatterdd
            | M::Vpscatterdq
            | M::Vpscatterqd
            | M::Vpscatterqq => self.with_fpu(|cx| cx.scatter(i)),
            M::Movdir64b => self.movdir64b(i),
            M::Clzero => self.clzero(i),
            _ => self.native(i),
        }
    }

    fn flags_op(&mut self, f: u64, on: bool) -> Exec<Flow> {
        self.set_flag(f, on);
        Ok(Flow::Next)
    }

    fn interrupt_instruction(&mut self, vector: u8) -> Exec<Flow> {
        self.software_interrupt(vector)?;
        Ok(Flow::Interrupt)
    }

    fn mov(&mut self, i: &Instruction) -> Exec<Flow> {
        for k in 0..2 {
            if i.op_kind(k) == OpKind::Register && !i.op_register(k).is_gpr() {
                return if i.op_register(k).is_segment_register() {
                    self.mov_segment(i)
                } else {
                    self.mov_control(i)
                };
            }
        }
        let v = self.read_op(i, 1)?;
        let size = self.op_size(i, 0);
        self.write_op(i, 0, size, v)?;
        Ok(Flow::Next)
    }

    fn mov_extended(&mut self, i: &Instruction) -> Exec<Flow> {
        let size = self.op_size(i, 1);
        let v = self.read_op(i, 1)?;
        let v = if i.mnemonic() == Mnemonic::Movzx {
            v
        } else {
            sign_extend(v, size)
        };
        self.set(i.op0_register(), v);
        Ok(Flow::Next)
    }

    fn cmov(&mut self, i: &Instruction) -> Exec<Flow> {
        // The source is read, and a 32-bit target's upper half cleared, whether or not the condition holds.
        let source = self.read_op(i, 1)?;
        let target = i.op0_register();
        let v = if flow::condition(self.cpu, i.condition_code()) {
            source
        } else {
            self.get(target)
        };
        self.set(target, v);
        Ok(Flow::Next)
    }
}
