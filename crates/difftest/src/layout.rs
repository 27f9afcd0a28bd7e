//! Where a case's memory lies: the same virtual addresses in the oracle's process and in the guest.
//!
//! Eleven backing pages are shown in a window at three bases, one below 4 GiB (for 32-bit code too) and two whose addresses need 64 bits.

pub const PAGE: u64 = 4096;

/// Bases of the windows.
pub const LOW: u64 = 0x2000_0000;
pub const HIGH: u64 = 0x2b12_3450_0000;
pub const OTHER: u64 = 0x5e93_2bc7_0000;
pub const WINDOWS: [u64; 3] = [LOW, HIGH, OTHER];

/// Window offsets. What lies between the regions is not mapped.
pub const CODE: u64 = 0x1_0000;
pub const PATCHABLE: u64 = 0x2_0000;
pub const DATA: u64 = 0x3_0000;
pub const READ_ONLY: u64 = 0x3_4000;
pub const STACK: u64 = 0x4_0000;
/// The patchable pages once more, writable but not executable.
pub const ALIAS: u64 = 0x5_0000;

/// A run of pages with the same rights.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub offset: u64,
    /// Number of the first backing page.
    pub backing: usize,
    pub pages: usize,
    pub write: bool,
    pub exec: bool,
}

const fn region(offset: u64, backing: usize, pages: usize, write: bool, exec: bool) -> Region {
    Region {
        offset,
        backing,
        pages,
        write,
        exec,
    }
}

pub const REGIONS: [Region; 6] = [
    region(CODE, 0, 2, false, true),
    region(PATCHABLE, 2, 2, true, true),
    region(DATA, 4, 4, true, false),
    region(READ_ONLY, 8, 1, false, false),
    region(STACK, 9, 2, true, false),
    region(ALIAS, 2, 2, true, false),
];

/// Backing pages of a window.
pub const PAGES: usize = 11;
/// Bytes of the backing pages.
pub const IMAGE_BYTES: usize = PAGES * PAGE as usize;
/// Backing pages from which code may run.
pub const CODE_PAGES: usize = 4;

/// Position in the backing pages of a window offset, with the bytes left in its region.
pub fn backing(offset: u64) -> Option<(usize, usize)> {
    REGIONS.iter().find_map(|r| {
        let inside = offset.checked_sub(r.offset)?;
        let len = r.pages as u64 * PAGE;
        (inside < len).then(|| {
            (
                r.backing * PAGE as usize + inside as usize,
                (len - inside) as usize,
            )
        })
    })
}

/// The contents that every case starts from: code pages full of INT3, the others random.
pub fn base_image() -> Vec<u8> {
    let mut rng = crate::rng::Rng::new(1);
    let mut image = vec![0xcc; IMAGE_BYTES];
    for chunk in image[CODE_PAGES * PAGE as usize..].chunks_exact_mut(16) {
        chunk.copy_from_slice(&rng.vector());
    }
    image
}
