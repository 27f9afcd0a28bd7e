//! `image`: disk images for guests.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use hospes_config::limits;
use hospes_debian::{BuildError, Made, Progress, Recipe, build, parse_size};
use hospes_image::{Format, Image, ImageError, OpenSpec, open};
use hospes_sys::Termination;

use crate::args::Args;
use crate::output::{print, say, tell};
use crate::table::Call;
use crate::{Failure, Outcome};

/// Columns of a line of progress that is written over.
const DETAIL_COLUMNS: usize = 78;

pub(crate) fn image(call: &Call) -> Outcome {
    match call.args.at(0) {
        "debian" => debian(call),
        kind => Err(Failure::Usage(format!(
            "there is no image `{kind}' to be made: say debian"
        ))),
    }
}

fn debian(call: &Call) -> Outcome {
    let recipe = recipe(&call.args)?;
    recipe
        .check()
        .map_err(|fault| Failure::Usage(fault.to_string()))?;
    if call.global.dry_run {
        return Ok(());
    }
    let held = hold(&recipe)?;
    let termination = Termination::catch_not_ignored().context("signals cannot be caught")?;
    let mut screen = Screen::new();
    let made = build(&recipe, &termination, &mut |progress| screen.show(progress));
    screen.clear();
    drop(held);
    if let Err(fault @ BuildError::Interrupted) = &made {
        tell!("{}: {fault}", call.program);
        termination.obey();
    }
    let made = made?;
    screen.show(Progress::Step("done"));
    Ok(print(format_args!("{}", summary(&call.program, &made)))?)
}

/// Keeps domains from the image that is written over, from which no domain may be running: it would go on with a file without a name.
fn hold(recipe: &Recipe) -> anyhow::Result<Option<Arc<dyn Image>>> {
    if !recipe.force {
        return Ok(None);
    }
    let wanted = OpenSpec {
        path: recipe.output.clone(),
        // Whatever it is: nothing is read.
        format: Format::Raw,
        read_only: false,
        direct: false,
        discard: false,
        sector_bytes: None,
        lock_owner: "image debian".into(),
    };
    match open(&wanted) {
        Ok(image) => Ok(Some(image)),
        Err(fault @ ImageError::Locked { .. }) => {
            Err(fault).context("the image is in use and is not written over")
        }
        // There is none, or it is no disk.
        Err(_) => Ok(None),
    }
}

fn summary(program: &str, made: &Made) -> String {
    let mut text = format!(
        "image          {}\nkernel         {}\nramdisk        {}\n",
        made.image.display(),
        made.kernel.display(),
        made.initrd.display()
    );
    if let Some(seed) = &made.seed {
        text.push_str(&format!("seed           {}\n", seed.display()));
    }
    let configuration = made.configuration.display();
    text.push_str(&format!(
        "configuration  {configuration}\nStart it: {} create -c {}\n",
        for_shell(program),
        for_shell(&configuration.to_string()),
    ));
    text
}

/// A word as a shell takes it for one.
fn for_shell(word: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_alphanumeric() || "_-./+:=@%,".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', r"'\''")).into(),
    }
}

fn recipe(args: &Args) -> Result<Recipe, Failure> {
    let usage = |fault: hospes_debian::RecipeError| Failure::Usage(fault.to_string());
    let mut recipe = Recipe::new("");
    if let Some(suite) = args.value("suite") {
        recipe.suite = suite.into();
    }
    recipe.mirror = args.value("mirror").map(String::from);
    if let Some(kernel) = args.value("kernel") {
        recipe.kernel = kernel.parse().map_err(usage)?;
    }
    recipe.packages.extend(
        args.values_of("packages")
            .flat_map(|list| list.split([',', ' ']))
            .filter(|name| !name.is_empty())
            .map(str::to_string),
    );
    if let Some(size) = args.value("size") {
        recipe.bytes = parse_size(size).map_err(usage)?;
    }
    if let Some(format) = args.value("format") {
        recipe.format = format.parse().map_err(usage)?;
    }
    if let Some(hostname) = args.value("hostname") {
        recipe.hostname = hostname.into();
    }
    recipe.autologin = !args.has("no-autologin");
    recipe
        .ssh_keys
        .extend(args.values_of("ssh-key").map(Into::into));
    recipe.password_file = args.value("root-password-file").map(Into::into);
    recipe.cloud_init = args.has("cloud-init");
    recipe.user_data = args.value("user-data").map(Into::into);
    recipe.run = args.value("run").map(Into::into);
    recipe.docs = args.has("docs");
    if let Some(memory) = args.value("memory") {
        let (min, max) = (limits::MEMORY_MIN_MIB, limits::MEMORY_MAX_MIB);
        recipe.memory_mb = number("--memory", memory, min, max, " MB")?;
    }
    if let Some(vcpus) = args.value("vcpus") {
        recipe.vcpus = number("--vcpus", vcpus, 1, limits::VCPUS_MAX.into(), "")?;
    }
    recipe.force = args.has("force");
    recipe.output = args.at(1).into();
    Ok(recipe)
}

/// Within the limits that configurations have: what is made is to be started.
fn number(option: &str, text: &str, min: u64, max: u64, unit: &str) -> Result<u32, Failure> {
    let number = text.parse().ok();
    number
        .filter(|number| (min..=max).contains(&u64::from(*number)))
        .ok_or_else(|| {
            let fault =
                format!("{option} is `{text}', it has to be a number from {min} to {max}{unit}");
            Failure::Usage(fault)
        })
}

/// Progress on standard error: a line a step, and on a terminal one line that shows what goes on.
struct Screen {
    began: Instant,
    terminal: bool,
}

impl Screen {
    fn new() -> Screen {
        Screen {
            began: Instant::now(),
            terminal: std::io::stderr().is_terminal(),
        }
    }

    fn clear(&mut self) {
        if self.terminal {
            say(format_args!("\r\x1b[K"));
        }
    }

    fn show(&mut self, progress: Progress<'_>) {
        match progress {
            Progress::Step(step) => {
                self.clear();
                tell!("[{:>3} s] {step}", self.began.elapsed().as_secs());
            }
            Progress::Detail(line) if self.terminal => {
                let line: String = line
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(DETAIL_COLUMNS)
                    .collect();
                say(format_args!("\r\x1b[K{line}"));
                // Only what people see while they wait.
                let _ = std::io::stderr().flush();
            }
            Progress::Detail(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Recipe, String> {
        let command = crate::table::find("image").expect("a command");
        let arguments = ["debian"].iter().chain(arguments);
        let parser = lexopt::Parser::from_args(arguments);
        let args = Args::read(command, parser).map_err(sentence)?;
        recipe(&args).map_err(sentence)
    }

    fn sentence(failure: Failure) -> String {
        match failure {
            Failure::Usage(sentence) => sentence,
            Failure::TooFew => "too few arguments".into(),
            Failure::Failed(fault) | Failure::FailedWith(_, fault) => format!("failed: {fault}"),
        }
    }

    #[test]
    fn recipe_all_options_are_taken() {
        let recipe = parsed(&[
            "--suite=trixie",
            "--mirror",
            "http://m/debian",
            "--kernel",
            "generic",
            "--packages=fio,nginx",
            "--packages",
            "vim",
            "--size",
            "8G",
            "--format",
            "qcow2",
            "--hostname",
            "web",
            "--no-autologin",
            "--ssh-key",
            "k.pub",
            "--root-password-file",
            "p",
            "--cloud-init",
            "--user-data",
            "u",
            "--run",
            "r",
            "--docs",
            "--memory=2048",
            "--vcpus",
            "2",
            "-f",
            "web.qcow2",
        ])
        .unwrap();
        assert_eq!(recipe.check(), Ok(()));
        assert_eq!(recipe.packages, ["fio", "nginx", "vim"]);
        assert_eq!(
            (recipe.bytes, recipe.memory_mb, recipe.vcpus),
            (8 << 30, 2048, 2)
        );
        assert!(!recipe.autologin && recipe.cloud_init && recipe.docs && recipe.force);
        assert_eq!(recipe.output.to_str(), Some("web.qcow2"));
    }

    #[test]
    fn summary_has_a_command_for_the_shell() {
        for (directory, expected) in [
            ("/srv/über", "hospes create -c /srv/über/a.cfg"),
            ("/my disks", "hospes create -c '/my disks/a.cfg'"),
            ("/it's", r"hospes create -c '/it'\''s/a.cfg'"),
            ("/$a", "hospes create -c '/$a/a.cfg'"),
        ] {
            let file = |name: &str| std::path::Path::new(directory).join(name);
            let made = Made {
                image: file("a.img"),
                kernel: file("a.vmlinuz"),
                initrd: file("a.initrd"),
                configuration: file("a.cfg"),
                seed: None,
            };
            let text = summary("hospes", &made);
            assert!(text.ends_with(&format!("Start it: {expected}\n")), "{text}");
        }
    }

    #[test]
    fn recipe_wrong_arguments_are_sentences() {
        assert!(parsed(&[]).unwrap_err().contains("too few"));
        assert!(parsed(&["a.img", "b.img"]).unwrap_err().contains("b.img"));
        assert!(
            parsed(&["--size", "big", "a.img"])
                .unwrap_err()
                .contains("no size")
        );
        for (option, value, limits) in [
            ("--vcpus", "0", "1 to 128"),
            ("--vcpus", "1000", "1 to 128"),
            ("--vcpus", "two", "1 to 128"),
            ("--memory", "7", "8 to 16777216 MB"),
            ("--memory", "17000000", "8 to 16777216 MB"),
        ] {
            let fault = parsed(&[option, value, "a.img"]).unwrap_err();
            let expected = format!("{option} is `{value}', it has to be a number from {limits}");
            assert_eq!(fault, expected);
        }
        assert!(
            parsed(&["--nonsense", "a.img"])
                .unwrap_err()
                .contains("--nonsense")
        );
    }
}
