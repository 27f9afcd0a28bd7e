//! Virtual CPUs: `vcpu-list`, `vcpu-pin`, `vcpu-set`.

use std::fmt::Write;
use std::fs;

use hospes_config::CpuList;
use hospes_toolstack::{Answer, Error, HOST_NAME, Host, VcpuInfo, host_cpus, resolve};

use crate::commands::{failed, find_but_host};
use crate::list::note;
use crate::output::{print, say};
use crate::table::Call;
use crate::{Failure, Outcome};

pub(crate) fn list(call: &Call) -> Outcome {
    Ok(list_of(&call.args.values)?)
}

fn list_of(wanted: &[String]) -> anyhow::Result<()> {
    let host = Host::from_environment()?;
    let mut table = format!(
        "{:<32} {:>5} {:>5} {:>5} {:>5} {:>9} Affinity (Hard / Soft)\n",
        "Name", "ID", "VCPU", "CPU", "State", "Time(s)"
    );
    let mut notes = String::new();
    if wanted.is_empty() {
        table.push_str(&rows(HOST_NAME, 0, &of_host()));
        for (entry, answer) in host.vcpus_of(host.entries()?) {
            match answer {
                Answer::Told(vcpus) => {
                    table.push_str(&rows(&entry.record.name, entry.domid.0, &vcpus));
                }
                Answer::NotYet => {}
                Answer::Silent(fault) => notes.push_str(&note(&entry, &fault)),
            }
        }
    }
    for who in wanted {
        if who == "0" || who == HOST_NAME {
            table.push_str(&rows(HOST_NAME, 0, &of_host()));
            continue;
        }
        let entry = host.find(who)?;
        let vcpus = host.vcpus(who)?;
        table.push_str(&rows(&entry.record.name, entry.domid.0, &vcpus));
    }
    print(format_args!("{table}"))?;
    say(format_args!("{notes}"));
    Ok(())
}

fn rows(name: &str, domid: u16, vcpus: &[VcpuInfo]) -> String {
    let mut text = String::new();
    for info in vcpus {
        let flag = |set: bool, letter: char| if set { letter } else { '-' };
        let cpu = match info.host_cpu {
            Some(cpu) if info.online => cpu.to_string(),
            _ => "-".into(),
        };
        let state = if info.online {
            format!("{}{}-", flag(info.running, 'r'), flag(info.blocked, 'b'))
        } else {
            "--p".into()
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{name:<32} {domid:>5} {:>5} {cpu:>4} {state:>5} {:>9.1}  {} / {}",
            info.vcpu,
            info.time_ns as f64 / 1e9,
            info.hard.as_deref().unwrap_or("all"),
            info.soft.as_deref().unwrap_or("all"),
        );
    }
    text
}

/// The host's own CPUs, as those of Domain-0.
fn of_host() -> Vec<VcpuInfo> {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks_per_s = rustix::param::clock_ticks_per_second().max(1);
    host_cpus()
        .cpus
        .iter()
        .map(|cpu| VcpuInfo {
            vcpu: cpu,
            online: true,
            running: true,
            blocked: false,
            host_cpu: Some(cpu),
            time_ns: crate::list::busy_ticks(&stat, &format!("cpu{cpu} "))
                .unwrap_or(0)
                .saturating_mul(1_000_000_000 / ticks_per_s),
            hard: None,
            soft: None,
        })
        .collect()
}

pub(crate) fn pin(call: &Call) -> Outcome {
    let host = Host::from_environment()?;
    let who = call.args.at(0);
    let vcpu = match call.args.at(1) {
        "all" if call.args.has("force") => {
            return failed("Error: --force and 'all' as VCPU not allowed.");
        }
        "all" => None,
        text => match text.parse() {
            Ok(vcpu) => Some(vcpu),
            Err(_) => return failed(&format!("Error: Invalid argument {text} as VCPU.")),
        },
    };
    let hard = cpus(call.args.at(2))?;
    let soft = match call.args.values.get(3) {
        Some(text) => cpus(text)?,
        None => None,
    };
    let Some(entry) = find_but_host(&host, who, "the CPUs it runs on are")? else {
        return Ok(());
    };
    if call.global.dry_run {
        let mut line = format!("cpumap: {}", shown(hard.as_ref())?);
        if let Some(soft) = &soft {
            line.push_str(&format!(" {}", shown(Some(soft))?));
        }
        return Ok(print(format_args!("{line}\n"))?);
    }
    Ok(host.pin(&entry.domid.to_string(), vcpu, hard, soft)?)
}

/// `None` where it is to stay as it is.
fn cpus(text: &str) -> Result<Option<CpuList>, Failure> {
    match text {
        "-" => Ok(None),
        text => Ok(Some(text.parse()?)),
    }
}

/// What a list means here.
fn shown(list: Option<&CpuList>) -> Result<String, Failure> {
    let Some(list) = list else {
        return Ok("-".into());
    };
    let set = resolve(list, &host_cpus())?;
    Ok(set.map_or("all".into(), |set| set.to_string()))
}

pub(crate) fn set(call: &Call) -> Outcome {
    let Ok(wanted) = call.args.at(1).parse::<u32>() else {
        return failed("Error: Invalid argument.");
    };
    let host = Host::from_environment()?;
    let Some(entry) = find_but_host(&host, call.args.at(0), "the number of its CPUs is")? else {
        return Ok(());
    };
    let physical = host_cpus().cpus.iter().count() as u32;
    let online = host.info(&entry).map(|info| info.vcpus_online);
    let Some(online) = online else {
        return Err(Error::Gone { domid: entry.domid }.into());
    };
    if !call.args.has("ignore-host") && wanted > online && wanted > physical {
        return failed(&format!(
            "You are overcommmitting! You have {physical} physical CPUs and want {wanted} vCPUs! Aborting, use --ignore-host to continue"
        ));
    }
    Ok(host.set_vcpus(&entry.domid.to_string(), wanted)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_columns_of_xl() {
        let running = VcpuInfo {
            vcpu: 0,
            online: true,
            running: true,
            blocked: false,
            host_cpu: Some(1),
            time_ns: 12_340_000_000,
            hard: Some("0-1".into()),
            soft: None,
        };
        let offline = VcpuInfo {
            vcpu: 1,
            ..VcpuInfo::default()
        };
        let text = rows("web", 3, &[running, offline]);
        assert_eq!(
            text,
            "web                                  3     0    1   r--      12.3  0-1 / all\n\
             web                                  3     1    -   --p       0.0  all / all\n"
        );
    }
}
