//! What comes out for small blocks: how many checks and saves of the flags, which a wrong turn in the emitter would multiply unnoticed.

use iced_x86::{Decoder, DecoderOptions, Mnemonic};

use crate::fuzz::LAYOUT;
use crate::{Mode, Placement, Request, Sight, Stubs, Translator};

const USER: u16 = Mode::LONG | Mode::USER;

/// Mnemonics of the host code between the direct entry and its first unconditional jump.
fn hot(mode: u16, guest: &[&[u8]]) -> Vec<Mnemonic> {
    hot_with(mode, guest, None)
}

fn hot_with(mode: u16, guest: &[&[u8]], sight: Option<Sight<'_>>) -> Vec<Mnemonic> {
    let bytes = guest.concat();
    let made = Translator::new(LAYOUT, Stubs::default())
        .translate(&Request {
            bytes: &bytes,
            crossing: false,
            pc: 0x40_0000,
            mode: Mode(mode),
            place: Placement {
                hot: 0x1_0000,
                cold: 0x8_0000,
            },
            connected: true,
            sight,
        })
        .expect("whole instructions");
    let code = &made.code[made.direct_entry as usize..];
    Decoder::with_ip(64, code, 0, DecoderOptions::NONE)
        .into_iter()
        .map(|i| i.mnemonic())
        .take_while(|m| *m != Mnemonic::Jmp)
        .collect()
}

fn count(host: &[Mnemonic], m: Mnemonic) -> usize {
    host.iter().filter(|h| **h == m).count()
}

fn checks(mode: u16, guest: &[&[u8]]) -> usize {
    count(&hot(mode, guest), Mnemonic::Ja)
}

const PUSH_RBP: &[u8] = &[0x55];
const MOV_RBP_RSP: &[u8] = &[0x48, 0x89, 0xe5];
const PUSH_RBX: &[u8] = &[0x53];
const SUB_RSP_24: &[u8] = &[0x48, 0x83, 0xec, 0x18];
const ADD_RSP_24: &[u8] = &[0x48, 0x83, 0xc4, 0x18];
const STORE_RBP_LOCAL: &[u8] = &[0x89, 0x7d, 0xec];
const LOAD_RSP_LOCAL: &[u8] = &[0x8b, 0x44, 0x24, 0x0c];
const POP_RBX: &[u8] = &[0x5b];
const POP_RBP: &[u8] = &[0x5d];
const RET: &[u8] = &[0xc3];
const LOAD_RDI: &[u8] = &[0x48, 0x8b, 0x07];
const LOAD_RDI_8: &[u8] = &[0x48, 0x8b, 0x57, 0x08];
const LOAD_RDI_512: &[u8] = &[0x48, 0x8b, 0x8f, 0, 2, 0, 0];
const ADC_RDI_8: &[u8] = &[0x48, 0x13, 0x47, 0x08];
const ADC_RDI_16: &[u8] = &[0x48, 0x13, 0x47, 0x10];
const LOAD_RSI_RDI: &[u8] = &[0x48, 0x8b, 0x37];
const LOAD_RSI_8: &[u8] = &[0x48, 0x8b, 0x46, 0x08];
const STAC: &[u8] = &[0x0f, 0x01, 0xcb];

#[test]
fn translate_a_stack_frame_checks_it_once() {
    let code = [
        PUSH_RBP,
        MOV_RBP_RSP,
        PUSH_RBX,
        SUB_RSP_24,
        STORE_RBP_LOCAL,
        LOAD_RSP_LOCAL,
        ADD_RSP_24,
        POP_RBX,
        POP_RBP,
        RET,
    ];
    assert_eq!(checks(USER, &code), 1);
    // Seven accesses.
    assert_eq!(checks(USER | Mode::SINGLE, &code), 7);
}

#[test]
fn translate_what_the_window_shows_needs_no_check() {
    let mut gpr = [0; 16];
    // RDI points to what is shown, RSP and RSI do not.
    gpr[7] = 0xffff_8880_0000_1000;
    let shows = |gva: u64| gva >> 39 == gpr[7] >> 39;
    let mut elsewhere = [0; 64];
    let look = |mode, guest: &[&[u8]], elsewhere: &[u64; 64]| {
        let sight = Sight {
            gpr: &gpr,
            gs_base: 0,
            shows: &shows,
            open: true,
            elsewhere: Some(elsewhere),
        };
        let host = hot_with(mode, guest, Some(sight));
        (count(&host, Mnemonic::Pext), count(&host, Mnemonic::Ja))
    };
    let kernel = Mode::LONG;
    let known = [LOAD_RDI, LOAD_RDI_8, LOAD_RDI_512, LOAD_RSI_8];
    assert_eq!(look(kernel, &known, &elsewhere), (1, 1));
    assert_eq!(look(kernel | Mode::AC, &known, &elsewhere), (0, 3));
    assert_eq!(look(USER, &known, &elsewhere), (0, 3));
    // What the first load brings is guessed.
    let loaded = [LOAD_RSI_RDI, LOAD_RSI_8];
    assert_eq!(look(kernel, &loaded, &elsewhere), (2, 0));
    assert_eq!(look(kernel, &[LOAD_RSP_LOCAL], &elsewhere), (0, 1));
    assert_eq!(
        look(kernel, &[LOAD_RDI, STAC, LOAD_RDI_8], &elsewhere),
        (1, 1)
    );
    // The second instruction has faulted.
    elsewhere[0] = 1 << LOAD_RSI_RDI.len();
    assert_eq!(look(kernel, &loaded, &elsewhere), (1, 1));
    // No flags are saved for what needs no check.
    let add: &[u8] = &[0x48, 0x01, 0xd0];
    let je: &[u8] = &[0x74, 0x10];
    let sight = Sight {
        gpr: &gpr,
        gs_base: 0,
        shows: &shows,
        open: true,
        elsewhere: None,
    };
    let code = [add, LOAD_RDI_8, je];
    let host = hot_with(kernel, &code, Some(sight));
    assert_eq!(count(&host, Mnemonic::Lahf), 0);
    assert_eq!(count(&hot(kernel, &code), Mnemonic::Lahf), 1);
}

#[test]
fn translate_far_or_unrelated_accesses_checks_each() {
    assert_eq!(checks(USER, &[LOAD_RDI, LOAD_RDI_512, RET]), 3);
    // The second address is what the first load brings.
    assert_eq!(checks(USER, &[LOAD_RSI_RDI, LOAD_RSI_8]), 2);
}

#[test]
fn translate_access_after_a_change_of_rights_checks_again() {
    assert_eq!(checks(Mode::LONG, &[LOAD_RDI, LOAD_RDI_8]), 1);
    assert_eq!(checks(Mode::LONG, &[LOAD_RDI, STAC, LOAD_RDI_8]), 2);
}

#[test]
fn translate_group_does_not_begin_in_the_shadow_of_sti() {
    let sti: &[u8] = &[0xfb];
    assert_eq!(checks(Mode::LONG, &[LOAD_RDI, LOAD_RDI_8]), 1);
    assert_eq!(checks(Mode::LONG, &[sti, LOAD_RDI, LOAD_RDI_8]), 2);
}

#[test]
fn translate_what_overwrites_its_own_operand_is_left_to_the_engine() {
    // CALL and PUSH of what lies below the stack pointer, whole and in part; the whole word again is what PUSH writes anyhow.
    let call = |disp: i8| [0xff, 0x54, 0x24, disp as u8];
    let push = |disp: i8| [0xff, 0x74, 0x24, disp as u8];
    for disp in [-15, -8, -1] {
        assert_eq!(checks(USER, &[&call(disp)]), 0, "{disp}");
    }
    for disp in [-15, -9, -7, -1] {
        assert_eq!(checks(USER, &[&push(disp)]), 0, "{disp}");
    }
    for disp in [-16, 0, 8] {
        assert_ne!(checks(USER, &[&call(disp)]), 0, "{disp}");
        assert_ne!(checks(USER, &[&push(disp)]), 0, "{disp}");
    }
    assert_ne!(checks(USER, &[&push(-8)]), 0);
}

#[test]
fn translate_carry_chain_through_memory_saves_no_flags() {
    // ADD RAX, RDX between makes the flags before it dead and those behind it live.
    let add: &[u8] = &[0x48, 0x01, 0xd0];
    let host = hot(
        USER | Mode::FPU,
        &[LOAD_RDI_8, add, ADC_RDI_8, ADC_RDI_16, &[0x0f, 0x0b]],
    );
    assert_eq!(count(&host, Mnemonic::Ja), 1);
    assert_eq!(count(&host, Mnemonic::Lahf), 0);
    assert_eq!(count(&host, Mnemonic::Adc), 2);
}

#[test]
fn translate_logic_and_shifts_need_no_flags_from_before() {
    let xor_eax: &[u8] = &[0x31, 0xc0];
    let test_rdi: &[u8] = &[0x48, 0x85, 0xff];
    let shr_rdi_4: &[u8] = &[0x48, 0xc1, 0xef, 0x04];
    let je: &[u8] = &[0x74, 0x10];
    for kills in [xor_eax, test_rdi, shr_rdi_4] {
        // Its access comes before they are overwritten.
        let host = hot(USER, &[LOAD_RDI, kills, je]);
        assert_eq!(count(&host, Mnemonic::Lahf), 0, "{kills:x?}");
    }
    // A multiplication may keep some of them, and a shift by nothing all.
    for keeps in [&[0x48, 0x0f, 0xaf, 0xc7][..], &[0x48, 0xc1, 0xef, 0x00]] {
        let host = hot(USER, &[LOAD_RDI, keeps, je]);
        assert_eq!(count(&host, Mnemonic::Lahf), 1, "{keeps:x?}");
    }
}

#[test]
fn translate_held_access_is_one_instruction() {
    let one = hot(USER, &[LOAD_RDI, LOAD_RDI_8]);
    let two = hot(USER, &[LOAD_RDI, LOAD_RDI_8, &[0x48, 0x8b, 0x57, 0x10]]);
    assert_eq!(two.len(), one.len() + 1);
}

/// vmovups zmm17, [rdi]; vaddps zmm17, zmm17, [rdi+64]
const WIDE: &[&[u8]] = &[
    &[0x62, 0xe1, 0x7c, 0x48, 0x10, 0x0f],
    &[0x62, 0xe1, 0x74, 0x40, 0x58, 0x4f, 0x01],
];
/// vmovups [rdi+64]{k1}, zmm17
const MASKED_STORE: &[u8] = &[0x62, 0xe1, 0x7c, 0x49, 0x11, 0x4f, 0x01];

#[test]
fn translate_avx512_only_where_it_may_be_used() {
    let narrow = hot(USER | Mode::FPU | Mode::AVX, WIDE);
    assert_eq!(count(&narrow, Mnemonic::Vmovups), 0);
    let wide = USER | Mode::FPU | Mode::AVX | Mode::AVX512;
    let host = hot(wide, WIDE);
    assert_eq!(count(&host, Mnemonic::Vmovups), 1);
    assert_eq!(count(&host, Mnemonic::Vaddps), 1);
    assert_eq!(count(&host, Mnemonic::Ja), 1, "both loads share a check");
    let masked = [WIDE[0], WIDE[1], MASKED_STORE].concat();
    // What the mask leaves out must not be checked with the loads.
    assert_eq!(checks(wide, &[&masked]), 2);
}

#[test]
fn translate_iret_of_a_kernel_stays_in_translated_code() {
    const IRETQ: &[u8] = &[0x48, 0xcf];
    // One check for what is popped, one for the descriptors, one for RIP and two for the selectors.
    let host = hot(Mode::LONG, &[IRETQ]);
    assert_eq!(count(&host, Mnemonic::Ja), 5);
    assert_eq!(count(&host, Mnemonic::Pext), 1);
    for mode in [Mode::LONG | Mode::AC, USER] {
        assert_eq!(count(&hot(mode, &[IRETQ]), Mnemonic::Pext), 0);
    }
}

/// An instruction that the engine executes ends a block.
#[test]
fn translate_a_read_of_the_fault_address_goes_on() {
    const MOV_RDI_CR2: &[u8] = &[0x0f, 0x20, 0xd7];
    const MOV_AX_ES: &[u8] = &[0x66, 0x8c, 0xc0];
    let host = hot(Mode::LONG, &[MOV_RDI_CR2, MOV_AX_ES, ADD_RSP_24]);
    assert_eq!(count(&host, Mnemonic::Add), 1);
    let host = hot(USER, &[MOV_RDI_CR2, ADD_RSP_24]);
    assert_eq!(count(&host, Mnemonic::Add), 0);
}
