//! String instructions, single and repeated.
//!
//! A repeated one works page chunk by page chunk and does at most [`MAX_BYTES`] per step, leaving RIP on the instruction so that interrupts
//! can be taken. Registers are brought up to date after every chunk: a fault stops exactly at its iteration.
//! INS and OUTS find no device: they read ones and drop what they write.

use hospes_engine::{reg, rflags, seg};
use iced_x86::{Code, Instruction, OpKind, Register};

use super::cx::{Cx, Exec, Flow, mask, seg_index, set_sized};
use super::debug::debug_active;
use super::host::Host;

/// Bytes per step, so that interrupts are not kept waiting.
const MAX_BYTES: u64 = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Movs,
    Cmps,
    Stos,
    Lods,
    Scas,
    Ins,
    Outs,
}

/// What a string instruction is to do, decoded.
struct StringOp {
    op: Op,
    size: usize,
    /// Address size in bytes.
    width: usize,
    /// Segment of the RSI side.
    source: usize,
    /// For CMPS and SCAS: the ZF value that goes on.
    while_zf: Option<bool>,
}

impl StringOp {
    fn uses_si(&self) -> bool {
        matches!(self.op, Op::Movs | Op::Cmps | Op::Lods | Op::Outs)
    }

    fn uses_di(&self) -> bool {
        !matches!(self.op, Op::Lods | Op::Outs)
    }
}

fn classify(code: Code) -> Option<(Op, usize)> {
    Some(match code {
        Code::Movsb_m8_m8 => (Op::Movs, 1),
        Code::Movsw_m16_m16 => (Op::Movs, 2),
        Code::Movsd_m32_m32 => (Op::Movs, 4),
        Code::Movsq_m64_m64 => (Op::Movs, 8),
        Code::Cmpsb_m8_m8 => (Op::Cmps, 1),
        Code::Cmpsw_m16_m16 => (Op::Cmps, 2),
        Code::Cmpsd_m32_m32 => (Op::Cmps, 4),
        Code::Cmpsq_m64_m64 => (Op::Cmps, 8),
        Code::Stosb_m8_AL => (Op::Stos, 1),
        Code::Stosw_m16_AX => (Op::Stos, 2),
        Code::Stosd_m32_EAX => (Op::Stos, 4),
        Code::Stosq_m64_RAX => (Op::Stos, 8),
        Code::Lodsb_AL_m8 => (Op::Lods, 1),
        Code::Lodsw_AX_m16 => (Op::Lods, 2),
        Code::Lodsd_EAX_m32 => (Op::Lods, 4),
        Code::Lodsq_RAX_m64 => (Op::Lods, 8),
        Code::Scasb_AL_m8 => (Op::Scas, 1),
        Code::Scasw_AX_m16 => (Op::Scas, 2),
        Code::Scasd_EAX_m32 => (Op::Scas, 4),
        Code::Scasq_RAX_m64 => (Op::Scas, 8),
        Code::Insb_m8_DX => (Op::Ins, 1),
        Code::Insw_m16_DX => (Op::Ins, 2),
        Code::Insd_m32_DX => (Op::Ins, 4),
        Code::Outsb_DX_m8 => (Op::Outs, 1),
        Code::Outsw_DX_m16 => (Op::Outs, 2),
        Code::Outsd_DX_m32 => (Op::Outs, 4),
        _ => return None,
    })
}

/// Address size in bytes of a string operand.
fn operand_width(kind: OpKind) -> Option<usize> {
    Some(match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 2,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 4,
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => 8,
        _ => return None,
    })
}

/// Elements from a linear address on that lie wholly in its page, in the direction of travel; 0 where the first one straddles.
fn elements_in_page(lin: u64, size: usize, down: bool) -> u64 {
    let po = lin & 0xfff;
    if down {
        if po + size as u64 > 4096 {
            0
        } else {
            po / size as u64 + 1
        }
    } else {
        (4096 - po) / size as u64
    }
}

/// The flags of `a - b`.
pub(super) fn sub_flags(a: u64, b: u64, size: usize) -> u64 {
    let (a, b) = (a & mask(size), b & mask(size));
    let r = a.wrapping_sub(b) & mask(size);
    let top = 8 * size as u32 - 1;
    let mut f = 0;
    if a < b {
        f |= rflags::CF;
    }
    if (r as u8).count_ones().is_multiple_of(2) {
        f |= rflags::PF;
    }
    if (a ^ b ^ r) & 0x10 != 0 {
        f |= rflags::AF;
    }
    if r == 0 {
        f |= rflags::ZF;
    }
    if r >> top & 1 != 0 {
        f |= rflags::SF;
    }
    if ((a ^ b) & (a ^ r)) >> top & 1 != 0 {
        f |= rflags::OF;
    }
    f
}

/// Whether the code is one of the string instructions handled here.
pub(super) fn is_string(code: Code) -> bool {
    classify(code).is_some()
}

impl<H: Host> Cx<'_, H> {
    pub fn string(&mut self, i: &Instruction) -> Exec<Flow> {
        let Some((op, size)) = classify(i.code()) else {
            return Err(super::host::Exception::ud());
        };
        let width = operand_width(i.op0_kind())
            .or_else(|| operand_width(i.op1_kind()))
            .unwrap_or(8);
        let compares = matches!(op, Op::Cmps | Op::Scas);
        let (f3, f2) = (i.has_rep_prefix(), i.has_repne_prefix());
        let s = StringOp {
            op,
            size,
            width,
            source: match i.memory_segment() {
                Register::None => seg::DS,
                r => seg_index(r),
            },
            while_zf: compares.then_some(!f2),
        };
        if matches!(op, Op::Ins | Op::Outs) {
            let port = self.cpu.gpr[reg::RDX] as u16;
            self.check_port(port, size)?;
        }
        if !(f3 || f2) {
            self.string_one(&s)?;
            return Ok(Flow::Next);
        }
        self.repeat(&s)
    }

    fn repeat(&mut self, s: &StringOp) -> Exec<Flow> {
        let single = debug_active(self.cpu);
        let mut budget = MAX_BYTES / s.size as u64;
        loop {
            let count = self.cpu.gpr[reg::RCX] & mask(s.width);
            if count == 0 {
                return Ok(Flow::Next);
            }
            if budget == 0 {
                return Ok(Flow::Again);
            }
            let done = if single {
                0
            } else {
                self.chunk(s, count.min(budget))?
            };
            let done = if done == 0 {
                self.string_one(s)?;
                budget = if single { 0 } else { budget - 1 };
                1
            } else {
                budget -= done;
                done
            };
            let left = count - done;
            set_sized(&mut self.cpu.gpr[reg::RCX], s.width, left);
            if left != 0 && s.while_zf.is_some_and(|z| z != self.flag(rflags::ZF)) {
                return Ok(Flow::Next);
            }
        }
    }

    fn advance(&mut self, r: usize, s: &StringOp, elements: u64) {
        let bytes = elements * s.size as u64;
        let old = self.cpu.gpr[r];
        let new = if self.flag(rflags::DF) {
            old.wrapping_sub(bytes)
        } else {
            old.wrapping_add(bytes)
        };
        set_sized(&mut self.cpu.gpr[r], s.width, new);
    }

    fn advance_both(&mut self, s: &StringOp, elements: u64) {
        if s.uses_si() {
            self.advance(reg::RSI, s, elements);
        }
        if s.uses_di() {
            self.advance(reg::RDI, s, elements);
        }
    }

    /// One iteration, with all checks; RCX apart.
    fn string_one(&mut self, s: &StringOp) -> Exec<()> {
        let si = self.cpu.gpr[reg::RSI] & mask(s.width);
        let di = self.cpu.gpr[reg::RDI] & mask(s.width);
        let acc = self.cpu.gpr[reg::RAX];
        match s.op {
            Op::Movs => {
                let v = self.read_mem(s.source, si, s.size)?;
                self.write_mem(seg::ES, di, s.size, v)?;
            }
            Op::Stos => self.write_mem(seg::ES, di, s.size, acc)?,
            Op::Ins => self.write_mem(seg::ES, di, s.size, u64::MAX)?,
            Op::Outs => {
                self.read_mem(s.source, si, s.size)?;
            }
            Op::Lods => {
                let v = self.read_mem(s.source, si, s.size)?;
                set_sized(&mut self.cpu.gpr[reg::RAX], s.size, v);
            }
            Op::Cmps => {
                // Where both fault, AMD's processors mostly name this one.
                let b = self.read_mem(seg::ES, di, s.size)?;
                let a = self.read_mem(s.source, si, s.size)?;
                self.set_compare(a, b, s.size);
            }
            Op::Scas => {
                let b = self.read_mem(seg::ES, di, s.size)?;
                self.set_compare(acc, b, s.size);
            }
        }
        self.advance_both(s, 1);
        Ok(())
    }

    fn set_compare(&mut self, a: u64, b: u64, size: usize) {
        self.cpu.rflags = self.cpu.rflags & !rflags::STATUS | sub_flags(a, b, size);
    }

    /// The lowest linear address of up to `n` elements at `segment:off`, and how many of them can be done in one go; 0 where one iteration
    /// has to be done with all checks.
    fn run_at(
        &mut self,
        segment: usize,
        off: u64,
        n: u64,
        s: &StringOp,
        write: bool,
    ) -> Exec<(u64, u64)> {
        let (size, down) = (s.size as u64, self.flag(rflags::DF));
        let lin = self.linear(segment, off, size, write)?;
        self.check_alignment(lin, s.size)?;
        let before_wrap = if down {
            (off / size).saturating_add(1)
        } else {
            (mask(s.width) - off) / size
        };
        let n = n.min(elements_in_page(lin, s.size, down)).min(before_wrap);
        if n == 0 {
            return Ok((lin, 0));
        }
        let back = if down { (n - 1) * size } else { 0 };
        // The whole run must pass the segment's checks; at its edge the iterations are done one by one.
        match self.linear(segment, off.wrapping_sub(back), n * size, write) {
            Ok(low) => Ok((low, n)),
            Err(_) => Ok((lin, 0)),
        }
    }

    /// Does up to `n` iterations inside one page on each side; returns how many.
    fn chunk(&mut self, s: &StringOp, n: u64) -> Exec<u64> {
        let done = match s.op {
            Op::Movs => self.chunk_movs(s, n),
            Op::Stos => self.chunk_stos(s, n),
            Op::Cmps | Op::Scas => self.chunk_compare(s, n),
            Op::Lods | Op::Ins | Op::Outs => Ok(0),
        };
        // A run that faults has done nothing; its first iteration finds the address that the processor would name, which is the highest one with DF set.
        Ok(done.unwrap_or(0))
    }

    fn chunk_stos(&mut self, s: &StringOp, n: u64) -> Exec<u64> {
        let di = self.cpu.gpr[reg::RDI] & mask(s.width);
        let (lin, n) = self.run_at(seg::ES, di, n, s, true)?;
        if n == 0 {
            return Ok(0);
        }
        let access = self.access(true);
        let gpa = self.translate(lin, access)?;
        let len = n as usize * s.size;
        if let Some(page) = self.host.memory().page(gpa.gfn()) {
            let v = self.cpu.gpr[reg::RAX].to_le_bytes();
            // SAFETY: the page is backed and the run lies inside it.
            unsafe { fill(page.add(gpa.page_offset() as usize), len, &v[..s.size]) };
            self.host.written(gpa, len);
        }
        self.advance_both(s, n);
        Ok(n)
    }

    fn chunk_movs(&mut self, s: &StringOp, n: u64) -> Exec<u64> {
        let si = self.cpu.gpr[reg::RSI] & mask(s.width);
        let di = self.cpu.gpr[reg::RDI] & mask(s.width);
        let (_, n) = self.run_at(s.source, si, n, s, false)?;
        let (_, n) = self.run_at(seg::ES, di, n, s, true)?;
        if n == 0 {
            return Ok(0);
        }
        let (from, m) = self.run_at(s.source, si, n, s, false)?;
        let (to, k) = self.run_at(seg::ES, di, n, s, true)?;
        debug_assert!(m == n && k == n);
        let access = self.access(false);
        let from = self.translate(from, access)?;
        let access = self.access(true);
        let to = self.translate(to, access)?;
        let len = n as usize * s.size;
        let down = self.flag(rflags::DF);
        let memory = self.host.memory();
        let (source, target) = (memory.page(from.gfn()), memory.page(to.gfn()));
        if let Some(target) = target {
            // SAFETY: both pages are backed and both runs lie inside their pages.
            unsafe {
                let target = target.add(to.page_offset() as usize);
                match source {
                    Some(p) => {
                        copy_elements(
                            p.add(from.page_offset() as usize),
                            target,
                            len,
                            s.size,
                            down,
                        );
                    }
                    None => fill(target, len, &[0xff]),
                }
            }
            self.host.written(to, len);
        }
        self.advance_both(s, n);
        Ok(n)
    }

    fn chunk_compare(&mut self, s: &StringOp, n: u64) -> Exec<u64> {
        let si = self.cpu.gpr[reg::RSI] & mask(s.width);
        let di = self.cpu.gpr[reg::RDI] & mask(s.width);
        let with_source = s.uses_si();
        let mut n = n;
        if with_source {
            n = self.run_at(s.source, si, n, s, false)?.1;
        }
        n = self.run_at(seg::ES, di, n, s, false)?.1;
        if n == 0 {
            return Ok(0);
        }
        let (len, access) = (n as usize * s.size, self.access(false));
        let mut left = [0u8; 4096];
        let mut right = [0u8; 4096];
        if with_source {
            let lin = self.run_at(s.source, si, n, s, false)?.0;
            let gpa = self.translate(lin, access)?;
            self.phys_read(gpa, &mut left[..len]);
        }
        let lin = self.run_at(seg::ES, di, n, s, false)?.0;
        let gpa = self.translate(lin, access)?;
        self.phys_read(gpa, &mut right[..len]);

        let down = self.flag(rflags::DF);
        let element = |b: &[u8; 4096], k: u64| {
            let k = if down { n - 1 - k } else { k } as usize * s.size;
            let mut v = [0; 8];
            v[..s.size].copy_from_slice(&b[k..k + s.size]);
            u64::from_le_bytes(v)
        };
        let acc = self.cpu.gpr[reg::RAX] & mask(s.size);
        let value = |k| {
            let a = if with_source { element(&left, k) } else { acc };
            (a, element(&right, k))
        };
        let stop = |k: &u64| {
            let (a, b) = value(*k);
            Some(a == b) != s.while_zf
        };
        let last = (0..n).find(stop).unwrap_or(n - 1);
        let (a, b) = value(last);
        self.set_compare(a, b, s.size);
        self.advance_both(s, last + 1);
        Ok(last + 1)
    }
}

/// Fills `len` bytes with a repeated value of 1, 2, 4 or 8 bytes.
///
/// # Safety
/// `to` must be writable for `len` bytes; `len` must be a multiple of the value's length.
unsafe fn fill(to: *mut u8, len: usize, value: &[u8]) {
    if value.iter().all(|&b| b == value[0]) {
        // SAFETY: the caller's contract.
        unsafe { to.write_bytes(value[0], len) };
        return;
    }
    for k in (0..len).step_by(value.len()) {
        // SAFETY: `k` stays below `len`, which the caller vouches for.
        unsafe {
            to.add(k)
                .copy_from_nonoverlapping(value.as_ptr(), value.len())
        };
    }
}

/// Copies element after element in the direction of travel, so that overlapping ranges repeat as on hardware.
///
/// # Safety
/// Both must be valid for `len` bytes, a multiple of `size`.
unsafe fn copy_elements(from: *const u8, to: *mut u8, len: usize, size: usize, down: bool) {
    let (f, t) = (from as usize, to as usize);
    let repeats = if down {
        t < f && f < t + len
    } else {
        f < t && t < f + len
    };
    if !repeats {
        // SAFETY: the caller's contract.
        unsafe { std::ptr::copy(from, to, len) };
        return;
    }
    let n = len / size;
    for k in 0..n {
        let k = if down { n - 1 - k } else { k } * size;
        let mut v = [0u8; 8];
        // SAFETY: `k + size` stays within `len`.
        unsafe {
            std::ptr::copy_nonoverlapping(from.add(k), v.as_mut_ptr(), size);
            std::ptr::copy_nonoverlapping(v.as_ptr(), to.add(k), size);
        }
    }
}
