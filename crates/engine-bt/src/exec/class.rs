//! What an instruction needs before it may run natively, by its code. Computed once from the decoder's tables.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, Ordering};

use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    InstructionInfoOptions, Mnemonic, OpAccess,
};

/// The state that must be enabled for an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Not offered to guests, or only by semantics of its own.
    Refused,
    /// General registers only.
    Plain,
    /// General registers only, VEX encoded: protected mode.
    PlainVex,
    X87,
    Mmx,
    Sse,
    Avx,
    Avx512,
}

static CLASSES: LazyLock<Vec<Class>> = LazyLock::new(|| Code::values().map(classify).collect());

/// Class of a code.
#[inline]
pub(super) fn class_of(code: Code) -> Class {
    CLASSES[code as usize]
}

fn classify(code: Code) -> Class {
    use CpuidFeature as F;
    let mnemonic = code.mnemonic();
    let mut class = Class::Plain;
    let mut wide = false;
    for &f in code.cpuid_features() {
        let this = match f {
            F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CX8
            | F::CMPXCHG16B
            | F::POPCNT
            | F::LZCNT
            | F::BMI1
            | F::BMI2
            | F::TBM
            | F::ADX
            | F::MOVBE
            | F::RDRAND
            | F::RDSEED
            | F::MOVDIRI
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::RAO_INT
            | F::CMPCCXADD => Class::Plain,
            F::FPU | F::FPU287 | F::FPU387 => Class::X87,
            F::MMX | F::D3NOW | F::D3NOWEXT => Class::Mmx,
            F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSE4A
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::GFNI => Class::Sse,
            F::AVX
            | F::AVX2
            | F::FMA
            | F::FMA4
            | F::XOP
            | F::F16C
            | F::VAES
            | F::VPCLMULQDQ
            | F::AVX_VNNI
            | F::AVX_IFMA
            | F::AVX_NE_CONVERT
            | F::AVX_VNNI_INT8
            | F::AVX_VNNI_INT16
            | F::SHA512
            | F::SM3
            | F::SM4 => Class::Avx,
            F::AVX512F
            | F::AVX512VL
            | F::AVX512BW
            | F::AVX512CD
            | F::AVX512DQ
            | F::AVX512_BF16
            | F::AVX512_BITALG
            | F::AVX512_IFMA
            | F::AVX512_VBMI
            | F::AVX512_VBMI2
            | F::AVX512_VNNI
            | F::AVX512_VP2INTERSECT
            | F::AVX512_VPOPCNTDQ
            | F::AVX512_FP16 => {
                wide = true;
                Class::Avx512
            }
            _ => return Class::Refused,
        };
        if this as u8 > class as u8 {
            class = this;
        }
    }
    // What changes control flow or is privileged has semantics of its own, or none.
    if code.flow_control() != FlowControl::Next
        || code.is_privileged()
        || code.is_stack_instruction()
    {
        return Class::Refused;
    }
    match mnemonic {
        Mnemonic::Wait => return Class::X87,
        // These use no vector state, so neither CR0 nor CR4 disables them.
        Mnemonic::Crc32
        | Mnemonic::Movnti
        | Mnemonic::Lfence
        | Mnemonic::Mfence
        | Mnemonic::Sfence => return Class::Plain,
        _ => {}
    }
    match code.encoding() {
        EncodingKind::VEX | EncodingKind::XOP if class == Class::Plain => Class::PlainVex,
        EncodingKind::VEX if wide => Class::Avx512,
        EncodingKind::VEX | EncodingKind::XOP => Class::Avx,
        EncodingKind::EVEX => Class::Avx512,
        EncodingKind::MVEX => Class::Refused,
        _ => class,
    }
}

/// What an instruction does with its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum MemAccess {
    None = 1,
    Read = 2,
    Write = 3,
}

static ACCESSES: LazyLock<Vec<AtomicU8>> =
    LazyLock::new(|| Code::values().map(|_| AtomicU8::new(0)).collect());

/// How the instruction uses its memory operand, which is operand `k`. Remembered per code.
pub(super) fn mem_access(i: &Instruction, k: u32) -> MemAccess {
    let slot = &ACCESSES[i.code() as usize];
    match slot.load(Ordering::Relaxed) {
        1 => MemAccess::None,
        2 => MemAccess::Read,
        3 => MemAccess::Write,
        _ => {
            let a = look_up_access(i, k);
            slot.store(a as u8, Ordering::Relaxed);
            a
        }
    }
}

#[cold]
fn look_up_access(i: &Instruction, k: u32) -> MemAccess {
    let options =
        InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
    let mut factory = InstructionInfoFactory::new();
    match factory.info_options(i, options).op_access(k) {
        OpAccess::None | OpAccess::NoMemAccess => MemAccess::None,
        OpAccess::Read | OpAccess::CondRead => MemAccess::Read,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
            MemAccess::Write
        }
    }
}

/// The form of an instruction that 64-bit hosts can encode, where the guest used one of 16- and 32-bit modes alone.
pub(super) fn encodable(code: Code) -> Option<Code> {
    Some(match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        _ => return None,
    })
}
