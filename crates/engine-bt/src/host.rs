//! What the instruction semantics find around them: TLBs, jump caches, native execution.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use hospes_engine::{CpuState, Segment, VcpuControl, VirtFault, rflags};
use hospes_memory::GuestMemory;
use hospes_translate::Mode;
use hospes_translate::layout::{TLB_ENTRIES, TLB_INVALID, TlbEntry, tlb_index};
use hospes_units::{Gfn, Gpa, Gva, PAGE_SIZE, VcpuId};
use iced_x86::{Instruction, Mnemonic};

use crate::control::{Control, request};
use crate::direct::Direct;
use crate::exec::{
    Access, Delivery, Host, Ipi, NativeFault, Operand, PageFault, Shorthand, TlbFlush, Vendor,
    lapic, vector, walk,
};
use crate::fpu;
use crate::frame::FrameBox;
use crate::jumps::{Jumps, Mapping};
use crate::signal::kick_signal;
use crate::stubs::ExitKind;
use crate::vcpu::{call, canonical, pack_flags};
use crate::vm::Shared;
use crate::window::{Holes, Window};

/// Marks of a TLB entry beside its frame number.
const GLOBAL: u64 = 1 << 63;
const LARGE: u64 = 1 << 62;
const MARKS: u64 = GLOBAL | LARGE;
/// log2 of the largest page.
pub(crate) const LARGE_BITS: u32 = 30;

/// A tag for an entry whose host address is good: the address that [`TLB_INVALID`] itself would match has another index.
const fn unmatched(n: usize) -> u64 {
    if n == tlb_index(TLB_INVALID) {
        TLB_INVALID + PAGE_SIZE
    } else {
        TLB_INVALID
    }
}

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
    /// Indices filled since the last flush; kernel entries that are global are in the fourth list.
    filled: [Vec<u16>; 4],
    /// Gigabytes of address space in which large pages stand behind some entries.
    large: [Vec<u64>; 3],
    /// Made when the first atomic access crosses pages.
    window: Option<Window>,
    /// Made when the first masked access reaches a missing page.
    holes: Option<Holes>,
    snippets: HashMap<Instruction, usize>,
    snippet_next: usize,
}

impl BtHost {
    pub fn new(
        shared: Arc<Shared>,
        id: VcpuId,
        control: Arc<Control>,
        frame: FrameBox,
        miss: u64,
    ) -> BtHost {
        let snippet_next = shared.snippets(id).start;
        let direct = Direct::new(shared.options.execution);
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
            filled: Default::default(),
            large: Default::default(),
            window: None,
            holes: None,
            snippets: HashMap::new(),
            snippet_next,
        }
    }

    /// The CPU state, for lending it out beside the rest. The rest touches other fields of the frame only, or goes through the entry code.
    pub fn cpu_ptr(&self) -> *mut CpuState {
        // SAFETY: the frame is mapped; only an address is formed.
        unsafe { &raw mut (*self.frame.as_ptr()).cpu }
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
        self.control.enter_code();
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
        if mode.has(Mode::SINGLE) || mode.has(Mode::USER) && self.direct.hold_jumps {
            return;
        }
        let address = self.shared.code.address(indirect as usize) as u64;
        self.jumps
            .add(&mut self.frame, mode, pc, direct, address, mapping);
    }

    /// Forgets positions of a generation before this one.
    pub fn follow_blocks(&mut self, now: u64) {
        if self.blocks_generation != now {
            self.blocks_generation = now;
            self.generation += 1;
            self.flush_jumps_all();
        }
    }

    pub fn flush_jumps_all(&mut self) {
        self.jumps.flush_all(&mut self.frame);
    }

    /// Forgets everything cached of the guest's mappings.
    pub fn flush_all(&mut self) {
        for table in &mut self.frame.tlb {
            table.fill(TlbEntry::INVALID);
        }
        self.direct.flush_all();
        for list in &mut self.filled {
            list.clear();
        }
        self.large.iter_mut().for_each(Vec::clear);
        self.flush_jumps_all();
    }

    fn flush_local(&mut self) {
        for (list, table) in [(0, 0), (1, 1), (2, 2)] {
            if self.filled[list].len() >= TLB_ENTRIES {
                self.frame.tlb[table].fill(TlbEntry::INVALID);
                if table == 1 {
                    self.filled[3].clear();
                    self.large[1].clear();
                }
            } else {
                for &n in &self.filled[list] {
                    let e = &mut self.frame.tlb[table][usize::from(n)];
                    if e.gfn & GLOBAL == 0 || table != 1 {
                        *e = TlbEntry::INVALID;
                    }
                }
            }
            self.filled[list].clear();
        }
        self.large[0].clear();
        self.large[2].clear();
        self.jumps.flush_local(&mut self.frame);
    }

    fn flush_page(&mut self, gva: u64) {
        let page = gva & !(PAGE_SIZE - 1);
        for table in 0..3 {
            let e = &mut self.frame.tlb[table][tlb_index(gva)];
            if e.read == page || e.write == page {
                *e = TlbEntry::INVALID;
            }
            if self.large[table].contains(&(gva >> LARGE_BITS)) {
                // The translation to forget may be that of a large page, of which any 4 KiB piece may be cached. Which size it had is not known; a
                // gigabyte is the largest.
                for e in &mut self.frame.tlb[table] {
                    if e.gfn & LARGE != 0 && (e.read ^ page) >> LARGE_BITS == 0 {
                        *e = TlbEntry::INVALID;
                    }
                }
            }
        }
        self.jumps.flush_page(&mut self.frame, gva);
    }

    /// Makes stores to a frame take the slow path.
    pub fn drop_write_tags(&mut self, gfn: Gfn) {
        for table in &mut self.frame.tlb {
            for (n, e) in table.iter_mut().enumerate() {
                if e.gfn & !MARKS == gfn.0 {
                    e.write = unmatched(n);
                }
            }
        }
    }

    pub fn drop_all_write_tags(&mut self) {
        for table in &mut self.frame.tlb {
            for (n, e) in table.iter_mut().enumerate() {
                e.write = unmatched(n);
            }
        }
    }

    /// Walks the guest's tables for a missed access and caches the result. False where the access must be executed by the instruction semantics.
    pub fn fill(&mut self, gva: Gva, access: Access) -> Result<bool, PageFault> {
        let cpu = &self.frame.cpu;
        let t = walk(cpu, &self.shared.memory, gva, access)?;
        let gfn = t.gpa.gfn();
        let Some(host) = self.shared.memory.page(gfn) else {
            return Ok(false);
        };
        let code = self.shared.pages.contains(gfn);
        if access.write && code {
            return Ok(false);
        }
        let table = self.table(access.user);
        let page = gva.page().0;
        let n = tlb_index(gva.0);
        let large = t.page_bits > 12;
        self.frame.tlb[table][n] = TlbEntry {
            read: page,
            write: if (access.write || t.writable && t.dirty) && !code {
                page
            } else {
                unmatched(n)
            },
            host: host as u64,
            gfn: gfn.0 | if t.global { GLOBAL } else { 0 } | if large { LARGE } else { 0 },
        };
        if large && !self.large[table].contains(&(gva.0 >> LARGE_BITS)) {
            self.large[table].push(gva.0 >> LARGE_BITS);
        }
        let list = if table == 1 && t.global { 3 } else { table };
        if self.filled[list].len() < TLB_ENTRIES {
            self.filled[list].push(n as u16);
        }
        Ok(true)
    }

    /// Whether the TLB that code uses now has the page around `ea`, with write access if asked for.
    pub fn cached(&self, ea: u64, user: bool, write: bool) -> bool {
        let page = Gva(ea).page().0;
        let e = &self.frame.tlb[self.table(user)][tlb_index(ea)];
        e.read == page && (!write || e.write == page)
    }

    /// Which TLB accesses of this privilege use.
    fn table(&self, user: bool) -> usize {
        if user {
            0
        } else if self.frame.cpu.rflags & rflags::AC != 0 {
            2
        } else {
            1
        }
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

    fn tlb_flush(&mut self, _cpu: &CpuState, what: TlbFlush) {
        match what {
            // Processes belong to one address space each.
            TlbFlush::Switch => {}
            TlbFlush::Page(gva) | TlbFlush::PageOfPcid { gva, .. } => self.direct.flush_page(gva),
            TlbFlush::Pcid(pcid) => self.direct.flush_pcid(pcid),
            TlbFlush::All | TlbFlush::NonGlobal => self.direct.flush_all(),
        }
        match what {
            TlbFlush::All => self.flush_all(),
            // Entries carry no PCID: only those of the present one exist.
            TlbFlush::NonGlobal | TlbFlush::Pcid(_) | TlbFlush::Switch => self.flush_local(),
            TlbFlush::Page(gva) | TlbFlush::PageOfPcid { gva, .. } => self.flush_page(gva.0),
        }
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

    fn apic_enabled(&mut self) {
        self.control.set_apic_enabled(true);
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
}
