//! What several vCPUs see of one another: the order of loads and stores, atomic operations, code that another vCPU changes.

use hospes_difftest::smp::{DATA, Machine, SPLIT, code_address, scattered};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Rounds of each test; with few of them rare orders are not seen.
const ROUNDS: i32 = 20_000;
/// Rounds of those that meet in each: on a busy machine a meeting takes as long as the host lets one of them wait.
const MEETINGS: i32 = 1_500;
/// Words that must not share a cache line.
const X: u64 = DATA;
const Y: u64 = DATA + 0x1000;
const BARRIER: u64 = DATA + 0x2000;
/// Counts what must not be.
const WRONG: u64 = DATA + 0x3000;

/// All of `vcpus` wait for one another; `rbp` counts the arrivals of all so far. Uses RAX.
fn meet(a: &mut CodeAssembler, vcpus: i32) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.add(rbp, vcpus)?;
    a.mov(rax, BARRIER)?;
    a.lock().inc(qword_ptr(rax))?;
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(qword_ptr(rax), rbp)?;
    a.jb(wait)
}

/// Two vCPUs meet in every round; each does `body` (RSI: its own word, RDI: the other's, RBX: the round) and compares what it read, in RCX, with the
/// round. `is_fine` jumps where that is as it may be; it must be so for one of the two.
fn one_of_two_is_fine(
    body: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    is_fine: impl Fn(&mut CodeAssembler, CodeLabel) -> Result<(), IcedError>,
) {
    let m = Machine::new(2);
    m.run(2, |a, id| {
        let (mine, other) = if id == 0 { (X, Y) } else { (Y, X) };
        let mut round = a.create_label();
        let mut fine = a.create_label();
        a.mov(rsi, mine)?;
        a.mov(rdi, other)?;
        a.xor(ebp, ebp)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut round)?;
        a.inc(rbx)?;
        meet(a, 2)?;
        body(a)?;
        // What was read is left for the other to look at.
        a.mov(qword_ptr(rsi + 0x100), rcx)?;
        meet(a, 2)?;
        a.cmp(rcx, rbx)?;
        is_fine(a, fine)?;
        a.cmp(qword_ptr(rdi + 0x100), rbx)?;
        is_fine(a, fine)?;
        a.mov(rax, WRONG)?;
        a.lock().inc(qword_ptr(rax))?;
        a.set_label(&mut fine)?;
        meet(a, 2)?;
        a.cmp(rbx, MEETINGS)?;
        a.jb(round)
    });
    assert_eq!(m.word(X), MEETINGS as u64);
    assert_eq!(m.word(WRONG), 0);
}

#[test]
fn store_buffering_with_fences_never_reads_two_old_values() {
    one_of_two_is_fine(
        |a| {
            a.mov(qword_ptr(rsi), rbx)?;
            a.mfence()?;
            a.mov(rcx, qword_ptr(rdi))
        },
        |a, fine| a.je(fine),
    );
}

#[test]
fn message_passing_never_shows_the_flag_before_the_data() {
    let m = Machine::new(2);
    m.run(2, |a, id| {
        let mut round = a.create_label();
        let mut fine = a.create_label();
        a.mov(rsi, X)?;
        a.mov(rdi, Y)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut round)?;
        if id == 0 {
            a.inc(rbx)?;
            a.mov(qword_ptr(rsi), rbx)?;
            a.mov(qword_ptr(rdi), rbx)?;
        } else {
            a.mov(rbx, qword_ptr(rdi))?;
            a.mov(rcx, qword_ptr(rsi))?;
            a.cmp(rcx, rbx)?;
            a.jae(fine)?;
            a.mov(rax, WRONG)?;
            a.inc(qword_ptr(rax))?;
            a.set_label(&mut fine)?;
        }
        a.cmp(rbx, 50 * ROUNDS)?;
        a.jb(round)
    });
    assert_eq!(m.word(WRONG), 0);
}

#[test]
fn load_buffering_never_reads_what_is_stored_later() {
    one_of_two_is_fine(
        |a| {
            a.mov(rcx, qword_ptr(rdi))?;
            a.mov(qword_ptr(rsi), rbx)
        },
        |a, fine| a.jne(fine),
    );
}

/// Every vCPU adds at `address` with each of several locked instructions; the sum has to be exact.
fn counts_exactly(vcpus: u32, address: u64, physical: [u64; 2], first_bytes: usize) {
    let m = Machine::new(vcpus);
    m.run(vcpus, |a, _| {
        let mut round = a.create_label();
        let mut again = a.create_label();
        a.mov(rsi, address)?;
        a.mov(ebx, ROUNDS)?;
        a.set_label(&mut round)?;
        a.lock().inc(qword_ptr(rsi))?;
        a.mov(ecx, 2)?;
        a.lock().xadd(qword_ptr(rsi), rcx)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.set_label(&mut again)?;
        a.lea(rdx, qword_ptr(rax + 3))?;
        a.lock().cmpxchg(qword_ptr(rsi), rdx)?;
        a.jne(again)?;
        a.dec(ebx)?;
        a.jne(round)
    });
    let mut bytes = [0; 8];
    let (first, second) = bytes.split_at_mut(first_bytes);
    for (part, at) in [first, second].into_iter().zip(physical) {
        m.memory.read(hospes_units::Gpa(at), part).unwrap();
    }
    let want = u64::from(vcpus) * ROUNDS as u64 * 6;
    assert_eq!(u64::from_le_bytes(bytes), want);
}

#[test]
fn locked_sums_are_exact() {
    counts_exactly(2, X, [X, X], 8);
    counts_exactly(4, X, [X, X], 8);
}

#[test]
fn locked_sums_across_cache_lines_are_exact() {
    let at = X + 60;
    counts_exactly(2, at, [at, at + 8], 8);
}

#[test]
fn locked_sums_across_pages_are_exact() {
    for first in [1, 4, 7] {
        let at = SPLIT + 0x1000 - first;
        let physical = [scattered(at), scattered(SPLIT + 0x1000)];
        counts_exactly(2, at, physical, first as usize);
    }
}

#[test]
fn exchange_guards_a_counter() {
    let m = Machine::new(3);
    m.run(3, |a, _| {
        let mut round = a.create_label();
        let mut taken = a.create_label();
        a.mov(rsi, X)?;
        a.mov(rdi, Y)?;
        a.mov(ebx, ROUNDS)?;
        a.set_label(&mut round)?;
        a.mov(eax, 1)?;
        a.xchg(dword_ptr(rsi), eax)?;
        a.test(eax, eax)?;
        a.je(taken)?;
        a.pause()?;
        a.jmp(round)?;
        a.set_label(&mut taken)?;
        a.inc(qword_ptr(rdi))?;
        a.mov(dword_ptr(rsi), 0)?;
        a.dec(ebx)?;
        a.jne(round)
    });
    assert_eq!(m.word(Y), 3 * ROUNDS as u64);
}

#[test]
fn cmpxchg16b_changes_both_halves_or_none() {
    let m = Machine::new(2);
    m.run(2, |a, _| {
        let mut round = a.create_label();
        let mut again = a.create_label();
        let mut fine = a.create_label();
        a.mov(rsi, X)?;
        a.mov(edi, ROUNDS)?;
        a.set_label(&mut round)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(rdx, qword_ptr(rsi + 8))?;
        a.set_label(&mut again)?;
        a.lea(rbx, qword_ptr(rax + 1))?;
        a.lea(rcx, qword_ptr(rdx + 2))?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))?;
        a.jne(again)?;
        // What was there was written by one operation.
        a.add(rax, rax)?;
        a.cmp(rax, rdx)?;
        a.je(fine)?;
        a.mov(rax, WRONG)?;
        a.lock().inc(qword_ptr(rax))?;
        a.set_label(&mut fine)?;
        a.dec(edi)?;
        a.jne(round)
    });
    assert_eq!(m.word(WRONG), 0);
    let sum = 2 * ROUNDS as u64;
    assert_eq!((m.word(X), m.word(X + 8)), (sum, 2 * sum));
}

/// vCPU 1 calls functions, one in each page, over and over; vCPU 0 gives each another constant to return and then says so. `store` writes EAX
/// to where RDI points.
fn changes_are_seen(store: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    const PAGES: i32 = 16;
    let functions = SPLIT;
    let m = Machine::new(2);
    for page in 0..PAGES as u64 {
        // mov eax, 0; ret, with the constant aligned.
        let code = [0xb8, 0, 0, 0, 0, 0xc3];
        let at = scattered(functions + page * 0x1000);
        m.memory.write(hospes_units::Gpa(at + 3), &code).unwrap();
    }
    m.run(2, |a, id| {
        let mut round = a.create_label();
        let mut same = a.create_label();
        let mut fine = a.create_label();
        a.mov(rsi, X)?;
        a.xor(ebx, ebx)?;
        a.mov(rdi, functions)?;
        a.set_label(&mut round)?;
        if id == 0 {
            a.inc(ebx)?;
            a.mov(eax, ebx)?;
            store(a)?;
            // Told: page and constant in one word.
            a.mov(rcx, rdi)?;
            a.shl(rcx, 32)?;
            a.or(rcx, rbx)?;
            a.mov(qword_ptr(rsi), rcx)?;
            a.add(rdi, 0x1000)?;
            a.cmp(rdi, (functions + PAGES as u64 * 0x1000) as i32)?;
            a.jb(same)?;
            a.mov(rdi, functions)?;
            a.set_label(&mut same)?;
        } else {
            a.mov(rbx, qword_ptr(rsi))?;
            a.mov(rdi, rbx)?;
            a.shr(rdi, 32)?;
            a.mov(ebx, ebx)?;
            a.test(edi, edi)?;
            a.je(fine)?;
            a.lea(rdx, qword_ptr(rdi + 3))?;
            // Serializes, as the architecture asks of code that another processor has changed.
            a.push(rbx)?;
            a.push(rdx)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.pop(rdx)?;
            a.pop(rbx)?;
            a.call(rdx)?;
            a.cmp(eax, ebx)?;
            a.jae(fine)?;
            a.mov(rax, WRONG)?;
            a.inc(qword_ptr(rax))?;
            a.set_label(&mut fine)?;
        }
        a.cmp(ebx, ROUNDS / 4)?;
        a.jb(round)
    });
    assert_eq!(m.word(WRONG), 0);
}

#[test]
fn code_changed_by_stores_is_seen_by_another_vcpu() {
    changes_are_seen(|a| a.mov(dword_ptr(rdi + 4), eax));
}

#[test]
fn code_changed_by_instructions_run_one_at_a_time_is_seen_by_another_vcpu() {
    changes_are_seen(|a| a.movnti(dword_ptr(rdi + 4), eax));
    // Through the engine's own copy, in elements of four bytes.
    changes_are_seen(|a| {
        a.push(rdi)?;
        a.add(rdi, 4)?;
        a.std()?;
        a.stosd()?;
        a.cld()?;
        a.pop(rdi)
    });
}

#[test]
fn programs_lie_apart() {
    assert!(code_address(4) <= DATA);
}
