//! Model-specific registers: RDMSR and WRMSR.
//!
//! Sources: Intel SDM volume 4; AMD PPRs for families 17h to 1Ah for the C001_xxxx range. What is not listed here is asked of the host, then
//! raises #GP, which guests expect of registers that CPUID does not announce.

use hospes_engine::{Exit, cr, reg, seg};
use hospes_units::Gva;

use super::cx::{Cx, Exec, Flow, canonical};
use super::host::{Exception, Host, TlbFlush};
use super::lapic::{self, Effect};
use super::walk::PHYS_BITS;

/// Writing a guest physical address here asks for a hypercall page.
pub const MSR_HYPERCALL_PAGE: u32 = 0x4000_0000;

const APIC_BSP: u64 = 1 << 8;
const APIC_EXTD: u64 = 1 << 10;
const APIC_ENABLED: u64 = 1 << 11;
/// Eight variable ranges, fixed ranges, write combining.
const MTRR_CAP: u64 = 0x508;
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
/// Microcode revisions that no erratum check takes for an old one.
const MICROCODE_INTEL: u64 = 0xffff_ffff << 32;
const MICROCODE_AMD: u64 = 0xffff_ffff;
/// AMD HWCR: the time-stamp counter runs at the P0 frequency.
const HWCR: u64 = 1 << 24;
/// AMD DE_CFG: LFENCE waits for all earlier instructions.
const DE_CFG: u64 = 1 << 1;

fn memory_type(t: u64) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6)
}

fn pat_valid(v: u64) -> bool {
    v.to_le_bytes()
        .iter()
        .all(|&t| memory_type(u64::from(t)) || t == 7)
}

fn mtrr_fixed_valid(v: u64) -> bool {
    v.to_le_bytes().iter().all(|&t| memory_type(u64::from(t)))
}

fn need(ok: bool) -> Exec<()> {
    if ok { Ok(()) } else { Err(Exception::gp(0)) }
}

impl<H: Host> Cx<'_, H> {
    pub fn rdmsr(&mut self) -> Exec<Flow> {
        self.need_cpl0()?;
        let v = self.read_msr(self.cpu.gpr[reg::RCX] as u32)?;
        self.set_edx_eax(v);
        Ok(Flow::Next)
    }

    pub fn wrmsr(&mut self) -> Exec<Flow> {
        self.need_cpl0()?;
        let index = self.cpu.gpr[reg::RCX] as u32;
        let value = self.edx_eax();
        if index == MSR_HYPERCALL_PAGE {
            return Ok(Flow::Exit(Exit::MsrWrite { index, value }));
        }
        self.write_msr(index, value)?;
        Ok(Flow::Next)
    }

    fn offers(&self, leaf: u32, word: usize, bit: u32) -> bool {
        let base = leaf & 0x8000_0000;
        self.host.cpuid(self.cpu, base, 0)[0] >= leaf
            && self.host.cpuid(self.cpu, leaf, 0)[word] & (1 << bit) != 0
    }

    /// CPUID 7.EDX and 8000_0008.EBX: some form of IBRS, IBPB, STIBP or SSBD.
    fn offers_spec_ctrl(&self) -> bool {
        [26, 27, 31].iter().any(|&b| self.offers(7, 3, b))
            || [12, 14, 15, 24]
                .iter()
                .any(|&b| self.offers(0x8000_0008, 1, b))
    }

    fn read_msr(&mut self, index: u32) -> Exec<u64> {
        let m = &self.cpu.msr;
        Ok(match index {
            0x10 => self.tsc(),
            0x1b => m.apic_base,
            0x3b if self.offers(7, 1, 1) => m.tsc_adjust,
            0x48 if self.offers_spec_ctrl() => m.spec_ctrl,
            0x8b if self.is_amd() => MICROCODE_AMD,
            0x8b => MICROCODE_INTEL,
            // Platform id, SMI count, platform info, feature enables, machine-check capability and status.
            0x17 | 0x34 | 0xce | 0x140 | 0x179 | 0x17a => 0,
            // Feature control: locked, nothing on.
            0x3a if !self.is_amd() => 1,
            0xfe => MTRR_CAP,
            0x10a if self.offers(7, 3, 29) => self.host.arch_capabilities(),
            0x174 => m.sysenter_cs,
            0x175 => m.sysenter_esp,
            0x176 => m.sysenter_eip,
            0x1a0 if !self.is_amd() => m.misc_enable,
            0x1d9 => m.debugctl,
            // Last-branch and last-exception records.
            0x1db..=0x1de => 0,
            0x200..=0x20f => m.mtrr_var[(index - 0x200) as usize],
            0x277 => m.pat,
            0x2ff => m.mtrr_def_type,
            0x800..=0x8ff if m.apic_base & APIC_EXTD != 0 => {
                lapic::read(&self.cpu.lapic, index - 0x800, true).map_err(|_| Exception::gp(0))?
            }
            MSR_HYPERCALL_PAGE => 0,
            0xc000_0080 => m.efer,
            0xc000_0081 => m.star,
            0xc000_0082 => m.lstar,
            0xc000_0083 => m.cstar,
            0xc000_0084 => m.sfmask,
            0xc000_0100 => self.cpu.seg[seg::FS].base,
            0xc000_0101 => self.cpu.seg[seg::GS].base,
            0xc000_0102 => m.kernel_gs_base,
            0xc000_0103 => m.tsc_aux,
            0xc001_011f if self.offers(0x8000_0008, 1, 25) => m.virt_spec_ctrl,
            _ => match MTRR_FIXED.iter().position(|&f| f == index) {
                Some(n) => m.mtrr_fixed[n],
                None => self.read_other(index)?,
            },
        })
    }

    fn read_other(&mut self, index: u32) -> Exec<u64> {
        if self.is_amd() {
            match index {
                0xc000_0104 => return Ok(1 << 32),
                0xc001_0015 => return Ok(HWCR),
                0xc001_1029 => return Ok(DE_CFG),
                i if amd_silent(i) => return Ok(0),
                _ => {}
            }
        }
        self.host.read_msr(self.cpu, index).ok_or(Exception::gp(0))
    }

    fn write_msr(&mut self, index: u32, v: u64) -> Exec<()> {
        match index {
            0x10 => {
                let delta = v.wrapping_sub(self.tsc());
                self.move_tsc(delta);
            }
            0x1b => self.write_apic_base(v)?,
            0x3b if self.offers(7, 1, 1) => {
                let delta = v.wrapping_sub(self.cpu.msr.tsc_adjust);
                self.move_tsc(delta);
            }
            0x48 if self.offers_spec_ctrl() => {
                // IBRS, STIBP, SSBD, and the newer controls of branch predictors.
                need(v & !0x5f7 == 0)?;
                self.cpu.msr.spec_ctrl = v;
            }
            // Commands: predictor barrier, cache flush. The host's own kernel keeps processes apart.
            0x49 if self.offers_spec_ctrl() => need(v & !0x81 == 0)?,
            0x10b if self.offers(7, 3, 28) => need(v & !1 == 0)?,
            // Microcode update, and writing zero to the revision to read it afresh.
            0x79 | 0x8b => {}
            0x17a => {}
            // Feature enables: none is there to be turned on, and kernels for Intel's processors write that back.
            0x140 => need(v == 0)?,
            0x174 => self.cpu.msr.sysenter_cs = v & 0xffff_ffff,
            0x175 => self.cpu.msr.sysenter_esp = checked(v)?,
            0x176 => self.cpu.msr.sysenter_eip = checked(v)?,
            0x1a0 if !self.is_amd() => self.cpu.msr.misc_enable = v,
            0x1d9 => {
                need(v & !0x3 == 0)?;
                self.cpu.msr.debugctl = v;
            }
            0x200..=0x20f => {
                let n = (index - 0x200) as usize;
                let low = if n.is_multiple_of(2) { 0xff } else { 0x800 };
                need(v >> PHYS_BITS == 0 && v & 0xfff & !low == 0)?;
                need(n % 2 == 1 || memory_type(v & 0xff))?;
                self.cpu.msr.mtrr_var[n] = v;
            }
            0x277 => {
                need(pat_valid(v))?;
                self.cpu.msr.pat = v;
            }
            0x2ff => {
                need(v & !0xcff == 0 && memory_type(v & 0xff))?;
                self.cpu.msr.mtrr_def_type = v;
            }
            0x800..=0x8ff if self.cpu.msr.apic_base & APIC_EXTD != 0 => {
                self.write_apic(index - 0x800, v)?;
            }
            0xc000_0080 => self.write_efer(v)?,
            0xc000_0081 => self.cpu.msr.star = v,
            0xc000_0082 => self.cpu.msr.lstar = checked(v)?,
            0xc000_0083 => self.cpu.msr.cstar = checked(v)?,
            0xc000_0084 => self.cpu.msr.sfmask = v & 0xffff_ffff,
            0xc000_0100 => self.cpu.seg[seg::FS].base = checked(v)?,
            0xc000_0101 => self.cpu.seg[seg::GS].base = checked(v)?,
            0xc000_0102 => self.cpu.msr.kernel_gs_base = checked(v)?,
            0xc000_0103 => {
                need(self.is_amd() || v >> 32 == 0)?;
                self.cpu.msr.tsc_aux = v & 0xffff_ffff;
            }
            0xc001_011f if self.offers(0x8000_0008, 1, 25) => {
                need(v & !4 == 0)?;
                self.cpu.msr.virt_spec_ctrl = v;
            }
            _ => match MTRR_FIXED.iter().position(|&f| f == index) {
                Some(n) => {
                    need(mtrr_fixed_valid(v))?;
                    self.cpu.msr.mtrr_fixed[n] = v;
                }
                None => self.write_other(index, v)?,
            },
        }
        Ok(())
    }

    fn write_other(&mut self, index: u32, v: u64) -> Exec<()> {
        let ignored = matches!(index, 0xc001_0015 | 0xc001_1029) || amd_silent(index);
        if self.is_amd() && ignored {
            return Ok(());
        }
        self.host
            .write_msr(self.cpu, index, v)
            .ok_or(Exception::gp(0))
    }

    /// Moves the guest's time-stamp counter, which TSC_ADJUST records.
    fn move_tsc(&mut self, delta: u64) {
        let m = &mut self.cpu.msr;
        m.tsc_offset = m.tsc_offset.wrapping_add(delta);
        m.tsc_adjust = m.tsc_adjust.wrapping_add(delta);
    }

    fn write_apic_base(&mut self, v: u64) -> Exec<()> {
        let old = self.cpu.msr.apic_base;
        let reserved = !(((1 << PHYS_BITS) - 1) & !0xfff | APIC_BSP | APIC_EXTD | APIC_ENABLED);
        let mode = |b: u64| (b & APIC_ENABLED != 0, b & APIC_EXTD != 0);
        need(v & reserved == 0)?;
        need(match (mode(old), mode(v)) {
            (_, (false, true)) => false,
            ((true, true), (true, false)) => false,
            ((false, _), (true, true)) => false,
            ((true, false), (true, true)) => self.offers(1, 2, 21),
            _ => true,
        })?;
        self.cpu.msr.apic_base = v & !APIC_BSP | old & APIC_BSP;
        Ok(())
    }

    fn write_apic(&mut self, r: u32, v: u64) -> Exec<()> {
        match lapic::write(&mut self.cpu.lapic, r, v, true) {
            Ok(Effect::None) => Ok(()),
            Ok(Effect::Ipi(ipi)) => {
                self.host.send_ipi(ipi);
                Ok(())
            }
            Ok(Effect::Enabled(on)) => {
                self.host.set_apic_enabled(on);
                Ok(())
            }
            Err(lapic::BadRegister) => Err(Exception::gp(0)),
        }
    }

    fn write_efer(&mut self, v: u64) -> Exec<()> {
        let old = self.cpu.msr.efer;
        let mut allowed = cr::EFER_SCE | cr::EFER_LMA;
        for (bit, leaf, word, feature) in [
            (cr::EFER_LME, 0x8000_0001, 3, 29),
            (cr::EFER_NXE, 0x8000_0001, 3, 20),
            (cr::EFER_FFXSR, 0x8000_0001, 3, 25),
            (cr::EFER_AIBRSE, 0x8000_0021, 0, 8),
        ] {
            if self.offers(leaf, word, feature) {
                allowed |= bit;
            }
        }
        let lme_changes = (old ^ v) & cr::EFER_LME != 0;
        need(v & !allowed == 0 && !(lme_changes && self.cpu.cr0 & cr::CR0_PG != 0))?;
        self.cpu.msr.efer = v & !cr::EFER_LMA | old & cr::EFER_LMA;
        if (old ^ v) & cr::EFER_NXE != 0 {
            self.host.tlb_flush(self.cpu, TlbFlush::All);
        }
        Ok(())
    }
}

/// AMD registers that Linux touches without expecting faults: they read as zero and ignore writes.
fn amd_silent(index: u32) -> bool {
    matches!(
        index,
        // Performance counters, old and new.
        0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b
        // SYSCFG, NB_CFG, interrupt pending, patch loader.
        | 0xc001_0010 | 0xc001_001f | 0xc001_0055 | 0xc001_0020
        // P-state limits, VM_CR, OSVW.
        | 0xc001_0061..=0xc001_0063 | 0xc001_0114 | 0xc001_0140 | 0xc001_0141
        // LS_CFG, IC_CFG, DC_CFG, BU_CFG2, spectral chicken.
        | 0xc001_1020..=0xc001_1023 | 0xc001_102a | 0xc001_10e3
    )
}

fn checked(v: u64) -> Exec<u64> {
    need(canonical(v))?;
    Ok(Gva(v).0)
}
