//! All commands but those with a file of their own.

use anyhow::bail;
use hospes_toolstack::{Ended, Error, HOST_NAME, Host, ShutdownKind, Until};
use hospes_units::DomId;
use lexopt::{Arg, Parser};

use crate::help::{self, Command};
use crate::output::print;
use crate::{Failure, Global, Outcome, create, image, list, terminal, text, unexpected};

/// Runs one command with the arguments that are left.
pub(crate) fn execute(
    command: &'static Command,
    program: &str,
    global: Global,
    parser: Parser,
) -> Outcome {
    if asks_for_help(&parser) {
        return Ok(print(format_args!("{}", help::page(program, command)))?);
    }
    match command.name {
        "create" => create::create(global, parser),
        "list" => list::list(parser),
        "console" => console(parser),
        "pause" => on_domain(global, parser, |host, who| host.pause(who)),
        "unpause" => on_domain(global, parser, |host, who| host.unpause(who)),
        "shutdown" => shut_down(ShutdownKind::Poweroff, global, parser),
        "reboot" => shut_down(ShutdownKind::Reboot, global, parser),
        "destroy" => on_domain(global, parser, |host, who| host.destroy(who)),
        "domid" => domid(parser),
        "domname" => domname(parser),
        "image" => image::image(program, global, parser),
        _ => help_command(program, parser),
    }
}

/// Whether `-h` or `--help` stands anywhere before `--`.
fn asks_for_help(parser: &Parser) -> bool {
    let mut copy = parser.clone();
    let Some(rest) = copy.try_raw_args() else {
        return false;
    };
    rest.map(|argument| argument.to_string_lossy().into_owned())
        .take_while(|argument| argument != "--")
        .any(|argument| argument == "-h" || argument == "--help")
}

/// The only argument of a command without options.
fn single(mut parser: Parser, what: &str, options: &[char]) -> Result<String, Failure> {
    let mut found = None;
    while let Some(argument) = parser
        .next()
        .map_err(|fault| Failure::Usage(fault.to_string()))?
    {
        match argument {
            Arg::Value(value) if found.is_none() => found = Some(text(value)?),
            Arg::Short(letter) if options.contains(&letter) => {}
            argument => return Err(unexpected(argument)),
        }
    }
    found.ok_or_else(|| Failure::Usage(format!("{what} is missing")))
}

fn on_domain(
    global: Global,
    parser: Parser,
    operation: impl FnOnce(&Host, &str) -> Result<(), Error>,
) -> Outcome {
    let who = single(parser, "the domain", &['f'])?;
    let host = Host::from_environment()?;
    if global.dry_run {
        host.find(&who)?;
        return Ok(());
    }
    Ok(operation(&host, &who)?)
}

fn console(mut parser: Parser) -> Outcome {
    let mut who = None;
    while let Some(argument) = parser
        .next()
        .map_err(|fault| Failure::Usage(fault.to_string()))?
    {
        match argument {
            Arg::Short('t') => match option_value(&mut parser)?.as_str() {
                "pv" => {}
                "serial" => bail_failure("a PVH domain has no serial console: use -t pv")?,
                other => {
                    return Err(Failure::Usage(format!(
                        "`{other}' is no kind of console: use pv"
                    )));
                }
            },
            Arg::Short('n') => match option_value(&mut parser)?.parse::<u32>() {
                Ok(0) => {}
                Ok(number) => bail_failure(&format!(
                    "there is no console {number}: a domain has console 0 only"
                ))?,
                Err(_) => return Err(Failure::Usage("-n wants a number".into())),
            },
            Arg::Value(value) if who.is_none() => who = Some(text(value)?),
            argument => return Err(unexpected(argument)),
        }
    }
    let who = who.ok_or_else(|| Failure::Usage("the domain is missing".into()))?;
    let stream = Host::from_environment()?.console(&who)?;
    terminal::attach(&stream)?;
    Ok(())
}

fn bail_failure(message: &str) -> Outcome {
    let failed = || -> anyhow::Result<()> { bail!("{message}") };
    Ok(failed()?)
}

/// The value behind an option.
pub(crate) fn option_value(parser: &mut Parser) -> Result<String, Failure> {
    text(
        parser
            .value()
            .map_err(|fault| Failure::Usage(fault.to_string()))?,
    )
}

fn shut_down(kind: ShutdownKind, global: Global, mut parser: Parser) -> Outcome {
    let (mut all, mut waits, mut who) = (false, 0, None);
    while let Some(argument) = parser
        .next()
        .map_err(|fault| Failure::Usage(fault.to_string()))?
    {
        match argument {
            Arg::Short('a') | Arg::Long("all") => all = true,
            Arg::Short('w') | Arg::Long("wait") => waits += 1,
            Arg::Short('F') => {}
            Arg::Value(value) if who.is_none() => who = Some(text(value)?),
            argument => return Err(unexpected(argument)),
        }
    }
    let host = Host::from_environment()?;
    let entries = match (&who, all) {
        (None, false) => return Err(Failure::Usage("give -a or a domain".into())),
        (Some(_), true) => return Err(Failure::Usage("give -a or a domain, not both".into())),
        (Some(who), false) => vec![host.find(who)?],
        (None, true) => host.entries()?,
    };
    if global.dry_run {
        return Ok(());
    }
    let until = if waits > 1 {
        Until::Death
    } else {
        Until::Shutdown
    };
    let mut watches = Vec::new();
    let mut failure = None;
    for entry in entries {
        let doing = match kind {
            ShutdownKind::Poweroff => "Shutting down",
            ShutdownKind::Reboot => "Rebooting",
        };
        eprintln!("{doing} domain {}", entry.domid);
        // Before the request: an end that comes at once is not missed.
        let watch = if waits > 0 {
            Some(host.watch(entry.domid, until)?)
        } else {
            None
        };
        match host.shutdown(&entry.domid.to_string(), kind) {
            Ok(()) => watches.extend(watch),
            // With -a the others are still to be asked.
            Err(fault) if all => {
                eprintln!("{fault}");
                failure = Some(fault);
            }
            Err(fault) => return Err(fault.into()),
        }
    }
    if waits > 0 {
        eprintln!("Waiting for {} domains", watches.len());
        for watch in watches {
            let domid = watch.domid();
            eprintln!("{}", describe_end(domid, &watch.wait()?));
        }
    }
    failure.map_or(Ok(()), |fault| Err(fault.into()))
}

fn describe_end(domid: DomId, ended: &Ended) -> String {
    match ended.reason.as_ref().and_then(|reason| reason.code()) {
        Some(code) => format!("Domain {domid} has been shut down, reason code {code}"),
        None => format!("Domain {domid} has been destroyed"),
    }
}

fn domid(parser: Parser) -> Outcome {
    let name = single(parser, "the name", &[])?;
    if name == HOST_NAME {
        return Ok(print(format_args!("0\n"))?);
    }
    let entries = Host::from_environment()?.entries()?;
    match entries.iter().find(|entry| entry.record.name == name) {
        Some(entry) => Ok(print(format_args!("{}\n", entry.domid))?),
        None => bail_failure(&format!(
            "Can't get domid of domain name '{name}', maybe this domain does not exist."
        )),
    }
}

fn domname(parser: Parser) -> Outcome {
    let id = single(parser, "the id", &[])?;
    let Ok(id) = id.parse::<u16>() else {
        return bail_failure(&format!("Invalid domain id: {id}"));
    };
    if id == 0 {
        return Ok(print(format_args!("{HOST_NAME}\n"))?);
    }
    let entries = Host::from_environment()?.entries()?;
    match entries.iter().find(|entry| entry.domid.0 == id) {
        Some(entry) => Ok(print(format_args!("{}\n", entry.record.name))?),
        None => bail_failure(&format!(
            "Can't get domain name of domain id '{id}', maybe this domain does not exist."
        )),
    }
}

fn help_command(program: &str, mut parser: Parser) -> Outcome {
    let (mut long, mut about) = (false, None);
    while let Some(argument) = parser
        .next()
        .map_err(|fault| Failure::Usage(fault.to_string()))?
    {
        match argument {
            Arg::Long("long") => long = true,
            Arg::Value(value) if about.is_none() => about = Some(text(value)?),
            argument => return Err(unexpected(argument)),
        }
    }
    let page = match about {
        Some(name) => match help::find(&name) {
            Some(command) => help::page(program, command),
            None => return bail_failure(&format!("there is no command `{name}'")),
        },
        None if long => {
            let pages: Vec<String> = help::COMMANDS
                .iter()
                .map(|command| help::page(program, command))
                .collect();
            format!("{}\n{}", help::overview(program), pages.join("\n"))
        }
        None => help::overview(program),
    };
    Ok(print(format_args!("{page}"))?)
}
