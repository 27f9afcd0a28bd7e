//! Random programs of some dozens of instructions: arithmetic, memory, jumps, bounded loops, calls, the stack, string instructions.
//!
//! Three registers point into the data pages and one counts loops; nothing else writes them, so most programs run to their end. Where one does not, the
//! fault is compared.

use std::sync::LazyLock;

use iced_x86::{
    Code, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpAccess, OpKind, Register,
};

use crate::forms::{self, Level};
use crate::layout::*;
use crate::operands::{Builder, Rules, Target, gpr};
use crate::program::{Flavour, Program, What};
use crate::rng::Rng;
use crate::single::place;
use crate::state::Regs;

const RCX: u8 = 1;
const RSP: u8 = 4;

struct Pool {
    common: Vec<Code>,
    rare: Vec<Code>,
    /// Of x86-64-v4.
    wide: Vec<Code>,
}

fn pool(bits: u32) -> &'static Pool {
    static POOLS: LazyLock<[Pool; 2]> = LazyLock::new(|| [make(32), make(64)]);
    fn make(bits: u32) -> Pool {
        let (common, rare) = forms::anywhere(bits, Level::V3)
            .into_iter()
            .filter(|c| !(c.op_code().is_privileged()))
            .partition(|c| forms::is_common(*c));
        let wide = forms::anywhere(bits, Level::V4);
        Pool { common, rare, wide }
    }
    &POOLS[usize::from(bits == 64)]
}

/// A conditional jump's form for another condition: the forms for three operand sizes stand side by side.
fn nth_condition(overflow: Code, condition: usize) -> Code {
    Code::values()
        .nth(overflow as usize + 3 * condition)
        .unwrap_or(overflow)
}

/// Generates one program piece by piece.
pub struct Writer<'a> {
    pub rng: &'a mut Rng,
    pub program: Program,
    pub base: u64,
    level: Level,
    factory: InstructionInfoFactory,
    /// Registers that ordinary instructions must not write.
    reserved: u16,
    pointers: [u8; 2],
    /// Counts the rounds of loops.
    pub counter: u8,
    /// Numbers of the first items of the functions.
    functions: Vec<u32>,
}

/// One of the windows that code of this kind can lie in.
pub fn any_window(flavour: Flavour, rng: &mut Rng) -> u64 {
    if flavour == Flavour::User32 || rng.one_in(2) {
        LOW
    } else {
        HIGH
    }
}

/// A random program with functions, loops and jumps.
pub fn generate(flavour: Flavour, level: Level, rng: &mut Rng) -> Option<Program> {
    let base = any_window(flavour, rng);
    generate_at(base, flavour, level, rng)
}

/// The same in a window.
pub fn generate_at(base: u64, flavour: Flavour, level: Level, rng: &mut Rng) -> Option<Program> {
    let mut w = Writer::new(base, flavour, level, CODE, rng);
    let start = w.program.push(What::Branch(w.jump(), 0));
    for _ in 0..w.rng.below(3) {
        w.function();
    }
    let main = w.program.next_id();
    w.program.items[start as usize].what = What::Branch(w.jump(), main);
    let n = w.rng.range(3, 30);
    w.body(n, 2);
    let Writer {
        mut program, rng, ..
    } = w;
    place(&mut program, rng);
    Some(program)
}

impl<'a> Writer<'a> {
    /// Begins a program in one of the code regions of a window.
    pub fn new(
        base: u64,
        flavour: Flavour,
        level: Level,
        region: u64,
        rng: &'a mut Rng,
    ) -> Writer<'a> {
        let mut regs = Regs::random(level, rng);
        let long = flavour != Flavour::User32;
        let (pointers, counter) = if long { ([3, 12], 15) } else { ([3, 5], 2) };
        for p in pointers {
            regs.gpr[usize::from(p)] = base + DATA + 3200 + rng.below(150) * 64;
        }
        if rng.one_in(12) {
            let bad = base + rng.pick(&[READ_ONLY, READ_ONLY + PAGE, DATA, CODE]);
            regs.gpr[usize::from(pointers[0])] = bad + rng.below(4000);
        }
        regs.gpr[usize::from(RSP)] = base + STACK + PAGE + rng.below(128) * 8 - 512;
        regs.gpr[usize::from(counter)] = rng.below(5);
        regs.rflags &= !(1 << 10);
        let reserved = [RSP, counter, pointers[0], pointers[1]]
            .iter()
            .fold(0, |m, r| m | 1 << r);
        Writer {
            program: Program::new(flavour, base + region, regs),
            rng,
            base,
            level,
            factory: InstructionInfoFactory::new(),
            reserved,
            pointers,
            counter,
            functions: Vec::new(),
        }
    }

    fn long(&self) -> bool {
        self.program.flavour.bits() == 64
    }

    fn size(&self) -> usize {
        if self.long() { 8 } else { 4 }
    }

    pub fn pick(&self, long: Code, short: Code) -> Code {
        if self.long() { long } else { short }
    }

    fn jump(&self) -> Code {
        self.pick(Code::Jmp_rel32_64, Code::Jmp_rel32_32)
    }

    pub fn emit(&mut self, i: Result<Instruction, iced_x86::IcedError>) -> u32 {
        self.program.instruction(i.expect("operands that fit"))
    }

    /// Several pieces, with forward jumps that stay among them.
    pub fn body(&mut self, pieces: u64, depth: u32) {
        let first = self.program.items.len();
        for _ in 0..pieces {
            self.piece(depth);
        }
        let end = self.program.next_id();
        for item in &mut self.program.items[first..] {
            if let What::Branch(_, target) | What::AddressOf(_, target, 0) = &mut item.what {
                *target = (*target).min(end);
            }
        }
    }

    fn piece(&mut self, depth: u32) {
        match self.rng.below(24) {
            0..=2 => self.forward_jump(),
            3 if depth > 0 => self.bounded_loop(depth),
            4 if depth > 0 && !self.functions.is_empty() => self.call(),
            5 => self.stack(),
            6 => self.string(),
            7 => self.indirect_jump(),
            8 => self.load_pointer(),
            _ => self.plain(),
        }
    }

    /// An instruction of any form.
    pub fn plain(&mut self) {
        let pool = pool(self.program.flavour.bits());
        for _ in 0..30 {
            let code = if self.level == Level::V4 && self.rng.one_in(2) {
                self.rng.pick(&pool.wide)
            } else if self.rng.one_in(4) {
                self.rng.pick(&pool.rare)
            } else {
                self.rng.pick(&pool.common)
            };
            let built = Builder {
                rng: &mut *self.rng,
                regs: &mut self.program.regs,
                flavour: self.program.flavour,
                base: self.base,
                rules: Rules {
                    pointers: self.pointers.iter().fold(0, |m, r| m | 1 << r),
                    target: Some(Target::Good),
                },
            }
            .build(code);
            if let Some(i) = built
                && self.acceptable(&i)
            {
                self.program.instruction(i);
                return;
            }
        }
    }

    fn acceptable(&mut self, i: &Instruction) -> bool {
        use Mnemonic as M;
        let odd = match i.mnemonic() {
            M::Div | M::Idiv => 8,
            M::Bt | M::Bts | M::Btr | M::Btc
                if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register =>
            {
                20
            }
            M::Pushf | M::Pushfd | M::Pushfq | M::Push | M::Pop | M::Leave => return false,
            M::Std => return false,
            _ => 1,
        };
        if !self.rng.one_in(odd) {
            return false;
        }
        let reserved = self.reserved;
        !self.factory.info(i).used_registers().iter().any(|u| {
            let r = u.register().full_register();
            r.is_gpr64()
                && reserved >> r.number() & 1 != 0
                && !matches!(u.access(), OpAccess::Read | OpAccess::CondRead)
        })
    }

    fn forward_jump(&mut self) {
        let condition = self.rng.below(16) as usize;
        let n = self.rng.range(1, 6) as u32;
        let target = self.program.next_id() + 1 + n;
        let near = self.pick(Code::Jo_rel32_64, Code::Jo_rel32_32);
        let code = match self.rng.below(8) {
            0 => self.jump(),
            1 => self.pick(Code::Jrcxz_rel8_64, Code::Jecxz_rel8_32),
            2 if self.long() => Code::Jecxz_rel8_64,
            3 | 4 => {
                let short = self.pick(Code::Jo_rel8_64, Code::Jo_rel8_32);
                nth_condition(short, condition)
            }
            _ => nth_condition(near, condition),
        };
        self.program.push(What::Branch(code, target));
    }

    fn bounded_loop(&mut self, depth: u32) {
        let before = self.reserved;
        let first = self.program.items.len();
        let n = self.rng.below(6) as u32;
        let by_loop = self.reserved >> RCX & 1 == 0 && self.rng.one_in(3);
        let counter = if by_loop { RCX } else { self.counter };
        self.emit(Instruction::with2(
            Code::Mov_r32_imm32,
            gpr(counter, 4),
            if by_loop { n + 1 } else { n },
        ));
        self.reserved |= 1 << counter;
        let top = self.program.next_id();
        let pieces = self.rng.range(1, 6);
        self.body(pieces, if by_loop { depth - 1 } else { 0 });
        if by_loop {
            let code = match self.rng.below(3) {
                0 => self.pick(Code::Loope_rel8_64_RCX, Code::Loope_rel8_32_ECX),
                1 => self.pick(Code::Loopne_rel8_64_RCX, Code::Loopne_rel8_32_ECX),
                _ => self.pick(Code::Loop_rel8_64_RCX, Code::Loop_rel8_32_ECX),
            };
            self.program.push(What::Branch(code, top));
        } else {
            self.emit(Instruction::with2(
                Code::Sub_rm32_imm8,
                gpr(counter, 4),
                1u32,
            ));
            let jump = self.pick(Code::Jg_rel32_64, Code::Jg_rel32_32);
            self.program.push(What::Branch(jump, top));
        }
        self.reserved = before;
        // A jump from before into the middle would find any count.
        let begin = self.program.items[first].id;
        for item in &mut self.program.items[..first] {
            if let What::Branch(_, target) | What::AddressOf(_, target, 0) = &mut item.what
                && *target > begin
            {
                *target = begin;
            }
        }
    }

    fn function(&mut self) {
        let id = self.program.next_id();
        let n = self.rng.range(1, 6);
        let frame = self.rng.one_in(3) && self.reserved >> 5 & 1 == 0;
        let size = self.size();
        if frame {
            self.emit(Instruction::with1(
                self.pick(Code::Push_r64, Code::Push_r32),
                gpr(5, size),
            ));
            self.emit(Instruction::with2(
                self.pick(Code::Mov_rm64_r64, Code::Mov_rm32_r32),
                gpr(5, size),
                gpr(RSP, size),
            ));
            self.reserved |= 1 << 5;
        }
        // No jump may leave the function, no call leads to itself, and RCX may count the caller's loop.
        let before = self.reserved;
        self.reserved |= 1 << RCX;
        self.body(n, 0);
        self.reserved = before;
        if frame {
            self.reserved &= !(1 << 5);
            let leave = self.pick(Code::Leaveq, Code::Leaved);
            self.program.instruction(Instruction::with(leave));
        }
        let ret = self.pick(Code::Retnq, Code::Retnd);
        self.program.instruction(Instruction::with(ret));
        self.functions.push(id);
    }

    /// A register that may be written, other than RAX.
    fn free(&mut self) -> Register {
        let r = if self.long() {
            self.rng.pick(&[8, 9, 10, 11])
        } else {
            self.rng.pick(&[6, 7])
        };
        gpr(r, self.size())
    }

    fn address_of(&mut self, register: Register, target: u32) {
        let i = if self.long() {
            Instruction::with2(Code::Mov_r64_imm64, register, 0u64)
        } else {
            Instruction::with2(Code::Mov_r32_imm32, register, 0u32)
        };
        let i = i.expect("register and immediate");
        self.program.push(What::AddressOf(i, target, 0));
    }

    fn call(&mut self) {
        let target = self.rng.pick(&self.functions.clone());
        if self.rng.one_in(2) {
            let code = self.pick(Code::Call_rel32_64, Code::Call_rel32_32);
            self.program.push(What::Branch(code, target));
            return;
        }
        let r = self.free();
        self.address_of(r, target);
        if self.rng.one_in(2) {
            let code = self.pick(Code::Call_rm64, Code::Call_rm32);
            self.emit(Instruction::with1(code, r));
        } else {
            let slot = self.slot();
            let store = self.pick(Code::Mov_rm64_r64, Code::Mov_rm32_r32);
            self.emit(Instruction::with2(store, slot, r));
            let code = self.pick(Code::Call_rm64, Code::Call_rm32);
            self.emit(Instruction::with1(code, slot));
        }
    }

    fn indirect_jump(&mut self) {
        let r = self.free();
        let target = self.program.next_id() + 2 + self.rng.below(3) as u32;
        self.address_of(r, target);
        let code = self.pick(Code::Jmp_rm64, Code::Jmp_rm32);
        self.emit(Instruction::with1(code, r));
    }

    /// A memory operand near one of the pointers.
    pub fn slot(&mut self) -> MemoryOperand {
        let base = gpr(self.rng.pick(&self.pointers), self.size());
        MemoryOperand::with_base_displ(base, self.rng.below(512) as i64 * 4 - 1024)
    }

    fn load_pointer(&mut self) {
        let lea = self.pick(Code::Lea_r64_m, Code::Lea_r32_m);
        let (r, slot) = (gpr(self.rng.pick(&self.pointers), self.size()), self.slot());
        if slot.base == r {
            let by = (self.rng.below(64) as i64 - 32) * 16;
            let to = MemoryOperand::with_base_displ(r, by);
            self.emit(Instruction::with2(lea, r, to));
        }
    }

    fn stack(&mut self) {
        let (push, pop) = (
            self.pick(Code::Push_r64, Code::Push_r32),
            self.pick(Code::Pop_r64, Code::Pop_r32),
        );
        let (a, b) = (self.free(), self.free());
        let flags = self.rng.one_in(4);
        match self.rng.below(5) {
            0 if flags => {
                let code = self.pick(Code::Pushfq, Code::Pushfd);
                self.program.instruction(Instruction::with(code));
            }
            0 => {
                let slot = self.slot();
                let code = self.pick(Code::Push_rm64, Code::Push_rm32);
                self.emit(Instruction::with1(code, slot));
            }
            1 => {
                let v = self.rng.value() as i32;
                let code = self.pick(Code::Pushq_imm32, Code::Pushd_imm32);
                if self.long() {
                    self.emit(Instruction::with1(code, v));
                } else {
                    self.emit(Instruction::with1(code, v as u32));
                }
            }
            _ => {
                self.emit(Instruction::with1(push, a));
            }
        }
        if !self.rng.one_in(4) {
            self.plain();
        }
        if self.rng.one_in(5) && self.program.flavour != Flavour::Kernel64 {
            // What has been pushed is no image of the flags, but user code may load any but TF, which ends the case.
            let size = self.size();
            let and = self.pick(Code::And_rm64_imm32, Code::And_rm32_imm32);
            let slot = MemoryOperand::with_base(gpr(RSP, size));
            if self.long() {
                self.emit(Instruction::with2(and, slot, 0xcd5i32));
            } else {
                self.emit(Instruction::with2(and, slot, 0xcd5u32));
            }
            let code = self.pick(Code::Popfq, Code::Popfd);
            self.program.instruction(Instruction::with(code));
            self.program.instruction(Instruction::with(Code::Cld));
        } else {
            self.emit(Instruction::with1(pop, b));
        }
    }

    fn string(&mut self) {
        let size = self.size();
        let lea = self.pick(Code::Lea_r64_m, Code::Lea_r32_m);
        if self.reserved & (1 << RCX) != 0 {
            return;
        }
        for r in [6, 7] {
            let slot = self.slot();
            self.emit(Instruction::with2(lea, gpr(r, size), slot));
        }
        let n = self.rng.below(40) as u32;
        self.emit(Instruction::with2(Code::Mov_r32_imm32, gpr(RCX, 4), n));
        let wide = u32::from(self.long()) * 32 + 32;
        let down = self.rng.one_in(6);
        if down {
            self.program.instruction(Instruction::with(Code::Std));
        }
        use iced_x86::RepPrefixKind as R;
        let none = Register::None;
        let plain = self.rng.one_in(3);
        let rep = if plain { R::None } else { R::Repe };
        let same = if plain {
            R::None
        } else {
            self.rng.pick(&[R::Repe, R::Repne])
        };
        let i = match self.rng.below(10) {
            0 => Instruction::with_movsb(wide, none, rep),
            1 => Instruction::with_movsd(wide, none, rep),
            2 if self.long() => Instruction::with_movsq(wide, none, rep),
            3 => Instruction::with_stosb(wide, rep),
            4 if self.long() => Instruction::with_stosq(wide, rep),
            5 => Instruction::with_cmpsb(wide, none, same),
            6 => Instruction::with_scasw(wide, same),
            7 => Instruction::with_lodsd(wide, none, rep),
            8 => Instruction::with_movsw(wide, none, rep),
            _ => Instruction::with_stosd(wide, rep),
        };
        self.emit(i);
        if down {
            self.program.instruction(Instruction::with(Code::Cld));
        }
    }
}
