//! Several vCPUs of one guest at the same time: small programs without an operating system, each on a thread of its own.
//!
//! There is no oracle: each test says what the architecture allows. The programs run with interrupts off, memory mapped one to one, and end with a VMCALL: at
//! privilege level 0, or as user code that is executed natively.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use hospes_engine::{CpuState, Exit, Segment, Vcpu, Vm, cr, reg, seg};
use hospes_engine_bt::{BtVm, Execution, Options};
use hospes_memory::{GuestMemory, Range};
use hospes_units::{Gpa, VcpuId};
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

use crate::forms::Level;
use crate::guest::{HostProcessor, host_vendor};

const RAM_BYTES: u64 = 16 << 20;
/// The second half of this 2 MiB is mapped by 4 KiB pages in reverse order, so that no two neighbours are neighbours in memory.
const SCATTERED: u64 = 0x80_0000;
/// Two pages that lie side by side for the guest alone.
pub const SPLIT: u64 = SCATTERED + 0x10_0000;
/// Data that all vCPUs share.
pub const DATA: u64 = 0x40_0000;
const CODE: u64 = 0x20_0000;
const CODE_BYTES: u64 = 0x1_0000;
const STACKS: u64 = 0x30_0000;
const TABLES: u64 = 0x10_0000;

const PRESENT_WRITE: u64 = 3;
const USER: u64 = 4;
const LARGE: u64 = 1 << 7;
/// A program that runs for so long hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// A guest whose vCPUs have not run yet.
pub struct Machine {
    pub memory: Arc<GuestMemory>,
    pub vm: BtVm,
    user: bool,
}

/// Where the program of a vCPU begins.
pub fn code_address(vcpu: u32) -> u64 {
    CODE + u64::from(vcpu) * CODE_BYTES
}

impl Machine {
    pub fn new(vcpus: u32) -> Machine {
        Machine::of(vcpus, false)
    }

    /// One whose programs are user code, executed natively.
    pub fn native(vcpus: u32) -> Machine {
        Machine::of(vcpus, true)
    }

    fn of(vcpus: u32, user: bool) -> Machine {
        let memory = GuestMemory::new(&[Range {
            start: 0,
            end: RAM_BYTES,
        }]);
        let memory = Arc::new(memory.expect("memory of the guest"));
        map(
            &memory,
            if user {
                PRESENT_WRITE | USER
            } else {
                PRESENT_WRITE
            },
        );
        let options = Options {
            code_bytes: 8 << 20,
            execution: if user {
                Execution::Direct
            } else {
                Execution::Translated
            },
        };
        let processor = Arc::new(HostProcessor(host_vendor(), Level::V3));
        let vm = BtVm::new(memory.clone(), processor, vcpus, options).expect("the engine");
        Machine { memory, vm, user }
    }

    /// A vCPU at the beginning of its program, which goes on behind a VMCALL when it is run again.
    pub fn vcpu(
        &self,
        id: u32,
        program: impl Fn(&mut CodeAssembler, u32) -> Result<(), IcedError>,
    ) -> Box<dyn Vcpu> {
        let at = code_address(id);
        let build = || {
            let mut a = CodeAssembler::new(64)?;
            program(&mut a, id)?;
            a.vmcall()?;
            a.assemble(at)
        };
        let code = build().expect("the program has an encoding");
        assert!(code.len() as u64 <= CODE_BYTES);
        self.memory.write(Gpa(at), &code).expect("code");
        let mut vcpu = self.vm.create_vcpu(VcpuId(id)).expect("vCPU");
        start(vcpu.state(), id, at);
        if self.user {
            make_user(vcpu.state());
        }
        vcpu.state_changed();
        vcpu
    }

    /// Runs one program on each vCPU, all at once, to their ends. Returns their registers. Panics where one does not end with a VMCALL.
    pub fn run(
        &self,
        vcpus: u32,
        program: impl Fn(&mut CodeAssembler, u32) -> Result<(), IcedError>,
    ) -> Vec<[u64; 16]> {
        self.run_beside(vcpus, program, || ())
    }

    /// The same with something else that is done meanwhile.
    pub fn run_beside(
        &self,
        vcpus: u32,
        program: impl Fn(&mut CodeAssembler, u32) -> Result<(), IcedError>,
        beside: impl FnOnce(),
    ) -> Vec<[u64; 16]> {
        let all: Vec<_> = (0..vcpus).map(|id| self.vcpu(id, &program)).collect();
        let controls: Vec<_> = all.iter().map(|vcpu| vcpu.control()).collect();
        let (done, finished) = channel();
        std::thread::scope(|scope| {
            let threads: Vec<_> = all
                .into_iter()
                .map(|mut vcpu| {
                    let done = done.clone();
                    scope.spawn(move || {
                        let end = run_to_vmcall(&mut *vcpu);
                        let _ = done.send(());
                        end.map(|()| vcpu.state().gpr)
                    })
                })
                .collect();
            beside();
            for _ in 0..vcpus {
                if finished.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    controls.iter().for_each(|control| control.kick());
                }
            }
            let ends = threads.into_iter().map(|t| t.join().expect("vCPU thread"));
            ends.map(|end| end.expect("the program ends")).collect()
        })
    }

    pub fn word(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(Gpa(address), &mut bytes).expect("data");
        u64::from_le_bytes(bytes)
    }
}

/// Runs a program to its next VMCALL.
pub fn run_to_vmcall(vcpu: &mut dyn Vcpu) -> Result<(), String> {
    loop {
        match vcpu.run() {
            Ok(Exit::Hypercall) => return Ok(()),
            Ok(Exit::Yield) => std::thread::yield_now(),
            Ok(other) => return Err(format!("{other:?} at {:#x}", vcpu.state().rip)),
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Physical address behind one of the scattered 4 KiB pages.
pub fn scattered(address: u64) -> u64 {
    let page = (address - SCATTERED) >> 12;
    SCATTERED + ((511 - page) << 12) + (address & 0xfff)
}

fn map(memory: &GuestMemory, bits: u64) {
    let put = |at: u64, value: u64| {
        memory
            .write(Gpa(at), &value.to_le_bytes())
            .expect("page tables")
    };
    put(TABLES, (TABLES + 0x1000) | bits);
    put(TABLES + 0x1000, (TABLES + 0x2000) | bits);
    for n in 0..RAM_BYTES >> 21 {
        put(TABLES + 0x2000 + 8 * n, n << 21 | bits | LARGE);
    }
    put(
        TABLES + 0x2000 + 8 * (SCATTERED >> 21),
        (TABLES + 0x3000) | bits,
    );
    for n in 0..512 {
        let page = scattered(SCATTERED + (n << 12));
        put(TABLES + 0x3000 + 8 * n, page | bits);
    }
}

fn start(cpu: &mut CpuState, id: u32, rip: u64) {
    let descriptor = |selector: u16, attr: u16| Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attr,
    };
    cpu.rip = rip;
    cpu.rflags = 2;
    cpu.gpr[reg::RSP] = STACKS + u64::from(id + 1) * 0x1000;
    cpu.cr0 = cr::CR0_PE | cr::CR0_MP | cr::CR0_ET | cr::CR0_NE | cr::CR0_WP | cr::CR0_PG;
    cpu.cr3 = TABLES;
    cpu.cr4 = cr::CR4_PAE | cr::CR4_PGE | cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT;
    cpu.msr.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
    cpu.seg = [descriptor(0x18, 0xc093); 6];
    cpu.seg[seg::CS] = descriptor(0x10, 0xa09b);
}

/// As Linux has its user code.
fn make_user(cpu: &mut CpuState) {
    let data = cpu.seg[seg::DS];
    cpu.cr4 |= cr::CR4_OSXSAVE | cr::CR4_FSGSBASE;
    cpu.xcr0 = Level::V3.xcr0();
    for s in &mut cpu.seg {
        s.selector = 0x2b;
        s.attr = data.attr | 0x60;
    }
    cpu.seg[seg::CS].selector = 0x33;
    cpu.seg[seg::CS].attr = 0xa0fb;
    for s in [seg::FS, seg::GS] {
        cpu.seg[s] = Segment::default();
    }
}
