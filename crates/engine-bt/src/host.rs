//! What the instruction semantics find around them: TLBs, jump caches, native execution.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use hospes_engine::{CpuState, Segment, VcpuControl, VirtFault, rflags};
use hospes_memory::GuestMemory;
use hospes_translate::Mode;
use hospes_units::{Gpa, Gva, PAGE_SIZE, VcpuId};
use iced_x86::{Instruction, Mnemonic};

use crate::blocks::{Blocks, Key};
use crate::control::{Control, request};
use crate::direct::Direct;
use crate::exec::{
    Access, Decoded, Delivery, Host, Ipi, NativeFault, Operand, PageFault, Shorthand, TlbFlush,
    Vendor, lapic, vector, walk,
};
use crate::fpu;
use crate::frame::FrameBox;
use crate::jumps::{Entry, Jumps, Mapping};
use crate::kernel_window::{Asker, KernelWindow};
use crate::parked::Parked;
use crate::signal::kick_signal;
use crate::stubs::ExitKind;
use crate::vcpu::{call, canonical, pack_flags};
use crate::vm::Shared;
use crate::window::{Holes, Window};

/// The part of a vCPU that serves its instructions.
pub(crate) struct BtHost {
    pub shared: Arc<Shared>,
    pub id: VcpuId,
    pub control: Arc<Control>,
    pub frame: FrameBox,
    pub jumps: Jumps,
    pub direct: Direct,
    /// x87 state is in the processor, vector state in the frame, and not in the XSAVE image.
    pub attached: bool,
    /// Position in the code cache to go on at, instead of looking RIP up.
    pub resume_at: Option<u32>,
    /// Counts how often the whole cache was thrown away.
    pub generation: u64,
    /// The generation of blocks that the positions this vCPU has belong to.
    pub blocks_generation: u64,
    /// Counts writes of this vCPU that dropped blocks.
    pub dropped_blocks: u64,
    /// Instructions executed one at a time.
    pub steps: u64,
    /// The STAR register that the frame's segment images were made from.
    star: Option<u64>,
    /// Gigabytes of address space in which large pages stand behind some entries.
    pub(crate) large: [Vec<u64>; 3],
    /// Made when the first atomic access crosses pages.
    window: Option<Window>,
    /// Made when the first masked access reaches a missing page.
    holes: Option<Holes>,
    /// The address space that the frame's tables are of, and others.
    pub(crate) pcid: u16,
    pub(crate) parked: Parked,
    /// The current space has been current before: others, as those of processes that only start a program, are not worth keeping.
    pub(crate) came_back: bool,
    decoded: Decoded,
    snippets: HashMap<Instruction, usize>,
    snippet_next: usize,
}

impl BtHost {
    pub fn new(
        shared: Arc<Shared>,
        id: VcpuId,
        control: Arc<Control>,
        frame: FrameBox,
        miss: [u64; 3],
    ) -> BtHost {
        let snippet_next = shared.snippets(id).start;
        let direct = Direct::new(shared.options.execution, shared.wide);
        BtHost {
            shared,
            id,
            control,
            frame,
            jumps: Jumps::new(miss),
            direct,
            attached: false,
            resume_at: None,
            generation: 0,
            blocks_generation: 0,
            dropped_blocks: 0,
            steps: 0,
            star: None,
            large: Default::default(),
            window: None,
            holes: None,
            pcid: 0,
            parked: Parked::default(),
            came_back: false,
            decoded: Decoded::default(),
            snippets: HashMap::new(),
            snippet_next,
        }
    }

    /// The CPU state, for lending it out beside the rest. The rest touches other fields of the frame only, or goes through the entry code.
    pub fn cpu_ptr(&self) -> *mut CpuState {
        // SAFETY: the frame is mapped; only an address is formed.
        unsafe { &raw mut (*self.frame.as_ptr()).cpu }
    }

    /// Lends the kernel window what it has to know of this vCPU.
    pub fn with_asker<T>(&self, f: impl FnOnce(&KernelWindow, &Asker<'_>) -> T) -> T {
        let s = &*self.shared;
        let roots = |each: &mut dyn FnMut(u64)| {
            let controls = s.controls.read().expect("vCPU list");
            controls.iter().for_each(|(_, c)| each(c.root()));
        };
        let asker = Asker {
            cpu: &self.frame.cpu,
            memory: &s.memory,
            pages: &s.pages,
            roots: &roots,
        };
        f(&s.window, &asker)
    }

    /// Enters translated code, unless a request waits; flags are synchronised on both sides.
    pub fn enter(&mut self, pos: usize) -> ExitKind {
        self.control.enter_code();
        // Whoever posts a request now sees that we are inside and sends a signal; who did before is seen here.
        if self.control.has_requests() {
            self.control.leave_code();
            return ExitKind::TurnedBack;
        }
        self.run_code(pos)
    }

    fn run_code(&mut self, pos: usize) -> ExitKind {
        self.sync_flags_out();
        self.control.enter_more_code();
        let kind = call(&self.shared, pos);
        self.control.leave_code();
        self.sync_flags_in();
        kind
    }

    /// Frame flags to RFLAGS.
    pub fn sync_flags_in(&mut self) {
        let f = &mut *self.frame;
        let status = u64::from(f.flags >> 8) & 0xd5 | u64::from(f.flags & 1) << 11;
        f.cpu.rflags = f.rest_flags | status | u64::from(f.interrupt_flag) | u64::from(f.ac_flag);
    }

    /// RFLAGS to the frame's flags.
    pub fn sync_flags_out(&mut self) {
        let f = &mut *self.frame;
        let all = f.cpu.rflags;
        f.flags = pack_flags(all);
        f.interrupt_flag = (all & rflags::IF) as u32;
        f.ac_flag = (all & rflags::AC) as u32;
        f.rest_flags = all & !(rflags::STATUS | rflags::IF | rflags::AC);
    }

    /// Keeps what SYSCALL and SYSRET load in step with the STAR register.
    pub fn update_syscall_segments(&mut self) {
        let f = &mut *self.frame;
        let star = f.cpu.msr.star;
        if self.star == Some(star) {
            return;
        }
        self.star = Some(star);
        let segment = |selector: u64, attr: u16| Segment {
            base: 0,
            limit: u32::MAX,
            selector: selector as u16,
            attr,
        };
        let (enter, leave) = ((star >> 32) as u16 & !3, (star >> 48) as u16 | 3);
        f.syscall_cs_ss = [
            segment(enter.into(), 0xa09b),
            segment(enter.wrapping_add(8).into(), 0xc093),
        ];
        f.sysret_cs_ss = [
            segment(leave.wrapping_add(16).into(), 0xa0fb),
            segment(leave.wrapping_add(8).into(), 0xc0f3),
        ];
    }

    /// Makes a block known to jumps to its address; code that does without groups is not for those.
    pub fn add_jump(&mut self, mode: Mode, pc: u64, direct: u32, indirect: u32, mapping: Mapping) {
        if self.holds_jumps(mode) {
            return;
        }
        let address = self.shared.code.address(indirect as usize) as u64;
        let entry = Entry { pc, direct, mode };
        self.jumps.add(&mut self.frame, entry, address, mapping);
    }

    fn holds_jumps(&self, mode: Mode) -> bool {
        mode.has(Mode::SINGLE) || mode.has(Mode::USER) && self.direct.hold_jumps
    }

    /// Makes known where jumps have led to before in the page of this block, where they know nothing of it: most of that will be executed again, and each would
    /// be a way out of translated code.
    pub fn offer_page(&mut self, blocks: &Blocks, key: &Key, mapping: Mapping) {
        if self.holds_jumps(key.mode) || !self.jumps.is_new(key.mode, key.pc) {
            return;
        }
        for e in blocks.entries(key) {
            let address = self.shared.code.address(e.indirect as usize) as u64;
            let entry = Entry {
                pc: e.pc,
                direct: e.direct,
                mode: key.mode,
            };
            self.jumps.offer(&mut self.frame, entry, address, mapping);
        }
    }

    /// Forgets positions of a generation before this one, which is the present one: the caller has the tables.
    pub fn follow_blocks(&mut self, now: u64) {
        if self.blocks_generation != now {
            self.blocks_generation = now;
            self.control.hold_positions(now);
            self.generation += 1;
            self.flush_jumps_all();
        }
    }

    /// After this vCPU has begun a generation of blocks: keeps of those before what other vCPUs may need.
    pub fn keep_needed(&mut self, blocks: &mut Blocks) {
        let now = blocks.generation();
        self.follow_blocks(now);
        blocks.keep_since(self.shared.oldest_positions(self.id, now));
    }

    pub fn flush_jumps_all(&mut self) {
        self.parked.clear_jumps();
        self.jumps.flush_all(&mut self.frame);
    }

    pub fn translate_as_kernel(&mut self, gva: Gva, access: Access) -> Result<Gpa, VirtFault> {
        if !canonical(gva.0) {
            return Err(VirtFault { gva });
        }
        let saved = self.frame.cpu.rflags;
        self.frame.cpu.rflags |= rflags::AC;
        let t = walk(&self.frame.cpu, &self.shared.memory, gva, access);
        self.frame.cpu.rflags = saved;
        t.map(|t| t.gpa).map_err(|_| VirtFault { gva })
    }

    /// Goes through a virtual range page by page. `f` copies one piece and says whether the memory was there.
    pub fn copy_virt(
        &mut self,
        gva: Gva,
        len: usize,
        access: Access,
        mut f: impl FnMut(&GuestMemory, Gpa, Range<usize>) -> bool,
    ) -> Result<(), VirtFault> {
        let mut done = 0;
        while done < len {
            let at = Gva(gva.0.wrapping_add(done as u64));
            let n = ((PAGE_SIZE - at.page_offset()) as usize).min(len - done);
            let gpa = self.translate_as_kernel(at, access)?;
            if !f(&self.shared.memory, gpa, done..done + n) {
                return Err(VirtFault { gva: at });
            }
            if access.write {
                self.written(gpa, n);
            }
            done += n;
        }
        Ok(())
    }

    /// Position of the code that runs this instruction alone.
    fn snippet(&mut self, instr: &Instruction) -> Option<usize> {
        if let Some(&pos) = self.snippets.get(instr) {
            return Some(pos);
        }
        let range = self.shared.snippets(self.id);
        if self.snippet_next + 64 > range.end {
            self.snippets.clear();
            self.snippet_next = range.start;
        }
        let pos = self.snippet_next;
        let code = {
            let mut t = self.shared.translations.lock().expect("translations");
            t.translator.native_snippet(instr, pos as i64)?
        };
        self.shared.code.put(pos, &code);
        self.snippet_next = (pos + code.len()).next_multiple_of(16);
        self.snippets.insert(*instr, pos);
        Some(pos)
    }
}

impl Host for BtHost {
    fn memory(&self) -> &GuestMemory {
        &self.shared.memory
    }

    fn vendor(&self) -> Vendor {
        self.shared.processor.vendor()
    }

    fn written(&mut self, gpa: Gpa, len: usize) {
        // The other side marks the page, then reads it.
        fence(Ordering::SeqCst);
        self.shared.memory.log().note(gpa, len as u64);
        if !self.shared.pages.contains(gpa.gfn()) {
            return;
        }
        let s = self.shared.clone();
        let mut t = s.translations.lock().expect("translations");
        if s.invalidate(&mut t, gpa, len as u64, Some(self.id)) {
            self.dropped_blocks += 1;
        }
    }

    fn neighbours(&mut self, first: Gpa, second: Gpa) -> Option<*mut u8> {
        let memory = &self.shared.memory;
        let (a, b) = (memory.page(first.gfn())?, memory.page(second.gfn())?);
        let offset = first.page_offset() as usize;
        if a.wrapping_add(PAGE_SIZE as usize) == b {
            return Some(a.wrapping_add(offset));
        }
        if self.window.is_none() {
            self.window = Window::new().ok();
        }
        let window = self.window.as_mut()?.show(a, b).ok()?;
        Some(window.wrapping_add(offset))
    }

    fn holes(&mut self) -> Option<*mut u8> {
        if self.holes.is_none() {
            self.holes = Holes::new().ok();
        }
        self.holes.as_ref().map(Holes::start)
    }

    fn translate(&mut self, cpu: &CpuState, gva: Gva, access: Access) -> Result<Gpa, PageFault> {
        self.data_translation(cpu, gva, access)
    }

    fn tlb_flush(&mut self, cpu: &CpuState, what: TlbFlush) {
        self.flush(cpu, what);
    }

    fn run_native(
        &mut self,
        _cpu: &mut CpuState,
        instr: &Instruction,
        operand: Option<Operand>,
    ) -> Result<(), NativeFault> {
        let pos = self.snippet(instr).ok_or(NativeFault::Undefined)?;
        if matches!(instr.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave) {
            // They show the x87 instruction and data pointers, which must not be the host's: going through the image clears them.
            fpu::store(&mut self.frame);
            fpu::load(&mut self.frame);
        }
        self.frame.operand = operand.map_or(0, |o| o.ptr as u64);
        loop {
            self.frame.turn_back.store(0, Ordering::Relaxed);
            match self.run_code(pos) {
                ExitKind::TurnedBack => {}
                ExitKind::Signal if self.frame.raw_signal == kick_signal() => {}
                ExitKind::Signal => {
                    return Err(match self.frame.raw_signal {
                        libc::SIGFPE => match self.frame.raw_trap as u8 {
                            vector::DE => NativeFault::Divide,
                            vector::MF => NativeFault::X87,
                            _ => NativeFault::Simd,
                        },
                        libc::SIGILL => NativeFault::Undefined,
                        libc::SIGSEGV if self.frame.raw_trap as u8 == vector::PF => {
                            NativeFault::Missing(self.frame.raw_address)
                        }
                        _ => NativeFault::Protection,
                    });
                }
                _ => return Ok(()),
            }
        }
    }

    fn cpuid(&self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.shared.processor.cpuid(self.id, cpu, leaf, subleaf)
    }

    fn host_tsc(&self) -> u64 {
        // SAFETY: RDTSC has no preconditions.
        unsafe { std::arch::x86_64::_rdtsc() }
    }

    fn send_ipi(&mut self, ipi: Ipi) {
        let own = self.frame.cpu.lapic.id;
        let controls = self.shared.controls.read().expect("vCPU list");
        for (id, control) in controls.iter() {
            let apic_id = 2 * id.0;
            let named = match ipi.shorthand {
                Shorthand::Oneself => apic_id == own,
                Shorthand::All => true,
                Shorthand::Others => apic_id != own,
                Shorthand::None if ipi.dest == u32::MAX => true,
                Shorthand::None if ipi.logical => {
                    let logical = lapic::x2apic_logical_id(apic_id);
                    logical >> 16 == ipi.dest >> 16 && logical & ipi.dest & 0xffff != 0
                }
                Shorthand::None => apic_id == ipi.dest,
            };
            if !named {
                continue;
            }
            match ipi.delivery {
                Delivery::Fixed | Delivery::LowestPriority => {
                    control.raise_interrupt(ipi.vector);
                }
                Delivery::Nmi => control.raise_nmi(),
                Delivery::Init => control.post(request::INIT),
                Delivery::Startup => control.post_startup(ipi.vector),
                Delivery::Smi => {}
            }
        }
    }

    fn arch_capabilities(&self) -> u64 {
        self.shared.processor.arch_capabilities()
    }

    fn set_apic_enabled(&mut self, on: bool) {
        self.control.set_apic_enabled(on);
    }

    fn load_fpu(&mut self, _cpu: &mut CpuState) {
        if self.attached {
            fpu::store(&mut self.frame);
        }
    }

    fn store_fpu(&mut self, _cpu: &mut CpuState) {
        if self.attached {
            fpu::load(&mut self.frame);
        }
    }

    fn is_all_fpu(&self, components: u64) -> bool {
        let (_, all) = fpu::extent(self.shared.wide);
        components & all == all
    }

    fn decoded(&mut self) -> Option<&mut Decoded> {
        Some(&mut self.decoded)
    }
}
