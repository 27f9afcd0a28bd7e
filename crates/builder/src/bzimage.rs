//! The envelope of a kernel: a bzImage's header, or none.
//!
//! Source: Linux's Documentation/x86/boot.rst. The payload is what the image's own decompressor would unpack; all formats
//! but gzip (which has it already) are followed by four bytes that hold the unpacked size.

use crate::ImageError;
use crate::unpack::Codec;

const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;
/// First protocol with the payload's place in the header.
const VERSION_MIN: u16 = 0x208;

/// The ELF image inside of a kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Payload<'a> {
    pub data: &'a [u8],
    /// `None`: the data is the ELF image itself.
    pub codec: Option<Codec>,
    /// Bytes it unpacks to (modulo 2^32), where the file says so.
    pub unpacked: Option<u32>,
}

fn u16_at(file: &[u8], at: usize) -> Option<u16> {
    file.get(at..at + 2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]))
}

fn u32_at(file: &[u8], at: usize) -> Option<u32> {
    file.get(at..at + 4)
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn is_elf(data: &[u8]) -> bool {
    data.starts_with(b"\x7fELF")
}

/// Finds the ELF image in a kernel file: a bzImage, an ELF image, or a packed ELF image.
pub(crate) fn payload(file: &[u8]) -> Result<Payload<'_>, ImageError> {
    if is_elf(file) {
        return Ok(Payload {
            data: file,
            codec: None,
            unpacked: None,
        });
    }
    if file.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS") {
        return bzimage(file);
    }
    match Codec::detect(file) {
        Some(codec) => Ok(Payload {
            data: file,
            codec: Some(codec),
            unpacked: None,
        }),
        None => Err(ImageError::UnknownFormat),
    }
}

fn bzimage(file: &[u8]) -> Result<Payload<'_>, ImageError> {
    let cut = || ImageError::damaged("the file ends inside of its payload");
    let version = u16_at(file, VERSION).ok_or_else(cut)?;
    if version < VERSION_MIN {
        return Err(ImageError::OldProtocol {
            major: (version >> 8) as u8,
            minor: version as u8,
        });
    }
    let sectors = match *file.get(SETUP_SECTS).ok_or_else(cut)? {
        0 => 4,
        n => usize::from(n),
    };
    let offset = u32_at(file, PAYLOAD_OFFSET).ok_or_else(cut)? as usize;
    let length = u32_at(file, PAYLOAD_LENGTH).ok_or_else(cut)? as usize;
    let data = file
        .get((sectors + 1) * SECTOR..)
        .and_then(|kernel| kernel.get(offset..))
        .and_then(|payload| payload.get(..length))
        .ok_or_else(cut)?;
    if is_elf(data) {
        return Ok(Payload {
            data,
            codec: None,
            unpacked: None,
        });
    }
    let Some(codec) = Codec::detect(data) else {
        let start = data.iter().take(6).map(|b| format!("{b:02x}")).collect();
        return Err(ImageError::UnknownCompression { start });
    };
    let (stream, size) = data.split_last_chunk::<4>().ok_or_else(cut)?;
    Ok(Payload {
        // gzip's own trailer is the size; it belongs to the stream.
        data: if codec == Codec::Gzip { data } else { stream },
        codec: Some(codec),
        unpacked: Some(u32::from_le_bytes(*size)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bzimage, pack};

    #[test]
    fn payload_of_bzimage_is_the_stream_without_its_size() {
        let packed = pack(Codec::Xz, b"hello");
        let file = bzimage(Codec::Xz, b"hello");
        let p = payload(&file).unwrap();
        assert_eq!((p.data, p.codec), (&packed[..], Some(Codec::Xz)));
        assert_eq!(p.unpacked, Some(5));
        let file = bzimage(Codec::Gzip, b"hello");
        let p = payload(&file).unwrap();
        assert_eq!(
            (p.data, p.unpacked),
            (&pack(Codec::Gzip, b"hello")[..], Some(5))
        );
    }

    #[test]
    fn payload_of_cut_bzimage_is_refused() {
        let file = bzimage(Codec::Zstd, b"hello");
        let end = {
            let p = payload(&file).unwrap();
            p.data.as_ptr() as usize - file.as_ptr() as usize + p.data.len() + 4
        };
        for cut in 0..end {
            assert!(payload(&file[..cut]).is_err(), "{cut}");
        }
        assert!(payload(&file[..end]).is_ok());
    }

    #[test]
    fn payload_names_what_is_wrong() {
        assert_eq!(payload(b"MZ"), Err(ImageError::UnknownFormat));
        let mut file = bzimage(Codec::Zstd, b"hello");
        file[0x206..0x208].copy_from_slice(&0x207u16.to_le_bytes());
        assert_eq!(
            payload(&file),
            Err(ImageError::OldProtocol { major: 2, minor: 7 })
        );
        file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        let at = payload(&file).unwrap().data.as_ptr() as usize - file.as_ptr() as usize;
        file[at] = 0;
        assert_eq!(
            payload(&file),
            Err(ImageError::UnknownCompression {
                start: "00b52ffd".to_owned() + &format!("{:02x}{:02x}", file[at + 4], file[at + 5])
            })
        );
    }
}
