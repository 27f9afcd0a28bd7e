//! Commands for running domains: devices, names, keys, configurations.

use std::process::Stdio;
use std::time::Duration;

use crate::common::Bench;

/// The configuration in the long list.
fn config(bench: &Bench, name: &str) -> serde_json::Value {
    let json: serde_json::Value =
        serde_json::from_str(&bench.ok(&["list", "-l", name])).expect("JSON");
    json[0]["config"].clone()
}

/// Waits until the guest was seen to get something.
fn heard(bench: &Bench, name: &str, text: &str) {
    crate::common::until(text, || {
        bench.log(&format!("{name}.console.log")).contains(text)
    });
}

#[test]
fn block_attach_and_detach_change_domain_and_record() {
    let bench = Bench::new();
    bench.create("one", &["disk=['/img/a,,xvda']"]);
    bench.ok(&["block-attach", "one", "/img/b,qcow2,xvdb,r"]);
    heard(&bench, "one", "attached disk xvdb");
    bench.ok(&["block-attach", "one", "target=/img/c", "vdev=xvdc"]);
    let disks = config(&bench, "one")["disks"].clone();
    assert_eq!(disks[1]["vdev"], "xvdb");
    assert_eq!(disks[1]["format"], "qcow2");
    assert_eq!(disks[1]["readwrite"], 0);
    assert_eq!(disks[2]["pdev_path"], "/img/c");

    let cases: &[(&[&str], &str)] = &[
        (
            &["block-attach", "one", "/img/d,,xvdb"],
            "xvdb is in use already",
        ),
        (
            &["block-attach", "one", "/img/d,,51728"],
            "51728 is in use already",
        ),
        (
            &["block-attach", "one", "/img/d"],
            "disk \"/img/d\": `vdev' is missing",
        ),
        (
            &["block-attach", "one", "/img/bad,,xvdd"],
            "the image is bad",
        ),
        (
            &["block-attach", "two", "/img/d,,xvdd"],
            "two is an invalid domain identifier",
        ),
        (
            &["block-detach", "one", "xvde"],
            "Error: Device xvde not connected.",
        ),
        (
            &["block-detach", "one", "nonsense"],
            "Error: Device nonsense not connected.",
        ),
        (
            &["cd-insert", "one", "xvdb", "/dev/null"],
            "no CD-ROM drive",
        ),
        (
            &["cd-insert", "one", "xvdx", "/dev/null"],
            "there is no CD-ROM drive xvdx",
        ),
    ];
    for (arguments, part) in cases {
        let said = bench.fails(1, arguments);
        assert!(said.contains(part), "{arguments:?}: {said}");
    }

    bench.ok(&["block-detach", "one", "51728"]);
    heard(&bench, "one", "detached Disk 51728");
    bench.ok(&["block-detach", "one", "xvda"]);
    let disks = config(&bench, "one")["disks"].clone();
    assert_eq!(disks.as_array().map(Vec::len), Some(1));
    assert_eq!(disks[0]["vdev"], "xvdc");
}

#[test]
fn block_detach_forced_takes_what_the_guest_keeps() {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.ok(&["block-attach", "one", "/img/stuck,,xvdb"]);
    let said = bench.fails(1, &["block-detach", "one", "xvdb"]);
    assert!(said.contains("does not let go"), "{said}");
    assert_eq!(config(&bench, "one")["disks"][0]["vdev"], "xvdb");
    bench.ok(&["block-detach", "--force", "one", "xvdb"]);
    assert!(config(&bench, "one")["disks"].is_null());
}

#[test]
fn attach_that_cannot_be_written_down_is_taken_back() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let in_the_way = bench.domain_dir(1).join("domain.json.new");
    std::fs::create_dir(&in_the_way).expect("writable");
    // The guest would keep it.
    let said = bench.fails(1, &["block-attach", "one", "/img/stuck,,xvdb"]);
    assert!(said.contains("cannot write"), "{said}");
    heard(&bench, "one", "detached Disk 51728");
    let said = bench.fails(1, &["network-attach", "one"]);
    assert!(said.contains("cannot write"), "{said}");
    heard(&bench, "one", "detached Vif 0");
    std::fs::remove_dir(&in_the_way).expect("writable");
    assert!(config(&bench, "one")["disks"].is_null());
    assert!(config(&bench, "one")["nics"].is_null());
    bench.ok(&["block-attach", "one", "/img/b,,xvdb"]);
    assert_eq!(config(&bench, "one")["disks"][0]["pdev_path"], "/img/b");
}

#[test]
fn block_resize_and_media_reach_the_domain() {
    let bench = Bench::new();
    std::fs::write(bench.path("cd.iso"), "medium").expect("writable");
    let iso = bench.path("cd.iso").display().to_string();
    bench.create("one", &["disk=['/img/a,,xvda', 'vdev=xvdc,cdrom']"]);
    bench.ok(&["block-resize", "one", "xvda", "64m"]);
    heard(&bench, "one", "resized 51712 to 67108864");
    let said = bench.fails(2, &["block-resize", "one", "xvda", "large"]);
    assert!(said.contains("`large' is no size"), "{said}");
    bench.ok(&["cd-insert", "one", "xvdc", &iso]);
    heard(&bench, "one", &format!("medium {iso}"));
    assert_eq!(config(&bench, "one")["disks"][1]["pdev_path"], *iso);
    bench.ok(&["cd-eject", "one", "51744"]);
    heard(&bench, "one", "no medium");
    assert_eq!(config(&bench, "one")["disks"][1]["format"], "empty");
    assert_eq!(config(&bench, "one")["disks"][1]["vdev"], "xvdc");
    let said = bench.fails(1, &["cd-insert", "one", "xvdc", "/nonexistent"]);
    assert!(said.contains("Cannot stat file: /nonexistent"), "{said}");
}

#[test]
fn medium_that_cannot_be_written_down_is_taken_out_again() {
    let bench = Bench::new();
    let [old, new] = ["old.iso", "new.iso"].map(|name| {
        std::fs::write(bench.path(name), "medium").expect("writable");
        bench.path(name).display().to_string()
    });
    bench.create("one", &[&format!("disk=['{old},,xvdc,cdrom']")]);
    let in_the_way = bench.domain_dir(1).join("domain.json.new");
    std::fs::create_dir(&in_the_way).expect("writable");
    let said = bench.fails(1, &["cd-insert", "one", "xvdc", &new]);
    assert!(said.contains("cannot write"), "{said}");
    heard(&bench, "one", &format!("medium {old}"));
    let said = bench.fails(1, &["cd-eject", "one", "xvdc"]);
    assert!(said.contains("cannot write"), "{said}");
    std::fs::remove_dir(&in_the_way).expect("writable");
    assert_eq!(config(&bench, "one")["disks"][0]["pdev_path"], *old);
    bench.ok(&["cd-insert", "one", "xvdc", &new]);
    assert_eq!(config(&bench, "one")["disks"][0]["pdev_path"], *new);
}

#[test]
fn network_attach_and_detach_change_domain_and_record() {
    let bench = Bench::new();
    bench.create("one", &["vif=['mac=00:16:3e:00:00:01', '']"]);
    let nics = config(&bench, "one")["nics"].clone();
    assert_eq!(nics[0]["mac"], "00:16:3e:00:00:01");
    let drawn = nics[1]["mac"].as_str().expect("an address").to_string();
    assert!(drawn.starts_with("00:16:3e:"), "{drawn}");

    bench.ok(&["network-attach", "one", "bridge=br0", "rate=10Mb/s"]);
    heard(&bench, "one", "attached vif 2");
    assert_eq!(config(&bench, "one")["nics"][2]["bridge"], "br0");
    bench.ok(&["network-detach", "one", &drawn.to_uppercase()]);
    heard(&bench, "one", "detached Vif 1");
    bench.ok(&["network-detach", "one", "0"]);
    // The lowest free number is used again.
    bench.ok(&["network-attach", "one"]);
    let nics = config(&bench, "one")["nics"].clone();
    assert_eq!(
        (&nics[0]["devid"], &nics[1]["devid"]),
        (&2.into(), &0.into())
    );

    let cases: &[(&[&str], &str)] = &[
        (&["network-detach", "one", "7"], "Unknown device 7."),
        (&["network-detach", "one", "x"], "Unknown device x."),
        (
            &["network-detach", "one", "00:16:3e:ff:ff:ff"],
            "Unknown device 00:16:3e:ff:ff:ff.",
        ),
        (
            &["network-attach", "one", "devid=2"],
            "network interface 2 is in use already",
        ),
        (
            &["network-attach", "one", "brigde=a"],
            "vif \"brigde=a\": `brigde' is no parameter",
        ),
    ];
    for (arguments, part) in cases {
        let said = bench.fails(1, arguments);
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

#[test]
fn device_lists_have_a_header_and_go_on_behind_a_fault() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let output = bench.run(&["block-list", "nobody", "one", "0"]);
    assert_eq!(output.status.code(), Some(0));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("nobody is an invalid domain identifier"),
        "{said}"
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim_end(),
        "Vdev  BE  handle state evt-ch ring-ref BE-path"
    );
    assert_eq!(
        bench.ok(&["network-list", "one"]).trim_end(),
        "Idx BE Mac Addr.         handle state evt-ch   tx-/rx-ring-ref BE-path"
    );
    bench.fails(1, &["network-list", "nobody"]);
}

#[test]
fn devices_stay_through_a_reboot() {
    let bench = Bench::new();
    bench.create("one", &["vif=['']"]);
    bench.ok(&["block-attach", "one", "/img/b,,xvdb"]);
    bench.ok(&["rename", "one", "two"]);
    let before = config(&bench, "two");
    bench.ok(&["reboot", "two"]);
    crate::common::until("it runs again", || {
        bench.row("two").is_some_and(|row| row[1] == "2")
    });
    let after = config(&bench, "two");
    assert_eq!(after["disks"], before["disks"]);
    assert_eq!(after["nics"], before["nics"]);
}

#[test]
fn dry_run_shows_the_device_and_attaches_nothing() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let disk = bench.ok(&["-N", "block-attach", "one", "/a,,xvdb,r"]);
    assert!(
        disk.starts_with("disk: {") && disk.contains("\"vdev\": \"xvdb\""),
        "{disk}"
    );
    let vif = bench.ok(&["-N", "network-attach", "one", "bridge=br0"]);
    assert!(
        vif.starts_with("vif: {") && vif.contains("\"bridge\": \"br0\""),
        "{vif}"
    );
    let medium = bench.ok(&["-N", "cd-insert", "one", "xvdc", "/a.iso"]);
    assert!(medium.contains("\"is_cdrom\": 1"), "{medium}");
    assert!(config(&bench, "one")["disks"].is_null());
}

#[test]
fn rename_gives_the_logs_the_new_name_and_the_old_one_to_the_next_domain() {
    let bench = Bench::new();
    // Of an earlier domain.
    std::fs::create_dir_all(bench.path("log")).expect("writable");
    for name in ["two.log", "two.console.log"] {
        std::fs::write(bench.path("log").join(name), "earlier\n").expect("writable");
    }
    bench.create("one", &[]);
    let console = bench.log("one.console.log");
    bench.ok(&["rename", "one", "two"]);
    bench.create("one", &[]);
    crate::common::until("the renamed domain has its log", || {
        bench.log("two.log").contains("(domid 1) to die")
    });
    assert!(
        bench
            .log("two.log")
            .contains("Domain one has the name two from here on")
    );
    assert!(bench.log("two.console.log").starts_with(&console));
    for name in ["two.log.1", "two.console.log.1"] {
        assert_eq!(bench.log(name), "earlier\n", "{name}");
    }
    // It is written when the command has been answered.
    crate::common::until("the next domain has the old name's log", || {
        bench.log("one.log").contains("(domid 2) to die")
    });
    let own = bench.log("one.log");
    assert!(!own.contains("domid 1"), "{own}");
    // What comes goes to the new ones.
    bench.ok(&["destroy", "two"]);
    crate::common::until("its end is in its own log", || {
        bench.log("two.log").contains("Domain 1 has been destroyed")
    });
    assert_eq!(bench.log("one.log"), own);
}

#[test]
fn rename_is_written_down_and_keeps_names_unique() {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.create("two", &[]);
    bench.ok(&["rename", "1", "uno"]);
    assert_eq!(bench.ok(&["domname", "1"]), "uno\n");
    assert_eq!(bench.ok(&["domid", "uno"]), "1\n");
    assert_eq!(
        bench.row("uno").map(|row| row[1].clone()).as_deref(),
        Some("1")
    );
    for (name, part) in [
        ("two", "a domain named \"two\" exists already"),
        ("Domain-0", "exists already"),
        ("", "the name \"\" is empty"),
        ("a/b", "contains a `/'"),
        ("two.console", "ends in `.console'"),
    ] {
        let said = bench.fails(1, &["rename", "uno", name]);
        assert!(said.contains(part), "{said}");
    }
    // Its own name is no conflict.
    bench.ok(&["rename", "uno", "uno"]);
}

#[test]
fn sysrq_and_trigger_reach_the_domain() {
    let bench = Bench::new();
    bench.create("one", &["vcpus=2"]);
    bench.ok(&["sysrq", "one", "h"]);
    heard(&bench, "one", "sysrq h");
    bench.ok(&["trigger", "one", "nmi", "1"]);
    heard(&bench, "one", "nmi at vCPU 1");
    bench.ok(&["trigger", "one", "nmi"]);
    heard(&bench, "one", "nmi at vCPU 0");
    let cases: &[(&[&str], &str)] = &[
        (&["sysrq", "one", "help"], "Invalid sysrq"),
        (&["sysrq", "one", ""], "Invalid sysrq"),
        (&["sysrq", "0", "h"], "Domain-0 is the host itself"),
        (&["trigger", "one", "fire"], "Invalid trigger \"fire\""),
        (&["trigger", "one", "power"], "no power here"),
        (&["button-press", "one", "power"], "no power here"),
        (
            &["button-press", "one", "red"],
            "red is an invalid button identifier",
        ),
    ];
    for (arguments, part) in cases {
        let said = bench.fails(1, arguments);
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

#[test]
fn config_update_counts_from_the_next_start() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let file = bench.path("new.cfg");
    let text = format!(
        "name='other'\ntype='pvh'\nkernel='{}'\nmemory=128\n",
        bench.path("kernel").display()
    );
    std::fs::write(&file, text).expect("writable");
    let file = file.display().to_string();
    let shown = bench.ok(&["-N", "config-update", "one", &file, "vcpus=2"]);
    assert!(shown.contains("\"max_vcpus\": 2"), "{shown}");
    let said = bench.fails(1, &["config-update", "one", &file, "memory=none"]);
    assert!(
        said.contains("the configuration has errors: domain 1 keeps what it has"),
        "{said}"
    );
    bench.ok(&["config-update", "one", &file, "vcpus=3"]);
    bench.ok(&["reboot", "one"]);
    crate::common::until("it runs again", || {
        bench.row("one").is_some_and(|row| row[1] == "2")
    });
    let row = bench.row("one").expect("it runs");
    assert_eq!((row[2].as_str(), row[3].as_str()), ("128", "3"));
}

#[test]
fn vcpu_set_counts_from_now_on_and_for_the_next_start() {
    let bench = Bench::new();
    bench.create("one", &["vcpus=1", "maxvcpus=3"]);
    let reboot = |id: &str| {
        bench.ok(&["reboot", "one"]);
        crate::common::until("it runs again", || {
            bench.row("one").is_some_and(|row| row[1] == id)
        });
        bench.row("one").expect("it runs")[3].clone()
    };
    bench.ok(&["vcpu-set", "-i", "one", "2"]);
    let online = config(&bench, "one")["b_info"]["avail_vcpus"].clone();
    assert_eq!(online, serde_json::json!([0, 1]));
    assert_eq!(reboot("2"), "2");
    let file = bench.path("new.cfg");
    let kernel = bench.path("kernel").display().to_string();
    let text = format!("name='one'\nkernel='{kernel}'\nvcpus=1\nmaxvcpus=2\n");
    std::fs::write(&file, text).expect("writable");
    bench.ok(&["config-update", "one", &file.display().to_string()]);
    bench.ok(&["vcpu-set", "-i", "one", "3"]);
    assert_eq!(bench.row("one").expect("it runs")[3], "3");
    assert_eq!(reboot("3"), "2", "the next one has no more");
}

#[test]
fn config_update_leaves_what_is_attached_to_the_running_domain() {
    let bench = Bench::new();
    bench.create("one", &["disk=['/img/a,,xvda']", "memory=64"]);
    let file = bench.path("new.cfg");
    let kernel = bench.path("kernel").display().to_string();
    let text = format!("name='one'\nkernel='{kernel}'\nmemory=4096\ndisk=['/img/b,,xvdb']\n");
    std::fs::write(&file, text).expect("writable");
    let claims = bench.ok(&["info", "outstanding_claims"]);
    bench.ok(&["config-update", "one", &file.display().to_string()]);
    assert_eq!(bench.ok(&["info", "outstanding_claims"]), claims);
    let disks = |bench: &Bench| -> Vec<String> {
        let disks = config(bench, "one")["disks"].clone();
        let names = disks.as_array().into_iter().flatten();
        names
            .map(|disk| disk["vdev"].as_str().unwrap_or_default().to_owned())
            .collect()
    };
    assert_eq!(disks(&bench), ["xvda"]);
    // What is changed from now on is changed for the next start too.
    bench.ok(&["block-attach", "one", "/img/c,,xvdc"]);
    bench.ok(&["block-detach", "one", "xvda"]);
    assert_eq!(disks(&bench), ["xvdc"]);
    bench.ok(&["reboot", "one"]);
    crate::common::until("it runs again", || {
        bench.row("one").is_some_and(|row| row[1] == "2")
    });
    assert_eq!(disks(&bench), ["xvdb", "xvdc"]);
    assert_eq!(bench.row("one").expect("it runs")[2], "4096");
}

#[test]
fn block_attach_of_a_device_that_linux_calls_otherwise_warns() {
    let bench = Bench::new();
    bench.create("one", &["disk=['/img/a,,xvda']"]);
    for (device, warned) in [
        ("xvdb", None),
        ("hdc", Some("calls hdc xvdc: write xvdc")),
        ("hda", Some("calls hda and xvda of another disk xvda both")),
    ] {
        let done = bench.run(&["block-attach", "one", &format!("/img/{device},,{device}")]);
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{said}");
        match warned {
            None => assert_eq!(said, ""),
            Some(part) => assert!(said.contains("warning:") && said.contains(part), "{said}"),
        }
    }
}

#[test]
fn detach_behind_another_says_that_the_device_is_not_there() {
    let bench = Bench::new();
    bench.create(
        "one",
        &[
            "disk=['/img/a,raw,xvda,w']",
            "vif=['mac=00:16:3e:00:00:01']",
        ],
    );
    let taken = bench.path("kernel.taken");
    let moment = || std::thread::sleep(Duration::from_millis(200));
    for (slow, command, device, said) in [
        (
            "xvdb",
            "block-detach",
            "xvda",
            "Error: Device xvda not connected.",
        ),
        (
            "xvdc",
            "network-detach",
            "00:16:3e:00:00:01",
            "Unknown device 00:16:3e:00:00:01.",
        ),
    ] {
        std::fs::write(&taken, "").expect("writable");
        // Changes come one after the other: neither of these is made before this one.
        let slow = format!("/img/slow,raw,{slow},w");
        let mut attaching = bench.spawn(&["block-attach", "one", &slow]);
        moment();
        let detach = || {
            let mut detaching = bench.command();
            detaching.args([command, "one", device]);
            detaching.stderr(Stdio::piped()).spawn().expect("a program")
        };
        let both = [detach(), detach()];
        moment();
        std::fs::remove_file(&taken).expect("there");
        let ends = both.map(|one| one.wait_with_output().expect("a child"));
        let mut ends = ends.map(|end| {
            (
                end.status.code(),
                String::from_utf8_lossy(&end.stderr).into_owned(),
            )
        });
        ends.sort();
        assert_eq!(ends[0], (Some(0), String::new()));
        assert_eq!(ends[1].0, Some(1));
        assert!(ends[1].1.contains(said), "{}", ends[1].1);
        assert_eq!(attaching.wait(), Some(0));
    }
}
