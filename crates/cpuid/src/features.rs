//! Every CPUID feature bit that this program has an opinion on, by name. What is missing here is hidden.
//!
//! Names are those of the manuals. Why a mitigation bit is offered is argued from Linux's arch/x86/kernel/cpu/common.c
//! (`cpu_set_bug_bits`) and bugs.c, 6.1 and later: they decide what a guest pays for flaws of the processor. Two facts
//! of translation carry the arguments. Guest page tables are never loaded into the hardware. Guest branches and returns are
//! replaced by table look-ups in translated code, so a guest's retpolines, return thunks, RSB stuffing and branch history
//! clearing are translated away too: they cost time and change nothing in how the hardware predicts.

use crate::host::{Flaw, Vendor};

/// When a bit is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// The engine does it on every host.
    Implemented,
    /// As `Implemented`, to guests that see this vendor.
    ImplementedFor(Vendor),
    /// The instruction is copied, or the bit describes how copied instructions behave: the host must have it.
    Host(Need),
    /// As `Implemented`, with more than one virtual CPU.
    Multiprocessor,
    /// As `Multiprocessor`, to guests that see this vendor.
    MultiprocessorFor(Vendor),
    /// The host has it and the domain is never moved to another.
    HostPinned,
    /// Mirrors CR4.OSXSAVE.
    OsXsave,
    /// The host's kernel says that the processor does not have the flaw.
    Unaffected(Flaw),
    /// Never; why.
    Hidden(&'static str),
}

/// For whom a copied bit is required; others never see it, unless it is `Optional`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Every domain: part of x86-64 itself.
    Base,
    /// Level x86-64-v2 and up.
    V2,
    /// Level x86-64-v3 and up.
    V3,
    /// Level x86-64-v4.
    V4,
    /// Nobody: offered with level x86-64-v4 where the host has it.
    WithV4,
    /// Nobody: offered where the host has it.
    Optional,
}

/// Result register of CPUID; its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reg {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

/// One bit of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    pub bit: u8,
    pub name: &'static str,
    pub offer: Offer,
}

/// A result register that consists of feature bits.
#[derive(Clone, Copy, Debug)]
pub struct Word {
    pub leaf: u32,
    pub subleaf: u32,
    pub reg: Reg,
    pub features: &'static [Feature],
}

const fn f(bit: u8, name: &'static str, offer: Offer) -> Feature {
    Feature { bit, name, offer }
}

use Offer::{
    Hidden, Host, HostPinned, Implemented, ImplementedFor, Multiprocessor, MultiprocessorFor,
    OsXsave, Unaffected,
};

const BASE: Offer = Host(Need::Base);
const V2: Offer = Host(Need::V2);
const V3: Offer = Host(Need::V3);
const V4: Offer = Host(Need::V4);
const WITH_V4: Offer = Host(Need::WithV4);
const OPTIONAL: Offer = Host(Need::Optional);
const INTEL: Offer = ImplementedFor(Vendor::Intel);
const AMD: Offer = ImplementedFor(Vendor::Amd);

const AVX512: Offer = Hidden("a part of AVX-512 that is not translated");
const AMX: Offer = Hidden("AMX is not translated");
const CET: Offer = Hidden("shadow stacks and branch tracking are not implemented");
const MCA: Offer = Hidden("no machine-check banks: the host handles its own errors");
const PMU: Offer = Hidden("no performance counters");
const POWER: Offer = Hidden("power and temperature belong to the host");
const SGX: Offer = Hidden("no enclaves");
const TSX: Offer = Hidden("transactions cannot survive the exits of translated code");
const TRACE: Offer = Hidden("traces would show translated code");
const NESTED: Offer = Hidden("no nested virtualisation");
const ENCRYPTION: Offer = Hidden("memory keys belong to the host");
const ALLOCATION: Offer = Hidden("caches and bandwidth are the host's to share out");
const NEWER: Offer = Hidden("beyond x86-64-v4; not translated yet");
const NO_BACKING: Offer = Hidden("the MSRs behind it do not exist");
const SPEC_LATCH: Offer =
    Hidden("a barrier or mode that the guest could switch but that would reach no hardware");
const NOT_FOR_GUESTS: Offer = Hidden("concerns firmware and hypervisors");
const SMT: Offer = Hidden("a guest's CPUs are cores, not threads");

/// All words with feature bits.
pub const FEATURES: &[Word] = &[
    Word {
        leaf: 1,
        subleaf: 0,
        reg: Reg::Ecx,
        features: &[
            f(0, "SSE3", V2),
            f(1, "PCLMULQDQ", OPTIONAL),
            f(2, "DTES64", PMU),
            f(
                3,
                "MONITOR",
                Hidden("guests would idle in MWAIT instead of HLT and take the host's CPU"),
            ),
            f(4, "DS-CPL", PMU),
            f(5, "VMX", NESTED),
            f(6, "SMX", NOT_FOR_GUESTS),
            f(7, "EIST", POWER),
            f(8, "TM2", POWER),
            f(9, "SSSE3", V2),
            f(10, "CNXT-ID", NOT_FOR_GUESTS),
            f(11, "SDBG", NOT_FOR_GUESTS),
            f(12, "FMA", V3),
            f(13, "CMPXCHG16B", V2),
            f(14, "XTPR", NOT_FOR_GUESTS),
            f(15, "PDCM", PMU),
            f(17, "PCID", Implemented),
            f(18, "DCA", NOT_FOR_GUESTS),
            f(19, "SSE4.1", V2),
            f(20, "SSE4.2", V2),
            // On from the first instruction, so that no APIC page is needed.
            f(21, "X2APIC", Implemented),
            f(22, "MOVBE", V3),
            f(23, "POPCNT", V2),
            f(
                24,
                "TSC-DEADLINE",
                Hidden("guests use the Xen timer; the APIC's is not kept in this mode"),
            ),
            f(25, "AES", OPTIONAL),
            f(26, "XSAVE", V3),
            f(27, "OSXSAVE", OsXsave),
            f(28, "AVX", V3),
            f(29, "F16C", V3),
            f(30, "RDRAND", OPTIONAL),
            // Without it no guest looks for Xen's leaves.
            f(31, "HYPERVISOR", Implemented),
        ],
    },
    Word {
        leaf: 1,
        subleaf: 0,
        reg: Reg::Edx,
        features: &[
            f(0, "FPU", BASE),
            f(1, "VME", Hidden("virtual-8086 mode has no extensions here")),
            f(2, "DE", Implemented),
            f(3, "PSE", Implemented),
            f(4, "TSC", BASE),
            f(5, "MSR", Implemented),
            f(6, "PAE", Implemented),
            f(7, "MCE", MCA),
            f(8, "CMPXCHG8B", BASE),
            f(9, "APIC", Implemented),
            f(11, "SEP", Implemented),
            // Linux turns PAT off with MTRRs hidden.
            f(12, "MTRR", Implemented),
            f(13, "PGE", Implemented),
            f(14, "MCA", MCA),
            f(15, "CMOV", BASE),
            f(16, "PAT", Implemented),
            f(17, "PSE-36", Implemented),
            f(18, "PSN", Hidden("a serial number would identify the host")),
            f(19, "CLFLUSH", Implemented),
            f(21, "DS", PMU),
            f(22, "ACPI", POWER),
            f(23, "MMX", BASE),
            f(24, "FXSR", BASE),
            f(25, "SSE", BASE),
            f(26, "SSE2", BASE),
            // Memory types never reach the hardware: all of a guest's memory is coherent. Saves Linux cache flushes.
            f(27, "SS", INTEL),
            f(28, "HTT", Multiprocessor),
            f(29, "TM", POWER),
            f(31, "PBE", PMU),
        ],
    },
    Word {
        leaf: 6,
        subleaf: 0,
        reg: Reg::Eax,
        features: &[
            f(0, "DTS", POWER),
            f(1, "TURBO-BOOST", POWER),
            // Nothing here stops in a sleep state.
            f(2, "ARAT", Implemented),
            f(4, "PLN", POWER),
            f(5, "ECMD", POWER),
            f(6, "PTM", POWER),
            f(7, "HWP", POWER),
            f(19, "HW-FEEDBACK", POWER),
            f(23, "THREAD-DIRECTOR", POWER),
        ],
    },
    Word {
        leaf: 6,
        subleaf: 0,
        reg: Reg::Ecx,
        features: &[f(0, "APERFMPERF", POWER), f(3, "EPB", POWER)],
    },
    Word {
        leaf: 7,
        subleaf: 0,
        reg: Reg::Ebx,
        features: &[
            f(0, "FSGSBASE", Implemented),
            f(
                1,
                "TSC-ADJUST",
                Hidden(
                    "the guest's time-stamp counter is the host's; one offset is all that is inlined",
                ),
            ),
            f(2, "SGX", SGX),
            f(3, "BMI1", V3),
            f(4, "HLE", TSX),
            f(5, "AVX2", V3),
            f(6, "FDP-EXCPTN-ONLY", OPTIONAL),
            f(7, "SMEP", Implemented),
            f(8, "BMI2", V3),
            f(9, "ERMS", OPTIONAL),
            f(10, "INVPCID", Implemented),
            f(11, "RTM", TSX),
            f(12, "RDT-M", ALLOCATION),
            f(13, "FCS-FDS-DEPRECATED", OPTIONAL),
            f(
                14,
                "MPX",
                Hidden("removed from processors; Linux has dropped it"),
            ),
            f(15, "RDT-A", ALLOCATION),
            f(16, "AVX512F", V4),
            f(17, "AVX512DQ", V4),
            f(18, "RDSEED", OPTIONAL),
            f(19, "ADX", OPTIONAL),
            f(20, "SMAP", Implemented),
            f(21, "AVX512_IFMA", WITH_V4),
            // The engine checks the address and flushes nothing: coherence does not need it.
            f(23, "CLFLUSHOPT", Implemented),
            f(24, "CLWB", Implemented),
            f(25, "PT", TRACE),
            f(26, "AVX512PF", AVX512),
            f(27, "AVX512ER", AVX512),
            f(28, "AVX512CD", V4),
            f(29, "SHA", OPTIONAL),
            f(30, "AVX512BW", V4),
            f(31, "AVX512VL", V4),
        ],
    },
    Word {
        leaf: 7,
        subleaf: 0,
        reg: Reg::Ecx,
        features: &[
            f(0, "PREFETCHWT1", AVX512),
            f(1, "AVX512_VBMI", WITH_V4),
            f(2, "UMIP", Implemented),
            f(
                3,
                "PKU",
                Hidden("protection keys are not kept in the software TLB"),
            ),
            f(4, "OSPKE", Hidden("mirrors PKU, which is hidden")),
            f(
                5,
                "WAITPKG",
                Hidden("guests would wait without giving up the host's CPU"),
            ),
            f(6, "AVX512_VBMI2", WITH_V4),
            f(7, "CET_SS", CET),
            f(8, "GFNI", WITH_V4),
            f(9, "VAES", WITH_V4),
            f(10, "VPCLMULQDQ", WITH_V4),
            f(11, "AVX512_VNNI", WITH_V4),
            f(12, "AVX512_BITALG", WITH_V4),
            f(13, "TME_EN", ENCRYPTION),
            f(14, "AVX512_VPOPCNTDQ", WITH_V4),
            f(16, "LA57", Hidden("page tables have four levels")),
            f(22, "RDPID", Implemented),
            f(23, "KL", ENCRYPTION),
            f(24, "BUS_LOCK_DETECT", NO_BACKING),
            f(25, "CLDEMOTE", NEWER),
            f(27, "MOVDIRI", NEWER),
            f(28, "MOVDIR64B", NEWER),
            f(29, "ENQCMD", NEWER),
            f(30, "SGX_LC", SGX),
            f(
                31,
                "PKS",
                Hidden("protection keys are not kept in the software TLB"),
            ),
        ],
    },
    Word {
        leaf: 7,
        subleaf: 0,
        reg: Reg::Edx,
        features: &[
            f(1, "SGX-KEYS", SGX),
            f(2, "AVX512_4VNNIW", AVX512),
            f(3, "AVX512_4FMAPS", AVX512),
            f(4, "FSRM", OPTIONAL),
            f(5, "UINTR", Hidden("user interrupts are not implemented")),
            f(8, "AVX512_VP2INTERSECT", AVX512),
            f(9, "SRBDS_CTRL", NO_BACKING),
            f(
                10,
                "MD_CLEAR",
                Hidden("VERW is emulated and clears no buffer"),
            ),
            f(11, "RTM_ALWAYS_ABORT", TSX),
            f(13, "TSX_FORCE_ABORT", TSX),
            f(14, "SERIALIZE", NEWER),
            f(15, "HYBRID", Hidden("a guest's CPUs are all alike")),
            f(16, "TSXLDTRK", TSX),
            f(18, "PCONFIG", ENCRYPTION),
            f(19, "ARCH_LBR", TRACE),
            f(20, "CET_IBT", CET),
            f(22, "AMX-BF16", AMX),
            f(23, "AVX512_FP16", AVX512),
            f(24, "AMX-TILE", AMX),
            f(25, "AMX-INT8", AMX),
            // SPEC_CTRL is a latch in the engine. Linux writes it in the mode that IBRS_ALL selects (below), which is the
            // mode without retpolines; hidden, that write would fault.
            f(26, "IBRS_IBPB", INTEL),
            f(27, "STIBP", SMT),
            f(28, "L1D_FLUSH", SPEC_LATCH),
            // Carries RDCL_NO (no page-table isolation), IBRS_ALL (no retpolines), MDS_NO and others (no VERW), ITS_NO (no
            // return thunks: with the hypervisor bit set Linux assumes the flaw otherwise).
            f(29, "ARCH_CAPABILITIES", INTEL),
            f(30, "CORE_CAPABILITIES", NO_BACKING),
            f(31, "SSBD", SPEC_LATCH),
        ],
    },
    Word {
        leaf: 7,
        subleaf: 1,
        reg: Reg::Eax,
        features: &[
            f(0, "SHA512", NEWER),
            f(1, "SM3", NEWER),
            f(2, "SM4", NEWER),
            f(3, "RAO-INT", NEWER),
            f(4, "AVX-VNNI", NEWER),
            f(5, "AVX512_BF16", WITH_V4),
            f(6, "LASS", NEWER),
            f(7, "CMPCCXADD", NEWER),
            f(8, "ARCHPERFMONEXT", PMU),
            // How fast string instructions are, which are copied.
            f(10, "FZRM", OPTIONAL),
            f(11, "FSRS", OPTIONAL),
            f(12, "FSRCS", OPTIONAL),
            f(17, "FRED", NEWER),
            f(18, "LKGS", NEWER),
            f(19, "WRMSRNS", NEWER),
            f(20, "NMI_SRC", NEWER),
            f(21, "AMX-FP16", AMX),
            f(22, "HRESET", NEWER),
            f(23, "AVX-IFMA", NEWER),
            f(26, "LAM", NEWER),
            f(27, "MSRLIST", NEWER),
        ],
    },
    Word {
        leaf: 7,
        subleaf: 1,
        reg: Reg::Edx,
        features: &[
            f(4, "AVX-VNNI-INT8", NEWER),
            f(5, "AVX-NE-CONVERT", NEWER),
            f(8, "AMX-COMPLEX", AMX),
            f(10, "AVX-VNNI-INT16", NEWER),
            f(14, "PREFETCHI", NEWER),
            f(17, "UIRET_UIF", NEWER),
            f(18, "CET_SSS", CET),
            f(19, "AVX10", AVX512),
            f(21, "APX_F", NEWER),
        ],
    },
    Word {
        leaf: 7,
        subleaf: 2,
        reg: Reg::Edx,
        features: &[
            f(0, "PSFD", SPEC_LATCH),
            f(1, "IPRED_CTRL", SPEC_LATCH),
            f(2, "RRSBA_CTRL", SPEC_LATCH),
            f(3, "DDPD_U", SPEC_LATCH),
            // A bit in the SPEC_CTRL latch. Linux sets it once, instead of clearing branch history by a loop at each system call.
            f(4, "BHI_CTRL", INTEL),
            f(5, "MCDT_NO", OPTIONAL),
        ],
    },
    Word {
        leaf: 0xd,
        subleaf: 1,
        reg: Reg::Eax,
        features: &[
            f(0, "XSAVEOPT", OPTIONAL),
            f(1, "XSAVEC", OPTIONAL),
            f(2, "XGETBV1", OPTIONAL),
            f(3, "XSAVES", Hidden("there is no supervisor state to save")),
            f(4, "XFD", AMX),
        ],
    },
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        reg: Reg::Ecx,
        features: &[
            f(0, "LAHF-SAHF", V2),
            // Without it Linux takes the CPUs that leaf 1 counts for threads of one core, and finds two packages.
            f(1, "CMP-LEGACY", MultiprocessorFor(Vendor::Amd)),
            f(2, "SVM", NESTED),
            f(3, "EXTAPIC", NO_BACKING),
            f(
                4,
                "ALTMOVCR8",
                Hidden("LOCK MOV CR0 is an invalid instruction here"),
            ),
            f(5, "LZCNT", V3),
            f(6, "SSE4A", OPTIONAL),
            f(
                7,
                "MISALIGNSSE",
                Hidden("MXCSR.MM is not let through to copied instructions"),
            ),
            f(8, "PREFETCHW", Implemented),
            f(9, "OSVW", NO_BACKING),
            f(10, "IBS", PMU),
            f(11, "XOP", NEWER),
            f(12, "SKINIT", NOT_FOR_GUESTS),
            f(13, "WDT", NOT_FOR_GUESTS),
            f(15, "LWP", PMU),
            f(16, "FMA4", NEWER),
            f(17, "TCE", Hidden("EFER.TCE is not implemented")),
            f(19, "NODEID_MSR", NO_BACKING),
            f(21, "TBM", NEWER),
            // Leaves 8000_001D and 8000_001E, which are made from the host's.
            f(22, "TOPOEXT", OPTIONAL),
            f(23, "PERFCTR-CORE", PMU),
            f(24, "PERFCTR-NB", PMU),
            f(26, "DBEXT", NO_BACKING),
            f(27, "PERFTSC", PMU),
            f(28, "PERFCTR-LLC", PMU),
            f(
                29,
                "MONITORX",
                Hidden("guests would wait without giving up the host's CPU"),
            ),
            f(30, "ADDRMASKEXT", NO_BACKING),
        ],
    },
    // Bits 0-9, 12-17, 23 and 24 repeat leaf 1 on AMD's processors.
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        reg: Reg::Edx,
        features: &[
            f(11, "SYSCALL", Implemented),
            f(20, "NX", Implemented),
            f(22, "MMXEXT", OPTIONAL),
            f(25, "FFXSR", Hidden("EFER.FFXSR is not implemented")),
            f(26, "PAGE1GB", Implemented),
            f(27, "RDTSCP", Implemented),
            f(29, "LM", Implemented),
            f(30, "3DNOWEXT", NEWER),
            f(31, "3DNOW", NEWER),
        ],
    },
    Word {
        leaf: 0x8000_0007,
        subleaf: 0,
        reg: Reg::Ebx,
        features: &[
            f(0, "MCA-OVERFLOW-RECOVERY", MCA),
            f(1, "SUCCOR", MCA),
            f(3, "SCALABLE-MCA", MCA),
        ],
    },
    Word {
        leaf: 0x8000_0007,
        subleaf: 0,
        reg: Reg::Edx,
        features: &[
            f(0, "TEMPERATURE-SENSOR", POWER),
            f(1, "FID", POWER),
            f(2, "VID", POWER),
            f(7, "HW-PSTATE", POWER),
            // A guest that trusts its TSC for ever must stay where that TSC is.
            f(8, "INVARIANT-TSC", HostPinned),
            f(9, "CPB", POWER),
            f(10, "EFF-FREQ-RO", POWER),
            f(11, "PROC-FEEDBACK", POWER),
            f(12, "PROC-POWER-REPORTING", POWER),
            f(14, "RAPL", POWER),
        ],
    },
    Word {
        leaf: 0x8000_0008,
        subleaf: 0,
        reg: Reg::Ebx,
        features: &[
            f(
                0,
                "CLZERO",
                Hidden("its operand is implicit, in RAX; not translated"),
            ),
            f(1, "INST-RET-CNT", PMU),
            f(2, "RSTR-FP-ERR-PTRS", OPTIONAL),
            f(
                3,
                "INVLPGB",
                Hidden("broadcasts reach no other virtual CPU's software TLB"),
            ),
            f(4, "RDPRU", POWER),
            f(6, "MBE", ALLOCATION),
            f(8, "MCOMMIT", NEWER),
            f(9, "WBNOINVD", NEWER),
            f(12, "AMD-IBPB", SPEC_LATCH),
            f(13, "INT-WBINVD", NEWER),
            f(14, "AMD-IBRS", SPEC_LATCH),
            f(15, "AMD-STIBP", SMT),
            f(16, "IBRS-ALWAYS-ON", SPEC_LATCH),
            f(17, "STIBP-ALWAYS-ON", SMT),
            f(18, "IBRS-PREFERRED", SPEC_LATCH),
            f(19, "IBRS-SAME-MODE", SPEC_LATCH),
            // EFER.LMSLE is refused.
            f(20, "EFER-LMSLE-UNSUPPORTED", AMD),
            f(21, "INVLPGB-NESTED", NESTED),
            f(
                23,
                "AMD-PPIN",
                Hidden("a serial number would identify the host"),
            ),
            f(24, "AMD-SSBD", SPEC_LATCH),
            f(25, "VIRT-SSBD", SPEC_LATCH),
            f(26, "AMD-SSB-NO", Unaffected(Flaw::SpecStoreBypass)),
            f(27, "CPPC", POWER),
            f(28, "AMD-PSFD", SPEC_LATCH),
            // Return predictions are not those of guest returns (see above): spares Linux the return thunks of Zen 1 and 2.
            f(29, "BTC-NO", AMD),
            f(30, "IBPB-RET", SPEC_LATCH),
            f(31, "BRS", TRACE),
        ],
    },
    Word {
        leaf: 0x8000_0021,
        subleaf: 0,
        reg: Reg::Eax,
        features: &[
            f(0, "NO-NESTED-DATA-BP", NOT_FOR_GUESTS),
            // Linux on the host has set this mode since 2018 where the processor does not always have it.
            f(2, "LFENCE-SERIALIZING", AMD),
            f(3, "SMM-PGCFG-LOCK", NOT_FOR_GUESTS),
            f(
                5,
                "VERW-CLEAR",
                Hidden("VERW is emulated and clears no buffer"),
            ),
            // Segment loads are emulated, and clear the base. Hidden, Linux writes each base twice.
            f(6, "NULL-SELECTOR-CLEARS-BASE", AMD),
            f(7, "UPPER-ADDRESS-IGNORE", NEWER),
            // EFER.AIBRSE is a latch. Linux then uses plain indirect branches, which are translated, instead of retpolines.
            f(8, "AUTOMATIC-IBRS", AMD),
            f(9, "NO-SMM-CTL-MSR", AMD),
            f(13, "PREFETCH-CTL-MSR", NO_BACKING),
            f(17, "CPUID-USER-DIS", NO_BACKING),
            f(18, "EPSF", SPEC_LATCH),
            f(24, "ERAPS", SPEC_LATCH),
            f(27, "SBPB", SPEC_LATCH),
            f(28, "IBPB-BRTYPE", SPEC_LATCH),
            // Return predictions are not those of guest returns (see above): spares Linux the safe-return thunk.
            f(29, "SRSO-NO", AMD),
            f(30, "SRSO-USER-KERNEL-NO", AMD),
            f(31, "SRSO-MSR-FIX", NO_BACKING),
        ],
    },
    Word {
        leaf: 0x8000_0021,
        subleaf: 0,
        reg: Reg::Ecx,
        features: &[
            // Without both, Linux on any Zen with the hypervisor bit executes VERW at each return to user mode.
            f(1, "TSA-SQ-NO", Unaffected(Flaw::TransientScheduler)),
            f(2, "TSA-L1-NO", Unaffected(Flaw::TransientScheduler)),
        ],
    },
];
