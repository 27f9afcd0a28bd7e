//! Shares of the host's CPUs: `sched-credit` and `sched-credit2`, with xl's columns.

use hospes_toolstack::{Answer, Error, HOST_NAME, Host, Share, host_cpus};

use crate::Outcome;
use crate::commands::{failed, find_but_host};
use crate::list::note;
use crate::output::{print, say};
use crate::table::Call;

/// The one pool there is, as in `list -c`.
const POOL: &str = "Pool-0";
/// What schedules its CPUs.
pub(crate) const SCHEDULER: &str = "linux";

/// Nothing limits how often Linux changes between the vCPUs, nor are there slices of a set length.
const CREDIT_PARAMETERS: &str = "tslice=0ms ratelimit=0us migration-delay=0us";
const CREDIT2_PARAMETERS: &str = "ratelimit=0us";

pub(crate) fn credit(call: &Call) -> Outcome {
    shares(call, CREDIT_PARAMETERS)
}

pub(crate) fn credit2(call: &Call) -> Outcome {
    shares(call, CREDIT2_PARAMETERS)
}

pub(crate) fn cpupools(call: &Call) -> Outcome {
    if let Some(pool) = call.args.values.first().filter(|pool| !is_pool(pool)) {
        return failed(&format!(
            "Pool '{pool}' does not exist: there is {POOL} only"
        ));
    }
    let cpus = host_cpus().cpus;
    let text = if call.args.has("cpus") {
        let numbers: Vec<String> = cpus.iter().map(|cpu| cpu.to_string()).collect();
        format!("{:<19}CPU list\n{POOL:<19}{}\n", "Name", numbers.join(","))
    } else {
        // Domain-0 is one, too.
        let domains = Host::from_environment()?.entries()?.len() + 1;
        pool_table(cpus.iter().count(), domains)
    };
    Ok(print(format_args!("{text}"))?)
}

fn pool_table(cpus: usize, domains: usize) -> String {
    format!(
        "{:<19}CPUs   Sched     Active   Domain count\n{POOL:<19}{cpus:>3} {SCHEDULER:>9}       y     {domains:>4}\n",
        "Name"
    )
}

/// Its name or, as everywhere in xl, its number.
fn is_pool(text: &str) -> bool {
    matches!(text, POOL | "0")
}

fn shares(call: &Call, parameters: &str) -> Outcome {
    let args = &call.args;
    let weight = number(args.value("weight"), "weight", 1)?;
    let cap = number(args.value("cap"), "cap", 0)?;
    let changes = weight.is_some() || cap.is_some();
    let domain = args.value("domain");
    let pool = args.value("cpupool");
    if (pool.is_some() || args.has("schedparam")) && (domain.is_some() || changes) {
        return failed("Specifying a cpupool or schedparam is not allowed with domain options.");
    }
    if let Some(pool) = pool.filter(|pool| !is_pool(pool)) {
        return failed(&format!("unknown cpupool '{pool}': there is {POOL} only"));
    }
    let host = Host::from_environment()?;
    let of_pool = format!("Cpupool {POOL}: {parameters}\n");
    if args.has("schedparam") {
        return Ok(print(format_args!("{of_pool}"))?);
    }
    let Some(who) = domain else {
        if changes {
            return failed("Must specify a domain.");
        }
        let (table, notes) = all(&host)?;
        print(format_args!("{of_pool}{table}"))?;
        say(format_args!("{notes}"));
        return Ok(());
    };
    if !changes {
        return Ok(print(format_args!("{}{}", header(), one(&host, who)?))?);
    }
    match find_but_host(&host, who, "its share of the CPUs is")? {
        Some(entry) => Ok(host.set_share(&entry.domid.to_string(), weight, cap)?),
        None => Ok(()),
    }
}

/// A number from `least` to 65535, the range of Xen's interface.
fn number(text: Option<&str>, what: &str, least: u16) -> Result<Option<u16>, crate::Failure> {
    let Some(text) = text else {
        return Ok(None);
    };
    match text.parse::<u16>() {
        Ok(number) if number >= least => Ok(Some(number)),
        _ => Err(crate::Failure::Failed(anyhow::anyhow!(
            "{what} \"{text}\" out of range, valid values are within range from {least} to {}",
            u16::MAX
        ))),
    }
}

fn header() -> String {
    format!("{:<33} {:>4} {:>6} {:>4}\n", "Name", "ID", "Weight", "Cap")
}

fn row(name: &str, domid: u16, share: Share) -> String {
    format!(
        "{name:<33} {domid:>4} {:>6} {:>4}\n",
        share.weight, share.cap
    )
}

/// Programs of the host, which Domain-0 stands for, have the share of a domain of which nothing is said.
fn of_host() -> String {
    row(HOST_NAME, 0, Share::DEFAULT)
}

fn one(host: &Host, who: &str) -> Result<String, Error> {
    match host.find(who) {
        Ok(entry) => {
            let share = host.share(&entry.domid.to_string())?;
            Ok(row(&entry.record.name, entry.domid.0, share))
        }
        Err(Error::Host) => Ok(of_host()),
        Err(fault) => Err(fault),
    }
}

/// The table, and what is to be said of domains that do not answer.
fn all(host: &Host) -> Result<(String, String), Error> {
    let mut table = header() + &of_host();
    let mut notes = String::new();
    for (entry, answer) in host.shares_of(host.entries()?) {
        match answer {
            Answer::Told(share) => {
                table.push_str(&row(&entry.record.name, entry.domid.0, share));
            }
            Answer::NotYet => {}
            Answer::Silent(fault) => notes.push_str(&note(&entry, &fault)),
        }
    }
    Ok((table, notes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_columns_of_xl() {
        let share = Share {
            weight: 512,
            cap: 50,
        };
        assert_eq!(
            header() + &row("web", 3, share),
            "Name                                ID Weight  Cap\n\
             web                                  3    512   50\n"
        );
    }
    #[test]
    fn pools_have_the_columns_of_xl() {
        assert_eq!(
            pool_table(4, 12),
            "Name               CPUs   Sched     Active   Domain count\n\
             Pool-0               4     linux       y       12\n"
        );
    }
}
