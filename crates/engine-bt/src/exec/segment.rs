//! Descriptors and segment register loads.
//!
//! Source: Intel SDM volume 3, chapter 3 and the MOV, LTR and LLDT pages of volume 2.

use hospes_engine::{DescTable, Segment, seg};

use super::cx::{Cx, Exec, canonical};
use super::host::{Exception, Host, Vendor, vector};
use super::walk::Access;

/// An 8-byte descriptor as it stands in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor(pub u64);

impl Descriptor {
    /// Access byte and flags, as in [`Segment::attr`].
    pub fn attr(self) -> u16 {
        (self.0 >> 40) as u16 & 0xf0ff
    }

    pub fn present(self) -> bool {
        self.attr() & Segment::ATTR_PRESENT != 0
    }

    pub fn dpl(self) -> u8 {
        (self.attr() >> 5 & 3) as u8
    }

    /// Type of a system descriptor; `None` for code and data.
    pub fn system_type(self) -> Option<u8> {
        (self.attr() & 0x10 == 0).then_some((self.attr() & 15) as u8)
    }

    pub fn is_code(self) -> bool {
        self.attr() & 0x18 == 0x18
    }

    pub fn is_data(self) -> bool {
        self.attr() & 0x18 == 0x10
    }

    pub fn is_conforming(self) -> bool {
        self.is_code() && self.attr() & 4 != 0
    }

    pub fn is_readable(self) -> bool {
        self.is_data() || (self.is_code() && self.attr() & 2 != 0)
    }

    pub fn is_writable(self) -> bool {
        self.is_data() && self.attr() & 2 != 0
    }

    /// Limit in bytes.
    pub fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff) as u32 | (self.0 >> 32) as u32 & 0xf_0000;
        if self.attr() & Segment::ATTR_G != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }

    pub fn base(self) -> u32 {
        (self.0 >> 16) as u32 & 0xff_ffff | (self.0 >> 32) as u32 & 0xff00_0000
    }

    pub fn segment(self, selector: u16) -> Segment {
        Segment {
            base: u64::from(self.base()),
            limit: self.limit(),
            selector,
            attr: self.attr(),
        }
    }
}

/// Error code that names a selector.
pub(super) fn sel_code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

pub(super) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// SS in 64-bit mode after a null selector was loaded: unusable, but it keeps the privilege level.
pub(super) fn null_stack(selector: u16, cpl: u8) -> Segment {
    Segment {
        selector,
        attr: u16::from(cpl) << 5,
        ..Segment::default()
    }
}

impl<H: Host> Cx<'_, H> {
    /// Linear address of a descriptor of `size` bytes, if its table reaches that far.
    pub fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 != 0 {
            let ldt = &self.cpu.ldtr;
            if ldt.attr & Segment::ATTR_PRESENT == 0 {
                return None;
            }
            (ldt.base, u64::from(ldt.limit))
        } else {
            (self.cpu.gdtr.base, u64::from(self.cpu.gdtr.limit))
        };
        (offset + size - 1 <= limit).then(|| base.wrapping_add(offset))
    }

    /// Reads a descriptor; one outside its table raises `vector` with the selector (plus `ext`) as error code.
    pub fn read_descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> Exec<Descriptor> {
        let Some(at) = self.descriptor_address(selector, 8) else {
            return Err(Exception::coded(vector, sel_code(selector) | ext));
        };
        Ok(Descriptor(self.read_system(at, 8)?))
    }

    /// Sets the accessed bit of a code or data descriptor where it is clear.
    pub fn mark_accessed(&mut self, selector: u16, d: Descriptor) -> Exec<()> {
        if d.attr() & 1 == 0 {
            self.or_access_byte(selector, 1)?;
        }
        Ok(())
    }

    /// Sets bits of a descriptor's access byte in its table.
    fn or_access_byte(&mut self, selector: u16, bits: u8) -> Exec<()> {
        let Some(at) = self.descriptor_address(selector, 8) else {
            return Ok(());
        };
        let at = at.wrapping_add(5);
        let gpa = self.translate(at, Access::SYSTEM_WRITE)?;
        let Some(page) = self.host.memory().page(gpa.gfn()) else {
            return Ok(());
        };
        // SAFETY: the page is backed and the offset lies inside it; a byte has no alignment.
        let byte = unsafe {
            &*page
                .add(gpa.page_offset() as usize)
                .cast::<std::sync::atomic::AtomicU8>()
        };
        byte.fetch_or(bits, std::sync::atomic::Ordering::SeqCst);
        self.host.written(gpa, 1);
        Ok(())
    }

    /// MOV or POP to DS, ES, SS, FS or GS (not CS).
    pub fn load_segment(&mut self, s: usize, selector: u16) -> Exec<()> {
        if !self.protected() {
            let r = &mut self.cpu.seg[s];
            r.selector = selector;
            r.base = u64::from(selector) << 4;
            return Ok(());
        }
        let new = if s == seg::SS {
            self.stack_for_load(selector)?
        } else {
            self.data_for_load(s, selector)?
        };
        self.cpu.seg[s] = new;
        Ok(())
    }

    fn stack_for_load(&mut self, selector: u16) -> Exec<Segment> {
        let cpl = self.cpu.cpl();
        if is_null(selector) {
            return if self.code64() && cpl != 3 && (selector & 3) as u8 == cpl {
                Ok(null_stack(selector, cpl))
            } else {
                Err(Exception::gp(0))
            };
        }
        self.checked_stack(selector, cpl, vector::GP, 0)
    }

    /// A non-null stack segment for privilege level `cpl`; violations raise `vector`, absence #SS.
    pub fn checked_stack(&mut self, selector: u16, cpl: u8, vector: u8, ext: u32) -> Exec<Segment> {
        let code = sel_code(selector) | ext;
        let d = self.read_descriptor(selector, vector, ext)?;
        if (selector & 3) as u8 != cpl || !d.is_writable() || d.dpl() != cpl {
            return Err(Exception::coded(vector, code));
        }
        if !d.present() {
            return Err(Exception::ss(code));
        }
        self.mark_accessed(selector, d)?;
        Ok(Segment {
            attr: d.attr() | 1,
            ..d.segment(selector)
        })
    }

    fn data_for_load(&mut self, s: usize, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Ok(Segment {
                selector,
                base: self.null_base(s),
                ..Segment::default()
            });
        }
        let code = sel_code(selector);
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        let rpl = (selector & 3) as u8;
        let outer = d.dpl() < rpl || d.dpl() < self.cpu.cpl();
        if !d.is_readable() || (outer && !d.is_conforming()) {
            return Err(Exception::gp(code));
        }
        if !d.present() {
            return Err(Exception::np(code));
        }
        self.mark_accessed(selector, d)?;
        Ok(Segment {
            attr: d.attr() | 1,
            ..d.segment(selector)
        })
    }

    /// Base of a data segment after a null selector was loaded: older AMD processors keep it.
    fn null_base(&self, s: usize) -> u64 {
        let keeps = self.host.vendor() == Vendor::Amd
            && matches!(s, seg::FS | seg::GS)
            && (self.host.cpuid(self.cpu, 0x8000_0000, 0)[0] < 0x8000_0021
                || self.host.cpuid(self.cpu, 0x8000_0021, 0)[0] & (1 << 6) == 0);
        if keeps { self.cpu.seg[s].base } else { 0 }
    }

    /// LLDT.
    pub fn load_ldt(&mut self, selector: u16) -> Exec<()> {
        if is_null(selector) {
            self.cpu.ldtr = Segment {
                selector,
                ..Segment::default()
            };
            return Ok(());
        }
        let (d, base) = self.system_descriptor(selector)?;
        let code = sel_code(selector);
        if d.system_type() != Some(2) {
            return Err(Exception::gp(code));
        }
        if !d.present() {
            return Err(Exception::np(code));
        }
        self.cpu.ldtr = Segment {
            base,
            ..d.segment(selector)
        };
        Ok(())
    }

    /// LTR.
    pub fn load_tr(&mut self, selector: u16) -> Exec<()> {
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        let (d, base) = self.system_descriptor(selector)?;
        let code = sel_code(selector);
        let fits = match d.system_type() {
            Some(9) => true,
            Some(1) => !self.long_mode(),
            _ => false,
        };
        if !fits {
            return Err(Exception::gp(code));
        }
        if !d.present() {
            return Err(Exception::np(code));
        }
        self.or_access_byte(selector, 2)?;
        self.cpu.tr = Segment {
            base,
            attr: d.attr() | 2,
            ..d.segment(selector)
        };
        Ok(())
    }

    /// A descriptor of the GDT for LLDT and LTR, with its base; 16 bytes in long mode.
    fn system_descriptor(&mut self, selector: u16) -> Exec<(Descriptor, u64)> {
        let bad = Exception::gp(sel_code(selector));
        let size = if self.long_mode() { 16 } else { 8 };
        if selector & 4 != 0 {
            return Err(bad);
        }
        let at = self.descriptor_address(selector, size).ok_or(bad)?;
        let d = Descriptor(self.read_system(at, 8)?);
        let mut base = u64::from(d.base());
        if size == 16 {
            let high = self.read_system(at.wrapping_add(8), 8)?;
            base |= high << 32;
            if high >> 32 & 0x1f00 != 0 || !canonical(base) {
                return Err(bad);
            }
        }
        Ok((d, base))
    }

    /// The descriptor that LAR, LSL, VERR and VERW look at, if the current privilege level may see it.
    fn visible_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        if is_null(selector) {
            return Ok(None);
        }
        let Some(at) = self.descriptor_address(selector, 8) else {
            return Ok(None);
        };
        let d = Descriptor(self.read_system(at, 8)?);
        let hidden = d.dpl() < self.cpu.cpl() || d.dpl() < (selector & 3) as u8;
        Ok((d.is_conforming() || !hidden).then_some(d))
    }

    /// LAR: the access rights, or `None` for ZF clear.
    pub fn access_rights(&mut self, selector: u16) -> Exec<Option<u64>> {
        let long = self.long_mode();
        Ok(self
            .visible_descriptor(selector)?
            .filter(|d| match d.system_type() {
                None => true,
                Some(2 | 9 | 11 | 12) => true,
                Some(1 | 3 | 4 | 5) => !long,
                Some(_) => false,
            })
            .map(|d| d.0 >> 32 & 0x00ff_ff00))
    }

    /// LSL: the limit in bytes, or `None` for ZF clear.
    pub fn segment_limit(&mut self, selector: u16) -> Exec<Option<u64>> {
        let long = self.long_mode();
        Ok(self
            .visible_descriptor(selector)?
            .filter(|d| match d.system_type() {
                None => true,
                Some(2 | 9 | 11) => true,
                Some(1 | 3) => !long,
                Some(_) => false,
            })
            .map(|d| u64::from(d.limit())))
    }

    /// VERR and VERW.
    pub fn verify(&mut self, selector: u16, write: bool) -> Exec<bool> {
        Ok(self.visible_descriptor(selector)?.is_some_and(|d| {
            if write {
                d.is_writable()
            } else {
                d.is_readable()
            }
        }))
    }

    /// The value of LGDT or LIDT.
    pub fn table_operand(&mut self, s: usize, off: u64, narrow: bool) -> Exec<DescTable> {
        let limit = self.read_mem(s, off, 2)? as u16;
        let size = if self.code64() { 8 } else { 4 };
        let mut base = self.read_mem(s, off.wrapping_add(2), size)?;
        if narrow {
            base &= 0xff_ffff;
        }
        if !canonical(base) {
            return Err(Exception::gp(0));
        }
        Ok(DescTable { base, limit })
    }
}
