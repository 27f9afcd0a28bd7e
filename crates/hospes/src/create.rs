//! `create`.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use hospes_config::{
    Diagnostic, DiskConfig, DomainConfig, MAX_SOURCE_BYTES, Severity, Source, load,
};
use hospes_toolstack::Error::Gone;
use hospes_toolstack::{CreateRequest, Created, Host, UNATTENDED, Until, Watch};
use hospes_units::DomId;
use serde_json::json as object;

use crate::args::Args;
use crate::commands::failed;
use crate::output::{json, print, tell};
use crate::table::Call;
use crate::{Failure, Global, Outcome, configured, terminal};

/// How long the command stays with the domain that it has made.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Attend {
    /// `-c`: at its console.
    pub console: bool,
    /// `-F`: until it has ended.
    pub foreground: bool,
    /// `-p`: leave it paused.
    pub paused: bool,
}

impl Attend {
    pub(crate) fn read(args: &Args) -> Attend {
        Attend {
            console: args.has("c"),
            foreground: args.has("F"),
            paused: args.has("p"),
        }
    }

    /// Whether the domain is to be made paused. Attached before the first instruction, the console shows everything.
    pub(crate) fn begins_paused(self) -> bool {
        self.paused || self.console
    }

    /// Stays with the domain.
    pub(crate) fn stay(self, host: &Host, created: Created) -> anyhow::Result<()> {
        let domid = created.domid;
        let mut ended = false;
        // From before the console: a domain that is kept does not end it.
        let watch = self
            .foreground
            .then(|| host.watch(domid, Until::Succession))
            .transpose()?;
        if self.console {
            let stream = host.console(&domid.to_string())?;
            if !self.paused {
                host.unpause(&domid.to_string())?;
            }
            ended = terminal::attach(&stream)? == terminal::Left::Ended;
        }
        if let Some(watch) = watch {
            ended = wait_for_end(host, watch)?;
        }
        // The console and the domain end in good order before their process does.
        if ended {
            created.wait_process()?;
        }
        Ok(())
    }
}

/// What `xl create` ends with where a domain cannot be made or the configuration cannot be read (ERROR_FAIL of libxl).
const FAILED: u8 = 3;
/// What it ends with where a disk is not there, or no configuration was given (ERROR_INVAL).
const INVALID: u8 = 6;

#[derive(Debug, Default)]
struct Options {
    file: Option<String>,
    assignments: Vec<String>,
    attend: Attend,
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
        attend: Attend::read(args),
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
    if options.file.is_none() && options.assignments.is_empty() {
        let fault = anyhow!("Config file not specified");
        return Err(Failure::FailedWith(INVALID, fault));
    }
    create_with(call.global, options)
}

pub(crate) fn config_update(call: &Call) -> Outcome {
    if call.args.values.is_empty() {
        return failed("config-update requires a domain argument");
    }
    let options = parse(&call.args, 1)?;
    if options.file.is_none() {
        return failed("Config file not specified");
    }
    tell!(
        "WARNING: what is attached to a running domain stays through its reboots by itself: this command is for the rest"
    );
    let host = Host::from_environment()?;
    let entry = host.find(call.args.at(0))?;
    let kept = format!("domain {} keeps what it has", entry.domid);
    let config = configure(call.global, &options, &kept)?;
    if options.debug || call.global.dry_run {
        // As xl does: an item of `list -l' that has no id yet.
        let uuid = config.uuid.or(Some(entry.record.uuid));
        let started_next = DomainConfig {
            uuid,
            ..config.clone()
        };
        let item = object!({ "domid": null, "config": configured::to_json(&started_next) });
        print(format_args!("{}\n", json(&item)))?;
    }
    if call.global.dry_run {
        return Ok(());
    }
    tell!("setting dom{} configuration", entry.domid);
    Ok(host.update_config(call.args.at(0), config)?)
}

/// The configuration in a file, and warnings about it; the error is all that is wrong with it.
pub(crate) fn checked(file: &str) -> anyhow::Result<(DomainConfig, Vec<Diagnostic>)> {
    let text = read(file)?;
    let (config, mut diagnostics) = load(&[Source {
        name: file,
        text: &text,
    }]);
    match config {
        Some(config) => {
            diagnostics.retain(|diagnostic| diagnostic.severity > Severity::Note);
            Ok((config, diagnostics))
        }
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

/// The configuration in a file, as for `create`; `otherwise` is what becomes of the domain where it has errors.
pub(crate) fn config_in(file: &str, otherwise: &str) -> anyhow::Result<DomainConfig> {
    let options = Options {
        file: Some(file.into()),
        quiet: true,
        ..Options::default()
    };
    configure(Global::default(), &options, otherwise)
}

fn create_with(global: Global, options: Options) -> Outcome {
    let mut config = configure(global, &options, "no domain was created").map_err(|fault| {
        match fault.downcast_ref::<io::Error>() {
            Some(_) => Failure::FailedWith(FAILED, fault),
            None => Failure::Failed(fault),
        }
    })?;
    // As in xl, which draws the UUID that the domain has before it shows the configuration.
    config.uuid = Some(config.uuid.map_or_else(hospes_toolstack::random_uuid, Ok)?);
    let shown = || json(&configured::to_json(&config));
    if options.dry_run || global.dry_run {
        return Ok(print(format_args!("{}\n", shown()))?);
    }
    if options.debug || global.verbose {
        tell!("{}", shown());
    }
    if options.vnc {
        tell!("note: there is no VNC server yet, -V and -A are ignored");
    }
    if options.unattended {
        config.on = UNATTENDED;
    }
    let host = Host::from_environment()?;
    let disks = config.disks.clone();
    let created = host
        .create(CreateRequest {
            config,
            paused: options.attend.begins_paused(),
        })
        .map_err(|fault| {
            let status = match disks.iter().all(is_there) {
                true => FAILED,
                false => INVALID,
            };
            Failure::FailedWith(status, fault.into())
        })?;
    Ok(options.attend.stay(&host, created)?)
}

/// Whether a disk has what it is made of, as xl looks for it before all else.
fn is_there(disk: &DiskConfig) -> bool {
    match (&disk.target, &disk.script) {
        (Some(target), None) => target.exists() || Path::new("/dev").join(target).exists(),
        _ => true,
    }
}

/// Follows a domain through its restarts, each of which gives it another id. False where it has come to another process than its first, which keeps a domain that has
/// ended (`rename-restart`) and has no more to say.
fn wait_for_end(host: &Host, mut watch: Watch) -> anyhow::Result<bool> {
    let mut is_in_first = true;
    loop {
        let domid = watch.domid();
        let ended = match is_in_first {
            true => watch.wait()?,
            // How that process has ended is known to nobody else.
            false => watch.wait_told().map_err(|fault| match fault {
                Gone { .. } => anyhow!(
                    "domain {domid} was killed, has ended at once or could not be started again: see its log"
                ),
                fault => fault.into(),
            })?,
        };
        if let Some(fault) = ended.alone {
            bail!("domain {domid} has ended and is kept, and cannot be started again: {fault}");
        }
        is_in_first &= ended.dead;
        match ended.next {
            Some(next) => watch = host.watch(DomId(next), Until::Succession)?,
            None => return Ok(is_in_first),
        }
    }
}

/// Reads and checks the configuration and says what is to be said about it; `otherwise` is what becomes of it where it has errors.
fn configure(global: Global, options: &Options, otherwise: &str) -> anyhow::Result<DomainConfig> {
    // As in xl, a missing file leaves every option at its default.
    let name = options.file.as_deref().unwrap_or("/dev/null");
    let file = read(name)?;
    if !options.quiet {
        tell!("Parsing config from {name}");
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
        tell!("{diagnostic}");
    }
    match config {
        Some(config) => Ok(config),
        None => bail!("the configuration has errors: {otherwise}"),
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
    decode(&bytes).map_err(|line| {
        anyhow!(
            "{name}:{line}: this is no text in UTF-8: is it a configuration file? save it as UTF-8"
        )
    })
}

/// The text of a configuration file, whose comments may be in any encoding. The error is the number of a line with something else that is no UTF-8.
fn decode(bytes: &[u8]) -> Result<String, u32> {
    let mut text = String::with_capacity(bytes.len());
    for (number, line) in (1u32..).zip(bytes.split_inclusive(|byte| *byte == b'\n')) {
        let (setting, comment) = line.split_at(comment_start(line));
        text.push_str(std::str::from_utf8(setting).map_err(|_| number)?);
        text.push_str(&String::from_utf8_lossy(comment));
    }
    Ok(text)
}

/// Where the comment of a line begins. A text in quotes ends on its line.
fn comment_start(line: &[u8]) -> usize {
    let mut quote = None;
    let mut bytes = line.iter().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match (quote, byte) {
            (None, b'#') => return at,
            (None, b'"' | b'\'') => quote = Some(byte),
            (Some(_), b'\\') => drop(bytes.next()),
            (Some(open), byte) if open == byte => quote = None,
            _ => {}
        }
    }
    line.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_takes_comments_in_any_encoding() {
        let file = b"# caf\xe9\nname='#a' # \xff\nextra=\"it's \\\" # \xc3\xa9\"";
        let text = decode(file).expect("only comments are no UTF-8");
        assert_eq!(text.lines().count(), 3);
        assert!(text.contains("name='#a' # "));
        assert!(text.ends_with("extra=\"it's \\\" # \u{e9}\""));
        assert_eq!(decode(b"a=1\nname='# \xe9'\n"), Err(2));
        assert_eq!(decode(b"\xff=1"), Err(1));
    }
}
