//! IA32_ARCH_CAPABILITIES, as guests with an Intel processor see it.
//!
//! What reads data that belongs to another (Meltdown, MDS and kin) is answered as the host's kernel does. What is about the
//! prediction of guest branches, or about guest page tables, is answered for translated code; see [`crate::features`].

use crate::host::{Flaw, HostCpu};

struct Capability {
    bit: u8,
    /// Flaws that must all be absent from the host; none: always set.
    without: &'static [Flaw],
}

const fn always(bit: u8) -> Capability {
    Capability { bit, without: &[] }
}

const fn unless(bit: u8, without: &'static [Flaw]) -> Capability {
    Capability { bit, without }
}

const CAPABILITIES: &[Capability] = &[
    // RDCL_NO: no page-table isolation, no inverted page-table entries.
    unless(0, &[Flaw::Meltdown, Flaw::L1tf]),
    // IBRS_ALL: one write to the SPEC_CTRL latch at boot, plain indirect branches instead of retpolines.
    always(1),
    // SSB_NO.
    unless(4, &[Flaw::SpecStoreBypass]),
    // MDS_NO: no VERW at each return to user mode.
    unless(5, &[Flaw::Mds]),
    // PSCHANGE_MC_NO: the machine check needs a guest page table in the hardware.
    always(6),
    // TAA_NO: transactions are hidden besides.
    unless(8, &[Flaw::TsxAsyncAbort]),
    // SBDR_SSDP_NO, FBSDP_NO, PSDP_NO: no VERW for stale data of MMIO.
    unless(13, &[Flaw::MmioStaleData]),
    unless(14, &[Flaw::MmioStaleData]),
    unless(15, &[Flaw::MmioStaleData]),
    // BHI_NO.
    unless(20, &[Flaw::BranchHistory]),
    // PBRSB_NO: the guest never leaves a guest of its own.
    always(24),
    // GDS_NO.
    unless(26, &[Flaw::GatherDataSampling]),
    // RFDS_NO.
    unless(27, &[Flaw::RegFileDataSampling]),
    // ITS_NO: where a guest's indirect branches lie in a cache line is not where the translated ones lie.
    always(62),
];

/// The value for a guest on this host.
pub(crate) fn arch_capabilities(host: &HostCpu) -> u64 {
    CAPABILITIES
        .iter()
        .filter(|c| c.without.iter().all(|&flaw| host.is_unaffected(flaw)))
        .fold(0, |value, c| value | 1 << c.bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arch_capabilities_of_an_affected_host_claim_nothing_about_data() {
        let host = HostCpu::new([], 0, [Flaw::Meltdown]);
        assert_eq!(
            arch_capabilities(&host),
            1 << 1 | 1 << 6 | 1 << 24 | 1 << 62
        );
    }

    #[test]
    fn arch_capabilities_follow_the_host_s_report() {
        let has = |flaws: &[Flaw], bits: u64| {
            let host = HostCpu::new([], 0, flaws.iter().copied());
            let value = arch_capabilities(&host);
            value & bits == bits
        };
        assert!(has(&[Flaw::Meltdown, Flaw::L1tf], 1 << 0));
        assert!(has(&[Flaw::Mds], 1 << 5));
        assert!(has(&[Flaw::MmioStaleData], 7 << 13));
        assert!(has(&[Flaw::RegFileDataSampling], 1 << 27));
        assert!(has(&[Flaw::GatherDataSampling], 1 << 26));
    }
}
