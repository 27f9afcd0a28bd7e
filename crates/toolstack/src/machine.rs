//! What the tool stack needs of a running machine. The program connects it to the domain crate; tests have a machine
//! without a guest.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hospes_config::{DiskConfig, DomainConfig, Uuid, VifConfig};
use hospes_migration::{LiveRound, Reader, Writer};
use hospes_store_server::StoreClient;
use hospes_units::DomId;
use serde::{Deserialize, Serialize};

use crate::protocol::{DeviceKind, EndReason, ShutdownKind, Trigger, Waiting};
use crate::scheduling::{Affinity, Share, VcpuInfo};
use crate::state::Promised;
use crate::traffic::Traffic;

pub type MachineError = Box<dyn Error + Send + Sync>;

/// The stream that a machine comes back from, behind its configuration.
pub type SavedStream = Reader<SavedInput>;

/// Where a saved stream is read from: a descriptor, and what was read of it ahead.
#[derive(Debug)]
pub struct SavedInput {
    ahead: io::Cursor<Vec<u8>>,
    rest: File,
}

impl SavedInput {
    pub fn new(ahead: Vec<u8>, rest: OwnedFd) -> SavedInput {
        SavedInput {
            ahead: io::Cursor::new(ahead),
            rest: File::from(rest),
        }
    }

    /// What was read ahead and is still to be read.
    pub(crate) fn ahead(&self) -> &[u8] {
        let read = self.ahead.position() as usize;
        self.ahead.get_ref().get(read..).unwrap_or_default()
    }

    /// Where all that comes behind it is.
    pub(crate) fn rest(&self) -> BorrowedFd<'_> {
        self.rest.as_fd()
    }
}

impl Read for SavedInput {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self.ahead.read(bytes)? {
            0 => self.rest.read(bytes),
            read => Ok(read),
        }
    }
}

/// A stream that a machine is saved to.
pub type SaveStream<'a> = Writer<&'a mut dyn Write>;

/// Takes bytes of a file at a position, each behind the ones before; what is left out is zero.
pub type Piece<'a> = &'a mut dyn FnMut(u64, &[u8]) -> io::Result<()>;

/// What to build.
#[derive(Clone, Debug)]
pub struct MachineSpec<'a> {
    pub domid: DomId,
    pub uuid: Uuid,
    pub config: &'a DomainConfig,
    /// Memory that other domains have not used yet and still may: what the host has free is theirs first.
    pub promised: Promised,
    /// Where the domain is entered.
    pub store: &'a StoreClient,
}

/// The state of a machine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Memory the guest has now, in KiB.
    pub memory_kib: u64,
    /// Memory that it does not use yet and may take at any time, in KiB.
    pub promised_kib: u64,
    pub vcpus_online: u32,
    /// Time all vCPUs together have run, in nanoseconds.
    pub cpu_time_ns: u64,
    /// A vCPU runs on a host CPU.
    pub running: bool,
    /// All vCPUs wait for something.
    pub blocked: bool,
    pub paused: bool,
}

/// One machine. It is made paused. All methods may be called from any thread and return soon, but for [`Machine::wait`], [`Machine::make_ready`] and those that wait for the guest.
pub trait Machine: Send + Sync {
    /// Does what is left to do before the guest may start, and what may take long: once, when commands reach the machine already. [`Machine::destroy`] cuts it short.
    fn make_ready(&self) -> Result<(), MachineError>;

    fn unpause(&self);

    fn pause(&self);

    /// Asks the guest; whether and when it follows is its own business.
    fn request_shutdown(&self, kind: ShutdownKind) -> Result<(), MachineError>;

    /// Blocks until the guest has acknowledged the last [`Machine::request_shutdown`], or has ended; an error where it takes too long. Asks `given_up` now and then
    /// whether to go on waiting. After an error the guest may still follow.
    fn wait_acknowledged(&self, given_up: &dyn Fn() -> bool) -> Result<(), MachineError>;

    /// Ends the machine, whatever it does; [`Machine::wait`] returns. Does nothing the second time.
    fn destroy(&self);

    /// Takes a machine that has ended, or ends now, out of the host: its devices and its part of the store are gone when this returns.
    fn leave(&self);

    /// Gives up the devices of a machine that has ended and is kept to be looked at: another may use what they stood for when this returns.
    fn give_up_devices(&self) {}

    /// Blocks until the machine has ended; from then on returns the same reason at once.
    fn wait(&self) -> EndReason;

    /// Whether the machine has ended, or is just about to: [`Machine::wait`] may take a moment to return yet.
    fn has_ended(&self) -> bool;

    fn info(&self) -> MachineInfo;

    /// What its devices have carried.
    fn traffic(&self) -> Traffic;

    /// Devices whose requests wait for something that the host lacks.
    fn waiting(&self) -> Vec<Waiting> {
        Vec::new()
    }

    /// Adds a disk while the guest runs. Returns when the back end is there; the guest takes the disk when it likes.
    fn attach_disk(&self, disk: &DiskConfig) -> Result<(), MachineError>;

    /// Adds a network interface while the guest runs; it has its number.
    fn attach_vif(&self, vif: &VifConfig) -> Result<(), MachineError>;

    /// Takes a device away: after the guest has let go of it, or at once with `force`. An error leaves it attached.
    fn detach_device(&self, kind: DeviceKind, devid: u32, force: bool) -> Result<(), MachineError>;

    /// Makes a disk larger or smaller, in bytes; the guest is told.
    fn resize_disk(&self, devid: u32, bytes: u64) -> Result<(), MachineError>;

    /// Puts another medium into a CD-ROM drive, or none.
    fn change_medium(&self, disk: &DiskConfig) -> Result<(), MachineError>;

    /// Asks the guest's kernel for the magic SysRq function of a key.
    fn send_sysrq(&self, key: char) -> Result<(), MachineError>;

    /// Raises an event at a vCPU.
    fn trigger(&self, trigger: Trigger, vcpu: u32) -> Result<(), MachineError>;

    /// Gives a core file of the guest, which may run on meanwhile or have ended, in pieces; returns its size in bytes.
    fn dump_core(&self, piece: Piece<'_>) -> Result<u64, MachineError>;

    /// What is known of the inside, for somebody who looks for a fault; lines of text.
    fn describe(&self) -> String {
        format!("{:?}", self.info())
    }

    /// All vCPUs by number, those that the guest does not use too.
    fn vcpus(&self) -> Vec<VcpuInfo>;

    /// Changes which host CPUs one vCPU, or all, may run on and prefer; what is `None` stays.
    fn pin(
        &self,
        vcpu: Option<u32>,
        hard: Option<&Affinity>,
        soft: Option<&Affinity>,
    ) -> Result<(), MachineError>;

    /// The share of the host's CPUs.
    fn share(&self) -> Share;

    fn set_share(&self, share: Share) -> Result<(), MachineError>;

    /// Asks the guest to use its first `online` vCPUs.
    fn set_vcpus(&self, online: u32) -> Result<(), MachineError>;

    /// Asks the guest to have this much memory, and lets it have no more. `promised` tells what other domains may still take of the host's, in
    /// bytes: what the host cannot give is refused.
    fn set_memory_target(&self, kib: u64, promised: &dyn Fn() -> u64) -> Result<(), MachineError>;

    /// Lets the guest have this much memory, of which it is not told.
    fn set_memory_max(&self, kib: u64, promised: &dyn Fn() -> u64) -> Result<(), MachineError>;

    /// Has the guest suspend itself and returns when it can be saved. Asks `given_up` now and then whether to go on waiting.
    fn suspend(&self, given_up: &dyn Fn() -> bool) -> Result<(), MachineError>;

    /// Whether the guest is suspended and stays so before [`Machine::resume`]. That of a machine that has ended is not.
    fn is_suspended(&self) -> bool;

    /// Sends most of the memory of a machine that runs, in rounds, each of which is told to `progress`: [`Machine::save`], into the same stream, sends what is left
    /// then. Asks `given_up` now and then whether to go on.
    fn send_live(
        &self,
        to: &mut SaveStream<'_>,
        progress: &mut dyn FnMut(LiveRound),
        given_up: &dyn Fn() -> bool,
    ) -> Result<(), MachineError> {
        let _ = (to, progress, given_up);
        Ok(())
    }

    /// Forgets what was sent live, as the machine is not saved into that stream; what the guest writes is not followed any more. Does nothing where nothing was.
    fn forget_live(&self) {}

    /// Writes all of a suspended machine but its configuration.
    fn save(&self, to: &mut SaveStream<'_>) -> Result<(), MachineError>;

    /// What the machine shows of itself to the host it is to move to, for [`Program::admit`](crate::Program::admit). Refuses what could not be moved now.
    fn passport(&self) -> Result<String, MachineError>;

    /// Lets go of what the devices of a suspended guest stand for: another process may have it when this returns, and all that was written is durable. Whatever it
    /// returns, the guest must not go on before [`Machine::take_again`].
    fn let_go(&self) -> Result<(), MachineError>;

    /// Takes all again that was let go of. After an error the guest must not go on, and this may be called again.
    fn take_again(&self) -> Result<(), MachineError>;

    /// Lets a suspended guest go on here. Does nothing to others.
    fn resume(&self);

    /// Ends a machine whose guest is suspended, for it is somewhere else now; false where the guest has gone on.
    fn end_saved(&self) -> bool;

    /// Input for the guest's console; returns how many bytes were taken, 0 where there is no room now.
    fn console_input(&self, bytes: &[u8]) -> usize;
}
