//! Entries of L1 and L2 tables.

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an L1 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct L1Entry {
    /// The L2 table; 0 if there is none.
    pub(crate) offset: u64,
    /// Nobody else refers to it, so that it may be changed.
    pub(crate) copied: bool,
}

impl L1Entry {
    pub(crate) fn decode(raw: u64) -> L1Entry {
        L1Entry {
            offset: raw & OFFSET,
            copied: raw & COPIED != 0,
        }
    }

    /// An entry for a table of the active L1 alone.
    pub(crate) fn own(offset: u64) -> u64 {
        offset | COPIED
    }
}

/// What an L2 entry says of a cluster of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L2Entry {
    /// What the backing file has.
    Unallocated,
    /// Zeros; space may be set aside for it, which is not used.
    Zero { reserved: Option<u64> },
    /// At an offset of the file. `copied`: nobody else refers to it.
    Data { offset: u64, copied: bool },
    /// `bytes` at most at any offset, compressed.
    Compressed { offset: u64, bytes: u64 },
}

impl L2Entry {
    /// Reads an entry. Version 2 has no zero clusters: there the bit has no meaning.
    pub(crate) fn decode(raw: u64, cluster_bits: u32, version: u32) -> L2Entry {
        if raw & COMPRESSED != 0 {
            let offset_bits = 62 - (cluster_bits - 8);
            let offset = raw & ((1 << offset_bits) - 1);
            let more_sectors = (raw & (COMPRESSED - 1)) >> offset_bits;
            // The first sector counts from the offset to its end.
            let bytes = (more_sectors + 1) * 512 - offset % 512;
            return L2Entry::Compressed { offset, bytes };
        }
        let offset = raw & OFFSET;
        if raw & ZERO != 0 && version >= 3 {
            let reserved = (offset != 0).then_some(offset);
            return L2Entry::Zero { reserved };
        }
        if offset == 0 {
            return L2Entry::Unallocated;
        }
        L2Entry::Data {
            offset,
            copied: raw & COPIED != 0,
        }
    }

    /// An entry for a cluster of data that nobody else refers to.
    pub(crate) fn own(offset: u64) -> u64 {
        offset | COPIED
    }

    /// The entry of a cluster that reads as zeros.
    pub(crate) const ZEROS: u64 = ZERO;
}
