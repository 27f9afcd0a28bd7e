//! Which segments 32-bit code may be translated with: those that need no checks.

use hospes_engine::{CpuState, Segment, seg};

/// Whether 32-bit code sees one flat address space.
pub fn flat(cpu: &CpuState) -> bool {
    let (cs, ss) = (&cpu.seg[seg::CS], &cpu.seg[seg::SS]);
    let data = [seg::DS, seg::ES, seg::SS];
    data.iter()
        .all(|&s| cpu.seg[s].base == 0 && whole_data(&cpu.seg[s]))
        && (cs.base, cs.limit) == (0, u32::MAX)
        && cs.attr & Segment::ATTR_PRESENT != 0
        && ss.attr & Segment::ATTR_DB != 0
}

/// Whether a segment lets data be read and written everywhere.
pub fn whole_data(s: &Segment) -> bool {
    // Of the type only "data, upwards, writable", accessed or not.
    s.attr & Segment::ATTR_PRESENT != 0 && s.attr & 0xe == 2 && s.limit == u32::MAX
}
