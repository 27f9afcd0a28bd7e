//! `create`.

use std::fs::File;
use std::io::Read;

use anyhow::{Context, bail};
use hospes_config::{
    Diagnostic, DomainConfig, EventAction, EventActions, MAX_SOURCE_BYTES, Severity, Source, load,
};
use hospes_toolstack::{CreateRequest, Host, Until};
use hospes_units::DomId;

use crate::args::Args;
use crate::commands::failed;
use crate::output::print;
use crate::table::Call;
use crate::{Failure, Global, Outcome, terminal};

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

/// Reads file and settings; `first` is where they begin among the values.
fn parse(args: &Args, first: usize) -> Result<Options, Failure> {
    let mut options = Options {
        file: args.value("defconfig").map(String::from),
        console: args.has("c"),
        foreground: args.has("F"),
        paused: args.has("p"),
        dry_run: args.has("dryrun"),
        quiet: args.has("quiet"),
        debug: args.has("d"),
        unattended: args.has("e"),
        vnc: args.has("V") || args.has("A"),
        ..Options::default()
    };
    for value in args.values.iter().skip(first) {
        if value.contains('=') {
            options.assignments.push(value.clone());
        } else if options.file.is_none() {
            options.file = Some(value.clone());
        } else {
            return Err(Failure::Usage(format!(
                "`{value}' is a second file and no KEY=VALUE"
            )));
        }
    }
    Ok(options)
}

pub(crate) fn create(call: &Call) -> Outcome {
    let options = parse(&call.args, 0)?;
    Ok(create_with(call.global, options)?)
}

pub(crate) fn config_update(call: &Call) -> Outcome {
    let options = parse(&call.args, 1)?;
    if options.file.is_none() {
        return failed("Config file not specified");
    }
    eprintln!(
        "WARNING: what is attached to a running domain stays through its reboots by itself: this command is for the rest"
    );
    let host = Host::from_environment()?;
    let entry = host.find(call.args.at(0))?;
    let config = configure(call.global, &options)?;
    if options.debug || call.global.dry_run {
        print(format_args!("{:#}\n", config.to_json()))?;
    }
    if call.global.dry_run {
        return Ok(());
    }
    eprintln!("setting dom{} configuration", entry.domid);
    Ok(host.update_config(&entry.domid.to_string(), config)?)
}

/// The name of the domain that a file describes.
pub(crate) fn name_in(file: &str) -> anyhow::Result<String> {
    let text = read(file)?;
    let (config, diagnostics) = load(&[Source {
        name: file,
        text: &text,
    }]);
    match config {
        Some(config) => Ok(config.name),
        None => {
            let errors: Vec<String> = diagnostics
                .iter()
                .filter(|diagnostic| diagnostic.is_error())
                .map(ToString::to_string)
                .collect();
            bail!("{}", errors.join("; "))
        }
    }
}

/// Creates the domain of a file and leaves it running.
pub(crate) fn create_from(file: &str) -> anyhow::Result<()> {
    let options = Options {
        file: Some(file.into()),
        quiet: true,
        ..Options::default()
    };
    create_with(Global::default(), options)
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
