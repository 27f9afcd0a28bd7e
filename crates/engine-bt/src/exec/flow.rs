//! Near control flow, the stack instructions, and LAHF and SAHF.

use hospes_engine::{CpuState, reg, rflags, seg};
use iced_x86::{Code, ConditionCode, Instruction, OpKind, Register};

use super::cx::{Cx, Exec, Flow, mask, seg_index, set_sized, sign_extend};
use super::host::{Exception, Host, vector};

/// Whether a condition holds on the status flags.
pub(super) fn condition(cpu: &CpuState, cc: ConditionCode) -> bool {
    let f = cpu.rflags;
    let on = |bits: u64| f & bits != 0;
    let less = on(rflags::SF) != on(rflags::OF);
    match cc {
        ConditionCode::None => true,
        ConditionCode::o => on(rflags::OF),
        ConditionCode::no => !on(rflags::OF),
        ConditionCode::b => on(rflags::CF),
        ConditionCode::ae => !on(rflags::CF),
        ConditionCode::e => on(rflags::ZF),
        ConditionCode::ne => !on(rflags::ZF),
        ConditionCode::be => on(rflags::CF | rflags::ZF),
        ConditionCode::a => !on(rflags::CF | rflags::ZF),
        ConditionCode::s => on(rflags::SF),
        ConditionCode::ns => !on(rflags::SF),
        ConditionCode::p => on(rflags::PF),
        ConditionCode::np => !on(rflags::PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || on(rflags::ZF),
        ConditionCode::g => !(less || on(rflags::ZF)),
    }
}

/// Size of the count register of LOOPcc and JrCXZ in bytes.
fn count_size(code: Code) -> usize {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX
        | Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32 => 2,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX
        | Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64 => 8,
        _ => 4,
    }
}

/// Operand size in bytes of an instruction whose forms for 16, 32 and 64 bits are neighbours in that order.
fn size_by_code(code: Code, first: Code) -> usize {
    2 << (code as usize - first as usize)
}

impl<H: Host> Cx<'_, H> {
    /// Checks a near target before anything else changes.
    fn check_near(&self, target: u64) -> Exec<()> {
        self.check_rip(&self.cpu.seg[seg::CS], target)
    }

    fn go(&mut self, target: u64) -> Exec<Flow> {
        self.check_near(target)?;
        self.cpu.rip = target;
        Ok(Flow::Jump)
    }

    /// Jump or branch with the target in the instruction.
    pub fn branch(&mut self, i: &Instruction, taken: bool) -> Exec<Flow> {
        if taken {
            self.go(i.near_branch_target())
        } else {
            Ok(Flow::Next)
        }
    }

    pub fn jcc(&mut self, i: &Instruction) -> Exec<Flow> {
        let taken = condition(self.cpu, i.condition_code());
        self.branch(i, taken)
    }

    pub fn jrcxz(&mut self, i: &Instruction) -> Exec<Flow> {
        let taken = self.cpu.gpr[reg::RCX] & mask(count_size(i.code())) == 0;
        self.branch(i, taken)
    }

    /// LOOP, LOOPE, LOOPNE: `zf` is the flag value that goes on looping, if any matters.
    pub fn loop_cc(&mut self, i: &Instruction, zf: Option<bool>) -> Exec<Flow> {
        let size = count_size(i.code());
        let count = self.cpu.gpr[reg::RCX].wrapping_sub(1) & mask(size);
        let taken = count != 0 && zf.is_none_or(|z| z == self.flag(rflags::ZF));
        if taken {
            self.check_near(i.near_branch_target())?;
        }
        set_sized(&mut self.cpu.gpr[reg::RCX], size, count);
        self.branch(i, taken)
    }

    pub fn jmp(&mut self, i: &Instruction) -> Exec<Flow> {
        match i.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                self.branch(i, true)
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => self.jmp_far(i),
            _ if is_far_indirect(i.code()) => self.jmp_far(i),
            _ => {
                let target = self.read_op(i, 0)?;
                self.go(target)
            }
        }
    }

    pub fn call(&mut self, i: &Instruction) -> Exec<Flow> {
        let (target, size) = match i.op0_kind() {
            OpKind::NearBranch16 => (i.near_branch_target(), 2),
            OpKind::NearBranch32 => (i.near_branch_target(), 4),
            OpKind::NearBranch64 => (i.near_branch_target(), 8),
            OpKind::FarBranch16 | OpKind::FarBranch32 => return self.call_far(i),
            _ if is_far_indirect(i.code()) => return self.call_far(i),
            _ => (self.read_op(i, 0)?, self.op_size(i, 0)),
        };
        self.check_near(target)?;
        let next = self.next;
        self.push(size, next)?;
        self.cpu.rip = target;
        Ok(Flow::Jump)
    }

    pub fn ret(&mut self, i: &Instruction) -> Exec<Flow> {
        let size = match i.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let release = if i.op_count() == 1 {
            u64::from(i.immediate16())
        } else {
            0
        };
        let mut sp = self.sp();
        let target = self.pop_at(&mut sp, size)?;
        self.check_near(target)?;
        self.set_sp(sp.wrapping_add(release));
        self.cpu.rip = target;
        Ok(Flow::Jump)
    }

    pub fn retf(&mut self, i: &Instruction) -> Exec<Flow> {
        let (size, release) = match i.code() {
            Code::Retfw => (2, 0),
            Code::Retfd => (4, 0),
            Code::Retfq => (8, 0),
            Code::Retfw_imm16 => (2, i.immediate16()),
            Code::Retfd_imm16 => (4, i.immediate16()),
            _ => (8, i.immediate16()),
        };
        self.ret_far(size, u64::from(release))
    }

    /// PUSH of a register, memory, immediate or segment register.
    pub fn push_op(&mut self, i: &Instruction) -> Exec<Flow> {
        let size = -i.stack_pointer_increment() as usize;
        let v = match i.op0_kind() {
            OpKind::Register if i.op0_register().is_segment_register() => {
                u64::from(self.cpu.seg[seg_index(i.op0_register())].selector)
            }
            _ => self.read_op(i, 0)?,
        };
        let selector = i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register();
        if selector && size == 4 && !self.is_amd() {
            // Intel's current processors leave the upper half of a 32-bit slot as it was.
            let sp = self.sp().wrapping_sub(4) & mask(self.stack_size());
            self.linear(seg::SS, sp, 4, true)?;
            self.write_mem(seg::SS, sp, 2, v)?;
            self.set_sp(sp);
        } else {
            self.push(size, v)?;
        }
        Ok(Flow::Next)
    }

    pub fn pop_op(&mut self, i: &Instruction) -> Exec<Flow> {
        let size = i.stack_pointer_increment() as usize;
        let old = self.cpu.gpr[reg::RSP];
        let mut sp = self.sp();
        if i.op0_kind() == OpKind::Register {
            let r = i.op0_register();
            if r.is_segment_register() {
                let v = self.read_mem(seg::SS, sp, 2)?;
                sp = sp.wrapping_add(size as u64);
                let s = seg_index(r);
                // The stack's width is that of the old SS.
                let width = self.stack_size();
                self.load_segment(s, v as u16)?;
                set_sized(&mut self.cpu.gpr[reg::RSP], width, sp);
                return Ok(if s == seg::SS {
                    Flow::Shadow { traps: true }
                } else {
                    Flow::Next
                });
            }
            let v = self.pop(size)?;
            self.set(r, v);
            return Ok(Flow::Next);
        }
        let v = self.pop_at(&mut sp, size)?;
        // A destination addressed by RSP uses the value after the pop.
        self.set_sp(sp);
        let written = self.write_op(i, 0, size, v);
        if written.is_err() {
            self.cpu.gpr[reg::RSP] = old;
        }
        written?;
        Ok(Flow::Next)
    }

    pub fn pusha(&mut self, size: usize) -> Exec<Flow> {
        let mut sp = self.sp();
        for r in reg::RAX..=reg::RDI {
            let v = self.cpu.gpr[r];
            self.push_at(&mut sp, size, v)?;
        }
        self.set_sp(sp);
        Ok(Flow::Next)
    }

    pub fn popa(&mut self, size: usize) -> Exec<Flow> {
        let mut sp = self.sp();
        let mut values = [0; 8];
        for v in values.iter_mut().rev() {
            *v = self.pop_at(&mut sp, size)?;
        }
        for (r, v) in values.into_iter().enumerate() {
            if r != reg::RSP {
                set_sized(&mut self.cpu.gpr[r], size, v);
            }
        }
        self.set_sp(sp);
        Ok(Flow::Next)
    }

    pub fn pushf(&mut self, code: Code) -> Exec<Flow> {
        let image = self.cpu.rflags & !(rflags::VM | rflags::RF);
        self.push(size_by_code(code, Code::Pushfw), image)?;
        Ok(Flow::Next)
    }

    pub fn popf(&mut self, code: Code) -> Exec<Flow> {
        let size = size_by_code(code, Code::Popfw);
        let image = self.pop(size)?;
        self.load_flags(image, size, false);
        Ok(Flow::Next)
    }

    pub fn enter(&mut self, i: &Instruction) -> Exec<Flow> {
        let size = size_by_code(i.code(), Code::Enterw_imm16_imm8);
        let frame = u64::from(i.immediate16());
        let level = u32::from(i.immediate8_2nd()) & 31;
        let width = self.stack_size();
        let mut sp = self.sp();
        let mut bp = self.cpu.gpr[reg::RBP];
        self.push_at(&mut sp, size, bp)?;
        let frame_pointer = sp;
        for _ in 1..level {
            bp = bp.wrapping_sub(size as u64);
            let v = self.read_mem(seg::SS, bp & mask(width), size)?;
            self.push_at(&mut sp, size, v)?;
        }
        if level > 0 {
            self.push_at(&mut sp, size, frame_pointer)?;
        }
        let sp = sp.wrapping_sub(frame) & mask(width);
        // The last byte of the new frame must be writable.
        let lin = self.linear(seg::SS, sp, 1, true)?;
        let access = self.access(true);
        self.translate(lin, access)?;
        set_sized(&mut self.cpu.gpr[reg::RBP], size, frame_pointer);
        self.set_sp(sp);
        Ok(Flow::Next)
    }

    pub fn leave(&mut self, code: Code) -> Exec<Flow> {
        let size = size_by_code(code, Code::Leavew);
        let mut sp = self.cpu.gpr[reg::RBP] & mask(self.stack_size());
        let v = self.pop_at(&mut sp, size)?;
        self.set_sp(sp);
        set_sized(&mut self.cpu.gpr[reg::RBP], size, v);
        Ok(Flow::Next)
    }

    /// LAHF and SAHF.
    pub fn ah_flags(&mut self, store: bool) -> Exec<Flow> {
        const BITS: u64 = rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF;
        if store {
            let ah = self.get(Register::AH);
            self.cpu.rflags = self.cpu.rflags & !BITS | ah & BITS;
        } else {
            let v = self.cpu.rflags & BITS | rflags::FIXED;
            self.set(Register::AH, v);
        }
        Ok(Flow::Next)
    }

    pub fn bound(&mut self, i: &Instruction) -> Exec<Flow> {
        let size = self.op_size(i, 0);
        let (s, off) = self.mem_ref(i);
        let second = off.wrapping_add(size as u64) & mask(self.address_size(i));
        let low = self.read_mem(s, off, size)?;
        let high = self.read_mem(s, second, size)?;
        let signed = |v| sign_extend(v, size) as i64;
        let index = signed(self.get(i.op0_register()));
        if index < signed(low) || index > signed(high) {
            return Err(Exception::plain(vector::BR));
        }
        Ok(Flow::Next)
    }
}

/// JMP and CALL through a far pointer in memory.
fn is_far_indirect(code: Code) -> bool {
    matches!(
        code,
        Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    )
}
