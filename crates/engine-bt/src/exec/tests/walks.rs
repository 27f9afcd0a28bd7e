//! The page walk, by table.

use hospes_units::Gva;

use super::*;
use crate::exec::walk::pf;

const VA: u64 = 0x7f_1234_5678;
const FRAME: u64 = 0x50_0000;

fn go(m: &Machine, va: u64, a: Access) -> Result<Translation, u32> {
    walk(&m.cpu, &m.host.memory, Gva(va), a).map_err(|f| f.error_code)
}

fn every_bool<const N: usize>() -> impl Iterator<Item = [bool; N]> {
    (0..1u32 << N).map(|n| std::array::from_fn(|k| n >> k & 1 != 0))
}

/// The rules of the manuals, written as a list of prohibitions.
#[allow(clippy::too_many_arguments)]
fn forbidden(
    a: Access,
    rw: bool,
    us: bool,
    nx: bool,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
) -> bool {
    let supervisor = !a.user;
    let data = !a.exec;
    (a.user && !us)
        || (a.user && a.write && !rw)
        || (a.exec && nx)
        || (supervisor && a.exec && us && smep)
        || (supervisor && a.write && !rw && wp)
        || (supervisor && data && us && smap && (a.implicit || !ac))
}

#[test]
fn walk_permissions_every_combination() {
    let mut m = Machine::long();
    let leaf = m.leaf(VA);
    let kinds = [
        Access::read(false),
        Access::write(false),
        Access::exec(false),
        Access::read(true),
        Access::write(true),
        Access::exec(true),
        Access::SYSTEM_READ,
        Access::SYSTEM_WRITE,
    ];
    for [rw, us, nx, wp, smep, smap, ac] in every_bool() {
        for a in kinds {
            let flags =
                P | if rw { RW } else { 0 } | if us { US } else { 0 } | if nx { XD } else { 0 };
            m.poke(leaf, FRAME | flags);
            m.cpu.cr0 = m.cpu.cr0 & !cr::CR0_WP | if wp { cr::CR0_WP } else { 0 };
            m.cpu.cr4 = m.cpu.cr4 & !(cr::CR4_SMEP | cr::CR4_SMAP)
                | if smep { cr::CR4_SMEP } else { 0 }
                | if smap { cr::CR4_SMAP } else { 0 };
            m.cpu.rflags = rflags::FIXED | if ac { rflags::AC } else { 0 };
            let found = go(&m, VA, a);
            let what =
                format!("{a:?} rw={rw} us={us} nx={nx} wp={wp} smep={smep} smap={smap} ac={ac}");
            if forbidden(a, rw, us, nx, wp, smep, smap, ac) {
                let code = pf::PRESENT
                    | if a.write { pf::WRITE } else { 0 }
                    | if a.user { pf::USER } else { 0 }
                    | if a.exec { pf::FETCH } else { 0 };
                assert_eq!(found, Err(code), "{what}");
                assert_eq!(
                    m.peek(leaf),
                    FRAME | flags,
                    "{what}: no A or D after a fault"
                );
            } else {
                let expected = Translation {
                    gpa: Gpa(FRAME + 0x678),
                    page_bits: 12,
                    writable: rw,
                    user: us,
                    global: false,
                    dirty: a.write,
                    nx,
                };
                assert_eq!(found, Ok(expected), "{what}");
                let set = A | if a.write { D } else { 0 };
                assert_eq!(m.peek(leaf), FRAME | flags | set, "{what}");
            }
        }
    }
}

#[test]
fn walk_combines_rights_of_all_levels() {
    for (level, bit, expect_writable, expect_user) in [
        (39, RW, false, true),
        (30, US, true, false),
        (21, RW, false, true),
    ] {
        let mut m = Machine::long();
        let leaf = m.leaf(VA);
        m.poke(leaf, FRAME | P | RW | US);
        let mut table = PML4;
        for l in [39, 30, 21] {
            let slot = table + 8 * (VA >> l & 0x1ff);
            if l == level {
                let e = m.peek(slot);
                m.poke(slot, e & !bit);
            }
            table = m.peek(slot) & 0xf_ffff_f000;
        }
        let t = go(&m, VA, Access::read(false)).unwrap();
        assert_eq!((t.writable, t.user), (expect_writable, expect_user));
    }
}

#[test]
fn walk_sets_accessed_on_all_levels_and_dirty_on_the_last() {
    let mut m = Machine::long();
    let leaf = m.leaf(VA);
    m.poke(leaf, FRAME | P | RW);
    go(&m, VA, Access::write(false)).unwrap();
    let mut table = PML4;
    for l in [39, 30, 21] {
        let e = m.peek(table + 8 * (VA >> l & 0x1ff));
        assert_eq!(e & (A | D), A, "level {l}");
        table = e & 0xf_ffff_f000;
    }
    assert_eq!(m.peek(leaf) & (A | D), A | D);
}

#[test]
fn walk_not_present_and_reserved_give_their_codes() {
    let mut m = Machine::long();
    let leaf = m.leaf(VA);
    assert_eq!(go(&m, VA, Access::read(true)), Err(pf::USER));
    for bad in [1 << 51, 1 << PHYS_BITS] {
        m.poke(leaf, FRAME | P | bad);
        assert_eq!(
            go(&m, VA, Access::write(false)),
            Err(pf::PRESENT | pf::RESERVED | pf::WRITE)
        );
    }
    m.poke(leaf, FRAME | P | XD);
    m.cpu.msr.efer &= !cr::EFER_NXE;
    assert_eq!(
        go(&m, VA, Access::read(false)),
        Err(pf::PRESENT | pf::RESERVED)
    );
    // Without NX and SMEP the fetch bit is not reported.
    m.poke(leaf, 0);
    assert_eq!(go(&m, VA, Access::exec(false)), Err(0));
}

#[test]
fn walk_table_outside_memory_is_not_present() {
    let mut m = Machine::long();
    m.poke(PML4 + 8 * 5, (RAM + 0x1000) | P | RW);
    assert_eq!(go(&m, 5 << 39, Access::read(false)), Err(0));
}

#[test]
fn walk_large_pages_cover_their_ranges() {
    let mut m = Machine::long();
    let pdpt = 0x70_0000;
    m.poke(PML4 + 8 * 7, pdpt | P | RW | US);
    m.poke(pdpt, P | RW | PS | G);
    m.poke(pdpt + 8, (pdpt + 0x1000) | P | RW | US);
    m.poke(pdpt + 0x1000 + 8, 0x40_0000 | P | RW | PS);
    let va = 7 << 39;
    m.cpu.cr4 |= cr::CR4_PGE;
    let t = go(&m, va + 0x12_3456, Access::read(false)).unwrap();
    assert_eq!((t.gpa, t.page_bits, t.global), (Gpa(0x12_3456), 30, true));
    let va = va + (1 << 30) + (2 << 20);
    let t = go(&m, va + 0x12_3456, Access::write(false)).unwrap();
    assert_eq!((t.gpa, t.page_bits, t.global), (Gpa(0x52_3456), 21, false));
    assert_eq!(m.peek(pdpt + 0x1008) & (A | D), A | D);
    m.poke(pdpt + 0x1008, 0x40_2000 | P | RW | PS);
    assert_eq!(
        go(&m, va, Access::read(false)),
        Err(pf::PRESENT | pf::RESERVED)
    );
}

#[test]
fn walk_two_level_and_page_size_extension() {
    let mut m = Machine::protected();
    let (pd, pt) = (0x70_0000u64, 0x70_1000u64);
    m.cpu.cr0 |= cr::CR0_PG;
    m.cpu.cr3 = pd;
    m.host
        .memory
        .write_obj(Gpa(pd + 4), &(pt as u32 | 7))
        .unwrap();
    m.host
        .memory
        .write_obj(Gpa(pt + 8), &0x0050_0003u32)
        .unwrap();
    let va = 0x40_2123;
    let t = go(&m, va, Access::write(false)).unwrap();
    assert_eq!((t.gpa, t.user, t.dirty), (Gpa(0x50_0123), false, true));
    assert_eq!(m.peek(pt + 8) as u32, 0x0050_0063);
    assert_eq!(m.peek(pd + 4) as u32, pt as u32 | 0x27);
    assert_eq!(go(&m, va, Access::read(true)), Err(pf::PRESENT | pf::USER));
    // With PSE bit 7 makes it a 4 MiB page; bits 20:13 are address bits 39:32.
    m.host
        .memory
        .write_obj(Gpa(pd + 4), &0x0080_2083u32)
        .unwrap();
    m.cpu.cr4 |= cr::CR4_PSE;
    let t = go(&m, va, Access::read(false)).unwrap();
    assert_eq!((t.gpa, t.page_bits), (Gpa(0x1_0080_2123), 22));
}

#[test]
fn walk_pae_uses_four_pointers() {
    let mut m = Machine::protected();
    let (root, pd) = (0x70_0020u64, 0x70_1000u64);
    m.cpu.cr0 |= cr::CR0_PG;
    m.cpu.cr4 |= cr::CR4_PAE;
    m.cpu.cr3 = root;
    m.poke(root + 24, pd | P);
    m.poke(pd + 8, 0x20_0000 | P | RW | US | PS);
    let va = 0xc020_0042;
    let t = go(&m, va, Access::write(true)).unwrap();
    assert_eq!((t.gpa, t.page_bits, t.user), (Gpa(0x20_0042), 21, true));
    m.poke(root + 24, pd | P | RW);
    assert_eq!(
        go(&m, va, Access::read(false)),
        Err(pf::PRESENT | pf::RESERVED)
    );
}

#[test]
fn walk_without_paging_is_identity() {
    let m = Machine::protected();
    let t = go(&m, 0x1_0000_1234, Access::write(false)).unwrap();
    assert_eq!(t.gpa, Gpa(0x1234));
}
