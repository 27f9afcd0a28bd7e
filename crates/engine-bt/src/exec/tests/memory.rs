//! Operands, segments, fetching and native execution.

use hospes_engine::cr;
use iced_x86::code_asm::*;

use super::*;

#[test]
fn fetch_across_pages_faults_on_the_second() {
    let mut m = Machine::user();
    // A 10-byte instruction of which 4 bytes lie before the hole.
    m.cpu.rip = HOLE - 4;
    m.host
        .memory
        .write(Gpa(HOLE - 4), &[0x48, 0xb8, 1, 2])
        .unwrap();
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.cpu.cr2, HOLE);
    // User, fetch.
    assert_eq!(m.stack(2), [0x14, HOLE - 4]);
    let mut m = Machine::user();
    m.cpu.rip = USER + 0xffd;
    m.raw(&[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8]);
    m.run(1);
    assert_eq!(m.cpu.gpr[reg::RAX], 0x0807_0605_0403_0201);
}

#[test]
fn instruction_before_the_hole_needs_no_second_page() {
    let mut m = Machine::user();
    m.cpu.rip = HOLE - 1;
    m.raw(&[0x90]);
    m.run(1);
    assert_eq!(m.cpu.rip, HOLE);
}

#[test]
fn overlong_and_undefined_instructions() {
    let mut m = Machine::long();
    m.raw(&[0x66; 16]);
    assert_eq!(m.fault(), vector::GP);
    for bytes in [
        &[0x0f, 0x0b][..],
        &[0x0f, 0xb9, 0xc0],
        // rdpkru, monitor, vmlaunch, xbegin, tpause
        &[0x0f, 0x01, 0xee],
        &[0x0f, 0x01, 0xc8],
        &[0x0f, 0x01, 0xc2],
        &[0xc7, 0xf8, 0, 0, 0, 0],
        &[0x66, 0x0f, 0xae, 0xf0],
    ] {
        let mut m = Machine::long();
        m.raw(bytes);
        assert_eq!(m.fault(), vector::UD, "{bytes:x?}");
    }
}

#[test]
fn no_execute_and_smep_stop_fetches() {
    let mut m = Machine::long();
    m.map(CODE, CODE, P | RW | XD);
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.stack(1), [0x11]);
    let mut m = Machine::long();
    m.cpu.cr4 |= cr::CR4_SMEP;
    m.cpu.rip = USER;
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.stack(2), [0x11, USER]);
}

#[test]
fn non_canonical_addresses_raise_gp_or_ss() {
    for (base, expected) in [(reg::RAX, vector::GP), (reg::RBP, vector::SS)] {
        let mut m = Machine::long();
        m.cpu.gpr[base] = 1 << 47;
        m.code(|a| {
            if base == reg::RAX {
                a.mov(rcx, qword_ptr(rax)).unwrap();
            } else {
                a.mov(rcx, qword_ptr(rbp)).unwrap();
            }
        });
        assert_eq!(m.fault(), expected);
        assert_eq!(m.stack(1), [0]);
    }
}

#[test]
fn store_across_pages_is_all_or_nothing() {
    let mut m = Machine::user();
    m.cpu.gpr[reg::RAX] = u64::MAX;
    m.code(|a| a.mov(qword_ptr(HOLE - 4), rax).unwrap());
    assert_eq!(m.fault(), vector::PF);
    assert_eq!((m.cpu.cr2, m.stack(1)[0]), (HOLE, 6));
    assert_eq!(m.bytes(HOLE - 4, 4), [0; 4]);
}

#[test]
fn memory_that_is_not_there_reads_ones_and_ignores_writes() {
    let mut m = Machine::long();
    m.map(HOLE, 0xfee0_0000, P | RW);
    m.code(|a| {
        a.mov(dword_ptr(HOLE), eax).unwrap();
        a.mov(eax, dword_ptr(HOLE + 0x20)).unwrap();
    });
    m.run(2);
    assert_eq!(m.cpu.gpr[reg::RAX], 0xffff_ffff);
}

/// Adds 1 to the operand, byte by byte where it lies.
fn increment(_: &mut CpuState, _: &Instruction, o: Option<Operand>) -> Result<(), NativeFault> {
    let o = o.unwrap();
    // SAFETY: the contract of `Operand`.
    unsafe {
        let v = o.ptr.cast::<u64>().read_unaligned();
        o.ptr.cast::<u64>().write_unaligned(v.wrapping_add(1));
    }
    Ok(())
}

#[test]
fn native_operand_is_guest_memory_itself_inside_a_page() {
    let mut m = Machine::long();
    m.host.native = increment;
    m.poke(0x5_0008, 41);
    m.code(|a| a.lock().add(qword_ptr(0x5_0008), 1).unwrap());
    m.run(1);
    assert_eq!(m.peek(0x5_0008), 42);
    let host = m.host.memory.slice(Gpa(0x5_0008), 8).unwrap() as usize;
    assert_eq!(m.host.native_runs, [(Mnemonic::Add, Some(host))]);
    assert!(m.host.writes.contains(&(0x5_0008, 8)));
}

#[test]
fn native_operand_across_pages_goes_through_a_copy() {
    let mut m = Machine::long();
    m.host.native = increment;
    // The second page is mapped elsewhere.
    m.map(0x5_1000, 0x5_3000, P | RW);
    m.poke(0x5_0ff8, 0xffff_ffff_0000_0000);
    m.poke(0x5_3000, 7);
    m.code(|a| a.add(qword_ptr(0x5_0ffc), 1).unwrap());
    m.run(1);
    assert_eq!(m.peek(0x5_0ff8), 0);
    assert_eq!(m.peek(0x5_3000), 8);
    let ptr = m.host.native_runs[0].1.unwrap();
    assert_eq!(ptr % 64, 0xffc % 64);
}

#[test]
fn native_write_is_refused_before_it_runs() {
    let mut m = Machine::long();
    m.map(0x5_0000, 0x5_0000, P);
    m.code(|a| a.add(qword_ptr(0x5_0008), 1).unwrap());
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.stack(1), [3]);
    assert_eq!(m.cpu.cr2, 0x5_0008);
}

#[test]
fn native_faults_become_guest_exceptions() {
    for (fault, expected) in [
        (NativeFault::Divide, vector::DE),
        (NativeFault::X87, vector::MF),
        (NativeFault::Simd, vector::XM),
        (NativeFault::Undefined, vector::UD),
        (NativeFault::Protection, vector::GP),
        (NativeFault::Missing(0), vector::GP),
    ] {
        let mut m = Machine::long();
        m.host.native = match fault {
            NativeFault::Divide => |_, _, _| Err(NativeFault::Divide),
            NativeFault::X87 => |_, _, _| Err(NativeFault::X87),
            NativeFault::Simd => |_, _, _| Err(NativeFault::Simd),
            NativeFault::Undefined => |_, _, _| Err(NativeFault::Undefined),
            NativeFault::Protection => |_, _, _| Err(NativeFault::Protection),
            NativeFault::Missing(_) => |_, _, _| Err(NativeFault::Missing(0)),
        };
        m.code(|a| a.div(rcx).unwrap());
        assert_eq!(m.fault(), expected);
        assert_eq!(
            m.peek(m.cpu.gpr[reg::RSP] + if expected == 13 { 8 } else { 0 }),
            CODE
        );
    }
}

#[test]
fn fpu_gates_follow_the_control_registers() {
    type Emit = fn(&mut CodeAssembler);
    type Case = (&'static str, Emit, fn(&mut CpuState), Option<u8>);
    let x87: Emit = |a| a.fld1().unwrap();
    let sse: Emit = |a| a.addps(xmm0, xmm1).unwrap();
    let avx: Emit = |a| a.vaddps(ymm0, ymm1, ymm2).unwrap();
    let bmi: Emit = |a| a.andn(rax, rcx, rdx).unwrap();
    let wait: Emit = |a| a.wait().unwrap();
    let crc: Emit = |a| a.crc32(eax, ecx).unwrap();
    let plain = |_: &mut CpuState| {};
    let ts = |c: &mut CpuState| c.cr0 |= cr::CR0_TS;
    let ts_mp = |c: &mut CpuState| c.cr0 |= cr::CR0_TS | cr::CR0_MP;
    let em = |c: &mut CpuState| c.cr0 |= cr::CR0_EM;
    let no_fxsr = |c: &mut CpuState| c.cr4 &= !cr::CR4_OSFXSR;
    let no_xsave = |c: &mut CpuState| c.cr4 &= !cr::CR4_OSXSAVE;
    let no_ymm = |c: &mut CpuState| c.xcr0 = 3;
    let cases: [Case; 16] = [
        ("x87", x87, plain, None),
        ("x87 ts", x87, ts, Some(vector::NM)),
        ("x87 em", x87, em, Some(vector::NM)),
        ("sse", sse, plain, None),
        ("sse ts", sse, ts, Some(vector::NM)),
        ("sse em", sse, em, Some(vector::UD)),
        ("sse no fxsr", sse, no_fxsr, Some(vector::UD)),
        ("avx", avx, plain, None),
        ("avx ts", avx, ts, Some(vector::NM)),
        ("avx no xsave", avx, no_xsave, Some(vector::UD)),
        ("avx no ymm", avx, no_ymm, Some(vector::UD)),
        ("bmi", bmi, no_xsave, None),
        ("wait", wait, ts, None),
        ("wait ts mp", wait, ts_mp, Some(vector::NM)),
        ("crc", crc, em, None),
        ("crc ts", crc, ts, None),
    ];
    for (name, emit, change, expected) in cases {
        let mut m = Machine::long();
        m.host.native = |_, _, _| Ok(());
        change(&mut m.cpu);
        m.code(emit);
        match expected {
            Some(v) => assert_eq!(m.fault(), v, "{name}"),
            None => {
                m.run(1);
                assert_eq!(m.host.native_runs.len(), 1, "{name}");
            }
        }
    }
}

#[test]
fn alignment_check_only_in_user_mode_with_both_bits() {
    for (am, ac, user, expected) in [
        (true, true, true, true),
        (false, true, true, false),
        (true, false, true, false),
        (true, true, false, false),
    ] {
        let mut m = if user {
            Machine::user()
        } else {
            Machine::long()
        };
        if am {
            m.cpu.cr0 |= cr::CR0_AM;
        }
        if ac {
            m.cpu.rflags |= rflags::AC;
        }
        m.code(|a| a.mov(eax, dword_ptr(USER + 0x101)).unwrap());
        if expected {
            assert_eq!(m.fault(), vector::AC);
            assert_eq!(m.stack(1), [0]);
        } else {
            m.run(1);
        }
    }
}

#[test]
fn bit_test_with_register_reaches_far_words() {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RAX] = 64 * 3 + 5;
    m.cpu.gpr[reg::RCX] = (-1i64) as u64;
    m.poke(0x5_0ff8, 1 << 63);
    m.code(|a| {
        a.lock().bts(qword_ptr(0x5_1000), rax).unwrap();
        a.btr(qword_ptr(0x5_1000), rcx).unwrap();
        a.bt(dword_ptr(0x5_1018), eax).unwrap();
    });
    m.run(1);
    assert_eq!(m.peek(0x5_1018), 1 << 5);
    assert_eq!(m.cpu.rflags & rflags::CF, 0);
    m.run(1);
    assert_eq!(m.peek(0x5_0ff8), 0);
    assert_ne!(m.cpu.rflags & rflags::CF, 0);
    // 197 bits on from 0x51018 is another word, which is clear.
    m.run(1);
    assert_eq!(m.cpu.rflags & rflags::CF, 0);
}

#[test]
fn push_and_pop_forms() {
    let mut m = Machine::long();
    m.poke(0x5_0000, 0x1111_2222_3333_4444);
    m.code(|a| {
        a.push(qword_ptr(0x5_0000)).unwrap();
        a.push(-2).unwrap();
        a.pop(rax).unwrap();
        a.pop(qword_ptr(rsp)).unwrap();
    });
    m.run(3);
    assert_eq!(m.cpu.gpr[reg::RAX], (-2i64) as u64);
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK - 8);
    // POP [RSP] addresses with the value after the pop.
    m.run(1);
    assert_eq!(m.peek(KERNEL_STACK), 0x1111_2222_3333_4444);
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK);
}

#[test]
fn faulting_pop_to_memory_restores_the_stack_pointer() {
    let mut m = Machine::user();
    m.code(|a| a.pop(qword_ptr(HOLE)).unwrap());
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.stack(5)[4], USER_STACK);
}

#[test]
fn enter_with_nesting_copies_frame_pointers() {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RBP] = 0x5_0100;
    m.poke(0x5_00f8, 0xaa);
    m.code(|a| {
        a.enter(0x20, 2).unwrap();
        a.leave().unwrap();
    });
    m.run(1);
    assert_eq!(m.cpu.gpr[reg::RBP], KERNEL_STACK - 8);
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK - 24 - 0x20);
    assert_eq!(m.peek(KERNEL_STACK - 8), 0x5_0100);
    assert_eq!(m.peek(KERNEL_STACK - 16), 0xaa);
    assert_eq!(m.peek(KERNEL_STACK - 24), KERNEL_STACK - 8);
    m.run(1);
    assert_eq!(m.cpu.gpr[reg::RBP], 0x5_0100);
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK);
}

#[test]
fn popf_obeys_privilege() {
    let all = rflags::IF | rflags::IOPL | rflags::AC | rflags::ID | rflags::CF | rflags::RF;
    for (user, changed) in [
        (false, all & !rflags::RF),
        (true, rflags::AC | rflags::ID | rflags::CF),
    ] {
        let mut m = if user {
            Machine::user()
        } else {
            Machine::long()
        };
        m.cpu.rflags = rflags::FIXED;
        let top = m.cpu.gpr[reg::RSP] - 8;
        m.cpu.gpr[reg::RSP] = top;
        m.poke(top, all);
        m.code(|a| a.popfq().unwrap());
        m.run(1);
        assert_eq!(m.cpu.rflags, changed | rflags::FIXED);
    }
}

#[test]
fn segment_loads_check_the_descriptor() {
    for (selector, expected) in [
        (KERNEL_DS, Ok(())),
        (USER_DS, Ok(())),
        (0, Ok(())),
        (3, Ok(())),
        (KERNEL_DS | 3, Err((vector::GP, 0x10))),
        (TSS_SEL, Err((vector::GP, 0x38))),
        (0x60, Err((vector::GP, 0x60))),
        (NOT_PRESENT_DS, Err((vector::NP, 0x48))),
        (READ_ONLY_DS, Ok(())),
    ] {
        let mut m = Machine::long();
        m.cpu.gpr[reg::RAX] = selector.into();
        m.code(|a| a.mov(ds, eax).unwrap());
        match expected {
            Ok(()) => {
                m.run(1);
                assert_eq!(m.cpu.seg[seg::DS].selector, selector);
            }
            Err((v, code)) => {
                assert_eq!(m.fault(), v, "{selector:#x}");
                assert_eq!(m.stack(1), [code]);
                assert_eq!(m.cpu.seg[seg::DS].selector, KERNEL_DS);
            }
        }
    }
    for (selector, v) in [
        (USER_DS, vector::GP),
        (READ_ONLY_DS, vector::GP),
        (3, vector::GP),
    ] {
        let mut m = Machine::long();
        m.cpu.gpr[reg::RAX] = selector.into();
        m.code(|a| a.mov(ss, eax).unwrap());
        assert_eq!(m.fault(), v, "{selector:#x}");
    }
}

#[test]
fn mov_ss_shadows_the_next_instruction() {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RAX] = KERNEL_DS.into();
    m.code(|a| {
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
    });
    m.run(1);
    assert!(m.cpu.interrupt_shadow);
    m.run(1);
    assert!(!m.cpu.interrupt_shadow);
}

#[test]
fn mov_ss_after_mov_ss_has_no_shadow() {
    let mut m = Machine::user();
    m.cpu.gpr[reg::RAX] = USER_DS.into();
    m.code(|a| {
        for _ in 0..3 {
            a.mov(ss, eax).unwrap();
        }
    });
    let mut shadows = || {
        m.run(1);
        m.cpu.interrupt_shadow
    };
    assert_eq!([shadows(), shadows(), shadows()], [true, false, true]);
}

#[test]
fn segment_limits_hold_in_protected_mode() {
    let mut m = Machine::protected();
    m.cpu.seg[seg::DS].limit = 0xfff;
    m.code(|a| a.mov(eax, dword_ptr(0xffd)).unwrap());
    assert_eq!(m.fault(), vector::GP);
    let mut m = Machine::protected();
    m.cpu.seg[seg::DS].limit = 0xfff;
    m.code(|a| a.mov(eax, dword_ptr(0xffc)).unwrap());
    m.run(1);
    // Expand-down: valid offsets lie above the limit.
    let mut m = Machine::protected();
    m.cpu.seg[seg::DS] = Segment {
        limit: 0xfff,
        ..flat(KERNEL_DS, 0xc097)
    };
    m.code(|a| a.mov(eax, dword_ptr(0x1000)).unwrap());
    m.run(1);
    m.code(|a| a.mov(eax, dword_ptr(0xffe)).unwrap());
    assert_eq!(m.fault(), vector::GP);
}

#[test]
fn masked_moves_ignore_pages_of_masked_lanes() {
    let mut m = Machine::user();
    let xmm = |n: usize| 160 + 16 * n;
    // Lanes 0 and 1 chosen; 2 and 3 lie in the hole.
    for lane in 0..2 {
        m.cpu.xsave.0[xmm(1) + 4 * lane + 3] = 0x80;
    }
    m.poke(HOLE - 8, 0x2222_2222_1111_1111);
    m.code(|a| {
        a.vpmaskmovd(xmm0, xmm1, xmmword_ptr(HOLE - 8)).unwrap();
        a.vpmaskmovd(xmmword_ptr(HOLE - 16), xmm1, xmm0).unwrap();
        a.vpmaskmovd(xmm0, xmm1, xmmword_ptr(HOLE - 4)).unwrap();
    });
    m.run(2);
    let mut want = [0; 16];
    want[..8].copy_from_slice(&0x2222_2222_1111_1111u64.to_le_bytes());
    assert_eq!(m.cpu.xsave.0[xmm(0)..xmm(0) + 16], want);
    assert_eq!(m.peek(HOLE - 16), 0x2222_2222_1111_1111);
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.cpu.cr2, HOLE);
}

#[test]
fn gather_keeps_finished_elements_after_a_fault() {
    let mut m = Machine::user();
    let xmm = |n: usize| 160 + 16 * n;
    m.cpu.xsave.0[xmm(2)..xmm(2) + 16].fill(0xff);
    for (lane, index) in [0u32, 2, (HOLE - USER) as u32 / 4, 1]
        .into_iter()
        .enumerate()
    {
        m.cpu.xsave.0[xmm(1) + 4 * lane..][..4].copy_from_slice(&index.to_le_bytes());
    }
    m.cpu.gpr[reg::RAX] = USER;
    // vpgatherdd xmm0, [rax + xmm1*4], xmm2
    m.raw(&[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x88]);
    let first = m.peek(USER) as u32;
    let third = m.peek(USER + 8) as u32;
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.cpu.cr2, HOLE);
    let lane = |m: &Machine, r: usize, k: usize| {
        let at = xmm(r) + 4 * k;
        u32::from_le_bytes(m.cpu.xsave.0[at..at + 4].try_into().unwrap())
    };
    assert_eq!((lane(&m, 0, 0), lane(&m, 0, 1)), (first, third));
    assert_eq!(
        (0..4).map(|k| lane(&m, 2, k)).collect::<Vec<_>>(),
        [0, 0, u32::MAX, u32::MAX]
    );
}
