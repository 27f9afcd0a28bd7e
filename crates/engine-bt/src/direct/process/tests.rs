//! Processes that run a few instructions.

use super::*;

const CODE: u64 = 0x40_0000;

/// A process with these bytes at `CODE`, readable and executable, and a writable page behind.
fn with_code(code: &[u8]) -> (Process, OwnedFd) {
    let mut content = code.to_vec();
    content.resize(2 * PAGE, 0);
    let memory = memfd(c"test", &content).unwrap();
    let process = Process::new(memory.as_raw_fd()).unwrap();
    let (rx, rw) = (
        libc::PROT_READ | libc::PROT_EXEC,
        libc::PROT_READ | libc::PROT_WRITE,
    );
    let calls = [
        process.map_call(CODE, PAGE as u64, rx, 0),
        process.map_call(CODE + PAGE as u64, PAGE as u64, rw, PAGE as u64),
    ];
    process.batch(&calls).unwrap();
    (process, memory)
}

fn start(process: &Process, rip: u64) -> Registers {
    let mut regs = process.template;
    regs.rip = rip;
    regs.orig_rax = u64::MAX;
    regs
}

/// A mapping that changes nothing of the code at `CODE`, so that it is run by way of our own.
fn remap(process: &mut Process) {
    let call = process.map_call(CODE, PAGE as u64, libc::PROT_READ | libc::PROT_EXEC, 0);
    process.queue([call]);
}

#[test]
fn process_is_empty_but_for_the_area() {
    let (process, _memory) = with_code(&[0x90]);
    let foreign = process.foreign_ranges().unwrap();
    assert_eq!(
        foreign,
        [
            CODE..CODE + PAGE as u64,
            CODE + PAGE as u64..CODE + 2 * PAGE as u64
        ]
    );
}

#[test]
fn syscall_of_the_guest_stops_and_is_not_made() {
    // mov eax, SYS_exit_group; syscall; int3
    let (mut process, _memory) = with_code(&[0xb8, 231, 0, 0, 0, 0x0f, 0x05, 0xcc]);
    for queued in [false, true] {
        let mut regs = start(&process, CODE);
        if queued {
            remap(&mut process);
        }
        assert_eq!(process.run(&mut regs).unwrap(), Stop::Syscall);
        assert_eq!((regs.orig_rax, regs.rip), (231, CODE + 7));
        regs.orig_rax = u64::MAX;
        if queued {
            remap(&mut process);
        }
        assert_eq!(
            process.run(&mut regs).unwrap(),
            Stop::Fault {
                signal: libc::SIGTRAP,
                code: 0x80,
                address: 0
            }
        );
        assert_eq!(regs.rip, CODE + 8);
    }
}

#[test]
fn fault_tells_the_address() {
    // mov al, [0x12345678]
    let (mut process, _memory) = with_code(&[0x8a, 0x04, 0x25, 0x78, 0x56, 0x34, 0x12]);
    let mut regs = start(&process, CODE);
    assert_eq!(
        process.run(&mut regs).unwrap(),
        Stop::Fault {
            signal: libc::SIGSEGV,
            code: 1,
            address: 0x1234_5678
        }
    );
}

#[test]
fn kick_before_and_during_a_run_stops_it() {
    // jmp $
    let (mut process, _memory) = with_code(&[0xeb, 0xfe]);
    let mut regs = start(&process, CODE);
    kick(process.kick_fd());
    assert_eq!(process.run(&mut regs).unwrap(), Stop::Kick);
    let fd = process.kick_fd();
    std::thread::scope(|s| {
        s.spawn(move || kick(fd));
        assert_eq!(process.run(&mut regs).unwrap(), Stop::Kick);
    });
    assert_eq!(regs.rip, CODE);
}

#[test]
fn kick_does_not_lose_a_call() {
    // jmp $
    let (mut process, _memory) = with_code(&[0xeb, 0xfe]);
    let mut regs = start(&process, CODE);
    regs.rbx = 0x1234;
    for n in 0..20 {
        let calls = (0..n).map(|i| {
            let there = CODE + (16 + 2 * i) * PAGE as u64;
            process.map_call(there, PAGE as u64, libc::PROT_READ, 0)
        });
        let calls: Vec<Call> = calls.collect();
        process.queue(calls);
        kick(process.kick_fd());
        assert_eq!(process.run(&mut regs).unwrap(), Stop::Kick);
        assert_eq!((regs.rip, regs.rbx), (CODE, 0x1234));
        let made = process.foreign_ranges().unwrap().len() as u64;
        assert_eq!(made, 2 + n);
        let calls = (0..n).map(|i| {
            let there = CODE + (16 + 2 * i) * PAGE as u64;
            Process::unmap_call(there, PAGE as u64)
        });
        process.queue(calls);
        std::thread::scope(|s| {
            let fd = process.kick_fd();
            s.spawn(move || kick(fd));
            assert_eq!(process.run(&mut regs).unwrap(), Stop::Kick);
        });
        assert_eq!(process.foreign_ranges().unwrap().len(), 2);
    }
}

#[test]
fn registers_pass_the_calls_unchanged() {
    // int3
    let (mut process, _memory) = with_code(&[0xcc]);
    let mut regs = start(&process, CODE);
    [
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp,
    ] = [1, 2, 3, 4, 5, 6, 7, 8];
    [
        regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ] = [9, 10, 11, 12, 13, 14, 15, 16];
    // Carry, parity, adjust, zero, sign, direction, overflow.
    regs.eflags |= 0xcd5;
    regs.fs_base = 0x7000;
    regs.gs_base = 0x8000;
    remap(&mut process);
    let before = regs;
    let stop = process.run(&mut regs).unwrap();
    assert!(
        matches!(
            stop,
            Stop::Fault {
                signal: libc::SIGTRAP,
                ..
            }
        ),
        "{stop:?}"
    );
    let words = |r: &Registers| -> Vec<u64> {
        // SAFETY: the structure is made of words.
        unsafe { *(&raw const *r).cast::<[u64; size_of::<Registers>() / 8]>() }.to_vec()
    };
    let mut expected = before;
    expected.rip += 1;
    assert_eq!(words(&regs), words(&expected));
}

/// Host CPUs that a process, or this thread for 0, may run on.
fn cpus(pid: i32) -> i32 {
    // SAFETY: an all-zero set is an empty one, and the call is given its size.
    unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        assert_eq!(libc::sched_getaffinity(pid, size_of_val(&set), &mut set), 0);
        libc::CPU_COUNT(&set)
    }
}

#[test]
fn process_stays_or_goes_where_the_thread_may() {
    let (mut process, _memory) = with_code(&[0xcc]);
    process.follow(true);
    assert_eq!(cpus(process.pid), 1);
    process.follow(false);
    assert_eq!(cpus(process.pid), cpus(0));
}

#[test]
fn calls_have_their_share_of_a_run() {
    // int3
    let (mut process, _memory) = with_code(&[0xcc]);
    let mut regs = start(&process, CODE);
    process.run(&mut regs).unwrap();
    assert_eq!(process.calls_share(), 0.0);
    regs.rip = CODE;
    for _ in 0..500 {
        remap(&mut process);
    }
    process.run(&mut regs).unwrap();
    let share = process.calls_share();
    assert!(share > 0.0 && share < 1.0, "{share}");
}

#[test]
fn call_that_fails_leaves_the_registers() {
    let (mut process, _memory) = with_code(&[0xcc]);
    let mut regs = start(&process, CODE);
    regs.rdx = 77;
    // Not the start of a page.
    let call = process.map_call(CODE + 1, PAGE as u64, libc::PROT_READ, 0);
    process.queue([call]);
    let fault = process.run(&mut regs).unwrap_err();
    assert_eq!(fault.raw_os_error(), Some(libc::EINVAL));
    assert_eq!((regs.rip, regs.rdx), (CODE, 77));
    assert_eq!(process.first_call(), 0);
}

#[test]
fn key_is_gone_when_guest_code_runs() {
    // int3
    let (mut process, _memory) = with_code(&[0xcc]);
    let mut regs = start(&process, CODE);
    for _ in 0..3 {
        remap(&mut process);
    }
    process.run(&mut regs).unwrap();
    let [third, fifth] = process.key.map(|k| (k >> 32) as u32);
    assert!(third != 0 && fifth != 0);
    // SAFETY: the area is mapped, and the process that shares it is stopped.
    let area = unsafe { std::slice::from_raw_parts(process.area.cast::<u32>(), AREA_BYTES / 4) };
    assert!(!area.contains(&third) && !area.contains(&fifth));
}

#[test]
fn mapping_calls_of_guest_code_stop_it() {
    // mov eax, SYS_munmap; mov edi, CODE + PAGE; mov esi, PAGE; syscall; int3
    let (mut process, _memory) = with_code(&[
        0xb8, 11, 0, 0, 0, 0xbf, 0, 0x10, 0x40, 0, 0xbe, 0, 0x10, 0, 0, 0x0f, 0x05, 0xcc,
    ]);
    for queued in [false, true] {
        let mut regs = start(&process, CODE);
        if queued {
            remap(&mut process);
        }
        assert_eq!(process.run(&mut regs).unwrap(), Stop::Syscall);
        assert_eq!(regs.orig_rax, libc::SYS_munmap as u64);
        assert_eq!(process.foreign_ranges().unwrap().len(), 2);
    }
}

#[test]
fn guest_code_that_finds_the_code_of_calls_makes_none() {
    // jmp rax
    let (mut process, _memory) = with_code(&[0xff, 0xe0]);
    for entry in [stub::ONE, stub::GO, stub::GO + 46] {
        for queued in [false, true] {
            let mut regs = start(&process, CODE);
            regs.rax = process.base + entry;
            if queued {
                remap(&mut process);
            }
            // However it ends, everything is still there.
            let _ = process.run(&mut regs);
            assert_eq!(process.foreign_ranges().unwrap().len(), 2);
        }
    }
}

#[test]
fn area_moves_and_still_serves() {
    let (mut process, _memory) = with_code(&[0xeb, 0xfe]);
    let old = process.base;
    process.move_area().unwrap();
    assert!(!process.in_area(old));
    process.unmap_all().unwrap();
    assert!(process.foreign_ranges().unwrap().is_empty());
}

#[test]
fn mapping_calls_are_the_only_ones_left() {
    let (process, _memory) = with_code(&[0x90]);
    let getpid = [libc::SYS_getpid as u64, 0, 0, 0, 0, 0, 0];
    assert!(process.call(process.base + stub::ONE, getpid).is_err());
}

#[test]
fn mapping_calls_need_the_whole_key() {
    for wrong in [[1 << 32, 0], [0, 1 << 32], [1 << 63, 1 << 63]] {
        let (mut process, _memory) = with_code(&[0x90]);
        for (key, wrong) in process.key.iter_mut().zip(wrong) {
            *key ^= wrong;
        }
        let unmap = Process::unmap_call(CODE, PAGE as u64);
        assert!(process.call(process.base + stub::ONE, unmap).is_err());
        assert_eq!(process.foreign_ranges().unwrap().len(), 2);
    }
}

#[test]
fn breakpoint_stops_before_its_instruction() {
    // nop; cpuid; nop; int3
    let (mut process, _memory) = with_code(&[0x90, 0x0f, 0xa2, 0x90, 0xcc]);
    process.set_breakpoints(&[CODE + 0x100, CODE + 1]).unwrap();
    let mut regs = start(&process, CODE);
    let stop = process.run(&mut regs).unwrap();
    assert!(
        matches!(
            stop,
            Stop::Fault {
                signal: libc::SIGTRAP,
                code: 4,
                ..
            }
        ),
        "{stop:?}"
    );
    assert_eq!(regs.rip, CODE + 1);
    process.set_breakpoints(&[]).unwrap();
    let mut regs = start(&process, CODE);
    process.run(&mut regs).unwrap();
    assert_eq!(regs.rip, CODE + 5);
}

#[test]
fn vector_state_goes_in_and_out() {
    // vaddps ymm1, ymm0, ymm0; int3
    let (mut process, _memory) = with_code(&[0xc5, 0xfc, 0x58, 0xc8, 0xcc]);
    let mut regs = start(&process, CODE);
    let mut image = vec![0u8; 832];
    image[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    image[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    image[512] = 7;
    for lane in 0..4 {
        image[160 + 4 * lane..][..4].copy_from_slice(&1.5f32.to_le_bytes());
        image[576 + 4 * lane..][..4].copy_from_slice(&2.5f32.to_le_bytes());
    }
    process.write_xstate(&image, &mut Vec::new()).unwrap();
    let stop = process.run(&mut regs).unwrap();
    assert!(matches!(stop, Stop::Fault { .. }));
    let mut after = vec![0u8; 832];
    process.read_xstate(&mut after).unwrap();
    assert_eq!(after[176..180], 3.0f32.to_le_bytes());
    assert_eq!(after[592..596], 5.0f32.to_le_bytes());
}

#[test]
fn mxcsr_is_known_where_all_vector_registers_are_zero() {
    // vzeroall; mov dword [0x401000], 0x9fc0; ldmxcsr [0x401000]; int3
    let (mut process, _memory) = with_code(&[
        0xc5, 0xfc, 0x77, 0xc7, 0x04, 0x25, 0x00, 0x10, 0x40, 0x00, 0xc0, 0x9f, 0, 0, 0x0f, 0xae,
        0x14, 0x25, 0x00, 0x10, 0x40, 0x00, 0xcc,
    ]);
    let mut regs = start(&process, CODE);
    let stop = process.run(&mut regs).unwrap();
    assert!(matches!(stop, Stop::Fault { .. }));
    assert_eq!(process.mxcsr().unwrap(), 0x9fc0);
}

#[test]
fn signals_to_all_processes_of_a_session_do_not_stop_guest_code() {
    // mov eax, 1; int3
    let (mut process, _memory) = with_code(&[0xb8, 1, 0, 0, 0, 0xcc]);
    for queued in [false, true] {
        let mut regs = start(&process, CODE);
        if queued {
            remap(&mut process);
        }
        for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGCONT] {
            // SAFETY: a plain system call; the process lives as long as its owner.
            unsafe { libc::kill(process.pid, signal) };
        }
        process.run(&mut regs).unwrap();
        assert_eq!((regs.rax, regs.rip), (1, CODE + 6));
    }
}

#[test]
fn vsyscall_stops_where_it_was_called() {
    if !std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .contains("[vsyscall]")
    {
        eprintln!("skipped: this host has no vsyscalls");
        return;
    }
    const GETTIMEOFDAY: u64 = 0xffff_ffff_ff60_0000;
    // call rax; int3
    let (mut process, _memory) = with_code(&[0xff, 0xd0, 0xcc]);
    for queued in [false, true] {
        let mut regs = start(&process, CODE);
        let top = CODE + 2 * PAGE as u64;
        (regs.rax, regs.rsp) = (GETTIMEOFDAY, top);
        if queued {
            remap(&mut process);
        }
        assert_eq!(process.run(&mut regs).unwrap(), Stop::Vsyscall);
        assert_eq!((regs.rip, regs.rsp), (GETTIMEOFDAY, top - 8));
    }
}

/// Asserts the same of system calls that a confined process does not get: its own are refused, the guest's stop.
#[test]
fn guest_code_of_a_confined_process_stops_at_every_call() {
    // mov eax, SYS_socket; syscall; mov eax, SYS_clone3; syscall; mov eax, 1; int 0x80
    let code = [
        0xb8, 41, 0, 0, 0, 0x0f, 0x05, 0xb8, 0xb3, 1, 0, 0, 0x0f, 0x05, 0xb8, 1, 0, 0, 0, 0xcd,
        0x80,
    ];
    let work = || {
        let keep = hospes_sandbox::Keep {
            read: &["/proc".into()],
            user: Some(4_190_711),
        };
        hospes_sandbox::confine(&keep).unwrap();
        let (mut process, _memory) = with_code(&code);
        for queued in [false, true] {
            let mut regs = start(&process, CODE);
            for (call, rip) in [(41, 7), (435, 14), (1, 21)] {
                if queued {
                    remap(&mut process);
                }
                assert_eq!(process.run(&mut regs).unwrap(), Stop::Syscall);
                assert_eq!((regs.orig_rax, regs.rip), (call, CODE + rip));
                regs.orig_rax = u64::MAX;
            }
        }
    };
    // SAFETY: plain system calls. The child has this thread alone, which ends in it.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            let done = std::panic::catch_unwind(work);
            libc::_exit(i32::from(done.is_err()));
        }
        assert_eq!(wait(child).unwrap(), 0);
    }
}
