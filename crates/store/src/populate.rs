//! The part of the tree that the tools write for a new PVH guest, as libxl does.

use hospes_units::DomId;

use crate::node::Perms;
use crate::tree::Error;
use crate::{Store, path};

/// What the tree says of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainEntry {
    pub domid: DomId,
    /// In its usual text form.
    pub uuid: String,
    pub name: String,
    /// RAM in KiB: exactly what the memory map lists, else the guest's balloon moves.
    pub memory_kib: u64,
    pub vcpus: u32,
    pub console_port: u32,
    pub console_ring: u64,
    pub store_port: u32,
    pub store_ring: u64,
}

/// A domain's home, without a slash at the end.
pub fn domain_path(domid: DomId) -> String {
    path::home(domid).trim_end_matches('/').to_owned()
}

impl Store {
    /// Writes the nodes of a new domain and introduces it.
    pub fn populate(&mut self, d: &DomainEntry) -> Result<(), Error> {
        let home = domain_path(d.domid);
        let vm = format!("/vm/{}", d.uuid);
        let read_only = Perms::read_only(d.domid);
        let memory = d.memory_kib.to_string();
        for (node, value) in [
            (vm.clone(), String::new()),
            (format!("{vm}/name"), d.name.clone()),
            (format!("{vm}/uuid"), d.uuid.clone()),
            (home.clone(), String::new()),
            (format!("{home}/vm"), vm),
            (format!("{home}/name"), d.name.clone()),
            (format!("{home}/domid"), d.domid.to_string()),
            (format!("{home}/cpu"), String::new()),
            (format!("{home}/memory"), String::new()),
            (format!("{home}/memory/static-max"), memory.clone()),
            (format!("{home}/memory/target"), memory),
            (format!("{home}/memory/videoram"), "0".to_owned()),
            (format!("{home}/device"), String::new()),
            (format!("{home}/control"), String::new()),
            (
                format!("{home}/control/platform-feature-multiprocessor-suspend"),
                "1".to_owned(),
            ),
            (
                format!("{home}/control/platform-feature-xs_reset_watches"),
                "1".to_owned(),
            ),
            (format!("{home}/store"), String::new()),
            (format!("{home}/store/port"), d.store_port.to_string()),
            (format!("{home}/store/ring-ref"), d.store_ring.to_string()),
        ] {
            self.put_node(&node, &value, &read_only)?;
        }
        for cpu in 0..d.vcpus {
            self.put_node(&format!("{home}/cpu/{cpu}"), "", &read_only)?;
            let node = format!("{home}/cpu/{cpu}/availability");
            self.put_node(&node, "online", &read_only)?;
        }
        let guest = Perms::owned(d.domid);
        for node in [
            "control/shutdown",
            "control/feature-poweroff",
            "control/feature-reboot",
            "control/feature-suspend",
            "control/sysrq",
            "device/suspend/event-channel",
            "data",
            "drivers",
            "feature",
            "attr",
            "error",
        ] {
            self.put_node(&format!("{home}/{node}"), "", &guest)?;
        }
        // Only the tools look at this; a guest that could write "tty" would choose what they open.
        let tools = Perms::owned(DomId::HOST);
        for (name, value) in [
            ("ring-ref", d.console_ring.to_string()),
            ("port", d.console_port.to_string()),
            ("type", "hospes".to_owned()),
            ("limit", "1048576".to_owned()),
            ("output", "pty".to_owned()),
            ("tty", String::new()),
        ] {
            self.put_node(&format!("{home}/console/{name}"), &value, &tools)?;
        }
        self.introduce(d.domid);
        Ok(())
    }

    /// Removes what [`Store::populate`] wrote, and announces that the domain has gone.
    pub fn depopulate(&mut self, domid: DomId, uuid: &str) -> Result<(), Error> {
        self.remove(&domain_path(domid))?;
        self.remove(&format!("/vm/{uuid}"))?;
        self.release(domid);
        Ok(())
    }

    /// Writes a node and says who may use it.
    pub fn put_node(&mut self, path: &str, value: &str, perms: &Perms) -> Result<(), Error> {
        self.write(path, value.as_bytes())?;
        self.set_perms(path, perms.clone())
    }
}
