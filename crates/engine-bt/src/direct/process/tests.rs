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
    process.set_registers(&regs).unwrap();
    regs
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
    let (process, _memory) = with_code(&[0xb8, 231, 0, 0, 0, 0x0f, 0x05, 0xcc]);
    start(&process, CODE);
    assert_eq!(process.run().unwrap(), Stop::Syscall);
    let regs = process.registers().unwrap();
    assert_eq!((regs.orig_rax, regs.rip), (231, CODE + 7));
    assert_eq!(
        process.run().unwrap(),
        Stop::Fault {
            signal: libc::SIGTRAP,
            code: 0x80,
            address: 0
        }
    );
    assert_eq!(process.registers().unwrap().rip, CODE + 8);
}

#[test]
fn fault_tells_the_address() {
    // mov al, [0x12345678]
    let (process, _memory) = with_code(&[0x8a, 0x04, 0x25, 0x78, 0x56, 0x34, 0x12]);
    start(&process, CODE);
    assert_eq!(
        process.run().unwrap(),
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
    let (process, _memory) = with_code(&[0xeb, 0xfe]);
    start(&process, CODE);
    kick(process.kick_fd());
    assert_eq!(process.run().unwrap(), Stop::Kick);
    let fd = process.kick_fd();
    std::thread::scope(|s| {
        s.spawn(move || kick(fd));
        assert_eq!(process.run().unwrap(), Stop::Kick);
    });
    assert_eq!(process.registers().unwrap().rip, CODE);
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
fn breakpoint_stops_before_its_instruction() {
    // nop; cpuid; nop; int3
    let (process, _memory) = with_code(&[0x90, 0x0f, 0xa2, 0x90, 0xcc]);
    process.set_breakpoints(&[CODE + 0x100, CODE + 1]).unwrap();
    start(&process, CODE);
    let stop = process.run().unwrap();
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
    assert_eq!(process.registers().unwrap().rip, CODE + 1);
    process.set_breakpoints(&[]).unwrap();
    start(&process, CODE);
    process.run().unwrap();
    assert_eq!(process.registers().unwrap().rip, CODE + 5);
}

#[test]
fn vector_state_goes_in_and_out() {
    // vaddps ymm1, ymm0, ymm0; int3
    let (process, _memory) = with_code(&[0xc5, 0xfc, 0x58, 0xc8, 0xcc]);
    start(&process, CODE);
    let mut image = vec![0u8; 832];
    image[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    image[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    image[512] = 7;
    for lane in 0..4 {
        image[160 + 4 * lane..][..4].copy_from_slice(&1.5f32.to_le_bytes());
        image[576 + 4 * lane..][..4].copy_from_slice(&2.5f32.to_le_bytes());
    }
    process.write_xstate(&image, &mut Vec::new()).unwrap();
    assert!(matches!(process.run().unwrap(), Stop::Fault { .. }));
    let mut after = vec![0u8; 832];
    process.read_xstate(&mut after).unwrap();
    assert_eq!(after[176..180], 3.0f32.to_le_bytes());
    assert_eq!(after[592..596], 5.0f32.to_le_bytes());
}

#[test]
fn mxcsr_is_known_where_all_vector_registers_are_zero() {
    // vzeroall; mov dword [0x401000], 0x9fc0; ldmxcsr [0x401000]; int3
    let (process, _memory) = with_code(&[
        0xc5, 0xfc, 0x77, 0xc7, 0x04, 0x25, 0x00, 0x10, 0x40, 0x00, 0xc0, 0x9f, 0, 0, 0x0f, 0xae,
        0x14, 0x25, 0x00, 0x10, 0x40, 0x00, 0xcc,
    ]);
    start(&process, CODE);
    assert!(matches!(process.run().unwrap(), Stop::Fault { .. }));
    assert_eq!(process.mxcsr().unwrap(), 0x9fc0);
}
