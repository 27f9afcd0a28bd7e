//! The device lists of a configuration: every item on its own, then the items against each other.

use crate::diagnostic::{Location, Severity};
use crate::disk::DiskConfig;
use crate::domain::Reader;
use crate::parse::ValueKind;
use crate::vif::VifConfig;

/// Most devices of one kind: as many as fit the numbers of the old form without partitions, and network numbers.
const DEVICES_MAX: usize = 256;

impl Reader<'_> {
    pub(crate) fn disks(&mut self) -> Vec<DiskConfig> {
        let mut disks: Vec<DiskConfig> = Vec::new();
        for (text, location) in self.items("disk") {
            match DiskConfig::parse(&text) {
                Ok(disk) => match disks.iter().find(|d| d.vdev.number == disk.vdev.number) {
                    Some(other) => {
                        let message = format!(
                            "disk \"{}\": {} is the same device as {} of another disk: give each disk its own",
                            text.escape_debug(),
                            disk.vdev,
                            other.vdev
                        );
                        self.error(&location, message);
                    }
                    None => {
                        if let Some(concern) = disk.concern(&disks) {
                            let message = format!("disk \"{}\": {concern}", text.escape_debug());
                            self.report(Severity::Warning, &location, message);
                        }
                        disks.push(disk);
                    }
                },
                Err(fault) => self.error(
                    &location,
                    format!("disk \"{}\": {fault}", text.escape_debug()),
                ),
            }
        }
        disks
    }

    pub(crate) fn vifs(&mut self) -> Vec<VifConfig> {
        let mut vifs: Vec<VifConfig> = Vec::new();
        for (index, (text, location)) in self.items("vif").into_iter().enumerate() {
            match VifConfig::parse_known(&text) {
                Ok((mut vif, left_out)) => {
                    for fault in left_out {
                        let message = format!("vif \"{}\": {fault}; ignored", text.escape_debug());
                        self.report(Severity::Warning, &location, message);
                    }
                    // `items` hands out at most DEVICES_MAX.
                    let devid = vif.devid.unwrap_or(index as u32);
                    vif.devid = Some(devid);
                    if vifs.iter().any(|other| other.devid == Some(devid)) {
                        let message = format!(
                            "vif \"{}\": number {devid} belongs to another interface: choose another devid",
                            text.escape_debug()
                        );
                        self.error(&location, message);
                    } else if vif.mac.is_some() && vifs.iter().any(|other| other.mac == vif.mac) {
                        let message = format!(
                            "vif \"{}\": another interface of the domain has the same mac",
                            text.escape_debug()
                        );
                        self.report(Severity::Warning, &location, message);
                        vifs.push(vif);
                    } else {
                        vifs.push(vif);
                    }
                }
                Err(fault) => self.error(
                    &location,
                    format!("vif \"{}\": {fault}", text.escape_debug()),
                ),
            }
        }
        vifs
    }

    /// The texts of a list whose shape has been checked, with their places.
    fn items(&mut self, name: &str) -> Vec<(String, Location)> {
        let document = self.document;
        let Some(setting) = document.get(name) else {
            return Vec::new();
        };
        let ValueKind::List(values) = &setting.value.kind else {
            return Vec::new();
        };
        if values.len() > DEVICES_MAX {
            let message = format!(
                "`{name}' has {} items, at most {DEVICES_MAX} are possible",
                values.len()
            );
            self.error(&setting.location, message);
            return Vec::new();
        }
        values
            .iter()
            .filter_map(|value| match &value.kind {
                ValueKind::Atom(atom) => Some((atom.text.clone(), value.location.clone())),
                ValueKind::List(_) => None,
            })
            .collect()
    }
}
