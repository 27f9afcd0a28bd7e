//! `dmesg`: the logs of all domain processes as one.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use hospes_toolstack::{Host, utc_now};

use crate::Outcome;
use crate::output::print;
use crate::table::Call;

/// What is read of each log, from its end, in bytes.
const TAIL_BYTES: u64 = 256 << 10;
/// In the run-time directory: the time up to which messages are not shown.
const CLEARED: &str = "dmesg-cleared";
/// How often the clock is looked at for the end of a second.
const TICK: Duration = Duration::from_millis(10);

pub(crate) fn dmesg(call: &Call) -> Outcome {
    Ok(show(call.args.has("clear"))?)
}

fn show(clear: bool) -> anyhow::Result<()> {
    let host = Host::from_environment()?;
    let paths = host.paths();
    let marker = paths.run.join(CLEARED);
    let cleared = fs::read_to_string(&marker).unwrap_or_default();
    let now = utc_now();
    // Times are of a second, which has to be over before the logs are read: nothing that comes in the rest of it is cleared unseen.
    while clear && utc_now() == now {
        std::thread::sleep(TICK);
    }
    let mut lines = Vec::new();
    for (name, text) in logs(&paths.log)? {
        lines.extend(messages(&name, &text, cleared.trim()));
    }
    lines.sort();
    for (_, line) in &lines {
        print(format_args!("{line}\n"))?;
    }
    if clear {
        paths.create()?;
        fs::write(&marker, now).with_context(|| format!("cannot write {}", marker.display()))?;
    }
    Ok(())
}

/// Name and end of each log that is not of a console.
fn logs(directory: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let listing = match fs::read_dir(directory) {
        Ok(listing) => listing,
        Err(fault) if fault.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(fault) => {
            return Err(fault).with_context(|| format!("cannot list {}", directory.display()));
        }
    };
    let mut logs = Vec::new();
    for item in listing.flatten() {
        let file = item.file_name().to_string_lossy().into_owned();
        let Some(name) = file.strip_suffix(".log") else {
            continue;
        };
        if name.ends_with(".console") {
            continue;
        }
        let path = item.path();
        let text = tail(&path).with_context(|| format!("cannot read {}", path.display()))?;
        logs.push((name.to_string(), text));
    }
    Ok(logs)
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    // The first line is a whole one only at the beginning of the file.
    Ok(match text.split_once('\n') {
        Some((_, rest)) if length > TAIL_BYTES => rest.to_string(),
        _ => text,
    })
}

/// Time and text of the lines that are newer than `cleared`. A line without a time belongs to the one before.
fn messages(name: &str, text: &str, cleared: &str) -> Vec<((String, usize), String)> {
    let mut time = String::new();
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if let Some(stamp) = stamp(line) {
            time = stamp.to_string();
        }
        if time.is_empty() || time.as_str() > cleared {
            found.push(((time.clone(), number), format!("({name}) {line}")));
        }
    }
    found
}

/// The time a line begins with: `2026-11-21T02:19:00Z`, which sorts as it is.
fn stamp(line: &str) -> Option<&str> {
    let stamp = line.split(' ').next()?;
    let shape = stamp.bytes().map(|b| match b {
        b'0'..=b'9' => b'0',
        other => other,
    });
    shape.eq(*b"0000-00-00T00:00:00Z").then_some(stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_leaves_out_what_was_cleared() {
        let text = "2026-11-21T02:19:00Z old\n  more of it\n2026-11-21T02:19:02Z new\n  and more\n";
        let lines = |cleared| -> Vec<String> {
            let found = messages("web", text, cleared);
            found.into_iter().map(|(_, line)| line).collect()
        };
        assert_eq!(lines("").len(), 4);
        assert_eq!(
            lines("2026-11-21T02:19:01Z"),
            ["(web) 2026-11-21T02:19:02Z new", "(web)   and more"]
        );
        assert!(lines("2026-11-21T02:19:02Z").is_empty());
    }

    #[test]
    fn stamp_takes_times_only() {
        assert_eq!(
            stamp("2026-11-21T02:19:00Z x"),
            Some("2026-11-21T02:19:00Z")
        );
        for line in ["", "x", "2026-11-21 x", "2026-11-21T02:19:00 x"] {
            assert_eq!(stamp(line), None);
        }
    }
}
