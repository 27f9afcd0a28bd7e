//! What a case starts from and what it ends with.

use std::fmt::Write;

use crate::forms::Level;
use crate::rng::Rng;

/// Bytes of the XSAVE image's parts that guests have, at most: legacy, header, upper halves of YMM, the AVX-512 components.
pub const XSAVE_BYTES: usize = hospes_engine::XSAVE_BYTES;
pub const XSAVE_HEADER: usize = 512;
const YMM_HIGH: usize = 576;
const NARROW_BYTES: usize = 832;

/// Where the AVX-512 components lie in this processor's XSAVE image: mask registers, upper halves of ZMM0-15, ZMM16-31.
fn wide_places() -> [usize; 3] {
    [5, 6, 7].map(|n| std::arch::x86_64::__cpuid_count(0xd, n).ebx as usize)
}

/// Bytes of the XSAVE image that cases of this level use.
pub fn image_bytes(level: Level) -> usize {
    match level {
        Level::V3 => NARROW_BYTES,
        Level::V4 => {
            let [masks, upper, more] = wide_places();
            (masks + 64).max(upper + 512).max(more + 1024)
        }
    }
}

/// x87 and vector registers, without instruction and data pointers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fpu {
    pub fcw: u16,
    pub fsw: u16,
    /// One bit a physical register that is not empty.
    pub tags: u8,
    pub mxcsr: u32,
    /// ST0 first.
    pub st: [[u8; 10]; 8],
    /// Cases without AVX-512 have the lower halves of the first sixteen.
    pub zmm: [[u8; 64]; 32],
    pub k: [u64; 8],
}

impl Default for Fpu {
    fn default() -> Fpu {
        Fpu {
            fcw: 0x37f,
            fsw: 0,
            tags: 0,
            mxcsr: 0x1f80,
            st: [[0; 10]; 8],
            zmm: [[0; 64]; 32],
            k: [0; 8],
        }
    }
}

fn u16_at(image: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([image[at], image[at + 1]])
}

impl Fpu {
    /// As an image in standard format in which every component of x86-64-v3 is present, and the AVX-512 ones if one of them is not zero.
    pub fn to_image(&self) -> [u8; XSAVE_BYTES] {
        let mut image = [0; XSAVE_BYTES];
        image[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4] = self.tags;
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        for (n, st) in self.st.iter().enumerate() {
            image[32 + 16 * n..42 + 16 * n].copy_from_slice(st);
        }
        for (n, zmm) in self.zmm[..16].iter().enumerate() {
            image[160 + 16 * n..176 + 16 * n].copy_from_slice(&zmm[..16]);
            image[YMM_HIGH + 16 * n..YMM_HIGH + 16 * n + 16].copy_from_slice(&zmm[16..32]);
        }
        image[XSAVE_HEADER] = 7;
        if self.is_wide() {
            let [masks, upper, more] = wide_places();
            image[XSAVE_HEADER] = 0xe7;
            for (n, k) in self.k.iter().enumerate() {
                image[masks + 8 * n..][..8].copy_from_slice(&k.to_le_bytes());
            }
            for (n, zmm) in self.zmm[..16].iter().enumerate() {
                image[upper + 32 * n..][..32].copy_from_slice(&zmm[32..]);
            }
            for (n, zmm) in self.zmm[16..].iter().enumerate() {
                image[more + 64 * n..][..64].copy_from_slice(zmm);
            }
        }
        image
    }

    fn is_wide(&self) -> bool {
        self.k != [0; 8]
            || self.zmm[..16].iter().any(|v| v[32..] != [0; 32])
            || self.zmm[16..].iter().any(|v| *v != [0; 64])
    }

    /// From an image in standard format; components that it marks as initial are so.
    pub fn from_image(image: &[u8]) -> Fpu {
        let present = image[XSAVE_HEADER];
        let mut fpu = Fpu::default();
        if present & 1 != 0 {
            fpu.fcw = u16_at(image, 0);
            fpu.fsw = u16_at(image, 2);
            fpu.tags = image[4];
            for (n, st) in fpu.st.iter_mut().enumerate() {
                st.copy_from_slice(&image[32 + 16 * n..42 + 16 * n]);
            }
        }
        fpu.mxcsr = u32::from(u16_at(image, 24)) | u32::from(u16_at(image, 26)) << 16;
        for (n, zmm) in fpu.zmm[..16].iter_mut().enumerate() {
            if present & 2 != 0 {
                zmm[..16].copy_from_slice(&image[160 + 16 * n..176 + 16 * n]);
            }
            if present & 4 != 0 {
                let at = YMM_HIGH + 16 * n;
                zmm[16..32].copy_from_slice(&image[at..at + 16]);
            }
        }
        let [masks, upper, more] = wide_places();
        if present & 0x20 != 0 {
            for (n, k) in fpu.k.iter_mut().enumerate() {
                let bytes = &image[masks + 8 * n..][..8];
                *k = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
            }
        }
        if present & 0x40 != 0 {
            for (n, zmm) in fpu.zmm[..16].iter_mut().enumerate() {
                zmm[32..].copy_from_slice(&image[upper + 32 * n..][..32]);
            }
        }
        if present & 0x80 != 0 {
            for (n, zmm) in fpu.zmm[16..].iter_mut().enumerate() {
                zmm.copy_from_slice(&image[more + 64 * n..][..64]);
            }
        }
        fpu
    }

    /// Random values in what only AVX-512 has; mask registers with few bits clear, few set, or any.
    fn widen(&mut self, rng: &mut Rng) {
        for (n, zmm) in self.zmm.iter_mut().enumerate() {
            let new = if n < 16 { 32 } else { 0 };
            for part in zmm[new..].chunks_exact_mut(16) {
                part.copy_from_slice(&rng.vector());
            }
        }
        for k in &mut self.k {
            *k = match rng.below(4) {
                0 => rng.value(),
                1 => rng.bits() & rng.bits() & rng.bits(),
                2 => rng.bits() | rng.bits() | rng.bits(),
                _ => rng.bits(),
            };
        }
    }

    pub fn random(level: Level, rng: &mut Rng) -> Fpu {
        let mut fpu = Fpu {
            fcw: 0x37f,
            fsw: (rng.below(8) << 11) as u16,
            tags: rng.bits() as u8,
            mxcsr: 0x1f80,
            ..Fpu::default()
        };
        if rng.one_in(3) {
            fpu.fcw = 0x7f | (rng.below(16) << 8) as u16;
            fpu.fsw |= (rng.bits() & 0x477f) as u16;
        }
        if rng.one_in(8) {
            // Unmasked exceptions, none pending.
            fpu.fcw &= !(rng.below(64) as u16);
            fpu.fsw &= !0x80ff;
        }
        if rng.one_in(2) {
            fpu.mxcsr |= rng.bits() as u32 & 0xe07f;
        }
        if rng.one_in(8) {
            fpu.mxcsr &= !((rng.below(64) as u32) << 7);
        }
        for st in &mut fpu.st {
            match rng.below(6) {
                0 => {
                    let exponent = rng.pick(&[0u16, 1, 0x7fff, 0xffff, 0x8000]);
                    st[..8].copy_from_slice(&rng.value().to_le_bytes());
                    st[8..].copy_from_slice(&exponent.to_le_bytes());
                }
                1 => {
                    for b in st.iter_mut() {
                        *b = rng.bits() as u8;
                    }
                }
                _ => {
                    let significand = rng.bits() | 1 << 63;
                    let exponent =
                        (16383 - 40 + rng.below(80)) as u16 | (rng.below(2) << 15) as u16;
                    st[..8].copy_from_slice(&significand.to_le_bytes());
                    st[8..].copy_from_slice(&exponent.to_le_bytes());
                }
            }
        }
        for zmm in &mut fpu.zmm[..16] {
            zmm[..16].copy_from_slice(&rng.vector());
            zmm[16..32].copy_from_slice(&rng.vector());
        }
        if level == Level::V4 {
            fpu.widen(rng);
        }
        fpu
    }
}

/// Registers of user code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Regs {
    /// In hardware encoding order.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub cs: u16,
    pub fpu: Fpu,
}

impl Regs {
    /// Random values in everything but RIP and CS.
    pub fn random(level: Level, rng: &mut Rng) -> Regs {
        let mut regs = Regs {
            rflags: 0x202 | rng.bits() & 0x8d5,
            fpu: Fpu::random(level, rng),
            ..Regs::default()
        };
        if rng.one_in(8) {
            regs.rflags |= 1 << 10;
        }
        for r in &mut regs.gpr {
            *r = rng.value();
        }
        regs
    }
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub ending: Ending,
    pub regs: Regs,
    /// The backing pages.
    pub memory: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// An exception, INT3 included. CR2 is given for page faults.
    Exception { vector: u8, error: u64, cr2: u64 },
    /// It ran longer than any case should.
    TimedOut,
    /// What the engine said that no case asks for.
    Failed(String),
}

pub const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// Bytes as one hexadecimal number, most significant first.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::new(), |mut s, b| {
        write!(s, "{b:02x}").expect("writing to a string");
        s
    })
}
