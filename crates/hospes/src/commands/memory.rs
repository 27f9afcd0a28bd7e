//! Memory of running domains: `mem-set`, `mem-max`.

use hospes_toolstack::{Error, Host};
use hospes_units::DomId;

use crate::commands::find_but_host;
use crate::table::Call;
use crate::{Failure, Outcome};

pub(crate) fn set(call: &Call) -> Outcome {
    let (host, kib) = (Host::from_environment()?, kib(call)?);
    match find_but_host(&host, call.args.at(0), "its memory is")? {
        Some(entry) => {
            // By the name that was given: a domain that starts again just now has another id.
            let set = host.set_memory_target(call.args.at(0), kib);
            done(call, entry.domid, "dynamic", set)
        }
        None => Ok(()),
    }
}

pub(crate) fn max(call: &Call) -> Outcome {
    let (host, kib) = (Host::from_environment()?, kib(call)?);
    let domid = host.find(call.args.at(0))?.domid;
    let set = host.set_memory_max(call.args.at(0), kib);
    done(call, domid, "static", set)
}

/// The size that was given.
fn kib(call: &Call) -> Result<u64, Failure> {
    let text = call.args.at(1);
    size_kib(text).ok_or_else(|| {
        Failure::Failed(anyhow::anyhow!(
            "invalid memory size: {text}: write a number of MiB, or one with t, g, m, k or b behind it"
        ))
    })
}

fn done(call: &Call, domid: DomId, which: &str, set: Result<(), Error>) -> Outcome {
    set.map_err(|fault| match fault {
        Error::Refused { message, .. } => Failure::Failed(anyhow::anyhow!(
            "cannot set domid {domid} {which} max memory to : {}: {message}",
            call.args.at(1)
        )),
        other => other.into(),
    })
}

/// `512`, `512m`, `2g`: in MiB where no unit is given.
fn size_kib(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match text[digits.len()..].to_ascii_lowercase().as_str() {
        "t" => number.checked_mul(1 << 30),
        "g" => number.checked_mul(1 << 20),
        "m" | "" => number.checked_mul(1 << 10),
        "k" => Some(number),
        "b" => Some(number >> 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_kib_knows_the_units_of_xl() {
        let cases = [
            ("512", Some(512 << 10)),
            ("512m", Some(512 << 10)),
            ("2048M", Some(2 << 20)),
            ("2g", Some(2 << 20)),
            ("1T", Some(1 << 30)),
            ("300000k", Some(300_000)),
            ("4096b", Some(4)),
            ("4095B", Some(3)),
            ("0", Some(0)),
            ("99999999999999999999", None),
            ("18446744073709551615t", None),
            ("512mb", None),
            ("512x", None),
            ("-1", None),
            ("1.5g", None),
            (" 5", None),
            ("5 ", None),
            ("m", None),
            ("", None),
        ];
        for (text, kib) in cases {
            assert_eq!(size_kib(text), kib, "{text:?}");
        }
    }
}
