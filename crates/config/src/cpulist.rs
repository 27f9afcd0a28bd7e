//! Lists of host CPUs as `cpus`, `cpus_soft` and `vcpu-pin` have them: numbers, ranges, NUMA nodes, exclusions.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use hospes_units::{CpuSet, HOST_CPUS_MAX};
use serde::{Deserialize, Serialize};

/// The CPUs and NUMA nodes of a host, against which a list is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCpus {
    pub cpus: CpuSet,
    /// By number.
    pub nodes: BTreeMap<u32, CpuSet>,
}

/// A list of host CPUs as written, in correct form. Which CPUs it means depends on the host: [`CpuList::resolve`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuList {
    text: String,
}

/// What is wrong with a list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuListError {
    #[error("\"{0}\" is no list of host CPUs: write it as \"0-3,^2\", \"node:1\" or \"all\"")]
    Syntax(String),
    #[error("\"{0}\" names no CPU of this host: it has the CPUs {1}")]
    Empty(String, CpuSet),
    #[error("\"{0}\" names the NUMA node {1}, which this host does not have")]
    NoNode(String, u32),
}

/// One part between commas.
enum Term {
    All,
    Range {
        remove: bool,
        nodes: bool,
        first: u32,
        last: u32,
    },
}

/// What stands between commas; nothing may.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter(|part| !part.is_empty())
}

fn term(text: &str) -> Option<Term> {
    let text = text.trim();
    if text == "all" {
        return Some(Term::All);
    }
    let (remove, text) = match text.strip_prefix('^') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (nodes, text) = match text.strip_prefix("nodes:").or(text.strip_prefix("node:")) {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    if nodes && !remove && text == "all" {
        return Some(Term::All);
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |text: &str| {
        let digits = text.trim();
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        digits.parse::<u32>().ok().filter(|_| plain)
    };
    let (first, last) = (number(first)?, number(last)?);
    (first <= last && last < HOST_CPUS_MAX).then_some(Term::Range {
        remove,
        nodes,
        first,
        last,
    })
}

impl CpuList {
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The CPUs that the list means on a host, parts from left to right. CPUs that the host does not have are left out; a list of
    /// which nothing remains is an error.
    pub fn resolve(&self, host: &HostCpus) -> Result<CpuSet, CpuListError> {
        let mut set = CpuSet::default();
        // The syntax was checked when the list was made.
        for term in parts(&self.text).filter_map(term) {
            match term {
                Term::All => set = host.cpus.clone(),
                Term::Range {
                    remove,
                    nodes,
                    first,
                    last,
                } => {
                    for number in first..=last {
                        let members: CpuSet = if nodes {
                            host.nodes
                                .get(&number)
                                .ok_or_else(|| CpuListError::NoNode(self.text.clone(), number))?
                                .clone()
                        } else {
                            [number].into_iter().collect()
                        };
                        for cpu in members.iter() {
                            if remove {
                                set.remove(cpu);
                            } else {
                                set.insert(cpu);
                            }
                        }
                    }
                }
            }
        }
        let set = set.intersection(&host.cpus);
        if set.is_empty() {
            return Err(CpuListError::Empty(self.text.clone(), host.cpus.clone()));
        }
        Ok(set)
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<CpuList, CpuListError> {
        if parts(text).next().is_some() && parts(text).all(|part| term(part).is_some()) {
            Ok(CpuList {
                text: text.to_owned(),
            })
        } else {
            Err(CpuListError::Syntax(text.to_owned()))
        }
    }
}

impl TryFrom<String> for CpuList {
    type Error = CpuListError;

    fn try_from(text: String) -> Result<CpuList, CpuListError> {
        text.parse()
    }
}

impl From<CpuList> for String {
    fn from(list: CpuList) -> String {
        list.text
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Which host CPUs the vCPUs of a domain are given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pinning {
    /// All CPUs, for all.
    #[default]
    None,
    /// The same list for all vCPUs.
    All(CpuList),
    /// One list for each vCPU from 0 on; those behind the last have all CPUs.
    Each(Vec<CpuList>),
}

impl Pinning {
    /// The list for one vCPU; `None` where it has all CPUs.
    pub fn of(&self, vcpu: u32) -> Option<&CpuList> {
        match self {
            Pinning::None => None,
            Pinning::All(list) => Some(list),
            Pinning::Each(lists) => lists.get(vcpu as usize),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The host of the manual page: four nodes of four CPUs.
    fn host() -> HostCpus {
        HostCpus {
            cpus: (0..16).collect(),
            nodes: (0..4).map(|n| (n, (4 * n..4 * n + 4).collect())).collect(),
        }
    }

    #[test]
    fn examples_of_the_manual_mean_what_it_says() {
        for (list, cpus) in [
            ("all", "0-15"),
            ("0-3,5,^1", "0,2-3,5"),
            ("all,^7", "0-6,8-15"),
            ("nodes:0-3,^node:2", "0-7,12-15"),
            ("1,node:1,^6", "1,4-5,7"),
            ("all,^node:1", "0-3,8-15"),
            ("3-8,^5", "3-4,6-8"),
            ("0,100", "0"),
            // Nothing in the manual says so, but xl takes these as well.
            ("0,,2,", "0,2"),
            ("1,nodes:all,^3", "0-2,4-15"),
        ] {
            let list: CpuList = list.parse().unwrap();
            assert_eq!(list.resolve(&host()).unwrap().to_string(), cpus, "{list}");
        }
    }

    #[test]
    fn wrong_lists_are_refused_with_the_form() {
        for text in [
            "",
            ",",
            "x",
            "^all",
            "^node:all",
            "1, ",
            "3-1",
            "node:",
            "1-2-3",
            "-1",
            "+1",
            "0-1024",
        ] {
            let error = text.parse::<CpuList>().unwrap_err();
            assert_eq!(error, CpuListError::Syntax(text.into()));
        }
        let list: CpuList = "99".parse().unwrap();
        assert!(matches!(
            list.resolve(&host()),
            Err(CpuListError::Empty(..))
        ));
        let list: CpuList = "node:4".parse().unwrap();
        assert!(matches!(
            list.resolve(&host()),
            Err(CpuListError::NoNode(_, 4))
        ));
    }

    #[test]
    fn pinning_gives_each_vcpu_its_list() {
        let list = |text: &str| text.parse::<CpuList>().unwrap();
        let each = Pinning::Each(vec![list("2"), list("3-8,^5")]);
        assert_eq!(each.of(1), Some(&list("3-8,^5")));
        assert_eq!(each.of(2), None);
        assert_eq!(Pinning::All(list("all")).of(77), Some(&list("all")));
        assert_eq!(Pinning::None.of(0), None);
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_resolved_inside_the_host(text in "[0-9a-z^:,\\- ]{0,30}") {
            if let Ok(list) = text.parse::<CpuList>()
                && let Ok(set) = list.resolve(&host())
            {
                prop_assert!(host().cpus.covers(&set) && !set.is_empty());
            }
        }
    }
}
