//! A guest's memory as pages in a stream: what is sent of it, and what is taken.
//!
//! A page that is sent again replaces what it was, and one that has become zero is sent only where the other side has something else. So the other side takes no
//! memory for zero pages, and both sides count the same.
//! Limits: a stream has [`PASSES_MAX`] times the guest's memory, and [`OTHER_PAGES_MAX`] pages.

use hospes_memory::{FrameSet, GuestMemory, Range};
use hospes_migration::{PAGE_BYTES, PAGES_MAX};
use hospes_units::{Gfn, Gpa, PAGE_SIZE};

use crate::CreateError;
use crate::saved::{RestoreError, SaveError, SaveStream};
use crate::suspend::Gate;

/// Pages in a stream beyond the guest's memory: tables and rings, of which some come twice, and what a guest may hold for a moment of that which it has given back.
pub const OTHER_PAGES_MAX: u64 = (64 << 20) / PAGE_SIZE;

/// How often all of a guest's memory may come: whoever sends more does not come to an end.
pub const PASSES_MAX: u64 = 8;

/// Frames by which the host is asked for memory while the stream has not said how much the guest has: more than a record has pages.
const STEP: u64 = (64 << 20) / PAGE_SIZE;

/// Pages of RAM that a memory has.
pub fn ram_pages(memory: &GuestMemory) -> u64 {
    let ranges = memory.ram().iter();
    ranges.map(|r| (r.end - r.start) / PAGE_SIZE).sum()
}

/// Most pages of a stream.
pub fn stream_pages_max(memory: &GuestMemory) -> u64 {
    PASSES_MAX * ram_pages(memory) + OTHER_PAGES_MAX
}

/// What the other side has of a guest's memory.
#[derive(Debug, Default)]
pub struct Sent {
    /// Frames that are not zero there.
    filled: FrameSet,
}

impl Sent {
    /// How many frames are not zero on the other side.
    pub fn filled(&self) -> u64 {
        self.filled.len()
    }

    /// Sends all that is not zero. Asks now and then whether to go on.
    pub fn all(
        &mut self,
        memory: &GuestMemory,
        to: &mut SaveStream<'_>,
        go_on: &dyn Fn() -> Result<(), SaveError>,
    ) -> Result<(), SaveError> {
        let mut at = Gpa(0);
        while let Some(run) = memory.occupied(at)? {
            at = Gpa(run.end);
            self.range(memory, run, to, go_on)?;
        }
        Ok(())
    }

    /// Sends these frames as they are now.
    pub fn frames(
        &mut self,
        memory: &GuestMemory,
        frames: &FrameSet,
        to: &mut SaveStream<'_>,
        go_on: &dyn Fn() -> Result<(), SaveError>,
    ) -> Result<(), SaveError> {
        for run in frames.runs() {
            for ram in memory.ram() {
                let start = ram.start.max(run.start * PAGE_SIZE);
                let end = ram.end.min(run.end * PAGE_SIZE);
                if start < end {
                    self.range(memory, Range { start, end }, to, go_on)?;
                }
            }
        }
        Ok(())
    }

    /// Sends a part of one range of RAM. The guest may write it meanwhile.
    fn range(
        &mut self,
        memory: &GuestMemory,
        range: Range,
        to: &mut SaveStream<'_>,
        go_on: &dyn Fn() -> Result<(), SaveError>,
    ) -> Result<(), SaveError> {
        let mut buffer = vec![0; PAGES_MAX.min(range_pages(range)) * PAGE_BYTES];
        let mut at = Gpa(range.start);
        while at.0 < range.end {
            go_on()?;
            let bytes = (range.end - at.0).min(buffer.len() as u64) as usize;
            memory.read_ram(at, &mut buffer[..bytes])?;
            self.pages(at.gfn().0, &buffer[..bytes], to)?;
            at = Gpa(at.0 + bytes as u64);
        }
        Ok(())
    }

    /// Sends those of some pages that the other side does not have.
    fn pages(
        &mut self,
        first: u64,
        bytes: &[u8],
        to: &mut SaveStream<'_>,
    ) -> Result<(), SaveError> {
        let pages = bytes.chunks(PAGE_BYTES).zip(first..);
        let wanted: Vec<bool> = pages
            .map(|(page, gfn)| {
                if is_zero(page) {
                    self.filled.remove(Gfn(gfn))
                } else {
                    self.filled.insert(Gfn(gfn));
                    true
                }
            })
            .collect();
        let mut at = 0;
        for run in wanted.chunk_by(|a, b| a == b) {
            let end = at + run.len();
            if run[0] {
                to.pages(first + at as u64, &bytes[at * PAGE_BYTES..end * PAGE_BYTES])?;
            }
            at = end;
        }
        Ok(())
    }

    /// Sends a page that threads of the domain write, as it is between two steps of theirs.
    pub fn page_of_rings(
        &mut self,
        memory: &GuestMemory,
        gfn: Gfn,
        gate: &Gate,
        to: &mut SaveStream<'_>,
    ) -> Result<(), SaveError> {
        let mut page = [0; PAGE_BYTES];
        let closed = gate.close();
        memory.read_ram(gfn.gpa(), &mut page)?;
        drop(closed);
        self.pages(gfn.0, &page, to)
    }
}

fn range_pages(range: Range) -> usize {
    ((range.end - range.start) / PAGE_SIZE) as usize
}

/// Whether a page has nothing in it.
pub fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// A guest's memory that is being filled from a stream.
pub struct Received<'a> {
    memory: &'a GuestMemory,
    /// Frames that are not zero.
    filled: FrameSet,
    /// How many may be.
    allowed: u64,
    /// Pages that may still come.
    left: u64,
    /// Whether the host has so many bytes more.
    room: &'a dyn Fn(u64) -> Result<(), CreateError>,
    /// The guest's memory is known, and the host has room for it.
    known: bool,
}

impl<'a> Received<'a> {
    /// `bytes` are there for it already.
    pub fn new(
        memory: &'a GuestMemory,
        bytes: u64,
        room: &'a dyn Fn(u64) -> Result<(), CreateError>,
    ) -> Received<'a> {
        Received {
            memory,
            filled: FrameSet::default(),
            allowed: bytes / PAGE_SIZE,
            left: stream_pages_max(memory),
            room,
            known: false,
        }
    }

    /// From now on it is known what the guest needs, and how many frames it may fill.
    pub fn set_size(&mut self, bytes: u64, frames_max: u64) -> Result<(), CreateError> {
        let used = self.filled.len() * PAGE_SIZE;
        (self.room)(bytes.saturating_sub(used))?;
        self.allowed = frames_max;
        self.known = true;
        self.check(0)
    }

    /// Whether so many frames more may be filled.
    fn check(&mut self, more: u64) -> Result<(), CreateError> {
        if self.filled.len() + more > self.allowed {
            if self.known {
                return Err(RestoreError::Invalid("it has more pages than memory").into());
            }
            (self.room)(STEP * PAGE_SIZE)?;
            self.allowed += STEP;
        }
        Ok(())
    }

    /// Takes whole pages.
    pub fn take(&mut self, first: u64, bytes: &[u8]) -> Result<(), CreateError> {
        let count = (bytes.len() / PAGE_BYTES) as u64;
        let left = self.left.checked_sub(count);
        self.left = left.ok_or(RestoreError::Invalid("it has pages again and again"))?;
        if !self.memory.is_ram(Gfn(first), count) {
            return Err(RestoreError::Invalid("it has pages beyond its memory").into());
        }
        let mut gfn = first;
        let pages: Vec<&[u8]> = bytes.chunks(PAGE_BYTES).collect();
        for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let frames = gfn..gfn + run.len() as u64;
            gfn = frames.end;
            if is_zero(run[0]) {
                for gfn in frames.map(Gfn) {
                    if self.filled.remove(gfn) {
                        self.memory.discard(gfn, 1)?;
                    }
                }
                continue;
            }
            let new = frames.clone().filter(|g| !self.filled.contains(Gfn(*g)));
            self.check(new.count() as u64)?;
            let at = (frames.start - first) as usize * PAGE_BYTES;
            let content = &bytes[at..at + run.len() * PAGE_BYTES];
            self.memory.write(Gfn(frames.start).gpa(), content)?;
            frames.for_each(|gfn| {
                self.filled.insert(Gfn(gfn));
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Write;

    use hospes_memory::HUGE_PAGE;
    use hospes_migration::{Reader, Record, Writer};

    use super::*;

    fn memory(bytes: u64) -> GuestMemory {
        let ram = [0..bytes / 2, bytes / 2..bytes].map(|r| Range {
            start: r.start,
            end: r.end,
        });
        GuestMemory::new(&ram).unwrap()
    }

    fn put(memory: &GuestMemory, gfn: u64, byte: u8) {
        memory.write(Gfn(gfn).gpa(), &[byte]).unwrap();
    }

    /// Frames of the records that are sent.
    fn sent(send: impl FnOnce(&mut SaveStream<'_>)) -> Vec<u64> {
        let mut bytes = Vec::new();
        let to: &mut dyn Write = &mut bytes;
        let mut stream = Writer::new(to, b"").unwrap();
        send(&mut stream);
        stream.machine(b"").unwrap();
        stream.end().unwrap();
        let (mut reader, _) = Reader::new(&bytes[..]).unwrap();
        let mut frames = Vec::new();
        loop {
            match reader.next().unwrap() {
                Record::Pages { first, bytes } => {
                    frames.extend(first..first + (bytes.len() / PAGE_BYTES) as u64);
                }
                Record::End => return frames,
                _ => {}
            }
        }
    }

    #[test]
    fn page_is_sent_where_the_other_side_has_another() {
        let memory = memory(4 << 20);
        let mut there = Sent::default();
        for gfn in [3, 511, 512, 700] {
            put(&memory, gfn, 1);
        }
        let all = sent(|to| there.all(&memory, to, &|| Ok(())).unwrap());
        assert_eq!(all, [3, 511, 512, 700]);
        put(&memory, 511, 2);
        for gfn in [3, 700] {
            memory.discard(Gfn(gfn), 1).unwrap();
        }
        let mut frames = FrameSet::default();
        for gfn in [3, 4, 511, 512, 513] {
            frames.insert(Gfn(gfn));
        }
        let mut again = || sent(|to| there.frames(&memory, &frames, to, &|| Ok(())).unwrap());
        // Frame 4 is as it was, and 700 is not asked for.
        assert_eq!(again(), [3, 511, 512]);
        assert_eq!(again(), [511, 512]);
        assert_eq!(there.filled(), 3);
    }

    #[test]
    fn page_that_comes_as_zero_takes_no_memory() {
        let memory = memory(4 << 20);
        let room = |_| Ok(());
        let mut received = Received::new(&memory, 4 << 20, &room);
        received.take(8, &[7; 4 * PAGE_BYTES]).unwrap();
        let used = memory.used_bytes();
        let mut pages = vec![0; 3 * PAGE_BYTES];
        pages[PAGE_BYTES] = 1;
        received.take(8, &pages).unwrap();
        // In another huge page, where the host has such.
        received.take(600, &[0; 4 * PAGE_BYTES]).unwrap();
        assert_eq!(received.filled.runs().collect::<Vec<_>>(), [9..10, 11..12]);
        assert!(memory.used_bytes() <= used);
        let mut now = vec![9; 4 * PAGE_BYTES];
        memory.read_ram(Gfn(8).gpa(), &mut now).unwrap();
        assert_eq!(now[..3 * PAGE_BYTES], pages);
        assert_eq!(now[3 * PAGE_BYTES..], [7; PAGE_BYTES]);
    }

    #[test]
    fn memory_is_asked_for_before_it_is_used() {
        let memory = memory(512 << 20);
        let asked = Cell::new(0);
        let room = |bytes| {
            asked.set(asked.get() + bytes);
            match asked.get() > 2 * STEP * PAGE_SIZE {
                true => Err(RestoreError::Invalid("no room").into()),
                false => Ok(()),
            }
        };
        let mut received = Received::new(&memory, 16 * PAGE_SIZE, &room);
        received.take(0, &[1; 16 * PAGE_BYTES]).unwrap();
        // The same again is no more.
        received.take(0, &[2; 16 * PAGE_BYTES]).unwrap();
        assert_eq!(asked.get(), 0);
        received.take(15, &[1; 2 * PAGE_BYTES]).unwrap();
        assert_eq!(asked.get(), STEP * PAGE_SIZE);
        let mut gfn = 17;
        let fault = loop {
            if let Err(fault) = received.take(gfn, &[1; 256 * PAGE_BYTES]) {
                break fault;
            }
            gfn += 256;
        };
        assert_eq!(
            fault.to_string(),
            RestoreError::Invalid("no room").to_string()
        );
        assert!(gfn <= 16 + 2 * STEP && gfn > 16 + 2 * STEP - 256);
        assert!(memory.used_bytes() <= gfn * PAGE_SIZE + HUGE_PAGE);
    }

    #[test]
    fn known_size_is_the_limit() {
        let memory = memory(4 << 20);
        let asked = Cell::new(0);
        let room = |bytes| {
            asked.set(bytes);
            Ok(())
        };
        let mut received = Received::new(&memory, 4 << 20, &room);
        received.take(0, &[1; 8 * PAGE_BYTES]).unwrap();
        received.set_size(1 << 20, 10).unwrap();
        assert_eq!(asked.get(), (1 << 20) - 8 * PAGE_SIZE);
        received.take(6, &[1; 4 * PAGE_BYTES]).unwrap();
        assert!(received.take(10, &[1; PAGE_BYTES]).is_err());
        received.take(0, &[0; PAGE_BYTES]).unwrap();
        received.take(10, &[1; PAGE_BYTES]).unwrap();
        let mut late = Received::new(&memory, 4 << 20, &room);
        late.take(0, &[1; 8 * PAGE_BYTES]).unwrap();
        assert!(late.set_size(1 << 20, 7).is_err());
    }

    #[test]
    fn stream_that_repeats_itself_comes_to_an_end() {
        let memory = memory(1 << 20);
        let room = |_| Ok(());
        let mut received = Received::new(&memory, 1 << 20, &room);
        let most = PASSES_MAX * 256 + OTHER_PAGES_MAX;
        for n in 0..most / 128 {
            received
                .take(n % 2 * 128, &[n as u8; 128 * PAGE_BYTES])
                .unwrap();
        }
        let fault = received.take(0, &[1; PAGE_BYTES]).unwrap_err();
        assert!(fault.to_string().contains("again"), "{fault}");
    }
}
