//! `create`.

use std::fs::File;
use std::io::Read;

use anyhow::{Context, bail};
use hospes_config::{
    Diagnostic, DomainConfig, EventAction, EventActions, MAX_SOURCE_BYTES, Severity, Source, load,
};
use hospes_toolstack::{CreateRequest, Host, Until};
use hospes_units::DomId;
use lexopt::{Arg, Parser};

use crate::commands::option_value;
use crate::output::print;
use crate::{Failure, Global, Outcome, terminal, text, unexpected};

#[derive(Debug, Default)]
struct Options {
    file: Option<String>,
    assignments: Vec<String>,
    console: bool,
    foreground: bool,
    paused: bool,
    dry_run: bool,
    quiet: bool,
    debug: bool,
    unattended: bool,
    vnc: bool,
}

fn parse(mut parser: Parser) -> Result<Options, Failure> {
    let mut options = Options::default();
    while let Some(argument) = parser
        .next()
        .map_err(|fault| Failure::Usage(fault.to_string()))?
    {
        match argument {
            Arg::Short('f') | Arg::Long("defconfig") => {
                options.file = Some(option_value(&mut parser)?)
            }
            Arg::Short('c') => options.console = true,
            Arg::Short('F') => options.foreground = true,
            Arg::Short('p') => options.paused = true,
            Arg::Short('n') | Arg::Long("dryrun") => options.dry_run = true,
            Arg::Short('q') | Arg::Long("quiet") => options.quiet = true,
            Arg::Short('d') => options.debug = true,
            Arg::Short('e') => options.unattended = true,
            Arg::Short('V') | Arg::Long("vncviewer") => options.vnc = true,
            Arg::Short('A') | Arg::Long("vncviewer-autopass") => options.vnc = true,
            Arg::Value(value) => {
                let value = text(value)?;
                if value.contains('=') {
                    options.assignments.push(value);
                } else if options.file.is_none() {
                    options.file = Some(value);
                } else {
                    return Err(Failure::Usage(format!(
                        "`{value}' is a second file and no KEY=VALUE"
                    )));
                }
            }
            argument => return Err(unexpected(argument)),
        }
    }
    Ok(options)
}

pub(crate) fn create(global: Global, parser: Parser) -> Outcome {
    let options = parse(parser)?;
    Ok(create_with(global, options)?)
}

fn create_with(global: Global, options: Options) -> anyhow::Result<()> {
    let mut config = configure(global, &options)?;
    if options.debug || global.verbose {
        eprintln!("{:#}", config.to_json());
    }
    if options.dry_run || global.dry_run {
        return Ok(print(format_args!("{:#}\n", config.to_json()))?);
    }
    if options.vnc {
        eprintln!("note: there is no VNC server yet, -V and -A are ignored");
    }
    if options.unattended {
        config.on = EventActions {
            poweroff: EventAction::Preserve,
            reboot: EventAction::Preserve,
            watchdog: EventAction::Preserve,
            crash: EventAction::Preserve,
            soft_reset: EventAction::Preserve,
        };
    }
    let host = Host::from_environment()?;
    // Attached before the first instruction, the console shows everything.
    let created = host.create(CreateRequest {
        config,
        paused: options.paused || options.console,
    })?;
    let domid = created.domid;
    let mut ended = false;
    if options.console {
        let stream = host.console(&domid.to_string())?;
        if !options.paused {
            host.unpause(&domid.to_string())?;
        }
        ended = terminal::attach(&stream)? == terminal::Left::Ended;
    }
    if options.foreground {
        wait_for_death(&host, domid)?;
        ended = true;
    }
    // The console and the domain end in good order before their process does.
    if ended {
        created.wait_process()?;
    }
    Ok(())
}

/// Follows a domain through its reboots, each of which gives it another id.
fn wait_for_death(host: &Host, mut domid: DomId) -> anyhow::Result<()> {
    while let Some(next) = host.watch(domid, Until::Death)?.wait()?.next {
        domid = DomId(next);
    }
    Ok(())
}

/// Reads and checks the configuration and says what is to be said about it.
fn configure(global: Global, options: &Options) -> anyhow::Result<DomainConfig> {
    // As in xl, a missing file leaves every option at its default.
    let name = options.file.as_deref().unwrap_or("/dev/null");
    let file = read(name)?;
    if !options.quiet {
        eprintln!("Parsing config from {name}");
    }
    let mut sources = vec![Source { name, text: &file }];
    sources.extend(options.assignments.iter().map(|assignment| Source {
        name: "command line",
        text: assignment,
    }));
    let (config, diagnostics) = load(&sources);
    for diagnostic in diagnostics
        .iter()
        .filter(|diagnostic| is_wanted(diagnostic, global, options))
    {
        eprintln!("{diagnostic}");
    }
    match config {
        Some(config) => Ok(config),
        None => bail!("the configuration has errors: no domain was created"),
    }
}

fn is_wanted(diagnostic: &Diagnostic, global: Global, options: &Options) -> bool {
    global.verbose || !options.quiet || diagnostic.severity > Severity::Note
}

fn read(name: &str) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    File::open(name)
        .and_then(|file| {
            file.take(MAX_SOURCE_BYTES as u64 + 1)
                .read_to_end(&mut bytes)
        })
        .with_context(|| format!("cannot read the configuration file {name}"))?;
    if bytes.len() > MAX_SOURCE_BYTES {
        bail!("{name} has more than {MAX_SOURCE_BYTES} bytes: is it a configuration file?");
    }
    String::from_utf8(bytes)
        .with_context(|| format!("{name} is no text in UTF-8: is it a configuration file?"))
}
