//! The `hospes` program: the command line, with machines that are domains.
#![forbid(unsafe_code)]

mod devices;
mod host;
mod keeper;
mod machine;
mod vifs;
mod wants;

use std::process::ExitCode;

use hospes_toolstack::{Apart, MACHINE_SUBCOMMAND, machine_process};

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == MACHINE_SUBCOMMAND)
    {
        return machine_process(&machine::Domains::default());
    }
    hospes_cli::run(std::env::args_os(), &Apart(machine::Domains::default()))
}
