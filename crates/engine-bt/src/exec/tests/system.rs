//! System instructions, MSRs and the XSAVE family.

use hospes_engine::cr;
use iced_x86::code_asm::*;

use super::*;

fn wrmsr(m: &mut Machine, index: u32, v: u64) -> Step {
    m.cpu.rip = CODE;
    m.cpu.gpr[reg::RSP] = KERNEL_STACK;
    m.cpu.gpr[reg::RCX] = index.into();
    m.cpu.gpr[reg::RAX] = v & 0xffff_ffff;
    m.cpu.gpr[reg::RDX] = v >> 32;
    m.raw(&[0x0f, 0x30]);
    m.step()
}

fn rdmsr(m: &mut Machine, index: u32) -> Option<u64> {
    m.cpu.rip = CODE;
    m.cpu.gpr[reg::RSP] = KERNEL_STACK;
    m.cpu.gpr[reg::RCX] = index.into();
    m.raw(&[0x0f, 0x32]);
    m.ok();
    (m.cpu.rip == CODE + 2).then_some(m.cpu.gpr[reg::RAX] | m.cpu.gpr[reg::RDX] << 32)
}

#[test]
fn msr_values_are_checked_and_read_back() {
    let good = [
        (0x277, 0x0007_0406_0007_0406),
        (0xc000_0102, 0xffff_8880_0000_0000),
        (0xc000_0082, 0xffff_ffff_8160_0000),
        (0x2ff, 0xc06),
        (0x250, 0x0606_0606_0606_0606),
        (0x174, 0x10),
        (0x48, 1),
        (0xc000_0103, 3),
        (0x140, 0),
    ];
    let mut m = Machine::long();
    for (index, v) in good {
        assert_eq!(wrmsr(&mut m, index, v), Step::Continue);
        assert_eq!(rdmsr(&mut m, index), Some(v), "{index:#x}");
    }
    let bad = [
        (0x277, 2),
        (0xc000_0100, 1 << 47),
        (0xc000_0082, 1 << 60),
        (0xc000_0080, 1 << 12),
        (0xc000_0103, 1 << 32),
        (0x2ff, 2),
        (0x1b, 1 << 10),
        (0xfe, 0),
        (0xdead, 0),
        (0x10a, 0),
        (0x140, 1),
    ];
    for (index, v) in bad {
        let mut m = Machine::long();
        wrmsr(&mut m, index, v);
        assert_eq!(m.cpu.rip, HANDLERS + 16 * 13, "{index:#x}");
    }
    assert_eq!(rdmsr(&mut m, 0xdead), None);
    assert_eq!(rdmsr(&mut m, 0x10a), Some(0x2b));
}

#[test]
fn msr_access_from_user_mode_faults() {
    let mut m = Machine::user();
    m.raw(&[0x0f, 0x32]);
    assert_eq!(m.fault(), vector::GP);
}

#[test]
fn hypercall_page_msr_exits() {
    let mut m = Machine::long();
    assert_eq!(
        wrmsr(&mut m, MSR_HYPERCALL_PAGE, 0x12_3000),
        Step::Exit(Exit::MsrWrite {
            index: MSR_HYPERCALL_PAGE,
            value: 0x12_3000
        })
    );
    assert_eq!(m.cpu.rip, CODE + 2);
}

#[test]
fn tsc_writes_move_offset_and_adjust() {
    let mut m = Machine::long();
    wrmsr(&mut m, 0x10, 5000);
    assert_eq!(m.cpu.msr.tsc_offset, 4000);
    assert_eq!(rdmsr(&mut m, 0x3b), Some(4000));
    wrmsr(&mut m, 0x3b, 0);
    assert_eq!(rdmsr(&mut m, 0x10), Some(1000));
}

#[test]
fn x2apic_registers_through_msrs() {
    let mut m = Machine::long();
    assert_eq!(rdmsr(&mut m, 0x802), None);
    m.cpu.msr.apic_base = 0xfee0_0d00;
    m.cpu.lapic.id = 2;
    assert_eq!(rdmsr(&mut m, 0x802), Some(2));
    wrmsr(&mut m, 0x80f, 0x1ff);
    wrmsr(&mut m, 0x83f, 0xf6);
    assert_eq!(lapic::pending_vector(&m.cpu.lapic), Some(0xf6));
    wrmsr(&mut m, 0x830, 0xc500 | 4 << 32);
    assert_eq!(m.host.ipis.len(), 1);
    assert_eq!(
        (m.host.ipis[0].dest, m.host.ipis[0].delivery),
        (4, Delivery::Init)
    );
    // CR8 is the upper half of TPR.
    m.cpu.rip = CODE;
    m.cpu.gpr[reg::RAX] = 0xf;
    m.code(|a| a.mov(cr8, rax).unwrap());
    m.run(1);
    assert_eq!(m.cpu.lapic.tpr, 0xf0);
    assert_eq!(lapic::pending_vector(&m.cpu.lapic), None);
}

#[test]
fn cr3_and_cr4_writes_flush_what_they_must() {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RAX] = PML4;
    m.cpu.gpr[reg::RBX] = m.cpu.cr4 | cr::CR4_PCIDE;
    m.cpu.gpr[reg::RCX] = PML4 | 5;
    m.cpu.gpr[reg::RDX] = PML4 | 6 | 1 << 63;
    m.code(|a| {
        a.mov(cr3, rax).unwrap();
        a.mov(cr4, rbx).unwrap();
        a.mov(cr3, rcx).unwrap();
        a.mov(cr3, rdx).unwrap();
        a.invlpg(byte_ptr(0x1234)).unwrap();
    });
    m.run(5);
    assert_eq!(m.cpu.cr3, PML4 | 6);
    assert_eq!(
        m.host.flushes,
        [
            TlbFlush::NonGlobal,
            TlbFlush::All,
            TlbFlush::Pcid(5),
            TlbFlush::Switch,
            TlbFlush::Page(hospes_units::Gva(0x1234)),
        ]
    );
}

#[test]
fn control_register_reserved_bits_fault() {
    for (n, v) in [
        (3, 1u64 << PHYS_BITS),
        (4, 1 << 12),
        (4, 1 << 13),
        (4, 0),
        (8, 16),
    ] {
        let mut m = Machine::long();
        m.cpu.gpr[reg::RAX] = v;
        m.code(|a| match n {
            3 => a.mov(cr3, rax).unwrap(),
            4 => a.mov(cr4, rax).unwrap(),
            _ => a.mov(cr8, rax).unwrap(),
        });
        assert_eq!(m.fault(), vector::GP, "cr{n} {v:#x}");
    }
}

#[test]
fn invpcid_types_and_checks() {
    let mut m = Machine::long();
    m.cpu.cr4 |= cr::CR4_PCIDE;
    m.poke(0x5_0000, 9);
    m.poke(0x5_0008, 0x7000);
    for (kind, what) in [
        (
            0,
            TlbFlush::PageOfPcid {
                pcid: 9,
                gva: hospes_units::Gva(0x7000),
            },
        ),
        (1, TlbFlush::Pcid(9)),
        (2, TlbFlush::All),
        (3, TlbFlush::NonGlobal),
    ] {
        m.cpu.rip = CODE;
        m.cpu.gpr[reg::RAX] = kind;
        m.code(|a| a.invpcid(rax, xmmword_ptr(0x5_0000)).unwrap());
        m.run(1);
        assert_eq!(m.host.flushes.last(), Some(&what));
    }
    m.cpu.rip = CODE;
    m.cpu.gpr[reg::RAX] = 4;
    assert_eq!(m.fault(), vector::GP);
}

#[test]
fn exits_carry_their_operands_and_point_behind() {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RAX] = 0x1234_5678;
    m.cpu.gpr[reg::RDX] = 0xcf8;
    let io = |port, size, write, value| {
        Step::Exit(Exit::PortIo {
            port,
            size,
            write,
            value,
        })
    };
    m.code(|a| {
        a.out(dx, eax).unwrap();
        a.in_(al, 0x61).unwrap();
        a.vmcall().unwrap();
        a.vmmcall().unwrap();
        a.sti().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.step(), io(0xcf8, 4, true, 0x1234_5678));
    assert_eq!(m.step(), io(0x61, 1, false, 0));
    assert_eq!(m.step(), Step::Exit(Exit::Hypercall));
    assert_eq!(m.step(), Step::Exit(Exit::Hypercall));
    m.ok();
    assert!(m.cpu.interrupt_shadow);
    assert_eq!(
        m.step(),
        Step::Exit(Exit::Halt {
            interrupts_enabled: true
        })
    );
    assert_eq!(m.cpu.rip, CODE + 1 + 2 + 3 + 3 + 1 + 1);
}

#[test]
fn user_port_access_follows_the_permission_map() {
    let mut m = Machine::user();
    m.cpu.tr.limit = 0x2067;
    m.poke(TSS + 0x66, 0x68);
    m.host.memory.zero(Gpa(TSS + 0x68), 0x1f00).unwrap();
    m.poke(TSS + 0x68 + 0x60 / 8, 0x02);
    let len = m.code(|a| a.in_(al, 0x60).unwrap());
    assert!(matches!(
        m.step(),
        Step::Exit(Exit::PortIo { port: 0x60, .. })
    ));
    m.cpu.rip = USER;
    assert_eq!(m.code(|a| a.in_(al, 0x61).unwrap()), len);
    assert_eq!(m.fault(), vector::GP);
    // A word at 0x60 needs both.
    let mut n = Machine::user();
    n.cpu.tr.limit = 0x2067;
    n.poke(TSS + 0x66, 0x68);
    n.host.memory.zero(Gpa(TSS + 0x68), 0x1f00).unwrap();
    n.poke(TSS + 0x68 + 0x60 / 8, 0x02);
    n.code(|a| a.in_(ax, 0x60).unwrap());
    assert_eq!(n.fault(), vector::GP);
    let mut n = Machine::user();
    n.code(|a| a.in_(al, 0x60).unwrap());
    assert_eq!(n.fault(), vector::GP);
}

#[test]
fn privileged_instructions_fault_in_user_mode() {
    let all: [fn(&mut CodeAssembler); 9] = [
        |a| a.hlt().unwrap(),
        |a| a.cli().unwrap(),
        |a| a.sti().unwrap(),
        |a| a.clts().unwrap(),
        |a| a.wbinvd().unwrap(),
        |a| a.swapgs().unwrap(),
        |a| a.mov(rax, cr0).unwrap(),
        |a| a.invlpg(byte_ptr(0)).unwrap(),
        |a| a.lgdt(fword_ptr(USER)).unwrap(),
    ];
    for emit in all {
        let mut m = Machine::user();
        m.code(emit);
        assert_eq!(m.fault(), vector::GP);
    }
}

#[test]
fn umip_hides_the_tables_from_user_mode() {
    let mut m = Machine::user();
    m.code(|a| a.sgdt(fword_ptr(USER + 0x100)).unwrap());
    m.run(1);
    assert_eq!(m.peek(USER + 0x102), GDT);
    for emit in [
        (|a| a.sgdt(fword_ptr(USER)).unwrap()) as fn(&mut CodeAssembler),
        |a| a.sidt(fword_ptr(USER)).unwrap(),
        |a| a.sldt(eax).unwrap(),
        |a| a.str(eax).unwrap(),
        |a| a.smsw(eax).unwrap(),
    ] {
        let mut m = Machine::user();
        m.cpu.cr4 |= cr::CR4_UMIP;
        m.code(emit);
        assert_eq!(m.fault(), vector::GP);
    }
}

#[test]
fn ltr_marks_the_descriptor_busy() {
    let mut m = Machine::long();
    m.cpu.tr = Segment::default();
    m.cpu.gpr[reg::RAX] = TSS_SEL.into();
    m.code(|a| {
        a.ltr(ax).unwrap();
        a.ltr(ax).unwrap();
    });
    m.run(1);
    assert_eq!((m.cpu.tr.base, m.cpu.tr.attr), (TSS, 0x8b));
    assert_eq!(m.peek(GDT + u64::from(TSS_SEL)) >> 40 & 0xff, 0x8b);
    assert_eq!(m.fault(), vector::GP);
}

#[test]
fn lsl_and_lar_report_through_zf() {
    let mut m = Machine::user();
    m.cpu.gpr[reg::RCX] = KERNEL_DS.into();
    m.cpu.gpr[reg::RDX] = USER_DS.into();
    m.cpu.gpr[reg::RAX] = 7;
    m.code(|a| {
        a.lsl(eax, ecx).unwrap();
        a.lsl(eax, edx).unwrap();
        a.lar(ebx, edx).unwrap();
    });
    m.run(1);
    assert_eq!((m.cpu.gpr[reg::RAX], m.cpu.rflags & rflags::ZF), (7, 0));
    m.run(2);
    assert_eq!(m.cpu.gpr[reg::RAX], 0xffff_ffff);
    assert_eq!(m.cpu.gpr[reg::RBX], 0x00cf_f300);
    assert_ne!(m.cpu.rflags & rflags::ZF, 0);
}

/// Fills the image with a recognisable state: everything in use.
fn fill_image(m: &mut Machine) {
    for (k, b) in m.cpu.xsave.0[32..160].iter_mut().enumerate() {
        *b = k as u8;
    }
    for (k, b) in m.cpu.xsave.0[160..416].iter_mut().enumerate() {
        *b = (k * 3) as u8;
    }
    for (k, b) in m.cpu.xsave.0[576..832].iter_mut().enumerate() {
        *b = (k * 5) as u8;
    }
    m.cpu.xsave.0[512] = 7;
}

const AREA: u64 = 0x50_0fc0;

#[test]
fn xsave_and_xrstor_round_trip_in_both_formats() {
    for compact in [false, true] {
        let mut m = Machine::long();
        fill_image(&mut m);
        let before = m.cpu.xsave.clone();
        m.cpu.gpr[reg::RAX] = u64::MAX;
        m.cpu.gpr[reg::RDX] = u64::MAX;
        m.cpu.gpr[reg::RDI] = AREA;
        m.code(|a| {
            if compact {
                a.xsavec64(ptr(rdi)).unwrap();
            } else {
                a.xsave64(ptr(rdi)).unwrap();
            }
            a.xrstor64(ptr(rdi)).unwrap();
        });
        m.run(1);
        assert_eq!(m.peek(AREA + 512), 7);
        assert_eq!(m.peek(AREA + 520), if compact { 7 | 1 << 63 } else { 0 });
        assert_eq!(m.bytes(AREA + 576, 256), before.0[576..832]);
        // Nothing beyond the enabled components is written.
        assert_eq!(m.bytes(AREA + 832, 64), [0; 64]);
        m.cpu.xsave.0[..832].fill(0);
        m.run(1);
        assert!(m.cpu.xsave.0[..28] == before.0[..28]);
        assert!(m.cpu.xsave.0[32..] == before.0[32..]);
    }
}

#[test]
fn xrstor_initialises_components_that_are_absent() {
    let mut m = Machine::long();
    fill_image(&mut m);
    m.cpu.gpr[reg::RAX] = 6;
    m.cpu.gpr[reg::RDX] = 0;
    m.cpu.gpr[reg::RDI] = AREA;
    m.poke(AREA + 24, 0xffff_0000_1f80);
    m.code(|a| a.xrstor(ptr(rdi)).unwrap());
    m.run(1);
    assert_eq!(m.cpu.xsave.0[160..416], [0; 256]);
    assert_eq!(m.cpu.xsave.0[576..832], [0; 256]);
    assert_eq!(m.cpu.xsave.0[33], 1);
    assert_eq!(m.cpu.xsave.0[512], 1);
}

#[test]
fn xrstor_bad_headers_fault() {
    // (offset, value): unsupported component, reserved header bytes, MXCSR, component outside XCOMP_BV.
    for (at, v) in [
        (512, 1 << 9),
        (528, 1),
        (24, 1 << 31),
        (520, 1 << 63 | 1 << 9),
    ] {
        let mut m = Machine::long();
        fill_image(&mut m);
        let before = m.cpu.xsave.clone();
        m.cpu.gpr[reg::RAX] = 7;
        m.cpu.gpr[reg::RDX] = 0;
        m.cpu.gpr[reg::RDI] = AREA;
        m.poke(AREA + at, v);
        m.code(|a| a.xrstor(ptr(rdi)).unwrap());
        assert_eq!(m.fault(), vector::GP, "{at}");
        assert_eq!(m.cpu.xsave, before);
    }
    let mut m = Machine::long();
    m.cpu.gpr[reg::RDI] = AREA + 16;
    m.code(|a| a.xsave(ptr(rdi)).unwrap());
    assert_eq!(m.fault(), vector::GP);
}

#[test]
fn xsave_never_writes_past_what_the_guest_enabled() {
    let mut m = Machine::long();
    fill_image(&mut m);
    m.cpu.xcr0 = 3;
    m.host.memory.write(Gpa(AREA), &[0xaa; 1024]).unwrap();
    m.cpu.gpr[reg::RAX] = u64::MAX;
    m.cpu.gpr[reg::RDX] = u64::MAX;
    m.cpu.gpr[reg::RDI] = AREA;
    m.code(|a| a.xsave(ptr(rdi)).unwrap());
    m.run(1);
    assert_eq!(m.bytes(AREA + 576, 256), [0xaa; 256]);
    assert_eq!(m.bytes(AREA + 416, 96), [0xaa; 96]);
}

#[test]
fn xsave_faulting_on_its_second_page_writes_nothing() {
    let mut m = Machine::user();
    fill_image(&mut m);
    m.cpu.gpr[reg::RAX] = 7;
    m.cpu.gpr[reg::RDX] = 0;
    m.cpu.gpr[reg::RDI] = HOLE - 0x40;
    m.code(|a| a.xsave(ptr(rdi)).unwrap());
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.cpu.cr2, HOLE);
    assert_eq!(m.bytes(HOLE - 0x40, 0x40), [0; 0x40]);
}

#[test]
fn xsetbv_refuses_impossible_sets() {
    for (v, ok) in [
        (7, true),
        (3, true),
        (1, true),
        (0, false),
        (5, false),
        (0xe7, false),
    ] {
        let mut m = Machine::long();
        m.cpu.gpr[reg::RAX] = v;
        m.cpu.gpr[reg::RDX] = 0;
        m.cpu.gpr[reg::RCX] = 0;
        m.code(|a| a.xsetbv().unwrap());
        if ok {
            m.run(1);
            assert_eq!(m.cpu.xcr0, v);
        } else {
            assert_eq!(m.fault(), vector::GP, "{v:#x}");
            assert_eq!(m.cpu.xcr0, 7);
        }
    }
}

#[test]
fn fxsave_round_trip_and_alignment() {
    let mut m = Machine::long();
    fill_image(&mut m);
    let before = m.cpu.xsave.clone();
    m.cpu.gpr[reg::RDI] = AREA + 0x10;
    m.code(|a| {
        a.fxsave64(ptr(rdi)).unwrap();
        a.fxrstor64(ptr(rdi)).unwrap();
    });
    m.run(1);
    m.cpu.xsave.0[32..416].fill(0);
    m.run(1);
    assert!(m.cpu.xsave.0[..416] == before.0[..416]);
    let mut m = Machine::long();
    m.cpu.gpr[reg::RDI] = AREA + 8;
    m.code(|a| a.fxsave64(ptr(rdi)).unwrap());
    assert_eq!(m.fault(), vector::GP);
}

#[test]
fn decimal_adjustments_match_known_results() {
    // Opcode, AX, flags in; AX and CF out.
    for (bytes, before, flags, after, cf) in [
        (&[0x27u8][..], 0x9au64, 0u64, 0u64, true),
        (&[0x27], 0x45, 0, 0x45, false),
        (&[0x2f], 0xff, 0, 0x99, true),
        (&[0x37], 0x000f, 0, 0x0105, true),
        (&[0x3f], 0x0203, rflags::AF, 0x000d, true),
        (&[0xd4, 10], 0x3f, 0, 0x0603, false),
        (&[0xd5, 10], 0x0603, 0, 0x003f, false),
    ] {
        let mut m = Machine::protected();
        m.cpu.gpr[reg::RAX] = before;
        m.cpu.rflags |= flags;
        m.raw(bytes);
        m.run(1);
        assert_eq!(m.cpu.gpr[reg::RAX], after, "{bytes:x?} {before:#x}");
        assert_eq!(m.cpu.rflags & rflags::CF != 0, cf, "{bytes:x?} {before:#x}");
    }
    let mut m = Machine::protected();
    m.raw(&[0xd4, 0]);
    assert_eq!(m.fault(), vector::DE);
}
