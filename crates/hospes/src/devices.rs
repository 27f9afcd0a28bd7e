//! Devices of a configuration as the domain takes them.

use hospes_config::{DiskConfig, DiskFormat};
use hospes_domain::frame::{DeviceInfo, Kind};
use hospes_domain::{DiskSpec, ImageFormat};
use hospes_toolstack::{DeviceKind, MachineError, MachineInfo};

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
