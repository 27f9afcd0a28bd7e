//! Accesses through the kernel window: the place of an address, without a check.

use iced_x86::{Instruction, Register};

use super::group::{Group, OPERAND, Place};
use super::memory::Address;
use super::{Work, bit};
use crate::insn::gpr;
use crate::layout::{KERNEL_TABLE, WINDOW_DISPLACEMENT, window_address};

/// Bytes between the first and the last of a group's accesses. Each of them would fault by itself, so the group need not lie in one page.
pub(super) const WINDOW_SPAN: i64 = 4096;

impl Work<'_> {
    /// Whether an access goes through the kernel window, which needs no check.
    pub(super) fn windowed(&self, i: usize, which: usize) -> bool {
        self.accesses[i][which].is_some_and(|a| a.window) && self.mode.table() == KERNEL_TABLE
    }

    /// The place in the kernel window of an access, and of its group if it begins one. What is not there faults.
    pub(super) fn through_window(
        &mut self,
        i: usize,
        which: usize,
        avoid: u16,
        address: impl FnOnce(&mut Self, Option<u8>, i32) -> Address,
    ) -> Place {
        let planned = self.plan(i, which, avoid);
        let (into, by) = match &planned {
            Some((a, plan)) => (Some(plan.reg), (plan.low - a.at) as i32),
            None => (None, 0),
        };
        if let Some(reg) = into
            && self.spilled & bit(reg) == 0
        {
            self.spill(reg);
        }
        let mask = self.layout.window_mask;
        let instr = self.insns[i].instr;
        let (segment, base, near) = match which {
            OPERAND => (segment(&instr), gpr(instr.memory_base()), near(&instr)),
            _ => {
                let (base, disp) = self.stack_access(&self.insns[i]);
                (None, Some(base), Some(disp))
            }
        };
        let near = near.map(|disp| disp + by);
        let (reg, plus) = match (segment, base, near) {
            (None, Some(base), Some(disp)) => {
                let s = into.unwrap_or_else(|| self.scratch(i, avoid));
                self.asm.pext_mem(s, base, mask);
                (s, disp)
            }
            (None, _, _) => match address(self, into, by) {
                Address::Register(s) | Address::Pair(s, _) => {
                    self.asm.pext_mem(s, s, mask);
                    (s, 0)
                }
                Address::Constant { ea, .. } => {
                    let s = into.unwrap_or_else(|| self.scratch(i, avoid));
                    self.asm.mov_imm(s, window_address(ea));
                    (s, 0)
                }
            },
            (Some(segment), base, near) => {
                let s = into.unwrap_or_else(|| self.scratch(i, avoid));
                self.asm.load(s, self.layout.seg_base[segment]);
                // Nobody has saved the flags, so nothing is added but by LEA, in which RSP can be the base and nothing else.
                if let Some(base) = base {
                    self.asm.lea(true, s, Some(base), Some((s, 1)), 0);
                }
                if let Some(index) = gpr(instr.memory_index()) {
                    let scale = instr.memory_index_scale() as u8;
                    self.asm.lea(true, s, Some(s), Some((index, scale)), 0);
                }
                let disp = near.unwrap_or_else(|| {
                    let far = instr.memory_displacement64() as i32 + by;
                    self.asm.lea(true, s, Some(s), None, far);
                    0
                });
                self.asm.pext_mem(s, s, mask);
                (s, disp)
            }
        };
        let Some((a, plan)) = planned else {
            return Place { reg, disp: plus };
        };
        self.groups.push(Group {
            family: a.family,
            low: plan.low,
            high: plan.high,
            write: plan.write,
            reg,
            plus,
            window: true,
        });
        Place {
            reg,
            disp: (a.at - plan.low) as i32 + plus,
        }
    }
}

/// The segment whose base an operand's address has in it.
fn segment(instr: &Instruction) -> Option<usize> {
    match instr.memory_segment() {
        Register::FS => Some(4),
        Register::GS => Some(5),
        _ => None,
    }
}

/// The displacement of an operand that lies near where its registers point: the place of what these come to leads to it as well. With an index they may come to anything
/// only together.
fn near(instr: &Instruction) -> Option<i32> {
    let disp = instr.memory_displacement64() as i64;
    let near = disp.unsigned_abs() + WINDOW_SPAN as u64 <= WINDOW_DISPLACEMENT;
    let alone = instr.memory_index() == Register::None || segment(instr).is_some();
    (near && alone && !instr.is_ip_rel_memory_operand()).then_some(disp as i32)
}
