//! The kernel window: what a kernel accesses in its linear mapping of all memory is what its tables say, whatever is done to them, to its code and to its frames meanwhile.
//!
//! Each program runs one instruction at a time as well, which knows no window, and both have to come to the same.

mod stacks;

use std::sync::mpsc::channel;

use hospes_difftest::kernel::*;
use hospes_difftest::rng::Rng;
use hospes_engine::{CpuState, Exit, Vcpu, Vm, reg, seg};
use hospes_engine_bt::{Execution, can_have_kernel_window};
use hospes_units::{Gfn, Gpa, PAGE_SIZE};
use iced_x86::code_asm::*;

/// Where all memory is mapped.
const LINEAR: u64 = 0xffff_8880_0000_0000;
const SLOT: u64 = LINEAR >> 39 & 511;
/// Addresses that have the same places in the window.
const RIVAL: u64 = LINEAR ^ 1 << 46;
const RIVAL_SLOT: u64 = RIVAL >> 39 & 511;

const TABLES: u64 = ROOT + 0x8000;
const OTHER_ROOT: u64 = ROOT + 0x1_0000;
const OTHER_TABLES: u64 = ROOT + 0x1_8000;
const RIVAL_TABLES: u64 = ROOT + 0x2_0000;
/// A page of the linear mapping, and one that replaces it; their words.
const PAGE: u64 = DATA + 0x5000;
const REPLACED: u64 = DATA + 0x9000;
const OLD: u64 = 0x1111;
const NEW: u64 = 0x2222;
/// Functions in frames of their own: one that is written, and those by which programs load and store, always by the same instruction.
const FUNCTION: u64 = 0xe000;
const LOADER: u64 = 0xd000;
const STORER: u64 = 0xd100;
/// Where a vCPU begins that has tables of its own.
const OTHER_CODE: u64 = 0xd200;

type Program = fn(&mut CodeAssembler);

fn entry_of(tables: u64, gpa: u64) -> u64 {
    tables + 0x2000 + 8 * ((gpa - DATA) >> 12)
}

/// Tables that map all of the first memory: 2 MiB as a large page, the rest as small ones.
fn map(m: &Machine, root: u64, slot: u64, tables: u64) {
    m.put(root + 8 * slot, &[tables + (P | W | A)]);
    m.put(tables, &[tables + 0x1000 + (P | W | A)]);
    let small = tables + 0x2000 + (P | W | A);
    m.put(tables + 0x1000, &[P | W | A | D | PS | G, small]);
    for gpa in (DATA..DATA + DATA_BYTES).step_by(0x1000) {
        m.put(entry_of(tables, gpa), &[gpa | P | W | A | D | G]);
    }
}

/// Another root, in which the page is the one that replaces it.
fn make_other_root(m: &Machine) {
    map(m, OTHER_ROOT, SLOT, OTHER_TABLES);
    m.put(
        entry_of(OTHER_TABLES, PAGE),
        &[REPLACED | P | W | A | D | G],
    );
    m.put(OTHER_ROOT, &[ROOT + 0x1000 + (P | W | A)]);
}

fn machine(program: Program) -> Machine {
    let m = Machine::new();
    map(&m, ROOT, SLOT, TABLES);
    m.put(PAGE, &[OLD]);
    m.put(REPLACED, &[NEW]);
    m.code(LOADER, |a| {
        a.mov(rcx, qword_ptr(rdi)).unwrap();
        a.ret().unwrap();
    });
    m.code(STORER, |a| {
        a.mov(qword_ptr(rdi), rbx).unwrap();
        a.ret().unwrap();
    });
    m.code(CODE, |a| {
        show(a);
        load(a);
        a.vmcall().unwrap();
        program(a);
        a.vmcall().unwrap();
    });
    m
}

/// Accesses both extents, by registers that are known before the code is translated.
fn show(a: &mut CodeAssembler) {
    let mut next = a.create_label();
    a.mov(rbx, LINEAR).unwrap();
    a.mov(rsi, LINEAR + DATA).unwrap();
    a.xor(eax, eax).unwrap();
    a.jmp(next).unwrap();
    a.set_label(&mut next).unwrap();
    a.add(rax, qword_ptr(rbx + 0x6000)).unwrap();
    a.add(rax, qword_ptr(rsi + 0x1000)).unwrap();
    a.mov(rdi, LINEAR + PAGE).unwrap();
}

/// Whether the window shows something, or the processor is none for it.
fn is_open(s: &Started) -> bool {
    s.vm.kernel_window_bytes() > 0 || !can_have_kernel_window()
}

/// What a program comes to.
#[derive(Debug, PartialEq)]
struct Result {
    gpr: [u64; 16],
    /// Words that are not zero, by address.
    data: Vec<(u64, u64)>,
    faults: [u64; 4],
}

fn run_to_vmcall(s: &mut Started) {
    assert_eq!(s.vcpu.run().unwrap(), Exit::Hypercall);
}

fn result(s: &mut Started) -> Result {
    let word = |gpa| s.memory.read_obj::<u64>(Gpa(gpa)).unwrap();
    let words = (DATA..DATA + DATA_BYTES).step_by(8);
    let data = words.map(|gpa| (gpa, word(gpa))).filter(|w| w.1 != 0);
    let data = data.collect();
    Result {
        gpr: s.vcpu.state().gpr,
        data,
        faults: [0, 1, 2, 3].map(|n| word(FAULTS + 8 * n)),
    }
}

/// The GS base is in the middle of what is shown.
fn begin(cpu: &mut CpuState) {
    cpu.gpr[15] = FAULTS;
    cpu.seg[seg::GS].base = LINEAR + DATA + 0x2_0000;
}

/// Runs a program in both ways, on what `machine` makes and with `between` done at each of its stops, of which the window is open at the first.
fn both_with(
    machine: impl Fn() -> Machine + Sync,
    stops: usize,
    between: impl Fn(&Started) + Sync,
) -> Result {
    let run = |execution| {
        on_its_own(|| {
            let mut started = machine().start(execution, begin);
            for stop in 0..stops {
                run_to_vmcall(&mut started);
                if stop == 0 && execution == Execution::Translated {
                    assert!(is_open(&started), "nothing was shown");
                }
                if stop + 1 < stops {
                    between(&started);
                }
            }
            result(&mut started)
        })
    };
    let single = run(Execution::Single);
    assert_eq!(run(Execution::Translated), single);
    single
}

fn both(program: Program) -> Result {
    both_with(|| machine(program), 2, |_| {})
}

/// Loads the word at RDI, first the page's, into RCX.
fn load(a: &mut CodeAssembler) {
    a.call(LOADER).unwrap();
}

/// Stores RBX there.
fn store(a: &mut CodeAssembler) {
    a.call(STORER).unwrap();
}

fn set_entry(a: &mut CodeAssembler, tables: u64, value: u64) {
    a.mov(rdx, value).unwrap();
    a.mov(qword_ptr(entry_of(tables, PAGE)), rdx).unwrap();
}

#[test]
fn every_form_of_access_reaches_its_bytes() {
    let result = both(|a| {
        let mut again = a.create_label();
        a.mov(r8d, 40).unwrap();
        a.mov(r9, LINEAR + DATA + 0x100).unwrap();
        a.set_label(&mut again).unwrap();
        // A group, with flags that live through it; an index; a constant; atomic, vector and far displacements; across pages.
        a.add(qword_ptr(r9), 3).unwrap();
        a.adc(qword_ptr(r9 + 8), r8).unwrap();
        a.adc(rax, qword_ptr(r9 + 16)).unwrap();
        a.mov(qword_ptr(r9 + r8 * 8 + 32), rax).unwrap();
        a.mov(rax, qword_ptr(LINEAR + DATA + 0x2000)).unwrap();
        a.lock().xadd(dword_ptr(r9 + 4), eax).unwrap();
        a.movups(xmm1, ptr(r9 - 16)).unwrap();
        a.movups(ptr(r9 + 0x7ff8), xmm1).unwrap();
        a.mov(word_ptr(r9 + 0xeff), r8w).unwrap();
        a.lea(r10, r9 - 0x1234_5678).unwrap();
        a.add(dword_ptr(r10 + 0x1234_5678), 7).unwrap();
        a.cmp(qword_ptr(r9), 100).unwrap();
        a.sbb(qword_ptr(r9 + 24), -1).unwrap();
        a.mov(r11, rsp).unwrap();
        a.push(qword_ptr(r9 + 8)).unwrap();
        a.pop(qword_ptr(r9 + 0x3000)).unwrap();
        a.mov(rsp, r11).unwrap();
        a.add(r9, 0x218).unwrap();
        a.dec(r8d).unwrap();
        a.jnz(again).unwrap();
    });
    assert!(result.data.len() > 100, "{result:x?}");
}

#[test]
fn stack_pointer_is_added_to_a_segments_base() {
    let result = both(|a| {
        // From here on nobody knows that it points to a stack.
        a.and(rsp, -64).unwrap();
        a.mov(qword_ptr(rsp + 0x40).gs(), rsp).unwrap();
        a.mov(rax, qword_ptr(rsp + 0x40).gs()).unwrap();
    });
    let stored = (DATA + 0x2_0000 + STACK + 0x40, STACK);
    assert!(result.data.contains(&stored), "{result:x?}");
}

/// An instruction, with its operand where registers of [`random`] point, or one that makes or reads flags.
fn emit_any(a: &mut CodeAssembler, rng: &mut Rng) {
    let value = rng.pick(&[rax, rdx, rbp]);
    let base = rng.pick(&[r8, r9, r10, r11]);
    let disp = rng.pick(&[0, 8, 0x40, -8, 0x1008, -0x3f8, 0x7ffc]);
    let place = match rng.below(8) {
        0..=3 => qword_ptr(base + disp),
        4 => qword_ptr(base + rcx * 8 + disp),
        // A pointer that the translator knows nothing of.
        5 => {
            a.mov(r12, qword_ptr(r13 + 8 * rng.below(8) as i32))
                .unwrap();
            qword_ptr(r12 + disp)
        }
        6 => qword_ptr(rcx * 8 + disp).gs(),
        _ => qword_ptr(r14 + (0x12_3456 + disp)).gs(),
    };
    match rng.below(16) {
        0 => a.mov(value, place),
        1 => a.mov(place, value),
        2 => a.add(place, value),
        3 => a.adc(value, place),
        4 => a.sbb(place, value),
        5 => a.cmp(place, value),
        6 => a.xadd(place, value),
        7 => a.lock().xor(place, 0x55),
        8 => a.inc(place),
        9 => a.push(place).and_then(|()| a.pop(value)),
        10 => a.cmovc(value, place),
        11 => a.cmp(value, rng.bits() as i32),
        12 => a.adc(value, rcx),
        13 => a.rcl(value, 1),
        14 => a.setg(byte_ptr(base + disp)),
        _ => a.lea(value, ptr(value + value)),
    }
    .unwrap();
}

/// A loop of random instructions. Each block is entered with pointers to other pages than the time before.
fn random(seed: u64) -> Machine {
    let mut rng = Rng::new(seed);
    let m = machine(|_| {});
    for n in 0..8 {
        let at = DATA + 0x8000 + 8 * rng.below(0x2000);
        m.put(DATA + 0x3_8000 + 8 * n, &[LINEAR + at]);
    }
    m.code(CODE, |a| {
        let mut again = a.create_label();
        show(a);
        load(a);
        a.vmcall().unwrap();
        a.mov(rbx, 3u64).unwrap();
        a.mov(r13, LINEAR + DATA + 0x3_8000).unwrap();
        a.mov(r14, -0x12_3456i64).unwrap();
        a.mov(rdx, rng.bits()).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(ecx, rng.below(8) as u32).unwrap();
        for base in [r8, r9, r10, r11] {
            let at = DATA + 0x8000 + rng.below(0x1_0000);
            a.imul_3(base, rbx, 0x1010).unwrap();
            a.mov(rsi, LINEAR + at).unwrap();
            a.add(base, rsi).unwrap();
        }
        for _ in 0..30 {
            emit_any(a, &mut rng);
        }
        a.pushfq().unwrap();
        a.pop(rsi).unwrap();
        a.and(esi, 0xcd5).unwrap();
        a.add(qword_ptr(r13 + 0x100), rsi).unwrap();
        a.dec(rbx).unwrap();
        a.jnz(again).unwrap();
        a.vmcall().unwrap();
    });
    m
}

#[test]
fn random_blocks_come_to_the_same() {
    for seed in 0..300 {
        both_with(|| random(seed), 2, |_| {});
    }
}

#[test]
fn page_that_is_replaced_is_seen() {
    let changes: [Program; 2] = [
        |a| {
            load(a);
            set_entry(a, TABLES, REPLACED | P | W | A | D | G);
            a.invlpg(ptr(rdi)).unwrap();
            a.mov(rax, rcx).unwrap();
            load(a);
        },
        |a| {
            load(a);
            set_entry(a, TABLES, REPLACED | P | W | A | D | G);
            flush_global(a);
            a.mov(rax, rcx).unwrap();
            load(a);
        },
    ];
    for change in changes {
        let gpr = both(change).gpr;
        assert_eq!((gpr[reg::RAX], gpr[reg::RCX]), (OLD, NEW));
    }
}

#[test]
fn rights_and_absence_fault() {
    let result = both(|a| {
        store(a);
        set_entry(a, TABLES, PAGE | P | A | D | G);
        a.invlpg(ptr(rdi)).unwrap();
        store(a);
        load(a);
        set_entry(a, TABLES, 0);
        a.invlpg(ptr(rdi)).unwrap();
        load(a);
    });
    let at = LINEAR + PAGE;
    assert_eq!(result.faults, [at, 3, at, 0]);
}

#[test]
fn other_tables_are_seen() {
    let made = || {
        let m = machine(|a| {
            load(a);
            a.mov(rdx, OTHER_ROOT).unwrap();
            a.mov(cr3, rdx).unwrap();
            flush_global(a);
            a.mov(rax, rcx).unwrap();
            load(a);
            a.mov(rbp, rcx).unwrap();
            a.mov(rdx, ROOT).unwrap();
            a.mov(cr3, rdx).unwrap();
            flush_global(a);
            load(a);
        });
        make_other_root(&m);
        m
    };
    let gpr = both_with(made, 2, |_| {}).gpr;
    assert_eq!(
        (gpr[reg::RAX], gpr[reg::RBP], gpr[reg::RCX]),
        (OLD, NEW, OLD)
    );
}

#[test]
fn each_of_two_vcpus_has_its_own_tables() {
    let m = machine(load);
    make_other_root(&m);
    run_with_other_root_beside(m);
}

/// Stops twice what a vCPU executes, and between that what another does that has [`OTHER_ROOT`] for its tables: each finds what its own say.
fn run_with_other_root_beside(m: Machine) {
    m.code(OTHER_CODE, |a| {
        a.mov(rdx, OTHER_ROOT).unwrap();
        a.mov(cr3, rdx).unwrap();
        a.mov(rdx, CODE).unwrap();
        a.jmp(rdx).unwrap();
    });
    let mut first = m.start(Execution::Translated, begin);
    let mut second = first.another(|cpu| {
        begin(cpu);
        cpu.rip = OTHER_CODE;
    });
    let stop = |vcpu: &mut dyn Vcpu| {
        assert_eq!(vcpu.run().unwrap(), Exit::Hypercall);
        vcpu.state().gpr[reg::RCX]
    };
    let (shown, stopped) = channel();
    let (done, seen) = channel();
    std::thread::scope(|s| {
        s.spawn(move || {
            assert_eq!(stop(&mut *first.vcpu), OLD);
            assert!(is_open(&first));
            shown.send(()).unwrap();
            seen.recv().unwrap();
            assert_eq!(stop(&mut *first.vcpu), OLD);
        });
        s.spawn(move || {
            stopped.recv().unwrap();
            assert_eq!(stop(&mut *second), NEW);
            assert_eq!(stop(&mut *second), NEW);
            done.send(()).unwrap();
        });
    });
}

#[test]
fn code_that_is_written_is_seen() {
    let made = || {
        // More often than it takes to be known as an instruction that writes code; the frame holds data beside the function.
        let m = machine(|a| {
            let mut again = a.create_label();
            a.mov(rdi, LINEAR + FUNCTION).unwrap();
            a.mov(r8d, 20).unwrap();
            a.xor(eax, eax).unwrap();
            a.set_label(&mut again).unwrap();
            a.mov(byte_ptr(rdi + 3), r8b).unwrap();
            a.add(qword_ptr(rdi + 0x800), rax).unwrap();
            a.call(FUNCTION).unwrap();
            a.dec(r8d).unwrap();
            a.jnz(again).unwrap();
        });
        m.code(FUNCTION, |a| {
            a.lea(rax, rax + 10).unwrap();
            a.ret().unwrap();
        });
        m
    };
    let gpr = both_with(made, 2, |_| {}).gpr;
    assert_eq!(gpr[reg::RAX], (1..=20).sum::<u64>());
}

/// Maps the other address while the first is shown.
fn rival_comes(a: &mut CodeAssembler) {
    load(a);
    a.mov(rbp, rcx).unwrap();
    a.mov(rdx, RIVAL_TABLES | P | W | A).unwrap();
    a.mov(qword_ptr(ROOT + 8 * RIVAL_SLOT), rdx).unwrap();
    a.btc(rdi, 46).unwrap();
}

fn load_both(a: &mut CodeAssembler) {
    load(a);
    a.mov(rax, rcx).unwrap();
    a.btc(rdi, 46).unwrap();
    load(a);
}

#[test]
fn addresses_that_share_a_place_are_told_apart() {
    let programs: [Program; 2] = [
        |a| {
            rival_comes(a);
            a.mov(rdx, ROOT).unwrap();
            a.mov(cr3, rdx).unwrap();
            load_both(a);
        },
        |a| {
            rival_comes(a);
            a.invlpg(ptr(rdi)).unwrap();
            load_both(a);
        },
    ];
    for program in programs {
        let made = || {
            let m = machine(program);
            map(&m, OTHER_ROOT, RIVAL_SLOT, RIVAL_TABLES);
            let replaced = REPLACED | P | W | A | D | G;
            m.put(entry_of(RIVAL_TABLES, PAGE), &[replaced]);
            m
        };
        let gpr = both_with(made, 2, |_| {}).gpr;
        assert_eq!(
            (gpr[reg::RBP], gpr[reg::RAX], gpr[reg::RCX]),
            (OLD, NEW, OLD)
        );
    }
}

#[test]
fn addresses_outside_fault() {
    let result = both(|a| {
        // Behind the last page; and no address of the kernel's at all.
        a.mov(rdi, LINEAR + DATA + DATA_BYTES).unwrap();
        load(a);
        a.mov(edi, 0x7000_0000).unwrap();
        load(a);
    });
    let end = LINEAR + DATA + DATA_BYTES;
    assert_eq!(result.faults, [end, 0, 0x7000_0000, 0]);
    let result = both(|a| {
        a.mov(rdi, 0xdead_0000_0000_0100u64).unwrap();
        load(a);
    });
    assert_eq!(result.gpr[reg::RAX], 13);
    let result = both(|a| {
        // The last four bytes and the first four behind them.
        a.mov(rdi, LINEAR + DATA + DATA_BYTES - 4).unwrap();
        load(a);
    });
    assert_eq!(result.faults, [end, 0, 0, 0]);
}

#[test]
fn special_page_is_seen_in_the_place_of_memory() {
    let special = |s: &Started| {
        let offset = s.memory.new_special_page().unwrap();
        s.memory.place_special(Gfn(PAGE >> 12), offset).unwrap();
        s.vm.mark_written(Gpa(PAGE), PAGE_SIZE);
        s.memory.write(Gpa(PAGE), &NEW.to_le_bytes()).unwrap();
    };
    let made = || {
        machine(|a| {
            a.mov(rbp, rcx).unwrap();
            load(a);
            a.mov(qword_ptr(rdi + 8), rcx).unwrap();
            a.mov(qword_ptr(rdi + 0x1008), rcx).unwrap();
        })
    };
    let result = both_with(made, 2, special);
    assert_eq!((result.gpr[reg::RBP], result.gpr[reg::RCX]), (OLD, NEW));
    assert!(result.data.contains(&(PAGE + 8, NEW)));
}

#[test]
fn what_is_written_is_noted_and_the_window_comes_back() {
    on_its_own(|| {
        let m = machine(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            a.add(qword_ptr(rdi), 1).unwrap();
            a.add(rax, qword_ptr(rbx + 0x6000)).unwrap();
            a.vmcall().unwrap();
            a.jmp(again).unwrap();
        });
        let mut s = m.start(Execution::Translated, begin);
        run_to_vmcall(&mut s);
        run_to_vmcall(&mut s);
        assert!(is_open(&s));
        s.vm.begin_round();
        for _ in 0..3 {
            run_to_vmcall(&mut s);
            let written: Vec<u64> = s.vm.begin_round().runs().flatten().collect();
            assert!(written.contains(&(PAGE >> 12)), "{written:x?}");
            assert_eq!(s.vm.kernel_window_bytes(), 0);
        }
        s.vm.end_rounds();
        run_to_vmcall(&mut s);
        // Code that is translated now finds the window again.
        s.vm.mark_written(Gpa(CODE), PAGE_SIZE);
        run_to_vmcall(&mut s);
        assert!(is_open(&s));
        let word: u64 = s.memory.read_obj(Gpa(PAGE)).unwrap();
        assert_eq!(word, OLD + 6);
    });
}

#[test]
fn second_machine_of_a_process_does_without() {
    let program: Program = load;
    let window = |s: &mut Started| {
        run_to_vmcall(s);
        assert_eq!(s.vcpu.state().gpr[reg::RCX], OLD);
        is_open(s)
    };
    on_its_own(|| {
        let mut first = machine(program).start(Execution::Translated, begin);
        assert!(window(&mut first));
        on_its_own(|| {
            let mut second = machine(program).start(Execution::Translated, begin);
            window(&mut second);
            assert_eq!(second.vm.kernel_window_bytes(), 0);
        });
    });
    // The first has given it back.
    on_its_own(|| {
        let mut third = machine(program).start(Execution::Translated, begin);
        assert!(window(&mut third));
    });
}
