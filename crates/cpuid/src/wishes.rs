//! Features that a domain's configuration names: shown or hidden against the rule of its level.

use crate::features::{FEATURES, Feature, Offer, Word};
use crate::host::HostCpu;
use crate::table::{CpuidError, has};

/// What is wanted of a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    Hide,
    /// The table is refused where it cannot be shown.
    Show,
    /// Shown where the host has it and the engine can offer it.
    Host,
}

/// xl's names that differ in more than case and punctuation.
const ALIASES: [(&str, &str); 12] = [
    ("3dnowprefetch", "PREFETCHW"),
    ("abm", "LZCNT"),
    ("clfsh", "CLFLUSH"),
    ("cmpxchg16", "CMPXCHG16B"),
    ("cmpxchg8", "CMPXCHG8B"),
    ("cx16", "CMPXCHG16B"),
    ("cx8", "CMPXCHG8B"),
    ("lahf-lm", "LAHF-SAHF"),
    ("lahfsahf", "LAHF-SAHF"),
    ("proc-trace", "PT"),
    ("sysenter", "SEP"),
    ("est", "EIST"),
];

/// A feature and one that it is nothing without.
const DEPENDS: [(&str, &str); 10] = [
    ("XSAVEOPT", "XSAVE"),
    ("XSAVEC", "XSAVE"),
    ("XGETBV1", "XSAVE"),
    ("AVX", "XSAVE"),
    ("AVX2", "AVX"),
    ("FMA", "AVX"),
    ("F16C", "AVX"),
    ("VAES", "AVX"),
    ("VPCLMULQDQ", "AVX"),
    ("AVX512F", "AVX2"),
];

fn parent(name: &str) -> Option<&'static str> {
    match DEPENDS.iter().find(|(child, _)| *child == name) {
        Some((_, parent)) => Some(parent),
        None if name.starts_with("AVX512") => Some("AVX512F"),
        None => None,
    }
}

/// A name without what its spellings differ in.
fn plain(name: &str) -> String {
    let letters = name.chars().filter(|c| !matches!(c, '-' | '_' | '.'));
    letters.flat_map(char::to_lowercase).collect()
}

/// The feature that xl, or the manuals, call so, with the number of its word.
fn find(name: &str) -> Option<(usize, &'static Feature)> {
    let alias = ALIASES.iter().find(|(xl, _)| *xl == name);
    let name = plain(alias.map_or(name, |(_, own)| own));
    FEATURES.iter().enumerate().find_map(|(n, word)| {
        let found = word.features.iter().find(|f| plain(f.name) == name);
        found.map(|f| (n, f))
    })
}

/// The word and the bit of the feature that xl, or the manuals, call so.
pub fn named(name: &str) -> Option<(&'static Word, &'static Feature)> {
    find(name).map(|(n, feature)| (&FEATURES[n], feature))
}

/// Changes the values of the words, which are those of [`FEATURES`] in its order.
pub(crate) fn apply(
    values: &mut [(&Word, u32)],
    wishes: &[(String, Wish)],
    host: &HostCpu,
) -> Result<(), CpuidError> {
    let mut shown = Vec::new();
    for (name, wish) in wishes {
        let Some((n, feature)) = find(name) else {
            return Err(CpuidError::Unknown(name.clone()));
        };
        let (word, value) = &mut values[n];
        let bit = 1 << feature.bit;
        let on_host = has(host, word.leaf, word.subleaf, word.reg, feature.bit);
        let refused = |why: &str| CpuidError::Refused {
            name: feature.name,
            why: why.to_owned(),
        };
        match (wish, feature.offer) {
            (Wish::Hide, _) => *value &= !bit,
            _ if *value & bit != 0 => shown.push(feature.name),
            (Wish::Show, Offer::Hidden(why)) => return Err(refused(why)),
            (_, Offer::Host(_)) if on_host => {
                *value |= bit;
                shown.push(feature.name);
            }
            (Wish::Show, Offer::Host(_)) => return Err(refused("the host's CPU lacks it")),
            // It follows the processor's own state.
            (Wish::Show, Offer::OsXsave) => {}
            (Wish::Show, _) => return Err(refused("this domain or this host is none for it")),
            (Wish::Host, _) => {}
        }
    }
    drop_orphans(values, &shown)
}

/// Hides what depends on something hidden; what was asked for by name may not.
fn drop_orphans(values: &mut [(&Word, u32)], shown: &[&str]) -> Result<(), CpuidError> {
    loop {
        let mut changed = false;
        for n in 0..values.len() {
            for feature in values[n].0.features {
                let bit = 1 << feature.bit;
                let Some(parent) = parent(feature.name).filter(|_| values[n].1 & bit != 0) else {
                    continue;
                };
                let there = find(parent).is_some_and(|(m, p)| values[m].1 >> p.bit & 1 != 0);
                if there {
                    continue;
                }
                if shown.contains(&feature.name) {
                    return Err(CpuidError::Refused {
                        name: feature.name,
                        why: format!("it is nothing without {parent}, which is hidden"),
                    });
                }
                values[n].1 &= !bit;
                changed = true;
            }
        }
        if !changed {
            return Ok(());
        }
    }
}
