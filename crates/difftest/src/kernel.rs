//! A guest without an operating system that does what a kernel does: descriptor and interrupt tables, user code under it, page tables of its own.

use std::sync::Arc;

use hospes_engine::{CpuState, Segment, Vcpu, Vm, cr, reg, rflags, seg};
use hospes_engine_bt::{BtVm, Execution, Options};
use hospes_memory::{GuestMemory, Range};
use hospes_units::{Gpa, VcpuId};
use iced_x86::code_asm::*;

use crate::guest::HostProcessor;

// Physical addresses; the kernel has the first 2 MiB where they are.
/// Where the kernel begins.
pub const CODE: u64 = 0x1000;
/// Exception handlers, 32 bytes each.
pub const HANDLERS: u64 = 0x1800;
/// What SYSCALL goes to.
pub const ENTRY: u64 = 0x1c00;
/// Where page faults are noted.
pub const PAGE_FAULT: u64 = 0x1d00;
pub const GDT: u64 = 0x2000;
pub const TSS: u64 = 0x2100;
pub const IDT: u64 = 0x2800;
pub const SCRIPT: u64 = 0x3000;
pub const STACK: u64 = 0x7000;
pub const KERNEL_STACK: u64 = 0x8000;
pub const LOG: u64 = 0x9000;
pub const FAULTS: u64 = 0xc000;
pub const ROOT: u64 = 0x10_0000;
/// The first pages once more, for user code.
pub const USER: u64 = 0x20_0000;

/// Where kernels have their code.
pub const TOP: u64 = 0xffff_ffff_8000_0000;

/// Memory that only page tables made by a test lead to; the same once more from [`HIGH`] on.
pub const DATA: u64 = 0x20_0000;
pub const DATA_BYTES: u64 = 0x4_0000;
pub const HIGH: u64 = 1 << 32;
const RAM: [Range; 2] = [
    Range {
        start: 0,
        end: DATA + DATA_BYTES,
    },
    Range {
        start: HIGH,
        end: HIGH + DATA + DATA_BYTES,
    },
];

/// vCPUs a machine may have.
const VCPUS: u32 = 2;

// Bits of a page table's entry.
pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 0x20;
pub const D: u64 = 0x40;
pub const PS: u64 = 0x80;
pub const G: u64 = 0x100;
pub const XD: u64 = 1 << 63;

pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_SS: u16 = 0x10;
pub const USER_SS: u16 = 0x1b;
pub const USER_CS: u16 = 0x23;
pub const DESCRIPTORS: [u64; 8] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    // The TSS, and compatibility-mode code.
    0x0000_8b00_2100_0067,
    0,
    0x00cf_fb00_0000_ffff,
];

/// The guest's memory.
#[derive(Debug)]
pub struct Machine(GuestMemory);

impl Machine {
    /// The tables of the kernel, and handlers that end in a VMCALL with the vector in RAX; that of a page fault notes it and goes on.
    #[expect(
        clippy::new_without_default,
        reason = "it takes memory, which a default value should not"
    )]
    pub fn new() -> Machine {
        let m = Machine(GuestMemory::new(&RAM).unwrap());
        m.put(GDT, &DESCRIPTORS);
        m.put(TSS + 4, &[KERNEL_STACK]);
        for vector in 0..32 {
            let at = HANDLERS + 32 * vector;
            let low = at & 0xffff | u64::from(KERNEL_CS) << 16 | 0x8e00 << 32;
            m.put(IDT + 16 * vector, &[low, 0]);
            m.code(at, |a| {
                if vector == 14 {
                    a.jmp(PAGE_FAULT).unwrap();
                } else {
                    a.mov(rax, vector).unwrap();
                    a.vmcall().unwrap();
                }
            });
        }
        m.code(ENTRY, |a| a.vmcall().unwrap());
        m.code(PAGE_FAULT, skip_fault);
        m.put(ROOT, &[ROOT + 0x1000 + (P | W | U | A)]);
        m.put(ROOT + 0x1000, &[ROOT + 0x2000 + (P | W | U | A)]);
        let user = ROOT + 0x3000 + (P | W | U | A);
        m.put(ROOT + 0x2000, &[P | W | A | D | PS | G, user]);
        for page in 0..16 {
            m.put(ROOT + 0x3000 + 8 * page, &[page << 12 | P | W | U | A | D]);
        }
        m
    }

    /// Writes words to memory.
    pub fn put(&self, gpa: u64, words: &[u64]) {
        for (n, w) in words.iter().enumerate() {
            let at = Gpa(gpa + 8 * n as u64);
            self.0.write(at, &w.to_le_bytes()).unwrap();
        }
    }

    pub fn put_bytes(&self, gpa: u64, bytes: &[u8]) {
        self.0.write(Gpa(gpa), bytes).unwrap();
    }

    /// Maps frames at [`TOP`], one page after the other, by three pages of tables: nothing else is there in this root.
    pub fn map_top(&self, root: u64, tables: u64, frames: &[u64], bits: u64) {
        self.put(root + 8 * 511, &[tables + (P | W | A)]);
        self.put(tables + 8 * 510, &[tables + 0x1000 + (P | W | A)]);
        self.put(tables + 0x1000, &[tables + 0x2000 + (P | W | A)]);
        for (page, frame) in (0..).zip(frames) {
            let entry = frame | P | W | A | D | bits;
            self.put(tables + 0x2000 + 8 * page, &[entry]);
        }
    }

    /// Assembles code to an address.
    pub fn code(&self, at: u64, f: impl FnOnce(&mut CodeAssembler)) {
        self.code_for(at, at, f);
    }

    /// Assembles code to a physical address that is executed at another one.
    pub fn code_for(&self, gpa: u64, at: u64, f: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(64).unwrap();
        f(&mut a);
        self.0.write(Gpa(gpa), &a.assemble(at).unwrap()).unwrap();
    }

    /// The machine with a vCPU in the state of [`state`], changed by `set`.
    pub fn start(self, execution: Execution, set: impl FnOnce(&mut CpuState)) -> Started {
        let memory = Arc::new(self.0);
        let options = Options {
            code_bytes: 1 << 20,
            execution,
        };
        let processor = Arc::new(HostProcessor::new());
        let vm = BtVm::new(memory.clone(), processor, VCPUS, options).unwrap();
        let vcpu = make_vcpu(&vm, 0, set);
        Started { vcpu, memory, vm }
    }
}

fn make_vcpu(vm: &BtVm, id: u32, set: impl FnOnce(&mut CpuState)) -> Box<dyn Vcpu> {
    let mut vcpu = vm.create_vcpu(VcpuId(id)).unwrap();
    state(vcpu.state());
    set(vcpu.state());
    vcpu.state_changed();
    vcpu
}

/// A machine that can run.
pub struct Started {
    pub vcpu: Box<dyn Vcpu>,
    pub memory: Arc<GuestMemory>,
    /// Its end would stop the vCPU.
    pub vm: BtVm,
}

impl Started {
    /// The second vCPU.
    pub fn another(&self, set: impl FnOnce(&mut CpuState)) -> Box<dyn Vcpu> {
        make_vcpu(&self.vm, 1, set)
    }
}

/// Puts the processor into 64-bit user code with flat segments.
pub fn to_user(cpu: &mut CpuState) {
    for (s, selector, attr) in [(seg::CS, USER_CS, 0xa0fb), (seg::SS, USER_SS, 0xc0f3)] {
        cpu.seg[s].selector = selector;
        cpu.seg[s].attr = attr;
    }
    cpu.gpr[reg::RSP] = STACK + USER;
}

/// A vCPU belongs to the thread that runs it.
pub fn on_its_own<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|s| s.spawn(f).join().unwrap())
}

/// Turns global pages off and on again. RDX is lost.
pub fn flush_global(a: &mut CodeAssembler) {
    a.mov(rdx, cr4).unwrap();
    a.and(rdx, !(cr::CR4_PGE as i32)).unwrap();
    a.mov(cr4, rdx).unwrap();
    a.or(rdx, cr::CR4_PGE as i32).unwrap();
    a.mov(cr4, rdx).unwrap();
}

/// Notes what a page fault says and goes on behind its instruction, which is three bytes long.
fn skip_fault(a: &mut CodeAssembler) {
    a.mov(r14, cr2).unwrap();
    a.mov(qword_ptr(r15), r14).unwrap();
    a.pop(r14).unwrap();
    a.mov(qword_ptr(r15 + 8), r14).unwrap();
    a.add(r15, 16).unwrap();
    a.add(qword_ptr(rsp), 3).unwrap();
    // Flags that nothing reads are not kept.
    a.and(qword_ptr(rsp + 16), !0x8d5).unwrap();
    a.iretq().unwrap();
}

/// The state in which the kernel begins at [`CODE`], with interrupts off.
pub fn state(cpu: &mut CpuState) {
    let segment = |selector: u16, attr: u16| Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attr,
    };
    cpu.cr0 = cr::CR0_PE | cr::CR0_ET | cr::CR0_NE | cr::CR0_WP | cr::CR0_PG;
    cpu.cr4 = cr::CR4_PAE | cr::CR4_PGE | cr::CR4_OSFXSR | cr::CR4_SMAP;
    cpu.cr3 = ROOT;
    cpu.msr.efer = cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
    cpu.msr.star = 0x13 << 48 | u64::from(KERNEL_CS) << 32;
    cpu.msr.lstar = ENTRY;
    cpu.msr.sfmask = 0x25_7fd5;
    cpu.seg = [Segment::default(); 6];
    cpu.seg[seg::CS] = segment(KERNEL_CS, 0xa09b);
    cpu.seg[seg::SS] = segment(KERNEL_SS, 0xc093);
    cpu.gdtr.base = GDT;
    cpu.gdtr.limit = 63;
    cpu.idtr.base = IDT;
    cpu.idtr.limit = 16 * 32 - 1;
    cpu.tr = segment(0x28, 0x8b);
    cpu.tr.base = TSS;
    cpu.tr.limit = 0x67;
    cpu.rflags = rflags::FIXED;
    cpu.gpr[reg::RSP] = STACK;
    cpu.rip = CODE;
}
