//! XSAVE, XRSTOR and FXSAVE families, XGETBV and XSETBV, on the vCPU's XSAVE image.
//!
//! Source: Intel SDM volume 1, chapter 13. What the guest has not enabled in its XCR0 is never read or written. The layout of components is
//! that of the guest's CPUID leaf 0xD, which the vCPU's own image shares. Supervisor states (XSAVES, XRSTORS) are not offered.

use std::ops::Range;

use hospes_engine::{cr, reg};
use iced_x86::{Code, Instruction};

use super::cx::{Cx, Exec, Flow, phys_read, phys_write};
use super::host::{Exception, Host};
use super::walk::Access;

const LEGACY: usize = 512;
const HEADER: usize = 64;
const XMM: usize = 160;
const AVX: (usize, usize) = (576, 256);
const MXCSR: usize = 24;
const MXCSR_RESET: u32 = 0x1f80;
const X87: u64 = 1;
const SSE: u64 = 2;
const YMM: u64 = 4;
const AVX512: u64 = 0xe0;
const COMPACT: u64 = 1 << 63;
/// Size in bytes of the largest component that a guest can enable: ZMM16 to ZMM31.
const COMPONENT_MAX: usize = 1024;
/// Components that a guest can enable at all.
const KNOWN: u64 = X87 | SSE | YMM | AVX512;

fn word(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().expect("eight bytes"))
}

fn half(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().expect("four bytes"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Save {
    Plain,
    Optimised,
    Compact,
}

impl<H: Host> Cx<'_, H> {
    /// Offset and size of an extended component (2 and up) in the standard format.
    fn component_place(&self, n: u32) -> (usize, usize) {
        if n == 2 {
            return AVX;
        }
        let c = self.host.cpuid(self.cpu, 0xd, n);
        (c[1] as usize, c[0] as usize)
    }

    /// Offset in memory of each component in `map`, in the compacted or standard format.
    fn layout(&self, map: u64, compact: bool) -> impl Iterator<Item = (u32, usize, usize, usize)> {
        let mut next = LEGACY + HEADER;
        let mut places = [(0u32, 0usize, 0usize, 0usize); 8];
        for n in 2..8u32 {
            if map & KNOWN & (1 << n) == 0 {
                continue;
            }
            let (own, size) = self.component_place(n);
            let aligned = n > 2 && self.host.cpuid(self.cpu, 0xd, n)[2] & 2 != 0;
            let start = if aligned {
                next.next_multiple_of(64)
            } else {
                next
            };
            places[n as usize] = (n, if compact { start } else { own }, own, size);
            next = start + size;
        }
        places.into_iter().filter(|p| p.0 != 0)
    }

    /// XSTATE_BV of the vCPU's own state.
    fn in_use(&self) -> u64 {
        let mut bv = word(&self.cpu.xsave.0, LEGACY);
        if half(&self.cpu.xsave.0, MXCSR) != MXCSR_RESET {
            bv |= SSE;
        }
        bv & KNOWN
    }

    fn mark_in_use(&mut self, bits: u64, on: bool) {
        let old = word(&self.cpu.xsave.0, LEGACY);
        let new = if on { old | bits } else { old & !bits };
        self.cpu.xsave.0[LEGACY..LEGACY + 8].copy_from_slice(&new.to_le_bytes());
    }

    fn need_xsave(&self) -> Exec<()> {
        if self.cpu.cr4 & cr::CR4_OSXSAVE == 0 {
            return Err(Exception::ud());
        }
        if self.cpu.cr0 & cr::CR0_TS != 0 {
            return Err(Exception::nm());
        }
        Ok(())
    }

    fn need_feature(&self, bit: u32) -> Exec<()> {
        if self.host.cpuid(self.cpu, 0xd, 1)[0] & (1 << bit) == 0 {
            return Err(Exception::ud());
        }
        Ok(())
    }

    /// Bytes 0 to 23 of a legacy area hold pointers whose form depends on REX.W: without it, 32-bit offsets and selectors.
    fn x87_header(&self, wide: bool) -> [u8; 24] {
        let mut h = [0; 24];
        h.copy_from_slice(&self.cpu.xsave.0[..24]);
        if !wide {
            h[12..16].fill(0);
            h[20..24].fill(0);
        }
        h
    }

    fn xmm_count(&self) -> usize {
        if self.code64() { 16 } else { 8 }
    }

    /// Bytes of a component that are saved and loaded: outside of 64-bit code there are only eight vector registers.
    fn component_reach(&self, n: u32, size: usize) -> usize {
        match n {
            _ if self.code64() => size,
            2 | 6 => size / 2,
            7 => 0,
            _ => size,
        }
    }

    pub fn xsave(&mut self, i: &Instruction, kind: Save) -> Exec<Flow> {
        self.need_xsave()?;
        match kind {
            Save::Plain => {}
            Save::Optimised => self.need_feature(0)?,
            Save::Compact => self.need_feature(1)?,
        }
        let wide = matches!(
            i.code(),
            Code::Xsave64_mem | Code::Xsaveopt64_mem | Code::Xsavec64_mem
        );
        let (s, off) = self.mem_ref(i);
        let wanted = self.edx_eax() & self.cpu.xcr0;
        let used = self.in_use() & wanted;
        let compact = kind == Save::Compact;
        let written = if kind == Save::Plain { wanted } else { used };
        let places = self.collect_layout(if compact { wanted } else { written }, compact);
        let end = (places.iter().flatten())
            .filter(|p| written & (1 << p.0) != 0)
            .map(|p| p.1 + p.3)
            .max()
            .unwrap_or(LEGACY + HEADER);
        let lin = self.linear(s, off, end as u64, true)?;
        if lin & 63 != 0 {
            return Err(Exception::gp(0));
        }
        self.check_range(lin, end, true)?;
        let access = self.access(true);

        let mut bv = [0; 8];
        self.read_lin(lin.wrapping_add(LEGACY as u64), &mut bv, self.access(false))?;
        let old_bv = if compact {
            0
        } else {
            u64::from_le_bytes(bv) & !wanted
        };
        let legacy = X87 | SSE;
        if written & legacy == legacy && wide && self.code64() {
            // All of it, as it lies in the vCPU's own image.
            self.write_image(lin, 0..XMM + 16 * 16, access)?;
        } else {
            self.xsave_legacy(lin, written, wide, compact, wanted)?;
        }
        for (n, at, own, size) in places.into_iter().flatten() {
            if written & (1 << n) != 0 {
                let size = self.component_reach(n, size.min(COMPONENT_MAX));
                self.write_image(lin.wrapping_add(at as u64), own..own + size, access)?;
            }
        }
        let header = lin.wrapping_add(LEGACY as u64);
        self.write_lin(header, &(old_bv | used).to_le_bytes(), access)?;
        if compact {
            let comp = wanted | COMPACT;
            self.write_lin(header.wrapping_add(8), &comp.to_le_bytes(), access)?;
        }
        self.watch(lin, end, true);
        Ok(Flow::Next)
    }

    /// The legacy area, part by part.
    fn xsave_legacy(
        &mut self,
        lin: u64,
        written: u64,
        wide: bool,
        compact: bool,
        wanted: u64,
    ) -> Exec<()> {
        let access = self.access(true);
        if written & X87 != 0 {
            let h = self.x87_header(wide);
            self.write_lin(lin, &h, access)?;
            self.store_own(lin, 32..XMM)?;
        }
        let mxcsr = if compact { SSE } else { SSE | YMM };
        if written & mxcsr != 0 || (!compact && wanted & mxcsr != 0) {
            self.store_own(lin, MXCSR..MXCSR + 8)?;
        }
        if written & SSE != 0 {
            self.store_own(lin, XMM..XMM + 16 * self.xmm_count())?;
        }
        Ok(())
    }

    /// Writes a part of the XSAVE image (at most a page) at a linear address, all or nothing.
    fn write_image(&mut self, lin: u64, part: Range<usize>, access: Access) -> Exec<()> {
        let s = self.span(lin, part.len(), access)?;
        let (a, b) = self.cpu.xsave.0[part].split_at(s.first_len);
        phys_write(self.host, s.first, a);
        if s.second_len != 0 {
            phys_write(self.host, s.second, b);
        }
        Ok(())
    }

    /// Reads a part of the XSAVE image (at most a page) from a linear address.
    fn read_image(&mut self, lin: u64, part: Range<usize>, access: Access) -> Exec<()> {
        let s = self.span(lin, part.len(), access)?;
        let (a, b) = self.cpu.xsave.0[part].split_at_mut(s.first_len);
        phys_read(self.host, s.first, a);
        if s.second_len != 0 {
            phys_read(self.host, s.second, b);
        }
        Ok(())
    }

    fn collect_layout(&self, map: u64, compact: bool) -> [Option<(u32, usize, usize, usize)>; 8] {
        let mut all = [None; 8];
        for (slot, p) in all.iter_mut().zip(self.layout(map, compact)) {
            *slot = Some(p);
        }
        all
    }

    /// Writes a part of the vCPU's own image, at the same offset, to memory.
    fn store_own(&mut self, lin: u64, part: Range<usize>) -> Exec<()> {
        let access = self.access(true);
        self.write_image(lin.wrapping_add(part.start as u64), part, access)
    }

    /// Checks that all pages of a range allow the access, before any byte moves.
    fn check_range(&mut self, lin: u64, len: usize, write: bool) -> Exec<()> {
        let access = self.access(write);
        let mut at = 0;
        while at < len {
            let here = lin.wrapping_add(at as u64);
            self.translate(here, access)?;
            at += 4096 - (here & 0xfff) as usize;
        }
        Ok(())
    }

    /// Brings the XSAVE image up to date as far as it is needed, and makes it the state that the guest goes on with.
    pub fn xrstor(&mut self, i: &Instruction) -> Exec<Flow> {
        self.need_xsave()?;
        let wide = i.code() == Code::Xrstor64_mem;
        let (s, off) = self.mem_ref(i);
        let lin = self.linear(s, off, (LEGACY + HEADER) as u64, false)?;
        let gp = Exception::gp(0);
        if lin & 63 != 0 {
            return Err(gp);
        }
        let access = self.access(false);
        let mut area = [0; LEGACY + HEADER];
        self.read_lin(lin, &mut area, access)?;
        let header = &area[LEGACY..];
        let (bv, comp) = (word(header, 0), word(header, 8));
        let xcr0 = self.cpu.xcr0;
        let compact = comp & COMPACT != 0;
        let bad = if compact {
            self.need_feature(1).is_err()
                || comp & !COMPACT & !xcr0 != 0
                || bv & !comp != 0
                || header[16..].iter().any(|&b| b != 0)
        } else {
            bv & !xcr0 != 0 || header[8..24].iter().any(|&b| b != 0)
        };
        if bad {
            return Err(gp);
        }
        let wanted = self.edx_eax() & xcr0;
        let load = wanted & bv;
        // Outside of 64-bit code registers that are out of reach keep their values.
        if !(self.code64() && self.host.is_all_fpu(wanted)) {
            self.host.load_fpu(self.cpu);
        }
        let mxcsr = if compact {
            (load & SSE != 0).then(|| half(&area, MXCSR))
        } else {
            (wanted & (SSE | YMM) != 0).then(|| half(&area, MXCSR))
        };
        if mxcsr.is_some_and(|m| m & !self.mxcsr_mask() != 0) {
            return Err(gp);
        }
        // All pages are checked before any register changes.
        let places = self.collect_layout(if compact { comp } else { wanted }, compact);
        for &(n, at, _, size) in places.iter().flatten() {
            if load & (1 << n) != 0 {
                self.check_range(lin.wrapping_add(at as u64), size, false)?;
            }
        }
        if wanted & X87 != 0 {
            self.load_x87(&area, load & X87 != 0, wide);
        }
        match mxcsr {
            Some(m) => self.set_mxcsr(m),
            None if compact && wanted & SSE != 0 => self.set_mxcsr(MXCSR_RESET),
            None => {}
        }
        if wanted & SSE != 0 {
            let xmm = XMM..XMM + 16 * self.xmm_count();
            if load & SSE != 0 {
                self.cpu.xsave.0[xmm.clone()].copy_from_slice(&area[xmm]);
            } else {
                self.cpu.xsave.0[xmm].fill(0);
            }
        }
        for n in (2..8u32).filter(|n| wanted & (1 << n) != 0) {
            let (own, size) = self.component_place(n);
            let size = self.component_reach(n, size.min(COMPONENT_MAX));
            let place = places.iter().flatten().find(|p| p.0 == n);
            match place.filter(|_| load & (1 << n) != 0) {
                Some(p) => {
                    self.read_image(lin.wrapping_add(p.1 as u64), own..own + size, access)?
                }
                None => self.cpu.xsave.0[own..own + size].fill(0),
            }
        }
        self.mark_in_use(load, true);
        // The registers out of reach keep their values.
        let kept = if self.code64() { 0 } else { wanted & !X87 };
        self.mark_in_use(wanted & !load & !kept, false);
        self.mark_in_use(kept, true);
        self.watch(lin, LEGACY + HEADER, false);
        self.host.store_fpu(self.cpu);
        Ok(Flow::Next)
    }

    fn mxcsr_mask(&self) -> u32 {
        match half(&self.cpu.xsave.0, MXCSR + 4) {
            0 => 0xffbf,
            m => m,
        }
    }

    fn set_mxcsr(&mut self, v: u32) {
        self.cpu.xsave.0[MXCSR..MXCSR + 4].copy_from_slice(&v.to_le_bytes());
    }

    /// Loads the x87 part of a legacy area, or its initial state.
    fn load_x87(&mut self, area: &[u8], present: bool, wide: bool) {
        let own = &mut self.cpu.xsave.0;
        if !present {
            own[..24].fill(0);
            own[..2].copy_from_slice(&0x37fu16.to_le_bytes());
            own[32..XMM].fill(0);
            return;
        }
        own[..24].copy_from_slice(&area[..24]);
        own[32..XMM].copy_from_slice(&area[32..XMM]);
        // The byte behind the abridged tags is reserved; selectors are not kept.
        own[5] = 0;
        if !wide {
            own[12..16].fill(0);
            own[20..24].fill(0);
        }
    }

    fn need_fxsr(&self) -> Exec<()> {
        if self.cpu.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 {
            return Err(Exception::nm());
        }
        Ok(())
    }

    /// Whether FXSAVE and FXRSTOR leave the XMM registers alone (AMD's fast form).
    fn fxsr_fast(&self) -> bool {
        self.cpu.msr.efer & cr::EFER_FFXSR != 0 && self.code64() && self.cpu.cpl() == 0
    }

    fn fx_area(&mut self, i: &Instruction, write: bool) -> Exec<u64> {
        self.need_fxsr()?;
        let (s, off) = self.mem_ref(i);
        let lin = self.linear(s, off, LEGACY as u64, write)?;
        if lin & 15 != 0 {
            return Err(Exception::gp(0));
        }
        self.check_range(lin, LEGACY, write)?;
        self.watch(lin, LEGACY, write);
        Ok(lin)
    }

    pub fn fxsave(&mut self, i: &Instruction) -> Exec<Flow> {
        let lin = self.fx_area(i, true)?;
        let wide = i.code() == Code::Fxsave64_m512byte;
        let h = self.x87_header(wide);
        let access = self.access(true);
        self.write_lin(lin, &h, access)?;
        self.store_own(lin, MXCSR..XMM)?;
        if !self.fxsr_fast() {
            self.store_own(lin, XMM..XMM + 16 * self.xmm_count())?;
        }
        Ok(Flow::Next)
    }

    pub fn fxrstor(&mut self, i: &Instruction) -> Exec<Flow> {
        let lin = self.fx_area(i, false)?;
        let mut area = [0; LEGACY];
        let access = self.access(false);
        self.read_lin(lin, &mut area, access)?;
        let m = half(&area, MXCSR);
        let sse = self.cpu.cr4 & cr::CR4_OSFXSR != 0;
        if sse && m & !self.mxcsr_mask() != 0 {
            return Err(Exception::gp(0));
        }
        self.load_x87(&area, true, i.code() == Code::Fxrstor64_m512byte);
        self.mark_in_use(X87, true);
        if sse {
            self.set_mxcsr(m);
            if !self.fxsr_fast() {
                let xmm = XMM..XMM + 16 * self.xmm_count();
                self.cpu.xsave.0[xmm.clone()].copy_from_slice(&area[xmm]);
            }
            self.mark_in_use(SSE, true);
        }
        Ok(Flow::Next)
    }

    pub fn xgetbv(&mut self) -> Exec<Flow> {
        if self.cpu.cr4 & cr::CR4_OSXSAVE == 0 {
            return Err(Exception::ud());
        }
        let v = match self.cpu.gpr[reg::RCX] as u32 {
            0 => self.cpu.xcr0,
            1 if self.need_feature(2).is_ok() => self.cpu.xcr0 & self.in_use(),
            _ => return Err(Exception::gp(0)),
        };
        self.set_edx_eax(v);
        Ok(Flow::Next)
    }

    pub fn xsetbv(&mut self) -> Exec<Flow> {
        if self.cpu.cr4 & cr::CR4_OSXSAVE == 0 {
            return Err(Exception::ud());
        }
        self.need_cpl0()?;
        let v = self.edx_eax();
        let d = self.host.cpuid(self.cpu, 0xd, 0);
        let offered = (u64::from(d[0]) | u64::from(d[3]) << 32) & KNOWN;
        let wide = v & AVX512;
        let bad = self.cpu.gpr[reg::RCX] as u32 != 0
            || v & X87 == 0
            || v & !offered != 0
            || (v & YMM != 0 && v & SSE == 0)
            || (wide != 0 && (wide != AVX512 || v & YMM == 0));
        if bad {
            return Err(Exception::gp(0));
        }
        self.cpu.xcr0 = v;
        Ok(Flow::Next)
    }
}
