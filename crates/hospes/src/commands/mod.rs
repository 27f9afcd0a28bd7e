//! The commands, by what they are about.

pub(crate) mod absent;
pub(crate) mod device_lists;
pub(crate) mod devices;
pub(crate) mod dumping;
pub(crate) mod host;
pub(crate) mod keys;
pub(crate) mod life;
pub(crate) mod logs;
pub(crate) mod memory;
pub(crate) mod meta;
pub(crate) mod migrating;
pub(crate) mod names;
pub(crate) mod saving;
pub(crate) mod shares;
pub(crate) mod top;
pub(crate) mod vcpus;

use std::ffi::OsString;

use anyhow::anyhow;
use hospes_toolstack::{Entry, Error, Host};
use lexopt::Parser;

use crate::args::Args;
use crate::output::{print, tell};
use crate::table::{Call, Command};
use crate::{Failure, Global, Outcome, help};

/// Runs one command with the arguments that are left.
pub(crate) fn execute(
    command: &'static Command,
    program: &str,
    global: Global,
    parser: Parser,
) -> Outcome {
    if asks_for_help(&parser) {
        return Ok(print(format_args!("{}", help::page(program, command)))?);
    }
    if global.dry_run && !command.dry_run {
        return failed("command does not implement -N (dryrun) option");
    }
    (command.run)(&Call {
        program: program.to_string(),
        global,
        args: Args::read(command, parser)?,
    })
}

/// Whether `-h` or `--help` stands anywhere before `--`.
fn asks_for_help(parser: &Parser) -> bool {
    let mut copy = parser.clone();
    let Some(rest) = copy.try_raw_args() else {
        return false;
    };
    rest.map(|argument: OsString| argument.to_string_lossy().into_owned())
        .take_while(|argument| argument != "--")
        .any(|argument| argument == "-h" || argument == "--help")
}

/// The domain; `None` for the host, of which something is left as it is, says `what`. Scripts that run when a host starts change Domain-0, and stop
/// where that is an error.
pub(crate) fn find_but_host(host: &Host, who: &str, what: &str) -> Result<Option<Entry>, Error> {
    match host.find(who) {
        Ok(entry) => Ok(Some(entry)),
        Err(Error::Host) => {
            tell!("note: Domain-0 is this host itself: {what} left as it is");
            Ok(None)
        }
        Err(fault) => Err(fault),
    }
}

/// Status 1 with a sentence.
pub(crate) fn failed(message: &str) -> Outcome {
    Err(Failure::Failed(anyhow!("{message}")))
}
