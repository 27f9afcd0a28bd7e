//! Devices of a configuration as the domain takes them.

use hospes_config::{DiskConfig, DiskFormat};
use hospes_domain::frame::{DeviceInfo, Kind};
use hospes_domain::{DiskSpec, ImageFormat};
use hospes_toolstack::{DeviceKind, MachineError, MachineInfo, Traffic};

/// A disk; `None` for an empty drive, of which a PVH guest sees nothing. The error is a sentence for the user.
pub fn disk_spec(disk: &DiskConfig) -> Result<Option<DiskSpec>, MachineError> {
    let vdev = &disk.vdev.name;
    if !matches!(disk.backend.as_str(), "" | "0" | "Domain-0") {
        return Err(format!(
            "Disk {vdev}: back ends run in the host only, not in domain {}: leave `backend' out",
            disk.backend
        )
        .into());
    }
    if let Some(script) = &disk.script {
        return Err(format!(
            "Disk {vdev}: the script {script} is not run: make the block device yourself and give its path"
        )
        .into());
    }
    let format = match disk.format {
        DiskFormat::Raw => ImageFormat::Raw,
        DiskFormat::Qcow2 => ImageFormat::Qcow2,
        DiskFormat::Empty => return Ok(None),
    };
    let Some(target) = disk.target.clone() else {
        return Ok(None);
    };
    Ok(Some(DiskSpec {
        devid: disk.vdev.number,
        vdev: vdev.clone(),
        target,
        format,
        read_only: disk.read_only,
        cdrom: disk.cdrom,
        discard: disk.discard.unwrap_or(true),
        direct: true,
        trusted: disk.trusted,
    }))
}

/// The kind of a device, as the domain has it.
pub fn kind(kind: DeviceKind) -> Kind {
    match kind {
        DeviceKind::Disk => Kind::Vbd,
        DeviceKind::Vif => Kind::Vif,
    }
}

/// What devices have carried, all of a kind together, by their counters.
pub fn traffic<'a>(devices: impl Iterator<Item = (Kind, &'a [(&'static str, u64)])>) -> Traffic {
    let mut traffic = Traffic::default();
    for (kind, counters) in devices {
        match kind {
            Kind::Vbd => traffic.disks += 1,
            Kind::Vif => traffic.vifs += 1,
        }
        for (name, value) in counters {
            let sum = match (kind, *name) {
                (Kind::Vif, "tx_bytes") => &mut traffic.sent_bytes,
                (Kind::Vif, "rx_bytes") => &mut traffic.received_bytes,
                (Kind::Vbd, "reads") => &mut traffic.reads,
                (Kind::Vbd, "writes") => &mut traffic.writes,
                (Kind::Vbd, "read_bytes") => &mut traffic.read_bytes,
                (Kind::Vbd, "written_bytes") => &mut traffic.written_bytes,
                _ => continue,
            };
            *sum = sum.saturating_add(*value);
        }
    }
    traffic
}

/// The machine and its devices, one a line, for somebody who looks for a fault.
pub fn describe(info: &MachineInfo, devices: &[DeviceInfo]) -> String {
    let mut text = format!("{info:?}\n");
    for device in devices {
        text += &format!("{}: {:?}", device.id, device.phase);
        for (name, value) in &device.counters {
            text += &format!(", {name} {value}");
        }
        if let Some(trouble) = &device.trouble {
            text += &format!(" ({trouble})");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_adds_up_what_all_devices_carry() {
        let vif = [("tx_bytes", 3), ("rx_bytes", 5), ("reads", 7)];
        let disk = [
            ("reads", 1),
            ("writes", 2),
            ("read_bytes", 512),
            ("written_bytes", 1024),
            ("tx_bytes", 9),
        ];
        let devices = [(Kind::Vif, &vif[..]), (Kind::Vbd, &disk), (Kind::Vif, &vif)];
        let expected = Traffic {
            vifs: 2,
            sent_bytes: 6,
            received_bytes: 10,
            disks: 1,
            reads: 1,
            writes: 2,
            read_bytes: 512,
            written_bytes: 1024,
        };
        assert_eq!(traffic(devices.into_iter()), expected);
    }
}
