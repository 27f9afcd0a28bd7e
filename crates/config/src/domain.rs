//! The typed configuration of a domain and the rules its values have to keep.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::cpuid::FeatureWish;
use crate::diagnostic::{Diagnostic, Location, Severity};
use crate::disk::DiskConfig;
use crate::keys::{self, Support};
use crate::number::parse_number;
use crate::parse::{Document, Setting, ValueKind};
use crate::scheduling::{CpuLevel, Scheduling};
use crate::uuid::Uuid;
use crate::vif::VifConfig;

/// Bounds of values.
pub mod limits {
    /// Smallest memory of a domain, in MiB: below it no Linux kernel unpacks itself.
    pub const MEMORY_MIN_MIB: u64 = 8;
    /// Largest memory of a domain, in MiB (16 TiB).
    pub const MEMORY_MAX_MIB: u64 = 16 << 20;
    /// What xl gives a domain that does not say, in MiB.
    pub const MEMORY_DEFAULT_MIB: u64 = 32;
    /// Most virtual CPUs of a domain, as for Xen's HVM and PVH domains.
    pub const VCPUS_MAX: u32 = 128;
    /// Longest name, in bytes: with a suffix it has to fit into a file name.
    pub const NAME_MAX: usize = 128;
    /// Longest kernel command line, in bytes: Linux's COMMAND_LINE_SIZE on x86 without the closing NUL.
    pub const CMDLINE_MAX: usize = 2047;
}

/// A text that cannot be the name of a domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the name \"{name}\" {fault}: choose another")]
pub struct NameError {
    name: String,
    fault: String,
}

/// Whether a domain can have this name: it stands in file names and in the xenstore.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let fault = if name.is_empty() {
        "is empty".to_string()
    } else if name.contains('/') {
        "contains a `/'".to_string()
    } else if name.chars().any(char::is_control) {
        "contains control characters".to_string()
    } else if name.ends_with(".console") {
        // `web.console.log` is what the guest of `web` printed.
        "ends in `.console', as the logs of consoles do".to_string()
    } else if name.len() > limits::NAME_MAX {
        format!("is longer than {} bytes", limits::NAME_MAX)
    } else {
        return Ok(());
    };
    Err(NameError {
        name: name.escape_debug().to_string(),
        fault,
    })
}

/// Kind of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestType {
    Pvh,
}

/// What happens with a domain that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventAction {
    Destroy,
    Restart,
    RenameRestart,
    Preserve,
    CoredumpDestroy,
    CoredumpRestart,
    SoftReset,
}

impl EventAction {
    /// The word of the configuration file.
    pub const fn as_str(self) -> &'static str {
        match self {
            EventAction::Destroy => "destroy",
            EventAction::Restart => "restart",
            EventAction::RenameRestart => "rename-restart",
            EventAction::Preserve => "preserve",
            EventAction::CoredumpDestroy => "coredump-destroy",
            EventAction::CoredumpRestart => "coredump-restart",
            EventAction::SoftReset => "soft-reset",
        }
    }
}

/// The text is none of the actions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownAction;

impl FromStr for EventAction {
    type Err = UnknownAction;

    fn from_str(text: &str) -> Result<EventAction, UnknownAction> {
        [
            EventAction::Destroy,
            EventAction::Restart,
            EventAction::RenameRestart,
            EventAction::Preserve,
            EventAction::CoredumpDestroy,
            EventAction::CoredumpRestart,
            EventAction::SoftReset,
        ]
        .into_iter()
        .find(|action| action.as_str() == text)
        .ok_or(UnknownAction)
    }
}

/// The actions by the reason of the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventActions {
    pub poweroff: EventAction,
    pub reboot: EventAction,
    pub watchdog: EventAction,
    pub crash: EventAction,
    pub soft_reset: EventAction,
}

impl Default for EventActions {
    /// The defaults of xl.cfg(5), Event Actions.
    fn default() -> EventActions {
        EventActions {
            poweroff: EventAction::Destroy,
            reboot: EventAction::Restart,
            watchdog: EventAction::Destroy,
            crash: EventAction::Destroy,
            soft_reset: EventAction::SoftReset,
        }
    }
}

fn yes() -> bool {
    true
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainConfig {
    /// Not empty, no '/', no control characters.
    pub name: String,
    pub guest_type: GuestType,
    /// `None`: a fresh one is drawn at creation.
    pub uuid: Option<Uuid>,
    /// As written; relative to where the command runs.
    pub kernel: PathBuf,
    pub ramdisk: Option<PathBuf>,
    /// The whole kernel command line.
    pub cmdline: String,
    /// Memory at start, in MiB.
    pub memory_mib: u64,
    /// Memory the guest may ever see, in MiB; at least `memory_mib`.
    pub maxmem_mib: u64,
    /// Memory at start, in KiB, where it was changed while the domain ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_kib: Option<u64>,
    /// Virtual CPUs online at start, 1 or more.
    pub vcpus: u32,
    /// Virtual CPUs in all; at least `vcpus`.
    pub maxvcpus: u32,
    pub scheduling: Scheduling,
    #[serde(default)]
    pub cpu_level: CpuLevel,
    /// Features by the names of xl, in the order of the configuration.
    #[serde(default)]
    pub cpuid: Vec<(String, FeatureWish)>,
    /// Long-running user code is executed natively where that pays.
    #[serde(default = "yes")]
    pub engine_direct: bool,
    pub on: EventActions,
    /// In the order of the configuration; each device once.
    pub disks: Vec<DiskConfig>,
    /// In the order of the configuration; each with its number.
    pub vifs: Vec<VifConfig>,
}

impl DomainConfig {
    /// Checks all settings. `None` where an error was added to `diagnostics`.
    pub fn interpret(
        document: &Document,
        diagnostics: &mut Vec<Diagnostic>,
    ) -> Option<DomainConfig> {
        let before = diagnostics.len();
        let mut reader = Reader {
            document,
            diagnostics,
        };
        reader.check_keys();
        let config = reader.config();
        let failed = diagnostics[before..].iter().any(Diagnostic::is_error);
        config.filter(|_| !failed)
    }

    /// Memory at start, in KiB; at most [`DomainConfig::memory_max_kib`].
    pub fn memory_kib(&self) -> u64 {
        self.target_kib.unwrap_or(self.memory_mib << 10)
    }

    /// Memory the guest may ever see, in KiB.
    pub fn memory_max_kib(&self) -> u64 {
        self.maxmem_mib << 10
    }
}

pub(crate) struct Reader<'a> {
    pub(crate) document: &'a Document,
    diagnostics: &'a mut Vec<Diagnostic>,
}

impl<'a> Reader<'a> {
    pub(crate) fn report(
        &mut self,
        severity: Severity,
        location: &Location,
        message: impl Into<String>,
    ) {
        self.diagnostics.push(Diagnostic {
            severity,
            location: location.clone(),
            message: message.into(),
        });
    }

    pub(crate) fn error(&mut self, location: &Location, message: impl Into<String>) {
        self.report(Severity::Error, location, message);
    }

    fn check_keys(&mut self) {
        for setting in self.document.settings() {
            self.check_key(setting);
        }
    }

    fn check_key(&mut self, setting: &Setting) {
        let (name, location) = (&setting.name, &setting.location);
        let Some(key) = keys::find(name) else {
            let hint = match keys::similar(name) {
                Some(other) => format!("; did you mean `{other}'?"),
                None => String::new(),
            };
            return self.report(
                Severity::Warning,
                location,
                format!("`{name}' is not a key of xl.cfg, ignored{hint}"),
            );
        };
        if let Err(fault) = key.shape.check(&setting.value) {
            // What is without effect is no reason to be without the domain.
            return match key.support {
                Support::Full => self.error(location, format!("`{name}' {fault}")),
                Support::Ignored | Support::Deprecated(_) => {
                    let message = format!("`{name}' {fault}; it is ignored in any case");
                    self.report(Severity::Warning, location, message);
                }
            };
        }
        if let Some(word) = key.shape.index(&setting.value) {
            self.report(
                Severity::Warning,
                location,
                format!("a number for `{name}' is deprecated: write {name}=\"{word}\""),
            );
        }
        if name == "bootloader_args" && matches!(setting.value.kind, ValueKind::Atom(_)) {
            let message =
                "a single text for `bootloader_args' is deprecated: write a list of arguments";
            self.report(Severity::Warning, location, message);
        }
        match key.support {
            Support::Full => {}
            Support::Deprecated(instead) => self.report(
                Severity::Warning,
                location,
                format!("`{name}' is deprecated and ignored: {instead}"),
            ),
            Support::Ignored => {
                // An empty list asks for nothing.
                if !matches!(&setting.value.kind, ValueKind::List(items) if items.is_empty()) {
                    self.report(
                        Severity::Note,
                        location,
                        format!("`{name}' is not supported yet, ignored"),
                    );
                }
            }
        }
    }

    /// The single value of a key whose shape has been checked.
    pub(crate) fn text(&self, name: &str) -> Option<(&'a str, &'a Location)> {
        let setting = self.document.get(name)?;
        match &setting.value.kind {
            ValueKind::Atom(atom) => Some((&atom.text, &setting.location)),
            ValueKind::List(_) => None,
        }
    }

    /// The number of a key inside `min..=max`; `meaning` ends the sentence about a value outside.
    pub(crate) fn number(&mut self, name: &str, min: u64, max: u64, meaning: &str) -> Option<u64> {
        let (text, location) = self.text(name)?;
        if self
            .document
            .get(name)
            .is_some_and(|setting| setting.appended)
        {
            self.error(
                location,
                format!("`{name}' is a number: += cannot be used with it"),
            );
            return None;
        }
        // The shape check has complained where this is no number.
        let value = parse_number(text).ok()?;
        match u64::try_from(value) {
            Ok(number) if (min..=max).contains(&number) => Some(number),
            _ => {
                self.error(
                    location,
                    format!("`{name}' is {value}, it has to be {min} to {max}{meaning}"),
                );
                None
            }
        }
    }

    fn config(&mut self) -> Option<DomainConfig> {
        let name = self.name();
        let guest_type = self.guest_type();
        let uuid = self.uuid();
        let kernel = self.kernel();
        // An empty one counts as not given.
        let ramdisk = self.text("ramdisk").filter(|(path, _)| !path.is_empty());
        let ramdisk = ramdisk.map(|(path, _)| PathBuf::from(path));
        let cmdline = self.cmdline();
        let (memory_mib, maxmem_mib) = self.memory();
        let (vcpus, maxvcpus) = self.vcpus();
        let scheduling = self.scheduling();
        let cpu_level = self.cpu_level();
        let cpuid = self.cpuid();
        let engine_direct = self.number("engine_direct", 0, 1, "") != Some(0);
        let on = self.actions();
        let disks = self.disks();
        let vifs = self.vifs();
        Some(DomainConfig {
            name: name?,
            guest_type: guest_type?,
            uuid,
            kernel: kernel?,
            ramdisk,
            cmdline,
            memory_mib,
            maxmem_mib,
            target_kib: None,
            vcpus,
            maxvcpus,
            scheduling,
            cpu_level,
            cpuid,
            engine_direct,
            on,
            disks,
            vifs,
        })
    }

    fn name(&mut self) -> Option<String> {
        let Some((name, location)) = self.text("name") else {
            if self.document.get("name").is_none() {
                self.error(
                    &self.document.whole(),
                    "the domain has no name: add name=\"NAME\"",
                );
            }
            return None;
        };
        if let Err(fault) = check_name(name) {
            self.error(location, fault.to_string());
            return None;
        }
        if name.bytes().all(|b| b.is_ascii_digit()) {
            let message = format!(
                "commands will take the name \"{name}\" for a domain id: use a name with a letter"
            );
            self.report(Severity::Warning, location, message);
        }
        Some(name.to_string())
    }

    fn guest_type(&mut self) -> Option<GuestType> {
        let wanted = self.text("type");
        if let Some((builder, location)) = self.text("builder") {
            self.report(
                Severity::Warning,
                location,
                "`builder' is deprecated: use type=\"pvh\"",
            );
            let builder_type = if builder == "hvm" { "hvm" } else { "pv" };
            match wanted {
                Some((text, _)) if text != builder_type => {
                    self.error(
                        location,
                        format!(
                            "`builder' says {builder_type} but `type' says {text}: remove `builder'"
                        ),
                    );
                    return None;
                }
                Some(_) => {}
                None => {
                    self.error(location, only_pvh(builder_type));
                    return None;
                }
            }
        }
        match wanted {
            None if self.document.get("type").is_none() => {
                let message = "`type' is not given: \"pvh\" is assumed, the only type supported (xl would assume \"pv\")";
                self.report(Severity::Note, &self.document.whole(), message);
                Some(GuestType::Pvh)
            }
            None => None,
            Some(("pvh", _)) => Some(GuestType::Pvh),
            Some((text, location)) => {
                if matches!(text, "pv" | "hvm") {
                    self.error(location, only_pvh(text));
                }
                None
            }
        }
    }

    fn uuid(&mut self) -> Option<Uuid> {
        let (text, location) = self.text("uuid")?;
        match text.parse() {
            Ok(Uuid::NIL) => {
                self.error(
                    location,
                    "the UUID with all digits zero is the host's: choose another or remove `uuid'",
                );
                None
            }
            Ok(uuid) => Some(uuid),
            Err(fault) => {
                self.error(location, fault.to_string());
                None
            }
        }
    }

    fn kernel(&mut self) -> Option<PathBuf> {
        if self.document.get("kernel").is_some() {
            let (text, location) = self.text("kernel")?;
            if text.is_empty() {
                self.error(location, "`kernel' is empty: give the path of a file");
                return None;
            }
            return Some(PathBuf::from(text));
        }
        let message = match self
            .document
            .get("bootloader")
            .or(self.document.get("firmware"))
        {
            Some(other) => format!(
                "`{}' is not supported yet: give the kernel with kernel=\"PATH\"",
                other.name
            ),
            None => "no kernel is given: add kernel=\"PATH\"".to_string(),
        };
        self.error(&self.document.whole(), message);
        None
    }

    /// `cmdline` alone, or `root=` and `extra` joined.
    fn cmdline(&mut self) -> String {
        let root = self.text("root");
        let extra = self.text("extra");
        let mut location = None;
        let line = if let Some((cmdline, at)) = self.text("cmdline") {
            location = Some(at);
            for (_, other) in [root, extra].into_iter().flatten() {
                self.report(
                    Severity::Warning,
                    other,
                    "ignored, because `cmdline' is given",
                );
            }
            cmdline.to_string()
        } else {
            let mut line = String::new();
            if let Some((root, at)) = root {
                location = Some(at);
                line = format!("root={root}");
            }
            if let Some((extra, at)) = extra {
                location = Some(at);
                if !line.is_empty() {
                    line.push(' ');
                }
                line.push_str(extra);
            }
            line
        };
        if let Some(location) = location
            && line.len() > limits::CMDLINE_MAX
        {
            let message = format!(
                "the kernel command line has {} bytes, at most {} are possible: shorten it",
                line.len(),
                limits::CMDLINE_MAX
            );
            self.error(location, message);
        }
        line
    }

    fn memory(&mut self) -> (u64, u64) {
        let (min, max) = (limits::MEMORY_MIN_MIB, limits::MEMORY_MAX_MIB);
        let memory = self.number("memory", min, max, " MiB");
        let maxmem = self.number("maxmem", min, max, " MiB");
        if self.document.get("memory").is_none() && self.document.get("maxmem").is_none() {
            let message = format!(
                "`memory' is not given: xl's default of {} MiB is used, too little for most Linux kernels",
                limits::MEMORY_DEFAULT_MIB
            );
            self.report(Severity::Warning, &self.document.whole(), message);
        }
        let memory_mib = memory.or(maxmem).unwrap_or(limits::MEMORY_DEFAULT_MIB);
        let maxmem_mib = maxmem.unwrap_or(memory_mib);
        if maxmem_mib < memory_mib
            && let Some((_, location)) = self.text("maxmem")
        {
            let message = format!(
                "`maxmem' is {maxmem_mib} MiB, less than `memory' with {memory_mib} MiB: raise it or remove it"
            );
            self.error(location, message);
        }
        (memory_mib, maxmem_mib)
    }

    fn vcpus(&mut self) -> (u32, u32) {
        let max = u64::from(limits::VCPUS_MAX);
        let wanted = self.number("vcpus", 1, max, "");
        let wanted_max = self.number("maxvcpus", 1, max, "");
        // Both are at most VCPUS_MAX.
        let vcpus = wanted.unwrap_or(1) as u32;
        let maxvcpus = wanted_max.map_or(vcpus, |number| number as u32);
        if maxvcpus < vcpus
            && let Some((_, location)) = self.text("maxvcpus")
        {
            let message = format!(
                "`maxvcpus' is {maxvcpus}, less than `vcpus' with {vcpus}: raise it or remove it"
            );
            self.error(location, message);
        }
        (vcpus, maxvcpus)
    }

    fn actions(&mut self) -> EventActions {
        let defaults = EventActions::default();
        // The shape check has complained about other words.
        let action = |name: &str, default: EventAction| {
            self.text(name)
                .and_then(|(text, _)| text.parse().ok())
                .unwrap_or(default)
        };
        EventActions {
            poweroff: action("on_poweroff", defaults.poweroff),
            reboot: action("on_reboot", defaults.reboot),
            watchdog: action("on_watchdog", defaults.watchdog),
            crash: action("on_crash", defaults.crash),
            soft_reset: action("on_soft_reset", defaults.soft_reset),
        }
    }
}

fn only_pvh(wanted: &str) -> String {
    format!(
        "domains of type {wanted} are not supported: use type=\"pvh\" (Linux kernels since 4.11 can be booted so)"
    )
}
