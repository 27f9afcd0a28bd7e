//! Exceptions, interrupts and the ways back from them.

use hospes_engine::cr;
use iced_x86::code_asm::{dr0, qword_ptr, rax};

use super::*;

#[test]
fn page_fault_in_user_mode_switches_stack_and_reports() {
    let mut m = Machine::user();
    m.code(|a| a.mov(rax, qword_ptr(HOLE + 8)).unwrap());
    let old = m.cpu.clone();
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.cpu.cr2, HOLE + 8);
    assert_eq!(m.cpu.gpr[reg::RSP], RING0_STACK - 48);
    assert_eq!(
        m.stack(6),
        [
            4,
            USER,
            u64::from(USER_CS),
            old.rflags | rflags::RF,
            USER_STACK,
            u64::from(USER_DS)
        ]
    );
    assert_eq!(m.cpu.cpl(), 0);
    assert_eq!(m.cpu.seg[seg::SS].selector, 0);
    assert_eq!(m.cpu.rflags & (rflags::IF | rflags::RF), 0);
    // IRET brings everything back but RF, which it sets from the frame.
    m.cpu.gpr[reg::RSP] += 8;
    m.code(|a| a.iretq().unwrap());
    m.ok();
    let mut expected = old;
    expected.rflags |= rflags::RF;
    assert_eq!(m.cpu.rip, USER);
    assert_eq!(m.cpu.rflags, expected.rflags);
    assert_eq!(m.cpu.gpr, expected.gpr);
    assert_eq!(m.cpu.seg[seg::CS], expected.seg[seg::CS]);
    assert_eq!(m.cpu.seg[seg::SS], expected.seg[seg::SS]);
    assert_eq!(m.cpu.cpl(), 3);
}

#[test]
fn interrupt_at_cpl0_aligns_the_stack() {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RSP] = KERNEL_STACK - 8;
    m.cpu.rflags |= rflags::IF;
    let flags = m.cpu.rflags;
    let s = deliver_interrupt(&mut m.cpu, &mut m.host, 0xf3, false);
    assert_eq!(s, Step::Continue);
    assert_eq!(m.cpu.rip, HANDLERS + 16 * 0xf3);
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK - 16 - 40);
    assert_eq!(
        m.stack(5),
        [
            CODE,
            u64::from(KERNEL_CS),
            flags,
            KERNEL_STACK - 8,
            u64::from(KERNEL_DS)
        ]
    );
    assert_eq!(m.cpu.seg[seg::SS].selector, KERNEL_DS);
}

#[test]
fn trap_gate_leaves_interrupts_enabled() {
    let mut m = Machine::long();
    m.gate64(0x80, HANDLERS + 0x800, KERNEL_CS, 0x8f, 0);
    m.cpu.rflags |= rflags::IF;
    let len = m.code(|a| a.int(0x80).unwrap());
    m.ok();
    assert_eq!(m.cpu.rip, HANDLERS + 0x800);
    assert_ne!(m.cpu.rflags & rflags::IF, 0);
    assert_eq!(m.peek(m.cpu.gpr[reg::RSP]), CODE + len);
}

#[test]
fn software_interrupt_respects_the_gate_level() {
    let mut m = Machine::user();
    m.code(|a| a.int(0x80).unwrap());
    assert_eq!(m.fault(), vector::GP);
    assert_eq!(m.stack(2), [0x80 << 3 | 2, USER]);
    let mut m = Machine::user();
    m.gate64(3, HANDLERS + 48, KERNEL_CS, 0xee, 0);
    m.code(|a| a.int3().unwrap());
    assert_eq!(m.fault(), vector::BP);
    assert_eq!(m.stack(1), [USER + 1]);
    assert_eq!(m.peek(m.cpu.gpr[reg::RSP] + 16) & rflags::RF, 0);
}

#[test]
fn double_fault_uses_its_ist_and_triple_fault_shuts_down() {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RSP] = HOLE + 0x1000;
    m.raw(&[0x0f, 0x0b]);
    // #UD, then #PF on its stack: benign, so the page fault comes next, which faults on the same stack.
    assert_eq!(m.fault(), vector::DF);
    assert_eq!(m.cpu.gpr[reg::RSP], IST1_STACK - 48);
    assert_eq!(m.stack(2), [0, CODE]);
    let mut m = Machine::long();
    m.cpu.gpr[reg::RSP] = HOLE + 0x1000;
    m.poke(TSS + 36, HOLE + 0x1000);
    m.raw(&[0x0f, 0x0b]);
    assert_eq!(m.step(), Step::Exit(Exit::Shutdown { rip: CODE }));
}

#[test]
fn contributory_faults_double_but_benign_ones_do_not() {
    // #GP while delivering #NP: double fault.
    let mut m = Machine::long();
    m.gate64(11, HANDLERS, 0, 0x8e, 0);
    deliver_exception(&mut m.cpu, &mut m.host, Exception::np(0));
    assert_eq!(m.cpu.rip, HANDLERS + 16 * 8);
    // #GP while delivering #UD: just #GP, with a null selector and EXT.
    let mut m = Machine::long();
    m.gate64(6, HANDLERS, 0, 0x8e, 0);
    deliver_exception(&mut m.cpu, &mut m.host, Exception::ud());
    assert_eq!(m.cpu.rip, HANDLERS + 16 * 13);
    assert_eq!(m.stack(1), [1]);
    // An absent gate names itself with IDT and EXT.
    let mut m = Machine::long();
    m.gate64(6, HANDLERS, KERNEL_CS, 0x0e, 0);
    deliver_exception(&mut m.cpu, &mut m.host, Exception::ud());
    assert_eq!(m.cpu.rip, HANDLERS + 16 * 11);
    assert_eq!(m.stack(1), [6 << 3 | 3]);
}

#[test]
fn nmi_blocks_until_iret() {
    let mut m = Machine::long();
    deliver_interrupt(&mut m.cpu, &mut m.host, vector::NMI, true);
    assert!(m.cpu.nmi_blocked);
    assert_eq!(m.cpu.rip, HANDLERS + 32);
    m.code(|a| a.iretq().unwrap());
    m.ok();
    assert!(!m.cpu.nmi_blocked);
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RSP]), (CODE, KERNEL_STACK));
}

#[test]
fn iret_with_nested_task_or_bad_frame_faults_without_change() {
    let mut m = Machine::long();
    m.cpu.rflags |= rflags::NT;
    m.code(|a| a.iretq().unwrap());
    assert_eq!(m.fault(), vector::GP);
    let frame = |m: &mut Machine, rip: u64, cs: u16, rsp: u64, ss: u16| {
        let sp = KERNEL_STACK - 40;
        m.cpu.gpr[reg::RSP] = sp;
        for (k, v) in [rip, cs.into(), 0x202, rsp, ss.into()]
            .into_iter()
            .enumerate()
        {
            m.poke(sp + 8 * k as u64, v);
        }
        m.code(|a| a.iretq().unwrap());
    };
    for (cs, ss, vector, code) in [
        (0, KERNEL_DS, vector::GP, 0),
        (KERNEL_DS, KERNEL_DS, vector::GP, 0x10),
        (USER_CS, 0, vector::GP, 0),
        (USER_CS, KERNEL_DS, vector::GP, 0x10),
        (0x1000 | 3, USER_DS, vector::GP, 0x1000),
    ] {
        let mut m = Machine::long();
        frame(&mut m, USER, cs, USER_STACK, ss);
        let before = m.cpu.clone();
        assert_eq!(m.fault(), vector, "cs {cs:#x} ss {ss:#x}");
        assert_eq!(m.stack(2), [code, CODE]);
        assert_eq!(m.stack(5)[4], before.gpr[reg::RSP]);
    }
    let mut m = Machine::long();
    frame(&mut m, 1 << 47, USER_CS, USER_STACK, USER_DS);
    assert_eq!(m.fault(), vector::GP);
}

#[test]
fn syscall_and_sysret_round_trip() {
    let mut m = Machine::user();
    m.cpu.rflags |= rflags::CF | rflags::DF;
    let old = m.cpu.clone();
    let len = m.code(|a| a.syscall().unwrap());
    m.ok();
    assert_eq!(m.cpu.rip, m.cpu.msr.lstar);
    assert_eq!(m.cpu.gpr[reg::RCX], USER + len);
    assert_eq!(m.cpu.gpr[reg::R11], old.rflags);
    assert_eq!(m.cpu.rflags & (rflags::IF | rflags::DF), 0);
    assert_ne!(m.cpu.rflags & rflags::CF, 0);
    assert_eq!(m.cpu.gpr[reg::RSP], USER_STACK);
    assert_eq!(
        (
            m.cpu.cpl(),
            m.cpu.seg[seg::CS].selector,
            m.cpu.seg[seg::SS].selector
        ),
        (0, KERNEL_CS, KERNEL_DS)
    );
    m.code(|a| a.sysretq().unwrap());
    m.ok();
    assert_eq!(m.cpu.rip, USER + len);
    assert_eq!(m.cpu.rflags, old.rflags);
    assert_eq!(m.cpu.seg[seg::CS], old.seg[seg::CS]);
    assert_eq!(m.cpu.seg[seg::SS], old.seg[seg::SS]);
}

#[test]
fn sysret_to_compatibility_mode_runs_32_bit_code() {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RCX] = 0xffff_ffff_0040_0000;
    m.cpu.gpr[reg::R11] = 0x202;
    m.raw(&[0x0f, 0x07]);
    m.ok();
    assert_eq!((m.cpu.rip, m.cpu.code_bits(), m.cpu.cpl()), (USER, 32, 3));
    assert_eq!(m.cpu.seg[seg::CS].selector, USER_CS32);
}

#[test]
fn syscall_needs_its_enable_bit_and_sysenter_depends_on_the_vendor() {
    let mut m = Machine::user();
    m.cpu.msr.efer &= !cr::EFER_SCE;
    m.code(|a| a.syscall().unwrap());
    assert_eq!(m.fault(), vector::UD);
    for (vendor, expected) in [(Vendor::Intel, None), (Vendor::Amd, Some(vector::UD))] {
        let mut m = Machine::user();
        m.host.vendor = vendor;
        m.cpu.msr.sysenter_cs = KERNEL_CS.into();
        m.cpu.msr.sysenter_eip = CODE;
        m.cpu.msr.sysenter_esp = KERNEL_STACK;
        m.code(|a| a.sysenter().unwrap());
        match expected {
            Some(v) => assert_eq!(m.fault(), v),
            None => {
                m.ok();
                assert_eq!(
                    (
                        m.cpu.rip,
                        m.cpu.gpr[reg::RSP],
                        m.cpu.cpl(),
                        m.cpu.code_bits()
                    ),
                    (CODE, KERNEL_STACK, 0, 64)
                );
            }
        }
    }
}

#[test]
fn single_step_traps_behind_each_instruction() {
    let mut m = Machine::long();
    m.cpu.rflags |= rflags::TF;
    m.code(|a| a.nop().unwrap());
    assert_eq!(m.fault(), vector::DB);
    assert_eq!(m.cpu.dr[6], DR6_RESET | 1 << 14);
    assert_eq!(m.stack(1), [CODE + 1]);
    assert_eq!(m.cpu.rflags & rflags::TF, 0);
}

#[test]
fn hypercall_under_single_step_is_still_its_makers() {
    // Answered after the trap it would be the kernel's, to which all is allowed.
    let mut m = Machine::user();
    m.cpu.rflags |= rflags::TF;
    m.code(|a| {
        a.vmcall().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(m.step(), Step::Exit(Exit::Hypercall));
    assert_eq!((m.cpu.cpl(), m.cpu.rip), (3, USER + 3));
    assert_eq!(m.fault(), vector::DB);
    assert_eq!(m.stack(1), [USER + 4]);
}

#[test]
fn halt_under_single_step_ends_at_once() {
    let mut m = Machine::long();
    m.cpu.rflags |= rflags::TF;
    m.code(|a| a.hlt().unwrap());
    assert_eq!(m.fault(), vector::DB);
    assert_eq!(m.cpu.activity, Activity::Running);
}

#[test]
fn breakpoints_fire_and_resume_flag_suppresses() {
    let mut m = Machine::long();
    m.cpu.dr[0] = CODE;
    m.cpu.dr[7] |= 1;
    assert!(debug_active(&m.cpu));
    m.code(|a| a.nop().unwrap());
    assert_eq!(m.fault(), vector::DB);
    assert_eq!(m.stack(1), [CODE]);
    assert_eq!(m.cpu.dr[6] & 0xf, 1);
    let mut m = Machine::long();
    m.cpu.dr[0] = CODE;
    m.cpu.dr[7] |= 1;
    m.cpu.rflags |= rflags::RF;
    m.code(|a| a.nop().unwrap());
    m.run(1);
    assert_eq!(m.cpu.rflags & rflags::RF, 0);
}

#[test]
fn watchpoint_traps_after_the_store() {
    let mut m = Machine::long();
    m.cpu.dr[1] = 0x5_0004;
    // Write, 4 bytes.
    m.cpu.dr[7] |= 1 << 2 | 0xd << 20;
    let len = m.code(|a| a.mov(qword_ptr(0x5_0000), rax).unwrap());
    m.cpu.gpr[reg::RAX] = 77;
    assert_eq!(m.fault(), vector::DB);
    assert_eq!(m.peek(0x5_0000), 77);
    assert_eq!(m.stack(1), [CODE + len]);
    assert_eq!(m.cpu.dr[6] & 0xf, 2);
    let mut m = Machine::long();
    m.cpu.dr[1] = 0x5_0004;
    m.cpu.dr[7] |= 1 << 2 | 0xd << 20;
    m.code(|a| a.mov(rax, qword_ptr(0x5_0000)).unwrap());
    m.run(1);
}

#[test]
fn debug_register_access_with_general_detect_traps() {
    let mut m = Machine::long();
    m.cpu.dr[7] |= 1 << 13;
    m.code(|a| a.mov(rax, dr0).unwrap());
    assert_eq!(m.fault(), vector::DB);
    assert_ne!(m.cpu.dr[6] & (1 << 13), 0);
    assert_eq!(m.cpu.dr[7] & (1 << 13), 0);
}

#[test]
fn protected_mode_interrupt_from_user_uses_the_tss() {
    let mut m = Machine::protected();
    m.poke(TSS + 4, RING0_STACK | u64::from(KERNEL_DS) << 32);
    m.cpu.seg[seg::CS] = flat(USER_CS32, 0xc0fb);
    m.cpu.seg[seg::SS] = flat(USER_DS, 0xc0f3);
    m.cpu.gpr[reg::RSP] = USER_STACK;
    m.cpu.rip = USER;
    m.cpu.rflags |= rflags::IF;
    m.gate32(0x80, HANDLERS + 0x800, KERNEL_CS32, 0xef);
    m.code(|a| a.int(0x80).unwrap());
    m.ok();
    let word = |m: &Machine, k: u64| m.peek(m.cpu.gpr[reg::RSP] + 4 * k) as u32;
    assert_eq!(m.cpu.gpr[reg::RSP], RING0_STACK - 20);
    assert_eq!(
        (0..5).map(|k| word(&m, k)).collect::<Vec<_>>(),
        [
            USER as u32 + 2,
            USER_CS32.into(),
            0x202,
            USER_STACK as u32,
            USER_DS.into()
        ]
    );
    assert_eq!(m.cpu.seg[seg::SS].selector, KERNEL_DS);
    m.code(|a| a.iretd().unwrap());
    m.ok();
    assert_eq!((m.cpu.rip, m.cpu.cpl()), (USER + 2, 3));
    assert_eq!(m.cpu.gpr[reg::RSP], USER_STACK);
    // Kernel data segments do not survive the way out.
    assert_eq!(
        (m.cpu.seg[seg::DS].selector, m.cpu.seg[seg::DS].attr),
        (0, 0)
    );
}

#[test]
fn real_mode_interrupt_and_return() {
    let mut m = Machine::bare();
    m.cpu.rip = 0x1000;
    m.cpu.gpr[reg::RSP] = 0x8000;
    m.cpu.rflags |= rflags::IF;
    m.poke(0x21 * 4, 0x2000_3000);
    m.code(|a| a.int(0x21).unwrap());
    m.ok();
    assert_eq!((m.cpu.rip, m.cpu.seg[seg::CS].base), (0x3000, 0x2_0000));
    assert_eq!(m.peek(0x7ffa) & 0xffff_ffff_ffff, 0x0202_0000_1002);
    m.code(|a| a.iret().unwrap());
    m.ok();
    assert_eq!((m.cpu.rip, m.cpu.seg[seg::CS].base), (0x1002, 0));
    assert_eq!(m.cpu.gpr[reg::RSP], 0x8000);
    assert_ne!(m.cpu.rflags & rflags::IF, 0);
}
