//! Domains that are saved when the host goes down and restored when it comes back.
//!
//! A file in the directory is the state of a domain that has not run since: its disks are as the guest left them. Of a domain that has, it would destroy the
//! file systems. So before a restored domain runs its file is set aside under a hidden name, and so is the file of a domain that runs for another reason.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use hospes_config::{DomainConfig, Uuid};
use hospes_toolstack::{AfterSave, Entry, Error, Host, SavedDomain};

use crate::commands::saving::warn_of_disks;
use crate::output::{Line, causes, tell};

/// Saves all domains that run, each in a file of its name. Those that cannot be saved go on; how many they are.
pub(crate) fn save_all(host: &Host, directory: &Path) -> anyhow::Result<usize> {
    DirBuilder::new()
        .recursive(true)
        // Guests' memory has their secrets.
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("cannot make the directory {}", directory.display()))?;
    let mut failed = 0;
    for entry in host.entries()? {
        // The ones before have taken their time.
        let Some(entry) = living(host, entry.record.uuid)? else {
            continue;
        };
        let Entry { domid, record, .. } = &entry;
        let file = directory.join(&record.name);
        let saved = save(host, &entry, &file);
        if let Err(fault) = &saved {
            failed += 1;
            tell!(
                "Domain {domid} ({}) is not saved and has to be shut down: {}",
                record.name,
                causes(fault)
            );
        }
        // What has been saved for sure or perhaps stays; any other file is of another time.
        let unsure = matches!(
            saved.as_ref().map_err(|fault| fault.downcast_ref()),
            Err(Some(Error::SavedUnsure { .. }))
        );
        let is_of_now = match saved {
            Ok(saved) => saved,
            Err(_) => unsure && living(host, record.uuid)?.is_none(),
        };
        if !is_of_now
            && is_file(&file)
            && let Err(fault) = supersede(&file)
        {
            failed += 1;
            tell!("{}", causes(&fault));
        }
    }
    Ok(failed)
}

/// False for a domain that has ended, of which there is nothing to be saved.
fn save(host: &Host, entry: &Entry, file: &Path) -> anyhow::Result<bool> {
    let name = &entry.record.name;
    if host
        .info(entry)
        .is_none_or(|domain| domain.shutdown.is_some())
    {
        return Ok(false);
    }
    if name.starts_with('.') {
        bail!("its name begins with a dot, and hidden files are not restored");
    }
    tell!(
        "Saving domain {} ({name}) to {}",
        entry.domid,
        file.display()
    );
    let mut line = Line::new("Saved");
    let who = entry.domid.to_string();
    host.save(&who, file, None, AfterSave::Destroy, &mut |pages| {
        line.show(pages)
    })?;
    line.end();
    Ok(true)
}

fn living(host: &Host, uuid: Uuid) -> anyhow::Result<Option<Entry>> {
    let mut entries = host.entries()?.into_iter();
    Ok(entries.find(|entry| entry.record.uuid == uuid))
}

fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file())
}

/// A saved domain that could not be restored, whose file is there still.
pub(crate) struct Unrestored {
    /// It is called so by the file, and perhaps otherwise by what is in it.
    name: OsString,
    config: Option<Box<DomainConfig>>,
}

impl Unrestored {
    /// Whether a configuration is that of the same domain, or of one that changes its disks.
    pub(crate) fn is(&self, other: &DomainConfig) -> bool {
        let is_same = |config: &DomainConfig| {
            let written = |config: &DomainConfig| {
                let disks = config.disks.iter().filter(|disk| !disk.read_only);
                let targets = disks.filter_map(|disk| disk.target.clone());
                targets.collect::<Vec<PathBuf>>()
            };
            let disks = written(config);
            config.name == other.name
                || config.uuid.is_some() && config.uuid == other.uuid
                || written(other).iter().any(|disk| disks.contains(disk))
        };
        self.name == *other.name || self.config.as_deref().is_some_and(is_same)
    }
}

/// Restores all domains that were saved in a directory, in the order of their names, and removes the files of those that run.
pub(crate) fn restore_all(host: &Host, directory: &Path) -> anyhow::Result<Vec<Unrestored>> {
    let mut unrestored = Vec::new();
    for file in files(directory)? {
        let shown = file.display();
        let mut config = None;
        match restore(host, &file, &mut config) {
            Ok(true) => tell!("{shown}: restored"),
            Ok(false) => {}
            Err(fault) => {
                tell!("{shown}: not restored: {}", causes(&fault));
                unrestored.push(Unrestored {
                    name: file.file_name().unwrap_or_default().into(),
                    config,
                });
            }
        }
    }
    Ok(unrestored)
}

fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let fault = || format!("cannot list {}", directory.display());
    let listing = match fs::read_dir(directory) {
        Ok(listing) => listing,
        // Nothing was ever saved.
        Err(fault) if fault.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(fault)?,
    };
    let mut files = Vec::new();
    for item in listing {
        // A file that is not seen is a domain that is started anew.
        let item = item.with_context(fault)?;
        let is_hidden = item.file_name().as_encoded_bytes().starts_with(b".");
        if !is_hidden && is_file(&item.path()) {
            files.push(item.path());
        }
    }
    files.sort();
    Ok(files)
}

/// False where the domain runs already. `config` is what the file says of it, as far as that can be read.
fn restore(
    host: &Host,
    file: &Path,
    config: &mut Option<Box<DomainConfig>>,
) -> anyhow::Result<bool> {
    let saved = SavedDomain::open(file)?;
    let saved_config = config.insert(Box::new(saved.config.clone()));
    let is_it = |entry: &Entry| {
        entry.record.name == saved_config.name || saved_config.uuid == Some(entry.record.uuid)
    };
    if host.entries()?.iter().any(is_it) {
        supersede(file)?;
        return Ok(false);
    }
    warn_of_disks(&saved);
    let mut line = Line::new("Restored");
    let created = host.restore(saved, true, &mut |pages| line.show(pages))?;
    line.end();
    let who = created.domid.to_string();
    let aside = match set_aside(file) {
        Ok(aside) => aside,
        Err(fault) => {
            host.destroy(&who)?;
            return Err(fault);
        }
    };
    host.unpause(&who).with_context(|| {
        format!(
            "it is not known whether it has run; what was saved is in {}",
            aside.display()
        )
    })?;
    if let Err(fault) = fs::remove_file(&aside) {
        tell!("{} is of no use any more: {fault}", aside.display());
    }
    Ok(true)
}

/// Sets the file of a domain that runs aside, and says so.
fn supersede(file: &Path) -> anyhow::Result<()> {
    let aside = set_aside(file)?;
    tell!(
        "{}: its domain has run since it was saved: it is not restored, and kept as {}",
        file.display(),
        aside.display()
    );
    Ok(())
}

/// Gives a file the name under which it is not restored, for good.
fn set_aside(file: &Path) -> anyhow::Result<PathBuf> {
    let mut name = OsString::from(".");
    name.push(file.file_name().unwrap_or_default());
    name.push(".old");
    let aside = file.with_file_name(name);
    let directory = file.parent().unwrap_or(Path::new("/"));
    fs::rename(file, &aside)
        .and_then(|()| File::open(directory)?.sync_all())
        .with_context(|| {
            format!(
                "{} cannot be renamed, and must not be restored behind a run of its domain",
                file.display()
            )
        })?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hospes_config::{Source, load};

    fn config(text: &str) -> DomainConfig {
        let text = format!("type='pvh'\nkernel='/k'\nmemory=64\n{text}");
        let (config, diagnostics) = load(&[Source {
            name: "test",
            text: &text,
        }]);
        config.unwrap_or_else(|| panic!("{diagnostics:?}"))
    }

    #[test]
    fn unrestored_is_what_has_its_name_uuid_or_disk() {
        const UUID: &str = "uuid='11111111-2222-3333-4444-555555555555'";
        let saved = format!("name='web'\n{UUID}\ndisk=['/a,raw,xvda,w','/iso,raw,xvdb,r']");
        let unrestored = Unrestored {
            name: "file".into(),
            config: Some(Box::new(config(&saved))),
        };
        for same in [
            "name='file'",
            "name='web'",
            &format!("name='other'\n{UUID}"),
            "name='other'\ndisk=['/a,raw,xvdc,w']",
        ] {
            assert!(unrestored.is(&config(same)), "{same}");
        }
        for other in ["", "disk=['/a,raw,xvdc,r']", "disk=['/iso,raw,xvdb,r']"] {
            let other = config(&format!("name='other'\n{other}"));
            assert!(!unrestored.is(&other), "{other:?}");
        }
        let unread = Unrestored {
            name: "web".into(),
            config: None,
        };
        assert!(unread.is(&config("name='web'")));
        assert!(!unread.is(&config("name='other'")));
    }
}
