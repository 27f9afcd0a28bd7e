//! The log of written frames: whatever a guest writes is in it, by whichever means, in the round in which it was written.

use std::time::{Duration, Instant};

use hospes_difftest::smp::{DATA, Machine, SPLIT, code_address, run_to_vmcall, scattered};
use hospes_engine::{Vcpu, Vm};
use hospes_memory::FrameSet;
use hospes_units::{Gfn, Gpa, Gva, PAGE_SIZE};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Programs that run until they are told end when it is not zero.
const STOP: u64 = 0x3f_0000;
/// Page table of the scattered pages, and the entry in it of [`SPLIT`].
const TABLE: u64 = 0x10_3000;
const ENTRY: u64 = TABLE + 256 * 8;
const ACCESSED_DIRTY: i32 = 0x60;

type Piece = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Means of writing 8 to 512 bytes where RDI points, a multiple of 64; they may change RAX, RCX, RDX, RSI and R8, which hold anything.
const MEANS: [(&str, Piece); 16] = [
    ("store", |a| a.mov(qword_ptr(rdi), rax)),
    ("group", |a| {
        a.mov(rdx, qword_ptr(rdi + 16))?;
        a.mov(qword_ptr(rdi + 8), rax)?;
        a.add(qword_ptr(rdi), rax)
    }),
    ("increment", |a| a.inc(byte_ptr(rdi))),
    ("push", |a| {
        a.mov(r8, rsp)?;
        a.lea(rsp, qword_ptr(rdi + 8))?;
        a.push(rax)?;
        a.mov(rsp, r8)
    }),
    ("call", |a| {
        let mut next = a.create_label();
        a.mov(r8, rsp)?;
        a.lea(rsp, qword_ptr(rdi + 8))?;
        // Or the bytes might be the same.
        a.not(qword_ptr(rdi))?;
        a.call(next)?;
        a.set_label(&mut next)?;
        a.mov(rsp, r8)
    }),
    ("fill", |a| {
        a.mov(rdx, rdi)?;
        a.mov(ecx, 64)?;
        a.rep().stosq()?;
        a.mov(rdi, rdx)
    }),
    ("copy", |a| {
        a.mov(rdx, rdi)?;
        a.lea(rsi, qword_ptr(rdi + 64))?;
        a.mov(qword_ptr(rsi), rax)?;
        a.mov(ecx, 8)?;
        a.rep().movsq()?;
        a.mov(rdi, rdx)
    }),
    ("copy downwards", |a| {
        a.mov(rdx, rdi)?;
        a.add(rdi, 16)?;
        a.std()?;
        a.mov(ecx, 2)?;
        a.rep().stosq()?;
        a.cld()?;
        a.mov(rdi, rdx)
    }),
    ("atomic addition", |a| {
        a.mov(ecx, 3)?;
        a.lock().xadd(qword_ptr(rdi), rcx)
    }),
    ("exchange", |a| a.xchg(qword_ptr(rdi), rax)),
    ("atomic comparison", |a| {
        a.mov(r8, rbx)?;
        a.mov(rcx, rax)?;
        a.mov(rax, qword_ptr(rdi))?;
        a.mov(rdx, qword_ptr(rdi + 8))?;
        a.lea(rbx, qword_ptr(rax + 1))?;
        a.lock().cmpxchg16b(xmmword_ptr(rdi))?;
        a.mov(rbx, r8)
    }),
    ("bit", |a| {
        a.and(eax, 1023)?;
        a.btc(qword_ptr(rdi), rax)
    }),
    ("vector", |a| {
        a.movq(xmm3, rax)?;
        a.movups(xmmword_ptr(rdi), xmm3)
    }),
    ("store past the cache", |a| a.movnti(qword_ptr(rdi), rax)),
    ("state image", |a| {
        a.not(qword_ptr(rdi + 504))?;
        a.fxsave64(ptr(rdi))
    }),
    ("flags", |a| {
        a.not(byte_ptr(rdi + 64))?;
        a.cmp(rax, rcx)?;
        a.setb(byte_ptr(rdi))
    }),
];

fn frames(set: &FrameSet) -> Vec<u64> {
    set.runs().flatten().collect()
}

fn frame(address: u64) -> u64 {
    address / PAGE_SIZE
}

/// Runs to the next VMCALL; gives the frames written until then, which a round was begun before.
fn next(m: &Machine, vcpu: &mut dyn Vcpu) -> Vec<u64> {
    run_to_vmcall(vcpu).unwrap();
    frames(&m.vm.begin_round())
}

/// In each round each page is written in the way it was written before; another is read.
#[test]
fn every_way_to_write_is_noted_in_every_round() {
    for user in [false, true] {
        for (name, piece) in MEANS {
            let m = if user {
                Machine::native(1)
            } else {
                Machine::new(1)
            };
            let pages = [DATA, SPLIT + 0x5000];
            let mut vcpu = m.vcpu(0, |a, _| {
                for round in 0..4u64 {
                    for page in pages {
                        a.mov(rdi, page + PAGE_SIZE)?;
                        a.mov(rcx, qword_ptr(rdi))?;
                        a.mov(rdi, page)?;
                        a.mov(rax, 0x1234_5678_9abc_def0 + round)?;
                        piece(a)?;
                    }
                    a.vmcall()?;
                }
                Ok(())
            });
            m.vm.begin_round();
            for round in 0..4 {
                let mut written = next(&m, &mut *vcpu);
                if round == 0 {
                    // The processor's first use of the tables, and the guest's of the stack.
                    written.retain(|gfn| *gfn >= 0x300);
                }
                let expected = [frame(DATA), frame(scattered(pages[1]))];
                assert_eq!(written, expected, "{name} in round {round}, user: {user}");
            }
            m.vm.end_rounds();
            let elsewhere = vcpu.control().time_elsewhere_ns();
            assert_eq!(elsewhere > 0, user, "{name}");
        }
    }
}

/// Such stores are the instruction semantics' and leave no trace in a TLB.
#[test]
fn write_to_a_page_with_code_is_noted() {
    for m in [Machine::new(1), Machine::native(1)] {
        let mut vcpu = m.vcpu(0, |a, _| {
            a.mov(rdi, code_address(0) + 0xf00)?;
            for value in 0..4 {
                a.mov(qword_ptr(rdi), value)?;
                a.vmcall()?;
            }
            Ok(())
        });
        run_to_vmcall(&mut *vcpu).unwrap();
        m.vm.begin_round();
        for _ in 0..3 {
            assert_eq!(next(&m, &mut *vcpu), [frame(code_address(0))]);
        }
    }
}

#[test]
fn atomic_access_to_two_frames_is_noted_in_both() {
    let m = Machine::new(1);
    let mut vcpu = m.vcpu(0, |a, _| {
        a.mov(rdi, SPLIT + 0xffc)?;
        for _ in 0..3 {
            a.mov(rcx, 0x1_0000_0001u64)?;
            a.lock().xadd(qword_ptr(rdi), rcx)?;
            a.vmcall()?;
        }
        Ok(())
    });
    run_to_vmcall(&mut *vcpu).unwrap();
    m.vm.begin_round();
    let mut expected = [SPLIT, SPLIT + PAGE_SIZE].map(|page| frame(scattered(page)));
    expected.sort_unstable();
    for _ in 0..2 {
        assert_eq!(next(&m, &mut *vcpu), expected);
    }
}

#[test]
fn bits_that_a_page_walk_sets_are_noted() {
    let m = Machine::new(1);
    let mut vcpu = m.vcpu(0, |a, _| {
        a.mov(rdi, SPLIT)?;
        a.mov(rsi, ENTRY)?;
        a.mov(rax, qword_ptr(rdi))?;
        a.mov(qword_ptr(rdi), rax)?;
        a.and(qword_ptr(rsi), !ACCESSED_DIRTY)?;
        a.invlpg(byte_ptr(rdi))?;
        a.vmcall()?;
        a.mov(rax, qword_ptr(rdi))?;
        a.vmcall()?;
        a.mov(rax, qword_ptr(rdi + 8))?;
        a.vmcall()?;
        a.mov(qword_ptr(rdi), 1)?;
        a.vmcall()
    });
    run_to_vmcall(&mut *vcpu).unwrap();
    m.vm.begin_round();
    assert_eq!(next(&m, &mut *vcpu), [frame(TABLE)], "accessed");
    assert!(next(&m, &mut *vcpu).is_empty());
    let both = [frame(TABLE), frame(scattered(SPLIT))];
    assert_eq!(next(&m, &mut *vcpu), both, "dirty");
}

#[test]
fn writes_of_the_monitor_are_noted() {
    let m = Machine::new(1);
    let mut vcpu = m.vcpu(0, |a, _| a.vmcall());
    run_to_vmcall(&mut *vcpu).unwrap();
    m.vm.begin_round();
    m.vm.mark_written(Gpa(DATA + 5), PAGE_SIZE);
    assert_eq!(frames(&m.vm.begin_round()), [frame(DATA), frame(DATA) + 1]);
    vcpu.write_virt(Gva(SPLIT), &[1; 8]).unwrap();
    let mut written = frames(&m.vm.begin_round());
    // It is the first access there.
    written.retain(|gfn| *gfn != frame(TABLE) && *gfn >= 0x300);
    assert_eq!(written, [frame(scattered(SPLIT))]);
}

#[test]
fn what_was_noted_before_the_log_ended_means_nothing() {
    let m = Machine::new(1);
    let mut vcpu = m.vcpu(0, |a, _| {
        a.mov(rdi, DATA)?;
        for value in 0..5 {
            a.mov(qword_ptr(rdi), value)?;
            a.vmcall()?;
        }
        Ok(())
    });
    run_to_vmcall(&mut *vcpu).unwrap();
    m.vm.begin_round();
    assert_eq!(next(&m, &mut *vcpu), [frame(DATA)]);
    m.vm.end_rounds();
    run_to_vmcall(&mut *vcpu).unwrap();
    assert!(m.vm.begin_round().is_empty());
    assert_eq!(next(&m, &mut *vcpu), [frame(DATA)]);
}

/// Programs write, by all means, pages that are theirs, in an order of their own, while rounds begin one after the other.
fn nothing_is_missed(m: &Machine, vcpus: u32, rounds: usize) {
    let all = (m.memory.ram()[0].end / PAGE_SIZE) as usize;
    let read = || {
        let mut bytes = vec![0; all * PAGE_SIZE as usize];
        m.memory.read_ram(Gpa(0), &mut bytes).unwrap();
        bytes
    };
    m.run_beside(
        vcpus,
        |a, id| {
            let mut again = a.create_label();
            a.mov(rbx, 0x9e37_79b9_7f4a_7c15 + u64::from(id))?;
            a.set_label(&mut again)?;
            for (n, (_, piece)) in MEANS.into_iter().enumerate() {
                let mut wait = a.create_label();
                for (left, by) in [(true, 13), (false, 7), (true, 17)] {
                    a.mov(rax, rbx)?;
                    if left {
                        a.shl(rax, by)?;
                    } else {
                        a.shr(rax, by)?;
                    }
                    a.xor(rbx, rax)?;
                }
                // One of four pages, in a large page or scattered.
                let group = (id * MEANS.len() as u32 + n as u32) * 4;
                a.mov(rdi, rbx)?;
                a.and(edi, 3)?;
                a.add(edi, group as i32)?;
                a.shl(rdi, 12)?;
                a.mov(rcx, rbx)?;
                a.shr(rcx, 40)?;
                a.and(ecx, (SPLIT - DATA) as i32)?;
                a.lea(rdi, qword_ptr(rdi + rcx))?;
                a.add(rdi, DATA as i32)?;
                a.mov(rax, rbx)?;
                piece(a)?;
                a.mov(rcx, rbx)?;
                a.and(ecx, 0xfff)?;
                a.inc(ecx)?;
                a.set_label(&mut wait)?;
                a.dec(ecx)?;
                a.jne(wait)?;
            }
            a.mov(rcx, STOP)?;
            a.cmp(qword_ptr(rcx), 0)?;
            a.je(again)
        },
        || {
            let mut sets = vec![m.vm.begin_round()];
            let mut differ: Vec<Vec<u64>> = Vec::new();
            let mut before = read();
            // On a busy machine programs do nothing in some rounds.
            let deadline = Instant::now() + Duration::from_secs(120);
            let mut busy = 0;
            while busy < rounds && Instant::now() < deadline {
                sets.push(m.vm.begin_round());
                let now = read();
                let pages = now.chunks(PAGE_SIZE as usize);
                let pages = pages.zip(before.chunks(PAGE_SIZE as usize)).zip(0..);
                let different = pages.filter(|((a, b), _)| a != b);
                differ.push(different.map(|(_, gfn)| gfn).collect());
                busy += usize::from(differ.last().is_some_and(|gfns| !gfns.is_empty()));
                before = now;
            }
            sets.push(m.vm.begin_round());
            m.memory.write(Gpa(STOP), &[1]).unwrap();
            assert_eq!(busy, rounds, "rounds in which anything was written");
            // What was written after a round had begun and before the page was read is in the next one's.
            for (n, gfns) in differ.iter().enumerate() {
                for gfn in gfns.iter().map(|gfn| Gfn(*gfn)) {
                    let noted = sets[n + 1].contains(gfn) || sets[n + 2].contains(gfn);
                    assert!(noted, "{gfn} in round {n}");
                }
            }
        },
    );
}

#[test]
fn nothing_is_missed_of_translated_code() {
    nothing_is_missed(&Machine::new(2), 2, 200);
}

#[test]
fn nothing_is_missed_of_native_code() {
    nothing_is_missed(&Machine::native(2), 2, 300);
}
