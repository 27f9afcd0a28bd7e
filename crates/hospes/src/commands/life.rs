//! Pausing, ending, and the console.

use hospes_toolstack::{Ended, Error, Host, ShutdownKind, Until};
use hospes_units::DomId;

use crate::commands::failed;
use crate::output::tell;
use crate::table::Call;
use crate::{Failure, Outcome, terminal};

pub(crate) fn pause(call: &Call) -> Outcome {
    Ok(Host::from_environment()?.pause(call.args.at(0))?)
}

pub(crate) fn unpause(call: &Call) -> Outcome {
    Ok(Host::from_environment()?.unpause(call.args.at(0))?)
}

pub(crate) fn destroy(call: &Call) -> Outcome {
    Ok(Host::from_environment()?.destroy(call.args.at(0))?)
}

pub(crate) fn console(call: &Call) -> Outcome {
    match call.args.value("t") {
        None | Some("pv") => {}
        Some(kind @ ("serial" | "vuart")) => {
            return failed(&format!("a PVH domain has no {kind} console: use -t pv"));
        }
        Some(_) => {
            return failed(
                "console type supported are: pv, serial, vuart; a PVH domain has pv: use -t pv",
            );
        }
    }
    match call.args.value("n") {
        None => {}
        Some(number) if number.parse() == Ok(0u32) => {}
        Some(number) => {
            return failed(&format!(
                "there is no console {number}: a domain has console 0 only"
            ));
        }
    }
    let stream = Host::from_environment()?.console(call.args.at(0))?;
    terminal::attach(&stream)?;
    Ok(())
}

pub(crate) fn shutdown(call: &Call) -> Outcome {
    shut_down(ShutdownKind::Poweroff, call)
}

pub(crate) fn reboot(call: &Call) -> Outcome {
    shut_down(ShutdownKind::Reboot, call)
}

fn shut_down(kind: ShutdownKind, call: &Call) -> Outcome {
    let all = call.args.has("all");
    let waits = call.args.count("wait");
    let host = Host::from_environment()?;
    let entries = match (call.args.values.first(), all) {
        (None, false) => return failed("You must specify -a or a domain id."),
        (Some(_), true) => return Err(Failure::Usage("give -a or a domain, not both".into())),
        (Some(who), false) => vec![host.find(who)?],
        (None, true) => host.entries()?,
    };
    let until = if waits > 1 {
        Until::Death
    } else {
        Until::Shutdown
    };
    let mut failure = None;
    let mut give_up = |fault: Error| {
        // With -a the others are still to be asked.
        if !all {
            return Err(fault);
        }
        tell!("{fault}");
        failure = Some(fault);
        Ok(())
    };
    let mut requests = Vec::new();
    for entry in entries {
        let doing = match kind {
            ShutdownKind::Poweroff => "Shutting down",
            ShutdownKind::Reboot => "Rebooting",
        };
        tell!("{doing} domain {}", entry.domid);
        // The watch comes before the request: an end that comes at once is not missed.
        let watch = (waits > 0).then(|| host.watch(entry.domid, until));
        let request = watch
            .transpose()
            .and_then(|watch| Ok((host.ask_to_shut_down(&entry, kind)?, watch)));
        match request {
            Ok(request) => requests.push(request),
            Err(fault) => give_up(fault)?,
        }
    }
    // All have been asked before one is waited for: each may take a while.
    let mut watches = Vec::new();
    for (asked, watch) in requests {
        match asked.wait() {
            Ok(()) => watches.extend(watch),
            Err(fault) => give_up(fault)?,
        }
    }
    if waits > 0 {
        tell!("Waiting for {} domains", watches.len());
        for watch in watches {
            let domid = watch.domid();
            match watch.wait() {
                Ok(ended) => tell!("{}", describe_end(domid, &ended)),
                // The others are still to be waited for.
                Err(fault) => {
                    tell!("{fault}");
                    failure = Some(fault);
                }
            }
        }
    }
    failure.map_or(Ok(()), |fault| Err(fault.into()))
}

pub(crate) fn describe_end(domid: DomId, ended: &Ended) -> String {
    match ended.reason.as_ref().and_then(|reason| reason.code()) {
        Some(code) => format!("Domain {domid} has been shut down, reason code {code}"),
        None => format!("Domain {domid} has been destroyed"),
    }
}
