//! The table of commands: what they are called, take and say about themselves. Arguments are read by it, and help,
//! completions and the manual page are made of it.

use crate::args::{Args, Opt};
use crate::commands::{
    absent, device_lists, devices, dumping, host, keys, life, logs, memory, meta, migrating, names,
    saving, shares, top, vcpus,
};
use crate::{Global, Outcome, create, domains, elsewhere, image, list};

/// A command that was called.
pub(crate) struct Call {
    /// The name by which the program was called.
    pub program: String,
    pub global: Global,
    pub args: Args,
}

/// A subcommand.
pub(crate) struct Command {
    pub name: &'static str,
    pub arguments: &'static str,
    /// One line.
    pub summary: &'static str,
    pub options: &'static [Opt],
    /// What else is to be known; a blank line begins a paragraph.
    pub details: &'static str,
    /// How many values there are at least and at most.
    pub min: usize,
    pub max: usize,
    /// Knows the global option -N.
    pub dry_run: bool,
    /// Does the work.
    pub run: fn(&Call) -> Outcome,
}

const MANY: usize = usize::MAX;

/// What an entry need not say.
const PLAIN: Command = Command {
    name: "",
    arguments: "",
    summary: "",
    options: &[],
    details: "",
    min: 0,
    max: 0,
    dry_run: false,
    run: meta::help,
};

const DOMAIN: &str = "A domain is given by its name or its id.";
const KEY_VALUE: &str = "KEY=VALUE is read behind FILE, as if it were its last line; several may stand in one argument, separated by semicolons. Texts need \
                         quotes that the shell leaves alone: 'extra=\"console=hvc0\"'.";

const CREATE: &[Opt] = &[
    Opt::both('f', "defconfig", "the configuration file").with("FILE"),
    Opt::short(
        'c',
        "attach to the console as soon as it is there; Ctrl-] leaves it",
    ),
    Opt::short('F', "stay in the foreground until the domain has ended"),
    Opt::short('p', "leave the domain paused"),
    Opt::both(
        'n',
        "dryrun",
        "print the configuration as JSON and create nothing",
    ),
    Opt::both('q', "quiet", "no messages but warnings and errors"),
    Opt::short(
        'd',
        "print the configuration as JSON to standard error, with -n to standard output alone",
    ),
    Opt::short(
        'e',
        "do nothing when the guest ends: every on_... action is preserve",
    ),
    Opt::both('V', "vncviewer", "accepted; there is no VNC server yet"),
    Opt::both(
        'A',
        "vncviewer-autopass",
        "accepted; there is no VNC server yet",
    ),
    Opt::both(
        'i',
        "ignore-global-affinity-masks",
        "accepted; there are no global masks",
    ),
];

const SHUTDOWN: &[Opt] = &[
    Opt::both('a', "all", "all domains"),
    Opt::both(
        'w',
        "wait",
        "wait, however long it takes, until the domain has shut down and, unless it is kept or starts again, is gone; given twice, until it is gone",
    ),
    Opt::short(
        'F',
        "accepted; every PVH guest that can be asked at all is asked this way",
    ),
];
const SCHED: &[Opt] = &[
    Opt::both('d', "domain", "this domain alone").with("DOMAIN"),
    Opt::both(
        'w',
        "weight",
        "its weight, 1 to 65535: twice the weight is twice the time on a busy host",
    )
    .with("WEIGHT"),
    Opt::both(
        'c',
        "cap",
        "most time it gets, in percent of one CPU; 0 for no limit",
    )
    .with("CAP"),
    Opt::both(
        'p',
        "cpupool",
        "the domains of this pool; there is Pool-0 only",
    )
    .with("CPUPOOL"),
    Opt::both('s', "schedparam", "the parameters of the pool"),
];
const SCHED_DETAILS: &str = "Without options all domains are listed. The weight is 256 and the cap 0 where nothing is said. They stay through reboots of the \
                             domain. Linux schedules the virtual CPUs, so the pools of Xen's schedulers have no parameters here.";
const MEMORY_DETAILS: &str = "MEM is in MiB, or with t, g, m, k or b behind it in TiB, GiB, MiB, KiB or bytes; at most maxmem of the configuration. The guest's \
                              balloon driver gives memory back or takes it; a guest without one keeps what it has. More is refused where the host has not \
                              enough. A guest may become unstable that has too little. What is set stays through reboots.";
const SHUTDOWN_DETAILS: &str = "The command returns when the guest has acknowledged the request, and fails where it has not after 60 seconds, as one that is paused or hangs. \
                                The guest decides how long it takes then. What happens behind that is set by on_poweroff and on_reboot of its configuration.";

const NO_DEVICES: &str = "There are no such devices here: the list is empty. Disks and network interfaces are in block-list and network-list.";

const IMAGE: &[Opt] = &[
    Opt::long("size", "size of the disk with K, M, G or T; 4G").with("SIZE"),
    Opt::long("format", "format of the image; raw").with("raw|qcow2"),
    Opt::long("hostname", "name of the guest; debian").with("NAME"),
    Opt::long("packages", "more packages; may be repeated").with("A,B"),
    Opt::long(
        "ssh-key",
        "public key that may log in as root by SSH; may be repeated",
    )
    .with("FILE"),
    Opt::long(
        "root-password-file",
        "file whose first line becomes root's password",
    )
    .with("FILE"),
    Opt::long(
        "no-autologin",
        "the console asks who logs in; without it root is logged in there",
    ),
    Opt::long("cloud-init", "with cloud-init and a seed disk for it"),
    Opt::long(
        "user-data",
        "cloud-init's user-data, instead of host name and keys",
    )
    .with("FILE"),
    Opt::long("run", "script to run in the new root once all is installed").with("FILE"),
    Opt::long("suite", "release of Debian; bookworm").with("NAME"),
    Opt::long(
        "mirror",
        "archive to take it from; the one that this machine uses",
    )
    .with("URL"),
    Opt::long("kernel", "which of Debian's kernels; cloud").with("cloud|generic"),
    Opt::long("docs", "with manual pages, documentation and translations"),
    Opt::long("memory", "memory in the configuration; 512").with("MB"),
    Opt::long("vcpus", "virtual CPUs in the configuration; 1").with("N"),
    Opt::both('f', "force", "write over files that exist"),
];

/// All commands, in the order of the help.
pub(crate) const COMMANDS: &[Command] = &[
    Command {
        name: "create",
        arguments: "[OPTIONS] FILE [KEY=VALUE...]",
        summary: "Create a domain from a configuration file",
        options: CREATE,
        details: "KEY=VALUE is read behind FILE, as if it were its last line; several may stand in one argument, separated by semicolons. FILE may be \
                  /dev/null. Texts need quotes that the shell leaves alone: 'extra=\"console=hvc0\"'.\n\nWithout -c and -F the command returns when the \
                  domain is there. Its log and what it prints are in /var/log/hospes, for users other than root in ~/.local/state/hospes.",
        max: MANY,
        dry_run: true,
        run: create::create,
        ..PLAIN
    },
    Command {
        name: "config-update",
        arguments: "[OPTIONS] DOMAIN FILE [KEY=VALUE...]",
        summary: "Change the configuration that a running domain is restarted with",
        options: &[
            Opt::both('f', "defconfig", "the configuration file").with("FILE"),
            Opt::both('q', "quiet", "no messages but warnings and errors"),
            Opt::short('d', "print the configuration as JSON"),
        ],
        details: KEY_VALUE,
        max: MANY,
        dry_run: true,
        run: create::config_update,
        ..PLAIN
    },
    Command {
        name: "list",
        arguments: "[OPTIONS] [DOMAIN...]",
        summary: "List domains",
        options: &[
            Opt::both('l', "long", "print everything as JSON"),
            Opt::both(
                'v',
                "verbose",
                "also UUID, reason of the shutdown, security label, and devices whose requests wait",
            ),
            Opt::both('Z', "context", "also security labels"),
            Opt::both('c', "cpupool", "also the CPU pool"),
            Opt::both('n', "numa", "also the NUMA nodes"),
        ],
        details: "State: r running, b blocked, p paused, s shut down, c crashed (w: by its watchdog, r: to reboot, s: suspended), d dying. Domain-0 is the \
                  host; its time is that of all its programs. Behind a row, held: names the disks whose writes wait because the host's file system is full; \
                  standard error says which.",
        max: MANY,
        run: list::list,
        ..PLAIN
    },
    Command {
        name: "console",
        arguments: "[OPTIONS] DOMAIN",
        summary: "Attach to a domain's console",
        options: &[
            Opt::short('t', "kind of console; a PVH domain has a pv console only")
                .with("pv|serial|vuart"),
            Opt::short('n', "number of the console; there is number 0 only").with("NUM"),
        ],
        details: "Ctrl-] leaves the console. The last 64 KiB of output are shown first. The end of the input does not end the command, the end of the \
                  domain does; a reboot does not.",
        min: 1,
        max: 1,
        run: life::console,
        ..PLAIN
    },
    Command {
        name: "destroy",
        arguments: "[OPTIONS] DOMAIN",
        summary: "End a domain at once, as by pulling the plug",
        options: &[Opt::short(
            'f',
            "accepted; Domain-0, which it is for in xl, cannot be destroyed here",
        )],
        details: "A domain that is still being made or restored is given up. A domain process that does not answer is killed.",
        min: 1,
        max: 1,
        run: life::destroy,
        ..PLAIN
    },
    Command {
        name: "shutdown",
        arguments: "[OPTIONS] -a|DOMAIN",
        summary: "Ask a domain to shut down",
        options: SHUTDOWN,
        details: SHUTDOWN_DETAILS,
        max: 1,
        run: life::shutdown,
        ..PLAIN
    },
    Command {
        name: "reboot",
        arguments: "[OPTIONS] -a|DOMAIN",
        summary: "Ask a domain to reboot",
        options: SHUTDOWN,
        details: SHUTDOWN_DETAILS,
        max: 1,
        run: life::reboot,
        ..PLAIN
    },
    Command {
        name: "pause",
        arguments: "DOMAIN",
        summary: "Stop a domain's virtual CPUs; its memory stays",
        details: DOMAIN,
        min: 1,
        max: 1,
        run: life::pause,
        ..PLAIN
    },
    Command {
        name: "unpause",
        arguments: "DOMAIN",
        summary: "Let a paused domain go on",
        details: DOMAIN,
        min: 1,
        max: 1,
        run: life::unpause,
        ..PLAIN
    },
    Command {
        name: "domid",
        arguments: "NAME",
        summary: "Print the id of the domain with this name",
        min: 1,
        max: 1,
        run: names::domid,
        ..PLAIN
    },
    Command {
        name: "domname",
        arguments: "ID",
        summary: "Print the name of the domain with this id",
        min: 1,
        max: 1,
        run: names::domname,
        ..PLAIN
    },
    Command {
        name: "rename",
        arguments: "DOMAIN NEWNAME",
        summary: "Give a domain another name",
        details: "The name stays through reboots. The domain's logs are renamed with it.",
        min: 2,
        max: 2,
        run: names::rename,
        ..PLAIN
    },
    Command {
        name: "save",
        arguments: "[OPTIONS] DOMAIN FILE [CONFIGFILE]",
        summary: "Save a running domain in a file and end it",
        options: &[
            Opt::short('c', "let the domain go on when it is saved"),
            Opt::short(
                'p',
                "leave the domain paused when it is saved, also with -c",
            ),
            Opt::short(
                'D',
                "accepted; a restored domain gets a new id all the same",
            ),
        ],
        details: "The guest suspends itself, as its kernel has to know how to: Linux does. FILE is there when it is complete and on the disk; until then, and when \
                  anything fails, a file of that name stays as it is and the guest goes on. It has the guest's memory, so it can be read by its owner alone, and \
                  the domain's configuration, or that in CONFIGFILE. The disks are not in it: what is restored needs them as they were at that moment.",
        min: 2,
        max: 3,
        run: saving::save,
        ..PLAIN
    },
    Command {
        name: "dump-core",
        arguments: "DOMAIN FILE",
        summary: "Write the memory and registers of a domain into a core file",
        details: "The domain is not stopped for it; pause it where the memory is to be that of one moment. FILE is there when it is complete; until then, and when anything fails, a \
                  file of that name stays as it is. It has the guest's memory, so it can be read by its owner alone; memory that is zero takes no room. It is ELF, as \
                  QEMU's dump-guest-memory makes it, for crash(8), drgn and gdb with the debugging symbols of the guest's kernel. With on_crash=\"coredump-restart\" and the like, \
                  the core of a guest that has crashed is written to /var/lib/hospes/dump/NAME.",
        min: 2,
        max: 2,
        run: dumping::dump_core,
        ..PLAIN
    },
    Command {
        name: "restore",
        arguments: "[OPTIONS] [CONFIGFILE] FILE",
        summary: "Let a saved domain go on",
        options: &[
            Opt::short('c', "attach to the console; Ctrl-] leaves it"),
            Opt::short('F', "stay in the foreground until the domain has ended"),
            Opt::short('p', "leave the domain paused"),
            Opt::short(
                'e',
                "do nothing when the guest ends: every on_... action is preserve",
            ),
            Opt::short('d', "print the configuration as JSON to standard error"),
            Opt::both('V', "vncviewer", "accepted; there is no VNC server yet"),
            Opt::both(
                'A',
                "vncviewer-autopass",
                "accepted; there is no VNC server yet",
            ),
        ],
        details: "The guest goes on where it was saved, under a new id, on a host whose processor has what the guest saw of that one. With CONFIGFILE, names, disks \
                  and network interfaces are those it says; memory and the number of virtual CPUs have to be the same. FILE stays as it is. Restore it again only \
                  with the disks as they were when it was saved: a guest that does not know of a change destroys its file systems.",
        min: 1,
        max: 2,
        run: saving::restore,
        ..PLAIN
    },
    Command {
        name: "migrate",
        arguments: "[OPTIONS] DOMAIN HOST",
        summary: "Move a running domain to another host",
        options: &[
            Opt::short(
                's',
                "use SSHCOMMAND, a text for the shell, in place of ssh; where it is empty, HOST is the whole text",
            )
            .with("SSHCOMMAND"),
            Opt::short(
                'e',
                "do nothing when the guest ends there: every on_... action is preserve",
            ),
            Opt::short(
                'C',
                "send the configuration in FILE in place of the domain's own",
            )
            .with("FILE"),
            Opt::short('F', "the same as -e, as in xl"),
            Opt::long("debug", "say what happens, and when"),
            Opt::long(
                "live",
                "accepted; the guest runs on while its memory is sent, always",
            ),
            Opt::short('p', "leave the domain paused there"),
            Opt::short('D', "refused: the domain gets an id of the other host"),
        ],
        details: "Runs `ssh HOST hospes migrate-receive', which has to be the same hospes, and sends the domain: its guest's memory, its state and its configuration. \
                  Disks are not sent: the other host has to reach them by the same paths, or by those in the other configuration. Where anything fails before the other host has the whole \
                  domain, the guest goes on here as if nothing had been. Where the connection breaks in the one moment in which the domain is given away, it is held here \
                  until you have looked whether it runs there, and `unpause' or `destroy' it here.",
        min: 2,
        max: 2,
        run: migrating::migrate,
        ..PLAIN
    },
    Command {
        name: "migrate-receive",
        arguments: "[OPTIONS]",
        summary: "Take a domain that another host sends",
        options: &[
            Opt::short(
                'e',
                "do nothing when the guest ends: every on_... action is preserve",
            ),
            Opt::short('p', "leave the domain paused"),
            Opt::both('d', "debug", "say what happens, and when"),
            Opt::short(
                'F',
                "accepted; the command returns when the domain runs all the same",
            ),
            Opt::short(
                'r',
                "refused: domains are not kept in two places at once",
            ),
        ],
        details: "What `migrate' runs on the other host; it reads from standard input and answers on standard output. It can be the forced command of a key in \
                  authorized_keys of sshd(8): who has the key makes domains here, with all rights of the user over the files that their configurations name.",
        run: migrating::receive,
        ..PLAIN
    },
    Command {
        name: "sysrq",
        arguments: "DOMAIN LETTER",
        summary: "Send a magic SysRq key to a domain",
        details: "What the letter does is up to the guest's kernel: s syncs its disks, b reboots it, h lists the others.",
        min: 2,
        max: 2,
        run: keys::sysrq,
        ..PLAIN
    },
    Command {
        name: "trigger",
        arguments: "DOMAIN nmi|reset|init|power|sleep|s3resume [VCPU]",
        summary: "Raise an event at a virtual CPU",
        details: "A PVH domain can be sent nmi, as Xen's own; the others belong to machines with firmware. VCPU is 0 where it is not given.",
        min: 2,
        max: 3,
        run: keys::trigger,
        ..PLAIN
    },
    Command {
        name: "button-press",
        arguments: "DOMAIN power|sleep",
        summary: "Press an ACPI button of a domain (deprecated: use trigger)",
        min: 2,
        max: 2,
        run: keys::button_press,
        ..PLAIN
    },
    Command {
        name: "debug-keys",
        arguments: "KEYS",
        summary: "Have the state of all domains written into their logs",
        details: "The key there is is q. `dmesg' shows the result.",
        min: 1,
        max: 1,
        run: keys::debug_keys,
        ..PLAIN
    },
    Command {
        name: "block-attach",
        arguments: "DOMAIN DISKSPEC...",
        summary: "Give a running domain another disk",
        details: "DISKSPEC is that of disk= in the configuration file, whole or in parts: disk.img,qcow2,xvdb,r or vdev=xvdb target=disk.img. The disk \
                  stays through reboots of the domain.",
        min: 2,
        max: MANY,
        dry_run: true,
        run: devices::block_attach,
        ..PLAIN
    },
    Command {
        name: "block-list",
        arguments: "DOMAIN...",
        summary: "List the disks of domains",
        details: "State: 1 initialising, 2 waiting for the guest, 3 initialised, 4 connected, 5 closing, 6 closed.",
        min: 1,
        max: MANY,
        run: device_lists::block_list,
        ..PLAIN
    },
    Command {
        name: "block-detach",
        arguments: "[OPTIONS] DOMAIN DEVID",
        summary: "Take a disk away from a running domain",
        options: &[Opt::both(
            'f',
            "force",
            "do not wait for the guest to let go of it",
        )],
        details: "DEVID is the name of the disk in the guest (xvdb) or its number in block-list.",
        min: 2,
        max: 2,
        run: devices::block_detach,
        ..PLAIN
    },
    Command {
        name: "block-resize",
        arguments: "DOMAIN DEVID SIZE",
        summary: "Change the size of a running domain's disk",
        details: "SIZE is in bytes, or with k, m, g or t behind it in KiB, MiB, GiB or TiB. The guest sees the new size at once. xl has no such command.",
        min: 3,
        max: 3,
        run: devices::block_resize,
        ..PLAIN
    },
    Command {
        name: "cd-insert",
        arguments: "DOMAIN DEVID FILE",
        summary: "Insert a medium into a CD-ROM drive",
        min: 3,
        max: 3,
        dry_run: true,
        run: devices::cd_insert,
        ..PLAIN
    },
    Command {
        name: "cd-eject",
        arguments: "DOMAIN DEVID",
        summary: "Eject the medium from a CD-ROM drive",
        min: 2,
        max: 2,
        dry_run: true,
        run: devices::cd_eject,
        ..PLAIN
    },
    Command {
        name: "network-attach",
        arguments: "DOMAIN [KEY=VALUE...]",
        summary: "Give a running domain another network interface",
        details: "The keys are those of vif= in the configuration file: mac, bridge, ip, script, vifname, rate, mtu, gatewaydev, backend, type, model, \
                  devid, trusted, untrusted. The interface stays through reboots of the domain.",
        min: 1,
        max: MANY,
        dry_run: true,
        run: devices::network_attach,
        ..PLAIN
    },
    Command {
        name: "network-list",
        arguments: "DOMAIN...",
        summary: "List the network interfaces of domains",
        details: "State: 1 initialising, 2 waiting for the guest, 3 initialised, 4 connected, 5 closing, 6 closed.",
        min: 1,
        max: MANY,
        run: device_lists::network_list,
        ..PLAIN
    },
    Command {
        name: "network-detach",
        arguments: "DOMAIN DEVID|MAC",
        summary: "Take a network interface away from a running domain",
        min: 2,
        max: 2,
        run: devices::network_detach,
        ..PLAIN
    },
    Command {
        name: "vm-list",
        summary: "List the UUIDs, ids and names of domains",
        run: host::vm_list,
        ..PLAIN
    },
    Command {
        name: "info",
        arguments: "[OPTIONS] [NAME]",
        summary: "Describe the host",
        options: &[Opt::both('n', "numa", "also CPUs and NUMA nodes")],
        details: "With NAME only the value of the line that begins so.",
        max: 1,
        run: host::info,
        ..PLAIN
    },
    Command {
        name: "claims",
        summary: "List the domains with the memory that is promised to them",
        details: "Claimed is what a domain has not used of its memory yet and still may take, in MiB: no other is given that.",
        run: list::claims,
        ..PLAIN
    },
    Command {
        name: "sharing",
        arguments: "[DOMAIN]",
        summary: "List the memory that domains share with each other",
        details: "They share none.",
        max: 1,
        run: list::sharing,
        ..PLAIN
    },
    Command {
        name: "uptime",
        arguments: "[OPTIONS] [DOMAIN...]",
        summary: "Print how long domains have been running",
        options: &[Opt::short(
            's',
            "the short form, with the time of day in UTC",
        )],
        max: MANY,
        run: host::uptime,
        ..PLAIN
    },
    Command {
        name: "top",
        arguments: "[OPTIONS]",
        summary: "Watch the domains and what they use",
        options: &[
            Opt::both('d', "delay", "seconds between two looks; 3").with("SECONDS"),
            Opt::both(
                'b',
                "batch",
                "print one table after another, as without a terminal",
            ),
            Opt::both(
                'i',
                "iterations",
                "end after so many tables; without a terminal 1",
            )
            .with("NUM"),
            Opt::both(
                'f',
                "full-name",
                "names are not cut after ten characters",
            ),
            Opt::both('r', "repeat-header", "the heading above each domain"),
            Opt::both(
                'n',
                "networks",
                "accepted; the table has what all network interfaces carry together",
            ),
            Opt::both(
                'x',
                "vbds",
                "accepted; the table has what all disks carry together",
            ),
            Opt::both('v', "vcpus", "accepted; vcpu-list has the virtual CPUs"),
            Opt::both('V', "version", "print the version of the program"),
        ],
        details: "q ends it. The columns are those of xentop(1), as which the program can be called, too. NETTX and NETRX are what the host's interfaces of the \
                  guests have sent and received, in KiB: what a guest receives and sends; VBD_RSECT and VBD_WSECT are sectors of 512 bytes.",
        run: top::top,
        ..PLAIN
    },
    Command {
        name: "dmesg",
        arguments: "[OPTIONS]",
        summary: "Print the messages of all domain processes",
        options: &[Opt::both('c', "clear", "and do not show them again")],
        details: "They are the last lines of the logs, in the order of their time. Clearing leaves the logs as they are.",
        run: logs::dmesg,
        ..PLAIN
    },
    Command {
        name: "vcpu-list",
        arguments: "[DOMAIN...]",
        summary: "List virtual CPUs",
        details: "State: r running, b blocked, p not used by the guest. CPU is the host CPU it runs on or last ran on.",
        max: MANY,
        run: vcpus::list,
        ..PLAIN
    },
    Command {
        name: "vcpu-pin",
        arguments: "[OPTIONS] DOMAIN VCPU|all CPUS|- [CPUS|-]",
        summary: "Set which host CPUs virtual CPUs may run on, and prefer",
        options: &[
            Opt::both(
                'f',
                "force",
                "accepted; there is no pinning by the guest's kernel to undo",
            ),
            Opt::both(
                'i',
                "ignore-global-affinity-masks",
                "accepted; there are no global masks",
            ),
        ],
        details: "CPUS is all, a list such as 0-3,5,^1, or nodes: node:0. - leaves it as it is. The first is hard (no other CPU), the second soft (these \
                  where possible).",
        min: 3,
        max: 4,
        dry_run: true,
        run: vcpus::pin,
    },
    Command {
        name: "vcpu-set",
        arguments: "[OPTIONS] DOMAIN NUM",
        summary: "Set how many virtual CPUs a guest uses",
        options: &[Opt::both(
            'i',
            "ignore-host",
            "also more than the host has CPUs",
        )],
        details: "At most maxvcpus of the configuration. The guest takes them on and off line by itself. The number stays through reboots.",
        min: 2,
        max: 2,
        run: vcpus::set,
        ..PLAIN
    },
    Command {
        name: "mem-set",
        arguments: "DOMAIN MEM",
        summary: "Ask a guest to have more or less memory",
        details: MEMORY_DETAILS,
        min: 2,
        max: 2,
        run: memory::set,
        ..PLAIN
    },
    Command {
        name: "mem-max",
        arguments: "DOMAIN MEM",
        summary: "Set how much memory a guest may have",
        details: "MEM is as for mem-set, which does this as well: the command is seldom needed. It cannot be less than what the guest is asked to have. \
                  The guest is not told, and the next start does not know of it.",
        min: 2,
        max: 2,
        run: memory::max,
        ..PLAIN
    },
    Command {
        name: "sched-credit",
        arguments: "[OPTIONS]",
        summary: "Show or set the domains' shares of the host's CPUs, as sched-credit2",
        options: SCHED,
        details: SCHED_DETAILS,
        run: shares::credit,
        ..PLAIN
    },
    Command {
        name: "sched-credit2",
        arguments: "[OPTIONS]",
        summary: "Show or set the domains' shares of the host's CPUs",
        options: SCHED,
        details: SCHED_DETAILS,
        run: shares::credit2,
        ..PLAIN
    },
    Command {
        name: "cpupool-list",
        arguments: "[OPTIONS] [CPUPOOL]",
        summary: "List the CPU pools",
        options: &[Opt::both('c', "cpus", "the CPUs of each pool")],
        details: "There is Pool-0 only, with all CPUs of the host and all domains.",
        max: 1,
        run: shares::cpupools,
        ..PLAIN
    },
    Command {
        name: "pci-list",
        arguments: "DOMAIN",
        summary: "List the PCI devices that are passed through to a domain",
        details: NO_DEVICES,
        min: 1,
        max: 1,
        run: absent::pci,
        ..PLAIN
    },
    Command {
        name: "pci-assignable-list",
        arguments: "[OPTIONS]",
        summary: "List the PCI devices that can be passed through",
        options: &[Opt::both(
            'n',
            "show-names",
            "with the names that were given to them",
        )],
        details: NO_DEVICES,
        run: absent::pci_assignable,
        ..PLAIN
    },
    Command {
        name: "usb-list",
        arguments: "DOMAIN",
        summary: "List the USB controllers and devices of a domain",
        details: NO_DEVICES,
        min: 1,
        max: 1,
        run: absent::usb,
        ..PLAIN
    },
    Command {
        name: "channel-list",
        arguments: "DOMAIN...",
        summary: "List the virtual channels of domains",
        details: NO_DEVICES,
        min: 1,
        max: MANY,
        run: absent::channels,
        ..PLAIN
    },
    Command {
        name: "vtpm-list",
        arguments: "DOMAIN...",
        summary: "List the virtual TPMs of domains",
        details: NO_DEVICES,
        min: 1,
        max: MANY,
        run: absent::vtpms,
        ..PLAIN
    },
    Command {
        name: "vkb-list",
        arguments: "DOMAIN...",
        summary: "List the virtual keyboards of domains",
        details: NO_DEVICES,
        min: 1,
        max: MANY,
        run: absent::vkbs,
        ..PLAIN
    },
    Command {
        name: "vdispl-list",
        arguments: "DOMAIN...",
        summary: "List the virtual displays of domains",
        details: NO_DEVICES,
        min: 1,
        max: MANY,
        run: absent::vdispls,
        ..PLAIN
    },
    Command {
        name: "vsnd-list",
        arguments: "DOMAIN...",
        summary: "List the virtual sound devices of domains",
        details: NO_DEVICES,
        min: 1,
        max: MANY,
        run: absent::vsnds,
        ..PLAIN
    },
    Command {
        name: "image",
        arguments: "[OPTIONS] debian FILE",
        summary: "Make a disk image with Debian from the archive",
        options: IMAGE,
        details: "Beside FILE appear its kernel (.vmlinuz), its initial root file system (.initrd) and a configuration (.cfg) that `create' takes as it is; \
                  with --cloud-init also the seed disk (.seed.iso). The same options on the same state of the archive give the same bytes. It takes a minute \
                  or two and needs the packages mmdebstrap and e2fsprogs, for users other than root uidmap, for qcow2 qemu-utils.",
        min: 2,
        max: 2,
        dry_run: true,
        run: image::image,
    },
    Command {
        name: "domains",
        arguments: "[OPTIONS] start|stop",
        summary: "Start the domains in /etc/hospes/auto, or shut down all",
        options: &[
            Opt::long("dir", "take the configuration files of this directory").with("DIR"),
            Opt::long(
                "timeout",
                "destroy what has not shut down after so long; 120",
            )
            .with("SECONDS"),
            Opt::long("save", "stop: save each domain in a file of its name in this directory")
                .with("DIR"),
            Opt::long("restore", "start: first restore the domains that were saved in this directory")
                .with("DIR"),
        ],
        details: "start creates a domain of each file in the directory, in the order of the names; a domain that runs already is left alone. Hidden files, and those \
                  that end in ~, .bak, .dpkg-... and .rpm..., are left out. stop asks all domains of the user to shut down and waits for them; none is started again or kept. \
                  hospes-domains.service does both with the host.\n\nA domain that cannot be saved is shut down. The file of one that has been restored is removed when it runs; one that \
                  cannot be restored keeps its file and is not started in another way. In both cases the others go on, and the status is 1.",
        min: 1,
        max: 1,
        run: domains::domains,
        ..PLAIN
    },
    Command {
        name: "completions",
        arguments: "bash|zsh|fish",
        summary: "Print a completion script for a shell",
        details: "For bash: source <(hospes completions bash).",
        min: 1,
        max: 1,
        run: meta::completions,
        ..PLAIN
    },
    Command {
        name: "manual",
        arguments: "hospes.1|hospes.cfg.5",
        summary: "Print a manual page",
        details: "In the form that man(1) reads: hospes manual hospes.1 | man -l -.",
        min: 1,
        max: 1,
        run: meta::manual,
        ..PLAIN
    },
    Command {
        name: "help",
        arguments: "[OPTIONS] [COMMAND]",
        summary: "Say what the commands do",
        options: &[Opt::long("long", "everything about all commands")],
        max: 1,
        run: meta::help,
        ..PLAIN
    },
];

/// Options in front of the command.
pub(crate) const GLOBAL_OPTIONS: &[Opt] = &[
    Opt::short('v', "say more"),
    Opt::short(
        'N',
        "dry run: look, but change nothing; for the commands that say so",
    ),
    Opt::short('f', "accepted, as in xl"),
    Opt::short('t', "accepted, as in xl"),
    Opt::short('T', "accepted, as in xl"),
    Opt::both('h', "help", "print the list of commands"),
    Opt::both('V', "version", "print the version"),
];

/// Commands that xl does not have: their names have to be written out, so that beginnings mean what they mean to xl.
const OWN: &[&str] = &["block-resize", "completions", "domains", "image", "manual"];

/// A command by its name or, as in xl, by the beginning of its name where no other command of xl begins so.
pub(crate) fn find(name: &str) -> Option<&'static Command> {
    if let Some(command) = COMMANDS.iter().find(|command| command.name == name) {
        return Some(command);
    }
    let here = COMMANDS.iter().map(|command| command.name);
    let elsewhere = elsewhere::names();
    let mut candidates = here
        .filter(|other| !OWN.contains(other))
        .chain(elsewhere)
        .filter(|other| !name.is_empty() && other.starts_with(name));
    let (Some(only), None) = (candidates.next(), candidates.next()) else {
        return None;
    };
    COMMANDS.iter().find(|command| command.name == only)
}
