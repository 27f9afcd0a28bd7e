//! Delivery of exceptions and interrupts through the IDT or the real-mode vector table.
//!
//! Source: Intel SDM volume 3, chapter 7. Task gates and virtual-8086 mode are not offered: a task gate raises #GP.
//!
//! Invariant: an event either reaches its handler completely, or changes nothing but what the nested fault reports.

use hospes_engine::{Activity, Exit, Segment, reg, rflags, seg};

use super::cx::{Cx, Exec, canonical, mask};
use super::host::{Exception, Host, Step, vector};
use super::segment::{Descriptor, is_null, null_stack, sel_code};
use super::walk::Access;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A fault or trap of the processor.
    Exception,
    /// INT n, INT3, INTO: the gate's privilege counts.
    Software,
    /// INT1: software raises it, but the gate's privilege does not count.
    Int1,
    External,
}

#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    error_code: Option<u32>,
    kind: Kind,
    /// RIP to push.
    rip: u64,
    /// RFLAGS.RF to push.
    resume: bool,
}

impl Event {
    /// EXT bit of error codes of faults during the delivery.
    fn ext(&self) -> u32 {
        u32::from(self.kind != Kind::Software)
    }

    /// Error code that points to this event's gate.
    fn idt_code(&self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.ext()
    }
}

fn contributory(v: u8) -> bool {
    matches!(
        v,
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP
    )
}

/// A gate of the IDT, all forms.
struct Gate {
    selector: u16,
    offset: u64,
    ist: u8,
    /// Size of one pushed word in bytes.
    word: usize,
    interrupt: bool,
}

impl<H: Host> Cx<'_, H> {
    /// Delivers an exception raised at the current RIP, through double fault and shutdown.
    pub fn raise(&mut self, e: Exception) -> Step {
        // All but #DB, #BP and #OF restart their instruction; #DB of an instruction breakpoint has RF clear in its frame as well.
        let resume = !matches!(e.vector, vector::DB | vector::BP | vector::OF | vector::DF)
            || self.flag(rflags::RF);
        let event = Event {
            vector: e.vector,
            error_code: e.error_code,
            kind: Kind::Exception,
            rip: self.cpu.rip,
            resume,
        };
        if let Some(cr2) = e.cr2 {
            self.cpu.cr2 = cr2;
        }
        self.deliver_nested(event)
    }

    /// Delivers an external interrupt or NMI.
    pub fn interrupt(&mut self, vector: u8, is_nmi: bool) -> Step {
        self.cpu.activity = Activity::Running;
        self.cpu.interrupt_shadow = false;
        if is_nmi {
            self.cpu.nmi_blocked = true;
        }
        let resume = self.flag(rflags::RF);
        self.deliver_nested(Event {
            vector,
            error_code: None,
            kind: Kind::External,
            rip: self.cpu.rip,
            resume,
        })
    }

    /// Delivers INT n, INT3 or INTO; RIP behind the instruction is pushed. Faults are those of the instruction.
    pub fn software_interrupt(&mut self, vector: u8) -> Exec<()> {
        let event = Event {
            vector,
            error_code: None,
            kind: Kind::Software,
            rip: self.next,
            resume: false,
        };
        self.deliver(&event)
    }

    /// Delivers INT1.
    pub fn debug_interrupt(&mut self) -> Exec<()> {
        let event = Event {
            vector: vector::DB,
            error_code: None,
            kind: Kind::Int1,
            rip: self.next,
            resume: false,
        };
        self.deliver(&event)
    }

    fn deliver_nested(&mut self, first: Event) -> Step {
        let rip = self.cpu.rip;
        let mut event = first;
        loop {
            let Err(second) = self.deliver(&event) else {
                return Step::Continue;
            };
            if let Some(cr2) = second.cr2 {
                self.cpu.cr2 = cr2;
            }
            let hardware = event.kind == Kind::Exception;
            if hardware && event.vector == vector::DF {
                return Step::Exit(Exit::Shutdown { rip });
            }
            let page = |v| v == vector::PF;
            let double = hardware
                && ((contributory(event.vector) && contributory(second.vector))
                    || (page(event.vector)
                        && (contributory(second.vector) || page(second.vector))));
            let (vector, error_code) = if double {
                (vector::DF, Some(0))
            } else {
                (second.vector, second.error_code)
            };
            event = Event {
                vector,
                error_code,
                kind: Kind::Exception,
                rip,
                resume: !double,
            };
        }
    }

    fn deliver(&mut self, event: &Event) -> Exec<()> {
        if !self.protected() {
            return self.deliver_real(event);
        }
        let gate = self.gate(event)?;
        let ext = event.ext();
        if is_null(gate.selector) {
            return Err(Exception::gp(ext));
        }
        let code = sel_code(gate.selector) | ext;
        let d = self.read_descriptor(gate.selector, vector::GP, ext)?;
        let cpl = self.cpu.cpl();
        if !d.is_code() || d.dpl() > cpl {
            return Err(Exception::gp(code));
        }
        if !d.present() {
            return Err(Exception::np(code));
        }
        let long = self.long_mode();
        let l_and_d = d.attr() & (Segment::ATTR_L | Segment::ATTR_DB);
        if long && l_and_d != Segment::ATTR_L {
            return Err(Exception::gp(code));
        }
        let new_cpl = if d.is_conforming() { cpl } else { d.dpl() };
        if long {
            self.deliver_long(event, &gate, d, new_cpl)
        } else {
            self.deliver_legacy(event, &gate, d, new_cpl)
        }
    }

    fn gate(&mut self, event: &Event) -> Exec<Gate> {
        let bad = Exception::gp(event.idt_code());
        let long = self.long_mode();
        let size = if long { 16 } else { 8 };
        let offset = u64::from(event.vector) * size;
        if offset + size - 1 > u64::from(self.cpu.idtr.limit) {
            return Err(bad);
        }
        let at = self.cpu.idtr.base.wrapping_add(offset);
        let low = self.read_system(at, 8)?;
        let high = if long {
            self.read_system(at.wrapping_add(8), 8)?
        } else {
            0
        };
        let attr = (low >> 40) as u16 & 0xff;
        let word = match attr & 0x1f {
            0xe | 0xf if long => 8,
            0xe | 0xf => 4,
            6 | 7 if !long => 2,
            _ => return Err(bad),
        };
        if event.kind == Kind::Software && ((attr >> 5 & 3) as u8) < self.cpu.cpl() {
            return Err(bad);
        }
        if attr & 0x80 == 0 {
            return Err(Exception::np(event.idt_code()));
        }
        let mut offset = low & 0xffff;
        if word > 2 {
            offset |= low >> 32 & 0xffff_0000;
        }
        if long {
            offset |= high << 32;
        }
        Ok(Gate {
            selector: (low >> 16) as u16,
            offset,

            ist: (low >> 32) as u8 & 7,
            word,
            interrupt: attr & 1 == 0,
        })
    }

    /// RFLAGS as pushed.
    fn pushed_flags(&self, event: &Event) -> u64 {
        let f = self.cpu.rflags & !rflags::RF;
        if event.resume { f | rflags::RF } else { f }
    }

    fn enter_handler(&mut self, gate: &Gate, d: Descriptor, new_cpl: u8) {
        let mut clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if gate.interrupt {
            clear |= rflags::IF;
        }
        self.cpu.rflags &= !clear;
        self.cpu.seg[seg::CS] = Segment {
            attr: d.attr() | 1,
            ..d.segment(gate.selector & !3 | u16::from(new_cpl))
        };
        self.cpu.rip = gate.offset;
    }

    fn deliver_long(&mut self, event: &Event, gate: &Gate, d: Descriptor, new_cpl: u8) -> Exec<()> {
        let ext = event.ext();
        let changes = new_cpl != self.cpu.cpl();
        let old_rsp = self.cpu.gpr[reg::RSP];
        let top = if gate.ist != 0 {
            self.tss_stack64(36 + 8 * (u64::from(gate.ist) - 1), ext)?
        } else if changes {
            self.tss_stack64(4 + 8 * u64::from(new_cpl), ext)?
        } else {
            old_rsp
        };
        if !canonical(gate.offset) {
            return Err(Exception::gp(ext));
        }
        let mut frame = [0u8; 48];
        let words = [
            u64::from(event.error_code.unwrap_or(0)),
            event.rip,
            u64::from(self.cpu.seg[seg::CS].selector),
            self.pushed_flags(event),
            old_rsp,
            u64::from(self.cpu.seg[seg::SS].selector),
        ];
        for (to, w) in frame.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&w.to_le_bytes());
        }
        let frame = if event.error_code.is_some() {
            &frame[..]
        } else {
            &frame[8..]
        };
        let rsp = (top & !15).wrapping_sub(frame.len() as u64);
        if !canonical(rsp) || !canonical(rsp.wrapping_add(frame.len() as u64 - 1)) {
            return Err(Exception::ss(ext));
        }
        self.mark_accessed(gate.selector, d)?;
        self.write_lin(rsp, frame, Access::write(new_cpl == 3))?;
        self.watch(rsp, frame.len(), true);
        if changes {
            self.cpu.seg[seg::SS] = null_stack(u16::from(new_cpl), new_cpl);
        }
        self.cpu.gpr[reg::RSP] = rsp;
        self.enter_handler(gate, d, new_cpl);
        Ok(())
    }

    /// Reads a stack pointer out of the 64-bit TSS.
    fn tss_stack64(&mut self, offset: u64, ext: u32) -> Exec<u64> {
        let tr = self.cpu.tr;
        if offset + 7 > u64::from(tr.limit) {
            return Err(Exception::ts(sel_code(tr.selector) | ext));
        }
        let rsp = self.read_system(tr.base.wrapping_add(offset), 8)?;
        if !canonical(rsp) {
            return Err(Exception::ss(ext));
        }
        Ok(rsp)
    }

    /// Reads SS and (E)SP for a privilege level out of a 16- or 32-bit TSS.
    fn tss_stack32(&mut self, cpl: u8, ext: u32) -> Exec<(u16, u64)> {
        let tr = self.cpu.tr;
        let wide = tr.attr & 8 != 0;
        let (offset, size) = if wide {
            (4 + 8 * u64::from(cpl), 4)
        } else {
            (2 + 4 * u64::from(cpl), 2)
        };
        if offset + 2 * size as u64 - 1 > u64::from(tr.limit) {
            return Err(Exception::ts(sel_code(tr.selector) | ext));
        }
        let at = tr.base.wrapping_add(offset);
        let sp = self.read_system(at, size)?;
        let ss = self.read_system(at.wrapping_add(size as u64), 2)?;
        Ok((ss as u16, sp))
    }

    fn deliver_legacy(
        &mut self,
        event: &Event,
        gate: &Gate,
        d: Descriptor,
        new_cpl: u8,
    ) -> Exec<()> {
        let ext = event.ext();
        let changes = new_cpl != self.cpu.cpl();
        let old_ss = self.cpu.seg[seg::SS];
        let old_sp = self.cpu.gpr[reg::RSP];
        let (stack, mut sp) = if changes {
            let (ss, sp) = self.tss_stack32(new_cpl, ext)?;
            if is_null(ss) {
                return Err(Exception::ts(ext));
            }
            (self.checked_stack(ss, new_cpl, vector::TS, ext)?, sp)
        } else {
            (old_ss, old_sp)
        };
        if gate.offset > u64::from(d.limit()) {
            return Err(Exception::gp(ext));
        }
        let mut words = [0u64; 6];
        let mut n = 0;
        let mut add = |w: u64| {
            words[n] = w;
            n += 1;
        };
        if let Some(code) = event.error_code {
            add(u64::from(code));
        }
        add(event.rip);
        add(u64::from(self.cpu.seg[seg::CS].selector));
        add(self.pushed_flags(event));
        if changes {
            add(old_sp);
            add(u64::from(old_ss.selector));
        }
        let mut frame = [0u8; 24];
        for (k, w) in words[..n].iter().enumerate() {
            frame[k * gate.word..][..gate.word].copy_from_slice(&w.to_le_bytes()[..gate.word]);
        }
        let len = n * gate.word;
        let width = if stack.attr & Segment::ATTR_DB != 0 {
            4
        } else {
            2
        };
        sp = (sp & mask(width)).wrapping_sub(len as u64) & mask(width);
        self.cpu.seg[seg::SS] = stack;
        let lin = self.linear(seg::SS, sp, len as u64, true);
        self.cpu.seg[seg::SS] = old_ss;
        let stack_code = if changes { sel_code(stack.selector) } else { 0 } | ext;
        let lin = lin.map_err(|_| Exception::ss(stack_code))?;
        self.mark_accessed(gate.selector, d)?;
        self.write_lin(lin, &frame[..len], Access::write(new_cpl == 3))?;
        self.watch(lin, len, true);
        self.cpu.seg[seg::SS] = stack;
        self.set_sp(sp);
        self.enter_handler(gate, d, new_cpl);
        Ok(())
    }

    fn deliver_real(&mut self, event: &Event) -> Exec<()> {
        let offset = u64::from(event.vector) * 4;
        if offset + 3 > u64::from(self.cpu.idtr.limit) {
            return Err(Exception::gp(event.idt_code()));
        }
        let at = self.cpu.idtr.base.wrapping_add(offset) & 0xffff_ffff;
        let entry = self.read_system(at, 4)?;
        let mut frame = [0u8; 6];
        let words = [
            event.rip,
            u64::from(self.cpu.seg[seg::CS].selector),
            self.cpu.rflags,
        ];
        for (to, w) in frame.chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&(w as u16).to_le_bytes());
        }
        let sp = self.sp().wrapping_sub(6) & 0xffff;
        let lin = self.linear(seg::SS, sp, 6, true)?;
        self.write_lin(lin, &frame, Access::write(false))?;
        self.set_sp(sp);
        self.cpu.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        let cs = &mut self.cpu.seg[seg::CS];
        cs.selector = (entry >> 16) as u16;
        cs.base = u64::from(cs.selector) << 4;
        self.cpu.rip = entry & 0xffff;
        Ok(())
    }
}
