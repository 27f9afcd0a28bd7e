//! An engine that runs a script in place of a guest's kernel, and a kernel file that the builder accepts.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};

use hospes_engine::{
    Activity, CpuState, EngineError, Exit, Vcpu, VcpuControl, VirtFault, Vm, Waker, reg, rflags,
};
use hospes_memory::{FrameSet, GuestMemory};
use hospes_units::{Gpa, Gva, VcpuId};
use hospes_xen_abi::{event, hypercall as nr, sched};

use crate::lock;

/// What a scripted vCPU may use.
pub struct Cpu<'a> {
    pub id: u32,
    pub state: &'a mut CpuState,
    pub memory: &'a GuestMemory,
    /// How often the script was asked before.
    pub step: u32,
}

impl Cpu<'_> {
    /// A hypercall with its argument in memory.
    pub fn call<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &mut self,
        number: u64,
        cmd: u64,
        arg: &T,
    ) -> Exit {
        self.memory.write_obj(Gpa(ARG), arg).unwrap();
        self.state.gpr[reg::RAX] = number;
        self.state.gpr[reg::RDI] = cmd;
        self.state.gpr[reg::RSI] = ARG;
        // The scripts run in the boot state, which is 32-bit code.
        self.state.gpr[reg::RBX] = cmd;
        self.state.gpr[reg::RCX] = ARG;
        Exit::Hypercall
    }

    pub fn shutdown(&mut self, reason: u32) -> Exit {
        self.call(nr::SCHED_OP, sched::SHUTDOWN, &reason)
    }

    pub fn send(&mut self, port: u32) -> Exit {
        self.call(nr::EVENT_CHANNEL_OP, event::SEND, &port)
    }

    pub fn word(&self, gpa: u64) -> u32 {
        self.memory.read_obj(Gpa(gpa)).unwrap()
    }
}

pub const ARG: u64 = 0x3000;
pub const CONSOLE: u64 = 0xfefff << 12;
pub const STORE: u64 = 0xfeffc << 12;
pub const STORE_PORT: u32 = 1;
pub const CONSOLE_PORT: u32 = 2;

pub type ScriptFn = dyn FnMut(&mut Cpu<'_>) -> Result<Exit, EngineError> + Send;
pub type Script = Arc<Mutex<Box<ScriptFn>>>;

#[derive(Default)]
struct Control {
    kicked: AtomicBool,
    interrupt: AtomicU32,
    nmi: AtomicBool,
    waker: OnceLock<Waker>,
}

impl Control {
    fn wake(&self) {
        if let Some(wake) = self.waker.get() {
            wake();
        }
    }
}

impl VcpuControl for Control {
    fn set_waker(&self, waker: Waker) {
        let _ = self.waker.set(waker);
    }

    fn kick(&self) {
        self.kicked.store(true, SeqCst);
        self.wake();
    }

    fn raise_interrupt(&self, vector: u8) -> bool {
        self.interrupt.store(u32::from(vector), SeqCst);
        self.wake();
        true
    }

    fn set_callback_line(&self, vector: Option<u8>) {
        self.interrupt.store(vector.map_or(0, u32::from), SeqCst);
        self.wake();
    }

    fn raise_nmi(&self) {
        self.nmi.store(true, SeqCst);
        self.wake();
    }

    fn has_wakeup(&self, interrupts_enabled: bool) -> bool {
        self.kicked.load(SeqCst)
            || interrupts_enabled && self.interrupt.load(SeqCst) != 0
            || self.nmi.load(SeqCst)
    }
}

struct ScriptVcpu {
    id: VcpuId,
    state: CpuState,
    control: Arc<Control>,
    memory: Arc<GuestMemory>,
    script: Script,
    step: u32,
    /// Interrupts that were taken in and not delivered; [`Control`] knows no more of them.
    interrupts: bool,
}

impl Vcpu for ScriptVcpu {
    fn run(&mut self) -> Result<Exit, EngineError> {
        if self.control.kicked.swap(false, SeqCst) {
            return Ok(Exit::Kicked);
        }
        let enabled = self.state.rflags & rflags::IF != 0;
        self.interrupts |= self.control.interrupt.swap(0, SeqCst) != 0;
        let nmi = self.control.nmi.swap(false, SeqCst);
        let woken = nmi || enabled && std::mem::take(&mut self.interrupts);
        if self.state.activity != Activity::Running && !woken {
            return Ok(Exit::Halt {
                interrupts_enabled: enabled,
            });
        }
        self.state.activity = Activity::Running;
        let mut cpu = Cpu {
            id: self.id.0,
            state: &mut self.state,
            memory: &self.memory,
            step: self.step,
        };
        self.step += 1;
        let exit = (lock(&self.script))(&mut cpu)?;
        if matches!(exit, Exit::Halt { .. }) {
            self.state.activity = Activity::Halted;
        }
        Ok(exit)
    }

    fn state(&mut self) -> &mut CpuState {
        &mut self.state
    }

    fn fetch_fpu(&mut self) {}

    fn state_changed(&mut self) {}

    fn control(&self) -> Arc<dyn VcpuControl> {
        self.control.clone()
    }

    fn read_virt(&mut self, gva: Gva, buf: &mut [u8]) -> Result<(), VirtFault> {
        self.memory
            .read(Gpa(gva.0), buf)
            .map_err(|_| VirtFault { gva })
    }

    fn write_virt(&mut self, gva: Gva, buf: &[u8]) -> Result<(), VirtFault> {
        self.memory
            .write(Gpa(gva.0), buf)
            .map_err(|_| VirtFault { gva })
    }

    fn translate(&mut self, gva: Gva) -> Option<Gpa> {
        Some(Gpa(gva.0))
    }
}

pub struct ScriptVm {
    pub memory: Arc<GuestMemory>,
    pub script: Script,
}

impl Vm for ScriptVm {
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(ScriptVcpu {
            id,
            state: CpuState::default(),
            control: Arc::default(),
            memory: self.memory.clone(),
            script: self.script.clone(),
            step: 0,
            interrupts: false,
        }))
    }

    fn mark_written(&self, gpa: Gpa, len: u64) {
        self.memory.log().note_written(gpa, len);
    }

    fn begin_round(&self) -> FrameSet {
        // Scripts write through the memory's own methods, which note it.
        self.memory.log().begin_round()
    }

    fn end_rounds(&self) {
        self.memory.log().end();
    }
}

/// The smallest kernel that the builder accepts: one page at 1 MiB and the note with its entry.
pub fn kernel() -> Vec<u8> {
    const ENTRY: u64 = 0x10_0000;
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend((ENTRY as u32).to_le_bytes());
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    for half in [2u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    let offset = 64 + 2 * 56;
    for (kind, at, size) in [(1u32, ENTRY, 4096u64), (4, ENTRY, note.len() as u64)] {
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        for word in [offset, at, at, note.len() as u64, size, 4] {
            elf.extend(word.to_le_bytes());
        }
    }
    elf.extend(note);
    elf
}
