//! Disk specifications, xl-disk-configuration(5): positional values, KEY=VALUE, flags and the deprecated prefixes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::spec::{SpecError, TRUST, flag, once};
use crate::vdev::Vdev;

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
    /// A CD-ROM drive without a disc.
    Empty,
}

impl DiskFormat {
    /// The word of the specification.
    pub const fn as_str(self) -> &'static str {
        match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
            DiskFormat::Empty => "empty",
        }
    }
}

/// A checked disk specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Image file or block device, as written: relative to where the command runs, or else to /dev. `None` only for an
    /// empty CD-ROM drive.
    pub target: Option<PathBuf>,
    pub format: DiskFormat,
    pub vdev: Vdev,
    pub read_only: bool,
    pub cdrom: bool,
    /// `None`: not said; offered to the guest where the image can do it.
    pub discard: Option<bool>,
    pub direct_io_safe: bool,
    /// Domain of the back end; empty or "0" for the host.
    pub backend: String,
    /// Program that makes the block device out of `target`.
    pub script: Option<String>,
    /// What the front end is told about the back end.
    pub trusted: bool,
}

const KEYS: &str = "target, format, vdev, access, devtype, cdrom, backend, backendtype, script, direct-io-safe, discard, \
                    no-discard, trusted, untrusted, specification";
const FORMATS: &str = "raw or qcow2 (other images are converted by `qemu-img convert')";
const ACCESS: &str = "ro, r, rw or w";

impl DiskConfig {
    /// Reads one item of `disk=`, or the joined arguments of `block-attach`.
    pub fn parse(spec: &str) -> Result<DiskConfig, SpecError> {
        DiskConfig::parse_all(&[spec])
    }

    /// Reads several specifications that describe one disk together, as the arguments of `block-attach` do.
    pub fn parse_all(specs: &[&str]) -> Result<DiskConfig, SpecError> {
        let mut draft = Draft::default();
        for spec in specs {
            draft.read(spec)?;
        }
        draft.finish()
    }

    /// What a Linux guest makes of its device number beside those of `others`, where that is hardly what was meant.
    pub fn concern(&self, others: &[DiskConfig]) -> Option<String> {
        let vdev = &self.vdev;
        let Some(name) = vdev.linux_name() else {
            return Some(format!(
                "a Linux guest refuses the device {vdev}: write xvda, xvdb or the like"
            ));
        };
        let other = others.iter().find(|other| {
            other.vdev.number != vdev.number && other.vdev.linux_name().as_ref() == Some(&name)
        });
        match other {
            Some(other) => Some(format!(
                "a Linux guest calls {vdev} and {} of another disk {name} both, and refuses one of them: write xvda, xvdb or the like",
                other.vdev
            )),
            None if name
                .parse()
                .is_ok_and(|xen: Vdev| xen.number != vdev.number) =>
            {
                Some(format!("a Linux guest calls {vdev} {name}: write {name}"))
            }
            None => None,
        }
    }
}

#[derive(Default)]
struct Draft {
    target: Option<String>,
    format: Option<DiskFormat>,
    vdev: Option<String>,
    read_only: Option<bool>,
    /// All positional values have been given.
    complete: bool,
    cdrom: Option<bool>,
    discard: Option<bool>,
    direct_io_safe: bool,
    backend: Option<String>,
    script: Option<String>,
    trusted: Option<bool>,
    /// A deprecated prefix was there: no format among the positional values.
    prefixed: bool,
}

impl Draft {
    fn read(&mut self, spec: &str) -> Result<(), SpecError> {
        let mut rest = spec;
        loop {
            rest = rest.trim_start_matches([' ', '\t', '\n']);
            if rest.is_empty() {
                return Ok(());
            }
            if let Some(target) = rest.strip_prefix("target=") {
                let target = target.strip_suffix(',').unwrap_or(target);
                return once(&mut self.target, "target", target);
            }
            if let Some(behind) = self.prefix(rest)? {
                rest = behind;
                continue;
            }
            let (item, behind) = rest.split_once(',').unwrap_or((rest, ""));
            self.item(item)?;
            rest = behind;
        }
    }

    /// Strips a deprecated prefix such as `phy:`; `None` where there is none.
    fn prefix<'a>(&mut self, rest: &'a str) -> Result<Option<&'a str>, SpecError> {
        let Some((word, behind)) = rest.split_once(':') else {
            return Ok(None);
        };
        let is_word = word.starts_with(|c: char| c.is_ascii_lowercase())
            && word
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !is_word {
            return Ok(None);
        }
        match word {
            "raw" | "qcow" | "qcow2" | "vhd" => self.set_format(word)?,
            "iscsi" | "nbd" | "enbd" | "drbd" => {
                once(&mut self.script, "script", &format!("block-{word}"))?;
            }
            "tapdisk" | "tap" | "tap2" | "aio" | "ioemu" | "file" | "phy" => {}
            // `hdc:cdrom` is a device with its type; a path or nothing behind the colon means a prefix.
            _ if behind.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) => {
                return Ok(None);
            }
            _ => {
                return Err(SpecError::value(
                    "target",
                    rest,
                    format!(
                        "a path, and `{word}:' is none of the deprecated prefixes; write target=PATH for a path with a colon"
                    ),
                ));
            }
        }
        self.prefixed = true;
        Ok(Some(behind))
    }

    fn item(&mut self, item: &str) -> Result<(), SpecError> {
        match item {
            // Of these the last one counts, as in xl.
            "cdrom" => self.cdrom = Some(true),
            "direct-io-safe" => self.direct_io_safe = true,
            "discard" => self.discard = Some(true),
            "no-discard" => self.discard = Some(false),
            "trusted" => self.trusted = Some(true),
            "untrusted" => self.trusted = Some(false),
            "no-colo" => {}
            "colo" => return Err(colo(item)),
            _ => {
                return match item.split_once('=') {
                    Some((key, value)) => self.keyed(key, value),
                    None => self.positional(item),
                };
            }
        }
        Ok(())
    }

    fn keyed(&mut self, key: &str, value: &str) -> Result<(), SpecError> {
        match key {
            "format" => self.set_format(value),
            "vdev" => once(&mut self.vdev, "vdev", value),
            "access" => self.set_access(value),
            "devtype" => match value {
                "cdrom" => {
                    self.cdrom = Some(true);
                    Ok(())
                }
                "disk" | "" => {
                    self.cdrom = Some(false);
                    Ok(())
                }
                _ => Err(SpecError::value("devtype", value, "cdrom or disk")),
            },
            "backend" => once(&mut self.backend, "backend", value),
            "backendtype" => match value {
                // The back end of Hospes does the work of both.
                "phy" | "qdisk" | "tap" | "" => Ok(()),
                "standalone" => Err(SpecError::Unsupported {
                    key: "backendtype=standalone".into(),
                    hint: "leave `backendtype' out",
                }),
                _ => Err(SpecError::value("backendtype", value, "phy or qdisk")),
            },
            "specification" => match value {
                "xen" | "" => Ok(()),
                "virtio" => Err(SpecError::Unsupported {
                    key: "specification=virtio".into(),
                    hint: "disks are Xen's block devices; leave `specification' out",
                }),
                _ => Err(SpecError::value("specification", value, "xen")),
            },
            "script" => once(&mut self.script, "script", value),
            "trusted" | "untrusted" => flag(key, TRUST),
            "discard" | "no-discard" => flag(key, "`discard' or `no-discard'"),
            "cdrom" => flag(key, "`cdrom'"),
            "direct-io-safe" => flag(key, "`direct-io-safe'"),
            "colo-host" | "colo-port" | "colo-export" | "active-disk" | "hidden-disk" => {
                Err(colo(key))
            }
            _ if key.starts_with(|c: char| c.is_ascii_lowercase()) => Err(SpecError::UnknownKey {
                kind: "disk",
                key: key.escape_debug().to_string(),
                known: KEYS.into(),
            }),
            _ => Err(SpecError::Syntax {
                text: format!("{key}={value}").escape_debug().to_string(),
            }),
        }
    }

    fn positional(&mut self, item: &str) -> Result<(), SpecError> {
        if self.target.is_none() {
            self.target = Some(item.to_string());
            Ok(())
        } else if !self.prefixed && self.format.is_none() {
            // xend's form of an empty drive: `,hdc:cdrom,r`.
            if self.target.as_deref() == Some("") && self.vdev_with_type(item)? {
                self.format = Some(DiskFormat::Empty);
                return Ok(());
            }
            self.set_format(item)
        } else if self.vdev.is_none() {
            if !self.vdev_with_type(item)? {
                self.vdev = Some(item.to_string());
            }
            Ok(())
        } else if !self.complete {
            self.complete = true;
            self.set_access(item)
        } else {
            Err(SpecError::TooMany {
                text: item.escape_debug().to_string(),
            })
        }
    }

    /// Takes `VDEV:TYPE`; false where there is no colon.
    fn vdev_with_type(&mut self, item: &str) -> Result<bool, SpecError> {
        let Some((vdev, kind)) = item.rsplit_once(':') else {
            return Ok(false);
        };
        match kind {
            "cdrom" => self.cdrom = Some(true),
            "disk" => self.cdrom = Some(false),
            _ => return Err(SpecError::value("devtype", kind, "cdrom or disk")),
        }
        once(&mut self.vdev, "vdev", vdev)?;
        Ok(true)
    }

    fn set_format(&mut self, text: &str) -> Result<(), SpecError> {
        let format = match text {
            "" | "raw" => DiskFormat::Raw,
            "qcow2" => DiskFormat::Qcow2,
            "empty" => DiskFormat::Empty,
            _ => return Err(SpecError::value("format", text, FORMATS)),
        };
        match self.format.replace(format) {
            Some(old) if old != format => Err(SpecError::Repeated { key: "format" }),
            _ => Ok(()),
        }
    }

    fn set_access(&mut self, text: &str) -> Result<(), SpecError> {
        self.read_only = match text {
            "r" | "ro" => Some(true),
            "w" | "rw" => Some(false),
            "" => None,
            _ => return Err(SpecError::value("access", text, ACCESS)),
        };
        Ok(())
    }

    fn finish(self) -> Result<DiskConfig, SpecError> {
        let cdrom = self.cdrom.unwrap_or(false);
        let vdev = self.vdev.filter(|name| !name.is_empty());
        let vdev = vdev.ok_or(SpecError::Missing {
            key: "vdev",
            hint: "say which disk the guest sees, for instance vdev=xvda (in the short form TARGET,FORMAT,VDEV,ACCESS)",
        })?;
        let vdev: Vdev = vdev.parse().map_err(|_| {
            let allowed = "xvda, xvdb1, hda, sda, d0p0 or the number of a device";
            SpecError::value("vdev", &vdev, allowed)
        })?;
        let target = self.target.filter(|target| !target.is_empty());
        let format = match (&target, self.format) {
            (None, _) if cdrom => DiskFormat::Empty,
            (None, _) => {
                return Err(SpecError::Missing {
                    key: "target",
                    hint: "give the path of an image or a block device; only CD-ROM drives can be empty",
                });
            }
            (Some(_), Some(DiskFormat::Empty)) => {
                return Err(SpecError::value(
                    "format",
                    "empty",
                    "raw or qcow2 where a target is given",
                ));
            }
            (Some(_), format) => format.unwrap_or(DiskFormat::Raw),
        };
        Ok(DiskConfig {
            target: target.map(PathBuf::from),
            format,
            vdev,
            read_only: cdrom || self.read_only.unwrap_or(false),
            cdrom,
            discard: self.discard,
            direct_io_safe: self.direct_io_safe,
            backend: self.backend.unwrap_or_default(),
            script: self.script.filter(|script| !script.is_empty()),
            trusted: self.trusted.unwrap_or(true),
        })
    }
}

fn colo(key: &str) -> SpecError {
    SpecError::Unsupported {
        key: key.into(),
        hint: "there is no COLO replication; remove it",
    }
}
