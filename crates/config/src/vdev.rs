//! Names and numbers of virtual block devices, xen-vbd-interface(7).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::number::parse_number;

/// A virtual block device: what the configuration calls it, and its number in the xenstore.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Vdev {
    /// As written: `xvda`, `hdc2`, `d0p1`, `51712`.
    pub name: String,
    /// The number that the front end sees; below 2^29.
    pub number: u32,
}

/// The text names no virtual block device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{text}\" names no virtual disk: write xvda, xvdb1, hda, sda, d0p0 or the number of the device"
)]
pub struct VdevError {
    pub text: String,
}

/// Set in numbers of Xen disks that do not fit the old form.
const EXTENDED: u32 = 1 << 28;
/// Numbers from here on are reserved.
const RESERVED: u32 = 2 << 28;
const XVD_DISKS: u32 = 1 << 20;
const XVD_PARTITIONS: u32 = 256;

impl Vdev {
    /// The device of a number, with the name that libxl gives it: always of the Xen disks.
    pub fn of_number(number: u32) -> Vdev {
        let (index, parts) = if number & EXTENDED != 0 {
            (number & !EXTENDED, 256)
        } else {
            (number & 0xff, 16)
        };
        let mut name = format!("xvd{}", letters(index / parts));
        if index % parts != 0 {
            name.push_str(&(index % parts).to_string());
        }
        Vdev { name, number }
    }

    /// What a Linux guest calls it: numbers of IDE and SCSI disks stand for Xen disks there, each IDE disk with its partitions for a whole one. `None` where Linux takes no
    /// such number.
    pub fn linux_name(&self) -> Option<String> {
        let (major, minor) = (self.number >> 8, self.number & 0xff);
        let xen = if self.number & EXTENDED != 0 {
            self.number
        } else {
            let disk_and_partition = match major {
                3 => minor / 64 * 16,
                22 => (minor / 64 + 2) * 16,
                8 | 202 => minor,
                _ => return None,
            };
            202 << 8 | disk_and_partition
        };
        Some(Vdev::of_number(xen).name)
    }
}

/// 0 is a, 25 is z, 26 is aa.
fn letters(mut disk: u32) -> String {
    let mut reversed = Vec::new();
    loop {
        reversed.push(b'a' + (disk % 26) as u8);
        if disk < 26 {
            break;
        }
        disk = disk / 26 - 1;
    }
    reversed.iter().rev().map(|b| char::from(*b)).collect()
}

/// Disk and partition of `PREFIX LETTERS [DIGITS]` inside the bounds.
fn lettered(text: &str, prefix: &str, disks: u32, partitions: u32) -> Option<(u32, u32)> {
    let rest = text.strip_prefix(prefix)?;
    let digits = rest.trim_start_matches(|c: char| c.is_ascii_lowercase());
    let letters = &rest[..rest.len() - digits.len()];
    // More letters would be beyond every bound and overflow the sum below.
    if letters.is_empty() || letters.len() > 5 {
        return None;
    }
    let disk = letters
        .bytes()
        .fold(0u32, |sum, b| sum * 26 + u32::from(b - b'a') + 1)
        - 1;
    let partition = if digits.is_empty() {
        0
    } else if digits.starts_with('0') || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    } else {
        digits.parse().ok()?
    };
    (disk < disks && partition < partitions).then_some((disk, partition))
}

/// Disk and partition of `dN` or `dNpM`.
fn numbered(text: &str) -> Option<(u32, u32)> {
    let rest = text.strip_prefix('d')?;
    let (disk, partition) = rest.split_once('p').unwrap_or((rest, "0"));
    let number = |text: &str| u32::try_from(parse_number(text).ok()?).ok();
    let (disk, partition) = (number(disk)?, number(partition)?);
    (disk < XVD_DISKS && partition < XVD_PARTITIONS).then_some((disk, partition))
}

fn number(text: &str) -> Option<u32> {
    if let Some((disk, partition)) =
        numbered(text).or_else(|| lettered(text, "xvd", XVD_DISKS, XVD_PARTITIONS))
    {
        return Some(if disk < 16 && partition < 16 {
            202 << 8 | disk << 4 | partition
        } else {
            EXTENDED | disk << 8 | partition
        });
    }
    if let Some((disk, partition)) = lettered(text, "hd", 4, 64) {
        let major = if disk < 2 { 3 } else { 22 };
        return Some(major << 8 | (disk & 1) << 6 | partition);
    }
    if let Some((disk, partition)) = lettered(text, "sd", 16, 16) {
        return Some(8 << 8 | disk << 4 | partition);
    }
    if !text.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let number = u32::try_from(parse_number(text).ok()?).ok()?;
    (number < RESERVED).then_some(number)
}

impl FromStr for Vdev {
    type Err = VdevError;

    fn from_str(text: &str) -> Result<Vdev, VdevError> {
        match number(text) {
            Some(number) => Ok(Vdev {
                name: text.to_string(),
                number,
            }),
            None => Err(VdevError {
                text: text.escape_debug().to_string(),
            }),
        }
    }
}

impl fmt::Display for Vdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn linux_knows_disks_of_all_kinds_as_xen_disks() {
        // As Linux 6.1 shows them.
        for (name, linux) in [
            ("xvdc", Some("xvdc")),
            ("xvdz", Some("xvdz")),
            ("d1p2", Some("xvdb2")),
            ("hda", Some("xvda")),
            ("hdb", Some("xvdb")),
            ("hdc", Some("xvdc")),
            ("sdb", Some("xvdb")),
            ("sdp", Some("xvdp")),
            ("7", None),
        ] {
            let vdev: Vdev = name.parse().expect(name);
            assert_eq!(vdev.linux_name().as_deref(), linux, "{name}");
        }
    }

    proptest! {
        #[test]
        fn of_number_of_a_xen_disk_reads_back(disk in 0..XVD_DISKS, partition in 0..XVD_PARTITIONS) {
            let device: Vdev = format!("d{disk}p{partition}").parse().expect("in bounds");
            let named = Vdev::of_number(device.number);
            prop_assert_eq!(named.name.parse::<Vdev>().map(|v| v.number), Ok(device.number));
        }

        #[test]
        fn parse_any_text_gives_no_reserved_number(text in "(xvd|hd|sd|d|0x)?[a-z0-9p]{0,12}|\\PC{0,12}") {
            if let Ok(device) = text.parse::<Vdev>() {
                prop_assert!(device.number < RESERVED);
            }
        }
    }
}
