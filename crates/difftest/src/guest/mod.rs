//! The engine's side: a guest whose kernel is a few instructions.
//!
//! Every exception handler is a VMCALL, behind which a common tail loads the next case's registers and returns to it. So one vCPU serves many cases
//! and its TLB and translations stay warm between them.

mod stub;
mod tables;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hospes_engine::{CpuState, EngineError, Exit, Segment, Vcpu, Vm, cr, reg, seg};
use hospes_engine_bt::exec::Vendor;
use hospes_engine_bt::{BtVm, Execution, Options, Processor};
use hospes_memory::{GuestMemory, MemoryError, Range};
use hospes_units::{Gpa, VcpuId};

use crate::forms::Level;
use crate::layout::{CODE_PAGES, IMAGE_BYTES, PAGE, PAGES, backing};
use crate::program::{Case, Flavour, window};
use crate::state::{Ending, Fpu, Outcome, Regs};
use stub::{FRAME, FS_BASE, GS_BASE, RAX, RCX, RDX, RESUME};
use tables::*;

/// Milliseconds between two looks at whether a case still runs.
const TICK_MS: u64 = 2_000;

/// Vectors that push an error code.
const WITH_ERROR: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17;

#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// The host's processor as it is.
pub struct HostProcessor(pub(crate) Vendor, pub(crate) Level);

impl HostProcessor {
    #[expect(
        clippy::new_without_default,
        reason = "it asks the processor, which a default value should not"
    )]
    pub fn new() -> HostProcessor {
        HostProcessor(host_vendor(), Level::V3)
    }
}

impl Processor for HostProcessor {
    fn cpuid(&self, _vcpu: VcpuId, _cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        let offered = if (leaf, subleaf) == (0xd, 0) {
            r.eax & self.1.xcr0() as u32
        } else {
            r.eax
        };
        [offered, r.ebx, r.ecx, r.edx]
    }

    fn vendor(&self) -> Vendor {
        self.0
    }

    fn arch_capabilities(&self) -> u64 {
        0
    }
}

pub(crate) fn host_vendor() -> Vendor {
    let r = std::arch::x86_64::__cpuid(0);
    if r.ebx.to_le_bytes() == *b"Genu" {
        Vendor::Intel
    } else {
        Vendor::Amd
    }
}

/// Ends a case that runs for too long.
struct Watchdog {
    /// Odd while a case runs.
    sequence: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    fn new(control: Arc<dyn hospes_engine::VcpuControl>) -> Watchdog {
        let sequence = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (s, q) = (sequence.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut last = 0;
            while !q.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_millis(TICK_MS));
                let now = s.load(Ordering::Relaxed);
                if now % 2 == 1 && now == last {
                    control.kick();
                }
                last = now;
            }
        });
        Watchdog {
            sequence,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(t) = self.thread.take() {
            t.thread().unpark();
            // The thread cannot have panicked: it only sleeps and kicks.
            let _ = t.join();
        }
    }
}

/// A guest on one of the engine's ways of executing.
pub struct Guest {
    memory: Arc<GuestMemory>,
    vm: BtVm,
    vcpu: Box<dyn Vcpu>,
    watchdog: Watchdog,
    base: Vec<u8>,
    roots: [u64; 2],
    level: Level,
}

impl Guest {
    /// Makes a guest whose memory begins as `base`.
    pub fn new(base: &[u8], execution: Execution, level: Level) -> Result<Guest, GuestError> {
        let memory = Arc::new(GuestMemory::new(&[Range {
            start: 0,
            end: RAM_BYTES,
        }])?);
        let roots = build(&memory);
        memory.write(Gpa(STUB), &stub::assemble(level.xcr0()))?;
        let options = Options {
            code_bytes: 8 << 20,
            execution,
        };
        let processor = Arc::new(HostProcessor(host_vendor(), level));
        let vm = BtVm::new(memory.clone(), processor, 1, options)?;
        let mut vcpu = vm.create_vcpu(VcpuId(0))?;
        initial_state(vcpu.state(), roots[0], level);
        vcpu.state_changed();
        let watchdog = Watchdog::new(vcpu.control());
        Ok(Guest {
            memory,
            vm,
            vcpu,
            watchdog,
            base: base.to_vec(),
            roots,
            level,
        })
    }

    /// Runs a case. `cold` forgets the TLB before.
    pub fn run(&mut self, case: &Case, cold: bool) -> Result<Outcome, GuestError> {
        self.place(case);
        self.load(&case.regs, case.flavour)?;
        let root = self.roots[usize::from(case.flavour == Flavour::Kernel64)];
        let cpu = self.vcpu.state();
        if cold || cpu.cr3 != root {
            cpu.cr3 = root;
            self.vcpu.state_changed();
        }
        self.watchdog.sequence.fetch_add(1, Ordering::Relaxed);
        let exit = self.vcpu.run();
        self.watchdog.sequence.fetch_add(1, Ordering::Relaxed);
        let ending = match exit? {
            Exit::Hypercall => None,
            Exit::Kicked => Some(Ending::TimedOut),
            other => Some(Ending::Failed(format!("{other:?}"))),
        };
        self.outcome(ending)
    }

    /// Brings the backing pages to what the case begins with.
    fn place(&mut self, case: &Case) {
        let mut image = self.base.clone();
        for (address, bytes) in &case.patches {
            let (at, _) = backing(address - window(*address)).expect("the oracle has checked");
            image[at..at + bytes.len()].copy_from_slice(bytes);
        }
        let mut now = vec![0; PAGE as usize];
        for (n, page) in image.chunks_exact(PAGE as usize).enumerate() {
            let gpa = Gpa(backing_page(n));
            self.memory.read(gpa, &mut now).expect("backing page");
            if now == page {
                continue;
            }
            self.memory.write(gpa, page).expect("backing page");
            if n < CODE_PAGES {
                self.vm.mark_written(gpa, PAGE);
            }
        }
    }

    fn load(&mut self, regs: &Regs, flavour: Flavour) -> Result<(), GuestError> {
        let put = |offset: u64, value: u64| {
            self.memory
                .write(Gpa(CONTEXT + offset), &value.to_le_bytes())
        };
        self.memory.write(Gpa(CONTEXT), &regs.fpu.to_image())?;
        put(FS_BASE, regs.fs_base)?;
        put(GS_BASE, regs.gs_base)?;
        put(RAX, regs.gpr[reg::RAX])?;
        put(RCX, regs.gpr[reg::RCX])?;
        put(RDX, regs.gpr[reg::RDX])?;
        let kernel = flavour == Flavour::Kernel64;
        let cs = if kernel { KERNEL_CS } else { regs.cs };
        let ss = if kernel { KERNEL_SS } else { USER_SS };
        let frame = [
            regs.rip,
            u64::from(cs),
            regs.rflags,
            regs.gpr[reg::RSP],
            u64::from(ss),
        ];
        for (n, value) in frame.into_iter().enumerate() {
            put(FRAME + 8 * n as u64, value)?;
        }
        let cpu = self.vcpu.state();
        cpu.gpr = regs.gpr;
        cpu.gpr[reg::RSP] = KERNEL + CONTEXT + FRAME;
        Ok(())
    }

    fn outcome(&mut self, ending: Option<Ending>) -> Result<Outcome, GuestError> {
        self.vcpu.fetch_fpu();
        let cpu = self.vcpu.state();
        let vector = (cpu.rip.wrapping_sub(KERNEL + STUB)) / 16;
        let mut regs = Regs {
            gpr: cpu.gpr,
            rip: cpu.rip,
            rflags: cpu.rflags,
            fs_base: cpu.seg[seg::FS].base,
            gs_base: cpu.seg[seg::GS].base,
            cs: cpu.seg[seg::CS].selector,
            fpu: Fpu::from_image(&cpu.xsave.0),
        };
        let cr2 = cpu.cr2;
        let rsp = cpu.gpr[reg::RSP];
        let ending = match ending {
            Some(e) => {
                // The vCPU is somewhere in the case: bring it back to the stub.
                let root = cpu.cr3;
                initial_state(cpu, root, self.level);
                self.vcpu.state_changed();
                e
            }
            None if vector >= 32 => Ending::Failed("a VMCALL outside of the handlers".into()),
            None => {
                let error = if WITH_ERROR >> vector & 1 != 0 {
                    self.read(rsp - KERNEL)?
                } else {
                    0
                };
                let frame = STACK_TOP - 40;
                regs.rip = self.read(frame)?;
                regs.cs = self.read(frame + 8)? as u16;
                regs.rflags = self.read(frame + 16)?;
                regs.gpr[reg::RSP] = self.read(frame + 24)?;
                Ending::Exception {
                    vector: vector as u8,
                    error,
                    cr2: if vector == 14 { cr2 } else { 0 },
                }
            }
        };
        let mut memory = vec![0; IMAGE_BYTES];
        for n in 0..PAGES {
            let page = &mut memory[n * PAGE as usize..(n + 1) * PAGE as usize];
            self.memory.read(Gpa(backing_page(n)), page)?;
        }
        Ok(Outcome {
            ending,
            regs,
            memory,
        })
    }

    fn read(&self, gpa: u64) -> Result<u64, GuestError> {
        let mut b = [0; 8];
        self.memory.read(Gpa(gpa), &mut b)?;
        Ok(u64::from_le_bytes(b))
    }
}

/// A kernel as Linux sets the processor up, about to run the stub's tail.
fn initial_state(cpu: &mut CpuState, root: u64, level: Level) {
    let descriptor = |selector: u16, attr: u16| Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attr,
    };
    cpu.rip = KERNEL + STUB + RESUME;
    cpu.rflags = 2;
    cpu.cr0 =
        cr::CR0_PE | cr::CR0_MP | cr::CR0_ET | cr::CR0_NE | cr::CR0_WP | cr::CR0_AM | cr::CR0_PG;
    cpu.cr3 = root;
    cpu.cr4 = cr::CR4_PAE
        | cr::CR4_PGE
        | cr::CR4_OSFXSR
        | cr::CR4_OSXMMEXCPT
        | cr::CR4_UMIP
        | cr::CR4_FSGSBASE
        | cr::CR4_OSXSAVE
        | cr::CR4_SMEP
        | cr::CR4_SMAP;
    cpu.msr.efer = cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
    cpu.xcr0 = level.xcr0();
    cpu.seg = [descriptor(USER_SS, 0xc0f3); 6];
    cpu.seg[seg::CS] = descriptor(KERNEL_CS, 0xa09b);
    cpu.seg[seg::SS] = descriptor(KERNEL_SS, 0xc093);
    for s in [seg::FS, seg::GS] {
        cpu.seg[s] = Segment::default();
    }
    cpu.tr = Segment {
        base: KERNEL + TSS,
        limit: 0x67,
        selector: TSS_SELECTOR,
        attr: 0x8b,
    };
    cpu.gdtr.base = KERNEL + GDT;
    cpu.gdtr.limit = GDT_BYTES - 1;
    cpu.idtr.base = KERNEL + IDT;
    cpu.idtr.limit = IDT_BYTES - 1;
    cpu.dr[6] = 0xffff_0ff0;
    cpu.dr[7] = 0x400;
}
