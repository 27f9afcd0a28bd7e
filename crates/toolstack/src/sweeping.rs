//! Removing what is left of dead domains from the registry.
//!
//! A guest's process dies of its keeper's death, which takes seconds where it has much memory, and until then it has what the domain had: files of disks, memory. So nobody
//! hears of the domain's end before. All other commands need the lock of the directory meanwhile, so that is let go of, and all is looked at anew when it is taken again.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::PathBuf;

use hospes_units::DomId;

use crate::clock::Utc;
use crate::error::{Result, at};
use crate::log::log;
use crate::logfile::{LOG_MAX_BYTES, LogFile};
use crate::orphans::{end_started, is_dying, wait_for_deaths};
use crate::registry::{Entry, Record, Registry, is_locked, read_record};

/// A directory whose domain is dead.
struct Dead {
    dir: PathBuf,
    /// `None` where there was no domain yet.
    record: Option<Record>,
}

impl Dead {
    fn machine(&self) -> Option<u32> {
        self.record.as_ref()?.machine
    }
}

impl Registry {
    /// Takes the lock of the directory, when nothing is left there of dead domains. With all living ones by id, but for those whose records cannot be read.
    pub(crate) fn lock_swept(&self) -> Result<(File, Vec<Entry>)> {
        // One that does not die in time is not waited for again.
        let mut waited_for = Vec::new();
        loop {
            let lock = self.lock()?;
            let (entries, dead) = self.scan()?;
            let machines = dead.iter().filter_map(Dead::machine);
            let dying: Vec<u32> = machines
                .filter(|machine| !waited_for.contains(machine) && is_dying(*machine))
                .collect();
            if dying.is_empty() {
                self.bury(&dead)?;
                return Ok((lock, entries));
            }
            drop(lock);
            wait_for_deaths(&dying);
            waited_for.extend(dying);
        }
    }

    /// Living domains and dead ones, for the holder of the lock.
    fn scan(&self) -> Result<(Vec<Entry>, Vec<Dead>)> {
        let (mut entries, mut dead) = (Vec::new(), Vec::new());
        let domains = self.domains();
        let listing = match fs::read_dir(&domains) {
            Ok(listing) => listing,
            Err(fault) if fault.kind() == ErrorKind::NotFound => return Ok((entries, dead)),
            Err(fault) => return Err(at("cannot list", &domains)(fault)),
        };
        for item in listing {
            let item = item.map_err(at("cannot list", &domains))?;
            // What else may lie here is not ours.
            let Some(id) = item
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u16>().ok())
            else {
                continue;
            };
            let dir = item.path();
            match (is_locked(&dir), read_record(&dir)) {
                (false, record) => dead.push(Dead {
                    dir,
                    record: record.ok(),
                }),
                (true, Ok(record)) => entries.push(Entry {
                    domid: DomId(id),
                    record,
                    dir,
                }),
                // The others can go on without it.
                (true, Err(fault)) => log!(
                    "domain {id} lives and is left out, {fault}: to end it, kill the process that `fuser {}` names",
                    dir.join("lock").display()
                ),
            }
        }
        entries.sort_by_key(|entry| entry.domid);
        Ok((entries, dead))
    }

    /// Removes what is left of dead domains, for the holder of the lock: the number of a process that is gone becomes no other machine process meanwhile.
    fn bury(&self, dead: &[Dead]) -> Result<()> {
        let machines: Vec<u32> = dead.iter().filter_map(Dead::machine).collect();
        end_started(&machines);
        for Dead { dir, record } in dead {
            if let Some(record) = record {
                self.note_death(record);
            }
            fs::remove_dir_all(dir)
                .map_err(at("cannot remove what is left of a dead domain in", dir))?;
        }
        Ok(())
    }

    /// A line in the log of a domain whose process could not write one any more.
    fn note_death(&self, record: &Record) {
        let log = self.paths.domain_log(&record.name);
        // Without a log there is nobody to tell.
        if let Ok(mut log) = LogFile::open(&log, LOG_MAX_BYTES) {
            let line = format!(
                "{} The domain process [pid {}] was killed, by a signal or for want of memory, and the domain with it\n",
                Utc::now(),
                record.pid
            );
            let _ = log.append(line.as_bytes());
        }
    }
}
