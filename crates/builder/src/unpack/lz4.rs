//! LZ4's legacy frame, as `lz4 -l` writes it: a magic number, then blocks of a 32-bit size and packed bytes.
//!
//! Every block but the last unpacks to exactly [`BLOCK_BYTES`]; blocks do not refer to one another. There is no end mark
//! and no checksum: the caller compares the total with the size that stands behind a kernel's payload.

use crate::ImageError;
use crate::unpack::{Bounded, Sink};

pub(super) const MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Bytes a full block unpacks to.
pub(super) const BLOCK_BYTES: usize = 8 << 20;

pub(super) fn unpack(data: &[u8], out: &mut Bounded) -> Result<(), ImageError> {
    let damaged =
        |why: &str| ImageError::damaged(format!("its lz4 data cannot be unpacked: {why}"));
    let mut rest = data
        .strip_prefix(&MAGIC)
        .ok_or_else(|| damaged("the magic number is missing"))?;
    let mut block = Vec::new();
    let mut last = false;
    while !rest.is_empty() {
        let (size, tail) = rest
            .split_first_chunk::<4>()
            .ok_or_else(|| damaged("a block size is cut off"))?;
        if *size == MAGIC {
            // Streams may be concatenated.
            last = false;
            rest = tail;
            continue;
        }
        if last {
            return Err(damaged("a short block is followed by another"));
        }
        let (packed, tail) = tail
            .split_at_checked(u32::from_le_bytes(*size) as usize)
            .ok_or_else(|| damaged("a block is cut off"))?;
        if block.is_empty() {
            // No LZ4 block unpacks to more than 255 times its size.
            block = vec![0; BLOCK_BYTES.min(data.len().saturating_mul(255))];
        }
        let n = match lz4_flex::block::decompress_into(packed, &mut block) {
            Ok(n) => n,
            Err(e) => return Err(damaged(&e.to_string())),
        };
        out.take(&block[..n])?;
        last = n < BLOCK_BYTES;
        rest = tail;
    }
    Ok(())
}
