//! What the tool stack needs of a running machine. The program connects it to the domain crate; tests have a machine
//! without a guest.

use std::error::Error;
use std::io::Write;
use std::sync::Arc;

use hospes_config::{DomainConfig, Uuid};
use hospes_units::DomId;

use crate::protocol::{EndReason, ShutdownKind};

pub type MachineError = Box<dyn Error + Send + Sync>;

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct MachineSpec<'a> {
    pub domid: DomId,
    pub uuid: Uuid,
    pub config: &'a DomainConfig,
    /// Memory that other domains have not used yet and still may, in bytes: what the host has free is theirs first.
    pub promised_bytes: u64,
}

/// The state of a machine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineInfo {
    /// Memory the guest has now, in KiB.
    pub memory_kib: u64,
    pub vcpus_online: u32,
    /// Time all vCPUs together have run, in nanoseconds.
    pub cpu_time_ns: u64,
    /// A vCPU runs on a host CPU.
    pub running: bool,
    /// All vCPUs wait for something.
    pub blocked: bool,
    pub paused: bool,
}

/// One machine. It is made paused. All methods may be called from any thread and, but for [`Machine::wait`], return soon.
pub trait Machine: Send + Sync {
    fn unpause(&self);

    fn pause(&self);

    /// Asks the guest; whether and when it follows is its own business.
    fn request_shutdown(&self, kind: ShutdownKind) -> Result<(), MachineError>;

    /// Ends the machine, whatever it does; [`Machine::wait`] returns. Does nothing the second time.
    fn destroy(&self);

    /// Blocks until the machine has ended; from then on returns the same reason at once.
    fn wait(&self) -> EndReason;

    fn info(&self) -> MachineInfo;

    /// Input for the guest's console; returns how many bytes were taken, 0 where there is no room now.
    fn console_input(&self, bytes: &[u8]) -> usize;
}

/// Builds machines.
pub trait MachineFactory: Send + Sync {
    /// Builds a machine, paused. What the guest prints goes to `console`, which never blocks for long. The error is a
    /// sentence for the user.
    fn create(
        &self,
        spec: &MachineSpec<'_>,
        console: Box<dyn Write + Send>,
    ) -> Result<Arc<dyn Machine>, MachineError>;
}
