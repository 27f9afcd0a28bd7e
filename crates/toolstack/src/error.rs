//! Why an operation failed.

use std::io;
use std::path::PathBuf;

use hospes_units::DomId;

use crate::paths::User;

pub type Result<T> = std::result::Result<T, Error>;

/// Each sentence says what happened and what can be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{who} is an invalid domain identifier: no such domain runs; see the list of domains")]
    NoSuchDomain { who: String },
    #[error("domain {domid} has ended in the meantime")]
    Gone { domid: DomId },
    #[error(
        "domain {domid} has restarted or closed the connection each of the {tries} times it was asked to end, and it still lives: see its log and try again"
    )]
    Restless { domid: DomId, tries: usize },
    #[error("Domain-0 is the host itself: this can only be done to the domains it runs")]
    Host,
    #[error(
        "a domain named \"{name}\" exists already with id {domid}: choose another name or destroy it"
    )]
    NameTaken { name: String, domid: DomId },
    #[error(
        "a domain with the UUID {uuid} exists already: \"{name}\" with id {domid}; remove `uuid' or destroy it"
    )]
    UuidTaken {
        uuid: hospes_config::Uuid,
        name: String,
        domid: DomId,
    },
    #[error(
        "the configuration takes {bytes} bytes in the registry of domains, which keeps up to {most}: make it shorter"
    )]
    RecordTooLong { bytes: usize, most: u64 },
    #[error("all domain ids are in use: destroy a domain")]
    NoFreeId,
    #[error("{what} {path}: {source}", path = .path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "the directory {path} belongs to {owner}, and the command runs as {user}: run it as that user, or set {variable} to a directory of your own",
        path = .path.display()
    )]
    Foreign {
        path: PathBuf,
        owner: User,
        user: User,
        variable: &'static str,
    },
    #[error(
        "the directory {path} is open to others (mode {mode:03o}): `chmod go-w` it, or set {variable} to another",
        path = .path.display()
    )]
    Open {
        path: PathBuf,
        mode: u32,
        variable: &'static str,
    },
    #[error(
        "cannot reach the directory {path} as {user}: {source}; run the command as the user to whom it belongs, or set {variable} to a directory of your own",
        path = .path.display()
    )]
    OutOfReach {
        path: PathBuf,
        user: User,
        source: io::Error,
        variable: &'static str,
    },
    #[error("no directory for {what}: set {variable} to one")]
    NoDirectory {
        what: &'static str,
        variable: &'static str,
    },
    #[error(
        "the directory for run-time state may have a path of {most} bytes at most, for the sockets in it: set {variable} to a shorter one than {path}",
        path = .path.display()
    )]
    RunTooLong {
        path: PathBuf,
        most: usize,
        variable: &'static str,
    },
    #[error("another hospes command has held {path} for too long: see which process it is with `fuser`", path = .path.display())]
    Locked { path: PathBuf },
    #[error(
        "domain {domid} is still being made and cannot be asked for anything: try again when it is there, or destroy it"
    )]
    Unmade { domid: DomId },
    #[error("domain {domid} does not answer ({source}): see its log, or destroy it")]
    Unreachable { domid: DomId, source: io::Error },
    #[error(
        "domain {domid} does not answer: its process {pid} is stopped; `kill -CONT {pid}` lets it go on"
    )]
    Stopped { domid: DomId, pid: u32 },
    #[error("domain {domid} refused: {message}")]
    Refused { domid: DomId, message: String },
    #[error(
        "the other side breaks the protocol: {0}; are all hospes programs of the same version?"
    )]
    Protocol(String),
    #[error("{0}: files, and the directory that the command runs in, need names in UTF-8")]
    NotText(serde_json::Error),
    #[error("{path}: {source}", path = .path.display())]
    SavedFile {
        path: PathBuf,
        source: hospes_migration::StreamError,
    },
    #[error("{path} is complete, and what became of the domain is not known ({why}): see whether it runs, and do not restore the file if it does", path = .path.display())]
    SavedUnsure { path: PathBuf, why: Box<Error> },
    #[error("{0}")]
    Migration(String),
    #[error("the domain cannot be taken: {0}")]
    Passed(hospes_migration::StreamError),
    #[error(
        "it is not known whether the domain runs on the other host ({why}). Look there: where it runs, `hospes destroy {name}` ends what is left of it here; where it does not, `hospes unpause {name}` lets it go on here, and where {incoming} is still listed, `hospes destroy {incoming}` it there first. Two that run at once destroy their disks"
    )]
    MigrationUnsure {
        name: String,
        /// What it is called there before it has arrived.
        incoming: String,
        why: String,
    },
    #[error("{message}")]
    Create { message: String },
    #[error("the domain process ended ({status}) before the domain was there; its log is {log}", log = .log.display())]
    ProcessDied {
        status: std::process::ExitStatus,
        log: PathBuf,
    },
    #[error("the process of domain {domid} ended ({status}) and the domain with it; its log is {log}", log = .log.display())]
    ProcessLost {
        domid: DomId,
        status: std::process::ExitStatus,
        log: PathBuf,
    },
    #[error(
        "the file system with {path} is full, and nothing more can be written down about domains: make room there and try again",
        path = .path.display()
    )]
    Full { path: PathBuf },
    #[error("cannot make ready to use the store: {0}")]
    Store(io::Error),
    #[error("cannot start the domain process: {0}")]
    Spawn(io::Error),
}

/// Adds what was done and to which file.
pub(crate) fn at<'a>(
    what: &'static str,
    path: &'a std::path::Path,
) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::File {
        what,
        path: path.to_path_buf(),
        source,
    }
}
