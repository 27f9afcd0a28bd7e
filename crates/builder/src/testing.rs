//! Small kernels made up for tests: ELF images, bzImages around them, and a packer for each compression.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::elf::Segment;
use crate::unpack::Codec;

/// A file that is removed with its value.
pub struct TempFile(PathBuf);

impl TempFile {
    pub fn new(content: &[u8]) -> TempFile {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!(
            "hospes-builder-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        std::fs::write(&path, content).unwrap();
        TempFile(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// One ELF note, padded.
pub fn note(name: &[u8], kind: u32, desc: &[u8], align: usize) -> Vec<u8> {
    let mut v = Vec::new();
    v.extend_from_slice(&(name.len() as u32).to_le_bytes());
    v.extend_from_slice(&(desc.len() as u32).to_le_bytes());
    v.extend_from_slice(&kind.to_le_bytes());
    v.extend_from_slice(name);
    v.resize(v.len().next_multiple_of(align), 0);
    v.extend_from_slice(desc);
    v.resize(v.len().next_multiple_of(align), 0);
    v
}

/// An ELF image; by default three segments from 16 MiB on and the notes that Linux has.
pub struct ElfSpec {
    /// 64-bit class.
    pub wide: bool,
    /// Physical address, content, bytes in memory.
    pub segments: Vec<(u64, Vec<u8>, u64)>,
    pub notes: Vec<u8>,
}

impl Default for ElfSpec {
    fn default() -> Self {
        let content = |seed: u32, len: u32| -> Vec<u8> {
            (0..len).map(|i| ((i * seed) >> 3) as u8).collect()
        };
        let mut notes = note(b"Xen\0", 6, b"linux\0", 4);
        notes.extend(note(b"Xen\0", 18, &0x100_0850u64.to_le_bytes(), 4));
        notes.extend(note(b"Xen\0", 14, &1u32.to_le_bytes(), 4));
        ElfSpec {
            wide: true,
            segments: vec![
                (0x100_0000, content(3, 20_000), 0x8000),
                (0x110_0000, content(7, 5_001), 0x2000),
                (0x120_0000, content(11, 1), 0x10_0001),
            ],
            notes,
        }
    }
}

impl ElfSpec {
    pub fn extent(&self) -> (u64, u64) {
        (
            self.segments.iter().map(|s| s.0).min().unwrap(),
            self.segments.iter().map(|s| s.0 + s.2).max().unwrap(),
        )
    }

    pub fn build(&self) -> Vec<u8> {
        self.build_with_segments().0
    }

    pub fn build_with_segments(&self) -> (Vec<u8>, Vec<Segment>) {
        let (ehsize, phsize) = if self.wide { (64, 56) } else { (52, 32) };
        let count = self.segments.len() + 1;
        let mut body = vec![0; ehsize + phsize * count];
        let mut table = Vec::new();
        let mut segments = Vec::new();
        for (paddr, content, memory_bytes) in &self.segments {
            let offset = body.len() as u64;
            body.extend_from_slice(content);
            table.extend(self.phdr(
                1,
                offset,
                *paddr,
                content.len() as u64,
                *memory_bytes,
                0x20_0000,
            ));
            segments.push(Segment {
                offset,
                file_bytes: content.len() as u64,
                paddr: *paddr,
                memory_bytes: *memory_bytes,
            });
        }
        let notes = self.notes.len() as u64;
        table.extend(self.phdr(4, body.len() as u64, 0, notes, notes, 4));
        body.extend_from_slice(&self.notes);
        // What follows the last segment (section headers, symbols) is not loaded.
        body.extend_from_slice(&[0x55; 300]);

        let mut header = b"\x7fELF".to_vec();
        header.extend_from_slice(&[if self.wide { 2 } else { 1 }, 1, 1]);
        header.resize(16, 0);
        header.extend_from_slice(&2u16.to_le_bytes());
        header.extend_from_slice(&(if self.wide { 62u16 } else { 3 }).to_le_bytes());
        header.extend_from_slice(&1u32.to_le_bytes());
        for word in [0x100_0000, ehsize as u64, 0] {
            header.extend(self.word(word));
        }
        header.extend_from_slice(&0u32.to_le_bytes());
        for half in [ehsize, phsize, count, 0, 0, 0] {
            header.extend_from_slice(&(half as u16).to_le_bytes());
        }
        assert_eq!(header.len(), ehsize);
        body[..ehsize].copy_from_slice(&header);
        body[ehsize..ehsize + table.len()].copy_from_slice(&table);
        (body, segments)
    }

    fn word(&self, w: u64) -> Vec<u8> {
        if self.wide {
            w.to_le_bytes().to_vec()
        } else {
            (w as u32).to_le_bytes().to_vec()
        }
    }

    fn phdr(
        &self,
        kind: u32,
        offset: u64,
        paddr: u64,
        file: u64,
        memory: u64,
        align: u64,
    ) -> Vec<u8> {
        const FLAGS: u32 = 7;
        // Some of Linux's segments have virtual address 0: only the physical one counts.
        let vaddr = 0;
        let mut v = kind.to_le_bytes().to_vec();
        if self.wide {
            v.extend_from_slice(&FLAGS.to_le_bytes());
        }
        for word in [offset, vaddr, paddr, file, memory] {
            v.extend(self.word(word));
        }
        if !self.wide {
            v.extend_from_slice(&FLAGS.to_le_bytes());
        }
        v.extend(self.word(align));
        v
    }
}

/// A bzImage around a packed image, with the size behind it that all formats but gzip need.
pub fn bzimage(codec: Codec, image: &[u8]) -> Vec<u8> {
    const SETUP_SECTS: usize = 2;
    const PAYLOAD_OFFSET: usize = 0x123;
    let mut payload = pack(codec, image);
    if codec != Codec::Gzip {
        payload.extend_from_slice(&(image.len() as u32).to_le_bytes());
    }
    let mut file = vec![0x90; (SETUP_SECTS + 1) * 512 + PAYLOAD_OFFSET];
    file[0x1f1] = SETUP_SECTS as u8;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&(PAYLOAD_OFFSET as u32).to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend_from_slice(&payload);
    file
}

/// Packs as Linux's build does.
pub fn pack(codec: Codec, plain: &[u8]) -> Vec<u8> {
    use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
    let lzma = |stream: Stream| {
        let mut w = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        w.write_all(plain).unwrap();
        w.finish().unwrap()
    };
    match codec {
        Codec::Gzip => {
            let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            w.write_all(plain).unwrap();
            w.finish().unwrap()
        }
        Codec::Bzip2 => {
            let mut w = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
            w.write_all(plain).unwrap();
            w.finish().unwrap()
        }
        Codec::Lzma => {
            let mut options = LzmaOptions::new_preset(6).unwrap();
            options.dict_size(1 << 20);
            lzma(Stream::new_lzma_encoder(&options).unwrap())
        }
        Codec::Xz => {
            let mut options = LzmaOptions::new_preset(6).unwrap();
            options.dict_size(32 << 20);
            let mut filters = Filters::new();
            filters.x86().lzma2(&options);
            lzma(Stream::new_stream_encoder(&filters, Check::Crc32).unwrap())
        }
        Codec::Lzo => lzop(plain),
        Codec::Lz4 => {
            let mut v = vec![0x02, 0x21, 0x4c, 0x18];
            for block in plain.chunks(8 << 20) {
                let packed = lz4_flex::block::compress(block);
                v.extend_from_slice(&(packed.len() as u32).to_le_bytes());
                v.extend_from_slice(&packed);
            }
            v
        }
        Codec::Zstd => {
            ruzstd::encoding::compress_to_vec(plain, ruzstd::encoding::CompressionLevel::Fastest)
        }
    }
}

/// An lzop file whose blocks use runs only.
fn lzop(plain: &[u8]) -> Vec<u8> {
    const ADLER32_D: u32 = 1;
    let mut v = b"\x89LZO\0\r\n\x1a\n".to_vec();
    for version in [0x1040u16, 0x20a0, 0x0940] {
        v.extend_from_slice(&version.to_be_bytes());
    }
    v.extend_from_slice(&[3, 9]);
    v.extend_from_slice(&ADLER32_D.to_be_bytes());
    v.extend_from_slice(&[0; 12]);
    v.push(0);
    v.extend_from_slice(&[0; 4]);
    for block in plain.chunks(256 << 10) {
        let packed = lzo1x_runs(block);
        let packed = if packed.len() < block.len() {
            &packed
        } else {
            block
        };
        v.extend_from_slice(&(block.len() as u32).to_be_bytes());
        v.extend_from_slice(&(packed.len() as u32).to_be_bytes());
        v.extend_from_slice(&crate::unpack::adler32(block).to_be_bytes());
        v.extend_from_slice(packed);
    }
    v.extend_from_slice(&[0; 4]);
    v
}

/// Packs repetitions of one byte as matches at distance 1, all else as literals.
fn lzo1x_runs(plain: &[u8]) -> Vec<u8> {
    fn length(v: &mut Vec<u8>, field: u8, mut over: usize) {
        v.push(field);
        while over > 255 {
            v.push(0);
            over -= 255;
        }
        v.push(over as u8);
    }
    fn literals(v: &mut Vec<u8>, bytes: &[u8]) {
        match bytes.len() {
            0 => {}
            // Up to three go with the match before them; at the start the first byte has a form of its own.
            n @ 1..4 if v.is_empty() => v.push(17 + n as u8),
            n @ 1..4 => {
                let low = v.len() - 2;
                v[low] |= n as u8;
            }
            n @ 4..=18 => v.push((n - 3) as u8),
            n => length(v, 0, n - 18),
        }
        v.extend_from_slice(bytes);
    }
    let (mut v, mut at, mut kept) = (Vec::new(), 0, 0);
    while at < plain.len() {
        let run = plain[at..].iter().take_while(|&&b| b == plain[at]).count();
        if run > 40 {
            literals(&mut v, &plain[kept..=at]);
            length(&mut v, 0b0010_0000, run - 1 - 33);
            v.extend_from_slice(&[0, 0]);
            kept = at + run;
        }
        at += run;
    }
    literals(&mut v, &plain[kept..]);
    v.extend_from_slice(&[0x11, 0, 0]);
    v
}
