//! Address spaces with PCIDs: what stays cached over a switch, and what must not.
//!
//! Two spaces have the same kernel, and at the same addresses their own user code and data. The kernel follows a script: it writes memory, runs INVPCID, loads CR3 and
//! goes to user code, which adds its own constant to its own data word and comes back by a system call; the kernel stores the sum.

use std::sync::Arc;

use hospes_difftest::guest::HostProcessor;
use hospes_engine::{CpuState, Exit, Segment, Vm, cr, reg, seg};
use hospes_engine_bt::{BtVm, Execution, Options};
use hospes_memory::{GuestMemory, Range};
use hospes_units::{Gpa, VcpuId};
use iced_x86::code_asm::*;

const NO_FLUSH: u64 = 1 << 63;
const ROOT_A: u64 = 0x10_0000 | 1;
const ROOT_B: u64 = 0x11_0000 | 2;
const KERNEL: u64 = 0x1000;
const SCRIPT: u64 = 0x2000;
const RESULTS: u64 = 0x3000;
const USER_CODE: u64 = 0x20_0000;
const USER_DATA: u64 = 0x20_1000;
/// Frames of user code and data: A's, B's, and another data frame.
const CODE: [u64; 2] = [0x4000, 0x5000];
const DATA: [u64; 3] = [0x6000, 0x7000, 0x8000];
const ADDS: [i32; 2] = [0x100, 0x200];
const WORDS: [u64; 3] = [1, 2, 3];

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;

/// One line of the script: what the kernel does, and two operands.
enum Do {
    /// Loads CR3 and runs user code, which gives one result.
    Run(u64),
    /// Writes a word of physical memory.
    Write(u64, u64),
    /// INVPCID of this type with the descriptor (PCID, address).
    Invalidate(u64, [u64; 2]),
}

/// Physical address of the entry that maps the user data page under a root.
fn data_entry(root: u64) -> u64 {
    (root & !0xfff) + 0x3000 + 8
}

fn kernel() -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut next, mut run, mut write) = (a.create_label(), a.create_label(), a.create_label());
    let mut end = a.create_label();
    // The system call's entry comes first: the sum is in RAX, the results' end in RDI.
    a.mov(qword_ptr(rdi), rax).unwrap();
    a.add(rdi, 8).unwrap();
    a.set_label(&mut next).unwrap();
    a.mov(rax, qword_ptr(rsi)).unwrap();
    a.mov(rbx, qword_ptr(rsi + 8)).unwrap();
    a.add(rsi, 24).unwrap();
    a.cmp(rax, 0).unwrap();
    a.je(end).unwrap();
    a.cmp(rax, 1).unwrap();
    a.je(run).unwrap();
    a.cmp(rax, 2).unwrap();
    a.je(write).unwrap();
    a.sub(rax, 3).unwrap();
    // The descriptor is the two operands.
    a.invpcid(rax, xmmword_ptr(rsi - 16)).unwrap();
    a.jmp(next).unwrap();
    a.set_label(&mut write).unwrap();
    a.mov(rax, qword_ptr(rsi - 8)).unwrap();
    a.mov(qword_ptr(rbx), rax).unwrap();
    a.jmp(next).unwrap();
    a.set_label(&mut run).unwrap();
    a.mov(cr3, rbx).unwrap();
    a.mov(rcx, USER_CODE).unwrap();
    a.mov(r11, 2u64).unwrap();
    a.sysretq().unwrap();
    a.set_label(&mut end).unwrap();
    a.vmcall().unwrap();
    a.assemble(KERNEL).unwrap()
}

fn user(add: i32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    a.mov(rax, qword_ptr(USER_DATA)).unwrap();
    a.add(rax, add).unwrap();
    a.syscall().unwrap();
    a.assemble(USER_CODE).unwrap()
}

fn put(memory: &GuestMemory, gpa: u64, words: &[u64]) {
    for (n, w) in words.iter().enumerate() {
        memory
            .write(Gpa(gpa + 8 * n as u64), &w.to_le_bytes())
            .unwrap();
    }
}

/// Tables under a root: the first 2 MiB as they are for the kernel, and the user's two pages.
fn tables(memory: &GuestMemory, root: u64, code: u64, data: u64) {
    let root = root & !0xfff;
    let all = PRESENT | WRITE | USER;
    put(memory, root, &[root + 0x1000 + all]);
    put(memory, root + 0x1000, &[root + 0x2000 + all]);
    const LARGE: u64 = 0x80;
    put(
        memory,
        root + 0x2000,
        &[PRESENT | WRITE | LARGE, root + 0x3000 + all],
    );
    put(memory, root + 0x3000, &[code + all, data + all]);
}

fn state(cpu: &mut CpuState) {
    let kernel = |selector: u16, attr: u16| Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attr,
    };
    cpu.cr0 = cr::CR0_PE | cr::CR0_ET | cr::CR0_NE | cr::CR0_WP | cr::CR0_PG;
    cpu.cr4 = cr::CR4_PAE | cr::CR4_PGE | cr::CR4_OSFXSR | cr::CR4_PCIDE;
    cpu.cr3 = ROOT_A;
    cpu.msr.efer = cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
    cpu.msr.star = 0x18 << 48 | 0x8 << 32;
    cpu.msr.lstar = KERNEL;
    cpu.msr.sfmask = 0x25_7fd5;
    cpu.seg = [kernel(0x10, 0xc093); 6];
    cpu.seg[seg::CS] = kernel(0x8, 0xa09b);
    cpu.rflags = 2;
    cpu.gpr[reg::RSI] = SCRIPT;
    cpu.gpr[reg::RDI] = RESULTS;
    // Behind the two instructions that store a result.
    cpu.rip = KERNEL + 7;
}

/// Runs a script; gives what user code came to each time.
fn results(script: &[Do]) -> Vec<u64> {
    let memory = Arc::new(
        GuestMemory::new(&[Range {
            start: 0,
            end: 4 << 20,
        }])
        .unwrap(),
    );
    memory.write(Gpa(KERNEL), &kernel()).unwrap();
    for (n, root) in [ROOT_A, ROOT_B].into_iter().enumerate() {
        tables(&memory, root, CODE[n], DATA[n]);
        memory.write(Gpa(CODE[n]), &user(ADDS[n])).unwrap();
    }
    for (gpa, word) in DATA.into_iter().zip(WORDS) {
        put(&memory, gpa, &[word]);
    }
    let mut runs = 0;
    for (n, line) in script.iter().enumerate() {
        let words = match *line {
            Do::Run(root) => {
                runs += 1;
                [1, root, 0]
            }
            Do::Write(gpa, word) => [2, gpa, word],
            Do::Invalidate(kind, [pcid, address]) => [3 + kind, pcid, address],
        };
        put(&memory, SCRIPT + 24 * n as u64, &words);
    }
    let options = Options {
        code_bytes: 1 << 20,
        execution: Execution::Translated,
    };
    let vm = BtVm::new(memory.clone(), Arc::new(HostProcessor::new()), 1, options).unwrap();
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    state(vcpu.state());
    vcpu.state_changed();
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, Exit::Hypercall), "{exit:?}");
    let mut bytes = vec![0; 8 * runs];
    memory.read(Gpa(RESULTS), &mut bytes).unwrap();
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|w| u64::from_le_bytes(*w)).collect()
}

/// B's data page becomes the third frame, unknown to any cache.
fn remap_b() -> Do {
    Do::Write(data_entry(ROOT_B), DATA[2] + (PRESENT | WRITE | USER))
}

const A: u64 = ROOT_A | NO_FLUSH;
const B: u64 = ROOT_B | NO_FLUSH;
const SUM_A: u64 = 0x101;
const SUM_B: u64 = 0x202;
const SUM_B_NEW: u64 = 0x203;

#[test]
fn switch_without_flush_keeps_spaces_apart() {
    let script: Vec<Do> = [A, B, A, A, B, B, A, B].map(Do::Run).into();
    assert_eq!(
        results(&script),
        [SUM_A, SUM_B, SUM_A, SUM_A, SUM_B, SUM_B, SUM_A, SUM_B]
    );
}

/// Both spaces have been current more than once: what a space leaves behind the first time is not kept. Gives four sums.
fn visits() -> Vec<Do> {
    [B, A, B, A].map(Do::Run).into()
}
const VISITS: [u64; 4] = [SUM_B, SUM_A, SUM_B, SUM_A];

fn results_after_visits(script: impl IntoIterator<Item = Do>) -> Vec<u64> {
    let all: Vec<Do> = visits().into_iter().chain(script).collect();
    let mut sums = results(&all);
    let rest = sums.split_off(VISITS.len());
    assert_eq!(sums, VISITS);
    rest
}

#[test]
fn switch_without_flush_keeps_translations() {
    assert_eq!(results_after_visits([remap_b(), Do::Run(B)]), [SUM_B]);
}

#[test]
fn switch_with_flush_forgets_translations() {
    assert_eq!(
        results_after_visits([remap_b(), Do::Run(ROOT_B)]),
        [SUM_B_NEW]
    );
}

#[test]
fn invalidate_reaches_a_space_that_is_not_current() {
    for (kind, descriptor) in [(0, [2, USER_DATA]), (1, [2, 0]), (2, [0, 0]), (3, [0, 0])] {
        let script = [
            remap_b(),
            Do::Invalidate(kind, descriptor),
            Do::Run(B),
            Do::Run(A),
        ];
        assert_eq!(results_after_visits(script), [SUM_B_NEW, SUM_A], "{kind}");
    }
}

/// User code is changed through its frame while its space is not current: neither its translation nor its jump target may survive.
#[test]
fn code_of_another_space_that_changes_is_translated_again() {
    let new = u64::from_le_bytes(user(0x400)[8..16].try_into().unwrap());
    let script = [Do::Write(CODE[1] + 8, new), Do::Run(B), Do::Run(A)];
    assert_eq!(results_after_visits(script), [0x402, SUM_A]);
}
