//! The first cluster of a qcow2 image. Source: docs/interop/qcow2.txt of QEMU.
//!
//! Pure: bytes in, a checked header out. Everything in it is hostile.

/// First four bytes of an image.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the first sector that hold all fields; a write of it is all or nothing.
pub(crate) const FIELDS_BYTES: usize = 512;
/// Tables of more bytes are refused, as by QEMU.
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const SNAPSHOTS_MAX: u32 = 65536;
const BACKING_NAME_BYTES_MAX: u32 = 1023;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
const COMPRESSION: u64 = 8;
const EXTENDED_L2: u64 = 16;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Deflate,
    Zstd,
}

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    /// Size of the disk in bytes.
    pub(crate) bytes: u64,
    /// Entries of the active L1 table, and where it is.
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    /// Refcounts may be wrong.
    pub(crate) dirty: bool,
    /// A program found its tables broken.
    pub(crate) corrupt: bool,
    /// Some feature that does not survive writes of programs that do not know it.
    pub(crate) autoclear: u64,
    /// log2 of the bits of a refcount.
    pub(crate) refcount_order: u32,
    pub(crate) compression: Compression,
    pub(crate) backing: Option<String>,
    pub(crate) backing_format: Option<String>,
}

/// Reads big-endian numbers.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// As [`be32`].
pub(crate) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

impl Header {
    /// Bytes of a cluster.
    pub(crate) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / 8
    }

    /// L1 entries that a disk of `bytes` needs.
    pub(crate) fn l1_entries_for(cluster_bits: u32, bytes: u64) -> Option<u32> {
        let covered = 1u64 << (cluster_bits + cluster_bits - 3);
        let entries = bytes.div_ceil(covered);
        (entries * 8 <= L1_BYTES_MAX).then_some(entries as u32)
    }

    /// Reads a header from the first bytes of a file: its first cluster, or all of it if it is shorter.
    ///
    /// # Errors
    /// What is wrong, as the end of a sentence.
    pub(crate) fn parse(first: &[u8]) -> Result<Header, String> {
        let short = || "it ends within its header".to_owned();
        let u32_at = |at| be32(first, at).ok_or_else(short);
        let u64_at = |at| be64(first, at).ok_or_else(short);
        if first.get(..4) != Some(&MAGIC[..]) {
            return Err("it is no qcow2 image; say format=raw if it is a raw one".to_owned());
        }
        let version = u32_at(4)?;
        if !matches!(version, 2 | 3) {
            return Err(format!(
                "qcow2 version {version} is not supported, only 2 and 3"
            ));
        }
        let cluster_bits = u32_at(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(format!(
                "clusters of 2^{cluster_bits} bytes are not possible (9 to 21)"
            ));
        }
        let cluster_bytes = 1usize << cluster_bits;
        let first = &first[..first.len().min(cluster_bytes)];
        if u32_at(32)? != 0 {
            return Err(
                "it is encrypted, which is not supported: decrypt it with qemu-img convert"
                    .to_owned(),
            );
        }
        let (incompatible, autoclear, refcount_order, header_bytes) = if version == 3 {
            (u64_at(72)?, u64_at(88)?, u32_at(96)?, u32_at(100)? as usize)
        } else {
            (0, 0, 4, 72)
        };
        if header_bytes > first.len() || (version == 3 && header_bytes < 104) {
            return Err(format!("a header of {header_bytes} bytes is not possible"));
        }
        if refcount_order > 6 {
            return Err(format!(
                "refcounts of 2^{refcount_order} bits are not possible"
            ));
        }
        let extensions = extensions(first, header_bytes)?;
        let known = DIRTY | CORRUPT | COMPRESSION;
        if incompatible & !known != 0 {
            let bit = (incompatible & !known).trailing_zeros() as u8;
            return Err(format!(
                "it needs the feature '{}', which is not supported",
                feature_name(extensions.feature_names, bit)
            ));
        }
        let compression = match first.get(104).copied().filter(|_| header_bytes > 104) {
            None | Some(0) => Compression::Deflate,
            Some(1) if incompatible & COMPRESSION != 0 => Compression::Zstd,
            Some(other) => return Err(format!("its compression type {other} is not known")),
        };
        let header = Header {
            version,
            cluster_bits,
            bytes: u64_at(24)?,
            l1_entries: u32_at(36)?,
            l1_offset: u64_at(40)?,
            refcount_table_offset: u64_at(48)?,
            refcount_table_clusters: u32_at(56)?,
            snapshots: u32_at(60)?,
            snapshots_offset: u64_at(64)?,
            dirty: incompatible & DIRTY != 0,
            corrupt: incompatible & CORRUPT != 0,
            autoclear,
            refcount_order,
            compression,
            backing: backing(first, u64_at(8)?, u32_at(16)?)?,
            backing_format: extensions.backing_format,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), String> {
        let cluster_bytes = self.cluster_bytes();
        if self.bytes > i64::MAX as u64 || !self.bytes.is_multiple_of(512) || self.bytes == 0 {
            return Err(format!("a disk of {} bytes is not possible", self.bytes));
        }
        let needed = Header::l1_entries_for(self.cluster_bits, self.bytes)
            .ok_or_else(|| format!("a disk of {} bytes needs a larger cluster size", self.bytes))?;
        if self.l1_entries < needed {
            return Err(format!(
                "its L1 table of {} entries is too small for its size",
                self.l1_entries
            ));
        }
        if u64::from(self.l1_entries) * 8 > L1_BYTES_MAX {
            return Err(format!(
                "an L1 table of {} entries is too large",
                self.l1_entries
            ));
        }
        let table_bytes = u64::from(self.refcount_table_clusters) * cluster_bytes;
        if table_bytes == 0 || table_bytes > REFCOUNT_TABLE_BYTES_MAX {
            return Err(format!(
                "a refcount table of {table_bytes} bytes is not possible"
            ));
        }
        if self.snapshots > SNAPSHOTS_MAX {
            return Err(format!("{} snapshots are too many", self.snapshots));
        }
        let ranges = [
            ("the header", 0, cluster_bytes),
            (
                "the L1 table",
                self.l1_offset,
                u64::from(self.l1_entries) * 8,
            ),
            (
                "the refcount table",
                self.refcount_table_offset,
                table_bytes,
            ),
        ];
        for (index, (name, start, bytes)) in ranges.iter().enumerate() {
            if start % cluster_bytes != 0 || *start > 1 << 56 {
                return Err(format!("{name} at {start:#x} is not where a table can be"));
            }
            for (other, other_start, other_bytes) in &ranges[..index] {
                if *start < other_start + other_bytes && *other_start < start + bytes {
                    return Err(format!("{other} and {name} overlap"));
                }
            }
        }
        if self.snapshots > 0
            && (!self.snapshots_offset.is_multiple_of(cluster_bytes)
                || self.snapshots_offset > 1 << 56
                || self.snapshots_offset == 0)
        {
            return Err("its snapshots are not where a table can be".to_owned());
        }
        Ok(())
    }

    /// Puts the fields that change during the life of an image into its first sector.
    pub(crate) fn store_fields(&self, sector: &mut [u8; FIELDS_BYTES]) {
        sector[24..32].copy_from_slice(&self.bytes.to_be_bytes());
        sector[36..40].copy_from_slice(&self.l1_entries.to_be_bytes());
        sector[40..48].copy_from_slice(&self.l1_offset.to_be_bytes());
        sector[48..56].copy_from_slice(&self.refcount_table_offset.to_be_bytes());
        sector[56..60].copy_from_slice(&self.refcount_table_clusters.to_be_bytes());
        if self.version == 3 {
            sector[79] = (sector[79] & !(DIRTY as u8)) | u8::from(self.dirty);
            sector[88..96].copy_from_slice(&self.autoclear.to_be_bytes());
        }
    }

    /// The first cluster of a new image of version 3, as far as it is not zero.
    ///
    /// # Errors
    /// The backing file's name is too long for the cluster.
    pub(crate) fn encode_new(&self) -> Result<Vec<u8>, String> {
        let mut out = vec![0; 104];
        out[..4].copy_from_slice(&MAGIC);
        out[4..8].copy_from_slice(&self.version.to_be_bytes());
        out[20..24].copy_from_slice(&self.cluster_bits.to_be_bytes());
        out[96..100].copy_from_slice(&self.refcount_order.to_be_bytes());
        out[100..104].copy_from_slice(&104u32.to_be_bytes());
        if let Some(format) = &self.backing_format {
            out.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
            out.extend((format.len() as u32).to_be_bytes());
            out.extend(format.bytes());
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]);
        if let Some(name) = &self.backing {
            let (offset, bytes) = (out.len() as u64, name.len() as u32);
            if bytes > BACKING_NAME_BYTES_MAX || offset + u64::from(bytes) > self.cluster_bytes() {
                return Err("the path of its backing file is too long".to_owned());
            }
            out[8..16].copy_from_slice(&offset.to_be_bytes());
            out[16..20].copy_from_slice(&bytes.to_be_bytes());
            out.extend(name.bytes());
        }
        out.resize(out.len().max(FIELDS_BYTES), 0);
        let sector: &mut [u8; FIELDS_BYTES] = (&mut out[..FIELDS_BYTES])
            .try_into()
            .expect("it is as long");
        self.store_fields(sector);
        Ok(out)
    }
}

fn backing(first: &[u8], offset: u64, bytes: u32) -> Result<Option<String>, String> {
    if offset == 0 || bytes == 0 {
        return Ok(None);
    }
    if bytes > BACKING_NAME_BYTES_MAX {
        return Err(format!(
            "a backing file's name of {bytes} bytes is too long"
        ));
    }
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let name = first
        .get(start..start.saturating_add(bytes as usize))
        .ok_or("the name of its backing file is not in its first cluster")?;
    String::from_utf8(name.to_vec())
        .map(Some)
        .map_err(|_| "the name of its backing file is not UTF-8".to_owned())
}

#[derive(Default)]
struct Extensions<'a> {
    backing_format: Option<String>,
    feature_names: &'a [u8],
}

fn extensions(first: &[u8], header_bytes: usize) -> Result<Extensions<'_>, String> {
    let mut found = Extensions::default();
    let mut at = header_bytes;
    // A version 2 image without extensions may have its backing file's name right here.
    let end = match be64(first, 8) {
        Some(name) if name >= header_bytes as u64 => (name as usize).min(first.len()),
        _ => first.len(),
    };
    while let (Some(kind), Some(bytes)) = (be32(&first[..end], at), be32(&first[..end], at + 4)) {
        if kind == EXTENSION_END {
            break;
        }
        let start = at + 8;
        let data = first
            .get(start..start.saturating_add(bytes as usize))
            .ok_or_else(|| {
                format!("a header extension of {bytes} bytes leaves the first cluster")
            })?;
        match kind {
            EXTENSION_BACKING_FORMAT => {
                found.backing_format = Some(String::from_utf8_lossy(data).into_owned());
            }
            EXTENSION_FEATURE_NAMES => found.feature_names = data,
            _ => {}
        }
        at = start + data.len().next_multiple_of(8);
    }
    Ok(found)
}

/// The name of an incompatible feature, from the image's own table if it has one.
fn feature_name(table: &[u8], bit: u8) -> String {
    match 1u64 << bit {
        EXTERNAL_DATA => return "external data file".to_owned(),
        EXTENDED_L2 => return "extended L2 entries".to_owned(),
        _ => {}
    }
    let entry = table
        .chunks_exact(48)
        .find(|entry| entry[0] == 0 && entry[1] == bit);
    let name: String = entry.map_or_else(String::new, |entry| {
        String::from_utf8_lossy(&entry[2..])
            .chars()
            .filter(|c| !c.is_control())
            .collect()
    });
    if name.is_empty() {
        format!("incompatible bit {bit}")
    } else {
        name
    }
}
