//! The host and what it runs: `info`, `uptime`, `vm-list`.

use std::fmt::Write;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use hospes_config::Uuid;
use hospes_toolstack::{Error, HOST_NAME, Host};
use hospes_units::DomId;

use crate::Outcome;
use crate::commands::shares::SCHEDULER;
use crate::list::HostMemory;
use crate::output::print;
use crate::table::Call;

/// The version of Xen whose guest interface and commands these are.
const XEN_MAJOR: u32 = 4;
const XEN_MINOR: u32 = 17;
const XEN_EXTRA: &str = ".0-hospes";
/// Width of the names in `info`.
const NAME_WIDTH: usize = 22;

pub(crate) fn vm_list(_: &Call) -> Outcome {
    let mut table = String::from("UUID                                  ID    name\n");
    let mut row = |uuid: Uuid, domid: DomId, name: &str| {
        // Writing to a string does not fail.
        let _ = writeln!(table, "{uuid}  {domid}    {name:<30}");
    };
    row(Uuid::NIL, DomId::HOST, HOST_NAME);
    for entry in Host::from_environment()?.entries()? {
        row(entry.record.uuid, entry.domid, &entry.record.name);
    }
    Ok(print(format_args!("{table}"))?)
}

pub(crate) fn info(call: &Call) -> Outcome {
    let numa = call.args.has("numa");
    let lines = facts()?;
    let mut text = String::new();
    match call.args.values.first() {
        Some(name) if !numa => {
            for (_, value) in lines.iter().filter(|(key, _)| key.starts_with(name)) {
                let _ = writeln!(text, "{value}");
            }
        }
        _ => {
            for (key, value) in &lines {
                // The topology stands between the memory and Xen, as in xl.
                if numa && *key == "xen_major" {
                    text.push_str(&topology());
                }
                let _ = writeln!(text, "{key:<NAME_WIDTH$} : {value}");
            }
        }
    }
    Ok(print(format_args!("{text}"))?)
}

/// Names and values in xl's order.
fn facts() -> anyhow::Result<Vec<(&'static str, String)>> {
    let name = rustix::system::uname();
    let memory = HostMemory::read(&Host::from_environment()?)?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpus = cpus();
    let cores: Vec<&Cpu> = cpus
        .iter()
        .filter(|cpu| cpu.socket == cpus[0].socket)
        .collect();
    let threads = cores.iter().filter(|cpu| cpu.core == cores[0].core).count();
    Ok(vec![
        ("host", name.nodename().to_string_lossy().into_owned()),
        ("release", name.release().to_string_lossy().into_owned()),
        ("version", name.version().to_string_lossy().into_owned()),
        ("machine", name.machine().to_string_lossy().into_owned()),
        ("nr_cpus", cpus.len().to_string()),
        ("max_cpu_id", max_cpu_id().to_string()),
        ("nr_nodes", nodes().len().max(1).to_string()),
        (
            "cores_per_socket",
            (cores.len() / threads.max(1)).max(1).to_string(),
        ),
        ("threads_per_core", threads.max(1).to_string()),
        ("cpu_mhz", cpu_mhz(&cpuinfo)),
        ("virt_caps", "hvm gnttab-v1".into()),
        ("total_memory", (memory.total_kib >> 10).to_string()),
        ("free_memory", (memory.free_kib >> 10).to_string()),
        ("sharing_freed_memory", "0".into()),
        ("sharing_used_memory", "0".into()),
        (
            "outstanding_claims",
            (memory.promised_kib >> 10).to_string(),
        ),
        ("free_cpus", "0".into()),
        ("xen_major", XEN_MAJOR.to_string()),
        ("xen_minor", XEN_MINOR.to_string()),
        ("xen_extra", XEN_EXTRA.into()),
        ("xen_version", format!("{XEN_MAJOR}.{XEN_MINOR}{XEN_EXTRA}")),
        (
            "xen_caps",
            "hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64".into(),
        ),
        ("xen_scheduler", SCHEDULER.into()),
        ("xen_pagesize", "4096".into()),
        ("platform_params", "virt_start=0xffff800000000000".into()),
        (
            "xen_changeset",
            concat!("hospes ", env!("CARGO_PKG_VERSION")).into(),
        ),
        ("xen_commandline", String::new()),
        ("cc_compiler", "rustc".into()),
        ("xend_config_format", "4".into()),
    ])
}

/// A CPU that is online.
struct Cpu {
    id: u32,
    core: u32,
    socket: u32,
}

fn cpus() -> Vec<Cpu> {
    let read = |id: u32, what: &str| {
        let path = format!("/sys/devices/system/cpu/cpu{id}/topology/{what}");
        fs::read_to_string(path)
            .ok()
            .and_then(|text| text.trim().parse().ok())
    };
    let online = ids("/sys/devices/system/cpu/online");
    online
        .into_iter()
        .map(|id| Cpu {
            id,
            core: read(id, "core_id").unwrap_or(id),
            socket: read(id, "physical_package_id").unwrap_or(0),
        })
        .collect()
}

fn max_cpu_id() -> u32 {
    ids("/sys/devices/system/cpu/possible")
        .last()
        .copied()
        .unwrap_or(0)
}

fn nodes() -> Vec<u32> {
    ids("/sys/devices/system/node/online")
}

/// The numbers of one of the lists in /sys; number 0 where it cannot be read.
fn ids(path: &str) -> Vec<u32> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let found = parse_ids(text.trim());
    if found.is_empty() { vec![0] } else { found }
}

/// `0-3,8`, the form of lists in /sys.
fn parse_ids(text: &str) -> Vec<u32> {
    text.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse().ok()?..=last.parse::<u32>().ok()?)
        })
        .flatten()
        .collect()
}

fn cpu_mhz(cpuinfo: &str) -> String {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("cpu MHz")?.split_once(':'))
        .map_or_else(|| "0.000".into(), |(_, value)| value.trim().to_string())
}

fn topology() -> String {
    let mut text = String::from("cpu_topology           :\ncpu:    core    socket     node\n");
    let nodes: Vec<(u32, Vec<u32>)> = nodes()
        .into_iter()
        .map(|node| {
            (
                node,
                ids(&format!("/sys/devices/system/node/node{node}/cpulist")),
            )
        })
        .collect();
    for cpu in cpus() {
        let node = nodes
            .iter()
            .find(|(_, cpus)| cpus.contains(&cpu.id))
            .map_or(0, |(node, _)| *node);
        let _ = writeln!(
            text,
            "{:3}:    {:4}     {:4}     {node:4}",
            cpu.id, cpu.core, cpu.socket
        );
    }
    text.push_str(
        "device topology        :\ndevice           node\nNo device topology data available\n",
    );
    text.push_str("numa_info              :\nnode:    memsize    memfree    distances\n");
    for (node, _) in &nodes {
        let read = |what: &str| {
            let path = format!("/sys/devices/system/node/node{node}/{what}");
            fs::read_to_string(path).unwrap_or_default()
        };
        let meminfo = read("meminfo");
        let mib = |what: &str| {
            let line = meminfo.lines().find(|line| line.contains(what));
            let kib = line.and_then(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok());
            kib.unwrap_or(0) >> 10
        };
        let distances = read("distance");
        let _ = writeln!(
            text,
            "{node:4}:    {:6}     {:6}      {}",
            mib("MemTotal:"),
            mib("MemFree:"),
            distances.split_whitespace().collect::<Vec<_>>().join(",")
        );
    }
    text
}

pub(crate) fn uptime(call: &Call) -> Outcome {
    Ok(print_uptime(call.args.has("s"), &call.args.values)?)
}

/// Name, id and time of running in seconds.
type Uptime = (String, u16, u64);

fn print_uptime(short: bool, wanted: &[String]) -> anyhow::Result<()> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let mut rows: Vec<Uptime> = vec![(HOST_NAME.into(), 0, host_uptime_s()?)];
    for entry in Host::from_environment()?.entries()? {
        let record = entry.record;
        let up = now.saturating_sub(record.created_unix_s);
        rows.push((record.name, entry.domid.0, up));
    }
    if !wanted.is_empty() {
        rows = wanted
            .iter()
            .map(|who| {
                let id = who.parse::<u16>().ok();
                rows.iter()
                    .find(|(name, domid, _)| id.map_or(name == who, |id| id == *domid))
                    .cloned()
                    .ok_or_else(|| Error::NoSuchDomain { who: who.clone() })
            })
            .collect::<Result<_, _>>()?;
    }
    let mut text = String::new();
    if !short {
        let _ = writeln!(text, "{:<33} {:>4} Uptime", "Name", "ID");
    }
    for (name, domid, up) in rows {
        let _ = if short {
            let (hour, minute, second) = (now / 3600 % 24, now / 60 % 60, now % 60);
            writeln!(
                text,
                " {hour:02}:{minute:02}:{second:02} up {}, {name} ({domid})",
                span(up, true)
            )
        } else {
            writeln!(text, "{name:<33} {domid:>4} {}", span(up, false))
        };
    }
    print(format_args!("{text}"))?;
    Ok(())
}

fn host_uptime_s() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/uptime").context("cannot read /proc/uptime")?;
    text.split('.')
        .next()
        .and_then(|seconds| seconds.parse().ok())
        .context("/proc/uptime is not a number")
}

/// Days, hours, minutes and, in the long form, seconds.
fn span(seconds: u64, short: bool) -> String {
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    let mut text = match days {
        0 => String::new(),
        1 => "1 day, ".into(),
        days => format!("{days} days, "),
    };
    let _ = write!(text, "{hours:2}:{minutes:02}");
    if !short {
        let _ = write!(text, ":{rest:02}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn span_has_the_forms_of_xl() {
        assert_eq!(span(5, false), " 0:00:05");
        assert_eq!(span(86_400 + 3600 * 11 + 125, false), "1 day, 11:02:05");
        assert_eq!(span(86_400 * 3 + 60, true), "3 days,  0:01");
    }

    #[test]
    fn parse_ids_reads_ranges() {
        assert_eq!(parse_ids("0-2,8"), [0, 1, 2, 8]);
        assert_eq!(parse_ids("5"), [5]);
        assert!(parse_ids("").is_empty());
    }

    #[test]
    fn cpu_mhz_takes_the_first_cpu() {
        let cpuinfo = "processor\t: 0\ncpu MHz\t\t: 2699.998\nprocessor\t: 1\ncpu MHz\t\t: 1.0\n";
        assert_eq!(cpu_mhz(cpuinfo), "2699.998");
        assert_eq!(cpu_mhz(""), "0.000");
    }
}
