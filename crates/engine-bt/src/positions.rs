//! What is known of positions in the code cache: which block lies there, where the guest is, where its jumps are.

use hospes_translate::{ChainSite, Place, Resume, SideEntry};

use crate::blocks::{Block, Point};
use crate::cache::CodeMemory;

/// Blocks, and what belongs to them.
#[derive(Debug)]
pub(crate) struct Tables {
    pub list: List,
    pub side: Vec<SideEntry>,
    pub chains: Vec<ChainSite>,
    pub places: Vec<Place>,
}

impl Tables {
    /// Address space for as much as a cache of this size can hold, so that the tables never move; pages come as they are used.
    pub fn new(bytes: usize, cold_from: u32) -> Tables {
        Tables {
            list: List::new(bytes / 256, cold_from),
            side: Vec::with_capacity(bytes / 16),
            chains: Vec::with_capacity(bytes / 64),
            places: Vec::with_capacity(bytes / 16),
        }
    }

    pub fn chains_of(&self, block: &Block) -> &[ChainSite] {
        &self.chains[block.chains as usize..][..block.chains_len.into()]
    }

    pub fn places_of(&self, block: &Block) -> &[Place] {
        &self.places[block.places as usize..][..block.places_len.into()]
    }

    pub fn side_of(&self, block: &Block) -> &[SideEntry] {
        &self.side[block.side as usize..][..block.side_len.into()]
    }

    /// Makes a jump of an original leave again.
    pub fn disconnect(&self, code: &CodeMemory, site: u32) {
        let Some(block) = self.list.at(site) else {
            return;
        };
        let mut chains = self.chains_of(block).iter();
        if let Some(c) = chains.find(|c| block.position(c.at) == site) {
            let to = block.position(c.unconnected);
            code.patch_jump(site as usize, to as usize);
        }
    }

    /// Where the guest is when the host is at `pos`, in this block.
    pub fn point(&self, block: &Block, pos: u32) -> Option<Point> {
        let host = block.offset(pos)?;
        let side = self.side_of(block);
        let n = side.partition_point(|e| e.host <= host);
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

/// Bytes of the code cache, as a power of two, whose blocks are looked through.
const STRETCH: u32 = 12;

/// Blocks, dead or alive, in the order of their positions, which they are found by: every way out of translated code looks for some.
#[derive(Debug)]
pub(crate) struct List {
    blocks: Vec<Block>,
    /// Where cold parts begin.
    cold_from: u32,
    hot: Stretches,
    cold: Stretches,
}

/// How many parts of one kind begin before the end of each stretch.
#[derive(Debug, Default)]
struct Stretches {
    /// The stretch of the first one.
    first: usize,
    begun: Vec<u32>,
}

impl Stretches {
    /// Adds a part that lies behind the `before` others.
    fn add(&mut self, pos: u32, before: usize) {
        let stretch = (pos >> STRETCH) as usize;
        if before == 0 {
            self.first = stretch;
        }
        self.begun.resize(stretch - self.first + 1, before as u32);
        self.begun[stretch - self.first] += 1;
    }

    /// Those that may lie around a position, of `all` there are.
    fn near(&self, pos: u32, all: usize) -> Option<std::ops::Range<usize>> {
        let stretch = ((pos >> STRETCH) as usize).checked_sub(self.first)?;
        let begun = |stretch: usize| self.begun.get(stretch).map_or(all, |&n| n as usize);
        Some(stretch.checked_sub(1).map_or(0, begun)..begun(stretch))
    }
}

impl List {
    /// With room for so many `blocks`, whose cold parts lie from a position on.
    pub fn new(blocks: usize, cold_from: u32) -> List {
        List {
            blocks: Vec::with_capacity(blocks),
            cold_from,
            hot: Stretches::default(),
            cold: Stretches::default(),
        }
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Adds a block both parts of which lie behind those of all others.
    pub fn push(&mut self, block: Block) {
        self.hot.add(block.place.hot, self.blocks.len());
        self.cold.add(block.place.cold, self.blocks.len());
        self.blocks.push(block);
    }

    /// The block that lies around a position.
    pub fn at(&self, pos: u32) -> Option<&Block> {
        type Begin = fn(&Block) -> u32;
        let (stretches, begin): (_, Begin) = if pos < self.cold_from {
            (&self.hot, |b| b.place.hot)
        } else {
            (&self.cold, |b| b.place.cold)
        };
        let near = stretches.near(pos, self.len())?;
        let from = near.start;
        let n = from + self.blocks[near].partition_point(|b| begin(b) <= pos);
        let block = &self.blocks[n.checked_sub(1)?];
        block.offset(pos).map(|_| block)
    }
}

impl std::ops::Index<u32> for List {
    type Output = Block;

    fn index(&self, n: u32) -> &Block {
        &self.blocks[n as usize]
    }
}

impl std::ops::IndexMut<u32> for List {
    fn index_mut(&mut self, n: u32) -> &mut Block {
        &mut self.blocks[n as usize]
    }
}

#[cfg(test)]
mod tests {
    use hospes_translate::{Mode, Translation};
    use hospes_units::Gpa;

    use crate::blocks::{Blocks, Key};
    use crate::cache::CodeMemory;

    #[test]
    fn blocks_are_found_by_every_position_in_them() {
        let code = CodeMemory::new(1 << 20).unwrap();
        let mut blocks = Blocks::new(3 * 4096 + 16, 1 << 20);
        let lengths = [16, 100, 4000, 33_000, 5, 64, 12_288, 4096, 1];
        let mut places = Vec::new();
        for (n, len) in lengths.into_iter().enumerate() {
            let key = Key {
                gpa: Gpa(n as u64),
                pc: n as u64,
                mode: Mode(Mode::LONG),
            };
            let hot = (len + n * 7) / 2;
            let made = Translation {
                code: vec![0x90; len],
                hot: hot.min(len) as u32,
                ..Translation::default()
            };
            let block = blocks.insert(&code, key, None, &made);
            let (hot, cold) = (u32::from(block.hot), u32::from(block.len - block.hot));
            for (from, len) in [(block.place.hot, hot), (block.place.cold, cold)] {
                places.push((from, from + len, key));
            }
        }
        for pos in 0..places.last().unwrap().1 + 10_000 {
            let around = places
                .iter()
                .find(|(from, to, _)| (*from..*to).contains(&pos));
            assert_eq!(
                blocks.at(pos).map(|b| b.key),
                around.map(|p| p.2),
                "{pos:#x}"
            );
        }
    }
}
