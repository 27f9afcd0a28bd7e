//! What is known of positions in the code cache: which block lies there, where the guest is, where its jumps are.

use hospes_translate::{ChainSite, Place, Resume, SideEntry};

use crate::blocks::{Block, Point};
use crate::cache::CodeMemory;

/// Blocks in the order of their positions, and what belongs to them.
#[derive(Debug)]
pub(crate) struct Tables {
    pub list: Vec<Block>,
    pub side: Vec<SideEntry>,
    pub chains: Vec<ChainSite>,
    pub places: Vec<Place>,
}

impl Tables {
    /// Address space for as much as a cache of this size can hold, so that the tables never move; pages come as they are used.
    pub fn new(bytes: usize) -> Tables {
        Tables {
            list: Vec::with_capacity(bytes / 256),
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
        let Some(block) = search(&self.list, site) else {
            return;
        };
        let mut chains = self.chains_of(block).iter();
        if let Some(c) = chains.find(|c| block.pos + u32::from(c.at) == site) {
            let to = block.pos + u32::from(c.unconnected);
            code.patch_jump(site as usize, to as usize);
        }
    }

    /// Where the guest is when the host is at `pos`, in this block.
    pub fn point(&self, block: &Block, pos: u32) -> Option<Point> {
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

/// The block, dead or alive, that lies around a position; they are in the order of theirs.
pub(crate) fn search(blocks: &[Block], pos: u32) -> Option<&Block> {
    let n = blocks.partition_point(|b| b.pos <= pos);
    let block = &blocks[n.checked_sub(1)?];
    (pos < block.pos + u32::from(block.len)).then_some(block)
}
