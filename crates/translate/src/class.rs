//! What each instruction form needs before it may be copied, computed once from the decoder's tables.

use std::sync::LazyLock;

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};

/// The state that must be enabled for a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// The engine executes it.
    Step,
    Plain,
    Fpu,
    Avx,
    /// AVX-512, and what only domains with it have.
    Avx512,
    /// It does nothing that a guest could see.
    Nop,
}

/// Class of a form.
pub(crate) fn class_of(code: Code) -> Class {
    CLASSES[code as usize]
}

static CLASSES: LazyLock<Vec<Class>> = LazyLock::new(|| Code::values().map(classify).collect());

fn classify(code: Code) -> Class {
    use Mnemonic as M;
    let op = code.op_code();
    if !op.is_instruction() {
        return Class::Step;
    }
    // The prefetch hints' forms with a register depend on the processor's vendor.
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    ) {
        return Class::Step;
    }
    match code.mnemonic() {
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Reservednop
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchnta
        | M::Prefetchw
        | M::Prefetch
        | M::Prefetchwt1
        | M::Cldemote
        | M::Rdsspq
        | M::Rdsspd => return Class::Nop,
        M::Cpuid
        | M::Rdtsc
        | M::Rdtscp
        | M::Rdpmc
        | M::Rdpid
        | M::Sgdt
        | M::Sidt
        | M::Sldt
        | M::Str
        | M::Smsw
        | M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Xgetbv
        | M::Xsetbv
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Rdpkru
        | M::Wrpkru
        | M::Pushf
        | M::Pushfq
        | M::Pushfd
        | M::Popf
        | M::Popfq
        | M::Popfd
        | M::Cld
        | M::Std
        | M::Fnstenv
        | M::Fldenv
        | M::Fnsave
        | M::Frstor
        | M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::Enter
        | M::Bound
        | M::Arpl
        | M::Xlatb
        | M::Maskmovq
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Vmaskmovps
        | M::Vmaskmovpd
        | M::Vpmaskmovd
        | M::Vpmaskmovq
        | M::Pusha
        | M::Pushad
        | M::Popa
        | M::Popad
        | M::Aaa
        | M::Aas
        | M::Daa
        | M::Das
        | M::Aam
        | M::Aad
        | M::Salc
        | M::Clflush
        | M::Clflushopt
        | M::Clwb
        | M::Wrfsbase
        | M::Wrgsbase
        | M::Rdfsbase
        | M::Rdgsbase
        | M::Loop
        | M::Loope
        | M::Loopne
        | M::Jcxz
        | M::Jecxz
        | M::Jrcxz
        | M::Into
        | M::Serialize
        | M::In
        | M::Out => {
            return Class::Step;
        }
        _ => {}
    }
    if op.is_privileged()
        || op.is_save_restore()
        || (0..op.op_count()).any(|i| {
            use iced_x86::OpCodeOperandKind as K;
            matches!(
                op.op_kind(i),
                K::seg_reg
                    | K::es
                    | K::cs
                    | K::ss
                    | K::ds
                    | K::fs
                    | K::gs
                    | K::cr_reg
                    | K::dr_reg
                    | K::tr_reg
                    | K::mem_vsib32x
                    | K::mem_vsib64x
                    | K::mem_vsib32y
                    | K::mem_vsib64y
                    | K::mem_vsib32z
                    | K::mem_vsib64z
                    | K::sibmem
            )
        })
    {
        return Class::Step;
    }
    if !matches!(
        code.encoding(),
        EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX
    ) {
        return Class::Step;
    }
    let mut class = Class::Plain;
    for feature in code.cpuid_features() {
        use CpuidFeature as F;
        match feature {
            F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL386_ONLY
            | F::INTEL486
            | F::CMOV
            | F::POPCNT
            | F::LZCNT
            | F::BMI1
            | F::BMI2
            | F::ADX
            | F::RDRAND
            | F::RDSEED
            | F::MOVBE
            | F::CMPXCHG16B
            | F::CX8
            | F::X64
            | F::PAUSE
            | F::MULTIBYTENOP => {}
            F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::AES
            | F::PCLMULQDQ
            | F::SHA => {
                class = class.max(Class::Fpu);
            }
            F::AVX | F::AVX2 | F::FMA | F::F16C => class = class.max(Class::Avx),
            F::AVX512F
            | F::AVX512VL
            | F::AVX512BW
            | F::AVX512DQ
            | F::AVX512CD
            | F::AVX512_BF16
            | F::AVX512_BITALG
            | F::AVX512_IFMA
            | F::AVX512_VBMI
            | F::AVX512_VBMI2
            | F::AVX512_VNNI
            | F::AVX512_VPOPCNTDQ
            | F::GFNI
            | F::VAES
            | F::VPCLMULQDQ => class = class.max(Class::Avx512),
            _ => return Class::Step,
        }
    }
    class
}
