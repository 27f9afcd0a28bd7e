//! The domain process.

use std::fs::File;
use std::io::{self, BufReader, Stdin, stderr, stdin, stdout};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use hospes_migration::Reader;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;

use crate::apart::Program;
use crate::ending::Ending;
use crate::error::{Error, Result};
use crate::hub::ConsoleHub;
use crate::log::log;
use crate::logfile::{LOG_MAX_BYTES, LogFile};
use crate::machine::{SavedInput, SavedStream};
use crate::protocol::{self, Arrival, Launch, Launched};
use crate::store;
use crate::supervisor::{Current, Supervisor};

/// How much of a saved domain is read at a time, in bytes.
const INPUT_BUFFER: usize = 1 << 20;

/// What the hidden subcommand [`crate::DOMAIN_SUBCOMMAND`] does: one domain, until it has ended.
pub fn domain_process(program: &dyn Program) -> ExitCode {
    detach();
    let ending = Ending::new(program.shutdown_patience());
    ending.listen();
    let mut input = BufReader::with_capacity(INPUT_BUFFER, stdin());
    let launch = match read_launch(&mut input) {
        Ok(launch) => launch,
        Err(fault) => {
            answer(&Launched::Error {
                message: fault.to_string(),
            });
            return ExitCode::FAILURE;
        }
    };
    let first_name = launch.first_name();
    let paths = launch.paths;
    let console_log = paths.console_log(&first_name);
    let console_log = match LogFile::open(&console_log, LOG_MAX_BYTES) {
        Ok(file) => Some(file),
        Err(fault) => {
            log!(
                "there will be no console log, {} cannot be opened: {fault}",
                console_log.display()
            );
            None
        }
    };
    let hub = ConsoleHub::new(console_log);
    // Every launch has one; a process without would still be a valid domain.
    let uuid = launch.config.uuid.unwrap_or(hospes_config::Uuid::NIL);
    let store = match store::client(&paths) {
        Ok(store) => store,
        Err(fault) => {
            log!("{fault}");
            answer(&Launched::Error {
                message: fault.to_string(),
            });
            return ExitCode::FAILURE;
        }
    };
    let supervisor = Supervisor::new(program, paths, hub, ending, launch.config, uuid, store);
    let saved = match launch.restore.then(|| saved_stream(&input)).transpose() {
        Ok(saved) => saved,
        Err(fault) => {
            answer(&Launched::Error {
                message: Error::Spawn(fault).to_string(),
            });
            return ExitCode::FAILURE;
        }
    };
    let next = launch.next.map(|next| *next);
    let accepted = || {
        // Where nobody hears it the stream ends as well.
        answer(&Launched::Accepted);
    };
    let started = match (saved, &launch.passport) {
        (Some(saved), Some(passport)) => supervisor.receive(saved, next, passport, &accepted),
        (saved, _) => supervisor.start(saved, next),
    };
    let current = match started {
        Ok(current) => current,
        Err(fault) => {
            if !fault.is_of_name() {
                log!("{fault}");
            }
            answer(&Launched::Error {
                message: fault.to_string(),
            });
            return ExitCode::FAILURE;
        }
    };
    if launch.passport.is_some() {
        return arrive(&supervisor, current);
    }
    // A saved guest that has gone on unheard would have changed its disks, and the file would not know.
    if launch.restore && !is_heard() {
        log!("the command that asked for the domain was ended: the guest does not go on");
        supervisor.abandon(current);
        return ExitCode::FAILURE;
    }
    // Before the answer: whoever hears of the domain finds it running.
    if !launch.paused {
        current.unpause();
    }
    let told = answer(&Launched::Domain {
        domid: current.domid().0,
    });
    if !told {
        log!("the command that asked for the domain was ended: so is the domain");
        supervisor.abandon(current);
        return ExitCode::FAILURE;
    }
    live(&supervisor, current)
}

/// The rest of the domain's life, on its own. The command that asked for it, where it stays, is told at the end what nobody wanted.
fn live(supervisor: &Supervisor<'_>, current: Current) -> ExitCode {
    let command = drop_streams();
    let Err(fault) = supervisor.run(current) else {
        return ExitCode::SUCCESS;
    };
    if let Some(command) = command {
        let message = format!("the domain has ended and cannot be started again: {fault}");
        // Mostly nobody listens any more.
        let _ = protocol::send(File::from(command), &Launched::Error { message });
    }
    ExitCode::FAILURE
}

/// The rest of the life of a domain that comes from another host, which is all here now.
fn arrive(supervisor: &Supervisor<'_>, current: Current) -> ExitCode {
    answer(&Launched::Domain {
        domid: current.domid().0,
    });
    let line = protocol::read_line(&mut stdin().lock());
    let arrival: Option<Arrival> = line
        .ok()
        .and_then(|line| line.ok().flatten())
        .and_then(|line| protocol::decode(&line).ok());
    let Some(Arrival { paused }) = arrival else {
        log!("The other host has not given the domain away: its guest does not go on here");
        supervisor.abandon(current);
        return ExitCode::FAILURE;
    };
    match supervisor.arrive(&current) {
        Ok(note) => {
            if let Some(note) = &note {
                log!("{note}");
            }
            if !paused {
                current.unpause();
            }
            log!("The domain has arrived from another host");
            // It is here, whoever hears of it.
            answer(&Launched::Arrived { note });
        }
        Err(fault) => {
            answer(&Launched::Error {
                message: fault.to_string(),
            });
        }
    }
    live(supervisor, current)
}

/// Survives the terminal, and gives no file to others.
fn detach() {
    // Fails for the leader of a process group: then a shell started it, by hand.
    let _ = rustix::process::setsid();
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    // The directory it was started in may want to be unmounted; paths in a launch are absolute.
    if let Err(fault) = rustix::process::chdir("/") {
        log!("cannot change to /: {fault}");
    }
}

fn read_launch(input: &mut BufReader<Stdin>) -> Result<Launch> {
    let line = protocol::read_line(input)?.map_err(Error::Spawn)?;
    match line {
        Some(line) => protocol::decode(&line),
        None => Err(Error::Protocol(
            "this subcommand is started by create, not by hand".into(),
        )),
    }
}

/// The stream that follows the launch.
fn saved_stream(input: &BufReader<Stdin>) -> io::Result<SavedStream> {
    let rest = rustix::io::fcntl_dupfd_cloexec(stdin(), 3)?;
    let ahead = input.buffer().to_vec();
    Ok(Reader::continued(SavedInput::new(ahead, rest)))
}

/// Whether somebody waits for the answer.
fn is_heard() -> bool {
    let stdout = stdout();
    let mut descriptors = [PollFd::new(&stdout, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Where that cannot be told it is as always: the answer shows it.
    poll(&mut descriptors, Some(&now)).is_err()
        || !descriptors[0].revents().intersects(PollFlags::ERR)
}

/// False where nobody listens any more.
pub(crate) fn answer(launched: &Launched) -> bool {
    matches!(protocol::send(stdout().lock(), launched), Ok(Ok(())))
}

/// Lets go of standard input and output, which are pipes to the command that started this. Returns the way to that command, for the end.
fn drop_streams() -> Option<OwnedFd> {
    let command = rustix::io::fcntl_dupfd_cloexec(stdout(), 3).ok();
    let null = File::open("/dev/null").map_err(|fault| fault.to_string());
    let dropped = null
        .and_then(|null| rustix::stdio::dup2_stdin(&null).map_err(|fault| fault.to_string()))
        .and_then(|()| rustix::stdio::dup2_stdout(stderr()).map_err(|fault| fault.to_string()));
    if let Err(fault) = dropped {
        log!("cannot let go of standard input and output: {fault}");
    }
    command
}
