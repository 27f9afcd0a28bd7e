//! One vCPU: the loop that finds, enters and leaves translated code.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hospes_engine::{Activity, CpuState, EngineError, Exit, Segment, Stay, Vcpu, VcpuControl};
use hospes_engine::{VirtFault, cr, rflags, seg};
use hospes_translate::Mode;
use hospes_units::{Gpa, Gva, PAGE_SIZE, VcpuId};

use crate::control::{Control, request};
use crate::exec::{self, Access, Exception, Step, debug_active, lapic};
use crate::flat::{flat, whole_data};
use crate::fpu::{self, Wide};
use crate::frame::FrameBox;
use crate::host::BtHost;
use crate::lookup::{By, MAX_INSTRUCTION};
use crate::signal::{Attachment, Detour, ThreadInfo, kick_signal};
use crate::stubs::{ExitKind, enter};
use crate::vm::{Execution, Shared, host_error};

/// How often a guest executes PAUSE before it is taken to wait for a vCPU whose thread does not run: some microseconds, as processors that look
/// for such loops do.
const PAUSES: u32 = 256;

/// Where a program counter's code is.
pub(crate) enum Found {
    /// Position of the direct entry.
    Code(u32),
    /// The guest took a fault or an instruction was executed instead.
    Stepped(Step),
}

/// Flags that SFMASK must clear for SYSCALL to be emitted in place.
const SYSCALL_CLEARS: u64 =
    rflags::STATUS | rflags::IF | rflags::TF | rflags::DF | rflags::NT | rflags::AC;

pub(crate) struct BtVcpu {
    pub(crate) host: BtHost,
    attachment: Option<SendAttachment>,
    /// The XSAVE image is current.
    fpu_fetched: bool,
    /// Where guest code is copied to for translation: a page and what an instruction may reach into the next.
    pub(crate) page: Vec<u8>,
}

/// The vCPU belongs to the thread that first runs it; the attachment is made and dropped there.
struct SendAttachment(Attachment);

// SAFETY: `BtVcpu::run` refuses other threads once attached; dropping elsewhere only frees the stack's memory and clears that thread's own (unset) pointer.
unsafe impl Send for SendAttachment {}

impl BtVcpu {
    pub fn new(
        shared: Arc<Shared>,
        id: VcpuId,
        control: Arc<Control>,
    ) -> Result<BtVcpu, EngineError> {
        let stub = |at: i64| shared.code.address(at as usize) as u64;
        let miss = shared.stubs.jump_miss.map(stub);
        let mut frame =
            FrameBox::new(miss, shared.wide).map_err(|e| host_error("memory for a vCPU", e))?;
        frame.pauses_left = PAUSES;
        frame.memory = shared.memory_for_walks();
        Ok(BtVcpu {
            host: BtHost::new(shared, id, control, frame, miss),
            attachment: None,
            fpu_fetched: false,
            page: vec![0; PAGE_SIZE as usize + MAX_INSTRUCTION],
        })
    }

    fn attach(&mut self) -> Result<(), EngineError> {
        if let Some(a) = &self.attachment {
            if a.0.is_of_this_thread() {
                return Ok(());
            }
            return Err(EngineError::Internal {
                engine: "bt",
                rip: self.host.frame.cpu.rip,
                what: "a vCPU was run by a second thread".into(),
            });
        }
        let s = &self.host.shared;
        let range =
            |r: std::ops::Range<usize>| s.code.address(r.start)..s.code.address(r.end - 1) + 1;
        let info = ThreadInfo {
            frame: self.host.frame.as_ptr(),
            blocks: range(crate::cache::STUB_BYTES..s.snippets(VcpuId(0)).start),
            enter_checked: range(s.points.enter_checked..s.points.enter_end),
            leave: s.code.address(s.points.leave),
            turned_back: s.code.address(s.points.turned_back),
            detours: [&s.points.second, &s.points.refill, &s.points.cached].map(|d| Detour {
                code: range(d.code.clone()),
                failed: s.code.address(d.failed),
            }),
            snippets: range(s.snippets(self.host.id)),
        };
        let attachment = Attachment::new(info).map_err(|e| host_error("signal set-up", e))?;
        // SAFETY: the frame is mapped; only an address is formed.
        let busy = unsafe { &raw mut (*self.host.frame.as_ptr()).busy };
        self.host.control.attach(attachment.tid, busy);
        self.attachment = Some(SendAttachment(attachment));
        self.host.attached = true;
        fpu::load(&mut self.host.frame);
        Ok(())
    }

    /// The parts of the mode that translations depend on; `None` where code is not translated at all.
    pub(crate) fn mode(&self) -> Option<Mode> {
        let cpu = &self.host.frame.cpu;
        let mut bits = 0;
        match cpu.code_bits() {
            64 => bits |= Mode::LONG,
            32 if flat(cpu) => {
                for (s, bit) in [(seg::FS, Mode::FS_DATA), (seg::GS, Mode::GS_DATA)] {
                    if whole_data(&cpu.seg[s]) {
                        bits |= bit;
                    }
                }
            }
            _ => return None,
        }
        let user = cpu.cpl() == 3;
        if user {
            bits |= Mode::USER;
            if cpu.rflags & rflags::AC != 0 && cpu.cr0 & cr::CR0_AM != 0 {
                return None;
            }
        } else {
            if cpu.cpl() != 0 {
                return None;
            }
            if cpu.rflags & rflags::AC != 0 {
                bits |= Mode::AC;
            }
        }
        let fpu = cpu.cr0 & (cr::CR0_TS | cr::CR0_EM) == 0 && cpu.cr4 & cr::CR4_OSFXSR != 0;
        if fpu {
            bits |= Mode::FPU;
            if cpu.cr4 & cr::CR4_OSXSAVE != 0 && cpu.xcr0 & 6 == 6 {
                bits |= Mode::AVX;
                let wide = Wide::XCR0;
                if cpu.xcr0 & wide == wide && self.host.shared.wide.is_some() {
                    bits |= Mode::AVX512;
                }
            }
        }
        if cpu.msr.tsc_offset == 0 && (!user || cpu.cr4 & cr::CR4_TSD == 0) {
            bits |= Mode::TSC;
        }
        if cpu.cr4 & cr::CR4_FSGSBASE != 0 {
            bits |= Mode::FSGSBASE;
        }
        if cpu.cr0 & cr::CR0_PG == 0 {
            bits |= Mode::UNPAGED;
        }
        if cpu.msr.efer & cr::EFER_SCE != 0 && cpu.msr.sfmask & SYSCALL_CLEARS == SYSCALL_CLEARS {
            bits |= Mode::SYSCALL;
        }
        Some(Mode(bits))
    }

    pub(crate) fn step(&mut self) -> Step {
        self.host.steps += 1;
        let user = self.host.frame.cpu.cpl() == 3;
        let cpu = self.host.cpu_ptr();
        // SAFETY: the frame is mapped. While the state is lent out, the host part changes it only where it is handed on to it (`run_native`, `load_fpu`,
        // `store_fpu`); elsewhere it reads it or touches other fields of the frame.
        let step = exec::step(unsafe { &mut *cpu }, &mut self.host);
        if user && self.host.frame.cpu.cpl() != 3 {
            self.count_visit();
        }
        step
    }

    /// User code has entered its kernel by itself.
    fn count_visit(&mut self) {
        let visits = &mut self.host.frame.kernel_visits;
        *visits = visits.wrapping_add(1);
    }

    pub(crate) fn raise(&mut self, e: Exception) -> Step {
        if self.host.frame.cpu.cpl() == 3 {
            self.count_visit();
        }
        let cpu = self.host.cpu_ptr();
        // SAFETY: as in `step`.
        exec::deliver_exception(unsafe { &mut *cpu }, &mut self.host, e)
    }

    /// Enters translated code at a position and deals with what it leaves for. `Ok(None)` means that the loop goes on.
    fn execute(&mut self, pos: u32) -> Result<Option<Exit>, EngineError> {
        // RF ends with the next instruction, and without breakpoints it means nothing to that one. PUSHF must not show it.
        self.host.frame.cpu.rflags &= !rflags::RF;
        let kind = self.host.enter(pos as usize);
        match kind {
            ExitKind::Lookup => {
                // Perhaps through the stale stub of a dropped block: whatever is remembered of this address is not to be trusted.
                let rip = self.host.frame.cpu.rip;
                self.host.jumps.forget(&mut self.host.frame, rip);
                Ok(None)
            }
            ExitKind::Step => {
                let exit = self.after(|s| s.step());
                if exit.is_none() && self.host.frame.pauses_left == 0 {
                    self.host.frame.pauses_left = PAUSES;
                    return Ok(Some(Exit::Yield));
                }
                Ok(exit)
            }
            ExitKind::Chain => {
                let site = self.host.frame.exit_arg;
                Ok(self.chain(site))
            }
            ExitKind::Mem => Ok(self.missed_access()),
            ExitKind::Signal => Ok(self.interrupted()),
            ExitKind::TurnedBack => {
                // Nothing has been executed: the state is that of the position we wanted to enter.
                self.locate(pos, None);
                Ok(None)
            }
            ExitKind::Native => Err(self.internal("a block left as a snippet")),
        }
    }

    fn internal(&self, what: &str) -> EngineError {
        EngineError::Internal {
            engine: "bt",
            rip: self.host.frame.cpu.rip,
            what: what.to_owned(),
        }
    }

    pub(crate) fn after(&mut self, f: impl FnOnce(&mut Self) -> Step) -> Option<Exit> {
        match f(self) {
            Step::Continue => None,
            Step::Exit(e) => Some(e),
        }
    }

    /// Sets RIP (and, where `raw` is given, the registers) to the guest's state at a code cache position.
    pub(crate) fn locate(&mut self, pos: u32, raw: Option<()>) {
        let shared = self.host.shared.clone();
        let guard = shared.translations.lock().expect("translations");
        let point = guard
            .blocks
            .point(self.host.blocks_generation, pos)
            .expect("code in the cache belongs to a block");
        drop(guard);
        let frame = &mut *self.host.frame;
        if let Some(rip) = point.rip {
            frame.cpu.rip = rip;
        }
        frame.cpu.interrupt_shadow = point.in_shadow;
        if raw.is_some() {
            for r in 0..16 {
                if point.spilled & 1 << r == 0 {
                    frame.cpu.gpr[r] = frame.raw[r];
                }
            }
            if !point.flags_saved {
                frame.flags = pack_flags(frame.raw_flags);
            }
            self.host.sync_flags_in();
        }
    }

    fn interrupted(&mut self) -> Option<Exit> {
        let frame = &mut self.host.frame;
        let signal = frame.raw_signal;
        // The PAUSE that was to be the engine's is executed, and counted, once more.
        frame.pauses_left = frame.pauses_left.max(1);
        let raw_pc = frame.raw_pc as usize;
        let pos = self
            .host
            .shared
            .code
            .position(raw_pc)
            .expect("the handler checked the range") as u32;
        self.locate(pos, Some(()));
        if signal == kick_signal() {
            return None;
        }
        if signal == libc::SIGSEGV && !self.explain_fault(pos) {
            return None;
        }
        self.host.frame.cpu.interrupt_shadow = false;
        self.after(|s| s.step())
    }

    /// Handles what others have asked for. True if `run` has to return.
    fn requests(&mut self) -> bool {
        let bits = self.host.control.take();
        if bits == 0 {
            return false;
        }
        if bits & request::WRITE_TAGS != 0 {
            self.host.drop_all_write_tags();
        }
        if bits & request::JUMPS != 0 {
            // Whoever posted it has the tables until they are empty.
            let shared = self.host.shared.clone();
            let mut guard = shared.translations.lock().expect("translations");
            self.host.keep_needed(&mut guard.blocks);
        }
        if bits & request::TLB != 0 {
            self.host.flush_all();
        }
        if bits & request::INIT != 0 {
            self.init();
        }
        if bits & request::SIPI != 0 && self.host.frame.cpu.activity == Activity::WaitForSipi {
            let vector = self.host.control.startup_vector();
            let cpu = &mut self.host.frame.cpu;
            cpu.activity = Activity::Running;
            cpu.rip = 0;
            cpu.seg[seg::CS].selector = u16::from(vector) << 8;
            cpu.seg[seg::CS].base = u64::from(vector) << 12;
        }
        if bits & (request::INTERRUPT | request::KICK) != 0 {
            let c = self.host.control.clone();
            c.take_interrupts(&mut self.host.frame.cpu.lapic.irr);
            if c.take_nmi() {
                self.host.frame.cpu.nmi_pending = true;
            }
        }
        bits & request::KICK != 0
    }

    /// INIT: the vCPU waits for a start-up interrupt with the registers of a reset.
    fn init(&mut self) {
        let old = &self.host.frame.cpu;
        let (lapic_id, msr, xsave) = (old.lapic.id, old.msr, old.xsave.clone());
        let mut cpu = CpuState {
            activity: Activity::WaitForSipi,
            xsave,
            xcr0: 1,
            cr0: cr::CR0_ET | cr::CR0_CD | cr::CR0_NW,
            ..CpuState::default()
        };
        cpu.lapic.id = lapic_id;
        cpu.msr = msr;
        cpu.msr.efer = 0;
        cpu.rflags = rflags::FIXED;
        cpu.dr[6] = 0xffff_0ff0;
        cpu.dr[7] = 0x400;
        for (n, s) in cpu.seg.iter_mut().enumerate() {
            s.limit = 0xffff;
            s.attr = if n == seg::CS { 0x9b } else { 0x93 };
        }
        cpu.ldtr = Segment {
            limit: 0xffff,
            attr: 0x82,
            ..Segment::default()
        };
        cpu.tr = Segment {
            limit: 0xffff,
            attr: 0x8b,
            ..Segment::default()
        };
        self.host.frame.cpu = cpu;
        let control = self.host.control.clone();
        control.set_apic_enabled(false);
        control.take_interrupts(&mut Default::default());
        self.host.flush_all();
    }

    /// Delivers the most urgent event that may be taken now; otherwise remembers that one waits.
    fn events(&mut self) -> Option<Step> {
        let callback = self.host.control.callback();
        let cpu = &self.host.frame.cpu;
        if cpu.activity == Activity::WaitForSipi {
            return None;
        }
        let vector = lapic::pending_vector(&cpu.lapic);
        if cpu.nmi_pending && !cpu.nmi_blocked && !cpu.interrupt_shadow {
            self.host.frame.cpu.nmi_pending = false;
            return Some(self.interrupt(exec::vector::NMI, true));
        }
        if vector.is_none() && callback.is_none() {
            self.host.frame.irq_pending = 0;
            return None;
        }
        if cpu.rflags & rflags::IF == 0 || cpu.interrupt_shadow {
            self.host.frame.irq_pending = 1;
            return None;
        }
        if let Some(v) = callback {
            // Whoever asserted it does so again while the guest has not seen to the cause.
            self.host.control.set_callback_line(None);
            return Some(self.interrupt(v, false));
        }
        let v = vector?;
        lapic::accept(&mut self.host.frame.cpu.lapic, v);
        self.host.frame.irq_pending =
            u8::from(lapic::pending_vector(&self.host.frame.cpu.lapic).is_some());
        Some(self.interrupt(v, false))
    }

    fn interrupt(&mut self, vector: u8, nmi: bool) -> Step {
        self.direct_tick();
        self.host.frame.cpu.activity = Activity::Running;
        self.host.resume_at = None;
        let cpu = self.host.cpu_ptr();
        // SAFETY: as in `step`.
        exec::deliver_interrupt(unsafe { &mut *cpu }, &mut self.host, vector, nmi)
    }

    fn run_loop(&mut self) -> Result<Exit, EngineError> {
        loop {
            self.host.frame.turn_back.store(0, Ordering::Relaxed);
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
            if self.host.control.has_requests() {
                // A position to go on at is only good for going on at once.
                if let Some(pos) = self.host.resume_at.take() {
                    self.locate(pos, None);
                }
                if self.requests() {
                    return Ok(Exit::Kicked);
                }
            }
            if let Some(pos) = self.host.resume_at.take() {
                if let Some(exit) = self.execute(pos)? {
                    return Ok(exit);
                }
                continue;
            }
            if let Some(step) = self.events() {
                if let Step::Exit(e) = step {
                    return Ok(e);
                }
                continue;
            }
            match self.host.frame.cpu.activity {
                Activity::Running => {}
                Activity::Halted | Activity::WaitForSipi => {
                    let on = self.host.frame.cpu.rflags & rflags::IF != 0
                        && self.host.frame.cpu.activity == Activity::Halted;
                    return Ok(Exit::Halt {
                        interrupts_enabled: on,
                    });
                }
            }
            if self.direct_ready() {
                if let Some(exit) = self.run_direct()? {
                    return Ok(exit);
                }
                continue;
            }
            let cpu = &self.host.frame.cpu;
            let mode = if self.host.shared.options.execution == Execution::Single
                || cpu.interrupt_shadow
                || debug_active(cpu)
            {
                None
            } else {
                self.mode()
            };
            let exit = match mode {
                None => self.after(|s| s.step()),
                Some(mode) => match self.find_code(mode, By::Lookup) {
                    Found::Code(pos) => self.execute(pos)?,
                    Found::Stepped(step) => self.after(|_| step),
                },
            };
            match exit {
                None => {}
                Some(Exit::Halt { .. }) => self.host.frame.cpu.activity = Activity::Halted,
                Some(exit) => return Ok(exit),
            }
        }
    }
}

pub(crate) fn canonical(address: u64) -> bool {
    (address << 16) as i64 >> 16 == address as i64
}

/// EFLAGS to the frame's form: AL = OF, AH = the low byte.
pub(crate) fn pack_flags(eflags: u64) -> u16 {
    ((eflags & 0xd5) as u16) << 8 | 0x200 | (eflags >> 11 & 1) as u16
}

impl Vcpu for BtVcpu {
    fn run(&mut self) -> Result<Exit, EngineError> {
        self.attach()?;
        self.fpu_fetched = false;
        self.host.sync_flags_out();
        self.host
            .control
            .hold_positions(self.host.blocks_generation);
        self.host.control.enter_run();
        let exit = self.run_loop();
        self.host.control.leave_run();
        exit
    }

    fn set_stay(&mut self, stay: Stay) {
        self.host.direct.stay = Some(stay);
    }

    fn state(&mut self) -> &mut CpuState {
        &mut self.host.frame.cpu
    }

    fn fetch_fpu(&mut self) {
        if self.host.attached && !self.fpu_fetched {
            fpu::store(&mut self.host.frame);
            self.fpu_fetched = true;
        }
    }

    fn state_changed(&mut self) {
        if self.host.attached && self.fpu_fetched {
            fpu::load(&mut self.host.frame);
        }
        let enabled = lapic::enabled(&self.host.frame.cpu.lapic);
        self.host.control.set_apic_enabled(enabled);
        self.host.sync_flags_out();
        self.host.flush_all();
    }

    fn control(&self) -> Arc<dyn VcpuControl> {
        self.host.control.clone()
    }

    fn read_virt(&mut self, gva: Gva, buf: &mut [u8]) -> Result<(), VirtFault> {
        self.host
            .copy_virt(gva, buf.len(), Access::read(false), |memory, gpa, range| {
                memory.read(gpa, &mut buf[range]).is_ok()
            })
    }

    fn write_virt(&mut self, gva: Gva, buf: &[u8]) -> Result<(), VirtFault> {
        self.host.copy_virt(
            gva,
            buf.len(),
            Access::write(false),
            |memory, gpa, range| memory.write(gpa, &buf[range]).is_ok(),
        )
    }

    fn translate(&mut self, gva: Gva) -> Option<Gpa> {
        self.host.translate_as_kernel(gva, Access::read(false)).ok()
    }
}

impl Drop for BtVcpu {
    fn drop(&mut self) {
        let mut controls = self.host.shared.controls.write().expect("vCPU list");
        controls.retain(|(id, _)| *id != self.host.id);
    }
}

/// Enters the code cache at a position.
pub(crate) fn call(shared: &Shared, pos: usize) -> ExitKind {
    // SAFETY: the vCPU is attached to this thread, so GS and the handlers are set; `pos` is an entry point whose conventions the callers keep.
    unsafe {
        enter(
            shared.code.address(shared.points.enter),
            shared.code.address(pos),
        )
    }
}
