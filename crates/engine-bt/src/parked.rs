//! Translations of user pages in the address spaces that are not current, by PCID: user code's, and those that the kernel uses with AC set.
//!
//! The frame's tables carry no tag: they hold the current address space. When CR3 names another one and says that its translations stay valid, those of the old
//! one are taken out and put here, and what is here of the new one goes back. That costs a copy of what was in use, which is far less than walks and look-ups.
//!
//! Invariants
//! * No entries of ordinary kernel code are here, and none that are global: what INVLPG does to global entries in another address space needs no look at this.
//! * What flushes a PCID, or all, drops its entries here; a flush of one page drops the whole space.
//! * Write tags and code positions are given up here whenever they are in the frame.

use std::collections::VecDeque;

use hospes_translate::layout::TlbEntry;
use hospes_units::Gfn;

use crate::jumps::UserJumps;
use crate::tlb::{MARKS, unmatched};

/// Address spaces kept at most. Linux uses six PCIDs on a CPU.
const SPACES: usize = 8;
/// Data translations and jump targets kept of one space at most: with more, filling them again costs little beside the work they are for.
pub(crate) const ENTRIES: usize = 1024;
pub(crate) const JUMPS: usize = 2048;

/// The data TLBs of which entries are kept.
pub(crate) const TABLES: [usize; 2] = [0, 2];

/// What one address space had in the frame.
#[derive(Default)]
pub(crate) struct Space {
    pub tlb: [Saved; TABLES.len()],
    pub jumps: UserJumps,
}

/// Entries of one table.
#[derive(Default)]
pub(crate) struct Saved {
    /// With their positions in the table.
    pub entries: Vec<(u16, TlbEntry)>,
    /// Gigabytes of address space in which large pages stand behind some entries.
    pub large: Vec<u64>,
}

/// The spaces, least recently used first.
#[derive(Default)]
pub(crate) struct Parked(VecDeque<(u16, Space)>);

impl Parked {
    pub fn put(&mut self, pcid: u16, space: Space) {
        self.remove(pcid);
        if self.0.len() >= SPACES {
            self.0.pop_front();
        }
        self.0.push_back((pcid, space));
    }

    pub fn take(&mut self, pcid: u16) -> Option<Space> {
        let n = self.0.iter().position(|(p, _)| *p == pcid)?;
        self.0.remove(n).map(|(_, space)| space)
    }

    pub fn remove(&mut self, pcid: u16) {
        self.0.retain(|(p, _)| *p != pcid);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn clear_jumps(&mut self) {
        for (_, space) in &mut self.0 {
            space.jumps.clear();
        }
    }

    /// Makes stores to one frame, or to all, take the slow path.
    pub fn drop_write_tags(&mut self, gfn: Option<Gfn>) {
        for (_, space) in &mut self.0 {
            for (n, e) in space.tlb.iter_mut().flat_map(|t| &mut t.entries) {
                if gfn.is_none_or(|g| e.gfn & !MARKS == g.0) {
                    e.write = unmatched(usize::from(*n));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use hospes_translate::layout::TLB_INVALID;

    use super::*;

    fn space(gfn: u64) -> Space {
        let entry = TlbEntry {
            read: 0x1000,
            write: 0x1000,
            host: 0x10_0000,
            gfn,
        };
        let mut space = Space::default();
        space.tlb[1].entries.push((1, entry));
        space
    }

    #[test]
    fn take_gives_each_space_once() {
        let mut p = Parked::default();
        p.put(1, space(10));
        p.put(2, space(20));
        assert_eq!(p.take(1).map(|s| s.tlb[1].entries[0].1.gfn), Some(10));
        assert!(p.take(1).is_none());
        p.remove(2);
        assert!(p.take(2).is_none());
    }

    #[test]
    fn put_beyond_the_limit_forgets_the_oldest() {
        let mut p = Parked::default();
        for pcid in 0..=SPACES as u16 {
            p.put(pcid, space(1));
        }
        assert!(p.take(0).is_none());
        assert!(p.take(1).is_some());
    }

    #[test]
    fn drop_write_tags_spares_other_frames() {
        let mut p = Parked::default();
        p.put(1, space(10 | 1 << 62));
        p.put(2, space(20));
        p.drop_write_tags(Some(Gfn(10)));
        assert_eq!(
            p.take(1).map(|s| s.tlb[1].entries[0].1.write),
            Some(TLB_INVALID)
        );
        assert_eq!(p.take(2).map(|s| s.tlb[1].entries[0].1.write), Some(0x1000));
        p.put(1, space(10));
        p.put(2, space(20));
        p.drop_write_tags(None);
        for pcid in 1..3 {
            let entry = p.take(pcid).map(|s| s.tlb[1].entries[0].1);
            assert_eq!(entry.map(|e| e.write), Some(TLB_INVALID));
        }
    }
}
