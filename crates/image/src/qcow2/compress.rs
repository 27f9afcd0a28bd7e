//! Compressed clusters, which are read only.

use std::io::Read;

use super::header::Compression;
use super::refcounts::damaged;
use crate::error::IoError;

/// Unpacks a cluster of `bytes` bytes; behind its end `packed` may have anything.
pub(crate) fn decompress(
    compression: Compression,
    packed: &[u8],
    bytes: usize,
) -> Result<Vec<u8>, IoError> {
    let mut out = vec![0; bytes];
    let complete = match compression {
        Compression::Deflate => flate2::read::DeflateDecoder::new(packed)
            .read_exact(&mut out)
            .is_ok(),
        Compression::Zstd => ruzstd::decoding::StreamingDecoder::new(packed)
            .is_ok_and(|mut decoder| decoder.read_exact(&mut out).is_ok()),
    };
    if complete {
        Ok(out)
    } else {
        Err(damaged("a compressed cluster cannot be unpacked"))
    }
}
