//! Breakpoints, watchpoints and single stepping.
//!
//! Source: Intel SDM volume 3, chapter 19. Breakpoints that are not enabled do not show in DR6. Watchpoints see accesses made through the
//! semantics; so the engine sends every instruction through them while [`debug_active`] holds. A watchpoint hit by MOV SS or POP SS is
//! reported behind that instruction.

use hospes_engine::{CpuState, cr, rflags, seg};

use super::cx::{Cx, Exec};
use super::host::{Exception, Host, vector};

/// DR6 and DR7 after reset.
pub const DR6_RESET: u64 = 0xffff_0ff0;
pub const DR7_RESET: u64 = 0x400;

pub(super) const DR6_BD: u64 = 1 << 13;
pub(super) const DR6_BS: u64 = 1 << 14;
const DR6_WRITABLE: u64 = 0xe00f;
const DR7_GD: u64 = 1 << 13;
const DR7_WRITABLE: u64 = 0xffff_2bff;
const DR7_ENABLES: u64 = 0xff;

const ON_EXEC: u64 = 0;
const ON_WRITE: u64 = 1;
const ON_IO: u64 = 2;

/// Whether instructions may raise debug exceptions, so that each must go through `step`.
#[inline]
pub fn debug_active(cpu: &CpuState) -> bool {
    cpu.rflags & rflags::TF != 0 || cpu.dr[7] & DR7_ENABLES != 0
}

/// Enabled breakpoints that an access of `kind` to `len` bytes at `addr` hits, as in DR6 bits 3:0.
fn hits(cpu: &CpuState, addr: u64, len: u64, matches: impl Fn(u64) -> bool) -> u64 {
    let dr7 = cpu.dr[7];
    let mut found = 0;
    for n in 0..4 {
        if dr7 >> (2 * n) & 3 == 0 || !matches(dr7 >> (16 + 4 * n) & 3) {
            continue;
        }
        let size = match dr7 >> (18 + 4 * n) & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        let start = cpu.dr[n] & !(size - 1);
        if addr <= start.wrapping_add(size - 1) && start <= addr.wrapping_add(len - 1) {
            found |= 1 << n;
        }
    }
    found
}

impl<H: Host> Cx<'_, H> {
    /// Notes data breakpoints that this access hits.
    #[inline]
    pub fn watch(&mut self, lin: u64, len: usize, write: bool) {
        if self.cpu.dr[7] & DR7_ENABLES != 0 {
            self.watch_hits |= hits(self.cpu, lin, len as u64, |kind| match kind {
                ON_WRITE => write,
                ON_EXEC | ON_IO => false,
                _ => true,
            });
        }
    }

    /// Notes I/O breakpoints.
    pub fn watch_port(&mut self, port: u16, size: usize) {
        if self.cpu.dr[7] & DR7_ENABLES != 0 && self.cpu.cr4 & cr::CR4_DE != 0 {
            self.watch_hits |= hits(self.cpu, u64::from(port), size as u64, |kind| kind == ON_IO);
        }
    }

    /// The fault of an instruction breakpoint at the current RIP.
    pub fn instruction_breakpoint(&mut self) -> Exec<()> {
        if self.cpu.dr[7] & DR7_ENABLES == 0 || self.cpu.rflags & rflags::RF != 0 {
            return Ok(());
        }
        let base = if self.code64() {
            0
        } else {
            self.cpu.seg[seg::CS].base
        };
        let found = hits(self.cpu, base.wrapping_add(self.cpu.rip), 1, |k| {
            k == ON_EXEC
        });
        if found == 0 {
            return Ok(());
        }
        Err(self.debug_exception(found))
    }

    /// Records the causes in DR6 and gives the exception to deliver.
    pub fn debug_exception(&mut self, causes: u64) -> Exception {
        self.cpu.dr[6] |= causes;
        self.cpu.dr[7] &= !DR7_GD;
        Exception::plain(vector::DB)
    }

    fn check_dr(&mut self, n: usize) -> Exec<usize> {
        let n = match n {
            4 | 5 if self.cpu.cr4 & cr::CR4_DE != 0 => return Err(Exception::ud()),
            4 | 5 => n + 2,
            0..=7 => n,
            _ => return Err(Exception::ud()),
        };
        self.need_cpl0()?;
        if self.cpu.dr[7] & DR7_GD != 0 {
            return Err(self.debug_exception(DR6_BD));
        }
        Ok(n)
    }

    pub fn read_dr(&mut self, n: usize) -> Exec<u64> {
        let n = self.check_dr(n)?;
        Ok(self.cpu.dr[n])
    }

    pub fn write_dr(&mut self, n: usize, v: u64) -> Exec<()> {
        let n = self.check_dr(n)?;
        if n >= 6 && v >> 32 != 0 {
            return Err(Exception::gp(0));
        }
        self.cpu.dr[n] = match n {
            6 => v & DR6_WRITABLE | DR6_RESET,
            7 => v & DR7_WRITABLE | DR7_RESET,
            _ => v,
        };
        Ok(())
    }
}
