//! Event channels and upcalls.

use super::*;

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

/// A vCPU's callback line; just before its next withdrawal something happens elsewhere.
#[derive(Default)]
struct RacingLine {
    line: Mutex<Option<u8>>,
    before_withdrawal: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl VcpuControl for RacingLine {
    fn set_waker(&self, _: Waker) {}

    fn kick(&self) {}

    fn raise_interrupt(&self, _: u8) -> bool {
        false
    }

    fn set_callback_line(&self, vector: Option<u8>) {
        let elsewhere = lock(&self.before_withdrawal).take_if(|_| vector.is_none());
        if let Some(elsewhere) = elsewhere {
            elsewhere();
        }
        *lock(&self.line) = vector;
    }

    fn raise_nmi(&self) {}

    fn has_wakeup(&self, _: bool) -> bool {
        lock(&self.line).is_some()
    }
}

#[test]
fn upcall_that_comes_during_the_withdrawal_of_the_line_is_not_lost() {
    let mut m = Machine::new(1);
    let control = Arc::new(RacingLine::default());
    let xen = Arc::get_mut(&mut m.xen).unwrap();
    xen.vcpus[0].control = OnceLock::from(control.clone() as Arc<dyn VcpuControl>);
    let mut p = hvm::Param {
        domid: 0x7ff0,
        index: hvm::PARAM_CALLBACK_IRQ,
        value: 2 << 56 | 0xf3,
        pad: 0,
    };
    assert_eq!(m.call_with(nr::HVM_OP, hvm::SET_PARAM, &mut p), 0);
    let port = bind_ipi(&mut m, 0);
    let poster = m.xen.clone();
    *lock(&control.before_withdrawal) = Some(Box::new(move || poster.post(port, 0)));
    m.call(nr::XEN_VERSION, [0, 0, 0]);
    assert!(m.xen.upcall_waits(0));
    assert_eq!(*lock(&control.line), Some(0xf3));
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
fn poll_with_interrupts_disabled_outlasts_an_upcall() {
    let mut m = Machine::new(1);
    boot(&mut m);
    let port = bind_ipi(&mut m, 0);
    let mut p = sched::Poll::default();
    assert_eq!(m.call_with(nr::SCHED_OP, sched::POLL, &mut p), 0);
    assert!(!m.xen.poll_done(VcpuId(0), true));
    port_op(&mut m, event::SEND, port);
    assert!(m.xen.poll_done(VcpuId(0), true));
    assert!(!m.xen.poll_done(VcpuId(0), false));
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
    assert!(!m.xen.poll_done(VcpuId(1), true));
    lock(&m.host.wakes).clear();
    port_op(&mut m, event::SEND, port);
    assert_eq!(*lock(&m.host.wakes), [1]);
    assert!(m.xen.poll_done(VcpuId(1), false));
    m.xen.end_poll(VcpuId(1));
    lock(&m.host.wakes).clear();
    port_op(&mut m, event::SEND, port);
    assert!(
        lock(&m.host.wakes).is_empty(),
        "nobody polls the port any more"
    );
    m.xen.memory().write_obj(Gpa(0x9000), &4096u32).unwrap();
    m.xen.memory().write_obj(Gpa(ARG), &p).unwrap();
    assert_eq!(
        m.call(nr::SCHED_OP, [sched::POLL, ARG, 0]),
        err(Errno::Inval)
    );
}
