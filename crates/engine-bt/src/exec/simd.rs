//! Vector instructions with several memory accesses or with faults by element: masked moves, gathers, scatters, and the 64-byte stores.
//!
//! Vector registers live in the XSAVE image; data of every component there is valid whatever XSTATE_BV says, and what changes here sets its
//! bit.

use hospes_engine::seg;
use iced_x86::{Instruction, MemorySize, Mnemonic, OpKind, Register};

use super::class::class_of;
use super::cx::{Cx, Exec, Flow, mask, seg_index};
use super::host::{Exception, Host};

const XMM: usize = 160;
const YMM_HIGH: usize = 576;
const XSTATE_BV: usize = 512;
const X87_STATUS: usize = 2;
const X87_TAGS: usize = 4;
const X87_REGS: usize = 32;

/// Number of a vector register.
fn vector_number(r: Register) -> usize {
    r.number()
}

impl<H: Host> Cx<'_, H> {
    /// Offset of an AVX-512 component in the XSAVE image.
    fn component(&self, n: u32) -> usize {
        self.host.cpuid(self.cpu, 0xd, n)[1] as usize
    }

    /// Value of a mask register; K0 and none mean no masking.
    pub fn mask_register(&self, k: Register) -> u64 {
        if matches!(k, Register::None | Register::K0) {
            return u64::MAX;
        }
        let at = self.component(5) + 8 * k.number();
        let mut b = [0; 8];
        b.copy_from_slice(&self.cpu.xsave.0[at..at + 8]);
        u64::from_le_bytes(b)
    }

    fn set_mask_register(&mut self, k: Register, v: u64) {
        let at = self.component(5) + 8 * k.number();
        self.cpu.xsave.0[at..at + 8].copy_from_slice(&v.to_le_bytes());
        self.cpu.xsave.0[XSTATE_BV] |= 1 << 5;
    }

    /// The image offsets and lengths of the pieces of vector register `n`, up to `len` bytes.
    fn vector_pieces(&self, n: usize, len: usize) -> [(usize, usize); 3] {
        if n >= 16 {
            return [(self.component(7) + 64 * (n - 16), len), (0, 0), (0, 0)];
        }
        let high = if len > 32 { self.component(6) } else { 0 };
        [
            (XMM + 16 * n, len.min(16)),
            (YMM_HIGH + 16 * n, len.saturating_sub(16).min(16)),
            (high + 32 * n, len.saturating_sub(32)),
        ]
    }

    fn vector(&self, r: Register) -> [u8; 64] {
        let mut v = [0; 64];
        let mut at = 0;
        for (from, n) in self.vector_pieces(vector_number(r), r.size()) {
            v[at..at + n].copy_from_slice(&self.cpu.xsave.0[from..from + n]);
            at += n;
        }
        v
    }

    /// Writes a vector register and clears its upper part, as VEX and EVEX instructions do.
    fn set_vector(&mut self, r: Register, v: &[u8; 64]) {
        let n = vector_number(r);
        let full = if self.cpu.xcr0 & 0xe0 == 0xe0 { 64 } else { 32 };
        let mut value = [0; 64];
        value[..r.size()].copy_from_slice(&v[..r.size()]);
        let mut at = 0;
        for (to, len) in self.vector_pieces(n, full) {
            self.cpu.xsave.0[to..to + len].copy_from_slice(&value[at..at + len]);
            at += len;
        }
        self.cpu.xsave.0[XSTATE_BV] |= if n >= 16 {
            1 << 7
        } else if full == 64 {
            0x46
        } else {
            6
        };
    }

    /// Writes a vector register and leaves its upper part alone, as an instruction that is interrupted halfway does.
    fn set_vector_low(&mut self, r: Register, v: &[u8; 64]) {
        let mut at = 0;
        for (to, len) in self.vector_pieces(vector_number(r), r.size()) {
            self.cpu.xsave.0[to..to + len].copy_from_slice(&v[at..at + len]);
            at += len;
        }
        self.cpu.xsave.0[XSTATE_BV] |= match (vector_number(r), r.size()) {
            (16.., _) => 1 << 7,
            (_, 64) => 0x46,
            (_, 32) => 6,
            _ => 2,
        };
    }

    /// Clears a register behind the vector length of an EVEX-coded gather, which AMD's processors do with its first element. The length is that of the
    /// longer one of target and indices.
    fn clear_behind(&mut self, target: Register, index_size: usize) {
        let n = vector_number(target) as u32;
        let whole = match target.size().max(index_size) {
            16 => Register::XMM0 + n,
            32 => Register::YMM0 + n,
            _ => Register::ZMM0 + n,
        };
        let value = self.vector(whole);
        self.set_vector(whole, &value);
    }

    fn vector_enabled(&self, i: &Instruction) -> Exec<()> {
        self.check_enabled(class_of(i.code()), i.mnemonic())
    }

    /// VZEROUPPER and VZEROALL outside of 64-bit code, where only the first eight registers exist.
    pub fn zero_vectors(&mut self, i: &Instruction) -> Exec<Flow> {
        self.vector_enabled(i)?;
        for n in 0..8u32 {
            let mut v = [0; 64];
            if i.mnemonic() == Mnemonic::Vzeroupper {
                v = self.vector(Register::XMM0 + n);
            }
            self.set_vector(Register::YMM0 + n, &v);
        }
        Ok(Flow::Next)
    }

    /// VMASKMOVPS/PD, VPMASKMOVD/Q.
    pub fn masked_move(&mut self, i: &Instruction) -> Exec<Flow> {
        self.vector_enabled(i)?;
        let element = match i.mnemonic() {
            Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => 4,
            _ => 8,
        };
        let store = i.op0_kind() == OpKind::Memory;
        let len = i.op1_register().size();
        let lanes = self.vector(i.op1_register());
        let (s, off) = self.mem_ref(i);
        let chosen = |n: usize| lanes[n * element + element - 1] & 0x80 != 0;
        let count = len / element;
        let wrap = mask(self.address_size(i));
        let at = |n: usize| off.wrapping_add((n * element) as u64) & wrap;
        if store {
            let data = self.vector(i.op2_register());
            // Every element is checked before the first is written.
            for n in (0..count).filter(|&n| chosen(n)) {
                let lin = self.linear(s, at(n), element as u64, true)?;
                let access = self.access(true);
                self.span(lin, element, access)?;
            }
            for n in (0..count).filter(|&n| chosen(n)) {
                self.write_mem(s, at(n), element, le(&data[n * element..][..element]))?;
            }
        } else {
            let mut value = [0; 64];
            for n in (0..count).filter(|&n| chosen(n)) {
                let v = self.read_mem(s, at(n), element)?;
                value[n * element..][..element].copy_from_slice(&v.to_le_bytes()[..element]);
            }
            self.set_vector(i.op0_register(), &value);
        }
        Ok(Flow::Next)
    }

    /// MASKMOVDQU, VMASKMOVDQU, MASKMOVQ: bytes to [RDI].
    pub fn masked_store_bytes(&mut self, i: &Instruction) -> Exec<Flow> {
        self.vector_enabled(i)?;
        let width = match i.op0_kind() {
            OpKind::MemorySegDI => 2,
            OpKind::MemorySegEDI => 4,
            _ => 8,
        };
        let off = self.cpu.gpr[hospes_engine::reg::RDI] & mask(width);
        let s = match i.memory_segment() {
            Register::None => seg::DS,
            r => seg_index(r),
        };
        let mmx = i.mnemonic() == Mnemonic::Maskmovq;
        let (data, lanes, len) = if mmx {
            (self.mmx(i.op1_register()), self.mmx(i.op2_register()), 8)
        } else {
            (
                self.vector(i.op1_register()),
                self.vector(i.op2_register()),
                16,
            )
        };
        if mmx {
            // Processors do this even where the store then faults.
            self.enter_mmx();
        }
        let chosen = |n: &usize| lanes[*n] & 0x80 != 0;
        let at = |n: usize| off.wrapping_add(n as u64) & mask(width);
        // Processors check all bytes, whether they are chosen or not.
        let lin = self.linear(s, off, len as u64, true)?;
        let access = self.access(true);
        self.span(lin, len, access)?;
        for n in (0..len).filter(chosen) {
            self.write_mem(s, at(n), 1, u64::from(data[n]))?;
        }
        Ok(Flow::Next)
    }

    fn x87_top(&self) -> usize {
        usize::from(self.cpu.xsave.0[X87_STATUS + 1] >> 3 & 7)
    }

    fn mmx(&self, r: Register) -> [u8; 64] {
        // The image holds the registers in stack order, MMX names them in physical order.
        let slot = (r.number() + 8 - self.x87_top()) % 8;
        let mut v = [0; 64];
        v[..8].copy_from_slice(&self.cpu.xsave.0[X87_REGS + 16 * slot..][..8]);
        v
    }

    /// What every MMX instruction does to the x87 state: top of stack 0, all registers valid.
    fn enter_mmx(&mut self) {
        let top = self.x87_top();
        self.cpu.xsave.0[X87_REGS..X87_REGS + 128].rotate_right(16 * top);
        self.cpu.xsave.0[X87_STATUS + 1] &= !0x38;
        self.cpu.xsave.0[X87_TAGS] = 0xff;
        self.cpu.xsave.0[XSTATE_BV] |= 1;
    }

    /// Address of element `n` of a gather or scatter.
    fn element_address(&self, i: &Instruction, indices: &[u8; 64], n: usize) -> u64 {
        let size = index_size(i);
        let raw = le(&indices[n * size..][..size]);
        let index = super::cx::sign_extend(raw, size);
        let base = match i.memory_base() {
            Register::None => 0,
            r => self.get(r),
        };
        let scaled = index << i.memory_index_scale().trailing_zeros();
        base.wrapping_add(i.memory_displacement64())
            .wrapping_add(scaled)
            & mask(self.address_size(i))
    }

    /// VGATHER*, VPGATHER*, with a vector mask (VEX) or a mask register (EVEX). Finished elements stay finished after a fault.
    pub fn gather(&mut self, i: &Instruction) -> Exec<Flow> {
        self.vector_enabled(i)?;
        let element = element_size(i);
        let target = i.op0_register();
        let indices = self.vector(i.memory_index());
        let count = (target.size() / element).min(i.memory_index().size() / index_size(i));
        let vex_mask = (i.op_count() == 3).then(|| i.op2_register());
        let s = seg_index(i.memory_segment());
        let mut value = self.vector(target);
        value[count * element..].fill(0);
        for n in 0..count {
            let lanes = vex_mask.map(|r| self.vector(r));
            let chosen = match &lanes {
                Some(m) => m[(n + 1) * element - 1] & 0x80 != 0,
                None => self.mask_register(i.op_mask()) >> n & 1 != 0,
            };
            if !chosen {
                // A vector mask loses the rest of an element passed over, too.
                if let (Some(r), Some(mut m)) = (vex_mask, lanes) {
                    m[n * element..][..element].fill(0);
                    self.set_vector_low(r, &m);
                }
                continue;
            }
            let at = self.element_address(i, &indices, n);
            let v = self.read_mem(s, at, element)?;
            value[n * element..][..element].copy_from_slice(&v.to_le_bytes()[..element]);
            self.set_vector_low(target, &value);
            if vex_mask.is_none() {
                self.clear_behind(target, i.memory_index().size());
            }
            match (vex_mask, lanes) {
                (Some(r), Some(mut m)) => {
                    m[n * element..][..element].fill(0);
                    self.set_vector_low(r, &m);
                }
                _ => {
                    let k = self.mask_register(i.op_mask());
                    self.set_mask_register(i.op_mask(), k & !(1 << n));
                }
            }
        }
        self.set_vector(target, &value);
        match vex_mask {
            Some(r) => self.set_vector(r, &[0; 64]),
            None => self.set_mask_register(i.op_mask(), 0),
        }
        Ok(Flow::Next)
    }

    /// VSCATTER*, VPSCATTER*.
    pub fn scatter(&mut self, i: &Instruction) -> Exec<Flow> {
        self.vector_enabled(i)?;
        let element = element_size(i);
        let source = i.op1_register();
        let indices = self.vector(i.memory_index());
        let count = (source.size() / element).min(i.memory_index().size() / index_size(i));
        let s = seg_index(i.memory_segment());
        let value = self.vector(source);
        for n in 0..count {
            let k = self.mask_register(i.op_mask());
            if k >> n & 1 == 0 {
                continue;
            }
            let at = self.element_address(i, &indices, n);
            self.write_mem(s, at, element, le(&value[n * element..][..element]))?;
            self.set_mask_register(i.op_mask(), k & !(1 << n));
        }
        self.set_mask_register(i.op_mask(), 0);
        Ok(Flow::Next)
    }

    /// MOVDIR64B: 64 bytes from memory to the aligned address in a register.
    pub fn movdir64b(&mut self, i: &Instruction) -> Exec<Flow> {
        if self.host.cpuid(self.cpu, 7, 0)[2] & (1 << 28) == 0 {
            return Err(Exception::ud());
        }
        let (s, off) = self.mem_ref(i);
        let from = self.linear(s, off, 64, false)?;
        let to = self.get(i.op0_register());
        let to = self.linear(seg::ES, to, 64, true)?;
        if to & 63 != 0 {
            return Err(Exception::gp(0));
        }
        let mut data = [0; 64];
        let access = self.access(false);
        self.read_lin(from, &mut data, access)?;
        let access = self.access(true);
        self.write_lin(to, &data, access)?;
        self.watch(from, 64, false);
        self.watch(to, 64, true);
        Ok(Flow::Next)
    }

    /// CLZERO: zeros the cache line at RAX.
    pub fn clzero(&mut self, i: &Instruction) -> Exec<Flow> {
        let offered = self.host.cpuid(self.cpu, 0x8000_0000, 0)[0] >= 0x8000_0008
            && self.host.cpuid(self.cpu, 0x8000_0008, 0)[1] & 1 != 0;
        if !offered {
            return Err(Exception::ud());
        }
        let s = match i.segment_prefix() {
            Register::None => seg::DS,
            r => seg_index(r),
        };
        let off = self.get(i.op0_register()) & !63;
        let lin = self.linear(s, off, 64, true)?;
        let access = self.access(true);
        self.write_lin(lin & !63, &[0; 64], access)?;
        self.watch(lin, 64, true);
        Ok(Flow::Next)
    }
}

/// Size of one index of a vector memory operand in bytes.
fn index_size(i: &Instruction) -> usize {
    if i.is_vsib64() { 8 } else { 4 }
}

/// Size of one element of a gather or scatter in bytes.
fn element_size(i: &Instruction) -> usize {
    match i.memory_size() {
        MemorySize::Float64 | MemorySize::UInt64 | MemorySize::Int64 => 8,
        m => m.element_size().clamp(4, 8),
    }
}

/// A little-endian value of up to 8 bytes.
fn le(b: &[u8]) -> u64 {
    let mut v = [0; 8];
    v[..b.len()].copy_from_slice(b);
    u64::from_le_bytes(v)
}
