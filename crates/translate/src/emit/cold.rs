//! Code off the hot path: what happens when a check fails or a jump leaves.

use super::control::Reach;
use super::{ColdKind, Flags, Start, Tag, Work, bit, ones};
use crate::asm::{Pos, RCX, RDX};
use crate::block::{ChainSite, Divert, Resume};
use crate::emit::SAVED_DIVERTS;
use crate::insn::{Kind, STATUS};
use crate::layout::{MISS_ANY_WRITE, MISS_GROUP, MISS_MASKED, MISS_WRITE, Mode};
use crate::relocate::PlaceKind;

/// Of an address, what is the same wherever its page is mapped.
const IN_PAGE: u64 = 0xfff;

impl Work<'_> {
    /// Emits what jumps out of the block's middle have to do before they are made, which is done as often as they are taken.
    pub(super) fn side_exits(&mut self) {
        self.groups.clear();
        let mut paths = std::mem::take(&mut self.cold);
        paths.retain_mut(|path| {
            let is_far = matches!(path.kind, ColdKind::Far { .. });
            if !is_far && (path.spilled == 0 || !matches!(path.kind, ColdKind::Chain { .. })) {
                return true;
            }
            self.aim(path.from, self.asm.pos());
            self.spilled = path.spilled;
            self.clean = 0;
            self.flags = path.flags;
            self.resume = path.resume;
            self.note();
            if let ColdKind::Far { target } = path.kind {
                self.mode = self.mode_at(path.resume);
                self.far_save_flags(STATUS);
                self.far_tail(Some(target), 0);
                return false;
            }
            self.unspill(!0);
            self.asm.align(4, 3);
            // This is the jump that will be connected.
            path.from = self.asm.jmp();
            path.spilled = 0;
            true
        });
        self.cold = paths;
    }

    pub(super) fn cold_paths(&mut self, connected: bool) {
        self.asm.align(16, 0);
        self.hot = self.asm.pos();
        self.out.hot = self.hot as u32;
        self.clean = 0;
        self.other_entries(connected);
        let mut stub = None;
        let mut paths = std::mem::take(&mut self.cold);
        for cold in paths.drain(..) {
            let here = self.asm.pos();
            self.spilled = cold.spilled;
            self.clean = 0;
            self.flags = cold.flags;
            self.resume = cold.resume;
            match cold.kind {
                ColdKind::Mem {
                    reg,
                    tag,
                    size,
                    write,
                    masked,
                    start,
                } => {
                    let site = self.resume_site(start, &mut stub);
                    let here = self.asm.pos();
                    self.aim(cold.from, here);
                    self.note();
                    self.missed(reg, tag, start.held);
                    self.unspill(!0);
                    self.store_position(self.layout.exit_arg, site);
                    let info = size
                        | if write { MISS_WRITE } else { 0 }
                        | if masked { MISS_MASKED } else { 0 };
                    self.asm.store_imm32(self.layout.exit_info, info);
                    let table = self.mode_at(cold.resume).table();
                    self.jmp_stub(self.stubs.mem[table]);
                }
                ColdKind::Group {
                    reg,
                    tag,
                    span,
                    write,
                    any_write,
                    start,
                    target,
                } => {
                    let site = self.resume_site(start, &mut stub);
                    let here = self.asm.pos();
                    self.aim(cold.from, here);
                    self.note();
                    self.missed(reg, tag, start.held);
                    self.unspill(!0);
                    self.restore_flags();
                    self.asm.align(4, 3);
                    // Connected to the translation without groups once there is one.
                    let at = self.asm.jmp();
                    let next = self.asm.pos();
                    self.aim(at, next);
                    self.store_position(self.layout.exit_chain, at);
                    self.store_position(self.layout.exit_arg, site);
                    let info = span
                        | MISS_GROUP
                        | if write { MISS_WRITE } else { 0 }
                        | if any_write { MISS_ANY_WRITE } else { 0 };
                    self.asm.store_imm32(self.layout.exit_info, info);
                    let mode = self.mode_at(cold.resume);
                    self.jmp_stub(self.stubs.mem[mode.table()]);
                    self.out.chains.push(ChainSite {
                        at: at as u16,
                        unconnected: next as u16,
                        exit: 0,
                        mode: Mode(mode.0 | Mode::SINGLE),
                        target: (target & IN_PAGE) as u32,
                        flags_saved: false,
                    });
                }
                ColdKind::Chain { target, reach } => {
                    self.note();
                    // That jump itself is what will be connected.
                    let (site, unconnected) = (cold.from, here);
                    self.aim(site, unconnected);
                    self.store_position(self.layout.exit_arg, site);
                    let (mut exit, mut kept) = (0, IN_PAGE);
                    if reach == Reach::Kernel {
                        kept = u64::MAX;
                        if self.resume != Resume::RipInFrame {
                            self.store_address(self.layout.rip, target);
                        }
                        self.asm.align(4, 3);
                        exit = self.asm.pos() + 1;
                    }
                    self.jmp_stub(self.stubs.chain);
                    self.out.chains.push(ChainSite {
                        at: site as u16,
                        unconnected: unconnected as u16,
                        exit: exit as u16,
                        mode: self.mode_at(cold.resume),
                        target: (target & kept) as u32,
                        flags_saved: self.flags == Flags::Saved,
                    });
                }
                ColdKind::Far { .. } => unreachable!("a side exit"),
                ColdKind::Leave { next } | ColdKind::LeaveInShadow { next } => {
                    self.aim(cold.from, here);
                    self.note();
                    self.unspill(!0);
                    if matches!(cold.kind, ColdKind::LeaveInShadow { .. }) {
                        self.asm.store_imm8(self.layout.interrupt_shadow, 1);
                    }
                    self.store_address(self.layout.rip, next);
                    self.jmp_stub(self.stubs.lookup);
                }
                ColdKind::LeaveWithRip => {
                    self.aim(cold.from, here);
                    self.note();
                    self.unspill(!0);
                    self.jmp_stub(self.stubs.lookup);
                }
                ColdKind::Step { offset } => {
                    self.aim(cold.from, here);
                    self.note();
                    self.step_at(offset);
                }
            }
        }
        self.cold = paths;
        // Reached when the block has been thrown away.
        self.clean = 0;
        self.resume = Resume::Offset(0);
        if connected {
            self.spilled = 0;
            if self.out.saved_entry + SAVED_DIVERTS == self.out.direct_entry {
                self.flags = Flags::Saved;
                self.stale(self.out.saved_entry);
            }
            self.flags = Flags::Host;
            self.stale(self.out.direct_entry);
        } else {
            self.spilled = bit(RCX) | bit(RDX);
            self.flags = Flags::Saved;
            self.stale(self.out.verified_body);
        }
    }

    /// Leaves to the engine at the block's own address, instead of an entry.
    fn stale(&mut self, entry: u32) {
        let stub = self.asm.pos() as u32;
        self.out.diverts.push(Divert { entry, stub });
        self.note();
        self.unspill(!0);
        self.store_address(self.layout.rip, self.pc);
        self.jmp_stub(self.stubs.lookup);
    }

    /// Emits what a missed access leaves behind: its address, and the host addresses that are needed when it is repeated.
    fn missed(&mut self, reg: u8, tag: Tag, held: u16) {
        match tag {
            Tag::Indexed { index, offset } => self.asm.xor_mem_base(reg, index, offset),
            Tag::Fixed { offset, relative } => {
                self.asm.xor_mem(reg, offset);
                self.place_behind_if(relative, 4, PlaceKind::TlbEntry);
            }
        }
        self.asm.store(self.layout.exit_ea, reg);
        for r in ones(held) {
            self.asm.store(self.layout.held + 8 * i32::from(r), r);
        }
    }

    /// Where the engine may repeat an instruction at once. Where groups are in use there, that is code which brings their host addresses back first;
    /// one for all accesses of the instruction, so that the engine sees when two of them evict each other.
    fn resume_site(&mut self, start: Start, stub: &mut Option<(u32, Pos)>) -> Pos {
        if start.held == 0 {
            return start.site as usize;
        }
        if let Some((_, at)) = stub.filter(|(site, _)| *site == start.site) {
            return at;
        }
        let cold = (self.spilled, self.flags, self.resume);
        (self.spilled, self.flags, self.resume) = (start.spilled, start.flags, start.resume);
        self.note_held(true);
        let begin = self.asm.pos();
        for r in ones(start.held) {
            self.asm.load(r, self.layout.held + 8 * i32::from(r));
        }
        let at = self.asm.jmp();
        self.aim(at, start.site as usize);
        (self.spilled, self.flags, self.resume) = cold;
        *stub = Some((start.site, begin));
        begin
    }

    /// The mode in force at a point of this block: STAC and CLAC change it on the way.
    pub(super) fn mode_at(&self, resume: Resume) -> Mode {
        let mut mode = self.initial;
        if !self.changes_ac {
            return mode;
        }
        let upto = match resume {
            Resume::Offset(o) | Resume::OffsetInShadow(o) => o,
            Resume::RipInFrame => u16::MAX,
        };
        for insn in &self.insns {
            if insn.offset >= upto {
                break;
            }
            match insn.kind {
                Kind::Stac => mode.0 |= Mode::AC,
                Kind::Clac => mode.0 &= !Mode::AC,
                _ => {}
            }
        }
        mode
    }
}
