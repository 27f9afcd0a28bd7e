//! What translated code leaves for and soon comes back from: an access that missed the TLB or the kernel window, a jump that is not connected yet.

use hospes_engine::Exit;
use hospes_translate::Mode;
use hospes_translate::layout::{
    MISS_ANY_WRITE, MISS_GROUP, MISS_MASKED, MISS_SIZE, MISS_WRITE, tlb_index,
};
use hospes_units::{Gva, PAGE_SIZE};

use crate::chains::Chain;
use crate::exec::{self, Access, Exception, Step, debug_active};
use crate::frame::LastMiss;
use crate::kernel_window::Verdict;
use crate::lookup::By;
use crate::vcpu::{BtVcpu, Found, canonical};

impl BtVcpu {
    pub(crate) fn chain(&mut self, site: u32) -> Option<Exit> {
        let shared = self.host.shared.clone();
        let guard = shared.translations.lock().expect("translations");
        let present = guard.blocks.generation() == self.host.blocks_generation;
        let found = guard.blocks.chain(site).filter(|_| present);
        drop(guard);
        let Some(Chain {
            target,
            mode,
            gfn,
            exit,
        }) = found
        else {
            return self.lost_chain(site);
        };
        self.host.frame.cpu.rip = target;
        if exit.is_some() {
            self.host.follow_tables();
        }
        let generation = self.host.generation;
        if self.mode() != Some(Mode(mode.0 & !Mode::SINGLE)) {
            return None;
        }
        match self.find_code(mode, By::Chain) {
            Found::Code(direct) => {
                let mut guard = shared.translations.lock().expect("translations");
                // Nobody else may have emptied the cache between the two locks: the target may come from the jump cache.
                let present = guard.blocks.generation() == self.host.blocks_generation;
                let source_ok = guard.blocks.at(site).is_some_and(|b| b.alive);
                let block = guard.blocks.at(direct).filter(|b| b.alive).copied();
                let Some(block) = block else {
                    self.host.jumps.forget(&mut self.host.frame, target);
                    return None;
                };
                if present && source_ok && generation == self.host.generation {
                    match exit {
                        Some(exit) => self.link(&mut guard, site, exit, &block),
                        None if block.key.gpa.gfn() == gfn && block.second_gfn().is_none() => {
                            guard.blocks.connect(&shared.code, site, direct);
                        }
                        None => {}
                    }
                }
                if mode.has(Mode::SINGLE) {
                    self.host.resume_at = Some(direct);
                }
                None
            }
            Found::Stepped(step) => self.after(|_| step),
        }
    }

    /// A jump of a dropped block was taken: its target is where the side table says the jump instruction is, executed once more by the engine.
    fn lost_chain(&mut self, site: u32) -> Option<Exit> {
        self.locate(site, None);
        None
    }

    pub(crate) fn missed_access(&mut self) -> Option<Exit> {
        let frame = &self.host.frame;
        let (ea, info, site) = (frame.exit_ea, frame.exit_info, frame.exit_arg);
        let (size, write) = (u64::from(info & MISS_SIZE), info & MISS_WRITE != 0);
        let group = info & MISS_GROUP != 0;
        let user = frame.cpu.cpl() == 3;
        let masked = info & MISS_MASKED != 0;
        let in_page = (ea & (PAGE_SIZE - 1)) + size <= PAGE_SIZE;
        // Two operands of one instruction that need the same TLB entry would evict each other for ever.
        let miss = LastMiss {
            site,
            page: Gva(ea).page().0,
        };
        let last = std::mem::replace(&mut self.host.frame.last_miss, miss);
        let conflict =
            site == last.site && miss.page != last.page && tlb_index(ea) == tlb_index(last.page);
        if in_page && canonical(ea) && !conflict {
            // With a mask perhaps nothing is written, and then the page must not become dirty.
            let access = if write && !masked {
                Access::write(user)
            } else {
                Access::read(user)
            };
            match self.host.fill(Gva(ea), access) {
                Ok(true)
                    if !group && !masked
                        || self.host.cached(
                            ea,
                            user,
                            masked && write || info & MISS_ANY_WRITE != 0,
                        ) =>
                {
                    self.host.resume_at = Some(site);
                    return None;
                }
                Ok(_) => {}
                // Which access of the group faults, and with what done before, shows when they are made one by one.
                Err(_) if group => {}
                // Perhaps the mask leaves out what is missing.
                Err(_) if masked => {}
                // An operand that must be aligned faults for that before its page does; the instruction semantics know which must.
                Err(_) if size >= 16 && ea % size != 0 => {}
                Err(fault) => {
                    self.locate(site, None);
                    return self.after(|s| s.raise(Exception::page(ea, fault)));
                }
            }
        }
        self.locate(site, None);
        if group {
            let chain = self.host.frame.exit_chain;
            return self.chain(chain);
        }
        let generation = self.host.generation;
        let before = self.host.dropped_blocks;
        let mode = self.mode();
        let step = self.step();
        if step == Step::Continue
            && mode == self.mode()
            && !debug_active(&self.host.frame.cpu)
            && before == self.host.dropped_blocks
            && generation == self.host.generation
        {
            // Go on inside the same block if that is where the next instruction is.
            let rip = self.host.frame.cpu.rip;
            let guard = self.host.shared.translations.lock().expect("translations");
            let present = guard.blocks.generation() == self.host.blocks_generation;
            let next = guard.blocks.reentry(site, rip).filter(|_| present);
            drop(guard);
            self.host.resume_at = next;
        }
        self.after(|_| step)
    }

    /// Sees to an access of the kernel's at `pos` that may have faulted in the window. False where it is to be made again.
    pub(crate) fn explain_fault(&mut self, pos: u32) -> bool {
        // Other faults than those of pages are none of the window's.
        let page_fault = self.host.frame.raw_trap == i32::from(exec::vector::PF);
        if self.host.frame.cpu.cpl() != 0 || !page_fault {
            return true;
        }
        let address = self.host.frame.raw_address;
        let verdict = self
            .host
            .with_asker(|window, asker| window.faulted(asker, address));
        match verdict {
            Verdict::Again => {
                let rip = self.host.frame.cpu.rip;
                let guard = self.host.shared.translations.lock().expect("translations");
                let present = guard.blocks.generation() == self.host.blocks_generation;
                self.host.resume_at = guard.blocks.reentry(pos, rip).filter(|_| present);
                return false;
            }
            Verdict::Step => {}
            Verdict::Elsewhere | Verdict::Closed => {
                let rip = Gva(self.host.frame.cpu.rip);
                let shared = self.host.shared.clone();
                let walked = exec::walk(
                    &self.host.frame.cpu,
                    &shared.memory,
                    rip,
                    Access::exec(false),
                );
                if let Ok(code) = walked {
                    let mut guard = shared.translations.lock().expect("translations");
                    if verdict == Verdict::Elsewhere {
                        guard.elsewhere.add(code.gpa);
                    }
                    shared.invalidate(&mut guard, code.gpa, 1, Some(self.host.id));
                }
            }
        }
        true
    }
}
