//! The command line, with the grammar and the output of xl(1).
//!
//! It reads arguments, prints and asks; what is done is in the tool stack. [`run`] is the whole program but for the
//! machine that domain processes run, which the binary brings along.
//!
//! Exit statuses are those of docs/commands.md: 0 done, 1 failed, 2 not understood, and what `create` has beside them.
#![forbid(unsafe_code)]
// They panic where nothing can be written.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod commands;
mod completions;
mod configured;
mod create;
mod domains;
mod elsewhere;
mod help;
mod image;
mod keeping;
mod list;
mod manual;
mod output;
mod table;
mod terminal;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use hospes_toolstack::{
    DOMAIN_SUBCOMMAND, MACHINE_SUBCOMMAND, Program, STORE_SUBCOMMAND, domain_process,
    machine_process, store_process,
};
use lexopt::Arg;

use crate::output::{causes, say, tell};
use crate::table::Command;

/// Called by this name the program is `top`.
pub(crate) const XENTOP: &str = "xentop";

/// Options in front of the subcommand.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Global {
    /// `-v`: say more.
    pub verbose: bool,
    /// `-N`: look, but change nothing.
    pub dry_run: bool,
}

/// Why a command did not do its work.
pub(crate) enum Failure {
    /// The arguments make no sense: status 2, with a hint at the help.
    Usage(String),
    /// Arguments are missing: status 2, with the help.
    TooFew,
    /// Status 1.
    Failed(anyhow::Error),
    /// Another status.
    FailedWith(u8, anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Failed(error.into())
    }
}

pub(crate) type Outcome = Result<(), Failure>;

/// The program: `arguments` begin with its own name, by which it calls itself in messages.
pub fn run(arguments: impl IntoIterator<Item = OsString>, machines: &dyn Program) -> ExitCode {
    let mut arguments = arguments.into_iter();
    let program = arguments
        .next()
        .as_deref()
        .and_then(|name| Path::new(name).file_name())
        .and_then(OsStr::to_str)
        .unwrap_or("hospes")
        .to_string();
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut global = Global::default();
    let command = loop {
        if program == XENTOP {
            break "top".to_string();
        }
        match parser.next() {
            Ok(Some(Arg::Short('v'))) => global.verbose = true,
            Ok(Some(Arg::Short('N'))) => global.dry_run = true,
            // Meant for the days of xend, and for progress and time stamps on slow operations.
            Ok(Some(Arg::Short('f' | 't' | 'T'))) => {}
            Ok(Some(Arg::Short('h') | Arg::Long("help"))) => break "help".to_string(),
            Ok(Some(Arg::Short('V') | Arg::Long("version"))) => {
                return status(output::print(format_args!("{}\n", help::version(&program))));
            }
            Ok(Some(Arg::Value(name))) => break name.to_string_lossy().into_owned(),
            Ok(Some(argument)) => {
                let fault = argument.unexpected();
                tell!("{program}: {fault}; `{program} help' lists the options");
                return ExitCode::FAILURE;
            }
            Ok(None) => {
                say(format_args!("{}", help::overview(&program)));
                return ExitCode::FAILURE;
            }
            Err(fault) => {
                tell!("{program}: {fault}; `{program} help' lists the options");
                return ExitCode::FAILURE;
            }
        }
    };
    match command.as_str() {
        DOMAIN_SUBCOMMAND => return domain_process(machines),
        MACHINE_SUBCOMMAND => return machine_process(machines),
        STORE_SUBCOMMAND => return store_process(machines),
        _ => {}
    }
    let Some(command) = table::find(&command) else {
        let reason = match elsewhere::why_not(&command) {
            Some(reason) => reason.to_string(),
            None => format!("`{program} help' lists the commands"),
        };
        tell!("{program}: command not implemented: {command}: {reason}");
        return ExitCode::FAILURE;
    };
    match commands::execute(command, &program, global, parser) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&program, command, failure),
    }
}

fn report(program: &str, command: &Command, failure: Failure) -> ExitCode {
    match failure {
        Failure::Usage(fault) => {
            let called = help::called(program, command);
            tell!("{called}: {fault}");
            tell!("{}", help::usage(program, command));
            tell!("`{called} --help' tells more.");
            ExitCode::from(2)
        }
        Failure::TooFew => {
            let plural = if command.min == 1 { "" } else { "s" };
            tell!(
                "'{program} {}' requires at least {} argument{plural}.\n\n{}",
                command.name,
                command.min,
                help::page(program, command)
            );
            ExitCode::from(2)
        }
        Failure::Failed(error) => fail(program, 1, &error),
        Failure::FailedWith(status, error) => fail(program, status, &error),
    }
}

fn fail(program: &str, status: u8, error: &anyhow::Error) -> ExitCode {
    // The reader of a pipe has left: it knows.
    let broken_pipe = error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|fault| fault.kind() == std::io::ErrorKind::BrokenPipe);
    if !broken_pipe {
        tell!("{program}: {}", causes(error));
    }
    ExitCode::from(status)
}

fn status(result: std::io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
