//! AVX-512 instructions with a mask and a memory operand: elements that are masked out neither fault nor change.
//!
//! Which bytes a store touches follows from its mask. Which a load touches depends on the instruction and on the processor (a permutation reads all of
//! its operand, an addition only the elements wanted), so the processor decides: where a page of the operand is missing, the instruction is tried at an address where the
//! same pages are missing in the host, and faults there or does not.

use hospes_engine::seg;
use hospes_units::Gpa;
use iced_x86::{Instruction, Mnemonic};

use super::cx::{Cx, Exec, canonical, segment_fault};
use super::host::{Exception, HOLES_MEMORY, Host, NativeFault, Operand};
use super::native::Bounce;

const PAGE: usize = 4096;
/// Bytes of the largest operand.
const MAX: usize = 64;

/// A page that an operand lies in: where it is in guest memory, or what an access to it raises; and the operand's bytes in it.
type Piece = (Result<Gpa, Exception>, std::ops::Range<usize>);

impl<H: Host> Cx<'_, H> {
    /// Runs an instruction with a mask register and a memory operand.
    pub(super) fn native_masked(
        &mut self,
        i: &Instruction,
        write: bool,
    ) -> Exec<Result<(), NativeFault>> {
        let size = i.memory_size().size();
        if size == 0 || size > MAX {
            return Err(Exception::ud());
        }
        let (s, off) = self.mem_ref(i);
        let lin = match s {
            _ if !self.code64() => self.linear(s, off, size as u64, write)?,
            seg::FS | seg::GS => self.cpu.seg[s].base.wrapping_add(off),
            _ => off,
        };
        self.host.load_fpu(self.cpu);
        if lin & (size as u64 - 1) != 0 && self.needs_alignment(i, size) && self.lanes(i, size) != 0
        {
            // The processor looks at the address before it looks at the page.
            return Err(Exception::gp(0));
        }
        if write {
            self.masked_store(i, s, lin, size)
        } else {
            self.masked_load(i, s, lin, size)
        }
    }

    fn masked_store(
        &mut self,
        i: &Instruction,
        s: usize,
        lin: u64,
        size: usize,
    ) -> Exec<Result<(), NativeFault>> {
        let active = self.active_bytes(i, size);
        let mut bounce = Bounce::default();
        let copy = &mut bounce.0[(lin & 63) as usize..][..size];
        let operand = Operand {
            ptr: copy.as_mut_ptr(),
            len: size,
        };
        let whole = is_extract(i.mnemonic());
        let element = i.memory_size().element_size().clamp(1, 8);
        let looked_at = if whole {
            u64::MAX >> (64 - size)
        } else {
            active
        };
        if looked_at == 0 {
            return Ok(self.host.run_native(self.cpu, i, Some(operand)));
        }
        let access = self.access(true);
        // Both pages are checked before anything runs.
        let mut pieces = [None, None];
        for (slot, bytes) in pieces.iter_mut().zip(split(lin, size)) {
            // A fault names the first byte that is looked at.
            let Some(k) = bytes.clone().find(|k| looked_at >> k & 1 != 0) else {
                continue;
            };
            let element = if whole { size } else { element };
            let last = lin.wrapping_add((k - k % element + element - 1) as u64);
            let at = self.masked_address(lin, k);
            let none = |at| self.code64() && !canonical(at);
            if none(at) {
                return Err(segment_fault(s));
            }
            // An address that is none counts for more than a page that is missing.
            let straddles = none(last);
            let page = match self.translate(at, access) {
                Err(_) if straddles => return Err(segment_fault(s)),
                page => page?,
            };
            *slot = Some((Gpa(page.0 - (k - bytes.start) as u64), bytes));
        }
        let result = self.host.run_native(self.cpu, i, Some(operand));
        if result.is_ok() {
            for (gpa, bytes) in pieces.into_iter().flatten() {
                for k in bytes.clone().filter(|k| active >> k & 1 != 0) {
                    let at = Gpa(gpa.0 + (k - bytes.start) as u64);
                    self.phys_write(at, &copy[k..=k]);
                }
            }
        }
        let (first, last) = (looked_at.trailing_zeros(), 63 - looked_at.leading_zeros());
        let begin = lin.wrapping_add(u64::from(first));
        self.watch(begin, (last - first) as usize + 1, true);
        Ok(result)
    }

    fn masked_load(
        &mut self,
        i: &Instruction,
        s: usize,
        lin: u64,
        size: usize,
    ) -> Exec<Result<(), NativeFault>> {
        let access = self.access(false);
        let mut bounce = Bounce::default();
        let copy = &mut bounce.0[(lin & 63) as usize..][..size];
        let mut pieces: [Option<Piece>; 2] = [None, None];
        for (slot, bytes) in pieces.iter_mut().zip(split(lin, size)) {
            if bytes.is_empty() {
                continue;
            }
            let at = self.masked_address(lin, bytes.start);
            let place = if self.code64() && !canonical(at) {
                Err(segment_fault(s))
            } else {
                self.translate(at, access)
            };
            if let Ok(gpa) = place {
                self.phys_read(gpa, &mut copy[bytes.clone()]);
            }
            *slot = Some((place, bytes));
        }
        let result = if pieces.iter().flatten().any(|(place, _)| place.is_err()) {
            self.try_in_holes(i, lin, &copy[..], &pieces)?
        } else {
            let operand = Operand {
                ptr: copy.as_mut_ptr(),
                len: size,
            };
            self.host.run_native(self.cpu, i, Some(operand))
        };
        self.watch(lin, size, false);
        Ok(result)
    }

    /// Address of a byte of the operand: outside of 64-bit code it wraps.
    fn masked_address(&self, lin: u64, byte: usize) -> u64 {
        let at = lin.wrapping_add(byte as u64);
        if self.code64() { at } else { at & 0xffff_ffff }
    }

    /// Runs a load of which at least one page is missing where the host lacks the same pages.
    fn try_in_holes(
        &mut self,
        i: &Instruction,
        lin: u64,
        copy: &[u8],
        pieces: &[Option<Piece>; 2],
    ) -> Exec<Result<(), NativeFault>> {
        let missing = |n: usize| match &pieces[n] {
            Some((Err(e), _)) => Some(*e),
            _ => None,
        };
        let any = missing(0).or(missing(1)).unwrap_or(Exception::gp(0));
        let Some(holes) = self.host.holes() else {
            return Err(any);
        };
        // The first page of the operand is the one in front of the memory, or behind, or neither.
        let page = match (missing(0), missing(1)) {
            (None, _) => HOLES_MEMORY,
            (_, None) if pieces[1].is_some() => HOLES_MEMORY - 1,
            _ => 0,
        };
        let ptr = holes.wrapping_add(page * PAGE + (lin & 0xfff) as usize);
        for (place, bytes) in pieces.iter().flatten() {
            if place.is_ok() {
                let to = ptr.wrapping_add(bytes.start);
                // SAFETY: the bytes of a page that is there lie in the one of the four that is memory, which nobody else uses.
                unsafe {
                    std::ptr::copy_nonoverlapping(copy[bytes.clone()].as_ptr(), to, bytes.len())
                };
            }
        }
        let operand = Operand {
            ptr,
            len: copy.len(),
        };
        match self.host.run_native(self.cpu, i, Some(operand)) {
            Err(NativeFault::Missing(at)) => {
                let by = at.wrapping_sub(ptr as u64);
                let border = match &pieces[1] {
                    Some((_, bytes)) => bytes.start as u64,
                    None => u64::MAX,
                };
                // An element that lies in both pages: an address that is none counts for more than a page that is missing.
                let end = by.saturating_add(i.memory_size().element_size() as u64);
                let none = missing(1).filter(|e| e.cr2.is_none() && end > border);
                let mut e = none.or(missing(usize::from(by >= border))).unwrap_or(any);
                if e.cr2.is_some() {
                    e.cr2 = Some(lin.wrapping_add(by));
                }
                Err(e)
            }
            other => Ok(other),
        }
    }

    /// Bits of the mask that stand for elements of the memory operand.
    fn lanes(&self, i: &Instruction, size: usize) -> u64 {
        let count = size / i.memory_size().element_size().clamp(1, 8);
        self.mask_register(i.op_mask()) & (u64::MAX >> (64 - count))
    }

    /// Bytes of memory that a masked store writes, one bit each.
    fn active_bytes(&self, i: &Instruction, size: usize) -> u64 {
        let element = i.memory_size().element_size().clamp(1, 8);
        let count = size / element;
        let lanes = self.lanes(i, size);
        let packed = matches!(
            i.mnemonic(),
            Mnemonic::Vcompressps
                | Mnemonic::Vcompresspd
                | Mnemonic::Vpcompressb
                | Mnemonic::Vpcompressw
                | Mnemonic::Vpcompressd
                | Mnemonic::Vpcompressq
        );
        let lanes = match lanes.count_ones() {
            0 => 0,
            n if packed => u64::MAX >> (64 - n),
            _ => lanes,
        };
        let one = u64::MAX >> (64 - element);
        (0..count)
            .filter(|n| lanes >> n & 1 != 0)
            .fold(0, |m, n| m | one << (n * element))
    }
}

/// Stores of which all bytes must be there, whatever the mask says.
fn is_extract(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Vextractf32x4
            | M::Vextractf32x8
            | M::Vextractf64x2
            | M::Vextractf64x4
            | M::Vextracti32x4
            | M::Vextracti32x8
            | M::Vextracti64x2
            | M::Vextracti64x4
    )
}

/// The operand's bytes in its first and in its second page.
fn split(lin: u64, size: usize) -> [std::ops::Range<usize>; 2] {
    let room = (PAGE - (lin & 0xfff) as usize).min(size);
    [0..room, room..size]
}
