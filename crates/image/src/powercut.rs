//! A power cut for tests: a disk with a cache that loses what was not synced.
//!
//! What is written stays here until a sync puts it into the file. At the cut each sector that waits gets any of the contents written to it
//! since the last sync, or none of them; in a real disk's cache, too, nothing but a sync orders writes. After it every call fails.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::host::HostFile;
use crate::storage::{Storage, copy_from, copy_to};
use crate::types::Buffer;

/// Random numbers that a seed decides (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

struct State {
    /// By sector: what was written since the last sync, oldest first.
    waiting: BTreeMap<u64, Vec<Box<[u8]>>>,
    bytes: u64,
    random: Random,
    /// Writes until the cut.
    left: u64,
    syncs: u64,
    cut: bool,
}

/// The disk.
pub(crate) struct PowerCut {
    below: Arc<dyn Storage>,
    state: Mutex<State>,
    /// Bytes that are written wholly or not at all.
    sector: u64,
    /// Called after the cut by whoever comes to the disk, without any lock.
    then: fn(),
}

impl PowerCut {
    /// A disk with sectors of `sector` bytes. Cuts the power at the write number `writes` (from 1), then calls `then`.
    pub(crate) fn new(
        below: Arc<dyn Storage>,
        sector: u64,
        seed: u64,
        writes: u64,
        then: fn(),
    ) -> io::Result<PowerCut> {
        let bytes = below.len()?;
        Ok(PowerCut {
            below,
            state: Mutex::new(State {
                waiting: BTreeMap::new(),
                bytes,
                random: Random(seed),
                left: writes,
                syncs: 0,
                cut: false,
            }),
            sector,
            then,
        })
    }

    /// Cuts the power at that write from now on.
    #[cfg(test)]
    pub(crate) fn cut_at(&self, writes: u64) {
        self.state.lock().expect("no thread panics with it").left = writes;
    }

    /// Whether the power is gone.
    #[cfg(test)]
    pub(crate) fn is_cut(&self) -> bool {
        self.state.lock().expect("no thread panics with it").cut
    }

    /// Syncs so far.
    #[cfg(test)]
    pub(crate) fn syncs(&self) -> u64 {
        self.state.lock().expect("no thread panics with it").syncs
    }

    /// The state while there is power.
    fn powered(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state.lock().expect("no thread panics with it");
        if state.cut {
            drop(state);
            (self.then)();
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(state)
    }

    /// The cut; nothing where it has happened before.
    fn lose_power(&self, state: &mut State) -> io::Result<()> {
        state.cut = true;
        for (sector, versions) in std::mem::take(&mut state.waiting) {
            let kept = state.random.below(versions.len() as u64 + 1) as usize;
            if let Some(bytes) = kept.checked_sub(1).and_then(|index| versions.get(index)) {
                self.below.write_bytes(bytes, sector * self.sector)?;
            }
        }
        Ok(())
    }

    fn put(&self, state: &mut State, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (sector, within) = (at / self.sector, (at % self.sector) as usize);
            let count = rest.len().min(self.sector as usize - within);
            let versions = state.waiting.entry(sector).or_default();
            let mut content = vec![0; self.sector as usize].into_boxed_slice();
            if count < content.len() {
                match versions.last() {
                    Some(last) => content.clone_from(last),
                    None => self.below.read_bytes(&mut content, sector * self.sector)?,
                }
            }
            content[within..within + count].copy_from_slice(&rest[..count]);
            versions.push(content);
            at += count as u64;
            rest = &rest[count..];
        }
        state.bytes = state.bytes.max(at);
        Ok(())
    }
}

impl Storage for PowerCut {
    fn read(&self, buffers: &[Buffer], offset: u64) -> io::Result<u64> {
        let state = self.powered()?;
        let mut bytes = vec![0; buffers.iter().map(|b| b.len).sum()];
        self.below.read_bytes(&mut bytes, offset)?;
        let end = offset + bytes.len() as u64;
        for (sector, versions) in state
            .waiting
            .range(offset / self.sector..end.div_ceil(self.sector))
        {
            let Some(last) = versions.last() else {
                continue;
            };
            let start = (sector * self.sector).max(offset);
            let stop = ((sector + 1) * self.sector).min(end);
            let source = &last[(start % self.sector) as usize..][..(stop - start) as usize];
            bytes[(start - offset) as usize..(stop - offset) as usize].copy_from_slice(source);
        }
        copy_to(buffers, &bytes);
        Ok(state.bytes.saturating_sub(offset).min(bytes.len() as u64))
    }

    fn write(&self, buffers: &[Buffer], offset: u64) -> io::Result<()> {
        let mut state = self.powered()?;
        let mut bytes = vec![0; buffers.iter().map(|b| b.len).sum()];
        copy_from(buffers, &mut bytes);
        self.put(&mut state, offset, &bytes)?;
        state.left = state.left.saturating_sub(1);
        if state.left == 0 {
            self.lose_power(&mut state)?;
            drop(state);
            return self.powered().map(drop);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.powered()?;
        for (sector, versions) in std::mem::take(&mut state.waiting) {
            if let Some(bytes) = versions.last() {
                self.below.write_bytes(bytes, sector * self.sector)?;
            }
        }
        state.syncs += 1;
        self.below.sync()
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.powered()?;
        let end = (offset + bytes).min(state.bytes);
        if offset < end {
            self.put(&mut state, offset, &vec![0; (end - offset) as usize])?;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.powered()?.bytes)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.powered()?;
        state.bytes = bytes;
        self.below.set_len(bytes)
    }

    /// None: every request has to come through here.
    fn host_file(self: Arc<Self>) -> Option<Arc<HostFile>> {
        None
    }
}

/// Guests get a disk that never tears what usual ones do not tear: ext4 has checksums but no second copy in use for its superblock of 1 KiB,
/// which it counts on being written as a whole.
#[cfg(feature = "power-cut")]
const GUEST_SECTOR: u64 = 4096;

/// The disks of this process, which lose power together.
#[cfg(feature = "power-cut")]
static DISKS: Mutex<Vec<std::sync::Weak<PowerCut>>> = Mutex::new(Vec::new());

/// Puts a disk that loses power under an image that is written, if the user wants that.
#[cfg(feature = "power-cut")]
pub(crate) fn from_environment(storage: Arc<dyn Storage>) -> io::Result<Arc<dyn Storage>> {
    let Some(wanted) = std::env::var_os("HOSPES_POWER_CUT") else {
        return Ok(storage);
    };
    let numbers = wanted.to_str().and_then(|text| {
        let (seed, writes) = text.split_once(':')?;
        Some((seed.parse::<u64>().ok()?, writes.parse().ok()?))
    });
    let (seed, writes) = numbers.ok_or_else(|| {
        io::Error::other(
            "HOSPES_POWER_CUT is SEED:WRITES, the power goes at that write of any disk",
        )
    })?;
    let mut disks = DISKS.lock().expect("no thread panics with it");
    let seed = seed ^ (disks.len() as u64) << 32;
    let disk = PowerCut::new(storage, GUEST_SECTOR, seed, writes, all_lose_power)?;
    let disk = Arc::new(disk);
    disks.push(Arc::downgrade(&disk));
    Ok(disk)
}

/// The end of the machine: who holds a disk is not waited for but until the disk is cut. Nobody returns from here, so that no guest ever sees a disk without power.
#[cfg(feature = "power-cut")]
fn all_lose_power() {
    let disks = DISKS.lock().expect("no thread panics with it");
    for disk in disks.iter().filter_map(std::sync::Weak::upgrade) {
        let mut state = disk.state.lock().expect("no thread panics with it");
        if let Err(error) = disk.lose_power(&mut state) {
            eprintln!("hospes: a disk could not be cut: {error}");
        }
    }
    eprintln!("hospes: the power is cut");
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

#[cfg(test)]
#[path = "powercut_tests.rs"]
mod tests;
