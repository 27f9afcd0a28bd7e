//! Every instruction form that a guest of x86-64-v3, or of -v4 with what usually comes with it, may use and that means the same in the oracle's process.

use std::sync::LazyLock;

use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Mnemonic, OpCodeOperandKind};

/// What the guest's processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// x86-64-v3.
    V3,
    /// With AVX-512.
    V4,
}

impl Level {
    /// XCR0 of a guest that uses all of it.
    pub fn xcr0(self) -> u64 {
        match self {
            Level::V3 => 7,
            Level::V4 => 0xe7,
        }
    }

    /// Whether this machine can be the oracle.
    pub fn on_host(self) -> bool {
        match self {
            Level::V3 => std::is_x86_feature_detected!("avx2"),
            Level::V4 => ["f", "bw", "cd", "dq", "vl"].iter().all(|n| avx512(n)),
        }
    }
}

/// Whether the host has this part of AVX-512, by the second half of its name.
fn avx512(name: &str) -> bool {
    match name {
        "f" => std::is_x86_feature_detected!("avx512f"),
        "bw" => std::is_x86_feature_detected!("avx512bw"),
        "cd" => std::is_x86_feature_detected!("avx512cd"),
        "dq" => std::is_x86_feature_detected!("avx512dq"),
        "vl" => std::is_x86_feature_detected!("avx512vl"),
        _ => false,
    }
}

/// Features that come with x86-64-v4, where the host has them.
fn wide(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::AVX512F => avx512("f"),
        F::AVX512BW => avx512("bw"),
        F::AVX512CD => avx512("cd"),
        F::AVX512DQ => avx512("dq"),
        F::AVX512VL => avx512("vl"),
        F::AVX512_BF16 => std::is_x86_feature_detected!("avx512bf16"),
        F::AVX512_BITALG => std::is_x86_feature_detected!("avx512bitalg"),
        F::AVX512_IFMA => std::is_x86_feature_detected!("avx512ifma"),
        F::AVX512_VBMI => std::is_x86_feature_detected!("avx512vbmi"),
        F::AVX512_VBMI2 => std::is_x86_feature_detected!("avx512vbmi2"),
        F::AVX512_VNNI => std::is_x86_feature_detected!("avx512vnni"),
        F::AVX512_VPOPCNTDQ => std::is_x86_feature_detected!("avx512vpopcntdq"),
        F::GFNI => std::is_x86_feature_detected!("gfni"),
        F::VAES => std::is_x86_feature_detected!("vaes"),
        F::VPCLMULQDQ => std::is_x86_feature_detected!("vpclmulqdq"),
        _ => false,
    }
}

/// Whether only guests of x86-64-v4 have it.
pub fn is_wide(code: Code) -> bool {
    code.cpuid_features().iter().any(|&f| wide(f))
}

/// How a form is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Alone and inside of blocks.
    Anywhere,
    /// Alone: it faults, or needs registers set up for it.
    Alone,
    No,
}

fn offered(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL386_ONLY
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CX8
            | F::CMPXCHG16B
            | F::POPCNT
            | F::LZCNT
            | F::BMI1
            | F::BMI2
            | F::ADX
            | F::MOVBE
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::FPU
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
            | F::SHA
            | F::PCLMULQDQ
            | F::AVX
            | F::AVX2
            | F::FMA
            | F::F16C
            | F::FXSR
            | F::XSAVE
            | F::XSAVEC
            | F::XSAVEOPT
            | F::FSGSBASE
            | F::CLFSH
            | F::CLFLUSHOPT
            | F::CLWB
            | F::PREFETCHW
    )
}

/// What a form is good for.
pub fn classify(code: Code, level: Level) -> Use {
    use Mnemonic as M;
    let op = code.op_code();
    let has = |f| offered(f) || level == Level::V4 && wide(f);
    if !op.is_instruction()
        || !matches!(
            code.encoding(),
            EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX
        )
        || !code.cpuid_features().iter().all(|&f| has(f))
    {
        return Use::No;
    }
    match code.mnemonic() {
        // The answer is the machine's and not the program's, or the system's tables are not alike.
        M::Cpuid
        | M::Rdtsc
        | M::Rdpmc
        | M::Rdrand
        | M::Rdseed
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
        | M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::Arpl
        | M::Wait => return Use::No,
        // Processors differ in how much of them they decode.
        M::Ud0 | M::Ud1 => return Use::No,
        // System calls.
        M::Syscall | M::Sysenter | M::Sysexit | M::Sysret | M::Int | M::Int1 | M::Rsm => {
            return Use::No;
        }
        // They store parts of the state that differ: pointers, reserved bytes. Tested by cases of their own.
        M::Fnstenv
        | M::Fnsave
        | M::Fldenv
        | M::Frstor
        | M::Fstenv
        | M::Fsave
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Xsave
        | M::Xsave64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xrstor
        | M::Xrstor64 => return Use::No,
        M::Popf | M::Popfd | M::Popfq | M::Enter | M::Bound | M::Into | M::Ud2 => {
            return Use::Alone;
        }
        M::Wrfsbase | M::Wrgsbase | M::Xlatb | M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {
            return Use::Alone;
        }
        _ if loose_flags(code) != 0 => return Use::Alone,
        M::Pusha | M::Pushad | M::Popa | M::Popad => return Use::Alone,
        _ => {}
    }
    if op.is_privileged() {
        // They raise #GP in user code.
        return Use::Alone;
    }
    if code.flow_control() != FlowControl::Next {
        return Use::No;
    }
    let mut result = Use::Anywhere;
    for k in op.op_kinds() {
        use OpCodeOperandKind as K;
        match k {
            K::mem_mpx | K::mem_mib | K::sibmem | K::farbr2_2 | K::farbr4_2 => return Use::No,
            K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs => {
                // Loads of segment registers are no form of user code worth the trouble.
                let stores = code.mnemonic() == M::Push
                    || code.mnemonic() == M::Mov && op.op_kind(1) == K::seg_reg;
                if !stores {
                    return Use::No;
                }
                result = Use::Alone;
            }
            K::seg_rSI
            | K::es_rDI
            | K::seg_rDI
            | K::mem_vsib32x
            | K::mem_vsib32y
            | K::mem_vsib32z
            | K::mem_vsib64x
            | K::mem_vsib64y
            | K::mem_vsib64z => result = Use::Alone,
            _ => {}
        }
    }
    result
}

/// Forms to test alone in 32- or 64-bit code; of x86-64-v4 those that -v3 does not have.
pub fn alone(bits: u32, level: Level) -> Vec<Code> {
    forms(bits, level, |u| u != Use::No)
}

/// Forms that may stand inside of a random block; of x86-64-v4 those that -v3 does not have.
pub fn anywhere(bits: u32, level: Level) -> Vec<Code> {
    forms(bits, level, |u| u == Use::Anywhere)
}

fn forms(bits: u32, level: Level, wanted: impl Fn(Use) -> bool) -> Vec<Code> {
    static USES: LazyLock<[Vec<Use>; 2]> = LazyLock::new(|| {
        [Level::V3, Level::V4].map(|l| Code::values().map(|c| classify(c, l)).collect())
    });
    Code::values()
        .filter(|c| {
            let op = c.op_code();
            let [narrow, all] = USES.each_ref().map(|uses| uses[*c as usize]);
            let of_level = match level {
                Level::V3 => narrow,
                Level::V4 if narrow == Use::No => all,
                Level::V4 => Use::No,
            };
            wanted(of_level) && if bits == 64 { op.mode64() } else { op.mode32() }
        })
        .collect()
}

/// Integer forms that make up most of real code.
pub fn is_common(code: Code) -> bool {
    use CpuidFeature as F;
    code.cpuid_features().iter().all(|f| {
        matches!(
            f,
            F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::X64 | F::CMOV
        )
    })
}

/// Status flags that cannot be compared behind this form, as bits of RFLAGS: those left undefined by decimal arithmetic, which 64-bit hosts no longer
/// have and the engine emulates, and OF behind a rotation of a byte or word through carry. The latter the manual calls undefined unless the count is 1;
/// decoders take a multiple of the width for a count of zero, so that the translator does not look at what the processor made of it.
pub fn loose_flags(code: Code) -> u64 {
    use Mnemonic as M;
    const OF: u64 = 1 << 11;
    match code.mnemonic() {
        M::Aaa | M::Aas => OF | 0xc4,
        M::Aam | M::Aad => OF | 0x11,
        M::Daa | M::Das => OF,
        M::Rcl | M::Rcr => match code {
            Code::Rcl_rm8_imm8
            | Code::Rcl_rm8_CL
            | Code::Rcl_rm16_imm8
            | Code::Rcl_rm16_CL
            | Code::Rcr_rm8_imm8
            | Code::Rcr_rm8_CL
            | Code::Rcr_rm16_imm8
            | Code::Rcr_rm16_CL => OF,
            _ => 0,
        },
        _ => 0,
    }
}

/// Whether it is a string instruction other than port input and output.
pub fn is_string(i: &iced_x86::Instruction) -> bool {
    use Mnemonic as M;
    i.is_string_instruction()
        && !matches!(
            i.mnemonic(),
            M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd
        )
}
