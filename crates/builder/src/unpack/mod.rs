//! Unpacking of kernels: every compression that Linux offers for its image, in bounded memory and with bounded output.
//!
//! Output goes piece by piece to a [`Sink`], in order; the pieces are small enough to stay in the processor's cache, or
//! whole blocks where the format has blocks. Checksums are verified where the format has them.

mod lz4;
mod lzo;

#[cfg(test)]
pub(crate) use lzo::adler32;

use std::io::Read;

use crate::ImageError;

/// Most bytes any image may unpack to.
pub(crate) const UNPACKED_BYTES_MAX: u64 = 1 << 30;
/// Dictionary memory granted to the LZMA decoders, in bytes: Linux uses 32 MiB with xz and 64 MiB with lzma.
const LZMA_MEMORY_MAX: u64 = 160 << 20;
/// Window granted to the zstd decoder, in bytes: `zstd -22 --ultra`, which Linux uses, asks for 128 MiB.
const ZSTD_WINDOW_MAX: u64 = 128 << 20;
const PIECE_BYTES: usize = 256 << 10;

/// A compression format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

/// Takes unpacked bytes, in order.
pub(crate) trait Sink {
    fn take(&mut self, bytes: &[u8]) -> Result<(), ImageError>;
}

impl Codec {
    const MAGICS: [(&'static [u8], Codec); 7] = [
        (&[0x1f, 0x8b], Codec::Gzip),
        (b"BZh", Codec::Bzip2),
        (&[0x5d, 0, 0], Codec::Lzma),
        (b"\xfd7zXZ\0", Codec::Xz),
        (b"\x89LZ", Codec::Lzo),
        (&lz4::MAGIC, Codec::Lz4),
        (&[0x28, 0xb5, 0x2f, 0xfd], Codec::Zstd),
    ];

    /// Recognises a format by its first bytes.
    pub fn detect(data: &[u8]) -> Option<Codec> {
        Self::MAGICS
            .iter()
            .find(|(magic, _)| data.starts_with(magic))
            .map(|&(_, codec)| codec)
    }

    pub fn name(self) -> &'static str {
        match self {
            Codec::Gzip => "gzip",
            Codec::Bzip2 => "bzip2",
            Codec::Lzma => "lzma",
            Codec::Xz => "xz",
            Codec::Lzo => "lzo",
            Codec::Lz4 => "lz4",
            Codec::Zstd => "zstd",
        }
    }

    /// Unpacks `data` into `sink`; the number of bytes given. Refuses more than `limit` bytes.
    pub fn unpack(self, data: &[u8], limit: u64, sink: &mut dyn Sink) -> Result<u64, ImageError> {
        let mut out = Bounded {
            sink,
            limit,
            total: 0,
        };
        let lzma_error = |e: liblzma::stream::Error| self.damaged(e);
        match self {
            Codec::Gzip => self.pump(flate2::bufread::GzDecoder::new(data), &mut out)?,
            Codec::Bzip2 => self.pump(bzip2::bufread::BzDecoder::new(data), &mut out)?,
            Codec::Lzma => {
                let stream = liblzma::stream::Stream::new_lzma_decoder(LZMA_MEMORY_MAX)
                    .map_err(lzma_error)?;
                self.pump(
                    liblzma::bufread::XzDecoder::new_stream(data, stream),
                    &mut out,
                )?;
            }
            Codec::Xz => {
                let stream = liblzma::stream::Stream::new_stream_decoder(LZMA_MEMORY_MAX, 0)
                    .map_err(lzma_error)?;
                self.pump(
                    liblzma::bufread::XzDecoder::new_stream(data, stream),
                    &mut out,
                )?;
            }
            Codec::Lzo => lzo::unpack(data, &mut out)?,
            Codec::Lz4 => lz4::unpack(data, &mut out)?,
            Codec::Zstd => self.zstd(data, &mut out)?,
        }
        Ok(out.total)
    }

    fn zstd(self, data: &[u8], out: &mut Bounded) -> Result<(), ImageError> {
        let mut decoder =
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(data, ZSTD_WINDOW_MAX)
                .map_err(|e| self.damaged(e))?;
        self.pump(&mut decoder, out)?;
        let frame = decoder.into_frame_decoder();
        match frame.get_checksum_from_data() {
            Some(stored) if frame.get_calculated_checksum() != Some(stored) => {
                Err(self.damaged("the checksum is wrong"))
            }
            _ => Ok(()),
        }
    }

    fn pump(self, mut reader: impl Read, out: &mut Bounded) -> Result<(), ImageError> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match reader.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(n) => out.take(&piece[..n])?,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.damaged(e)),
            }
        }
    }

    fn damaged(self, why: impl std::fmt::Display) -> ImageError {
        ImageError::damaged(format!(
            "its {} data cannot be unpacked: {why}",
            self.name()
        ))
    }
}

/// A sink that refuses to take more than its limit.
pub(crate) struct Bounded<'a> {
    sink: &'a mut dyn Sink,
    limit: u64,
    total: u64,
}

impl Bounded<'_> {
    /// Bytes that may still come.
    pub fn left(&self) -> u64 {
        self.limit - self.total
    }

    pub fn refuse(&self) -> ImageError {
        ImageError::TooLarge {
            limit_mib: self.limit >> 20,
        }
    }
}

impl Sink for Bounded<'_> {
    fn take(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        if bytes.len() as u64 > self.left() {
            return Err(self.refuse());
        }
        self.total += bytes.len() as u64;
        self.sink.take(bytes)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::pack;

    pub struct Collect(pub Vec<u8>);

    impl Sink for Collect {
        fn take(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
            self.0.extend_from_slice(bytes);
            Ok(())
        }
    }

    const ALL: [Codec; 7] = [
        Codec::Gzip,
        Codec::Bzip2,
        Codec::Lzma,
        Codec::Xz,
        Codec::Lzo,
        Codec::Lz4,
        Codec::Zstd,
    ];

    fn unpack(codec: Codec, data: &[u8], limit: u64) -> Result<Vec<u8>, ImageError> {
        let mut out = Collect(Vec::new());
        let total = codec.unpack(data, limit, &mut out)?;
        assert_eq!(total, out.0.len() as u64);
        Ok(out.0)
    }

    /// Bytes that pack, but not to nothing: a counter among repeated text.
    fn sample(len: usize) -> Vec<u8> {
        let mut v: Vec<u8> = (0u32..)
            .flat_map(|i| {
                let mut piece = b"the quick brown fox ".to_vec();
                piece.extend_from_slice(&i.wrapping_mul(2_654_435_761).to_le_bytes());
                piece
            })
            .take(len)
            .collect();
        // Long runs use the formats' extended lengths.
        v.extend(std::iter::repeat_n(0x90, len / 4));
        v
    }

    #[test]
    fn unpack_gives_back_what_each_format_packed() {
        for codec in ALL {
            for len in [0, 1, 3, 1000, 700_000] {
                let plain = sample(len);
                let packed = pack(codec, &plain);
                assert_eq!(Codec::detect(&packed), Some(codec));
                assert_eq!(
                    unpack(codec, &packed, 1 << 20).unwrap(),
                    plain,
                    "{codec:?} {len}"
                );
            }
        }
    }

    #[test]
    fn unpack_of_truncated_data_fails_or_gives_a_prefix() {
        for codec in ALL {
            let plain = sample(5000);
            let packed = pack(codec, &plain);
            for end in 0..packed.len() {
                match unpack(codec, &packed[..end], 1 << 20) {
                    Err(ImageError::Damaged { what }) => assert!(what.contains(codec.name())),
                    // lz4's legacy format has no end mark: a cut between blocks shows only in the size behind it.
                    Ok(part) => assert!(codec == Codec::Lz4 && plain.starts_with(&part)),
                    Err(e) => panic!("{codec:?} cut at {end}: {e}"),
                }
            }
        }
    }

    #[test]
    fn unpack_refuses_more_than_the_limit() {
        for codec in ALL {
            let packed = pack(codec, &vec![0; 3 << 20]);
            assert_eq!(
                unpack(codec, &packed, (2 << 20) - 1),
                Err(ImageError::TooLarge { limit_mib: 1 }),
                "{codec:?}"
            );
        }
    }

    #[test]
    fn unpack_of_changed_data_never_gives_the_original() {
        // These formats carry checksums; the others are guarded by the size behind the payload alone.
        for codec in [
            Codec::Gzip,
            Codec::Bzip2,
            Codec::Xz,
            Codec::Lzo,
            Codec::Zstd,
        ] {
            let plain = sample(2000);
            let packed = pack(codec, &plain);
            let mut changed = packed.clone();
            let middle = packed.len() / 2;
            changed[middle] ^= 0x10;
            assert!(unpack(codec, &changed, 1 << 20).is_err(), "{codec:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn unpack_of_arbitrary_bytes_ends(
            codec in proptest::sample::select(ALL.to_vec()),
            mut bytes: Vec<u8>,
            with_magic: bool,
        ) {
            if with_magic {
                let magic = Codec::MAGICS.iter().find(|m| m.1 == codec).unwrap().0;
                bytes.splice(0..0, magic.iter().copied());
            }
            if let Ok(out) = unpack(codec, &bytes, 1 << 20) {
                proptest::prop_assert!(out.len() <= 1 << 20);
            }
        }

        #[test]
        fn unpack_of_mutated_streams_ends(
            codec in proptest::sample::select(ALL.to_vec()),
            at: proptest::sample::Index,
            value: u8,
        ) {
            let mut packed = pack(codec, &sample(3000));
            let at = at.index(packed.len());
            packed[at] = value;
            if let Ok(out) = unpack(codec, &packed, 1 << 20) {
                proptest::prop_assert!(out.len() <= 1 << 20);
            }
        }
    }
}
