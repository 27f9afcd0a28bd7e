//! Hypercalls as a guest makes them, on a machine without an engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use hospes_engine::{Segment, reg, seg};
use hospes_units::{Gfn, Gpa, GrantRef, Port, VcpuId};
use hospes_xen_abi::shared::{
    PVCLOCK_GUEST_STOPPED, Runstate, RunstateInfo, SI_MASK, SI_PENDING, VI_TIME, VcpuTimeInfo,
};
use hospes_xen_abi::{Errno, event, grant, hvm, hypercall as nr, memory, sched, vcpu, version};

use crate::testing::{ARG, Machine};
use crate::{Access, GrantError, Outcome, ShutdownReason, lock};

const INFO_GFN: u64 = 0x20;
const SHARED_GFN: u64 = 0x10;

fn err(e: Errno) -> i64 {
    e.as_rax() as i64
}

/// What Linux does before its first event: shared info, `vcpu_info`, upcall vector; its ports are unmasked.
fn boot(m: &mut Machine) {
    let mut a = memory::AddToPhysmap {
        domid: 0x7ff0,
        gpfn: SHARED_GFN,
        ..Default::default()
    };
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::ADD_TO_PHYSMAP, &mut a),
        0
    );
    for id in 0..m.vcpus.len() as u64 {
        let info = vcpu::RegisterVcpuInfo {
            gfn: INFO_GFN + id,
            offset: 64,
            pad: 0,
        };
        m.xen.memory().write_obj(Gpa(ARG), &info).unwrap();
        assert_eq!(m.call(nr::VCPU_OP, [vcpu::REGISTER_VCPU_INFO, id, ARG]), 0);
        let mut v = hvm::UpcallVector {
            vcpu: id as u32,
            vector: 0xf3,
            pad: [0; 3],
        };
        assert_eq!(
            m.call_with(nr::HVM_OP, hvm::SET_EVTCHN_UPCALL_VECTOR, &mut v),
            0
        );
        take_upcall(m, id as usize);
    }
}

/// The guest's upcall handler: clears the flag and the selector, returns the selector.
fn take_upcall(m: &Machine, id: usize) -> u64 {
    m.interrupts(id);
    let info = (INFO_GFN + id as u64) * 4096 + 64;
    let sel = m.xen.memory().read_obj(Gpa(info + 8)).unwrap();
    m.xen.memory().write(Gpa(info), &[0; 16]).unwrap();
    sel
}

fn shared_word(m: &Machine, offset: usize) -> u64 {
    m.xen
        .memory()
        .read_obj(Gpa(SHARED_GFN * 4096 + offset as u64))
        .unwrap()
}

fn bind_ipi(m: &mut Machine, vcpu: u32) -> u32 {
    let mut a = event::BindIpi { vcpu, port: 0 };
    assert_eq!(
        m.call_with(nr::EVENT_CHANNEL_OP, event::BIND_IPI, &mut a),
        0
    );
    a.port
}

fn bind_virq(m: &mut Machine, virq: u32, vcpu: u32) -> Result<u32, i64> {
    let mut a = event::BindVirq {
        virq,
        vcpu,
        port: 0,
    };
    match m.call_with(nr::EVENT_CHANNEL_OP, event::BIND_VIRQ, &mut a) {
        0 => Ok(a.port),
        e => Err(e),
    }
}

fn port_op(m: &mut Machine, op: u64, mut port: u32) -> i64 {
    m.call_with(nr::EVENT_CHANNEL_OP, op, &mut port)
}

#[test]
fn call_from_user_mode_is_refused() {
    let mut m = Machine::new(1);
    m.vcpus[0].state.seg[seg::SS].attr |= 3 << 5;
    assert_eq!(m.call(nr::XEN_VERSION, [0, 0, 0]), err(Errno::Perm));
}

#[test]
fn call_unknown_number_gives_enosys() {
    let mut m = Machine::new(1);
    for number in [0, 1, 7, 13, 26, 33, 35, 36, 41, 55, u64::MAX] {
        assert_eq!(m.call(number, [0, 0, 0]), err(Errno::NoSys));
    }
}

#[test]
fn call_from_32_bit_code_uses_its_registers() {
    let mut m = Machine::new(1);
    let v = &mut m.vcpus[0];
    v.state.seg[seg::CS].attr = 0x9b | Segment::ATTR_DB;
    v.state.gpr[reg::RAX] = nr::XEN_VERSION;
    v.state.gpr[reg::RBX] = version::GET_FEATURES;
    v.state.gpr[reg::RCX] = 0xffff_0000_0000_0000 | ARG;
    let xen = m.xen.clone();
    assert_eq!(xen.hypercall(v, VcpuId(0)), Outcome::Resume);
    assert_eq!(v.state.gpr[reg::RAX], 0);
    let map: u32 = xen.memory().read_obj(Gpa(ARG + 4)).unwrap();
    assert_eq!(map, 0x10305);
    let v = &mut m.vcpus[0];
    v.state.gpr[reg::RAX] = nr::MEMORY_OP;
    xen.hypercall(v, VcpuId(0));
    assert_eq!(v.state.gpr[reg::RAX] as u32 as i32, -38);
    assert_eq!(v.state.gpr[reg::RAX] >> 32, 0);
}

#[test]
fn ask_version_gives_4_17() {
    let mut m = Machine::new(1);
    assert_eq!(m.call(nr::XEN_VERSION, [0, 0, 0]), 0x40011);
    assert_eq!(m.call(nr::XEN_VERSION, [version::PAGESIZE, 0, 0]), 4096);
    assert_eq!(m.call(nr::XEN_VERSION, [version::GUEST_HANDLE, ARG, 0]), 0);
    let uuid: [u8; 16] = m.xen.memory().read_obj(Gpa(ARG)).unwrap();
    assert_eq!(&uuid, b"0123456789abcdef");
    assert_eq!(
        m.call(nr::XEN_VERSION, [version::COMPILE_INFO, 0xf_fff0, 0]),
        err(Errno::Fault)
    );
    let mut f = version::FeatureInfo {
        submap_idx: 1,
        submap: 0,
    };
    assert_eq!(
        m.call_with(nr::XEN_VERSION, version::GET_FEATURES, &mut f),
        err(Errno::Inval)
    );
}

#[test]
fn write_hypercall_page_fills_stubs() {
    let m = Machine::new(1);
    assert!(m.xen.write_hypercall_page(0x3000));
    let stub: [u8; 9] = m.xen.memory().read_obj(Gpa(0x3000 + 29 * 32)).unwrap();
    assert_eq!(stub, [0xb8, 29, 0, 0, 0, 0x0f, 0x01, 0xc1, 0xc3]);
    let iret: [u8; 2] = m.xen.memory().read_obj(Gpa(0x3000 + 23 * 32)).unwrap();
    assert_eq!(iret, [0x0f, 0x0b]);
    assert_eq!(lock(&m.vm.written)[0], (Gpa(0x3000), 4096));
    assert!(!m.xen.write_hypercall_page(0x3001));
    assert!(!m.xen.write_hypercall_page(u64::MAX << 12));
}

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
fn register_vcpu_info_twice_is_refused() {
    let mut m = Machine::new(1);
    boot(&mut m);
    let mut call = |gfn: u64, offset: u32| {
        let a = vcpu::RegisterVcpuInfo {
            gfn,
            offset,
            pad: 0,
        };
        m.xen.memory().write_obj(Gpa(ARG), &a).unwrap();
        m.call(nr::VCPU_OP, [vcpu::REGISTER_VCPU_INFO, 0, ARG])
    };
    assert_eq!(call(INFO_GFN, 64), err(Errno::Inval));
    let mut m = Machine::new(1);
    let mut call = |gfn: u64, offset: u32| {
        let a = vcpu::RegisterVcpuInfo {
            gfn,
            offset,
            pad: 0,
        };
        m.xen.memory().write_obj(Gpa(ARG), &a).unwrap();
        m.call(nr::VCPU_OP, [vcpu::REGISTER_VCPU_INFO, 0, ARG])
    };
    for (gfn, offset) in [
        (INFO_GFN, 4095),
        (INFO_GFN, 4040),
        (INFO_GFN, 4),
        (0x9999, 0),
        (u64::MAX, 0),
    ] {
        assert_eq!(call(gfn, offset), err(Errno::Inval));
    }
    assert_eq!(call(INFO_GFN, 4032), 0);
}

#[test]
fn send_ipi_sets_bits_and_raises_the_upcall_of_the_target() {
    let mut m = Machine::new(2);
    boot(&mut m);
    let port = bind_ipi(&mut m, 1);
    assert_eq!(port_op(&mut m, event::SEND, port), 0);
    assert_eq!(shared_word(&m, SI_PENDING), 1 << port);
    assert_eq!(m.interrupts(1), [0xf3]);
    assert!(m.interrupts(0).is_empty());
    assert_eq!(take_upcall(&m, 1), 1);
    assert!(lock(&m.host.wakes).contains(&1));
}

#[test]
fn send_to_a_masked_port_waits_for_unmask() {
    let mut m = Machine::new(1);
    boot(&mut m);
    let port = bind_ipi(&mut m, 0);
    let mask = Gpa(SHARED_GFN * 4096 + SI_MASK as u64);
    m.xen.memory().write_obj(mask, &u64::MAX).unwrap();
    assert_eq!(port_op(&mut m, event::SEND, port), 0);
    assert!(m.interrupts(0).is_empty());
    assert_eq!(take_upcall(&m, 0), 0);
    assert_eq!(port_op(&mut m, event::UNMASK, port), 0);
    assert_eq!(m.interrupts(0), [0xf3]);
    assert_eq!(shared_word(&m, SI_MASK), !(1 << port));
    assert_eq!(take_upcall(&m, 0), 1);
}

#[test]
fn event_while_an_upcall_was_lost_raises_it_again() {
    let mut m = Machine::new(1);
    m.vcpus[0].control.lapic_off.store(true, SeqCst);
    let info = vcpu::RegisterVcpuInfo {
        gfn: INFO_GFN,
        offset: 64,
        pad: 0,
    };
    m.xen.memory().write_obj(Gpa(ARG), &info).unwrap();
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::REGISTER_VCPU_INFO, 0, ARG]), 0);
    let mut v = hvm::UpcallVector {
        vcpu: 0,
        vector: 0xf3,
        pad: [0; 3],
    };
    m.call_with(nr::HVM_OP, hvm::SET_EVTCHN_UPCALL_VECTOR, &mut v);
    let port = bind_ipi(&mut m, 0);
    port_op(&mut m, event::SEND, port);
    assert!(m.interrupts(0).is_empty());
    m.vcpus[0].control.lapic_off.store(false, SeqCst);
    port_op(&mut m, event::SEND, port);
    assert!(m.interrupts(0).contains(&0xf3));
}

#[test]
fn callback_vector_asserts_the_line_until_the_upcall_is_taken() {
    let mut m = Machine::new(1);
    let mut p = hvm::Param {
        domid: 0x7ff0,
        index: hvm::PARAM_CALLBACK_IRQ,
        value: 2 << 56 | 0xf3,
        pad: 0,
    };
    assert_eq!(m.call_with(nr::HVM_OP, hvm::SET_PARAM, &mut p), 0);
    let port = bind_ipi(&mut m, 0);
    port_op(&mut m, event::SEND, port);
    assert_eq!(*lock(&m.vcpus[0].control.line), Some(0xf3));
    m.xen.vcpus[0].info().u8(0).store(0, SeqCst);
    m.call(nr::XEN_VERSION, [0, 0, 0]);
    assert_eq!(*lock(&m.vcpus[0].control.line), None);
    p.value = 1;
    assert_eq!(m.call_with(nr::HVM_OP, hvm::SET_PARAM, &mut p), 0);
    port_op(&mut m, event::SEND, port);
    assert_eq!(
        *lock(&m.vcpus[0].control.line),
        None,
        "the port was pending"
    );
}

#[test]
fn bind_virq_twice_gives_eexist_until_closed() {
    let mut m = Machine::new(2);
    let port = bind_virq(&mut m, event::VIRQ_TIMER, 1).unwrap();
    assert_eq!(
        bind_virq(&mut m, event::VIRQ_TIMER, 1),
        Err(err(Errno::Exist))
    );
    assert!(bind_virq(&mut m, event::VIRQ_TIMER, 0).is_ok());
    assert_eq!(port_op(&mut m, event::CLOSE, port), 0);
    assert_eq!(port_op(&mut m, event::CLOSE, port), err(Errno::Inval));
    assert_eq!(bind_virq(&mut m, event::VIRQ_TIMER, 1), Ok(port));
    assert_eq!(bind_virq(&mut m, 24, 0), Err(err(Errno::Inval)));
    assert_eq!(bind_virq(&mut m, 0, 2), Err(err(Errno::NoEnt)));
    assert_eq!(bind_virq(&mut m, 11, 1), Err(err(Errno::Inval)));
}

#[test]
fn allocate_ports_ends_at_4095() {
    let mut m = Machine::new(1);
    let mut a = event::AllocUnbound {
        dom: 0x7ff0,
        remote_dom: 0,
        port: 0,
    };
    for want in 1..4096 {
        assert_eq!(
            m.call_with(nr::EVENT_CHANNEL_OP, event::ALLOC_UNBOUND, &mut a),
            0
        );
        assert_eq!(a.port, want);
    }
    assert_eq!(
        m.call_with(nr::EVENT_CHANNEL_OP, event::ALLOC_UNBOUND, &mut a),
        err(Errno::NoSpc)
    );
    assert_eq!(port_op(&mut m, event::SEND, 4096), err(Errno::Inval));
    assert_eq!(port_op(&mut m, event::UNMASK, u32::MAX), err(Errno::Inval));
}

#[test]
fn host_port_carries_events_both_ways() {
    let mut m = Machine::new(2);
    boot(&mut m);
    let mut a = event::AllocUnbound {
        dom: 0x7ff0,
        remote_dom: 0,
        port: 0,
    };
    m.call_with(nr::EVENT_CHANNEL_OP, event::ALLOC_UNBOUND, &mut a);
    let heard = Arc::new(AtomicU32::new(0));
    let listener = heard.clone();
    let xen = m.xen.clone();
    let connect = |port| {
        let listener = listener.clone();
        xen.connect_port(
            Port(port),
            Arc::new(move || {
                listener.fetch_add(1, SeqCst);
            }),
        )
    };
    let host = connect(a.port).unwrap();
    assert!(connect(a.port).is_err());
    assert!(connect(99).is_err());
    assert_eq!(port_op(&mut m, event::SEND, a.port), 0);
    assert_eq!(heard.load(SeqCst), 1);
    let mut move_to = event::BindVcpu {
        port: a.port,
        vcpu: 1,
    };
    m.call_with(nr::EVENT_CHANNEL_OP, event::BIND_VCPU, &mut move_to);
    host.notify();
    assert_eq!(m.interrupts(1), [0xf3]);
    let mut s = event::Status {
        dom: 0x7ff0,
        port: a.port,
        ..Default::default()
    };
    m.call_with(nr::EVENT_CHANNEL_OP, event::STATUS, &mut s);
    assert_eq!((s.status, s.vcpu), (event::STATUS_INTERDOMAIN, 1));
    port_op(&mut m, event::CLOSE, a.port);
    assert!(!host.is_connected());
    let reused = bind_ipi(&mut m, 0);
    assert_eq!(reused, a.port);
    take_upcall(&m, 0);
    host.notify();
    drop(host);
    assert!(m.interrupts(0).is_empty());
    assert_eq!(port_op(&mut m, event::SEND, reused), 0);
}

#[test]
fn place_grant_frames_and_read_grants_through_them() {
    let mut m = Machine::new(1);
    let mut q = grant::QuerySize {
        dom: 0x7ff0,
        ..Default::default()
    };
    assert_eq!(
        m.call_with(nr::GRANT_TABLE_OP, grant::QUERY_SIZE, &mut q),
        0
    );
    assert_eq!((q.max_nr_frames, q.nr_frames, q.status), (64, 1, 0));
    let mut place = |idx: u64, gpfn: u64| {
        let mut a = memory::AddToPhysmap {
            domid: 0x7ff0,
            space: memory::SPACE_GRANT_TABLE,
            idx,
            gpfn,
            ..Default::default()
        };
        m.call_with(nr::MEMORY_OP, memory::ADD_TO_PHYSMAP, &mut a)
    };
    for idx in (0..64).rev() {
        assert_eq!(place(idx, 0x17f00 + idx), 0);
    }
    assert_eq!(place(0, 0x17f00), 0);
    assert_eq!(place(64, 0x17f00), err(Errno::Inval));
    assert_eq!(place(1 << 31, 0x17f00), err(Errno::Inval));
    assert_eq!(place(0, u64::MAX), err(Errno::Inval));
    let set = |gref: u64, entry: grant::EntryV1| {
        m.xen
            .memory()
            .write_obj(Gpa(0x17f0_0000 + gref * 8), &entry)
            .unwrap();
    };
    let entry = |flags, domid, frame| grant::EntryV1 {
        flags,
        domid,
        frame,
    };
    set(600, entry(1, 0, 0x33));
    set(601, entry(1 | grant::FLAG_READONLY, 0, 0x33));
    set(602, entry(1, 3, 0x33));
    set(603, entry(0, 0, 0x33));
    set(604, entry(1, 0, 0x9_9999));
    let page = |r, access| m.xen.grant_page(GrantRef(r), access);
    assert_eq!(page(600, Access::Write), Ok(Gpa(0x33000)));
    assert_eq!(page(601, Access::Read), Ok(Gpa(0x33000)));
    assert_eq!(
        page(601, Access::Write),
        Err(GrantError::ReadOnly(GrantRef(601)))
    );
    assert!(matches!(
        page(602, Access::Read),
        Err(GrantError::WrongDomain { .. })
    ));
    assert!(matches!(
        page(603, Access::Read),
        Err(GrantError::NotGranted(_))
    ));
    assert!(matches!(
        page(604, Access::Read),
        Err(GrantError::NotMemory { .. })
    ));
    assert!(matches!(
        page(u32::MAX, Access::Read),
        Err(GrantError::BadReference(_))
    ));
    assert_eq!(page(grant::REF_XENSTORE, Access::Write), Ok(Gpa(0xc000)));
}

#[test]
fn place_shared_pages_everywhere_is_bounded() {
    let mut m = Machine::new(1);
    let mut last = 0;
    for gpfn in 0x2_0000..0x2_0000 + 2000 {
        let mut a = memory::AddToPhysmap {
            domid: 0x7ff0,
            gpfn,
            ..Default::default()
        };
        last = m.call_with(nr::MEMORY_OP, memory::ADD_TO_PHYSMAP, &mut a);
    }
    assert_eq!(last, err(Errno::NoMem));
}

#[test]
fn balloon_gives_pages_back_and_takes_them_zeroed() {
    let mut m = Machine::new(1);
    let memory = m.xen.memory().clone();
    memory.write(Gpa(0x40000), &[7; 4096]).unwrap();
    let list: Vec<u64> = vec![0x40, 0x41, 0x42];
    for (i, gfn) in list.iter().enumerate() {
        memory.write_obj(Gpa(0x9000 + 8 * i as u64), gfn).unwrap();
    }
    let mut r = memory::Reservation {
        extent_start: 0x9000,
        nr_extents: 3,
        domid: 0x7ff0,
        ..Default::default()
    };
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::DECREASE_RESERVATION, &mut r),
        3
    );
    assert_eq!(m.xen.current_pages(), 253);
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::POPULATE_PHYSMAP, &mut r),
        3
    );
    assert_eq!(m.xen.current_pages(), 256);
    assert_eq!(memory.read_obj::<u64>(Gpa(0x40000)).unwrap(), 0);
    memory.write_obj(Gpa(0x9008), &0x9_9999u64).unwrap();
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::DECREASE_RESERVATION, &mut r),
        1
    );
    r.domid = 3;
    assert_eq!(
        m.call_with(nr::MEMORY_OP, memory::DECREASE_RESERVATION, &mut r),
        err(Errno::Perm)
    );
}

#[test]
fn long_reservation_is_continued_from_the_instruction() {
    let mut m = Machine::new(1);
    let memory = m.xen.memory().clone();
    for i in 0..1500u64 {
        memory
            .write_obj(Gpa(0x2_0000 + 8 * i), &(0x80 + i % 64))
            .unwrap();
    }
    let r = memory::Reservation {
        extent_start: 0x2_0000,
        nr_extents: 1500,
        domid: 0x7ff0,
        ..Default::default()
    };
    memory.write_obj(Gpa(ARG), &r).unwrap();
    m.vcpus[0].state.rip = 0x1003;
    m.call(nr::MEMORY_OP, [memory::DECREASE_RESERVATION, ARG, 0]);
    assert_eq!(m.vcpus[0].state.rip, 0x1000);
    let cmd = m.vcpus[0].state.gpr[reg::RDI];
    assert_eq!(cmd, memory::DECREASE_RESERVATION | 1024 << 6);
    assert_eq!(m.call(nr::MEMORY_OP, [cmd, ARG, 0]), 1500);
    assert_eq!(m.vcpus[0].state.rip, 0x1000);
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

#[test]
fn singleshot_timer_fires_not_before_its_time() {
    let mut m = Machine::new(1);
    boot(&mut m);
    let clock = m.xen.start_clock().unwrap();
    let port = bind_virq(&mut m, event::VIRQ_TIMER, 0).unwrap();
    let deadline = m.xen.system_time_ns() + 3_000_000;
    let t = vcpu::SetSingleshot {
        timeout_abs_ns: deadline,
        ..Default::default()
    };
    m.xen.memory().write_obj(Gpa(ARG), &t).unwrap();
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::SET_SINGLESHOT_TIMER, 0, ARG]), 0);
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
        flags: vcpu::SINGLESHOT_FUTURE,
        ..t
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
        let now = line.at(crate::clock::rdtsc());
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
fn shutdown_reason_reaches_the_thread() {
    let mut m = Machine::new(1);
    for (code, want) in [
        (0u32, ShutdownReason::PowerOff),
        (1, ShutdownReason::Reboot),
        (2, ShutdownReason::Suspend),
        (3, ShutdownReason::Crash),
        (4, ShutdownReason::Watchdog),
        (5, ShutdownReason::SoftReset),
    ] {
        m.xen.memory().write_obj(Gpa(ARG), &code).unwrap();
        let (rax, outcome) = m.call_on(0, nr::SCHED_OP, [sched::SHUTDOWN, ARG, 0]);
        assert_eq!((rax, outcome), (0, Outcome::Shutdown(want)));
    }
    m.xen.memory().write_obj(Gpa(ARG), &6u32).unwrap();
    assert_eq!(
        m.call(nr::SCHED_OP, [sched::SHUTDOWN, ARG, 0]),
        err(Errno::Inval)
    );
}

#[test]
fn poll_ends_by_an_event_on_a_masked_port() {
    let mut m = Machine::new(2);
    boot(&mut m);
    let port = bind_ipi(&mut m, 1);
    let mask = Gpa(SHARED_GFN * 4096 + SI_MASK as u64);
    m.xen.memory().write_obj(mask, &u64::MAX).unwrap();
    m.xen.memory().write_obj(Gpa(0x9000), &port).unwrap();
    let p = sched::Poll {
        ports: 0x9000,
        nr_ports: 1,
        ..Default::default()
    };
    m.xen.memory().write_obj(Gpa(ARG), &p).unwrap();
    let (rax, outcome) = m.call_on(1, nr::SCHED_OP, [sched::POLL, ARG, 0]);
    assert_eq!((rax, outcome), (0, Outcome::Poll));
    assert!(!m.xen.poll_done(VcpuId(1)));
    lock(&m.host.wakes).clear();
    port_op(&mut m, event::SEND, port);
    assert_eq!(*lock(&m.host.wakes), [1]);
    assert!(m.xen.poll_done(VcpuId(1)));
    m.xen.memory().write_obj(Gpa(0x9000), &4096u32).unwrap();
    m.xen.memory().write_obj(Gpa(ARG), &p).unwrap();
    assert_eq!(
        m.call(nr::SCHED_OP, [sched::POLL, ARG, 0]),
        err(Errno::Inval)
    );
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
    assert!(m.xen.poll_done(VcpuId(0)));
}

#[test]
fn vcpu_down_and_up_change_is_up() {
    let mut m = Machine::new(2);
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::IS_UP, 1, 0]), 1);
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::DOWN, 1, 0]), 0);
    assert_eq!(m.vcpus[1].control.kicks.load(SeqCst), 1);
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::IS_UP, 1, 0]), 0);
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::UP, 1, 0]), 0);
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::IS_UP, 1, 0]), 1);
    let (rax, outcome) = m.call_on(0, nr::VCPU_OP, [vcpu::DOWN, 0, 0]);
    assert_eq!((rax, outcome), (0, Outcome::Down));
    assert_eq!(m.call(nr::VCPU_OP, [vcpu::SEND_NMI, 1, 0]), 0);
    assert_eq!(m.vcpus[1].control.nmis.load(SeqCst), 1);
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

#[test]
fn params_are_read_and_protected() {
    let mut m = Machine::new(1);
    m.xen.set_console_port(Port(2));
    let param = |m: &mut Machine, op, index, value| {
        let mut p = hvm::Param {
            domid: 0x7ff0,
            index,
            value,
            pad: 0,
        };
        (m.call_with(nr::HVM_OP, op, &mut p), p.value)
    };
    assert_eq!(
        param(&mut m, hvm::GET_PARAM, hvm::PARAM_CONSOLE_EVTCHN, 0),
        (0, 2)
    );
    assert_eq!(
        param(&mut m, hvm::GET_PARAM, hvm::PARAM_STORE_PFN, 0),
        (0, 0xc)
    );
    assert_eq!(
        param(&mut m, hvm::SET_PARAM, hvm::PARAM_STORE_PFN, 5).0,
        err(Errno::Perm)
    );
    assert_eq!(param(&mut m, hvm::SET_PARAM, 77, 5).0, err(Errno::Inval));
    assert!(param(&mut m, hvm::PAGETABLE_DYING, 0, 0).0 < 0);
}

#[test]
fn console_io_reaches_the_host() {
    let mut m = Machine::new(1);
    m.xen.memory().write(Gpa(ARG), b"hello").unwrap();
    assert_eq!(m.call(nr::CONSOLE_IO, [nr::CONSOLEIO_WRITE, 5, ARG]), 0);
    assert_eq!(*lock(&m.host.console), b"hello");
    assert_eq!(
        m.call(nr::CONSOLE_IO, [nr::CONSOLEIO_WRITE, u64::MAX, 0xf_ff00]),
        err(Errno::Fault)
    );
}

#[test]
fn memory_map_is_cut_to_the_buffer() {
    let mut m = Machine::new(1);
    let mut a = memory::MemoryMap {
        nr_entries: 128,
        pad: 0,
        buffer: 0x9000,
    };
    assert_eq!(m.call_with(nr::MEMORY_OP, memory::MEMORY_MAP, &mut a), 0);
    assert_eq!(a.nr_entries, 1);
    let e: crate::E820 = m.xen.memory().read_obj(Gpa(0x9000)).unwrap();
    assert_eq!({ e.size }, 0x10_0000);
    assert_eq!(m.call(nr::MEMORY_OP, [memory::MAXIMUM_RAM_PAGE, 0, 0]), 255);
    assert!(m.xen.memory().is_backed(Gfn(255)));
}

proptest::proptest! {
    #[test]
    fn any_hypercall_is_survived(
        number in 0u64..60, args in proptest::array::uniform3(proptest::num::u64::ANY), small in proptest::array::uniform3(0u64..24),
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 64),
    ) {
        let mut m = Machine::new(2);
        m.xen.memory().write(Gpa(ARG), &bytes).unwrap();
        m.call(number, args);
        m.call(number, [small[0], ARG, small[2]]);
        m.call(number, [small[0], small[1], ARG]);
    }
}
