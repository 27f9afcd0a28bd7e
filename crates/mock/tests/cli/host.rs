//! What commands say about the host and about all domains; starting and stopping domains with the host.

use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::common::{Bench, until};

#[test]
fn vm_list_uptime_and_info_know_the_domains() {
    let bench = Bench::new();
    bench.create("one", &["uuid='59e1cf6c-6ab9-4879-90e7-adc8d1c63bf5'"]);
    let list = bench.ok(&["vm-list"]);
    let rows: Vec<Vec<&str>> = list
        .lines()
        .skip(1)
        .map(|row| row.split_whitespace().collect())
        .collect();
    let nil = "00000000-0000-0000-0000-000000000000";
    assert_eq!(rows[0], [nil, "0", "Domain-0"]);
    let uuid = "59e1cf6c-6ab9-4879-90e7-adc8d1c63bf5";
    assert_eq!(rows[1..], [[uuid, "1", "one"]]);

    let uptime = bench.ok(&["uptime"]);
    assert!(
        uptime.starts_with("Name                                ID Uptime\nDomain-0 "),
        "{uptime}"
    );
    assert!(
        uptime.lines().nth(2).expect("a row").starts_with("one "),
        "{uptime}"
    );
    assert!(bench.ok(&["uptime", "-s", "one"]).contains(" up "));
    let said = bench.fails(1, &["uptime", "two"]);
    assert!(
        said.contains("two is an invalid domain identifier"),
        "{said}"
    );

    let info = bench.ok(&["info"]);
    for name in [
        "host",
        "release",
        "nr_cpus",
        "max_cpu_id",
        "cpu_mhz",
        "total_memory",
        "free_memory",
        "xen_major",
        "xen_version",
        "xen_caps",
    ] {
        assert!(
            info.lines()
                .any(|line| line.starts_with(&format!("{name:<22} : "))),
            "{name} in {info}"
        );
    }
    assert_eq!(bench.ok(&["info", "xen_major"]), "4\n");
    // As in xl, a beginning is enough.
    assert_eq!(bench.ok(&["info", "xen_m"]), "4\n17\n");
    let numa = bench.ok(&["info", "-n"]);
    assert!(numa.contains("cpu_topology") && numa.contains("\ndevice           node\n"));
}

#[test]
fn memory_of_all_domains_and_what_is_free_is_the_hosts() {
    let bench = Bench::new();
    bench.create("one", &["memory=64"]);
    let mib = |name: &str| -> u64 { bench.ok(&["info", name]).trim().parse().expect("a number") };
    let table = bench.ok(&["list"]);
    let used: u64 = table
        .lines()
        .skip(1)
        .filter_map(|row| row.split_whitespace().nth(2)?.parse::<u64>().ok())
        .sum();
    // Other programs of the host are not asked to wait.
    let known = used + mib("free_memory");
    assert!(known.abs_diff(mib("total_memory")) < 1024, "{table}");
    assert_eq!(
        table
            .lines()
            .filter(|row| row.split_whitespace().count() != 6)
            .count(),
        0
    );
}

#[test]
fn host_has_its_cpus_wherever_the_command_may_run() {
    let bench = Bench::new();
    // Commands inherit it.
    let mut first = rustix::thread::CpuSet::new();
    first.set(rustix::thread::sched_getcpu());
    rustix::thread::sched_setaffinity(None, &first).expect("one that it runs on");
    let rows = bench.ok(&["vcpu-list", "0"]).lines().skip(1).count();
    let listed = &bench.row("Domain-0").expect("the host is there")[3];
    assert_eq!(*listed, rows.to_string());
}

/// What scripts such as Xen's own for the start of the host look for in JSON.
#[test]
fn json_is_laid_out_as_that_of_xl() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let long = bench.ok(&["list", "-l"]);
    let ids: Vec<&str> = long
        .lines()
        .filter(|line| line.starts_with("        \"domid\": "))
        .collect();
    assert_eq!(ids, ["        \"domid\": 0,", "        \"domid\": 1,"]);
    assert_eq!(long.lines().filter(|line| *line == "    {").count(), 2);
    assert!(
        long.contains("\n                \"name\": \"one\",\n"),
        "{long}"
    );
    let kernel = format!("kernel='{}'", bench.path("kernel").display());
    let dry = bench.ok(&["create", "-n", "/dev/null", "name='two'", &kernel]);
    assert!(dry.starts_with("{\n    \"c_info\": {\n        \"type\": \"pvh\",\n        \"name\": \"two\",\n        \"uuid\": \""), "{dry}");
}

#[test]
fn top_without_a_terminal_prints_one_table() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let text = bench.ok(&["top"]);
    let names: Vec<Option<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(names, [Some("NAME"), Some("Domain-0"), Some("one")]);
    let twice = bench.ok(&["top", "-b", "-d", "0.01", "-i", "2"]);
    assert_eq!(twice.lines().count(), 6);
}

#[test]
fn program_called_xentop_prints_the_table_of_xentop() {
    let bench = Bench::new();
    bench.create("a-longer-name", &["maxmem=128"]);
    let xentop = |arguments: &[&str], status: i32| {
        let mut command = bench.command();
        let output = command.arg0("/usr/sbin/xentop").args(arguments).output();
        let output = output.expect("the program can be started");
        let said = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(status), "{said}");
        (String::from_utf8(output.stdout).expect("text"), said)
    };
    let (table, _) = xentop(&["-b", "-d", "0.01", "-i2", "-n", "-x", "-v"], 0);
    let rows: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let heading = "NAME STATE CPU(sec) CPU(%) MEM(k) MEM(%) MAXMEM(k) MAXMEM(%) VCPUS NETS NETTX(k) NETRX(k) VBDS VBD_OO VBD_RD VBD_WR VBD_RSECT VBD_WSECT SSID";
    assert_eq!(rows[0].join(" "), heading);
    assert_eq!(rows.len(), 6);
    assert!(rows.iter().all(|row| row.len() == 19), "{table}");
    assert_eq!(rows[1][..2], ["Domain-0", "-----r"]);
    let expected = ["a-longer-n", "--b---", "1", "0.0", "65536"];
    assert_eq!(rows[5][..5], expected);
    assert_eq!(rows[5][6], "131072");
    let carried = ["1", "1", "4", "2", "2", "0", "3", "5", "7", "11", "0"];
    assert_eq!(rows[5][8..], carried);

    let (full, _) = xentop(&["-bfri1"], 0);
    assert!(full.contains("\na-longer-name --b---"), "{full}");
    assert_eq!(full.matches("NAME").count(), 2);
    let (help, _) = xentop(&["--help"], 0);
    assert!(help.starts_with("Usage: xentop [OPTIONS]\n"), "{help}");
    for option in ["-V", "--version", "-bV"] {
        let (version, _) = xentop(&[option], 0);
        let first = concat!("xentop (hospes ", env!("CARGO_PKG_VERSION"), ")\n");
        assert_eq!(version, first);
    }
    let (_, said) = xentop(&["-z"], 2);
    assert!(
        said.starts_with("xentop: option `z' not supported."),
        "{said}"
    );
}

#[test]
fn states_in_list_and_top_are_the_same() {
    let bench = Bench::new();
    for (name, line, list, top) in [
        ("off", "poweroff", "---s--", "-s----"),
        ("mad", "crash", "---sc-", "---c--"),
        ("dog", "watchdog", "---sw-", "-s----"),
        ("calm", "hello", "-b----", "--b---"),
        ("still", "pause", "--p---", "----p-"),
    ] {
        bench.create(
            name,
            &["on_poweroff='preserve'; on_crash='preserve'; on_watchdog='preserve'"],
        );
        let mut console = bench.spawn(&["console", name]);
        if line == "pause" {
            bench.ok(&["pause", name]);
        } else {
            console.send(&format!("{line}\n"));
        }
        until("list shows the state", || {
            bench.row(name).is_some_and(|row| row[4] == list)
        });
        let table = bench.ok(&["top", "-b", "-d", "0.01", "-i1"]);
        let mut rows = table.lines().map(str::split_whitespace);
        let state = rows.find_map(|mut row| (row.next() == Some(name)).then(|| row.next()));
        assert_eq!(state, Some(Some(top)), "{table}");
    }
}

#[test]
fn dmesg_merges_the_logs_and_forgets_what_was_cleared() {
    let bench = Bench::new();
    bench.create("one", &[]);
    bench.create("two", &[]);
    let says = |name: &str| {
        let text = bench.ok(&["dmesg"]);
        let mut lines = text.lines();
        lines.any(|line| line.starts_with(&format!("({name}) ")) && line.contains("to die"))
    };
    for name in ["one", "two"] {
        until("the domain's process says that it waits", || says(name));
    }
    let text = bench.ok(&["dmesg", "-c"]);
    assert!(!text.contains("mock guest ready"), "{text}");
    assert_eq!(bench.ok(&["dmesg"]), "");
    // Times are of a second: what comes at once is none of the second that was cleared.
    bench.ok(&["debug-keys", "q"]);
    until("what came at once is there", || {
        bench.ok(&["dmesg"]).contains("(two) ")
    });
}

#[test]
fn vcpu_list_and_pin_and_set_reach_the_domain() {
    let bench = Bench::new();
    bench.create("one", &["vcpus=2"]);
    let table = bench.ok(&["vcpu-list"]);
    let rows: Vec<&str> = table.lines().collect();
    assert_eq!(
        rows[0],
        "Name                                ID  VCPU   CPU State   Time(s) Affinity (Hard / Soft)"
    );
    assert!(rows.iter().any(|row| row.starts_with("Domain-0 ")));
    assert_eq!(rows.iter().filter(|row| row.starts_with("one ")).count(), 2);
    assert_eq!(bench.ok(&["vcpu-list", "one"]).lines().count(), 3);
    assert_eq!(
        bench
            .ok(&["-N", "vcpu-pin", "one", "0", "0"])
            .trim_end()
            .split(' ')
            .next(),
        Some("cpumap:")
    );
    assert_eq!(
        bench.ok(&["-N", "vcpu-pin", "one", "all", "-", "all"]),
        "cpumap: - all\n"
    );
    let cases: &[(&[&str], &str)] = &[
        (
            &["vcpu-pin", "one", "first", "0"],
            "Error: Invalid argument first as VCPU.",
        ),
        (
            &["vcpu-pin", "-f", "one", "all", "0"],
            "--force and 'all' as VCPU not allowed",
        ),
        (&["vcpu-set", "one", "many"], "Error: Invalid argument."),
        (&["vcpu-set", "one", "100"], "--ignore-host"),
    ];
    for (arguments, part) in cases {
        let said = bench.fails(1, arguments);
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

#[test]
fn commands_may_be_shortened() {
    let bench = Bench::new();
    assert_eq!(bench.ok(&["vm-l"]), bench.ok(&["vm-list"]));
    assert_eq!(bench.ok(&["help", "unp"]), bench.ok(&["help", "unpause"]));
}

#[test]
fn changes_of_the_host_are_noted_and_left() {
    let bench = Bench::new();
    let before = bench.ok(&["sched-credit2"]);
    for arguments in [
        &["sched-credit", "-d", "0", "-w", "512"][..],
        &["sched-credit2", "-d", "Domain-0", "-w", "512", "-c", "0"],
        &["vcpu-pin", "Domain-0", "all", "0"],
        &["vcpu-set", "0", "1"],
        &["mem-set", "0", "1024"],
        &["mem-set", "Domain-0", "1g"],
    ] {
        let output = bench.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {said}");
        assert!(
            said.starts_with("note: Domain-0 is this host itself: "),
            "{said}"
        );
        assert!(said.ends_with(" as it is\n"), "{said}");
        assert!(output.stdout.is_empty());
    }
    assert_eq!(bench.ok(&["sched-credit2"]), before);
    for (arguments, fault) in [
        (&["mem-max", "0", "1024"][..], "Domain-0 is the host itself"),
        (&["mem-set", "0", "much"], "invalid memory size"),
        (&["vcpu-pin", "0", "first", "0"], "Invalid argument"),
        (&["vcpu-set", "0", "one"], "Invalid argument"),
        (&["sched-credit2", "-d", "0", "-w", "70000"], "out of range"),
    ] {
        let said = bench.fails(1, arguments);
        assert!(said.contains(fault), "{arguments:?}: {said}");
    }
}

#[test]
fn domains_start_and_stop_what_the_directory_says() {
    let bench = Bench::new();
    let auto = bench.path("auto");
    std::fs::create_dir(&auto).expect("writable");
    let kernel = bench.path("kernel").display().to_string();
    let config = |name: &str, more: &str| {
        format!("name='{name}'\ntype='pvh'\nkernel='{kernel}'\nmemory=64\n{more}\n")
    };
    for (file, text) in [
        ("b.cfg", config("second", "extra='deaf'")),
        ("a.cfg", config("first", "on_poweroff='preserve'")),
        ("c.cfg", "memory=".to_string()),
        ("a.cfg~", "not read".to_string()),
    ] {
        std::fs::write(auto.join(file), text).expect("writable");
    }
    let dir = auto.display().to_string();
    // One that is wrong does not keep the others from being started.
    let said = bench.fails(1, &["domains", "start", "--dir", &dir]);
    assert!(
        said.contains("c.cfg: ") && said.contains("a domain could not be started"),
        "{said}"
    );
    assert_eq!(bench.row("first").expect("it runs")[1], "1");
    assert_eq!(bench.row("second").expect("it runs")[1], "2");
    std::fs::remove_file(auto.join("c.cfg")).expect("there");
    bench.ok(&["domains", "start", "--dir", &dir]);
    assert_eq!(bench.row("first").expect("it still runs")[1], "1");

    let output = bench.run(&["domains", "stop", "--timeout", "1"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("Domain 1 has been shut down, reason code 0"),
        "{said}"
    );
    assert!(
        said.contains("Domain 2 has not shut down: it is destroyed"),
        "{said}"
    );
    // The heading and Domain-0.
    assert_eq!(bench.ok(&["vm-list"]).lines().count(), 2);
    bench.ok(&["domains", "stop"]);
    bench.ok(&["domains", "start", "--dir", "/nonexistent"]);
}

#[test]
fn domains_are_those_of_all_files_but_what_editors_and_packages_leave() {
    let bench = Bench::new();
    let auto = bench.path("auto");
    std::fs::create_dir_all(auto.join("directory")).expect("writable");
    let write = |file: &str, name: &str| {
        let kernel = bench.path("kernel").display().to_string();
        let text = format!("name='{name}'; type='pvh'; memory=64; kernel='{kernel}'\n");
        std::fs::write(auto.join(file), text).expect("writable");
    };
    write("20-web", "web");
    write("10-db.xl", "db");
    write("../mail.cfg", "mail");
    symlink("../mail.cfg", auto.join("30-mail")).expect("writable");
    for left in [
        ".hidden",
        "old~",
        "web.bak",
        "web.dpkg-old",
        "web.cfg.dpkg-dist",
        "web.rpmsave",
        "web.rpmnew",
    ] {
        write(left, left);
    }
    let dir = auto.display().to_string();
    let output = bench.run(&["domains", "start", "--dir", &dir]);
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(0), "{said}");
    let started = |file: &str| format!("{dir}/{file}: started\n");
    assert_eq!(
        said,
        started("10-db.xl") + &started("20-web") + &started("30-mail")
    );
    for (name, id) in [("db", "1"), ("web", "2"), ("mail", "3")] {
        assert_eq!(bench.row(name).expect("listed")[1], id);
    }
    symlink("nowhere", auto.join("40-lost")).expect("writable");
    let said = bench.fails(1, &["domains", "start", "--dir", &dir]);
    assert!(said.contains("40-lost: cannot read"), "{said}");
}

#[test]
fn domains_that_stop_do_not_start_again_while_others_take_their_time() {
    let bench = Bench::new();
    bench.create("slow", &["extra='deaf'"]);
    bench.create("again", &["on_poweroff='restart'"]);
    bench.create("kept", &["on_poweroff='preserve'"]);
    // Longer than a domain has to have run before it is restarted.
    bench.ok(&["domains", "stop", "--timeout", "3"]);
    // The heading and Domain-0.
    assert_eq!(bench.ok(&["vm-list"]).lines().count(), 2);
    let log = bench.log("again.log");
    assert!(
        log.contains("Domain 2 has shut down, reason code 0") && !log.contains("Rebooting"),
        "{log}"
    );
    bench.create("next", &[]);
    assert_eq!(bench.row("next").expect("it runs")[1], "4");
}

/// What bash makes of the words behind the program's name, in the directory of the test.
fn completed(bench: &Bench, line: &str) -> Vec<String> {
    let script = bench.path("completions.bash");
    std::fs::write(&script, bench.ok(&["completions", "bash"])).expect("writable");
    let words: Vec<&str> = line.split(' ').collect();
    let output = Command::new("bash")
        .args([
            "-c",
            r#"source ./completions.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _hospes; printf '%s\n' "${COMPREPLY[@]}""#,
            "bash",
            env!("CARGO_BIN_EXE_hospes-mock"),
        ])
        .args(words)
        .env("HOSPES_RUN_DIR", bench.path("run"))
        .env("HOSPES_LOG_DIR", bench.path("log"))
        .current_dir(bench.path("."))
        .output()
        .expect("bash");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(String::from).collect()
}

#[test]
fn completions_leave_names_of_domains_and_files_whole() {
    let bench = Bench::new();
    bench.create("we b", &[]);
    bench.create("we$(touch hit)", &[]);
    std::fs::write(bench.path("my vm.cfg"), "").expect("writable");
    assert_eq!(
        completed(&bench, "pause we"),
        [r"we\ b", r"we\$\(touch\ hit\)"]
    );
    assert_eq!(
        completed(&bench, r"pause we\"),
        [r"we\ b", r"we\$\(touch\ hit\)"]
    );
    assert_eq!(completed(&bench, "create my"), ["my vm.cfg"]);
    assert!(!bench.path("hit").exists(), "the name was run");
}

#[test]
fn completions_are_scripts_that_the_shell_takes() {
    let bench = Bench::new();
    assert_eq!(
        completed(&bench, "vcpu-"),
        ["vcpu-list", "vcpu-pin", "vcpu-set"]
    );
    assert_eq!(
        completed(&bench, "-v shutdown --"),
        ["--all", "--wait", "--help"]
    );
    assert_eq!(completed(&bench, "domains st"), ["start", "stop"]);
    assert!(
        bench
            .ok(&["completions", "zsh"])
            .starts_with("#compdef hospes xl\n")
    );
    assert!(
        bench
            .ok(&["completions", "fish"])
            .contains("complete -c xl -n __fish_use_subcommand -a list")
    );
}

#[test]
fn manual_pages_are_made_of_the_tables() {
    let bench = Bench::new();
    let commands = bench.ok(&["manual", "hospes.1"]);
    assert!(
        commands.contains(".SS block\\-attach DOMAIN DISKSPEC..."),
        "{commands}"
    );
    let keys = bench.ok(&["manual", "hospes.cfg.5"]);
    assert!(
        keys.contains(".TH hospes.cfg 5") && keys.contains("cpu_weight="),
        "{keys}"
    );
}

#[test]
fn shares_are_shown_and_changed_as_by_xl() {
    let bench = Bench::new();
    bench.create("web", &["cpu_weight=300", "vcpus=2"]);
    let table = bench.ok(&["sched-credit2"]);
    assert_eq!(
        table,
        "Cpupool Pool-0: ratelimit=0us\n\
         Name                                ID Weight  Cap\n\
         Domain-0                             0    256    0\n\
         web                                  1    300    0\n"
    );
    assert_eq!(bench.ok(&["sched-credit2", "-d", "web", "-c", "150"]), "");
    assert_eq!(
        bench.ok(&["sched-credit", "-d", "web", "-w", "512"]),
        "",
        "both names mean the same"
    );
    let row = "web                                  1    512  150\n";
    assert!(bench.ok(&["sched-credit2", "-d", "1"]).ends_with(row));
    let long = bench.ok(&["list", "-l", "web"]);
    assert!(long.contains("\"weight\": 512"), "{long}");
}

#[test]
fn shares_out_of_range_are_refused() {
    let bench = Bench::new();
    bench.create("web", &[]);
    let cases: [(&[&str], &str); 8] = [
        (&["-d", "web", "-c", "101"], "0 to 100"),
        (&["-d", "web", "-w", "0"], "out of range"),
        (&["-d", "web", "-w", "65536"], "out of range"),
        (&["-d", "web", "-c", "-1"], "out of range"),
        (&["-w", "100"], "Must specify a domain."),
        (&["-s", "-d", "web"], "not allowed with domain options"),
        (&["-p", "Pool-7"], "there is Pool-0 only"),
        (&["-d", "nobody"], "nobody"),
    ];
    for (arguments, sentence) in cases {
        let said = bench.fails(1, &[&["sched-credit2"], arguments].concat());
        assert!(said.contains(sentence), "{arguments:?}: {said}");
    }
}

#[test]
fn cap_of_more_than_all_vcpus_is_refused_at_creation() {
    let bench = Bench::new();
    let mut arguments = bench.creation("web", &["-q"]);
    arguments.extend(["vcpus=2", "cap=201"].map(String::from));
    let said = bench.fails(3, &arguments);
    assert!(said.contains("0 to 200"), "{said}");
    assert!(bench.row("web").is_none());
}

#[test]
fn cpupool_list_shows_the_one_pool() {
    let bench = Bench::new();
    bench.create("one", &[]);
    let table = bench.ok(&["cpupool-list"]);
    assert_eq!(table.lines().count(), 2);
    let row: Vec<&str> = table
        .lines()
        .nth(1)
        .expect("a row")
        .split_whitespace()
        .collect();
    assert_eq!([row[0], row[3], row[4]], ["Pool-0", "y", "2"], "{table}");
    let cpus = bench.ok(&["cpupool-list", "-c", "Pool-0"]);
    let list = cpus.lines().nth(1).expect("a row").split_whitespace();
    let numbers = list.last().expect("CPUs").split(',').count();
    assert_eq!(numbers.to_string(), row[1], "{cpus}");
    assert_eq!(bench.ok(&["cpupool-list", "0"]), table);
    let said = bench.fails(1, &["cpupool-list", "other"]);
    assert!(said.contains("Pool 'other' does not exist"), "{said}");
    bench.fails(1, &["cpupool-create", "name='other'"]);
}
