//! Which guest frames hold code.

use std::sync::atomic::{AtomicU64, Ordering};

use hospes_units::Gfn;

/// One bit for each guest frame. Read by every vCPU without a lock.
#[derive(Debug)]
struct Bits(Vec<AtomicU64>);

impl Bits {
    fn new(frames: u64) -> Bits {
        Bits(
            (0..frames.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
        )
    }

    fn contains(&self, gfn: Gfn) -> bool {
        self.0
            .get((gfn.0 / 64) as usize)
            .is_some_and(|w| w.load(Ordering::Acquire) & 1 << (gfn.0 % 64) != 0)
    }

    /// True if the bit was clear.
    fn insert(&self, gfn: Gfn) -> bool {
        let bit = 1 << (gfn.0 % 64);
        self.0[(gfn.0 / 64) as usize].fetch_or(bit, Ordering::SeqCst) & bit == 0
    }

    /// True if the bit was set.
    fn remove(&self, gfn: Gfn) -> bool {
        let bit = 1 << (gfn.0 % 64);
        self.0[(gfn.0 / 64) as usize].fetch_and(!bit, Ordering::SeqCst) & bit != 0
    }

    fn clear(&self) {
        for w in &self.0 {
            w.store(0, Ordering::SeqCst);
        }
    }
}

/// The guest frames whose bytes are executed: those that have translations, and among them those that address-space processes execute.
#[derive(Debug)]
pub struct CodePages {
    code: Bits,
    direct: Bits,
    /// Counts frames that address-space processes may no longer execute without another look at them; the last of them stand in `dropped`.
    changes: AtomicU64,
    dropped: Vec<AtomicU64>,
    /// Counts frames that have become ones with code; the last of them stand in `recent`.
    marks: AtomicU64,
    recent: Vec<AtomicU64>,
}

/// How many frames that have become ones with code, or were dropped, are remembered: a power of 2.
const RECENT: u64 = 4096;
/// Stands for all frames.
const EVERY: u64 = u64::MAX;

impl CodePages {
    pub fn new(frames: u64) -> CodePages {
        CodePages {
            code: Bits::new(frames),
            direct: Bits::new(frames),
            changes: AtomicU64::new(0),
            dropped: (0..RECENT).map(|_| AtomicU64::new(0)).collect(),
            marks: AtomicU64::new(0),
            recent: (0..RECENT).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Marks a frame as one with code; true if it was not. Called by one thread at a time.
    pub fn mark(&self, gfn: Gfn) -> bool {
        let new = self.code.insert(gfn);
        if new {
            let n = self.marks.load(Ordering::Relaxed);
            self.recent[(n % RECENT) as usize].store(gfn.0, Ordering::Relaxed);
            self.marks.store(n + 1, Ordering::SeqCst);
        }
        new
    }

    /// How many frames have become ones with code so far.
    pub fn marks(&self) -> u64 {
        self.marks.load(Ordering::Acquire)
    }

    /// Whether `matches` one of the frames that have become ones with code since there were `seen` of them; true where that is not known any more.
    pub fn marked_since(&self, seen: u64, matches: impl Fn(Gfn) -> bool) -> bool {
        let now = self.marks();
        let any = now - seen < RECENT / 2
            && (seen..now).any(|n| {
                let gfn = self.recent[(n % RECENT) as usize].load(Ordering::Relaxed);
                matches(Gfn(gfn))
            });
        // What was read may have been overwritten meanwhile.
        any || self.marks() - seen >= RECENT / 2
    }

    /// Host address of one bit for each frame, set for those with code.
    pub fn bitmap(&self) -> u64 {
        self.code.0.as_ptr() as u64
    }

    pub fn contains(&self, gfn: Gfn) -> bool {
        self.code.contains(gfn)
    }

    /// Nothing depends on the frame any more.
    pub fn unmark(&self, gfn: Gfn) {
        self.code.remove(gfn);
    }

    /// Notes that address-space processes execute the frame. It must be marked as code, and its bytes be read after this.
    pub fn mark_direct(&self, gfn: Gfn) {
        self.direct.insert(gfn);
    }

    /// Whether the frame has not been written since [`CodePages::mark_direct`].
    pub fn is_direct(&self, gfn: Gfn) -> bool {
        self.direct.contains(gfn)
    }

    pub fn direct_changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// The frame has been, or is about to be, written. Called by one thread at a time.
    pub fn drop_direct(&self, gfn: Gfn) {
        if self.direct.remove(gfn) {
            self.note_dropped(gfn.0);
        }
    }

    fn note_dropped(&self, gfn: u64) {
        let n = self.changes.load(Ordering::Relaxed);
        self.dropped[(n % RECENT) as usize].store(gfn, Ordering::Relaxed);
        self.changes.store(n + 1, Ordering::SeqCst);
    }

    /// Frames dropped since there were `seen` changes, whatever has become of them, in ascending order; `None` where it may be any.
    pub fn dropped_since(&self, seen: u64) -> Option<Vec<Gfn>> {
        let now = self.direct_changes();
        if now - seen >= RECENT / 2 {
            return None;
        }
        let frame = |n: u64| self.dropped[(n % RECENT) as usize].load(Ordering::Relaxed);
        let mut found: Vec<Gfn> = (seen..now).map(|n| Gfn(frame(n))).collect();
        found.sort_unstable();
        // What was read may have been overwritten meanwhile.
        (self.direct_changes() - seen < RECENT / 2 && !found.contains(&Gfn(EVERY))).then_some(found)
    }

    pub fn clear(&self) {
        self.direct.clear();
        self.note_dropped(EVERY);
        self.code.clear();
    }
}
