//! SYSCALL, SYSRET, SYSENTER, SYSEXIT.
//!
//! Sources: Intel SDM and AMD APM, volume 2 and 3. The vendors differ: AMD knows SYSCALL outside 64-bit mode but no SYSENTER in long mode.

use hospes_engine::{Segment, cr, reg, rflags, seg};

use super::cx::{Cx, Exec, Flow, canonical};
use super::host::{Exception, Host};

const CODE64: u16 = 0xa09b;
const CODE32: u16 = 0xc09b;
const DATA: u16 = 0xc093;
const DPL3: u16 = 3 << 5;
/// RFLAGS bits that SYSRET loads from R11.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;

fn flat(selector: u16, attr: u16) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        attr,
    }
}

impl<H: Host> Cx<'_, H> {
    fn need_syscall(&self) -> Exec<()> {
        let offered = self.protected()
            && self.cpu.msr.efer & cr::EFER_SCE != 0
            && (self.code64() || self.is_amd());
        if offered {
            Ok(())
        } else {
            Err(Exception::ud())
        }
    }

    pub fn syscall(&mut self) -> Exec<Flow> {
        self.need_syscall()?;
        let star = self.cpu.msr.star;
        let cs = (star >> 32) as u16 & !3;
        self.cpu.gpr[reg::RCX] = self.next;
        let code = if self.long_mode() {
            self.cpu.gpr[reg::R11] = self.cpu.rflags & !rflags::RF;
            self.cpu.rip = if self.code64() {
                self.cpu.msr.lstar
            } else {
                self.cpu.msr.cstar
            };
            let masked = self.cpu.msr.sfmask | rflags::RF;
            self.cpu.rflags = self.cpu.rflags & !masked | rflags::FIXED;
            CODE64
        } else {
            self.cpu.rip = star & 0xffff_ffff;
            self.cpu.rflags &= !(rflags::IF | rflags::VM | rflags::RF);
            CODE32
        };
        self.cpu.seg[seg::CS] = flat(cs, code);
        self.cpu.seg[seg::SS] = flat(cs.wrapping_add(8), DATA);
        Ok(Flow::JumpTfAfter)
    }

    /// SYSRET; `wide` with REX.W.
    pub fn sysret(&mut self, wide: bool) -> Exec<Flow> {
        self.need_syscall()?;
        self.need_cpl0()?;
        let base = (self.cpu.msr.star >> 48) as u16;
        let rcx = self.cpu.gpr[reg::RCX];
        if wide && !self.is_amd() && !canonical(rcx) {
            return Err(Exception::gp(0));
        }
        if self.long_mode() {
            let r11 = self.cpu.gpr[reg::R11];
            self.cpu.rflags = r11 & SYSRET_FLAGS | rflags::FIXED;
        } else {
            self.cpu.rflags |= rflags::IF;
        }
        let cs = if wide { base.wrapping_add(16) } else { base } | 3;
        let code = if wide { CODE64 } else { CODE32 } | DPL3;
        self.cpu.rip = if wide { rcx } else { rcx & 0xffff_ffff };
        self.cpu.seg[seg::CS] = flat(cs, code);
        self.cpu.seg[seg::SS] = flat(base.wrapping_add(8) | 3, DATA | DPL3);
        Ok(Flow::JumpTfAfter)
    }

    fn need_sysenter(&self) -> Exec<()> {
        if self.is_amd() && self.long_mode() {
            return Err(Exception::ud());
        }
        if !self.protected() || self.cpu.msr.sysenter_cs & 0xfffc == 0 {
            return Err(Exception::gp(0));
        }
        Ok(())
    }

    pub fn sysenter(&mut self) -> Exec<Flow> {
        self.need_sysenter()?;
        let cs = self.cpu.msr.sysenter_cs as u16 & 0xfffc;
        let (code, width) = if self.long_mode() {
            (CODE64, u64::MAX)
        } else {
            (CODE32, 0xffff_ffff)
        };
        self.cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        self.cpu.gpr[reg::RSP] = self.cpu.msr.sysenter_esp & width;
        self.cpu.rip = self.cpu.msr.sysenter_eip & width;
        self.cpu.seg[seg::CS] = flat(cs, code);
        self.cpu.seg[seg::SS] = flat(cs.wrapping_add(8), DATA);
        Ok(Flow::Jump)
    }

    /// SYSEXIT; `wide` with REX.W.
    pub fn sysexit(&mut self, wide: bool) -> Exec<Flow> {
        // The privilege counts first, also where the instruction is none.
        self.need_cpl0()?;
        self.need_sysenter()?;
        let base = self.cpu.msr.sysenter_cs as u16 & 0xfffc;
        let (rip, rsp) = (self.cpu.gpr[reg::RDX], self.cpu.gpr[reg::RCX]);
        let (cs, code, width) = if wide {
            if !canonical(rip) || !canonical(rsp) {
                return Err(Exception::gp(0));
            }
            (base.wrapping_add(32), CODE64, u64::MAX)
        } else {
            (base.wrapping_add(16), CODE32, 0xffff_ffff)
        };
        self.cpu.rip = rip & width;
        self.cpu.gpr[reg::RSP] = rsp & width;
        self.cpu.seg[seg::CS] = flat(cs | 3, code | DPL3);
        self.cpu.seg[seg::SS] = flat(cs.wrapping_add(8) | 3, DATA | DPL3);
        Ok(Flow::Jump)
    }
}
