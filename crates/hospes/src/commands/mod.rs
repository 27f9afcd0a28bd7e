//! The commands, by what they are about.

pub(crate) mod device_lists;
pub(crate) mod devices;
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
use lexopt::Parser;

use crate::args::Args;
use crate::output::print;
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

/// Status 1 with a sentence.
pub(crate) fn failed(message: &str) -> Outcome {
    Err(Failure::Failed(anyhow!("{message}")))
}
