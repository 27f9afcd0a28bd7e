//! Instructions that the host CPU runs itself: everything here is about their memory operand and about whether they may run at all.
//!
//! An operand inside one page of guest memory is used where it lies, so LOCK forms stay atomic; for those that cross pages both are shown side by
//! side. Others that cross pages, or are not memory, go through a copy at the same address modulo 64. Write permission is checked before anything runs.

use hospes_engine::{cr, rflags};
use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::class::{Class, MemAccess, class_of, encodable, mem_access};
use super::cx::{Cx, Exec, Flow, sign_extend};
use super::host::{Exception, Host, NativeFault, Operand, vector};

/// Longest operand of a natively run instruction: FNSAVE's 108 bytes.
const MAX_OPERAND: usize = 128;

/// Room for any operand at any offset modulo 64.
#[repr(C, align(64))]
pub(super) struct Bounce(pub [u8; MAX_OPERAND + 64]);

impl Default for Bounce {
    fn default() -> Bounce {
        Bounce([0; MAX_OPERAND + 64])
    }
}

const XCR0_AVX: u64 = 0x6;
const XCR0_AVX512: u64 = 0xe6;

/// The memory operand's number, if there is one.
pub(super) fn memory_operand(i: &Instruction) -> Option<u32> {
    (0..i.op_count()).find(|&k| i.op_kind(k) == OpKind::Memory)
}

/// Where the x87 instruction and data pointers lie in an image of FNSTENV or FNSAVE. They would be those of the host's code, so guests find
/// zeros there; for other instructions the operand is left alone.
fn hidden_pointers(i: &Instruction) -> std::ops::Range<usize> {
    match i.code() {
        Code::Fnstenv_m14byte | Code::Fnsave_m94byte => 6..14,
        Code::Fnstenv_m28byte | Code::Fnsave_m108byte => 12..28,
        _ => 0..0,
    }
}

/// Whether the access to memory is atomic: by the prefix, or because XCHG always is.
fn is_locked(i: &Instruction) -> bool {
    i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg
}

impl<H: Host> Cx<'_, H> {
    /// Whether CR0, CR4 and XCR0 let this class of instruction run.
    pub fn check_enabled(&self, class: Class, m: Mnemonic) -> Exec<()> {
        let (cr0, cr4) = (self.cpu.cr0, self.cpu.cr4);
        let ud = |bad: bool| if bad { Err(Exception::ud()) } else { Ok(()) };
        match class {
            Class::Plain => return Ok(()),
            Class::Refused => return Err(Exception::ud()),
            Class::PlainVex => return self.need_protected(),
            Class::X87 if m == Mnemonic::Wait => {
                let both = cr::CR0_MP | cr::CR0_TS;
                return if cr0 & both == both {
                    Err(Exception::nm())
                } else {
                    Ok(())
                };
            }
            Class::X87 => {
                if cr0 & cr::CR0_EM != 0 {
                    return Err(Exception::nm());
                }
            }
            Class::Mmx => ud(cr0 & cr::CR0_EM != 0)?,
            Class::Sse => ud(cr0 & cr::CR0_EM != 0 || cr4 & cr::CR4_OSFXSR == 0)?,
            Class::Avx | Class::Avx512 => {
                self.need_protected()?;
                let need = if class == Class::Avx {
                    XCR0_AVX
                } else {
                    XCR0_AVX512
                };
                ud(cr4 & cr::CR4_OSXSAVE == 0 || self.cpu.xcr0 & need != need)?;
            }
        }
        if cr0 & cr::CR0_TS != 0 {
            return Err(Exception::nm());
        }
        Ok(())
    }

    /// Runs one instruction of the "ordinary computation" kind.
    pub fn native(&mut self, i: &Instruction) -> Exec<Flow> {
        let class = class_of(i.code());
        self.check_enabled(class, i.mnemonic())?;
        if let Some(code) = encodable(i.code()) {
            let mut other = *i;
            other.set_code(code);
            return self.native_checked(&other);
        }
        self.native_checked(i)
    }

    fn native_checked(&mut self, i: &Instruction) -> Exec<Flow> {
        let result = match memory_operand(i).map(|k| mem_access(i, k)) {
            None | Some(MemAccess::None) => self.host.run_native(self.cpu, i, None),
            Some(a) if i.op_mask() != Register::None => {
                self.native_masked(i, a == MemAccess::Write)?
            }
            Some(a) => self.native_memory(i, a == MemAccess::Write)?,
        };
        match result {
            Ok(()) => Ok(Flow::Next),
            Err(NativeFault::Simd) if self.cpu.cr4 & cr::CR4_OSXMMEXCPT == 0 => {
                Err(Exception::ud())
            }
            Err(f) => Err(f.into()),
        }
    }

    fn native_memory(&mut self, i: &Instruction, write: bool) -> Exec<Result<(), NativeFault>> {
        let size = i.memory_size().size();
        if size == 0 || size > MAX_OPERAND {
            return Err(Exception::ud());
        }
        let (s, off) = self.mem_ref(i);
        let lin = match self.linear(s, off, size as u64, write) {
            Err(_) if off & (size as u64 - 1) != 0 && self.needs_alignment(i, size) => {
                return Err(Exception::gp(0));
            }
            lin => lin?,
        };
        if size <= 8 && size.is_power_of_two() {
            self.check_alignment(lin, size)?;
        }
        let result = self.native_linear(i, lin, size, write);
        if result.is_err() && lin & (size as u64 - 1) != 0 && self.needs_alignment(i, size) {
            // The processor looks at the address before it looks at the page.
            return Err(Exception::gp(0));
        }
        result
    }

    fn native_linear(
        &mut self,
        i: &Instruction,
        lin: u64,
        size: usize,
        write: bool,
    ) -> Exec<Result<(), NativeFault>> {
        let access = self.access(write);
        let direct = (lin & 0xfff) as usize + size <= 4096 && hidden_pointers(i).is_empty();
        let result = if direct {
            let gpa = self.translate(lin, access)?;
            match self.host.memory().page(gpa.gfn()) {
                Some(page) => {
                    // SAFETY: the page is backed and the operand lies inside it.
                    let ptr = unsafe { page.add(gpa.page_offset() as usize) };
                    let operand = Operand { ptr, len: size };
                    let result = self.host.run_native(self.cpu, i, Some(operand));
                    if write {
                        self.host.written(gpa, size);
                    }
                    result
                }
                None => self.native_bounced(i, lin, size, write)?,
            }
        } else {
            self.native_bounced(i, lin, size, write)?
        };
        self.watch(lin, size, write);
        Ok(result)
    }

    /// Whether an operand of 16 bytes or more must be aligned to its size.
    pub(super) fn needs_alignment(&self, i: &Instruction, size: usize) -> bool {
        use Mnemonic as M;
        if !matches!(size, 16 | 32 | 64) {
            return false;
        }
        match i.mnemonic() {
            M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovdqa32
            | M::Vmovdqa64
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa => true,
            M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm => false,
            M::Sha1rnds4
            | M::Sha1nexte
            | M::Sha1msg1
            | M::Sha1msg2
            | M::Sha256rnds2
            | M::Sha256msg1
            | M::Sha256msg2 => !self.is_amd(),
            _ => {
                i.code().encoding() == EncodingKind::Legacy
                    && matches!(class_of(i.code()), Class::Plain | Class::Sse)
            }
        }
    }

    fn native_bounced(
        &mut self,
        i: &Instruction,
        lin: u64,
        size: usize,
        write: bool,
    ) -> Exec<Result<(), NativeFault>> {
        let access = self.access(write);
        let span = self.span(lin, size, access)?;
        if write && span.second_len != 0 && is_locked(i) {
            // Two pages that are neighbours in the host's memory: the processor sees to it that other vCPUs find all or nothing.
            if let Some(ptr) = self.host.neighbours(span.first, span.second) {
                let operand = Operand { ptr, len: size };
                let result = self.host.run_native(self.cpu, i, Some(operand));
                self.host.written(span.first, span.first_len);
                self.host.written(span.second, span.second_len);
                return Ok(result);
            }
        }
        let mut bounce = Bounce::default();
        let copy = &mut bounce.0[(lin & 63) as usize..][..size];
        self.read_span(&span, copy);
        let operand = Operand {
            ptr: copy.as_mut_ptr(),
            len: size,
        };
        let result = self.host.run_native(self.cpu, i, Some(operand));
        if write && result.is_ok() {
            copy[hidden_pointers(i)].fill(0);
            self.write_span(&span, copy);
        }
        Ok(result)
    }

    /// BT, BTS, BTR, BTC with the bit number in a register: it also selects the memory word, near or far.
    pub fn bit_test(&mut self, i: &Instruction) -> Exec<Flow> {
        if i.op0_kind() != OpKind::Memory || i.op1_kind() != OpKind::Register {
            return self.native(i);
        }
        let size = i.op1_register().size();
        let index = sign_extend(self.get(i.op1_register()), size) as i64;
        let bits = 8 * size as i64;
        let (s, off) = self.mem_ref(i);
        let words = index.div_euclid(bits) * size as i64;
        let off = off.wrapping_add(words as u64) & super::cx::mask(self.address_size(i));
        let bit = index.rem_euclid(bits) as u32;
        let write = i.mnemonic() != Mnemonic::Bt;
        let lin = self.linear(s, off, size as u64, write)?;
        self.check_alignment(lin, size)?;
        let access = self.access(write);
        let span = self.span(lin, size, access)?;
        let flip = 1u64 << bit;
        let change = |v: u64| match i.mnemonic() {
            Mnemonic::Bts => v | flip,
            Mnemonic::Btr => v & !flip,
            Mnemonic::Btc => v ^ flip,
            _ => v,
        };
        let old = if write {
            self.update(&span, lin, size, change)
        } else {
            let mut b = [0; 8];
            self.read_span(&span, &mut b[..size]);
            u64::from_le_bytes(b)
        };
        self.set_flag(rflags::CF, old & flip != 0);
        self.watch(lin, size, write);
        Ok(Flow::Next)
    }

    /// Replaces a value in memory, atomically where it is naturally aligned; returns the old one.
    fn update(
        &mut self,
        span: &super::cx::Span,
        lin: u64,
        size: usize,
        change: impl Fn(u64) -> u64,
    ) -> u64 {
        use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};
        let page = self.host.memory().page(span.first.gfn());
        if let (true, Some(page)) = (lin.is_multiple_of(size as u64), page) {
            macro_rules! update {
                ($atomic:ty, $value:ty, $ptr:expr) => {{
                    // SAFETY: the page is backed, the value lies inside it and is naturally aligned.
                    let a = unsafe { &*$ptr.cast::<$atomic>() };
                    let f = |v: $value| Some(change(u64::from(v)) as $value);
                    // The closure never declines, so both outcomes carry the old value.
                    u64::from(a.fetch_update(SeqCst, SeqCst, f).unwrap_or_else(|v| v))
                }};
            }
            // SAFETY: the offset lies inside the backed page.
            let ptr = unsafe { page.add(span.first.page_offset() as usize) };
            let old = match size {
                2 => update!(AtomicU16, u16, ptr),
                4 => update!(AtomicU32, u32, ptr),
                _ => update!(AtomicU64, u64, ptr),
            };
            self.host.written(span.first, size);
            return old;
        }
        let mut b = [0; 8];
        self.read_span(span, &mut b[..size]);
        let old = u64::from_le_bytes(b);
        self.write_span(span, &change(old).to_le_bytes()[..size]);
        old
    }

    /// AAA, AAS, AAM, AAD, DAA, DAS, SALC: decimal arithmetic that 64-bit hosts no longer have.
    pub fn decimal(&mut self, i: &Instruction) -> Exec<Flow> {
        let ax = self.get(Register::AX) as u16;
        let (al, ah) = (ax as u8, (ax >> 8) as u8);
        let (cf, af) = (self.flag(rflags::CF), self.flag(rflags::AF));
        let adjust = al & 15 > 9 || af;
        let result = match i.code() {
            Code::Salc => {
                self.set(Register::AL, if cf { 0xff } else { 0 });
                return Ok(Flow::Next);
            }
            Code::Aaa | Code::Aas => {
                let ax = match (adjust, i.code()) {
                    (false, _) => ax,
                    (true, Code::Aaa) => ax.wrapping_add(0x106),
                    (true, _) => ax.wrapping_sub(0x106),
                };
                self.set_flag(rflags::AF | rflags::CF, adjust);
                ax & 0xff0f
            }
            Code::Aam_imm8 => {
                let base = i.immediate8();
                if base == 0 {
                    return Err(Exception::plain(vector::DE));
                }
                self.set_flag(rflags::AF | rflags::CF, false);
                u16::from(al / base) << 8 | u16::from(al % base)
            }
            Code::Aad_imm8 => {
                self.set_flag(rflags::AF | rflags::CF, false);
                u16::from(al.wrapping_add(ah.wrapping_mul(i.immediate8())))
            }
            code => {
                let high = al > 0x99 || cf;
                let low_step = if adjust { 6 } else { 0 };
                let high_step = if high { 0x60 } else { 0 };
                let subtract = code == Code::Das;
                let borrow = subtract && adjust && al < 6;
                let new = if subtract {
                    al.wrapping_sub(low_step).wrapping_sub(high_step)
                } else {
                    al.wrapping_add(low_step).wrapping_add(high_step)
                };
                self.set_flag(rflags::AF, adjust);
                self.set_flag(rflags::CF, high || borrow);
                u16::from(ah) << 8 | u16::from(new)
            }
        };
        self.set(Register::AX, u64::from(result));
        let al = result as u8;
        self.set_flag(rflags::PF, al.count_ones().is_multiple_of(2));
        self.set_flag(rflags::ZF, al == 0);
        self.set_flag(rflags::SF, al >> 7 != 0);
        self.set_flag(rflags::OF, false);
        Ok(Flow::Next)
    }
}
