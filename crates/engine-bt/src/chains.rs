//! Jumps that are connected with the blocks they lead to.
//!
//! A block that is dropped keeps those who come by an entry away from its code: they leave to the engine, each time. So the jumps of its page's other blocks that
//! were connected with it become what they were before: the next one that is taken is connected anew.

use hospes_translate::Mode;
use hospes_units::Gfn;

use crate::blocks::Blocks;
use crate::cache::CodeMemory;

/// A jump that may be connected, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    pub target: u64,
    pub mode: Mode,
    /// Frame of the block that has the jump.
    pub gfn: Gfn,
    /// Where it leaves by if it leads to another page.
    pub exit: Option<Leaving>,
}

/// The jump by which one to another page leaves while it is not connected.
#[derive(Clone, Copy, Debug)]
pub struct Leaving {
    /// Position of its displacement.
    pub at: u32,
    pub flags_saved: bool,
}

impl Blocks {
    /// The connectable jump whose displacement is at `site`. `None` where its block has been dropped.
    pub fn chain(&self, site: u32) -> Option<Chain> {
        let block = self.at(site).filter(|b| b.alive)?;
        self.tables
            .chains_of(block)
            .iter()
            .find(|c| block.position(c.at) == site)
            .map(|c| Chain {
                target: c.target_from(block.key.pc),
                mode: c.mode,
                gfn: block.key.gpa.gfn(),
                exit: c.leaves_page().then(|| Leaving {
                    at: block.position(c.exit),
                    flags_saved: c.flags_saved,
                }),
            })
    }

    /// Connects a jump with a block.
    pub fn connect(&mut self, code: &CodeMemory, site: u32, target: u32) {
        code.patch_jump(site as usize, target as usize);
        if self.copies.contains(target) && !self.copies.contains(site) {
            self.copies.note_link(site);
        }
    }

    /// Makes the jumps inside a page leave again that are connected with any of these direct entries.
    pub(crate) fn disconnect_from(&self, code: &CodeMemory, gfn: Gfn, entries: &[u32]) {
        let Some(page) = self.pages.get(&gfn.0).filter(|_| !entries.is_empty()) else {
            return;
        };
        for block in page.blocks().map(|n| self.block(n)) {
            let chains = self.tables.chains_of(block).iter();
            for chain in chains.filter(|c| !c.leaves_page()) {
                let site = block.position(chain.at) as usize;
                if entries.contains(&(code.jump_target(site) as u32)) {
                    code.patch_jump(site, block.position(chain.unconnected) as usize);
                }
            }
        }
    }
}
