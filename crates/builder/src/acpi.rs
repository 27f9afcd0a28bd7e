//! The ACPI tables of a PVH domain: RSDP, XSDT, FADT (hardware-reduced), MADT, DSDT.
//!
//! Linux needs the MADT even with one CPU (without it there is no timer), and from the DSDT only `\_S5`, so that power-off
//! uses the sleep control register. Everything else a PC has (PM timer, PIC, PIT, RTC, VGA, IOAPIC) is declared absent.
//! Source: ACPI 6.4, chapters 5.2 and 4.8.

use acpi_tables::aml::{Name, Package, Path};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::{GenericAddress, Sdt};
use acpi_tables::{Aml, AmlSink};
use zerocopy::{Immutable, IntoBytes};

use crate::layout::{ACPI_BASE, ACPI_PAGES, LAPIC_BASE};
use hospes_units::PAGE_SIZE;

/// Byte-wide port of the FADT's SLEEP_CONTROL_REG: the guest writes [`POWER_OFF_REQUEST`] to power off.
pub const SLEEP_CONTROL_PORT: u16 = 0xb010;
/// Byte-wide port of the FADT's SLEEP_STATUS_REG: reads as 0 (nothing has woken the machine).
pub const SLEEP_STATUS_PORT: u16 = 0xb011;
/// What a guest writes to [`SLEEP_CONTROL_PORT`] to power off: sleep type 5 from `\_S5` in bits 4:2, SLP_EN in bit 5.
pub const POWER_OFF_REQUEST: u8 = SLEEP_TYPE_S5 << 2 | 1 << 5;
/// Most virtual CPUs of a domain; as many entries fit into the pages of the tables.
pub const MAX_VCPUS: u32 = 512;

const SLEEP_TYPE_S5: u8 = 5;
const OEM_ID: [u8; 6] = *b"Hospes";
const OEM_TABLE_ID: [u8; 8] = *b"HOSPESVM";
const OEM_REVISION: u32 = 1;

/// The local APIC id of a virtual CPU, equal in MADT, CPUID and APIC: twice its number, as under Xen.
pub const fn apic_id(vcpu: u32) -> u32 {
    2 * vcpu
}

/// The tables as bytes, to be placed at [`ACPI_BASE`]; the RSDP comes first.
pub(crate) fn tables(vcpus: u32) -> Vec<u8> {
    let mut area = Area(vec![0; align(Rsdp::len())]);
    let dsdt = area.push(&dsdt());
    let fadt = area.push(&fadt(dsdt));
    let madt = area.push(&madt(vcpus));
    let mut xsdt = table(*b"XSDT", 1, 36);
    xsdt.append_slice(&fadt.to_le_bytes());
    xsdt.append_slice(&madt.to_le_bytes());
    let xsdt = area.push(&xsdt);
    let mut rsdp = Bytes(Vec::new());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    area.0[..rsdp.0.len()].copy_from_slice(&rsdp.0);
    area.0
}

const fn align(n: usize) -> usize {
    n.next_multiple_of(64)
}

fn table(signature: [u8; 4], revision: u8, length: u32) -> Sdt {
    Sdt::new(
        signature,
        length,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    )
}

struct Area(Vec<u8>);

impl Area {
    /// Appends a table; its guest physical address.
    fn push(&mut self, table: &Sdt) -> u64 {
        let at = self.0.len();
        self.0.extend_from_slice(table.as_slice());
        self.0.resize(align(self.0.len()), 0);
        ACPI_BASE + at as u64
    }
}

struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn dsdt() -> Sdt {
    let mut aml = Bytes(Vec::new());
    let zero = 0u8;
    let sleep = SLEEP_TYPE_S5;
    Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&sleep, &sleep, &zero, &zero]),
    )
    .to_aml_bytes(&mut aml);
    let mut dsdt = table(*b"DSDT", 2, 36);
    dsdt.append_slice(&aml.0);
    dsdt
}

fn fadt(dsdt: u64) -> Sdt {
    const LENGTH: u32 = 268;
    const DSDT: usize = 40;
    const IAPC_BOOT_ARCH: usize = 109;
    const FLAGS: usize = 112;
    const MINOR_VERSION: usize = 131;
    const X_DSDT: usize = 140;
    const SLEEP_CONTROL: usize = 244;
    const SLEEP_STATUS: usize = 256;

    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_RTC: u16 = 1 << 5;

    const WBINVD: u32 = 1 << 0;
    const PWR_BUTTON_NOT_FIXED: u32 = 1 << 4;
    const SLP_BUTTON_NOT_FIXED: u32 = 1 << 5;
    const FORCE_APIC_PHYSICAL: u32 = 1 << 19;
    const HW_REDUCED: u32 = 1 << 20;

    let mut t = table(*b"FACP", 5, LENGTH);
    t.write_u32(DSDT, dsdt as u32);
    t.write_u16(IAPC_BOOT_ARCH, NO_VGA | NO_CMOS_RTC);
    t.write_u32(
        FLAGS,
        WBINVD | PWR_BUTTON_NOT_FIXED | SLP_BUTTON_NOT_FIXED | FORCE_APIC_PHYSICAL | HW_REDUCED,
    );
    t.write_u8(MINOR_VERSION, 1);
    t.write_u64(X_DSDT, dsdt);
    t.write(
        SLEEP_CONTROL,
        GenericAddress::io_port_address::<u8>(SLEEP_CONTROL_PORT),
    );
    t.write(
        SLEEP_STATUS,
        GenericAddress::io_port_address::<u8>(SLEEP_STATUS_PORT),
    );
    t
}

/// Processor local APIC structure, for ids below 255.
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct LocalApic {
    kind: u8,
    length: u8,
    processor_uid: u8,
    apic_id: u8,
    flags: u32,
}

/// Processor local x2APIC structure, for ids from 255.
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct LocalX2Apic {
    kind: u8,
    length: u8,
    reserved: u16,
    x2apic_id: u32,
    flags: u32,
    processor_uid: u32,
}

/// The processor UID is the vCPU number, which Linux takes for its Xen vCPU id. All are enabled: those that the
/// configuration starts without are put off-line by the guest itself, through xenstore.
fn madt(vcpus: u32) -> Sdt {
    const ENABLED: u32 = 1;
    const FLAGS_WITHOUT_PIC: u32 = 0;
    let mut body = Vec::new();
    body.extend_from_slice(&(LAPIC_BASE as u32).to_le_bytes());
    body.extend_from_slice(&FLAGS_WITHOUT_PIC.to_le_bytes());
    for vcpu in 0..vcpus {
        let id = apic_id(vcpu);
        match (u8::try_from(id), u8::try_from(vcpu)) {
            (Ok(apic_id), Ok(processor_uid)) if apic_id < 255 => body.extend_from_slice(
                LocalApic {
                    kind: 0,
                    length: size_of::<LocalApic>() as u8,
                    processor_uid,
                    apic_id,
                    flags: ENABLED,
                }
                .as_bytes(),
            ),
            _ => body.extend_from_slice(
                LocalX2Apic {
                    kind: 9,
                    length: size_of::<LocalX2Apic>() as u8,
                    reserved: 0,
                    x2apic_id: id,
                    flags: ENABLED,
                    processor_uid: vcpu,
                }
                .as_bytes(),
            ),
        }
    }
    let mut t = table(*b"APIC", 4, 36);
    t.append_slice(&body);
    t
}

// The MADT is the only table that grows; the others stay well below two pages.
const _: () = assert!(
    MAX_VCPUS as usize * size_of::<LocalX2Apic>() + 2 * PAGE_SIZE as usize
        <= (ACPI_PAGES * PAGE_SIZE) as usize
);

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(b: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
    }

    fn u64_at(b: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
    }

    fn sums_to_zero(b: &[u8]) -> bool {
        b.iter().fold(0u8, |s, &x| s.wrapping_add(x)) == 0
    }

    /// The table at a guest physical address, checked as a guest would.
    fn table_at(area: &[u8], gpa: u64, signature: &[u8; 4]) -> Vec<u8> {
        let at = (gpa - ACPI_BASE) as usize;
        let table = &area[at..at + u32_at(area, at + 4) as usize];
        assert_eq!(&table[..4], signature);
        assert!(sums_to_zero(table), "checksum");
        table.to_vec()
    }

    fn walk(vcpus: u32) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let area = tables(vcpus);
        assert!(area.len() as u64 <= ACPI_PAGES * PAGE_SIZE);
        assert_eq!(&area[..8], b"RSD PTR ");
        assert_eq!(area[15], 2, "revision");
        assert!(sums_to_zero(&area[..20]) && sums_to_zero(&area[..36]));
        let xsdt = table_at(&area, u64_at(&area, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 16);
        let fadt = table_at(&area, u64_at(&xsdt, 36), b"FACP");
        let madt = table_at(&area, u64_at(&xsdt, 44), b"APIC");
        let dsdt = table_at(&area, u64_at(&fadt, 140), b"DSDT");
        (fadt, madt, dsdt)
    }

    #[test]
    fn fadt_declares_reduced_hardware_and_the_sleep_registers() {
        let (fadt, _, _) = walk(1);
        assert_eq!(fadt.len(), 268);
        assert_eq!(fadt[8], 5);
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0x24);
        assert_eq!(u32_at(&fadt, 112) & (3 << 19), 3 << 19);
        for (at, port) in [(244, 0xb010), (256, 0xb011)] {
            assert_eq!(fadt[at..at + 4], [1, 8, 0, 1], "byte-wide system I/O");
            assert_eq!(u64_at(&fadt, at + 4), port);
        }
    }

    #[test]
    fn dsdt_holds_s5_with_sleep_type_5() {
        let (_, _, dsdt) = walk(1);
        // NameOp, root prefix, "_S5_", PackageOp, length, 4 elements: byte 5, byte 5, Zero, Zero.
        assert_eq!(
            dsdt[36..],
            [
                0x08, b'\\', b'_', b'S', b'5', b'_', 0x12, 0x08, 0x04, 0x0a, 5, 0x0a, 5, 0, 0
            ]
        );
        assert_eq!(POWER_OFF_REQUEST, 0x34);
    }

    #[test]
    fn madt_lists_every_vcpu_with_twice_its_number() {
        for vcpus in [1, 2, 127, 128, 129, MAX_VCPUS] {
            let (_, madt, _) = walk(vcpus);
            assert_eq!(u32_at(&madt, 36), 0xfee0_0000);
            assert_eq!(u32_at(&madt, 40), 0, "no PIC");
            let mut at = 44;
            for vcpu in 0..vcpus {
                let (uid, id, flags) = match madt[at] {
                    0 => (
                        u32::from(madt[at + 2]),
                        u32::from(madt[at + 3]),
                        u32_at(&madt, at + 4),
                    ),
                    9 => (
                        u32_at(&madt, at + 12),
                        u32_at(&madt, at + 4),
                        u32_at(&madt, at + 8),
                    ),
                    kind => panic!("entry of type {kind}"),
                };
                assert_eq!(madt[at] == 0, id < 255);
                assert_eq!((uid, id, flags), (vcpu, 2 * vcpu, 1));
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(at, madt.len());
        }
    }
}
