//! The clock, timers and accounts.

use super::*;

#[test]
fn map_shared_info_shows_valid_time_everywhere() {
    let mut m = Machine::new(2);
    boot(&mut m);
    for id in 0..2u64 {
        for gpa in [
            SHARED_GFN * 4096 + id * 64 + 32,
            (INFO_GFN + id) * 4096 + 64 + VI_TIME as u64,
        ] {
            let t: VcpuTimeInfo = m.xen.memory().read_obj(Gpa(gpa)).unwrap();
            assert_ne!(t.tsc_to_system_mul, 0);
            assert_eq!(t.version % 2, 0);
            assert_ne!(t.version, 0);
        }
    }
    let (sec, nsec) = (
        shared_word(&m, 3072) >> 32,
        shared_word(&m, 3080) & 0xffff_ffff,
    );
    assert!(sec > 1_600_000_000 && nsec < 1_000_000_000);
}

#[test]
fn runstate_area_across_pages_accounts_all_time() {
    let mut m = Machine::new(1);
    let at = 0x4_0ff0u64;
    m.xen.memory().write_obj(Gpa(ARG), &at).unwrap();
    m.call(
        nr::VM_ASSIST,
        [nr::VMASST_ENABLE, nr::VMASST_RUNSTATE_UPDATE_FLAG, 0],
    );
    assert_eq!(
        m.call(nr::VCPU_OP, [vcpu::REGISTER_RUNSTATE_AREA, 0, ARG]),
        0
    );
    m.xen.vcpu_thread_started(VcpuId(0));
    m.xen.set_runstate(VcpuId(0), Runstate::Running);
    std::thread::sleep(Duration::from_millis(2));
    m.xen.set_runstate(VcpuId(0), Runstate::Blocked);
    std::thread::sleep(Duration::from_millis(2));
    m.xen.set_runstate(VcpuId(0), Runstate::Running);
    let info: RunstateInfo = m.xen.memory().read_obj(Gpa(at)).unwrap();
    assert_eq!(info.state, Runstate::Running as u32);
    let sum: u64 = info.time.iter().sum();
    assert!(info.time[0] + info.time[1] >= 2_000_000 && sum >= 4_000_000);
    assert!(info.state_entry_time >= sum && info.state_entry_time >> 63 == 0);
    m.xen.memory().write_obj(Gpa(ARG), &(at + 1)).unwrap();
    assert_eq!(
        m.call(nr::VCPU_OP, [vcpu::REGISTER_RUNSTATE_AREA, 0, ARG]),
        err(Errno::Inval)
    );
    m.xen.memory().write_obj(Gpa(ARG), &0xf_fff0u64).unwrap();
    assert_eq!(
        m.call(nr::VCPU_OP, [vcpu::REGISTER_RUNSTATE_AREA, 0, ARG]),
        err(Errno::Fault)
    );
}

/// Sets the timer of vCPU 0 to fire in 3 ms; gives the system time of that, ns.
fn set_timer(m: &mut Machine) -> u64 {
    let deadline = m.xen.system_time_ns() + 3_000_000;
    let t = vcpu::SetSingleshot {
        timeout_abs_ns: deadline,
        ..Default::default()
    };
    m.xen.memory().write_obj(Gpa(ARG), &t).unwrap();
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::SET_SINGLESHOT_TIMER, 0, ARG]), 0);
    deadline
}

#[test]
fn runstate_is_up_to_date_when_a_timer_fires() {
    let mut m = Machine::new(1);
    boot(&mut m);
    let at = 0x4_0000u64;
    m.xen.memory().write_obj(Gpa(ARG), &at).unwrap();
    m.call(
        nr::VM_ASSIST,
        [nr::VMASST_ENABLE, nr::VMASST_RUNSTATE_UPDATE_FLAG, 0],
    );
    m.call(nr::VCPU_OP, [vcpu::REGISTER_RUNSTATE_AREA, 0, ARG]);
    let _clock = m.xen.start_clock().unwrap();
    m.xen.set_runstate(VcpuId(0), Runstate::Running);
    let port = bind_virq(&mut m, event::VIRQ_TIMER, 0).unwrap();
    let deadline = set_timer(&mut m);
    while !m.xen.is_pending(port) {
        std::thread::yield_now();
    }
    let info: RunstateInfo = m.xen.memory().read_obj(Gpa(at)).unwrap();
    assert!(info.state_entry_time >= deadline, "{info:?}");
}

#[test]
fn time_in_which_the_process_was_stopped_is_stolen() {
    let m = Machine::new(2);
    m.xen.set_runstate(VcpuId(0), Runstate::Running);
    std::thread::sleep(Duration::from_millis(4));
    m.xen.note_stopped(3_000_000);
    m.xen.set_runstate(VcpuId(0), Runstate::Blocked);
    let stolen = |id: u32| {
        let info = crate::lock(&m.xen.vcpus[id as usize].run).info();
        info.time[Runstate::Runnable as usize]
    };
    assert_eq!((stolen(0), stolen(1)), (3_000_000, 0));
}

#[test]
fn singleshot_timer_fires_not_before_its_time() {
    let mut m = Machine::new(1);
    boot(&mut m);
    let clock = m.xen.start_clock().unwrap();
    let port = bind_virq(&mut m, event::VIRQ_TIMER, 0).unwrap();
    let deadline = set_timer(&mut m);
    while !m.xen.is_pending(port) {
        std::thread::sleep(Duration::from_micros(100));
    }
    assert!(m.xen.system_time_ns() >= deadline);
    drop(clock);
    assert!(m.interrupts(0).contains(&0xf3));
    m.xen.clear_pending(port);
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::SET_SINGLESHOT_TIMER, 0, ARG]), 0);
    assert!(
        m.xen.is_pending(port),
        "a deadline in the past fires at once"
    );
    let late = vcpu::SetSingleshot {
        timeout_abs_ns: deadline,
        flags: vcpu::SINGLESHOT_FUTURE,
        ..Default::default()
    };
    m.xen.memory().write_obj(Gpa(ARG), &late).unwrap();
    assert_eq!(
        m.call(nr::VCPU_OP, [vcpu::SET_SINGLESHOT_TIMER, 0, ARG]),
        err(Errno::Time)
    );
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::STOP_PERIODIC_TIMER, 0, 0]), 0);
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::STOP_SINGLESHOT_TIMER, 0, 0]), 0);
    assert_eq!(
        m.call(nr::VCPU_OP, [vcpu::STOP_SINGLESHOT_TIMER, 1, 0]),
        err(Errno::NoEnt)
    );
}

#[test]
fn steered_clock_never_goes_backwards_for_a_guest() {
    let mut m = Machine::new(1);
    boot(&mut m);
    let _clock = m.xen.start_clock().unwrap();
    let at = Gpa(INFO_GFN * 4096 + 64 + VI_TIME as u64);
    let page = crate::Page::of_frame(m.xen.memory(), at.gfn()).unwrap();
    let word = |i: usize| page.u32(at.page_offset() as usize + i).load(SeqCst);
    let wide = |i: usize| page.u64(at.page_offset() as usize + i).load(SeqCst);
    let (mut last, mut versions) = (0, std::collections::BTreeSet::new());
    while versions.len() < 4 {
        let version = word(0);
        let line = crate::clock::Line {
            tsc: wide(8),
            system_ns: wide(16),
            mul: word(24),
            shift: word(28) as i8,
        };
        let now = line.at(hospes_sys::rdtsc());
        if version % 2 == 1 || word(0) != version {
            continue;
        }
        assert!(now >= last, "{now} < {last}");
        last = now;
        versions.insert(version);
    }
}

#[test]
fn paused_domain_is_told_in_its_time_area() {
    let mut m = Machine::new(1);
    boot(&mut m);
    m.xen.mark_stopped();
    let gpa = Gpa(INFO_GFN * 4096 + 64 + VI_TIME as u64);
    let t: VcpuTimeInfo = m.xen.memory().read_obj(gpa).unwrap();
    assert_ne!(t.flags & PVCLOCK_GUEST_STOPPED, 0);
}

#[test]
fn user_time_area_is_filled_and_can_be_removed() {
    let mut m = Machine::new(1);
    m.xen.memory().write_obj(Gpa(ARG), &0x5_0000u64).unwrap();
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::REGISTER_TIME_AREA, 0, ARG]), 0);
    let t: VcpuTimeInfo = m.xen.memory().read_obj(Gpa(0x5_0000)).unwrap();
    assert_ne!(t.tsc_to_system_mul, 0);
    m.xen.memory().write_obj(Gpa(ARG), &0u64).unwrap();
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::REGISTER_TIME_AREA, 0, ARG]), 0);
    m.xen.memory().zero(Gpa(0x5_0000), 32).unwrap();
    m.xen.time.steer(Duration::from_secs(1));
    let t: VcpuTimeInfo = m.xen.memory().read_obj(Gpa(0x5_0000)).unwrap();
    assert_eq!(t.tsc_to_system_mul, 0);
}

#[test]
fn poll_ends_by_its_timeout() {
    let mut m = Machine::new(1);
    boot(&mut m);
    let _clock = m.xen.start_clock().unwrap();
    let mut p = sched::Poll {
        timeout: m.xen.system_time_ns() + 1_000_000,
        ..Default::default()
    };
    lock(&m.host.wakes).clear();
    assert_eq!(m.call_with(nr::SCHED_OP, sched::POLL, &mut p), 0);
    while lock(&m.host.wakes).is_empty() {
        std::thread::sleep(Duration::from_micros(100));
    }
    assert!(m.xen.poll_done(VcpuId(0), false));
}

#[test]
fn watchdog_fires_unless_it_is_renewed() {
    let mut m = Machine::new(1);
    let _clock = m.xen.start_clock().unwrap();
    let watchdog = |m: &mut Machine, id, timeout| {
        m.call_with(
            nr::SCHED_OP,
            sched::WATCHDOG,
            &mut sched::Watchdog { id, timeout },
        )
    };
    assert_eq!(watchdog(&mut m, 0, 0), err(Errno::Inval));
    assert_eq!(watchdog(&mut m, 3, 1), err(Errno::Inval));
    assert_eq!(watchdog(&mut m, 0, 1000), 1);
    assert_eq!(watchdog(&mut m, 0, 1000), 2);
    assert_eq!(watchdog(&mut m, 0, 1000), err(Errno::NoSpc));
    assert_eq!(watchdog(&mut m, 1, 0), 0);
    assert_eq!(watchdog(&mut m, 2, 1), 0);
    while !m.host.watchdog.load(SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
    }
}
