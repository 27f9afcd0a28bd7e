//! What translated code does of a kernel's work without the monitor, page walks and IRET, held against the instruction semantics.
//!
//! The same guest runs translated and one instruction at a time, on page tables and return frames of all kinds, and must come to the same registers and the same
//! memory, accessed and dirty bits among it.

use hospes_difftest::kernel::*;
use hospes_difftest::rng::Rng;
use hospes_engine::{Activity, CpuState, Exit, Segment, cr, reg, rflags, seg};
use hospes_engine_bt::Execution;
use hospes_units::Gpa;
use iced_x86::code_asm::*;

const CASES: u64 = 150;

/// Where anything may be written, with its length.
const USED: [(u64, u64); 4] = [
    (0, 0x1_0000),
    (ROOT, 0x4_0000),
    (DATA, DATA_BYTES),
    (HIGH + DATA, DATA_BYTES),
];

/// Runs to the first hypercall or the end of all; gives which, the registers and memory.
fn run(
    machine: Machine,
    execution: Execution,
    interrupt: bool,
    set: impl FnOnce(&mut CpuState),
) -> (Exit, CpuState, Vec<u8>) {
    let mut started = machine.start(execution, set);
    if interrupt {
        started.vcpu.control().set_callback_line(Some(31));
    }
    let exit = started.vcpu.run().unwrap();
    assert_ne!(exit, Exit::Kicked);
    let mut bytes = Vec::new();
    for (start, len) in USED {
        let mut piece = vec![0; len as usize];
        started.memory.read(Gpa(start), &mut piece).unwrap();
        bytes.append(&mut piece);
    }
    (exit, started.vcpu.state().clone(), bytes)
}

/// Runs the same guest in both ways, `make` being called for each, and compares it all; of the flags those given.
fn compare(
    what: &str,
    (interrupt, flags): (bool, u64),
    make: impl Fn() -> Machine + Sync,
    set: impl Fn(&mut CpuState) + Sync,
) -> CpuState {
    // A vCPU belongs to the thread that runs it, and its x87 state stays with that.
    let run = |execution| {
        std::thread::scope(|s| {
            s.spawn(|| run(make(), execution, interrupt, &set))
                .join()
                .unwrap()
        })
    };
    let (ended, single, memory) = run(Execution::Single);
    let (other_end, translated, other) = run(Execution::Translated);
    assert_eq!(ended, other_end, "{what}");
    assert_eq!(single.gpr.map(Hex), translated.gpr.map(Hex), "{what}");
    assert_eq!(Hex(single.rip), Hex(translated.rip), "{what}");
    let flags = |cpu: &CpuState| Hex(cpu.rflags & flags);
    assert_eq!(flags(&single), flags(&translated), "{what}");
    assert_eq!(Hex(single.cr2), Hex(translated.cr2), "{what}");
    assert_eq!(single.seg, translated.seg, "{what}");
    assert_eq!(single.nmi_blocked, translated.nmi_blocked, "{what}");
    let (mine, _) = memory.as_chunks::<8>();
    let (others, _) = other.as_chunks::<8>();
    for (n, (a, b)) in mine.iter().zip(others).enumerate() {
        let word = |w: &[u8; 8]| Hex(u64::from_le_bytes(*w));
        assert_eq!(word(a), word(b), "{what}, word {n:#x}");
    }
    single
}

#[derive(PartialEq, Eq)]
struct Hex(u64);

impl std::fmt::Debug for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// What the script's lines do: RSI is the next line, RDI the end of the log.
fn accesses(m: &Machine) {
    m.code(CODE, |a| {
        let mut next = a.create_label();
        let (mut write, mut both, mut end) = (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut next).unwrap();
        a.mov(rax, qword_ptr(rsi)).unwrap();
        a.mov(rbx, qword_ptr(rsi + 8)).unwrap();
        a.add(rsi, 16).unwrap();
        a.cmp(rbx, 1).unwrap();
        a.je(write).unwrap();
        a.cmp(rbx, 2).unwrap();
        a.ja(both).unwrap();
        a.je(end).unwrap();
        a.mov(rdx, 0x77u64).unwrap();
        a.mov(rdx, qword_ptr(rax)).unwrap();
        a.mov(qword_ptr(rdi), rdx).unwrap();
        a.add(rdi, 8).unwrap();
        a.jmp(next).unwrap();
        a.set_label(&mut write).unwrap();
        a.mov(qword_ptr(rax), rsi).unwrap();
        a.jmp(next).unwrap();
        // From the one address to the other: two checks of one instruction.
        a.set_label(&mut both).unwrap();
        a.mov(r8, rsi).unwrap();
        a.mov(r9, rdi).unwrap();
        a.mov(rsi, rax).unwrap();
        a.mov(rdi, rbx).unwrap();
        a.movsq().unwrap();
        a.nop().unwrap();
        a.mov(rsi, r8).unwrap();
        a.mov(rdi, r9).unwrap();
        a.jmp(next).unwrap();
        a.set_label(&mut end).unwrap();
        a.vmcall().unwrap();
    });
}

/// An entry that maps something or refers to the next table, mostly as a kernel would write it.
fn entry(rng: &mut Rng, target: u64, kernel: bool) -> u64 {
    let mut e = target | P | W | A | if kernel { 0 } else { U };
    for (bit, rare) in [(P, 24), (W, 8), (A, 12), (U, 12), (XD, 6), (1 << 46, 40)] {
        if rng.one_in(rare) {
            e ^= bit;
        }
    }
    e
}

fn leaf(rng: &mut Rng, target: u64, kernel: bool) -> u64 {
    let mut e = entry(rng, target, kernel);
    e |= if rng.one_in(3) { 0 } else { D };
    e | if rng.one_in(4) { G } else { 0 }
}

/// Writes the tables behind slots 8 to 15 of the root; each has a few pages.
fn tables(m: &Machine, rng: &mut Rng, kernel: bool) -> Vec<u64> {
    let mut addresses = Vec::new();
    for slot in 8..16u64 {
        let table = ROOT + 0x1_0000 + (slot - 8) * 0x3000;
        let place = |rng: &mut Rng| if rng.one_in(4) { HIGH } else { 0 };
        m.put(ROOT + 8 * slot, &[entry(rng, table, kernel)]);
        let kind = rng.below(8);
        let mut next = table + 0x1000;
        if rng.one_in(12) {
            // Not memory.
            next = 0x9000_0000;
        }
        if kind == 0 {
            let at = place(rng) | if rng.one_in(4) { 1 << 20 } else { 0 };
            m.put(table, &[leaf(rng, at, kernel) | PS]);
        } else {
            m.put(table, &[entry(rng, next, kernel)]);
        }
        if kind == 1 {
            let low = if rng.one_in(4) { 1 << 14 } else { 0 };
            let at = (place(rng) + DATA) | low;
            m.put(table + 0x1008, &[leaf(rng, at, kernel) | PS]);
        } else {
            m.put(table + 0x1008, &[entry(rng, table + 0x2000, kernel)]);
        }
        for page in 0..4u64 {
            let offset = DATA + rng.below(DATA_BYTES >> 12) * 0x1000;
            let at = if rng.one_in(10) {
                0x8000_0000
            } else {
                place(rng) + offset
            };
            m.put(table + 0x2000 + 8 * page, &[leaf(rng, at, kernel)]);
            addresses.push(slot << 39 | 1 << 21 | page << 12);
        }
    }
    addresses
}

#[test]
fn accesses_through_tables_of_all_kinds_match() {
    for seed in 0..CASES {
        let kernel = seed % 2 == 0;
        let smap = seed % 3 != 0;
        let alias = if kernel { 0 } else { USER };
        let make = || {
            let mut rng = Rng::new(seed);
            let m = Machine::new();
            accesses(&m);
            for n in 0..DATA_BYTES / 8 / 64 {
                m.put(DATA + 512 * n, &[rng.bits()]);
                m.put(HIGH + DATA + 512 * n, &[rng.bits()]);
            }
            let pages = tables(&m, &mut rng, kernel);
            let address = |rng: &mut Rng| {
                let offset = if rng.one_in(8) {
                    0xffc
                } else {
                    8 * rng.below(500)
                };
                let strange = if rng.one_in(40) { 1 << 60 } else { 0 };
                (rng.pick(&pages) + offset) ^ strange
            };
            for n in 0..200 {
                let first = address(&mut rng);
                let second = match rng.below(4) {
                    0 => 0,
                    1 => 1,
                    2 => address(&mut rng) & !(1 << 60),
                    // The same place of the TLB.
                    _ => (first & !(1 << 60)) ^ (3 << 39),
                };
                m.put(SCRIPT + 16 * n, &[first & !(1 << 60), second]);
            }
            m.put(SCRIPT + 16 * 200, &[0, 2]);
            m
        };
        let flags = !(rflags::RF | rflags::STATUS);
        compare(&format!("seed {seed}"), (false, flags), make, |cpu| {
            cpu.rip = CODE + alias;
            cpu.gpr[reg::RSI] = SCRIPT + alias;
            cpu.gpr[reg::RDI] = LOG + alias;
            cpu.gpr[15] = FAULTS;
            if !smap {
                cpu.cr4 &= !cr::CR4_SMAP;
            } else if kernel && seed % 5 == 0 {
                cpu.rflags |= rflags::AC;
            }
            if !kernel {
                to_user(cpu);
            }
        });
    }
}

#[test]
fn iret_with_frames_of_all_kinds_matches() {
    let (mut to_user, mut to_kernel) = (0, 0);
    for seed in 0..4 * CASES {
        let mut rng = Rng::new(seed);
        let user = rng.one_in(2);
        let mut frame = if user {
            let (code, stack) = (u64::from(USER_CS), u64::from(USER_SS));
            [USER + ENTRY, code, 0x202, USER + STACK, stack]
        } else {
            let stack = rng.pick(&[0, u64::from(KERNEL_SS)]);
            [ENTRY, u64::from(KERNEL_CS), 2, STACK - 0x100, stack]
        };
        frame[2] |= rng.bits() & 0x8d5;
        if rng.one_in(3) {
            frame[2] ^= 0x200;
        }
        if rng.one_in(4) {
            frame[2] |= 1 << rng.pick(&[8, 10, 12, 13, 14, 16, 17, 18, 19, 20, 21, 33]);
        }
        if rng.one_in(4) {
            let n = rng.pick(&[0, 1, 3, 4]);
            frame[n] = match (n, rng.below(4)) {
                (0, 0) => 0x8000_0000_0000,
                (0, _) => 0xffff_0000_0000_0000 | rng.bits(),
                (3, _) => rng.value(),
                _ => rng.below(0x48) | rng.pick(&[0, 0, 1 << 16, 1 << 40]),
            };
        }
        let stack = if rng.one_in(6) { 0x6fec } else { 0x6000 } + 8 * rng.below(4);
        let descriptor = (rng.one_in(5), rng.range(1, 5), rng.below(64));
        let data = rng
            .one_in(6)
            .then(|| (rng.pick(&[0, 3, 4, 5]), rng.pick(&[0x93, 0xf3, 0x13])));
        let (limit, gdt) = (rng.pick(&[63, 63, 63, 127, 39]), rng.one_in(10));
        let (nt, blocked, interrupt) = (rng.one_in(12), rng.one_in(8), rng.one_in(3));
        let null = rng.one_in(2);
        let make = || {
            let m = Machine::new();
            m.code(CODE, |a| {
                a.mov(rsp, stack).unwrap();
                // Something for the flags, and all of the table in the TLB.
                a.mov(rax, qword_ptr(GDT + 8)).unwrap();
                a.add(rax, rax).unwrap();
                a.mov(rax, 0x1234u64).unwrap();
                a.iretq().unwrap();
            });
            m.code(HANDLERS + 32 * 14, |a| {
                a.mov(rax, 14u64).unwrap();
                a.vmcall().unwrap();
            });
            m.put(stack, &frame);
            let (change, which, bit) = descriptor;
            if change {
                m.put(GDT + 8 * which, &[DESCRIPTORS[which as usize] ^ 1 << bit]);
            }
            if gdt {
                m.put(0x5fe8, &DESCRIPTORS);
            }
            m
        };
        let end = compare(
            &format!("seed {seed}"),
            (interrupt, !rflags::RF),
            make,
            |cpu| {
                cpu.gdtr.limit = limit;
                if gdt {
                    cpu.gdtr.base = 0x5fe8;
                }
                if nt {
                    cpu.rflags |= rflags::NT;
                }
                cpu.nmi_blocked = blocked;
                if null {
                    cpu.seg[seg::SS] = Segment::default();
                }
                if let Some((n, attr)) = data {
                    cpu.seg[n].attr = attr;
                    cpu.seg[n].selector = 0x1b;
                }
                for (n, r) in cpu.gpr.iter_mut().enumerate() {
                    *r = 0x1111 * n as u64;
                }
            },
        );
        to_user += u32::from(end.rip == USER + ENTRY + 3);
        to_kernel += u32::from(end.rip == ENTRY + 3);
    }
    // Most frames are good ones.
    assert!(to_user > 50 && to_kernel > 50, "{to_user}, {to_kernel}");
}

#[test]
fn interrupt_that_waits_comes_behind_the_instruction_after_sti() {
    // Where STI is the first of a block, the last that fits in one, and the last of its page.
    for (at, before) in [
        (0x5000, 0),
        (0x5000, 1),
        (0x5000, 46),
        (0x5000, 47),
        (0x5ffe, 1),
        (0x5fff, 0),
    ] {
        for behind in [0xf4, 0x90, 0x9d] {
            let make = || {
                let m = Machine::new();
                let mut code = vec![0x90; before];
                code.extend([0xfb, behind, 0x90, 0x0f, 0x01, 0xc1]);
                m.put_bytes(at, &code);
                // What POPF takes: interrupts off again.
                m.put(STACK - 8, &[2]);
                m
            };
            let what = format!("{before} before, {behind:#x} behind");
            compare(&what, (true, !rflags::RF), make, |cpu| {
                cpu.rip = at;
                cpu.gpr[reg::RSP] = STACK - 8;
            });
        }
    }
}

#[test]
fn popf_of_all_images_matches() {
    let mut rng = Rng::new(5);
    for case in 0..CASES {
        // All bits there are, reserved ones too; in most cases those of the lowest byte and OF only.
        let mut image = rng.bits() & 0x3f_ffff;
        if !case.is_multiple_of(3) {
            image &= 0x8ff;
        }
        let (stac, crosses) = (case % 2 == 0, case % 5 == 0);
        let stack = if crosses { STACK - 4 } else { STACK - 8 };
        let make = || {
            let m = Machine::new();
            m.code(CODE, |a| {
                if stac {
                    a.stac().unwrap();
                }
                a.popfq().unwrap();
                a.pushfq().unwrap();
                a.pop(rax).unwrap();
                a.vmcall().unwrap();
            });
            m.put(stack, &[image]);
            m
        };
        let what = format!("{image:#x}, AC {stac}");
        compare(&what, (false, !rflags::RF), make, |cpu| {
            cpu.gpr[reg::RSP] = stack;
        });
    }
}

#[test]
fn time_stamp_counter_closed_to_user_code_stays_closed_behind_sysret() {
    let make = || {
        let m = Machine::new();
        m.code(ENTRY, |a| {
            let (mut close, mut end) = (a.create_label(), a.create_label());
            a.dec(r8).unwrap();
            a.jz(close).unwrap();
            a.cmp(r8, -20).unwrap();
            a.je(end).unwrap();
            a.sysretq().unwrap();
            a.set_label(&mut close).unwrap();
            a.mov(rax, cr4).unwrap();
            a.or(rax, cr::CR4_TSD as i32).unwrap();
            a.mov(cr4, rax).unwrap();
            a.sysretq().unwrap();
            a.set_label(&mut end).unwrap();
            a.vmcall().unwrap();
        });
        m.code_for(0x5000, USER + 0x5000, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            a.rdtsc().unwrap();
            a.xor(eax, eax).unwrap();
            a.xor(edx, edx).unwrap();
            a.syscall().unwrap();
            a.jmp(again).unwrap();
        });
        m
    };
    let end = compare("TSD", (false, !rflags::RF), make, |cpu| {
        to_user(cpu);
        cpu.rip = USER + 0x5000;
        cpu.gpr[8] = 30;
    });
    assert_eq!(end.gpr[reg::RAX], 13);
}

#[test]
fn stack_pointer_into_the_signal_stack_does_no_harm() {
    let m = Machine::new();
    m.code_for(0x5000, USER + 0x5000, |a| {
        a.vmcall().unwrap();
        a.movaps(xmm0, xmmword_ptr(rbx)).unwrap();
    });
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut started = m.start(Execution::Translated, |cpu| {
                to_user(cpu);
                cpu.rip = USER + 0x5000;
            });
            assert_eq!(started.vcpu.run().unwrap(), Exit::Hypercall);
            // SAFETY: all-zero is a valid structure, and the call only fills it.
            let stack = unsafe {
                let mut stack: libc::stack_t = std::mem::zeroed();
                assert_eq!(libc::sigaltstack(std::ptr::null(), &mut stack), 0);
                stack
            };
            let cpu = started.vcpu.state();
            cpu.gpr[reg::RSP] = stack.ss_sp as u64 + 512;
            // Not aligned: a fault of the host's.
            cpu.gpr[reg::RBX] = USER + 0x6008;
            started.vcpu.state_changed();
            assert_eq!(started.vcpu.run().unwrap(), Exit::Hypercall);
            assert_eq!(started.vcpu.state().gpr[reg::RAX], 13);
        });
    });
}

#[test]
fn kick_behind_a_string_instruction_that_faults_arrives() {
    let m = Machine::new();
    m.code(CODE, |a| {
        a.mov(rdi, 0x8000_0000_0000_0000u64).unwrap();
        a.mov(ecx, 8).unwrap();
        a.rep().stosb().unwrap();
    });
    // The handler of #GP: a jump to itself.
    m.put_bytes(HANDLERS + 32 * 13, &[0xeb, 0xfe]);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut started = m.start(Execution::Translated, |_| {});
            let control = started.vcpu.control();
            s.spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(50));
                control.kick();
            });
            assert_eq!(started.vcpu.run().unwrap(), Exit::Kicked);
            assert_eq!(Hex(started.vcpu.state().rip), Hex(HANDLERS + 32 * 13));
        });
    });
}

#[test]
fn halt_by_the_monitor_does_not_sleep_on_an_interrupt_taken_in_before() {
    for execution in [Execution::Single, Execution::Translated] {
        for interrupt in [true, false] {
            let m = Machine::new();
            m.code(CODE, |a| {
                for (register, value) in [(0x80f, 0x1ffu64), (0x83f, 31)] {
                    if register == 0x80f || interrupt {
                        a.mov(ecx, register).unwrap();
                        a.mov(rax, value).unwrap();
                        a.xor(edx, edx).unwrap();
                        a.wrmsr().unwrap();
                    }
                }
                a.mov(rax, 1u64).unwrap();
                a.vmcall().unwrap();
            });
            std::thread::scope(|s| {
                s.spawn(|| {
                    let mut guest = m.start(execution, |cpu| {
                        cpu.gpr[reg::RSP] = STACK;
                        cpu.rip = CODE;
                        cpu.msr.apic_base = 0xfee0_0d00;
                    });
                    let vcpu = &mut guest.vcpu;
                    assert_eq!(vcpu.run().unwrap(), Exit::Hypercall);
                    assert_eq!(vcpu.state().gpr[reg::RAX], 1);
                    assert!(!vcpu.control().has_wakeup(true));
                    vcpu.state().rflags |= rflags::IF;
                    vcpu.state().activity = Activity::Halted;
                    vcpu.state_changed();
                    let exit = vcpu.run().unwrap();
                    if interrupt {
                        assert_eq!(exit, Exit::Hypercall);
                        assert_eq!(vcpu.state().gpr[reg::RAX], 31);
                        assert_eq!(vcpu.state().activity, Activity::Running);
                    } else {
                        assert_eq!(
                            exit,
                            Exit::Halt {
                                interrupts_enabled: true
                            }
                        );
                    }
                });
            });
        }
    }
}
