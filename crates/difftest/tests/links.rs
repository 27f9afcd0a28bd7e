//! Jumps of kernel code from page to page, which are connected for as long as the mapping of their target is known to hold.
//!
//! A kernel at the top of the address space calls a function in another page until that call is connected. Then the function's page becomes another one, in each of the ways that a
//! processor has to notice, and the same call has to come to the new one.

use std::sync::mpsc::channel;

use hospes_difftest::kernel::*;
use hospes_engine::{CpuState, Exit, Vcpu, cr, reg};
use hospes_engine_bt::Execution;
use iced_x86::code_asm::*;

/// The tables of the kernel's code.
const TOP_TABLES: u64 = ROOT + 0x8000;
/// Another root, with tables of its own for the top.
const OTHER_ROOT: u64 = ROOT + 0x1_0000;
const OTHER_TABLES: u64 = ROOT + 0x1_8000;

/// Frames of the kernel's pages: the main program; the function, which goes on in two other pages; and what the function is replaced by.
const MAIN: u64 = 0x5000;
const FUNCTION: u64 = 0xe000;
const TAIL: u64 = 0xa000;
const CARRY: u64 = 0xb000;
const REPLACED: u64 = 0xd000;
const FRAMES: [u64; 4] = [MAIN, FUNCTION, TAIL, CARRY];
/// Calls before the change and behind it.
const CALLS: u64 = 100;
/// What one call adds to RAX, before and behind: one in two calls takes the way with the carry flag set.
const BEFORE: u64 = 10 * CALLS + CALLS / 2 * (1 + 100);
const BEHIND: u64 = 1000 * CALLS;

fn entry_of(page: u64) -> u64 {
    TOP_TABLES + 0x2000 + 8 * page
}

/// A change of the kernel's pages.
type Change = fn(&mut CodeAssembler);

/// Calls the function so many times, always by the same instruction, before and behind each of the changes. RCX counts down, R14 up. Flags reach the function as they are.
fn program(a: &mut CodeAssembler, changes: &[Change]) {
    let mut again = a.create_label();
    a.xor(r14d, r14d).unwrap();
    a.mov(rcx, CALLS).unwrap();
    a.set_label(&mut again).unwrap();
    a.bt(rcx, 0).unwrap();
    a.call(TOP + 0x1000).unwrap();
    a.dec(rcx).unwrap();
    a.jnz(again).unwrap();
    for (n, change) in (0..).zip(changes) {
        let mut next = a.create_label();
        a.cmp(r14, n).unwrap();
        a.jne(next).unwrap();
        a.inc(r14).unwrap();
        change(a);
        a.mov(rcx, CALLS).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut next).unwrap();
        a.nop().unwrap();
    }
    a.vmcall().unwrap();
}

fn machine(bits: u64, changes: &[Change]) -> Machine {
    let m = Machine::new();
    m.map_top(ROOT, TOP_TABLES, &FRAMES, bits);
    let mut replaced = FRAMES;
    replaced[1] = REPLACED;
    m.map_top(OTHER_ROOT, OTHER_TABLES, &replaced, bits);
    m.put(OTHER_ROOT, &[ROOT + 0x1000 + (P | W | A)]);
    let put = |frame: u64, page: u64, f: &dyn Fn(&mut CodeAssembler)| {
        m.code_for(frame, TOP + page * 0x1000, |a| f(a));
    };
    put(MAIN, 0, &|a| program(a, changes));
    // The carry flag goes through two jumps to other pages.
    put(FUNCTION, 1, &|a| {
        a.lea(rax, rax + 10).unwrap();
        a.jmp(TOP + 0x2000).unwrap();
    });
    put(TAIL, 2, &|a| {
        a.jc(TOP + 0x3000).unwrap();
        a.ret().unwrap();
    });
    put(CARRY, 3, &|a| {
        a.adc(rax, 100).unwrap();
        a.ret().unwrap();
    });
    put(REPLACED, 1, &|a| {
        a.lea(rax, rax + 1000).unwrap();
        a.ret().unwrap();
    });
    m
}

fn begin(cpu: &mut CpuState) {
    cpu.rip = TOP;
    cpu.gpr[reg::RAX] = 0;
}

fn to_vmcall(vcpu: &mut dyn Vcpu) -> u64 {
    assert_eq!(vcpu.run().unwrap(), Exit::Hypercall);
    vcpu.state().gpr[reg::RAX]
}

/// Runs the program in both ways, from a state that `set` changes; gives what RAX comes to.
fn sum_from(bits: u64, changes: &[Change], set: impl Fn(&mut CpuState) + Sync) -> u64 {
    let run = |execution| {
        on_its_own(|| {
            let mut started = machine(bits, changes).start(execution, |cpu| {
                begin(cpu);
                set(cpu);
            });
            to_vmcall(&mut *started.vcpu)
        })
    };
    let single = run(Execution::Single);
    assert_eq!(run(Execution::Translated), single);
    single
}

fn sum(bits: u64, change: Change) -> u64 {
    sum_from(bits, &[change], |_| {})
}

fn replace(a: &mut CodeAssembler, bits: u64) {
    a.mov(rbx, REPLACED | P | W | A | D | bits).unwrap();
    a.mov(qword_ptr(entry_of(1)), rbx).unwrap();
}

fn invalidate(a: &mut CodeAssembler) {
    a.mov(rbx, TOP + 0x1000).unwrap();
    a.invlpg(ptr(rbx)).unwrap();
}

fn load(a: &mut CodeAssembler, root: u64) {
    a.mov(rbx, root).unwrap();
    a.mov(cr3, rbx).unwrap();
}

#[test]
fn calls_to_another_page_go_on_with_nothing_changed() {
    for bits in [0, G] {
        assert_eq!(sum(bits, |_| {}), 2 * BEFORE);
    }
}

#[test]
fn page_that_is_invalidated_is_seen() {
    let change: Change = |a| {
        replace(a, G);
        invalidate(a);
    };
    assert_eq!(sum(G, change), BEFORE + BEHIND);
}

#[test]
fn flush_of_global_pages_is_seen() {
    let change: Change = |a| {
        replace(a, G);
        flush_global(a);
    };
    assert_eq!(sum(G, change), BEFORE + BEHIND);
}

#[test]
fn page_that_is_not_global_is_seen_when_cr3_is_loaded() {
    let change: Change = |a| {
        replace(a, 0);
        load(a, ROOT);
    };
    assert_eq!(sum(0, change), BEFORE + BEHIND);
}

#[test]
fn other_tables_for_all_of_the_kernel_are_seen() {
    assert_eq!(sum(0, |a| load(a, OTHER_ROOT)), BEFORE + BEHIND);
    // A processor may go on with global pages until they are flushed.
    let change: Change = |a| {
        load(a, OTHER_ROOT);
        flush_global(a);
    };
    assert_eq!(sum(G, change), BEFORE + BEHIND);
}

#[test]
fn pages_that_become_global_later_are_connected_then() {
    let changes: [Change; 2] = [flush_global, |a| {
        replace(a, G);
        invalidate(a);
    }];
    let sum = sum_from(G, &changes, |cpu| cpu.cr4 &= !cr::CR4_PGE);
    assert_eq!(sum, 2 * BEFORE + BEHIND);
}

#[test]
fn code_that_is_written_is_seen() {
    // The displacement of LEA, through the page's other address; once more when the call has been connected again.
    let changes: [Change; 2] = [
        |a| a.mov(byte_ptr(FUNCTION + 3), 20).unwrap(),
        |a| a.mov(byte_ptr(FUNCTION + 3), 30).unwrap(),
    ];
    let sum = sum_from(G, &changes, |_| {});
    assert_eq!(sum, 3 * BEFORE + (10 + 20) * CALLS);
}

#[test]
fn page_that_becomes_missing_faults() {
    let run = |execution| {
        on_its_own(|| {
            let m = machine(
                G,
                &[|a| {
                    a.mov(qword_ptr(entry_of(1)), 0).unwrap();
                    invalidate(a);
                }],
            );
            // Brings the other page, and goes back.
            m.code(HANDLERS + 32 * 14, |a| {
                a.mov(qword_ptr(entry_of(1)), r15).unwrap();
                a.add(rsp, 8).unwrap();
                a.iretq().unwrap();
            });
            let mut started = m.start(execution, |cpu| {
                begin(cpu);
                cpu.gpr[15] = REPLACED | P | W | A | D | G;
            });
            to_vmcall(&mut *started.vcpu)
        })
    };
    assert_eq!(run(Execution::Single), BEFORE + BEHIND);
    assert_eq!(run(Execution::Translated), BEFORE + BEHIND);
}

/// One vCPU has its calls connected, if it may, and stops; another runs the same code with a function of its own, in tables that it has from the start or gets only then; then the
/// first goes on.
fn two_vcpus(from_start: bool) {
    let m = machine(G, &[|a| a.vmcall().unwrap()]);
    m.code(CODE, |a| {
        load(a, OTHER_ROOT);
        a.mov(rbx, TOP).unwrap();
        a.jmp(rbx).unwrap();
    });
    let mut first = m.start(Execution::Translated, begin);
    let mut second = first.another(|cpu| {
        begin(cpu);
        if from_start {
            cpu.cr3 = OTHER_ROOT;
        } else {
            cpu.rip = CODE;
        }
    });
    let (connected, stopped) = channel();
    let (done, replaced) = channel();
    std::thread::scope(|s| {
        s.spawn(move || {
            assert_eq!(to_vmcall(&mut *first.vcpu), BEFORE);
            connected.send(()).unwrap();
            replaced.recv().unwrap();
            assert_eq!(to_vmcall(&mut *first.vcpu), 2 * BEFORE);
        });
        s.spawn(move || {
            stopped.recv().unwrap();
            assert_eq!(to_vmcall(&mut *second), BEHIND);
            assert_eq!(to_vmcall(&mut *second), 2 * BEHIND);
            done.send(()).unwrap();
        });
    });
}

#[test]
fn each_of_two_vcpus_has_its_own_pages() {
    two_vcpus(true);
    two_vcpus(false);
}
