//! The store process of a run-time directory: where it is, how it is started, what it does.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use hospes_store_server::{Place, StoreClient, Surroundings, serve};
use hospes_units::DomId;
use rustix::fs::Mode;

use crate::STORE_SUBCOMMAND;
use crate::apart::Program;
use crate::error::{Error, Result};
use crate::launch::own_program;
use crate::log::log;
use crate::logfile::{LOG_MAX_BYTES, LogFile, open_append};
use crate::paths::{DEFAULT_RUN, LOG_VARIABLE, Paths, RUN_VARIABLE};
use crate::registry::{Registry, is_locked};

/// After so long each it is looked for leftovers of killed domains.
const SWEEP_PAUSES: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_millis(300),
    Duration::from_secs(3),
];

/// Where Xen's tools look for a store.
const PUBLIC_SOCKET: &str = "/var/run/xenstored/socket";

/// The store process of these directories, which is started where it is needed and not there.
pub(crate) fn place(paths: &Paths) -> Place {
    let at = paths.clone();
    Place::new(&paths.run, Place::starter(move || command(&at)))
}

impl Paths {
    /// The socket of the store that all domains of these directories are in.
    pub fn store_socket(&self) -> PathBuf {
        place(self).socket()
    }
}

/// The command that becomes the store process.
fn command(paths: &Paths) -> io::Result<Command> {
    let log = paths.log.join("store.log");
    // Moves a log that has become too long out of the way.
    LogFile::open(&log, LOG_MAX_BYTES).and_then(|mut log| log.append(b""))?;
    let mut command = own_program(STORE_SUBCOMMAND);
    command
        .env(RUN_VARIABLE, &paths.run)
        .env(LOG_VARIABLE, &paths.log)
        .stderr(open_append(&log)?);
    Ok(command)
}

/// A client of the store process.
pub(crate) fn client(paths: &Paths) -> Result<StoreClient> {
    paths.create()?;
    StoreClient::new(place(paths)).map_err(Error::Store)
}

/// What the hidden subcommand [`STORE_SUBCOMMAND`] does: the store, for as long as somebody needs it.
pub fn store_process(program: &dyn Program) -> ExitCode {
    // Fails for the leader of a process group: then a shell started it, by hand.
    let _ = rustix::process::setsid();
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let result = Paths::from_environment().and_then(|paths| {
        paths.create()?;
        if let Err(fault) = rustix::process::chdir("/") {
            log!("cannot change to /: {fault}");
        }
        Ok(paths)
    });
    let paths = match result {
        Ok(paths) => paths,
        Err(fault) => {
            log!("{fault}");
            return ExitCode::FAILURE;
        }
    };
    let place = place(&paths);
    let result = thread::scope(|scope| {
        let sweep = || {
            scope.spawn(|| sweep(program, &paths));
        };
        let around = Surroundings {
            is_alive: &|domid: DomId| is_locked(&paths.run.join("domains").join(domid.to_string())),
            ready: &|| {
                publish(&paths, &place);
                tell_starter();
                // Domains may have been killed while there was no store.
                sweep();
            },
            orphaned: &sweep,
            log: &|line| log!("{line}"),
        };
        serve(&place, &around)
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            log!("{fault}");
            ExitCode::FAILURE
        }
    }
}

/// Removes what killed domains left: their records, with the processes that their guests may have started, and of the host's devices. Another process would do that
/// with the next command: there may be none.
///
/// A killed process lets go of what it had one after the other, so it is looked again.
fn sweep(program: &dyn Program, paths: &Paths) {
    for pause in SWEEP_PAUSES {
        thread::sleep(pause);
        if let Err(fault) = Registry::new(paths).entries() {
            log!("cannot remove what a killed domain left: {fault}");
        }
        if let Err(fault) = program.sweep(&paths.run) {
            log!("cannot remove what a killed domain left: {fault}");
        }
    }
}

/// The host's own store is where Debian's tools look.
fn publish(paths: &Paths, place: &Place) {
    let is_hosts = rustix::process::geteuid().is_root() && paths.run == Path::new(DEFAULT_RUN);
    if is_hosts && let Err(fault) = place.publish(Path::new(PUBLIC_SOCKET)) {
        log!("{PUBLIC_SOCKET} cannot be made: set XENSTORED_PATH for the tools ({fault})");
    }
}

/// The one who started the process waits for a line. The pipe is let go of: nobody reads more.
fn tell_starter() {
    // It may have been killed meanwhile; the store is of use to others.
    let _ = writeln!(io::stdout(), "ready");
    let null = std::fs::File::open("/dev/null").map_err(|fault| fault.to_string());
    let dropped =
        null.and_then(|null| rustix::stdio::dup2_stdout(&null).map_err(|fault| fault.to_string()));
    if let Err(fault) = dropped {
        log!("cannot let go of standard output: {fault}");
    }
}
