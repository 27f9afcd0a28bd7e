//! Puts a kernel's segments into guest memory while the image is being unpacked.
//!
//! The first bytes of the stream are kept until the program headers are complete; from then on every piece is copied to
//! the segments it belongs to. Only the notes are kept a second time. An image that does not fit at its place is read
//! twice: once for its relocation note, once to be loaded elsewhere.

use hospes_memory::GuestMemory;
use hospes_units::Gpa;

use crate::ImageError;
use crate::bzimage::payload;
use crate::elf::{self, HEADERS_BYTES_MAX, Headers, Notes, Segment};
use crate::layout::Layout;
use crate::unpack::{Sink, UNPACKED_BYTES_MAX};

/// Entry points and relocated images must be reachable with 32 bits.
const ADDRESS_MAX: u64 = u32::MAX as u64;
const RELOCATION_ALIGN_DEFAULT: u64 = 2 << 20;

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// 32-bit entry point.
    pub entry: u32,
    /// First address of what was loaded.
    pub start: u64,
    /// End of what was loaded, including zeroed memory.
    pub end: u64,
    /// The kernel accepts the return value 1 from a suspend hypercall.
    pub suspend_cancel: bool,
}

/// Loads the kernel in `file`, a whole kernel file, into `memory`.
pub(crate) fn load(
    file: &[u8],
    memory: &GuestMemory,
    layout: &Layout,
) -> Result<Kernel, ImageError> {
    let payload = payload(file)?;
    let limit = layout.ram_bytes().min(UNPACKED_BYTES_MAX);
    let read = |placing: Placing| -> Result<Loader, ImageError> {
        let mut loader = Loader::new(memory, layout, placing);
        let total = match payload.codec {
            Some(codec) => codec
                .unpack(payload.data, limit, &mut loader)
                .map_err(|e| loader.explain(e))?,
            None => {
                loader.take(payload.data)?;
                payload.data.len() as u64
            }
        };
        if payload.unpacked.is_some_and(|n| n != total as u32) {
            return Err(ImageError::damaged(
                "it unpacks to another size than it says",
            ));
        }
        Ok(loader)
    };
    let first = read(Placing::WhereItWants)?;
    let (headers, notes) = first.finish()?;
    if first.fits {
        return kernel(&headers, &notes, 0);
    }
    let shift = relocate(&headers, &notes, layout)?;
    let (headers, notes) = read(Placing::Shifted(shift))?.finish()?;
    kernel(&headers, &notes, shift)
}

/// The address difference to place an image that does not fit where it wants to be.
fn relocate(headers: &Headers, notes: &Notes, layout: &Layout) -> Result<u64, ImageError> {
    let (start, end) = headers.extent();
    let refuse = || does_not_fit(headers, layout);
    if notes.entry.is_none() {
        return Err(ImageError::NoPvhNote);
    }
    let reloc = notes.relocation.ok_or_else(refuse)?;
    let align = match reloc.align {
        Some(align) => u64::from(align),
        None if headers.align >= 4096 && headers.align.is_power_of_two() => headers.align,
        None => RELOCATION_ALIGN_DEFAULT,
    };
    // The low megabyte stays free for the code that starts further processors.
    let lowest = u64::from(reloc.min).max(1 << 20);
    let to = lowest.checked_next_multiple_of(align).ok_or_else(refuse)?;
    let to_end = to.checked_add(end - start).ok_or_else(refuse)?;
    if to_end - 1 > u64::from(reloc.max) || !layout.is_ram(to, to_end) {
        return Err(refuse());
    }
    Ok(to.wrapping_sub(start))
}

fn does_not_fit(headers: &Headers, layout: &Layout) -> ImageError {
    let (start, end) = headers.extent();
    ImageError::DoesNotFit {
        start,
        end,
        needed_mib: end.div_ceil(1 << 20),
        have_mib: layout.ram_bytes() >> 20,
    }
}

fn kernel(headers: &Headers, notes: &Notes, shift: u64) -> Result<Kernel, ImageError> {
    let entry = notes.entry.ok_or(ImageError::NoPvhNote)?;
    let inside = headers
        .segments
        .iter()
        .any(|s| s.paddr <= entry && entry < s.paddr + s.memory_bytes);
    let (start, end) = headers.extent();
    let moved = entry.wrapping_add(shift);
    match u32::try_from(moved) {
        Ok(entry) if inside => Ok(Kernel {
            entry,
            start: start.wrapping_add(shift),
            end: end.wrapping_add(shift),
            suspend_cancel: notes.suspend_cancel,
        }),
        _ => Err(ImageError::EntryOutside { entry }),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placing {
    /// At the addresses in the image, or nowhere if memory does not reach there.
    WhereItWants,
    /// At the addresses in the image plus this, modulo 2^64.
    Shifted(u64),
}

/// Takes an ELF image as a stream.
struct Loader<'a> {
    memory: &'a GuestMemory,
    layout: &'a Layout,
    placing: Placing,
    /// The beginning of the file, until the headers are complete.
    head: Vec<u8>,
    headers: Option<Headers>,
    /// The bytes of each note segment, as far as they have come.
    notes: Vec<Vec<u8>>,
    /// Offset in the file of the next byte to come.
    at: u64,
    /// Whether the segments fit into memory and are being copied.
    fits: bool,
}

impl<'a> Loader<'a> {
    fn new(memory: &'a GuestMemory, layout: &'a Layout, placing: Placing) -> Loader<'a> {
        Loader {
            memory,
            layout,
            placing,
            head: Vec::new(),
            headers: None,
            notes: Vec::new(),
            at: 0,
            fits: false,
        }
    }

    /// An image that is larger than memory is most often one that does not fit: that says how much it needs.
    fn explain(&self, e: ImageError) -> ImageError {
        match (&e, &self.headers) {
            (ImageError::TooLarge { .. }, Some(headers)) if !self.fits => {
                does_not_fit(headers, self.layout)
            }
            _ => e,
        }
    }

    fn shift(&self) -> u64 {
        match self.placing {
            Placing::WhereItWants => 0,
            Placing::Shifted(by) => by,
        }
    }

    /// Everything has come: what was in the image. Notes are parsed here.
    fn finish(&self) -> Result<(Headers, Notes), ImageError> {
        let cut = || ImageError::damaged("the image inside of it ends too early");
        let headers = self.headers.clone().ok_or_else(cut)?;
        if self.at < headers.file_end() {
            return Err(cut());
        }
        let mut notes = Notes::default();
        for (range, bytes) in headers.notes.iter().zip(&self.notes) {
            notes.read(bytes, range.align);
        }
        Ok((headers, notes))
    }

    fn begin(&mut self, headers: Headers) -> Result<(), ImageError> {
        let shift = self.shift();
        self.fits = headers.segments.iter().all(|s| {
            let start = s.paddr.wrapping_add(shift);
            start
                .checked_add(s.memory_bytes)
                .is_some_and(|end| end <= ADDRESS_MAX + 1 && self.layout.is_ram(start, end))
        });
        if self.fits {
            for s in &headers.segments {
                self.memory.zero(
                    Gpa(s.paddr.wrapping_add(shift) + s.file_bytes),
                    s.memory_bytes - s.file_bytes,
                )?;
            }
        }
        self.notes = headers.notes.iter().map(|_| Vec::new()).collect();
        self.headers = Some(headers);
        Ok(())
    }

    fn place(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let shift = self.shift();
        let Some(headers) = &self.headers else {
            return Ok(());
        };
        let at = self.at;
        if self.fits {
            for s in &headers.segments {
                if let Some((skip, part)) = overlap(s.offset, s.file_bytes, at, bytes) {
                    let to = segment_address(s, shift) + skip;
                    self.memory.write(Gpa(to), part)?;
                }
            }
        }
        for (range, kept) in headers.notes.iter().zip(&mut self.notes) {
            if let Some((_, part)) = overlap(range.offset, range.bytes, at, bytes) {
                kept.extend_from_slice(part);
            }
        }
        self.at += bytes.len() as u64;
        Ok(())
    }
}

fn segment_address(s: &Segment, shift: u64) -> u64 {
    s.paddr.wrapping_add(shift)
}

/// The part of `bytes`, which lie at `at` of the file, that belongs to `len` bytes from `start`: how far into that range it
/// begins, and the part itself.
fn overlap(start: u64, len: u64, at: u64, bytes: &[u8]) -> Option<(u64, &[u8])> {
    let from = start.max(at);
    let to = (start + len).min(at + bytes.len() as u64);
    (from < to).then(|| {
        (
            from - start,
            &bytes[(from - at) as usize..(to - at) as usize],
        )
    })
}

impl Sink for Loader<'_> {
    fn take(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        if self.headers.is_some() {
            return self.place(bytes);
        }
        // Parsed in place where the first piece is large enough, which it nearly always is.
        let known = self.head.len();
        let room = HEADERS_BYTES_MAX.saturating_sub(known).min(bytes.len());
        let (now, later) = bytes.split_at(room);
        self.head.extend_from_slice(now);
        let Some(headers) = elf::headers(&self.head)? else {
            return Ok(());
        };
        self.begin(headers)?;
        let head = std::mem::take(&mut self.head);
        self.place(&head)?;
        self.place(later)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::memory_layout;
    use crate::testing::{ElfSpec, bzimage, pack};
    use crate::unpack::Codec;

    const MIB: u64 = 1 << 20;

    fn domain(mib: u64) -> (GuestMemory, Layout) {
        let layout = memory_layout(mib * MIB).unwrap();
        (GuestMemory::new(&layout.backed).unwrap(), layout)
    }

    fn read(memory: &GuestMemory, gpa: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        memory.read(Gpa(gpa), &mut b).unwrap();
        b
    }

    fn check_loaded(memory: &GuestMemory, spec: &ElfSpec, shift: i64) {
        for (paddr, data, memory_bytes) in &spec.segments {
            let at = paddr.wrapping_add_signed(shift);
            assert_eq!(&read(memory, at, data.len()), data);
            let bss = read(
                memory,
                at + data.len() as u64,
                *memory_bytes as usize - data.len(),
            );
            assert!(bss.iter().all(|&b| b == 0), "BSS at {at:#x}");
        }
    }

    #[test]
    fn load_places_segments_by_physical_address_and_zeroes_the_rest() {
        for wide in [true, false] {
            let (memory, layout) = domain(64);
            memory.write(Gpa(16 * MIB), &vec![0xee; 4 << 20]).unwrap();
            let spec = ElfSpec {
                wide,
                ..ElfSpec::default()
            };
            let k = load(&spec.build(), &memory, &layout).unwrap();
            check_loaded(&memory, &spec, 0);
            assert_eq!(k.entry, 0x100_0850);
            let (start, end) = spec.extent();
            assert_eq!((k.start, k.end), (start, end));
            assert!(k.suspend_cancel);
            assert_eq!(read(&memory, end, 1), [0xee], "nothing behind the image");
        }
    }

    #[test]
    fn load_unpacks_every_compression_in_and_outside_of_a_bzimage() {
        let spec = ElfSpec::default();
        for codec in [
            Codec::Gzip,
            Codec::Bzip2,
            Codec::Lzma,
            Codec::Xz,
            Codec::Lzo,
            Codec::Lz4,
            Codec::Zstd,
        ] {
            for file in [bzimage(codec, &spec.build()), pack(codec, &spec.build())] {
                let (memory, layout) = domain(64);
                let k = load(&file, &memory, &layout).unwrap_or_else(|e| panic!("{codec:?} {e}"));
                assert_eq!(k.entry, 0x100_0850);
                check_loaded(&memory, &spec, 0);
            }
        }
    }

    #[test]
    fn load_refuses_images_cut_at_any_byte() {
        let (memory, layout) = domain(64);
        let elf = ElfSpec::default().build();
        for codec in [Codec::Gzip, Codec::Lzo, Codec::Lz4, Codec::Zstd, Codec::Xz] {
            let file = bzimage(codec, &elf);
            for cut in (0..file.len() - 64)
                .step_by(37)
                .chain(file.len() - 64..file.len())
            {
                // What stands behind the payload is not part of the kernel.
                assert!(
                    load(&file[..cut], &memory, &layout).is_err(),
                    "{codec:?} {cut}"
                );
            }
        }
        let needed = elf::headers(&elf).unwrap().unwrap().file_end() as usize;
        for cut in (0..needed).step_by(101).chain(needed - 200..needed) {
            assert!(load(&elf[..cut], &memory, &layout).is_err(), "{cut}");
        }
    }

    #[test]
    fn load_refuses_a_payload_of_another_size_than_stated() {
        let (memory, layout) = domain(64);
        let elf = ElfSpec::default().build();
        let mut file = bzimage(Codec::Lz4, &elf);
        let at = file.len() - 4;
        file[at] ^= 1;
        let e = load(&file, &memory, &layout).unwrap_err();
        assert!(matches!(e, ImageError::Damaged { .. }), "{e}");
    }

    #[test]
    fn load_refuses_bombs() {
        let (memory, layout) = domain(64);
        let mut elf = ElfSpec::default().build();
        elf.resize(80 << 20, 0);
        for codec in [Codec::Gzip, Codec::Lz4, Codec::Xz, Codec::Lzo] {
            let e = load(&pack(codec, &elf), &memory, &layout).unwrap_err();
            assert_eq!(e, ImageError::TooLarge { limit_mib: 64 }, "{codec:?}");
            let e = load(&bzimage(codec, &elf), &memory, &layout).unwrap_err();
            assert_eq!(e, ImageError::TooLarge { limit_mib: 64 }, "{codec:?}");
        }
    }

    #[test]
    fn load_without_pvh_note_says_so() {
        let (memory, layout) = domain(64);
        let spec = ElfSpec {
            notes: Vec::new(),
            ..ElfSpec::default()
        };
        let e = load(&spec.build(), &memory, &layout).unwrap_err();
        assert_eq!(
            e.to_string(),
            "has no PVH entry note (CONFIG_PVH=y is needed)"
        );
    }

    #[test]
    fn load_refuses_an_entry_outside_of_the_image() {
        let (memory, layout) = domain(64);
        for entry in [0u64, 0xfff_ffff, 0x1_0100_0850] {
            let spec = ElfSpec {
                notes: crate::testing::note(b"Xen\0", 18, &entry.to_le_bytes(), 4),
                ..ElfSpec::default()
            };
            assert_eq!(
                load(&spec.build(), &memory, &layout),
                Err(ImageError::EntryOutside { entry })
            );
        }
    }

    #[test]
    fn load_into_too_little_memory_says_how_much_is_needed() {
        let (memory, layout) = domain(16);
        let spec = ElfSpec::default();
        let (start, end) = spec.extent();
        assert_eq!(
            load(&bzimage(Codec::Zstd, &spec.build()), &memory, &layout),
            Err(ImageError::DoesNotFit {
                start,
                end,
                needed_mib: end.div_ceil(MIB),
                have_mib: 16
            })
        );
    }

    #[test]
    fn load_of_an_image_larger_than_memory_says_how_much_is_needed() {
        let (memory, layout) = domain(16);
        let mut elf = ElfSpec::default().build();
        elf.resize(17 << 20, 0);
        assert!(matches!(
            load(&bzimage(Codec::Lz4, &elf), &memory, &layout),
            Err(ImageError::DoesNotFit { have_mib: 16, .. })
        ));
    }

    #[test]
    fn load_moves_a_relocatable_image_that_does_not_fit() {
        let (memory, layout) = domain(16);
        let mut spec = ElfSpec::default();
        let words: Vec<u8> = [0x10_0000u32, 0x30_0001, 0xff_ffff]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        spec.notes
            .extend(crate::testing::note(b"Xen\0", 19, &words, 4));
        let k = load(&bzimage(Codec::Lz4, &spec.build()), &memory, &layout).unwrap();
        assert_eq!(k.start, 0x40_0000);
        assert_eq!(k.entry, 0x40_0850);
        check_loaded(&memory, &spec, 0x40_0000 - 0x100_0000);

        // Where it fits, it stays.
        let (memory, layout) = domain(64);
        let k = load(&spec.build(), &memory, &layout).unwrap();
        assert_eq!(k.entry, 0x100_0850);

        // Not below its minimum, nor above its maximum.
        let (memory, layout) = domain(4);
        assert!(matches!(
            load(&spec.build(), &memory, &layout),
            Err(ImageError::DoesNotFit { .. })
        ));
    }
}
