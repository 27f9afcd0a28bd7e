//! Interrupts between any two instructions of the host's: whatever translated code is in the middle of, it must come out as if it had not been interrupted.
//!
//! Random code with a stack, frames, calls and system calls runs twice, once left alone and once with interrupts and kicks as fast as another thread can send
//! them. The interrupt's handler writes over the stack below the stack pointer, so that nothing may be read there again. In the end registers and data must be the same.

use std::sync::atomic::{AtomicBool, Ordering};

use hospes_difftest::kernel::*;
use hospes_difftest::rng::Rng;
use hospes_engine::{CpuState, Exit, rflags};
use hospes_engine_bt::Execution;
use hospes_units::Gpa;
use iced_x86::code_asm::*;

const CASES: u64 = 40;
/// Interrupts in a case; fewer prove nothing.
const ENOUGH: u64 = 1500;
/// Runs at most until there were so many.
const RUNS: u32 = 3000;
const ROUNDS: u64 = 20_000;
const PIECES: u32 = 12;

const VECTOR: u8 = 31;
const HANDLER: u64 = 0x5000;
const COUNT: u64 = 0x5800;
const SAVED_RSP: u64 = 0x5808;
const TOP_TABLES: u64 = ROOT + 0x8000;
const SYSCALL_STACK: u64 = 0xc000;
const WORDS: u64 = 0x9000;
const WORDS_BYTES: u64 = 0x2000;
/// Functions, one of them in each page.
const FUNCTIONS: [u64; 3] = [CODE + 0x700, 0xd000, 0xe000];
const DEPTH: u32 = 2;

/// Random code that leaves the stack as it was. R12 is where the first pages begin, R13 counts rounds.
struct Generator<'a> {
    a: &'a mut CodeAssembler,
    rng: Rng,
    user: bool,
    calls: bool,
}

impl Generator<'_> {
    fn register(&mut self) -> AsmRegister64 {
        self.rng.pick(&[rax, rbx, rdx, rsi, rdi, r8, r9, r10, r14])
    }

    fn word(&mut self) -> AsmMemoryOperand {
        r12 + (WORDS + self.rng.below(WORDS_BYTES - 8)) as i32
    }

    fn block(&mut self, depth: u32) -> Result<(), IcedError> {
        for _ in 0..self.rng.range(1, 4) {
            self.piece(depth)?;
        }
        Ok(())
    }

    fn inner(&mut self, depth: u32) -> Result<(), IcedError> {
        if depth == 0 {
            return self.arithmetic();
        }
        self.block(depth - 1)
    }

    fn piece(&mut self, depth: u32) -> Result<(), IcedError> {
        let (r, s) = (self.register(), self.register());
        match self.rng.below(16) {
            0 | 1 => self.frame(depth),
            2 => {
                self.a.push(r)?;
                self.inner(depth)?;
                self.a.pop(s)
            }
            3 => {
                let n = self.rng.bits() as i32;
                self.a.push(n)?;
                self.inner(depth)?;
                self.a.pop(r)
            }
            4 => {
                let (from, to) = (self.word(), self.register());
                self.a.push(qword_ptr(from))?;
                self.inner(depth)?;
                self.a.pop(to)
            }
            5 => {
                self.a.pushfq()?;
                self.inner(depth)?;
                self.a.popfq()?;
                self.a.adc(r, s)
            }
            6 => {
                self.a.add(r, s)?;
                self.a.pushfq()?;
                self.a.pop(r)
            }
            7 | 8 if self.calls => self.call(),
            9 => self.string(),
            10 => {
                let to = self.word();
                self.a.mov(rcx, r)?;
                self.a.and(ecx, 0x3f)?;
                self.a.bts(qword_ptr(to), rcx)?;
                self.a.adc(s, 0)
            }
            11 => {
                let to = self.word();
                self.a.lock().xadd(qword_ptr(to), r)?;
                let to = self.word();
                self.a.xchg(qword_ptr(to), s)
            }
            12 => {
                let mut over = self.a.create_label();
                self.a.test(r, 1)?;
                self.a.jz(over)?;
                self.inner(depth)?;
                self.a.set_label(&mut over)?;
                self.a.nop()
            }
            13 if self.user => self.a.syscall(),
            13 => {
                self.a.cli()?;
                self.inner(depth)?;
                self.a.sti()
            }
            14 if !self.user => {
                self.a.swapgs()?;
                self.arithmetic()?;
                self.a.swapgs()
            }
            _ => self.arithmetic(),
        }
    }

    fn arithmetic(&mut self) -> Result<(), IcedError> {
        for _ in 0..self.rng.range(1, 4) {
            let (r, s) = (self.register(), self.register());
            match self.rng.below(6) {
                0 => self.a.add(r, s)?,
                1 => self.a.xor(r, s)?,
                2 => self.a.lea(r, r + s * 4 + 12345)?,
                3 => self.a.rol(r, 13)?,
                4 => {
                    let from = self.word();
                    self.a.add(r, qword_ptr(from))?;
                }
                _ => {
                    let to = self.word();
                    self.a.mov(qword_ptr(to), r)?;
                }
            }
        }
        Ok(())
    }

    fn frame(&mut self, depth: u32) -> Result<(), IcedError> {
        let locals = self.rng.below(4) as i32;
        let (r, s) = (self.register(), self.register());
        self.a.push(rbp)?;
        self.a.mov(rbp, rsp)?;
        self.a.sub(rsp, 8 * locals)?;
        for n in 1..=locals {
            self.a.mov(qword_ptr(rbp - 8 * n), r)?;
        }
        self.inner(depth)?;
        for n in 1..=locals {
            self.a.add(s, qword_ptr(rbp - 8 * n))?;
        }
        self.a.leave()?;
        // The frame pointer's value matters where frames are in frames.
        self.a.lea(s, s + rbp)
    }

    fn call(&mut self) -> Result<(), IcedError> {
        let function = self.rng.pick(&FUNCTIONS);
        if self.rng.one_in(2) {
            return self.a.call(function);
        }
        self.a.lea(rcx, r12 + function as i32)?;
        self.a.call(rcx)
    }

    fn string(&mut self) -> Result<(), IcedError> {
        let (from, to) = (self.word(), self.word());
        let count = self.rng.below(8) as i32;
        self.a.lea(rsi, from)?;
        self.a.lea(rdi, to)?;
        self.a.mov(ecx, count)?;
        match self.rng.below(4) {
            0 => self.a.rep().movsb(),
            1 => self.a.rep().stosb(),
            2 => self.a.movsq(),
            _ => self.a.stosq(),
        }
    }
}

fn machine(seed: u64, user: bool) -> Machine {
    let m = Machine::new();
    let mut rng = Rng::new(seed);
    let generate =
        |at: u64, seed: u64, user: bool, calls: bool, frame: &dyn Fn(&mut Generator<'_>)| {
            m.code(at, |a| {
                frame(&mut Generator {
                    a,
                    rng: Rng::new(seed),
                    user,
                    calls,
                })
            });
        };
    generate(CODE, rng.bits(), user, true, &|g| {
        let mut again = g.a.create_label();
        if !user {
            g.a.sti().unwrap();
        }
        g.a.set_label(&mut again).unwrap();
        for _ in 0..PIECES {
            g.piece(DEPTH).unwrap();
        }
        g.a.dec(r13).unwrap();
        g.a.jnz(again).unwrap();
        g.a.vmcall().unwrap();
    });
    for at in FUNCTIONS {
        generate(at, rng.bits(), user, false, &|g| {
            g.block(1).unwrap();
            g.a.ret().unwrap();
        });
    }
    // Between SYSCALL and SYSRET interrupts are on for a while, on a stack of its own.
    generate(ENTRY, rng.bits(), false, false, &|g| {
        let a = &mut *g.a;
        a.swapgs().unwrap();
        a.mov(qword_ptr(SAVED_RSP), rsp).unwrap();
        a.mov(rsp, SYSCALL_STACK).unwrap();
        for r in [rcx, r11, r12] {
            a.push(r).unwrap();
        }
        a.xor(r12d, r12d).unwrap();
        a.sti().unwrap();
        g.frame(0).unwrap();
        let a = &mut *g.a;
        a.cli().unwrap();
        for r in [r12, r11, rcx] {
            a.pop(r).unwrap();
        }
        a.mov(rsp, qword_ptr(SAVED_RSP)).unwrap();
        a.swapgs().unwrap();
        a.sysretq().unwrap();
    });
    m.code(HANDLER, |a| {
        for n in 0..8 {
            a.push(0x7b7b_7b00 + n).unwrap();
        }
        a.add(rsp, 64).unwrap();
        a.inc(qword_ptr(COUNT)).unwrap();
        a.iretq().unwrap();
    });
    // The first pages once more: jumps from one of them to another are connected there.
    let frames: [u64; 16] = std::array::from_fn(|page| (page as u64) << 12);
    m.map_top(ROOT, TOP_TABLES, &frames, G);
    let gate = HANDLER | u64::from(KERNEL_CS) << 16 | 0x8e00 << 32;
    m.put(IDT + 16 * u64::from(VECTOR), &[gate, 0]);
    for n in 0..WORDS_BYTES / 8 {
        m.put(WORDS + 8 * n, &[rng.bits()]);
    }
    m
}

/// Runs to the hypercall, with interrupts all the time or none at all. Gives the registers, the data and how many interrupts there were.
fn run(seed: u64, user: bool, interrupts: bool) -> ([u64; 16], Vec<u8>, u64) {
    let alias = match (user, seed % 4) {
        (true, _) => USER,
        (_, 0) => TOP,
        _ => 0,
    };
    let set = |cpu: &mut CpuState| {
        cpu.gpr = std::array::from_fn(|n| 0x0123_4567_89ab_cdef * n as u64);
        cpu.gpr[4] = STACK;
        if user {
            to_user(cpu);
            cpu.rflags |= rflags::IF;
        }
        cpu.gpr[12] = alias;
        cpu.gpr[13] = ROUNDS;
        cpu.rip = CODE + alias;
    };
    let mut guest = machine(seed, user).start(Execution::Translated, set);
    let vcpu = &mut guest.vcpu;
    let control = vcpu.control();
    let (started, done) = (AtomicBool::new(!interrupts), AtomicBool::new(!interrupts));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            started.store(true, Ordering::Relaxed);
            let mut rng = Rng::new(seed);
            while !done.load(Ordering::Relaxed) {
                if rng.one_in(8) {
                    control.kick();
                } else {
                    control.set_callback_line(Some(VECTOR));
                }
                for _ in 0..rng.below(300) {
                    std::hint::spin_loop();
                }
            }
        });
        while !started.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
        let end = loop {
            match vcpu.run() {
                Ok(Exit::Kicked) => {}
                end => break end,
            }
        };
        done.store(true, Ordering::Relaxed);
        // In user code VMCALL leaves as well.
        assert_eq!(end.unwrap(), Exit::Hypercall, "seed {seed}");
    });
    let mut data = vec![0; WORDS_BYTES as usize];
    guest.memory.read(Gpa(WORDS), &mut data).unwrap();
    let mut count = [0; 8];
    guest.memory.read(Gpa(COUNT), &mut count).unwrap();
    let cpu = vcpu.state();
    assert_eq!(
        cpu.gpr[13], 0,
        "seed {seed} ended early, RAX {:#x}, CR2 {:#x}, RSP {:#x}",
        cpu.gpr[0], cpu.cr2, cpu.gpr[4]
    );
    (cpu.gpr, data, u64::from_le_bytes(count))
}

#[test]
fn interrupts_at_any_point_change_nothing() {
    for seed in 0..CASES {
        let user = seed % 2 == 1;
        // A vCPU belongs to the thread that runs it.
        let run = |interrupts| {
            std::thread::scope(|s| s.spawn(move || run(seed, user, interrupts)).join().unwrap())
        };
        let (registers, data, none) = run(false);
        assert_eq!(none, 0);
        let mut taken = 0;
        for _ in 0..RUNS {
            let (interrupted, changed, count) = run(true);
            taken += count;
            let hex = |registers: [u64; 16]| registers.map(|r| format!("{r:x}"));
            assert_eq!(
                hex(registers),
                hex(interrupted),
                "seed {seed}, {taken} interrupts"
            );
            assert!(data == changed, "seed {seed}, {taken} interrupts: data");
            if taken >= ENOUGH {
                break;
            }
        }
        assert!(taken >= ENOUGH, "seed {seed}, {taken} interrupts");
    }
}
