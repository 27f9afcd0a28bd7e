//! Domains whose engine runs a script in place of a guest's kernel.

mod core_dump;
mod failing;
mod live;
mod media;
mod memory;
mod moving;
mod requests;
mod saving;
mod vcpus;

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hospes_engine::{EngineError, Exit, reg, rflags};
use hospes_units::{DomId, Gpa, VcpuId};
use hospes_xen_abi::shared::Runstate;
use hospes_xen_abi::{event, hvm, hypercall as nr, ring, sched, vcpu};

use crate::testing::*;
use crate::*;

/// A file that goes with its value.
struct KernelFile(PathBuf);

impl KernelFile {
    fn new() -> KernelFile {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, SeqCst);
        let name = format!("hospes-domain-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, kernel()).unwrap();
        KernelFile(path)
    }
}

impl Drop for KernelFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// With so much memory at first and at most.
fn spec(
    vcpus: u32,
    [memory_bytes, memory_max_bytes]: [u64; 2],
    sink: Sink,
    kernel: &KernelFile,
) -> DomainSpec {
    DomainSpec {
        domid: DomId(3),
        uuid: [7; 16],
        name: "test".to_owned(),
        kernel: kernel.0.clone(),
        ramdisk: None,
        cmdline: "console=hvc0".to_owned(),
        memory_bytes,
        memory_max_bytes,
        promised: Box::new(|| 0),
        vcpus,
        level: Level::default(),
        wishes: Vec::new(),
        nomigrate: false,
        store: Arc::new(hospes_store::LocalStore::default()),
        console: Box::new(sink),
        files: Arc::new(hospes_image::HostFiles),
        disks: Vec::new(),
        vifs: Vec::new(),
        log: Arc::new(|_| {}),
        open: Box::new(|path| std::fs::File::open(path)),
        confine: Box::new(|_| Ok(())),
        scheduler: Arc::new(crate::Scheduler::of(std::process::id())),
    }
}

fn engine(
    script: impl FnMut(&mut Cpu<'_>) -> Result<Exit, EngineError> + Send + 'static,
) -> EngineFactory<'static> {
    let script: Script = Arc::new(Mutex::new(Box::new(script)));
    Box::new(move |memory, _, _| Ok(Arc::new(ScriptVm { memory, script })))
}

fn try_domain(
    vcpus: u32,
    memory_bytes: u64,
    sink: Sink,
    script: impl FnMut(&mut Cpu<'_>) -> Result<Exit, EngineError> + Send + 'static,
) -> Result<Domain, CreateError> {
    domain_with(vcpus, [memory_bytes; 2], sink, script)
}

fn domain_with(
    vcpus: u32,
    memory_bytes: [u64; 2],
    sink: Sink,
    script: impl FnMut(&mut Cpu<'_>) -> Result<Exit, EngineError> + Send + 'static,
) -> Result<Domain, CreateError> {
    let kernel = KernelFile::new();
    Domain::create(spec(vcpus, memory_bytes, sink, &kernel), engine(script))
}

pub(crate) fn domain(script: impl FnMut(&mut Cpu<'_>) -> Exit + Send + 'static) -> Domain {
    let mut script = script;
    try_domain(1, 64 << 20, Sink::default(), move |c| Ok(script(c))).unwrap()
}

/// The reason a script ends its domain for.
fn end_of(script: impl FnMut(&mut Cpu<'_>) -> Exit + Send + 'static) -> EndReason {
    let d = domain(script);
    d.unpause();
    d.wait()
}

#[test]
fn shutdown_by_hypercall_gives_its_reason() {
    for (code, want) in [
        (sched::SHUTDOWN_POWEROFF, EndReason::PowerOff),
        (sched::SHUTDOWN_REBOOT, EndReason::Reboot),
        (sched::SHUTDOWN_SUSPEND, EndReason::Suspend),
        (sched::SHUTDOWN_WATCHDOG, EndReason::Watchdog),
        (sched::SHUTDOWN_SOFT_RESET, EndReason::Reboot),
    ] {
        assert_eq!(end_of(move |c| c.shutdown(code)), want);
    }
    let EndReason::Crash(text) = end_of(|c| c.shutdown(sched::SHUTDOWN_CRASH)) else {
        panic!("not a crash");
    };
    assert!(text.contains("kernel"), "{text}");
}

#[test]
fn power_off_through_acpi_ends_the_domain() {
    let write = |port, value| Exit::PortIo {
        port,
        size: 1,
        write: true,
        value,
    };
    assert_eq!(
        end_of(move |c| match c.step {
            0 => write(hospes_builder::SLEEP_CONTROL_PORT, 0),
            1 => write(0xcf8, 0x34),
            _ => write(
                hospes_builder::SLEEP_CONTROL_PORT,
                u32::from(hospes_builder::POWER_OFF_REQUEST)
            ),
        }),
        EndReason::PowerOff
    );
}

#[test]
fn read_of_an_unclaimed_port_gives_ones() {
    let seen = Arc::new(AtomicU64::new(0));
    let log = seen.clone();
    let read = |size| Exit::PortIo {
        port: 0xcfc,
        size,
        write: false,
        value: 0,
    };
    let end = end_of(move |c| match c.step {
        0 => {
            c.state.gpr[reg::RAX] = 0x1111_2222_3333_4444;
            read(1)
        }
        1 => {
            log.fetch_add(
                u64::from(c.state.gpr[reg::RAX] == 0x1111_2222_3333_44ff),
                SeqCst,
            );
            read(2)
        }
        2 => {
            log.fetch_add(
                u64::from(c.state.gpr[reg::RAX] == 0x1111_2222_3333_ffff),
                SeqCst,
            );
            read(4)
        }
        _ => {
            log.fetch_add(u64::from(c.state.gpr[reg::RAX] == 0xffff_ffff), SeqCst);
            c.shutdown(0)
        }
    });
    assert_eq!((end, seen.load(SeqCst)), (EndReason::PowerOff, 3));
}

#[test]
fn read_of_the_absent_timer_gives_zeros() {
    const PORTS: [u16; 5] = [0x40, 0x41, 0x42, 0x43, 0x61];
    let zeros = Arc::new(AtomicU64::new(0));
    let log = zeros.clone();
    let end = end_of(move |c| {
        let step = c.step as usize;
        if step > 0 {
            log.fetch_add(
                u64::from(c.state.gpr[reg::RAX] == 0x1111_2222_3333_4400),
                SeqCst,
            );
        }
        let Some(&port) = PORTS.get(step) else {
            return c.shutdown(0);
        };
        c.state.gpr[reg::RAX] = 0x1111_2222_3333_4444;
        Exit::PortIo {
            port,
            size: 1,
            write: false,
            value: 0,
        }
    });
    assert_eq!((end, zeros.load(SeqCst)), (EndReason::PowerOff, 5));
}

#[test]
fn halt_without_interrupts_powers_off() {
    assert_eq!(
        end_of(|_| Exit::Halt {
            interrupts_enabled: false
        }),
        EndReason::PowerOff
    );
}

#[test]
fn triple_fault_names_its_address() {
    let end = end_of(|_| Exit::Shutdown { rip: 0xdead_beef });
    assert!(end.to_string().contains("0xdeadbeef"), "{end}");
}

#[test]
fn engine_failure_and_panic_end_the_domain() {
    let d = try_domain(1, 64 << 20, Sink::default(), |_| {
        Err(EngineError::Internal {
            engine: "script",
            rip: 0x123,
            what: "out of ideas".to_owned(),
        })
    })
    .unwrap();
    d.unpause();
    assert!(d.wait().to_string().contains("out of ideas"));
    let state = d.info().state;
    assert!(state.crashed && !state.dying);
    assert_eq!(state.to_string(), "----c-");
    assert!(matches!(
        end_of(|_| panic!("the script fails")),
        EndReason::Crash(_)
    ));
}

#[test]
fn pause_stops_the_guest_until_unpause() {
    let count = Arc::new(AtomicU64::new(0));
    let counter = count.clone();
    let d = domain(move |_| {
        counter.fetch_add(1, SeqCst);
        Exit::Yield
    });
    assert_eq!(d.info().state.to_string(), "--p---");
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(count.load(SeqCst), 0);
    for _ in 0..20 {
        d.unpause();
        let before = count.load(SeqCst);
        while count.load(SeqCst) < before + 10 {
            std::thread::yield_now();
        }
        assert_eq!(d.info().state.to_string(), "r-----");
        d.pause();
        let stopped = count.load(SeqCst);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(count.load(SeqCst), stopped);
        assert!(d.info().state.paused);
    }
    d.destroy();
    assert_eq!(d.wait(), EndReason::Destroyed);
    assert_eq!(d.end_reason(), Some(EndReason::Destroyed));
}

#[test]
fn destroy_a_paused_domain_ends_it() {
    let d = domain(|_| Exit::Yield);
    d.destroy();
    assert_eq!(d.wait(), EndReason::Destroyed);
    assert!(matches!(
        d.request_shutdown(ShutdownKind::Reboot),
        Err(RequestError::Ended(EndReason::Destroyed))
    ));
}

#[test]
fn halted_guest_is_woken_by_its_timer() {
    let d = domain(|c| match c.step {
        0 => c.call(
            nr::HVM_OP,
            hvm::SET_EVTCHN_UPCALL_VECTOR,
            &hvm::UpcallVector {
                vcpu: 0,
                vector: 0xf3,
                pad: [0; 3],
            },
        ),
        1 => c.call(
            nr::EVENT_CHANNEL_OP,
            event::BIND_VIRQ,
            &event::BindVirq::default(),
        ),
        2 => {
            // A timer call has a third argument and needs 64-bit code.
            c.state.msr.efer |= hospes_engine::cr::EFER_LMA;
            c.state.seg[hospes_engine::seg::CS].attr |= hospes_engine::Segment::ATTR_L;
            c.state.rflags |= rflags::IF;
            let timer = vcpu::SetSingleshot {
                timeout_abs_ns: u64::MAX / 4,
                ..Default::default()
            };
            c.state.gpr[reg::RDX] = ARG;
            let exit = c.call(nr::VCPU_OP, vcpu::SET_SINGLESHOT_TIMER, &timer);
            c.state.gpr[reg::RSI] = 0;
            exit
        }
        3 => {
            let timer = vcpu::SetSingleshot {
                // After this much system time at the latest the machine has booted, on any host.
                timeout_abs_ns: 50_000_000,
                ..Default::default()
            };
            let exit = c.call(nr::VCPU_OP, vcpu::SET_SINGLESHOT_TIMER, &timer);
            c.state.gpr[reg::RSI] = 0;
            exit
        }
        4 => Exit::Halt {
            interrupts_enabled: true,
        },
        _ => c.shutdown(sched::SHUTDOWN_REBOOT),
    });
    d.unpause();
    assert_eq!(d.wait(), EndReason::Reboot);
}

#[test]
fn guest_does_not_block_on_an_interrupt_that_the_engine_has_taken_in() {
    let d = domain(|c| match c.step {
        0 => c.call(
            nr::HVM_OP,
            hvm::SET_EVTCHN_UPCALL_VECTOR,
            &hvm::UpcallVector {
                vcpu: 0,
                vector: 0xf3,
                pad: [0; 3],
            },
        ),
        1 => c.call(
            nr::EVENT_CHANNEL_OP,
            event::BIND_IPI,
            &event::BindIpi::default(),
        ),
        2 => {
            let bound: event::BindIpi = c.memory.read_obj(hospes_units::Gpa(ARG)).unwrap();
            c.send(bound.port)
        }
        // The interrupt leaves the control for the engine before this.
        3 => Exit::Yield,
        4 => c.call(nr::SCHED_OP, sched::BLOCK, &0u64),
        _ => {
            assert_ne!(c.state.rflags & rflags::IF, 0);
            c.shutdown(sched::SHUTDOWN_REBOOT)
        }
    });
    d.unpause();
    assert_eq!(d.wait(), EndReason::Reboot);
}

#[test]
fn guest_that_blocks_sleeps_until_an_interrupt() {
    let d = domain(|c| match c.step {
        0 => c.call(nr::SCHED_OP, sched::BLOCK, &0u64),
        _ => c.shutdown(sched::SHUTDOWN_REBOOT),
    });
    d.unpause();
    while d.info().state.to_string() != "-b----" {
        std::thread::yield_now();
    }
    d.destroy();
    assert_eq!(d.wait(), EndReason::Destroyed);
}

#[test]
fn blocked_guest_shows_as_blocked() {
    let d = domain(|c| {
        c.state.rflags |= rflags::IF;
        Exit::Halt {
            interrupts_enabled: true,
        }
    });
    d.unpause();
    while d.info().state.to_string() != "-b----" {
        std::thread::yield_now();
    }
    d.pause();
    assert_eq!(d.info().state.to_string(), "--p---");
    let info = d.info();
    assert_eq!((info.memory_kib, info.vcpus_online), (65536, 1));
}

#[test]
fn console_output_reaches_history_sink_and_listener() {
    let sink = Sink::default();
    let d = try_domain(1, 64 << 20, sink.clone(), |c| {
        Ok(match c.step {
            0 => {
                let text = b"hello from the ring\n";
                c.memory
                    .write(Gpa(CONSOLE + ring::CONSOLE_OUT as u64), text)
                    .unwrap();
                let prod = Gpa(CONSOLE + ring::CONSOLE_OUT_PROD as u64);
                c.memory.write_obj(prod, &(text.len() as u32)).unwrap();
                c.send(CONSOLE_PORT)
            }
            1..=3 => Exit::PortIo {
                port: 0xe9,
                size: 1,
                write: true,
                value: u32::from(b"abc"[c.step as usize - 1]),
            },
            _ => c.shutdown(0),
        })
    })
    .unwrap();
    let listener = d.console().subscribe();
    d.unpause();
    d.wait();
    let heard: Vec<u8> = listener
        .output
        .iter()
        .flat_map(|piece| piece.to_vec())
        .collect();
    let kept = d.console().subscribe().history;
    assert_eq!(heard, kept);
    assert_eq!(*lock(&sink.0), kept);
    let mut letters: Vec<u8> = b"hello from the ring\nabc".to_vec();
    let mut got = kept.clone();
    // The port and the ring are two ways; only each one's own order is kept.
    letters.sort_unstable();
    got.sort_unstable();
    assert_eq!(got, letters);
}

#[test]
fn console_input_reaches_the_guest() {
    let d = domain(|c| {
        if c.word(CONSOLE + ring::CONSOLE_IN_PROD as u64) < 5 {
            return Exit::Yield;
        }
        let mut text = [0; 5];
        c.memory.read(Gpa(CONSOLE), &mut text).unwrap();
        c.shutdown(u32::from(&text == b"login"))
    });
    d.unpause();
    assert_eq!(d.console().write_input(b"login"), 5);
    assert_eq!(d.wait(), EndReason::Reboot);
}

#[test]
fn guest_reads_its_name_from_the_store() {
    let d = domain(|c| match c.step {
        0 => {
            let mut message = Vec::new();
            for word in [2u32, 77, 0, 5] {
                message.extend(word.to_le_bytes());
            }
            message.extend(b"name\0");
            c.memory.write(Gpa(STORE), &message).unwrap();
            let prod = Gpa(STORE + ring::XS_REQ_PROD as u64);
            c.memory.write_obj(prod, &(message.len() as u32)).unwrap();
            c.send(STORE_PORT)
        }
        _ if c.word(STORE + ring::XS_RSP_PROD as u64) < 20 => Exit::Yield,
        _ => {
            let mut reply = [0; 20];
            c.memory
                .read(Gpa(STORE + ring::XS_RSP as u64), &mut reply)
                .unwrap();
            c.shutdown(u32::from(reply[4] == 77 && &reply[16..] == b"test"))
        }
    });
    d.unpause();
    assert_eq!(d.wait(), EndReason::Reboot);
}

#[test]
fn second_vcpu_waits_and_the_first_ends_the_domain() {
    let d = try_domain(2, 64 << 20, Sink::default(), |c| {
        assert_eq!(c.id, 0, "nobody started the other one");
        Ok(match c.step {
            0..=99 => Exit::Yield,
            _ => CLI_HLT,
        })
    })
    .unwrap();
    d.unpause();
    d.pause();
    d.unpause();
    assert_eq!(d.wait(), EndReason::PowerOff);
}

#[test]
fn vcpu_that_is_down_is_brought_back_by_an_nmi() {
    let d = try_domain(2, 64 << 20, Sink::default(), |c| {
        Ok(match (c.id, c.step) {
            (0, 0) => vcpu_op(c, vcpu::SEND_NMI),
            (0, _) => Exit::Yield,
            _ => c.shutdown(sched::SHUTDOWN_REBOOT),
        })
    })
    .unwrap();
    d.unpause();
    assert_eq!(d.wait(), EndReason::Reboot);
}

/// A call about vCPU 1, from 64-bit code as it needs to be.
fn vcpu_op(c: &mut Cpu<'_>, cmd: u64) -> Exit {
    c.state.msr.efer |= hospes_engine::cr::EFER_LMA;
    c.state.seg[hospes_engine::seg::CS].attr |= hospes_engine::Segment::ATTR_L;
    let exit = c.call(nr::VCPU_OP, cmd, &0u64);
    c.state.gpr[reg::RSI] = 1;
    exit
}

const CLI_HLT: Exit = Exit::Halt {
    interrupts_enabled: false,
};

#[test]
fn last_vcpu_that_halts_powers_off_beside_one_taken_down_while_halted() {
    for pauses in [0, 20] {
        let d = try_domain(2, 64 << 20, Sink::default(), move |c| {
            assert_eq!(c.id, 0, "nobody started the other one");
            Ok(match c.step {
                0 => vcpu_op(c, vcpu::DOWN),
                step if step <= pauses => {
                    std::thread::sleep(Duration::from_millis(1));
                    Exit::Yield
                }
                _ => CLI_HLT,
            })
        })
        .unwrap();
        d.unpause();
        assert_eq!(d.wait(), EndReason::PowerOff);
    }
}

#[test]
fn impossible_domains_are_refused() {
    let refuse = |vcpus, bytes| {
        try_domain(vcpus, bytes, Sink::default(), |_| Ok(Exit::Yield))
            .unwrap_err()
            .to_string()
    };
    assert!(refuse(0, 64 << 20).contains("vcpus"));
    assert!(refuse(129, 64 << 20).contains("129"));
    assert!(refuse(1, 12345).contains("12345"));
    let text = refuse(1, 16 << 40);
    assert!(text.contains("memory") && text.contains("test"), "{text}");
}
