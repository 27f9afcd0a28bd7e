//! What a machine process may ask its keeper for, and what it gets.

use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use hospes_config::VifConfig;
use hospes_domain::VifFacts;
use hospes_domain::net::{Guard, Rate};
use hospes_image::{Access, Facts, Report};
use serde::{Deserialize, Serialize};

/// A question. Devices are named by their numbers: what stands for them is the keeper's to know.
#[derive(Debug, Serialize, Deserialize)]
pub enum Want {
    /// A file of a disk: [`Opened`], with its descriptors.
    Open { path: PathBuf, access: Access },
    /// The file is closed.
    Closed(u64),
    /// An interface: [`Plugged`], with its descriptors.
    Plug(u32),
    /// The interface is plugged in: its script is to run.
    Online(u64),
    /// The interface is about to go: its script is to run.
    Offline(u64),
    /// Another stream for an interface whose own broke: one descriptor.
    Renew(u64),
    /// The interface is closed.
    Unplugged(u64),
    /// These threads are to have a share of their own.
    Group(Vec<i32>),
    /// Its weight, its limit and how many vCPUs it has.
    Share(u16, u16, u32),
    /// They have none any more.
    Ungroup,
    /// These threads are to have this nice value.
    Renice(Vec<i32>, i32),
    /// The same for the process's session.
    ReniceSession(i32),
}

/// The answer to [`Want::Open`].
#[derive(Debug, Serialize, Deserialize)]
pub enum Opened {
    Here { id: u64, facts: Facts },
    Refused(Report),
}

/// The answer to what asks of the host's scheduler: the number of the host's error, where there was one.
pub type Done = Result<(), i32>;

/// The answer to [`Want::Plug`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Plugged {
    pub id: u64,
    pub mac: [u8; 6],
    pub interface: Option<String>,
    pub bridge: Option<String>,
    pub mtu: u32,
    /// Frames come as a stream.
    pub is_stream: bool,
    /// The script that makes it ready.
    pub script: Option<String>,
    pub guard: Option<Claims>,
    /// Its stream can be had anew.
    pub renews: bool,
    /// It can be plugged in anew.
    pub returns: bool,
}

impl Plugged {
    /// What tools and scripts are told of an interface of this configuration.
    pub fn facts(&self, vif: &VifConfig) -> VifFacts {
        VifFacts {
            devid: vif.devid.unwrap_or(0),
            mac: self.mac,
            mtu: self.mtu,
            interface: self.interface.clone(),
            bridge: self.bridge.clone().or_else(|| vif.bridge.clone()),
            ip: vif.ip.clone(),
            rate: vif.rate.map(|rate| Rate {
                bytes: rate.bytes_per_interval(),
                interval: Duration::from_micros(rate.interval_us.into()),
            }),
            script: self.script.clone(),
            gateway_device: vif.netdev.clone(),
        }
    }
}

/// What the guest may claim to be; a [`Guard`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Claims {
    mac: [u8; 6],
    ip: Option<Vec<(IpAddr, u8)>>,
    host_v6: Vec<Ipv6Addr>,
}

impl From<Guard> for Claims {
    fn from(Guard { mac, ip, host_v6 }: Guard) -> Claims {
        Claims { mac, ip, host_v6 }
    }
}

impl From<Claims> for Guard {
    fn from(Claims { mac, ip, host_v6 }: Claims) -> Guard {
        Guard { mac, ip, host_v6 }
    }
}
