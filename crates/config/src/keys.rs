//! Every key of xl.cfg(5) and what its value looks like.

use crate::number::parse_number;
use crate::parse::{Value, ValueKind};

/// What a value has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One value, taken as text.
    Text,
    Number,
    /// A number; 0 is false.
    Boolean,
    /// A list of single values.
    List,
    /// A list of lists.
    Lists,
    /// One text, or a list of them.
    TextOrList,
    /// One of these words.
    Word(&'static [&'static str]),
    /// One of these words, or (deprecated in xl) its place in the list.
    WordOrIndex(&'static [&'static str]),
    /// A number, 0 for false, or a list.
    BooleanOrList,
}

/// What is done with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// Has an effect.
    Full,
    /// Known; its value is checked for its shape and has no effect yet.
    Ignored,
    /// As `Ignored`, and deprecated: the text says what to write instead.
    Deprecated(&'static str),
}

/// A key of the configuration file.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub name: &'static str,
    pub shape: Shape,
    pub support: Support,
    /// What a key with an effect does, in sentences; empty for the others.
    pub about: &'static str,
}

const ACTIONS: Shape = Shape::Word(&[
    "destroy",
    "restart",
    "rename-restart",
    "preserve",
    "coredump-destroy",
    "coredump-restart",
    "soft-reset",
]);
const TSC_MODES: &[&str] = &["default", "always_emulate", "native", "native_paravirt"];
const TIMER_MODES: &[&str] = &[
    "delay_for_missed_ticks",
    "no_delay_for_missed_ticks",
    "no_missed_ticks_pending",
    "one_missed_tick_pending",
];

const fn key(name: &'static str, shape: Shape, support: Support) -> Key {
    Key {
        name,
        shape,
        support,
        about: "",
    }
}

const fn full(name: &'static str, shape: Shape, about: &'static str) -> Key {
    Key {
        about,
        ..key(name, shape, Support::Full)
    }
}

macro_rules! ignored {
    ($shape:expr; $($name:literal),* $(,)?) => {
        &[$(key($name, $shape, Support::Ignored)),*]
    };
}

const FULL: &[Key] = &[
    full(
        "name",
        Shape::Text,
        "Name of the domain; no other domain may have it. It has to be given.",
    ),
    full(
        "type",
        Shape::Word(&["pv", "pvh", "hvm"]),
        "Kind of guest. Only pvh is supported, and assumed where nothing is said.",
    ),
    full(
        "builder",
        Shape::Word(&["generic", "hvm"]),
        "Deprecated; use type.",
    ),
    full(
        "uuid",
        Shape::Text,
        "Identifier of the domain; drawn where it is not given.",
    ),
    full(
        "kernel",
        Shape::Text,
        "The kernel: a Linux bzImage or an ELF file with a PVH entry. It has to be given.",
    ),
    full(
        "ramdisk",
        Shape::Text,
        "The kernel's initial root file system.",
    ),
    full(
        "cmdline",
        Shape::Text,
        "The whole kernel command line. root and extra are then ignored.",
    ),
    full(
        "root",
        Shape::Text,
        "Put on the kernel command line as root=.",
    ),
    full("extra", Shape::Text, "The rest of the kernel command line."),
    full(
        "memory",
        Shape::Number,
        "Memory at the start, in MiB; mem-set changes it while the domain runs.",
    ),
    full(
        "maxmem",
        Shape::Number,
        "Memory the guest may have at most, in MiB; that of memory where it is not given. The guest needs a balloon driver where it is more, as Linux has one: it sees all of it at first and has to give the rest back.",
    ),
    full(
        "vcpus",
        Shape::Number,
        "Virtual CPUs at the start; 1 where it is not given.",
    ),
    full(
        "maxvcpus",
        Shape::Number,
        "Virtual CPUs the guest may have at most; that of vcpus where it is not given.",
    ),
    full(
        "cpus",
        Shape::TextOrList,
        "Host CPUs that the virtual CPUs may run on: all, 0-3,5,^1, node:0, or a list with one such text for each virtual CPU.",
    ),
    full(
        "cpus_soft",
        Shape::TextOrList,
        "Host CPUs that the virtual CPUs prefer, in the same form.",
    ),
    full(
        "cpu_weight",
        Shape::Number,
        "Share of the host's CPUs where they are scarce, 1 to 65535; 256 is the usual one.",
    ),
    full(
        "cap",
        Shape::Number,
        "Most time of a host CPU that the domain may have, in percent of one; 0 is no limit.",
    ),
    full(
        "on_poweroff",
        ACTIONS,
        "What becomes of the domain when the guest powers off; destroy where it is not given.",
    ),
    full(
        "on_reboot",
        ACTIONS,
        "What becomes of it when the guest reboots; restart where it is not given.",
    ),
    full(
        "on_watchdog",
        ACTIONS,
        "What becomes of it when its watchdog strikes; destroy where it is not given.",
    ),
    full(
        "on_crash",
        ACTIONS,
        "What becomes of it when the guest crashes; destroy where it is not given.",
    ),
    full(
        "on_soft_reset",
        ACTIONS,
        "What becomes of it when the guest asks for a soft reset; soft-reset where it is not given.",
    ),
    full(
        "engine_direct",
        Shape::Boolean,
        "Whether long-running user code of the guest is executed natively where that pays; 1 where it is not given. Not a key of xl.",
    ),
    full(
        "cpu_level",
        Shape::Word(&["x86-64-v3", "x86-64-v4"]),
        "Instruction set level of the guest's processor; x86-64-v3 where it is not given. x86-64-v4 is AVX-512, with the extensions of it that the host has: the host \
         needs it, and so does every host that the domain is to run on. Not a key of xl.",
    ),
    full(
        "cpuid",
        Shape::TextOrList,
        "Features that the guest sees or does not see whatever the level says: \"host,avx512f=1,rdrand=0\". 0 hides a feature (and what depends on it), 1 shows it or refuses \
         to create the domain, k and s show it where the host has it, x leaves it. The names are those of xl. A list of leaves, and keys that take a number, \
         have no effect.",
    ),
    full("disk", Shape::List, "The disks; see below."),
    full("vif", Shape::List, "The network interfaces; see below."),
];

const TEXTS: &[Key] = ignored![Shape::Text;
    "pool", "seclabel", "init_seclabel", "device_tree", "rdm", "firmware", "firmware_override", "pvshim_path",
    "pvshim_cmdline", "pvshim_extra", "device_model_user", "bootloader", "boot", "bios_path_override", "acpi_firmware",
    "smbios_firmware", "soundhw", "vnclisten", "vncpasswd", "keymap", "display", "xauthority", "spicehost",
    "spicepasswd", "spice_image_compression", "spice_streaming_video", "device_model_override", "stubdomain_kernel",
    "stubdomain_cmdline", "stubdomain_ramdisk", "device_model_stubdomain_seclabel",
];

const NUMBERS: &[Key] = ignored![Shape::Number;
    "period", "slice", "latency", "extratime", "max_grant_frames", "max_maptrack_frames",
    "max_grant_version", "vmtrace_buf_kb", "rdm_mem_boundary", "max_event_channels", "shadow_memory", "rtc_timeoffset",
    "mmio_hole", "videoram", "vncdisplay", "spiceport", "spicetls_port", "spiceusbredirection", "usbversion",
    "stubdomain_memory", "nr_spis",
];

const BOOLEANS: &[Key] = ignored![Shape::Boolean;
    "pvshim", "nomigrate", "driver_domain", "xend_suspend_evtchn_compat", "vpmu", "pci_permissive", "pci_msitranslate",
    "pci_seize", "pci_power_mgmt", "dm_restrict", "e820_host", "hap", "oos", "pae", "acpi", "acpi_s3", "acpi_s4",
    "acpi_laptop_slate", "apic", "nx", "hpet", "nestedhvm", "localtime", "vpt_align", "xen_platform_pci", "stdvga",
    "vnc", "vncunused", "sdl", "opengl", "nographic", "spice", "spicedisable_ticketing", "spiceagent_mouse",
    "spicevdagent", "spice_clipboard_sharing", "vkb_device", "usb", "device_model_stubdomain_override", "msr_relaxed",
];

const LISTS: &[Key] = ignored![Shape::List;
    "vif2", "vtpm", "p9", "pvcalls", "vfb", "channel", "usbctrl", "usbdev", "pci", "dtdev", "ioports",
    "iomem", "irqs", "vdispl", "vkb", "device_model_args", "device_model_args_pv", "device_model_args_hvm", "mca_caps",
];

const OTHERS: &[Key] = &[
    key("vnuma", Shape::Lists, Support::Ignored),
    key("vsnd", Shape::Lists, Support::Ignored),
    key("serial", Shape::TextOrList, Support::Ignored),
    key("usbdevice", Shape::TextOrList, Support::Ignored),
    key("gfx_passthru", Shape::Text, Support::Ignored),
    key("viridian", Shape::BooleanOrList, Support::Ignored),
    key(
        "passthrough",
        Shape::Word(&["default", "disabled", "enabled", "sync_pt", "share_pt"]),
        Support::Ignored,
    ),
    key("tee", Shape::Word(&["none", "optee"]), Support::Ignored),
    key("hdtype", Shape::Word(&["ide", "ahci"]), Support::Ignored),
    key(
        "bios",
        Shape::Word(&["rombios", "seabios", "ovmf"]),
        Support::Ignored,
    ),
    key(
        "altp2m",
        Shape::WordOrIndex(&["disabled", "mixed", "external", "limited"]),
        Support::Ignored,
    ),
    key(
        "ms_vm_genid",
        Shape::Word(&["generate", "none"]),
        Support::Ignored,
    ),
    key("tsc_mode", Shape::WordOrIndex(TSC_MODES), Support::Ignored),
    key(
        "timer_mode",
        Shape::WordOrIndex(TIMER_MODES),
        Support::Ignored,
    ),
    key(
        "vga",
        Shape::Word(&["stdvga", "cirrus", "none", "qxl"]),
        Support::Ignored,
    ),
    key(
        "vendor_device",
        Shape::Word(&["none", "xenserver"]),
        Support::Ignored,
    ),
    key(
        "device_model_version",
        Shape::Word(&["qemu-xen", "qemu-xen-traditional"]),
        Support::Ignored,
    ),
    key(
        "gic_version",
        Shape::Word(&["v2", "v3", "default"]),
        Support::Ignored,
    ),
    key("vuart", Shape::Text, Support::Ignored),
    key("bootloader_args", Shape::TextOrList, Support::Ignored),
    key(
        "altp2mhvm",
        Shape::Boolean,
        Support::Deprecated("use altp2m=\"MODE\""),
    ),
    key(
        "device_model",
        Shape::Text,
        Support::Deprecated("use device_model_override=\"PATH\""),
    ),
    key(
        "vncviewer",
        Shape::Number,
        Support::Deprecated("use the option -V of create"),
    ),
];

/// All keys, those with an effect first.
pub fn known_keys() -> impl Iterator<Item = &'static Key> {
    [FULL, TEXTS, NUMBERS, BOOLEANS, LISTS, OTHERS]
        .into_iter()
        .flatten()
}

pub(crate) fn find(name: &str) -> Option<&'static Key> {
    known_keys().find(|key| key.name == name)
}

/// The known key that `name` most likely is a misspelling of.
pub(crate) fn similar(name: &str) -> Option<&'static str> {
    if name.len() > 64 {
        return None;
    }
    known_keys()
        .map(|key| (edit_distance(name, key.name), key.name))
        .filter(|(distance, candidate)| *distance <= 2 && *distance * 3 <= candidate.len())
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance, in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

impl Shape {
    /// How the value is written, for a line of a manual page.
    pub fn usage(self) -> String {
        match self {
            Shape::Text => "\"TEXT\"".into(),
            Shape::Number => "NUMBER".into(),
            Shape::Boolean => "0|1".into(),
            Shape::List => "[ \"ITEM\", ... ]".into(),
            Shape::Lists => "[ [ \"ITEM\", ... ], ... ]".into(),
            Shape::TextOrList => "\"TEXT\" or [ \"TEXT\", ... ]".into(),
            Shape::Word(words) | Shape::WordOrIndex(words) => format!("\"{}\"", words.join("|")),
            Shape::BooleanOrList => "0|1 or [ \"ITEM\", ... ]".into(),
        }
    }

    /// Checks a value; the error says what it should be.
    pub(crate) fn check(self, value: &Value) -> Result<(), String> {
        match (self, &value.kind) {
            (Shape::Text | Shape::TextOrList, ValueKind::Atom(_)) => Ok(()),
            (Shape::Text, ValueKind::List(_)) => {
                Err("is a list but should be a single value".into())
            }
            (Shape::Number | Shape::Boolean | Shape::BooleanOrList, ValueKind::Atom(atom)) => {
                parse_number(&atom.text).map(|_| ()).map_err(|fault| {
                    format!("\"{}\" {fault}{}", atom.text.escape_debug(), self.hint())
                })
            }
            (Shape::Number | Shape::Boolean, ValueKind::List(_)) => {
                Err("is a list but should be a number".into())
            }
            (Shape::List | Shape::TextOrList | Shape::BooleanOrList, ValueKind::List(items)) => {
                match items
                    .iter()
                    .find(|item| matches!(item.kind, ValueKind::List(_)))
                {
                    Some(inner) => Err(format!(
                        "has a list inside (at {}) where a single value belongs",
                        inner.location
                    )),
                    None => Ok(()),
                }
            }
            (Shape::List | Shape::Lists, ValueKind::Atom(_)) => {
                Err("is a single value but should be a list: put it in [ ]".into())
            }
            (Shape::Lists, ValueKind::List(items)) => {
                match items
                    .iter()
                    .find(|item| matches!(item.kind, ValueKind::Atom(_)))
                {
                    Some(inner) => Err(format!(
                        "has a single value inside (at {}) where a list belongs",
                        inner.location
                    )),
                    None => Ok(()),
                }
            }
            (Shape::Word(words) | Shape::WordOrIndex(words), ValueKind::List(_)) => Err(format!(
                "is a list but should be one of {}",
                words.join(", ")
            )),
            (Shape::Word(words), ValueKind::Atom(atom)) if words.contains(&atom.text.as_str()) => {
                Ok(())
            }
            (Shape::WordOrIndex(words), ValueKind::Atom(atom))
                if words
                    .iter()
                    .any(|word| word.eq_ignore_ascii_case(&atom.text))
                    || self.index(value).is_some() =>
            {
                Ok(())
            }
            (Shape::Word(words) | Shape::WordOrIndex(words), ValueKind::Atom(atom)) => {
                Err(format!(
                    "cannot be \"{}\": it is one of {}",
                    atom.text.escape_debug(),
                    words.join(", ")
                ))
            }
        }
    }

    /// The word a deprecated number stands for.
    pub(crate) fn index(self, value: &Value) -> Option<&'static str> {
        let (Shape::WordOrIndex(words), ValueKind::Atom(atom)) = (self, &value.kind) else {
            return None;
        };
        let index = usize::try_from(parse_number(&atom.text).ok()?).ok()?;
        words.get(index).copied()
    }

    fn hint(self) -> &'static str {
        match self {
            Shape::Boolean | Shape::BooleanOrList => " (true is 1, false is 0)",
            _ => "",
        }
    }
}
