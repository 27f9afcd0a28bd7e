//! The page walk: linear to guest physical addresses through the guest's own tables.
//!
//! Sources: Intel SDM volume 3, chapter 5; AMD APM volume 2, chapter 5. Five-level paging, protection keys and shadow stacks are not
//! offered to guests. Table pages outside guest memory count as not present.
//!
//! Invariant: A and D bits are set by compare-and-exchange on the very value that the translation was computed from, so a table that
//! another vCPU changes meanwhile is walked again.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hospes_engine::{CpuState, cr, rflags};
use hospes_memory::GuestMemory;
use hospes_units::{Gfn, Gpa, Gva};

/// Width of guest physical addresses in bits; CPUID leaf 0x80000008 must report this number.
pub const PHYS_BITS: u32 = 46;

/// Bits of a page-fault error code.
pub mod pf {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

pub(crate) const P: u64 = 1 << 0;
pub(crate) const RW: u64 = 1 << 1;
pub(crate) const US: u64 = 1 << 2;
pub(crate) const A: u64 = 1 << 5;
pub(crate) const D: u64 = 1 << 6;
pub(crate) const PS: u64 = 1 << 7;
pub(crate) const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;
pub(crate) const ADDR: u64 = ((1 << PHYS_BITS) - 1) & !0xfff;
/// Address bits that the guest's physical addresses do not have.
pub(crate) const RSVD_ADDR: u64 = ((1 << 52) - 1) & !((1 << PHYS_BITS) - 1);
/// Reserved bits of a page-directory-pointer entry of 32-bit PAE paging.
pub(super) const RSVD_PAE_PDPTE: u64 = 0x1e6 | !((1u64 << PHYS_BITS) - 1);

/// The kind of a memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub write: bool,
    pub exec: bool,
    /// Made at CPL 3.
    pub user: bool,
    /// Made by the processor for itself (descriptor tables, TSS): a supervisor access that SMAP forbids whatever AC says.
    pub implicit: bool,
}

impl Access {
    pub const fn read(user: bool) -> Access {
        Access {
            write: false,
            exec: false,
            user,
            implicit: false,
        }
    }

    pub const fn write(user: bool) -> Access {
        Access {
            write: true,
            ..Access::read(user)
        }
    }

    pub const fn exec(user: bool) -> Access {
        Access {
            exec: true,
            ..Access::read(user)
        }
    }

    pub const SYSTEM_READ: Access = Access {
        write: false,
        exec: false,
        user: false,
        implicit: true,
    };

    pub const SYSTEM_WRITE: Access = Access {
        write: true,
        exec: false,
        user: false,
        implicit: true,
    };
}

/// A successful walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    pub gpa: Gpa,
    /// log2 of the page size: 12, 21, 22 or 30.
    pub page_bits: u8,
    /// R/W of all levels; CR0.WP is not considered.
    pub writable: bool,
    /// U/S of all levels.
    pub user: bool,
    /// The entry survives address-space switches.
    pub global: bool,
    /// D of the last level, after this walk.
    pub dirty: bool,
    /// No level allows instruction fetches.
    pub nx: bool,
}

/// A failed walk: the error code of the page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    pub error_code: u32,
}

/// Translates `gva` for one access, sets accessed and dirty bits. The address must be canonical.
#[inline]
pub fn walk(
    cpu: &CpuState,
    mem: &GuestMemory,
    gva: Gva,
    access: Access,
) -> Result<Translation, PageFault> {
    if cpu.cr0 & cr::CR0_PG == 0 {
        return Ok(Translation {
            gpa: Gpa(gva.0 & 0xffff_ffff),
            page_bits: 12,
            writable: true,
            user: true,
            global: false,
            dirty: true,
            nx: false,
        });
    }
    let w = Walk { cpu, mem, access };
    loop {
        let tried = if cpu.cr4 & cr::CR4_PAE == 0 {
            w.two_level(gva.0 as u32)
        } else if cpu.msr.efer & cr::EFER_LMA == 0 {
            w.pae(gva.0 as u32)
        } else {
            w.levels(gva.0, 4, cpu.cr3 & ADDR, 0)
        };
        match tried {
            Ok(t) => return Ok(t),
            Err(Stop::Fault(f)) => return Err(f),
            Err(Stop::Changed) => {}
        }
    }
}

enum Stop {
    Fault(PageFault),
    /// A table entry changed between reading it and setting its A or D bit.
    Changed,
}

struct Walk<'a> {
    cpu: &'a CpuState,
    mem: &'a GuestMemory,
    access: Access,
}

impl Walk<'_> {
    #[cold]
    fn fault(&self, bits: u32) -> Stop {
        let a = self.access;
        let nx_on = self.cpu.cr4 & cr::CR4_PAE != 0 && self.cpu.msr.efer & cr::EFER_NXE != 0;
        let mut error_code = bits;
        if a.write {
            error_code |= pf::WRITE;
        }
        if a.user {
            error_code |= pf::USER;
        }
        if a.exec && (nx_on || self.cpu.cr4 & cr::CR4_SMEP != 0) {
            error_code |= pf::FETCH;
        }
        Stop::Fault(PageFault { error_code })
    }

    /// The permission check, on the combined rights of all levels.
    #[inline]
    fn permitted(&self, writable: bool, user: bool, nx: bool) -> bool {
        let (a, cpu) = (self.access, self.cpu);
        if a.exec && (nx || (!a.user && user && cpu.cr4 & cr::CR4_SMEP != 0)) {
            return false;
        }
        if a.user {
            return user && (writable || !a.write);
        }
        if !a.exec
            && user
            && cpu.cr4 & cr::CR4_SMAP != 0
            && (a.implicit || cpu.rflags & rflags::AC == 0)
        {
            return false;
        }
        writable || !a.write || cpu.cr0 & cr::CR0_WP == 0
    }

    /// Tables of 512 entries of 8 bytes, from `level` down. `reserved` adds to the bits that must be zero.
    #[inline]
    fn levels(&self, gva: u64, level: u32, root: u64, reserved: u64) -> Result<Translation, Stop> {
        let nxe = self.cpu.msr.efer & cr::EFER_NXE != 0;
        let reserved = reserved | RSVD_ADDR | if nxe { 0 } else { XD };
        let mut seen: [(*const AtomicU64, u64); 4] = [(std::ptr::null(), 0); 4];
        let mut depth = 0;
        let mut table = root;
        let mut level = level;
        let (mut all, mut any) = (RW | US, 0u64);
        loop {
            let shift = 12 + 9 * (level - 1);
            let slot = self.entry(table, ((gva >> shift) & 0x1ff) * 8, 8)?.cast();
            // SAFETY: `entry` gives an address in backed guest memory, aligned as the index is a multiple of 8.
            let e = unsafe { &*slot as &AtomicU64 }.load(Ordering::Relaxed);
            if e & P == 0 {
                return Err(self.fault(0));
            }
            let large = e & PS != 0 && level > 1;
            let bad = reserved
                | match level {
                    4 => PS,
                    2 | 3 if large => ((1 << shift) - 1) & !0x1fff,
                    _ => 0,
                };
            if e & bad != 0 {
                return Err(self.fault(pf::PRESENT | pf::RESERVED));
            }
            seen[depth] = (slot, e);
            depth += 1;
            all &= e;
            any |= e;
            if large || level == 1 {
                let (writable, user, nx) = (all & RW != 0, all & US != 0, any & XD != 0);
                if !self.permitted(writable, user, nx) {
                    return Err(self.fault(pf::PRESENT));
                }
                for (i, &(slot, e)) in seen[..depth].iter().enumerate() {
                    let dirty = self.access.write && i + 1 == depth;
                    let new = e | A | if dirty { D } else { 0 };
                    if new == e {
                        continue;
                    }
                    // SAFETY: as above; the address was valid a moment ago and guest memory is never unmapped.
                    let slot = unsafe { &*slot };
                    if slot
                        .compare_exchange(e, new, Ordering::AcqRel, Ordering::Relaxed)
                        .is_err()
                    {
                        return Err(Stop::Changed);
                    }
                    self.note(slot.as_ptr().cast());
                }
                let offset = gva & ((1 << shift) - 1);
                return Ok(Translation {
                    gpa: Gpa((e & ADDR & !((1 << shift) - 1)) | offset),
                    page_bits: shift as u8,
                    writable,
                    user,
                    global: e & G != 0 && self.cpu.cr4 & cr::CR4_PGE != 0,
                    dirty: e & D != 0 || self.access.write,
                    nx,
                });
            }
            table = e & ADDR;
            level -= 1;
        }
    }

    fn pae(&self, gva: u32) -> Result<Translation, Stop> {
        let root = self.cpu.cr3 & 0xffff_ffe0;
        let slot = self.entry(root & !0xfff, (root & 0xfff) + u64::from(gva >> 30) * 8, 8)?;
        // SAFETY: `entry` gives an address in backed guest memory; root and index are multiples of 8.
        let e = unsafe { &*slot.cast::<AtomicU64>() }.load(Ordering::Relaxed);
        if e & P == 0 {
            return Err(self.fault(0));
        }
        if e & RSVD_PAE_PDPTE != 0 {
            return Err(self.fault(pf::PRESENT | pf::RESERVED));
        }
        let high = !XD & !((1u64 << 52) - 1);
        self.levels(u64::from(gva), 2, e & ADDR, high)
    }

    fn two_level(&self, gva: u32) -> Result<Translation, Stop> {
        let pse = self.cpu.cr4 & cr::CR4_PSE != 0;
        let pd = self
            .entry(self.cpu.cr3 & 0xffff_f000, u64::from(gva >> 22) * 4, 4)?
            .cast::<AtomicU32>();
        // SAFETY: `entry` gives an address in backed guest memory, aligned as the index is a multiple of 4.
        let pde = unsafe { &*pd }.load(Ordering::Relaxed);
        if u64::from(pde) & P == 0 {
            return Err(self.fault(0));
        }
        if pse && u64::from(pde) & PS != 0 {
            if pde & (1 << 21) != 0 {
                return Err(self.fault(pf::PRESENT | pf::RESERVED));
            }
            let frame = u64::from(pde & 0xffc0_0000) | (u64::from(pde >> 13 & 0xff) << 32);
            return self.finish32(gva, frame, 22, &[(pd, pde)], pde);
        }
        let pt = self
            .entry(u64::from(pde & !0xfff), u64::from(gva >> 12 & 0x3ff) * 4, 4)?
            .cast::<AtomicU32>();
        // SAFETY: as above.
        let pte = unsafe { &*pt }.load(Ordering::Relaxed);
        if u64::from(pte) & P == 0 {
            return Err(self.fault(0));
        }
        let frame = u64::from(pte & !0xfff);
        self.finish32(gva, frame, 12, &[(pd, pde), (pt, pte)], pde & pte)
    }

    fn finish32(
        &self,
        gva: u32,
        frame: u64,
        page_bits: u8,
        seen: &[(*const AtomicU32, u32)],
        all: u32,
    ) -> Result<Translation, Stop> {
        let (writable, user) = (u64::from(all) & RW != 0, u64::from(all) & US != 0);
        if !self.permitted(writable, user, false) {
            return Err(self.fault(pf::PRESENT));
        }
        let last = seen.len() - 1;
        for (i, &(slot, e)) in seen.iter().enumerate() {
            let dirty = self.access.write && i == last;
            let new = e | A as u32 | if dirty { D as u32 } else { 0 };
            if new == e {
                continue;
            }
            // SAFETY: the slot was read a moment ago and guest memory is never unmapped.
            let slot = unsafe { &*slot };
            if slot
                .compare_exchange(e, new, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                return Err(Stop::Changed);
            }
            self.note(slot.as_ptr().cast());
        }
        let leaf = u64::from(seen[last].1);
        Ok(Translation {
            gpa: Gpa(frame | u64::from(gva) & ((1 << page_bits) - 1)),
            page_bits,
            writable,
            user,
            global: leaf & G != 0 && self.cpu.cr4 & cr::CR4_PGE != 0,
            dirty: leaf & D != 0 || self.access.write,
            nx: false,
        })
    }

    /// Notes an entry that was changed. The atomic operation that did so stands for a fence.
    fn note(&self, entry: *const u8) {
        let gpa = entry as u64 - self.mem.host_base() as u64;
        self.mem.log().note(Gpa(gpa), 1);
    }

    /// Host address of a table entry; not present where no memory is.
    #[inline]
    fn entry(&self, table: u64, offset: u64, size: u64) -> Result<*const u8, Stop> {
        debug_assert!(offset.is_multiple_of(size));
        match self.mem.page(Gfn(table >> 12)) {
            // SAFETY: the offset stays inside the backed page: tables are page aligned, a PAE root is 32-byte aligned.
            Some(page) => Ok(unsafe { page.add(offset as usize) }),
            None => Err(self.fault(0)),
        }
    }
}
