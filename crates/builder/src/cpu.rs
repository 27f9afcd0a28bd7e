//! The state in which virtual CPUs start.

use hospes_engine::{Activity, CpuState, DescTable, LapicState, Msrs, Segment, cr, rflags, seg};
use hospes_units::{Gpa, VcpuId};

use crate::acpi::apic_id;

/// IA32_APIC_BASE: default address, x2APIC mode, enabled.
const APIC_BASE: u64 = 0xfee0_0c00;
/// IA32_APIC_BASE: this is the boot processor.
const APIC_BASE_BSP: u64 = 1 << 8;
/// Default memory type write-back, MTRRs enabled.
const MTRR_DEF_TYPE: u64 = 0x806;
/// The page attribute table after a reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Fast strings on (Linux otherwise drops ERMS), branch trace store and precise event sampling unavailable.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;
const DR6_RESET: u64 = 0xffff_0ff0;
const DR7_RESET: u64 = 0x400;

fn common(vcpu: VcpuId, apic_base: u64) -> CpuState {
    let id = apic_id(vcpu.0);
    let mut state = CpuState {
        rflags: rflags::FIXED,
        xcr0: 1,
        msr: Msrs {
            pat: PAT_RESET,
            misc_enable: MISC_ENABLE,
            apic_base,
            mtrr_def_type: MTRR_DEF_TYPE,
            ..Msrs::default()
        },
        lapic: LapicState {
            id,
            // In x2APIC mode the logical id follows from the id: cluster in the upper half, one bit in the lower.
            ldr: (id >> 4) << 16 | 1 << (id & 15),
            ..LapicState::default()
        },
        ..CpuState::default()
    };
    state.dr[6] = DR6_RESET;
    state.dr[7] = DR7_RESET;
    state
}

/// vCPU 0 at the PVH entry point: 32-bit protected mode, flat segments, paging off, EBX = start information.
pub fn bsp_cpu_state(entry: u32, start_info: Gpa) -> CpuState {
    const ACCESSED_DATA: u16 = 0x93;
    const ACCESSED_CODE: u16 = 0x9b;
    const BUSY_TSS: u16 = 0x8b;
    let flat = |access: u16| Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0,
        attr: access | Segment::ATTR_DB | Segment::ATTR_G,
    };
    let mut state = common(VcpuId(0), APIC_BASE | APIC_BASE_BSP);
    state.rip = u64::from(entry);
    state.gpr[hospes_engine::reg::RBX] = start_info.0;
    state.cr0 = cr::CR0_PE | cr::CR0_ET;
    state.seg = [flat(ACCESSED_DATA); 6];
    state.seg[seg::CS] = flat(ACCESSED_CODE);
    state.tr = Segment {
        base: 0,
        limit: 0x67,
        selector: 0,
        attr: BUSY_TSS,
    };
    state.activity = Activity::Running;
    state
}

/// Any further vCPU: as after an INIT, waiting for its start-up IPI.
pub fn ap_cpu_state(vcpu: VcpuId) -> CpuState {
    const LIMIT: u32 = 0xffff;
    let segment = |attr: u16| Segment {
        base: 0,
        limit: LIMIT,
        selector: 0,
        attr,
    };
    let mut state = common(vcpu, APIC_BASE);
    state.cr0 = cr::CR0_ET;
    state.rip = 0xfff0;
    state.seg = [segment(0x93); 6];
    state.seg[seg::CS] = Segment {
        base: 0xffff_0000,
        limit: LIMIT,
        selector: 0xf000,
        attr: 0x9b,
    };
    state.ldtr = segment(0x82);
    state.tr = segment(0x8b);
    let table = DescTable {
        base: 0,
        limit: LIMIT as u16,
    };
    state.gdtr = table;
    state.idtr = table;
    state.activity = Activity::WaitForSipi;
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bsp_cpu_state_is_the_pvh_entry_state() {
        let s = bsp_cpu_state(0x100_0850, Gpa(0x8_0000));
        assert_eq!(s.rip, 0x100_0850);
        assert_eq!(s.gpr[hospes_engine::reg::RBX], 0x8_0000);
        assert_eq!((s.cr0, s.cr4, s.msr.efer, s.rflags), (0x11, 0, 0, 2));
        assert_eq!((s.dr[6], s.dr[7]), (0xffff_0ff0, 0x400));
        assert_eq!(s.seg[seg::CS].attr, 0xc09b);
        for i in [seg::DS, seg::ES, seg::SS] {
            assert_eq!(
                (s.seg[i].attr, s.seg[i].limit, s.seg[i].base),
                (0xc093, u32::MAX, 0)
            );
        }
        assert_eq!((s.tr.attr, s.tr.limit), (0x8b, 0x67));
        assert_eq!(s.ldtr.attr & Segment::ATTR_PRESENT, 0);
        assert_eq!((s.code_bits(), s.cpl()), (32, 0));
        assert_eq!(s.msr.apic_base, 0xfee0_0d00);
        assert_eq!(s.msr.mtrr_def_type, 0x806);
        assert_eq!(s.msr.pat, 0x0007_0406_0007_0406);
        assert_eq!(s.xcr0, 1);
        assert_eq!(s.activity, Activity::Running);
    }

    #[test]
    fn ap_cpu_state_waits_in_real_mode_with_its_own_apic_id() {
        let s = ap_cpu_state(VcpuId(9));
        assert_eq!(s.activity, Activity::WaitForSipi);
        assert_eq!((s.cr0, s.msr.efer, s.cr4), (0x10, 0, 0));
        assert_eq!(s.code_bits(), 16);
        assert_eq!(s.lapic.id, 18);
        assert_eq!(s.lapic.ldr, 1 << 16 | 1 << 2);
        assert_eq!(s.msr.apic_base, 0xfee0_0c00);
        assert_eq!(s.msr.mtrr_def_type, 0x806);
    }
}
