//! Arguments, help, exit statuses, and peers of the sockets that do not behave.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use crate::common::{Bench, until};

const COMMANDS: &[&str] = &[
    "create",
    "config-update",
    "list",
    "console",
    "destroy",
    "shutdown",
    "reboot",
    "pause",
    "unpause",
    "domid",
    "domname",
    "rename",
    "save",
    "restore",
    "migrate",
    "dump-core",
    "sysrq",
    "trigger",
    "button-press",
    "debug-keys",
    "block-attach",
    "block-list",
    "network-list",
    "block-detach",
    "block-resize",
    "cd-insert",
    "cd-eject",
    "network-attach",
    "network-detach",
    "vm-list",
    "info",
    "uptime",
    "top",
    "dmesg",
    "vcpu-list",
    "vcpu-pin",
    "vcpu-set",
    "claims",
    "sharing",
    "pci-list",
    "pci-assignable-list",
    "usb-list",
    "channel-list",
    "vtpm-list",
    "vkb-list",
    "vdispl-list",
    "vsnd-list",
    "image",
    "domains",
    "completions",
    "manual",
    "help",
];

#[test]
fn help_knows_every_command() {
    let bench = Bench::new();
    let overview = bench.ok(&["help"]);
    let long = bench.ok(&["help", "--long"]);
    for command in COMMANDS {
        assert!(
            overview.contains(&format!("\n {command} ")),
            "{command} in {overview}"
        );
        let page = bench.ok(&[command, "--help"]);
        assert!(page.starts_with("Usage: hospes-mock [-vf"), "{page}");
        assert_eq!(bench.ok(&["help", command]), page);
        assert!(long.contains(&page));
    }
    assert!(bench.ok(&["--version"]).starts_with("hospes "));
}

#[test]
fn run_as_xl_calls_itself_so() {
    let bench = Bench::new();
    let output = bench
        .command()
        .arg0("/usr/sbin/xl")
        .args(["help", "list"])
        .output()
        .expect("it can be started");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("Usage: xl [-vf] list"));
}

#[test]
fn run_wrong_arguments_gives_the_status_of_xl() {
    let bench = Bench::new();
    let cases: &[(i32, &[&str], &str)] = &[
        (1, &[], "Commands:"),
        (
            1,
            &["fly"],
            "command not implemented: fly: `hospes-mock help' lists",
        ),
        (
            1,
            &["pci-attach", "d", "x"],
            "command not implemented: pci-attach: devices of the host",
        ),
        (
            1,
            &["remus", "d", "h"],
            "command not implemented: remus: domains are not kept in two places",
        ),
        (
            2,
            &["sa"],
            "'hospes-mock save' requires at least 2 arguments.",
        ),
        (1, &["s"], "command not implemented: s"),
        // xl has others that begin so.
        (1, &["p", "d"], "command not implemented: p"),
        (1, &["sh", "d"], "command not implemented: sh"),
        // Not xl's: it has to be written out.
        (1, &["im"], "command not implemented: im"),
        (2, &["list", "--ver", "--c"], "option `--c' not supported."),
        (1, &["help", "fly"], "command \"fly\" not implemented"),
        (1, &["-x"], "invalid option '-x'"),
        (2, &["list", "-x"], "option `x' not supported."),
        (2, &["list", "--fast"], "option `--fast' not supported."),
        (2, &["create", "-x"], "Usage: hospes-mock [-vfN] create"),
        (2, &["create", "a.cfg", "b.cfg"], "second file"),
        (2, &["create", "-f"], "missing argument"),
        (
            2,
            &["pause"],
            "'hospes-mock pause' requires at least 1 argument.\n",
        ),
        (
            2,
            &["rename", "d"],
            "'hospes-mock rename' requires at least 2 arguments.\n",
        ),
        (2, &["trigger", "d"], "requires at least 2 arguments."),
        (2, &["block-attach", "d"], "requires at least 2 arguments."),
        (2, &["vcpu-pin", "d", "0"], "requires at least 3 arguments."),
        (2, &["pause", "a", "b"], "unexpected argument \"b\""),
        (1, &["shutdown"], "You must specify -a or a domain id."),
        (2, &["shutdown", "-a", "d"], "not both"),
        (
            1,
            &["-N", "pause", "d"],
            "command does not implement -N (dryrun) option",
        ),
        (1, &["config-update", "d"], "Config file not specified"),
        (1, &["debug-keys", "x"], "cannot send debug keys: x"),
        (2, &["top", "-d", "0"], "-d wants a number"),
        (2, &["top", "-i", "no"], "-i wants a number"),
        (2, &["completions", "tcsh"], "say bash, zsh or fish"),
        (2, &["manual", "xl.1"], "there is no manual page `xl.1'"),
        (2, &["domains", "restart"], "neither start nor stop"),
        (
            2,
            &["domains", "start", "--save", "d"],
            "--restore belongs to start",
        ),
        (2, &["domains", "stop", "--restore", "d"], "--save to stop"),
        (
            2,
            &["domains", "stop", "--timeout", "long"],
            "--timeout wants a number",
        ),
        (1, &["console", "-n", "x", "d"], "there is no console x"),
        (1, &["console", "-n", "1", "d"], "there is no console 1"),
        (
            1,
            &["console", "-t", "foo", "d"],
            "console type supported are: pv, serial, vuart",
        ),
        (1, &["console", "-t", "vuart", "d"], "no vuart console"),
        (2, &["console", "-t"], "missing argument for option '-t'"),
        (2, &["console", "-s", "d"], "option `s' not supported."),
        (2, &["vcpu-list", "--all"], "option `--all' not supported."),
        (2, &["list", "--long=5"], "unexpected argument for option"),
        (1, &["config-update"], "requires a domain argument"),
        (
            2,
            &["config-update", "d", "-n"],
            "option `n' not supported.",
        ),
        (
            1,
            &["cpupool-create", "name='x'"],
            "command not implemented: cpupool-create: Linux schedules the virtual CPUs: vcpu-pin",
        ),
        (
            1,
            &["vncviewer", "d"],
            "command not implemented: vncviewer: there is no VNC server yet: use console",
        ),
        (
            1,
            &["pause", "nobody"],
            "nobody is an invalid domain identifier",
        ),
        (1, &["destroy", "77"], "77 is an invalid domain identifier"),
        (
            1,
            &["destroy", "99999999999"],
            "is an invalid domain identifier",
        ),
        (1, &["destroy", "0"], "Domain-0 is the host itself"),
        (
            1,
            &["domid", "nobody"],
            "Can't get domid of domain name 'nobody'",
        ),
        (
            1,
            &["domname", "7"],
            "Can't get domain name of domain id '7'",
        ),
        (1, &["domname", "x"], "Invalid domain id: x"),
        (
            3,
            &["create", "/nonexistent.cfg"],
            "cannot read the configuration file /nonexistent.cfg",
        ),
        (3, &["create", "/"], "cannot read the configuration file /"),
        (6, &["create"], "Config file not specified"),
        (2, &["create", "a.cfg", "b.cfg"], "is a second file"),
        (1, &["create", "/dev/null"], "the domain has no name"),
        (
            1,
            &["create", "/dev/null", "name='a"],
            "command line:1: error: the string is not closed",
        ),
        (1, &["create", "/dev/zero"], "is it a configuration file?"),
    ];
    for (status, arguments, part) in cases {
        let said = bench.fails(*status, arguments);
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

#[test]
fn create_dry_run_prints_json_and_creates_nothing() {
    let bench = Bench::new();
    for arguments in [
        bench.creation("one", &["-n"]),
        [vec!["-N".into()], bench.creation("one", &[])].concat(),
    ] {
        let json: serde_json::Value = serde_json::from_str(&bench.ok(&arguments)).expect("JSON");
        assert_eq!(json["c_info"]["name"], "one");
        assert_eq!(json["b_info"]["max_memkb"], 65536);
    }
    assert!(!bench.path("run").exists());
}

#[test]
fn list_long_has_affinities_and_features_of_the_configuration() {
    let bench = Bench::new();
    let more = [
        "vcpus=2",
        "cpus=['0']",
        "cpus_soft='0'",
        "cpuid='host,aes=0'",
    ];
    bench.create("one", &more);
    let text = bench.ok(&["list", "-l", "one"]);
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let build = &json[0]["config"]["b_info"];
    assert_eq!(build["vcpu_hard_affinity"], serde_json::json!([[0]]));
    assert_eq!(build["vcpu_soft_affinity"], serde_json::json!([[0], [0]]));
    let features = serde_json::json!([{ "leaf": 1, "ecx": "xxxxxx0xxxxxxxxxxxxxxxxxxxxxxxxx" }]);
    assert_eq!(build["cpuid"], features);
}

#[test]
fn create_notes_and_warns_unless_quiet() {
    let bench = Bench::new();
    let mut arguments = bench.creation("one", &["-n"]);
    arguments.extend(["vfb=['']".into(), "memry=1".into()]);
    let loud = String::from_utf8(bench.run(&arguments).stderr).expect("text");
    assert!(
        loud.contains("command line:1: note: `vfb' is not supported yet, ignored"),
        "{loud}"
    );
    assert!(loud.contains("did you mean `memory'?"), "{loud}");
    arguments.insert(1, "-q".into());
    let quiet = String::from_utf8(bench.run(&arguments).stderr).expect("text");
    assert!(
        !quiet.contains("note:") && !quiet.contains("Parsing"),
        "{quiet}"
    );
    assert!(quiet.contains("warning:"), "{quiet}");
}

#[test]
fn control_socket_is_private_and_survives_garbage() {
    let bench = Bench::new();
    bench.create("one", &[]);
    for (path, mode) in [
        ("control.sock", 0o600),
        ("console.sock", 0o600),
        ("domain.json", 0o600),
        (".", 0o700),
    ] {
        let metadata = std::fs::metadata(bench.domain_dir(1).join(path)).expect("there");
        assert_eq!(metadata.permissions().mode() & 0o777, mode, "{path}");
    }
    let too_long = vec![b'{'; 100_000];
    let garbage: &[&[u8]] = &[
        b"hello\n",
        b"\xff\xfe\n",
        b"{\"version\":7,\"body\":{}}\n",
        b"{\"version\":1,\"body\":{\"op\":\"fly\"}}\n",
        &too_long,
    ];
    for bytes in garbage {
        let mut stream =
            UnixStream::connect(bench.domain_dir(1).join("control.sock")).expect("it listens");
        stream.write_all(bytes).expect("it reads");
        let mut answer = Vec::new();
        // A peer that is cut off in the middle of its line may get a reset behind the answer.
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.contains("\"reply\":\"error\""), "{answer}");
    }
    // Nor do connections that say nothing keep others out for good, or the domain from ending.
    let _silent: Vec<UnixStream> = (0..8)
        .map(|_| UnixStream::connect(bench.domain_dir(1).join("control.sock")).expect("it listens"))
        .collect();
    assert!(bench.row("one").is_some());
    bench.ok(&["destroy", "one"]);
}

#[test]
fn run_directory_open_to_others_is_refused() {
    let bench = Bench::new();
    let run = bench.path("run");
    std::fs::create_dir(&run).expect("writable");
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o777)).expect("ours");
    let said = bench.fails(3, &bench.creation("one", &[]));
    assert!(said.contains("HOSPES_RUN_DIR"), "{said}");
}

#[test]
fn commands_do_their_work_where_standard_error_cannot_be_written() {
    let bench = Bench::new();
    let unheard = |arguments: &[String]| {
        // Every write to it fails, as on a full disk.
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
        let status = bench
            .command()
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(full.expect("there"))
            .status();
        status.expect("the program can be started").code()
    };
    let words = |line: &str| line.split(' ').map(String::from).collect::<Vec<_>>();
    // Without `-q` it says what it reads.
    for name in ["one", "two"] {
        assert_eq!(unheard(&bench.creation(name, &[])), Some(0));
    }
    assert_eq!(unheard(&words("shutdown nobody")), Some(1));
    assert_eq!(unheard(&words("shutdown --what")), Some(2));
    // It says whom it asks.
    assert_eq!(unheard(&words("shutdown -a")), Some(0));
    until("both have shut down", || {
        bench.row("one").is_none() && bench.row("two").is_none()
    });
}

#[test]
fn output_that_cannot_be_written_is_said_to_be_that() {
    let bench = Bench::new();
    let output = bench
        .command()
        .arg("info")
        .stdout(
            std::fs::OpenOptions::new()
                .write(true)
                .open("/dev/full")
                .expect("there"),
        )
        .output()
        .expect("the program can be started");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("cannot write to standard output: No space left"),
        "{said}"
    );
}

#[test]
fn directory_whose_name_is_no_text_is_named_as_the_cause() {
    let bench = Bench::new();
    let directory = bench.path("").join(OsStr::from_bytes(b"\xff"));
    std::fs::create_dir(&directory).expect("writable");
    std::fs::write(directory.join("kernel"), "no kernel").expect("writable");
    let mut creation = bench.creation("one", &[]);
    creation.push("kernel='kernel'".into());
    let output = bench
        .command()
        .args(&creation)
        .current_dir(&directory)
        .output()
        .expect("the program can be started");
    assert_eq!(output.status.code(), Some(3));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("need names in UTF-8"), "{said}");
    assert!(bench.row("one").is_none());
}
