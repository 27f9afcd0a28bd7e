//! Where packages come from: the archive that this machine uses, for the suite that the image wants.

use std::fs;
use std::path::Path;

const DEBIAN: &str = "http://deb.debian.org/debian";
const SECURITY: &str = "http://deb.debian.org/debian-security";

/// Suites that have no separate archives for updates and security.
const ROLLING: [&str; 4] = ["sid", "unstable", "testing", "experimental"];

/// The lines of a sources.list for `suite`. A mirror that was chosen is used alone where it is no archive of Debian's usual
/// layout (`file:` trees), else with the updates of its suite.
pub(crate) fn sources(suite: &str, mirror: Option<&str>, configured: &str) -> Vec<String> {
    let main = mirror
        .map(str::to_string)
        .or_else(|| configured_uri(configured, "debian"))
        .unwrap_or_else(|| DEBIAN.into());
    let mut lines = vec![format!("deb {main} {suite} main")];
    if ROLLING.contains(&suite) || main.starts_with("file:") {
        return lines;
    }
    let security = configured_uri(configured, "debian-security").unwrap_or_else(|| SECURITY.into());
    lines.push(format!("deb {main} {suite}-updates main"));
    lines.push(format!("deb {security} {suite}-security main"));
    lines
}

/// All of this machine's apt sources as one text; empty where it has none.
pub(crate) fn configured_sources() -> String {
    let apt = Path::new("/etc/apt");
    let mut text = fs::read_to_string(apt.join("sources.list")).unwrap_or_default();
    let Ok(entries) = fs::read_dir(apt.join("sources.list.d")) else {
        return text;
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("list" | "sources")) {
            text.push('\n');
            text.push_str(&fs::read_to_string(&path).unwrap_or_default());
        }
    }
    text
}

/// The first address of an archive whose path ends in `/name`, without its last slash.
fn configured_uri(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(str::split_whitespace)
        .map(|word| word.trim_end_matches('/'))
        .find(|word| {
            (word.starts_with("http://") || word.starts_with("https://"))
                && word.rsplit_once('/').is_some_and(|(_, last)| last == name)
        })
        .map(str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_nothing_configured_is_deb_debian_org() {
        let lines = sources("bookworm", None, "");
        assert_eq!(lines[0], "deb http://deb.debian.org/debian bookworm main");
        assert_eq!(lines.len(), 3);
        assert_eq!(
            lines[2],
            "deb http://deb.debian.org/debian-security bookworm-security main"
        );
    }

    #[test]
    fn sources_follow_this_machine() {
        let text = "# deb http://old/debian x\nTypes: deb\nURIs: https://mirror.example/debian/\n\
                    deb [arch=amd64] http://sec.example/debian-security bookworm-security main\n";
        let lines = sources("trixie", None, text);
        assert_eq!(lines[0], "deb https://mirror.example/debian trixie main");
        assert_eq!(
            lines[2],
            "deb http://sec.example/debian-security trixie-security main"
        );
    }

    #[test]
    fn sources_chosen_mirror_and_rolling_suite() {
        assert_eq!(
            sources("sid", Some("http://m/d"), ""),
            ["deb http://m/d sid main"]
        );
        assert_eq!(
            sources("bookworm", Some("file:/srv/m"), ""),
            ["deb file:/srv/m bookworm main"]
        );
        assert_eq!(
            sources("bookworm", Some("http://m/d"), "")[1],
            "deb http://m/d bookworm-updates main"
        );
    }
}
