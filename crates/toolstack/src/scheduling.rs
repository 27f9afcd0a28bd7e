//! vCPUs and the host's CPUs, as commands and domain processes speak of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use hospes_config::{CpuList, CpuListError, HostCpus};
use hospes_units::CpuSet;
use serde::{Deserialize, Serialize};

/// One vCPU of a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuInfo {
    pub vcpu: u32,
    /// The guest runs on it.
    pub online: bool,
    pub running: bool,
    pub blocked: bool,
    /// The host CPU it runs on, or last ran on.
    pub host_cpu: Option<u32>,
    /// Host CPU time, in nanoseconds.
    pub time_ns: u64,
    /// Host CPUs it may run on, such as `0-3,7`; `None` for all.
    pub hard: Option<String>,
    /// Host CPUs it prefers; `None` for all.
    pub soft: Option<String>,
}

/// A domain's share of the host's CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// 1 to 65535.
    pub weight: u16,
    /// Most time in percent of one CPU; 0 for no limit.
    pub cap: u16,
}

impl Share {
    /// What a domain has of which nothing is said, as in Xen.
    pub const DEFAULT: Share = Share {
        weight: 256,
        cap: 0,
    };
}

/// Host CPUs of a vCPU; `None` means all.
pub type Affinity = Option<CpuSet>;

/// The CPUs and NUMA nodes of this host that are online. Where the host's kernel does not tell, CPU 0 alone.
pub fn host_cpus() -> HostCpus {
    let system = Path::new("/sys/devices/system");
    let list = |path: &Path| fs::read_to_string(path).ok()?.parse::<CpuSet>().ok();
    let cpus = list(&system.join("cpu/online"))
        .filter(|set| !set.is_empty())
        .unwrap_or_else(|| [0].into_iter().collect());
    let mut nodes = BTreeMap::new();
    for entry in fs::read_dir(system.join("node"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("node"));
        if let Some(number) = number.and_then(|number| number.parse().ok())
            && let Some(members) = list(&entry.path().join("cpulist"))
        {
            nodes.insert(number, members);
        }
    }
    HostCpus { cpus, nodes }
}

/// What a list means on a host.
pub fn resolve(list: &CpuList, host: &HostCpus) -> Result<Affinity, CpuListError> {
    let set = list.resolve(host)?;
    Ok((!set.covers(&host.cpus)).then_some(set))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_has_cpus_and_all_of_them_is_no_restriction() {
        let host = host_cpus();
        assert!(!host.cpus.is_empty());
        let all: CpuList = "all".parse().unwrap();
        assert_eq!(resolve(&all, &host), Ok(None));
        for (number, members) in &host.nodes {
            let node: CpuList = format!("node:{number}").parse().unwrap();
            let online = members.intersection(&host.cpus);
            if !online.is_empty() && online != host.cpus {
                assert_eq!(resolve(&node, &host), Ok(Some(online)));
            }
        }
    }

    #[test]
    fn part_of_the_host_is_a_restriction() {
        let host = HostCpus {
            cpus: (0..4).collect(),
            nodes: BTreeMap::new(),
        };
        let list: CpuList = "all,^0".parse().unwrap();
        let affinity = resolve(&list, &host).unwrap();
        assert_eq!(affinity.map(|set| set.to_string()).as_deref(), Some("1-3"));
    }
}
