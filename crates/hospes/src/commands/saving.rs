//! Saving domains in files, and making domains of them.

use std::path::Path;

use anyhow::Context;
use hospes_toolstack::{AfterSave, Host, SavedDomain, UNATTENDED};

use crate::create::{Attend, config_in};
use crate::output::{Line, tell};
use crate::table::Call;
use crate::{Failure, Outcome};

pub(crate) fn save(call: &Call) -> Outcome {
    let (who, path) = (call.args.at(0), call.args.at(1));
    let config = call
        .args
        .values
        .get(2)
        .map(|file| config_in(file, "the domain goes on"));
    let config = config.transpose()?;
    let after = match (call.args.has("c"), call.args.has("p")) {
        (false, false) => AfterSave::Destroy,
        // As in xl, one that is to go on and to be paused is paused.
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
        tell!(
            "{}",
            crate::output::json(&crate::configured::to_json(&saved.config))
        );
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
