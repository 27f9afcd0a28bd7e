//! What the host's processor says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use hospes_sys::{cpuid, xcr0};
use serde::{Deserialize, Serialize};

/// Whose instruction set it is, as far as that matters to guests: AMD's makes hypercalls with VMMCALL, all others with VMCALL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vendor {
    Intel,
    /// AMD, and Hygon, which is the same design under another name.
    Amd,
    Other,
}

/// A flaw of processors that guests work around at a cost, unless they are told that they need not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flaw {
    Meltdown,
    L1tf,
    Mds,
    SpecStoreBypass,
    TsxAsyncAbort,
    MmioStaleData,
    GatherDataSampling,
    RegFileDataSampling,
    TransientScheduler,
    BranchHistory,
}

impl Flaw {
    /// Every flaw, with the file of /sys/devices/system/cpu/vulnerabilities that reports it and the text that clears it.
    const REPORTS: [(Flaw, &'static str, &'static str); 10] = [
        (Flaw::Meltdown, "meltdown", "Not affected"),
        (Flaw::L1tf, "l1tf", "Not affected"),
        (Flaw::Mds, "mds", "Not affected"),
        (Flaw::SpecStoreBypass, "spec_store_bypass", "Not affected"),
        (Flaw::TsxAsyncAbort, "tsx_async_abort", "Not affected"),
        (Flaw::MmioStaleData, "mmio_stale_data", "Not affected"),
        (
            Flaw::GatherDataSampling,
            "gather_data_sampling",
            "Not affected",
        ),
        (
            Flaw::RegFileDataSampling,
            "reg_file_data_sampling",
            "Not affected",
        ),
        (Flaw::TransientScheduler, "tsa", "Not affected"),
        (Flaw::BranchHistory, "spectre_v2", "BHI: Not affected"),
    ];
}

const VULNERABILITIES: &str = "/sys/devices/system/cpu/vulnerabilities";

/// CPUID of the host, and what its kernel knows of flaws.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCpu {
    leaves: BTreeMap<(u32, u32), [u32; 4]>,
    xcr0: u64,
    unaffected: BTreeSet<Flaw>,
}

impl HostCpu {
    /// Executes CPUID and XGETBV here, and reads the kernel's report on flaws. A flaw that the kernel does not report
    /// counts as present.
    pub fn capture() -> HostCpu {
        let mut host = HostCpu::new([], 0, []);
        for base in [0, 0x8000_0000] {
            let last = cpuid(base, 0)[0].min(base + 0x40);
            for leaf in base..=last {
                for subleaf in 0..subleaves(leaf) {
                    host.leaves.insert((leaf, subleaf), cpuid(leaf, subleaf));
                }
            }
        }
        host.xcr0 = xcr0();
        host.unaffected = unaffected(Path::new(VULNERABILITIES));
        host
    }

    /// A host made up of `((leaf, subleaf), [eax, ebx, ecx, edx])`, the XCR0 that its kernel set, and the flaws it does not
    /// have.
    pub fn new(
        leaves: impl IntoIterator<Item = ((u32, u32), [u32; 4])>,
        xcr0: u64,
        unaffected: impl IntoIterator<Item = Flaw>,
    ) -> HostCpu {
        HostCpu {
            leaves: leaves.into_iter().collect(),
            xcr0,
            unaffected: unaffected.into_iter().collect(),
        }
    }

    /// EAX, EBX, ECX, EDX; zeros where the host has no such leaf.
    pub fn leaf(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.leaves
            .get(&(leaf, subleaf))
            .copied()
            .unwrap_or_default()
    }

    /// XCR0 as the host's kernel set it; 0 without XSAVE.
    pub fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Whether the host's kernel says that the processor does not have the flaw.
    pub fn is_unaffected(&self, flaw: Flaw) -> bool {
        self.unaffected.contains(&flaw)
    }

    pub fn vendor(&self) -> Vendor {
        let [_, b, c, d] = self.leaf(0, 0);
        let mut name = [0; 12];
        for (part, word) in name.chunks_exact_mut(4).zip([b, d, c]) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        match &name {
            b"GenuineIntel" => Vendor::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            _ => Vendor::Other,
        }
    }
}

/// Number of subleaves that are worth keeping.
fn subleaves(leaf: u32) -> u32 {
    match leaf {
        4 | 0xd | 0x8000_001d => 8,
        7 => 3,
        0xb => 4,
        _ => 1,
    }
}

fn unaffected(directory: &Path) -> BTreeSet<Flaw> {
    Flaw::REPORTS
        .iter()
        .filter(|(_, file, clear)| {
            std::fs::read_to_string(directory.join(file)).is_ok_and(|text| text.contains(clear))
        })
        .map(|&(flaw, _, _)| flaw)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unaffected_takes_only_what_the_kernel_clears() {
        let dir = std::env::temp_dir().join(format!("hospes-cpuid-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for (file, text) in [
            ("meltdown", "Not affected\n"),
            ("l1tf", "Mitigation: PTE Inversion\n"),
            (
                "mds",
                "Vulnerable: Clear CPU buffers attempted, no microcode\n",
            ),
            ("mmio_stale_data", "Unknown: No mitigations\n"),
            (
                "spectre_v2",
                "Mitigation: Enhanced IBRS; BHI: Not affected\n",
            ),
        ] {
            std::fs::write(dir.join(file), text).unwrap();
        }
        let found: Vec<Flaw> = unaffected(&dir).into_iter().collect();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(found, [Flaw::Meltdown, Flaw::BranchHistory]);
        assert!(unaffected(&dir).is_empty(), "without a report");
    }

    #[test]
    fn capture_knows_this_machine() {
        let host = HostCpu::capture();
        assert!(host.leaf(0, 0)[0] >= 1);
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|l| host.leaf(l, 0))
            .flat_map(u32::to_le_bytes)
            .collect();
        assert!(brand.iter().any(|&b| b != 0));
        assert_eq!(host.xcr0() & 3 == 3, std::is_x86_feature_detected!("xsave"));
    }
}
