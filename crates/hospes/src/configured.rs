//! A configuration as `xl create -n` and `xl list -l` print it, with what only a host, or the names of features, give a meaning to.

use std::collections::BTreeMap;

use hospes_config::{DomainConfig, FeatureWish, HostCpus, Pinning};
use serde_json::{Map, Value, json};

/// libxl's names of the result registers of CPUID, in its order.
const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];
/// The leaves that have subleaves, with bits in them that libxl has names for.
const WITH_SUBLEAVES: [u32; 2] = [7, 0xd];

/// In the form of libxl 4.17.
pub(crate) fn to_json(config: &DomainConfig) -> Value {
    on_host(config, &hospes_toolstack::host_cpus())
}

fn on_host(config: &DomainConfig, host: &HostCpus) -> Value {
    let mut whole = config.to_json();
    let build = &mut whole["b_info"];
    for (key, pinning) in [
        ("vcpu_hard_affinity", &config.scheduling.cpus),
        ("vcpu_soft_affinity", &config.scheduling.cpus_soft),
    ] {
        if let Some(affinity) = affinity(pinning, config.maxvcpus, host) {
            build[key] = affinity;
        }
    }
    if !config.cpuid.is_empty() {
        build["cpuid"] = cpuid(&config.cpuid);
    }
    whole
}

/// The numbers of the host CPUs of each vCPU, of which those behind the last have all; nothing where all have. A list that means nothing on this host has none.
fn affinity(pinning: &Pinning, vcpus: u32, host: &HostCpus) -> Option<Value> {
    let vcpus = match pinning {
        Pinning::None => return None,
        Pinning::All(_) => vcpus,
        Pinning::Each(lists) => vcpus.min(lists.len() as u32),
    };
    let cpus = |vcpu| -> Value {
        let set = pinning.of(vcpu).and_then(|list| list.resolve(host).ok());
        set.unwrap_or_default().iter().collect()
    };
    Some((0..vcpus).map(cpus).collect())
}

/// A leaf of which all is in one subleaf has no number of that.
fn cpuid(wishes: &[(String, FeatureWish)]) -> Value {
    let mut leaves: BTreeMap<(u32, u32), [Option<[u8; 32]>; 4]> = BTreeMap::new();
    // A name that is not known is refused when the domain is made.
    let known = wishes
        .iter()
        .filter_map(|(name, wish)| Some((hospes_cpuid::named(name)?, wish)));
    for ((word, feature), wish) in known {
        let registers = leaves.entry((word.leaf, word.subleaf)).or_default();
        let bits = registers[word.reg as usize].get_or_insert([b'x'; 32]);
        // From the highest bit on.
        bits[31 - usize::from(feature.bit)] = match wish {
            FeatureWish::Hide => b'0',
            FeatureWish::Show => b'1',
            FeatureWish::Host => b'k',
        };
    }
    let policy = |((leaf, subleaf), registers): ((u32, u32), [Option<[u8; 32]>; 4])| {
        let mut policy = Map::new();
        policy.insert("leaf".into(), json!(leaf));
        if WITH_SUBLEAVES.contains(&leaf) {
            policy.insert("subleaf".into(), json!(subleaf));
        }
        for (name, bits) in REGISTERS.iter().zip(registers) {
            if let Some(bits) = bits {
                let text: String = bits.into_iter().map(char::from).collect();
                policy.insert((*name).into(), json!(text));
            }
        }
        Value::from(policy)
    };
    leaves.into_iter().map(policy).collect()
}

#[cfg(test)]
mod tests {
    use hospes_config::{Source, load};

    use super::*;

    fn build(more: &str) -> Value {
        let text = format!("name='d'; type='pvh'; kernel='/k'; memory=64; vcpus=3\n{more}");
        let source = Source {
            name: "test",
            text: &text,
        };
        let host = HostCpus {
            cpus: (0..8).collect(),
            nodes: [(1, (4..8).collect())].into_iter().collect(),
        };
        on_host(&load(&[source]).0.expect("valid"), &host)["b_info"].take()
    }

    #[test]
    fn affinities_are_numbers_of_host_cpus() {
        for (text, hard, soft) in [
            ("", json!(null), json!(null)),
            (
                "cpus='0-2,^1'",
                json!([[0, 2], [0, 2], [0, 2]]),
                json!(null),
            ),
            ("cpus=['1','2']", json!([[1], [2]]), json!(null)),
            (
                "cpus='all'\ncpus_soft='node:1'",
                json!([
                    [0, 1, 2, 3, 4, 5, 6, 7],
                    [0, 1, 2, 3, 4, 5, 6, 7],
                    [0, 1, 2, 3, 4, 5, 6, 7]
                ]),
                json!([[4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6, 7]]),
            ),
            ("cpus=['99']", json!([[]]), json!(null)),
        ] {
            let build = build(text);
            assert_eq!(build["vcpu_hard_affinity"], hard, "{text}");
            assert_eq!(build["vcpu_soft_affinity"], soft, "{text}");
        }
    }

    #[test]
    fn cpuid_has_a_letter_for_each_bit() {
        assert_eq!(build("")["cpuid"], json!(null));
        assert_eq!(
            build("cpuid='host,sse4.2=0,popcnt=1,gfni=k,avx2=0'")["cpuid"],
            json!([
                { "leaf": 1, "ecx": "xxxxxxxx1xx0xxxxxxxxxxxxxxxxxxxx" },
                {
                    "leaf": 7,
                    "subleaf": 0,
                    "ebx": "xxxxxxxxxxxxxxxxxxxxxxxxxx0xxxxx",
                    "ecx": "xxxxxxxxxxxxxxxxxxxxxxxkxxxxxxxx",
                },
            ])
        );
    }
}
