//! Making and looking up a domain's table.

use std::fmt;

use hospes_engine::cr;
use hospes_units::DomId;

use crate::caches::{caches, package_id_bits};
use crate::capabilities::arch_capabilities;
use crate::features::{FEATURES, Feature, Need, Offer, Reg, Word};
use crate::host::{HostCpu, Vendor};
use crate::saved::SavedFeatures;
use crate::wishes::{self, Wish};
use crate::xen::{self, XenLeaves};
use crate::xsave::Xsave;

const LAST_BASIC: u32 = 0xd;
const EXTENDED: u32 = 0x8000_0000;
const LAST_EXTENDED_INTEL: u32 = 0x8000_0008;
const LAST_EXTENDED_AMD: u32 = 0x8000_0021;
/// Most bits of a guest physical address that guest memory can stand behind.
const PHYSICAL_BITS_MAX: u32 = 46;
const VIRTUAL_BITS: u32 = 48;
const CACHE_LINE_BYTES: u32 = 64;
/// Bits of 8000_0001.EDX that repeat 1.EDX on AMD's processors.
const AMD_REPEATED: u32 = 0x0183_f3ff;

const XCR0_X87: u64 = 1 << 0;
const XCR0_SSE: u64 = 1 << 1;
const XCR0_AVX: u64 = 1 << 2;
/// Mask registers, upper halves of ZMM0-15, ZMM16-31.
const XCR0_AVX512: u64 = 0xe0;

/// The instruction set level of a domain, as the x86-64 psABI defines them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// SSE4.2, POPCNT, CMPXCHG16B. For hosts without AVX2.
    V2,
    /// AVX2, BMI, FMA and others.
    #[default]
    V3,
    /// AVX-512, with the extensions that usually come with it where the host has them.
    V4,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::V2 => "x86-64-v2",
            Level::V3 => "x86-64-v3",
            Level::V4 => "x86-64-v4",
        })
    }
}

/// What a domain's configuration wants of its processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy<'a> {
    /// Number of virtual CPUs, at least 1.
    pub vcpus: u32,
    pub domid: DomId,
    /// Rate of the guest's time-stamp counter, which is the host's.
    pub tsc_khz: u32,
    /// The domain is never saved or moved: what is true of this host alone may be told.
    pub nomigrate: bool,
    pub level: Level,
    /// Features by name, in this order, that are to differ from the level's.
    pub wishes: &'a [(String, Wish)],
    /// The features of a domain that was saved, which it keeps whatever else is said here.
    pub saved: Option<&'a SavedFeatures>,
}

/// What of a virtual CPU's state shows in CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dynamic {
    pub vcpu: u32,
    pub apic_id: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    pub xcr0: u64,
}

/// Why no table can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuidError {
    #[error(
        "the host's CPU lacks {name}, which guests of the {level} level need: {}", way_out(*level)
    )]
    Missing { name: &'static str, level: Level },
    #[error(
        "the host's kernel does not enable {state} state (XCR0 is {xcr0:#x}), which guests of the {level} level need: {}", way_out(*level)
    )]
    StateDisabled {
        state: &'static str,
        xcr0: u64,
        level: Level,
    },
    #[error(
        "`cpuid' names the feature {0}, which is not known here: see cpufeatureset.h of Xen for the names"
    )]
    Unknown(String),
    #[error("`cpuid' asks for {name}, which the guest cannot have ({why}): leave it out")]
    Refused { name: &'static str, why: String },
    #[error(
        "{name}, which the guest had where it was saved, cannot be offered here: restore it on a host like that one, with the same `cpu_level' and `cpuid'"
    )]
    SavedFeature { name: &'static str },
    #[error(
        "the host's CPU is of another vendor than that on which the domain was saved: restore it on a host like that one"
    )]
    SavedVendor,
    #[error("a domain needs at least one virtual CPU")]
    NoVcpus,
}

/// What to do where the host is not enough for a level.
fn way_out(level: Level) -> &'static str {
    match level {
        Level::V4 => "use another host, or set cpu_level=\"x86-64-v3\"",
        Level::V2 | Level::V3 => "use another host",
    }
}

/// The answers of CPUID for one domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidTable {
    vendor: Vendor,
    xcr0: u64,
    capabilities: Option<u64>,
    /// Leaves 0 to 0xD; those with subleaves or dynamic parts are completed in [`CpuidTable::lookup`].
    basic: [[u32; 4]; LAST_BASIC as usize + 1],
    /// Leaf 7.
    seven: [[u32; 4]; 3],
    xsave: Xsave,
    /// Leaves from 8000_0000 on.
    extended: Vec<[u32; 4]>,
    /// Leaf 4 or 8000_001D.
    caches: Vec<[u32; 4]>,
    vcpus: u32,
    xen: XenLeaves,
}

impl CpuidTable {
    /// Makes the table of a domain that runs on `host`; refuses a host that lacks a bit of the level, by its name.
    pub fn new(host: &HostCpu, policy: &Policy<'_>) -> Result<CpuidTable, CpuidError> {
        if policy.vcpus == 0 {
            return Err(CpuidError::NoVcpus);
        }
        let vendor = host.vendor();
        let avx = XCR0_X87 | XCR0_SSE | XCR0_AVX;
        let mut words = Vec::new();
        for word in FEATURES {
            words.push((word, offered(word, host, policy)?));
        }
        wishes::apply(&mut words, policy.wishes, host)?;
        if let Some(saved) = policy.saved {
            saved.apply(&mut words, vendor)?;
        }
        let word = |leaf: u32, subleaf: u32| {
            let mut regs = [0; 4];
            for (w, value) in &words {
                if (w.leaf, w.subleaf) == (leaf, subleaf) {
                    regs[w.reg as usize] = *value;
                }
            }
            regs
        };
        const XSAVE: u32 = 1 << 26;
        const AVX: u32 = 1 << 28;
        const AVX512F: u32 = 1 << 16;
        let [_, _, basic, _] = word(1, 0);
        let [_, extended, _, _] = word(7, 0);
        let mut xcr0 = 0;
        if basic & XSAVE != 0 {
            xcr0 |= XCR0_X87 | XCR0_SSE;
        }
        if basic & AVX != 0 {
            xcr0 |= avx;
        }
        if extended & AVX512F != 0 {
            xcr0 |= XCR0_AVX512;
        }
        // Last, so that a processor without AVX is refused for that.
        for (state, components, level) in
            [("AVX", avx, Level::V3), ("AVX-512", XCR0_AVX512, Level::V4)]
        {
            if xcr0 & components & !host.xcr0() != 0 {
                return Err(CpuidError::StateDisabled {
                    state,
                    xcr0: host.xcr0(),
                    level,
                });
            }
        }
        let mut table = CpuidTable {
            vendor,
            xcr0,
            capabilities: (vendor == Vendor::Intel).then(|| arch_capabilities(host)),
            basic: Default::default(),
            seven: [word(7, 0), word(7, 1), word(7, 2)],
            xsave: Xsave::new(host, xcr0, word(0xd, 1)[0]),
            extended: Vec::new(),
            caches: Vec::new(),
            vcpus: policy.vcpus,
            xen: XenLeaves {
                domid: u32::from(policy.domid.0),
                tsc_khz: policy.tsc_khz,
                tsc_reliable: host.leaf(0x8000_0007, 0)[3] & 1 << 8 != 0,
            },
        };
        table.seven[0][0] = 2;
        table.fill_basic(host, word(1, 0), word(6, 0));
        table.fill_extended(host, &word);
        Ok(table)
    }

    fn fill_basic(&mut self, host: &HostCpu, features: [u32; 4], power: [u32; 4]) {
        let [_, b, c, d] = host.leaf(0, 0);
        self.basic[0] = [LAST_BASIC, b, c, d];
        // On Intel's processors a count of APIC ids, on AMD's one of CPUs.
        let logical = match self.vendor {
            Vendor::Amd => self.vcpus,
            _ => 1 << package_id_bits(self.vcpus),
        };
        let signature = host.leaf(1, 0)[0];
        self.basic[1] = [
            signature,
            (CACHE_LINE_BYTES / 8) << 8 | logical.min(0xff) << 16,
            features[2],
            features[3],
        ];
        if self.vendor == Vendor::Intel {
            // Descriptors of caches and TLBs, for programs that do not read leaf 4.
            self.basic[2] = host.leaf(2, 0);
            self.caches = caches((0..8).map(|i| host.leaf(4, i)), self.vcpus, true);
        }
        self.basic[6] = power;
    }

    fn fill_extended(&mut self, host: &HostCpu, word: &dyn Fn(u32, u32) -> [u32; 4]) {
        let amd = self.vendor == Vendor::Amd;
        let last = if amd {
            LAST_EXTENDED_AMD
        } else {
            LAST_EXTENDED_INTEL
        };
        self.extended = (EXTENDED..=last).map(|leaf| word(leaf, 0)).collect();
        let extended = &mut self.extended;
        extended[0][0] = last;
        if amd {
            let [_, b, c, d] = host.leaf(0, 0);
            extended[0][1..].copy_from_slice(&[b, c, d]);
            extended[1][0] = self.basic[1][0];
            extended[1][3] |= self.basic[1][3] & AMD_REPEATED;
        }
        // Name, caches and TLBs are the host's.
        for leaf in 2..=6u32 {
            extended[leaf as usize] = host.leaf(EXTENDED + leaf, 0);
        }
        let physical = match host.leaf(0x8000_0008, 0)[0] & 0xff {
            0 => 36,
            bits => bits.min(PHYSICAL_BITS_MAX),
        };
        extended[8][0] = physical | VIRTUAL_BITS << 8;
        if amd {
            extended[8][2] = (self.vcpus - 1).min(0xff) | package_id_bits(self.vcpus) << 12;
            self.caches = caches((0..8).map(|i| host.leaf(0x8000_001d, i)), self.vcpus, false);
        }
    }

    /// EAX, EBX, ECX, EDX. Leaves that do not exist are zeros.
    pub fn lookup(&self, leaf: u32, subleaf: u32, now: &Dynamic) -> [u32; 4] {
        match leaf {
            1 => {
                let mut r = self.basic[1];
                r[1] |= (now.apic_id & 0xff) << 24;
                if now.osxsave && self.xcr0 != 0 {
                    r[2] |= 1 << 27;
                }
                r
            }
            4 if self.vendor != Vendor::Amd => self.cache(subleaf),
            7 => self
                .seven
                .get(subleaf as usize)
                .copied()
                .unwrap_or_default(),
            0xb => self.topology(subleaf, now.apic_id),
            0xd => self.xsave.lookup(subleaf, now.xcr0),
            0..=LAST_BASIC => self.basic[leaf as usize],
            xen::BASE..=xen::LAST => self.xen.lookup(leaf, subleaf, now.vcpu),
            0x8000_001d if self.vendor == Vendor::Amd => self.cache(subleaf),
            0x8000_001e if self.vendor == Vendor::Amd => {
                // One thread in each core, one node in the package.
                [now.apic_id, now.vcpu & 0xff, 0, 0]
            }
            EXTENDED.. => self
                .extended
                .get((leaf - EXTENDED) as usize)
                .copied()
                .unwrap_or_default(),
            _ => [0; 4],
        }
    }

    fn cache(&self, subleaf: u32) -> [u32; 4] {
        self.caches
            .get(subleaf as usize)
            .copied()
            .unwrap_or_default()
    }

    /// Leaf 0xB: cores of one thread with two ids each, all in one package.
    fn topology(&self, subleaf: u32, apic_id: u32) -> [u32; 4] {
        const THREAD: u32 = 1;
        const CORE: u32 = 2;
        let number = subleaf & 0xff;
        match subleaf {
            0 => [1, 1, THREAD << 8 | number, apic_id],
            1 => [
                package_id_bits(self.vcpus),
                self.vcpus,
                CORE << 8 | number,
                apic_id,
            ],
            _ => [0, 0, number, apic_id],
        }
    }

    /// IA32_ARCH_CAPABILITIES, where CPUID offers it.
    pub fn arch_capabilities(&self) -> Option<u64> {
        self.capabilities
    }

    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Bits that XSETBV may set in XCR0; 0 without XSAVE.
    pub fn supported_xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Bits that may be set in CR4; any other raises #GP.
    pub fn valid_cr4_bits(&self) -> u64 {
        const ALWAYS: u64 = cr::CR4_TSD | cr::CR4_PCE | cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT;
        let [_, _, c, d] = self.basic[1];
        let [_, b7, c7, _] = self.seven[0];
        [
            (d, 1, cr::CR4_VME | cr::CR4_PVI),
            (d, 2, cr::CR4_DE),
            (d, 3, cr::CR4_PSE),
            (d, 6, cr::CR4_PAE),
            (d, 7, cr::CR4_MCE),
            (d, 13, cr::CR4_PGE),
            (c, 17, cr::CR4_PCIDE),
            (c, 26, cr::CR4_OSXSAVE),
            (b7, 0, cr::CR4_FSGSBASE),
            (b7, 7, cr::CR4_SMEP),
            (b7, 20, cr::CR4_SMAP),
            (c7, 2, cr::CR4_UMIP),
            (c7, 3, cr::CR4_PKE),
            (c7, 16, cr::CR4_LA57),
        ]
        .iter()
        .filter(|(word, bit, _)| word >> bit & 1 != 0)
        .fold(ALWAYS, |bits, (_, _, cr4)| bits | cr4)
    }

    /// Bits that may be set in EFER; any other raises #GP. LMA is among them: writes to it are ignored.
    pub fn valid_efer_bits(&self) -> u64 {
        let d = self.extended[1][3];
        let a21 = self.extended.get(0x21).map_or(0, |r| r[0]);
        [
            (d, 11, cr::EFER_SCE),
            (d, 20, cr::EFER_NXE),
            (d, 25, cr::EFER_FFXSR),
            (d, 29, cr::EFER_LME | cr::EFER_LMA),
            (a21, 8, cr::EFER_AIBRSE),
        ]
        .iter()
        .filter(|(word, bit, _)| word >> bit & 1 != 0)
        .fold(0, |bits, (_, _, efer)| bits | efer)
    }
}

/// The value of a word of feature bits.
fn offered(word: &Word, host: &HostCpu, policy: &Policy<'_>) -> Result<u32, CpuidError> {
    let mut value = 0;
    for feature in word.features {
        if is_offered(word, feature, host, policy)? {
            value |= 1 << feature.bit;
        }
    }
    Ok(value)
}

fn is_offered(
    word: &Word,
    feature: &Feature,
    host: &HostCpu,
    policy: &Policy<'_>,
) -> Result<bool, CpuidError> {
    let on_host = has(host, word.leaf, word.subleaf, word.reg, feature.bit);
    Ok(match feature.offer {
        Offer::Implemented => true,
        Offer::ImplementedFor(vendor) => host.vendor() == vendor,
        Offer::Host(need) => {
            let required = match need {
                Need::Base => true,
                Need::V2 => policy.level >= Level::V2,
                Need::V3 => policy.level >= Level::V3,
                Need::V4 => policy.level >= Level::V4,
                Need::WithV4 | Need::Optional => false,
            };
            let optional = match need {
                Need::Optional => true,
                Need::WithV4 => policy.level >= Level::V4,
                _ => false,
            };
            if required && !on_host {
                return Err(CpuidError::Missing {
                    name: feature.name,
                    level: policy.level,
                });
            }
            on_host && (required || optional)
        }
        Offer::Multiprocessor => policy.vcpus > 1,
        Offer::MultiprocessorFor(vendor) => policy.vcpus > 1 && host.vendor() == vendor,
        Offer::HostPinned => on_host && policy.nomigrate,
        // Added when it is looked up.
        Offer::OsXsave => false,
        Offer::Unaffected(flaw) => host.vendor() == Vendor::Amd && host.is_unaffected(flaw),
        Offer::Hidden(_) => false,
    })
}

pub(crate) fn has(host: &HostCpu, leaf: u32, subleaf: u32, reg: Reg, bit: u8) -> bool {
    host.leaf(leaf, subleaf)[reg as usize] >> bit & 1 != 0
}
