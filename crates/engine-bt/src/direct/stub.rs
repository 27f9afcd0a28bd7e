//! The code that runs inside an address-space process: a minimal ELF file to start it from, and the page through which its mappings are changed.

use std::arch::global_asm;

/// Where the ELF file is linked: the lowest address that an unprivileged process may use by default.
const LINK_ADDRESS: u64 = 0x10000;

/// Address of the ELF file's code, which is a system call and a breakpoint.
pub const FIRST_CALL: u64 = LINK_ADDRESS + HEADERS as u64;

const HEADERS: usize = 64 + 2 * 56;

/// One system call for the batch: number and six arguments.
pub type Call = [u64; 7];

/// Distances of the entry points from the start of the code page.
pub const ONE: u64 = 0;
pub const MXCSR: u64 = 16;
pub const GO: u64 = 32;
/// A breakpoint outside of all of them, and the last byte of the page.
pub const STOP: u64 = 4095;

/// Distance of the table of calls from the start of the code page, and pages of it.
pub const TABLE: usize = 4096;
pub const TABLE_PAGES: usize = 16;
/// Distance of the page behind the table.
pub const SCRATCH: usize = TABLE + TABLE_PAGES * 4096;

/// What `GO` finds at the start of the page behind the table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Start {
    /// R15 down to R8, RBP, RDI, RSI, RDX, RCX, RBX, RAX.
    pub general: [u64; 15],
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    /// Calls in the table.
    pub calls: u64,
    /// Words that they take there.
    pub words: u64,
    /// The time-stamp counter when they have been made.
    pub made: u64,
}

/// Where in that page MXCSR goes.
pub const MXCSR_SLOT: usize = 1024;

// `ONE`: one system call with what the tracer put into the registers, then a breakpoint.
// `MXCSR`: stores that register at R12, then a breakpoint.
// `GO`: the calls of the table, up to one that fails and a breakpoint behind it. When all have been made it clears the table, takes the registers from [`Start`] and goes on
// where that says. It trusts in no register: guest code may jump here as well.
global_asm!(
    ".pushsection .rodata",
    ".balign 16",
    ".globl hospes_direct_stub",
    "hospes_direct_stub:",
    "syscall",
    "int3",
    ".org hospes_direct_stub + 16, 0xcc",
    "stmxcsr [r12]",
    "int3",
    ".org hospes_direct_stub + 32, 0xcc",
    "lea r12, [rip + hospes_direct_stub + {table}]",
    "mov r13, [rip + hospes_direct_stub + {calls}]",
    "4:",
    "test r13, r13",
    "jz 5f",
    "mov rax, [r12]",
    "mov rdi, [r12 + 8]",
    "mov rsi, [r12 + 16]",
    "mov rdx, [r12 + 24]",
    "mov r10, [r12 + 32]",
    "mov r8, [r12 + 40]",
    "mov r9, [r12 + 48]",
    "syscall",
    "add r12, 56",
    "dec r13",
    "cmp rax, -4096",
    "jbe 4b",
    "int3",
    "5:",
    "lea rdi, [rip + hospes_direct_stub + {table}]",
    "mov rcx, [rip + hospes_direct_stub + {words}]",
    "xor eax, eax",
    "cld",
    "rep stosq",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [rip + hospes_direct_stub + {made}], rax",
    "lea rsp, [rip + hospes_direct_stub + {start}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbp",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "iretq",
    "int3",
    ".globl hospes_direct_stub_end",
    "hospes_direct_stub_end:",
    ".popsection",
    table = const TABLE,
    start = const SCRATCH,
    calls = const SCRATCH + std::mem::offset_of!(Start, calls),
    words = const SCRATCH + std::mem::offset_of!(Start, words),
    made = const SCRATCH + std::mem::offset_of!(Start, made),
);

unsafe extern "C" {
    static hospes_direct_stub: u8;
    static hospes_direct_stub_end: u8;
}

/// The bytes of the code page; the rest of it is breakpoints.
pub fn code_page() -> Vec<u8> {
    let start = &raw const hospes_direct_stub;
    let end = &raw const hospes_direct_stub_end;
    // SAFETY: both labels bound the same object in read-only data, in this order.
    let code = unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) };
    let mut page = code.to_vec();
    page.resize(4096, 0xcc);
    page
}

/// A static ELF file of one page: no interpreter, no data, no stack of its own. Layout: System V ABI, chapter "Object Files".
pub fn elf() -> Vec<u8> {
    const PT_LOAD: u32 = 1;
    const PT_GNU_STACK: u32 = 0x6474_e551;
    let mut file = Vec::new();
    let code = [0x0f, 0x05, 0xcc];
    let size = (HEADERS + code.len()) as u64;
    file.extend_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    // ET_EXEC, x86-64, version 1.
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    for word in [FIRST_CALL, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    // Sizes and numbers of headers: ELF 64, two program headers of 56, no sections.
    for half in [64u16, 56, 2, 64, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    for (kind, flags, bytes) in [(PT_LOAD, 5u32, size), (PT_GNU_STACK, 6, 0)] {
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&flags.to_le_bytes());
        let address = if kind == PT_LOAD { LINK_ADDRESS } else { 0 };
        for word in [0, address, address, bytes, bytes, 4096] {
            file.extend_from_slice(&word.to_le_bytes());
        }
    }
    file.extend_from_slice(&code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elf_headers_have_their_size() {
        assert_eq!(elf().len(), HEADERS + 3);
    }

    #[test]
    fn code_page_has_all_entries() {
        let page = code_page();
        assert_eq!(page.len(), 4096);
        assert_eq!(page[ONE as usize..][..3], [0x0f, 0x05, 0xcc]);
        // stmxcsr [r12]; int3
        assert_eq!(
            page[MXCSR as usize..][..6],
            [0x41, 0x0f, 0xae, 0x1c, 0x24, 0xcc]
        );
        // lea r12, [rip + what lies from the end of this instruction to the table]
        let to_table = (TABLE as u32 - GO as u32 - 7).to_le_bytes();
        assert_eq!(page[GO as usize..][..3], [0x4c, 0x8d, 0x25]);
        assert_eq!(page[GO as usize + 3..][..4], to_table);
        assert_eq!(page[STOP as usize], 0xcc);
    }
}
