//! The `hospes` program: the command line, with machines that are domains.
#![forbid(unsafe_code)]

mod devices;
mod host;
mod keeper;
mod machine;
mod vifs;
mod wants;

use std::process::ExitCode;

fn main() -> ExitCode {
    hospes_cli::run(std::env::args_os(), &machine::Domains::default())
}
