//! Network interface specifications, xl-network-configuration(5).

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::spec::{SpecError, TRUST, flag, interface_name};

/// Where the frames of an interface go when no bridge is named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VifKind {
    /// Not said, or one of Xen's words `vif` and `ioemu`: the bridge, or the network of Hospes.
    #[default]
    Vif,
    /// `type=user`: a network in user space, for which no privilege is needed.
    User,
}

/// Limit of what a guest sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    pub bytes_per_s: u64,
    /// How often the credit is renewed, in microseconds; at least 1.
    pub interval_us: u32,
}

impl Rate {
    /// Bytes the guest may send in one interval; the first of the two numbers in the xenstore.
    pub fn bytes_per_interval(self) -> u64 {
        let bytes = u128::from(self.bytes_per_s) * u128::from(self.interval_us) / 1_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

/// A checked network interface specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VifConfig {
    /// `None`: the place in the list, or the lowest free number.
    pub devid: Option<u32>,
    /// `None`: one of Xen's range is drawn.
    pub mac: Option<[u8; 6]>,
    /// `None`: the network of Hospes, or the one in user space.
    pub bridge: Option<String>,
    pub kind: VifKind,
    /// Addresses the guest may use, with or without a prefix length. Empty: any.
    pub ip: Vec<String>,
    pub script: Option<String>,
    /// Name of the interface on the host; `None`: vifDOMID.DEVID.
    pub vifname: Option<String>,
    pub rate: Option<Rate>,
    pub mtu: Option<u32>,
    /// Interface of the host that a routed guest goes through (`gatewaydev`, formerly `netdev`).
    pub netdev: Option<String>,
    /// Domain of the back end; empty or "0" for the host.
    pub backend: String,
    /// Kind of emulated card; without effect, as no card is emulated.
    pub model: Option<String>,
    /// What the front end is told about the back end.
    pub trusted: bool,
}

impl Default for VifConfig {
    /// The interface of an empty specification.
    fn default() -> VifConfig {
        VifConfig {
            devid: None,
            mac: None,
            bridge: None,
            kind: VifKind::Vif,
            ip: Vec::new(),
            script: None,
            vifname: None,
            rate: None,
            mtu: None,
            netdev: None,
            backend: String::new(),
            model: None,
            trusted: true,
        }
    }
}

const KEYS: &str = "mac, bridge, ip, script, vifname, rate, mtu, gatewaydev, backend, type, model, devid, trusted, untrusted";
const MTU_MIN: u32 = 68;
/// What Linux takes for a tap: an Ethernet header less than its longest frame.
const MTU_MAX: u32 = 65521;
/// The host's ends of all interfaces have this address, as in Xen: a bridge keeps what is sent to it.
const HOST_MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
const RATE: &str =
    "NUMBER[GMK](B|b)/s with an interval behind it if wanted, for instance 10Mb/s or 1MB/s@20ms";
const INTERVAL_DEFAULT_US: u32 = 50_000;

impl VifConfig {
    /// Reads the arguments of `network-attach` joined by commas.
    pub fn parse(spec: &str) -> Result<VifConfig, SpecError> {
        VifConfig::read(spec, Err)
    }

    /// Reads one item of `vif=`. What xl warns of and goes on without is left out, and given back as well: keys and words that it does not know, and a wrong type.
    pub fn parse_known(spec: &str) -> Result<(VifConfig, Vec<SpecError>), SpecError> {
        let mut left_out = Vec::new();
        let vif = VifConfig::read(spec, |fault| {
            left_out.push(fault);
            Ok(())
        })?;
        Ok((vif, left_out))
    }

    /// Asks `leave_out` whether to go on where xl would.
    fn read(
        spec: &str,
        mut leave_out: impl FnMut(SpecError) -> Result<(), SpecError>,
    ) -> Result<VifConfig, SpecError> {
        let mut vif = VifConfig::default();
        for item in spec.split([',', '\n', '\r']) {
            let item = item.trim_start_matches([' ', '\t']);
            match item.split_once('=') {
                Some((key, value)) => match vif.keyed(key, value) {
                    Err(
                        fault @ (SpecError::UnknownKey { .. }
                        | SpecError::Unsupported { .. }
                        | SpecError::Flag { .. }
                        | SpecError::Value { key: "type", .. }),
                    ) => leave_out(fault)?,
                    other => other?,
                },
                None => match item {
                    "" => {}
                    "trusted" => vif.trusted = true,
                    "untrusted" => vif.trusted = false,
                    _ => leave_out(SpecError::Syntax {
                        text: item.escape_debug().to_string(),
                    })?,
                },
            }
        }
        // To a script it is what the script makes of it: a switch with the number of a VLAN, perhaps.
        if let (Some(bridge), None) = (&vif.bridge, &vif.script) {
            interface_name("bridge", bridge)?;
        }
        Ok(vif)
    }

    fn keyed(&mut self, key: &str, value: &str) -> Result<(), SpecError> {
        match key {
            "mac" => self.mac = mac(value)?,
            "bridge" => self.bridge = optional(value, |v| printable("bridge", v))?,
            "vifname" => self.vifname = optional(value, |v| interface_name("vifname", v))?,
            "gatewaydev" => self.netdev = optional(value, |v| interface_name("gatewaydev", v))?,
            "netdev" => self.netdev = optional(value, |v| interface_name("netdev", v))?,
            "script" => self.script = optional(value, |v| Ok(v.to_string()))?,
            "model" => self.model = optional(value, |v| Ok(v.to_string()))?,
            "backend" => self.backend = value.to_string(),
            "ip" => self.ip = addresses(value)?,
            "rate" => self.rate = Some(rate(value)?),
            "type" => {
                self.kind = match value {
                    "vif" | "ioemu" => VifKind::Vif,
                    "user" => VifKind::User,
                    _ => return Err(SpecError::value("type", value, "vif, ioemu or user")),
                }
            }
            "mtu" => {
                self.mtu = Some(number("mtu", value, MTU_MIN, MTU_MAX)?);
            }
            "devid" => self.devid = Some(number("devid", value, 0, 65535)?),
            "trusted" | "untrusted" => return flag(key, TRUST),
            "accel" => {
                return Err(SpecError::Unsupported {
                    key: "accel".into(),
                    hint: "it has been gone from Xen for long; remove it",
                });
            }
            _ if key == "forwarddev" || key.starts_with("colo_") => {
                return Err(SpecError::Unsupported {
                    key: key.into(),
                    hint: "there is no COLO replication; remove it",
                });
            }
            _ => {
                return Err(SpecError::UnknownKey {
                    kind: "network interface",
                    key: key.escape_debug().to_string(),
                    known: KEYS.into(),
                });
            }
        }
        Ok(())
    }
}

/// An empty value counts as not given.
fn optional(
    value: &str,
    check: impl Fn(&str) -> Result<String, SpecError>,
) -> Result<Option<String>, SpecError> {
    if value.is_empty() {
        Ok(None)
    } else {
        check(value).map(Some)
    }
}

fn printable(key: &'static str, value: &str) -> Result<String, SpecError> {
    if value.contains(char::is_control) {
        return Err(SpecError::value(
            key,
            value,
            "a text without control characters",
        ));
    }
    Ok(value.to_string())
}

fn number(key: &'static str, value: &str, min: u32, max: u32) -> Result<u32, SpecError> {
    match value.parse() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(SpecError::value(
            key,
            value,
            format!("a number from {min} to {max}"),
        )),
    }
}

/// All zero asks for a drawn one, as in libxl.
fn mac(value: &str) -> Result<Option<[u8; 6]>, SpecError> {
    let error = || {
        let allowed =
            "six pairs of hexadecimal digits, separated by colons, for instance 00:16:3e:74:3d:76";
        SpecError::value("mac", value, allowed)
    };
    let mut bytes = [0; 6];
    let mut groups = value.split(':');
    for byte in &mut bytes {
        let group = groups.next().ok_or_else(error)?;
        let digits = matches!(group.len(), 1 | 2) && group.bytes().all(|b| b.is_ascii_hexdigit());
        if !digits {
            return Err(error());
        }
        *byte = u8::from_str_radix(group, 16).map_err(|_| error())?;
    }
    if groups.next().is_some() {
        return Err(error());
    }
    if bytes[0] & 1 != 0 {
        let allowed =
            "the address of one interface, whose first byte is even; this is that of a group";
        return Err(SpecError::value("mac", value, allowed));
    }
    if bytes == HOST_MAC {
        let allowed = "any other: the host's ends of interfaces have this one, and no bridge would forward to the guest";
        return Err(SpecError::value("mac", value, allowed));
    }
    Ok((bytes != [0; 6]).then_some(bytes))
}

fn addresses(value: &str) -> Result<Vec<String>, SpecError> {
    let mut addresses = Vec::new();
    for text in value.split_ascii_whitespace() {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let longest = match address.parse::<IpAddr>() {
            Ok(IpAddr::V4(_)) => Some(32),
            Ok(IpAddr::V6(_)) => Some(128),
            Err(_) => None,
        };
        let good = match (longest, prefix) {
            (Some(_), None) => true,
            (Some(longest), Some(prefix)) => {
                prefix.bytes().all(|b| b.is_ascii_digit())
                    && prefix.parse::<u32>().is_ok_and(|bits| bits <= longest)
            }
            (None, _) => false,
        };
        if !good {
            let allowed = "an address such as 10.0.0.2, 10.0.0.0/24 or fd00::2, or several with blanks between them";
            return Err(SpecError::value("ip", text, allowed));
        }
        addresses.push(text.to_string());
    }
    Ok(addresses)
}

fn rate(value: &str) -> Result<Rate, SpecError> {
    let error = || SpecError::value("rate", value, RATE);
    let (amount, interval) = match value.split_once('@') {
        Some((amount, interval)) => (amount, Some(interval)),
        None => (value, None),
    };
    let amount = amount.strip_suffix("/s").ok_or_else(error)?;
    let (amount, bits) = match (amount.strip_suffix('b'), amount.strip_suffix('B')) {
        (Some(amount), _) => (amount, true),
        (None, Some(amount)) => (amount, false),
        (None, None) => return Err(error()),
    };
    let (digits, unit) = match amount.as_bytes().last() {
        Some(b'G') => (&amount[..amount.len() - 1], 1_000_000_000),
        Some(b'M') => (&amount[..amount.len() - 1], 1_000_000),
        Some(b'K') => (&amount[..amount.len() - 1], 1000),
        _ => (amount, 1),
    };
    let number = u64::from(positive(digits).ok_or_else(error)?) * unit;
    let bytes_per_s = if bits { number / 8 } else { number };
    let interval_us = match interval {
        Some(text) => interval_us(text).ok_or_else(error)?,
        None => INTERVAL_DEFAULT_US,
    };
    let rate = Rate {
        bytes_per_s,
        interval_us,
    };
    if rate.bytes_per_interval() == 0 {
        let allowed = "at least one byte in each interval: raise the rate or the interval";
        return Err(SpecError::value("rate", value, allowed));
    }
    Ok(rate)
}

/// `20ms`, `500us`, `2s` and, as in libxl, `2` for two seconds.
fn interval_us(text: &str) -> Option<u32> {
    let text = text.strip_suffix('s').unwrap_or(text);
    let (digits, unit) = match text.as_bytes().last()? {
        b'm' => (&text[..text.len() - 1], 1000),
        b'u' => (&text[..text.len() - 1], 1),
        _ => (text, 1_000_000),
    };
    positive(digits)?.checked_mul(unit)
}

fn positive(digits: &str) -> Option<u32> {
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|number| *number > 0)
}
