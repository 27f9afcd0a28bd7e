//! What the translator must know of one guest instruction.

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};

use crate::class::{Class, class_of};
use crate::layout::Mode;

/// How an instruction is carried over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Copied as it is; touches no memory.
    Copy,
    /// One memory operand, which is redirected.
    Mem,
    /// LEA: address arithmetic only.
    Lea,
    /// Does nothing that a guest could see.
    Nop,
    Push,
    Pop,
    Leave,
    /// Direct near jump, call, conditional jump; the target's virtual address.
    Jmp(u64),
    Call(u64),
    Jcc(u64),
    /// Near jump or call through a register or memory.
    JmpIndirect,
    CallIndirect,
    Ret,
    Stac,
    Clac,
    Cli,
    Sti,
    /// Reads of the FS or GS base by RDFSBASE or RDGSBASE.
    ReadSegBase,
    /// MOV from CR2 or CR3.
    ReadControl,
    /// MOV from a segment register to a general one.
    ReadSelector,
    /// MOV from a segment register to memory.
    StoreSelector,
    /// BT, BTS, BTR or BTC of a bit string in memory: the bit number in a register also moves the address.
    BitString,
    /// WRFSBASE or WRGSBASE of 64 bits.
    WriteSegBase,
    /// JRCXZ or JECXZ; the target's virtual address.
    Jrcxz(u64),
    /// MOVS or STOS with 64-bit addresses, perhaps repeated.
    String,
    Cld,
    /// The guest waits for another vCPU, actively.
    Pause,
    Rdtscp,
    Pushf,
    Popf,
    Swapgs,
    Syscall,
    Sysret,
    /// IRET of 64 bits, of kernel code.
    Iret,
    /// Executed one at a time by the engine.
    Step,
}

/// The memory operand of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemAccess {
    /// Bytes.
    pub size: u32,
    /// The access writes, or checks for writing.
    pub write: bool,
    /// A mask register chooses the elements that are accessed.
    pub masked: bool,
}

/// A decoded instruction with what it reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Insn {
    pub instr: Instruction,
    pub kind: Kind,
    /// Offset from the block's first byte.
    pub offset: u16,
    pub len: u8,
    /// General registers read (or written only in part), as a bit mask.
    pub reads: u16,
    /// General registers written in full, without regard to their old value.
    pub writes: u16,
    /// General registers that may change at all.
    pub changes: u16,
    pub mem: Option<MemAccess>,
    /// Status flags read; `RflagsBits`.
    pub flags_read: u32,
    /// Status flags given a new value whatever they were.
    pub flags_killed: u32,
    /// Status flags that may change at all.
    pub flags_modified: u32,
    /// Uses AH, BH, CH or DH, which rules out registers that need a REX prefix.
    pub high_byte: bool,
}

/// The six arithmetic flags as iced names them.
pub const STATUS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

fn gpr_mask(register: Register) -> u16 {
    let full = register.full_register();
    if full.is_gpr64() {
        1 << full.number()
    } else {
        0
    }
}

/// Number of a general register operand, whatever its width; high-byte registers count as the register they are part of.
pub fn gpr(register: Register) -> Option<u8> {
    let full = register.full_register();
    full.is_gpr64().then(|| full.number() as u8)
}

/// Whether the flags that are undefined after an instruction do not depend on those before it. After others (multiplications, bit tests, counts of
/// zeros) some processors keep them.
fn forgets_old_flags(instr: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instr.mnemonic(),
        M::And
            | M::Or
            | M::Xor
            | M::Test
            | M::Andn
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Shld
            | M::Shrd
            | M::Bsf
            | M::Bsr
            | M::Blsr
            | M::Blsi
            | M::Blsmsk
            | M::Bzhi
            | M::Bextr
    )
}

/// Whether a PUSH or CALL reads, below the stack pointer, some of what it overwrites: half done it could not be done again. An operand that lies there by way of another
/// register does not show.
fn overwrites_itself(instr: &Instruction, stack: usize) -> bool {
    let word = stack as i64;
    let disp = instr.memory_displacement64() as i64;
    let disp = if stack == 4 {
        i64::from(disp as i32)
    } else {
        disp
    };
    let same = instr.mnemonic() == Mnemonic::Push && disp == -word;
    instr.op0_kind() == OpKind::Memory
        && gpr(instr.memory_base()) == Some(4)
        && instr.memory_index() == Register::None
        && (1 - 2 * word..0).contains(&disp)
        && !same
}

fn count_is_zero_or_unknown(instr: &Instruction) -> bool {
    use Mnemonic as M;
    let operand = match instr.mnemonic() {
        M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Rcl | M::Rcr => 1,
        M::Shld | M::Shrd => 2,
        _ => return false,
    };
    match instr.op_kind(operand) {
        OpKind::Immediate8 => {
            let mask = if instr.op0_kind() == OpKind::Register && instr.op0_register().size() == 8
                || instr.memory_size().size() == 8
            {
                63
            } else {
                31
            };
            instr.immediate8() & mask == 0
        }
        _ => true,
    }
}

impl Insn {
    /// Classifies a decoded instruction for translation in `mode`.
    pub fn new(
        instr: Instruction,
        offset: u16,
        mode: Mode,
        factory: &mut InstructionInfoFactory,
    ) -> Insn {
        let mut insn = Insn::without_registers(instr, offset, mode);
        if matches!(insn.kind, Kind::Step | Kind::Iret | Kind::Nop) {
            return insn;
        }
        let info = factory.info_options(&instr, InstructionInfoOptions::NO_MEMORY_USAGE);
        for used in info.used_registers() {
            let r = used.register();
            let mask = gpr_mask(r);
            if mask == 0 {
                continue;
            }
            if matches!(r, Register::AH | Register::BH | Register::CH | Register::DH) {
                insn.high_byte = true;
            }
            if !matches!(
                used.access(),
                OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            ) {
                insn.changes |= mask;
            }
            if used.access() == OpAccess::Write && r.size() >= 4 {
                insn.writes |= mask;
            } else {
                insn.reads |= mask;
            }
        }
        insn.writes &= !insn.reads;
        if let Some(mem) = &mut insn.mem {
            mem.write = (0..instr.op_count())
                .filter(|&i| instr.op_kind(i) == OpKind::Memory)
                .any(|i| !matches!(info.op_access(i), OpAccess::Read | OpAccess::CondRead));
        }
        insn
    }

    /// The same without what depends on how each operand is used: the registers, and whether memory is written. Enough to look ahead.
    pub fn without_registers(instr: Instruction, offset: u16, mode: Mode) -> Insn {
        let mut insn = Insn {
            instr,
            kind: Kind::Step,
            offset,
            len: instr.len() as u8,
            reads: 0,
            writes: 0,
            changes: 0,
            mem: None,
            flags_read: 0,
            flags_killed: 0,
            flags_modified: 0,
            high_byte: false,
        };
        insn.kind = insn.decide(mode);
        let memory = insn.has_memory_operand();
        let size = instr.memory_size().size() as u32;
        if insn.kind == Kind::Mem && (size == 0 || size > 64) {
            insn.kind = Kind::Step;
        }
        match insn.kind {
            // Where it faults it shows them.
            Kind::Step | Kind::Iret => {
                insn.flags_read = STATUS;
                return insn;
            }
            Kind::Nop => return insn,
            _ => {}
        }
        insn.mem = memory.then_some(MemAccess {
            size,
            write: false,
            masked: instr.op_mask() != Register::None,
        });
        insn.flags_read = instr.rflags_read() & STATUS;
        insn.flags_modified = instr.rflags_modified() & STATUS;
        let mut changed = instr.rflags_written() | instr.rflags_cleared() | instr.rflags_set();
        if forgets_old_flags(&instr) {
            changed |= instr.rflags_undefined();
        }
        insn.flags_killed = changed & STATUS;
        if count_is_zero_or_unknown(&instr) {
            insn.flags_killed = 0;
        }
        insn
    }

    /// Whether one of the explicit operands is memory.
    pub fn has_memory_operand(&self) -> bool {
        (0..self.instr.op_count()).any(|i| self.instr.op_kind(i) == OpKind::Memory)
    }

    fn decide(&self, mode: Mode) -> Kind {
        use Mnemonic as M;
        let i = &self.instr;
        let long = mode.has(Mode::LONG);
        let stack = if long { 8 } else { 4 };
        if i.is_invalid()
            || self.has_memory_operand() && i.memory_displ_size() == 2
            || i.memory_base().size() == 2
            || i.memory_index().size() == 2
        {
            return Kind::Step;
        }
        let segment_refuses = match i.memory_segment() {
            _ if long => false,
            Register::CS => true,
            Register::FS => !mode.has(Mode::FS_DATA),
            Register::GS => !mode.has(Mode::GS_DATA),
            _ => false,
        };
        match i.mnemonic() {
            M::Lea => return Kind::Lea,
            _ if segment_refuses && self.has_memory_operand() => return Kind::Step,
            M::Bt | M::Bts | M::Btr | M::Btc
                if long
                    && i.op0_kind() == OpKind::Memory
                    && i.op1_kind() == OpKind::Register
                    && i.op1_register().size() >= 4
                    && wide_address(i) =>
            {
                return Kind::BitString;
            }
            // The bit number in a register reaches memory far away from the operand's own address.
            M::Bt | M::Bts | M::Btr | M::Btc
                if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register =>
            {
                return Kind::Step;
            }
            // Re-encoded for the host they would clear registers that 32-bit code does not have.
            M::Vzeroupper | M::Vzeroall if !long => return Kind::Step,
            M::Stac if !mode.has(Mode::USER) => return Kind::Stac,
            M::Clac if !mode.has(Mode::USER) => return Kind::Clac,
            M::Cli if !mode.has(Mode::USER) => return Kind::Cli,
            M::Sti if !mode.has(Mode::USER) => return Kind::Sti,
            M::Rdtsc if mode.has(Mode::TSC) => return Kind::Copy,
            M::Cld => return Kind::Cld,
            M::Pause => return Kind::Pause,
            M::Rdtscp if mode.has(Mode::TSC) => return Kind::Rdtscp,
            M::Pushfq if long => return Kind::Pushf,
            // With AC set it may clear it, which changes the mode.
            M::Popfq if long && !mode.has(Mode::USER) && !mode.has(Mode::AC) => return Kind::Popf,
            M::Swapgs if long && !mode.has(Mode::USER) => return Kind::Swapgs,
            M::Syscall if long && mode.has(Mode::SYSCALL) && mode.has(Mode::USER) => {
                return Kind::Syscall;
            }
            M::Sysretq if long && mode.has(Mode::SYSCALL) && !mode.has(Mode::USER) => {
                return Kind::Sysret;
            }
            M::Iretq if long && !mode.has(Mode::USER) && !mode.has(Mode::AC) => return Kind::Iret,
            M::Mov
                if i.op1_kind() == OpKind::Register
                    && i.op1_register().is_segment_register()
                    && i.op0_kind() == OpKind::Memory =>
            {
                return Kind::StoreSelector;
            }
            M::Wrfsbase | M::Wrgsbase
                if long && mode.has(Mode::FSGSBASE) && i.op0_register().is_gpr64() =>
            {
                return Kind::WriteSegBase;
            }
            M::Jrcxz | M::Jecxz if long => return Kind::Jrcxz(i.near_branch_target()),
            M::Mov
                if i.op1_kind() == OpKind::Register
                    && i.op1_register().is_segment_register()
                    && i.op0_kind() == OpKind::Register =>
            {
                return Kind::ReadSelector;
            }
            M::Mov
                if long
                    && !mode.has(Mode::USER)
                    && matches!(i.op1_register(), Register::CR2 | Register::CR3) =>
            {
                return Kind::ReadControl;
            }
            M::Movsb
            | M::Movsw
            | M::Movsd
            | M::Movsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
                if long && plain_string(i) =>
            {
                return Kind::String;
            }
            M::Rdfsbase | M::Rdgsbase if long && mode.has(Mode::FSGSBASE) => {
                return Kind::ReadSegBase;
            }
            M::Push => {
                let plain = match i.op0_kind() {
                    OpKind::Register => {
                        i.op0_register().is_gpr() && i.op0_register().size() == stack
                    }
                    OpKind::Memory => {
                        i.memory_size().size() == stack && !overwrites_itself(i, stack)
                    }
                    OpKind::Immediate8to64 | OpKind::Immediate32to64 => long,
                    OpKind::Immediate8to32 | OpKind::Immediate32 => !long,
                    _ => false,
                };
                return if plain { Kind::Push } else { Kind::Step };
            }
            M::Pop => {
                let plain = i.op0_kind() == OpKind::Register
                    && i.op0_register().is_gpr()
                    && i.op0_register().size() == stack
                    && (long || gpr(i.op0_register()) != Some(4));
                return if plain { Kind::Pop } else { Kind::Step };
            }
            M::Leave => {
                return if i.code() == Code::Leaveq && long || i.code() == Code::Leaved && !long {
                    Kind::Leave
                } else {
                    Kind::Step
                };
            }
            _ => {}
        }
        match i.flow_control() {
            FlowControl::Next => {}
            FlowControl::UnconditionalBranch if i.op0_kind() == near(long) => {
                return Kind::Jmp(i.near_branch_target());
            }
            FlowControl::ConditionalBranch
                if i.op0_kind() == near(long) && i.is_jcc_short_or_near() =>
            {
                return Kind::Jcc(i.near_branch_target());
            }
            FlowControl::Call if i.op0_kind() == near(long) => {
                return Kind::Call(i.near_branch_target());
            }
            FlowControl::IndirectCall if overwrites_itself(i, stack) => return Kind::Step,
            FlowControl::IndirectBranch | FlowControl::IndirectCall
                if matches!(
                    (i.code(), long),
                    (Code::Jmp_rm64 | Code::Call_rm64, true)
                        | (Code::Jmp_rm32 | Code::Call_rm32, false)
                ) =>
            {
                return if i.flow_control() == FlowControl::IndirectBranch {
                    Kind::JmpIndirect
                } else {
                    Kind::CallIndirect
                };
            }
            FlowControl::Return
                if matches!(
                    (i.code(), long),
                    (Code::Retnq | Code::Retnq_imm16, true)
                        | (Code::Retnd | Code::Retnd_imm16, false)
                ) =>
            {
                return Kind::Ret;
            }
            _ => return Kind::Step,
        }
        let allowed = match class_of(i.code()) {
            Class::Nop => return Kind::Nop,
            Class::Plain => true,
            Class::Fpu => mode.has(Mode::FPU),
            Class::Avx => mode.has(Mode::AVX),
            Class::Avx512 => mode.has(Mode::AVX512),
            _ => false,
        };
        if !allowed {
            Kind::Step
        } else if self.has_memory_operand() {
            Kind::Mem
        } else if (0..i.op_count()).any(|n| {
            matches!(
                i.op_kind(n),
                OpKind::MemorySegSI
                    | OpKind::MemorySegESI
                    | OpKind::MemorySegRSI
                    | OpKind::MemorySegDI
                    | OpKind::MemorySegEDI
                    | OpKind::MemorySegRDI
                    | OpKind::MemoryESDI
                    | OpKind::MemoryESEDI
                    | OpKind::MemoryESRDI
            )
        }) {
            Kind::Step
        } else {
            Kind::Copy
        }
    }
}

/// Whether the memory operand's address is computed in 64 bits.
fn wide_address(i: &Instruction) -> bool {
    match (i.memory_base(), i.memory_index()) {
        (Register::None, Register::None) => i.memory_displ_size() == 8,
        (Register::None, index) => index.size() == 8,
        (base, _) => base.size() == 8,
    }
}

/// A string instruction on RSI and RDI without a segment override that has a base.
fn plain_string(i: &Instruction) -> bool {
    let source =
        |k| k == OpKind::MemorySegRSI && !matches!(i.memory_segment(), Register::FS | Register::GS);
    i.op0_kind() == OpKind::MemoryESRDI
        && (i.op1_kind() == OpKind::Register || source(i.op1_kind()))
        && !i.has_repne_prefix()
}

fn near(long: bool) -> OpKind {
    if long {
        OpKind::NearBranch64
    } else {
        OpKind::NearBranch32
    }
}
