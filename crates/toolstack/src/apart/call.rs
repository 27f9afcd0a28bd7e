//! What a keeper asks of its machine process: the methods of [`Machine`](crate::Machine), one call each.

use hospes_config::{DiskConfig, DomainConfig, Uuid, VifConfig};
use hospes_migration::LiveRound;
use hospes_units::CpuSet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::protocol::{DeviceKind, ShutdownKind, Trigger};
use crate::scheduling::{Affinity, Share};

/// A call of the keeper's.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Call {
    /// The first one, with a descriptor for what the guest prints and, where it was saved, one for the stream it comes from.
    Build(Box<Build>),
    MakeReady,
    Unpause,
    Pause,
    RequestShutdown(ShutdownKind),
    WaitAcknowledged,
    Destroy,
    Leave,
    GiveUpDevices,
    Wait,
    HasEnded,
    Info,
    Traffic,
    Waiting,
    AttachDisk(Box<DiskConfig>),
    AttachVif(Box<VifConfig>),
    DetachDevice {
        kind: DeviceKind,
        devid: u32,
        force: bool,
    },
    ResizeDisk {
        devid: u32,
        bytes: u64,
    },
    ChangeMedium(Box<DiskConfig>),
    SendSysrq(char),
    Trigger {
        trigger: Trigger,
        vcpu: u32,
    },
    DumpCore,
    Describe,
    Vcpus,
    Pin {
        vcpu: Option<u32>,
        hard: Option<Cpus>,
        soft: Option<Cpus>,
    },
    Share,
    SetShare(Share),
    SetVcpus(u32),
    SetMemoryTarget(u64),
    SetMemoryMax(u64),
    Suspend,
    IsSuspended,
    SendLive,
    ForgetLive,
    Save,
    Passport,
    LetGo,
    TakeAgain,
    Resume,
    EndSaved,
    ConsoleInput(Vec<u8>),
}

/// What a machine is made of.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Build {
    pub(super) domid: u16,
    pub(super) uuid: Uuid,
    pub(super) config: DomainConfig,
    /// Bytes of the saved stream that were read ahead and follow this message; `None` where nothing was saved.
    pub(super) ahead: Option<u32>,
}

/// Host CPUs; `None` means all.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Cpus(Option<String>);

impl Cpus {
    pub(super) fn new(affinity: &Affinity) -> Cpus {
        Cpus(affinity.as_ref().map(ToString::to_string))
    }

    pub(super) fn affinity(&self) -> Result<Affinity, String> {
        let parse = |text: &String| {
            let set = text.parse::<CpuSet>();
            set.map_err(|_| format!("`{text}' are no CPUs"))
        };
        self.0.as_ref().map(parse).transpose()
    }
}

/// What the machine process says on a call's connection.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Back {
    /// How much memory have others been promised? Answered by bytes.
    Promised,
    /// Has whoever waits given up? Answered by yes or no.
    GivenUp,
    Round {
        number: u32,
        pages: u64,
        bytes_per_s: u64,
        left: u64,
    },
    /// So many bytes of the stream follow.
    Bytes(u32),
    /// So many bytes of the core file follow, which stand there. Answered by the error in writing them, where there is one.
    Piece { offset: u64, bytes: u32 },
    /// The last one.
    Done(Result<Value, String>),
}

impl Back {
    pub(super) fn round(round: LiveRound) -> Back {
        Back::Round {
            number: round.number,
            pages: round.pages,
            bytes_per_s: round.bytes_per_s,
            left: round.left,
        }
    }
}

/// See [`hospes_store_server::Connector::trouble`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum StoreTrouble {
    Full,
    OtherVersion,
}

/// What the machine process asks its keeper for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// A connection to the store, with this domain's rights.
    Store,
    /// Why the store's process cannot be had, or not for changes: a [`StoreTrouble`], if it is known.
    StoreTrouble,
    /// How much memory others have been promised, in bytes.
    Promised,
    /// What the program knows.
    Program(Value),
}

/// The answer to a question, whose descriptors come with it.
pub(super) type Answer = Result<Value, String>;
