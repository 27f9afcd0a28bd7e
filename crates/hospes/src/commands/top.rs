//! `top`: the domains and what they use, again and again, with the columns of xentop(1).

use std::fmt::Write;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use hospes_sys::terminal::Raw;
use hospes_toolstack::{Answer, DomainInfo, EndReason, Host};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::list::{HostMemory, host_info};
use crate::output::print;
use crate::table::Call;
use crate::{Failure, Outcome, help};

const DELAY_S: f64 = 3.0;
/// Clears the screen and puts the cursor at its beginning.
const CLEAR: &str = "\x1b[H\x1b[J";
/// Where names are cut, and the least width of their column.
const NAME_WIDTH: usize = 10;
/// xentop counts in sectors.
const SECTOR: u64 = 512;

/// How the table is to look.
#[derive(Clone, Copy, Debug, Default)]
struct Style {
    /// Names are not cut.
    full_names: bool,
    /// Each row has the heading above it.
    repeat_heading: bool,
}

/// A domain and the most memory that it may have, in KiB.
type Row = (DomainInfo, u64);

pub(crate) fn top(call: &Call) -> Outcome {
    if call.args.has("version") {
        return Ok(print(format_args!("{}\n", help::version(&call.program)))?);
    }
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
    let style = Style {
        full_names: call.args.has("full-name"),
        repeat_heading: call.args.has("repeat-header"),
    };
    Ok(show(
        Duration::from_secs_f64(delay),
        screen,
        iterations,
        style,
    )?)
}

fn show(delay: Duration, screen: bool, iterations: u64, style: Style) -> anyhow::Result<()> {
    let host = Host::from_environment()?;
    let total_kib = HostMemory::read(&host)?.total_kib;
    let _raw = if screen { Some(Raw::enter()?) } else { None };
    let mut before = look(&host, total_kib)?;
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
        let now = look(&host, total_kib)?;
        let elapsed_ns = since.elapsed().as_nanos().max(1);
        since = Instant::now();
        let table = table(&before, &now, elapsed_ns, total_kib, style);
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

/// All domains; the host may have all of its memory.
fn look(host: &Host, total_kib: u64) -> anyhow::Result<Vec<Row>> {
    let answers = host.infos(host.entries()?).into_iter();
    let mut rows: Vec<Row> = answers
        .map(|(entry, answer)| {
            let info = match answer {
                Answer::Told(info) => info,
                Answer::NotYet | Answer::Silent(_) => entry.as_recorded(),
            };
            (info, entry.record.config.memory_max_kib())
        })
        .collect();
    let itself = host_info(host, rows.iter().map(|(info, _)| info))?;
    rows.insert(0, (itself, total_kib));
    Ok(rows)
}

fn table(before: &[Row], now: &[Row], elapsed_ns: u128, total_kib: u64, style: Style) -> String {
    let longest = now.iter().map(|(info, _)| info.name.chars().count()).max();
    let width = match longest {
        Some(longest) if style.full_names => longest.max(NAME_WIDTH),
        _ => NAME_WIDTH,
    };
    let heading = format!(
        "{:>width$}  STATE   CPU(sec) CPU(%)     MEM(k) MEM(%)  MAXMEM(k) MAXMEM(%) VCPUS NETS NETTX(k) NETRX(k) VBDS   VBD_OO   VBD_RD   VBD_WR  VBD_RSECT  VBD_WSECT SSID\n",
        "NAME"
    );
    let mut text = String::new();
    for (number, (info, max_kib)) in now.iter().enumerate() {
        if number == 0 || style.repeat_heading {
            text.push_str(&heading);
        }
        let past = before.iter().find(|(past, _)| past.domid == info.domid);
        let past_ns = past.map_or(info.cpu_time_ns, |(past, _)| past.cpu_time_ns);
        let used_ns = info.cpu_time_ns.saturating_sub(past_ns);
        let state = state(info);
        let share = |kib: u64| kib as f64 * 100.0 / total_kib.max(1) as f64;
        let traffic = &info.traffic;
        // Writing to a string does not fail. What the host's interface sends (NETTX) the guest receives. No request waits for want of resources (VBD_OO), and there are no security labels (SSID).
        let _ = writeln!(
            text,
            "{:>width$.width$} {state} {:>10} {:>6.1} {:>10} {:>6.1} {:>10} {:>9.1} {:>5} {:>4} {:>8} {:>8} {:>4} {:>8} {:>8} {:>8} {:>10} {:>10} {:>4}",
            info.name,
            info.cpu_time_ns / 1_000_000_000,
            used_ns as f64 * 100.0 / elapsed_ns as f64,
            info.memory_kib,
            share(info.memory_kib),
            max_kib,
            share(*max_kib),
            info.vcpus_online,
            traffic.vifs,
            traffic.received_bytes / 1024,
            traffic.sent_bytes / 1024,
            traffic.disks,
            0,
            traffic.reads,
            traffic.writes,
            traffic.read_bytes / SECTOR,
            traffic.written_bytes / SECTOR,
            0,
        );
    }
    text
}

/// The letters of xentop, where a domain that has crashed has not shut down.
fn state(info: &DomainInfo) -> String {
    let flag = |set: bool, letter: char| if set { letter } else { '-' };
    let has_crashed = matches!(info.shutdown, Some(EndReason::Crash(_)));
    let letters = [
        flag(info.dying, 'd'),
        flag(info.shutdown.is_some() && !has_crashed, 's'),
        flag(info.blocked, 'b'),
        flag(has_crashed, 'c'),
        flag(info.paused, 'p'),
        flag(info.running, 'r'),
    ];
    letters.iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hospes_config::Uuid;
    use hospes_toolstack::Traffic;

    fn info(name: &str, cpu_time_ns: u64) -> Row {
        let info = DomainInfo {
            domid: 3,
            name: name.into(),
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
            traffic: Traffic {
                vifs: 1,
                sent_bytes: 3000,
                received_bytes: 5000,
                disks: 2,
                reads: 7,
                writes: 8,
                read_bytes: 9 * 512,
                written_bytes: 10 * 512,
            },
            waiting: Vec::new(),
            moving: false,
            held: None,
        };
        (info, 768)
    }

    #[test]
    fn table_shows_what_was_used_between_two_looks() {
        let text = table(
            &[info("web", 4_000_000_000)],
            &[info("web", 5_000_000_000)],
            2_000_000_000,
            1024,
            Style::default(),
        );
        assert_eq!(
            text,
            "      NAME  STATE   CPU(sec) CPU(%)     MEM(k) MEM(%)  MAXMEM(k) MAXMEM(%) VCPUS NETS NETTX(k) NETRX(k) VBDS   VBD_OO   VBD_RD   VBD_WR  VBD_RSECT  VBD_WSECT SSID\n\
             \x20      web --b---          5   50.0        512   50.0        768      75.0     2    1        4        2    2        0        7        8          9         10    0\n"
        );
    }

    #[test]
    fn names_are_cut_but_where_all_of_them_is_wanted() {
        let rows = [info("a-long-name", 0), info("a", 0)];
        let first = |style| {
            let text = table(&[], &rows, 1, 1024, style);
            let columns = text
                .lines()
                .filter_map(|line| line.split_whitespace().next());
            columns.map(String::from).collect::<Vec<_>>()
        };
        assert_eq!(first(Style::default()), ["NAME", "a-long-nam", "a"]);
        let full = Style {
            full_names: true,
            repeat_heading: true,
        };
        assert_eq!(first(full), ["NAME", "a-long-name", "NAME", "a"]);
        let text = table(&[], &rows, 1, 1024, full);
        let mut widths = text.lines().map(str::len);
        let width = widths.next();
        assert!(widths.all(|other| Some(other) == width), "{text}");
    }
}
