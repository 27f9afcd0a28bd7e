//! Disks, CD-ROM drives and network interfaces of running domains.

use anyhow::anyhow;
use hospes_config::{DiskConfig, Vdev, VifConfig};
use hospes_toolstack::{self as toolstack, DeviceKind, Entry, Host, Request};

use crate::commands::failed;
use crate::output::{json, print, tell};
use crate::table::Call;
use crate::{Failure, Outcome};

pub(crate) fn block_attach(call: &Call) -> Outcome {
    let host = Host::from_environment()?;
    let entry = host.find(call.args.at(0))?;
    let specs: Vec<&str> = call.args.values[1..].iter().map(String::as_str).collect();
    let disk = DiskConfig::parse_all(&specs).map_err(|fault| in_spec("disk", &specs, &fault))?;
    if let Some(concern) = disk.concern(&entry.record.config.disks) {
        tell!("warning: {concern}");
    }
    if call.global.dry_run {
        return Ok(print(format_args!("disk: {}\n", json(&disk.to_json())))?);
    }
    Ok(host.attach_disk(&entry.domid.to_string(), disk)?)
}

fn in_spec(what: &str, specs: &[&str], fault: &hospes_config::SpecError) -> Failure {
    Failure::Failed(anyhow!(
        "{what} \"{}\": {fault}",
        specs.join(" ").escape_debug()
    ))
}

pub(crate) fn block_detach(call: &Call) -> Outcome {
    let host = Host::from_environment()?;
    let entry = host.find(call.args.at(0))?;
    let Some(devid) = disk_number(&entry, call.args.at(1)) else {
        return not_connected(call.args.at(1));
    };
    let request = Request::DetachDevice {
        kind: DeviceKind::Disk,
        devid,
        force: call.args.has("force"),
    };
    change(&host, &entry, &request, |now| {
        missing_disk(now, call.args.at(1))
    })
}

fn not_connected(what: &str) -> Outcome {
    failed(&format!("Error: Device {what} not connected."))
}

/// What there is to say where a domain has no such disk.
fn missing_disk(entry: &Entry, text: &str) -> Option<Outcome> {
    disk_number(entry, text)
        .is_none()
        .then(|| not_connected(text))
}

/// The number of a domain's disk: by the name the configuration gives it, or by any name or number of it.
fn disk_number(entry: &Entry, text: &str) -> Option<u32> {
    let number = text.parse::<Vdev>().ok()?.number;
    let disks = &entry.record.config.disks;
    disks
        .iter()
        .any(|disk| disk.vdev.number == number)
        .then_some(number)
}

/// Asks for a change of a device that the user has named and that was there. Where it is refused, another command may have taken the device away meanwhile:
/// `missing` says so in the user's words, as where it had not been there at all.
fn change(
    host: &Host,
    entry: &Entry,
    request: &Request,
    missing: impl Fn(&Entry) -> Option<Outcome>,
) -> Outcome {
    let who = entry.domid.to_string();
    let refused = match host.ask(&who, request) {
        Err(fault @ toolstack::Error::Refused { .. }) => fault,
        answered => return Ok(answered?),
    };
    let now = host.find(&who).ok();
    now.and_then(|entry| missing(&entry))
        .unwrap_or(Err(refused.into()))
}

pub(crate) fn block_resize(call: &Call) -> Outcome {
    let host = Host::from_environment()?;
    let entry = host.find(call.args.at(0))?;
    let Some(devid) = disk_number(&entry, call.args.at(1)) else {
        return not_connected(call.args.at(1));
    };
    let Some(bytes) = size_bytes(call.args.at(2)) else {
        return Err(Failure::Usage(format!(
            "`{}' is no size: write a number of bytes, or one with k, m, g or t behind it",
            call.args.at(2)
        )));
    };
    let request = Request::ResizeDisk { devid, bytes };
    change(&host, &entry, &request, |now| {
        missing_disk(now, call.args.at(1))
    })
}

/// `4096`, `64m`, `1g`.
fn size_bytes(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let (digits, shift) = match lower.as_bytes().last()? {
        b'b' => (&lower[..lower.len() - 1], 0),
        b'k' => (&lower[..lower.len() - 1], 10),
        b'm' => (&lower[..lower.len() - 1], 20),
        b'g' => (&lower[..lower.len() - 1], 30),
        b't' => (&lower[..lower.len() - 1], 40),
        _ => (lower.as_str(), 0),
    };
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

pub(crate) fn cd_insert(call: &Call) -> Outcome {
    change_medium(call, Some(call.args.at(2)))
}

pub(crate) fn cd_eject(call: &Call) -> Outcome {
    change_medium(call, None)
}

fn change_medium(call: &Call, file: Option<&str>) -> Outcome {
    let host = Host::from_environment()?;
    let entry = host.find(call.args.at(0))?;
    let spec = format!(
        "vdev={},access=r,devtype=cdrom,target={}",
        call.args.at(1),
        file.unwrap_or_default()
    );
    let disk = DiskConfig::parse(&spec).map_err(|fault| in_spec("disk", &[&spec], &fault))?;
    if call.global.dry_run {
        return Ok(print(format_args!("disk: {}\n", json(&disk.to_json())))?);
    }
    if let Some(target) = &disk.target
        && !target.exists()
    {
        return failed(&format!("Cannot stat file: {}", target.display()));
    }
    Ok(host.change_medium(&entry.domid.to_string(), disk)?)
}

pub(crate) fn network_attach(call: &Call) -> Outcome {
    let host = Host::from_environment()?;
    let entry = host.find(call.args.at(0))?;
    let specs: Vec<&str> = call.args.values[1..].iter().map(String::as_str).collect();
    let vif = VifConfig::parse(&specs.join(",")).map_err(|fault| in_spec("vif", &specs, &fault))?;
    if call.global.dry_run {
        return Ok(print(format_args!("vif: {}\n", json(&vif.to_json())))?);
    }
    Ok(host.attach_vif(&entry.domid.to_string(), vif)?)
}

pub(crate) fn network_detach(call: &Call) -> Outcome {
    let host = Host::from_environment()?;
    let entry = host.find(call.args.at(0))?;
    let which = call.args.at(1);
    let unknown = || failed(&format!("Unknown device {which}."));
    let Some(devid) = vif_number(&entry, which) else {
        return unknown();
    };
    let request = Request::DetachDevice {
        kind: DeviceKind::Vif,
        devid,
        force: false,
    };
    change(&host, &entry, &request, |now| {
        vif_number(now, which).is_none().then(unknown)
    })
}

/// The number of a domain's network interface, by number or address.
fn vif_number(entry: &Entry, text: &str) -> Option<u32> {
    let vifs = &entry.record.config.vifs;
    let found = if text.contains(':') {
        let mac = VifConfig::parse(&format!("mac={text}")).ok()?.mac?;
        vifs.iter().find(|vif| vif.mac == Some(mac))
    } else {
        let devid = text.parse().ok()?;
        vifs.iter().find(|vif| vif.devid == Some(devid))
    };
    found?.devid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_bytes_knows_units() {
        let cases = [
            ("4096", Some(4096)),
            ("64m", Some(64 << 20)),
            ("1G", Some(1 << 30)),
            ("2t", Some(2 << 40)),
            ("512b", Some(512)),
            ("99999999t", None),
            ("", None),
            ("m", None),
            ("1.5g", None),
            ("-1", None),
        ];
        for (text, bytes) in cases {
            assert_eq!(size_bytes(text), bytes, "{text:?}");
        }
    }
}
