//! Xen's own leaves.
//!
//! Source: Xen's public/arch-x86/cpuid.h. They are the only hypervisor leaves: guests take the one with the highest base.

/// First leaf.
pub(crate) const BASE: u32 = 0x4000_0000;
/// Last leaf.
pub(crate) const LAST: u32 = BASE + 4;

/// Interface version, 4.17: the first with vectors for events of each CPU.
const VERSION: u32 = 4 << 16 | 17;
/// MSR through which a guest asks for a page of hypercall stubs.
const HYPERCALL_MSR: u32 = 0x4000_0000;

const TSC_HOST_RELIABLE: u32 = 1 << 1;
const TSC_RDTSCP: u32 = 1 << 2;

const VCPU_ID_PRESENT: u32 = 1 << 3;
const DOMID_PRESENT: u32 = 1 << 4;
const UPCALL_VECTOR: u32 = 1 << 6;

/// What the leaves say of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct XenLeaves {
    pub domid: u32,
    pub tsc_khz: u32,
    /// The host's TSC runs at one rate for ever.
    pub tsc_reliable: bool,
}

impl XenLeaves {
    pub fn lookup(&self, leaf: u32, subleaf: u32, vcpu: u32) -> [u32; 4] {
        let word = |name: &[u8; 4]| u32::from_le_bytes(*name);
        match (leaf - BASE, subleaf) {
            (0, _) => [LAST, word(b"XenV"), word(b"MMXe"), word(b"nVMM")],
            (1, _) => [VERSION, 0, 0, 0],
            (2, _) => [1, HYPERCALL_MSR, 0, 0],
            (3, 0) => {
                let reliable = if self.tsc_reliable {
                    TSC_HOST_RELIABLE
                } else {
                    0
                };
                // tsc_mode 0 (default), incarnation 0.
                [TSC_RDTSCP | reliable, 0, self.tsc_khz, 0]
            }
            (3, 1) => {
                let (mul, shift) = ns_of_tsc(self.tsc_khz);
                // The guest's TSC is the host's: offset 0.
                [0, 0, mul, shift as i32 as u32]
            }
            (3, 2) => [self.tsc_khz, 0, 0, 0],
            (4, 0) => [
                VCPU_ID_PRESENT | DOMID_PRESENT | UPCALL_VECTOR,
                vcpu,
                self.domid,
                0,
            ],
            _ => [0; 4],
        }
    }
}

/// Multiplier (a fraction of 2^32) and shift such that ns = (ticks << shift) * mul >> 32; a negative shift goes right.
fn ns_of_tsc(khz: u32) -> (u32, i8) {
    const NS_PER_MS: u64 = 1_000_000;
    if khz == 0 {
        return (0, 0);
    }
    let (mut hz_scaled, mut shift) = (u64::from(khz), 0i8);
    // The fraction NS_PER_MS / khz is brought into [0.5, 1).
    while hz_scaled <= NS_PER_MS {
        hz_scaled <<= 1;
        shift += 1;
    }
    let mut ns = NS_PER_MS;
    while 2 * ns < hz_scaled {
        ns <<= 1;
        shift -= 1;
    }
    (((ns << 32) / hz_scaled) as u32, shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    const XEN: XenLeaves = XenLeaves {
        domid: 7,
        tsc_khz: 2_596_134,
        tsc_reliable: true,
    };

    #[test]
    fn lookup_gives_the_signature_and_what_linux_reads() {
        let [max, b, c, d] = XEN.lookup(BASE, 0, 0);
        let name: Vec<u8> = [b, c, d].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(name, b"XenVMMXenVMM");
        assert!(max - BASE >= 2);
        assert_eq!(XEN.lookup(BASE + 1, 0, 0)[0], 0x0004_0011);
        assert_eq!(XEN.lookup(BASE + 2, 0, 0), [1, 0x4000_0000, 0, 0]);
        assert_eq!(XEN.lookup(BASE + 3, 0, 0), [6, 0, 2_596_134, 0]);
        assert_eq!(XEN.lookup(BASE + 4, 0, 3), [0x58, 3, 7, 0]);
        assert_eq!(XEN.lookup(BASE + 4, 1, 3), [0; 4]);
    }

    #[test]
    fn ns_of_tsc_turns_ticks_into_nanoseconds() {
        for khz in [1, 999, 1_000_000, 1_000_001, 2_596_134, 5_800_000, u32::MAX] {
            let (mul, shift) = ns_of_tsc(khz);
            // A second's ticks, in 128 bits so that no precision is lost on the way.
            let ticks = u128::from(khz) * 1000;
            let ns = if shift < 0 {
                (ticks * u128::from(mul)) >> (32 - i32::from(shift))
            } else {
                ((ticks << shift) * u128::from(mul)) >> 32
            };
            assert!(ns.abs_diff(1_000_000_000) <= 2, "{khz} kHz: {ns}");
            assert!(mul >= 1 << 31);
        }
        assert_eq!(ns_of_tsc(0), (0, 0));
    }
}
