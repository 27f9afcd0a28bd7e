//! A machine without an engine, for tests: registers, flat memory and controls that record what they are told.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use hospes_engine::{CpuState, Segment, cr, reg, seg};
use hospes_engine_mock::{Control, FlatVcpu, RecordingVm};
use hospes_memory::{GuestMemory, Range};
use hospes_units::{DomId, Gfn, Gpa, VcpuId};

use crate::{Config, E820, Host, Outcome, TrapInstruction, TscRate, Xen, lock};

#[derive(Default)]
pub struct RecordingHost {
    pub wakes: Mutex<Vec<u32>>,
    pub console: Mutex<Vec<u8>>,
    pub watchdog: AtomicBool,
}

impl Host for RecordingHost {
    fn wake(&self, vcpu: VcpuId) {
        lock(&self.wakes).push(vcpu.0);
    }

    fn console_write(&self, bytes: &[u8]) {
        lock(&self.console).extend(bytes);
    }

    fn watchdog_expired(&self) -> bool {
        self.watchdog.store(true, SeqCst);
        true
    }
}

/// A domain with 1 MiB of memory.
pub struct Machine {
    pub xen: Arc<Xen>,
    pub vm: Arc<RecordingVm>,
    pub host: Arc<RecordingHost>,
    pub vcpus: Vec<FlatVcpu>,
}

/// Where tests put arguments.
pub const ARG: u64 = 0x8000;

impl Machine {
    pub fn new(vcpus: u32) -> Machine {
        Machine::with_pages(vcpus, 256)
    }

    /// One that may have so many of its 256 pages.
    pub fn with_pages(vcpus: u32, pages: u64) -> Machine {
        let memory = Arc::new(
            GuestMemory::new(&[Range {
                start: 0,
                end: 0x10_0000,
            }])
            .unwrap(),
        );
        let config = Config {
            domid: DomId(7),
            uuid: *b"0123456789abcdef",
            vcpus,
            trap: TrapInstruction::Vmcall,
            memory_map: vec![E820 {
                addr: 0,
                size: 0x10_0000,
                kind: 1,
            }],
            ram_pages: 256,
            pages,
            store_gfn: Gfn(0xc),
            console_gfn: Gfn(0xd),
            grant_frames: 64,
            tsc: TscRate { hz: 2e9 },
            system_time_ns: 0,
        };
        let vm = Arc::new(RecordingVm::default());
        let host = Arc::new(RecordingHost::default());
        let xen = Xen::new(config, memory.clone(), vm.clone(), host.clone()).unwrap();
        let vcpus = (0..vcpus)
            .map(|id| {
                let mut state = CpuState {
                    cr0: cr::CR0_PE | cr::CR0_PG,
                    ..CpuState::default()
                };
                state.msr.efer = cr::EFER_LMA | cr::EFER_LME;
                state.seg[seg::CS].attr = 0x9b | Segment::ATTR_L;
                state.seg[seg::SS].attr = 0x93;
                let control = Arc::new(Control::default());
                xen.attach_vcpu(VcpuId(id), control.clone());
                FlatVcpu {
                    state,
                    control,
                    memory: memory.clone(),
                }
            })
            .collect();
        Machine {
            xen,
            vm,
            host,
            vcpus,
        }
    }

    /// A hypercall of a vCPU; the result of RAX and what its thread shall do.
    pub fn call_on(&mut self, id: usize, number: u64, args: [u64; 3]) -> (i64, Outcome) {
        let vcpu = &mut self.vcpus[id];
        vcpu.state.gpr[reg::RAX] = number;
        vcpu.state.gpr[reg::RDI] = args[0];
        vcpu.state.gpr[reg::RSI] = args[1];
        vcpu.state.gpr[reg::RDX] = args[2];
        let outcome = self.xen.hypercall(vcpu, VcpuId(id as u32));
        (vcpu.state.gpr[reg::RAX] as i64, outcome)
    }

    pub fn call(&mut self, number: u64, args: [u64; 3]) -> i64 {
        self.call_on(0, number, args).0
    }

    /// A call whose argument is one structure at [`ARG`]; the structure comes back as the call left it.
    pub fn call_with<T>(&mut self, number: u64, cmd: u64, arg: &mut T) -> i64
    where
        T: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable,
    {
        let memory = self.xen.memory().clone();
        memory.write_obj(Gpa(ARG), arg).unwrap();
        let result = self.call(number, [cmd, ARG, 1]);
        *arg = memory.read_obj(Gpa(ARG)).unwrap();
        result
    }

    pub fn interrupts(&self, id: usize) -> Vec<u8> {
        std::mem::take(&mut *lock(&self.vcpus[id].control.interrupts))
    }
}
