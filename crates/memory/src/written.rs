//! Which frames are written: for who sends a guest's memory while the guest runs.
//!
//! Frames are noted in rounds. A round begins with taking what the one before has noted; what it took is read after that, and sent.
//!
//! Invariant: whoever changes RAM notes the frame, either after the write or, where writes then go on unseen, before the first of them; ways to write unseen
//! are given up when a round begins, after what was noted is taken and before any of it is read. So a write that is not noted in the new round is one to a
//! frame that was taken, made before that frame is read, and none is missed.
//!
//! The bitmap has what is still to be noted, a bit for each frame of RAM: while there is no log it is all zeros, and takes no memory.

use std::collections::BTreeMap;
use std::ops;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hospes_units::{Gfn, Gpa, PAGE_SIZE};

use crate::Range;

/// A set of frames: one bit for each up to the highest.
#[derive(Clone, Debug, Default)]
pub struct FrameSet {
    words: Vec<u64>,
    len: u64,
}

impl FrameSet {
    /// True if it was not in the set.
    pub fn insert(&mut self, gfn: Gfn) -> bool {
        let (n, bit) = place(gfn);
        if n >= self.words.len() {
            self.words.resize(n + 1, 0);
        }
        let new = self.words[n] & bit == 0;
        self.words[n] |= bit;
        self.len += u64::from(new);
        new
    }

    /// True if it was in the set.
    pub fn remove(&mut self, gfn: Gfn) -> bool {
        let (n, bit) = place(gfn);
        let was = self.contains(gfn);
        if was {
            self.words[n] &= !bit;
            self.len -= 1;
        }
        was
    }

    pub fn contains(&self, gfn: Gfn) -> bool {
        let (n, bit) = place(gfn);
        self.words.get(n).is_some_and(|word| word & bit != 0)
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The frames in runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = ops::Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, 0)?;
            at = self.next(start, u64::MAX).unwrap_or(self.end());
            Some(start..at)
        })
    }

    fn end(&self) -> u64 {
        self.words.len() as u64 * 64
    }

    /// The first frame from `at` on whose bit differs from that of `like`.
    fn next(&self, at: u64, like: u64) -> Option<u64> {
        let (n, bit) = place(Gfn(at));
        let mut words = self.words.iter().enumerate().skip(n);
        words.find_map(|(i, word)| {
            let from = if i == n { !(bit - 1) } else { u64::MAX };
            let differ = (word ^ like) & from;
            (differ != 0).then(|| i as u64 * 64 + u64::from(differ.trailing_zeros()))
        })
    }
}

fn place(gfn: Gfn) -> (usize, u64) {
    ((gfn.0 / 64) as usize, 1 << (gfn.0 % 64))
}

/// The frames of one domain that were written.
#[derive(Debug)]
pub struct WriteLog {
    on: AtomicBool,
    /// Rounds begun so far.
    rounds: AtomicU64,
    /// Set for frames of RAM that were not noted in this round.
    unnoted: Box<[AtomicU64]>,
    ram: Vec<ops::Range<u64>>,
    /// Frames that are written at any time without being noted, and by how many.
    held: Mutex<BTreeMap<u64, u32>>,
}

impl WriteLog {
    pub(crate) fn new(ram: &[Range]) -> WriteLog {
        let end = ram.last().map_or(0, |r| r.end / PAGE_SIZE);
        // Zeroed memory that nobody has touched takes none of the host.
        let words = vec![0u64; end.div_ceil(64) as usize].into_boxed_slice();
        let words = Box::into_raw(words) as *mut [AtomicU64];
        WriteLog {
            on: AtomicBool::new(false),
            rounds: AtomicU64::new(0),
            // SAFETY: the slice was just given up by a box, and both types have the same size, alignment and values.
            unnoted: unsafe { Box::from_raw(words) },
            ram: ram
                .iter()
                .map(|r| r.start / PAGE_SIZE..r.end / PAGE_SIZE)
                .collect(),
            held: Mutex::default(),
        }
    }

    /// Begins a round, with the log switched on if it was off: gives what was written in the round before, nothing in the first one. Who can write without noting
    /// has to give that up before what is given here is read.
    pub fn begin_round(&self) -> FrameSet {
        let held = self.held();
        let first = !self.on.swap(true, Ordering::SeqCst);
        let mut written = FrameSet::default();
        for (n, mask) in self.words() {
            let word = &self.unnoted[n];
            // What is noted from here on belongs to the new round.
            if word.load(Ordering::SeqCst) & mask == mask {
                continue;
            }
            let noted = mask & !word.fetch_or(mask, Ordering::SeqCst);
            if !first {
                let bits = (0..64).filter(|bit| noted & 1 << bit != 0);
                bits.for_each(|bit| {
                    written.insert(Gfn(n as u64 * 64 + bit));
                });
            }
        }
        if !first {
            for &gfn in held.keys() {
                written.insert(Gfn(gfn));
            }
        }
        self.rounds.fetch_add(1, Ordering::SeqCst);
        // On the other side a write comes first, and then the look whether it has to be noted: it is seen there, or by who reads the frame now.
        fence(Ordering::SeqCst);
        written
    }

    /// Switches the log off.
    pub fn end(&self) {
        let _held = self.held();
        self.on.store(false, Ordering::SeqCst);
        for (n, mask) in self.words() {
            self.unnoted[n].fetch_and(!mask, Ordering::SeqCst);
        }
    }

    /// Frames that the next round would begin with; 0 while the log is off.
    pub fn pages(&self) -> u64 {
        let held = self.held();
        if !self.on.load(Ordering::SeqCst) {
            return 0;
        }
        let noted = self.words().map(|(n, mask)| {
            let unnoted = self.unnoted[n].load(Ordering::Relaxed);
            u64::from((mask & !unnoted).count_ones())
        });
        noted.sum::<u64>() + held.keys().filter(|gfn| self.must_note(Gfn(**gfn))).count() as u64
    }

    /// Rounds begun so far: who can write without noting compares.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Acquire)
    }

    /// Whether a write to the frame has still to be noted: who may write it must not do so unseen.
    pub fn must_note(&self, gfn: Gfn) -> bool {
        self.on.load(Ordering::Relaxed) && {
            let (n, bit) = place(gfn);
            let word = self.unnoted.get(n);
            word.is_some_and(|word| word.load(Ordering::Acquire) & bit != 0)
        }
    }

    /// Notes frames that are about to be written unseen, or were written: then behind a sequentially consistent fence.
    pub fn note(&self, gpa: Gpa, len: u64) {
        if self.on.load(Ordering::Relaxed) && len > 0 {
            self.note_frames(gpa.0 / PAGE_SIZE..(gpa.0.saturating_add(len - 1)) / PAGE_SIZE + 1);
        }
    }

    /// Notes what was just written.
    pub fn note_written(&self, gpa: Gpa, len: u64) {
        fence(Ordering::SeqCst);
        self.note(gpa, len);
    }

    #[cold]
    fn note_frames(&self, frames: ops::Range<u64>) {
        for gfn in frames.start..frames.end.min(self.unnoted.len() as u64 * 64) {
            let (n, bit) = place(Gfn(gfn));
            if self.unnoted[n].load(Ordering::Relaxed) & bit != 0 {
                self.unnoted[n].fetch_and(!bit, Ordering::SeqCst);
            }
        }
    }

    /// Host address of the bitmap, in which a frame of RAM has a bit while a write to it has still to be noted.
    pub fn bitmap(&self) -> u64 {
        self.unnoted.as_ptr() as u64
    }

    /// From now on somebody writes the frame at any time: every round has it.
    pub(crate) fn hold(&self, gfn: Gfn) {
        if self.ram.iter().any(|r| r.contains(&gfn.0)) {
            *self.held().entry(gfn.0).or_default() += 1;
        }
    }

    /// Ends what [`WriteLog::hold`] began.
    pub(crate) fn release(&self, gfn: Gfn) {
        // First, so that a round that begins meanwhile has it, too.
        self.note_written(gfn.gpa(), PAGE_SIZE);
        let mut held = self.held();
        if let Some(count) = held.get_mut(&gfn.0) {
            *count -= 1;
            if *count == 0 {
                held.remove(&gfn.0);
            }
        }
    }

    /// Who has this begins and ends rounds, too. A thread that panicked while holding it left data that is valid.
    fn held(&self) -> MutexGuard<'_, BTreeMap<u64, u32>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The words of the bitmap that have frames of RAM, with the bits of these frames.
    fn words(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.ram.iter().flat_map(|r| {
            (r.start / 64..r.end.div_ceil(64)).map(|n| {
                let (first, last) = (r.start.max(n * 64), r.end.min(n * 64 + 64) - 1);
                let mask = u64::MAX << (first % 64) & u64::MAX >> (63 - last % 64);
                (n as usize, mask)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestMemory;

    fn log() -> WriteLog {
        let range = |start: u64, end: u64| Range {
            start: start * PAGE_SIZE,
            end: end * PAGE_SIZE,
        };
        WriteLog::new(&[range(0, 70), range(100, 120), range(130, 300)])
    }

    fn frames(set: &FrameSet) -> Vec<u64> {
        set.runs().flatten().collect()
    }

    #[test]
    fn runs_of_a_set() {
        let mut set = FrameSet::default();
        assert_eq!(set.runs().next(), None);
        for gfn in [0, 1, 62, 63, 64, 65, 127, 300] {
            assert!(set.insert(Gfn(gfn)));
        }
        assert!(!set.insert(Gfn(65)));
        assert_eq!(
            set.runs().collect::<Vec<_>>(),
            [0..2, 62..66, 127..128, 300..301]
        );
        assert!(set.remove(Gfn(63)) && !set.remove(Gfn(63)) && !set.remove(Gfn(5000)));
        assert_eq!((set.len(), set.contains(Gfn(63))), (7, false));
        (128..300).for_each(|gfn| {
            set.insert(Gfn(gfn));
        });
        assert_eq!(set.runs().last(), Some(127..301));
        // A run that ends with the last word.
        (301..320).for_each(|gfn| {
            set.insert(Gfn(gfn));
        });
        assert_eq!(set.runs().last(), Some(127..320));
    }

    #[test]
    fn off_notes_nothing() {
        let log = log();
        log.note(Gpa(0), 4 * PAGE_SIZE);
        assert!(!log.must_note(Gfn(0)));
        assert_eq!(log.pages(), 0);
        assert!(log.unnoted.iter().all(|w| w.load(Ordering::SeqCst) == 0));
        assert!(log.begin_round().is_empty());
        log.end();
        assert!(log.unnoted.iter().all(|w| w.load(Ordering::SeqCst) == 0));
    }

    #[test]
    fn round_has_what_was_written_in_the_one_before() {
        let log = log();
        assert!(log.begin_round().is_empty());
        assert!(log.must_note(Gfn(69)) && log.must_note(Gfn(119)) && log.must_note(Gfn(299)));
        // No RAM: nothing to note.
        assert!(!log.must_note(Gfn(70)) && !log.must_note(Gfn(99)) && !log.must_note(Gfn(400)));
        log.note(Gpa(69 * PAGE_SIZE + 4095), 1);
        log.note(Gpa(110 * PAGE_SIZE + 4095), 2);
        log.note(Gpa(250 * PAGE_SIZE), 0);
        log.note(Gpa(u64::MAX - 5), 100);
        log.note(Gpa(299 * PAGE_SIZE), u64::MAX);
        log.note(Gpa(71 * PAGE_SIZE), PAGE_SIZE);
        assert_eq!(log.pages(), 4);
        assert!(!log.must_note(Gfn(110)) && log.must_note(Gfn(112)));
        let rounds = log.rounds();
        assert_eq!(frames(&log.begin_round()), [69, 110, 111, 299]);
        assert_eq!(log.rounds(), rounds + 1);
        assert!(log.must_note(Gfn(110)));
        assert!(log.begin_round().is_empty());
        log.note(Gpa(0), PAGE_SIZE);
        log.end();
        // Another one begins without what was before.
        assert!(log.begin_round().is_empty() && log.must_note(Gfn(0)));
    }

    #[test]
    fn held_frame_is_in_every_round_and_in_the_one_after() {
        let memory = std::sync::Arc::new(
            GuestMemory::new(&[Range {
                start: 0,
                end: 0x10_0000,
            }])
            .unwrap(),
        );
        let log = memory.log();
        let page = crate::Page::of_frame(&memory, Gfn(7)).unwrap();
        let other = page.clone();
        log.begin_round();
        assert_eq!(log.pages(), 1);
        log.note(Gpa(7 * PAGE_SIZE), 1);
        assert_eq!(log.pages(), 1);
        for _ in 0..2 {
            assert_eq!(frames(&log.begin_round()), [7]);
        }
        drop(page);
        assert_eq!(frames(&log.begin_round()), [7]);
        other.u64(8).store(1, Ordering::SeqCst);
        drop(other);
        assert_eq!(frames(&log.begin_round()), [7]);
        assert!(log.begin_round().is_empty());
    }

    #[test]
    fn memory_notes_its_own_writes() {
        let memory = GuestMemory::new(&[Range {
            start: 0,
            end: 0x10_0000,
        }])
        .unwrap();
        memory.log().begin_round();
        memory.write(Gpa(0x1fff), &[1; 2]).unwrap();
        memory.zero(Gpa(0x5000), 0x2000).unwrap();
        memory.discard(Gfn(9), 1).unwrap();
        assert!(memory.write(Gpa(0xf_ffff), &[1; 2]).is_err());
        assert_eq!(frames(&memory.log().begin_round()), [1, 2, 5, 6, 9]);
    }

    #[test]
    fn write_is_in_the_round_it_was_made_in_or_the_next() {
        // Writers of a word each, noted after the write; rounds read what they are given. In the end nothing is missing.
        let memory = GuestMemory::new(&[Range {
            start: 0,
            end: 0x10_0000,
        }])
        .unwrap();
        const WRITES: u64 = 20_000;
        let mut copy = vec![0u64; 256];
        memory.log().begin_round();
        std::thread::scope(|s| {
            let writers: Vec<_> = (0..2u64)
                .map(|n| {
                    let memory = &memory;
                    s.spawn(move || {
                        for i in 0..WRITES {
                            let gfn = (i * 7 + n * 128) % 128 + n * 128;
                            memory.write_obj(Gpa(gfn * PAGE_SIZE), &i).unwrap();
                        }
                    })
                })
                .collect();
            loop {
                let done = writers.iter().all(|w| w.is_finished());
                for gfn in memory.log().begin_round().runs().flatten() {
                    copy[gfn as usize] = memory.read_obj(Gpa(gfn * PAGE_SIZE)).unwrap();
                }
                if done {
                    break;
                }
            }
        });
        for gfn in 0..256 {
            let now: u64 = memory.read_obj(Gpa(gfn * PAGE_SIZE)).unwrap();
            assert_eq!(copy[gfn as usize], now, "{gfn}");
        }
    }
}
