//! The lzop container with LZO1X blocks.
//!
//! Sources: Linux's Documentation/staging/lzo.rst for the instruction stream; the container's fields as lzop writes them.
//! Both are big endian outside of the packed bytes.

use crate::ImageError;
use crate::unpack::{Bounded, Sink};

const MAGIC: &[u8] = b"\x89LZO\0\r\n\x1a\n";
/// Most bytes a block may unpack to; lzop writes 256 KiB.
const BLOCK_BYTES_MAX: usize = 8 << 20;

const F_ADLER32_D: u32 = 1 << 0;
const F_ADLER32_C: u32 = 1 << 1;
const F_EXTRA_FIELD: u32 = 1 << 6;
const F_CRC32_D: u32 = 1 << 8;
const F_CRC32_C: u32 = 1 << 9;
const F_FILTER: u32 = 1 << 11;

fn damaged(why: &str) -> ImageError {
    ImageError::damaged(format!("its lzo data cannot be unpacked: {why}"))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], ImageError> {
        let (head, tail) = self
            .0
            .split_at_checked(n)
            .ok_or_else(|| damaged("it is cut off"))?;
        self.0 = tail;
        Ok(head)
    }

    fn u8(&mut self) -> Result<u8, ImageError> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, ImageError> {
        let b = self.take(2)?;
        Ok(u16::from_be_bytes([b[0], b[1]]))
    }

    fn u32(&mut self) -> Result<u32, ImageError> {
        let b = self.take(4)?;
        Ok(u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }
}

/// Reads the file header; the flags.
fn header(r: &mut Reader) -> Result<u32, ImageError> {
    if r.take(MAGIC.len())? != MAGIC {
        return Err(damaged("the magic number is wrong"));
    }
    let version = r.u16()?;
    r.take(2)?; // Version of the library.
    if version >= 0x940 {
        r.take(2)?; // Version needed to extract.
    }
    let method = r.u8()?;
    if !(1..=3).contains(&method) {
        return Err(damaged("it does not use LZO1X"));
    }
    if version >= 0x940 {
        r.take(1)?; // Level.
    }
    let flags = r.u32()?;
    if flags & F_FILTER != 0 {
        return Err(damaged("it uses a filter"));
    }
    r.take(8)?; // Mode and time.
    if version >= 0x940 {
        r.take(4)?; // Time, upper half.
    }
    let name = r.u8()?;
    r.take(usize::from(name) + 4)?; // Name, checksum of the header.
    if flags & F_EXTRA_FIELD != 0 {
        let extra = r.u32()? as usize;
        r.take(extra)?;
        r.take(4)?;
    }
    Ok(flags)
}

pub(super) fn unpack(data: &[u8], out: &mut Bounded) -> Result<(), ImageError> {
    let mut r = Reader(data);
    let flags = header(&mut r)?;
    let mut block = Vec::new();
    loop {
        let plain = r.u32()? as usize;
        if plain == 0 {
            return Ok(());
        }
        let packed = r.u32()? as usize;
        if plain > BLOCK_BYTES_MAX || packed == 0 || packed > plain {
            return Err(damaged("a block has impossible sizes"));
        }
        if plain as u64 > out.left() {
            return Err(out.refuse());
        }
        let adler = (flags & F_ADLER32_D != 0).then(|| r.u32()).transpose()?;
        if flags & F_CRC32_D != 0 {
            r.u32()?;
        }
        // The packed bytes have checksums of their own only where the block is packed at all.
        if packed < plain {
            for flag in [F_ADLER32_C, F_CRC32_C] {
                if flags & flag != 0 {
                    r.u32()?;
                }
            }
        }
        let input = r.take(packed)?;
        let bytes = if packed == plain {
            input
        } else {
            lzo1x(input, plain, &mut block).ok_or_else(|| damaged("a block is corrupt"))?;
            &block
        };
        if adler.is_some_and(|sum| sum != adler32(bytes)) {
            return Err(damaged("the checksum of a block is wrong"));
        }
        out.take(bytes)?;
    }
}

pub(crate) fn adler32(bytes: &[u8]) -> u32 {
    const MOD: u32 = 65521;
    let (mut a, mut b) = (1u32, 0u32);
    // 5552 additions are the most that cannot overflow before the remainder is taken.
    for piece in bytes.chunks(5552) {
        for &x in piece {
            a += u32::from(x);
            b += a;
        }
        a %= MOD;
        b %= MOD;
    }
    b << 16 | a
}

/// Unpacks one LZO1X block to exactly `len` bytes; `None` where the stream is not valid.
fn lzo1x(input: &[u8], len: usize, out: &mut Vec<u8>) -> Option<()> {
    out.clear();
    out.reserve(len);
    let mut s = Stream {
        input,
        out,
        limit: len,
    };
    // The number of literals that the last instruction ended with; 4 after a run of literals.
    let mut state = 0;
    let first = *s.input.first()?;
    if first > 17 {
        s.byte()?;
        let run = usize::from(first) - 17;
        s.literals(run)?;
        state = run.min(4);
    } else if first == 17 {
        // Bitstream version 1 (run-length encoding); lzop does not write it.
        return None;
    }
    loop {
        let op = usize::from(s.byte()?);
        let (length, distance, trailing) = match op {
            0..=15 if state == 0 => {
                let run = 3 + s.length(op, 15)?;
                s.literals(run)?;
                state = 4;
                continue;
            }
            0..=15 => {
                let high = usize::from(s.byte()?) << 2;
                let distance = high + (op >> 2);
                if state == 4 {
                    (3, distance + 2049, op & 3)
                } else {
                    (2, distance + 1, op & 3)
                }
            }
            16..=31 => {
                let length = 2 + s.length(op & 7, 7)?;
                let low = s.u16()?;
                let distance = 16384 + ((op & 8) << 11) + (low >> 2);
                if distance == 16384 {
                    return (length == 3 && s.input.is_empty() && s.out.len() == len).then_some(());
                }
                (length, distance, low & 3)
            }
            32..=63 => {
                let length = 2 + s.length(op & 31, 31)?;
                let low = s.u16()?;
                (length, (low >> 2) + 1, low & 3)
            }
            _ => {
                let length = if op >= 128 {
                    5 + ((op >> 5) & 3)
                } else {
                    3 + ((op >> 5) & 1)
                };
                let high = usize::from(s.byte()?) << 3;
                (length, high + ((op >> 2) & 7) + 1, op & 3)
            }
        };
        s.copy(distance, length)?;
        s.literals(trailing)?;
        state = trailing;
    }
}

struct Stream<'a> {
    input: &'a [u8],
    out: &'a mut Vec<u8>,
    limit: usize,
}

impl Stream<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&b, rest) = self.input.split_first()?;
        self.input = rest;
        Some(b)
    }

    fn u16(&mut self) -> Option<usize> {
        Some(usize::from(self.byte()?) | usize::from(self.byte()?) << 8)
    }

    /// A length field: itself, or where it is 0, `base` plus 255 for each zero byte plus the first other byte.
    fn length(&mut self, field: usize, base: usize) -> Option<usize> {
        if field != 0 {
            return Some(field);
        }
        let zeros = self.input.iter().take_while(|&&b| b == 0).count();
        self.input = &self.input[zeros..];
        Some(base + 255 * zeros + usize::from(self.byte()?))
    }

    fn room(&self, n: usize) -> Option<()> {
        (n <= self.limit - self.out.len()).then_some(())
    }

    fn literals(&mut self, n: usize) -> Option<()> {
        self.room(n)?;
        let (head, tail) = self.input.split_at_checked(n)?;
        self.out.extend_from_slice(head);
        self.input = tail;
        Some(())
    }

    fn copy(&mut self, distance: usize, length: usize) -> Option<()> {
        self.room(length)?;
        let from = self.out.len().checked_sub(distance)?;
        // The source may run into what is being written: then its pattern repeats.
        let mut left = length;
        while left > 0 {
            let n = left.min(self.out.len() - from);
            self.out.extend_from_within(from..from + n);
            left -= n;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(input: &[u8], len: usize) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        lzo1x(input, len, &mut out).map(|()| out)
    }

    const END: [u8; 3] = [0x11, 0, 0];

    #[test]
    fn lzo1x_decodes_each_kind_of_instruction() {
        // First byte 17+n: n literals.
        let mut s = vec![17 + 5];
        s.extend_from_slice(b"abcde");
        // 01LDDDSS: 4 bytes from 5 back, then 1 literal.
        s.extend_from_slice(&[0b0111_0001, 0, b'X']);
        // 0000DDSS after 1 literal: 2 bytes from 1+1 back, no literals.
        s.extend_from_slice(&[0b0000_0100, 0]);
        // 0000LLLL after none: 3+1 literals.
        s.push(1);
        s.extend_from_slice(b"wxyz");
        // 001LLLLL: 2+1 bytes from 4 back, no literals.
        s.extend_from_slice(&[0b0010_0001, 3 << 2, 0]);
        // 1LLDDDSS: 5 bytes from 1 back: a run.
        s.extend_from_slice(&[0b1000_0000, 0]);
        s.extend_from_slice(&END);
        let want = b"abcdeabcdXdXwxyzwxyyyyyy";
        assert_eq!(block(&s, want.len()).as_deref(), Some(&want[..]));
        assert_eq!(block(&s, want.len() - 1), None);
        assert_eq!(block(&s, want.len() + 1), None);
    }

    #[test]
    fn lzo1x_decodes_long_lengths_and_far_distances() {
        // 0000 0000, two zero bytes, 7: 3 + 15 + 2*255 + 7 literals.
        let run: usize = 3 + 15 + 510 + 7;
        let literals: Vec<u8> = (0..run).map(|i| (i * 7) as u8).collect();
        let mut s = vec![0, 0, 0, 7];
        s.extend_from_slice(&literals);
        // 001 00000: 2 + 31 + 255 + 9 bytes from `run` back.
        s.extend_from_slice(&[0b0010_0000, 0, 9]);
        s.extend_from_slice(&((((run - 1) << 2) as u16).to_le_bytes()));
        // 16 KiB more of literals, so that the far form reaches the start.
        s.push(0);
        s.extend(std::iter::repeat_n(0, 63));
        s.push(100);
        let tail = 18 + 63 * 255 + 100;
        s.extend(std::iter::repeat_n(b'-', tail));
        let total = run + 297 + tail;
        // 0001 HLLL: 2 + 3 bytes from the first byte.
        s.push(0b0001_0011);
        s.extend_from_slice(&(((total - 16384) << 2) as u16).to_le_bytes());
        s.extend_from_slice(&END);

        let mut want = literals.clone();
        want.extend_from_slice(&literals[..297]);
        want.extend(std::iter::repeat_n(b'-', tail));
        want.extend_from_slice(&literals[..5]);
        assert_eq!(block(&s, want.len()), Some(want));
    }

    #[test]
    fn lzo1x_decodes_a_short_match_behind_a_literal_run() {
        // 2049 + 3 literals, then 0000DDSS in state 4: 3 bytes from 2049 + 3 back.
        let n = 2052;
        let literals: Vec<u8> = (0..n).map(|i| (i % 251) as u8).collect();
        let mut s = vec![0];
        s.extend(std::iter::repeat_n(0, (n - 18) / 255));
        s.push(((n - 18) % 255) as u8);
        s.extend_from_slice(&literals);
        s.extend_from_slice(&[0b0000_1100, 0]);
        s.extend_from_slice(&END);
        let mut want = literals.clone();
        want.extend_from_slice(&literals[..3]);
        assert_eq!(block(&s, want.len()), Some(want));
    }

    #[test]
    fn lzo1x_refuses_references_before_the_start() {
        let s = [18, b'a', 0b0010_0001, 1 << 2, 0, 0x11, 0, 0];
        assert_eq!(block(&s, 4), None);
    }

    #[test]
    fn adler32_matches_the_published_example() {
        // RFC 1950's algorithm on the usual word.
        assert_eq!(adler32(b"Wikipedia"), 0x11e6_0398);
    }

    proptest::proptest! {
        #[test]
        fn lzo1x_of_arbitrary_bytes_stays_within_the_length(bytes: Vec<u8>, len in 0usize..5000) {
            if let Some(out) = block(&bytes, len) {
                proptest::prop_assert_eq!(out.len(), len);
            }
        }
    }
}
