//! A small machine for the tests: flat guest memory, page tables, descriptor tables, and a host whose native execution each test chooses.

mod events;
mod memory;
mod modes;
mod strings;
mod system;
mod walks;

use hospes_engine::{CpuState, DescTable, Segment, cr, reg, rflags, seg};
use hospes_memory::{GuestMemory, Range};
use hospes_units::Gpa;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Instruction, Mnemonic};

use super::*;

pub const RAM: u64 = 16 << 20;
pub const PML4: u64 = 0x1000;
pub const GDT: u64 = 0x8000;
pub const IDT: u64 = 0x9000;
pub const TSS: u64 = 0xa000;
pub const CODE: u64 = 0x1_0000;
pub const KERNEL_STACK: u64 = 0x2_0000;
pub const RING0_STACK: u64 = 0x3_0000;
pub const IST1_STACK: u64 = 0x4_0000;
/// Handler of vector `n`: this plus 16 n.
pub const HANDLERS: u64 = 0x20_0000;
/// Identity-mapped user memory.
pub const USER: u64 = 0x40_0000;
pub const USER_STACK: u64 = 0x48_0000;
/// Nothing is mapped from here to 8 MiB.
pub const HOLE: u64 = 0x60_0000;
const TABLES: u64 = 0x10_0000;

pub const P: u64 = 1;
pub const RW: u64 = 2;
pub const US: u64 = 4;
pub const A: u64 = 0x20;
pub const D: u64 = 0x40;
pub const PS: u64 = 0x80;
pub const G: u64 = 0x100;
pub const XD: u64 = 1 << 63;

pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_DS: u16 = 0x10;
pub const USER_CS32: u16 = 0x1b;
pub const USER_DS: u16 = 0x23;
pub const USER_CS: u16 = 0x2b;
pub const KERNEL_CS32: u16 = 0x30;
pub const TSS_SEL: u16 = 0x38;
pub const NOT_PRESENT_DS: u16 = 0x48;
pub const READ_ONLY_DS: u16 = 0x50;
pub const GDT_LIMIT: u16 = 0x57;

pub type Native = fn(&mut CpuState, &Instruction, Option<Operand>) -> Result<(), NativeFault>;

pub struct TestHost {
    pub memory: GuestMemory,
    pub vendor: Vendor,
    pub native: Native,
    pub native_runs: Vec<(Mnemonic, Option<usize>)>,
    pub flushes: Vec<TlbFlush>,
    pub ipis: Vec<Ipi>,
    pub writes: Vec<(u64, usize)>,
    pub tsc: u64,
    pub decoded: Decoded,
}

impl Host for TestHost {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn vendor(&self) -> Vendor {
        self.vendor
    }

    fn written(&mut self, gpa: Gpa, len: usize) {
        assert!(gpa.page_offset() + len as u64 <= 4096);
        self.writes.push((gpa.0, len));
    }

    fn tlb_flush(&mut self, _cpu: &CpuState, what: TlbFlush) {
        self.flushes.push(what);
    }

    fn run_native(
        &mut self,
        cpu: &mut CpuState,
        instr: &Instruction,
        operand: Option<Operand>,
    ) -> Result<(), NativeFault> {
        self.native_runs
            .push((instr.mnemonic(), operand.map(|o| o.ptr as usize)));
        (self.native)(cpu, instr, operand)
    }

    fn cpuid(&self, _cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        match (leaf, subleaf) {
            (0, _) => [0xd, 0, 0, 0],
            (1, _) => [0, 0, 1 << 17 | 1 << 21 | 1 << 26, 0],
            (7, 0) => [
                0,
                1 | 1 << 1 | 1 << 7 | 1 << 10 | 1 << 20,
                1 << 2 | 1 << 22,
                1 << 26 | 1 << 29,
            ],
            (0xd, 0) => [7, 832, 832, 0],
            (0xd, 1) => [7, 0, 0, 0],
            (0xd, 2) => [256, 576, 0, 0],
            (0x8000_0000, _) => [0x8000_0021, 0, 0, 0],
            (0x8000_0001, _) => [0, 0, 0, 1 << 20 | 1 << 27 | 1 << 29],
            _ => [0; 4],
        }
    }

    fn host_tsc(&self) -> u64 {
        self.tsc
    }

    fn send_ipi(&mut self, ipi: Ipi) {
        self.ipis.push(ipi);
    }

    fn arch_capabilities(&self) -> u64 {
        0x2b
    }

    fn decoded(&mut self) -> Option<&mut Decoded> {
        Some(&mut self.decoded)
    }
}

/// A native execution for tests that need none: it must not be reached.
pub fn no_native(_: &mut CpuState, i: &Instruction, _: Option<Operand>) -> Result<(), NativeFault> {
    panic!("{:?} must not run natively here", i.mnemonic());
}

/// OR and AND of a 32-bit register with an immediate or register, which the mode-switching code uses.
pub fn native_or(
    cpu: &mut CpuState,
    i: &Instruction,
    _: Option<Operand>,
) -> Result<(), NativeFault> {
    let (r, _) = super::cx::gpr_index(i.op0_register());
    let b = i.try_immediate(1).unwrap_or(0);
    let v = match i.mnemonic() {
        Mnemonic::Or => cpu.gpr[r] | b,
        Mnemonic::Xor => 0,
        m => panic!("{m:?}"),
    };
    cpu.gpr[r] = v & 0xffff_ffff;
    Ok(())
}

pub struct Machine {
    pub cpu: CpuState,
    pub host: TestHost,
    next_table: u64,
}

pub fn descriptor(base: u64, limit: u64, attr: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | (attr & 0xf0ff) << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

pub fn flat(selector: u16, attr: u16) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        attr,
    }
}

impl Machine {
    /// Bare memory and a processor after reset, without any table.
    pub fn bare() -> Machine {
        let memory = GuestMemory::new(&[Range { start: 0, end: RAM }]).unwrap();
        let mut cpu = CpuState {
            rflags: rflags::FIXED,
            cr0: cr::CR0_ET,
            ..CpuState::default()
        };
        cpu.dr[6] = DR6_RESET;
        cpu.dr[7] = DR7_RESET;
        cpu.xcr0 = 1;
        cpu.idtr.limit = 0x3ff;
        for s in &mut cpu.seg {
            s.limit = 0xffff;
            s.attr = 0x93;
        }
        Machine {
            cpu,
            host: TestHost {
                memory,
                vendor: Vendor::Intel,
                native: no_native,
                native_runs: Vec::new(),
                flushes: Vec::new(),
                ipis: Vec::new(),
                writes: Vec::new(),
                tsc: 1000,
                decoded: Decoded::default(),
            },
            next_table: TABLES,
        }
    }

    /// 64-bit mode at CPL 0 with paging, all tables, and a handler for every exception.
    pub fn long() -> Machine {
        let mut m = Machine::bare();
        for va in (0..USER).step_by(4096) {
            m.map(va, va, P | RW);
        }
        for va in (USER..HOLE).step_by(4096) {
            m.map(va, va, P | RW | US);
        }
        m.tables();
        for v in 0..=255u64 {
            let ist = u64::from(v == 8);
            m.gate64(v, HANDLERS + 16 * v, KERNEL_CS, 0x8e, ist);
        }
        let c = &mut m.cpu;
        c.cr0 = cr::CR0_PE | cr::CR0_ET | cr::CR0_NE | cr::CR0_WP | cr::CR0_PG;
        c.cr3 = PML4;
        c.cr4 = cr::CR4_PAE | cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT | cr::CR4_OSXSAVE;
        c.xcr0 = 7;
        c.msr.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE | cr::EFER_SCE;
        c.msr.star = 0x0018_0008 << 32;
        c.msr.lstar = HANDLERS + 0x8000;
        c.msr.sfmask = rflags::TF | rflags::IF | rflags::DF | rflags::AC | rflags::NT;
        for s in [seg::ES, seg::DS, seg::SS] {
            c.seg[s] = flat(KERNEL_DS, 0xc093);
        }
        c.seg[seg::FS] = Segment::default();
        c.seg[seg::GS] = Segment::default();
        c.seg[seg::CS] = flat(KERNEL_CS, 0xa09b);
        c.tr = Segment {
            base: TSS,
            limit: 0x67,
            selector: TSS_SEL,
            attr: 0x8b,
        };
        c.gpr[reg::RSP] = KERNEL_STACK;
        c.rip = CODE;
        m
    }

    /// As `long`, at CPL 3.
    pub fn user() -> Machine {
        let mut m = Machine::long();
        let c = &mut m.cpu;
        for s in [seg::ES, seg::DS, seg::SS] {
            c.seg[s] = flat(USER_DS, 0xc0f3);
        }
        c.seg[seg::CS] = flat(USER_CS, 0xa0fb);
        c.gpr[reg::RSP] = USER_STACK;
        c.rip = USER;
        c.rflags |= rflags::IF;
        m
    }

    /// 32-bit protected mode at CPL 0 without paging.
    pub fn protected() -> Machine {
        let mut m = Machine::bare();
        m.tables();
        for v in 0..=255u64 {
            m.gate32(v, HANDLERS + 16 * v, KERNEL_CS32, 0x8e);
        }
        let c = &mut m.cpu;
        c.cr0 = cr::CR0_PE | cr::CR0_ET;
        for s in [seg::ES, seg::DS, seg::SS, seg::FS, seg::GS] {
            c.seg[s] = flat(KERNEL_DS, 0xc093);
        }
        c.seg[seg::CS] = flat(KERNEL_CS32, 0xc09b);
        c.tr = Segment {
            base: TSS,
            limit: 0x67,
            selector: TSS_SEL,
            attr: 0x8b,
        };
        c.gpr[reg::RSP] = KERNEL_STACK;
        c.rip = CODE;
        m
    }

    fn tables(&mut self) {
        for (n, d) in [
            0,
            descriptor(0, 0xf_ffff, 0xa09b),
            descriptor(0, 0xf_ffff, 0xc093),
            descriptor(0, 0xf_ffff, 0xc0fb),
            descriptor(0, 0xf_ffff, 0xc0f3),
            descriptor(0, 0xf_ffff, 0xa0fb),
            descriptor(0, 0xf_ffff, 0xc09b),
            descriptor(TSS, 0x67, 0x89),
            0,
            descriptor(0, 0xf_ffff, 0xc013),
            descriptor(0, 0xf_ffff, 0xc091),
        ]
        .into_iter()
        .enumerate()
        {
            self.poke(GDT + 8 * n as u64, d);
        }
        self.poke(TSS + 4, RING0_STACK);
        self.poke(TSS + 0x66, 0x68);
        self.poke(TSS + 36, IST1_STACK);
        self.cpu.gdtr = DescTable {
            base: GDT,
            limit: GDT_LIMIT,
        };
        self.cpu.idtr = DescTable {
            base: IDT,
            limit: 0xfff,
        };
    }

    pub fn gate64(&mut self, v: u64, target: u64, selector: u16, attr: u64, ist: u64) {
        let low = target & 0xffff
            | u64::from(selector) << 16
            | ist << 32
            | attr << 40
            | (target >> 16 & 0xffff) << 48;
        self.poke(IDT + 16 * v, low);
        self.poke(IDT + 16 * v + 8, target >> 32);
    }

    pub fn gate32(&mut self, v: u64, target: u64, selector: u16, attr: u64) {
        let low = target & 0xffff
            | u64::from(selector) << 16
            | attr << 40
            | (target >> 16 & 0xffff) << 48;
        self.poke(IDT + 8 * v, low);
    }

    pub fn poke(&mut self, pa: u64, v: u64) {
        self.host.memory.write_obj(Gpa(pa), &v).unwrap();
    }

    pub fn peek(&self, pa: u64) -> u64 {
        self.host.memory.read_obj(Gpa(pa)).unwrap()
    }

    pub fn bytes(&self, pa: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.host.memory.read(Gpa(pa), &mut b).unwrap();
        b
    }

    /// Maps one 4 KiB page in the four-level tables at [`PML4`]; upper levels allow everything.
    pub fn map(&mut self, va: u64, pa: u64, flags: u64) {
        let leaf = self.leaf(va);
        self.poke(leaf, pa | flags);
    }

    /// Address of the last-level entry for `va`, with the tables above it.
    pub fn leaf(&mut self, va: u64) -> u64 {
        let mut table = PML4;
        for level in [39, 30, 21] {
            let slot = table + 8 * (va >> level & 0x1ff);
            if self.peek(slot) & P == 0 {
                let new = self.next_table;
                self.next_table += 4096;
                assert!(new < HANDLERS, "out of room for page tables");
                self.poke(slot, new | P | RW | US);
            }
            table = self.peek(slot) & 0xf_ffff_f000;
        }
        table + 8 * (va >> 12 & 0x1ff)
    }

    /// Assembles code for the current mode at RIP; pages are identity-mapped where code goes.
    pub fn code(&mut self, f: impl FnOnce(&mut CodeAssembler)) -> u64 {
        let mut a = CodeAssembler::new(self.cpu.code_bits()).unwrap();
        f(&mut a);
        let base = self.cpu.seg[seg::CS].base;
        let at = if self.cpu.code_bits() == 64 { 0 } else { base } + self.cpu.rip;
        let bytes = a.assemble(self.cpu.rip).unwrap();
        self.host.memory.write(Gpa(at), &bytes).unwrap();
        bytes.len() as u64
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        let base = self.cpu.seg[seg::CS].base;
        let at = if self.cpu.code_bits() == 64 { 0 } else { base } + self.cpu.rip;
        self.host.memory.write(Gpa(at), bytes).unwrap();
    }

    pub fn step(&mut self) -> Step {
        step(&mut self.cpu, &mut self.host)
    }

    /// Steps and asserts that the vCPU goes on.
    pub fn ok(&mut self) {
        assert_eq!(self.step(), Step::Continue, "at {:#x}", self.cpu.rip);
    }

    /// Steps `n` instructions, none of which may fault.
    pub fn run(&mut self, n: usize) {
        for _ in 0..n {
            let from = self.cpu.rip;
            self.ok();
            let in_handler = (HANDLERS..HANDLERS + 0x1000).contains(&self.cpu.rip);
            assert!(
                !in_handler,
                "exception {} at {from:#x}",
                (self.cpu.rip - HANDLERS) / 16
            );
        }
    }

    /// Steps once and gives the vector of the exception that was delivered.
    pub fn fault(&mut self) -> u8 {
        self.ok();
        assert!(
            (HANDLERS..HANDLERS + 0x1000).contains(&self.cpu.rip),
            "no exception: RIP {:#x}",
            self.cpu.rip
        );
        ((self.cpu.rip - HANDLERS) / 16) as u8
    }

    /// The 64-bit words at the top of the stack.
    pub fn stack(&self, n: usize) -> Vec<u64> {
        (0..n as u64)
            .map(|k| self.peek(self.cpu.gpr[reg::RSP] + 8 * k))
            .collect()
    }
}
