//! A page with too many suspects for breakpoints, executed natively while no other is.
//!
//! Programs that are linked statically keep their own loops and the functions in which their C library asks CPUID in one page. An interrupt that finds the program there is the
//! sign to try: as long as no other page is executable, of the suspects that only tell something those matter which the code can come to from where it is; all others have breakpoints in any case. Whatever leads out of the page ends it. A
//! return into the middle of a function of the same page is not seen in the code; where it may lead is looked for on the stack.

use std::io;
use std::time::{Duration, Instant};

use hospes_engine::reg;
use hospes_units::{Gfn, Gpa, PAGE_SIZE};

use super::process::BREAKPOINTS;
use super::tables::look_up;
use super::{Space, guards, scan};
use crate::vcpu::BtVcpu;

/// A page that was executed alone for as long is so from then on whenever it is called; another is tried ever more rarely, for all other code has to be mapped anew behind it.
const WORTH: Duration = Duration::from_micros(300);
/// Interrupts in a row that find the program in one page before it is tried, by how many times more after each failure, and how many at most.
const TICKS: u32 = 2;
const MORE: u32 = 4;
const MOST_TICKS: u32 = 32;
/// Words of the stack that are looked at.
const STACK: u64 = 512;

/// Where interrupts have found the program.
#[derive(Debug)]
pub(super) struct Found {
    page: u64,
    ticks: u32,
}

/// The page that is executed alone.
#[derive(Debug)]
pub(super) struct Alone {
    page: u64,
    since: Instant,
    /// Where the program was when its last burst ended; `None` where another program has begun since.
    left: Option<u64>,
}

impl Space {
    /// An interrupt has found the program in a page that stays translated.
    pub(super) fn want_alone(&mut self, page: u64) {
        let ticks = match &self.found {
            Some(found) if found.page == page => found.ticks.saturating_add(1),
            _ => 1,
        };
        self.found = Some(Found { page, ticks });
    }

    fn wanted(&self, page: u64) -> bool {
        let ticks = self.poor.get(&page).copied().unwrap_or(TICKS);
        let found = self.found.as_ref();
        found.is_some_and(|f| f.page == page && f.ticks >= ticks)
    }

    fn was_poor(&mut self, page: u64) {
        let ticks = self.poor.entry(page).or_insert(TICKS);
        *ticks = (*ticks * MORE).min(MOST_TICKS);
    }

    /// Whether the page is to be executed alone when it is reached.
    pub(super) fn wants_alone(&self, page: u64) -> bool {
        let is_alone = self.alone.as_ref().is_some_and(|a| a.page == page);
        is_alone || self.wanted(page) || self.lone.contains(&page)
    }

    /// A burst has ended at an address.
    pub(super) fn leave_alone(&mut self, rip: u64) {
        if let Some(alone) = &mut self.alone {
            alone.left = Some(rip);
        }
    }

    /// Another program begins in this address space: what the last one has come to says nothing about it.
    pub(super) fn begin_program(&mut self) {
        self.retired.clear();
        self.lone.clear();
        self.poor.clear();
        self.found = None;
        if let Some(alone) = &mut self.alone {
            alone.left = None;
        }
    }

    /// Nothing is executed alone any more, for everything has been unmapped.
    pub(super) fn forget_alone(&mut self) {
        self.alone = None;
        self.found = None;
    }
}

impl BtVcpu {
    /// Makes a page the only one that is executable; false where it cannot be. The instruction at `rip` is in it.
    pub(super) fn begin_alone(
        &mut self,
        space: &mut Space,
        page: u64,
        gfn: Gfn,
        rip: u64,
    ) -> io::Result<bool> {
        if !space.wants_alone(page) || rip >> 12 != page {
            return Ok(false);
        }
        space.found = None;
        let mut bytes = [0; PAGE_SIZE as usize];
        if self.host.shared.memory.read(gfn.gpa(), &mut bytes).is_err() {
            return Ok(false);
        }
        let mut ways = self.returns(page, &bytes);
        ways.push((rip & (PAGE_SIZE - 1)) as u16);
        let found = guards::reachable(&bytes, &scan::suspects(&bytes), ways);
        if found.len() > BREAKPOINTS {
            space.was_poor(page);
            return Ok(false);
        }
        let calls = space.mirror.take_out_code();
        space.process.queue(calls);
        space.breakpoints = found.iter().map(|&o| page << 12 | u64::from(o)).collect();
        space.process.set_breakpoints(&space.breakpoints)?;
        space.alone = Some(Alone {
            page,
            since: Instant::now(),
            left: Some(rip),
        });
        Ok(true)
    }

    /// A burst begins. What can be reached is known from where the last one ended, and from nowhere else.
    pub(super) fn resume_alone(&mut self, space: &mut Space, rip: u64) -> io::Result<()> {
        let moved = |a: &mut Alone| a.page == rip >> 12 && a.left != Some(rip);
        let Some(alone) = space.alone.take_if(moved) else {
            return Ok(());
        };
        space.found = alone.left.map(|_| Found {
            page: alone.page,
            ticks: u32::MAX,
        });
        self.drop_code(space, alone.page)
    }

    /// Code of another page is about to be executed.
    pub(super) fn end_alone(&mut self, space: &mut Space, next: u64) -> io::Result<()> {
        let Some(alone) = space.alone.take_if(|a| a.page != next) else {
            return Ok(());
        };
        if alone.left.is_some() {
            if alone.since.elapsed() >= WORTH {
                space.lone.insert(alone.page);
            } else {
                space.lone.remove(&alone.page);
                space.was_poor(alone.page);
            }
        }
        self.drop_code(space, alone.page)
    }

    /// Offsets in the page that stand behind calls, or may do so, and of which the stack has the addresses.
    fn returns(&self, page: u64, bytes: &[u8]) -> Vec<u16> {
        let cpu = &self.host.frame.cpu;
        let memory = &self.host.shared.memory;
        let first = cpu.gpr[reg::RSP] & !7;
        let words = (0..STACK).filter_map(|n| {
            let at = first.wrapping_add(8 * n);
            let m = look_up(memory, cpu.cr3, at >> 12)?;
            let gpa = Gpa(m.gfn.gpa().0 + (at & (PAGE_SIZE - 1)));
            memory.read_obj::<u64>(gpa).ok()
        });
        words
            .filter(|w| w >> 12 == page)
            .map(|w| (w & (PAGE_SIZE - 1)) as u16)
            .filter(|&offset| behind_call(bytes, offset.into()))
            .collect()
    }
}

/// Whether the bytes before an offset can be those of a call; where they lie in the page before they can.
fn behind_call(page: &[u8], offset: usize) -> bool {
    const CALL_NEAR: u8 = 0xe8;
    const GROUP_5: u8 = 0xff;
    /// Lengths of calls by register or memory, from their opcode on.
    const INDIRECT: [usize; 5] = [2, 3, 4, 6, 7];
    let before = |n: usize| offset.checked_sub(n).map(|at| page[at]);
    let indirect = |n: usize| match (before(n), before(n - 1)) {
        (Some(GROUP_5), Some(modrm)) => modrm >> 3 & 7 == 2,
        (None, _) => true,
        _ => false,
    };
    matches!(before(5), None | Some(CALL_NEAR)) || INDIRECT.into_iter().any(indirect)
}

#[cfg(test)]
mod tests {
    use iced_x86::IcedError;
    use iced_x86::code_asm::*;

    use super::*;

    #[test]
    fn return_addresses_stand_behind_calls() {
        let mut a = CodeAssembler::new(64).unwrap();
        type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;
        let calls: [Write; 6] = [
            |a| a.call(0x1234u64),
            |a| a.call(rax),
            |a| a.call(r12),
            |a| a.call(qword_ptr(rax + 8)),
            |a| a.call(qword_ptr(r12 + 8 * rbx + 0x1000)),
            // By an address relative to RIP.
            |a| a.db(&[0xff, 0x15, 0, 0x10, 0, 0]),
        ];
        for call in calls {
            a.reset();
            a.nops_with_size(64).unwrap();
            call(&mut a).unwrap();
            let code = a.assemble(0).unwrap();
            assert!(behind_call(&code, code.len()), "{code:x?}");
            assert!(!behind_call(&code, 60));
        }
        // Of a call that begins in the page before nothing is seen.
        assert!(behind_call(&[0x90; 16], 3));
    }
}
