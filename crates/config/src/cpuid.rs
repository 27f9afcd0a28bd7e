//! Single bits of what CPUID shows: `cpuid`, in libxl's form.

use serde::{Deserialize, Serialize};

use crate::diagnostic::{Location, Severity};
use crate::domain::Reader;
use crate::parse::ValueKind;

/// What is wanted of a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FeatureWish {
    /// `0`: the guest does not see it.
    Hide,
    /// `1`: the guest sees it, or the domain is not created.
    Show,
    /// `k` and `s`: the guest sees it where the host has it.
    Host,
}

/// Keys with a number, which say who made the processor and how it is put together.
const NUMBERS: [&str; 11] = [
    "apicidsize",
    "brandid",
    "clflush",
    "family",
    "localapicid",
    "maxleaf",
    "maxhvleaf",
    "model",
    "nc",
    "proccount",
    "procpkg",
];

impl Reader<'_> {
    /// Features by the names of xl, in the order of the configuration.
    pub(crate) fn cpuid(&mut self) -> Vec<(String, FeatureWish)> {
        let mut wishes = Vec::new();
        let Some(setting) = self.document.get("cpuid") else {
            return wishes;
        };
        let location = &setting.location;
        let ValueKind::Atom(atom) = &setting.value.kind else {
            self.ignored(location, "a list of leaves");
            return wishes;
        };
        let mut parts = atom.text.split(',').map(str::trim);
        if parts.next() != Some("host") {
            self.error(
                location,
                "`cpuid' does not begin with `host': write cpuid=\"host,FEATURE=0\"",
            );
            return wishes;
        }
        for part in parts {
            let Some((name, value)) = part.split_once('=') else {
                self.error(
                    location,
                    format!("`{part}' in `cpuid' is not FEATURE=VALUE"),
                );
                continue;
            };
            if name == "stepping" || NUMBERS.contains(&name) {
                self.ignored(location, &format!("`{name}'"));
                continue;
            }
            let wish = match value {
                "0" => FeatureWish::Hide,
                "1" => FeatureWish::Show,
                "k" | "s" => FeatureWish::Host,
                "x" => continue,
                _ => {
                    self.error(
                        location,
                        format!("`{name}' in `cpuid' is `{value}', it has to be 0, 1, x, k or s"),
                    );
                    continue;
                }
            };
            wishes.push((name.to_owned(), wish));
        }
        wishes
    }

    fn ignored(&mut self, location: &Location, what: &str) {
        let message = format!("{what} in `cpuid' is not supported yet, ignored");
        self.report(Severity::Note, location, message);
    }
}

#[cfg(test)]
mod tests {
    use super::FeatureWish::*;
    use crate::{DomainConfig, Source, load};

    fn read(text: &str) -> (Option<DomainConfig>, Vec<String>) {
        let text = format!("name='d'\ntype='pvh'\nkernel='/k'\nmemory=64\n{text}");
        let name = "d.cfg";
        let (config, diagnostics) = load(&[Source { name, text: &text }]);
        (
            config,
            diagnostics.iter().map(ToString::to_string).collect(),
        )
    }

    #[test]
    fn cpuid_of_libxl_names_features() {
        let (config, said) = read("cpuid='host,avx512f=1, sse4.2=0,gfni=k,vaes=s,tm=x'");
        assert_eq!(said, Vec::<String>::new());
        let wishes = config.unwrap().cpuid;
        let want = [
            ("avx512f", Show),
            ("sse4.2", Hide),
            ("gfni", Host),
            ("vaes", Host),
        ];
        assert_eq!(wishes, want.map(|(name, wish)| (name.to_owned(), wish)));
    }

    #[test]
    fn cpuid_without_effect_is_noted() {
        for (text, what) in [
            ("cpuid='host,family=6'", "`family'"),
            ("cpuid=['1:ecx=0xxx']", "a list of leaves"),
        ] {
            let (config, said) = read(text);
            assert_eq!(config.unwrap().cpuid, []);
            let note = format!("d.cfg:5: note: {what} in `cpuid' is not supported yet, ignored");
            assert_eq!(said, [note]);
        }
    }

    #[test]
    fn cpuid_that_is_wrong_is_refused() {
        for (text, what) in [
            ("cpuid='avx=0'", "does not begin with `host'"),
            ("cpuid='host,avx'", "`avx' in `cpuid' is not FEATURE=VALUE"),
            ("cpuid='host,avx=2'", "has to be 0, 1, x, k or s"),
        ] {
            let (config, said) = read(text);
            assert!(config.is_none() && said[0].contains(what), "{said:?}");
        }
    }
}
