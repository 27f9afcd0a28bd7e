//! The configuration as `xl create -n` and `xl list -l` print it: libxl's JSON form of a domain configuration.

use serde_json::{Map, Value, json};

use crate::domain::{DomainConfig, EventAction, GuestType};

impl DomainConfig {
    /// An object with `c_info`, `b_info` and the actions. Memory is in KiB, as in libxl.
    pub fn to_json(&self) -> Value {
        let kind = match self.guest_type {
            GuestType::Pvh => "pvh",
        };
        let mut create = Map::new();
        create.insert("type".into(), json!(kind));
        create.insert("name".into(), json!(self.name));
        if let Some(uuid) = self.uuid {
            create.insert("uuid".into(), json!(uuid));
        }
        let mut build = Map::new();
        build.insert("max_vcpus".into(), json!(self.maxvcpus));
        build.insert("avail_vcpus".into(), (0..self.vcpus).collect());
        build.insert("max_memkb".into(), json!(self.maxmem_mib * 1024));
        build.insert("target_memkb".into(), json!(self.memory_mib * 1024));
        build.insert("kernel".into(), json!(self.kernel));
        if let Some(ramdisk) = &self.ramdisk {
            build.insert("ramdisk".into(), json!(ramdisk));
        }
        if !self.cmdline.is_empty() {
            build.insert("cmdline".into(), json!(self.cmdline));
        }
        build.insert(format!("type.{kind}"), json!({}));
        json!({
            "c_info": create,
            "b_info": build,
            "on_poweroff": action_name(self.on.poweroff),
            "on_reboot": action_name(self.on.reboot),
            "on_watchdog": action_name(self.on.watchdog),
            "on_crash": action_name(self.on.crash),
            "on_soft_reset": action_name(self.on.soft_reset),
        })
    }
}

/// libxl's identifiers differ from the words of the configuration file.
fn action_name(action: EventAction) -> String {
    match action {
        EventAction::RenameRestart => "restart_rename".into(),
        other => other.as_str().replace('-', "_"),
    }
}
