//! A byte-template assembler for the handful of instructions that the translator itself needs.
//!
//! Registers are numbered as the hardware encodes them, 0 = RAX to 15 = R15. `gs:[offset]` addresses the per-vCPU frame.

/// A code position inside the buffer, in bytes from its start.
pub type Pos = usize;

pub const RAX: u8 = 0;
pub const RCX: u8 = 1;
pub const RDX: u8 = 2;
pub const RBX: u8 = 3;
pub const RSP: u8 = 4;
pub const RBP: u8 = 5;
pub const RSI: u8 = 6;
pub const RDI: u8 = 7;

/// Condition codes as encoded in Jcc.
pub mod cc {
    pub const O: u8 = 0;
    pub const B: u8 = 2;
    pub const AE: u8 = 3;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    /// The same as E and NE, after TEST or AND.
    pub const Z: u8 = 4;
    pub const NZ: u8 = 5;
    pub const A: u8 = 7;
}

/// A code buffer.
#[derive(Debug, Default)]
pub struct Asm {
    pub buf: Vec<u8>,
}

impl Asm {
    pub fn pos(&self) -> Pos {
        self.buf.len()
    }

    pub fn bytes(&mut self, b: &[u8]) {
        self.buf.extend_from_slice(b);
    }

    fn imm32(&mut self, v: i32) {
        self.bytes(&v.to_le_bytes());
    }

    /// `gs: REX op modrm(reg, [disp32])`. `op` may have a 0x0f escape as its first byte.
    fn gs_op<const N: usize>(&mut self, w: bool, op: &[u8; N], reg: u8, offset: i32) {
        let rex = 0x40 | (w as u8) << 3 | (reg >> 3) << 2;
        self.gs_head(rex, op);
        let [a, b, c, d] = offset.to_le_bytes();
        self.bytes(&[(reg & 7) << 3 | 4, 0x25, a, b, c, d]);
    }

    /// `gs: REX op modrm(reg, [base + disp32])`.
    fn gs_base_op<const N: usize>(
        &mut self,
        w: bool,
        op: &[u8; N],
        reg: u8,
        base: u8,
        offset: i32,
    ) {
        let rex = 0x40 | (w as u8) << 3 | (reg >> 3) << 2 | base >> 3;
        self.gs_head(rex, op);
        let [a, b, c, d] = offset.to_le_bytes();
        if base & 7 == 4 {
            self.bytes(&[0x80 | (reg & 7) << 3 | 4, 0x24, a, b, c, d]);
        } else {
            self.bytes(&[0x80 | (reg & 7) << 3 | base & 7, a, b, c, d]);
        }
    }

    fn gs_head<const N: usize>(&mut self, rex: u8, op: &[u8; N]) {
        if rex == 0x40 {
            self.bytes(&[0x65]);
        } else {
            self.bytes(&[0x65, rex]);
        }
        self.bytes(op);
    }

    /// `mov reg, gs:[offset]`
    pub fn load(&mut self, reg: u8, offset: i32) {
        self.gs_op(true, &[0x8b], reg, offset);
    }

    /// `mov reg32, gs:[offset]`
    pub fn load32(&mut self, reg: u8, offset: i32) {
        self.gs_op(false, &[0x8b], reg, offset);
    }

    /// `mov gs:[offset], reg`
    pub fn store(&mut self, offset: i32, reg: u8) {
        self.gs_op(true, &[0x89], reg, offset);
    }

    /// `mov gs:[offset], reg32`
    pub fn store32(&mut self, offset: i32, reg: u8) {
        self.gs_op(false, &[0x89], reg, offset);
    }

    /// `mov gs:[offset], reg16`
    pub fn store16(&mut self, offset: i32, reg: u8) {
        self.buf.push(0x66);
        self.gs_op(false, &[0x89], reg, offset);
    }

    /// `movzx reg32, word gs:[offset]`
    pub fn load_u16(&mut self, reg: u8, offset: i32) {
        self.gs_op(false, &[0x0f, 0xb7], reg, offset);
    }

    /// `mov reg16, gs:[offset]`, which keeps the upper bits.
    pub fn load16(&mut self, reg: u8, offset: i32) {
        self.buf.push(0x66);
        self.gs_op(false, &[0x8b], reg, offset);
    }

    /// `movzx reg32, byte gs:[offset]`
    pub fn load_u8(&mut self, reg: u8, offset: i32) {
        self.gs_op(false, &[0x0f, 0xb6], reg, offset);
    }

    /// `mov dword gs:[offset], imm`
    pub fn store_imm32(&mut self, offset: i32, imm: u32) {
        self.gs_op(false, &[0xc7], 0, offset);
        self.imm32(imm as i32);
    }

    /// `mov byte gs:[offset], imm`
    pub fn store_imm8(&mut self, offset: i32, imm: u8) {
        self.gs_op(false, &[0xc6], 0, offset);
        self.buf.push(imm);
    }

    /// Stores a 64-bit constant without a register: one sign-extended store, or two halves.
    pub fn store_imm64(&mut self, offset: i32, imm: u64) {
        if imm as i64 == i64::from(imm as i32) {
            self.gs_op(true, &[0xc7], 0, offset);
            self.imm32(imm as i32);
        } else {
            self.store_imm32(offset, imm as u32);
            self.store_imm32(offset + 4, (imm >> 32) as u32);
        }
    }

    /// `cmp byte gs:[offset], imm`
    pub fn cmp_mem8(&mut self, offset: i32, imm: u8) {
        self.gs_op(false, &[0x80], 7, offset);
        self.buf.push(imm);
    }

    /// `xor reg, gs:[offset]`
    pub fn xor_mem(&mut self, reg: u8, offset: i32) {
        self.gs_op(true, &[0x33], reg, offset);
    }

    /// `add reg, gs:[offset]`
    pub fn add_mem(&mut self, reg: u8, offset: i32) {
        self.gs_op(true, &[0x03], reg, offset);
    }

    /// `xor reg, gs:[base + offset]`
    pub fn xor_mem_base(&mut self, reg: u8, base: u8, offset: i32) {
        self.gs_base_op(true, &[0x33], reg, base, offset);
    }

    /// `cmp reg, gs:[base + offset]`
    pub fn cmp_mem_base(&mut self, reg: u8, base: u8, offset: i32) {
        self.gs_base_op(true, &[0x3b], reg, base, offset);
    }

    /// `mov reg, gs:[base + offset]`
    pub fn load_mem_base(&mut self, reg: u8, base: u8, offset: i32) {
        self.gs_base_op(true, &[0x8b], reg, base, offset);
    }

    /// `jmp reg`
    pub fn jmp_reg(&mut self, reg: u8) {
        if reg >= 8 {
            self.buf.push(0x41);
        }
        self.bytes(&[0xff, 0xe0 | reg & 7]);
    }

    /// `add reg, gs:[base + offset]`
    pub fn add_mem_base(&mut self, reg: u8, base: u8, offset: i32) {
        self.gs_base_op(true, &[0x03], reg, base, offset);
    }

    /// `mov gs:[offset], reg8`
    pub fn store8(&mut self, offset: i32, reg: u8) {
        self.bytes(&[0x65, 0x40 | (reg >> 3) << 2, 0x88, (reg & 7) << 3 | 4, 0x25]);
        self.imm32(offset);
    }

    /// `or reg, gs:[offset]`
    pub fn or_mem(&mut self, reg: u8, offset: i32) {
        self.gs_op(true, &[0x0b], reg, offset);
    }

    /// `or reg32, gs:[offset]`
    pub fn or_mem32(&mut self, reg: u8, offset: i32) {
        self.gs_op(false, &[0x0b], reg, offset);
    }

    /// `and reg, gs:[offset]`
    pub fn and_mem(&mut self, reg: u8, offset: i32) {
        self.gs_op(true, &[0x23], reg, offset);
    }

    /// `and dword gs:[offset], imm`
    pub fn and_mem_imm32(&mut self, offset: i32, imm: u32) {
        self.gs_op(false, &[0x81], 4, offset);
        self.imm32(imm as i32);
    }

    /// `test dword gs:[offset], imm`
    pub fn test_mem_imm32(&mut self, offset: i32, imm: u32) {
        self.gs_op(false, &[0xf7], 0, offset);
        self.imm32(imm as i32);
    }

    /// `cmp dword gs:[offset], imm`
    pub fn cmp_mem_imm32(&mut self, offset: i32, imm: u32) {
        self.gs_op(false, &[0x81], 7, offset);
        self.imm32(imm as i32);
    }

    /// `dec dword gs:[offset]`
    pub fn dec_mem32(&mut self, offset: i32) {
        self.gs_op(false, &[0xff], 1, offset);
    }

    /// `inc dword gs:[offset]`
    pub fn inc_mem32(&mut self, offset: i32) {
        self.gs_op(false, &[0xff], 0, offset);
    }

    /// `mov word gs:[offset], imm`
    pub fn store_imm16(&mut self, offset: i32, imm: u16) {
        self.buf.push(0x66);
        self.gs_op(false, &[0xc7], 0, offset);
        self.bytes(&imm.to_le_bytes());
    }

    /// `cmp reg, gs:[offset]`
    pub fn cmp_mem(&mut self, reg: u8, offset: i32) {
        self.gs_op(true, &[0x3b], reg, offset);
    }

    /// `sub reg, gs:[offset]`
    pub fn sub_mem(&mut self, reg: u8, offset: i32) {
        self.gs_op(true, &[0x2b], reg, offset);
    }

    /// `mov gs:[base + offset], reg`
    pub fn store_mem_base(&mut self, base: u8, offset: i32, reg: u8) {
        self.gs_base_op(true, &[0x89], reg, base, offset);
    }

    /// `mov gs:[base + offset], reg16`
    pub fn store16_mem_base(&mut self, base: u8, offset: i32, reg: u8) {
        self.buf.push(0x66);
        self.gs_base_op(false, &[0x89], reg, base, offset);
    }

    fn rr(&mut self, wide: bool, op: u8, rm: u8, reg: u8) {
        let rex = 0x40 | (wide as u8) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0x40 {
            self.buf.push(rex);
        }
        self.bytes(&[op, 0xc0 | (reg & 7) << 3 | rm & 7]);
    }

    /// `or dst32, src32`
    pub fn or32(&mut self, dst: u8, src: u8) {
        self.rr(false, 0x09, dst, src);
    }

    /// `or dst, src`
    pub fn or(&mut self, dst: u8, src: u8) {
        self.rr(true, 0x09, dst, src);
    }

    /// `and dst, src`
    pub fn and(&mut self, dst: u8, src: u8) {
        self.rr(true, 0x21, dst, src);
    }

    /// `bt a32, number32`: the bit's number counts modulo 32.
    pub fn bt32(&mut self, a: u8, number: u8) {
        let rex = 0x40 | (number >> 3) << 2 | a >> 3;
        if rex != 0x40 {
            self.buf.push(rex);
        }
        self.bytes(&[0x0f, 0xa3, 0xc0 | (number & 7) << 3 | a & 7]);
    }

    /// `shl reg, count`
    pub fn shl(&mut self, reg: u8, count: u8) {
        self.rr(true, 0xc1, reg, 4);
        self.buf.push(count);
    }

    /// `xor dst, src`
    pub fn xor(&mut self, dst: u8, src: u8) {
        self.rr(true, 0x31, dst, src);
    }

    /// `sub dst, src`
    pub fn sub(&mut self, dst: u8, src: u8) {
        self.rr(true, 0x29, dst, src);
    }

    /// `cmp a, b`
    pub fn cmp(&mut self, a: u8, b: u8) {
        self.rr(true, 0x39, a, b);
    }

    /// `cmova dst, src`
    pub fn cmova(&mut self, dst: u8, src: u8) {
        let rex = 0x48 | dst >> 3 << 2 | src >> 3;
        self.bytes(&[rex, 0x0f, 0x47, 0xc0 | (dst & 7) << 3 | src & 7]);
    }

    /// `test a, b`
    pub fn test(&mut self, a: u8, b: u8) {
        self.rr(true, 0x85, a, b);
    }

    /// `not reg`
    pub fn not(&mut self, reg: u8) {
        self.rr(true, 0xf7, reg, 2);
    }

    /// `shl reg32, count`
    pub fn shl32(&mut self, reg: u8, count: u8) {
        self.rr(false, 0xc1, reg, 4);
        self.buf.push(count);
    }

    /// `shr reg, count`
    pub fn shr(&mut self, reg: u8, count: u8) {
        self.rr(true, 0xc1, reg, 5);
        self.buf.push(count);
    }

    /// `jmp gs:[offset]`
    pub fn jmp_mem(&mut self, offset: i32) {
        self.gs_op(false, &[0xff], 4, offset);
    }

    /// `jmp gs:[index * 8 + offset]`
    pub fn jmp_mem_index8(&mut self, index: u8, offset: i32) {
        self.buf.push(0x65);
        if index >= 8 {
            self.buf.push(0x42);
        }
        self.bytes(&[0xff, 0x24, 0xc5 | (index & 7) << 3]);
        self.imm32(offset);
    }

    /// `mov dst, src`
    pub fn mov(&mut self, dst: u8, src: u8) {
        self.bytes(&[
            0x48 | (src >> 3) << 2 | dst >> 3,
            0x89,
            0xc0 | (src & 7) << 3 | dst & 7,
        ]);
    }

    /// `mov dst32, src32`, which clears the upper half.
    pub fn mov32(&mut self, dst: u8, src: u8) {
        let rex = 0x40 | (src >> 3) << 2 | dst >> 3;
        if rex != 0x40 {
            self.buf.push(rex);
        }
        self.bytes(&[0x89, 0xc0 | (src & 7) << 3 | dst & 7]);
    }

    /// Shortest `mov reg, imm`; touches no flags.
    pub fn mov_imm(&mut self, reg: u8, imm: u64) {
        if imm <= u64::from(u32::MAX) {
            if reg >= 8 {
                self.buf.push(0x41);
            }
            self.buf.push(0xb8 | reg & 7);
            self.imm32(imm as u32 as i32);
        } else if imm as i64 == i64::from(imm as i32) {
            self.bytes(&[0x48 | reg >> 3, 0xc7, 0xc0 | reg & 7]);
            self.imm32(imm as i32);
        } else {
            self.bytes(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
            self.bytes(&imm.to_le_bytes());
        }
    }

    /// `lea dst, [base + index * scale + disp]` with 64-bit (`wide`) or 32-bit address and result. Touches no flags.
    pub fn lea(
        &mut self,
        wide: bool,
        dst: u8,
        base: Option<u8>,
        index: Option<(u8, u8)>,
        disp: i32,
    ) {
        if !wide {
            self.buf.push(0x67);
        }
        let (ix, scale) = index.unwrap_or((4, 1));
        let b = base.unwrap_or(5);
        let rex = 0x40 | (wide as u8) << 3 | (dst >> 3) << 2 | (ix >> 3) << 1 | b >> 3;
        if rex != 0x40 {
            self.buf.push(rex);
        }
        self.buf.push(0x8d);
        let short = i8::try_from(disp).is_ok();
        let mode = match base {
            None => 0,
            Some(b) if disp == 0 && b & 7 != 5 => 0,
            Some(_) if short => 1,
            Some(_) => 2,
        };
        let reg = (dst & 7) << 3;
        if index.is_some() || base.is_none() || b & 7 == 4 {
            let ss = scale.trailing_zeros() as u8;
            self.bytes(&[mode << 6 | reg | 4, ss << 6 | (ix & 7) << 3 | b & 7]);
        } else {
            self.buf.push(mode << 6 | reg | b & 7);
        }
        match mode {
            1 => self.buf.push(disp as i8 as u8),
            2 => self.imm32(disp),
            _ if base.is_none() => self.imm32(disp),
            _ => {}
        }
    }

    /// `rorx dst, src, count` (BMI2): rotates without touching flags.
    pub fn rorx(&mut self, dst: u8, src: u8, count: u8) {
        self.bytes(&[
            0xc4,
            (if dst >= 8 { 0 } else { 0x80 }) | 0x40 | (if src >= 8 { 0 } else { 0x20 }) | 0x03,
            0xfb,
            0xf0,
            0xc0 | (dst & 7) << 3 | src & 7,
            count,
        ]);
    }

    /// `pext dst, src, gs:[offset]` (BMI2): touches no flags.
    pub fn pext_mem(&mut self, dst: u8, src: u8, offset: i32) {
        self.bytes(&[
            0x65,
            0xc4,
            (if dst >= 8 { 0 } else { 0x80 }) | 0x60 | 0x02,
            0x80 | (!src & 15) << 3 | 0x02,
            0xf5,
            (dst & 7) << 3 | 4,
            0x25,
        ]);
        self.imm32(offset);
    }

    /// `and reg32, imm`
    pub fn and_imm32(&mut self, reg: u8, imm: i32) {
        if reg >= 8 {
            self.buf.push(0x41);
        }
        self.bytes(&[0x81, 0xe0 | reg & 7]);
        self.imm32(imm);
    }

    /// `cmp reg, imm` (64 bits, sign-extended immediate)
    pub fn cmp_imm(&mut self, reg: u8, imm: i32) {
        self.bytes(&[0x48 | reg >> 3, 0x81, 0xf8 | reg & 7]);
        self.imm32(imm);
    }

    /// `mov [base + disp], reg` of 4 or 8 bytes.
    pub fn store_at(&mut self, wide: bool, base: u8, disp: i32, reg: u8) {
        self.mem_op(wide, 0x89, base, disp, reg);
    }

    /// `mov reg, [base + disp]` of 4 (zero-extended) or 8 bytes.
    pub fn load_at(&mut self, wide: bool, reg: u8, base: u8, disp: i32) {
        self.mem_op(wide, 0x8b, base, disp, reg);
    }

    fn mem_op(&mut self, wide: bool, op: u8, base: u8, disp: i32, reg: u8) {
        let rex = 0x40 | (wide as u8) << 3 | (reg >> 3) << 2 | base >> 3;
        if rex != 0x40 {
            self.buf.push(rex);
        }
        self.buf.push(op);
        let mode: u8 = if disp == 0 && base & 7 != 5 {
            0
        } else if i8::try_from(disp).is_ok() {
            1
        } else {
            2
        };
        self.buf.push(mode << 6 | (reg & 7) << 3 | base & 7);
        if base & 7 == 4 {
            self.buf.push(0x24);
        }
        match mode {
            1 => self.buf.push(disp as i8 as u8),
            2 => self.imm32(disp),
            _ => {}
        }
    }

    /// `mov dword/qword [base + disp], imm32` (sign-extended for 8 bytes)
    pub fn store_imm_at(&mut self, wide: bool, base: u8, disp: i32, imm: i32) {
        self.mem_op(wide, 0xc7, base, disp, 0);
        self.imm32(imm);
    }

    /// `mov word [base], reg16`
    pub fn store16_at(&mut self, base: u8, reg: u8) {
        self.buf.push(0x66);
        self.mem_op(false, 0x89, base, 0, reg);
    }

    /// `sar reg, count`
    pub fn sar(&mut self, reg: u8, count: u8) {
        self.rr(true, 0xc1, reg, 7);
        self.buf.push(count);
    }

    /// `movsxd dst, src32`
    pub fn movsxd(&mut self, dst: u8, src: u8) {
        self.rr(true, 0x63, src, dst);
    }

    /// `jcc rel32` with the displacement left for [`Asm::patch_rel32`]; returns where the displacement is.
    pub fn jcc(&mut self, cond: u8) -> Pos {
        self.bytes(&[0x0f, 0x80 | cond]);
        self.imm32(0);
        self.pos() - 4
    }

    /// `jmp rel32` with the displacement left for [`Asm::patch_rel32`]; returns where the displacement is.
    pub fn jmp(&mut self) -> Pos {
        self.buf.push(0xe9);
        self.imm32(0);
        self.pos() - 4
    }

    /// Points the displacement at `at` to `target`, both positions in the same address space of `i64`s.
    pub fn patch_rel32(&mut self, at: Pos, target: i64) {
        let rel = (target - (at as i64 + 4)) as i32;
        self.buf[at..at + 4].copy_from_slice(&rel.to_le_bytes());
    }

    /// `lahf; seto al`: AH = SF ZF AF PF CF, AL = OF.
    pub fn flags_to_ax(&mut self) {
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// `add al, 127; sahf`: the reverse of [`Asm::flags_to_ax`].
    pub fn flags_from_ax(&mut self) {
        self.bytes(&[0x04, 0x7f, 0x9e]);
    }

    /// Multi-byte no-operations, `n` bytes.
    pub fn nops(&mut self, mut n: usize) {
        const NOPS: [&[u8]; 9] = [
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x40, 0x00],
            &[0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
            &[0x0f, 0x1f, 0x84, 0x00, 0, 0, 0, 0],
            &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0, 0, 0, 0],
        ];
        while n > 0 {
            let k = n.min(9);
            self.bytes(NOPS[k - 1]);
            n -= k;
        }
    }

    /// Pads with no-operations until `pos() % align == rest`.
    pub fn align(&mut self, align: usize, rest: usize) {
        let n = (rest + align - self.pos() % align) % align;
        self.nops(n);
    }

    /// `vmovups gs:[offset], ymm`
    pub fn store_ymm(&mut self, offset: i32, ymm: u8) {
        self.bytes(&[
            0x65,
            0xc5,
            if ymm >= 8 { 0x7c } else { 0xfc },
            0x11,
            (ymm & 7) << 3 | 4,
            0x25,
        ]);
        self.imm32(offset);
    }

    /// `vmovups ymm, gs:[offset]`
    pub fn load_ymm(&mut self, ymm: u8, offset: i32) {
        self.bytes(&[
            0x65,
            0xc5,
            if ymm >= 8 { 0x7c } else { 0xfc },
            0x10,
            (ymm & 7) << 3 | 4,
            0x25,
        ]);
        self.imm32(offset);
    }

    /// `vmovups` between `gs:[offset]` and one of 32 registers of 512 bits.
    fn zmm_op(&mut self, opcode: u8, offset: i32, zmm: u8) {
        // The register's bits 3 and 4 are inverted in the prefix.
        let register = (!zmm & 8) << 4 | (!zmm & 16);
        self.bytes(&[
            0x65,
            0x62,
            0x61 | register,
            0x7c,
            0x48,
            opcode,
            (zmm & 7) << 3 | 4,
            0x25,
        ]);
        self.imm32(offset);
    }

    /// `vmovups gs:[offset], zmm`
    pub fn store_zmm(&mut self, offset: i32, zmm: u8) {
        self.zmm_op(0x11, offset, zmm);
    }

    /// `vmovups zmm, gs:[offset]`
    pub fn load_zmm(&mut self, zmm: u8, offset: i32) {
        self.zmm_op(0x10, offset, zmm);
    }

    /// `kmovq gs:[offset], k`
    pub fn store_mask(&mut self, offset: i32, k: u8) {
        self.bytes(&[0x65, 0xc4, 0xe1, 0xf8, 0x91, k << 3 | 4, 0x25]);
        self.imm32(offset);
    }

    /// `kmovq k, gs:[offset]`
    pub fn load_mask(&mut self, k: u8, offset: i32) {
        self.bytes(&[0x65, 0xc4, 0xe1, 0xf8, 0x90, k << 3 | 4, 0x25]);
        self.imm32(offset);
    }

    /// `ldmxcsr gs:[offset]`
    pub fn ldmxcsr(&mut self, offset: i32) {
        self.gs_op(false, &[0x0f, 0xae], 2, offset);
    }

    /// `stmxcsr gs:[offset]`
    pub fn stmxcsr(&mut self, offset: i32) {
        self.gs_op(false, &[0x0f, 0xae], 3, offset);
    }

    /// `push reg`
    pub fn push(&mut self, reg: u8) {
        if reg >= 8 {
            self.buf.push(0x41);
        }
        self.buf.push(0x50 | reg & 7);
    }

    /// `pop reg`
    pub fn pop(&mut self, reg: u8) {
        if reg >= 8 {
            self.buf.push(0x41);
        }
        self.buf.push(0x58 | reg & 7);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    fn text(f: impl FnOnce(&mut Asm)) -> String {
        let mut a = Asm::default();
        f(&mut a);
        let mut out = String::new();
        let mut decoder = Decoder::new(64, &a.buf, DecoderOptions::NONE);
        let mut formatter = IntelFormatter::new();
        while decoder.can_decode() {
            if !out.is_empty() {
                out.push_str("; ");
            }
            let i = decoder.decode();
            formatter.format(&i, &mut out);
        }
        out
    }

    #[test]
    fn emit_each_template_decodes_to_what_it_says() {
        type Emit<'a> = &'a dyn Fn(&mut Asm);
        let cases: &[(Emit<'_>, &str)] = &[
            (&|a| a.load(9, 0x10), "mov r9,gs:[10h]"),
            (&|a| a.load32(9, 0x10), "mov r9d,gs:[10h]"),
            (&|a| a.store(0x10, 3), "mov gs:[10h],rbx"),
            (&|a| a.store16(0x10, 0), "mov gs:[10h],ax"),
            (&|a| a.load_u16(0, 0x10), "movzx eax,word ptr gs:[10h]"),
            (&|a| a.load_u8(8, 0x10), "movzx r8d,byte ptr gs:[10h]"),
            (&|a| a.load16(9, 0x10), "mov r9w,gs:[10h]"),
            (&|a| a.cmp_mem_base(1, 2, 0x10), "cmp rcx,gs:[rdx+10h]"),
            (&|a| a.load_mem_base(2, 10, 0x10), "mov rdx,gs:[r10+10h]"),
            (&|a| a.jmp_reg(10), "jmp r10"),
            (&|a| a.store_imm32(8, 7), "mov dword ptr gs:[8],7"),
            (&|a| a.store_imm8(8, 7), "mov byte ptr gs:[8],7"),
            (
                &|a| a.store_imm64(8, u64::MAX),
                "mov qword ptr gs:[8],0FFFFFFFFFFFFFFFFh",
            ),
            (
                &|a| a.store_imm64(8, 0x1_0000_0002),
                "mov dword ptr gs:[8],2; mov dword ptr gs:[0Ch],1",
            ),
            (&|a| a.cmp_mem8(8, 1), "cmp byte ptr gs:[8],1"),
            (&|a| a.dec_mem32(8), "dec dword ptr gs:[8]"),
            (&|a| a.inc_mem32(8), "inc dword ptr gs:[8]"),
            (&|a| a.xor_mem_base(1, 12, 0x20), "xor rcx,gs:[r12+20h]"),
            (&|a| a.add_mem_base(9, 3, 0x20), "add r9,gs:[rbx+20h]"),
            (&|a| a.xor_mem(9, 0x20), "xor r9,gs:[20h]"),
            (&|a| a.add_mem(2, 0x20), "add rdx,gs:[20h]"),
            (&|a| a.jmp_mem(0x20), "jmp qword ptr gs:[20h]"),
            (
                &|a| a.jmp_mem_index8(2, 0x20),
                "jmp qword ptr gs:[rdx*8+20h]",
            ),
            (
                &|a| a.jmp_mem_index8(10, 0x20),
                "jmp qword ptr gs:[r10*8+20h]",
            ),
            (&|a| a.mov(9, 1), "mov r9,rcx"),
            (&|a| a.mov32(1, 9), "mov ecx,r9d"),
            (&|a| a.mov_imm(9, 5), "mov r9d,5"),
            (&|a| a.mov_imm(1, u64::MAX), "mov rcx,0FFFFFFFFFFFFFFFFh"),
            (&|a| a.mov_imm(9, 0x12_3456_789a), "mov r9,123456789Ah"),
            (
                &|a| a.lea(true, 9, Some(13), Some((12, 4)), 0x100),
                "lea r9,[r13+r12*4+100h]",
            ),
            (&|a| a.lea(true, 1, Some(4), None, -8), "lea rcx,[rsp-8]"),
            (&|a| a.lea(true, 1, Some(5), None, 0), "lea rcx,[rbp]"),
            (&|a| a.lea(true, 1, Some(3), None, 0), "lea rcx,[rbx]"),
            (
                &|a| a.lea(true, 1, None, Some((3, 8)), 4),
                "lea rcx,[rbx*8+4]",
            ),
            (
                &|a| a.lea(false, 1, Some(8), Some((3, 1)), 4),
                "lea ecx,[r8d+ebx+4]",
            ),
            (&|a| a.rorx(9, 10, 7), "rorx r9,r10,7"),
            (&|a| a.rorx(1, 2, 12), "rorx rcx,rdx,0Ch"),
            (&|a| a.pext_mem(2, 9, 0x40), "pext rdx,r9,gs:[40h]"),
            (&|a| a.pext_mem(10, 1, 0x40), "pext r10,rcx,gs:[40h]"),
            (&|a| a.and_imm32(9, 0x7fe0), "and r9d,7FE0h"),
            (&|a| a.cmp_imm(9, 0xff8), "cmp r9,0FF8h"),
            (&|a| a.store_at(true, 12, 0, 9), "mov [r12],r9"),
            (&|a| a.load_at(false, 9, 13, 0), "mov r9d,[r13]"),
            (&|a| a.load_at(true, 1, 12, 8), "mov rcx,[r12+8]"),
            (&|a| a.store_at(true, 3, 0x90, 2), "mov [rbx+90h],rdx"),
            (
                &|a| a.store_imm_at(true, 9, 0, -1),
                "mov qword ptr [r9],0FFFFFFFFFFFFFFFFh",
            ),
            (&|a| a.store8(0x10, 6), "mov gs:[10h],sil"),
            (&|a| a.store8(0x10, 9), "mov gs:[10h],r9b"),
            (&|a| a.or_mem(9, 0x10), "or r9,gs:[10h]"),
            (&|a| a.or_mem32(1, 0x10), "or ecx,gs:[10h]"),
            (&|a| a.and_mem(9, 0x10), "and r9,gs:[10h]"),
            (&|a| a.and_mem_imm32(0x10, 7), "and dword ptr gs:[10h],7"),
            (&|a| a.test_mem_imm32(0x10, 7), "test dword ptr gs:[10h],7"),
            (&|a| a.cmp_mem_imm32(0x10, 7), "cmp dword ptr gs:[10h],7"),
            (&|a| a.store_imm16(0x10, 7), "mov word ptr gs:[10h],7"),
            (&|a| a.or32(9, 1), "or r9d,ecx"),
            (&|a| a.cmp_mem(9, 0x10), "cmp r9,gs:[10h]"),
            (&|a| a.sub_mem(1, 0x10), "sub rcx,gs:[10h]"),
            (&|a| a.store_mem_base(10, 0x10, 2), "mov gs:[r10+10h],rdx"),
            (&|a| a.store16_mem_base(10, 0x10, 2), "mov gs:[r10+10h],dx"),
            (&|a| a.or(9, 1), "or r9,rcx"),
            (&|a| a.and(1, 9), "and rcx,r9"),
            (&|a| a.bt32(0, 10), "bt eax,r10d"),
            (&|a| a.shl(9, 12), "shl r9,0Ch"),
            (&|a| a.xor(9, 1), "xor r9,rcx"),
            (&|a| a.sub(1, 9), "sub rcx,r9"),
            (&|a| a.test(1, 1), "test rcx,rcx"),
            (&|a| a.not(9), "not r9"),
            (&|a| a.shl32(9, 11), "shl r9d,0Bh"),
            (&|a| a.shr(2, 11), "shr rdx,0Bh"),
            (&|a| a.store16_at(13, 9), "mov [r13],r9w"),
            (&|a| a.sar(9, 47), "sar r9,2Fh"),
            (&|a| a.movsxd(1, 9), "movsxd rcx,r9d"),
            (&|a| a.movsxd(9, 1), "movsxd r9,ecx"),
            (&|a| a.flags_to_ax(), "lahf; seto al"),
            (&|a| a.flags_from_ax(), "add al,7Fh; sahf"),
            (&|a| a.store_ymm(0x40, 9), "vmovups gs:[40h],ymm9"),
            (&|a| a.load_ymm(1, 0x40), "vmovups ymm1,gs:[40h]"),
            (&|a| a.store_zmm(0x40, 31), "vmovups gs:[40h],zmm31"),
            (&|a| a.store_zmm(0x40, 9), "vmovups gs:[40h],zmm9"),
            (&|a| a.load_zmm(1, 0x40), "vmovups zmm1,gs:[40h]"),
            (&|a| a.load_zmm(22, 0x40), "vmovups zmm22,gs:[40h]"),
            (&|a| a.store_mask(0x40, 7), "kmovq gs:[40h],k7"),
            (&|a| a.load_mask(1, 0x40), "kmovq k1,gs:[40h]"),
            (&|a| a.ldmxcsr(0x40), "ldmxcsr gs:[40h]"),
            (&|a| a.stmxcsr(0x40), "stmxcsr gs:[40h]"),
        ];
        for (f, expected) in cases {
            let got = text(f);
            let norm = |s: &str| s.replace(", ", ",");
            assert_eq!(norm(&got), norm(expected));
        }
    }
}
