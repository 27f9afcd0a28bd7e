//! The commands and what they say about themselves.

use std::fmt::Write;

/// A subcommand as the user sees it.
#[derive(Debug)]
pub(crate) struct Command {
    pub name: &'static str,
    pub arguments: &'static str,
    /// One line.
    pub summary: &'static str,
    /// Option and meaning.
    pub options: &'static [(&'static str, &'static str)],
    /// What else is to be known.
    pub details: &'static str,
}

const DOMAIN: &str = "A domain is given by its name or its id.";

pub(crate) const COMMANDS: &[Command] = &[
    Command {
        name: "create",
        arguments: "[OPTIONS] FILE [KEY=VALUE...]",
        summary: "Create a domain from a configuration file.",
        options: &[
            ("-f FILE, --defconfig=FILE", "the configuration file"),
            (
                "-c",
                "attach to the console as soon as it is there; Ctrl-] leaves it",
            ),
            ("-F", "stay in the foreground until the domain has ended"),
            ("-p", "leave the domain paused"),
            (
                "-n, --dryrun",
                "print the configuration as JSON and create nothing",
            ),
            ("-q, --quiet", "no messages but warnings and errors"),
            ("-d", "print the configuration as JSON to standard error"),
            (
                "-e",
                "do nothing when the guest ends: every on_... action is preserve",
            ),
            ("-V, --vncviewer", "accepted; there is no VNC server yet"),
            (
                "-A, --vncviewer-autopass",
                "accepted; there is no VNC server yet",
            ),
        ],
        details: "KEY=VALUE is read behind FILE, as if it were its last line; several may stand in one argument,\n\
                  separated by semicolons. FILE may be /dev/null. Texts need quotes that the shell leaves alone:\n\
                  'extra=\"console=hvc0\"'. Without -c and -F the command returns when the domain is there. Its log and\n\
                  what it prints are in /var/log/hospes, for users other than root in ~/.local/state/hospes.",
    },
    Command {
        name: "list",
        arguments: "[OPTIONS] [DOMAIN...]",
        summary: "List domains.",
        options: &[
            ("-l, --long", "print everything as JSON"),
            (
                "-v, --verbose",
                "also UUID, reason of the shutdown and security label",
            ),
            ("-Z, --context", "also security labels"),
            ("-c, --cpupool", "also the CPU pool"),
            ("-n, --numa", "also the NUMA nodes"),
        ],
        details: "State: r running, b blocked, p paused, s shut down, c crashed (w: by its watchdog, r: to reboot,\n\
                  s: suspended), d dying. Domain-0 is the host; its time is that of all its programs.",
    },
    Command {
        name: "console",
        arguments: "[OPTIONS] DOMAIN",
        summary: "Attach to a domain's console.",
        options: &[
            (
                "-t pv|serial",
                "kind of console; a PVH domain has a pv console only",
            ),
            ("-n NUM", "number of the console; there is number 0 only"),
        ],
        details: "Ctrl-] leaves the console. The last 64 KiB of output are shown first. The end of the input does not\n\
                  end the command, the end of the domain does; a reboot does not.",
    },
    Command {
        name: "pause",
        arguments: "DOMAIN",
        summary: "Stop a domain's virtual CPUs; its memory stays.",
        options: &[],
        details: DOMAIN,
    },
    Command {
        name: "unpause",
        arguments: "DOMAIN",
        summary: "Let a paused domain go on.",
        options: &[],
        details: DOMAIN,
    },
    Command {
        name: "shutdown",
        arguments: "[OPTIONS] -a|DOMAIN",
        summary: "Ask a domain to shut down.",
        options: SHUTDOWN_OPTIONS,
        details: SHUTDOWN_DETAILS,
    },
    Command {
        name: "reboot",
        arguments: "[OPTIONS] -a|DOMAIN",
        summary: "Ask a domain to reboot.",
        options: SHUTDOWN_OPTIONS,
        details: SHUTDOWN_DETAILS,
    },
    Command {
        name: "destroy",
        arguments: "[OPTIONS] DOMAIN",
        summary: "End a domain at once, as by pulling the plug.",
        options: &[(
            "-f",
            "accepted; Domain-0, which it is for in xl, cannot be destroyed here",
        )],
        details: "A domain process that does not answer is killed.",
    },
    Command {
        name: "domid",
        arguments: "NAME",
        summary: "Print the id of the domain with this name.",
        options: &[],
        details: "",
    },
    Command {
        name: "domname",
        arguments: "ID",
        summary: "Print the name of the domain with this id.",
        options: &[],
        details: "",
    },
    Command {
        name: "image",
        arguments: "debian [OPTIONS] FILE",
        summary: "Make a disk image with Debian from the archive.",
        options: IMAGE_OPTIONS,
        details: "Beside FILE appear its kernel (.vmlinuz), its initial root file system (.initrd) and a configuration\n\
                  (.cfg) that `create' takes as it is; with --cloud-init also the seed disk (.seed.iso). The same options on\n\
                  the same state of the archive give the same bytes. It takes a minute or two and needs the packages\n\
                  mmdebstrap and e2fsprogs, for users other than root uidmap, for qcow2 qemu-utils.",
    },
    Command {
        name: "help",
        arguments: "[--long] [COMMAND]",
        summary: "Say what the commands do.",
        options: &[("--long", "everything about all commands")],
        details: "",
    },
];

const IMAGE_OPTIONS: &[(&str, &str)] = &[
    ("--size SIZE", "size of the disk with K, M, G or T; 4G"),
    ("--format raw|qcow2", "format of the image; raw"),
    ("--hostname NAME", "name of the guest; debian"),
    ("--packages A,B", "more packages; may be repeated"),
    (
        "--ssh-key FILE",
        "public key that may log in as root by SSH; may be repeated",
    ),
    (
        "--root-password-file FILE",
        "file whose first line becomes root's password",
    ),
    (
        "--no-autologin",
        "the console asks who logs in; without it root is logged in there",
    ),
    ("--cloud-init", "with cloud-init and a seed disk for it"),
    (
        "--user-data FILE",
        "cloud-init's user-data, instead of host name and keys",
    ),
    (
        "--run FILE",
        "program to run in the new root once all is installed",
    ),
    ("--suite NAME", "release of Debian; bookworm"),
    (
        "--mirror URL",
        "archive to take it from; the one that this machine uses",
    ),
    ("--kernel cloud|generic", "which of Debian's kernels; cloud"),
    (
        "--docs",
        "with manual pages, documentation and translations",
    ),
    ("--memory MB", "memory in the configuration; 512"),
    ("--vcpus N", "virtual CPUs in the configuration; 1"),
    ("-f, --force", "write over files that exist"),
];

const GLOBAL_OPTIONS: &[(&str, &str)] = &[
    ("-v", "say more"),
    ("-N", "dry run: look, but change nothing"),
    ("-f, -t, -T", "accepted, as in xl"),
    ("--version", "print the version"),
];

const SHUTDOWN_OPTIONS: &[(&str, &str)] = &[
    ("-a, --all", "all domains"),
    (
        "-w, --wait",
        "wait until the domain has shut down; given twice, until it is gone",
    ),
    (
        "-F",
        "accepted; every PVH guest that can be asked at all is asked this way",
    ),
];
const SHUTDOWN_DETAILS: &str = "The guest decides whether and when it follows. What happens then is set by on_poweroff and\n\
                                on_reboot of its configuration.";

pub(crate) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

pub(crate) fn usage(program: &str, command: &Command) -> String {
    format!(
        "Usage: {program} [-vfN] {} {}",
        command.name, command.arguments
    )
}

/// Everything about a command.
pub(crate) fn page(program: &str, command: &Command) -> String {
    let mut page = format!("{}\n\n{}\n", usage(program, command), command.summary);
    page.push_str("\nOptions:\n");
    for (option, meaning) in command
        .options
        .iter()
        .chain(&[("-h, --help", "print this")])
    {
        // Writing to a string does not fail.
        let _ = writeln!(page, "  {option:<26} {meaning}");
    }
    if !command.details.is_empty() {
        let _ = writeln!(page, "\n{}", command.details);
    }
    page
}

/// The list of commands.
pub(crate) fn overview(program: &str) -> String {
    let mut text = format!("Usage: {program} [-vfN] COMMAND [ARGUMENTS]\n\nCommands:\n");
    for command in COMMANDS {
        let _ = writeln!(text, " {:<20} {}", command.name, command.summary);
    }
    text.push_str("\nOptions:\n");
    for (option, meaning) in GLOBAL_OPTIONS {
        let _ = writeln!(text, " {option:<20} {meaning}");
    }
    let _ = writeln!(text, "\n`{program} COMMAND --help' tells more.");
    text
}
