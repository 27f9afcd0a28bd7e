//! What becomes of vCPUs whose domain is paused, pinned or limited.

use super::*;

#[test]
fn pause_steals_no_time_from_a_blocked_guest() {
    let d = domain(|c| {
        c.state.rflags |= rflags::IF;
        match c.step {
            0 => Exit::Halt {
                interrupts_enabled: true,
            },
            _ => Exit::Yield,
        }
    });
    let becomes = |wanted| while d.xen.runstate(VcpuId(0)) != Some(wanted) {};
    d.unpause();
    becomes(Runstate::Blocked);
    d.pause();
    while d.run.activities() != [Activity::Held] {}
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(d.xen.runstate(VcpuId(0)), Some(Runstate::Blocked));
    d.unpause();
    assert!(d.run.raise_nmi(VcpuId(0)));
    becomes(Runstate::Running);
    d.pause();
    becomes(Runstate::Offline);
}

#[test]
fn pin_to_a_cpu_that_is_not_there_is_refused_from_the_start() {
    let nowhere: Affinity = Some([hospes_units::HOST_CPUS_MAX - 1].into_iter().collect());
    for _ in 0..20 {
        let d = try_domain(4, 64 << 20, Sink::default(), |_| Ok(Exit::Yield)).unwrap();
        let refused = d.pin(None, Some(&nowhere), None).unwrap_err();
        assert!(matches!(refused, RequestError::Affinity { .. }));
    }
}

#[test]
fn cap_of_more_than_all_vcpus_is_refused() {
    let d = try_domain(2, 64 << 20, Sink::default(), |_| Ok(Exit::Yield)).unwrap();
    let set = |cap| d.set_share(Share { weight: 256, cap });
    set(200).unwrap();
    let refused = set(201).unwrap_err().to_string();
    assert!(refused.contains("201") && refused.contains("0 to 200"));
    assert_eq!(d.share().cap, 200);
}

#[test]
fn set_vcpus_beyond_those_there_are_is_refused_by_the_key() {
    let d = try_domain(1, 64 << 20, Sink::default(), |_| Ok(Exit::Yield)).unwrap();
    let refused = |online| d.set_vcpus(online).unwrap_err().to_string();
    assert!(refused(2).starts_with("2 vCPUs cannot be online: the domain has 1 at most"));
    assert!(refused(0).contains("`maxvcpus'") && refused(0).contains("at least 1"));
}
