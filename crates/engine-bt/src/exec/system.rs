//! Control and debug registers, descriptor-table registers, ports, counters, TLB and cache control.
//!
//! Source: Intel SDM volumes 2 and 3; AMD APM volume 3 where marked.

use hospes_engine::{Activity, Exit, Segment, cr, reg, rflags, seg};
use hospes_units::Gva;
use iced_x86::{Code, Instruction, OpKind, Register};

use super::cx::{Cx, Exec, Flow, canonical, mask, seg_index};
use super::host::{Exception, Host, TlbFlush, Vendor};
use super::walk::{Access, PHYS_BITS, RSVD_PAE_PDPTE};

const CR0_DEFINED: u64 = cr::CR0_PE
    | cr::CR0_MP
    | cr::CR0_EM
    | cr::CR0_TS
    | cr::CR0_ET
    | cr::CR0_NE
    | cr::CR0_WP
    | cr::CR0_AM
    | cr::CR0_NW
    | cr::CR0_CD
    | cr::CR0_PG;
const CR3_NO_FLUSH: u64 = 1 << 63;
const PCID: u64 = 0xfff;
/// CR4 bits that every guest may set.
const CR4_BASE: u64 = cr::CR4_TSD
    | cr::CR4_DE
    | cr::CR4_PSE
    | cr::CR4_PAE
    | cr::CR4_MCE
    | cr::CR4_PGE
    | cr::CR4_PCE
    | cr::CR4_OSFXSR
    | cr::CR4_OSXMMEXCPT;

impl<H: Host> Cx<'_, H> {
    // ---- control registers ----

    /// MOV to and from CRn and DRn.
    pub fn mov_control(&mut self, i: &Instruction) -> Exec<Flow> {
        let (to, from) = (i.op0_register(), i.op1_register());
        if to.is_dr() {
            let n = to.number();
            let v = self.get(from);
            self.write_dr(n, v)?;
        } else if from.is_dr() {
            let v = self.read_dr(from.number())?;
            self.set(to, v);
        } else if to.is_cr() {
            let v = self.get(from);
            self.write_cr(to.number(), v)?;
        } else if from.is_cr() {
            let v = self.read_cr(from.number())?;
            self.set(to, v);
        } else {
            return Err(Exception::ud());
        }
        Ok(Flow::Next)
    }

    fn read_cr(&mut self, n: usize) -> Exec<u64> {
        let v = match n {
            0 => self.cpu.cr0,
            2 => self.cpu.cr2,
            3 => self.cpu.cr3,
            4 => self.cpu.cr4,
            8 => u64::from(self.cpu.lapic.tpr >> 4 & 15),
            _ => return Err(Exception::ud()),
        };
        self.need_cpl0()?;
        Ok(v)
    }

    fn write_cr(&mut self, n: usize, v: u64) -> Exec<()> {
        if !matches!(n, 0 | 2 | 3 | 4 | 8) {
            return Err(Exception::ud());
        }
        self.need_cpl0()?;
        match n {
            0 => self.write_cr0(v)?,
            2 => self.cpu.cr2 = v,
            3 => self.write_cr3(v)?,
            4 => self.write_cr4(v)?,
            _ => {
                if v > 15 {
                    return Err(Exception::gp(0));
                }
                self.cpu.lapic.tpr = (v as u32) << 4;
            }
        }
        Ok(())
    }

    fn write_cr0(&mut self, v: u64) -> Exec<()> {
        let old = self.cpu.cr0;
        let new = v & CR0_DEFINED | cr::CR0_ET;
        let set = |b: u64| new & b != 0;
        let gp = Err(Exception::gp(0));
        if v >> 32 != 0
            || (set(cr::CR0_PG) && !set(cr::CR0_PE))
            || (set(cr::CR0_NW) && !set(cr::CR0_CD))
        {
            return gp;
        }
        let changed = old ^ new;
        let mut efer = self.cpu.msr.efer;
        if changed & cr::CR0_PG != 0 && set(cr::CR0_PG) {
            if efer & cr::EFER_LME != 0 {
                let tss16 = self.cpu.tr.attr & 0x9d == 0x81;
                if self.cpu.cr4 & cr::CR4_PAE == 0
                    || self.cpu.seg[seg::CS].attr & Segment::ATTR_L != 0
                    || tss16
                {
                    return gp;
                }
                efer |= cr::EFER_LMA;
            } else if self.cpu.cr4 & cr::CR4_PAE != 0 {
                self.check_pdptes(self.cpu.cr3)?;
            }
        } else if changed & cr::CR0_PG != 0 {
            if self.code64() || self.cpu.cr4 & cr::CR4_PCIDE != 0 {
                return gp;
            }
            efer &= !cr::EFER_LMA;
        }
        self.cpu.cr0 = new;
        self.cpu.msr.efer = efer;
        if changed & (cr::CR0_PG | cr::CR0_PE | cr::CR0_WP) != 0 {
            self.host.tlb_flush(self.cpu, TlbFlush::All);
        }
        Ok(())
    }

    /// #GP where the four page-directory pointers of 32-bit PAE paging have reserved bits set.
    fn check_pdptes(&mut self, cr3: u64) -> Exec<()> {
        let gpa = hospes_units::Gpa(cr3 & 0xffff_ffe0);
        let mut table = [0; 32];
        self.phys_read(gpa, &mut table);
        for e in table.chunks_exact(8) {
            let e = e.iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b));
            if e & 1 != 0 && e & RSVD_PAE_PDPTE != 0 {
                return Err(Exception::gp(0));
            }
        }
        Ok(())
    }

    fn write_cr3(&mut self, v: u64) -> Exec<()> {
        let pcide = self.cpu.cr4 & cr::CR4_PCIDE != 0;
        let keep = pcide && v & CR3_NO_FLUSH != 0;
        let v = if pcide { v & !CR3_NO_FLUSH } else { v };
        if self.long_mode() {
            if v >> PHYS_BITS != 0 {
                return Err(Exception::gp(0));
            }
        } else if self.cpu.cr0 & cr::CR0_PG != 0 && self.cpu.cr4 & cr::CR4_PAE != 0 {
            self.check_pdptes(v)?;
        }
        self.cpu.cr3 = v;
        let what = match (pcide, keep) {
            (_, true) => TlbFlush::Switch,
            (true, false) => TlbFlush::Pcid((v & PCID) as u16),
            (false, false) => TlbFlush::NonGlobal,
        };
        self.host.tlb_flush(self.cpu, what);
        Ok(())
    }

    /// CR4 bits that this guest's CPUID offers.
    fn cr4_offered(&self) -> u64 {
        let one = self.host.cpuid(self.cpu, 1, 0);
        let seven = self.host.cpuid(self.cpu, 7, 0);
        let mut bits = CR4_BASE;
        for (word, bit, offer) in [
            (one[2], 17, cr::CR4_PCIDE),
            (one[2], 26, cr::CR4_OSXSAVE),
            (seven[1], 0, cr::CR4_FSGSBASE),
            (seven[1], 7, cr::CR4_SMEP),
            (seven[1], 20, cr::CR4_SMAP),
            (seven[2], 2, cr::CR4_UMIP),
        ] {
            if word & (1 << bit) != 0 {
                bits |= offer;
            }
        }
        bits
    }

    fn write_cr4(&mut self, v: u64) -> Exec<()> {
        let old = self.cpu.cr4;
        let changed = old ^ v;
        let long = self.long_mode();
        let pcide_on = changed & v & cr::CR4_PCIDE != 0;
        if v & !self.cr4_offered() != 0
            || (long && v & cr::CR4_PAE == 0)
            || (pcide_on && (!long || self.cpu.cr3 & PCID != 0))
        {
            return Err(Exception::gp(0));
        }
        let paging = cr::CR4_PSE | cr::CR4_PAE | cr::CR4_PGE;
        if changed & paging != 0 && v & cr::CR4_PAE != 0 && self.cpu.cr0 & cr::CR0_PG != 0 && !long
        {
            self.check_pdptes(self.cpu.cr3)?;
        }
        self.cpu.cr4 = v;
        // With TSD changes what user code may do, not the mode of the kernel's that returns to it: whatever leads there is forgotten.
        let rights = cr::CR4_SMEP | cr::CR4_SMAP | cr::CR4_PCIDE | cr::CR4_TSD;
        if changed & (paging | rights) != 0 {
            self.host.tlb_flush(self.cpu, TlbFlush::All);
        }
        Ok(())
    }

    pub fn clts(&mut self) -> Exec<Flow> {
        self.need_cpl0()?;
        self.cpu.cr0 &= !cr::CR0_TS;
        Ok(Flow::Next)
    }

    pub fn lmsw(&mut self, i: &Instruction) -> Exec<Flow> {
        self.need_cpl0()?;
        let v = self.read_op_sized(i, 0, 2)?;
        // PE can be set this way but not cleared.
        let keep = self.cpu.cr0 & !0xe;
        self.write_cr0(keep | v & 0xf)?;
        Ok(Flow::Next)
    }

    /// #GP in user mode where UMIP hides what an instruction would show.
    fn check_umip(&self) -> Exec<()> {
        if self.cpu.cr4 & cr::CR4_UMIP != 0 && self.cpu.cpl() != 0 {
            return Err(Exception::gp(0));
        }
        Ok(())
    }

    /// Writes a 16-bit system value: 2 bytes to memory, the operand's size to a register.
    fn store_word(&mut self, i: &Instruction, v: u64) -> Exec<Flow> {
        self.check_umip()?;
        self.write_op(i, 0, 2, v)?;
        Ok(Flow::Next)
    }

    pub fn smsw(&mut self, i: &Instruction) -> Exec<Flow> {
        let v = self.cpu.cr0;
        self.store_word(i, v)
    }

    pub fn sldt(&mut self, i: &Instruction) -> Exec<Flow> {
        self.need_protected()?;
        let v = u64::from(self.cpu.ldtr.selector);
        self.store_word(i, v)
    }

    pub fn str(&mut self, i: &Instruction) -> Exec<Flow> {
        self.need_protected()?;
        let v = u64::from(self.cpu.tr.selector);
        self.store_word(i, v)
    }

    /// LGDT and LIDT.
    pub fn load_table(&mut self, i: &Instruction) -> Exec<Flow> {
        self.need_cpl0()?;
        let (s, off) = self.mem_ref(i);
        let narrow = matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
        let t = self.table_operand(s, off, narrow)?;
        match i.code() {
            Code::Lgdt_m1632_16 | Code::Lgdt_m1632 | Code::Lgdt_m1664 => self.cpu.gdtr = t,
            _ => self.cpu.idtr = t,
        }
        Ok(Flow::Next)
    }

    /// SGDT and SIDT.
    pub fn store_table(&mut self, i: &Instruction) -> Exec<Flow> {
        self.check_umip()?;
        let t = match i.code() {
            Code::Sgdt_m1632_16 | Code::Sgdt_m1632 | Code::Sgdt_m1664 => self.cpu.gdtr,
            _ => self.cpu.idtr,
        };
        let mut image = [0; 10];
        image[..2].copy_from_slice(&t.limit.to_le_bytes());
        image[2..].copy_from_slice(&t.base.to_le_bytes());
        let len = if self.code64() { 10 } else { 6 };
        let (s, off) = self.mem_ref(i);
        let lin = self.linear(s, off, len as u64, true)?;
        let access = self.access(true);
        self.write_lin(lin, &image[..len], access)?;
        self.watch(lin, len, true);
        Ok(Flow::Next)
    }

    pub fn lldt(&mut self, i: &Instruction) -> Exec<Flow> {
        self.need_protected()?;
        self.need_cpl0()?;
        let selector = self.read_op_sized(i, 0, 2)?;
        self.load_ldt(selector as u16)?;
        Ok(Flow::Next)
    }

    pub fn ltr(&mut self, i: &Instruction) -> Exec<Flow> {
        self.need_protected()?;
        self.need_cpl0()?;
        let selector = self.read_op_sized(i, 0, 2)?;
        self.load_tr(selector as u16)?;
        Ok(Flow::Next)
    }

    /// LAR and LSL.
    pub fn selector_info(&mut self, i: &Instruction, limit: bool) -> Exec<Flow> {
        self.need_protected()?;
        let selector = self.read_op_sized(i, 1, 2)? as u16;
        let found = if limit {
            self.segment_limit(selector)?
        } else {
            self.access_rights(selector)?
        };
        if let Some(v) = found {
            self.set(i.op0_register(), v);
        }
        self.set_flag(rflags::ZF, found.is_some());
        Ok(Flow::Next)
    }

    /// VERR and VERW.
    pub fn selector_verify(&mut self, i: &Instruction, write: bool) -> Exec<Flow> {
        self.need_protected()?;
        let selector = self.read_op_sized(i, 0, 2)? as u16;
        let ok = self.verify(selector, write)?;
        self.set_flag(rflags::ZF, ok);
        Ok(Flow::Next)
    }

    pub fn arpl(&mut self, i: &Instruction) -> Exec<Flow> {
        self.need_protected()?;
        let to = self.read_op_sized(i, 0, 2)?;
        let rpl = self.get(i.op1_register()) & 3;
        let raise = to & 3 < rpl;
        let new = if raise { to & !3 | rpl } else { to };
        if i.op0_kind() == OpKind::Register {
            let (n, _) = super::cx::gpr_index(i.op0_register());
            super::cx::set_sized(&mut self.cpu.gpr[n], 2, new);
        } else {
            let (s, off) = self.mem_ref(i);
            self.write_mem(s, off, 2, new)?;
        }
        self.set_flag(rflags::ZF, raise);
        Ok(Flow::Next)
    }

    /// LDS, LES, LFS, LGS, LSS.
    pub fn load_far_pointer(&mut self, i: &Instruction, s: usize) -> Exec<Flow> {
        let size = i.op0_register().size();
        let (from, off) = self.mem_ref(i);
        let second = off.wrapping_add(size as u64) & mask(self.address_size(i));
        let v = self.read_mem(from, off, size)?;
        let selector = self.read_mem(from, second, 2)?;
        self.load_segment(s, selector as u16)?;
        self.set(i.op0_register(), v);
        Ok(Flow::Next)
    }

    /// MOV to and from a segment register.
    pub fn mov_segment(&mut self, i: &Instruction) -> Exec<Flow> {
        if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() {
            let s = seg_index(i.op0_register());
            if s == seg::CS {
                return Err(Exception::ud());
            }
            let v = self.read_op_sized(i, 1, 2)?;
            self.load_segment(s, v as u16)?;
            return Ok(if s == seg::SS {
                Flow::Shadow { traps: true }
            } else {
                Flow::Next
            });
        }
        let v = u64::from(self.cpu.seg[seg_index(i.op1_register())].selector);
        self.write_op(i, 0, 2, v)?;
        Ok(Flow::Next)
    }

    // ---- flags ----

    pub fn cli(&mut self) -> Exec<Flow> {
        if self.cpu.cpl() > self.iopl() {
            return Err(Exception::gp(0));
        }
        self.cpu.rflags &= !rflags::IF;
        Ok(Flow::Next)
    }

    pub fn sti(&mut self) -> Exec<Flow> {
        if self.cpu.cpl() > self.iopl() {
            return Err(Exception::gp(0));
        }
        let was = self.flag(rflags::IF);
        self.cpu.rflags |= rflags::IF;
        Ok(if was {
            Flow::Next
        } else {
            Flow::Shadow { traps: false }
        })
    }

    /// STAC and CLAC.
    pub fn set_ac(&mut self, on: bool) -> Exec<Flow> {
        let offered = self.host.cpuid(self.cpu, 7, 0)[1] & (1 << 20) != 0;
        if !offered || self.cpu.cpl() != 0 {
            return Err(Exception::ud());
        }
        self.set_flag(rflags::AC, on);
        Ok(Flow::Next)
    }

    // ---- bases ----

    pub fn swapgs(&mut self) -> Exec<Flow> {
        if !self.code64() {
            return Err(Exception::ud());
        }
        self.need_cpl0()?;
        std::mem::swap(
            &mut self.cpu.seg[seg::GS].base,
            &mut self.cpu.msr.kernel_gs_base,
        );
        Ok(Flow::Next)
    }

    fn need_fsgsbase(&self) -> Exec<()> {
        if self.code64() && self.cpu.cr4 & cr::CR4_FSGSBASE != 0 {
            Ok(())
        } else {
            Err(Exception::ud())
        }
    }

    pub fn read_base(&mut self, i: &Instruction, s: usize) -> Exec<Flow> {
        self.need_fsgsbase()?;
        let v = self.cpu.seg[s].base;
        self.set(i.op0_register(), v);
        Ok(Flow::Next)
    }

    pub fn write_base(&mut self, i: &Instruction, s: usize) -> Exec<Flow> {
        self.need_fsgsbase()?;
        let v = self.get(i.op0_register());
        if !canonical(v) {
            return Err(Exception::gp(0));
        }
        self.cpu.seg[s].base = v;
        Ok(Flow::Next)
    }

    // ---- TLB and caches ----

    pub fn invlpg(&mut self, i: &Instruction) -> Exec<Flow> {
        self.need_cpl0()?;
        let (s, off) = self.mem_ref(i);
        let lin = if self.code64() {
            match s {
                seg::FS | seg::GS => self.cpu.seg[s].base.wrapping_add(off),
                _ => off,
            }
        } else {
            self.cpu.seg[s].base.wrapping_add(off) & 0xffff_ffff
        };
        if canonical(lin) {
            self.host.tlb_flush(self.cpu, TlbFlush::Page(Gva(lin)));
        }
        Ok(Flow::Next)
    }

    pub fn invpcid(&mut self, i: &Instruction) -> Exec<Flow> {
        if self.host.cpuid(self.cpu, 7, 0)[1] & (1 << 10) == 0 {
            return Err(Exception::ud());
        }
        self.need_protected()?;
        self.need_cpl0()?;
        let kind = self.get(i.op0_register());
        let (s, off) = self.mem_ref(i);
        let lin = self.linear(s, off, 16, false)?;
        let mut d = [0; 16];
        let access = self.access(false);
        self.read_lin(lin, &mut d, access)?;
        let word = |b: &[u8]| b.iter().rev().fold(0u64, |v, &x| v << 8 | u64::from(x));
        let (pcid, address) = (word(&d[..8]), word(&d[8..]));
        let pcide = self.cpu.cr4 & cr::CR4_PCIDE != 0;
        let bad = match kind {
            0 => pcid >> 12 != 0 || !canonical(address) || (!pcide && pcid != 0),
            1 => pcid >> 12 != 0 || (!pcide && pcid != 0),
            2 | 3 => false,
            _ => true,
        };
        if bad {
            return Err(Exception::gp(0));
        }
        let pcid = pcid as u16;
        let what = match kind {
            0 => TlbFlush::PageOfPcid {
                pcid,
                gva: Gva(address),
            },
            1 => TlbFlush::Pcid(pcid),
            2 => TlbFlush::All,
            _ => TlbFlush::NonGlobal,
        };
        self.host.tlb_flush(self.cpu, what);
        Ok(Flow::Next)
    }

    /// WBINVD, INVD, WBNOINVD: memory is coherent, so only the privilege counts.
    pub fn cache_control(&mut self) -> Exec<Flow> {
        self.need_cpl0()?;
        Ok(Flow::Next)
    }

    /// CLFLUSH, CLFLUSHOPT, CLWB: faults like a load of one byte.
    pub fn flush_line(&mut self, i: &Instruction) -> Exec<Flow> {
        let offered = match i.code() {
            Code::Clflushopt_m8 => self.host.cpuid(self.cpu, 7, 0)[1] & (1 << 23),
            Code::Clwb_m8 => self.host.cpuid(self.cpu, 7, 0)[1] & (1 << 24),
            _ => 1,
        };
        if offered == 0 {
            return Err(Exception::ud());
        }
        let (s, off) = self.mem_ref(i);
        let lin = self.linear(s, off, 1, false)?;
        let access = self.access(false);
        self.translate(lin, access)?;
        Ok(Flow::Next)
    }

    pub fn serialize(&mut self) -> Exec<Flow> {
        if self.host.cpuid(self.cpu, 7, 0)[3] & (1 << 14) == 0 {
            return Err(Exception::ud());
        }
        Ok(Flow::Next)
    }

    // ---- the rest ----

    pub fn hlt(&mut self) -> Exec<Flow> {
        self.need_cpl0()?;
        self.cpu.activity = Activity::Halted;
        let interrupts_enabled = self.flag(rflags::IF);
        Ok(Flow::Exit(Exit::Halt { interrupts_enabled }))
    }

    pub fn cpuid(&mut self) -> Exec<Flow> {
        let leaf = self.cpu.gpr[reg::RAX] as u32;
        let subleaf = self.cpu.gpr[reg::RCX] as u32;
        let v = self.host.cpuid(self.cpu, leaf, subleaf);
        for (r, v) in [reg::RAX, reg::RBX, reg::RCX, reg::RDX].into_iter().zip(v) {
            self.cpu.gpr[r] = u64::from(v);
        }
        Ok(Flow::Next)
    }

    /// The guest's time-stamp counter.
    pub fn tsc(&self) -> u64 {
        self.host.host_tsc().wrapping_add(self.cpu.msr.tsc_offset)
    }

    /// RDTSC, and RDTSCP with `aux`.
    pub fn rdtsc(&mut self, aux: bool) -> Exec<Flow> {
        if aux && self.host.cpuid(self.cpu, 0x8000_0001, 0)[3] & (1 << 27) == 0 {
            return Err(Exception::ud());
        }
        if self.cpu.cr4 & cr::CR4_TSD != 0 && self.cpu.cpl() != 0 {
            return Err(Exception::gp(0));
        }
        let t = self.tsc();
        self.set_edx_eax(t);
        if aux {
            self.cpu.gpr[reg::RCX] = self.cpu.msr.tsc_aux & 0xffff_ffff;
        }
        Ok(Flow::Next)
    }

    pub fn rdpid(&mut self, i: &Instruction) -> Exec<Flow> {
        if self.host.cpuid(self.cpu, 7, 0)[2] & (1 << 22) == 0 {
            return Err(Exception::ud());
        }
        let v = self.cpu.msr.tsc_aux & 0xffff_ffff;
        self.set(i.op0_register(), v);
        Ok(Flow::Next)
    }

    pub fn set_edx_eax(&mut self, v: u64) {
        self.cpu.gpr[reg::RAX] = v & 0xffff_ffff;
        self.cpu.gpr[reg::RDX] = v >> 32;
    }

    pub fn edx_eax(&self) -> u64 {
        self.cpu.gpr[reg::RAX] & 0xffff_ffff | self.cpu.gpr[reg::RDX] << 32
    }

    // ---- ports ----

    /// #GP where neither IOPL nor the TSS's permission map allows the port.
    pub fn check_port(&mut self, port: u16, size: usize) -> Exec<()> {
        if !self.protected() || self.cpu.cpl() <= self.iopl() {
            return Ok(());
        }
        let tr = self.cpu.tr;
        let denied = Err(Exception::gp(0));
        let wide = tr.attr & 0x9d == 0x89;
        if !wide || tr.limit < 0x67 {
            return denied;
        }
        let map = self.read_system(tr.base.wrapping_add(0x66), 2)?;
        let at = map + u64::from(port >> 3);
        if at + 1 > u64::from(tr.limit) {
            return denied;
        }
        let bits = self.read_lin_word(tr.base.wrapping_add(at))?;
        let wanted = (1u32 << size) - 1;
        if bits >> (port & 7) & wanted != 0 {
            return denied;
        }
        Ok(())
    }

    fn read_lin_word(&mut self, lin: u64) -> Exec<u32> {
        let mut b = [0; 2];
        self.read_lin(lin, &mut b, Access::SYSTEM_READ)?;
        Ok(u32::from(u16::from_le_bytes(b)))
    }

    /// IN and OUT.
    pub fn port_io(&mut self, i: &Instruction, write: bool) -> Exec<Flow> {
        let (value, port) = if write { (1, 0) } else { (0, 1) };
        let size = match i.op_kind(value) {
            OpKind::Register => i.op_register(value).size(),
            _ => return Err(Exception::ud()),
        };
        let port = match i.op_kind(port) {
            OpKind::Register => self.get(Register::DX) as u16,
            _ => u16::from(i.immediate8()),
        };
        self.check_port(port, size)?;
        self.watch_port(port, size);
        let value = if write {
            (self.cpu.gpr[reg::RAX] & mask(size)) as u32
        } else {
            0
        };
        Ok(Flow::Exit(Exit::PortIo {
            port,
            size: size as u8,
            write,
            value,
        }))
    }

    /// Whether this vCPU shows itself as an AMD processor.
    pub fn is_amd(&self) -> bool {
        self.host.vendor() == Vendor::Amd
    }
}
