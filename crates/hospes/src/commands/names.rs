//! Names and ids.

use hospes_config::check_name;
use hospes_toolstack::{HOST_NAME, Host, Request};

use crate::Outcome;
use crate::commands::failed;
use crate::output::print;
use crate::table::Call;

pub(crate) fn domid(call: &Call) -> Outcome {
    let name = call.args.at(0);
    if name == HOST_NAME {
        return Ok(print(format_args!("0\n"))?);
    }
    let entries = Host::from_environment()?.entries()?;
    match entries.iter().find(|entry| entry.record.name == name) {
        Some(entry) => Ok(print(format_args!("{}\n", entry.domid))?),
        None => failed(&format!(
            "Can't get domid of domain name '{name}', maybe this domain does not exist."
        )),
    }
}

pub(crate) fn domname(call: &Call) -> Outcome {
    let id = call.args.at(0);
    let Ok(id) = id.parse::<u16>() else {
        return failed(&format!("Invalid domain id: {id}"));
    };
    if id == 0 {
        return Ok(print(format_args!("{HOST_NAME}\n"))?);
    }
    let entries = Host::from_environment()?.entries()?;
    match entries.iter().find(|entry| entry.domid.0 == id) {
        Some(entry) => Ok(print(format_args!("{}\n", entry.record.name))?),
        None => failed(&format!(
            "Can't get domain name of domain id '{id}', maybe this domain does not exist."
        )),
    }
}

pub(crate) fn rename(call: &Call) -> Outcome {
    let name = call.args.at(1).to_string();
    if let Err(fault) = check_name(&name) {
        return failed(&fault.to_string());
    }
    let host = Host::from_environment()?;
    Ok(host.ask(call.args.at(0), &Request::Rename { name })?)
}
