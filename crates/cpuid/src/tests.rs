//! Tables made for synthetic hosts.

use std::collections::BTreeSet;

use hospes_engine::cr;
use hospes_units::DomId;

use crate::*;

const POLICY: Policy<'static> = Policy {
    vcpus: 4,
    domid: DomId(5),
    tsc_khz: 2_600_000,
    nomigrate: false,
    level: Level::V3,
    wishes: &[],
    saved: None,
};

const NOW: Dynamic = Dynamic {
    vcpu: 3,
    apic_id: 6,
    osxsave: true,
    xcr0: 7,
};

const FLAWS: [Flaw; 10] = [
    Flaw::Meltdown,
    Flaw::L1tf,
    Flaw::Mds,
    Flaw::SpecStoreBypass,
    Flaw::TsxAsyncAbort,
    Flaw::MmioStaleData,
    Flaw::GatherDataSampling,
    Flaw::RegFileDataSampling,
    Flaw::TransientScheduler,
    Flaw::BranchHistory,
];

type Leaves = Vec<((u32, u32), [u32; 4])>;

fn vendor_leaf(name: &[u8; 12]) -> [u32; 4] {
    let w = |i: usize| u32::from_le_bytes(name[i..i + 4].try_into().unwrap());
    [0x20, w(0), w(8), w(4)]
}

/// A processor that claims every bit there is.
fn everything(name: &[u8; 12]) -> Leaves {
    let mut leaves: Leaves = Vec::new();
    for leaf in (1..=0x20).chain(0x8000_0000..=0x8000_0028) {
        for subleaf in 0..4 {
            leaves.push(((leaf, subleaf), [u32::MAX; 4]));
        }
    }
    leaves.push(((0, 0), vendor_leaf(name)));
    leaves
}

fn host(name: &[u8; 12]) -> HostCpu {
    HostCpu::new(everything(name), 0xe7, FLAWS)
}

const INTEL: &[u8; 12] = b"GenuineIntel";
const AMD: &[u8; 12] = b"AuthenticAMD";

fn table(host: &HostCpu) -> CpuidTable {
    CpuidTable::new(host, &POLICY).unwrap()
}

fn without(name: &[u8; 12], word: &Word, bit: u8) -> HostCpu {
    let mut leaves = everything(name);
    for (at, regs) in &mut leaves {
        if *at == (word.leaf, word.subleaf) {
            regs[word.reg as usize] &= !(1 << bit);
        }
    }
    HostCpu::new(leaves, 0xe7, FLAWS)
}

#[test]
fn features_name_every_bit_once() {
    let mut names = BTreeSet::new();
    let mut places = BTreeSet::new();
    for w in FEATURES {
        for f in w.features {
            assert!(names.insert(f.name), "{} is there twice", f.name);
            assert!(f.bit < 32);
            assert!(
                places.insert((w.leaf, w.subleaf, w.reg, f.bit)),
                "{} shares its bit",
                f.name
            );
            if let Offer::Hidden(reason) = f.offer {
                assert!(reason.len() > 8, "{} has no reason", f.name);
            }
        }
        assert!(w.features.windows(2).all(|p| p[0].bit < p[1].bit));
    }
}

#[test]
fn new_shows_nothing_that_is_hidden_or_unknown() {
    for name in [INTEL, AMD] {
        let t = table(&host(name));
        for w in FEATURES {
            let value = t.lookup(w.leaf, w.subleaf, &NOW)[w.reg as usize];
            let last = t.lookup(0x8000_0000, 0, &NOW)[0];
            let exists = w.leaf < 0x8000_0000 || w.leaf <= last;
            let mut known = 0;
            for f in w.features {
                known |= 1 << f.bit;
                let shown = value >> f.bit & 1 != 0;
                match f.offer {
                    Offer::Hidden(_) => assert!(!shown, "{} is shown", f.name),
                    Offer::Host(Need::V4 | Need::WithV4) => {
                        assert!(!shown, "{} is shown", f.name);
                    }
                    Offer::Implemented | Offer::Host(_) | Offer::Multiprocessor => {
                        assert_eq!(shown, exists, "{}", f.name);
                    }
                    Offer::OsXsave => assert!(shown),
                    Offer::ImplementedFor(v) | Offer::MultiprocessorFor(v) => {
                        assert_eq!(shown, v == t.vendor(), "{}", f.name);
                    }
                    Offer::Unaffected(_) => assert_eq!(shown, t.vendor() == Vendor::Amd),
                    Offer::HostPinned => assert!(!shown, "the domain may move"),
                }
            }
            if (w.leaf, w.reg) == (0x8000_0001, Reg::Edx) && name == AMD {
                known |= 0x0183_f3ff;
            }
            assert_eq!(
                value & !known,
                0,
                "leaf {:x}.{} {:?}",
                w.leaf,
                w.subleaf,
                w.reg
            );
        }
    }
}

#[test]
fn new_refuses_a_host_that_lacks_a_required_bit_by_its_name() {
    let mut required = 0;
    for name in [INTEL, AMD] {
        for w in FEATURES {
            for f in w.features {
                let made =
                    |level| CpuidTable::new(&without(name, w, f.bit), &Policy { level, ..POLICY });
                let missing = |level| {
                    Err(CpuidError::Missing {
                        name: f.name,
                        level,
                    })
                };
                match f.offer {
                    Offer::Host(Need::Base | Need::V2) => {
                        assert_eq!(made(Level::V3), missing(Level::V3));
                        assert_eq!(made(Level::V2), missing(Level::V2));
                        required += 1;
                    }
                    Offer::Host(Need::V3) => {
                        assert_eq!(made(Level::V3), missing(Level::V3));
                        assert!(made(Level::V2).is_ok(), "{}", f.name);
                        required += 1;
                    }
                    Offer::Host(Need::V4) => {
                        assert_eq!(made(Level::V4), missing(Level::V4));
                        assert!(made(Level::V3).is_ok(), "{}", f.name);
                        required += 1;
                    }
                    Offer::Host(Need::WithV4) => {
                        let shown = |t: CpuidTable| {
                            t.lookup(w.leaf, w.subleaf, &NOW)[w.reg as usize] >> f.bit & 1
                        };
                        let full = Policy {
                            level: Level::V4,
                            ..POLICY
                        };
                        assert_eq!(shown(made(Level::V4).unwrap()), 0, "{}", f.name);
                        assert_eq!(shown(CpuidTable::new(&host(name), &full).unwrap()), 1);
                    }
                    Offer::Host(Need::Optional) => {
                        let t = made(Level::V3).unwrap();
                        let value = t.lookup(w.leaf, w.subleaf, &NOW)[w.reg as usize];
                        assert_eq!(value >> f.bit & 1, 0, "{}", f.name);
                    }
                    _ => assert!(made(Level::V3).is_ok(), "{}", f.name),
                }
            }
        }
    }
    assert!(required >= 2 * 24);
    let message = CpuidError::Missing {
        name: "BMI2",
        level: Level::V3,
    }
    .to_string();
    assert!(message.contains("lacks BMI2") && message.contains("x86-64-v3"));
    let message = CpuidError::Missing {
        name: "AVX512VL",
        level: Level::V4,
    }
    .to_string();
    assert!(message.contains("lacks AVX512VL") && message.contains("cpu_level=\"x86-64-v3\""));
}

#[test]
fn new_refuses_a_host_whose_kernel_has_no_avx_state() {
    let h = HostCpu::new(everything(INTEL), 3, FLAWS);
    let disabled = |state, xcr0, level| Err(CpuidError::StateDisabled { state, xcr0, level });
    assert_eq!(CpuidTable::new(&h, &POLICY), disabled("AVX", 3, Level::V3));
    let narrow = HostCpu::new(everything(INTEL), 7, FLAWS);
    let level = Level::V4;
    assert_eq!(
        CpuidTable::new(&narrow, &Policy { level, ..POLICY }),
        disabled("AVX-512", 7, level)
    );
    let level = Level::V2;
    assert!(CpuidTable::new(&h, &Policy { level, ..POLICY }).is_ok());
}

#[test]
fn level_v3_is_the_whole_psabi_level() {
    let t = table(&host(AMD));
    let [_, _, c1, d1] = t.lookup(1, 0, &NOW);
    let [_, b7, _, _] = t.lookup(7, 0, &NOW);
    let [_, _, c81, d81] = t.lookup(0x8000_0001, 0, &NOW);
    // SSE3, SSSE3, FMA, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, XSAVE, OSXSAVE, AVX, F16C.
    let ecx = 1 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 22 | 1 << 23 | 0xf << 26;
    assert_eq!(c1 & ecx, ecx);
    // FPU, TSC, MSR, PAE, CX8, CMOV, MMX, FXSR, SSE, SSE2.
    let edx = 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 15 | 0xf << 23;
    assert_eq!(d1 & edx, edx);
    // BMI1, AVX2, BMI2.
    assert_eq!(b7 & 0x128, 0x128);
    // LAHF, LZCNT; SYSCALL, NX, LM.
    assert_eq!(c81 & 0x21, 0x21);
    assert_eq!(d81 & 0x2010_0800, 0x2010_0800);
}

#[test]
fn level_v2_has_neither_avx_nor_xsave() {
    let level = Level::V2;
    let t = CpuidTable::new(&host(INTEL), &Policy { level, ..POLICY }).unwrap();
    let c = t.lookup(1, 0, &NOW)[2];
    assert_eq!(c & (1 << 12 | 0xf << 26), 0);
    assert_eq!(t.supported_xcr0(), 0);
    assert_eq!(t.lookup(0xd, 0, &NOW), [0; 4]);
    assert_eq!(t.valid_cr4_bits() & cr::CR4_OSXSAVE, 0);
}

#[test]
fn lookup_mirrors_the_state_of_the_vcpu() {
    let t = table(&host(INTEL));
    let off = Dynamic {
        osxsave: false,
        xcr0: 1,
        ..NOW
    };
    assert_eq!(t.lookup(1, 0, &NOW)[2] >> 27 & 1, 1);
    assert_eq!(t.lookup(1, 0, &off)[2] >> 27 & 1, 0);
    assert_eq!(t.lookup(1, 0, &NOW)[1] >> 24, 6);
    assert_eq!(t.lookup(0xd, 0, &NOW), [7, 832, 832, 0]);
    assert_eq!(t.lookup(0xd, 0, &off), [7, 576, 832, 0]);
    assert_eq!(t.lookup(0xd, 1, &NOW), [7, 832, 0, 0]);
    assert_eq!(t.lookup(0xd, 2, &NOW), [256, 576, 0, 0]);
    assert_eq!(t.lookup(0xd, 9, &NOW), [0; 4]);
    assert_eq!(t.supported_xcr0(), 7);
    assert_eq!(t.lookup(0x4000_0004, 0, &NOW), [0x58, 3, 5, 0]);
}

#[test]
fn level_v4_is_the_whole_psabi_level_with_its_state() {
    for (places, size, aligned) in [([832, 896, 1408], 2432, 0), ([1088, 1152, 1664], 2688, 2)] {
        let mut leaves = everything(AMD);
        for (n, (bytes, at)) in [64, 512, 1024].into_iter().zip(places).enumerate() {
            leaves.push(((0xd, 5 + n as u32), [bytes, at, aligned, 0]));
        }
        let level = Level::V4;
        let host = HostCpu::new(leaves, 0x2e7, FLAWS);
        let t = CpuidTable::new(&host, &Policy { level, ..POLICY }).unwrap();
        // F, DQ, CD, BW, VL.
        let bits = 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31;
        assert_eq!(t.lookup(7, 0, &NOW)[1] & bits, bits);
        assert_eq!(t.supported_xcr0(), 0xe7);
        let wide = Dynamic { xcr0: 0xe7, ..NOW };
        assert_eq!(t.lookup(0xd, 0, &wide), [0xe7, size, size, 0]);
        assert_eq!(t.lookup(0xd, 0, &NOW), [0xe7, 832, size, 0]);
        assert_eq!(t.lookup(0xd, 1, &wide)[1], 576 + 256 + 64 + 512 + 1024);
        assert_eq!(t.lookup(0xd, 6, &wide), [512, places[1], aligned, 0]);
        assert_eq!(t.lookup(0xd, 9, &wide), [0; 4]);
    }
}

/// The table of a domain with wishes, on a host that has everything.
fn wishing(level: Level, wishes: &[(&str, Wish)]) -> Result<CpuidTable, CpuidError> {
    let wishes: Vec<_> = wishes.iter().map(|(n, w)| ((*n).to_owned(), *w)).collect();
    let wishes = &wishes;
    CpuidTable::new(
        &host(AMD),
        &Policy {
            level,
            wishes,
            ..POLICY
        },
    )
}

#[test]
fn wishes_show_and_hide_single_features() {
    let (f, bw) = (1 << 16, 1 << 30);
    let shows = [("avx512f", Wish::Show), ("avx512bw", Wish::Host)];
    let t = wishing(Level::V3, &shows).unwrap();
    assert_eq!(t.lookup(7, 0, &NOW)[1] & (f | bw | 1 << 31), f | bw);
    assert_eq!(t.supported_xcr0(), 0xe7);
    let t = wishing(
        Level::V4,
        &[("avx512-vbmi2", Wish::Hide), ("sse4.2", Wish::Hide)],
    )
    .unwrap();
    assert_eq!(t.lookup(7, 0, &NOW)[2] & (1 << 6 | 1 << 1), 1 << 1);
    assert_eq!(t.lookup(1, 0, &NOW)[2] & (3 << 19), 1 << 19);
    // What depends on a hidden feature is hidden with it, and so is its state.
    let t = wishing(Level::V4, &[("avx512f", Wish::Hide)]).unwrap();
    assert_eq!(t.lookup(7, 0, &NOW)[1] & (f | bw), 0);
    assert_eq!(t.supported_xcr0(), 7);
    let t = wishing(Level::V4, &[("xsave", Wish::Hide)]).unwrap();
    assert_eq!(t.lookup(1, 0, &NOW)[2] & (1 << 12 | 0xf << 26), 0);
    assert_eq!(
        (t.lookup(7, 0, &NOW)[1] & (1 << 5 | f), t.supported_xcr0()),
        (0, 0)
    );
}

#[test]
fn wishes_that_cannot_be_met_are_refused_with_a_reason() {
    for (wishes, want) in [
        (
            &[("turbo", Wish::Show)][..],
            "`cpuid' names the feature turbo",
        ),
        (
            &[("hle", Wish::Show)],
            "asks for HLE, which the guest cannot have (transactions",
        ),
        (&[("avx512bw", Wish::Show)], "nothing without AVX512F"),
        (
            &[("avx2", Wish::Show), ("avx", Wish::Hide)],
            "nothing without AVX",
        ),
        (
            &[("btc-no", Wish::Hide), ("ss", Wish::Show)],
            "asks for SS,",
        ),
    ] {
        let said = wishing(Level::V3, wishes).unwrap_err().to_string();
        assert!(said.contains(want), "{said}");
    }
}

#[test]
fn lookup_describes_cores_of_one_thread() {
    for name in [INTEL, AMD] {
        let t = table(&host(name));
        assert_eq!(t.lookup(0xb, 0, &NOW), [1, 1, 0x100, 6]);
        assert_eq!(t.lookup(0xb, 1, &NOW), [3, 4, 0x201, 6]);
        assert_eq!(t.lookup(0xb, 2, &NOW), [0, 0, 2, 6]);
        assert_eq!(t.lookup(1, 0, &NOW)[3] >> 28 & 1, 1, "HTT");
        let vcpus = 1;
        let one = CpuidTable::new(&host(name), &Policy { vcpus, ..POLICY }).unwrap();
        assert_eq!(one.lookup(1, 0, &NOW)[3] >> 28 & 1, 0);
        assert_eq!(one.lookup(0xb, 1, &NOW), [1, 1, 0x201, 6]);
    }
    let amd = table(&host(AMD));
    assert_eq!(amd.lookup(0x8000_001e, 0, &NOW), [6, 3, 0, 0]);
    assert_eq!(amd.lookup(0x8000_0008, 0, &NOW)[2], 3 | 3 << 12);
    assert_eq!(amd.lookup(4, 0, &NOW), [0; 4]);
    assert_eq!(amd.lookup(0x8000_001d, 0, &NOW)[0] >> 14 & 0xfff, 7);
    let intel = table(&host(INTEL));
    assert_eq!(intel.lookup(4, 0, &NOW)[0] >> 14 & 0xfff, 7);
    assert_eq!(intel.lookup(4, 9, &NOW), [0; 4]);
    assert_eq!(intel.lookup(0x8000_001e, 0, &NOW), [0; 4]);
}

#[test]
fn physical_address_width_is_that_of_the_host_up_to_46() {
    for (bits, want) in [(39, 39), (46, 46), (48, 46), (52, 46), (0, 36)] {
        let mut leaves = everything(INTEL);
        leaves.push(((0x8000_0008, 0), [bits | 57 << 8, 0, 0, 0]));
        let t = table(&HostCpu::new(leaves, 7, []));
        assert_eq!(t.lookup(0x8000_0008, 0, &NOW)[0], want | 48 << 8);
    }
}

#[test]
fn invariant_tsc_is_offered_only_where_the_domain_stays() {
    let nomigrate = true;
    let t = CpuidTable::new(
        &host(AMD),
        &Policy {
            nomigrate,
            ..POLICY
        },
    )
    .unwrap();
    assert_eq!(t.lookup(0x8000_0007, 0, &NOW), [0, 0, 0, 1 << 8]);
    assert_eq!(table(&host(AMD)).lookup(0x8000_0007, 0, &NOW), [0; 4]);
}

#[test]
fn mitigation_bits_spare_guests_what_translation_makes_useless() {
    let amd = table(&HostCpu::new(everything(AMD), 7, []));
    assert_eq!(amd.arch_capabilities(), None);
    let [a, _, c, _] = amd.lookup(0x8000_0021, 0, &NOW);
    assert_eq!(a, 1 << 2 | 1 << 6 | 1 << 8 | 1 << 9 | 3 << 29);
    assert_eq!(c, 0, "the host has not cleared TSA");
    assert_eq!(
        amd.lookup(0x8000_0008, 0, &NOW)[1],
        1 << 2 | 1 << 20 | 1 << 29
    );
    let clean = table(&host(AMD));
    assert_eq!(clean.lookup(0x8000_0021, 0, &NOW)[2], 6);
    assert_eq!(clean.lookup(0x8000_0008, 0, &NOW)[1] >> 26 & 1, 1);

    let intel = table(&host(INTEL));
    let d = intel.lookup(7, 0, &NOW)[3];
    assert_eq!(d, 1 << 4 | 1 << 26 | 1 << 29);
    assert_eq!(intel.lookup(7, 2, &NOW)[3] & 0x1f, 1 << 4);
    let caps = intel.arch_capabilities().unwrap();
    let (rdcl_no, ibrs_all, mds_no, its_no) = (1, 1 << 1, 1 << 5, 1 << 62);
    let want = rdcl_no | ibrs_all | mds_no | its_no;
    assert_eq!(caps & want, want);
}

#[test]
fn control_register_bits_follow_the_offer() {
    let t = table(&host(AMD));
    let cr4 = t.valid_cr4_bits();
    let want = cr::CR4_PAE
        | cr::CR4_PGE
        | cr::CR4_PCIDE
        | cr::CR4_OSXSAVE
        | cr::CR4_SMEP
        | cr::CR4_SMAP
        | cr::CR4_UMIP
        | cr::CR4_FSGSBASE
        | cr::CR4_OSFXSR;
    assert_eq!(cr4 & want, want);
    let never = cr::CR4_LA57 | cr::CR4_PKE | cr::CR4_VME | cr::CR4_MCE;
    assert_eq!(cr4 & never, 0);
    let efer = cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
    assert_eq!(t.valid_efer_bits(), efer | cr::EFER_AIBRSE);
    assert_eq!(table(&host(INTEL)).valid_efer_bits(), efer);
}

#[test]
fn identity_is_the_host_s() {
    let mut leaves = everything(AMD);
    leaves.push(((1, 0), [0x00a1_0f11, 0x0102_0800, u32::MAX, u32::MAX]));
    leaves.push(((0x8000_0002, 0), [1, 2, 3, 4]));
    let t = table(&HostCpu::new(leaves, 7, []));
    assert_eq!(t.vendor(), Vendor::Amd);
    assert_eq!(t.lookup(0, 0, &NOW)[1..], vendor_leaf(AMD)[1..]);
    assert_eq!(t.lookup(0x8000_0000, 0, &NOW)[1..], vendor_leaf(AMD)[1..]);
    assert_eq!(t.lookup(1, 0, &NOW)[0], 0x00a1_0f11);
    assert_eq!(t.lookup(0x8000_0001, 0, &NOW)[0], 0x00a1_0f11);
    assert_eq!(t.lookup(0x8000_0002, 0, &NOW), [1, 2, 3, 4]);
    assert_eq!(table(&host(b"HygonGenuine")).vendor(), Vendor::Amd);
    assert_eq!(table(&host(b"CentaurHauls")).vendor(), Vendor::Other);
}

#[test]
fn new_on_this_machine_names_what_is_missing_or_succeeds() {
    let has_v3 = ["avx2", "bmi1", "bmi2", "fma", "f16c", "lzcnt", "movbe"];
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let known = |n: &str| {
        flags
            .split_whitespace()
            .any(|f| f == n || (n == "lzcnt" && f == "abm"))
    };
    if has_v3.iter().all(|n| known(n)) {
        let t = table(&HostCpu::capture());
        assert_eq!(t.supported_xcr0(), 7);
    } else {
        assert!(CpuidTable::new(&HostCpu::capture(), &POLICY).is_err());
    }
}

/// The places of all optional bits.
fn optional() -> Vec<(u32, u32, Reg, u8)> {
    let places = FEATURES.iter().flat_map(|w| {
        let optional = w
            .features
            .iter()
            .filter(|f| f.offer == Offer::Host(Need::Optional));
        optional.map(|f| (w.leaf, w.subleaf, w.reg, f.bit))
    });
    places.collect()
}

proptest::proptest! {
    #[test]
    fn lookup_never_panics_and_stays_within_the_leaves(
        leaf: u32,
        near in 0u32..0x40,
        subleaf: u32,
        vcpus in 1u32..600,
        vcpu: u32,
        apic_id: u32,
        xcr0: u64,
    ) {
        let t = CpuidTable::new(&host(AMD), &Policy { vcpus, ..POLICY }).unwrap();
        let now = Dynamic { vcpu, apic_id, osxsave: true, xcr0 };
        for base in [0, 0x4000_0000, 0x8000_0000] {
            t.lookup(base + near, subleaf, &now);
        }
        if (0xe..0x4000_0000).contains(&leaf) || leaf > 0x8000_0021 {
            proptest::prop_assert_eq!(t.lookup(leaf, subleaf, &now), [0; 4]);
        }
    }

    #[test]
    fn new_offers_each_optional_bit_exactly_where_the_host_has_it(
        lacks in proptest::collection::btree_set(proptest::sample::select(optional()), 0..12),
    ) {
        let mut leaves = everything(AMD);
        for (at, regs) in &mut leaves {
            for &(leaf, subleaf, reg, bit) in &lacks {
                if *at == (leaf, subleaf) {
                    regs[reg as usize] &= !(1 << bit);
                }
            }
        }
        let t = table(&HostCpu::new(leaves, 7, []));
        for place in optional() {
            let (leaf, subleaf, reg, bit) = place;
            let shown = t.lookup(leaf, subleaf, &NOW)[reg as usize] >> bit & 1 != 0;
            proptest::prop_assert_eq!(shown, !lacks.contains(&place));
        }
    }
}

/// The table of a saved domain on another host.
fn kept(saved: &SavedFeatures, host: &HostCpu, level: Level) -> Result<CpuidTable, CpuidError> {
    let saved = Some(saved);
    CpuidTable::new(
        host,
        &Policy {
            level,
            saved,
            ..POLICY
        },
    )
}

#[test]
fn saved_features_are_kept_on_a_host_that_has_more() {
    for name in [INTEL, AMD] {
        let small = table(&host(name)).features();
        // At a higher level, and for one who says nothing, the domain keeps what it had.
        let t = kept(&small, &host(name), Level::V4).unwrap();
        assert_eq!(t.features(), small);
        assert_eq!(t.supported_xcr0(), 7);
    }
}

#[test]
fn saved_feature_that_the_host_lacks_is_named() {
    let saved = table(&host(AMD)).features();
    let word = FEATURES.iter().find(|w| {
        let optional = |f: &Feature| f.offer == Offer::Host(Need::Optional);
        w.features.iter().any(optional)
    });
    let word = word.expect("some are optional");
    let optional = |f: &&Feature| f.offer == Offer::Host(Need::Optional);
    let feature = word.features.iter().find(optional).expect("one is");
    let other = without(AMD, word, feature.bit);
    let fault = kept(&saved, &other, Level::V3).unwrap_err();
    assert!(fault.to_string().contains(feature.name), "{fault}");
    assert_eq!(
        kept(&saved, &host(INTEL), Level::V3),
        Err(CpuidError::SavedVendor)
    );
}
