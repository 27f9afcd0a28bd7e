//! Every key that xl.cfg(5) of Xen 4.17 documents: a value it takes, and one that is refused with a reason.

use hospes_config::{CpuLevel, DiskFormat, DomainConfig, EventAction, Source, load};

const BASE: &str = "name='d'\ntype='pvh'\nkernel='/k'\nmemory=64\n";

fn read(text: &str) -> (Option<DomainConfig>, Vec<String>) {
    let text = format!("{BASE}{text}");
    let (config, diagnostics) = load(&[Source {
        name: "d.cfg",
        text: &text,
    }]);
    (
        config,
        diagnostics.iter().map(ToString::to_string).collect(),
    )
}

/// Key, a value of the page, a value of the wrong form, and what is said about that.
const WITHOUT_EFFECT: &[(&str, &str, &str, &str)] = &[
    ("acpi", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "acpi_firmware",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("acpi_laptop_slate", "1", "'yes'", "(true is 1, false is 0)"),
    ("acpi_s3", "1", "'yes'", "(true is 1, false is 0)"),
    ("acpi_s4", "1", "'yes'", "(true is 1, false is 0)"),
    ("altp2m", "'external'", "'nonsense'", "it is one of"),
    ("apic", "1", "'yes'", "(true is 1, false is 0)"),
    ("bios", "'ovmf'", "'nonsense'", "it is one of"),
    (
        "bios_path_override",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "boot",
        "'dc'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "bootloader",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "bootloader_args",
        "['--kernel', '/vmlinuz']",
        "[['a']]",
        "where a single value belongs",
    ),
    (
        "channel",
        "['connection=socket,path=/tmp/socket,name=org.qemu.guest_agent.0']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    (
        "device_model_args",
        "['-nodefaults']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    (
        "device_model_args_hvm",
        "['a']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    (
        "device_model_args_pv",
        "['a']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    (
        "device_model_override",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "device_model_stubdomain_override",
        "1",
        "'yes'",
        "(true is 1, false is 0)",
    ),
    (
        "device_model_stubdomain_seclabel",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "device_model_user",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "device_model_version",
        "'qemu-xen'",
        "'nonsense'",
        "it is one of",
    ),
    (
        "device_tree",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("dm_restrict", "1", "'yes'", "(true is 1, false is 0)"),
    ("driver_domain", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "dtdev",
        "['/soc/mmc@0']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    ("e820_host", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "firmware",
        "'ovmf'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "gfx_passthru",
        "'igd'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("gic_version", "'v3'", "'nonsense'", "it is one of"),
    ("hap", "1", "'yes'", "(true is 1, false is 0)"),
    ("hdtype", "'ahci'", "'nonsense'", "it is one of"),
    ("hpet", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "init_seclabel",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "iomem",
        "['fe800,1@1000']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    (
        "ioports",
        "['2f8-2ff', '3f8']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    ("irqs", "[5, 7]", "'a'", "should be a list: put it in [ ]"),
    (
        "keymap",
        "'de'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("localtime", "1", "'yes'", "(true is 1, false is 0)"),
    ("max_event_channels", "64", "'many'", "is not a number"),
    ("max_grant_frames", "64", "'many'", "is not a number"),
    ("max_grant_version", "64", "'many'", "is not a number"),
    ("max_maptrack_frames", "64", "'many'", "is not a number"),
    (
        "mca_caps",
        "['lmce']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    ("mmio_hole", "64", "'many'", "is not a number"),
    ("ms_vm_genid", "'generate'", "'nonsense'", "it is one of"),
    ("msr_relaxed", "1", "'yes'", "(true is 1, false is 0)"),
    ("nestedhvm", "1", "'yes'", "(true is 1, false is 0)"),
    ("nographic", "1", "'yes'", "(true is 1, false is 0)"),
    ("nomigrate", "1", "'yes'", "(true is 1, false is 0)"),
    ("nx", "1", "'yes'", "(true is 1, false is 0)"),
    ("oos", "1", "'yes'", "(true is 1, false is 0)"),
    ("opengl", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "p9",
        "['tag=share,path=/srv/share,security_model=none']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    ("pae", "1", "'yes'", "(true is 1, false is 0)"),
    ("passthrough", "'sync_pt'", "'nonsense'", "it is one of"),
    (
        "pci",
        "['0000:03:04.1,msitranslate=1']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    ("pci_msitranslate", "1", "'yes'", "(true is 1, false is 0)"),
    ("pci_permissive", "1", "'yes'", "(true is 1, false is 0)"),
    ("pci_power_mgmt", "1", "'yes'", "(true is 1, false is 0)"),
    ("pci_seize", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "pool",
        "'Pool-0'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "pvcalls",
        "['backend=0']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    ("pvshim", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "pvshim_cmdline",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "pvshim_extra",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "pvshim_path",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "rdm",
        "'strategy=host,policy=relaxed'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("rdm_mem_boundary", "64", "'many'", "is not a number"),
    ("rtc_timeoffset", "64", "'many'", "is not a number"),
    ("sdl", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "seclabel",
        "'system_u:system_r:domU_t'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "serial",
        "['pty', '/dev/ttyS0']",
        "[['a']]",
        "where a single value belongs",
    ),
    ("shadow_memory", "64", "'many'", "is not a number"),
    (
        "smbios_firmware",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "soundhw",
        "'hda'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("spice", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "spice_clipboard_sharing",
        "1",
        "'yes'",
        "(true is 1, false is 0)",
    ),
    (
        "spice_image_compression",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "spice_streaming_video",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("spiceagent_mouse", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "spicedisable_ticketing",
        "1",
        "'yes'",
        "(true is 1, false is 0)",
    ),
    (
        "spicehost",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "spicepasswd",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("spiceport", "64", "'many'", "is not a number"),
    ("spicetls_port", "64", "'many'", "is not a number"),
    ("spiceusbredirection", "64", "'many'", "is not a number"),
    ("spicevdagent", "1", "'yes'", "(true is 1, false is 0)"),
    ("stdvga", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "stubdomain_cmdline",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "stubdomain_kernel",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("stubdomain_memory", "64", "'many'", "is not a number"),
    (
        "stubdomain_ramdisk",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("tee", "'optee'", "'nonsense'", "it is one of"),
    (
        "timer_mode",
        "'one_missed_tick_pending'",
        "'nonsense'",
        "it is one of",
    ),
    ("tsc_mode", "'native'", "'nonsense'", "it is one of"),
    ("usb", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "usbctrl",
        "['type=pv,version=2,ports=4']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    (
        "usbdev",
        "['type=hostdev,hostbus=1,hostaddr=2']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    (
        "usbdevice",
        "['tablet', 'host:1.2']",
        "[['a']]",
        "where a single value belongs",
    ),
    ("usbversion", "64", "'many'", "is not a number"),
    (
        "vdispl",
        "['backend=0,be-alloc=1,connectors=id0:1920x1080']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    ("vendor_device", "'xenserver'", "'nonsense'", "it is one of"),
    (
        "vfb",
        "['vnc=1,vnclisten=0.0.0.0']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    ("vga", "'qxl'", "'nonsense'", "it is one of"),
    ("videoram", "64", "'many'", "is not a number"),
    (
        "viridian",
        "['base', '!time_ref_count']",
        "[['a']]",
        "where a single value belongs",
    ),
    (
        "vkb",
        "['feature-disable-keyboard=1,width=800']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    ("vkb_device", "1", "'yes'", "(true is 1, false is 0)"),
    ("vmtrace_buf_kb", "8192", "'many'", "is not a number"),
    ("vnc", "1", "'yes'", "(true is 1, false is 0)"),
    ("vncdisplay", "64", "'many'", "is not a number"),
    (
        "vnclisten",
        "'127.0.0.1:5'",
        "['a']",
        "is a list but should be a single value",
    ),
    (
        "vncpasswd",
        "'some text'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("vncunused", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "vnuma",
        "[['pnode=0', 'size=512', 'vcpus=0-4', 'vdistances=10,20']]",
        "['a']",
        "where a list belongs",
    ),
    ("vpmu", "1", "'yes'", "(true is 1, false is 0)"),
    ("vpt_align", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "vsnd",
        "[['CARD, short-name=Main', 'PCM, name=dev1', 'STREAM, id=0, type=P']]",
        "['a']",
        "where a list belongs",
    ),
    (
        "vtpm",
        "['backend=vtpm']",
        "'a'",
        "should be a list: put it in [ ]",
    ),
    (
        "vuart",
        "'sbsa_uart'",
        "['a']",
        "is a list but should be a single value",
    ),
    ("xen_platform_pci", "1", "'yes'", "(true is 1, false is 0)"),
    (
        "xend_suspend_evtchn_compat",
        "1",
        "'yes'",
        "(true is 1, false is 0)",
    ),
];

#[test]
fn load_key_without_effect_is_noted() {
    for (key, value, _, _) in WITHOUT_EFFECT {
        let (config, said) = read(&format!("{key}={value}"));
        assert!(config.is_some(), "{key}: {said:?}");
        let note = format!("d.cfg:5: note: `{key}' is not supported yet, ignored");
        assert_eq!(said, [note], "{key}={value}");
    }
}

#[test]
fn load_key_without_effect_with_a_wrong_value_is_ignored_with_a_warning() {
    for (key, _, value, part) in WITHOUT_EFFECT {
        let (config, said) = read(&format!("{key}={value}"));
        assert!(config.is_some(), "{key}={value}: {said:?}");
        assert_eq!(said.len(), 1, "{key}={value}: {said:?}");
        assert!(
            said[0].starts_with(&format!("d.cfg:5: warning: `{key}' ")) && said[0].contains(part),
            "{key}={value}: {said:?}"
        );
    }
}

#[test]
fn load_words_without_effect_in_any_case() {
    let (config, said) = read("tsc_mode='Native'");
    assert!(config.is_some());
    assert_eq!(
        said,
        ["d.cfg:5: note: `tsc_mode' is not supported yet, ignored"]
    );
}

#[test]
fn load_empty_ramdisk_is_none() {
    let (config, said) = read("ramdisk=''");
    assert_eq!(config.expect("accepted").ramdisk, None);
    assert!(said.is_empty(), "{said:?}");
}

/// Keys with an effect: a value of the page, what it means, a value that is refused, and what is said about that.
type Case = (
    &'static str,
    fn(&DomainConfig) -> bool,
    &'static str,
    &'static str,
);

const WITH_EFFECT: &[Case] = &[
    (
        "cpuid='host,tm=0,sse3=0'",
        |c| c.cpuid.len() == 2,
        "cpuid='tm=0'",
        "does not begin with `host'",
    ),
    (
        "cpu_level='x86-64-v4'",
        |c| c.cpu_level == CpuLevel::V4,
        "cpu_level='x86-64-v5'",
        "cpu_level",
    ),
    (
        "engine_direct=0",
        |c| !c.engine_direct,
        "engine_direct=2",
        "engine_direct",
    ),
    (
        "name='web.example'",
        |c| c.name == "web.example",
        "name='a/b'",
        "contains a `/'",
    ),
    (
        "type='pvh'",
        |c| c.name == "d",
        "type='hvm'",
        "domains of type hvm are not supported",
    ),
    (
        "uuid='c0ffee00-0000-4000-8000-000000000001'",
        |c| c.uuid.is_some(),
        "uuid='c0ffee'",
        "is not a UUID: write 32 hexadecimal digits",
    ),
    (
        "kernel='/boot/vmlinuz'",
        |c| c.kernel.ends_with("vmlinuz"),
        "kernel=''",
        "`kernel' is empty",
    ),
    (
        "ramdisk='/boot/initrd.img'",
        |c| {
            c.ramdisk
                .as_ref()
                .is_some_and(|path| path.ends_with("initrd.img"))
        },
        "ramdisk=['/a']",
        "is a list but should be a single value",
    ),
    (
        "cmdline='quiet'",
        |c| c.cmdline == "quiet",
        "cmdline=['quiet']",
        "is a list but should be a single value",
    ),
    (
        "root='/dev/xvda1'",
        |c| c.cmdline == "root=/dev/xvda1",
        "root=[]",
        "is a list but should be a single value",
    ),
    (
        "extra='ro single'",
        |c| c.cmdline == "ro single",
        "extra=[]",
        "is a list but should be a single value",
    ),
    (
        "memory=1024",
        |c| c.memory_mib == 1024,
        "memory=4",
        "it has to be 8 to 16777216 MiB",
    ),
    (
        "maxmem=2048",
        |c| c.maxmem_mib == 2048,
        "maxmem=63",
        "less than `memory'",
    ),
    (
        "vcpus=4",
        |c| c.vcpus == 4,
        "vcpus=129",
        "it has to be 1 to 128",
    ),
    (
        "maxvcpus=8",
        |c| c.maxvcpus == 8,
        "maxvcpus=0",
        "it has to be 1 to 128",
    ),
    (
        "cpus='0-3,5,^1'",
        |c| c.scheduling.cpus.of(0).is_some(),
        "cpus='first'",
        "`cpus'",
    ),
    (
        "cpus='all'",
        |c| c.scheduling.cpus.of(0).is_some(),
        "cpus=[['0']]",
        "where a single value belongs",
    ),
    (
        "cpus=['2', '3-8,^5']",
        |c| c.scheduling.cpus.of(0).is_some(),
        "cpus='3-1'",
        "`cpus'",
    ),
    (
        "cpus_soft='node:0'",
        |c| c.scheduling.cpus_soft.of(0).is_some(),
        "cpus_soft='^'",
        "`cpus_soft'",
    ),
    (
        "cpu_weight=512",
        |c| c.name == "d",
        "cpu_weight=0",
        "`cpu_weight' is 0",
    ),
    ("cap=50", |c| c.name == "d", "cap='half'", "is not a number"),
    (
        "on_poweroff='preserve'",
        |c| c.on.poweroff == EventAction::Preserve,
        "on_poweroff='keep'",
        "it is one of destroy",
    ),
    (
        "on_reboot='destroy'",
        |c| c.on.reboot == EventAction::Destroy,
        "on_reboot='again'",
        "it is one of destroy",
    ),
    (
        "on_watchdog='restart'",
        |c| c.on.watchdog == EventAction::Restart,
        "on_watchdog=1",
        "it is one of destroy",
    ),
    (
        "on_crash='coredump-restart'",
        |c| c.on.crash == EventAction::CoredumpRestart,
        "on_crash=[]",
        "is a list but should be one of destroy",
    ),
    (
        "on_soft_reset='rename-restart'",
        |c| c.on.soft_reset == EventAction::RenameRestart,
        "on_soft_reset='soft'",
        "it is one of destroy",
    ),
    (
        "disk=['/dev/vg/guest-volume,,xvda', '/root/image.iso,,xvdc,cdrom']",
        |c| c.disks.len() == 2 && c.disks[1].cdrom && c.disks[0].format == DiskFormat::Raw,
        "disk=['/a']",
        "disk \"/a\": `vdev' is missing",
    ),
    (
        "vif=['mac=00:16:3E:74:34:32', 'mac=00:16:3e:5f:48:e4,bridge=xenbr1']",
        |c| c.vifs.len() == 2 && c.vifs[1].bridge.as_deref() == Some("xenbr1"),
        "vif='bridge=a'",
        "should be a list: put it in [ ]",
    ),
];

#[test]
fn load_key_with_effect_gives_its_value() {
    for (text, check, _, _) in WITH_EFFECT {
        let (config, said) = read(text);
        assert!(said.is_empty(), "{text}: {said:?}");
        assert!(config.as_ref().is_some_and(check), "{text}: {config:?}");
    }
}

#[test]
fn load_without_engine_direct_takes_it_as_on() {
    let (config, _) = read("");
    assert!(config.is_some_and(|c| c.engine_direct));
}

#[test]
fn load_key_with_effect_with_a_wrong_value_is_refused() {
    for (_, _, text, part) in WITH_EFFECT {
        let (config, said) = read(text);
        assert!(config.is_none(), "{text} was accepted");
        assert!(
            said.iter()
                .any(|line| line.starts_with("d.cfg:5: error: ") && line.contains(part)),
            "{text}: {said:?}"
        );
    }
}

#[test]
fn tables_hold_every_known_key_once() {
    let mut named: Vec<&str> = WITHOUT_EFFECT.iter().map(|case| case.0).collect();
    named.extend(
        WITH_EFFECT
            .iter()
            .filter_map(|case| case.0.split('=').next()),
    );
    for key in hospes_config::known_keys() {
        let deprecated = matches!(key.support, hospes_config::Support::Deprecated(_));
        // xl reads them all the same.
        let undocumented = [
            "builder",
            "vif2",
            "nr_spis",
            "latency",
            "period",
            "slice",
            "extratime",
            "display",
            "xauthority",
            "firmware_override",
        ];
        assert!(
            deprecated || undocumented.contains(&key.name) || named.contains(&key.name),
            "no case for {}",
            key.name
        );
    }
}
