//! The state of one vCPU as plain data.

use serde::{Deserialize, Serialize};

/// Index of a general register in [`CpuState::gpr`]: the hardware's encoding order.
pub mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}

/// Index of a segment register in [`CpuState::seg`]: the hardware's encoding order.
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Bits of RFLAGS.
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Bits of CR0, CR4 and EFER.
pub mod cr {
    pub const CR0_PE: u64 = 1 << 0;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_EM: u64 = 1 << 2;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_VME: u64 = 1 << 0;
    pub const CR4_PVI: u64 = 1 << 1;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_DE: u64 = 1 << 3;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_MCE: u64 = 1 << 6;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCE: u64 = 1 << 8;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const CR4_UMIP: u64 = 1 << 11;
    pub const CR4_LA57: u64 = 1 << 12;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const CR4_PKE: u64 = 1 << 22;
    pub const EFER_SCE: u64 = 1 << 0;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
    pub const EFER_FFXSR: u64 = 1 << 14;
    pub const EFER_AIBRSE: u64 = 1 << 21;
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Segment {
    pub base: u64,
    /// Last valid offset, in bytes (already scaled by the granularity bit).
    pub limit: u32,
    pub selector: u16,
    /// Bits 7:0 are the descriptor's access byte (type, S, DPL, P); bits 15:12 are AVL, L, D/B, G. 0x10000 is not used: an unusable segment has
    /// P = 0.
    pub attr: u16,
}

impl Segment {
    pub const ATTR_PRESENT: u16 = 1 << 7;
    pub const ATTR_L: u16 = 1 << 13;
    pub const ATTR_DB: u16 = 1 << 14;
    pub const ATTR_G: u16 = 1 << 15;
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct DescTable {
    pub base: u64,
    pub limit: u16,
}

/// Model-specific registers that are plain storage or feed the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    /// Added to the host's TSC to give the guest's.
    pub tsc_offset: u64,
    pub spec_ctrl: u64,
    pub virt_spec_ctrl: u64,
    pub misc_enable: u64,
    pub apic_base: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    /// PHYSBASE0, PHYSMASK0, PHYSBASE1 ...
    pub mtrr_var: [u64; 16],
    pub debugctl: u64,
}

/// Bytes of the XSAVE image kept per vCPU: legacy 512, header 64, AVX 256, then room for the AVX-512 components in standard format.
pub const XSAVE_BYTES: usize = 2816;

/// XSAVE image in the standard (not compacted) format.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct XsaveImage(pub [u8; XSAVE_BYTES]);

impl Serialize for XsaveImage {
    /// Two hexadecimal digits a byte.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digits = self.0.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let text: String = digits
            .filter_map(|digit| char::from_digit(digit.into(), 16))
            .collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for XsaveImage {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits: Option<Vec<u8>> = text
            .chars()
            .map(|c| c.to_digit(16).map(|digit| digit as u8))
            .collect();
        match digits {
            Some(digits) if digits.len() == 2 * XSAVE_BYTES => {
                Ok(XsaveImage(std::array::from_fn(|i| {
                    digits[2 * i] << 4 | digits[2 * i + 1]
                })))
            }
            _ => Err(serde::de::Error::custom(format!(
                "an XSAVE image is {XSAVE_BYTES} bytes in hexadecimal digits"
            ))),
        }
    }
}

impl Default for XsaveImage {
    /// The state after a processor reset: x87 control word 0x37f (as FNINIT leaves it), MXCSR 0x1f80, all else zero.
    fn default() -> Self {
        let mut bytes = [0; XSAVE_BYTES];
        bytes[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        bytes[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        bytes[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        XsaveImage(bytes)
    }
}

/// Registers of the local APIC, independent of xAPIC or x2APIC mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct LapicState {
    pub id: u32,
    pub tpr: u32,
    pub ldr: u32,
    pub dfr: u32,
    pub svr: u32,
    pub esr: u32,
    pub icr: u64,
    pub isr: [u32; 8],
    pub tmr: [u32; 8],
    pub irr: [u32; 8],
    /// Timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    pub timer_initial: u32,
    pub timer_divide: u32,
}

impl Default for LapicState {
    fn default() -> Self {
        LapicState {
            id: 0,
            tpr: 0,
            ldr: 0,
            dfr: 0xffff_ffff,
            svr: 0xff,
            esr: 0,
            icr: 0,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            lvt: [0x10000; 6],
            timer_initial: 0,
            timer_divide: 0,
        }
    }
}

/// Whether a vCPU executes, as far as the processor itself is concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Activity {
    #[default]
    Running = 0,
    /// After HLT.
    Halted = 1,
    /// After INIT, waiting for a start-up IPI.
    WaitForSipi = 2,
}

/// Everything the guest can see of one CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C, align(64))]
pub struct CpuState {
    /// In hardware encoding order, see [`reg`].
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// In hardware encoding order, see [`seg`]. The FS and GS bases are in here.
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescTable,
    pub idtr: DescTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub xcr0: u64,
    pub dr: [u64; 8],
    pub msr: Msrs,
    pub activity: Activity,
    /// The instruction boundary behind STI or MOV SS: no interrupt is taken before the next instruction has ended.
    pub interrupt_shadow: bool,
    /// Between an NMI and the IRET that ends it.
    pub nmi_blocked: bool,
    pub nmi_pending: bool,
    pub lapic: LapicState,
    pub xsave: XsaveImage,
}

impl CpuState {
    /// Current privilege level.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & cr::CR0_PE == 0 {
            0
        } else if self.rflags & rflags::VM != 0 {
            3
        } else {
            (self.seg[seg::SS].attr >> 5) as u8 & 3
        }
    }

    /// Width of the code being executed, in bits: 16, 32 or 64.
    pub fn code_bits(&self) -> u32 {
        let cs = &self.seg[seg::CS];
        if self.msr.efer & cr::EFER_LMA != 0 && cs.attr & Segment::ATTR_L != 0 {
            64
        } else if self.cr0 & cr::CR0_PE != 0
            && self.rflags & rflags::VM == 0
            && cs.attr & Segment::ATTR_DB != 0
        {
            32
        } else {
            16
        }
    }
}
