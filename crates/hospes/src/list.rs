//! `list`, `claims` and `sharing`, with xl's columns.

use std::fs;

use anyhow::Context;
use hospes_config::Uuid;
use hospes_toolstack::{
    Answer, DeviceKind, DomainInfo, EndReason, Entry, Error, HOST_NAME, Host, Traffic, host_cpus,
};
use serde_json::{Value, json as object};

use crate::Outcome;
use crate::configured;
use crate::output::{json, print, say};
use crate::table::Call;

#[derive(Debug, Default)]
struct Options {
    long: bool,
    verbose: bool,
    context: bool,
    cpupool: bool,
    numa: bool,
    claims: bool,
    domains: Vec<String>,
}

pub(crate) fn list(call: &Call) -> Outcome {
    let args = &call.args;
    Ok(list_with(&Options {
        long: args.has("long"),
        verbose: args.has("verbose"),
        context: args.has("context"),
        cpupool: args.has("cpupool"),
        numa: args.has("numa"),
        claims: false,
        domains: args.values.clone(),
    })?)
}

/// The list with what each domain has not used of its memory yet and still may.
pub(crate) fn claims(_: &Call) -> Outcome {
    Ok(list_with(&Options {
        claims: true,
        ..Options::default()
    })?)
}

pub(crate) fn sharing(call: &Call) -> Outcome {
    Ok(sharing_of(&call.args.values)?)
}

/// No two domains have a page in common.
fn sharing_of(domains: &[String]) -> anyhow::Result<()> {
    let mut silent = Vec::new();
    let rows = wanted(all(&Host::from_environment()?, &mut silent)?, domains)?;
    let mut table = String::from("Name                                        ID   Mem Shared\n");
    for (info, _) in &rows {
        let mib = info.memory_kib / 1024;
        table.push_str(&format!(
            "{:<40} {:>5} {mib:>5}  {:>5}\n",
            info.name, info.domid, 0
        ));
    }
    print(format_args!("{table}"))?;
    say(format_args!("{}", of_rows(silent, &rows)));
    Ok(())
}

/// The notes on domains that a list has.
fn of_rows(notes: Vec<(u16, String)>, rows: &[Row]) -> String {
    let is_listed = |domid| rows.iter().any(|(info, _)| info.domid == domid);
    let notes = notes.into_iter().filter(|(domid, _)| is_listed(*domid));
    notes.map(|(_, note)| note).collect()
}

/// What xl prints where there is nothing to print, as for the label without a security module.
const NO_LABEL: &str = "-";

/// A row: the entry is missing for the host.
type Row = (DomainInfo, Option<Entry>);

fn list_with(options: &Options) -> anyhow::Result<()> {
    let host = Host::from_environment()?;
    let mut silent = Vec::new();
    let rows = wanted(all(&host, &mut silent)?, &options.domains)?;
    let silent = of_rows(silent, &rows);
    if options.long {
        let total_kib = HostMemory::read(&host)?.total_kib;
        let items: Vec<Value> = rows.iter().map(|row| long(row, total_kib)).collect();
        print(format_args!("{}\n", json(&Value::Array(items))))?;
        say(format_args!("{silent}"));
        return Ok(());
    }
    let mut table = header(options);
    let mut notes = silent;
    for (info, entry) in &rows {
        let waiting = waiting(info, entry.as_ref());
        table.push_str(&row(info, &waiting, options));
        for (device, why) in waiting {
            notes.push_str(&format!("{}: {device}: {why}\n", info.name));
        }
        if let Some(why) = &info.held {
            notes.push_str(&format!("{}: {why}\n", info.name));
        }
    }
    print(format_args!("{table}"))?;
    say(format_args!("{notes}"));
    Ok(())
}

/// The devices whose requests wait, by their names in the configuration, with the reason.
fn waiting<'a>(info: &'a DomainInfo, entry: Option<&Entry>) -> Vec<(String, &'a str)> {
    let disks = entry.map_or(&[][..], |entry| &entry.record.config.disks);
    let named = info.waiting.iter().map(|device| {
        let disk = disks.iter().find(|disk| disk.vdev.number == device.devid);
        let name = match (device.kind, disk) {
            (DeviceKind::Disk, Some(disk)) => disk.vdev.name.clone(),
            (DeviceKind::Disk, None) => format!("vbd {}", device.devid),
            (DeviceKind::Vif, _) => format!("vif {}", device.devid),
        };
        (name, device.why.as_str())
    });
    named.collect()
}

/// All rows. Of domains that do not answer there is what is written down of them, and a note for the user in `silent`.
fn all(host: &Host, silent: &mut Vec<(u16, String)>) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (entry, answer) in host.infos(host.entries()?) {
        let info = match answer {
            Answer::Told(info) => info,
            Answer::NotYet => entry.as_recorded(),
            Answer::Silent(fault) => {
                silent.push((entry.domid.0, note(&entry, &fault)));
                entry.as_recorded()
            }
        };
        rows.push((info, Some(entry)));
    }
    rows.insert(
        0,
        (host_info(host, rows.iter().map(|(info, _)| info))?, None),
    );
    Ok(rows)
}

/// What a list says of a domain that does not answer.
pub(crate) fn note(entry: &Entry, fault: &Error) -> String {
    format!("{}: {fault}\n", entry.record.name)
}

fn wanted(rows: Vec<Row>, names: &[String]) -> anyhow::Result<Vec<Row>> {
    if names.is_empty() {
        return Ok(rows);
    }
    names
        .iter()
        .map(|who| {
            let id = who.parse::<u16>().ok();
            let found = rows.iter().find(|(info, _)| match id {
                Some(id) => info.domid == id,
                None => info.name == *who,
            });
            Ok(found
                .cloned()
                .ok_or_else(|| Error::NoSuchDomain { who: who.clone() })?)
        })
        .collect()
}

fn header(options: &Options) -> String {
    let mut line =
        String::from("Name                                        ID   Mem VCPUs\tState\tTime(s)");
    if options.verbose {
        line.push_str("   UUID                            Reason-Code\tSecurity Label");
    } else if options.context {
        line.push_str("   Security Label");
    }
    if options.claims {
        line.push_str("  Claimed");
    }
    if options.cpupool {
        line.push_str("         Cpupool");
    }
    if options.numa {
        line.push_str(" NODE Affinity");
    }
    line.push('\n');
    line
}

/// The fifth letter of the state, by the reason of the shutdown.
fn reason_letter(reason: Option<&EndReason>) -> char {
    match reason {
        None | Some(EndReason::Poweroff | EndReason::Destroyed) => '-',
        Some(EndReason::Reboot) => 'r',
        Some(EndReason::Suspend) => 's',
        Some(EndReason::Crash(_)) => 'c',
        Some(EndReason::Watchdog) => 'w',
        Some(EndReason::SoftReset) => 'S',
    }
}

/// A row. What waits stands behind xl's columns, and where details are asked for: programs count the others.
fn row(info: &DomainInfo, waiting: &[(String, &str)], options: &Options) -> String {
    let flag = |set: bool, letter: char| if set { letter } else { '-' };
    let state = [
        flag(info.running, 'r'),
        flag(info.blocked, 'b'),
        flag(info.paused, 'p'),
        flag(info.shutdown.is_some(), 's'),
        reason_letter(info.shutdown.as_ref()),
        flag(info.dying, 'd'),
    ];
    let mut line = format!(
        "{:<40} {:>5} {:>5} {:>5}     {}  {:>8.1}",
        info.name,
        info.domid,
        info.memory_kib / 1024,
        info.vcpus_online,
        state.iter().collect::<String>(),
        info.cpu_time_ns as f64 / 1e9,
    );
    if options.verbose {
        let code = info.shutdown.as_ref().and_then(EndReason::code);
        let code = code.map_or_else(|| NO_LABEL.to_string(), |code| format!("{code:x}"));
        line.push_str(&format!(" {} {code:>8}", info.uuid));
    }
    if options.claims {
        line.push_str(&format!(" {:>5}", info.promised_kib / 1024));
    }
    if options.verbose || options.context {
        line.push_str(&format!(" {NO_LABEL:>16}"));
    }
    if options.cpupool {
        line.push_str(&format!("{:>16}", "Pool-0"));
    }
    if options.numa {
        line.push_str(" all");
    }
    if options.verbose && !waiting.is_empty() {
        let names: Vec<&str> = waiting.iter().map(|(name, _)| name.as_str()).collect();
        line.push_str(&format!("  held: {}", names.join(",")));
    }
    line.push('\n');
    line
}

/// A row in libxl's form. Domain-0, which may have all memory, looks as Xen's tools enter it.
fn long((info, entry): &Row, total_kib: u64) -> Value {
    let config = match entry {
        Some(entry) => {
            let mut config = configured::to_json(&entry.record.config);
            config["c_info"]["name"] = object!(info.name);
            config["c_info"]["uuid"] = object!(info.uuid);
            config
        }
        None => object!({
            "c_info": { "type": "pv", "name": info.name, "uuid": info.uuid },
            "b_info": {
                "max_vcpus": info.vcpus_online,
                "max_memkb": total_kib,
                "target_memkb": info.memory_kib,
                "type.pv": {},
            },
        }),
    };
    let mut item = object!({ "domid": info.domid, "config": config });
    if !info.waiting.is_empty() {
        let held = waiting(info, entry.as_ref()).into_iter();
        item["held"] = held
            .map(|(device, why)| object!({ "device": device, "why": why }))
            .collect();
    }
    if let Some(why) = &info.held {
        item["undecided"] = object!(why);
    }
    item
}

/// The host as Domain-0: the memory that is neither free nor the domains', and the time of everything that runs on it.
pub(crate) fn host_info<'a>(
    host: &Host,
    domains: impl Iterator<Item = &'a DomainInfo>,
) -> anyhow::Result<DomainInfo> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    let memory = HostMemory::read(host)?;
    let others_kib = memory.free_kib + domains.map(|info| info.memory_kib).sum::<u64>();
    let ticks = busy_ticks(&read("/proc/stat")?, "cpu ").context("/proc/stat has no line cpu")?;
    let ticks_per_s = rustix::param::clock_ticks_per_second().max(1);
    Ok(DomainInfo {
        domid: 0,
        name: HOST_NAME.into(),
        uuid: Uuid::NIL,
        memory_kib: memory.total_kib.saturating_sub(others_kib),
        promised_kib: 0,
        vcpus_online: host_cpus().cpus.iter().count() as u32,
        cpu_time_ns: ticks.saturating_mul(1_000_000_000 / ticks_per_s),
        running: true,
        blocked: false,
        paused: false,
        shutdown: None,
        dying: false,
        traffic: Traffic::default(),
        waiting: Vec::new(),
        moving: false,
        held: None,
    })
}

/// Memory of the host, in KiB.
pub(crate) struct HostMemory {
    pub(crate) total_kib: u64,
    /// What a new domain can have.
    pub(crate) free_kib: u64,
    /// What domains have not used yet and still may.
    pub(crate) promised_kib: u64,
}

impl HostMemory {
    pub(crate) fn read(host: &Host) -> anyhow::Result<HostMemory> {
        let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        let total = memory_kib(&meminfo, "MemTotal:").context("/proc/meminfo has no MemTotal")?;
        let available_kib = memory_kib(&meminfo, "MemAvailable:").unwrap_or(0);
        let promised_kib = host.promised_bytes()? >> 10;
        Ok(HostMemory {
            total_kib: total,
            free_kib: available_kib.saturating_sub(promised_kib),
            promised_kib,
        })
    }
}

/// One of the values of /proc/meminfo, in KiB.
pub(crate) fn memory_kib(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The time of a CPU, or of all (`cpu `), but idle and waiting for I/O, in clock ticks (proc(5), /proc/stat).
pub(crate) fn busy_ticks(stat: &str, cpu: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix(cpu))?;
    let columns: Vec<u64> = line
        .split_whitespace()
        .map_while(|column| column.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; the guests' time is in user and nice already.
    let busy = columns
        .iter()
        .take(8)
        .enumerate()
        .filter(|(index, _)| !matches!(index, 3 | 4));
    (columns.len() >= 4).then(|| busy.map(|(_, ticks)| ticks).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hospes_toolstack::Waiting;

    fn info() -> DomainInfo {
        DomainInfo {
            domid: 2,
            name: "linux".into(),
            uuid: Uuid::NIL,
            memory_kib: 2048 << 10,
            promised_kib: 0,
            vcpus_online: 2,
            cpu_time_ns: 5_624_240_000_000,
            running: true,
            blocked: false,
            paused: false,
            shutdown: None,
            dying: false,
            traffic: Traffic::default(),
            waiting: Vec::new(),
            moving: false,
            held: None,
        }
    }

    #[test]
    fn row_has_the_columns_of_xl() {
        let options = Options::default();
        let name = "Name                                        ID   Mem VCPUs\tState\tTime(s)\n";
        assert_eq!(header(&options), name);
        assert_eq!(
            row(&info(), &[], &options),
            "linux                                        2  2048     2     r-----    5624.2\n"
        );
    }

    #[test]
    fn row_names_held_disks_where_details_are_asked_for() {
        let held = DomainInfo {
            waiting: vec![Waiting {
                kind: DeviceKind::Disk,
                devid: 51712,
                why: "the host is full".into(),
            }],
            ..info()
        };
        let waiting = waiting(&held, None);
        let plain = row(&held, &waiting, &Options::default());
        assert_eq!(plain, row(&info(), &[], &Options::default()));
        let options = Options {
            verbose: true,
            ..Options::default()
        };
        assert!(row(&held, &waiting, &options).ends_with(" -  held: vbd 51712\n"));
        let long = long(&(held, None), 4 << 20);
        assert_eq!(long["held"][0]["why"], "the host is full");
        assert_eq!(long["config"]["c_info"]["type"], "pv");
        assert_eq!(long["config"]["b_info"]["max_memkb"], 4 << 20);
    }

    #[test]
    fn row_shows_why_a_domain_has_ended() {
        let cases = [
            (EndReason::Poweroff, "---s--"),
            (EndReason::Reboot, "---sr-"),
            (EndReason::Suspend, "---ss-"),
            (EndReason::Crash("x".into()), "---sc-"),
            (EndReason::Watchdog, "---sw-"),
        ];
        for (reason, state) in cases {
            let ended = DomainInfo {
                running: false,
                shutdown: Some(reason),
                ..info()
            };
            let row = row(&ended, &[], &Options::default());
            assert_eq!(row.split_whitespace().nth(4), Some(state));
        }
    }

    #[test]
    fn row_verbose_adds_uuid_reason_and_label() {
        let options = Options {
            verbose: true,
            ..Options::default()
        };
        let row = row(&info(), &[], &options);
        let columns: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(
            columns[6..],
            ["00000000-0000-0000-0000-000000000000", "-", "-"]
        );
    }

    #[test]
    fn busy_ticks_leaves_out_idle_time() {
        let stat = "cpu  10 1 5 1000 50 2 3 4 7 0\ncpu0 1 2 3 4\n";
        assert_eq!(busy_ticks(stat, "cpu "), Some(25));
        assert_eq!(busy_ticks("cpu  x", "cpu "), None);
        assert_eq!(busy_ticks("", "cpu "), None);
    }

    #[test]
    fn memory_kib_finds_its_line() {
        assert_eq!(
            memory_kib("MemTotal:       24593692 kB\nMemFree: 1 kB\n", "MemTotal:"),
            Some(24_593_692)
        );
        assert_eq!(memory_kib("MemFree: 1 kB\n", "MemTotal:"), None);
    }
}
