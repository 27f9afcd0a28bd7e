//! Whether a page of guest code may be executed natively.
//!
//! Some instructions show the host's processor instead of the guest's and do not trap at CPL 3: CPUID without faulting, RDTSCP, RDPID, XGETBV, the XSAVE family with
//! the host's XCR0, and those that read descriptor tables. Calls of a hypervisor would reach the one that the host itself runs on. Two vectors of INT trap as
//! something else than they are. RDTSCP differs in ECX alone, so it is no suspect where the code that follows loads ECX before it looks at it or returns, as all that reads the clock does. The processor's breakpoints stop before the few of a page; pages with more stay in the translator. What a jump into the middle
//! of other instructions could still find are facts about the host's processor, never a way out: the process has nothing else in it.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register,
};

fn is_suspect(i: &Instruction) -> bool {
    use Mnemonic::*;
    if i.mnemonic() == Int {
        // The host reports that of INTO behind it, and cuts the number of a system call.
        return matches!(i.immediate8(), 4 | 0x80);
    }
    matches!(
        i.mnemonic(),
        Cpuid
            | Rdtscp
            | Rdpid
            | Xgetbv
            | Xsave
            | Xsave64
            | Xsavec
            | Xsavec64
            | Xsaveopt
            | Xsaveopt64
            | Xsaves
            | Xsaves64
            | Xrstor
            | Xrstor64
            | Xrstors
            | Xrstors64
            | Sgdt
            | Sidt
            | Sldt
            | Str
            | Smsw
            | Lsl
            | Lar
            | Verr
            | Verw
            | Rdpkru
            | Wrpkru
            | Sysenter
            | Vmcall
            | Vmmcall
            | Vmgexit
            | Vmfunc
            | Rdpmc
            | Rdpru
            | Serialize
            | Tpause
            | Umonitor
            | Umwait
            | Monitorx
            | Mwaitx
    )
}

/// Instructions behind RDTSCP within which ECX has to be loaded anew.
const AHEAD: usize = 16;

/// Whether the code at an offset of a page loads RCX as a whole before it looks at any part of it, or returns to a caller who expects nothing there by the calling convention, all
/// without a jump and without leaving the page.
fn forgets_rcx(page: &[u8], at: usize) -> bool {
    let mut decoder = Decoder::new(64, page, DecoderOptions::NONE);
    let mut factory = InstructionInfoFactory::new();
    if decoder.set_position(at).is_err() {
        return false;
    }
    for instruction in decoder.iter().take(AHEAD) {
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::Return => return instruction.mnemonic() == Mnemonic::Ret,
            _ => return false,
        }
        if instruction.is_invalid() {
            return false;
        }
        let mut loaded = false;
        for used in factory.info(&instruction).used_registers() {
            if used.register().full_register() != Register::RCX {
                continue;
            }
            if used.access() != OpAccess::Write || used.register().size() < 4 {
                return false;
            }
            loaded = true;
        }
        if loaded {
            return true;
        }
    }
    false
}

/// Bytes of a page that an instruction may share with the next page.
pub const SEAM: usize = 14;

/// Where in a page instructions may lie that must not be executed natively, as offsets. What goes on in the next page is left to [`across`].
pub fn suspects(page: &[u8]) -> Vec<u16> {
    // Whatever the boundaries of the instructions are, these are too easily found in any code to be left to them, or change memory.
    let anywhere = |i: usize| match page[i..] {
        [0x0f, 0xa2, ..] => Some(i),
        // XGETBV, VMCALL, VMFUNC, VMMCALL, RDPKRU, WRPKRU.
        [0x0f, 0x01, 0xd0 | 0xc1 | 0xd4 | 0xd9 | 0xee | 0xef, ..] => Some(i),
        [0x0f, 0x01, 0xf9, ..] if !forgets_rcx(page, i + 3) => Some(i),
        // XSAVE, XRSTOR and XSAVEOPT, or XRSTORS, XSAVEC and XSAVES: of memory.
        [0x0f, 0xae, m, ..] if m < 0xc0 && matches!(m >> 3 & 7, 4..=6) => Some(i),
        [0x0f, 0xc7, m, ..] if m < 0xc0 && matches!(m >> 3 & 7, 3..=5) => Some(i),
        [0x0f, 0xc7, 0xf8..=0xff, ..] if i > 0 && page[i - 1] == 0xf3 => Some(i - 1),
        _ => None,
    };
    let mut found: Vec<u16> = (0..page.len())
        .filter(|&i| page[i] == 0x0f)
        .filter_map(anywhere)
        .map(|i| i as u16)
        .collect();
    let mut decoder = Decoder::new(64, page, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut instruction);
        let forgets =
            instruction.mnemonic() == Mnemonic::Rdtscp && forgets_rcx(page, decoder.position());
        if is_suspect(&instruction) && !forgets {
            // A breakpoint counts at the first byte of an instruction, prefixes and all.
            let inside = at + 1..decoder.position();
            found.retain(|&f| !inside.contains(&usize::from(f)));
            found.push(at as u16);
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// The same for instructions that begin in one page and end in the next one, given the last bytes of the first and the first of the second: offsets from the first of these.
/// Each byte is taken for the first of an instruction, as a breakpoint counts only where one begins.
pub fn across(last: &[u8; SEAM], first: &[u8; SEAM]) -> Vec<u16> {
    let both = [*last, *first].concat();
    let crosses = |&start: &usize| {
        let mut decoder = Decoder::new(64, &both[start..], DecoderOptions::NONE);
        let instruction = decoder.decode();
        start + instruction.len() > SEAM && is_suspect(&instruction)
    };
    (0..SEAM).filter(crosses).map(|s| s as u16).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(code: &[u8]) -> Vec<u8> {
        let mut page = vec![0x90; 4096];
        page[100..100 + code.len()].copy_from_slice(code);
        page
    }

    #[test]
    fn suspects_of_ordinary_code_are_none() {
        assert_eq!(suspects(&page(&[])), []);
        // mov eax, 15; syscall; rdtsc; mfence; lfence; rdrand eax; int 0x81; int1
        let code = [
            0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x31, 0x0f, 0xae, 0xf0, 0x0f, 0xae, 0xe8, 0x0f,
            0xc7, 0xf0, 0xcd, 0x81, 0xf1,
        ];
        assert_eq!(suspects(&page(&code)), []);
    }

    #[test]
    fn suspects_are_what_is_suspect() {
        for (code, at) in [
            (&[0x0f, 0xa2][..], 100),
            (&[0x0f, 0x01, 0xf9], 100),
            (&[0x66, 0x0f, 0x01, 0xf9], 100),
            (&[0x0f, 0x01, 0xd0], 100),
            (&[0xf3, 0x0f, 0xc7, 0xf8], 100),
            (&[0x0f, 0x03, 0xc0], 100),
            (&[0x0f, 0xc7, 0x21], 100),
            (&[0x0f, 0x01, 0x00], 100),
            (&[0x0f, 0x01, 0xc1], 100),
            (&[0x0f, 0x01, 0xd9], 100),
            (&[0xcd, 0x80], 100),
            // xsavec64 [rsp]
            (&[0x48, 0x0f, 0xc7, 0x24, 0x24], 100),
            (&[0xcd, 0x04], 100),
            // Inside another instruction: mov eax, imm32
            (&[0xb8, 0x90, 0x0f, 0xa2, 0x90], 102),
            (&[0xb8, 0x90, 0x0f, 0xae, 0x20], 102),
        ] {
            assert_eq!(suspects(&page(code)), [at], "{code:x?}");
        }
    }

    #[test]
    fn rdtscp_is_none_where_ecx_is_loaded_before_it_is_read() {
        let behind = |code: &[u8]| suspects(&page(&[&[0x0f, 0x01, 0xf9], code].concat()));
        // xchg ax, ax; shl rdx, 32; or rdx, rax; btr rdx, 63; then mov ecx, [r10 + 36]
        let clock = [
            0x66, 0x90, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xc2, 0x48, 0x0f, 0xba, 0xf2, 0x3f,
        ];
        assert_eq!(
            behind(&[&clock[..], &[0x41, 0x8b, 0x4a, 0x24]].concat()),
            []
        );
        // ret; mov rcx, rdx; xor edx, edx; mov ecx, 1
        assert_eq!(behind(&[&clock[..], &[0xc3]].concat()), []);
        assert_eq!(behind(&[0x48, 0x89, 0xd1]), []);
        assert_eq!(behind(&[0x31, 0xd2, 0xb9, 1, 0, 0, 0]), []);
        for other in [
            // mov [rdi], ecx; mov ecx, ecx; add ecx, eax; mov cl, 1; cmove ecx, eax; shl eax, cl
            &[0x89, 0x0f][..],
            &[0x89, 0xc9],
            &[0x01, 0xc1],
            &[0xb1, 1],
            &[0x0f, 0x44, 0xc8],
            &[0xd3, 0xe0],
            // mov ecx, [rcx]; retf; je +0; syscall; an invalid instruction
            &[0x8b, 0x09],
            &[0xcb],
            &[0x74, 0],
            &[0x0f, 0x05],
            &[0x06],
        ] {
            let code = [other, &[0xb9, 1, 0, 0, 0]].concat();
            assert_eq!(behind(&code), [100], "{other:x?}");
        }
        // It leaves the page, or is found in another instruction: mov eax, imm32.
        let mut last = vec![0x90; 4096];
        last[4090..4093].copy_from_slice(&[0x0f, 0x01, 0xf9]);
        assert_eq!(suspects(&last), [4090]);
        let inside = [0xb8, 0x90, 0x0f, 0x01, 0xf9];
        assert_eq!(suspects(&page(&inside)), [102]);
        assert_eq!(
            suspects(&page(&[&inside[..], &[0xb9, 1, 0, 0, 0]].concat())),
            []
        );
    }

    fn seam(last: &[u8], first: &[u8]) -> Vec<u16> {
        let mut sides = [[0x90; SEAM]; 2];
        sides[0][SEAM - last.len()..].copy_from_slice(last);
        sides[1][..first.len()].copy_from_slice(first);
        across(&sides[0], &sides[1])
    }

    #[test]
    fn across_finds_suspects_in_both_pages_only() {
        for (last, first, at) in [
            (&[0x0f][..], &[0xa2][..], &[13][..]),
            (&[0x0f, 0x01], &[0xf9], &[12]),
            (&[0x0f], &[0xc7, 0x21], &[13]),
            (&[0xf3], &[0x0f, 0xc7, 0xf8], &[13]),
            (&[0x48, 0x0f], &[0xa2], &[12, 13]),
            (&[0xcd], &[0x80], &[13]),
            // A conditional jump, and what one page has alone.
            (&[0x0f], &[0x84, 0, 0, 0, 0], &[]),
            (&[0x0f, 0xa2], &[], &[]),
            (&[], &[0x0f, 0xa2], &[]),
        ] {
            assert_eq!(seam(last, first), at, "{last:x?} {first:x?}");
        }
    }
}
