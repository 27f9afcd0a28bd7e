//! The context of one instruction: the vCPU, its host, and access to registers, operands and memory with all checks.

use hospes_engine::{CpuState, Exit, Segment, cr, reg, rflags, seg};
use hospes_units::{Gpa, Gva};
use iced_x86::{Instruction, OpKind, Register};

use super::host::{Exception, Host, vector};
use super::walk::Access;

/// Result of anything that can raise a guest exception.
pub(super) type Exec<T> = Result<T, Exception>;

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// RIP goes on to the next instruction.
    Next,
    /// As `Next`, and no interrupt is taken before the next instruction has ended. `traps`: nor is a debug trap (MOV SS).
    Shadow { traps: bool },
    /// RIP has been set.
    Jump,
    /// As `Jump`, where a single-step trap depends on TF as it is now, not as it was before (SYSCALL, SYSRET).
    JumpTfAfter,
    /// RIP and RF have been set (IRET).
    Return,
    /// RIP has been set by the delivery of a software interrupt: no single-step trap follows.
    Interrupt,
    /// A repeated string instruction that is not finished: RIP stays.
    Again,
    /// RIP goes on to the next instruction, then the vCPU stops.
    Exit(Exit),
}

pub(super) struct Cx<'a, H: Host> {
    pub cpu: &'a mut CpuState,
    pub host: &'a mut H,
    /// RIP behind the instruction.
    pub next: u64,
    /// Data breakpoints hit, as in DR6 bits 3:0.
    pub watch_hits: u64,
}

/// A checked range of guest memory: one or two pieces, each inside a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub first: Gpa,
    pub first_len: usize,
    pub second: Gpa,
    pub second_len: usize,
}

/// Index in `gpr` of a general register of any width, and whether it is one of AH, CH, DH, BH.
#[inline]
pub(super) fn gpr_index(r: Register) -> (usize, bool) {
    let n = r as usize;
    if n >= Register::RAX as usize {
        (n - Register::RAX as usize, false)
    } else if n >= Register::EAX as usize {
        (n - Register::EAX as usize, false)
    } else if n >= Register::AX as usize {
        (n - Register::AX as usize, false)
    } else if n >= Register::SPL as usize {
        (n - Register::SPL as usize + 4, false)
    } else if n >= Register::AH as usize {
        (n - Register::AH as usize, true)
    } else {
        (n - Register::AL as usize, false)
    }
}

/// Index in `seg` of a segment register.
#[inline]
pub(super) fn seg_index(r: Register) -> usize {
    debug_assert!(r.is_segment_register());
    r as usize - Register::ES as usize
}

/// All ones in the low `size` bytes.
#[inline]
pub(super) fn mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

/// Sign-extends the low `size` bytes.
#[inline]
pub(super) fn sign_extend(v: u64, size: usize) -> u64 {
    let s = 64 - 8 * size as u32;
    (((v << s) as i64) >> s) as u64
}

/// Whether an address has all upper bits equal to bit 47.
#[inline]
pub(super) fn canonical(a: u64) -> bool {
    ((a as i64) << 16 >> 16) as u64 == a
}

impl<H: Host> Cx<'_, H> {
    // ---- modes ----

    #[inline]
    pub fn long_mode(&self) -> bool {
        self.cpu.msr.efer & cr::EFER_LMA != 0
    }

    #[inline]
    pub fn code64(&self) -> bool {
        self.long_mode() && self.cpu.seg[seg::CS].attr & Segment::ATTR_L != 0
    }

    #[inline]
    pub fn protected(&self) -> bool {
        self.cpu.cr0 & cr::CR0_PE != 0
    }

    #[inline]
    pub fn user(&self) -> bool {
        self.cpu.cpl() == 3
    }

    pub fn iopl(&self) -> u8 {
        (self.cpu.rflags >> 12 & 3) as u8
    }

    /// #GP(0) unless at CPL 0.
    pub fn need_cpl0(&self) -> Exec<()> {
        if self.cpu.cpl() == 0 {
            Ok(())
        } else {
            Err(Exception::gp(0))
        }
    }

    /// #UD in real mode.
    pub fn need_protected(&self) -> Exec<()> {
        if self.protected() {
            Ok(())
        } else {
            Err(Exception::ud())
        }
    }

    // ---- registers ----

    #[inline]
    pub fn get(&self, r: Register) -> u64 {
        let (i, high) = gpr_index(r);
        let v = self.cpu.gpr[i];
        if high {
            v >> 8 & 0xff
        } else {
            v & mask(r.size())
        }
    }

    #[inline]
    pub fn set(&mut self, r: Register, v: u64) {
        let (i, high) = gpr_index(r);
        let slot = &mut self.cpu.gpr[i];
        if high {
            *slot = *slot & !0xff00 | (v & 0xff) << 8;
        } else {
            set_sized(slot, r.size(), v);
        }
    }

    pub fn flag(&self, f: u64) -> bool {
        self.cpu.rflags & f != 0
    }

    pub fn set_flag(&mut self, f: u64, on: bool) {
        if on {
            self.cpu.rflags |= f;
        } else {
            self.cpu.rflags &= !f;
        }
    }

    // ---- addresses ----

    /// Segment and offset of the instruction's memory operand.
    #[inline]
    pub fn mem_ref(&self, i: &Instruction) -> (usize, u64) {
        let base = i.memory_base();
        let index = i.memory_index();
        let mut off = i.memory_displacement64();
        if base != Register::None && !base.is_ip() {
            off = off.wrapping_add(self.get(base));
        }
        if index != Register::None && index.is_gpr() {
            off = off.wrapping_add(self.get(index) << i.memory_index_scale().trailing_zeros());
        }
        (self.operand_segment(i), off & mask(self.address_size(i)))
    }

    /// Segment of the memory operand. 64-bit code ignores all overrides but FS and GS, also for whether a bad address is #SS or #GP.
    #[inline]
    fn operand_segment(&self, i: &Instruction) -> usize {
        match i.segment_prefix() {
            Register::CS | Register::DS | Register::ES | Register::SS if self.code64() => {
                if matches!(
                    i.memory_base().full_register(),
                    Register::RSP | Register::RBP
                ) {
                    seg::SS
                } else {
                    seg::DS
                }
            }
            _ => seg_index(i.memory_segment()),
        }
    }

    /// Address size of the instruction's memory operand, in bytes.
    #[inline]
    pub fn address_size(&self, i: &Instruction) -> usize {
        let base = i.memory_base();
        if base != Register::None {
            return base.size();
        }
        let index = i.memory_index();
        if index.is_gpr() && index.size() >= 2 {
            return index.size();
        }
        match i.memory_displ_size() {
            n @ (2 | 4 | 8) => n as usize,
            _ if self.code64() => 8,
            _ => (self.cpu.code_bits() / 8) as usize,
        }
    }

    /// Linear address of `len` bytes at `segment:off`, with the segment's checks. `len` is at least 1.
    #[inline]
    pub fn linear(&self, segment: usize, off: u64, len: u64, write: bool) -> Exec<u64> {
        if self.code64() {
            let lin = match segment {
                seg::FS | seg::GS => self.cpu.seg[segment].base.wrapping_add(off),
                _ => off,
            };
            let last = lin.wrapping_add(len - 1);
            if canonical(lin) && canonical(last) {
                return Ok(lin);
            }
            return Err(segment_fault(segment));
        }
        self.linear_legacy(segment, off, len, write)
    }

    fn linear_legacy(&self, segment: usize, off: u64, len: u64, write: bool) -> Exec<u64> {
        let s = &self.cpu.seg[segment];
        let bad = Err(segment_fault(segment));
        let code = s.attr & 8 != 0;
        if self.protected() {
            let readable = !code || s.attr & 2 != 0;
            let writable = !code && s.attr & 2 != 0;
            if s.attr & Segment::ATTR_PRESENT == 0 || (write && !writable) || (!write && !readable)
            {
                return bad;
            }
        }
        let last = off + len - 1;
        let limit = u64::from(s.limit);
        let fits = if !code && s.attr & 4 != 0 && self.protected() {
            let top = if s.attr & Segment::ATTR_DB != 0 {
                0xffff_ffff
            } else {
                0xffff
            };
            off > limit && last <= top
        } else {
            last <= limit
        };
        if fits {
            Ok(s.base.wrapping_add(off) & 0xffff_ffff)
        } else {
            bad
        }
    }

    /// #AC for a misaligned access of a power-of-two size, where the guest has asked for it.
    #[inline]
    pub fn check_alignment(&self, lin: u64, size: usize) -> Exec<()> {
        if lin & (size as u64 - 1) != 0
            && self.cpu.cr0 & cr::CR0_AM != 0
            && self.cpu.rflags & rflags::AC != 0
            && self.user()
        {
            return Err(Exception::coded(vector::AC, 0));
        }
        Ok(())
    }

    // ---- linear memory ----

    /// The access that an instruction's data operand makes at the current privilege level.
    #[inline]
    pub fn access(&self, write: bool) -> Access {
        if write {
            Access::write(self.user())
        } else {
            Access::read(self.user())
        }
    }

    #[inline]
    pub fn translate(&mut self, lin: u64, access: Access) -> Exec<Gpa> {
        match self.host.translate(self.cpu, Gva(lin), access) {
            Ok(gpa) => Ok(gpa),
            Err(f) => Err(Exception::page(lin, f)),
        }
    }

    /// Checks and translates `len` bytes (at most a page) at a linear address.
    #[inline]
    pub fn span(&mut self, lin: u64, len: usize, access: Access) -> Exec<Span> {
        let room = 4096 - (lin & 0xfff) as usize;
        let first = self.translate(lin, access)?;
        if len <= room {
            return Ok(Span {
                first,
                first_len: len,
                second: Gpa(0),
                second_len: 0,
            });
        }
        let mut next = (lin & !0xfff).wrapping_add(4096);
        if !self.long_mode() {
            next &= 0xffff_ffff;
        }
        let second = self.translate(next, access)?;
        Ok(Span {
            first,
            first_len: room,
            second,
            second_len: len - room,
        })
    }

    /// Copies a piece inside one page out of guest memory; what is not memory reads as ones.
    pub fn phys_read(&self, gpa: Gpa, buf: &mut [u8]) {
        phys_read(self.host, gpa, buf);
    }

    /// Copies a piece inside one page into guest memory; what is not memory ignores it.
    pub fn phys_write(&mut self, gpa: Gpa, buf: &[u8]) {
        phys_write(self.host, gpa, buf);
    }

    #[inline]
    pub fn read_span(&self, s: &Span, buf: &mut [u8]) {
        let (a, b) = buf.split_at_mut(s.first_len);
        self.phys_read(s.first, a);
        if s.second_len != 0 {
            self.phys_read(s.second, b);
        }
    }

    #[inline]
    pub fn write_span(&mut self, s: &Span, buf: &[u8]) {
        let (a, b) = buf.split_at(s.first_len);
        self.phys_write(s.first, a);
        if s.second_len != 0 {
            self.phys_write(s.second, b);
        }
    }

    /// Reads `buf.len()` bytes (at most a page) at a linear address.
    pub fn read_lin(&mut self, lin: u64, buf: &mut [u8], access: Access) -> Exec<()> {
        let s = self.span(lin, buf.len(), access)?;
        self.read_span(&s, buf);
        Ok(())
    }

    /// Writes `buf.len()` bytes (at most a page) at a linear address, all or nothing.
    pub fn write_lin(&mut self, lin: u64, buf: &[u8], access: Access) -> Exec<()> {
        let s = self.span(lin, buf.len(), access)?;
        self.write_span(&s, buf);
        Ok(())
    }

    /// A little-endian value of 1 to 8 bytes that the processor reads for itself.
    pub fn read_system(&mut self, lin: u64, size: usize) -> Exec<u64> {
        let mut b = [0; 8];
        self.read_lin(lin, &mut b[..size], Access::SYSTEM_READ)?;
        Ok(u64::from_le_bytes(b))
    }

    // ---- segmented memory ----

    /// Reads a value of 1, 2, 4 or 8 bytes.
    #[inline]
    pub fn read_mem(&mut self, segment: usize, off: u64, size: usize) -> Exec<u64> {
        let lin = self.linear(segment, off, size as u64, false)?;
        self.check_alignment(lin, size)?;
        let mut b = [0; 8];
        self.read_lin(lin, &mut b[..size], self.access(false))?;
        self.watch(lin, size, false);
        Ok(u64::from_le_bytes(b))
    }

    /// Writes a value of 1, 2, 4 or 8 bytes.
    #[inline]
    pub fn write_mem(&mut self, segment: usize, off: u64, size: usize, v: u64) -> Exec<()> {
        let lin = self.linear(segment, off, size as u64, true)?;
        self.check_alignment(lin, size)?;
        self.write_lin(lin, &v.to_le_bytes()[..size], self.access(true))?;
        self.watch(lin, size, true);
        Ok(())
    }

    // ---- operands ----

    /// Size of operand `k` in bytes: a general register or memory.
    pub fn op_size(&self, i: &Instruction, k: u32) -> usize {
        match i.op_kind(k) {
            OpKind::Register => i.op_register(k).size(),
            _ => i.memory_size().size(),
        }
    }

    /// Reads operand `k`: a general register, memory of 1 to 8 bytes, or an immediate, sign-extended as encoded.
    #[inline]
    pub fn read_op(&mut self, i: &Instruction, k: u32) -> Exec<u64> {
        match i.op_kind(k) {
            OpKind::Register => Ok(self.get(i.op_register(k))),
            OpKind::Memory => {
                let (s, off) = self.mem_ref(i);
                self.read_mem(s, off, i.memory_size().size())
            }
            _ => i.try_immediate(k).map_err(|_| Exception::ud()),
        }
    }

    /// As [`Self::read_op`] for a memory operand or register of which only `size` bytes are wanted.
    pub fn read_op_sized(&mut self, i: &Instruction, k: u32, size: usize) -> Exec<u64> {
        match i.op_kind(k) {
            OpKind::Register => Ok(self.get(i.op_register(k)) & mask(size)),
            _ => {
                let (s, off) = self.mem_ref(i);
                self.read_mem(s, off, size)
            }
        }
    }

    /// Writes operand `k`: a general register or memory of `size` bytes.
    #[inline]
    pub fn write_op(&mut self, i: &Instruction, k: u32, size: usize, v: u64) -> Exec<()> {
        match i.op_kind(k) {
            OpKind::Register => {
                self.set(i.op_register(k), v);
                Ok(())
            }
            _ => {
                let (s, off) = self.mem_ref(i);
                self.write_mem(s, off, size, v)
            }
        }
    }

    // ---- stack ----

    /// Width of the stack pointer in bytes.
    #[inline]
    pub fn stack_size(&self) -> usize {
        if self.code64() {
            8
        } else if self.cpu.seg[seg::SS].attr & Segment::ATTR_DB != 0 && self.protected() {
            4
        } else {
            2
        }
    }

    /// The stack pointer, truncated to the stack's width.
    pub fn sp(&self) -> u64 {
        self.cpu.gpr[reg::RSP] & mask(self.stack_size())
    }

    #[inline]
    pub fn set_sp(&mut self, v: u64) {
        let n = self.stack_size();
        set_sized(&mut self.cpu.gpr[reg::RSP], n, v);
    }

    /// Pushes below `*sp` without changing RSP.
    pub fn push_at(&mut self, sp: &mut u64, size: usize, v: u64) -> Exec<()> {
        let new = sp.wrapping_sub(size as u64) & mask(self.stack_size());
        self.write_mem(seg::SS, new, size, v)?;
        *sp = new;
        Ok(())
    }

    /// Pops at `*sp` without changing RSP.
    pub fn pop_at(&mut self, sp: &mut u64, size: usize) -> Exec<u64> {
        let v = self.read_mem(seg::SS, *sp, size)?;
        *sp = sp.wrapping_add(size as u64) & mask(self.stack_size());
        Ok(v)
    }

    pub fn push(&mut self, size: usize, v: u64) -> Exec<()> {
        let mut sp = self.sp();
        self.push_at(&mut sp, size, v)?;
        self.set_sp(sp);
        Ok(())
    }

    pub fn pop(&mut self, size: usize) -> Exec<u64> {
        let mut sp = self.sp();
        let v = self.pop_at(&mut sp, size)?;
        self.set_sp(sp);
        Ok(v)
    }
}

/// Copies a piece inside one page out of guest memory; what is not memory reads as ones.
pub(super) fn phys_read(host: &impl Host, gpa: Gpa, buf: &mut [u8]) {
    match host.memory().page(gpa.gfn()) {
        // SAFETY: the page is backed, and the caller's piece does not leave it.
        Some(p) => unsafe {
            copy_sized(
                p.add(gpa.page_offset() as usize),
                buf.as_mut_ptr(),
                buf.len(),
            )
        },
        None => buf.fill(0xff),
    }
}

/// Copies a piece inside one page into guest memory; what is not memory ignores it.
pub(super) fn phys_write(host: &mut impl Host, gpa: Gpa, buf: &[u8]) {
    let Some(p) = host.memory().page(gpa.gfn()) else {
        return;
    };
    // SAFETY: the page is backed, and the caller's piece does not leave it.
    unsafe { copy_sized(buf.as_ptr(), p.add(gpa.page_offset() as usize), buf.len()) };
    host.written(gpa, buf.len());
}

/// Writes the low `size` bytes of a register; 4 bytes clear the upper half.
#[inline]
pub(super) fn set_sized(slot: &mut u64, size: usize, v: u64) {
    match size {
        8 => *slot = v,
        4 => *slot = v & 0xffff_ffff,
        n => *slot = *slot & !mask(n) | v & mask(n),
    }
}

/// The exception for an access outside a segment: #SS for the stack, #GP otherwise.
pub(super) fn segment_fault(segment: usize) -> Exception {
    if segment == seg::SS {
        Exception::ss(0)
    } else {
        Exception::gp(0)
    }
}

/// Copies `len` bytes between guest memory and a buffer; naturally aligned power-of-two sizes in one access, as hardware does.
///
/// # Safety
/// `from` must be readable and `to` writable for `len` bytes, and they must not overlap.
#[inline]
unsafe fn copy_sized(from: *const u8, to: *mut u8, len: usize) {
    macro_rules! once {
        ($t:ty) => {{
            // SAFETY: the caller's contract; the volatile access on the guest's side tolerates other CPUs' writes and does not tear.
            unsafe {
                if from as usize % len == 0 {
                    let v = from.cast::<$t>().read_volatile();
                    if to as usize % len == 0 {
                        to.cast::<$t>().write_volatile(v);
                    } else {
                        to.cast::<$t>().write_unaligned(v);
                    }
                } else if to as usize % len == 0 {
                    to.cast::<$t>().write_volatile(from.cast::<$t>().read_unaligned());
                } else {
                    std::ptr::copy_nonoverlapping(from, to, len);
                }
            }
        }};
    }
    match len {
        1 => once!(u8),
        2 => once!(u16),
        4 => once!(u32),
        8 => once!(u64),
        // SAFETY: the caller's contract.
        _ => unsafe { std::ptr::copy_nonoverlapping(from, to, len) },
    }
}
