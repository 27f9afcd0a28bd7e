//! The calling convention, versions, parameters and life cycle.

use super::*;

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
