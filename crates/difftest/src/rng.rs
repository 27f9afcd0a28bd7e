//! A small deterministic generator of random numbers (SplitMix64), so that a seed names a case for ever.

/// The generator's state.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `n`, which is not zero.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }

    pub fn range(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A 64-bit value of the kinds on which arithmetic goes wrong: small, all ones, sign boundaries, single bits, random.
    pub fn value(&mut self) -> u64 {
        match self.below(10) {
            0 => self.below(4),
            1 => self.below(300),
            2 => 0u64.wrapping_sub(self.below(300)),
            3 => 1 << self.below(64),
            4 => (1u64 << self.below(64)).wrapping_sub(1),
            5 => self.pick(&[
                0x7f,
                0x80,
                0x7fff,
                0x8000,
                0x7fff_ffff,
                0x8000_0000,
                0xffff_ffff,
                0x7fff_ffff_ffff_ffff,
                0x8000_0000_0000_0000,
                u64::MAX,
            ]),
            6 => self.bits() & 0xffff_ffff,
            _ => self.bits(),
        }
    }

    /// Sixteen bytes as vector operands: numbers of either precision, integers, special values, noise.
    pub fn vector(&mut self) -> [u8; 16] {
        let mut out = [0; 16];
        let kind = self.below(6);
        for n in 0..4 {
            let word = match kind {
                0 => self.bits() as u32,
                1 => ((self.bits() as i32 >> 16) as f32 / 16.0).to_bits(),
                2 if n % 2 == 1 => {
                    let double = (self.bits() as i32 as f64 / 512.0).to_bits();
                    out[4 * n - 4..4 * n].copy_from_slice(&(double as u32).to_le_bytes());
                    (double >> 32) as u32
                }
                3 => self.value() as u32,
                4 => self.pick(&[
                    0,
                    0x8000_0000,
                    0x7f80_0000,
                    0xff80_0000,
                    0x7fc0_0000,
                    0x7fa0_0001,
                    1,
                    0x807f_ffff,
                    0x7ff0_0000,
                    0x3f80_0000,
                    0x4f00_0000,
                ]),
                _ => self.below(200) as u32,
            };
            out[4 * n..4 * n + 4].copy_from_slice(&word.to_le_bytes());
        }
        out
    }
}
