//! Network interface specifications out of xl-network-configuration(5), Xen 4.17.

use hospes_config::{Rate, Source, VifConfig, VifKind, load, mac_text};
use proptest::prelude::*;

#[test]
fn parse_valid_specifications_gives_their_values() {
    type Check = fn(&VifConfig) -> bool;
    let cases: &[(&str, Check)] = &[
        ("", |v| *v == VifConfig::default() && v.trusted),
        ("mac=00:16:3E:74:3d:76,model=rtl8139,bridge=xenbr0", |v| {
            v.mac == Some([0, 0x16, 0x3e, 0x74, 0x3d, 0x76])
                && v.model.as_deref() == Some("rtl8139")
                && v.bridge.as_deref() == Some("xenbr0")
        }),
        ("mac=00:16:3E:74:34:32", |v| {
            v.mac == Some([0, 0x16, 0x3e, 0x74, 0x34, 0x32])
        }),
        ("mac=2:0:0:0:0:a", |v| v.mac == Some([2, 0, 0, 0, 0, 10])),
        ("mac=00:00:00:00:00:00", |v| v.mac.is_none()),
        ("bridge=", |v| v.bridge.is_none()),
        ("bridge=xenbr1, mtu=9000", |v| v.mtu == Some(9000)),
        ("ip=10.0.0.2", |v| v.ip == ["10.0.0.2"]),
        ("ip=10.0.0.2 10.1.0.0/16 fd00::2,bridge=b", |v| {
            v.ip == ["10.0.0.2", "10.1.0.0/16", "fd00::2"]
        }),
        ("script=vif-route", |v| {
            v.script.as_deref() == Some("vif-route")
        }),
        ("script=/etc/xen/scripts/vif-nat", |v| v.script.is_some()),
        ("vifname=web0", |v| v.vifname.as_deref() == Some("web0")),
        ("gatewaydev=eth0", |v| v.netdev.as_deref() == Some("eth0")),
        ("netdev=eth0", |v| v.netdev.as_deref() == Some("eth0")),
        ("type=vif", |v| v.kind == VifKind::Vif),
        ("type=ioemu,model=e1000", |v| v.kind == VifKind::Vif),
        ("type=user", |v| v.kind == VifKind::User),
        ("backend=net", |v| v.backend == "net"),
        ("devid=3", |v| v.devid == Some(3)),
        ("trusted", |v| v.trusted),
        ("bridge=b,untrusted", |v| !v.trusted),
        ("bridge=a,bridge=b", |v| v.bridge.as_deref() == Some("b")),
        (",,bridge=b,", |v| v.bridge.as_deref() == Some("b")),
    ];
    for (text, check) in cases {
        let vif = VifConfig::parse(text).unwrap_or_else(|fault| panic!("{text:?}: {fault}"));
        assert!(check(&vif), "{text:?}: {vif:?}");
    }
}

#[test]
fn parse_rates_gives_bytes_and_interval() {
    let cases = [
        ("10Mb/s", 1_250_000, 50_000, 62_500),
        ("250KB/s", 250_000, 50_000, 12_500),
        ("1MB/s@20ms", 1_000_000, 20_000, 20_000),
        ("1GB/s", 1_000_000_000, 50_000, 50_000_000),
        ("1Gb/s", 125_000_000, 50_000, 6_250_000),
        ("8Kb/s@1s", 1000, 1_000_000, 1000),
        ("100B/s", 100, 50_000, 5),
        ("800b/s@100ms", 100, 100_000, 10),
        ("1MB/s@500us", 1_000_000, 500, 500),
        ("1MB/s@2", 1_000_000, 2_000_000, 2_000_000),
        ("1MB/s@2m", 1_000_000, 2000, 2000),
    ];
    for (text, bytes_per_s, interval_us, bytes) in cases {
        let vif = VifConfig::parse(&format!("rate={text}"))
            .unwrap_or_else(|fault| panic!("{text:?}: {fault}"));
        let rate = vif.rate.expect("given");
        assert_eq!(
            rate,
            Rate {
                bytes_per_s,
                interval_us
            },
            "{text:?}"
        );
        assert_eq!(rate.bytes_per_interval(), bytes, "{text:?}");
    }
}

#[test]
fn parse_wrong_specifications_says_what_is_allowed() {
    let cases = [
        (
            "mac=00:16:3e:74:34",
            "`mac' cannot be \"00:16:3e:74:34\": it is six pairs of hexadecimal digits",
        ),
        ("mac=00:16:3e:74:34:32:11", "six pairs"),
        ("mac=00-16-3e-74-34-32", "six pairs"),
        ("mac=00:16:3e:74:34:+1", "six pairs"),
        ("mac=01:16:3e:74:34:32", "whose first byte is even"),
        (
            "mac=ff:ff:ff:ff:ff:ff",
            "it is the address of one interface, whose first byte is even; this is that of a group",
        ),
        (
            "mac=FE:ff:ff:ff:ff:ff",
            "it is any other: the host's ends of interfaces have this one",
        ),
        (
            "bridge=a/b",
            "`bridge' cannot be \"a/b\": it is the name of a network interface",
        ),
        ("bridge=sixteen-letters!", "1 to 15 bytes"),
        ("vifname=..", "the name of a network interface"),
        (
            "ip=10.0.0",
            "`ip' cannot be \"10.0.0\": it is an address such as 10.0.0.2",
        ),
        ("ip=10.0.0.0/33", "`ip' cannot be"),
        ("ip=fd00::/129", "`ip' cannot be"),
        ("rate=", "`rate' cannot be \"\": it is NUMBER[GMK](B|b)/s"),
        ("rate=10Mb", "NUMBER[GMK]"),
        ("rate=10mb/s", "NUMBER[GMK]"),
        ("rate=0Mb/s", "NUMBER[GMK]"),
        ("rate=-1Mb/s", "NUMBER[GMK]"),
        ("rate=99999999999MB/s", "NUMBER[GMK]"),
        ("rate=1MB/s@0ms", "NUMBER[GMK]"),
        ("rate=1MB/s@20ks", "NUMBER[GMK]"),
        ("rate=1MB/s@9999s", "NUMBER[GMK]"),
        ("rate=1MB/s@", "NUMBER[GMK]"),
        ("rate=1B/s@1us", "at least one byte in each interval"),
        (
            "type=tap",
            "`type' cannot be \"tap\": it is vif, ioemu or user",
        ),
        (
            "mtu=67",
            "`mtu' cannot be \"67\": it is a number from 68 to 65521",
        ),
        ("mtu=big", "a number from 68 to 65521"),
        ("mtu=65535", "a number from 68 to 65521"),
        ("devid=-1", "a number from 0 to 65535"),
        (
            "vlan=3",
            "`vlan' is no parameter of a network interface; known are mac, bridge",
        ),
        ("bridge", "\"bridge\" is not understood: write KEY=VALUE"),
        (
            "bridge=b,trusted=0",
            "`trusted' takes no value: write `trusted' (as without either) or `untrusted', alone",
        ),
        ("untrusted=1", "`untrusted' takes no value"),
        ("forwarddev=eth1", "`forwarddev' is not supported"),
        ("colo_sock_mirror_id=1", "there is no COLO replication"),
        ("accel=1", "`accel' is not supported"),
    ];
    for (text, part) in cases {
        let said = match VifConfig::parse(text) {
            Ok(vif) => panic!("{text:?} was accepted: {vif:?}"),
            Err(fault) => fault.to_string(),
        };
        assert!(said.contains(part), "{text:?}: {said}");
    }
}

#[test]
fn load_device_lists_numbers_and_compares_their_items() {
    let base = "name='d'\ntype='pvh'\nkernel='/k'\nmemory=64\n";
    let read = |text: &str| {
        let text = format!("{base}{text}");
        let (config, diagnostics) = load(&[Source {
            name: "d.cfg",
            text: &text,
        }]);
        let said: Vec<String> = diagnostics.iter().map(ToString::to_string).collect();
        (config, said)
    };

    let (config, said) =
        read("vif=['', 'devid=7', 'bridge=b']\ndisk=['/a,,xvda', '/b,qcow2,xvdb,r']");
    assert!(said.is_empty(), "{said:?}");
    let config = config.expect("accepted");
    let devids: Vec<_> = config.vifs.iter().map(|vif| vif.devid).collect();
    assert_eq!(devids, [Some(0), Some(7), Some(2)]);
    let disks: Vec<_> = config.disks.iter().map(|disk| disk.vdev.number).collect();
    assert_eq!(disks, [51712, 51728]);

    let refused = [
        (
            "disk=['/a,,xvda',\n'/b,,51712']",
            "d.cfg:6: error: disk \"/b,,51712\": 51712 is the same device as xvda",
        ),
        (
            "disk=['/a,,xvda',\n'/b']",
            "d.cfg:6: error: disk \"/b\": `vdev' is missing",
        ),
        (
            "vif=['devid=1', '']",
            "d.cfg:5: error: vif \"\": number 1 belongs to another interface",
        ),
        (
            "vif=['rate=much']",
            "d.cfg:5: error: vif \"rate=much\": `rate' cannot be",
        ),
        (
            "vif=['mac=00:16:3e']",
            "d.cfg:5: error: vif \"mac=00:16:3e\": `mac' cannot be",
        ),
    ];
    for (text, part) in refused {
        let (config, said) = read(text);
        assert!(config.is_none(), "{text:?} was accepted");
        assert!(
            said.iter().any(|line| line.starts_with(part)),
            "{text:?}: {said:?}"
        );
    }

    // As in xl, the domain is made all the same.
    for (text, part) in [
        ("brigde=a", "`brigde' is no parameter"),
        ("vlan=5", "`vlan' is no parameter"),
        ("accel=1", "`accel' is not supported"),
        ("type=tap", "`type' cannot be \"tap\""),
        ("type=", "`type' cannot be \"\""),
        ("bridge", "\"bridge\" is not understood"),
        ("untrusted=1", "`untrusted' takes no value"),
    ] {
        let (config, said) = read(&format!("vif=['{text},mtu=1400']"));
        let config = config.unwrap_or_else(|| panic!("{text:?} was refused: {said:?}"));
        let expected = VifConfig {
            devid: Some(0),
            mtu: Some(1400),
            ..VifConfig::default()
        };
        assert_eq!(config.vifs, [expected], "{text}");
        let start = format!("d.cfg:5: warning: vif \"{text},mtu=1400\": {part}");
        assert!(
            said.len() == 1 && said[0].starts_with(&start) && said[0].ends_with("; ignored"),
            "{said:?}"
        );
        assert!(VifConfig::parse(text).is_err(), "{text}");
    }

    let (config, said) = read("vif=['mac=00:16:3e:00:00:01', 'mac=00:16:3e:00:00:01']");
    assert_eq!(config.map(|config| config.vifs.len()), Some(2));
    assert!(
        said[0].contains("warning: vif") && said[0].contains("the same mac"),
        "{said:?}"
    );
}

#[test]
fn to_json_lists_devices_as_libxl_does() {
    let text = "name='d'\ntype='pvh'\nkernel='/k'\nmemory=64\ndisk=['/a,,xvda,r','vdev=hdc,cdrom']\n\
                vif=['mac=00:16:3e:00:00:01,bridge=b,rate=10Mb/s,ip=10.0.0.2,backend=net']";
    let (config, _) = load(&[Source {
        name: "d.cfg",
        text,
    }]);
    let json = config.expect("accepted").to_json();
    assert_eq!(json["disks"][0]["pdev_path"], "/a");
    assert_eq!(json["disks"][0]["vdev"], "xvda");
    assert_eq!(json["disks"][0]["readwrite"], 0);
    assert_eq!(json["disks"][1]["is_cdrom"], 1);
    assert_eq!(json["disks"][1]["format"], "empty");
    assert_eq!(json["nics"][0]["mac"], "00:16:3e:00:00:01");
    assert_eq!(json["nics"][0]["devid"], 0);
    assert_eq!(json["nics"][0]["rate_bytes_per_interval"], 62_500);
    assert_eq!(json["nics"][0]["backend_domname"], "net");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn parse_any_text_does_not_panic(text in "((mac|rate|ip|mtu|bridge)=)?[A-Za-z0-9=,:/@. é-]{0,60}") {
        if let Ok(vif) = VifConfig::parse(&text) {
            prop_assert!(vif.rate.is_none_or(|rate| rate.bytes_per_interval() > 0));
        }
    }

    #[test]
    fn parse_mac_reads_what_is_printed(mut mac: [u8; 6]) {
        mac[0] = mac[0] & 0xfe | 2;
        let vif = VifConfig::parse(&format!("mac={}", mac_text(mac)));
        prop_assert_eq!(vif.ok().and_then(|vif| vif.mac), Some(mac));
    }
}

#[test]
fn parse_bridge_is_the_scripts_business_where_there_is_one() {
    let switch = "ovs-with-a-long-name.100:10:20";
    let vif = VifConfig::parse(&format!("bridge={switch},script=vif-openvswitch"));
    assert_eq!(vif.expect("accepted").bridge.as_deref(), Some(switch));
    assert!(VifConfig::parse(&format!("bridge={switch}")).is_err());
    assert!(VifConfig::parse("bridge=a\tb,script=s").is_err());
}
