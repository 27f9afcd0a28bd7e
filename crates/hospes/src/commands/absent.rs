//! Lists of what domains cannot have here: xl's headings, and nothing below them.

use hospes_toolstack::Host;

use crate::Outcome;
use crate::commands::device_lists::domid;
use crate::output::{print, tell};
use crate::table::Call;

pub(crate) fn pci_assignable(_: &Call) -> Outcome {
    Ok(())
}

/// As `usb-list`, it has no heading where there is nothing.
pub(crate) fn pci(call: &Call) -> Outcome {
    none(call, "")
}

pub(crate) fn usb(call: &Call) -> Outcome {
    none(call, "")
}

pub(crate) fn channels(call: &Call) -> Outcome {
    none(
        call,
        "Idx BE state evt-ch ring-ref connection                               \n",
    )
}

pub(crate) fn vkbs(call: &Call) -> Outcome {
    none(
        call,
        "Idx BE handle state evt-ch    ref ID         BE-type    BE-path                       \n",
    )
}

pub(crate) fn vtpms(call: &Call) -> Outcome {
    none_of_any(
        call,
        "Idx BE Uuid                                 handle state evt-ch ring-ref BE-path   \n",
    )
}

/// As `vsnd-list`, it has no heading.
pub(crate) fn vdispls(call: &Call) -> Outcome {
    none_of_any(call, "")
}

pub(crate) fn vsnds(call: &Call) -> Outcome {
    none_of_any(call, "")
}

/// The heading; an error where there is no such domain.
fn none(call: &Call, heading: &str) -> Outcome {
    let host = Host::from_environment()?;
    for who in &call.args.values {
        domid(&host, who)?;
    }
    Ok(print(format_args!("{heading}"))?)
}

/// The same; where there is no such domain the others are still to be listed, as in xl.
fn none_of_any(call: &Call, heading: &str) -> Outcome {
    let host = Host::from_environment()?;
    for who in &call.args.values {
        if let Err(fault) = domid(&host, who) {
            tell!("{fault}");
        }
    }
    Ok(print(format_args!("{heading}"))?)
}
