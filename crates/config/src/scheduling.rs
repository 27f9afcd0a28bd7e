//! Which host CPUs a domain gets, and how much of them: `cpus`, `cpus_soft`, `cpu_weight`, `cap`. What its own look like: `cpu_level`.

use serde::{Deserialize, Serialize};

use crate::cpulist::{CpuList, Pinning};
use crate::diagnostic::Location;
use crate::domain::Reader;
use crate::parse::ValueKind;

/// A domain's share of the host's CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// The host CPUs that the vCPUs may run on.
    pub cpus: Pinning,
    /// The host CPUs that the vCPUs prefer.
    pub cpus_soft: Pinning,
    /// Share under contention, 1 to 65535; 256 where nothing is said.
    pub weight: Option<u16>,
    /// Most host CPU time in percent of one CPU; 0 or nothing: no limit.
    pub cap: Option<u16>,
}

/// The instruction set level of a domain's processor, as the x86-64 psABI names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuLevel {
    #[default]
    #[serde(rename = "x86-64-v3")]
    V3,
    #[serde(rename = "x86-64-v4")]
    V4,
}

impl Reader<'_> {
    pub(crate) fn cpu_level(&mut self) -> CpuLevel {
        match self.text("cpu_level") {
            Some(("x86-64-v4", _)) => CpuLevel::V4,
            // The shape check has complained about other words.
            _ => CpuLevel::V3,
        }
    }

    pub(crate) fn scheduling(&mut self) -> Scheduling {
        let max = u64::from(u16::MAX);
        Scheduling {
            cpus: self.pinning("cpus"),
            cpus_soft: self.pinning("cpus_soft"),
            weight: self.number("cpu_weight", 1, max, "").map(|n| n as u16),
            cap: self
                .number("cap", 0, max, " percent of one CPU")
                .map(|n| n as u16),
        }
    }

    fn pinning(&mut self, name: &str) -> Pinning {
        let Some(setting) = self.document.get(name) else {
            return Pinning::None;
        };
        match &setting.value.kind {
            ValueKind::Atom(atom) => self
                .cpu_list(name, &atom.text, &setting.location)
                .map_or(Pinning::None, Pinning::All),
            ValueKind::List(items) => {
                let mut lists = Vec::new();
                for item in items {
                    // The shape check has complained about lists in the list.
                    if let ValueKind::Atom(atom) = &item.kind {
                        lists.extend(self.cpu_list(name, &atom.text, &item.location));
                    }
                }
                Pinning::Each(lists)
            }
        }
    }

    fn cpu_list(&mut self, name: &str, text: &str, location: &Location) -> Option<CpuList> {
        match text.parse() {
            Ok(list) => Some(list),
            Err(fault) => {
                self.error(location, format!("`{name}': {fault}"));
                None
            }
        }
    }
}
