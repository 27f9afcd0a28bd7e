//! Far jumps, calls and returns, IRET.
//!
//! Source: Intel SDM volume 2, JMP, CALL, RET and IRET. Call gates, task gates, task switches and virtual-8086 mode are not offered: using
//! them raises #GP.

use hospes_engine::{Segment, reg, rflags, seg};
use iced_x86::{Instruction, OpKind};

use super::cx::{Cx, Exec, Flow, canonical, set_sized};
use super::host::{Exception, Host, vector};
use super::segment::{Descriptor, is_null, null_stack, sel_code};

/// RFLAGS bits that IRET and POPF may change at CPL 0, IOPL apart.
const POPPED: u64 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;

impl<H: Host> Cx<'_, H> {
    /// Checks a new instruction pointer against the code segment it will be used with.
    pub fn check_rip(&self, cs: &Segment, rip: u64) -> Exec<()> {
        let fits = if self.long_mode() && cs.attr & Segment::ATTR_L != 0 {
            canonical(rip)
        } else {
            rip <= u64::from(cs.limit)
        };
        if fits { Ok(()) } else { Err(Exception::gp(0)) }
    }

    fn check_l_and_d(&self, d: Descriptor, code: u32) -> Exec<()> {
        let both = Segment::ATTR_L | Segment::ATTR_DB;
        if self.long_mode() && d.attr() & both == both {
            return Err(Exception::gp(code));
        }
        Ok(())
    }

    /// The code segment of a far jump or call, at the same privilege level.
    fn jump_segment(&mut self, selector: u16) -> Exec<Segment> {
        if !self.protected() {
            return Ok(Segment {
                selector,
                base: u64::from(selector) << 4,
                ..self.cpu.seg[seg::CS]
            });
        }
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        let code = sel_code(selector);
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        let cpl = self.cpu.cpl();
        let allowed = if d.is_conforming() {
            d.dpl() <= cpl
        } else {
            d.is_code() && d.dpl() == cpl && (selector & 3) as u8 <= cpl
        };
        if !allowed {
            return Err(Exception::gp(code));
        }
        if !d.present() {
            return Err(Exception::np(code));
        }
        self.check_l_and_d(d, code)?;
        self.mark_accessed(selector, d)?;
        Ok(Segment {
            attr: d.attr() | 1,
            ..d.segment(selector & !3 | u16::from(cpl))
        })
    }

    /// Selector, offset and operand size (bytes) of a far jump or call.
    fn far_target(&mut self, i: &Instruction) -> Exec<(u16, u64, usize)> {
        match i.op0_kind() {
            OpKind::FarBranch16 => Ok((i.far_branch_selector(), u64::from(i.far_branch16()), 2)),
            OpKind::FarBranch32 => Ok((i.far_branch_selector(), u64::from(i.far_branch32()), 4)),
            _ => {
                let size = i.memory_size().size() - 2;
                let (s, off) = self.mem_ref(i);
                let offset = self.read_mem(s, off, size)?;
                let at = off.wrapping_add(size as u64);
                let at = at & super::cx::mask(self.address_size(i));
                let selector = self.read_mem(s, at, 2)?;
                Ok((selector as u16, offset, size))
            }
        }
    }

    pub fn jmp_far(&mut self, i: &Instruction) -> Exec<Flow> {
        let (selector, offset, _) = self.far_target(i)?;
        let cs = self.jump_segment(selector)?;
        self.check_rip(&cs, offset)?;
        self.cpu.seg[seg::CS] = cs;
        self.cpu.rip = offset;
        Ok(Flow::Jump)
    }

    pub fn call_far(&mut self, i: &Instruction) -> Exec<Flow> {
        let (selector, offset, size) = self.far_target(i)?;
        let cs = self.jump_segment(selector)?;
        self.check_rip(&cs, offset)?;
        let (old_cs, next) = (self.cpu.seg[seg::CS].selector, self.next);
        let mut sp = self.sp();
        self.push_at(&mut sp, size, u64::from(old_cs))?;
        self.push_at(&mut sp, size, next)?;
        self.set_sp(sp);
        self.cpu.seg[seg::CS] = cs;
        self.cpu.rip = offset;
        Ok(Flow::Jump)
    }

    /// The code segment that RETF or IRET returns to.
    fn return_segment(&mut self, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        let code = sel_code(selector);
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        let rpl = (selector & 3) as u8;
        let allowed = if d.is_conforming() {
            d.dpl() <= rpl
        } else {
            d.is_code() && d.dpl() == rpl
        };
        if !allowed || rpl < self.cpu.cpl() {
            return Err(Exception::gp(code));
        }
        self.check_l_and_d(d, code)?;
        if !d.present() {
            return Err(Exception::np(code));
        }
        self.mark_accessed(selector, d)?;
        Ok(Segment {
            attr: d.attr() | 1,
            ..d.segment(selector)
        })
    }

    /// The stack segment that RETF or IRET returns to.
    fn return_stack(&mut self, selector: u16, cs: &Segment) -> Exec<Segment> {
        let cpl = (cs.selector & 3) as u8;
        if is_null(selector) {
            let to64 = self.long_mode() && cs.attr & Segment::ATTR_L != 0;
            return if to64 && cpl != 3 && (selector & 3) as u8 == cpl {
                Ok(null_stack(selector, cpl))
            } else {
                Err(Exception::gp(0))
            };
        }
        self.checked_stack(selector, cpl, vector::GP, 0)
    }

    /// Enters the returned-to context; `stack` where SS and RSP are loaded too.
    fn finish_return(
        &mut self,
        cs: Segment,
        rip: u64,
        stack: Option<(Segment, u64)>,
        release: u64,
    ) {
        let cpl = self.cpu.cpl();
        let outer = (cs.selector & 3) as u8;
        self.cpu.seg[seg::CS] = cs;
        self.cpu.rip = rip;
        if let Some((ss, sp)) = stack {
            self.cpu.seg[seg::SS] = ss;
            // A 16-bit stack segment loads SP alone: the upper half of ESP stays, as on hardware.
            let width = self.stack_size();
            let sp = sp.wrapping_add(release);
            set_sized(&mut self.cpu.gpr[reg::RSP], width, sp);
        }
        if outer > cpl {
            for s in [seg::ES, seg::DS, seg::FS, seg::GS] {
                let r = &mut self.cpu.seg[s];
                let conforming = r.attr & 0xc == 0xc;
                if r.attr & 0x90 == 0x90 && (r.attr >> 5 & 3) < u16::from(outer) && !conforming {
                    r.selector = 0;
                    r.attr = 0;
                }
            }
        }
    }

    pub fn ret_far(&mut self, size: usize, release: u64) -> Exec<Flow> {
        let mut sp = self.sp();
        let rip = self.pop_at(&mut sp, size)?;
        let selector = self.pop_at(&mut sp, size)? as u16;
        let stack_mask = super::cx::mask(self.stack_size());
        sp = sp.wrapping_add(release) & stack_mask;
        if !self.protected() {
            let cs = self.jump_segment(selector)?;
            self.check_rip(&cs, rip)?;
            self.set_sp(sp);
            self.cpu.seg[seg::CS] = cs;
            self.cpu.rip = rip;
            return Ok(Flow::Jump);
        }
        let cs = self.return_segment(selector)?;
        if (selector & 3) as u8 > self.cpu.cpl() {
            let new_sp = self.pop_at(&mut sp, size)?;
            let ss = self.pop_at(&mut sp, size)? as u16;
            let ss = self.return_stack(ss, &cs)?;
            self.check_rip(&cs, rip)?;
            self.finish_return(cs, rip, Some((ss, new_sp)), release);
        } else {
            self.check_rip(&cs, rip)?;
            self.set_sp(sp);
            self.finish_return(cs, rip, None, 0);
        }
        Ok(Flow::Jump)
    }

    pub fn iret(&mut self, size: usize) -> Exec<Flow> {
        let mut sp = self.sp();
        if self.protected() && self.flag(rflags::NT) {
            return Err(Exception::gp(0));
        }
        let rip = self.pop_at(&mut sp, size)?;
        let selector = self.pop_at(&mut sp, size)? as u16;
        let flags = self.pop_at(&mut sp, size)?;
        if !self.protected() {
            let cs = self.jump_segment(selector)?;
            self.check_rip(&cs, rip)?;
            self.set_sp(sp);
            self.cpu.seg[seg::CS] = cs;
            self.cpu.rip = rip;
            self.load_flags(flags, size, true);
            self.cpu.nmi_blocked = false;
            return Ok(Flow::Return);
        }
        if size >= 4 && flags & rflags::VM != 0 && !self.long_mode() && self.cpu.cpl() == 0 {
            return Err(Exception::gp(0));
        }
        let cs = self.return_segment(selector)?;
        let stack = if self.code64() || (selector & 3) as u8 > self.cpu.cpl() {
            let new_sp = self.pop_at(&mut sp, size)?;
            let ss = self.pop_at(&mut sp, size)? as u16;
            Some((self.return_stack(ss, &cs)?, new_sp))
        } else {
            None
        };
        self.check_rip(&cs, rip)?;
        self.load_flags(flags, size, true);
        if stack.is_none() {
            self.set_sp(sp);
        }
        self.finish_return(cs, rip, stack, 0);
        self.cpu.nmi_blocked = false;
        Ok(Flow::Return)
    }

    /// Loads RFLAGS from a popped image by the rules of the current privilege level. IRET restores RF, POPF clears it.
    pub fn load_flags(&mut self, image: u64, size: usize, iret: bool) {
        let mut bits = POPPED;
        if size == 2 {
            bits &= 0xffff;
        } else if iret {
            bits |= rflags::RF;
        }
        let cpl = self.cpu.cpl();
        if cpl <= self.iopl() {
            bits |= rflags::IF;
        }
        if cpl == 0 {
            bits |= rflags::IOPL;
        }
        let kept = self.cpu.rflags & !bits;
        self.cpu.rflags = kept | image & bits | rflags::FIXED;
        if !iret {
            self.cpu.rflags &= !rflags::RF;
        }
    }
}
