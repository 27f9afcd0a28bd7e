//! `block-list` and `network-list`: what the xenstore says of devices, in xl's columns.

use std::fmt::Write;

use anyhow::Context;
use hospes_store::{StoreAccess, domain_path};
use hospes_toolstack::{Answer, DeviceKind, Error, Host};
use hospes_units::DomId;

use crate::Outcome;
use crate::output::{print, say, tell};
use crate::table::Call;

/// What xl prints for a number that is not there.
const MISSING: i64 = -1;

pub(crate) fn block_list(call: &Call) -> Outcome {
    let mut table = format!(
        "{:<5} {:<3} {:<6} {:<5} {:<6} {:<8} {:<30}\n",
        "Vdev", "BE", "handle", "state", "evt-ch", "ring-ref", "BE-path"
    );
    let host = Host::from_environment()?;
    let store = host.store()?;
    for who in &call.args.values {
        // As xl does: the others are still to be listed.
        match domid(&host, who) {
            Ok(domid) => table.push_str(&disks(&store, domid)?),
            Err(fault) => tell!("{fault}"),
        }
    }
    Ok(print(format_args!("{table}"))?)
}

pub(crate) fn network_list(call: &Call) -> Outcome {
    let mut table = format!(
        "{:<3} {:<2} {:<17} {:<6} {:<5} {:<6} {:>5}/{:<5} {:<30}\n",
        "Idx", "BE", "Mac Addr.", "handle", "state", "evt-ch", "tx-", "rx-ring-ref", "BE-path"
    );
    let host = Host::from_environment()?;
    let store = host.store()?;
    let mut notes = String::new();
    for who in &call.args.values {
        let domid = domid(&host, who)?;
        table.push_str(&vifs(&store, domid)?);
        notes.push_str(&troubles(&host, domid)?);
    }
    print(format_args!("{table}"))?;
    say(format_args!("{notes}"));
    Ok(())
}

/// What is wrong with a domain's network interfaces.
fn troubles(host: &Host, domid: DomId) -> Result<String, Error> {
    let mut entries = host.entries()?;
    entries.retain(|entry| entry.domid == domid);
    let mut notes = String::new();
    for (_, answer) in host.infos(entries) {
        let Answer::Told(info) = answer else { continue };
        for device in info.waiting.iter().filter(|d| d.kind == DeviceKind::Vif) {
            let _ = writeln!(notes, "{}: vif {}: {}", info.name, device.devid, device.why);
        }
    }
    Ok(notes)
}

/// The host has an id too, and no devices.
pub(crate) fn domid(host: &Host, who: &str) -> Result<DomId, Error> {
    match host.find(who) {
        Ok(entry) => Ok(entry.domid),
        Err(Error::Host) => Ok(DomId::HOST),
        Err(fault) => Err(fault),
    }
}

/// A device: what tools wrote down of it, and what the guest says.
struct Device<'a> {
    store: &'a dyn StoreAccess,
    /// The guest cannot write here.
    tools: String,
    frontend: String,
    number: u32,
}

impl Device<'_> {
    fn known(&self, name: &str) -> String {
        let path = format!("{}/{name}", self.tools);
        self.store.read_text(&path).unwrap_or_default()
    }

    /// The first of the guest's nodes that is a number; nothing else is printed of what it writes.
    fn number(&self, names: &[&str]) -> i64 {
        names
            .iter()
            .find_map(|name| {
                let path = format!("{}/{name}", self.frontend);
                self.store.read_text(&path)?.trim().parse::<u32>().ok()
            })
            .map_or(MISSING, i64::from)
    }

    /// The domain in `/local/domain/0/backend/vbd/3/51712`.
    fn backend_id(&self) -> i64 {
        let path = self.known("backend");
        let id = path.split('/').nth(3).and_then(|id| id.parse::<u16>().ok());
        id.map_or(MISSING, i64::from)
    }
}

/// The devices of a kind, by number; an error where the store does not answer.
fn devices<'a>(
    store: &'a dyn StoreAccess,
    domid: DomId,
    kind: &str,
) -> anyhow::Result<Vec<Device<'a>>> {
    let tools = format!("/libxl/{domid}/device/{kind}");
    let names = match store.list(&tools) {
        Err(hospes_store::Error::NoEntry) => Vec::new(),
        names => names.context("cannot read the list of devices")?,
    };
    let mut numbers: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    let devices = numbers.into_iter().map(|number| Device {
        store,
        tools: format!("{tools}/{number}"),
        frontend: format!("{}/device/{kind}/{number}", domain_path(domid)),
        number,
    });
    Ok(devices.collect())
}

fn disks(store: &dyn StoreAccess, domid: DomId) -> anyhow::Result<String> {
    let mut rows = String::new();
    for device in devices(store, domid, "vbd")? {
        // Writing to a string does not fail.
        let _ = writeln!(
            rows,
            "{:<5} {:<3} {:<6} {:<5} {:<6} {:<8} {:<30}",
            device.number,
            device.backend_id(),
            domid.0,
            device.number(&["state"]),
            device.number(&["event-channel", "queue-0/event-channel"]),
            device.number(&[
                "ring-ref",
                "ring-ref0",
                "queue-0/ring-ref",
                "queue-0/ring-ref0"
            ]),
            device.known("backend"),
        );
    }
    Ok(rows)
}

fn vifs(store: &dyn StoreAccess, domid: DomId) -> anyhow::Result<String> {
    let mut rows = String::new();
    for device in devices(store, domid, "vif")? {
        let _ = writeln!(
            rows,
            "{:<3} {:<2} {:<17}{:>6} {:>5} {:>6} {:>5}/{:<11} {:<30}",
            device.number,
            device.backend_id(),
            device.known("mac"),
            device.number,
            device.number(&["state"]),
            device.number(&[
                "event-channel",
                "event-channel-tx",
                "queue-0/event-channel",
                "queue-0/event-channel-tx"
            ]),
            device.number(&["tx-ring-ref", "queue-0/tx-ring-ref"]),
            device.number(&["rx-ring-ref", "queue-0/rx-ring-ref"]),
            device.known("backend"),
        );
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hospes_store::LocalStore;

    /// Nodes in the guest's directory and, beginning with `tools/`, in that of the tools.
    fn store(nodes: &[(&str, &str)]) -> LocalStore {
        let store = LocalStore::default();
        for (path, value) in nodes {
            let path = match path.strip_prefix("tools/") {
                Some(path) => format!("/libxl/3/device/{path}"),
                None => format!("/local/domain/3/device/{path}"),
            };
            store.write(&path, value.as_bytes()).expect("a node");
        }
        store
    }

    #[test]
    fn disks_have_the_columns_of_xl() {
        let store = store(&[
            (
                "tools/vbd/51728/backend",
                "/local/domain/0/backend/vbd/3/51728",
            ),
            ("vbd/51728/state", "1"),
            (
                "tools/vbd/51712/backend",
                "/local/domain/0/backend/vbd/3/51712",
            ),
            ("vbd/51712/state", "4"),
            ("vbd/51712/queue-0/event-channel", "12"),
            ("vbd/51712/ring-ref", "8"),
            ("vbd/7/state", "4"),
        ]);
        assert_eq!(
            disks(&store, DomId(3)).expect("it answers"),
            "51712 0   3      4     12     8        /local/domain/0/backend/vbd/3/51712\n\
             51728 0   3      1     -1     -1       /local/domain/0/backend/vbd/3/51728\n"
        );
        assert_eq!(disks(&store, DomId(4)).expect("it answers"), "");
    }

    #[test]
    fn vifs_have_the_columns_of_xl() {
        let store = store(&[
            ("tools/vif/0/backend", "/local/domain/0/backend/vif/3/0"),
            ("tools/vif/0/mac", "00:16:3e:00:00:01"),
            ("vif/0/state", "4"),
            ("vif/0/event-channel-tx", "7"),
            ("vif/0/tx-ring-ref", "768"),
            ("vif/0/rx-ring-ref", "769"),
        ]);
        assert_eq!(
            vifs(&store, DomId(3)).expect("it answers"),
            "0   0  00:16:3e:00:00:01     0     4      7   768/769         /local/domain/0/backend/vif/3/0\n"
        );
    }

    #[test]
    fn rows_hold_nothing_that_a_guest_made_up() {
        let store = store(&[
            ("tools/vif/0/backend", "/local/domain/0/backend/vif/3/0"),
            ("vif/0/backend", "/elsewhere"),
            ("vif/0/mac", "\x1b[2J"),
            ("vif/0/state", "four\n"),
        ]);
        let row = vifs(&store, DomId(3)).expect("it answers");
        assert!(
            !row.contains("elsewhere") && !row.contains('\x1b'),
            "{row:?}"
        );
        assert!(row.contains("    -1 "), "{row:?}");
    }
}
