//! The manual pages, made of the table of commands and of the keys of the configuration; in man(7).

use std::fmt::Write;

use hospes_config::{Key, Support, known_keys};

use crate::table::{COMMANDS, GLOBAL_OPTIONS};

/// Text as roff reads it back: no line may look like a request, and a dash is a dash.
fn escape(text: &str) -> String {
    let text = text
        .replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('`', "\\(ga")
        .replace('\'', "\\(aq");
    if text.starts_with('.') {
        format!("\\&{text}")
    } else {
        text
    }
}

fn paragraphs(page: &mut String, text: &str) {
    let paragraphs: Vec<String> = text.split("\n\n").map(escape).collect();
    // Writing to a string does not fail.
    let _ = writeln!(page, "{}", paragraphs.join("\n.PP\n"));
}

fn item(page: &mut String, tag: &str, text: &str) {
    // A line may end between words to choose from: some lists of them are longer than lines are.
    let tag = escape(tag).replace('|', "|\\:");
    let _ = writeln!(page, ".TP\n.B {tag}\n{}", escape(text));
}

fn title(name: &str, section: u8) -> String {
    format!(
        ".TH {} {section} \"\" \"hospes {}\" \"Hospes\"\n.nh\n.ad l\n",
        escape(name),
        env!("CARGO_PKG_VERSION")
    )
}

/// hospes(1).
pub(crate) fn hospes_1() -> String {
    let mut page = title("hospes", 1);
    page.push_str(
        ".SH NAME\nhospes, xl \\- run operating systems in domains\n.SH SYNOPSIS\n.B hospes\n[\\-vfN] COMMAND [ARGUMENTS]\n.SH DESCRIPTION\n",
    );
    paragraphs(
        &mut page,
        "Hospes runs whole operating systems in isolated domains, as Xen does, but as an ordinary program. The commands are those of Xen's xl: installed \
         under the name xl it behaves the same.\n\nA domain is given by its name or its id. Commands of xl may be shortened as long as no other begins so. \
         Domain-0 is the host.",
    );
    page.push_str(".SH OPTIONS\n");
    for option in GLOBAL_OPTIONS {
        item(&mut page, &option.usage(), option.help);
    }
    page.push_str(".SH COMMANDS\n");
    for command in COMMANDS {
        let usage = format!("{} {}", command.name, command.arguments);
        let _ = writeln!(page, ".SS {}", escape(usage.trim_end()));
        let _ = writeln!(page, "{}.", escape(command.summary));
        for option in command.options {
            item(&mut page, &option.usage(), option.help);
        }
        if !command.details.is_empty() {
            page.push_str(".PP\n");
            paragraphs(&mut page, command.details);
        }
    }
    page.push_str(".SH EXIT STATUS\n");
    for (status, meaning) in [
        ("0", "Done."),
        (
            "1",
            "Failed, or no such command; a sentence on standard error says what happened.",
        ),
        (
            "2",
            "The arguments were not understood; the usage is printed to standard error.",
        ),
        (
            "3",
            "create: the configuration file cannot be read, or the domain cannot be made.",
        ),
        (
            "6",
            "create: there is no file for a disk, or no configuration was given.",
        ),
    ] {
        item(&mut page, status, meaning);
    }
    page.push_str(".SH ENVIRONMENT\n");
    for (name, meaning) in [
        (
            "HOSPES_RUN_DIR",
            "Directory of run-time state; by default /run/hospes for root and $XDG_RUNTIME_DIR/hospes for others.",
        ),
        (
            "HOSPES_LOG_DIR",
            "Directory of logs; by default /var/log/hospes for root and $XDG_STATE_HOME/hospes or ~/.local/state/hospes for others.",
        ),
        (
            "HOSPES_DUMP_DIR",
            "Directory of the core files of guests that have crashed; by default /var/lib/hospes/dump for root and $XDG_STATE_HOME/hospes/dump or ~/.local/state/hospes/dump for others.",
        ),
    ] {
        item(&mut page, name, meaning);
    }
    page.push_str(".SH FILES\n");
    item(
        &mut page,
        "/etc/hospes/auto/*.cfg",
        "Configurations of the domains that hospes-domains.service starts with the host.",
    );
    page.push_str(".SH SEE ALSO\n.BR hospes.cfg (5)\n");
    page
}

const DISK: &[(&str, &str)] = &[
    (
        "target=PATH",
        "Image file or block device. It takes the rest of the text and so stands last; as the first value without a name it may not \
                     contain commas. A CD-ROM drive may be without.",
    ),
    (
        "format=raw|qcow2",
        "Format of the image; raw where it is not given.",
    ),
    (
        "vdev=NAME",
        "The disk in the guest: xvda, xvdb1, d0p0 or a number. It has to be given. Linux guests show hda and sda as xvda.",
    ),
    (
        "access=rw|ro",
        "Also w and r. rw where it is not given, ro for a CD-ROM drive.",
    ),
    ("cdrom, devtype=cdrom", "A CD-ROM drive."),
    (
        "discard, no-discard",
        "Whether the guest may give blocks back; where nothing is said, if the image can.",
    ),
    (
        "direct-io-safe",
        "Accepted: the disk is read and written past the host's page cache in any case where the host can do that.",
    ),
    (
        "script=PROGRAM",
        "Refused, and so are the prefixes that stand for one: make the block device first and give its path.",
    ),
    (
        "backend=DOMAIN",
        "Refused unless it names the host, which serves all disks.",
    ),
    (
        "trusted, untrusted",
        "What the guest is told about the back end.",
    ),
];

const VIF: &[(&str, &str)] = &[
    (
        "mac=ADDRESS",
        "Address of the guest's interface; drawn of 00:16:3e:... where it is not given.",
    ),
    (
        "bridge=NAME",
        "Bridge of the host that the interface is put on. Without it the guest is in the network of Hospes, which reaches the outside \
                     through the host.",
    ),
    (
        "type=user",
        "A network in user space, for which no privilege is needed. Users other than root have it where nothing is said.",
    ),
    (
        "ip=ADDRESS...",
        "Addresses and networks of IPv4 and IPv6, separated by spaces, that the guest may send from. On a bridge, or with a script, packets from \
         others are dropped, and without ip= everything passes. In the network of Hospes they are allowed beside the addresses that the guest gets \
         there. 0.0.0.0/0 lets everything pass.",
    ),
    (
        "script=PROGRAM",
        "Program that sets the interface of the host up, called as Xen calls it; without a path it lies in /etc/xen/scripts.",
    ),
    (
        "vifname=NAME",
        "Name of the interface of the host; vifDOMID.DEVID where it is not given.",
    ),
    (
        "rate=AMOUNT/s[@INTERVAL]",
        "Limit of what the guest sends: 10Mb/s, 250KB/s, 1MB/s@20ms.",
    ),
    ("mtu=BYTES", "Largest packet; that of the bridge, or 1500."),
    (
        "gatewaydev=NAME",
        "Interface of the host that a routed guest goes through, for the script.",
    ),
    (
        "backend=DOMAIN",
        "Refused unless it names the host, which serves all interfaces.",
    ),
    (
        "devid=NUMBER",
        "Number of the interface; its place in the list where it is not given.",
    ),
    (
        "trusted, untrusted",
        "What the guest is told about the back end.",
    ),
];

/// hospes.cfg(5).
pub(crate) fn hospes_cfg_5() -> String {
    let mut page = title("hospes.cfg", 5);
    page.push_str(".SH NAME\nhospes.cfg \\- configuration of a domain\n.SH DESCRIPTION\n");
    paragraphs(
        &mut page,
        "A configuration file of xl.cfg(5): settings KEY=VALUE, one on a line or separated by semicolons. A value is a text in quotes, a number (decimal, \
         octal with a leading 0, hexadecimal with a leading 0x) or a list in brackets, which may span lines. KEY+=VALUE adds to a text or a list. # begins a \
         comment. True is 1, false is 0.",
    );
    page.push_str(".SH EXAMPLE\n.nf\nname = \"web\"\ntype = \"pvh\"\nkernel = \"/boot/vmlinuz\"\nramdisk = \"/boot/initrd.img\"\nextra = \"root=/dev/xvda \
                   console=hvc0\"\nmemory = 1024\nvcpus = 2\ndisk = [ \"/srv/web.img,raw,xvda,rw\" ]\nvif = [ \"\" ]\n.fi\n.SH KEYS\n");
    let mut ignored = Vec::new();
    for key in known_keys() {
        match key.support {
            Support::Full => item(&mut page, &usage(key), key.about),
            Support::Ignored | Support::Deprecated(_) => ignored.push(key.name),
        }
    }
    page.push_str(".SH DISKS\n");
    paragraphs(
        &mut page,
        "An item of disk= is values and KEY=VALUE separated by commas. Values without a name are target, format, vdev and access, in this order. The \
         prefixes of old (phy:, file:, tap:aio:, qcow2: and so on) are understood.",
    );
    for (name, meaning) in DISK {
        item(&mut page, name, meaning);
    }
    page.push_str(".SH NETWORK INTERFACES\n");
    paragraphs(
        &mut page,
        "An item of vif= is KEY=VALUE separated by commas; it may be empty.",
    );
    for (name, meaning) in VIF {
        item(&mut page, name, meaning);
    }
    page.push_str(".SH KEYS WITHOUT EFFECT\n");
    let introduction = "These keys of xl.cfg(5) are understood, checked for their form and have no effect; a note says so.";
    paragraphs(
        &mut page,
        &format!("{introduction}\n\n{}", ignored.join(", ")),
    );
    page.push_str(".SH SEE ALSO\n.BR hospes (1)\n");
    page
}

fn usage(key: &Key) -> String {
    format!("{}={}", key.name, key.shape.usage())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_name_every_command_and_key() {
        let page = hospes_1();
        for command in COMMANDS {
            assert!(page.contains(&format!(".SS {}", escape(command.name))));
        }
        let page = hospes_cfg_5();
        for key in known_keys() {
            assert!(page.contains(&escape(key.name)), "{}", key.name);
            assert!(
                key.support != Support::Full || !key.about.is_empty(),
                "{} is not described",
                key.name
            );
        }
    }

    #[test]
    fn pages_have_no_empty_paragraph_and_no_line_that_cannot_end() {
        for page in [hospes_1(), hospes_cfg_5()] {
            let lines: Vec<&str> = page.lines().collect();
            for pair in lines.windows(2).filter(|pair| pair[0] == ".PP") {
                assert!(!pair[1].starts_with('.'), "{pair:?}");
            }
            for tag in lines.iter().filter(|line| line.starts_with(".B ")) {
                let words = tag.split([' ', ':']);
                assert!(words.map(str::len).all(|bytes| bytes < 60), "{tag}");
            }
        }
    }

    #[test]
    fn keys_that_are_refused_are_said_to_be() {
        let about = |keys: &[(&str, &'static str)], key: &str| {
            let found = keys.iter().find(|(name, _)| name.starts_with(key));
            found.expect("described").1
        };
        // What devices.rs and vifs.rs refuse.
        for (keys, key) in [(DISK, "script="), (DISK, "backend="), (VIF, "backend=")] {
            assert!(about(keys, key).starts_with("Refused"), "{key}");
        }
        assert!(about(VIF, "ip=").contains("dropped"));
    }

    #[test]
    fn escape_leaves_no_request() {
        assert_eq!(escape(".x -a\\b"), "\\&.x \\-a\\eb");
    }
}
