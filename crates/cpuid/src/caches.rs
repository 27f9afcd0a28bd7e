//! The host's caches as a guest sees them: sizes are the host's, sharing is the guest's.
//!
//! Every virtual CPU is a core of its own with two APIC ids, of which it uses the even one. All are in one package that
//! shares the last level.

/// Bits of an APIC id that number the CPUs of the package: ids go up to 2 * vcpus - 1.
pub(crate) fn package_id_bits(vcpus: u32) -> u32 {
    (2 * vcpus).next_power_of_two().trailing_zeros()
}

/// Rewrites subleaves of leaf 4 (Intel) or 8000_001D (AMD): the host's as `subleaves`, up to the first that is no cache.
pub(crate) fn caches(
    subleaves: impl Iterator<Item = [u32; 4]>,
    vcpus: u32,
    cores_in_eax: bool,
) -> Vec<[u32; 4]> {
    const TYPE: u32 = 0x1f;
    const SHARING_SHIFT: u32 = 14;
    const SHARING_MAX: u32 = 0xfff;
    const CORES_SHIFT: u32 = 26;
    const CORES_MAX: u32 = 0x3f;
    const KEPT: u32 = (1 << SHARING_SHIFT) - 1;
    const LEVEL_SHIFT: u32 = 5;

    let ids_in_package = (1 << package_id_bits(vcpus)) - 1;
    subleaves
        .take_while(|c| c[0] & TYPE != 0)
        .map(|[eax, ebx, ecx, edx]| {
            let level = eax >> LEVEL_SHIFT & 7;
            let sharing: u32 = if level >= 3 { ids_in_package } else { 1 };
            let cores = if cores_in_eax {
                (vcpus.next_power_of_two() - 1).min(CORES_MAX)
            } else {
                0
            };
            let eax = eax & KEPT | sharing.min(SHARING_MAX) << SHARING_SHIFT | cores << CORES_SHIFT;
            [eax, ebx, ecx, edx]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_id_bits_cover_twice_the_vcpus() {
        for (vcpus, bits) in [(1, 1), (2, 2), (3, 3), (4, 3), (64, 7), (128, 8)] {
            assert_eq!(package_id_bits(vcpus), bits, "{vcpus}");
        }
    }

    #[test]
    fn caches_keep_sizes_and_share_only_the_last_level() {
        let host = [
            [0x1c00_4121, 0x01c0_003f, 0x3f, 0],
            [0x1c00_4143, 0x03c0_003f, 0x3ff, 0],
            [0x1c03_c163, 0x02c0_003f, 0x2fff, 4],
            [0; 4],
            [0x21, 1, 1, 1],
        ];
        let got = caches(host.into_iter(), 4, true);
        assert_eq!(got.len(), 3, "ends at the first empty one");
        for (g, h) in got.iter().zip(&host) {
            assert_eq!(g[1..], h[1..]);
            assert_eq!(g[0] & 0x3fff, h[0] & 0x3fff);
            assert_eq!(g[0] >> 26, 3);
        }
        let sharing: Vec<u32> = got.iter().map(|c| c[0] >> 14 & 0xfff).collect();
        assert_eq!(sharing, [1, 1, 7]);
        assert_eq!(caches(host.into_iter(), 4, false)[2][0] >> 26, 0);
    }
}
