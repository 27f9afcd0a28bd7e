//! Internal snapshots: which clusters their tables take.

use super::header::{Header, be32, be64};
use crate::storage::Storage;

/// Bytes of a snapshot's fixed fields.
const FIELDS: usize = 40;
const EXTRA_BYTES_MAX: usize = 1 << 10;

/// Entries of the L1 tables of all snapshots together.
const L1_ENTRIES_MAX: u64 = 16 << 20;

/// A snapshot's L1 table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
}

/// The snapshots of an image, and the bytes of their table.
///
/// # Errors
/// What is wrong, as the end of a sentence.
pub(crate) fn read(storage: &dyn Storage, header: &Header) -> Result<(Vec<Snapshot>, u64), String> {
    let mut found = Vec::new();
    let mut at = header.snapshots_offset;
    let mut entries = 0u64;
    for _ in 0..header.snapshots {
        let mut fields = [0; FIELDS];
        storage
            .read_bytes(&mut fields, at)
            .map_err(|error| format!("its snapshots cannot be read: {error}"))?;
        let number = |at| be32(&fields, at).unwrap_or(0);
        let snapshot = Snapshot {
            l1_offset: be64(&fields, 0).unwrap_or(0),
            l1_entries: number(8),
        };
        let names = number(12);
        let extra = number(36) as usize;
        entries += u64::from(snapshot.l1_entries);
        let valid = snapshot.l1_offset.is_multiple_of(header.cluster_bytes())
            && snapshot.l1_offset < 1 << 56
            && snapshot.l1_entries <= 4 << 20
            && entries <= L1_ENTRIES_MAX
            && extra <= EXTRA_BYTES_MAX;
        if !valid {
            return Err("its snapshots are damaged".to_owned());
        }
        found.push(snapshot);
        let bytes = FIELDS + extra + (names >> 16) as usize + (names & 0xffff) as usize;
        at += bytes.next_multiple_of(8) as u64;
    }
    Ok((found, at - header.snapshots_offset))
}
