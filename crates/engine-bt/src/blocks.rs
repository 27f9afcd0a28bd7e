//! The table of translated blocks, shared by all vCPUs of a domain.
//!
//! A block is found by physical address, virtual address and mode. A page from which anything was translated is marked in [`CodePages`]; stores to such a
//! page take the slow path on every vCPU and drop the blocks that overlap the written bytes.

use std::mem;
use std::num::NonZeroU32;
use std::time::Instant;

use hospes_translate::layout::KERNEL_CODE;
use hospes_translate::{Mode, Placement, Resume, Translation};
use hospes_units::{Gfn, Gpa, PAGE_SIZE};
use rustc_hash::FxHashMap;

use crate::cache::CodeMemory;
use crate::compaction::Compaction;
use crate::copies::{Copies, is_copy};
use crate::direct::Suspects;
use crate::links::Links;
use crate::pages::CodePages;
use crate::past::Past;
use crate::positions::Tables;
use crate::space::Space;

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
#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub key: Key,
    pub place: Placement,
    /// Where this block's entries begin in the shared tables.
    pub(crate) side: u32,
    pub(crate) chains: u32,
    pub(crate) places: u32,
    /// For an instruction that lies in two pages: the frame of the second one, plus 1.
    second: Option<NonZeroU32>,
    /// Bytes of the hot part, and of both.
    pub hot: u16,
    pub len: u16,
    indirect: u16,
    direct: u16,
    saved: u16,
    /// The second one is that of the first where there is but one.
    diverts: [(u16, u16); 2],
    /// Was made for a jump that is connected with it.
    connected: bool,
    pub(crate) side_len: u16,
    pub(crate) chains_len: u16,
    pub(crate) places_len: u16,
    /// Guest bytes the block depends on, in front of its address and from it on.
    before: u16,
    extent: u16,
    pub alive: bool,
    /// Is among the entries of its page.
    entered: bool,
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

impl Block {
    /// Position for transfers that verify their target.
    pub fn indirect(&self) -> u32 {
        self.position(self.indirect)
    }

    /// Position for transfers that know their target.
    pub fn direct(&self) -> u32 {
        self.position(self.direct)
    }

    /// The same for those that have the flags in the frame.
    pub fn saved(&self) -> u32 {
        self.position(self.saved)
    }

    /// Has all who come by an entry leave to the engine.
    fn divert(&self, code: &CodeMemory) {
        for (entry, stub) in self.diverts {
            let [entry, stub] = [entry, stub].map(|offset| self.position(offset) as usize);
            code.divert(entry, stub);
        }
    }

    /// Whether a jump that is to be connected deserves a block made for that.
    pub fn is_to_be_replaced(&self) -> bool {
        !self.connected && self.second.is_none()
    }

    /// Position of an offset in the block.
    pub(crate) fn position(&self, offset: u16) -> u32 {
        self.place.position(self.hot.into(), offset.into())
    }

    /// The reverse, where the position is in the block.
    pub(crate) fn offset(&self, pos: u32) -> Option<u16> {
        let (hot, cold) = (u32::from(self.hot), u32::from(self.len - self.hot));
        let in_hot = pos.checked_sub(self.place.hot).filter(|n| *n < hot);
        let in_cold = || pos.checked_sub(self.place.cold).filter(|n| *n < cold);
        let offset = in_hot.or_else(|| in_cold().map(|n| hot + n))?;
        Some(offset as u16)
    }

    /// Frame of the second page that the block's only instruction reaches into.
    pub fn second_gfn(&self) -> Option<Gfn> {
        self.second.map(|n| Gfn(u64::from(n.get()) - 1))
    }

    /// The same block for another key, at another place.
    pub fn copied(&self, key: Key, place: Placement) -> Block {
        Block {
            key,
            place,
            ..*self
        }
    }

    fn entry(&self, number: u32) -> Entry {
        Entry {
            pc: self.key.pc,
            number,
            indirect: self.indirect(),
            direct: self.direct(),
        }
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

    pub(crate) fn guest(&self, offset: u16) -> u64 {
        let rip = self.key.pc.wrapping_add(u64::from(offset));
        if self.key.mode.has(Mode::LONG) {
            rip
        } else {
            rip & 0xffff_ffff
        }
    }
}

/// The blocks of one page at one virtual address and in one mode.
#[derive(Debug)]
pub(crate) struct Variant {
    /// Virtual address of the page.
    pub page: u64,
    pub mode: Mode,
    blocks: Vec<u32>,
    /// Where jumps from other pages and returns have led to.
    entries: Vec<Entry>,
}

/// A block that jumps from elsewhere have led to, with what a jump cache needs of it, all in one place: whole pages of them are entered.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub pc: u64,
    number: u32,
    /// Positions as in [`Block::indirect`] and [`Block::direct`].
    pub indirect: u32,
    pub direct: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Page {
    /// The latest last. Of most pages there is one; of those of libraries one for each program that was started.
    pub variants: Vec<Variant>,
    /// Blocks of other pages that reach into this one.
    reaching: Vec<u32>,
    stray_writes: u32,
}

impl Page {
    fn variant(&self, key: &Key) -> Option<&Variant> {
        let page = page_of(key.pc);
        let mut latest = self.variants.iter().rev();
        latest.find(|v| v.page == page && v.mode == key.mode)
    }

    fn variant_mut(&mut self, key: &Key) -> Option<&mut Variant> {
        let page = page_of(key.pc);
        let mut latest = self.variants.iter_mut().rev();
        latest.find(|v| v.page == page && v.mode == key.mode)
    }

    fn add(&mut self, block: &Block, n: u32) {
        let entry = block.entered.then(|| block.entry(n));
        match self.variant_mut(&block.key) {
            Some(v) => {
                v.blocks.push(n);
                v.entries.extend(entry);
            }
            None => self.variants.push(Variant {
                page: page_of(block.key.pc),
                mode: block.key.mode,
                blocks: vec![n],
                entries: Vec::from_iter(entry),
            }),
        }
    }

    /// Numbers of the blocks at all addresses.
    pub fn blocks(&self) -> impl Iterator<Item = u32> {
        self.variants.iter().flat_map(|v| &v.blocks).copied()
    }

    /// Drops the blocks of variants with these numbers.
    fn retain(&mut self, mut keep: impl FnMut(u32) -> bool) {
        for variant in &mut self.variants {
            let before = variant.blocks.len();
            variant.blocks.retain(|&n| keep(n));
            if variant.blocks.len() != before {
                let left = &variant.blocks;
                variant.entries.retain(|e| left.contains(&e.number));
            }
        }
        self.variants.retain(|v| !v.blocks.is_empty());
    }
}

/// Address of the page around an address.
pub(crate) fn page_of(address: u64) -> u64 {
    address & !(PAGE_SIZE - 1)
}

/// All blocks of the present generation.
#[derive(Debug)]
pub struct Blocks {
    pub(crate) space: Space,
    /// Bytes that blocks and copies may take.
    bytes: usize,
    /// How often blocks were forgotten, all or the copies among them.
    generation: u64,
    pub(crate) compaction: Compaction,
    pub(crate) tables: Tables,
    past: Past<Tables>,
    pub(crate) copies: Copies,
    /// Numbers of blocks: their places in the tables' list, or among the copies.
    pub(crate) by_key: FxHashMap<Key, u32>,
    pub(crate) pages: FxHashMap<u64, Page>,
    /// What the frames that address-space processes execute hold, for as long as they are not written.
    scans: FxHashMap<u64, Suspects>,
    pub(crate) links: Links,
}

impl Blocks {
    /// Blocks are placed in `start..end` of the code cache, copies in the last quarter of it.
    pub fn new(start: usize, end: usize) -> Blocks {
        let last = end;
        let end = last - (last - start) / 4;
        let bytes = end - start;
        let space = Space::new(start, end);
        Blocks {
            tables: Tables::new(bytes, space.middle()),
            space,
            bytes,
            generation: 0,
            compaction: Compaction::new(Instant::now()),
            past: Past::default(),
            copies: Copies::new(Space::new(end, last)),
            by_key: FxHashMap::default(),
            pages: FxHashMap::default(),
            scans: FxHashMap::default(),
            links: Links::default(),
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
        self.by_key.get(key).map(|&n| self.block(n))
    }

    pub(crate) fn block(&self, n: u32) -> &Block {
        match self.copies.get(n) {
            Some(copy) => copy,
            None => &self.tables.list[n],
        }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The block, dead or alive, that lies around a position.
    pub fn at(&self, pos: u32) -> Option<&Block> {
        let copies = self.copies.contains(pos);
        let list = if copies {
            &self.copies.list
        } else {
            &self.tables.list
        };
        list.at(pos)
    }

    /// Where the guest is when the host is, or was, at `pos` of this generation.
    pub fn point(&self, generation: u64, pos: u32) -> Option<Point> {
        let tables = self.past.of(&self.tables, generation)?;
        let list = if self.copies.contains(pos) {
            self.copies.of_generation(generation)?
        } else {
            &tables.list
        };
        tables.point(list.at(pos)?, pos)
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
            .map(|e| block.position(e.host))
    }

    /// Where the next block will be placed; `None` when less than `room` bytes are left for one of its parts.
    pub fn place(&self, room: usize) -> Option<Placement> {
        self.space.place(room)
    }

    /// Marks the page as one with code. True if it was not: then stores to it must be stopped on every vCPU before its bytes are read.
    pub fn mark(&mut self, pages: &CodePages, gfn: Gfn) -> bool {
        pages.mark(gfn)
    }

    /// Adds a translation that was made for the place [`Blocks::place`] gave. `second` is the physical address of the page behind, for an
    /// instruction that reaches into it.
    pub fn insert(
        &mut self,
        code: &CodeMemory,
        key: Key,
        second: Option<Gpa>,
        t: &Translation,
    ) -> &Block {
        let place = self.space.place(0).expect("there was room to translate");
        let (hot, cold) = t.code.split_at(t.hot as usize);
        code.put(place.hot as usize, hot);
        code.put(place.cold as usize, cold);
        self.space.take(hot.len(), cold.len());
        let tables = &mut self.tables;
        let small = |v: usize| u16::try_from(v).expect("a block is shorter than 64 KiB");
        let divert = |n: usize| {
            let d = t.diverts.get(n).or(t.diverts.first());
            d.map_or((0, 0), |d| {
                (small(d.entry as usize), small(d.stub as usize))
            })
        };
        let diverts = [divert(0), divert(1)];
        let block = Block {
            key,
            place,
            side: tables.side.len() as u32,
            chains: tables.chains.len() as u32,
            places: tables.places.len() as u32,
            second: second.and_then(|g| NonZeroU32::new(g.gfn().0 as u32 + 1)),
            hot: small(hot.len()),
            len: small(t.code.len()),
            indirect: small(t.indirect_entry as usize),
            direct: small(t.direct_entry as usize),
            saved: small(t.saved_entry as usize),
            diverts,
            connected: t.diverts.iter().any(|d| d.entry == t.direct_entry),
            side_len: small(t.side.len()),
            chains_len: small(t.chains.len()),
            places_len: small(t.places.len()),
            before: t.extent_before,
            extent: t.extent,
            alive: true,
            entered: false,
        };
        tables.side.extend_from_slice(&t.side);
        tables.chains.extend_from_slice(&t.chains);
        tables.places.extend_from_slice(&t.places);
        let n = tables.list.len() as u32;
        tables.list.push(block);
        self.register(n);
        if let Some(g) = second {
            self.pages.entry(g.gfn().0).or_default().reaching.push(n);
        }
        &self.tables.list[n]
    }

    /// Makes the block with this number known.
    pub(crate) fn register(&mut self, n: u32) {
        let block = *self.block(n);
        self.by_key.insert(block.key, n);
        let page = self.pages.entry(block.key.gpa.gfn().0).or_default();
        page.add(&block, n);
    }

    /// Notes that a jump from elsewhere has led to the block for this key.
    pub fn enter(&mut self, key: &Key) {
        let Some(&n) = self.by_key.get(key) else {
            return;
        };
        let block = match self.copies.get_mut(n) {
            Some(copy) => copy,
            None => &mut self.tables.list[n],
        };
        // What reaches into another page depends on more than the mapping of its own.
        if block.second.is_some() || mem::replace(&mut block.entered, true) {
            return;
        }
        let entry = block.entry(n);
        let page = self.pages.get_mut(&key.gpa.gfn().0);
        if let Some(variant) = page.and_then(|p| p.variant_mut(key)) {
            variant.entries.push(entry);
        }
    }

    /// Where jumps from elsewhere have led to in the same virtual page and mode.
    pub fn entries(&self, key: &Key) -> &[Entry] {
        let page = self.pages.get(&key.gpa.gfn().0);
        page.and_then(|p| p.variant(key))
            .map_or(&[], |v| &v.entries)
    }

    /// Drops the blocks that depend on any of these bytes, which lie in one page. True if there were any.
    pub fn invalidate(&mut self, code: &CodeMemory, pages: &CodePages, gpa: Gpa, len: u64) -> bool {
        let gfn = gpa.gfn();
        pages.drop_direct(gfn);
        self.scans.remove(&gfn.0);
        let Some(page) = self.pages.get_mut(&gfn.0) else {
            pages.unmark(gfn);
            return false;
        };
        let (start, end) = (gpa.0, gpa.0 + len);
        let (list, copies) = (&mut self.tables.list, &mut self.copies);
        let by_key = &mut self.by_key;
        let mut unlinked = Vec::new();
        let mut dead = Vec::new();
        // True if there was one.
        let mut drop_if = |all: bool, page: &mut Page| {
            let mut any = false;
            let mut keep = |n: u32| {
                let b = match copies.get_mut(n) {
                    Some(copy) => copy,
                    None => &mut list[n],
                };
                let hit = all || b.depends_on(start, end);
                if hit && b.alive {
                    b.alive = false;
                    if by_key.get(&b.key) == Some(&n) {
                        by_key.remove(&b.key);
                    }
                    b.divert(code);
                    dead.push(b.direct());
                    if b.key.pc >= KERNEL_CODE {
                        unlinked.push(page_of(b.key.pc));
                    }
                }
                any |= hit;
                !hit
            };
            page.reaching.retain(|&n| keep(n));
            page.retain(keep);
            any
        };
        let mut dropped = drop_if(false, page);
        if !dropped {
            page.stray_writes += 1;
            if page.stray_writes >= STRAY_WRITES {
                dropped = drop_if(true, page);
            }
        }
        if page.variants.is_empty() && page.reaching.is_empty() {
            self.pages.remove(&gfn.0);
            pages.unmark(gfn);
        } else {
            self.disconnect_from(code, gfn, &dead);
        }
        for page in unlinked {
            self.unlink_page(code, page);
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

    /// Drops what is known of generations before this one.
    pub fn keep_since(&mut self, oldest: u64) {
        self.past.keep_since(oldest);
        self.copies.keep_since(oldest);
    }

    /// Forgets the copies. No vCPU may be inside translated code, and all must forget their jump caches before they go back.
    pub fn clear_copies(&mut self, code: &CodeMemory) {
        for site in self.copies.take_links() {
            self.tables.disconnect(code, site);
        }
        self.by_key.retain(|_, n| !is_copy(*n));
        for page in self.pages.values_mut() {
            page.retain(|n| !is_copy(n));
        }
        self.generation += 1;
        self.copies.clear(self.generation);
    }

    /// Forgets everything. No vCPU may be inside translated code, and all must forget their jump caches before they go back.
    pub fn clear(&mut self, pages: &CodePages) {
        self.space.clear();
        self.compaction.emptied(Instant::now());
        let new = Tables::new(self.bytes, self.space.middle());
        let tables = mem::replace(&mut self.tables, new);
        self.generation += 1;
        self.past.add(tables, self.generation);
        self.copies.clear(self.generation);
        self.by_key.clear();
        self.pages.clear();
        self.scans.clear();
        self.links = Links::default();
        pages.clear();
    }
}
