//! Blocks whose accesses share base registers, as stack frames and structures do, most of them about a page boundary: next to another page with the same rights,
//! one that is read-only, one that is missing.
//!
//! Base registers move by constants between the accesses, other registers become copies of them, flags live across accesses, and jumps leave in the middle.

use iced_x86::{Code, Instruction, MemoryOperand, Register};

use crate::blocks::{Writer, any_window};
use crate::forms::Level;
use crate::layout::*;
use crate::operands::gpr;
use crate::program::{Flavour, Program, What};
use crate::rng::Rng;
use crate::single::place;

const RSP: u8 = 4;
/// Bases of accesses, a register that becomes a copy of one, an index.
const BASES: [u8; 2] = [3, 5];
const COPY: u8 = 6;
const INDEX: u8 = 7;

/// A random program of groups of accesses.
pub fn generate(flavour: Flavour, level: Level, rng: &mut Rng) -> Option<Program> {
    let base = any_window(flavour, rng);
    generate_at(base, flavour, level, rng)
}

/// The same in a window.
pub fn generate_at(base: u64, flavour: Flavour, level: Level, rng: &mut Rng) -> Option<Program> {
    let mut w = Writer::new(base, flavour, level, CODE, rng);
    let base = w.base;
    for r in BASES {
        let page = base + DATA + w.rng.range(1, 4) * PAGE;
        let page = match w.rng.below(30) {
            0 => base + DATA,
            1 | 2 => base + READ_ONLY,
            3 => base + READ_ONLY + PAGE,
            _ => page,
        };
        w.program.regs.gpr[usize::from(r)] = page.wrapping_add(near(w.rng));
    }
    let stack = match w.rng.below(24) {
        0 => base + STACK,
        1 => base + STACK + 2 * PAGE,
        _ => base + STACK + PAGE,
    };
    w.program.regs.gpr[usize::from(RSP)] = stack.wrapping_add(near(w.rng) & !7);
    w.program.regs.gpr[usize::from(COPY)] = base + DATA + PAGE;
    w.program.regs.gpr[usize::from(INDEX)] = w.rng.below(20);
    let (rounds, counter) = (w.rng.range(1, 4) as u32, w.counter);
    w.emit(Instruction::with2(
        Code::Mov_r32_imm32,
        gpr(counter, 4),
        rounds,
    ));
    let top = w.program.next_id();
    for _ in 0..w.rng.range(4, 24) {
        w.grouped_piece();
    }
    let end = w.program.next_id();
    for item in &mut w.program.items {
        if let What::Branch(_, target) = &mut item.what {
            *target = (*target).min(end);
        }
    }
    w.emit(Instruction::with2(
        Code::Sub_rm32_imm8,
        gpr(counter, 4),
        1u32,
    ));
    let jump = w.pick(Code::Jg_rel32_64, Code::Jg_rel32_32);
    w.program.push(What::Branch(jump, top));
    let Writer {
        mut program, rng, ..
    } = w;
    place(&mut program, rng);
    Some(program)
}

/// A distance from a page boundary, mostly small.
fn near(rng: &mut Rng) -> u64 {
    let by = match rng.below(4) {
        0 => rng.below(2048),
        1 => rng.below(8) * 8,
        _ => rng.below(160),
    };
    if rng.one_in(2) { by } else { by.wrapping_neg() }
}

impl Writer<'_> {
    fn word(&self) -> usize {
        if self.program.flavour == Flavour::User32 {
            4
        } else {
            8
        }
    }

    fn grouped_piece(&mut self) {
        match self.rng.below(20) {
            0 => self.move_base(),
            1 => self.copy_base(),
            2 | 3 => self.stack_run(),
            4 => self.leave_in_the_middle(),
            5 => self.plain(),
            6 => self.push_operand(),
            _ => self.grouped_access(),
        }
    }

    /// An operand at a distance from a base that groups often cover.
    fn grouped_operand(&mut self) -> MemoryOperand {
        let word = self.word();
        let base = match self.rng.below(8) {
            0 => COPY,
            1 | 2 => RSP,
            _ => self.rng.pick(&BASES),
        };
        let span = self.rng.pick(&[32u64, 64, 300]);
        let mut disp = self.rng.below(span) as i64 - span as i64 / 2;
        if !self.rng.one_in(4) {
            disp &= !7;
        }
        let base = gpr(base, word);
        if self.rng.one_in(5) {
            let scale = self.rng.pick(&[1u32, 2, 4, 8]);
            let index = gpr(INDEX, word);
            MemoryOperand::new(base, index, scale, disp, 1, false, Register::None)
        } else {
            MemoryOperand::with_base_displ(base, disp)
        }
    }

    fn grouped_access(&mut self) {
        let m = self.grouped_operand();
        let v = self.rng.pick(&[0u8, 1]);
        let long = self.word() == 8;
        let (narrow, wide) = (gpr(v, 4), gpr(v, self.word()));
        let i = match self.rng.below(16) {
            0 | 1 => Instruction::with2(self.pick(Code::Mov_r64_rm64, Code::Mov_r32_rm32), wide, m),
            2 | 3 => Instruction::with2(self.pick(Code::Mov_rm64_r64, Code::Mov_rm32_r32), m, wide),
            4 => Instruction::with2(Code::Mov_rm32_imm32, m, 0x1234_5678u32),
            5 => Instruction::with2(Code::Adc_r32_rm32, narrow, m),
            6 => Instruction::with2(Code::Adc_rm32_r32, m, narrow),
            7 => Instruction::with2(Code::Cmp_rm32_r32, m, narrow),
            8 => Instruction::with2(Code::Movzx_r32_rm8, narrow, m),
            9 => Instruction::with2(Code::Mov_rm8_r8, m, Register::AH),
            10 => Instruction::with2(Code::Movdqu_xmm_xmmm128, Register::XMM1, m),
            11 => Instruction::with2(Code::Movups_xmmm128_xmm, m, Register::XMM1),
            12 if self.rng.one_in(4) => {
                Instruction::with2(Code::Movaps_xmm_xmmm128, Register::XMM0, m)
            }
            12 => Instruction::with2(Code::VEX_Vmovdqu_ymm_ymmm256, Register::YMM1, m),
            13 => Instruction::with2(Code::Xadd_rm32_r32, m, narrow),
            14 if long => Instruction::with2(Code::Adox_r64_rm64, wide, m),
            14 => Instruction::with2(Code::Sbb_r32_rm32, narrow, m),
            _ => Instruction::with1(Code::Setb_rm8, m),
        };
        self.emit(i);
    }

    fn move_base(&mut self) {
        let r = gpr(self.rng.pick(&BASES), self.word());
        let by = self.rng.below(9) as i32 * 8 - 32;
        let i = match self.rng.below(5) {
            0 if self.word() == 8 => Instruction::with2(Code::Add_rm64_imm8, r, by),
            0 => Instruction::with2(Code::Add_rm32_imm8, r, by),
            1 if self.word() == 8 => Instruction::with2(Code::Sub_rm64_imm8, r, by),
            1 => Instruction::with2(Code::Sub_rm32_imm8, r, by),
            2 => Instruction::with1(self.pick(Code::Inc_rm64, Code::Inc_rm32), r),
            3 => Instruction::with1(self.pick(Code::Dec_rm64, Code::Dec_rm32), r),
            _ => Instruction::with2(
                self.pick(Code::Lea_r64_m, Code::Lea_r32_m),
                r,
                MemoryOperand::with_base_displ(r, by.into()),
            ),
        };
        self.emit(i);
    }

    fn copy_base(&mut self) {
        let word = self.word();
        let from = self.rng.pick(&[BASES[0], BASES[1], RSP]);
        let (to, from) = (gpr(COPY, word), gpr(from, word));
        let i = if self.rng.one_in(2) {
            Instruction::with2(self.pick(Code::Mov_rm64_r64, Code::Mov_rm32_r32), to, from)
        } else {
            let m = MemoryOperand::with_base_displ(from, self.rng.below(9) as i64 * 4 - 16);
            Instruction::with2(self.pick(Code::Lea_r64_m, Code::Lea_r32_m), to, m)
        };
        self.emit(i);
    }

    /// Pushes, perhaps an access between, and as many pops.
    fn stack_run(&mut self) {
        let (push, pop) = (
            self.pick(Code::Push_r64, Code::Push_r32),
            self.pick(Code::Pop_r64, Code::Pop_r32),
        );
        let n = self.rng.range(1, 4);
        for _ in 0..n {
            let r = gpr(self.rng.pick(&[0u8, 1, 3]), self.word());
            self.emit(Instruction::with1(push, r));
        }
        if self.rng.one_in(2) {
            self.grouped_access();
        }
        for _ in 0..n {
            let r = gpr(self.rng.pick(&[0u8, 1]), self.word());
            self.emit(Instruction::with1(pop, r));
        }
    }

    /// A push of a memory operand: two accesses, of one group or two.
    fn push_operand(&mut self) {
        let m = self.grouped_operand();
        let push = self.pick(Code::Push_rm64, Code::Push_rm32);
        self.emit(Instruction::with1(push, m));
        let pop = self.pick(Code::Pop_r64, Code::Pop_r32);
        self.emit(Instruction::with1(pop, gpr(1, self.word())));
    }

    fn leave_in_the_middle(&mut self) {
        let target = self.program.next_id() + 1 + self.rng.range(1, 4) as u32;
        let code = self.rng.pick(&[
            self.pick(Code::Jb_rel32_64, Code::Jb_rel32_32),
            self.pick(Code::Jne_rel32_64, Code::Jne_rel32_32),
            self.pick(Code::Jo_rel32_64, Code::Jo_rel32_32),
        ]);
        self.program.push(What::Branch(code, target));
    }
}
