//! The domains of a run-time directory: ids, records, and which of them still live.
//!
//! A domain lives as long as its process holds the lock on `domains/<id>/lock`. The kernel drops the lock with the
//! process, however it ends, so that nothing stale is ever taken for a domain, not even after its pid was reused.
//! Everything that adds, removes or renames a domain holds `<run>/lock`.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hospes_config::{DomainConfig, Uuid};
use hospes_units::DomId;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::clock::Utc;
use crate::error::{Error, Result, at};
use crate::guest_memory::guest_memory_bytes;
use crate::paths::Paths;

/// The first id that Xen reserves (`DOMID_FIRST_RESERVED`): ids are below it.
const FIRST_RESERVED_ID: u16 = 0x7ff0;
/// How long the lock of the directory is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// Longest record, in bytes.
const RECORD_MAX_BYTES: u64 = 64 << 10;

/// Name of domain 0.
pub const HOST_NAME: &str = "Domain-0";

/// What is written down about a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    pub uuid: Uuid,
    /// The domain process.
    pub pid: u32,
    /// The machine process, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<u32>,
    /// When the domain was created, in seconds since 1970.
    pub created_unix_s: u64,
    /// What it has now, with all that was attached and taken away.
    pub config: DomainConfig,
    /// What it is started with the next time, where that was set apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<DomainConfig>,
}

impl Record {
    /// The record of a domain of the calling process.
    pub fn new(config: &DomainConfig, uuid: Uuid) -> Record {
        Record {
            name: config.name.clone(),
            uuid,
            pid: std::process::id(),
            machine: None,
            created_unix_s: Utc::now().unix_s(),
            config: config.clone(),
            next: None,
        }
    }

    /// The configuration of the next start.
    pub(crate) fn next_config(&self) -> DomainConfig {
        let config = self.next.as_ref().unwrap_or(&self.config);
        DomainConfig {
            name: self.name.clone(),
            uuid: self.config.uuid,
            ..config.clone()
        }
    }

    /// The process that the guest is in.
    pub(crate) fn guest_process(&self) -> u32 {
        self.machine.unwrap_or(self.pid)
    }
}

/// A living domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub domid: DomId,
    pub dir: PathBuf,
    pub record: Record,
}

impl Entry {
    /// Memory that it has not used yet and still may, in bytes, as far as is seen from outside.
    pub(crate) fn promised_bytes(&self) -> u64 {
        let memory = self.record.config.memory_kib() << 10;
        // A process that is gone by now needs no more.
        let used = guest_memory_bytes(self.record.guest_process()).unwrap_or(memory);
        memory.saturating_sub(used)
    }
}

/// The id and directory of a domain, held by its process.
#[derive(Debug)]
pub(crate) struct Slot {
    domid: DomId,
    dir: PathBuf,
    /// Holds the lock.
    _lock: File,
}

impl Slot {
    pub fn domid(&self) -> DomId {
        self.domid
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Registry {
    pub(crate) paths: Paths,
}

impl Registry {
    pub fn new(paths: &Paths) -> Registry {
        Registry {
            paths: paths.clone(),
        }
    }

    pub(crate) fn domains(&self) -> PathBuf {
        self.paths.run.join("domains")
    }

    /// Takes the lock of the directory; it is released when the file is dropped.
    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.paths.run.join("lock");
        let file = open_lock(&path).map_err(at("cannot open", &path))?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Locked { path }),
                Err(rustix::io::Errno::INTR) => {}
                Err(fault) => return Err(at("cannot lock", &path)(fault.into())),
            }
        }
    }

    /// All living domains by id, but for those whose records cannot be read. What is left of dead ones is removed.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        if !self.paths.has_run()? {
            return Ok(Vec::new());
        }
        self.lock_swept().map(|(_, entries)| entries)
    }

    /// Gives a new domain its id and directory. Name and UUID have to be unused.
    pub fn allocate(&self, record: &Record) -> Result<Slot> {
        let (_lock, entries) = self.lock_swept()?;
        self.allocate_locked(&entries, record, None)
    }

    /// Gives a domain the place of `old`, which ends: under one lock, so that no other takes its name in between, nor changes what is made of its
    /// record by `next`. After [`Error::Locked`] `old` has its place still.
    pub fn replace(
        &self,
        old: &Slot,
        next: impl FnOnce(Record) -> Record,
    ) -> Result<(Slot, Record)> {
        let (_lock, entries) = self.lock_swept()?;
        let made = read_record(&old.dir).and_then(|record| {
            let record = next(record);
            let slot = self.allocate_locked(&entries, &record, Some(old.domid))?;
            Ok((slot, record))
        });
        remove(old)?;
        made
    }

    /// Ends a domain's entry.
    pub fn release(&self, slot: Slot) -> Result<()> {
        let _lock = self.lock()?;
        remove(&slot)
    }

    /// The same for a domain of the calling process, whose slot is with another thread: to be called right before the process ends.
    pub fn forget(&self, domid: DomId) -> Result<()> {
        let _lock = self.lock()?;
        let dir = self.domains().join(domid.to_string());
        fs::remove_dir_all(&dir).map_err(at("cannot remove", &dir))
    }

    /// Changes the record of a living domain of the calling process.
    pub fn update(&self, domid: DomId, record: &Record) -> Result<()> {
        self.update_and(domid, record, |_| ())
    }

    /// The same, with something that is done before another domain can take the name that the record had.
    pub fn update_and(
        &self,
        domid: DomId,
        record: &Record,
        then: impl FnOnce(&Paths),
    ) -> Result<()> {
        let (_lock, entries) = self.lock_swept()?;
        check_unused(&entries, record, Some(domid))?;
        write_record(&self.domains().join(domid.to_string()), record)?;
        then(&self.paths);
        Ok(())
    }

    /// For the holder of the lock, with all living domains.
    fn allocate_locked(
        &self,
        entries: &[Entry],
        record: &Record,
        ignored: Option<DomId>,
    ) -> Result<Slot> {
        check_unused(entries, record, ignored)?;
        let domains = self.domains();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&domains)
            .map_err(at("cannot make the directory", &domains))?;
        let domid = self.next_id()?;
        let dir = domains.join(domid.to_string());
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(at("cannot make the directory", &dir))?;
        let path = dir.join("lock");
        let lock = open_lock(&path).map_err(at("cannot open", &path))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|fault| at("cannot lock", &path)(fault.into()))?;
        write_record(&dir, record)?;
        Ok(Slot {
            domid,
            dir,
            _lock: lock,
        })
    }

    /// Ids ascend, so that a command with an old id meets no other domain; after the last they begin again.
    fn next_id(&self) -> Result<DomId> {
        let path = self.paths.run.join("next-domid");
        let stored = fs::read_to_string(&path)
            .ok()
            .and_then(|text| text.trim().parse::<u16>().ok());
        let first = stored
            .filter(|id| (1..FIRST_RESERVED_ID).contains(id))
            .unwrap_or(1);
        // Behind a sweep there are only the directories of living domains.
        let domains = self.domains();
        let used = |id: u16| domains.join(id.to_string()).exists();
        let id = (first..FIRST_RESERVED_ID)
            .chain(1..first)
            .find(|id| !used(*id))
            .ok_or(Error::NoFreeId)?;
        fs::write(&path, format!("{}\n", id + 1)).map_err(at("cannot write", &path))?;
        Ok(DomId(id))
    }
}

fn check_unused(entries: &[Entry], record: &Record, ignored: Option<DomId>) -> Result<()> {
    if record.name == HOST_NAME {
        return Err(Error::NameTaken {
            name: record.name.clone(),
            domid: DomId::HOST,
        });
    }
    for entry in entries.iter().filter(|entry| Some(entry.domid) != ignored) {
        if entry.record.name == record.name {
            return Err(Error::NameTaken {
                name: record.name.clone(),
                domid: entry.domid,
            });
        }
        if entry.record.uuid == record.uuid {
            return Err(Error::UuidTaken {
                uuid: record.uuid,
                name: entry.record.name.clone(),
                domid: entry.domid,
            });
        }
    }
    Ok(())
}

fn remove(slot: &Slot) -> Result<()> {
    fs::remove_dir_all(&slot.dir).map_err(at("cannot remove", &slot.dir))
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
}

/// Whether a living process holds the lock of a domain's directory.
pub(crate) fn is_locked(dir: &Path) -> bool {
    match OpenOptions::new().write(true).open(dir.join("lock")) {
        // Whatever else keeps it from being looked at, such as too many open files, says nothing about the domain.
        Err(fault) => fault.kind() != ErrorKind::NotFound,
        Ok(file) => flock(&file, FlockOperation::NonBlockingLockShared).is_err(),
    }
}

fn write_record(dir: &Path, record: &Record) -> Result<()> {
    let path = dir.join("domain.json");
    let text =
        serde_json::to_vec(record).map_err(|fault| at("cannot write", &path)(fault.into()))?;
    if text.len() as u64 > RECORD_MAX_BYTES {
        return Err(Error::RecordTooLong {
            bytes: text.len(),
            most: RECORD_MAX_BYTES,
        });
    }
    // A reader never sees half a record.
    let new = dir.join("domain.json.new");
    OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| file.write_all(&text))
        .and_then(|()| fs::rename(&new, &path))
        .map_err(at("cannot write", &path))
}

pub(crate) fn read_record(dir: &Path) -> Result<Record> {
    let path = dir.join("domain.json");
    let fault = at("cannot read", &path);
    let mut text = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(RECORD_MAX_BYTES).read_to_end(&mut text))
        .map_err(&fault)?;
    serde_json::from_slice(&text).map_err(|broken| fault(broken.into()))
}

#[cfg(test)]
pub(crate) mod testing {
    use std::fs;

    use hospes_config::{Source, Uuid, load};

    use super::{Record, Registry};
    use crate::paths::Paths;

    /// A run-time directory, which goes with the value.
    pub(crate) struct Directory {
        pub(crate) paths: Paths,
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.paths.run);
        }
    }

    /// An empty registry; `test` is a word that no other test has.
    pub(crate) fn registry(test: &str) -> (Registry, Directory) {
        let run = std::env::temp_dir().join(format!("hospes-{test}-{}", std::process::id()));
        fs::create_dir_all(&run).expect("temporary directory");
        let [log, dump] = ["log", "dump"].map(|name| run.join(name));
        let paths = Paths { run, log, dump };
        (Registry::new(&paths), Directory { paths })
    }

    /// The record of a small domain, whose UUID is this byte throughout.
    pub(crate) fn record(name: &str, uuid: u8) -> Record {
        let text = format!("name='{name}'; type='pvh'; kernel='/k'; memory=64");
        let source = Source {
            name: "test",
            text: &text,
        };
        let config = load(&[source]).0.expect("valid");
        Record::new(&config, Uuid::from_bytes([uuid; 16]))
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{record, registry};
    use super::*;

    #[test]
    fn domain_whose_lock_cannot_be_looked_at_is_left_alone() {
        let (registry, _directory) = registry("unseen");
        let slot = registry.allocate(&record("a", 1)).expect("free");
        // As with too many open files: the open fails, and not because there is none.
        let lock = slot.dir().join("lock");
        fs::remove_file(&lock).expect("there");
        std::os::unix::fs::symlink("lock", &lock).expect("free");
        assert_eq!(registry.entries().expect("a list").len(), 1);
        assert!(slot.dir().join("domain.json").exists());
    }

    #[test]
    fn allocate_gives_ascending_ids() {
        let (registry, _directory) = registry("ascending");
        let first = registry.allocate(&record("a", 1)).expect("free");
        let second = registry.allocate(&record("b", 2)).expect("free");
        assert_eq!((first.domid(), second.domid()), (DomId(1), DomId(2)));
        registry.release(second).expect("held");
        let third = registry.allocate(&record("b", 2)).expect("free");
        assert_eq!(third.domid(), DomId(3));
        let listed: Vec<DomId> = registry
            .entries()
            .expect("list")
            .iter()
            .map(|entry| entry.domid)
            .collect();
        assert_eq!(listed, [DomId(1), DomId(3)]);
    }

    #[test]
    fn allocate_behind_the_last_id_begins_again() {
        let (registry, directory) = registry("wrap");
        let _first = registry.allocate(&record("a", 1)).expect("free");
        fs::write(directory.paths.run.join("next-domid"), "32751").expect("writable");
        assert_eq!(
            registry.allocate(&record("b", 2)).expect("free").domid(),
            DomId(32751)
        );
        assert_eq!(
            registry.allocate(&record("c", 3)).expect("free").domid(),
            DomId(2)
        );
        fs::write(directory.paths.run.join("next-domid"), "garbage").expect("writable");
        assert_eq!(
            registry.allocate(&record("d", 4)).expect("free").domid(),
            DomId(2)
        );
    }

    #[test]
    fn allocate_used_name_or_uuid_is_refused() {
        let (registry, _directory) = registry("unique");
        let _slot = registry.allocate(&record("a", 1)).expect("free");
        assert!(matches!(
            registry.allocate(&record("a", 2)),
            Err(Error::NameTaken { .. })
        ));
        assert!(matches!(
            registry.allocate(&record("b", 1)),
            Err(Error::UuidTaken { .. })
        ));
        assert!(matches!(
            registry.allocate(&record(HOST_NAME, 2)),
            Err(Error::NameTaken { .. })
        ));
    }

    #[test]
    fn replace_keeps_the_name_and_changes_the_id() {
        let (registry, _directory) = registry("replace");
        let old = registry.allocate(&record("a", 1)).expect("free");
        let (new, _) = registry
            .replace(&old, |record| record)
            .expect("its own name");
        assert_eq!(new.domid(), DomId(2));
        assert_eq!(registry.entries().expect("list").len(), 1);
    }

    #[test]
    fn update_changes_the_name_unless_it_is_used() {
        let (registry, _directory) = registry("update");
        let slot = registry.allocate(&record("a", 1)).expect("free");
        let _other = registry.allocate(&record("b", 2)).expect("free");
        registry
            .update(slot.domid(), &record("c", 1))
            .expect("free name");
        assert_eq!(registry.entries().expect("list")[0].record.name, "c");
        assert!(matches!(
            registry.update(slot.domid(), &record("b", 1)),
            Err(Error::NameTaken { .. })
        ));
    }

    #[test]
    fn entries_removes_what_no_process_holds() {
        let (registry, directory) = registry("stale");
        let slot = registry.allocate(&record("a", 1)).expect("free");
        // As after SIGKILL: the lock is gone, the files are not.
        drop(slot);
        let half_made = directory.paths.run.join("domains/7");
        fs::create_dir(&half_made).expect("writable");
        fs::create_dir(directory.paths.run.join("log")).expect("writable");
        assert_eq!(registry.entries().expect("list"), []);
        assert_eq!(
            fs::read_dir(directory.paths.run.join("domains"))
                .expect("there")
                .count(),
            0
        );
        registry
            .allocate(&record("a", 1))
            .expect("the name is free again");
        let log = fs::read_to_string(directory.paths.run.join("log/a.log")).expect("a log");
        assert!(log.lines().count() == 1 && log.contains("killed"), "{log}");
    }

    #[test]
    fn entries_leaves_out_a_living_domain_with_a_broken_record() {
        let (registry, directory) = registry("broken");
        let first = registry.allocate(&record("a", 1)).expect("free");
        let second = registry.allocate(&record("b", 2)).expect("free");
        fs::write(first.dir().join("domain.json"), "{").expect("writable");
        let listed = registry.entries().expect("the others");
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].domid, second.domid());
        // Nor is its id given away.
        fs::write(directory.paths.run.join("next-domid"), "1").expect("writable");
        let third = registry.allocate(&record("c", 3)).expect("free");
        assert_eq!(third.domid(), DomId(3));
        registry
            .update(first.domid(), &record("a", 1))
            .expect("its own record");
        assert_eq!(registry.entries().expect("list").len(), 3);
    }

    #[test]
    fn write_record_that_could_not_be_read_again_is_refused() {
        let (registry, _directory) = registry("long");
        let slot = registry.allocate(&record("a", 1)).expect("free");
        let mut long = record("a", 1);
        let spare = RECORD_MAX_BYTES as usize - serde_json::to_vec(&long).expect("JSON").len();
        long.config.cmdline = "x".repeat(spare);
        registry.update(slot.domid(), &long).expect("just so long");
        assert_eq!(registry.entries().expect("list")[0].record, long);
        let mut longer = long.clone();
        longer.config.cmdline.push('x');
        let refused = registry.update(slot.domid(), &longer);
        assert!(matches!(refused, Err(Error::RecordTooLong { .. })));
        let other = Record {
            name: "b".into(),
            uuid: Uuid::from_bytes([2; 16]),
            ..longer
        };
        let refused = registry.allocate(&other);
        assert!(matches!(refused, Err(Error::RecordTooLong { .. })));
        let listed = registry.entries().expect("list");
        assert_eq!((listed.len(), &listed[0].record), (1, &long));
    }
}
