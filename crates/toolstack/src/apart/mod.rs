//! Machines in processes of their own, without rights.
//!
//! The domain process is the *keeper* of its machine: it holds the sockets, the registry, the host's networks and images, and has the rights of its user. The guest, its memory and the
//! back ends are in the *machine process*, a child of it that gives up all rights before it looks at anything of the guest ([`Program::build`]); it is made anew
//! with each start of the domain. What it needs of the host it asks its keeper for, which gives descriptors, and only those that the operator meant it to have ([`Keeper`]).
//!
//! The two talk over a pair of sockets. Each call of the keeper's and each question of the machine process is a connection of its own, so that they do not wait for each other.

mod build;
mod call;
mod machine;
mod meanwhile;
mod process;
mod serve;
mod speech;
mod told;
mod wire;

use std::fmt::Debug;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hospes_config::{DiskConfig, VifConfig};
use serde_json::Value;

pub(crate) use build::start;
pub(crate) use machine::RemoteMachine;
pub use serve::{Asker, machine_process};

use crate::machine::{Machine, MachineError, MachineSpec, SavedStream};
use crate::protocol::DeviceKind;
use crate::scheduling::Share;

/// A device that a domain is to have.
#[derive(Clone, Copy, Debug)]
pub enum Device<'a> {
    Disk(&'a DiskConfig),
    Vif(&'a VifConfig),
}

/// The keeper's side of what a program's machines need of the host. Whoever asks may be a guest that has broken out.
pub trait Keeper: Send + Sync {
    /// Does what a machine process asks for, and gives descriptors for it. Refuses all that was not permitted. May be called by several threads.
    fn answer(&self, ask: Value) -> Result<(Value, Vec<OwnedFd>), MachineError>;

    /// The domain is to have this device, beside those that it is made with.
    fn permit(&self, device: Device<'_>) -> Result<(), MachineError>;

    /// The domain has this device no more.
    fn revoke(&self, kind: DeviceKind, devid: u32);

    /// The domain is to have this share of the host's CPUs, or where that cannot be, the one before.
    fn share(&self, share: Share);

    /// The domain is destroyed: nothing is to take long any more.
    fn hurry(&self);

    /// The machine process has given all back, or is gone: takes back from the host what was done for it.
    fn release(&self);
}

/// What a program brings along: its machines, each in a process of its own.
pub trait Program: Send + Sync {
    /// What does for a machine to be built what that has no right to. `process` is the number of the machine process.
    fn keeper(&self, spec: &MachineSpec<'_>, process: u32)
    -> Result<Arc<dyn Keeper>, MachineError>;

    /// In the machine process: builds a machine, paused, which goes on where another was saved if there is `saved`, and gives up all rights before it reads
    /// anything of a guest's. The process has one thread until then. What the guest prints goes to `console`, which never blocks for long. The error is a
    /// sentence for the user.
    fn build(
        &self,
        spec: &MachineSpec<'_>,
        saved: Option<SavedStream>,
        console: Box<dyn Write + Send>,
        asker: Asker,
    ) -> Result<Arc<dyn Machine>, MachineError>;

    /// Whether a machine with this passport could come here now, as far as can be told before it does.
    fn admit(&self, spec: &MachineSpec<'_>, passport: &str) -> Result<(), MachineError>;

    /// How long a guest may take to shut down when its process is asked to end: less than systemd waits before it kills (90 s).
    fn shutdown_patience(&self) -> Duration {
        Duration::from_secs(60)
    }

    /// Removes from the host what machines left whose processes were killed; those that live keep what they have.
    fn sweep(&self, run: &Path) -> Result<(), MachineError>;
}

/// A sentence for what a peer sends that it must not.
fn broken(what: impl Debug) -> MachineError {
    let what = told::sentence(&format!("{what:?}"));
    format!("the machine process does not keep to the protocol: {what}").into()
}
