//! Guests that suspend themselves, and domains that come out of a stream.

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU32};

use hospes_migration::{Reader, Record, Writer};
use serde_json::{Value, json};

use super::*;

pub(super) const MEMORY: u64 = 64 << 20;
const PAGE: Gpa = Gpa(32 << 20);

/// A guest of two vCPUs that suspends itself once it was asked to, with a word in its memory and another in a register, and tells in its way to end what the
/// hypercall came back with.
fn suspending(asked: Arc<AtomicBool>) -> Domain {
    let d = try_domain(2, MEMORY, Sink::default(), move |c| {
        Ok(match c.id {
            0 if asked.swap(false, SeqCst) => {
                c.memory.write_obj(PAGE, &77u32).unwrap();
                c.state.gpr[reg::R12] = 88;
                c.shutdown(sched::SHUTDOWN_SUSPEND)
            }
            0 => after(c).unwrap_or(Exit::Yield),
            _ => Exit::Yield,
        })
    })
    .unwrap();
    d.unpause();
    d
}

/// How a guest ends that has been suspended.
fn after(c: &mut Cpu<'_>) -> Option<Exit> {
    if c.state.gpr[reg::R12] != 88 || c.word(PAGE.0) != 77 {
        return None;
    }
    Some(match c.state.gpr[reg::RAX] {
        0 => c.shutdown(sched::SHUTDOWN_REBOOT),
        1 => c.shutdown(sched::SHUTDOWN_POWEROFF),
        _ => c.shutdown(sched::SHUTDOWN_CRASH),
    })
}

/// A domain that is suspended.
fn suspended() -> Domain {
    let asked = Arc::new(AtomicBool::new(false));
    let d = suspending(Arc::clone(&asked));
    suspend(&d, &asked);
    d
}

/// Has a guest suspend itself that does so once it finds this set.
pub(super) fn suspend(d: &Domain, asked: &AtomicBool) {
    let once = AtomicBool::new(true);
    let ask = || {
        if once.swap(false, SeqCst) {
            asked.store(true, SeqCst);
        }
        false
    };
    d.suspend(&ask).unwrap();
}

fn saved(d: &Domain) -> Vec<u8> {
    let mut bytes = Vec::new();
    let to: &mut dyn Write = &mut bytes;
    let mut stream = Writer::new(to, b"configuration").unwrap();
    d.save(&mut stream, None).unwrap();
    stream.end().unwrap();
    bytes
}

pub(super) fn restored(
    vcpus: u32,
    memory_bytes: u64,
    bytes: Vec<u8>,
) -> Result<Domain, CreateError> {
    restored_beside(Box::new(|| 0), vcpus, memory_bytes, bytes)
}

/// On a host that has promised so much to others.
fn restored_beside(
    promised: Box<dyn Fn() -> u64 + Send + Sync>,
    vcpus: u32,
    memory_bytes: u64,
    bytes: Vec<u8>,
) -> Result<Domain, CreateError> {
    let from: Box<dyn Read + Send> = Box::new(std::io::Cursor::new(bytes));
    let (stream, config) = Reader::new(from).unwrap();
    assert_eq!(config, b"configuration");
    let kernel = KernelFile::new();
    let spec = spec(vcpus, [memory_bytes; 2], Sink::default(), &kernel);
    Domain::restore(
        DomainSpec { promised, ..spec },
        stream,
        engine(|c| {
            Ok(match c.id {
                0 => after(c).expect("the memory and the registers are there"),
                _ => Exit::Yield,
            })
        }),
    )
}

/// The stream with another machine, and with one page more.
fn changed(bytes: &[u8], change: impl Fn(&mut Value), page: Option<u64>) -> Vec<u8> {
    let (mut reader, config) = Reader::new(bytes).unwrap();
    let mut writer = Writer::new(Vec::new(), &config).unwrap();
    loop {
        match reader.next().unwrap() {
            Record::Machine(text) => {
                let mut value = serde_json::from_slice(text).unwrap();
                change(&mut value);
                writer
                    .machine(&serde_json::to_vec(&value).unwrap())
                    .unwrap();
            }
            Record::Pages { first, bytes } => writer.pages(first, bytes).unwrap(),
            Record::Config(_) => unreachable!("it has been read"),
            Record::End => break,
        }
    }
    if let Some(first) = page {
        writer.pages(first, &[1; 4096]).unwrap();
    }
    writer.end().unwrap()
}

#[test]
fn saved_domain_goes_on_in_a_new_one() {
    let d = suspended();
    assert!(d.is_suspended());
    let time = d.xen().system_time_ns();
    let bytes = saved(&d);
    assert!(
        bytes.len() < 1 << 20,
        "{} bytes of an empty guest",
        bytes.len()
    );
    drop(d);
    let d = restored(2, MEMORY, bytes).unwrap();
    assert!(d.xen().system_time_ns() >= time);
    d.unpause();
    assert_eq!(d.wait(), EndReason::Reboot);
}

/// What a guest of 32 MiB in 64 has or may take that was saved when it might have so much more than that, and restored beside others.
fn claimed_mib_after(most_mib: Option<u64>, promised: u64) -> u64 {
    let asked = Arc::new(AtomicBool::new(false));
    let suspends = Arc::clone(&asked);
    let sizes = [MEMORY / 2, MEMORY];
    let d = domain_with(1, sizes, Sink::default(), move |c| {
        Ok(match suspends.swap(false, SeqCst) {
            true => c.shutdown(sched::SHUTDOWN_SUSPEND),
            false => Exit::Yield,
        })
    })
    .unwrap();
    if let Some(mib) = most_mib {
        d.set_memory_max(mib << 10, &|| 0).unwrap();
    }
    d.unpause();
    suspend(&d, &asked);
    let from: Box<dyn Read + Send> = Box::new(std::io::Cursor::new(saved(&d)));
    let (stream, _) = Reader::new(from).unwrap();
    let kernel = KernelFile::new();
    let calls = AtomicU32::new(0);
    let spec = DomainSpec {
        // The domain itself has its place: others have come since.
        promised: Box::new(move || match calls.fetch_add(1, SeqCst) {
            0 | 1 => 0,
            _ => promised,
        }),
        ..spec(1, sizes, Sink::default(), &kernel)
    };
    let d = Domain::restore(spec, stream, engine(|_| Ok(Exit::Yield))).unwrap();
    // Of 4 KiB.
    d.xen().claimed_pages() / 256
}

#[test]
fn restored_domain_may_have_the_memory_that_it_might_have() {
    assert_eq!(claimed_mib_after(None, 0), 32);
    assert_eq!(claimed_mib_after(Some(48), 0), 48);
    assert_eq!(claimed_mib_after(Some(1 << 30), 0), 64);
    // What the host does not have it goes on without.
    assert_eq!(claimed_mib_after(Some(48), u64::MAX), 32);
}

#[test]
fn watchdog_waits_for_a_guest_that_is_suspended() {
    let d = suspended();
    let host: &dyn hospes_xen::Host = &*d.run;
    assert!(!host.watchdog_expired());
    assert_eq!(d.end_reason(), None);
    d.resume();
    assert!(host.watchdog_expired());
    assert!(d.end_reason().is_some());
}

#[test]
fn saved_domain_ends_only_while_it_is_suspended() {
    let d = suspended();
    assert!(d.end_saved());
    assert!(!d.is_suspended());
    assert_eq!(d.wait(), EndReason::Destroyed);
    let d = suspended();
    d.resume();
    assert!(!d.end_saved());
    assert_eq!(d.wait(), EndReason::PowerOff);
}

#[test]
fn restored_vcpu_that_was_down_is_seen_as_down() {
    let bytes = saved(&suspended());
    let down = |v: &mut Value| v["vcpus"][1]["up"] = json!(false);
    let d = restored(2, MEMORY, changed(&bytes, down, None)).unwrap();
    let online = |d: &Domain| d.vcpus().iter().map(|v| v.online).collect::<Vec<_>>();
    assert_eq!(online(&d), [true, false]);
    // It waits for its start, as it did.
    let d = restored(2, MEMORY, bytes.clone()).unwrap();
    assert_eq!(online(&d), [true, false]);
    let runs = |v: &mut Value| v["vcpus"][1]["state"]["activity"] = json!("Running");
    let d = restored(2, MEMORY, changed(&bytes, runs, None)).unwrap();
    assert_eq!(online(&d), [true, true]);
}

#[test]
fn resumed_domain_goes_on_where_it_was() {
    let d = suspended();
    saved(&d);
    assert!(matches!(
        d.suspend(&|| false),
        Err(RequestError::Suspending)
    ));
    assert_eq!(d.end_reason(), None);
    d.resume();
    assert_eq!(d.wait(), EndReason::PowerOff);
}

#[test]
fn paused_while_it_is_suspended_stays_paused() {
    let d = suspended();
    d.pause();
    d.resume();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(d.end_reason(), None);
    d.unpause();
    assert_eq!(d.wait(), EndReason::PowerOff);
}

#[test]
fn suspend_is_refused_where_no_guest_can_follow() {
    let d = domain(|_| Exit::Yield);
    assert!(matches!(d.suspend(&|| false), Err(RequestError::Paused)));
    assert!(!d.is_suspended());
    d.unpause();
    assert!(matches!(d.suspend(&|| true), Err(RequestError::TakenBack)));
    let node = "/local/domain/3/control/shutdown";
    assert_eq!(d.store().read_text(node).as_deref(), Some(""));
    d.destroy();
    assert!(matches!(d.suspend(&|| false), Err(RequestError::Ended(_))));
}

#[test]
fn suspend_waits_until_a_request_to_shut_down_is_heard() {
    let asked = Arc::new(AtomicBool::new(false));
    let d = suspending(Arc::clone(&asked));
    let node = "/local/domain/3/control/shutdown";
    d.request_shutdown(ShutdownKind::PowerOff).unwrap();
    assert!(matches!(d.suspend(&|| true), Err(RequestError::TakenBack)));
    assert_eq!(d.store().read_text(node).as_deref(), Some("poweroff"));
    let looks = AtomicU32::new(0);
    let hear = || {
        match d.store().read_text(node).as_deref() {
            Some("poweroff") if looks.fetch_add(1, SeqCst) == 5 => {
                d.store().write(node, b"").unwrap();
            }
            Some("suspend") => asked.store(true, SeqCst),
            _ => {}
        }
        false
    };
    d.suspend(&hear).unwrap();
    assert!(looks.load(SeqCst) > 5, "it was asked at once");
}

#[test]
fn guest_that_suspends_too_late_goes_on() {
    let asked = Arc::new(AtomicBool::new(false));
    let d = suspending(Arc::clone(&asked));
    assert!(matches!(d.suspend(&|| true), Err(RequestError::TakenBack)));
    asked.store(true, SeqCst);
    assert_eq!(d.wait(), EndReason::PowerOff);
}

#[test]
fn save_of_a_guest_that_runs_is_refused() {
    let d = domain(|_| Exit::Yield);
    let mut bytes = Vec::new();
    let to: &mut dyn Write = &mut bytes;
    let mut stream = Writer::new(to, b"").unwrap();
    assert!(matches!(d.save(&mut stream, None), Err(SaveError::Running)));
}

#[test]
fn restore_asks_what_others_were_promised_when_it_counts() {
    let bytes = saved(&suspended());
    let asked = AtomicBool::new(false);
    // Others come while the stream is read.
    let promised = move || match asked.swap(true, SeqCst) {
        false => 0,
        true => u64::MAX,
    };
    let fault = restored_beside(Box::new(promised), 2, MEMORY, bytes).unwrap_err();
    assert!(matches!(fault, CreateError::HostMemory { .. }), "{fault}");
}

#[test]
fn restore_refuses_what_does_not_fit_by_its_name() {
    let bytes = saved(&suspended());
    let refused = |what: &str, domain: Result<Domain, CreateError>| {
        let text = domain.expect_err(what).to_string();
        assert!(text.contains(what), "{text}");
    };
    refused(
        "(`maxmem') is 64, and the configuration says 128",
        restored(2, 2 * MEMORY, bytes.clone()),
    );
    refused(
        "number of vCPUs (`maxvcpus') is 2, and the configuration says 1",
        restored(1, MEMORY, bytes.clone()),
    );
    for page in [MEMORY >> 12, u64::MAX, 1 << 52, 0xfee00] {
        let bytes = changed(&bytes, |_| (), Some(page));
        refused("pages beyond", restored(2, MEMORY, bytes));
    }
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 8] = [
        ("CR4", |v| v["vcpus"][1]["state"]["cr4"] = json!(1u64 << 40)),
        ("EFER", |v| {
            v["vcpus"][0]["state"]["msr"]["efer"] = json!(1 << 1)
        }),
        ("XCR0", |v| v["vcpus"][0]["state"]["xcr0"] = json!(1 << 9)),
        ("canonical", |v| {
            v["vcpus"][0]["state"]["seg"][4]["base"] = json!(1u64 << 47)
        }),
        ("APIC", |v| v["vcpus"][1]["state"]["lapic"]["id"] = json!(0)),
        ("XSAVE", |v| {
            v["vcpus"][0]["state"]["xsave"] = json!("ff".repeat(2816))
        }),
        ("not understood", |v| {
            v["vcpus"][0]["state"]["xsave"] = json!("ff")
        }),
        ("cannot be offered here", |v| {
            for word in v["features"]["words"].as_array_mut().unwrap() {
                word["value"] = json!(u32::MAX);
            }
        }),
    ];
    for (what, change) in cases {
        refused(what, restored(2, MEMORY, changed(&bytes, change, None)));
    }
}
