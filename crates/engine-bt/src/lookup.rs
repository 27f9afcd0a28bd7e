//! From a program counter to translated code, made where there is none yet.

use hospes_engine::seg;
use hospes_translate::layout::{KERNEL_CODE, KERNEL_TABLE};
use hospes_translate::{Mode, Request, Sight};
use hospes_units::{Gpa, Gva, PAGE_SIZE};

use crate::blocks::{Block, Key};
use crate::exec::{self, Access, Exception};
use crate::jumps::Mapping;
use crate::vcpu::{BtVcpu, Found, canonical};
use crate::vm::{FORGET_CODE, Translations};

/// Code cache room that one block may need.
const BLOCK_ROOM: usize = 64 * 1024;
/// Longest instruction in bytes.
pub(crate) const MAX_INSTRUCTION: usize = 15;

/// What a block is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// A jump through the caches, or anything else that knows nothing but an address.
    Lookup,
    /// A jump inside a page, which will be connected.
    Chain,
}

/// What looking a block up came to.
enum Looked {
    At(u32),
    /// The instruction semantics take the next instruction.
    Step,
}

impl BtVcpu {
    /// Finds or makes the translation of the code at RIP.
    pub(crate) fn find_code(&mut self, mode: Mode, by: By) -> Found {
        let rip = self.host.frame.cpu.rip;
        let table = mode.table();
        let entered = Mode(mode.0 & !Mode::SINGLE);
        self.host.jumps.enter_mode(&mut self.host.frame, entered);
        self.host.update_syscall_segments();
        // For a jump that is to be connected another block may be better than the one that other jumps find.
        if by == By::Lookup
            && let Some(direct) = self.host.jumps.get(table, mode, rip)
        {
            return Found::Code(direct);
        }
        let user = mode.has(Mode::USER);
        if rip >= KERNEL_CODE && !user && self.host.control.kernel_entry() == 0 {
            self.host.follow_tables();
        }
        if !canonical(rip) {
            return Found::Stepped(self.step());
        }
        let tr = match exec::walk(
            &self.host.frame.cpu,
            &self.host.shared.memory,
            Gva(rip),
            Access::exec(user),
        ) {
            Ok(tr) => tr,
            Err(f) => return Found::Stepped(self.raise(Exception::page(rip, f))),
        };
        if !self.host.shared.memory.is_backed(tr.gpa.gfn()) {
            return Found::Stepped(self.step());
        }
        let key = Key {
            gpa: tr.gpa,
            pc: rip,
            mode,
        };
        let mut page = std::mem::take(&mut self.page);
        let found = self.find_block(key, Mapping::of(&tr), by, &mut page);
        self.page = page;
        match found {
            Looked::At(direct) => Found::Code(direct),
            Looked::Step => Found::Stepped(self.step()),
        }
    }

    /// Finds or makes the block for a key whose page is backed by memory.
    fn find_block(&mut self, key: Key, mapping: Mapping, by: By, page: &mut [u8]) -> Looked {
        let shared = self.host.shared.clone();
        let mut guard = shared.translations.lock().expect("translations");
        let t = &mut *guard;
        self.host.follow_blocks(t.blocks.generation());
        let positions = |b: &Block| (b.direct(), b.indirect(), b.second_gfn());
        let block = t.blocks.find(&key);
        if by == By::Chain && block.is_some_and(Block::is_to_be_replaced) {
            // The other one serves whoever has it.
            return self.make_block(t, key, mapping, None, by, page);
        }
        let mut found = block.map(positions);
        if found.is_none() {
            if t.blocks.lacks_room_to_copy(&key, BLOCK_ROOM) {
                shared.rendezvous(Some(self.host.id), FORGET_CODE);
                t.blocks.clear_copies(&shared.code);
                self.host.keep_needed(&mut t.blocks);
            }
            let copy = t.blocks.copy_from_other_address(&shared.code, &key);
            found = copy.map(positions);
        }
        if let Some((direct, indirect, second)) = found {
            let mut mapping = mapping;
            if let Some(gfn) = second {
                // The block is right only as long as the second page is still what it was made from.
                let next = Gva((key.pc | (PAGE_SIZE - 1)).wrapping_add(1));
                match self.code_page(next, key.mode) {
                    Some(tr) if tr.gpa.gfn() == gfn => mapping = mapping.and(Mapping::of(&tr)),
                    Some(tr) => {
                        return self.make_block(t, key, mapping, Some(tr), by, page);
                    }
                    None => return Looked::Step,
                }
            } else {
                self.host.offer_page(&t.blocks, &key, mapping);
            }
            self.host
                .add_jump(key.mode, key.pc, direct, indirect, mapping);
            if by == By::Lookup {
                t.blocks.enter(&key);
            }
            return Looked::At(direct);
        }
        let made = self.make_block(t, key, mapping, None, by, page);
        if by == By::Lookup {
            t.blocks.enter(&key);
        }
        made
    }

    /// Translation of a page that an instruction reaches into.
    fn code_page(&self, gva: Gva, mode: Mode) -> Option<exec::Translation> {
        if !canonical(gva.0) {
            return None;
        }
        let access = Access::exec(mode.has(Mode::USER));
        let memory = &self.host.shared.memory;
        let tr = exec::walk(&self.host.frame.cpu, memory, gva, access).ok()?;
        memory.is_backed(tr.gpa.gfn()).then_some(tr)
    }

    /// Marks a page as one with code, on all vCPUs, before its bytes are read.
    pub(crate) fn mark_code(&mut self, t: &mut Translations, gpa: Gpa) {
        let shared = self.host.shared.clone();
        if t.blocks.mark(&shared.pages, gpa.gfn()) {
            shared.window.protect(&shared.memory, gpa.gfn());
            self.host.drop_write_tags(gpa.gfn());
            shared.forget_writable(Some(self.host.id));
        }
    }

    fn make_block(
        &mut self,
        t: &mut Translations,
        key: Key,
        mapping: Mapping,
        second: Option<exec::Translation>,
        by: By,
        page: &mut [u8],
    ) -> Looked {
        let shared = self.host.shared.clone();
        let compact = t.blocks.is_compaction_due();
        let place = match t.blocks.place(BLOCK_ROOM).filter(|_| !compact) {
            Some(place) => place,
            None => {
                shared.rendezvous(Some(self.host.id), FORGET_CODE);
                t.blocks.clear(&shared.pages);
                self.host.keep_needed(&mut t.blocks);
                t.blocks.place(BLOCK_ROOM).expect("an empty cache has room")
            }
        };
        let n = (PAGE_SIZE - key.gpa.page_offset()) as usize;
        self.mark_code(t, key.gpa);
        if shared.memory.read(key.gpa, &mut page[..n]).is_err() {
            return Looked::Step;
        }
        let host = &self.host;
        let shows = |gva| host.with_asker(|window, asker| window.show(asker, gva));
        let sight = Sight {
            gpr: &host.frame.cpu.gpr,
            gs_base: host.frame.cpu.seg[seg::GS].base,
            shows: &shows,
            open: shared.window.is_open(),
            elsewhere: t.elsewhere.of(key.gpa.gfn()),
        };
        let request = Request {
            bytes: &page[..n],
            crossing: false,
            pc: key.pc,
            mode: key.mode,
            place,
            connected: by == By::Chain,
            sight: (key.mode.table() == KERNEL_TABLE).then_some(sight),
        };
        let made = match second {
            None => t.translator.translate(&request),
            Some(_) => None,
        };
        if let Some(made) = made {
            let b = t.blocks.insert(&shared.code, key, None, &made);
            let (direct, indirect) = (b.direct(), b.indirect());
            t.translator.reuse(made);
            self.host
                .add_jump(key.mode, key.pc, direct, indirect, mapping);
            return Looked::At(direct);
        }
        let next = Gva((key.pc | (PAGE_SIZE - 1)).wrapping_add(1));
        let Some(tr) = second.or_else(|| self.code_page(next, key.mode)) else {
            return Looked::Step;
        };
        self.mark_code(t, tr.gpa);
        let rest = &mut page[n..n + MAX_INSTRUCTION];
        if shared.memory.read(tr.gpa, rest).is_err() {
            return Looked::Step;
        }
        let request = Request {
            bytes: &page[..n + MAX_INSTRUCTION],
            crossing: true,
            pc: key.pc,
            mode: key.mode,
            place,
            connected: false,
            sight: None,
        };
        let Some(made) = t.translator.translate(&request) else {
            return Looked::Step;
        };
        let b = t.blocks.insert(&shared.code, key, Some(tr.gpa), &made);
        let (direct, indirect) = (b.direct(), b.indirect());
        let mapping = mapping.and(Mapping::of(&tr));
        self.host
            .add_jump(key.mode, key.pc, direct, indirect, mapping);
        Looked::At(direct)
    }
}
