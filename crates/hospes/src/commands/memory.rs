//! Memory of running domains: `mem-set`, `mem-max`.

use hospes_toolstack::{Error, Host};

use crate::commands::failed;
use crate::table::Call;
use crate::{Failure, Outcome};

pub(crate) fn set(call: &Call) -> Outcome {
    change(call, "dynamic", Host::set_memory_target)
}

pub(crate) fn max(call: &Call) -> Outcome {
    change(call, "static", Host::set_memory_max)
}

fn change(call: &Call, which: &str, set: fn(&Host, &str, u64) -> Result<(), Error>) -> Outcome {
    let host = Host::from_environment()?;
    let domid = host.find(call.args.at(0))?.domid;
    let text = call.args.at(1);
    let Some(kib) = size_kib(text) else {
        return failed(&format!(
            "invalid memory size: {text}: write a number of MiB, or one with t, g, m, k or b behind it"
        ));
    };
    set(&host, &domid.to_string(), kib).map_err(|fault| match fault {
        Error::Refused { message, .. } => Failure::Failed(anyhow::anyhow!(
            "cannot set domid {domid} {which} max memory to : {text}: {message}"
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
