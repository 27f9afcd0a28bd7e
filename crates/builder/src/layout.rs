//! Where things lie in a domain's physical address space (as Xen's tool stack places them for PVH).
//!
//! A guest maps grant frames and foreign pages at addresses that its memory map does not mention, so everything the
//! monitor owns is listed there.

use hospes_memory::Range;
use hospes_units::{Gfn, PAGE_SIZE};

use crate::BuildError;
use crate::start_info::{MemmapEntry, MemmapType};

/// End of the RAM below 4 GiB; what is left follows at 4 GiB.
pub const LOW_RAM_END: u64 = 0xfc00_0000;
/// ACPI tables: [`ACPI_PAGES`] pages, backed, kept by the guest because AML may read them.
pub const ACPI_BASE: u64 = LOW_RAM_END;
/// Pages reserved for ACPI tables.
pub const ACPI_PAGES: u64 = 17;
/// The local APIC's page; not backed.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Eight special pages; xenstore and console rings are among them.
pub const SPECIAL_BASE: u64 = 0xfeff_8000;
/// End of the special pages.
pub const SPECIAL_END: u64 = 0xff00_0000;
/// Frame of the xenstore ring (`HVM_PARAM_STORE_PFN`).
pub const XENSTORE_GFN: Gfn = Gfn(0xfeffc);
/// Frame of the console ring (`HVM_PARAM_CONSOLE_PFN`).
pub const CONSOLE_GFN: Gfn = Gfn(0xfefff);

const HIGH_RAM_START: u64 = 1 << 32;
/// Least memory of a domain, in bytes: below this no 64-bit kernel gets to its first message.
pub const MEMORY_BYTES_MIN: u64 = 1 << 20;
/// Most memory of a domain, in bytes: the guest physical address width offered is 46 bits.
pub const MEMORY_BYTES_MAX: u64 = 1 << 45;

/// Guest physical layout of one domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM proper, ascending.
    pub ram: Vec<Range>,
    /// Everything that memory must stand behind, ascending: RAM, ACPI tables, special pages. For
    /// [`hospes_memory::GuestMemory::new`].
    pub backed: Vec<Range>,
    /// The pages of the ACPI tables.
    pub acpi: Range,
    /// The special pages.
    pub special: Range,
    /// Frame of the xenstore ring.
    pub xenstore: Gfn,
    /// Frame of the console ring.
    pub console: Gfn,
}

/// Lays out a domain with `memory_bytes` bytes of RAM, all of it visible to the guest as RAM.
pub fn memory_layout(memory_bytes: u64) -> Result<Layout, BuildError> {
    if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&memory_bytes)
        || !memory_bytes.is_multiple_of(PAGE_SIZE)
    {
        return Err(BuildError::MemorySize {
            bytes: memory_bytes,
            min_mib: MEMORY_BYTES_MIN >> 20,
            max_mib: MEMORY_BYTES_MAX >> 20,
        });
    }
    let low = memory_bytes.min(LOW_RAM_END);
    let mut ram = vec![Range { start: 0, end: low }];
    let acpi = Range {
        start: ACPI_BASE,
        end: ACPI_BASE + ACPI_PAGES * PAGE_SIZE,
    };
    let special = Range {
        start: SPECIAL_BASE,
        end: SPECIAL_END,
    };
    let mut backed = vec![ram[0], acpi, special];
    if memory_bytes > low {
        let high = Range {
            start: HIGH_RAM_START,
            end: HIGH_RAM_START + (memory_bytes - low),
        };
        ram.push(high);
        backed.push(high);
    }
    Ok(Layout {
        ram,
        backed,
        acpi,
        special,
        xenstore: XENSTORE_GFN,
        console: CONSOLE_GFN,
    })
}

impl Layout {
    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.ram.iter().map(|r| r.end - r.start).sum()
    }

    /// End of the RAM that a 32-bit address reaches.
    pub(crate) fn low_ram_end(&self) -> u64 {
        self.ram
            .iter()
            .filter(|r| r.start < HIGH_RAM_START)
            .map(|r| r.end)
            .max()
            .unwrap_or(0)
    }

    /// Whether `start..end` is RAM throughout.
    pub(crate) fn is_ram(&self, start: u64, end: u64) -> bool {
        self.ram.iter().any(|r| r.start <= start && end <= r.end)
    }

    /// The memory map given to the guest, ascending.
    pub fn memmap(&self) -> Vec<MemmapEntry> {
        let entry = |r: Range, kind| MemmapEntry::new(r.start, r.end - r.start, kind);
        let lapic = Range {
            start: LAPIC_BASE,
            end: LAPIC_BASE + PAGE_SIZE,
        };
        let mut map: Vec<MemmapEntry> = self
            .ram
            .iter()
            .map(|&r| entry(r, MemmapType::Ram))
            .collect();
        map.push(entry(self.acpi, MemmapType::AcpiNvs));
        map.push(entry(lapic, MemmapType::Reserved));
        map.push(entry(self.special, MemmapType::Reserved));
        map.sort_by_key(|e| e.addr);
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hospes_memory::GuestMemory;

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_layout_of_small_domain_has_one_ram_range() {
        let l = memory_layout(64 * MIB).unwrap();
        assert_eq!(
            l.ram,
            [Range {
                start: 0,
                end: 64 * MIB
            }]
        );
        assert_eq!(l.backed.len(), 3);
        assert_eq!(l.ram_bytes(), 64 * MIB);
    }

    #[test]
    fn memory_layout_of_large_domain_continues_above_4_gib() {
        let l = memory_layout(16384 * MIB).unwrap();
        assert_eq!(l.ram[0].end, 0xfc00_0000);
        assert_eq!(
            l.ram[1],
            Range {
                start: 1 << 32,
                end: (1 << 32) + 16384 * MIB - 0xfc00_0000
            }
        );
        assert_eq!(l.ram_bytes(), 16384 * MIB);
        assert!(l.backed.windows(2).all(|w| w[0].end <= w[1].start));
    }

    #[test]
    fn memory_layout_backs_the_special_frames() {
        let l = memory_layout(64 * MIB).unwrap();
        let m = GuestMemory::new(&l.backed).unwrap();
        for gfn in [
            l.xenstore,
            l.console,
            Gfn(0xfc000),
            Gfn(0xfc010),
            Gfn(0xfeff8),
        ] {
            assert!(m.is_backed(gfn), "{gfn}");
        }
        for gfn in [Gfn(0xfc011), Gfn(0xfee00), Gfn(0xff000), Gfn(0x4000)] {
            assert!(!m.is_backed(gfn), "{gfn}");
        }
    }

    #[test]
    fn memmap_lists_everything_in_order_without_overlap() {
        for mib in [1, 64, 4032, 4033, 16384, 65536] {
            let l = memory_layout(mib * MIB).unwrap();
            let map = l.memmap();
            assert!(map.windows(2).all(|w| w[0].addr + w[0].size <= w[1].addr));
            let of = |kind: MemmapType| -> u64 {
                map.iter()
                    .filter(|e| e.kind == kind as u32)
                    .map(|e| e.size)
                    .sum()
            };
            assert_eq!(of(MemmapType::Ram), mib * MIB);
            assert_eq!(of(MemmapType::AcpiNvs), 17 * 4096);
            assert_eq!(of(MemmapType::Reserved), 9 * 4096);
        }
    }

    #[test]
    fn memory_layout_refuses_impossible_sizes() {
        for bytes in [0, 4096, 64 * MIB + 1, u64::MAX, !4095] {
            assert!(
                matches!(memory_layout(bytes), Err(BuildError::MemorySize { .. })),
                "{bytes}"
            );
        }
    }
}
