//! The table of translated blocks, shared by all vCPUs of a domain.
//!
//! A block is found by physical address, virtual address and mode. A page from which anything was translated is marked in [`CodePages`]; stores to such a
//! page take the slow path on every vCPU and drop the blocks that overlap the written bytes.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};

use hospes_translate::{ChainSite, Mode, Resume, SideEntry, Translation};
use hospes_units::{Gfn, Gpa, PAGE_SIZE};
use rustc_hash::FxHashMap;

use crate::cache::CodeMemory;
use crate::direct::Suspects;

/// Writes to a page with code that hit none of its blocks before the blocks are dropped so that the page can be written at full speed.
const STRAY_WRITES: u32 = 64;

/// What a block is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub gpa: Gpa,
    pub pc: u64,
    pub mode: Mode,
}

/// One translated block. Positions are bytes from the start of the code cache, distances from the block's start.
#[derive(Debug)]
pub struct Block {
    pub key: Key,
    pub pos: u32,
    /// Where this block's entries begin in the shared tables.
    side: u32,
    chains: u32,
    /// For an instruction that lies in two pages: the frame of the second one, plus 1.
    second: Option<NonZeroU32>,
    len: u16,
    direct: u16,
    stale: u16,
    side_len: u16,
    chains_len: u16,
    /// Guest bytes the block depends on, in front of its address and from it on.
    before: u16,
    extent: u16,
    pub alive: bool,
}

/// The guest's state at some host address inside a block.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Guest program counter, `None` where the frame has it.
    pub rip: Option<u64>,
    pub in_shadow: bool,
    pub spilled: u16,
    pub flags_saved: bool,
}

/// A jump that may be connected, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    pub target: u64,
    pub mode: Mode,
    /// Frame of the block that has the jump.
    pub gfn: Gfn,
}

impl Block {
    /// Position for transfers that verify their target.
    pub fn indirect(&self) -> u32 {
        self.pos
    }

    /// Position for transfers that know their target.
    pub fn direct(&self) -> u32 {
        self.pos + u32::from(self.direct)
    }

    /// Frame of the second page that the block's only instruction reaches into.
    pub fn second_gfn(&self) -> Option<Gfn> {
        self.second.map(|n| Gfn(u64::from(n.get()) - 1))
    }

    fn depends_on(&self, start: u64, end: u64) -> bool {
        let gpa = self.key.gpa.0;
        let (first, last) = (gpa - u64::from(self.before), gpa + u64::from(self.extent));
        match self.second_gfn() {
            None => first < end && start < last,
            Some(gfn) => {
                let first_page_end = self.key.gpa.gfn().gpa().0 + PAGE_SIZE;
                let second = gfn.gpa().0;
                first < end && start < first_page_end
                    || second < end && start < second + (last - first_page_end)
            }
        }
    }

    fn guest(&self, offset: u16) -> u64 {
        let rip = self.key.pc.wrapping_add(u64::from(offset));
        if self.key.mode.has(Mode::LONG) {
            rip
        } else {
            rip & 0xffff_ffff
        }
    }
}

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
    /// Counts frames that address-space processes may no longer execute without another look at them.
    changes: AtomicU64,
    /// Counts frames that have become ones with code; the last of them stand in `recent`.
    marks: AtomicU64,
    recent: Vec<AtomicU64>,
}

/// How many frames that have become ones with code are remembered: a power of 2.
const RECENT: u64 = 4096;

impl CodePages {
    pub fn new(frames: u64) -> CodePages {
        CodePages {
            code: Bits::new(frames),
            direct: Bits::new(frames),
            changes: AtomicU64::new(0),
            marks: AtomicU64::new(0),
            recent: (0..RECENT).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Marks a frame as one with code; true if it was not. Called by one thread at a time.
    fn mark(&self, gfn: Gfn) -> bool {
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

    pub fn contains(&self, gfn: Gfn) -> bool {
        self.code.contains(gfn)
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

    fn drop_direct(&self, gfn: Gfn) {
        if self.direct.remove(gfn) {
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn clear(&self) {
        self.direct.clear();
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.code.clear();
    }
}

#[derive(Debug, Default)]
struct Page {
    blocks: Vec<u32>,
    stray_writes: u32,
}

/// What is known of positions in the code cache: blocks in the order of theirs, and what belongs to them.
#[derive(Debug)]
struct Tables {
    list: Vec<Block>,
    side: Vec<SideEntry>,
    chains: Vec<ChainSite>,
}

impl Tables {
    /// Address space for as much as a cache of this size can hold, so that the tables never move; pages come as they are used.
    fn new(bytes: usize) -> Tables {
        Tables {
            list: Vec::with_capacity(bytes / 256),
            side: Vec::with_capacity(bytes / 16),
            chains: Vec::with_capacity(bytes / 64),
        }
    }

    /// The block, dead or alive, that lies around a position.
    fn at(&self, pos: u32) -> Option<&Block> {
        let n = self.list.partition_point(|b| b.pos <= pos);
        let block = &self.list[n.checked_sub(1)?];
        (pos < block.pos + u32::from(block.len)).then_some(block)
    }

    fn side_of(&self, block: &Block) -> &[SideEntry] {
        &self.side[block.side as usize..][..block.side_len.into()]
    }

    /// Where the guest is when the host is at `pos`.
    fn point(&self, pos: u32) -> Option<Point> {
        let block = self.at(pos)?;
        let host = pos - block.pos;
        let side = self.side_of(block);
        let n = side.partition_point(|e| u32::from(e.host) <= host);
        let entry = side[n.checked_sub(1)?];
        let (rip, in_shadow) = match entry.resume() {
            Resume::Offset(o) => (Some(block.guest(o)), false),
            Resume::OffsetInShadow(o) => (Some(block.guest(o)), true),
            Resume::RipInFrame => (None, false),
        };
        Some(Point {
            rip,
            in_shadow,
            spilled: entry.spilled,
            flags_saved: entry.flags_saved,
        })
    }
}

/// Generations whose tables are kept after the cache was emptied: a vCPU that was made to leave its code still has to learn where the guest was. None is
/// slower than others fill the cache twice.
const OLD_TABLES: usize = 2;

/// All blocks of the present generation.
#[derive(Debug)]
pub struct Blocks {
    start: usize,
    end: usize,
    next: usize,
    /// How often everything was forgotten.
    generation: u64,
    tables: Tables,
    /// The tables of the generations before, the latest first.
    old: VecDeque<Tables>,
    by_key: FxHashMap<Key, u32>,
    pages: HashMap<u64, Page, rustc_hash::FxBuildHasher>,
    /// What the frames that address-space processes execute hold, for as long as they are not written.
    scans: FxHashMap<u64, Suspects>,
}

impl Blocks {
    /// Blocks are placed in `start..end` of the code cache.
    pub fn new(start: usize, end: usize) -> Blocks {
        let bytes = end - start;
        Blocks {
            start,
            end,
            next: start,
            generation: 0,
            tables: Tables::new(bytes),
            old: VecDeque::new(),
            by_key: FxHashMap::default(),
            pages: HashMap::default(),
            scans: FxHashMap::default(),
        }
    }

    /// What a scan of the frame came to, if it has not been written since.
    pub fn scan(&self, gfn: Gfn) -> Option<&Suspects> {
        self.scans.get(&gfn.0)
    }

    /// Notes what a frame held that was marked before it was read.
    pub fn set_scan(&mut self, gfn: Gfn, found: Suspects) {
        self.scans.insert(gfn.0, found);
    }

    pub fn find(&self, key: &Key) -> Option<&Block> {
        self.by_key.get(key).map(|&n| &self.tables.list[n as usize])
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The block, dead or alive, that lies around a position.
    pub fn at(&self, pos: u32) -> Option<&Block> {
        self.tables.at(pos)
    }

    /// Where the guest is when the host is, or was, at `pos` of this generation.
    pub fn point(&self, generation: u64, pos: u32) -> Option<Point> {
        match (self.generation - generation) as usize {
            0 => self.tables.point(pos),
            n => self.old.get(n - 1)?.point(pos),
        }
    }

    /// Position in the living block around `pos` where the instruction at guest address `rip` can be entered with all registers and flags in the
    /// frame.
    pub fn reentry(&self, pos: u32, rip: u64) -> Option<u32> {
        let block = self.at(pos).filter(|b| b.alive)?;
        let offset = rip.checked_sub(block.key.pc)?;
        self.tables
            .side_of(block)
            .iter()
            .find(|e| matches!(e.resume(), Resume::Offset(o) if u64::from(o) == offset))
            .filter(|e| e.enterable())
            .map(|e| block.pos + u32::from(e.host))
    }

    /// The connectable jump whose displacement is at `site`. `None` where its block has been dropped.
    pub fn chain(&self, site: u32) -> Option<Chain> {
        let block = self.at(site).filter(|b| b.alive)?;
        self.tables.chains[block.chains as usize..][..block.chains_len.into()]
            .iter()
            .find(|c| block.pos + u32::from(c.at) == site)
            .map(|c| Chain {
                target: block.key.pc & !(PAGE_SIZE - 1) | u64::from(c.target),
                mode: c.mode,
                gfn: block.key.gpa.gfn(),
            })
    }

    /// Where the next block will be placed; `None` when less than `room` bytes are left.
    pub fn place(&self, room: usize) -> Option<usize> {
        (self.next + room <= self.end).then_some(self.next)
    }

    /// Marks the page as one with code. True if it was not: then stores to it must be stopped on every vCPU before its bytes are read.
    pub fn mark(&mut self, pages: &CodePages, gfn: Gfn) -> bool {
        pages.mark(gfn)
    }

    /// Adds a translation that was made for the position [`Blocks::place`] gave. `second` is the physical address of the page behind, for an
    /// instruction that reaches into it.
    pub fn insert(
        &mut self,
        code: &CodeMemory,
        key: Key,
        second: Option<Gpa>,
        t: Translation,
    ) -> &Block {
        let pos = self.next;
        code.put(pos, &t.code);
        let tables = &mut self.tables;
        let n = tables.list.len() as u32;
        self.next = (pos + t.code.len()).next_multiple_of(16);
        let small = |v: usize| u16::try_from(v).expect("a block is shorter than 64 KiB");
        tables.list.push(Block {
            key,
            pos: pos as u32,
            side: tables.side.len() as u32,
            chains: tables.chains.len() as u32,
            second: second.and_then(|g| NonZeroU32::new(g.gfn().0 as u32 + 1)),
            len: small(t.code.len()),
            direct: small(t.direct_entry as usize),
            stale: small(t.stale_stub as usize),
            side_len: small(t.side.len()),
            chains_len: small(t.chains.len()),
            before: t.extent_before,
            extent: t.extent,
            alive: true,
        });
        tables.side.extend_from_slice(&t.side);
        tables.chains.extend_from_slice(&t.chains);
        self.by_key.insert(key, n);
        self.pages
            .entry(key.gpa.gfn().0)
            .or_default()
            .blocks
            .push(n);
        if let Some(g) = second {
            self.pages.entry(g.gfn().0).or_default().blocks.push(n);
        }
        &self.tables.list[n as usize]
    }

    /// Drops the blocks that depend on any of these bytes, which lie in one page. True if there were any.
    pub fn invalidate(&mut self, code: &CodeMemory, pages: &CodePages, gpa: Gpa, len: u64) -> bool {
        let gfn = gpa.gfn();
        pages.drop_direct(gfn);
        self.scans.remove(&gfn.0);
        let Some(page) = self.pages.get_mut(&gfn.0) else {
            pages.code.remove(gfn);
            return false;
        };
        let (start, end) = (gpa.0, gpa.0 + len);
        let list = &mut self.tables.list;
        let by_key = &mut self.by_key;
        let before = page.blocks.len();
        let mut drop_if = |all: bool, blocks: &mut Vec<u32>| {
            blocks.retain(|&n| {
                let b = &mut list[n as usize];
                let hit = all || b.depends_on(start, end);
                if hit && b.alive {
                    b.alive = false;
                    if by_key.get(&b.key) == Some(&n) {
                        by_key.remove(&b.key);
                    }
                    code.divert(b.direct() as usize, (b.pos + u32::from(b.stale)) as usize);
                }
                !hit
            });
        };
        drop_if(false, &mut page.blocks);
        if page.blocks.len() == before {
            page.stray_writes += 1;
            if page.stray_writes >= STRAY_WRITES {
                drop_if(true, &mut page.blocks);
            }
        }
        let dropped = page.blocks.len() != before;
        if page.blocks.is_empty() {
            self.pages.remove(&gfn.0);
            pages.code.remove(gfn);
        }
        dropped
    }

    /// Drops the blocks of every page in a physical range of any length.
    pub fn invalidate_range(
        &mut self,
        code: &CodeMemory,
        pages: &CodePages,
        gpa: Gpa,
        len: u64,
    ) -> bool {
        let mut any = false;
        let mut at = gpa.0;
        let end = gpa.0 + len;
        while at < end {
            let next = ((at / PAGE_SIZE) + 1) * PAGE_SIZE;
            if pages.contains(Gpa(at).gfn()) {
                any |= self.invalidate(code, pages, Gpa(at), next.min(end) - at);
            }
            at = next;
        }
        any
    }

    /// Forgets everything. No vCPU may be inside translated code, and all must forget their jump caches before they go back.
    pub fn clear(&mut self, pages: &CodePages) {
        self.next = self.start;
        let new = Tables::new(self.end - self.start);
        self.old.push_front(mem::replace(&mut self.tables, new));
        self.old.truncate(OLD_TABLES);
        self.generation += 1;
        self.by_key.clear();
        self.pages.clear();
        self.scans.clear();
        pages.clear();
    }
}
