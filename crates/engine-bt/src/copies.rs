//! Copies of blocks for the same page at another virtual address: what a program that is started again needs of its code, and of its libraries'.
//!
//! A copy has the tables of its original and dies with it, as both depend on the same bytes. With the block that is wanted come those that jumps have led to from
//! there inside the page, connected as they were: they will be needed next.
//!
//! Copies have a part of the code cache of their own. When it is full all of them are forgotten, and what was translated stays: most are of programs that have ended, and
//! those still wanted are soon made again.

use std::mem;

use hospes_translate::{ChainSite, Move, Placement};
use hospes_units::{Gpa, PAGE_SIZE};

use crate::blocks::{Block, Blocks, Key, page_of};
use crate::cache::CodeMemory;
use crate::frame::LAYOUT;
use crate::past::Past;
use crate::positions::List;
use crate::space::Space;

/// Variants of a page that are searched for an original, the latest first.
const SEARCHED: usize = 8;

/// Marks the number of a block as one of a copy.
const COPY: u32 = 1 << 31;

/// Whether the block with this number is a copy.
pub(crate) fn is_copy(n: u32) -> bool {
    n & COPY != 0
}

/// The part of the code cache where the copies are, and which they are.
#[derive(Debug)]
pub(crate) struct Copies {
    space: Space,
    pub list: List,
    past: Past<List>,
    /// Where jumps of other blocks are connected with copies.
    links: Vec<u32>,
}

impl Copies {
    pub fn new(space: Space) -> Copies {
        Copies {
            list: List::new(0, space.middle()),
            space,
            past: Past::default(),
            links: Vec::new(),
        }
    }

    /// Whether a position is where copies are.
    pub fn contains(&self, pos: u32) -> bool {
        self.space.contains(pos)
    }

    pub fn get(&self, n: u32) -> Option<&Block> {
        is_copy(n).then(|| &self.list[n & !COPY])
    }

    pub fn get_mut(&mut self, n: u32) -> Option<&mut Block> {
        is_copy(n).then(|| &mut self.list[n & !COPY])
    }

    /// The copies there were in a generation.
    pub fn of_generation(&self, generation: u64) -> Option<&List> {
        self.past.of(&self.list, generation)
    }

    /// Drops the lists of generations before this one.
    pub fn keep_since(&mut self, oldest: u64) {
        self.past.keep_since(oldest);
    }

    /// Where the next copy has its place; `None` when less than `room` bytes are left for one of its parts.
    fn place(&self, room: usize) -> Option<Placement> {
        self.space.place(room)
    }

    /// Adds a copy whose code has been put in the next place; gives its number.
    fn add(&mut self, block: Block) -> u32 {
        let (hot, len) = (usize::from(block.hot), usize::from(block.len));
        self.space.take(hot, len - hot);
        self.list.push(block);
        (self.list.len() - 1) as u32 | COPY
    }

    /// Notes that a jump of another block is connected with a copy.
    pub fn note_link(&mut self, site: u32) {
        self.links.push(site);
    }

    pub fn take_links(&mut self) -> Vec<u32> {
        mem::take(&mut self.links)
    }

    /// Forgets all copies; `now` is the generation that begins.
    pub fn clear(&mut self, now: u64) {
        self.space.clear();
        let empty = List::new(0, self.space.middle());
        self.past.add(mem::replace(&mut self.list, empty), now);
        self.links.clear();
    }
}

impl Blocks {
    /// Whether there is a block to copy for this key, but less than `room` bytes to put a copy in.
    pub fn lacks_room_to_copy(&self, key: &Key, room: usize) -> bool {
        self.copies.place(room).is_none() && self.original(key).is_some()
    }

    /// Copies the block for this key from another virtual address, if it is there and can be copied.
    pub fn copy_from_other_address(&mut self, code: &CodeMemory, key: &Key) -> Option<&Block> {
        let original = self.original(key)?;
        let by = key.pc.wrapping_sub(self.block(original).key.pc);
        let mut copied: Vec<(u32, u32)> = Vec::new();
        let mut connections = Vec::new();
        let mut wanted = vec![original];
        while let Some(n) = wanted.pop() {
            let Some(copy) = self.copy_block(code, n, by) else {
                continue;
            };
            copied.push((n, copy));
            let (from, to) = (self.block(n), self.block(copy));
            for chain in self.tables.chains_of(from) {
                let site = to.position(chain.at);
                if let Some(target) = self.connected(code, from, chain) {
                    wanted.push(target);
                    connections.push((site, target, to.position(chain.unconnected)));
                } else {
                    code.patch_jump(site as usize, to.position(chain.unconnected) as usize);
                }
            }
        }
        // As far as there are copies of what the originals' jumps lead to.
        for (site, target, unconnected) in connections {
            let just_made = copied.iter().find(|(n, _)| *n == target);
            let copy = just_made.map(|&(_, copy)| copy).or_else(|| {
                let key = moved(&self.block(target).key, by);
                self.by_key.get(&key).copied()
            });
            let to = copy.map_or(unconnected, |n| self.block(n).direct());
            code.patch_jump(site as usize, to as usize);
        }
        let &(_, wanted) = copied.first()?;
        Some(self.block(wanted))
    }

    /// A block for the same code and mode, of one of the latest variants of its page.
    fn original(&self, key: &Key) -> Option<u32> {
        let page = self.pages.get(&key.gpa.gfn().0)?;
        let variants = page.variants.iter().rev().filter(|v| v.mode == key.mode);
        variants.take(SEARCHED).find_map(|v| {
            let pc = v.page | key.gpa.page_offset();
            self.by_key.get(&Key { pc, ..*key }).copied()
        })
    }

    /// Copies one block, unless that has been done; its jumps are still those of the original.
    fn copy_block(&mut self, code: &CodeMemory, n: u32, by: u64) -> Option<u32> {
        let from = *self.block(n);
        let key = moved(&from.key, by);
        let places = self.tables.places_of(&from);
        if places.is_empty() || self.by_key.contains_key(&key) {
            return None;
        }
        let place = self.copies.place(from.len.into())?;
        let change = Move::new(from.key.pc, key.pc, from.place, place)?;
        let (hot, cold) = (usize::from(from.hot), usize::from(from.len - from.hot));
        code.copy(from.place.hot as usize, place.hot as usize, hot, |hot| {
            code.copy(
                from.place.cold as usize,
                place.cold as usize,
                cold,
                |cold| {
                    change.apply(hot, cold, places, &LAYOUT);
                },
            );
        });
        let copy = self.copies.add(from.copied(key, place));
        self.register(copy);
        Some(copy)
    }

    /// The block that a jump of a living block is connected with.
    fn connected(&self, code: &CodeMemory, from: &Block, chain: &ChainSite) -> Option<u32> {
        let target = code.jump_target(from.position(chain.at) as usize);
        if target == from.position(chain.unconnected) as usize {
            return None;
        }
        let pc = chain.target_from(from.key.pc);
        let n = *self.by_key.get(&Key {
            gpa: Gpa(page_of(from.key.gpa.0) | pc & (PAGE_SIZE - 1)),
            pc,
            mode: chain.mode,
        })?;
        (self.block(n).direct() as usize == target).then_some(n)
    }
}

/// The key of the same code at another virtual address.
fn moved(key: &Key, by: u64) -> Key {
    Key {
        pc: key.pc.wrapping_add(by),
        ..*key
    }
}

#[cfg(test)]
mod tests {
    use hospes_translate::{Mode, Request, Stubs, Translation, Translator};

    use super::*;
    use crate::pages::CodePages;

    const FRAME: u64 = 0x3000;
    const HERE: u64 = 0x55aa_1234_5000;
    const THERE: u64 = 0x7f00_0bad_c000;
    const BRANCH: u64 = 0x100;
    const TARGET: u64 = 0x110;
    /// TEST EAX, EAX; JE to `TARGET`; CALL to the page behind.
    const BRANCH_CODE: &[u8] = &[0x85, 0xc0, 0x74, 0x0c, 0xe8, 0xf7, 0x0f, 0, 0];
    /// LEA RAX, [RIP + 0x1000]; RET.
    const TARGET_CODE: &[u8] = &[0x48, 0x8d, 0x05, 0, 0x10, 0, 0, 0xc3];

    struct Rig {
        blocks: Blocks,
        code: CodeMemory,
        pages: CodePages,
        translator: Translator,
    }

    fn key(page: u64, offset: u64) -> Key {
        Key {
            gpa: Gpa(FRAME + offset),
            pc: page + offset,
            mode: Mode(Mode::LONG | Mode::USER),
        }
    }

    impl Rig {
        fn new() -> Rig {
            Rig {
                blocks: Blocks::new(4096, 1 << 20),
                code: CodeMemory::new(1 << 20).unwrap(),
                pages: CodePages::new(16),
                translator: Translator::new(LAYOUT, Stubs::default()),
            }
        }

        fn translate(&mut self, key: &Key, bytes: &[u8], place: Placement) -> Translation {
            self.translator
                .translate(&Request {
                    bytes,
                    crossing: false,
                    pc: key.pc,
                    mode: key.mode,
                    place,
                    connected: false,
                    sight: None,
                })
                .unwrap()
        }

        /// Translates both pieces of code for a page and connects the jump from one to the other.
        fn with_page(page: u64) -> Rig {
            let mut rig = Rig::new();
            for (offset, bytes) in [(BRANCH, BRANCH_CODE), (TARGET, TARGET_CODE)] {
                let key = key(page, offset);
                let place = rig.blocks.place(4096).unwrap();
                let made = rig.translate(&key, bytes, place);
                rig.blocks.mark(&rig.pages, key.gpa.gfn());
                rig.blocks.insert(&rig.code, key, None, &made);
            }
            let target = rig.blocks.find(&key(page, TARGET)).unwrap().direct();
            rig.code.patch_jump(rig.site(page), target as usize);
            rig
        }

        /// Position of the displacement of the jump to `TARGET`.
        fn site(&self, page: u64) -> usize {
            let block = self.blocks.find(&key(page, BRANCH)).unwrap();
            let chains = self.blocks.tables.chains_of(block);
            let chain = chains
                .iter()
                .find(|c| u64::from(c.target) == TARGET)
                .unwrap();
            block.position(chain.at) as usize
        }

        fn bytes(&self, block: &Block) -> Vec<u8> {
            let part = |pos: u32, len: u16| {
                let start = self.code.address(pos as usize) as *const u8;
                // SAFETY: the block lies in the mapping, and nobody changes it meanwhile.
                unsafe { std::slice::from_raw_parts(start, len.into()) }
            };
            let place = block.place;
            [
                part(place.hot, block.hot),
                part(place.cold, block.len - block.hot),
            ]
            .concat()
        }
    }

    #[test]
    fn copy_is_the_translation_for_its_address_and_connected() {
        let mut rig = Rig::with_page(HERE);
        rig.blocks
            .copy_from_other_address(&rig.code, &key(THERE, BRANCH));
        let target = *rig.blocks.find(&key(THERE, TARGET)).unwrap();
        assert_eq!(
            rig.code.jump_target(rig.site(THERE)),
            target.direct() as usize
        );
        let made = rig.translate(&target.key, TARGET_CODE, target.place);
        assert_eq!(rig.bytes(&target), made.code);
    }

    #[test]
    fn jump_of_a_copy_leads_to_its_own_page() {
        let mut rig = Rig::with_page(HERE);
        rig.blocks
            .copy_from_other_address(&rig.code, &key(THERE, BRANCH));
        for page in [HERE, THERE] {
            let chain = rig.blocks.chain(rig.site(page) as u32).unwrap();
            assert_eq!(chain.target, page + TARGET);
        }
    }

    #[test]
    fn jump_to_a_dropped_block_leads_out() {
        let mut rig = Rig::with_page(HERE);
        rig.blocks
            .copy_from_other_address(&rig.code, &key(THERE, BRANCH));
        let (offset, len) = (TARGET + 1, 1);
        rig.blocks
            .invalidate(&rig.code, &rig.pages, Gpa(FRAME + offset), len);
        for page in [HERE, THERE] {
            let block = rig.blocks.find(&key(page, BRANCH)).unwrap();
            let site = rig.site(page);
            let chains = rig.blocks.tables.chains_of(block);
            let chain = chains
                .iter()
                .find(|c| block.position(c.at) as usize == site)
                .unwrap();
            let out = block.position(chain.unconnected) as usize;
            assert_eq!(rig.code.jump_target(site), out);
        }
    }

    #[test]
    fn copy_of_an_unconnected_jump_leads_out() {
        let mut rig = Rig::with_page(HERE);
        rig.blocks.invalidate(
            &rig.code,
            &rig.pages,
            Gpa(FRAME + TARGET),
            TARGET_CODE.len() as u64,
        );
        rig.blocks
            .copy_from_other_address(&rig.code, &key(THERE, BRANCH));
        assert!(rig.blocks.find(&key(THERE, TARGET)).is_none());
        let copy = *rig.blocks.find(&key(THERE, BRANCH)).unwrap();
        let made = rig.translate(&copy.key, BRANCH_CODE, copy.place);
        assert_eq!(rig.bytes(&copy), made.code);
    }

    #[test]
    fn invalidate_drops_copies_with_their_original() {
        let mut rig = Rig::with_page(HERE);
        rig.blocks
            .copy_from_other_address(&rig.code, &key(THERE, BRANCH));
        assert!(
            rig.blocks
                .invalidate(&rig.code, &rig.pages, Gpa(FRAME + TARGET), 1)
        );
        for page in [HERE, THERE] {
            assert!(rig.blocks.find(&key(page, TARGET)).is_none());
            assert!(rig.blocks.find(&key(page, BRANCH)).is_some());
        }
        rig.blocks
            .invalidate(&rig.code, &rig.pages, Gpa(FRAME), PAGE_SIZE);
        assert!(rig.blocks.find(&key(THERE, BRANCH)).is_none());
        assert!(!rig.pages.contains(Gpa(FRAME).gfn()));
    }

    #[test]
    fn clear_copies_leaves_the_originals_without_links_to_them() {
        let mut rig = Rig::with_page(HERE);
        let unconnected = {
            let mut rig = Rig::with_page(HERE);
            let other = key(THERE, BRANCH);
            rig.blocks
                .invalidate(&rig.code, &rig.pages, Gpa(FRAME + TARGET), 1);
            rig.blocks.copy_from_other_address(&rig.code, &other);
            let copy = rig.blocks.find(&other).unwrap();
            let to = rig.code.jump_target(rig.site(THERE));
            copy.offset(to as u32).unwrap()
        };
        rig.blocks
            .copy_from_other_address(&rig.code, &key(THERE, TARGET));
        let copy = rig.blocks.find(&key(THERE, TARGET)).unwrap().direct();
        let (site, before) = (rig.site(HERE), rig.blocks.generation());
        rig.blocks.connect(&rig.code, site as u32, copy);
        rig.blocks.clear_copies(&rig.code);
        assert!(rig.blocks.find(&key(THERE, TARGET)).is_none());
        assert!(rig.blocks.find(&key(HERE, TARGET)).is_some());
        let original = rig.blocks.find(&key(HERE, BRANCH)).unwrap();
        let to = rig.code.jump_target(site) as u32;
        assert_eq!(original.offset(to), Some(unconnected));
        let point = rig.blocks.point(before, copy).unwrap();
        assert_eq!(point.rip, Some(THERE + TARGET));
        assert!(rig.blocks.point(rig.blocks.generation(), copy).is_none());
        // For as long as anybody may ask, however often the cache was emptied since.
        for _ in 0..10 {
            rig.blocks.clear_copies(&rig.code);
            rig.blocks.clear(&rig.pages);
            rig.blocks.keep_since(before);
        }
        assert!(rig.blocks.point(before, copy).is_some());
        rig.blocks.keep_since(before + 1);
        assert!(rig.blocks.point(before, copy).is_none());
    }

    #[test]
    fn entries_are_copied_and_die_with_their_blocks() {
        let mut rig = Rig::with_page(HERE);
        let pcs = |rig: &Rig, page| -> Vec<u64> {
            let entries = rig.blocks.entries(&key(page, 0));
            entries.iter().map(|e| e.pc).collect()
        };
        assert!(pcs(&rig, HERE).is_empty());
        for _ in 0..2 {
            rig.blocks.enter(&key(HERE, BRANCH));
        }
        assert_eq!(pcs(&rig, HERE), [HERE + BRANCH]);
        rig.blocks
            .copy_from_other_address(&rig.code, &key(THERE, BRANCH));
        assert_eq!(pcs(&rig, THERE), [THERE + BRANCH]);
        let copy = rig.blocks.find(&key(THERE, BRANCH)).unwrap();
        let entry = rig.blocks.entries(&key(THERE, 0))[0];
        assert_eq!(
            (entry.direct, entry.indirect),
            (copy.direct(), copy.indirect())
        );
        rig.blocks
            .invalidate(&rig.code, &rig.pages, Gpa(FRAME + BRANCH), 1);
        assert!(pcs(&rig, HERE).is_empty() && pcs(&rig, THERE).is_empty());
    }

    #[test]
    fn copy_below_four_gigabytes_is_refused() {
        let mut rig = Rig::with_page(HERE);
        let low = key(0x40_0000, BRANCH);
        rig.blocks.copy_from_other_address(&rig.code, &low);
        assert!(rig.blocks.find(&low).is_none());
    }
}
