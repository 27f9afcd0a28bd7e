//! Moving domains to other hosts.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use hospes_toolstack::{Host, MoveOptions, MoveWatcher};

use crate::create::config_in;
use crate::output::{Line, say};
use crate::table::Call;
use crate::{Failure, Outcome};

/// What leads to the other host where nothing else is given.
const SSH: &str = "ssh";

pub(crate) fn migrate(call: &Call) -> Outcome {
    let args = &call.args;
    let (who, target) = (args.at(0), args.at(1));
    if args.has("D") {
        return Err(Failure::Usage(
            "the domain gets an id of the other host: leave -D out".into(),
        ));
    }
    let config = args.value("C");
    let config = config.map(|file| config_in(file, "the domain goes on here"));
    let config = config.transpose()?;
    let mut options = options(call);
    // There is no foreground on the other host: xl makes -e of it.
    options.unattended |= args.has("F");
    let transport = transport(args.value("s"), target)?;
    let host = Host::from_environment()?;
    let mut shown = Shown::new("Sent", options.debug);
    host.migrate(who, config, transport, options, &mut shown)
        .context("Migration failed")?;
    say(format_args!("Migration successful.\n"));
    Ok(())
}

pub(crate) fn receive(call: &Call) -> Outcome {
    if call.args.has("r") {
        return Err(Failure::Usage(
            "domains are not kept in two places at once: leave -r out".into(),
        ));
    }
    let host = Host::from_environment()?;
    let options = options(call);
    let open = |stream: std::io::Result<std::os::fd::OwnedFd>| stream.map(File::from);
    let from = open(std::io::stdin().as_fd().try_clone_to_owned());
    let to = open(std::io::stdout().as_fd().try_clone_to_owned());
    let from = from.context("cannot read standard input")?;
    let to = to.context("cannot write to standard output")?;
    let mut shown = Shown::new("Received", options.debug);
    // The other side shows how far it has come.
    shown.line = None;
    let received = host.receive(from, to, options, &mut shown);
    Ok(received.context("migration target")?)
}

fn options(call: &Call) -> MoveOptions {
    MoveOptions {
        paused: call.args.has("p"),
        unattended: call.args.has("e"),
        debug: call.args.has("debug"),
    }
}

/// The command that leads to the other host: as with xl its text is the shell's, and an empty one makes the host itself the text.
fn transport(ssh: Option<&str>, target: &str) -> Result<Command, Failure> {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c");
    match ssh.unwrap_or(SSH) {
        "" => {
            shell.arg(target);
        }
        ssh => {
            if target.is_empty() || target.starts_with('-') {
                return Err(Failure::Usage(format!("{target:?} is no name of a host")));
            }
            shell.arg(format!("exec {ssh} \"$@\"")).arg("sh");
            shell.args([target, "hospes", "migrate-receive"]);
        }
    }
    Ok(shell)
}

/// What the user sees of a domain that moves.
struct Shown {
    line: Option<Line>,
    /// Whether the line has its end.
    ended: bool,
    debug: bool,
    begun: Instant,
}

impl Shown {
    fn new(done: &'static str, debug: bool) -> Shown {
        Shown {
            line: Some(Line::new(done)),
            ended: true,
            debug,
            begun: Instant::now(),
        }
    }
}

impl MoveWatcher for Shown {
    fn pages(&mut self, pages: u64) {
        if let Some(line) = &mut self.line {
            line.show(pages);
            self.ended = false;
        }
    }

    fn step(&mut self, text: &str) {
        if let Some(line) = &self.line
            && !std::mem::replace(&mut self.ended, true)
        {
            line.end();
        }
        let time = self.begun.elapsed().as_secs_f64();
        match self.debug {
            true => say(format_args!("{time:8.3} {text}\n")),
            false => say(format_args!("{text}\n")),
        }
    }

    fn detail(&mut self, text: &str) {
        if self.debug {
            self.step(text);
        }
    }

    fn show_details(&mut self) {
        self.debug = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(ssh: Option<&str>, target: &str) -> Vec<String> {
        let Ok(command) = transport(ssh, target) else {
            panic!("{target} is a host");
        };
        let arguments = command.get_args();
        arguments.map(|a| a.to_str().unwrap().to_string()).collect()
    }

    #[test]
    fn transport_is_a_command_of_the_shell() {
        let tail = ["sh", "there", "hospes", "migrate-receive"];
        let plain = text(None, "there");
        assert_eq!(
            (&plain[1][..], &plain[2..]),
            ("exec ssh \"$@\"", &tail.map(String::from)[..])
        );
        assert_eq!(text(Some("ssh -p 22"), "there")[1], "exec ssh -p 22 \"$@\"");
        assert_eq!(text(Some(""), "a | b"), ["-c", "a | b"]);
        for target in ["", "-oProxyCommand=x"] {
            assert!(transport(None, target).is_err(), "{target}");
        }
    }
}
