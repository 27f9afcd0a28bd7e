//! `domains`: what the host starts and stops with itself.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hospes_toolstack::{CreateRequest, Entry, Host, Until, Watch};

use crate::commands::life::describe_end;
use crate::keeping::{Unrestored, restore_all, save_all};
use crate::output::{causes, tell};
use crate::table::Call;
use crate::{Failure, Outcome, create};

/// Configuration files of the domains that are started with the host, as /etc/xen/auto.
const AUTO: &str = "/etc/hospes/auto";
/// How long domains may take to shut down, in seconds: less than systemd gives the service.
const TIMEOUT_S: u64 = 120;

pub(crate) fn domains(call: &Call) -> Outcome {
    let directory = call.args.value("dir").unwrap_or(AUTO);
    let timeout = match call.args.value("timeout").map(str::parse) {
        None => TIMEOUT_S,
        Some(Ok(seconds)) => seconds,
        Some(Err(_)) => return Err(Failure::Usage("--timeout wants a number of seconds".into())),
    };
    let [saved, restored] =
        ["save", "restore"].map(|option| call.args.value(option).map(Path::new));
    match (call.args.at(0), saved, restored) {
        ("start", None, _) => start(Path::new(directory), restored)?,
        ("stop", _, None) => stop(Duration::from_secs(timeout), saved)?,
        ("start" | "stop", ..) => {
            return Err(Failure::Usage(
                "--restore belongs to start and --save to stop".into(),
            ));
        }
        (other, ..) => {
            return Err(Failure::Usage(format!(
                "`{other}' is neither start nor stop"
            )));
        }
    }
    Ok(())
}

/// Every file is tried, whatever becomes of the others. A saved domain that cannot be restored is not started in another way.
fn start(directory: &Path, saved: Option<&Path>) -> anyhow::Result<()> {
    let host = Host::from_environment()?;
    let unrestored = saved.map(|saved| restore_all(&host, saved)).transpose()?;
    let unrestored = unrestored.unwrap_or_default();
    let mut failed = unrestored.len();
    for file in files(directory)? {
        let shown = file.display();
        match start_one(&host, &file.to_string_lossy(), &unrestored) {
            Ok(done) => tell!("{shown}: {done}"),
            Err(fault) => {
                failed += 1;
                tell!("{shown}: {}", causes(&fault));
            }
        }
    }
    match failed {
        0 => Ok(()),
        1 => bail!("a domain could not be started"),
        _ => bail!("{failed} domains could not be started"),
    }
}

fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let listing = match fs::read_dir(directory) {
        Ok(listing) => listing,
        // Nothing is to be started.
        Err(fault) if fault.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(fault) => {
            return Err(fault).with_context(|| format!("cannot list {}", directory.display()));
        }
    };
    let mut files: Vec<PathBuf> = listing
        .flatten()
        .map(|item| item.path())
        .filter(|path| is_meant(path))
        .collect();
    files.sort();
    Ok(files)
}

/// Whether a file of the directory describes a domain: names need no ending, as in /etc/xen/auto, and what editors and packages leave is none. A
/// link that leads nowhere is meant too, so that the user hears of it.
fn is_meant(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
    let left = name.starts_with('.')
        || name.ends_with('~')
        || ending == "bak"
        || ending.starts_with("dpkg-")
        || ending.starts_with("rpm");
    !left && fs::metadata(path).map_or(true, |file| file.is_file())
}

/// What was done.
fn start_one(host: &Host, file: &str, unrestored: &[Unrestored]) -> anyhow::Result<String> {
    let (config, warnings) = create::checked(file)?;
    let name = &config.name;
    if host
        .entries()?
        .iter()
        .any(|entry| entry.record.name == *name)
    {
        return Ok(format!("domain {name} runs already"));
    }
    if unrestored.iter().any(|saved| saved.is(&config)) {
        return Ok(format!(
            "domain {name} is not started, for it was saved and could not be restored"
        ));
    }
    for warning in warnings {
        tell!("{warning}");
    }
    host.create(CreateRequest {
        config,
        paused: false,
    })?;
    Ok("started".into())
}

/// Saves what is to be saved and can be. Asks all others at once to end for good, waits for them together, and destroys those that are left.
fn stop(timeout: Duration, save: Option<&Path>) -> anyhow::Result<()> {
    let host = Host::from_environment()?;
    let unsaved = save.map_or(0, |directory| {
        save_all(&host, directory).unwrap_or_else(|fault| {
            tell!(
                "The domains are not saved and have to be shut down: {}",
                causes(&fault)
            );
            1
        })
    });
    let deadline = Instant::now() + timeout;
    let mut asked = Vec::new();
    for entry in host.entries()? {
        tell!(
            "Shutting down domain {} ({})",
            entry.domid,
            entry.record.name
        );
        // One that cannot be asked is destroyed, and does not keep the others from being asked.
        let watch = ask(&host, &entry).map_err(|fault| tell!("{fault}")).ok();
        asked.push((entry, watch));
    }
    let mut failed = 0;
    for (entry, watch) in asked {
        let ended = watch.and_then(|watch| {
            let ended = watch.wait_until(deadline);
            ended.unwrap_or_else(|fault| {
                tell!("{fault}");
                None
            })
        });
        match ended {
            Some(ended) => tell!("{}", describe_end(entry.domid, &ended)),
            None => tell!("Domain {} has not shut down: it is destroyed", entry.domid),
        }
        // One that has ended is waited for until it is gone.
        if !destroy(&host, &entry) {
            failed += 1;
        }
    }
    if failed > 0 {
        bail!("{failed} domains could not be ended");
    }
    if unsaved > 0 {
        bail!("not all domains could be saved");
    }
    Ok(())
}

/// Asks a guest to shut down; the watch is from before, so that an end that comes at once is not missed.
fn ask(host: &Host, entry: &Entry) -> hospes_toolstack::Result<Watch> {
    let who = entry.domid.to_string();
    let watch = host.watch(entry.domid, Until::Shutdown)?;
    // A paused guest cannot follow.
    host.unpause(&who)?;
    host.shutdown_for_good(&who)?;
    Ok(watch)
}

/// Ends the domain by its UUID, which a restart has not changed; true where it is gone.
fn destroy(host: &Host, entry: &Entry) -> bool {
    let ended = host.destroy_uuid(entry.record.uuid);
    if let Err(fault) = &ended {
        tell!("{fault}");
    }
    ended.is_ok()
}
