//! Keys and events for guests.

use hospes_toolstack::{Host, Request, Trigger};

use crate::Outcome;
use crate::commands::failed;
use crate::output::tell;
use crate::table::Call;

pub(crate) fn sysrq(call: &Call) -> Outcome {
    let mut letters = call.args.at(1).chars();
    let (Some(key), None) = (letters.next(), letters.next()) else {
        return failed("Invalid sysrq: it is one letter");
    };
    let host = Host::from_environment()?;
    Ok(host.ask(call.args.at(0), &Request::Sysrq { key })?)
}

pub(crate) fn trigger(call: &Call) -> Outcome {
    let word = call.args.at(1);
    let Some(trigger) = Trigger::ALL
        .into_iter()
        .find(|trigger| trigger.as_str() == word)
    else {
        return failed(&format!("Invalid trigger \"{word}\""));
    };
    let vcpu = match call.args.values.get(2).map(|text| text.parse()) {
        None => 0,
        Some(Ok(vcpu)) => vcpu,
        // As xl does.
        Some(Err(_)) => {
            tell!("Invalid vcpuid, using default vcpuid=0.");
            0
        }
    };
    send(call, trigger, vcpu)
}

pub(crate) fn button_press(call: &Call) -> Outcome {
    tell!("WARNING: \"button-press\" is deprecated. Please use \"trigger\"");
    match call.args.at(1) {
        "power" => send(call, Trigger::Power, 0),
        "sleep" => send(call, Trigger::Sleep, 0),
        other => failed(&format!("{other} is an invalid button identifier")),
    }
}

fn send(call: &Call, trigger: Trigger, vcpu: u32) -> Outcome {
    let host = Host::from_environment()?;
    Ok(host.ask(call.args.at(0), &Request::Trigger { trigger, vcpu })?)
}

pub(crate) fn debug_keys(call: &Call) -> Outcome {
    let keys = call.args.at(0);
    if keys.is_empty() || keys.chars().any(|key| key != 'q') {
        return failed(&format!(
            "cannot send debug keys: {keys}: the key there is is q"
        ));
    }
    let host = Host::from_environment()?;
    for entry in host.entries()? {
        // One that ended just now has nothing more to say.
        if let Err(fault) = host.ask(&entry.domid.to_string(), &Request::Describe) {
            tell!("{fault}");
        }
    }
    Ok(())
}
