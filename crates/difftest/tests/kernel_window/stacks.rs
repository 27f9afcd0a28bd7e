//! Stacks, of which the window shows each small page by itself.

use super::*;

/// Where the stack is, in two pages between two that are accessed by other registers. None of their frames are neighbours.
const AREA: u64 = 0xffff_c900_0040_0000;
const AREA_SLOT: u64 = AREA >> 39 & 511;
const AREA_RIVAL: u64 = AREA ^ 1 << 46;
const AREA_TABLES: u64 = ROOT + 0x3_0000;
const OTHER_AREA_TABLES: u64 = ROOT + 0x3_8000;
const FRAMES: [u64; 4] = [DATA + 0x7000, DATA + 0x3000, DATA + 0xb000, DATA + 0x1_0000];
/// The stack grows from here into the page below.
const TOP_OF_STACK: u64 = AREA + 0x2040;
/// A word of another page of the stack, and one that replaces its page.
const WORD: u64 = AREA + 0x3010;
const WORD_FRAME: u64 = FRAMES[3];
const INSTEAD: u64 = DATA + 0x2_0000;
/// Accesses the word at RDI, always by the same instruction.
const WORD_LOADER: u64 = 0xd300;

fn entry_of_page(tables: u64, gva: u64) -> u64 {
    tables + 0x2000 + 8 * (gva >> 12 & 511)
}

fn map_area(m: &Machine, root: u64, slot: u64, tables: u64) {
    m.put(root + 8 * slot, &[tables + (P | W | U | A)]);
    m.put(tables, &[tables + 0x1000 + (P | W | U | A)]);
    m.put(tables + 0x1000 + 16, &[tables + 0x2000 + (P | W | U | A)]);
    for (gva, frame) in (AREA..).step_by(0x1000).zip(FRAMES) {
        m.put(entry_of_page(tables, gva), &[frame | P | W | A | D | G]);
    }
}

/// A machine that shows its stack and the word beside it, stops, and runs the program.
fn stack_machine(program: Program) -> Machine {
    let m = Machine::new();
    map_area(&m, ROOT, AREA_SLOT, AREA_TABLES);
    m.put(WORD_FRAME + 0x10, &[OLD]);
    m.put(INSTEAD + 0x10, &[NEW]);
    m.code(WORD_LOADER, |a| {
        a.mov(rcx, qword_ptr(rdi)).unwrap();
        a.ret().unwrap();
    });
    m.code(CODE, |a| {
        use_stack(a);
        load_word(a);
        a.vmcall().unwrap();
        program(a);
        a.vmcall().unwrap();
    });
    m
}

/// Goes to the stack in a block of its own, so that the next is entered with it.
fn use_stack(a: &mut CodeAssembler) {
    let mut next = a.create_label();
    a.mov(rsp, TOP_OF_STACK).unwrap();
    a.mov(rdi, WORD).unwrap();
    a.jmp(next).unwrap();
    a.set_label(&mut next).unwrap();
    a.push(rdi).unwrap();
    a.pop(rax).unwrap();
}

fn load_word(a: &mut CodeAssembler) {
    a.call(WORD_LOADER).unwrap();
}

fn stacks(program: Program) -> Result {
    both_with(|| stack_machine(program), 2, |_| {})
}

#[test]
fn every_form_reaches_its_slot() {
    let result = stacks(|a| {
        let (mut again, mut function, mut begin) =
            (a.create_label(), a.create_label(), a.create_label());
        let mut left = a.create_label();
        a.mov(r8d, 40).unwrap();
        a.mov(r11, AREA + 0x2ff8).unwrap();
        a.jmp(begin).unwrap();

        a.set_label(&mut function).unwrap();
        a.push(rbp).unwrap();
        a.mov(rbp, rsp).unwrap();
        a.sub(rsp, 0x28).unwrap();
        a.adc(qword_ptr(rbp - 8), r8).unwrap();
        a.mov(rax, qword_ptr(rsp + 0x30)).unwrap();
        a.add(qword_ptr(rsp + 8), rax).unwrap();
        a.movups(xmm1, ptr(rsp + 0x28)).unwrap();
        a.movups(ptr(rsp + 0x10), xmm1).unwrap();
        a.jmp(left).unwrap();
        a.set_label(&mut left).unwrap();
        a.leave().unwrap();
        a.ret_1(16).unwrap();

        a.set_label(&mut begin).unwrap();
        a.lea(r9, ptr(function)).unwrap();
        a.set_label(&mut again).unwrap();
        // Flags live through all of it; each round begins eight bytes and one lower, so that slots come to lie in two pages.
        a.cmp(r8d, 17).unwrap();
        a.push(r8).unwrap();
        a.push(qword_ptr(rsp)).unwrap();
        a.push(-7).unwrap();
        a.push(0x1234_5678).unwrap();
        a.sbb(qword_ptr(rsp + 16), 0).unwrap();
        a.call(function).unwrap();
        a.push(r9).unwrap();
        a.push(r9).unwrap();
        a.call(r9).unwrap();
        a.push(r9).unwrap();
        a.push(1).unwrap();
        a.push(r9).unwrap();
        a.call(qword_ptr(rsp)).unwrap();
        a.pop(rdx).unwrap();
        a.pop(qword_ptr(rsp + 8)).unwrap();
        a.xchg(qword_ptr(rsp), rdx).unwrap();
        a.add(qword_ptr(r11), rdx).unwrap();
        a.lea(rsp, rsp - 9).unwrap();
        a.dec(r8d).unwrap();
        a.jnz(again).unwrap();
    });
    assert!(result.data.len() > 40, "{result:x?}");
}

/// An instruction that accesses the stack, or one that makes or reads flags.
fn emit_stack(a: &mut CodeAssembler, rng: &mut Rng) {
    let value = rng.pick(&[rax, rdx, rbp, rcx]);
    let disp = 8 * rng.below(24) as i32 + rng.pick(&[0, 0, 0, 3]);
    match rng.below(14) {
        0 => a.push(value),
        1 => a.pop(value),
        2 => a.push(qword_ptr(rsp + disp)),
        3 => a.pop(qword_ptr(rsp + disp)),
        4 => a.mov(qword_ptr(rsp + disp), value),
        5 => a.adc(value, qword_ptr(rsp + disp)),
        6 => a.sbb(qword_ptr(rbx + disp), value),
        7 => a.lea(rbx, rsp + disp),
        8 => a.push(rng.below(1 << 31) as i32),
        9 => a.sub(rsp, 8 * rng.below(6) as i32),
        10 => a.cmp(value, rdx),
        11 => a.cmovc(value, qword_ptr(rbx)),
        12 => a.xchg(qword_ptr(rsp), value),
        _ => a.rcl(value, 1),
    }
    .unwrap();
}

/// Loops over random instructions, each time with another stack pointer.
fn random_stack(seed: u64) -> Machine {
    let mut rng = Rng::new(seed);
    let m = stack_machine(|_| {});
    m.code(CODE, |a| {
        let (mut again, mut function, mut begin) =
            (a.create_label(), a.create_label(), a.create_label());
        use_stack(a);
        a.vmcall().unwrap();
        a.mov(r8d, 4).unwrap();
        a.mov(rbx, rsp).unwrap();
        a.jmp(begin).unwrap();
        a.set_label(&mut function).unwrap();
        a.adc(rax, qword_ptr(rsp + 8)).unwrap();
        a.ret().unwrap();
        a.set_label(&mut begin).unwrap();
        a.nop().unwrap();
        a.set_label(&mut again).unwrap();
        a.imul_3(r9, r8, 0x2f8).unwrap();
        a.mov(rsp, AREA + 0x1800).unwrap();
        a.add(rsp, r9).unwrap();
        a.lea(rbx, rsp + 64).unwrap();
        for n in 0..30 {
            emit_stack(a, &mut rng);
            if n % 10 == 9 {
                a.call(function).unwrap();
            }
        }
        a.dec(r8d).unwrap();
        a.jnz(again).unwrap();
        a.vmcall().unwrap();
    });
    m
}

#[test]
fn random_blocks_use_their_stack() {
    for seed in 0..300 {
        both_with(|| random_stack(seed), 2, |_| {});
    }
}

fn set_page(a: &mut CodeAssembler, tables: u64, value: u64) {
    a.mov(rdx, value).unwrap();
    a.mov(qword_ptr(entry_of_page(tables, WORD)), rdx).unwrap();
}

const REPLACED_PAGE: u64 = INSTEAD | P | W | A | D | G;

#[test]
fn page_of_a_stack_that_is_replaced_is_seen() {
    let changes: [Program; 2] = [
        |a| {
            set_page(a, AREA_TABLES, REPLACED_PAGE);
            a.invlpg(ptr(rdi)).unwrap();
        },
        |a| {
            set_page(a, AREA_TABLES, REPLACED_PAGE);
            flush_global(a);
        },
    ];
    for change in changes {
        let made = || {
            let m = stack_machine(|_| {});
            m.code(CODE, |a| {
                use_stack(a);
                load_word(a);
                a.vmcall().unwrap();
                a.mov(rax, rcx).unwrap();
                change(a);
                load_word(a);
                a.vmcall().unwrap();
            });
            m
        };
        let gpr = both_with(made, 2, |_| {}).gpr;
        assert_eq!((gpr[reg::RAX], gpr[reg::RCX]), (OLD, NEW));
    }
}

#[test]
fn page_of_a_stack_that_goes_faults() {
    let result = stacks(|a| {
        set_page(a, AREA_TABLES, 0);
        a.invlpg(ptr(rdi)).unwrap();
        load_word(a);
        set_page(a, AREA_TABLES, WORD_FRAME | P | A | D | G);
        a.mov(qword_ptr(rdi), rbx).unwrap();
        a.invlpg(ptr(rdi)).unwrap();
        load_word(a);
        a.mov(qword_ptr(rdi), rbx).unwrap();
    });
    assert_eq!(result.faults[..2], [WORD, 0]);
}

#[test]
fn page_of_a_stack_that_becomes_the_users_faults() {
    let result = stacks(|a| {
        set_page(a, AREA_TABLES, WORD_FRAME | P | W | U | A | D | G);
        a.invlpg(ptr(rdi)).unwrap();
        load_word(a);
    });
    assert_eq!(result.faults, [WORD, 1, 0, 0]);
}

#[test]
fn each_of_two_vcpus_has_its_own_stack() {
    let m = stack_machine(load_word);
    map_area(&m, OTHER_ROOT, AREA_SLOT, OTHER_AREA_TABLES);
    m.put(entry_of_page(OTHER_AREA_TABLES, WORD), &[REPLACED_PAGE]);
    m.put(OTHER_ROOT, &[ROOT + 0x1000 + (P | W | A)]);
    run_with_other_root_beside(m);
}

#[test]
fn addresses_that_share_a_stacks_place_are_told_apart() {
    let made = || {
        let m = stack_machine(|a| {
            a.mov(rbp, rcx).unwrap();
            a.mov(rdx, OTHER_AREA_TABLES | P | W | A).unwrap();
            a.mov(qword_ptr(ROOT + 8 * (AREA_RIVAL >> 39 & 511)), rdx)
                .unwrap();
            a.btc(rdi, 46).unwrap();
            a.invlpg(ptr(rdi)).unwrap();
            load_word(a);
            a.mov(rax, rcx).unwrap();
            a.btc(rdi, 46).unwrap();
            load_word(a);
        });
        map_area(&m, OTHER_ROOT, AREA_SLOT, OTHER_AREA_TABLES);
        m.put(entry_of_page(OTHER_AREA_TABLES, WORD), &[REPLACED_PAGE]);
        m
    };
    let gpr = both_with(made, 2, |_| {}).gpr;
    assert_eq!(
        (gpr[reg::RBP], gpr[reg::RAX], gpr[reg::RCX]),
        (OLD, NEW, OLD)
    );
}

/// The word's page is the function's: its frame becomes one with code when the function is first called.
fn stack_with_code() -> Machine {
    let m = stack_machine(|_| {});
    let entry = FUNCTION | P | W | A | D | G;
    m.put(entry_of_page(AREA_TABLES, WORD), &[entry]);
    m.code(FUNCTION, |a| {
        a.lea(rax, rax + 10).unwrap();
        a.ret().unwrap();
    });
    m.code(CODE, |a| {
        let mut again = a.create_label();
        use_stack(a);
        load_word(a);
        a.vmcall().unwrap();
        a.mov(rbp, rsp).unwrap();
        a.mov(r8d, 100).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut again).unwrap();
        // Behind the function, and in it.
        a.mov(rsp, AREA + 0x3100).unwrap();
        a.push(rax).unwrap();
        a.mov(byte_ptr(rsp - (0xf8 - 3)), r8b).unwrap();
        a.mov(rdx, rsp).unwrap();
        a.mov(rsp, rbp).unwrap();
        a.call(FUNCTION).unwrap();
        a.mov(rsp, rdx).unwrap();
        a.pop(rcx).unwrap();
        a.add(qword_ptr(rsp), rcx).unwrap();
        a.dec(r8d).unwrap();
        a.jnz(again).unwrap();
        a.vmcall().unwrap();
    });
    m
}

#[test]
fn code_in_a_page_of_a_stack_is_seen_when_it_is_written() {
    let gpr = both_with(stack_with_code, 2, |_| {}).gpr;
    assert_eq!(gpr[reg::RAX], (1..=100).sum::<u64>());
}

#[test]
fn special_page_is_seen_in_the_place_of_a_stacks() {
    let special = |s: &Started| {
        let offset = s.memory.new_special_page().unwrap();
        let gfn = Gfn(WORD_FRAME >> 12);
        s.memory.place_special(gfn, offset).unwrap();
        s.vm.mark_written(gfn.gpa(), PAGE_SIZE);
        let word = Gpa(WORD_FRAME + 0x10);
        s.memory.write(word, &NEW.to_le_bytes()).unwrap();
    };
    let made = || {
        stack_machine(|a| {
            a.mov(rbp, rcx).unwrap();
            load_word(a);
        })
    };
    let gpr = both_with(made, 2, special).gpr;
    assert_eq!((gpr[reg::RBP], gpr[reg::RCX]), (OLD, NEW));
}

#[test]
fn what_is_pushed_is_noted_and_stacks_come_back() {
    on_its_own(|| {
        let m = stack_machine(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            a.push(rdi).unwrap();
            a.pop(rax).unwrap();
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
            assert!(written.contains(&(FRAMES[2] >> 12)), "{written:x?}");
            assert_eq!(s.vm.kernel_window_bytes(), 0);
        }
        s.vm.end_rounds();
        run_to_vmcall(&mut s);
        s.vm.mark_written(Gpa(CODE), PAGE_SIZE);
        run_to_vmcall(&mut s);
        assert!(is_open(&s));
    });
}
