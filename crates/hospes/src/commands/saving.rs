//! Saving domains in files, and making domains of them.

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use hospes_toolstack::{AfterSave, Host, SavedDomain, UNATTENDED};

use crate::create::{Attend, config_in};
use crate::output::{say, tell};
use crate::table::Call;
use crate::{Failure, Outcome};

const PAGE_BYTES: u64 = 4096;
/// How often the line of progress is written anew.
const INTERVAL: Duration = Duration::from_millis(200);

pub(crate) fn save(call: &Call) -> Outcome {
    let (who, path) = (call.args.at(0), call.args.at(1));
    let config = call
        .args
        .values
        .get(2)
        .map(|file| config_in(file, "the domain goes on"));
    let config = config.transpose()?;
    let after = match (call.args.has("c"), call.args.has("p")) {
        (true, true) => return Err(Failure::Usage("give -c or -p, not both".into())),
        (false, false) => AfterSave::Destroy,
        (_, paused) => AfterSave::GoOn { paused },
    };
    if call.args.has("D") {
        tell!("note: a restored domain gets a new id, -D is ignored");
    }
    let host = Host::from_environment()?;
    let domid = host.find(who)?.domid;
    tell!("Saving domain {domid} to {path}");
    let mut line = Line::new("Saved");
    host.save(who, Path::new(path), config, after, &mut |pages| {
        line.show(pages)
    })
    .context("Failed to save the domain")?;
    line.end();
    Ok(())
}

pub(crate) fn restore(call: &Call) -> Outcome {
    let (config, path) = match &call.args.values[..] {
        [config, path] => (Some(config), path),
        [path] => (None, path),
        _ => return Err(Failure::Usage("give the file of a saved domain".into())),
    };
    let mut saved = SavedDomain::open(Path::new(path))?;
    if let Some(file) = config {
        saved.set_config(config_in(file, "no domain was restored")?);
    }
    if call.args.has("d") {
        tell!("{}", crate::output::json(&saved.config.to_json()));
    }
    for option in ["vncviewer", "vncviewer-autopass"] {
        if call.args.has(option) {
            tell!("note: there is no VNC server yet, --{option} is ignored");
        }
    }
    if call.args.has("e") {
        saved.config.on = UNATTENDED;
    }
    tell!("Loading the domain {} from {path}", saved.config.name);
    warn_of_disks(&saved);
    let host = Host::from_environment()?;
    let mut line = Line::new("Restored");
    let attend = Attend::read(&call.args);
    let paused = attend.begins_paused();
    let created = host.restore(saved, paused, &mut |pages| line.show(pages))?;
    line.end();
    tell!("It is domain {}", created.domid);
    Ok(attend.stay(&host, created)?)
}

/// The guest would write what it remembers of its disks over what is there now.
pub(crate) fn warn_of_disks(saved: &SavedDomain) {
    for change in saved.changed_disks() {
        tell!(
            "WARNING: {change}: where it is no copy of what it was then, destroy the domain at once, before the guest destroys its file system"
        );
    }
}

/// How far it has come: on a terminal a line that is written over, elsewhere one at the end.
pub(crate) struct Line {
    done: &'static str,
    bytes: u64,
    terminal: bool,
    shown: Option<Instant>,
}

impl Line {
    pub(crate) fn new(done: &'static str) -> Line {
        Line {
            done,
            bytes: 0,
            terminal: std::io::stderr().is_terminal(),
            shown: None,
        }
    }

    pub(crate) fn show(&mut self, pages: u64) {
        self.show_bytes(pages * PAGE_BYTES);
    }

    pub(crate) fn show_bytes(&mut self, bytes: u64) {
        self.bytes = bytes;
        if self.terminal && self.shown.is_none_or(|shown| shown.elapsed() >= INTERVAL) {
            self.shown = Some(Instant::now());
            say(format_args!("\r{} MiB", bytes >> 20));
        }
    }

    pub(crate) fn end(&self) {
        let start = if self.terminal { "\r" } else { "" };
        let mib = self.bytes >> 20;
        say(format_args!("{start}{} {mib} MiB\n", self.done));
    }
}
