//! What changes nothing because it is wrong.

use crate::common::Bench;

/// All that commands show of what they could have changed.
fn seen(bench: &Bench) -> Vec<String> {
    let lists = [
        &["list", "-l", "one"][..],
        &["vcpu-list", "one"],
        &["sched-credit2", "-d", "one"],
    ];
    lists.iter().map(|list| bench.ok(list)).collect()
}

#[test]
fn wrong_changes_are_refused_with_the_status_of_xl_and_change_nothing() {
    let bench = Bench::new();
    bench.create("one", &["memory=64", "vcpus=2", "maxvcpus=3"]);
    let bad = format!("{},raw,xvdb,w", bench.path("bad").display());
    let before = seen(&bench);
    let cases: &[(i32, &[&str])] = &[
        (1, &["block-attach", "one", "x.img,raw,xvdb,q"]),
        (1, &["block-attach", "one", "x.img,vhd,xvdb,w"]),
        (1, &["block-attach", "one", "vdev=xvdb"]),
        (1, &["block-attach", "one", &bad]),
        (1, &["block-attach", "two", &bad]),
        (1, &["block-attach", "0", &bad]),
        (2, &["block-attach", "one"]),
        (2, &["block-attach", "-f", "one", &bad]),
        (1, &["block-detach", "one", "xvdb"]),
        (1, &["network-attach", "one", "mac=no"]),
        (1, &["network-detach", "one", "5"]),
        (1, &["vcpu-pin", "one", "3", "0"]),
        (1, &["vcpu-pin", "one", "0", "none"]),
        (1, &["vcpu-pin", "one", "0", "4095"]),
        (1, &["vcpu-pin", "one", "all", "0", "4095"]),
        (1, &["vcpu-pin", "one", "-f", "all", "0"]),
        (1, &["vcpu-pin", "two", "0", "0"]),
        (2, &["vcpu-pin", "one", "0"]),
        (2, &["vcpu-pin", "-x", "one", "0", "0"]),
        (1, &["vcpu-set", "-i", "one", "0"]),
        (1, &["vcpu-set", "-i", "one", "4"]),
        (1, &["vcpu-set", "one", "4x"]),
        (1, &["vcpu-set", "two", "1"]),
        (2, &["vcpu-set", "one"]),
        (1, &["mem-max", "one", "63"]),
        (1, &["mem-max", "one", "64x"]),
        (1, &["mem-max", "two", "64"]),
        (2, &["mem-max", "one"]),
        (1, &["mem-set", "one", "65"]),
        (1, &["sched-credit2", "-d", "one", "-w", "0"]),
        (1, &["sched-credit2", "-d", "one", "-w", "65536"]),
        (1, &["sched-credit2", "-d", "one", "-w", "many"]),
        (1, &["sched-credit2", "-d", "one", "-w", "512", "-c", "301"]),
        (1, &["sched-credit", "-d", "one", "-w", "512", "-c", "301"]),
        (1, &["sched-credit2", "-d", "two", "-w", "512"]),
        (1, &["sched-credit2", "-w", "512"]),
        (1, &["sched-credit2", "-s", "-d", "one", "-w", "512"]),
        (1, &["sched-credit2", "-p", "Pool-0", "-d", "one"]),
        (1, &["sched-credit2", "-p", "Pool-1"]),
        (2, &["sched-credit2", "-d", "one", "-w"]),
        (2, &["sched-credit2", "-x"]),
        (1, &["cpupool-list", "Pool-1"]),
    ];
    for (status, arguments) in cases {
        let output = bench.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(*status), "{arguments:?}: {said}");
        assert!(!said.is_empty(), "{arguments:?}");
    }
    assert_eq!(seen(&bench), before);
}
