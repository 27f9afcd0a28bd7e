//! Commands of xl that are not here.

/// By the reason, and what to use instead.
const NOT_HERE: &[(&str, &[&str])] = &[
    (
        "domains are not kept in two places at once: migrate moves one",
        &["remus"],
    ),
    ("there is no VNC server yet: use console", &["vncviewer"]),
    (
        "devices of the host cannot be passed through: block-attach and network-attach give a domain what it can have",
        &[
            "pci-attach",
            "pci-detach",
            "pci-assignable-add",
            "pci-assignable-remove",
            "usbctrl-attach",
            "usbctrl-detach",
            "usbdev-attach",
            "usbdev-detach",
        ],
    ),
    (
        "there are no such devices: block-attach and network-attach give a domain what it can have",
        &[
            "vtpm-attach",
            "vtpm-detach",
            "vkb-attach",
            "vkb-detach",
            "vdispl-attach",
            "vdispl-detach",
            "vsnd-attach",
            "vsnd-detach",
        ],
    ),
    (
        "a PVH domain has no device model: its log and debug-keys say what there is to know",
        &["qemu-monitor-command"],
    ),
    (
        "Linux schedules the virtual CPUs: vcpu-pin says where they run, sched-credit2 how much",
        &[
            "sched-rtds",
            "cpupool-create",
            "cpupool-destroy",
            "cpupool-rename",
            "cpupool-cpu-add",
            "cpupool-cpu-remove",
            "cpupool-migrate",
            "cpupool-numa-split",
        ],
    ),
    (
        "the host's kernel divides caches and memory bandwidth, by its file system resctrl",
        &[
            "psr-hwinfo",
            "psr-cmt-attach",
            "psr-cmt-detach",
            "psr-cmt-show",
            "psr-cat-set",
            "psr-cat-show",
            "psr-mba-set",
            "psr-mba-show",
        ],
    ),
    (
        "there is no hypervisor below the kernel, which has its own parameters and security modules",
        &["set-parameters", "getenforce", "setenforce", "loadpolicy"],
    ),
    (
        "back ends are in the domain processes: none has to be started",
        &["devd"],
    ),
];

/// Their names.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    NOT_HERE.iter().flat_map(|(_, names)| names.iter().copied())
}

/// Why a command of xl is not here; `None` for what xl does not have either.
pub(crate) fn why_not(name: &str) -> Option<&'static str> {
    NOT_HERE
        .iter()
        .find(|(_, names)| names.contains(&name))
        .map(|(reason, _)| *reason)
}
