//! Operations on domains: create, list, pause, shut down, destroy, attach a console.
//!
//! Every domain lives in a process of its own, which owns a directory `<run>/domains/<domid>/`:
//!
//! | file | what |
//! |---|---|
//! | `lock` | locked by the domain process for as long as it lives; an unlocked one is stale and is removed |
//! | `domain.json` | a [`Record`]: name, UUID, process, configuration |
//! | `control.sock` | requests and replies of [`protocol`], one JSON object a line |
//! | `console.sock` | the console's bytes, both ways, beginning with the last output |
//!
//! [`Host`] is the side of the commands, [`domain_process`] the side of the domain. The machine itself is behind
//! [`Machine`] and [`Program`]: nothing here knows how a guest is executed.
//!
//! Trust: directories are 0700 and sockets 0600; a peer has to have the same user id or be root, and everything it
//! sends is bounded and checked. What the guest prints is bounded too: history, queues and log files have limits.
#![forbid(unsafe_code)]

mod apart;
mod busy;
mod client;
mod clock;
mod dumping;
mod each;
mod ending;
mod error;
mod guest_memory;
mod handover;
mod hub;
mod images;
mod instance;
mod killing;
mod launch;
mod leaving;
mod log;
mod logfile;
mod machine;
mod migrating;
mod naming;
mod orphans;
mod paths;
mod process;
pub mod protocol;
mod receiving;
mod registry;
mod saving;
mod scheduling;
mod server;
mod shutting_down;
mod standing;
mod state;
mod store;
mod supervisor;
mod sweeping;
mod target;
mod traffic;

pub use apart::{Asker, Device, Keeper, Program, machine_process};
pub use client::{Host, Watch};
pub use each::{Answer, Answers};
pub use error::{Error, Result};
pub use handover::{MoveOptions, MoveWatcher};
pub use hospes_migration::LiveRound;
pub use launch::{CreateRequest, Created, random_uuid};
pub use machine::{
    Machine, MachineError, MachineInfo, MachineSpec, Piece, SaveStream, SavedInput, SavedStream,
};
pub use orphans::machine_user;
pub use paths::Paths;
pub use process::domain_process;
pub use protocol::{
    AfterSave, DeviceKind, DomainInfo, EndReason, Ended, Request, ShutdownKind, Trigger, Until,
    Waiting,
};
pub use receiving::UNATTENDED;
pub use registry::{Entry, HOST_NAME, Record};
pub use saving::SavedDomain;
pub use scheduling::{Affinity, Share, VcpuInfo, host_cpus, resolve};
pub use shutting_down::Asked;
pub use state::Promised;
pub use store::store_process;
pub use traffic::Traffic;

/// The hidden subcommand with which the program starts itself as a domain process.
pub const DOMAIN_SUBCOMMAND: &str = "__domain";
/// The same for the store process.
pub const STORE_SUBCOMMAND: &str = "__store";
/// The same for a machine process.
pub const MACHINE_SUBCOMMAND: &str = "__machine";

/// A line in the log of a domain, which is the standard error of its process.
pub fn log_line(text: &str) {
    log::line(format_args!("{text}"));
}

/// The present time as it stands before the lines of the logs.
pub fn utc_now() -> String {
    clock::Utc::now().to_string()
}
