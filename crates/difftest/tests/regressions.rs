//! One small program for each bug that was found. Each states how it ends; everything else is what the processor makes of it.

use hospes_difftest::forms::Level;
use hospes_difftest::layout::{CODE, DATA, LOW, PAGE, PATCHABLE, READ_ONLY, STACK};
use hospes_difftest::program::{Flavour, Program, What};
use hospes_difftest::rng::Rng;
use hospes_difftest::runner::Runner;
use hospes_difftest::state::{Ending, Regs};

const RAX: usize = 0;
const RCX: usize = 1;
const RBX: usize = 3;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

/// The page behind the data and the read-only page is missing.
const MISSING: u64 = LOW + READ_ONLY + PAGE;
const MIDDLE: u64 = LOW + DATA + 2 * PAGE;

/// Exceptions.
const BREAKPOINT: u8 = 3;
const UNDEFINED: u8 = 6;
const PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;
const X87: u8 = 16;

fn program(flavour: Flavour, code: &[&[u8]], registers: &[(usize, u64)]) -> Program {
    let mut regs = Regs::random(Level::V3, &mut Rng::new(code[0][0].into()));
    regs.fpu.fcw = 0x37f;
    regs.fpu.mxcsr = 0x1f80;
    regs.rflags = 0x202;
    regs.gpr[4] = LOW + STACK + PAGE;
    for &(r, v) in registers {
        regs.gpr[r] = v;
    }
    let mut p = Program::new(flavour, LOW + CODE, regs);
    for bytes in code {
        p.push(What::Bytes(bytes.to_vec()));
    }
    p
}

fn agrees(p: &Program) -> (u8, u64) {
    match Runner::new(Level::V3).unwrap().check(p).unwrap() {
        Ok(Ending::Exception { vector, cr2, .. }) => (vector, cr2),
        Ok(other) => panic!("{other:?}\n{}", p.describe()),
        Err(text) => panic!("{text}"),
    }
}

fn user(code: &[&[u8]], registers: &[(usize, u64)]) -> Program {
    program(Flavour::User64, code, registers)
}

/// `bts [rbx], rax` sets a bit of the next page.
#[test]
fn bit_number_in_a_register_reaches_another_page() {
    let p = user(
        &[&[0x48, 0x0f, 0xab, 0x03]],
        &[(RBX, LOW + DATA + 64), (RAX, 8 * PAGE + 5)],
    );
    assert_eq!(agrees(&p), (BREAKPOINT, 0));
}

/// `bt [rbx], rax` looks far behind everything.
#[test]
fn bit_number_in_a_register_reaches_a_missing_page() {
    let p = user(
        &[&[0x48, 0x0f, 0xa3, 0x03]],
        &[(RBX, LOW + DATA), (RAX, 8 * (MISSING - LOW - DATA))],
    );
    assert_eq!(agrees(&p), (PAGE_FAULT, MISSING));
}

/// `movaps xmm0, [rbx]` is checked for alignment before the page is looked at.
#[test]
fn unaligned_operand_on_a_missing_page_is_a_protection_fault() {
    let p = user(&[&[0x0f, 0x28, 0x03]], &[(RBX, MISSING + 8)]);
    assert_eq!(agrees(&p), (PROTECTION, 0));
}

/// `std; rep stosd` downwards in a missing page names the highest element.
#[test]
fn repeated_store_downwards_names_its_first_element() {
    let p = user(&[&[0xfd], &[0xf3, 0xab]], &[(RDI, MISSING + 256), (RCX, 8)]);
    assert_eq!(agrees(&p), (PAGE_FAULT, MISSING + 256));
}

/// `maskmovq mm0, mm1` enters MMX mode though its store faults.
#[test]
fn masked_mmx_store_that_faults_changes_the_x87_state() {
    let p = user(
        &[&[0x0f, 0x76, 0xc9], &[0x0f, 0xf7, 0xc1]],
        &[(RDI, MISSING)],
    );
    assert_eq!(agrees(&p), (PAGE_FAULT, MISSING));
}

/// `vpgatherdd xmm0, [rbx+xmm1*4], xmm2` with all mask bits set; the third element is missing.
#[test]
fn gather_that_faults_halfway_keeps_the_elements_before() {
    let mut p = user(
        &[
            &[0xc5, 0xe9, 0x76, 0xd2],
            &[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x8b],
        ],
        &[(RBX, MISSING - 8)],
    );
    p.regs.fpu.zmm[1] = [0; 64];
    for lane in 0..4 {
        p.regs.fpu.zmm[1][4 * lane] = lane as u8;
    }
    assert_eq!(agrees(&p), (PAGE_FAULT, MISSING));
}

/// `0F 0D` with a register is a NOP or undefined, by the processor's vendor.
#[test]
fn prefetch_hint_with_a_register_is_what_the_processor_says() {
    let (vector, _) = agrees(&user(&[&[0x0f, 0x0d, 0xc1]], &[]));
    assert!(vector == BREAKPOINT || vector == UNDEFINED);
}

/// `push es` in 32-bit code: the upper half of the slot.
#[test]
fn pushed_selector_fills_its_slot_as_the_processor_does() {
    let p = program(Flavour::User32, &[&[0x06]], &[]);
    assert_eq!(agrees(&p), (BREAKPOINT, 0));
}

/// `vzeroupper` and `vzeroall` in 32-bit code leave YMM8-15 alone.
#[test]
fn vector_clears_of_32_bit_code_spare_the_upper_registers() {
    for opcode in [0xf8, 0xfc] {
        let p = program(Flavour::User32, &[&[0xc5, opcode, 0x77]], &[]);
        assert_eq!(agrees(&p), (BREAKPOINT, 0));
    }
}

/// `xsave [ebx]; xrstor [ebx]` in 32-bit code likewise.
#[test]
fn saved_state_of_32_bit_code_spares_the_upper_registers() {
    let p = program(
        Flavour::User32,
        &[
            &[0x31, 0xd2],
            &[0xb8, 6, 0, 0, 0],
            &[0x0f, 0xae, 0x23],
            &[0xc5, 0xf5, 0xef, 0xc9],
            &[0x0f, 0xae, 0x2b],
            // The mask of MXCSR is the processor's own.
            &[0xc7, 0x43, 0x1c, 0, 0, 0, 0],
        ],
        &[(RBX, MIDDLE)],
    );
    let mut p = p;
    p.patches.push((MIDDLE + 512, vec![0; 64]));
    assert_eq!(agrees(&p), (BREAKPOINT, 0));
}

/// `leave` with RBP at the very top: the access begins on a page that is missing.
#[test]
fn access_that_wraps_around_the_top_is_a_page_fault() {
    let p = user(&[&[0xc9]], &[(RBP, u64::MAX)]);
    assert_eq!(agrees(&p), (PAGE_FAULT, u64::MAX));
}

/// `pushfq` as the first instruction behind an IRET that has loaded RF.
#[test]
fn pushed_flags_do_not_show_the_resume_flag() {
    let mut p = user(&[&[0x9c]], &[]);
    p.regs.rflags |= 1 << 16;
    assert_eq!(agrees(&p), (BREAKPOINT, 0));
}

/// `fldz; fld1; fdivrp; pmovmskb eax, mm0` with x87 exceptions unmasked.
#[test]
fn pending_x87_exception_at_an_mmx_instruction_is_a_floating_point_error() {
    let mut p = user(
        &[
            &[0xdb, 0xe2],
            &[0xd9, 0xe8],
            &[0xd9, 0xee],
            &[0xde, 0xf9],
            &[0x0f, 0xd7, 0xc0],
        ],
        &[],
    );
    p.regs.fpu.fcw = 0x340;
    p.regs.fpu.fsw = 0;
    p.regs.fpu.tags = 0;
    assert_eq!(agrees(&p), (X87, 0));
}

/// `movsq` from a missing page to a missing page reads first.
#[test]
fn string_move_reads_before_it_writes() {
    let p = user(&[&[0x48, 0xa5]], &[(RSI, MISSING + 64), (RDI, 0x40)]);
    assert_eq!(agrees(&p), (PAGE_FAULT, MISSING + 64));
}

/// `rep movsw` from an address that matches empty TLB entries.
#[test]
fn string_move_from_the_empty_tag_shows_no_host_address() {
    let p = user(
        &[&[0x66, 0xf3, 0xa5]],
        &[(RSI, 1 << 63), (RDI, MIDDLE), (RCX, 8)],
    );
    assert_eq!(agrees(&p), (PROTECTION, 0));
}

/// `mov cs:[ebx], eax` and `mov eax, fs:[ebx]` with a null selector, in 32-bit code.
#[test]
fn segments_of_32_bit_code_that_must_not_be_used_fault() {
    for prefix in [[0x2e, 0x89], [0x64, 0x8b]] {
        let code: &[&[u8]] = &[&[prefix[0], prefix[1], 0x03]];
        let p = program(Flavour::User32, code, &[(RBX, MIDDLE)]);
        assert_eq!(agrees(&p), (PROTECTION, 0));
    }
}

/// `mov eax, ss:[rbx]` at an address that is not canonical.
#[test]
fn stack_override_in_64_bit_code_makes_no_stack_fault() {
    let p = user(&[&[0x36, 0x8b, 0x03]], &[(RBX, 1 << 62)]);
    assert_eq!(agrees(&p), (PROTECTION, 0));
}

/// `bts gs:[eax], ecx`: bit strings with 32-bit addresses wrap at 4 GiB before the segment's base is added.
#[test]
fn bit_string_with_a_32_bit_address_wraps() {
    let mut p = user(
        &[&[0x65, 0x67, 0x0f, 0xab, 0x08]],
        &[(RAX, 0x100), (RCX, 0xffff_8000)],
    );
    p.regs.gs_base = MIDDLE;
    assert_eq!(agrees(&p), (PAGE_FAULT, MIDDLE + 0xffff_f100));
}

/// A loop jumps by memory to `sub eax, eax; jmp r15`, which needs no flags, and makes `lahf` of its first instruction in the last round but one.
#[test]
fn code_that_replaces_other_code_finds_the_flags_it_is_entered_with() {
    let at = LOW + DATA;
    let regs = user(&[&[0x90]], &[(RBX, at), (RSI, at)]).regs;
    let mut p = Program::new(Flavour::User64, LOW + PATCHABLE, regs);
    let code: [&[u8]; 13] = [
        &[0xb9, 0x06, 0x00, 0x00, 0x00],
        &[0x48, 0x8d, 0x15, 0x0f, 0x00, 0x00, 0x00],
        &[0x48, 0x89, 0x13],
        &[0x4c, 0x8d, 0x3d, 0x0a, 0x00, 0x00, 0x00],
        &[0x83, 0xf9, 0x03],
        &[0xff, 0x26],
        &[0x29, 0xc0],
        &[0x41, 0xff, 0xe7],
        &[0x83, 0xf9, 0x02],
        &[0x75, 0x09],
        &[0x66, 0xc7, 0x05, 0xed, 0xff, 0xff, 0xff, 0x9f, 0x90],
        &[0xff, 0xc9],
        &[0x75, 0xd3],
    ];
    for bytes in code {
        p.push(What::Bytes(bytes.to_vec()));
    }
    assert_eq!(agrees(&p), (BREAKPOINT, 0));
}
