//! Where packages come from: the archive that this machine uses, for the suite that the image wants.

use std::process::{Command, Stdio};

const DEBIAN: &str = "http://deb.debian.org/debian";
const SECURITY: &str = "http://deb.debian.org/debian-security";

/// Suites that have no separate archives for updates and security.
const ROLLING: [&str; 4] = ["sid", "unstable", "testing", "experimental"];

/// What apt is asked for, of each index that it has.
const TARGET: &str = "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)";

/// The addresses of Debian's archives, where this machine's apt has them from a server that others can ask as well.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Archives {
    main: Option<String>,
    security: Option<String>,
}

impl Archives {
    /// Asks this machine's apt. It knows them by what their signed Release files say, whatever their address; there is none of a machine
    /// without apt or without its lists.
    pub(crate) fn of_this_machine() -> Archives {
        let output = Command::new("apt-get")
            .args(["indextargets", "--format", TARGET])
            .stdin(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                Archives::among(&String::from_utf8_lossy(&output.stdout))
            }
            _ => Archives::default(),
        }
    }

    /// The first of each kind in lines of the form [`TARGET`].
    fn among(targets: &str) -> Archives {
        let first = |label: &str| {
            targets.lines().find_map(|line| {
                let uri = line.strip_prefix("Debian\t")?.strip_prefix(label)?;
                let uri = uri.strip_prefix('\t')?.trim_end_matches('/');
                let shared = uri.starts_with("http://") || uri.starts_with("https://");
                shared.then(|| uri.to_string())
            })
        };
        Archives {
            main: first("Debian"),
            security: first("Debian-Security"),
        }
    }
}

/// The lines of a sources.list for `suite`. A mirror that was chosen is used alone where it is no archive of Debian's usual
/// layout (`file:` trees), else with the updates of its suite.
pub(crate) fn sources(suite: &str, mirror: Option<&str>, archives: &Archives) -> Vec<String> {
    let main = mirror.or(archives.main.as_deref()).unwrap_or(DEBIAN);
    let mut lines = vec![format!("deb {main} {suite} main")];
    if ROLLING.contains(&suite) || main.starts_with("file:") {
        return lines;
    }
    let security = archives.security.as_deref().unwrap_or(SECURITY);
    lines.push(format!("deb {main} {suite}-updates main"));
    lines.push(format!("deb {security} {suite}-security main"));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_nothing_configured_is_deb_debian_org() {
        let lines = sources("bookworm", None, &Archives::default());
        assert_eq!(lines[0], "deb http://deb.debian.org/debian bookworm main");
        assert_eq!(lines.len(), 3);
        assert_eq!(
            lines[2],
            "deb http://deb.debian.org/debian-security bookworm-security main"
        );
    }

    #[test]
    fn sources_follow_this_machine() {
        let archives = Archives {
            main: Some("https://mirror.example/debian".into()),
            security: Some("http://sec.example".into()),
        };
        let lines = sources("trixie", None, &archives);
        assert_eq!(lines[0], "deb https://mirror.example/debian trixie main");
        assert_eq!(lines[2], "deb http://sec.example trixie-security main");
    }

    #[test]
    fn archives_are_known_by_origin_and_not_by_their_path() {
        let archives = Archives::among(
            "cloudsmith/caddy/stable\tcaddy/stable\thttps://dl.cloudsmith.io/public/caddy/stable/deb/debian/\n\
             Docker\tDocker CE\thttps://download.docker.com/linux/debian/\n\
             $(ORIGIN)\t$(LABEL)\thttps://vendor.example/debian/\n\
             Debian Backports\tDebian Backports\thttp://old.example/debian/\n\
             Debian\tDebian-Security\thttp://security.debian.org/\n\
             Debian\tDebian\thttp://mirror.example/debian/\n\
             Debian\tDebian\thttp://second.example/debian/\n",
        );
        assert_eq!(
            archives.main.as_deref(),
            Some("http://mirror.example/debian")
        );
        assert_eq!(
            archives.security.as_deref(),
            Some("http://security.debian.org")
        );
    }

    #[test]
    fn archives_that_mmdebstrap_cannot_ask_are_none() {
        let archives = Archives::among(
            "Debian\tDebian\tmirror+file:/etc/apt/mirrors/debian.list/\n\
             Debian\tDebian\tfile:/srv/debian/\n\
             Debian\tDebian-Security\tcdrom://[Debian 12]/\n",
        );
        assert_eq!(archives, Archives::default());
        assert_eq!(Archives::among(""), Archives::default());
    }

    #[test]
    fn sources_chosen_mirror_and_rolling_suite() {
        let none = Archives::default();
        assert_eq!(
            sources("sid", Some("http://m/d"), &none),
            ["deb http://m/d sid main"]
        );
        assert_eq!(
            sources("bookworm", Some("file:/srv/m"), &none),
            ["deb file:/srv/m bookworm main"]
        );
        assert_eq!(
            sources("bookworm", Some("http://m/d"), &none)[1],
            "deb http://m/d bookworm-updates main"
        );
    }
}
