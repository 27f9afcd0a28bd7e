//! ELF headers, program headers and notes of a kernel, read from the beginning of a stream.
//!
//! Source: System V ABI, chapters 4 and 5, for both classes; Xen's public/elfnote.h for the notes. Everything is checked
//! before it is used: the image is not trusted.

use crate::ImageError;

/// Most program headers of an image; Linux has 5.
const PHNUM_MAX: usize = 64;
/// Most bytes from the start of the file to the end of the program headers.
pub(crate) const HEADERS_BYTES_MAX: usize = 64 << 10;
/// Most bytes of one note segment; Linux has about 500.
const NOTE_BYTES_MAX: u64 = 64 << 10;

const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_PHYS32_RELOC: u32 = 19;
const NOTE_SUSPEND_CANCEL: u32 = 14;

/// A range of the file that is copied to memory; what `memory` has beyond `file` is zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub offset: u64,
    pub file_bytes: u64,
    pub paddr: u64,
    pub memory_bytes: u64,
}

/// A range of the file that holds notes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoteRange {
    pub offset: u64,
    pub bytes: u64,
    pub align: u64,
}

/// What the headers of an image say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Headers {
    pub segments: Vec<Segment>,
    pub notes: Vec<NoteRange>,
    /// Largest alignment of a segment, in bytes.
    pub align: u64,
}

impl Headers {
    /// First and end address of what is loaded.
    pub fn extent(&self) -> (u64, u64) {
        let start = self.segments.iter().map(|s| s.paddr).min().unwrap_or(0);
        let end = self
            .segments
            .iter()
            .map(|s| s.paddr + s.memory_bytes)
            .max()
            .unwrap_or(0);
        (start, end)
    }

    /// End of what is needed of the file.
    pub fn file_end(&self) -> u64 {
        let segments = self.segments.iter().map(|s| s.offset + s.file_bytes);
        let notes = self.notes.iter().map(|n| n.offset + n.bytes);
        segments.chain(notes).max().unwrap_or(0)
    }
}

/// Where a relocatable image may be moved to (note PHYS32_RELOC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Relocation {
    /// Alignment in bytes, where the note gives one.
    pub align: Option<u32>,
    /// Lowest address of the first byte.
    pub min: u32,
    /// Highest address of the last byte.
    pub max: u32,
}

/// What the notes of an image say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Notes {
    /// 32-bit entry point, a guest physical address.
    pub entry: Option<u64>,
    pub relocation: Option<Relocation>,
    /// The kernel accepts the return value 1 from a suspend hypercall.
    pub suspend_cancel: bool,
}

/// Field access with the class's widths.
#[derive(Clone, Copy)]
struct Fields<'a> {
    data: &'a [u8],
    wide: bool,
}

impl Fields<'_> {
    fn u16(&self, at: usize) -> Option<u16> {
        let b = self.data.get(at..at.checked_add(2)?)?;
        Some(u16::from_le_bytes(b.try_into().ok()?))
    }

    fn u32(&self, at: usize) -> Option<u32> {
        let b = self.data.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(b.try_into().ok()?))
    }

    /// An address or offset: at `at32` in the 32-bit class, at `at64` in the 64-bit class.
    fn word(&self, at32: usize, at64: usize) -> Option<u64> {
        if self.wide {
            let b = self.data.get(at64..at64.checked_add(8)?)?;
            Some(u64::from_le_bytes(b.try_into().ok()?))
        } else {
            self.u32(at32).map(u64::from)
        }
    }

    fn half(&self, at32: usize, at64: usize) -> Option<u16> {
        self.u16(if self.wide { at64 } else { at32 })
    }
}

/// Reads the headers from the first bytes of an image; `None` where more bytes are needed first.
pub(crate) fn headers(data: &[u8]) -> Result<Option<Headers>, ImageError> {
    let Some(ident) = data.get(..6) else {
        return Ok(None);
    };
    let wide = ident[4] == 2;
    if &ident[..4] != b"\x7fELF" || !(1..=2).contains(&ident[4]) || ident[5] != 1 {
        return Err(ImageError::damaged(
            "what it unpacks to is not a little-endian ELF image",
        ));
    }
    let fields = Fields { data, wide };
    let Some(table) = table(fields)? else {
        return Ok(None);
    };
    let Some(entries) = data.get(table.offset..table.end) else {
        return Ok(None);
    };
    let mut found = Headers {
        segments: Vec::new(),
        notes: Vec::new(),
        align: 1,
    };
    for entry in entries.chunks_exact(table.entry_bytes) {
        let damaged = || ImageError::damaged("a program header is out of range");
        entry_into(Fields { data: entry, wide }, &mut found).ok_or_else(damaged)?;
    }
    if found.segments.is_empty() {
        return Err(ImageError::damaged("it has nothing to load"));
    }
    Ok(Some(found))
}

struct Table {
    offset: usize,
    end: usize,
    entry_bytes: usize,
}

fn table(fields: Fields) -> Result<Option<Table>, ImageError> {
    let read = || {
        let machine = fields.u16(18)?;
        let offset = fields.word(28, 32)?;
        let entry_bytes = fields.half(42, 54)?;
        let count = fields.half(44, 56)?;
        Some((
            machine,
            offset,
            usize::from(entry_bytes),
            usize::from(count),
        ))
    };
    let Some((machine, offset, entry_bytes, count)) = read() else {
        return Ok(None);
    };
    if machine != EM_386 && machine != EM_X86_64 {
        return Err(ImageError::WrongMachine { machine });
    }
    let entry_min = if fields.wide { 56 } else { 32 };
    let end = usize::try_from(offset)
        .ok()
        .and_then(|offset| offset.checked_add(entry_bytes * count));
    match end {
        Some(end)
            if end <= HEADERS_BYTES_MAX
                && entry_bytes >= entry_min
                && (1..=PHNUM_MAX).contains(&count) =>
        {
            Ok(Some(Table {
                offset: offset as usize,
                end,
                entry_bytes,
            }))
        }
        _ => Err(ImageError::damaged(
            "its table of program headers is out of range",
        )),
    }
}

/// Adds one program header; `None` where its ranges make no sense.
fn entry_into(f: Fields, found: &mut Headers) -> Option<()> {
    let kind = f.u32(0)?;
    let offset = f.word(4, 8)?;
    let paddr = f.word(12, 24)?;
    let file_bytes = f.word(16, 32)?;
    let memory_bytes = f.word(20, 40)?;
    let align = f.word(28, 48)?;
    match kind {
        PT_LOAD if memory_bytes > 0 => {
            offset.checked_add(file_bytes)?;
            paddr.checked_add(memory_bytes)?;
            if file_bytes > memory_bytes {
                return None;
            }
            found.align = found.align.max(align);
            found.segments.push(Segment {
                offset,
                file_bytes,
                paddr,
                memory_bytes,
            });
        }
        PT_NOTE => {
            offset.checked_add(file_bytes)?;
            if file_bytes > NOTE_BYTES_MAX {
                return None;
            }
            found.notes.push(NoteRange {
                offset,
                bytes: file_bytes,
                align,
            });
        }
        _ => {}
    }
    Some(())
}

impl Notes {
    /// Adds what the notes in `data` say. Stops at what is not a note.
    pub fn read(&mut self, data: &[u8], align: u64) {
        // Notes are padded to 4 bytes, in segments that are aligned to 8 to 8.
        let align = if align == 8 { 8 } else { 4 };
        let mut at = 0;
        while let Some((kind, name, desc, next)) = note_at(data, at, align) {
            if name == b"Xen\0" {
                self.add(kind, desc);
            }
            at = next;
        }
    }

    fn add(&mut self, kind: u32, desc: &[u8]) {
        let word = |i: usize| {
            desc.get(4 * i..4 * i + 4)
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        };
        match kind {
            NOTE_PHYS32_ENTRY => {
                self.entry = match desc.len() {
                    4 => word(0).map(u64::from),
                    8 => word(0)
                        .zip(word(1))
                        .map(|(l, h)| u64::from(h) << 32 | u64::from(l)),
                    _ => None,
                }
            }
            NOTE_PHYS32_RELOC => {
                self.relocation = Some(Relocation {
                    align: word(0).filter(|a| a.is_power_of_two()),
                    min: word(1).unwrap_or(0),
                    max: word(2).unwrap_or(u32::MAX),
                });
            }
            NOTE_SUSPEND_CANCEL => self.suspend_cancel = word(0).is_some_and(|v| v != 0),
            _ => {}
        }
    }
}

/// Type, name, description of the note at `at`, and where the next one is.
fn note_at(data: &[u8], at: usize, align: usize) -> Option<(u32, &[u8], &[u8], usize)> {
    let header: &[u8; 12] = data.get(at..)?.first_chunk()?;
    let word =
        |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
    let (name_bytes, desc_bytes, kind) = (word(0) as usize, word(4) as usize, word(8));
    let name_at = at + 12;
    let desc_at = name_at
        .checked_add(name_bytes)?
        .checked_next_multiple_of(align)?;
    let name = data.get(name_at..name_at + name_bytes)?;
    let desc = data.get(desc_at..desc_at.checked_add(desc_bytes)?)?;
    let next = (desc_at + desc_bytes).checked_next_multiple_of(align)?;
    Some((kind, name, desc, next))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ElfSpec, note};

    #[test]
    fn headers_of_both_classes_give_the_same_segments() {
        for wide in [true, false] {
            let spec = ElfSpec {
                wide,
                ..ElfSpec::default()
            };
            let (file, want) = spec.build_with_segments();
            let h = headers(&file).unwrap().unwrap();
            assert_eq!(h.segments, want);
            assert_eq!(h.notes.len(), 1);
            assert!(h.file_end() <= file.len() as u64);
        }
    }

    #[test]
    fn headers_ask_for_more_until_the_table_is_complete() {
        let file = ElfSpec::default().build();
        let complete = (0..file.len())
            .find(|&n| headers(&file[..n]).unwrap().is_some())
            .unwrap();
        assert_eq!(complete, 64 + 56 * 4);
    }

    #[test]
    fn headers_refuse_what_is_out_of_range() {
        let good = ElfSpec::default().build();
        let with = |at: usize, bytes: &[u8]| {
            let mut file = good.clone();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            headers(&file)
        };
        assert_eq!(
            with(18, &183u16.to_le_bytes()),
            Err(ImageError::WrongMachine { machine: 183 })
        );
        assert!(with(4, &[3]).is_err(), "class");
        assert!(with(5, &[2]).is_err(), "big endian");
        assert!(with(32, &u64::MAX.to_le_bytes()).is_err(), "table offset");
        assert!(with(54, &8u16.to_le_bytes()).is_err(), "entry size");
        assert!(with(56, &u16::MAX.to_le_bytes()).is_err(), "count");
        assert!(with(64 + 8, &u64::MAX.to_le_bytes()).is_err(), "offset");
        assert!(with(64 + 24, &u64::MAX.to_le_bytes()).is_err(), "address");
        assert!(with(64 + 40, &1u64.to_le_bytes()).is_err(), "memory < file");
    }

    #[test]
    fn notes_read_entry_of_4_and_8_bytes_and_relocation() {
        for align in [4, 8] {
            let mut data = note(b"GNU\0", 3, &[1; 20], align);
            data.extend(note(b"Xen\0", 6, b"linux\0", align));
            data.extend(note(b"Xen\0", 18, &0x100_0850u64.to_le_bytes(), align));
            data.extend(note(b"Xen\0", 14, &1u32.to_le_bytes(), align));
            let mut n = Notes::default();
            n.read(&data, align as u64);
            assert_eq!(n.entry, Some(0x100_0850));
            assert!(n.suspend_cancel);
            assert_eq!(n.relocation, None);
        }
        let mut n = Notes::default();
        n.read(&note(b"Xen\0", 18, &0x10_0000u32.to_le_bytes(), 4), 4);
        n.read(&note(b"Xen\0", 19, &[], 4), 4);
        assert_eq!(n.entry, Some(0x10_0000));
        assert_eq!(
            n.relocation,
            Some(Relocation {
                align: None,
                min: 0,
                max: u32::MAX
            })
        );
        let words: Vec<u8> = [0x20_0000u32, 0x10_0000, 0x3fff_ffff]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        n.read(&note(b"Xen\0", 19, &words, 4), 4);
        assert_eq!(
            n.relocation,
            Some(Relocation {
                align: Some(0x20_0000),
                min: 0x10_0000,
                max: 0x3fff_ffff
            })
        );
    }

    #[test]
    fn notes_of_another_owner_are_ignored() {
        let mut n = Notes::default();
        n.read(&note(b"NetBSD\0", 18, &[0; 8], 4), 4);
        assert_eq!(n, Notes::default());
    }

    proptest::proptest! {
        #[test]
        fn notes_of_arbitrary_bytes_end(data: Vec<u8>, align in 0u64..16) {
            let mut n = Notes::default();
            n.read(&data, align);
            proptest::prop_assert!(n.entry.is_none() || data.len() >= 20);
        }

        #[test]
        fn headers_of_arbitrary_bytes_stay_in_bounds(mut data: Vec<u8>) {
            data.splice(0..0, *b"\x7fELF\x02\x01");
            if let Ok(Some(h)) = headers(&data) {
                let (start, end) = h.extent();
                proptest::prop_assert!(start < end);
            }
        }
    }
}
