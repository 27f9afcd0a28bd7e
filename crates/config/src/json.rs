//! The configuration as `xl create -n` and `xl list -l` print it: libxl's JSON form of a domain configuration.

use serde_json::{Map, Value, json};

use crate::disk::DiskConfig;
use crate::domain::{DomainConfig, EventAction, GuestType};
use crate::vif::{VifConfig, VifKind};

impl DomainConfig {
    /// An object with `c_info`, `b_info`, devices and the actions, in libxl's order. Memory is in KiB, as in libxl.
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
        build.insert("max_memkb".into(), json!(self.memory_max_kib()));
        build.insert("target_memkb".into(), json!(self.memory_kib()));
        let share = object(vec![
            ("weight", self.scheduling.weight.map(|weight| json!(weight))),
            ("cap", self.scheduling.cap.map(|cap| json!(cap))),
        ]);
        if share != json!({}) {
            build.insert("sched_params".into(), share);
        }
        build.insert("kernel".into(), json!(self.kernel));
        if !self.cmdline.is_empty() {
            build.insert("cmdline".into(), json!(self.cmdline));
        }
        if let Some(ramdisk) = &self.ramdisk {
            build.insert("ramdisk".into(), json!(ramdisk));
        }
        build.insert(format!("type.{kind}"), json!({}));
        let devices = |list: Vec<Value>| (!list.is_empty()).then_some(Value::Array(list));
        let action = |action| Some(json!(action_name(action)));
        object(vec![
            ("c_info", Some(create.into())),
            ("b_info", Some(build.into())),
            (
                "disks",
                devices(self.disks.iter().map(DiskConfig::to_json).collect()),
            ),
            (
                "nics",
                devices(self.vifs.iter().map(VifConfig::to_json).collect()),
            ),
            ("on_poweroff", action(self.on.poweroff)),
            ("on_reboot", action(self.on.reboot)),
            ("on_watchdog", action(self.on.watchdog)),
            ("on_crash", action(self.on.crash)),
            ("on_soft_reset", action(self.on.soft_reset)),
        ])
    }
}

/// An object of the settings that are not libxl's defaults.
fn object(pairs: Vec<(&str, Option<Value>)>) -> Value {
    pairs
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_string(), value?)))
        .collect::<Map<_, _>>()
        .into()
}

/// The number where it names a domain, or else the name.
fn backend(text: &str) -> Vec<(&'static str, Option<Value>)> {
    match text.parse::<u16>() {
        Ok(0) => Vec::new(),
        Ok(domid) => vec![("backend_domid", Some(json!(domid)))],
        Err(_) if text.is_empty() => Vec::new(),
        Err(_) => vec![("backend_domname", Some(json!(text)))],
    }
}

impl DiskConfig {
    /// libxl's `device_disk`.
    pub fn to_json(&self) -> Value {
        let one = self.cdrom.then(|| json!(1));
        let mut pairs = backend(&self.backend);
        pairs.extend([
            ("pdev_path", self.target.as_ref().map(|path| json!(path))),
            ("vdev", Some(json!(self.vdev.name))),
            ("format", Some(json!(self.format.as_str()))),
            ("script", self.script.as_ref().map(|script| json!(script))),
            ("removable", one.clone()),
            ("readwrite", Some(json!(u8::from(!self.read_only)))),
            ("is_cdrom", one),
            (
                "direct_io_safe",
                self.direct_io_safe.then_some(Value::Bool(true)),
            ),
            ("discard_enable", self.discard.map(defbool)),
            ("trusted", Some(defbool(self.trusted))),
        ]);
        object(pairs)
    }
}

impl VifConfig {
    /// libxl's `device_nic`.
    pub fn to_json(&self) -> Value {
        let text = |text: &Option<String>| text.as_ref().map(|text| json!(text));
        let mac = self.mac.map(|mac| json!(mac_text(mac)));
        let ip = (!self.ip.is_empty()).then(|| json!(self.ip.join(" ")));
        let mut pairs = backend(&self.backend);
        pairs.extend([
            ("devid", self.devid.map(|devid| json!(devid))),
            ("mtu", self.mtu.map(|mtu| json!(mtu))),
            ("model", text(&self.model)),
            ("mac", mac),
            ("ip", ip),
            ("bridge", text(&self.bridge)),
            ("ifname", text(&self.vifname)),
            ("script", text(&self.script)),
            (
                "nictype",
                Some(match self.kind {
                    VifKind::Vif => json!("vif"),
                    VifKind::User => json!("user"),
                }),
            ),
            (
                "rate_bytes_per_interval",
                self.rate.map(|rate| json!(rate.bytes_per_interval())),
            ),
            (
                "rate_interval_usecs",
                self.rate.map(|rate| json!(rate.interval_us)),
            ),
            ("gatewaydev", text(&self.netdev)),
            ("trusted", Some(defbool(self.trusted))),
        ]);
        object(pairs)
    }
}

/// A truth value that may be left to libxl.
fn defbool(value: bool) -> Value {
    json!(if value { "True" } else { "False" })
}

/// As in the xenstore: 00:16:3e:74:3d:76.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// libxl's identifiers differ from the words of the configuration file.
fn action_name(action: EventAction) -> String {
    match action {
        EventAction::RenameRestart => "restart_rename".into(),
        other => other.as_str().replace('-', "_"),
    }
}
