//! Disk specifications out of xl-disk-configuration(5) and xen-vbd-interface(7), Xen 4.17.

use hospes_config::{DiskConfig, Source, Vdev, load};
use proptest::prelude::*;

/// A disk in one line: target, format, device, number, mode, and what else is set.
fn line(disk: &DiskConfig) -> String {
    let mut text = format!(
        "{} {} {}={} {}",
        disk.target
            .as_ref()
            .map_or("-".into(), |target| target.display().to_string()),
        disk.format.as_str(),
        disk.vdev.name,
        disk.vdev.number,
        if disk.read_only { "r" } else { "w" },
    );
    if disk.cdrom {
        text += " cdrom";
    }
    match disk.discard {
        Some(true) => text += " discard",
        Some(false) => text += " no-discard",
        None => {}
    }
    if disk.direct_io_safe {
        text += " direct-io-safe";
    }
    if !disk.backend.is_empty() {
        text += &format!(" backend={}", disk.backend);
    }
    if let Some(script) = &disk.script {
        text += &format!(" script={script}");
    }
    if !disk.trusted {
        text += " untrusted";
    }
    text
}

#[test]
fn parse_valid_specifications_gives_their_values() {
    let lv = "/dev/vg/guest-volume raw hda=768 w";
    let iso = "/root/image.iso raw hdc=5632 r cdrom";
    let cases = [
        // The examples of the page.
        ("/dev/vg/guest-volume,,hda", lv),
        ("/dev/vg/guest-volume,raw,hda,rw", lv),
        (
            "format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume",
            lv,
        ),
        ("raw:/dev/vg/guest-volume,hda,w", lv),
        ("/root/image.iso,,hdc,cdrom", iso),
        ("/root/image.iso,,hdc,,cdrom", iso),
        ("/root/image.iso,raw,hdc,devtype=cdrom", iso),
        (
            "format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso",
            iso,
        ),
        ("raw:/root/image.iso,hdc:cdrom,ro", iso),
        (",hdc:cdrom,r", "- empty hdc=5632 r cdrom"),
        // Positional values.
        ("/a.img,qcow2,xvda", "/a.img qcow2 xvda=51712 w"),
        ("/a.img,,xvda,r", "/a.img raw xvda=51712 r"),
        ("/a.img,,xvda,ro", "/a.img raw xvda=51712 r"),
        ("/a.img,,xvda,w", "/a.img raw xvda=51712 w"),
        ("/a.img,,xvda,", "/a.img raw xvda=51712 w"),
        ("vg/lv,,xvda", "vg/lv raw xvda=51712 w"),
        ("  /a.img,\t,\n xvda", "/a.img raw xvda=51712 w"),
        ("/a.img,vdev=xvdb,qcow2", "/a.img qcow2 xvdb=51728 w"),
        ("vdev=xvda,/a.img", "/a.img raw xvda=51712 w"),
        ("format=qcow2,/a.img,xvda", "/a.img qcow2 xvda=51712 w"),
        // target= takes the rest, whatever is in it.
        ("vdev=xvda,target=/a,b:c=d", "/a,b:c=d raw xvda=51712 w"),
        (",,xvda,target=/a", "/a raw xvda=51712 w"),
        (
            "vdev=xvda,target=/with blank ",
            "/with blank  raw xvda=51712 w",
        ),
        (
            "/a.img,format=,vdev=xvda,access=",
            "/a.img raw xvda=51712 w",
        ),
        // Flags and other parameters.
        ("/a,,xvda,discard", "/a raw xvda=51712 w discard"),
        ("/a,,xvda,no-discard", "/a raw xvda=51712 w no-discard"),
        (
            "/a,,xvda,direct-io-safe",
            "/a raw xvda=51712 w direct-io-safe",
        ),
        (
            "direct-io-safe,/a,,xvda,w,discard",
            "/a raw xvda=51712 w discard direct-io-safe",
        ),
        (
            "/a,,xvda,backend=storage",
            "/a raw xvda=51712 w backend=storage",
        ),
        ("/a,,xvda,backendtype=phy", "/a raw xvda=51712 w"),
        ("/a,,xvda,backendtype=qdisk", "/a raw xvda=51712 w"),
        (
            "/a,,xvda,script=block-x",
            "/a raw xvda=51712 w script=block-x",
        ),
        ("/a,,xvda,trusted", "/a raw xvda=51712 w"),
        ("/a,,xvda,untrusted", "/a raw xvda=51712 w untrusted"),
        ("/a,,xvda,specification=xen", "/a raw xvda=51712 w"),
        ("/a,,xvda,devtype=disk", "/a raw xvda=51712 w"),
        ("/a,,xvda,no-colo", "/a raw xvda=51712 w"),
        ("/a.iso,,xvdc,rw,cdrom", "/a.iso raw xvdc=51744 r cdrom"),
        ("vdev=hdc,cdrom", "- empty hdc=5632 r cdrom"),
        ("vdev=hdc,cdrom,target=", "- empty hdc=5632 r cdrom"),
        (",empty,hdc,r,cdrom", "- empty hdc=5632 r cdrom"),
        // Deprecated prefixes: stripped, and no format among the positional values.
        ("phy:/dev/vg/lv,xvda,w", "/dev/vg/lv raw xvda=51712 w"),
        ("phy:vg/lv,xvda,w", "vg/lv raw xvda=51712 w"),
        ("file:/a.img,xvda,w", "/a.img raw xvda=51712 w"),
        ("tap:aio:/a.img,xvda,w", "/a.img raw xvda=51712 w"),
        ("tap2:aio:/a.img,xvda,r", "/a.img raw xvda=51712 r"),
        ("tap:qcow2:/a.img,xvda,w", "/a.img qcow2 xvda=51712 w"),
        ("tapdisk:/a.img,xvda,w", "/a.img raw xvda=51712 w"),
        ("aio:/a.img,xvda,w", "/a.img raw xvda=51712 w"),
        ("ioemu:/a.img,hda,w", "/a.img raw hda=768 w"),
        ("qcow2:/a.img,xvda:disk,w", "/a.img qcow2 xvda=51712 w"),
        (
            "iscsi:iqn.2001,xvda,w",
            "iqn.2001 raw xvda=51712 w script=block-iscsi",
        ),
        (
            "nbd:host 1,xvda,w",
            "host 1 raw xvda=51712 w script=block-nbd",
        ),
        ("drbd:r0,xvda,w", "r0 raw xvda=51712 w script=block-drbd"),
        ("enbd:x,xvda,w", "x raw xvda=51712 w script=block-enbd"),
    ];
    for (text, expected) in cases {
        let disk = DiskConfig::parse(text).unwrap_or_else(|fault| panic!("{text:?}: {fault}"));
        assert_eq!(line(&disk), expected, "{text:?}");
    }
}

#[test]
fn parse_wrong_specifications_says_what_is_allowed() {
    let cases = [
        ("", "`vdev' is missing: say which disk the guest sees"),
        ("/a.img", "`vdev' is missing"),
        ("/a.img,raw,", "`vdev' is missing"),
        (
            "vdev=xvda",
            "`target' is missing: give the path of an image",
        ),
        (",,xvda", "`target' is missing"),
        (
            "/a,xvda,w",
            "`format' cannot be \"xvda\": it is raw or qcow2",
        ),
        (
            "/a,qcow,xvda",
            "`format' cannot be \"qcow\": it is raw or qcow2",
        ),
        ("/a,vhd,xvda", "`format' cannot be \"vhd\""),
        ("/a,qed,xvda", "converted by `qemu-img convert'"),
        ("vhd:/a,xvda,w", "`format' cannot be \"vhd\""),
        (
            "/a,empty,xvda",
            "`format' cannot be \"empty\": it is raw or qcow2 where a target is given",
        ),
        (
            "raw:/a,format=qcow2,vdev=xvda",
            "`format' is given twice: remove one",
        ),
        (
            "/a,,xvda,x",
            "`access' cannot be \"x\": it is ro, r, rw or w",
        ),
        ("/a,,xvda,access=rwx", "`access' cannot be \"rwx\""),
        ("/a,,xvda,r,w", "\"w\" is one value too many"),
        ("/a,,xvda,vdev=xvdb", "`vdev' is given twice"),
        ("/a,,xvda,target=/b", "`target' is given twice"),
        ("/a,,xvda,backend=a,backend=b", "`backend' is given twice"),
        (
            "/a,,xvda,devtype=floppy",
            "`devtype' cannot be \"floppy\": it is cdrom or disk",
        ),
        ("raw:/a,hdc:dvd,r", "`devtype' cannot be \"dvd\""),
        (
            "/a,,xvda,backendtype=loop",
            "`backendtype' cannot be \"loop\": it is phy or qdisk",
        ),
        (
            "/a,,xvda,backendtype=standalone",
            "`backendtype=standalone' is not supported",
        ),
        (
            "/a,,xvda,specification=virtio",
            "`specification=virtio' is not supported",
        ),
        (
            "/a,,xvda,specification=nvme",
            "`specification' cannot be \"nvme\": it is xen",
        ),
        (
            "/a,,xvda,colo",
            "`colo' is not supported: there is no COLO replication",
        ),
        ("/a,,xvda,colo-host=h", "`colo-host' is not supported"),
        ("/a,,xvda,hidden-disk=/b", "`hidden-disk' is not supported"),
        (
            "/a,,xvda,cache=none",
            "`cache' is no parameter of a disk; known are target, format, vdev",
        ),
        ("/a,,xvda,=x", "\"=x\" is not understood"),
        (
            "/a,,xvda,trusted=0",
            "`trusted' takes no value: write `trusted' (as without either) or `untrusted', alone",
        ),
        (
            "/a,,xvda,discard=0",
            "`discard' takes no value: write `discard' or `no-discard', alone",
        ),
        ("/a,,xvda,cdrom=1", "write `cdrom', alone"),
        (
            "http://h/a,xvda,w",
            "`http:' is none of the deprecated prefixes",
        ),
        (
            "/a,,sdq",
            "`vdev' cannot be \"sdq\": it is xvda, xvdb1, hda, sda, d0p0 or the number",
        ),
        ("/a,,vda", "`vdev' cannot be \"vda\""),
    ];
    for (text, part) in cases {
        let said = match DiskConfig::parse(text) {
            Ok(disk) => panic!("{text:?} was accepted: {disk:?}"),
            Err(fault) => fault.to_string(),
        };
        assert!(said.contains(part), "{text:?}: {said}");
    }
}

#[test]
fn parse_repeated_flags_and_access_the_last_counts() {
    let parse = |text: &str| DiskConfig::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert!(!parse("/a,,xvda,access=r,access=w").read_only);
    // A place among the values is not used up by name.
    assert!(!parse("access=r,/a,raw,xvda,w").read_only);
    assert!(parse("/a,,xvda,w,access=ro").read_only);
    assert_eq!(parse("/a,,xvda,discard,no-discard").discard, Some(false));
    assert!(!parse("/a,,xvda,trusted,untrusted").trusted);
    assert!(!parse("/a,,xvda,cdrom,devtype=disk").cdrom);
}

#[test]
fn parse_all_reads_several_arguments_as_one_disk() {
    let disk = DiskConfig::parse_all(&["/a.img", "qcow2", "xvdb", "r"]).expect("accepted");
    assert_eq!(line(&disk), "/a.img qcow2 xvdb=51728 r");
}

#[test]
fn vdev_names_have_the_numbers_of_the_page() {
    let cases = [
        ("xvda", 51712),
        ("d0", 51712),
        ("d0p0", 51712),
        ("xvdb2", 51730),
        ("d1p2", 51730),
        ("xvdp15", 51967),
        ("xvdq", (1 << 28) | 16 << 8),
        ("xvda16", (1 << 28) | 16),
        ("xvdtq37", (1 << 28) | 536 << 8 | 37),
        ("d536p37", (1 << 28) | 536 << 8 | 37),
        ("xvdaa", (1 << 28) | 26 << 8),
        ("d1048575p255", (1 << 28) | 1_048_575 << 8 | 255),
        ("sda", 2048),
        ("sdb3", 2067),
        ("sdp15", 2303),
        ("hda", 768),
        ("hdb", 832),
        ("hdc2", 5634),
        ("hdd63", 5759),
        ("51712", 51712),
        ("0xca00", 51712),
        ("0145000", 51712),
        ("0", 0),
        ("536870911", (2 << 28) - 1),
    ];
    for (text, number) in cases {
        let vdev: Vdev = text.parse().unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!((vdev.name.as_str(), vdev.number), (text, number));
    }
}

#[test]
fn vdev_names_outside_of_the_bounds_are_refused() {
    let cases = [
        "",
        "xvd",
        "xvd1",
        "xvda0",
        "xvda01",
        "xvda256",
        "xvda1x",
        "XVDA",
        "hde",
        "hda64",
        "sdq",
        "sda16",
        "d",
        "dp",
        "d0p",
        "d0p256",
        "d1048576",
        "d-1",
        "-1",
        "536870912",
        "0x20000000",
        "ca00",
        "51712 ",
        "xvdzzzzzzzzzzzzzzz",
    ];
    for text in cases {
        assert!(text.parse::<Vdev>().is_err(), "{text:?} was accepted");
    }
}

#[test]
fn vdev_of_number_names_xen_disks() {
    let cases = [
        (51712, "xvda"),
        (51730, "xvdb2"),
        ((1 << 28) | 536 << 8 | 37, "xvdtq37"),
        ((1 << 28) | 26 << 8, "xvdaa"),
        (5632, "xvda"),
    ];
    for (number, name) in cases {
        assert_eq!(Vdev::of_number(number).name, name);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn parse_any_text_does_not_panic(text in "((phy|raw|tap|x):)?[a-z0-9=,:/ é-]{0,60}") {
        if let Ok(disk) = DiskConfig::parse(&text) {
            prop_assert!(disk.target.is_some() || disk.cdrom);
        }
    }

    #[test]
    fn parse_named_target_keeps_it_whole(target in "/[ -~]{0,40}[a-z]") {
        let disk = DiskConfig::parse(&format!("vdev=xvda,target={target}"));
        prop_assert_eq!(disk.ok().and_then(|disk| disk.target), Some(target.into()));
    }
}

#[test]
fn load_device_that_linux_calls_otherwise_is_taken_with_a_warning() {
    let clash = |both: &str, name: &str| {
        format!("a Linux guest calls {both} of another disk {name} both, and refuses one of them")
    };
    for (devices, expected) in [
        (&["xvda", "xvdaa", "d1"][..], None),
        (
            &["hda"],
            Some("a Linux guest calls hda xvda: write xvda".into()),
        ),
        (
            &["sdb"],
            Some("a Linux guest calls sdb xvdb: write xvdb".into()),
        ),
        (
            &["xvda", "5632"],
            Some("a Linux guest calls 5632 xvdc: write xvdc".into()),
        ),
        (&["xvdc", "hdc"], Some(clash("hdc and xvdc", "xvdc"))),
        (
            &["xvda", "0x7"],
            Some("a Linux guest refuses the device 0x7: write xvda".into()),
        ),
    ] {
        let disks = devices.iter().map(|device| format!("'/a,,{device}'"));
        let disks = disks.collect::<Vec<_>>().join(",");
        let text = format!("name='a'\ntype='pvh'\nkernel='/k'\nmemory=64\ndisk=[{disks}]");
        let name = "d.cfg";
        let (config, said) = load(&[Source { name, text: &text }]);
        assert_eq!(config.map(|config| config.disks.len()), Some(devices.len()));
        let said: Vec<String> = said.iter().map(ToString::to_string).collect();
        match expected {
            None => assert!(said.is_empty(), "{devices:?}: {said:?}"),
            Some(expected) => {
                let [line] = &said[..] else {
                    panic!("{devices:?}: {said:?}")
                };
                assert!(line.starts_with("d.cfg:5: warning: disk "), "{line}");
                assert!(line.contains(&expected), "{line}");
            }
        }
    }
}
