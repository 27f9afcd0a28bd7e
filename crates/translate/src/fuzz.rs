//! Any bytes as guest code: what must hold of every translation, checked on the host code itself.

use iced_x86::{
    Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use crate::block::{Placement, Request};
use crate::emit::Translator;
use crate::insn::gpr;
use crate::layout::{FrameLayout, Mode, Stubs, WINDOW, WINDOW_DISPLACEMENT};
use crate::relocate::Move;
use crate::sight::Sight;

const PAGE: usize = 4096;
/// Bytes that one check may be for, at most.
const GROUP_SPAN: u64 = 256;
const PLACE: Placement = Placement {
    hot: 0x10_0000,
    cold: 0x80_0000,
};

/// A frame whose fields lie apart, in the order of their size.
pub(crate) const LAYOUT: FrameLayout = FrameLayout {
    gpr: 0,
    rip: 0x80,
    flags: 0x88,
    irq_pending: 0x8a,
    busy: 0x8b,
    turn_back: 0x8c,
    interrupt_flag: 0x90,
    ac_flag: 0x94,
    rest_flags: 0x98,
    jump_bases: [0xa0, 0xa4],
    selectors: [0xb0, 0xc0, 0xd0, 0xe0, 0xf0, 0x100],
    seg_base: [0x110, 0x120, 0x130, 0x140, 0x150, 0x160],
    cs_ss: [0x170, 0x180],
    syscall_cs_ss: [0x190, 0x1a0],
    sysret_cs_ss: [0x1b0, 0x1c0],
    lstar: 0x1d0,
    sfmask: 0x1d8,
    kernel_gs_base: 0x1e0,
    tsc_aux: 0x1e8,
    exit_arg: 0x1f0,
    exit_info: 0x1f4,
    exit_ea: 0x1f8,
    exit_chain: 0x210,
    held: 0x218,
    jump_masks: [0x200, 0x2c0, 0x2c8],
    window_mask: 0x7f00,
    operand: 0x208,
    cr2: 0x2a0,
    cr3: 0x2a8,
    gdt: 0x2b0,
    nmi_blocked: 0x2bc,
    interrupt_shadow: 0x2bd,
    pauses_left: 0x210,
    kernel_visits: 0x214,
    jumps: [0x1_0000, 0x9_0000, 0xc_0000],
    tlb: [0xa_0000, 0xd_0000, 0x10_0000],
};

/// Translates `data` as guest code and panics where a translation breaks a rule: two bytes choose the mode, two the place in the page.
pub fn fuzz_translate(data: &[u8]) {
    let Some((head, code)) = data.split_at_checked(4) else {
        return;
    };
    let choice = u16::from_le_bytes([head[0], head[1]]);
    let mode = Mode(choice & (0x1ff | Mode::AVX512));
    let connected = choice & 0x8000 != 0;
    let offset = usize::from(u16::from_le_bytes([head[2], head[3]])) % PAGE;
    let room = PAGE - offset;
    let pc = if mode.has(Mode::LONG) {
        0xffff_ffff_8100_0000 + offset as u64
    } else {
        0x0804_8000 + offset as u64
    };
    let sighted = choice & 0x4000 != 0;
    // Half of all addresses are shown.
    let shows = |gva: u64| (gva >> 12).count_ones().is_multiple_of(2);
    let sight = Sight {
        gpr: &[0xffff_8880_0123_4000; 16],
        gs_base: 0xffff_8880_0765_4000,
        shows: &shows,
        open: choice & 0x2000 != 0,
        elsewhere: None,
    };
    let mut translator = Translator::new(LAYOUT, Stubs::default());
    let mut request = Request {
        bytes: &code[..code.len().min(room)],
        crossing: false,
        pc,
        mode,
        place: PLACE,
        connected,
        sight: sighted.then_some(sight),
    };
    let mut made = translator.translate(&request);
    if made.is_none() && code.len() > room {
        request.bytes = code;
        request.crossing = true;
        made = translator.translate(&request);
    }
    let Some(t) = made else {
        return;
    };
    assert!(!t.diverts.is_empty());
    for divert in &t.diverts {
        assert_eq!(divert.entry % 8, 0, "an entry is not aligned");
        assert_eq!(
            t.code[divert.entry as usize..][..5],
            [0x0f, 0x1f, 0x44, 0, 0],
            "an entry cannot be diverted"
        );
        assert!(divert.stub >= t.hot && (divert.stub as usize) < t.code.len());
    }
    assert!(
        t.side.windows(2).all(|w| w[0].host < w[1].host),
        "the side table is not ascending"
    );
    for c in &t.chains {
        assert_eq!(c.at % 4, 0, "a displacement is not aligned");
        assert!(usize::from(c.at) + 4 <= t.code.len());
        assert_eq!(c.exit % 4, 0, "a displacement is not aligned");
        assert!(!c.leaves_page() || t.code[usize::from(c.exit) - 1] == 0xe9);
    }
    if !request.crossing && mode.has(Mode::LONG) && mode.has(Mode::USER) {
        for (from, to) in MOVES {
            check_copy(&mut translator, &request, from, to);
        }
    }
    let mut decoder = Decoder::with_ip(64, &t.code, PLACE.hot.into(), DecoderOptions::NONE);
    let mut places = 0;
    while decoder.can_decode() {
        let i = decoder.decode();
        check(&i, places);
        places = places_after(&i, places);
    }
}

/// Pages from which and to which copies of translations are made.
const MOVES: [(u64, u64); 3] = [
    (0x55d4_1f3a_7000, 0x7f02_aabb_c000),
    (0x7fff_ffff_f000 - (1 << 33), 0x2_0000_0000),
    (0x5640_0000_0000, 0x5640_0000_1000),
];

/// Panics where a copy of the translation for one page is not the translation for another.
fn check_copy(translator: &mut Translator, request: &Request<'_>, from: u64, to: u64) {
    let offset = request.pc % PAGE as u64;
    let mut at = |pc: u64, place: Placement| {
        let request = Request {
            pc: pc + offset,
            place,
            ..*request
        };
        translator.translate(&request).expect("whole instructions")
    };
    let other = Placement {
        hot: PLACE.hot + 0x51_2340,
        cold: PLACE.cold + 0x12_3450,
    };
    let (mut copy, made) = (at(from, PLACE), at(to, other));
    let moved = Move::new(from + offset, to + offset, PLACE, other);
    let moved = moved.expect("both are user addresses");
    if made.places.is_empty() {
        assert!(copy.places.is_empty(), "only one of two can be copied");
        return;
    }
    let (hot, cold) = copy.code.split_at_mut(copy.hot as usize);
    moved.apply(hot, cold, &made.places, &LAYOUT);
    assert_eq!(copy, made, "a copy differs from a translation");
}

/// Which general registers point into the kernel window, behind an instruction.
fn places_after(i: &Instruction, places: u16) -> u16 {
    let mut factory = InstructionInfoFactory::new();
    let written = factory.info(i).used_registers().iter().filter(|r| {
        !matches!(
            r.access(),
            OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
        )
    });
    let written = written.filter_map(|r| gpr(r.register()));
    let kept = written.fold(places, |left, r| left & !(1 << r));
    let by_mask = i.mnemonic() == Mnemonic::Pext
        && i.memory_segment() == Register::GS
        && i.memory_displacement64() == LAYOUT.window_mask as u64;
    let constant = i.mnemonic() == Mnemonic::Mov
        && i.op1_kind() == OpKind::Immediate64
        && WINDOW.contains(&i.immediate64());
    let made = gpr(i.op0_register()).filter(|_| by_mask || constant);
    kept | made.map_or(0, |r| 1 << r)
}

/// Panics on host code that could reach what is not the guest's. `places`: registers that point into the kernel window.
fn check(i: &Instruction, places: u16) {
    use Mnemonic as M;
    assert!(
        !i.is_invalid(),
        "host code does not decode at {:#x}",
        i.ip()
    );
    let op = i.op_code();
    assert!(
        !op.is_privileged() && !op.is_save_restore(),
        "{:?} in host code",
        i.code()
    );
    assert!(
        !matches!(
            i.mnemonic(),
            M::Syscall
                | M::Sysenter
                | M::Int
                | M::Int1
                | M::Int3
                | M::Into
                | M::In
                | M::Out
                | M::Popf
                | M::Popfq
                | M::Pushfq
                | M::Push
                | M::Pop
                | M::Call
                | M::Ret
                | M::Retf
                | M::Iret
                | M::Iretq
                | M::Std
                | M::Cpuid
                | M::Wrfsbase
                | M::Wrgsbase
                | M::Xgetbv
                | M::Wrpkru
                | M::Xlatb
                | M::Maskmovq
                | M::Maskmovdqu
                | M::Clzero
        ),
        "{:?} in host code",
        i.code()
    );
    for n in 0..i.op_count() {
        if i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register() {
            panic!("{:?} touches a segment register", i.code());
        }
        if i.op_kind(n) != OpKind::Memory || matches!(i.mnemonic(), M::Lea | M::Nop) {
            continue;
        }
        let (base, index) = (i.memory_base(), i.memory_index());
        match i.memory_segment() {
            // The frame: at a fixed place, or indexed by what was masked just before.
            Register::GS => assert!(
                base == Register::None || index == Register::None,
                "an open frame access"
            ),
            Register::FS => panic!("the thread's own data is accessed"),
            // Behind a place in the kernel window, or near it.
            _ if gpr(base).is_some_and(|r| places >> r & 1 != 0) => assert!(
                index == Register::None
                    && (i.memory_displacement64() as i64).unsigned_abs() <= WINDOW_DISPLACEMENT,
                "an operand far from the kernel window: {:?}",
                i.code()
            ),
            // Guest memory: at an address that a check has made, or behind it in the range that the check was for.
            _ => assert!(
                base.is_gpr64()
                    && index == Register::None
                    && i.memory_displacement64() < GROUP_SPAN,
                "an operand that no check has made: {:?}",
                i.code()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50_000))]

        #[test]
        fn translate_any_bytes_keeps_the_rules(
            head in any::<[u8; 4]>(),
            code in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut data = head.to_vec();
            data.extend(code);
            super::fuzz_translate(&data);
        }

        #[test]
        fn translate_common_opcodes_keeps_the_rules(
            user in any::<bool>(),
            code in prop::collection::vec(
                prop::sample::select(vec![
                    0x0f, 0x48, 0x66, 0x67, 0xf3, 0xf2, 0x65, 0x64, 0x8b, 0x89, 0x01, 0xa4, 0xa5, 0xab, 0x50, 0x58, 0x5c, 0xe8, 0xeb, 0x74,
                    0xff, 0xc3, 0xc9, 0xae, 0xa3, 0xab, 0xba, 0x05, 0x07, 0x10, 0x28, 0xc5, 0xc4, 0xdd, 0x9d, 0x9c, 0xfa, 0xfb, 0x8e, 0x8c,
                    0x04, 0x24, 0x80, 0x00, 0x1e, 0xe3,
                ]),
                1..60,
            ),
        ) {
            let mut data = vec![if user { 0x7b } else { 0x79 }, 1, 0, 1];
            data.extend(code);
            super::fuzz_translate(&data);
        }
    }
}
