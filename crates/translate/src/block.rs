//! What a translation is given and what it gives back.

use crate::layout::Mode;
use crate::relocate::Place;
use crate::sight::Sight;

/// A request to translate the code at one guest address.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Guest bytes from `pc` on: to the end of its page, or with `crossing` into the next page.
    pub bytes: &'a [u8],
    /// Translate just the one instruction at `pc`, which lies in two pages.
    pub crossing: bool,
    /// Guest virtual address of the first byte.
    pub pc: u64,
    pub mode: Mode,
    /// Where the block will be placed.
    pub place: Placement,
    /// It is wanted for a jump that will be connected with it.
    pub connected: bool,
    /// For kernel code of a machine with a kernel window.
    pub sight: Option<Sight<'a>>,
}

/// Positions in the code cache of a block's two parts, 16-byte aligned: its hot one, which is all that is executed where every check succeeds and every jump is
/// connected, and its cold one. Offsets in a block count through the first and on through the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    pub hot: u32,
    pub cold: u32,
}

impl Placement {
    /// Position of an offset in a block whose hot part has `hot` bytes.
    pub fn position(self, hot: usize, offset: usize) -> u32 {
        match offset.checked_sub(hot) {
            None => self.hot + offset as u32,
            Some(behind) => self.cold + behind as u32,
        }
    }
}

/// Where the guest's program counter is, for one stretch of host code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At the instruction this many bytes behind the block's start.
    Offset(u16),
    /// As `Offset`, but directly behind an STI: no interrupt before the next instruction.
    OffsetInShadow(u16),
    /// In the frame: between leaving one block and entering another.
    RipInFrame,
}

/// From `host` bytes behind the block's start on, until the next entry, this is where the guest's state is. Eight bytes: there are many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideEntry {
    pub host: u16,
    /// General registers whose value is in the frame and not in the host register.
    pub spilled: u16,
    offset: u16,
    kind: u8,
    /// The status flags are in the frame and not in the host register.
    pub flags_saved: bool,
}

const HELD: u8 = 4;

impl SideEntry {
    /// Whether code may be entered here with everything in the frame.
    pub fn enterable(&self) -> bool {
        self.kind & HELD == 0
    }

    /// `held`: registers hold the host addresses of groups, so nothing may be entered here.
    pub fn new(
        host: usize,
        resume: Resume,
        spilled: u16,
        flags_saved: bool,
        held: bool,
    ) -> SideEntry {
        let (kind, offset) = match resume {
            Resume::Offset(o) => (0, o),
            Resume::OffsetInShadow(o) => (1, o),
            Resume::RipInFrame => (2, 0),
        };
        SideEntry {
            host: u16::try_from(host).expect("a block is shorter than 64 KiB"),
            spilled,
            offset,
            kind: kind | if held { HELD } else { 0 },
            flags_saved,
        }
    }

    fn is_at(&self, offset: u16) -> bool {
        matches!(self.resume(), Resume::Offset(o) | Resume::OffsetInShadow(o) if o == offset)
    }

    /// Whether the guest's state is where another entry says.
    pub(crate) fn says_the_same(&self, other: &SideEntry) -> bool {
        let host = self.host;
        *self == SideEntry { host, ..*other }
    }

    pub fn resume(&self) -> Resume {
        match self.kind & !HELD {
            0 => Resume::Offset(self.offset),
            1 => Resume::OffsetInShadow(self.offset),
            _ => Resume::RipInFrame,
        }
    }
}

/// A jump to another block that may be connected directly: in the same guest page, or from one page of the kernel's code to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainSite {
    /// Position of the 4-byte aligned displacement, from the block's start.
    pub at: u16,
    /// Where the jump goes while it is not connected, from the block's start.
    pub unconnected: u16,
    /// Of a jump to another page: position of the 4-byte aligned displacement by which it leaves while it is not connected, with the target's address
    /// in the frame; otherwise 0.
    pub exit: u16,
    pub mode: Mode,
    /// Offset of the target in the page; of one in another page the lower half of its address.
    pub target: u32,
    /// The jump is made with the flags in the frame.
    pub flags_saved: bool,
}

impl ChainSite {
    /// Whether the target is in another page.
    pub fn leaves_page(&self) -> bool {
        self.exit != 0
    }

    /// The target of a jump of a block at this address.
    pub fn target_from(&self, pc: u64) -> u64 {
        const PAGE: u64 = 0xfff;
        let kept = if self.leaves_page() {
            u32::MAX.into()
        } else {
            PAGE
        };
        pc & !kept | u64::from(self.target)
    }
}

/// Translated code, position-dependent (see [`Request::place`] and [`crate::relocate`]).
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// The hot part and the cold one behind it.
    pub code: Vec<u8>,
    /// Bytes of the hot part.
    pub hot: u32,
    /// Entry for transfers through a jump cache, which it verifies.
    pub indirect_entry: u32,
    /// Entry for transfers that know their target: registers and flags live.
    pub direct_entry: u32,
    /// The same with the flags in the frame.
    pub saved_entry: u32,
    /// Where the verified entry goes on, in a block that was not made for a jump which is connected with it: there all entries come by.
    pub verified_body: u32,
    /// Whoever comes by any entry comes by one of these.
    pub diverts: Vec<Divert>,
    /// Ascending by host position.
    pub side: Vec<SideEntry>,
    pub chains: Vec<ChainSite>,
    /// What a copy for another guest address differs in; none where only another translation will do.
    pub places: Vec<Place>,
    /// Guest bytes this translation depends on, from `pc`: its own and those looked at ahead. `before` bytes in front of `pc`.
    pub extent_before: u16,
    pub extent: u16,
    /// Number of guest instructions.
    pub instructions: u16,
}

/// An 8-byte aligned no-operation of 5 bytes, which one atomic store replaces by a jump to where the engine hears that the block has been thrown away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Divert {
    pub entry: u32,
    pub stub: u32,
}

impl Translation {
    /// Host position where the instruction that the last entry is about begins.
    pub(crate) fn host_of_last(&self) -> Option<u32> {
        let (Resume::Offset(offset) | Resume::OffsetInShadow(offset)) = self.side.last()?.resume()
        else {
            return None;
        };
        let its = self.side.iter().rev().take_while(|e| e.is_at(offset));
        its.last().map(|e| e.host.into())
    }
}
