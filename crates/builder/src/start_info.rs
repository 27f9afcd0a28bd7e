//! The PVH start information, its module list and its memory map.
//!
//! Source: Xen's public header arch-x86/hvm/start_info.h. All fields are little endian.

use zerocopy::{Immutable, IntoBytes};

/// First field of the start information.
pub const MAGIC: u32 = 0x336e_c578;
/// Version of the layout: the first that has a memory map.
pub const VERSION: u32 = 1;

/// `struct hvm_start_info`: its guest physical address is in EBX at the entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub struct StartInfo {
    pub magic: u32,
    pub version: u32,
    /// SIF_* flags; 0 for an unprivileged domain.
    pub flags: u32,
    pub nr_modules: u32,
    pub modlist_paddr: u64,
    pub cmdline_paddr: u64,
    pub rsdp_paddr: u64,
    pub memmap_paddr: u64,
    pub memmap_entries: u32,
    pub reserved: u32,
}

/// `struct hvm_modlist_entry`. Module 0 is the initial ramdisk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub struct Module {
    pub paddr: u64,
    pub size: u64,
    pub cmdline_paddr: u64,
    pub reserved: u64,
}

/// What a range of the memory map is; the numbers are those of the e820 map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemmapType {
    Ram = 1,
    Reserved = 2,
    /// ACPI tables that the guest must keep.
    AcpiNvs = 4,
}

/// `struct hvm_memmap_table_entry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub struct MemmapEntry {
    pub addr: u64,
    pub size: u64,
    /// A [`MemmapType`].
    pub kind: u32,
    pub reserved: u32,
}

impl MemmapEntry {
    pub(crate) fn new(addr: u64, size: u64, kind: MemmapType) -> MemmapEntry {
        MemmapEntry {
            addr,
            size,
            kind: kind as u32,
            reserved: 0,
        }
    }
}

const _: () = assert!(size_of::<StartInfo>() == 56);
const _: () = assert!(size_of::<Module>() == 32);
const _: () = assert!(size_of::<MemmapEntry>() == 24);
const _: () = assert!(std::mem::offset_of!(StartInfo, rsdp_paddr) == 32);
const _: () = assert!(std::mem::offset_of!(StartInfo, memmap_entries) == 48);

/// Where the parts of the boot information lie once it is placed at a base address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BootInfo<'a> {
    pub cmdline: &'a str,
    pub rsdp: u64,
    pub memmap: &'a [MemmapEntry],
    /// The initial ramdisk: address and size in bytes.
    pub ramdisk: Option<(u64, u64)>,
}

impl BootInfo<'_> {
    fn offsets(&self) -> (usize, usize, usize, usize) {
        let modlist = size_of::<StartInfo>();
        let memmap = modlist + self.ramdisk.iter().count() * size_of::<Module>();
        let cmdline = memmap + size_of_val(self.memmap);
        (modlist, memmap, cmdline, cmdline + self.cmdline.len() + 1)
    }

    /// Bytes it takes.
    pub fn size(&self) -> usize {
        self.offsets().3
    }

    /// The bytes to put at guest physical address `base`; the start information comes first.
    pub fn encode(&self, base: u64) -> Vec<u8> {
        let (modlist, memmap, cmdline, size) = self.offsets();
        let info = StartInfo {
            magic: MAGIC,
            version: VERSION,
            flags: 0,
            nr_modules: u32::from(self.ramdisk.is_some()),
            modlist_paddr: if self.ramdisk.is_some() {
                base + modlist as u64
            } else {
                0
            },
            cmdline_paddr: base + cmdline as u64,
            rsdp_paddr: self.rsdp,
            memmap_paddr: base + memmap as u64,
            memmap_entries: self.memmap.len() as u32,
            reserved: 0,
        };
        let mut bytes = Vec::with_capacity(size);
        bytes.extend_from_slice(info.as_bytes());
        if let Some((paddr, size)) = self.ramdisk {
            let module = Module {
                paddr,
                size,
                ..Module::default()
            };
            bytes.extend_from_slice(module.as_bytes());
        }
        bytes.extend_from_slice(self.memmap.as_bytes());
        bytes.extend_from_slice(self.cmdline.as_bytes());
        bytes.push(0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(b: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
    }

    fn u64_at(b: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn encode_puts_every_field_at_its_offset() {
        let map = [
            MemmapEntry::new(0, 0x400_0000, MemmapType::Ram),
            MemmapEntry::new(0xfeff_8000, 0x8000, MemmapType::Reserved),
        ];
        let info = BootInfo {
            cmdline: "console=hvc0",
            rsdp: 0xfc00_0000,
            memmap: &map,
            ramdisk: Some((0x500_0000, 1234)),
        };
        let b = info.encode(0x8_0000);
        assert_eq!(b.len(), info.size());
        assert_eq!(u32_at(&b, 0), 0x336e_c578);
        assert_eq!(u32_at(&b, 4), 1);
        assert_eq!(u32_at(&b, 8), 0);
        assert_eq!(u32_at(&b, 12), 1);
        assert_eq!(u64_at(&b, 32), 0xfc00_0000);
        assert_eq!(u32_at(&b, 48), 2);
        let modlist = (u64_at(&b, 16) - 0x8_0000) as usize;
        assert_eq!(u64_at(&b, modlist), 0x500_0000);
        assert_eq!(u64_at(&b, modlist + 8), 1234);
        let memmap = (u64_at(&b, 40) - 0x8_0000) as usize;
        assert_eq!(u64_at(&b, memmap + 8), 0x400_0000);
        assert_eq!(u32_at(&b, memmap + 16), 1);
        assert_eq!(u64_at(&b, memmap + 24), 0xfeff_8000);
        assert_eq!(u32_at(&b, memmap + 40), 2);
        let cmdline = (u64_at(&b, 24) - 0x8_0000) as usize;
        assert_eq!(&b[cmdline..], b"console=hvc0\0");
    }

    #[test]
    fn encode_without_ramdisk_has_no_modules() {
        let info = BootInfo {
            cmdline: "",
            rsdp: 0,
            memmap: &[],
            ramdisk: None,
        };
        let b = info.encode(0x1000);
        assert_eq!(u32_at(&b, 12), 0);
        assert_eq!(u64_at(&b, 16), 0);
        assert_eq!(b.len(), 57);
    }
}
