//! String instructions.

use super::*;

const FROM: u64 = 0x50_0000;
const TO: u64 = 0x51_0000;

fn machine(count: u64) -> Machine {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RSI] = FROM;
    m.cpu.gpr[reg::RDI] = TO;
    m.cpu.gpr[reg::RCX] = count;
    m
}

fn run(m: &mut Machine) {
    let start = m.cpu.rip;
    while m.cpu.rip == start {
        m.ok();
    }
}

fn pattern(m: &mut Machine, at: u64, len: usize) -> Vec<u8> {
    let b: Vec<u8> = (0..len).map(|k| (k * 7 + 3) as u8).collect();
    m.host.memory.write(Gpa(at), &b).unwrap();
    b
}

#[test]
fn rep_movs_copies_across_pages() {
    for (offset, len) in [(0, 10_000), (5, 4091), (4095, 2), (1, 0)] {
        let mut m = machine(len);
        let want = pattern(&mut m, FROM + offset, len as usize);
        m.cpu.gpr[reg::RSI] += offset;
        m.cpu.gpr[reg::RDI] += 3;
        m.code(|a| a.rep().movsb().unwrap());
        run(&mut m);
        assert_eq!(m.bytes(TO + 3, len as usize), want);
        assert_eq!(
            (
                m.cpu.gpr[reg::RSI],
                m.cpu.gpr[reg::RDI],
                m.cpu.gpr[reg::RCX]
            ),
            (FROM + offset + len, TO + 3 + len, 0)
        );
    }
}

#[test]
fn rep_movs_overlapping_replicates_like_hardware() {
    let mut m = machine(100);
    pattern(&mut m, FROM, 3);
    m.cpu.gpr[reg::RDI] = FROM + 3;
    m.code(|a| a.rep().movsb().unwrap());
    run(&mut m);
    let b = m.bytes(FROM, 103);
    assert!((3..103).all(|k| b[k] == b[k - 3]));
}

#[test]
fn rep_movs_backwards() {
    let mut m = machine(700);
    let want = pattern(&mut m, FROM, 5600);
    m.cpu.rflags |= rflags::DF;
    m.cpu.gpr[reg::RSI] = FROM + 5592;
    m.cpu.gpr[reg::RDI] = TO + 5592;
    m.code(|a| a.rep().movsq().unwrap());
    run(&mut m);
    assert_eq!(m.bytes(TO, 5600), want);
    assert_eq!(m.cpu.gpr[reg::RSI], FROM.wrapping_sub(8));
}

#[test]
fn rep_movs_stops_at_the_faulting_element() {
    // The target runs into the hole 1,000 bytes on.
    let mut m = machine(300);
    let want = pattern(&mut m, FROM, 2400);
    m.cpu.gpr[reg::RDI] = HOLE - 1000;
    m.code(|a| a.rep().movsq().unwrap());
    m.cpu.gpr[reg::RSP] = KERNEL_STACK;
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.cpu.cr2, HOLE);
    assert_eq!(
        (
            m.cpu.gpr[reg::RSI],
            m.cpu.gpr[reg::RDI],
            m.cpu.gpr[reg::RCX]
        ),
        (FROM + 1000, HOLE, 175)
    );
    assert_eq!(m.bytes(HOLE - 1000, 1000), want[..1000]);
    assert_eq!(m.stack(2), [2, CODE]);
}

#[test]
fn rep_movs_element_across_the_fault_writes_nothing_of_it() {
    let mut m = machine(2);
    pattern(&mut m, FROM, 16);
    m.cpu.gpr[reg::RDI] = HOLE - 12;
    m.code(|a| a.rep().movsq().unwrap());
    assert_eq!(m.fault(), vector::PF);
    assert_eq!(m.cpu.cr2, HOLE);
    assert_eq!((m.cpu.gpr[reg::RDI], m.cpu.gpr[reg::RCX]), (HOLE - 4, 1));
    assert_eq!(m.bytes(HOLE - 4, 4), [0; 4]);
}

#[test]
fn rep_stos_is_bounded_per_step() {
    let mut m = machine(0x2_0000);
    m.cpu.gpr[reg::RAX] = 0x1122_3344_5566_7788;
    m.cpu.gpr[reg::RDI] = 0x50_0000;
    m.cpu.gpr[reg::RCX] = 0x4000;
    m.code(|a| a.rep().stosq().unwrap());
    m.ok();
    assert_eq!(m.cpu.rip, CODE);
    assert_eq!(m.cpu.gpr[reg::RCX], 0x2000);
    m.ok();
    m.ok();
    assert_eq!((m.cpu.rip > CODE, m.cpu.gpr[reg::RCX]), (true, 0));
    assert_eq!(m.peek(0x51_fff8), 0x1122_3344_5566_7788);
    assert_eq!(m.peek(0x52_0000), 0);
}

#[test]
fn repe_cmps_and_repne_scas_stop_at_the_element() {
    let mut m = machine(5000);
    pattern(&mut m, FROM, 5000);
    pattern(&mut m, TO, 5000);
    m.host.memory.write(Gpa(TO + 4500), &[0xee]).unwrap();
    m.code(|a| a.repe().cmpsb().unwrap());
    run(&mut m);
    assert_eq!((m.cpu.gpr[reg::RDI], m.cpu.gpr[reg::RCX]), (TO + 4501, 499));
    assert_eq!(m.cpu.rflags & rflags::ZF, 0);

    let mut m = machine(u64::MAX);
    m.host.memory.write(Gpa(TO), &[1; 9000]).unwrap();
    m.host.memory.write(Gpa(TO + 9000), &[0]).unwrap();
    m.cpu.gpr[reg::RAX] = 0;
    m.code(|a| a.repne().scasb().unwrap());
    run(&mut m);
    assert_eq!(m.cpu.gpr[reg::RDI], TO + 9001);
    assert_eq!(!m.cpu.gpr[reg::RCX], 9001);
    assert_ne!(m.cpu.rflags & rflags::ZF, 0);
}

#[test]
fn stepping_takes_one_iteration_at_a_time() {
    let mut m = machine(3);
    m.cpu.rflags |= rflags::TF;
    m.code(|a| a.rep().stosb().unwrap());
    assert_eq!(m.fault(), vector::DB);
    assert_eq!(m.cpu.gpr[reg::RCX], 2);
    assert_eq!(m.stack(1), [CODE]);
}

#[test]
fn lods_and_address_size_override() {
    let mut m = machine(0);
    m.poke(FROM, 0x8877_6655_4433_2211);
    m.cpu.gpr[reg::RSI] = 0xffff_ffff_0000_0000 | FROM;
    // 67h: ESI.
    m.raw(&[0x67, 0xac]);
    m.run(1);
    assert_eq!(m.cpu.gpr[reg::RAX] & 0xff, 0x11);
    assert_eq!(m.cpu.gpr[reg::RSI], FROM + 1);
}

proptest::proptest! {
    #[test]
    fn sub_flags_agree_with_the_host(a: u64, b: u64) {
        let host: u64;
        // SAFETY: compares two registers and reads the flags through the stack.
        unsafe {
            std::arch::asm!("cmp {a}, {b}", "pushfq", "pop {f}", a = in(reg) a, b = in(reg) b, f = lateout(reg) host);
        }
        proptest::prop_assert_eq!(super::super::string::sub_flags(a, b, 8), host & rflags::STATUS);
        let host8: u64;
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("cmp {a}, {b}", "pushfq", "pop {f}", a = in(reg_byte) a as u8, b = in(reg_byte) b as u8, f = lateout(reg) host8);
        }
        proptest::prop_assert_eq!(super::super::string::sub_flags(a, b, 1), host8 & rflags::STATUS);
    }
}
