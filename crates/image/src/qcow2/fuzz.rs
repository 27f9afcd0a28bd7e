//! Entry point of the fuzzers: the tables of an image that somebody else made.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::header::Header;
use super::open::read_header;
use super::{Options, Qcow2};
use crate::host::HostFile;
use crate::storage::{Storage, copy_from, copy_to, fill_zero, part};
use crate::threads::Work;
use crate::types::{Buffer, Op, Request};

/// A file in memory that has room for so many bytes.
const ROOM: usize = 4 << 20;
/// What the guest writes. Not in any table.
const MARK: u8 = 0xa5;
const CLUSTER: usize = 512;

#[derive(Default)]
pub(super) struct Memory(Mutex<Vec<u8>>);

impl Storage for Memory {
    fn read(&self, buffers: &[Buffer], offset: u64) -> io::Result<u64> {
        let bytes = self.0.lock().expect("not poisoned");
        let start = usize::try_from(offset).map_or(bytes.len(), |at| at.min(bytes.len()));
        copy_to(buffers, &bytes[start..]);
        let there = (bytes.len() - start) as u64;
        fill_zero(&part(buffers, there, u64::MAX));
        Ok(there.min(buffers.iter().map(|b| b.len as u64).sum()))
    }

    fn write(&self, buffers: &[Buffer], offset: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().expect("not poisoned");
        let count: usize = buffers.iter().map(|b| b.len).sum();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(count);
        if end > ROOM {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        copy_from(buffers, &mut bytes[start..end]);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut all = self.0.lock().expect("not poisoned");
        let len = all.len() as u64;
        let start = offset.min(len) as usize;
        let end = offset.saturating_add(bytes).min(len) as usize;
        all[start..end].fill(0);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("not poisoned").len() as u64)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.0
            .lock()
            .expect("not poisoned")
            .resize(bytes.min(ROOM), 0);
        Ok(())
    }

    fn host_file(self: Arc<Self>) -> Option<Arc<HostFile>> {
        None
    }
}

/// An image of 64 KiB with small clusters, one L2 table and some data. Clusters: header, refcount table, block, L1, L2, then data.
fn valid() -> Vec<u8> {
    let word = |value: u64| value.to_be_bytes();
    let header = Header {
        version: 3,
        cluster_bits: 9,
        bytes: 64 << 10,
        l1_entries: 2,
        l1_offset: 3 * 512,
        refcount_table_offset: 512,
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshots_offset: 0,
        dirty: false,
        corrupt: false,
        autoclear: 0,
        refcount_order: 4,
        compression: super::header::Compression::Deflate,
        backing: None,
        backing_format: None,
    };
    let mut out = header.encode_new().expect("nothing is long");
    out.resize(8 * CLUSTER, 0);
    out[CLUSTER..][..8].copy_from_slice(&word(2 * 512));
    for cluster in 0..8 {
        out[2 * CLUSTER + cluster * 2 + 1] = 1;
    }
    out[3 * CLUSTER..][..8].copy_from_slice(&word((4 * 512) | (1 << 63)));
    for (entry, cluster) in [(0usize, 5u64), (1, 6), (7, 7)] {
        out[4 * CLUSTER + entry * 8..][..8].copy_from_slice(&word((cluster * 512) | (1 << 63)));
    }
    out
}

/// Changes words of a small valid image as `data` says and uses it. Panics only where an invariant is broken: above all, what the guest
/// writes must not get into the header, which names files of the host.
pub fn fuzz_qcow2(data: &[u8]) {
    // A header alone first: the whole of `data` as a file.
    let _ = Header::parse(data);
    let mut bytes = valid();
    let (patches, work) = data.split_at(data.len() / 2);
    for patch in patches.chunks_exact(6) {
        let at = (usize::from(patch[0]) | usize::from(patch[1]) << 8) % (bytes.len() - 8);
        // Words that are near to valid ones: flags, and a small offset.
        let flags = u64::from(patch[2]) << 56;
        let value =
            flags | u64::from(u16::from_be_bytes([patch[3], patch[4]])) << 4 | u64::from(patch[5]);
        if patch[2] == 1 {
            bytes[at] = patch[3];
        } else {
            let at = at & !7;
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
    }
    let (names, rest) = (bytes[8..20].to_vec(), bytes[104..512].to_vec());
    let storage = Arc::new(Memory(Mutex::new(bytes)));
    let path = Path::new("fuzzed.qcow2");
    let Ok(header) = read_header(path, &*storage) else {
        return;
    };
    let options = Options {
        read_only: false,
        discard: true,
        sector_bytes: 512,
        physical_sector_bytes: 512,
        fixed: false,
    };
    let Ok(image) = Qcow2::open(path, storage.clone(), header, None, options) else {
        return;
    };
    use_image(&image, work);
    drop(image);
    let bytes = storage.0.lock().expect("not poisoned");
    assert_eq!(
        bytes[8..20],
        names,
        "the guest changed the name of the backing file"
    );
    assert_eq!(bytes[104..512], rest, "the guest wrote to the header");
}

fn use_image(image: &Qcow2, work: &[u8]) {
    let mut memory = vec![MARK; 8 << 10];
    for step in work.chunks_exact(4) {
        let size = image.geometry().bytes.min(1 << 30);
        let offset = (u64::from(step[1]) << 8 | u64::from(step[2])) * 512 % size.max(512);
        let bytes = (u64::from(step[3] % 16) + 1) * 512;
        memory.fill(MARK);
        let buffer = Buffer::of(&mut memory[..bytes as usize]);
        let (op, bytes, buffers) = match step[0] % 4 {
            0 => (Op::Read, bytes, vec![buffer]),
            1 => (Op::Write, bytes, vec![buffer]),
            2 => (Op::Discard, bytes, Vec::new()),
            _ => (Op::Flush, 0, Vec::new()),
        };
        let request = Request {
            id: 0,
            op,
            offset,
            bytes,
            buffers,
        };
        // Errors are what damaged tables lead to.
        let _ = image.work(&request);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn valid_image_is_one_for_qemu() {
        let directory = crate::testing::Directory::new();
        let path = directory.join("a.qcow2");
        std::fs::write(&path, valid()).unwrap();
        let check = std::process::Command::new("qemu-img")
            .arg("check")
            .arg(&path)
            .status();
        assert!(check.unwrap().success());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn fuzz_qcow2_of_arbitrary_bytes_keeps_the_header(data: Vec<u8>) {
            fuzz_qcow2(&data);
        }

        #[test]
        fn fuzz_qcow2_of_likely_damage_keeps_the_header(
            patches in prop::collection::vec((0u16..4096, prop_oneof![Just(0u8), Just(0x80), Just(0x40), Just(1)], 0u16..0x200, any::<u8>()), 0..6),
            work in prop::collection::vec((0u8..4, 0u8..1, any::<u8>(), any::<u8>()), 0..30),
        ) {
            let mut data: Vec<u8> = patches
                .into_iter()
                .flat_map(|(at, flags, value, low)| {
                    let (at, value) = (at.to_le_bytes(), value.to_be_bytes());
                    [at[0], at[1], flags, value[0], value[1], low]
                })
                .collect();
            let mut work: Vec<u8> = work.into_iter().flat_map(|(op, high, low, count)| [op, high, low, count]).collect();
            // Both halves are equally long.
            while data.len() + 6 <= work.len() {
                data.extend([200, 15, 1, 0, 0, 0]);
            }
            while work.len() < data.len() {
                work.push(3);
            }
            data.resize(work.len(), 0);
            data.extend(work);
            fuzz_qcow2(&data);
        }
    }
}
