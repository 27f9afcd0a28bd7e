//! Messages between commands and domain processes: one JSON object a line, in UTF-8, each with the protocol's version.
//!
//! On the control socket a client sends requests and gets one reply to each, in order. A peer that sends a line longer
//! than [`MAX_LINE_BYTES`] or something else than a request gets an error and is disconnected.

use std::io::{self, BufRead, Read, Write};

use hospes_config::{CpuList, DiskConfig, DomainConfig, Uuid, VifConfig};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::paths::Paths;
use crate::scheduling::{Share, VcpuInfo};
use crate::traffic::Traffic;

/// Version of all messages here.
pub const VERSION: u32 = 1;
/// Longest message, in bytes.
pub const MAX_LINE_BYTES: usize = 64 << 10;

/// What a guest is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownKind {
    Poweroff,
    Reboot,
}

/// A kind of device that can come and go while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    Disk,
    Vif,
}

/// What `trigger` raises; the words are those of xl.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trigger {
    Nmi,
    Reset,
    Init,
    Power,
    Sleep,
    S3Resume,
}

impl Trigger {
    pub const ALL: [Trigger; 6] = [
        Trigger::Nmi,
        Trigger::Reset,
        Trigger::Init,
        Trigger::Power,
        Trigger::Sleep,
        Trigger::S3Resume,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Trigger::Nmi => "nmi",
            Trigger::Reset => "reset",
            Trigger::Init => "init",
            Trigger::Power => "power",
            Trigger::Sleep => "sleep",
            Trigger::S3Resume => "s3resume",
        }
    }
}

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    Poweroff,
    Reboot,
    Suspend,
    /// With what is known of the cause.
    Crash(String),
    Watchdog,
    SoftReset,
    /// By a command.
    Destroyed,
}

impl EndReason {
    /// The number of Xen's public ABI (`SHUTDOWN_*`, sched.h), which xl prints; `None` for what is no shutdown.
    pub fn code(&self) -> Option<u32> {
        match self {
            EndReason::Poweroff => Some(0),
            EndReason::Reboot => Some(1),
            EndReason::Suspend => Some(2),
            EndReason::Crash(_) => Some(3),
            EndReason::Watchdog => Some(4),
            EndReason::SoftReset => Some(5),
            EndReason::Destroyed => None,
        }
    }
}

/// What [`Request::Wait`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Until {
    /// The guest has ended, even where the domain is preserved.
    Shutdown,
    /// The domain's id is free again.
    Death,
    /// The same, or the domain is kept under another name and a new one was to take its place.
    Succession,
}

/// One request on the control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    Info,
    Pause,
    Unpause,
    /// The reply comes when the guest has acknowledged it.
    Shutdown {
        kind: ShutdownKind,
        /// Nothing is to come behind the domain, whatever its configuration says. Then the reply does not wait for the guest.
        #[serde(default)]
        last: bool,
    },
    /// The reply comes when the domain is gone. There is none where it has become another id's before it could be
    /// destroyed: then that one is to be asked.
    Destroy,
    /// All vCPUs.
    Vcpus,
    /// Changes which host CPUs one vCPU, or all, may run on and prefer; what is `None` stays.
    Pin {
        vcpu: Option<u32>,
        hard: Option<CpuList>,
        soft: Option<CpuList>,
    },
    /// The domain's share of the host's CPUs.
    Share,
    /// Changes the share; what is `None` stays.
    SetShare {
        weight: Option<u16>,
        cap: Option<u16>,
    },
    /// How many vCPUs the guest is to use.
    SetVcpus {
        online: u32,
    },
    /// How much memory the guest is to have. It stays through reboots of the domain.
    SetMemoryTarget {
        kib: u64,
    },
    /// How much memory the guest may have.
    SetMemoryMax {
        kib: u64,
    },
    Wait {
        until: Until,
    },
    /// The reply comes when the back end is there. What is attached stays through reboots of the domain.
    AttachDisk {
        disk: DiskConfig,
    },
    /// Without a number the lowest free one is taken.
    AttachVif {
        vif: VifConfig,
    },
    /// The reply comes when the device is gone.
    DetachDevice {
        kind: DeviceKind,
        devid: u32,
        force: bool,
    },
    ResizeDisk {
        devid: u32,
        bytes: u64,
    },
    /// Into a CD-ROM drive that is there; without a target the drive is emptied.
    ChangeMedium {
        disk: DiskConfig,
    },
    Sysrq {
        key: char,
    },
    Trigger {
        trigger: Trigger,
        vcpu: u32,
    },
    Rename {
        name: String,
    },
    /// The configuration that the domain is restarted with; name and UUID stay.
    UpdateConfig {
        config: Box<DomainConfig>,
    },
    /// Writes what is known of the domain into its log.
    Describe,
    /// Behind [`Reply::Dumping`] comes a core file, of a guest that goes on as it was.
    DumpCore,
    /// The domain is to go to another host; behind [`Reply::Saving`] comes its stream, as for [`Request::Save`], of which all but the configuration comes when the
    /// client has said [`MoveStep::Send`]. The other steps follow it. A client that leaves before [`MoveStep::GiveAway`] has nothing become of it.
    Migrate {
        config: Option<Box<DomainConfig>>,
    },
    /// The guest suspends itself; behind [`Reply::Saving`] comes the domain as a stream, with this configuration or its own, and then the client says what
    /// becomes of it, an [`AfterSave`].
    Save {
        config: Option<Box<DomainConfig>>,
    },
}

/// What becomes of a domain whose stream the client has safely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AfterSave {
    Destroy,
    GoOn { paused: bool },
}

/// What becomes of a domain that is on its way to another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveStep {
    /// The other host would take it: the stream is to come.
    Send,
    /// The other host has all of it: from here on the guest never goes on here by itself. Answered.
    GiveAway,
    /// It runs on the other host: the domain is to end. Answered when it has.
    Ended,
    /// It is not known whether it runs on the other host, for this reason.
    Unsure(String),
}

impl Request {
    /// Whether it wants something else of the domain than to tell of itself, to stop for a while or to end.
    pub(crate) fn is_change(&self) -> bool {
        !matches!(
            self,
            Request::Info
                | Request::Vcpus
                | Request::Share
                | Request::Pause
                | Request::Unpause
                | Request::Shutdown { last: true, .. }
                | Request::Destroy
                | Request::Wait { .. }
                | Request::Describe
                | Request::DumpCore
        )
    }

    /// Whether it is done at once and changes nothing that would have to go along to another host ([`crate::instance::Instance::order`]).
    pub(crate) fn is_order(&self) -> bool {
        matches!(
            self,
            Request::Shutdown { last: false, .. }
                | Request::Sysrq { .. }
                | Request::Trigger { .. }
                | Request::Pin { .. }
        )
    }

    /// Whether it changes what stands in the registry or in the store.
    pub(crate) fn is_written_down(&self) -> bool {
        self.is_change() && !matches!(self, Request::Trigger { .. } | Request::Pin { .. })
    }

    /// Whether it means the guest, and has no meaning when that has ended.
    pub(crate) fn asks_guest(&self) -> bool {
        self.is_change()
            && !matches!(
                self,
                Request::Rename { .. }
                    | Request::UpdateConfig { .. }
                    | Request::SetMemoryTarget { .. }
                    | Request::SetMemoryMax { .. }
            )
    }
}

/// How a domain ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// `None` where the domain process died before it could say.
    pub reason: Option<EndReason>,
    /// True where the domain is gone and not only shut down.
    pub dead: bool,
    /// Id of the domain that took its place (a reboot gives a new id).
    pub next: Option<u16>,
    /// Why no domain could take its place, where one was to and it is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alone: Option<String>,
}

/// What is known of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainInfo {
    pub domid: u16,
    pub name: String,
    pub uuid: Uuid,
    /// Memory the guest has now, in KiB.
    pub memory_kib: u64,
    /// Memory that it does not use yet and may take at any time, in KiB.
    #[serde(default)]
    pub promised_kib: u64,
    pub vcpus_online: u32,
    /// In nanoseconds.
    pub cpu_time_ns: u64,
    pub running: bool,
    pub blocked: bool,
    pub paused: bool,
    /// Why the guest has ended, where it has.
    pub shutdown: Option<EndReason>,
    pub dying: bool,
    #[serde(default)]
    pub traffic: Traffic,
    /// Devices whose requests wait.
    #[serde(default)]
    pub waiting: Vec<Waiting>,
    /// It is on its way to another host or from one, or is being saved: what becomes of it is decided soon.
    #[serde(default)]
    pub moving: bool,
    /// Why the guest is held until somebody decides what becomes of it: a sentence for the user.
    #[serde(default)]
    pub held: Option<String>,
}

/// A device whose requests wait for something that the host lacks, such as room for a disk's image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    pub kind: DeviceKind,
    pub devid: u32,
    /// A sentence for the user: what is missing, and what to do.
    pub why: String,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    Done,
    Info(Box<DomainInfo>),
    Ended(Ended),
    Vcpus {
        vcpus: Vec<VcpuInfo>,
    },
    Share(Share),
    /// What follows is no message but a stream.
    Saving,
    /// What follows is pieces of a file.
    Dumping,
    Error {
        message: String,
    },
}

/// What a domain process is told at its start, on its standard input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// With absolute paths and a UUID.
    pub config: DomainConfig,
    /// Leave the domain paused.
    pub paused: bool,
    /// Whether the stream of a saved domain follows this message, from behind its configuration to its end.
    #[serde(default)]
    pub restore: bool,
    /// What a restored domain is started with the next time, where that was set apart.
    #[serde(default)]
    pub next: Option<Box<DomainConfig>>,
    /// What a domain that comes from another host shows there ([`crate::Machine::passport`]). It answers with [`Launched::Accepted`] before it reads the stream, and
    /// runs when it has read [`Arrival`] behind it.
    #[serde(default)]
    pub passport: Option<String>,
    pub paths: Paths,
}

/// The name of a domain that comes from another host and may not run yet.
pub(crate) fn incoming_name(name: &str) -> String {
    format!("{name}--incoming")
}

/// The name of a domain that was given away to another host.
pub(crate) fn away_name(name: &str) -> String {
    format!("{name}--migratedaway")
}

impl Launch {
    /// The domain's name at first, which its logs have.
    pub(crate) fn first_name(&self) -> String {
        match self.passport {
            Some(_) => incoming_name(&self.config.name),
            None => self.config.name.clone(),
        }
    }
}

/// The last thing that a domain from another host is told: it is all there, and nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Arrival {
    /// Leave it paused.
    pub paused: bool,
}

/// What a domain process answers on its standard output: once, and where it comes from another host three times.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Launched {
    /// It may come.
    Accepted,
    Domain {
        domid: u16,
    },
    /// It is no other host's any more; with what the user should know.
    Arrived {
        note: Option<String>,
    },
    Error {
        message: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Message<T> {
    version: u32,
    body: T,
}

/// One message as a line.
pub fn encode<T: Serialize>(body: &T) -> Result<Vec<u8>> {
    let message = Message {
        version: VERSION,
        body,
    };
    // Of all that is sent, nothing but a path can be no text.
    let mut line = serde_json::to_vec(&message).map_err(Error::NotText)?;
    line.push(b'\n');
    if line.len() > MAX_LINE_BYTES {
        return Err(Error::Protocol(format!(
            "a message of {} bytes is too long",
            line.len()
        )));
    }
    Ok(line)
}

/// The message in a line.
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let fault = |fault: serde_json::Error| {
        Error::Protocol(format!("a message is not understood ({fault})"))
    };
    // First the version alone: the rest may look different in another one.
    let Version { version } = serde_json::from_slice(line).map_err(fault)?;
    if version != VERSION {
        return Err(Error::Protocol(format!(
            "it speaks version {version}, this is version {VERSION}"
        )));
    }
    let message: Message<T> = serde_json::from_slice(line).map_err(fault)?;
    Ok(message.body)
}

/// Writes one message.
pub fn send<T: Serialize>(mut to: impl Write, body: &T) -> Result<io::Result<()>> {
    let line = encode(body)?;
    Ok(to.write_all(&line).and_then(|()| to.flush()))
}

/// Reads one line without its end; `None` at the end of the stream.
pub fn read_line(from: &mut impl BufRead) -> Result<io::Result<Option<Vec<u8>>>> {
    let mut line = Vec::new();
    if let Err(fault) = from
        .take(MAX_LINE_BYTES as u64 + 1)
        .read_until(b'\n', &mut line)
    {
        return Ok(Err(fault));
    }
    if line.len() > MAX_LINE_BYTES {
        return Err(Error::Protocol(format!(
            "a line has more than {MAX_LINE_BYTES} bytes"
        )));
    }
    match line.pop() {
        Some(b'\n') => Ok(Ok(Some(line))),
        Some(_) => Err(Error::Protocol("the stream ends inside a line".into())),
        None => Ok(Ok(None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn decode_shutdown_that_does_not_say_is_not_the_last() {
        let line =
            format!(r#"{{"version":{VERSION},"body":{{"op":"shutdown","kind":"poweroff"}}}}"#);
        let expected = Request::Shutdown {
            kind: ShutdownKind::Poweroff,
            last: false,
        };
        let decoded: Request = decode(line.as_bytes()).expect("a request");
        assert_eq!(decoded, expected);
    }

    #[test]
    fn decode_encoded_request_returns_it() {
        for request in [
            Request::Info,
            Request::Shutdown {
                kind: ShutdownKind::Reboot,
                last: true,
            },
            Request::Wait {
                until: Until::Death,
            },
            Request::Pin {
                vcpu: None,
                hard: "0-3,^2".parse().ok(),
                soft: None,
            },
        ] {
            let line = encode(&request).expect("short");
            assert_eq!(decode::<Request>(&line).expect("valid"), request);
        }
    }

    #[test]
    fn decode_other_version_names_both() {
        let error = decode::<Request>(b"{\"version\":2,\"body\":{\"op\":\"fly\"}}")
            .expect_err("another version");
        assert!(
            error.to_string().contains("version 2, this is version 1"),
            "{error}"
        );
    }

    #[test]
    fn decode_unknown_request_is_an_error() {
        for line in [
            &b"{\"version\":1,\"body\":{\"op\":\"fly\"}}"[..],
            b"{}",
            b"",
            b"[1]",
            b"\xff",
        ] {
            assert!(decode::<Request>(line).is_err());
        }
    }

    #[test]
    fn read_line_too_long_is_an_error() {
        let long = vec![b'x'; MAX_LINE_BYTES + 2];
        assert!(read_line(&mut &long[..]).is_err());
        assert!(read_line(&mut &b"half"[..]).is_err());
        assert!(matches!(read_line(&mut &b""[..]), Ok(Ok(None))));
    }

    proptest! {
        #[test]
        fn decode_any_bytes_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Reply>(&bytes);
            let _ = read_line(&mut &bytes[..]);
        }

        #[test]
        fn decode_encoded_reply_returns_it(message in "\\PC{0,80}") {
            let reply = Reply::Error { message };
            prop_assert_eq!(decode::<Reply>(&encode(&reply).expect("short")).expect("valid"), reply);
        }
    }
}
