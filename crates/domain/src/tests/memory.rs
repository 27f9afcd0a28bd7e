//! How much memory a domain has and may have.

use std::time::Instant;

use hospes_engine::{Segment, cr, seg};
use hospes_xen_abi::memory::{DECREASE_RESERVATION, Reservation};

use super::*;

const MIB: u64 = 1 << 20;

/// 64 MiB of 256, with a guest that does nothing but this.
fn domain_of(mut script: impl FnMut(&mut Cpu<'_>) -> Exit + Send + 'static) -> Domain {
    domain_with(1, [64 * MIB, 256 * MIB], Sink::default(), move |c| {
        Ok(script(c))
    })
    .unwrap()
}

/// A balloon's hypercall, which takes 64-bit code.
pub(super) fn give_back(c: &mut Cpu<'_>, frame: u64) -> Exit {
    c.state.cr0 |= cr::CR0_PE | cr::CR0_PG;
    c.state.msr.efer = cr::EFER_LMA | cr::EFER_LME;
    c.state.seg[seg::CS].attr = 0x9b | Segment::ATTR_L;
    let list = ARG + 0x100;
    c.memory.write_obj(Gpa(list), &frame).unwrap();
    let reservation = Reservation {
        extent_start: list,
        nr_extents: 1,
        domid: 0x7ff0,
        ..Reservation::default()
    };
    c.call(nr::MEMORY_OP, DECREASE_RESERVATION, &reservation)
}

fn target(domain: &Domain) -> String {
    domain
        .store()
        .read_text("/local/domain/3/memory/target")
        .unwrap()
}

fn set(domain: &Domain, mib: u64) -> Result<(), RequestError> {
    domain.set_memory_target(mib << 10, &|| 0)
}

/// Memory that the guest has or may take, in KiB: what it uses and what is promised to it at one moment, for the domain's own threads may use a page of it at any time.
fn claimed_kib(domain: &Domain) -> u64 {
    let used = || domain.xen().memory().used_bytes() / 1024;
    loop {
        let before = used();
        let promised = domain.promised_kib();
        if used() == before {
            return before + promised;
        }
    }
}

#[test]
fn domain_is_made_with_less_than_its_map_lists() {
    let d = domain_of(|c| c.shutdown(sched::SHUTDOWN_POWEROFF));
    let info = d.info();
    assert_eq!(
        (info.memory_kib, info.memory_max_kib),
        (64 << 10, 256 << 10)
    );
    let max = d.store().read_text("/local/domain/3/memory/static-max");
    assert_eq!(
        (max.as_deref(), target(&d).as_str()),
        (Some("262144"), "65536")
    );
    assert_eq!(claimed_kib(&d), 64 << 10);
    let more = domain_with(
        1,
        [128 * MIB, 64 * MIB],
        Sink::default(),
        |_| unreachable!(),
    );
    let fault = more.expect_err("more than the most").to_string();
    assert!(
        fault.contains("128 MiB") && fault.contains("64 MiB"),
        "{fault}"
    );
}

#[test]
fn target_is_written_for_the_guest_and_promised_to_it() {
    let d = domain_of(|c| c.shutdown(sched::SHUTDOWN_POWEROFF));
    set(&d, 96).unwrap();
    assert_eq!(target(&d), "98304");
    assert_eq!(claimed_kib(&d), 96 << 10);
    // Less is asked for; until the guest follows it has what it had.
    set(&d, 32).unwrap();
    assert_eq!(target(&d), "32768");
    assert_eq!(claimed_kib(&d), 96 << 10);
    assert!(matches!(
        set(&d, 257),
        Err(RequestError::MemoryAboveMax { max_mib: 256 })
    ));
    assert!(matches!(
        set(&d, 7),
        Err(RequestError::MemoryTooLittle { .. })
    ));
    assert!(matches!(
        d.set_memory_max(31 << 10, &|| 0),
        Err(RequestError::MemoryBelowTarget { target_kib: 32768 })
    ));
    d.set_memory_max(1 << 30, &|| 0).unwrap();
    assert_eq!(claimed_kib(&d), 256 << 10);
    assert_eq!(target(&d), "32768");
    // A guest that has ended needs nothing of the host.
    d.unpause();
    d.wait();
    d.set_memory_target(128 << 10, &|| u64::MAX).unwrap();
    assert_eq!(target(&d), "131072");
}

#[test]
fn growth_beyond_the_host_is_refused_and_changes_nothing() {
    let d = domain_of(|c| c.shutdown(sched::SHUTDOWN_POWEROFF));
    let during = std::cell::Cell::new(0);
    let all = || {
        during.set(claimed_kib(&d));
        u64::MAX
    };
    let fault = d.set_memory_target(128 << 10, &all).unwrap_err();
    assert!(fault.to_string().contains("the host has"), "{fault}");
    assert_eq!(during.get(), 128 << 10, "others see what is asked for");
    assert_eq!((claimed_kib(&d), target(&d).as_str()), (64 << 10, "65536"));
    assert!(d.set_memory_max(128 << 10, &all).is_err());
    // Less is always to be had.
    d.set_memory_target(32 << 10, &|| u64::MAX).unwrap();
}

#[test]
fn guest_that_touches_more_than_it_has_is_ended() {
    let d = domain_of(|c| {
        let page = u64::from(c.step) * 4096 + 8 * MIB;
        if page < 250 * MIB {
            c.memory.write_obj(Gpa(page), &1u64).unwrap();
            c.call(nr::XEN_VERSION, 0, &0u64)
        } else {
            Exit::Halt {
                interrupts_enabled: true,
            }
        }
    });
    d.unpause();
    let EndReason::Crash(why) = d.wait() else {
        panic!("it goes on");
    };
    assert!(why.contains("64 MiB") && why.contains("balloon"), "{why}");
}

#[test]
fn guest_that_gives_back_what_it_has_too_much_goes_on() {
    let wanted = 64 * MIB / 4096;
    let d = domain_of(move |c| {
        // Frame by frame, each touched first, as Linux does, and once more afterwards.
        let frame = u64::from(c.step) + wanted;
        if frame < 256 * MIB / 4096 {
            c.memory.write_obj(Gpa(frame * 4096), &1u64).unwrap();
            let before = Gpa((frame - 1) * 4096);
            c.memory.write_obj(before, &1u64).unwrap();
            return give_back(c, frame);
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while c.memory.used_bytes() > 96 * MIB && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        c.shutdown(sched::SHUTDOWN_POWEROFF)
    });
    d.unpause();
    assert_eq!(d.wait(), EndReason::PowerOff);
    assert_eq!(d.info().memory_kib, 64 << 10);
    assert!(d.xen().memory().used_bytes() < 96 * MIB);
}
