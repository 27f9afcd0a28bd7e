//! The command line from the outside, with a machine that has no guest.

mod command_line;
mod common;
mod completions;
mod configuration;
mod console;
mod destroy;
mod devices;
mod dumping;
mod giving_away;
mod host;
mod image;
mod keeping;
mod life_cycle;
mod lists;
mod memory;
mod migrating;
mod rename_restart;
mod saving;
mod scarcity;
mod shutting_down;
mod signals;
mod stopped;
mod transport;
mod unprivileged;
mod wrong_arguments;
