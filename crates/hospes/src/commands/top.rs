//! `top`: the domains and what they use, again and again. The columns are those of xentop(1) that mean something here.

use std::fmt::Write;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use hospes_sys::terminal::Raw;
use hospes_toolstack::{Answer, DomainInfo, Host};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::list::{HostMemory, host_info};
use crate::output::print;
use crate::table::Call;
use crate::{Failure, Outcome};

const DELAY_S: f64 = 3.0;
/// Clears the screen and puts the cursor at its beginning.
const CLEAR: &str = "\x1b[H\x1b[J";

pub(crate) fn top(call: &Call) -> Outcome {
    let delay = match call.args.value("delay").map(str::parse::<f64>) {
        None => DELAY_S,
        Some(Ok(seconds)) if seconds > 0.0 && seconds < 1e6 => seconds,
        Some(_) => {
            return Err(Failure::Usage(
                "-d wants a number of seconds above 0".into(),
            ));
        }
    };
    let terminal = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    let screen = terminal && !call.args.has("batch");
    let iterations = match call.args.value("iterations").map(str::parse::<u64>) {
        None if screen || call.args.has("batch") => u64::MAX,
        None => 1,
        Some(Ok(number)) if number > 0 => number,
        Some(_) => return Err(Failure::Usage("-i wants a number above 0".into())),
    };
    Ok(show(Duration::from_secs_f64(delay), screen, iterations)?)
}

fn show(delay: Duration, screen: bool, iterations: u64) -> anyhow::Result<()> {
    let host = Host::from_environment()?;
    let total_kib = HostMemory::read(&host)?.total_kib;
    let _raw = if screen { Some(Raw::enter()?) } else { None };
    let mut before = look(&host)?;
    let mut since = Instant::now();
    for number in 0..iterations {
        // Use is use between two looks: the first comes soon, so that there is something to see.
        let pause = if number == 0 {
            delay.min(Duration::from_millis(500))
        } else {
            delay
        };
        if wait(pause, screen)? {
            break;
        }
        let now = look(&host)?;
        let elapsed_ns = since.elapsed().as_nanos().max(1);
        since = Instant::now();
        let table = table(&before, &now, elapsed_ns, total_kib);
        before = now;
        if screen {
            print(format_args!("{CLEAR}{}", table.replace('\n', "\r\n")))?;
        } else {
            print(format_args!("{table}"))?;
        }
    }
    Ok(())
}

/// Waits for so long, or for the key that ends it; true where it was pressed.
fn wait(time: Duration, keys: bool) -> anyhow::Result<bool> {
    if !keys {
        std::thread::sleep(time);
        return Ok(false);
    }
    let deadline = Instant::now() + time;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let input = std::io::stdin();
        let mut descriptors = [PollFd::new(&input, PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut descriptors, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(fault) => return Err(fault.into()),
        }
        let mut typed = [0; 16];
        let length = rustix::io::read(&input, &mut typed)?;
        // q, Q, Ctrl-C, Ctrl-D; the end of the input too.
        if length == 0
            || typed[..length]
                .iter()
                .any(|key| b"qQ\x03\x04".contains(key))
        {
            return Ok(true);
        }
    }
}

fn look(host: &Host) -> anyhow::Result<Vec<DomainInfo>> {
    let answers = host.infos(host.entries()?).into_iter();
    let mut infos: Vec<DomainInfo> = answers
        .map(|(entry, answer)| match answer {
            Answer::Told(info) => info,
            Answer::NotYet | Answer::Silent(_) => entry.as_recorded(),
        })
        .collect();
    infos.insert(0, host_info(host, infos.iter())?);
    Ok(infos)
}

fn table(before: &[DomainInfo], now: &[DomainInfo], elapsed_ns: u128, total_kib: u64) -> String {
    let mut text = String::from("      NAME  STATE   CPU(sec) CPU(%)     MEM(k) MEM(%) VCPUS\n");
    for info in now {
        let past = before.iter().find(|past| past.domid == info.domid);
        let past_ns = past.map_or(info.cpu_time_ns, |past| past.cpu_time_ns);
        let used_ns = info.cpu_time_ns.saturating_sub(past_ns);
        let flag = |set: bool, letter: char| if set { letter } else { '-' };
        let state: String = [
            flag(info.dying, 'd'),
            flag(info.shutdown.is_some(), 's'),
            flag(info.blocked, 'b'),
            flag(false, 'c'),
            flag(info.paused, 'p'),
            flag(info.running, 'r'),
        ]
        .iter()
        .collect();
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:>10} {state} {:>10} {:>6.1} {:>10} {:>6.1} {:>5}",
            info.name,
            info.cpu_time_ns / 1_000_000_000,
            used_ns as f64 * 100.0 / elapsed_ns as f64,
            info.memory_kib,
            info.memory_kib as f64 * 100.0 / total_kib.max(1) as f64,
            info.vcpus_online,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use hospes_config::Uuid;

    #[test]
    fn table_shows_what_was_used_between_two_looks() {
        let info = |cpu_time_ns| DomainInfo {
            domid: 3,
            name: "web".into(),
            uuid: Uuid::NIL,
            memory_kib: 512,
            promised_kib: 0,
            vcpus_online: 2,
            cpu_time_ns,
            running: false,
            blocked: true,
            paused: false,
            shutdown: None,
            dying: false,
            waiting: Vec::new(),
            moving: false,
            held: None,
        };
        let text = table(
            &[info(4_000_000_000)],
            &[info(5_000_000_000)],
            2_000_000_000,
            1024,
        );
        let row: Vec<&str> = text
            .lines()
            .nth(1)
            .expect("a row")
            .split_whitespace()
            .collect();
        assert_eq!(row, ["web", "--b---", "5", "50.0", "512", "50.0", "2"]);
    }
}
