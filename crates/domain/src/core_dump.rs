//! A guest's memory and registers as a core file, for those who look for the fault of its kernel.
//!
//! The file is ELF as QEMU's `dump-guest-memory` makes it, which crash(8), drgn and gdb read: a segment for each range of RAM, by guest physical address; for each vCPU a note
//! `CORE` (elf_prstatus of the System V ABI) and a note `QEMU` with its system registers, by which readers find a kernel that lies at a random address; and
//! the note `VMCOREINFO` that Linux keeps in its memory about itself, where there is one.
//!
//! The guest may run: the registers are those of one moment for each vCPU, and memory is read behind that. What is zero is a hole in the file.
//! Special pages of the Xen side (console, store, shared info) are not in it.

use std::io;

use hospes_engine::{CpuState, DescTable, Segment, reg, seg};
use hospes_memory::{GuestMemory, MemoryError};
use hospes_units::{Gpa, PAGE_SIZE};

use crate::Domain;
use crate::pages::is_zero;

/// Bytes of memory read at a time.
const CHUNK: u64 = 1 << 20;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const NOTE_HEADER_BYTES: usize = 12;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;

/// The name of the note in which Linux describes itself. It begins at the start of a page.
const VMCOREINFO: &[u8] = b"VMCOREINFO\0";
/// Most bytes of that description: Linux keeps it in one page.
const VMCOREINFO_MAX: usize = PAGE_SIZE as usize;

/// Why a core file was not written.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    #[error("its memory cannot be read: {0}")]
    Memory(#[from] MemoryError),
    #[error("{0}")]
    Write(#[from] io::Error),
}

/// Takes bytes of a file at a position, each behind the ones before; what is left out is zero.
pub type Piece<'a> = &'a mut dyn FnMut(u64, &[u8]) -> io::Result<()>;

impl Domain {
    /// Gives the core file in pieces; returns its size in bytes. A guest that runs goes on.
    pub fn dump_core(&self, piece: Piece<'_>) -> Result<u64, DumpError> {
        let states = self.run.vcpu_states();
        let memory = self.xen.memory();
        let mut notes = Vec::new();
        for (state, id) in states.iter().zip(1..) {
            if let Some(state) = state {
                note(
                    &mut notes,
                    b"CORE\0",
                    NT_PRSTATUS,
                    &process_status(state, id),
                );
            }
        }
        for state in states.iter().flatten() {
            note(&mut notes, b"QEMU\0", 0, &system_registers(state));
        }
        if let Some(description) = vmcoreinfo(memory)? {
            note(&mut notes, VMCOREINFO, 0, &description);
        }
        let head = head(memory, &notes);
        piece(0, &head)?;
        let mut at = head.len() as u64;
        for ram in memory.ram() {
            contents(memory, at.wrapping_sub(ram.start), *ram, piece)?;
            at += ram.end - ram.start;
        }
        Ok(at)
    }
}

/// What stands before the memory: headers and notes, up to a page's end.
fn head(memory: &GuestMemory, notes: &[u8]) -> Vec<u8> {
    const ET_CORE: u16 = 4;
    const EM_X86_64: u16 = 62;
    let segments = 1 + memory.ram().len();
    let notes_at = HEADER_BYTES + segments * PROGRAM_HEADER_BYTES;
    let end = (notes_at + notes.len()).next_multiple_of(PAGE_SIZE as usize);
    let mut head = Words::default();
    head.bytes(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    head.u16(ET_CORE).u16(EM_X86_64).u32(1);
    // Entry; program headers and sections from the file's start.
    head.u64(0).u64(HEADER_BYTES as u64).u64(0);
    head.u32(0).u16(HEADER_BYTES as u16);
    head.u16(PROGRAM_HEADER_BYTES as u16).u16(segments as u16);
    head.u16(0).u16(0).u16(0);
    let mut segment = |kind: u32, offset: usize, address: u64, bytes: u64| {
        head.u32(kind).u32(0).u64(offset as u64);
        head.u64(0).u64(address).u64(bytes).u64(bytes).u64(0);
    };
    segment(PT_NOTE, notes_at, 0, notes.len() as u64);
    let mut at = end;
    for ram in memory.ram() {
        segment(PT_LOAD, at, ram.start, ram.end - ram.start);
        at += (ram.end - ram.start) as usize;
    }
    head.bytes(notes);
    head.0.resize(end, 0);
    head.0
}

/// Gives what is not zero of a range of RAM, which lies so many bytes further on in the file.
fn contents(
    memory: &GuestMemory,
    distance: u64,
    ram: hospes_memory::Range,
    piece: Piece<'_>,
) -> Result<(), DumpError> {
    let mut buffer = vec![0; CHUNK as usize];
    let mut from = ram.start;
    while let Some(run) = memory.occupied(Gpa(from))?.filter(|r| r.start < ram.end) {
        from = run.start;
        while from < run.end {
            let bytes = (run.end - from).min(CHUNK);
            let chunk = &mut buffer[..bytes as usize];
            memory.read_ram(Gpa(from), chunk)?;
            let mut at = distance.wrapping_add(from);
            let zero = |a: &&[u8], b: &&[u8]| is_zero(a) == is_zero(b);
            let pages: Vec<&[u8]> = chunk.chunks(PAGE_SIZE as usize).collect();
            let mut first = 0;
            for alike in pages.chunk_by(zero) {
                let bytes = alike.len() * PAGE_SIZE as usize;
                if !is_zero(alike[0]) {
                    piece(at, &chunk[first..first + bytes])?;
                }
                first += bytes;
                at += bytes as u64;
            }
            from += bytes;
        }
    }
    Ok(())
}

/// What Linux says of itself: the first note of that name at the start of a page. It is the guest's word, and bounded.
fn vmcoreinfo(memory: &GuestMemory) -> Result<Option<Vec<u8>>, DumpError> {
    let name_bytes = VMCOREINFO.len().next_multiple_of(4);
    let mut from = Gpa(0);
    while let Some(run) = memory.occupied(from)? {
        from = Gpa(run.end);
        for page in (run.start..run.end).step_by(PAGE_SIZE as usize) {
            let mut start = [0; NOTE_HEADER_BYTES + VMCOREINFO.len()];
            memory.read_ram(Gpa(page), &mut start)?;
            let (header, name) = start.split_at(NOTE_HEADER_BYTES);
            let word = |n: usize| {
                header[4 * n..]
                    .first_chunk()
                    .map_or(0, |w| u32::from_le_bytes(*w))
            };
            let bytes = word(1) as usize;
            let found = name == VMCOREINFO && word(0) as usize == name.len() && word(2) == 0;
            if !found || !(1..=VMCOREINFO_MAX).contains(&bytes) {
                continue;
            }
            let mut description = vec![0; bytes];
            let at = page + (NOTE_HEADER_BYTES + name_bytes) as u64;
            // One that reaches past the RAM is none.
            if memory.read_ram(Gpa(at), &mut description).is_ok() {
                return Ok(Some(description));
            }
        }
    }
    Ok(None)
}

/// Adds a note.
fn note(notes: &mut Vec<u8>, name: &[u8], kind: u32, description: &[u8]) {
    let mut words = Words(std::mem::take(notes));
    words
        .u32(name.len() as u32)
        .u32(description.len() as u32)
        .u32(kind);
    for part in [name, description] {
        words.bytes(part);
        words.0.resize(words.0.len().next_multiple_of(4), 0);
    }
    *notes = words.0;
}

/// `struct elf_prstatus` of x86-64: `id` stands for the process, and the general registers follow.
fn process_status(state: &CpuState, id: u32) -> Vec<u8> {
    let mut words = Words(vec![0; 32]);
    words.u32(id);
    words.0.resize(112, 0);
    let g = &state.gpr;
    for register in [
        15,
        14,
        13,
        12,
        reg::RBP,
        reg::RBX,
        11,
        10,
        9,
        8,
        reg::RAX,
        reg::RCX,
        reg::RDX,
        reg::RSI,
        reg::RDI,
    ] {
        words.u64(g[register]);
    }
    let selector = |s: usize| u64::from(state.seg[s].selector);
    // What a system call was entered with; there is none.
    words.u64(u64::MAX).u64(state.rip).u64(selector(seg::CS));
    words
        .u64(state.rflags)
        .u64(g[reg::RSP])
        .u64(selector(seg::SS));
    words
        .u64(state.seg[seg::FS].base)
        .u64(state.seg[seg::GS].base);
    for s in [seg::DS, seg::ES, seg::FS, seg::GS] {
        words.u64(selector(s));
    }
    words.0.resize(336, 0);
    words.0
}

/// `QEMUCPUState`, version 1, of QEMU's `target/i386/arch_dump.c`.
fn system_registers(state: &CpuState) -> Vec<u8> {
    const BYTES: u32 = 8 + 18 * 8 + 10 * 24 + 6 * 8;
    let mut words = Words::default();
    words.u32(1).u32(BYTES);
    let g = &state.gpr;
    for register in [
        reg::RAX,
        reg::RBX,
        reg::RCX,
        reg::RDX,
        reg::RSI,
        reg::RDI,
        reg::RSP,
        reg::RBP,
    ] {
        words.u64(g[register]);
    }
    for register in &g[8..16] {
        words.u64(*register);
    }
    words.u64(state.rip).u64(state.rflags);
    for s in [seg::CS, seg::DS, seg::ES, seg::FS, seg::GS, seg::SS] {
        words.segment(&state.seg[s]);
    }
    words.segment(&state.ldtr).segment(&state.tr);
    words.table(&state.gdtr).table(&state.idtr);
    words
        .u64(state.cr0)
        .u64(0)
        .u64(state.cr2)
        .u64(state.cr3)
        .u64(state.cr4);
    words.u64(state.msr.kernel_gs_base);
    debug_assert_eq!(words.0.len(), BYTES as usize);
    words.0
}

/// Bytes that grow by little-endian words.
#[derive(Default)]
struct Words(Vec<u8>);

impl Words {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Words {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u16(&mut self, word: u16) -> &mut Words {
        self.bytes(&word.to_le_bytes())
    }

    fn u32(&mut self, word: u32) -> &mut Words {
        self.bytes(&word.to_le_bytes())
    }

    fn u64(&mut self, word: u64) -> &mut Words {
        self.bytes(&word.to_le_bytes())
    }

    /// With the rights where a descriptor's second word has them.
    fn segment(&mut self, segment: &Segment) -> &mut Words {
        let rights = u32::from(segment.attr & 0xf0ff) << 8;
        self.u32(segment.selector.into()).u32(segment.limit);
        self.u32(rights).u32(0).u64(segment.base)
    }

    fn table(&mut self, table: &DescTable) -> &mut Words {
        self.u32(0)
            .u32(table.limit.into())
            .u32(0)
            .u32(0)
            .u64(table.base)
    }
}
