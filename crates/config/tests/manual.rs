//! Cases out of xl.cfg(5), Xen 4.17: what is accepted, with which value, and what is said about the rest.

use hospes_config::{Diagnostic, DomainConfig, EventAction, Severity, Source, load};

const BASE: &str = "name='d'\ntype='pvh'\nkernel='/k'\nmemory=64\n";

fn read(text: &str) -> (Option<DomainConfig>, Vec<Diagnostic>) {
    load(&[Source {
        name: "d.cfg",
        text,
    }])
}

/// A valid configuration with `text` behind it: no message expected.
fn accept(text: &str) -> DomainConfig {
    let (config, diagnostics) = read(&format!("{BASE}{text}"));
    assert!(diagnostics.is_empty(), "{text:?}: {diagnostics:?}");
    config.unwrap_or_else(|| panic!("{text:?} was refused"))
}

/// The messages about a configuration with `text` in line 5.
fn messages(text: &str) -> Vec<String> {
    read(&format!("{BASE}{text}"))
        .1
        .iter()
        .map(Diagnostic::to_string)
        .collect()
}

#[test]
fn load_valid_settings_gives_their_values() {
    type Check = fn(&DomainConfig) -> bool;
    let cases: &[(&str, Check)] = &[
        ("", |c| {
            c.name == "d" && c.memory_mib == 64 && c.maxmem_mib == 64
        }),
        ("", |c| {
            c.vcpus == 1 && c.maxvcpus == 1 && c.cmdline.is_empty()
        }),
        ("", |c| c.uuid.is_none() && c.ramdisk.is_none()),
        ("name=\"h0\"; type=\"pvh\"", |c| c.name == "h0"),
        ("name=\"h0\"; ", |c| c.name == "h0"),
        ("name='it is \"quoted\"'", |c| c.name == "it is \"quoted\""),
        ("name=\"it's\"", |c| c.name == "it's"),
        ("name='a\\'b'", |c| c.name == "a'b"),
        ("name='\\x41\\102'", |c| c.name == "AB"),
        ("name='höst'", |c| c.name == "höst"),
        ("name=7 # no letter\nname='e'", |c| c.name == "e"),
        ("memory=128", |c| c.memory_mib == 128),
        ("memory=\"128\"", |c| c.memory_mib == 128),
        ("memory=0x80", |c| c.memory_mib == 128),
        ("memory=0200", |c| c.memory_mib == 128),
        ("memory = 128 # MiB", |c| c.memory_mib == 128),
        ("\tmemory\t=\t128\r", |c| c.memory_mib == 128),
        ("memory=128;vcpus=2", |c| {
            c.memory_mib == 128 && c.vcpus == 2
        }),
        ("memory=128\nmemory=256", |c| c.memory_mib == 256),
        ("maxmem=128", |c| c.memory_mib == 64 && c.maxmem_mib == 128),
        ("memory=8", |c| c.memory_mib == 8),
        ("vcpus=2", |c| c.vcpus == 2 && c.maxvcpus == 2),
        ("maxvcpus=4", |c| c.vcpus == 1 && c.maxvcpus == 4),
        ("vcpus=2\nmaxvcpus=4", |c| c.vcpus == 2 && c.maxvcpus == 4),
        ("vcpus=128", |c| c.vcpus == 128),
        ("cpus='0-3,5,^1'", |c| {
            c.scheduling
                .cpus
                .of(77)
                .is_some_and(|list| list.as_str() == "0-3,5,^1")
        }),
        ("cpus=2", |c| {
            c.scheduling
                .cpus
                .of(0)
                .is_some_and(|list| list.as_str() == "2")
        }),
        ("cpus=[\"2\", \"3-8,^5\"]", |c| {
            let cpus = &c.scheduling.cpus;
            cpus.of(1).is_some_and(|list| list.as_str() == "3-8,^5") && cpus.of(2).is_none()
        }),
        ("cpus_soft='node:0'\ncpu_weight=512\ncap=150", |c| {
            let s = &c.scheduling;
            s.cpus_soft.of(0).is_some() && s.weight == Some(512) && s.cap == Some(150)
        }),
        ("ramdisk='/i'", |c| {
            c.ramdisk.as_deref() == Some("/i".as_ref())
        }),
        ("kernel='rel/k'", |c| c.kernel.as_os_str() == "rel/k"),
        ("extra='a b'", |c| c.cmdline == "a b"),
        ("root='/dev/xvda'", |c| c.cmdline == "root=/dev/xvda"),
        ("extra='ro'\nroot='/dev/xvda'", |c| {
            c.cmdline == "root=/dev/xvda ro"
        }),
        ("cmdline='console=hvc0'", |c| c.cmdline == "console=hvc0"),
        ("cmdline='a'\ncmdline+=' b'", |c| c.cmdline == "a b"),
        ("cmdline += 'b'", |c| c.cmdline == "b"),
        ("on_poweroff='destroy'", |c| {
            c.on.poweroff == EventAction::Destroy
        }),
        ("on_poweroff='preserve'", |c| {
            c.on.poweroff == EventAction::Preserve
        }),
        ("", |c| c.on.poweroff == EventAction::Destroy),
        ("", |c| c.on.reboot == EventAction::Restart),
        ("", |c| c.on.watchdog == EventAction::Destroy),
        ("", |c| c.on.crash == EventAction::Destroy),
        ("", |c| c.on.soft_reset == EventAction::SoftReset),
        ("on_reboot='rename-restart'", |c| {
            c.on.reboot == EventAction::RenameRestart
        }),
        ("on_crash='restart'", |c| c.on.crash == EventAction::Restart),
        ("on_crash='coredump-destroy'", |c| {
            c.on.crash == EventAction::CoredumpDestroy
        }),
        ("on_crash='coredump-restart'", |c| {
            c.on.crash == EventAction::CoredumpRestart
        }),
        ("on_watchdog='restart'", |c| {
            c.on.watchdog == EventAction::Restart
        }),
        ("on_soft_reset='soft-reset'", |c| {
            c.on.soft_reset == EventAction::SoftReset
        }),
        ("uuid='59e1cf6c-6ab9-4879-90e7-adc8d1c63bf5'", |c| {
            c.uuid.map(|u| u.to_string()).as_deref() == Some("59e1cf6c-6ab9-4879-90e7-adc8d1c63bf5")
        }),
        ("cpuid='host,tm=0,sse3=0'", |c| c.cpuid.len() == 2),
        ("disk=[]", |c| c.name == "d"),
        ("disk=[\n\n]\n\n;;\n", |c| c.name == "d"),
        ("# comment without an end", |c| c.name == "d"),
    ];
    for (text, check) in cases {
        let config = accept(text);
        assert!(check(&config), "{text:?}: {config:?}");
    }
}

#[test]
fn load_known_keys_without_effect_notes_them() {
    let cases = [
        (
            "vnuma=[[\"pnode=0\",\"size=512\",\"vcpus=0-4\",\"vdistances=10,20\"]]",
            "vnuma",
        ),
        ("pool='Pool-0'", "pool"),
        ("vfb=['vnc=1']", "vfb"),
        ("irqs=[ 5, 7 ]", "irqs"),
        ("pvshim=1", "pvshim"),
        ("nomigrate=0", "nomigrate"),
        ("tsc_mode='native'", "tsc_mode"),
        ("timer_mode=\"one_missed_tick_pending\"", "timer_mode"),
        ("viridian=1", "viridian"),
        ("viridian=['base','!time_ref_count']", "viridian"),
        ("serial=['pty','/dev/ttyS0']", "serial"),
        ("serial='pty'", "serial"),
        ("vnc=1", "vnc"),
        ("bootloader='pygrub'", "bootloader"),
        ("bootloader_args=['--kernel','/k']", "bootloader_args"),
        ("passthrough='sync_pt'", "passthrough"),
        ("max_grant_frames=64", "max_grant_frames"),
        ("device_model_version='qemu-xen'", "device_model_version"),
        ("vsnd=[['CARD, short-name=Main']]", "vsnd"),
        ("msr_relaxed=1", "msr_relaxed"),
    ];
    for (text, key) in cases {
        let (config, diagnostics) = read(&format!("{BASE}{text}"));
        assert!(config.is_some(), "{text:?}: {diagnostics:?}");
        let said: Vec<String> = diagnostics.iter().map(Diagnostic::to_string).collect();
        assert_eq!(
            said,
            [format!(
                "d.cfg:5: note: `{key}' is not supported yet, ignored"
            )],
            "{text:?}"
        );
    }
}

#[test]
fn load_wrong_settings_names_line_and_reason() {
    let cases = [
        ("memory=128M", "d.cfg:5: error: `128M' is no number"),
        (
            "memory=7",
            "d.cfg:5: error: `memory' is 7, it has to be 8 to 16777216 MiB",
        ),
        ("memory=99999999999", "it has to be 8 to"),
        ("memory='-1'", "d.cfg:5: error: `memory' is -1"),
        ("memory='99999999999999999999'", "does not fit into 64 bits"),
        ("memory=08", "is not a number"),
        (
            "memory='lots'",
            "d.cfg:5: error: `memory' \"lots\" is not a number",
        ),
        ("memory=[128]", "is a list but should be a number"),
        ("memory+=1", "+= cannot be used with it"),
        (
            "maxmem=32",
            "d.cfg:5: error: `maxmem' is 32 MiB, less than `memory' with 64 MiB",
        ),
        ("vcpus=0", "`vcpus' is 0, it has to be 1 to 128"),
        ("vcpus=129", "`vcpus' is 129, it has to be 1 to 128"),
        (
            "cpus='1-'",
            "d.cfg:5: error: `cpus': \"1-\" is no list of host CPUs",
        ),
        (
            "cpus=['1', '^all']",
            "`cpus': \"^all\" is no list of host CPUs",
        ),
        ("cpu_weight=0", "`cpu_weight' is 0, it has to be 1 to 65535"),
        (
            "vcpus=4\nmaxvcpus=2",
            "d.cfg:6: error: `maxvcpus' is 2, less than `vcpus' with 4",
        ),
        ("name=''", "d.cfg:5: error: the name \"\" is empty"),
        ("name='a/b'", "contains a `/'"),
        ("name='web.console'", "ends in `.console'"),
        ("name='a\\nb'", "contains control characters"),
        ("name=['a']", "is a list but should be a single value"),
        ("uuid='59e1cf6c'", "\"59e1cf6c\" is not a UUID"),
        (
            "uuid='59e1cf6c-6ab9-4879-90e7-adc8d1c63bfg'",
            "is not a UUID",
        ),
        (
            "uuid='00000000-0000-0000-0000-000000000000'",
            "is the host's",
        ),
        ("type='pv'", "domains of type pv are not supported"),
        ("type='hvm'", "domains of type hvm are not supported"),
        (
            "type='lpar'",
            "`type' cannot be \"lpar\": it is one of pv, pvh, hvm",
        ),
        ("builder='hvm'", "`builder' says hvm but `type' says pvh"),
        ("kernel=''", "`kernel' is empty"),
        (
            "on_crash='reboot'",
            "`on_crash' cannot be \"reboot\": it is one of destroy, restart",
        ),
        ("on_reboot=1", "`on_reboot' cannot be \"1\""),
        ("disk='a'", "`disk' is a single value but should be a list"),
        ("disk=[['a']]", "has a list inside (at d.cfg:5)"),
        ("engine_direct='true'", "(true is 1, false is 0)"),
        (
            "memory",
            "`=' behind `memory' expected, found the end of the text",
        ),
        (
            "memory=",
            "string, number or list expected, found the end of the text",
        ),
        (
            "memory 128",
            "`=' behind `memory' expected, found number 128",
        ),
        (
            "memory=128 vcpus=1",
            "end of line or `;' behind the value of `memory' expected, found `vcpus'",
        ),
        ("= 3", "NAME=VALUE expected, found `='"),
        ("disk=['a' 'b']", "`,' or `]' expected, found string \"b\""),
        (
            "disk=['a'\n",
            "`,' or `]' expected, found the end of the text",
        ),
        ("disk=[,]", "string, number or list expected, found `,'"),
        (
            "extra='a",
            "d.cfg:5: error: the string is not closed with ' on its line",
        ),
        ("extra=\"a\nb\"", "d.cfg:5: error: the string is not closed"),
        ("extra='\\q'", "`\\q' is no escape"),
        ("extra='\\x1'", "needs two hexadecimal digits"),
        ("extra='\\0'", "NUL"),
        ("extra='\\xff'", "above 0x7f"),
        ("Memory=128", "`Memory' is no name"),
        ("memory=1.5", "Python code is not understood"),
        ("import os", "`=' behind `import' expected"),
        ("def f():", "`=' behind `def' expected"),
        ("vcpus=1\n@", "d.cfg:6: error: `@' has no meaning here"),
        ("extra=['a']\nextra+='b'", "is a list"),
        (
            "cmdline='a'\ncmdline+=['b']",
            "one value is a list, the other is not (first set at d.cfg:5)",
        ),
        (
            "disk=[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]",
            "nested more than 16 deep",
        ),
    ];
    for (text, part) in cases {
        let (config, diagnostics) = read(&format!("{BASE}{text}"));
        assert!(config.is_none(), "{text:?} was accepted");
        let said: Vec<String> = diagnostics
            .iter()
            .filter(|d| d.is_error())
            .map(Diagnostic::to_string)
            .collect();
        assert!(
            said.iter().any(|message| message.contains(part)),
            "{text:?}: {said:?}"
        );
    }
}

#[test]
fn load_deprecated_and_unknown_keys_warns() {
    let cases = [
        (
            "tsc_mode=2",
            "warning: a number for `tsc_mode' is deprecated: write tsc_mode=\"native\"",
        ),
        (
            "timer_mode=0",
            "write timer_mode=\"delay_for_missed_ticks\"",
        ),
        (
            "bootloader_args='-k /k'",
            "warning: a single text for `bootloader_args' is deprecated",
        ),
        ("altp2mhvm=1", "warning: `altp2mhvm' is deprecated"),
        ("vncviewer=1", "warning: `vncviewer' is deprecated"),
        (
            "device_model='qemu-dm'",
            "warning: `device_model' is deprecated",
        ),
        (
            "memry=128",
            "d.cfg:5: warning: `memry' is not a key of xl.cfg, ignored; did you mean `memory'?",
        ),
        (
            "frobnicate=1",
            "d.cfg:5: warning: `frobnicate' is not a key of xl.cfg, ignored",
        ),
        (
            "vm.cpu_mask2.=['a']",
            "d.cfg:5: warning: `vm.cpu_mask2.' is not a key of xl.cfg, ignored",
        ),
        (
            "cmdline='a'\nroot='b'",
            "d.cfg:6: warning: ignored, because `cmdline' is given",
        ),
        ("name='12'", "for a domain id"),
    ];
    for (text, part) in cases {
        let said = messages(text);
        assert!(
            said.iter().any(|message| message.contains(part)),
            "{text:?}: {said:?}"
        );
        assert!(
            read(&format!("{BASE}{text}")).0.is_some(),
            "{text:?} was refused"
        );
    }
}

#[test]
fn load_missing_mandatory_keys_says_what_to_add() {
    let (config, diagnostics) = read("");
    assert!(config.is_none());
    let said: Vec<String> = diagnostics.iter().map(Diagnostic::to_string).collect();
    assert!(said.contains(&"d.cfg: error: the domain has no name: add name=\"NAME\"".to_string()));
    assert!(said.contains(&"d.cfg: error: no kernel is given: add kernel=\"PATH\"".to_string()));
}

#[test]
fn load_missing_type_and_memory_takes_defaults_and_says_so() {
    let (config, diagnostics) = read("name='d'\nkernel='/k'");
    assert_eq!(config.expect("accepted").memory_mib, 32);
    let severities: Vec<Severity> = diagnostics.iter().map(|d| d.severity).collect();
    assert_eq!(severities, [Severity::Note, Severity::Warning]);
}

#[test]
fn load_maxmem_alone_is_the_memory() {
    let (config, _) = read("name='d'\nkernel='/k'\nmaxmem=96");
    let config = config.expect("accepted");
    assert_eq!((config.memory_mib, config.maxmem_mib), (96, 96));
}

#[test]
fn load_several_sources_lets_the_last_win() {
    let sources = [
        Source {
            name: "d.cfg",
            text: BASE,
        },
        Source {
            name: "command line",
            text: "memory=96; extra='x'",
        },
        Source {
            name: "command line",
            text: "extra+=' y'\nvcpus='many'",
        },
    ];
    let (config, _) = load(&sources[..2]);
    assert_eq!(config.expect("accepted").memory_mib, 96);
    let (config, diagnostics) = load(&sources);
    assert!(config.is_none());
    assert!(
        diagnostics[0]
            .to_string()
            .starts_with("command line:2: error: `vcpus' \"many\"")
    );
}

#[test]
fn load_goes_on_behind_a_fault() {
    let said = messages("memory=\nvcpus=1\nextra='\nramdisk=]\n(\nname='ok'");
    let lines: Vec<&str> = said.iter().map(|message| &message[..8]).collect();
    assert_eq!(lines, ["d.cfg:5:", "d.cfg:7:", "d.cfg:8:", "d.cfg:9:"]);
}

#[test]
fn load_too_long_source_is_refused() {
    let (config, diagnostics) = read(&"#".repeat(hospes_config::MAX_SOURCE_BYTES + 1));
    assert!(config.is_none());
    assert!(diagnostics[0].message.contains("is it the right file?"));
}

#[test]
fn to_json_has_the_form_of_libxl() {
    let json =
        accept("vcpus=2\nuuid='59e1cf6c-6ab9-4879-90e7-adc8d1c63bf5'\non_crash='rename-restart'")
            .to_json();
    assert_eq!(json["c_info"]["name"], "d");
    assert_eq!(json["c_info"]["type"], "pvh");
    assert_eq!(
        json["c_info"]["uuid"],
        "59e1cf6c-6ab9-4879-90e7-adc8d1c63bf5"
    );
    assert_eq!(json["b_info"]["target_memkb"], 65536);
    assert_eq!(json["b_info"]["avail_vcpus"], serde_json::json!([0, 1]));
    assert_eq!(json["on_crash"], "restart_rename");
    assert_eq!(json["on_soft_reset"], "soft_reset");
}
