//! `image`: disk images for guests.

use std::io::{IsTerminal, Write};
use std::time::Instant;

use hospes_debian::{Made, Progress, Recipe, build, parse_size};
use lexopt::{Arg, Parser};

use crate::commands::option_value;
use crate::output::print;
use crate::{Failure, Global, Outcome, text, unexpected};

/// Columns of a line of progress that is written over.
const DETAIL_COLUMNS: usize = 78;

pub(crate) fn image(program: &str, global: Global, mut parser: Parser) -> Outcome {
    match next(&mut parser)? {
        Some(Arg::Value(kind)) if kind == "debian" => debian(program, global, parser),
        Some(Arg::Value(kind)) => Err(Failure::Usage(format!(
            "there is no image `{}' to be made: say debian",
            kind.to_string_lossy()
        ))),
        Some(argument) => Err(unexpected(argument)),
        None => Err(Failure::Usage("say what is to be made: debian".into())),
    }
}

fn next(parser: &mut Parser) -> Result<Option<Arg<'_>>, Failure> {
    parser
        .next()
        .map_err(|fault| Failure::Usage(fault.to_string()))
}

fn debian(program: &str, global: Global, parser: Parser) -> Outcome {
    let recipe = recipe(parser)?;
    recipe
        .check()
        .map_err(|fault| Failure::Usage(fault.to_string()))?;
    if global.dry_run {
        return Ok(());
    }
    let mut screen = Screen::new();
    let made = build(&recipe, &mut |progress| screen.show(progress));
    screen.clear();
    let made = made?;
    screen.show(Progress::Step("done"));
    Ok(print(format_args!("{}", summary(program, &made)))?)
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
        "configuration  {configuration}\nStart it: {program} create -c {configuration}\n"
    ));
    text
}

fn recipe(mut parser: Parser) -> Result<Recipe, Failure> {
    let mut recipe = Recipe::new("");
    let mut output = None;
    while let Some(argument) = next(&mut parser)? {
        let usage = |fault: hospes_debian::RecipeError| Failure::Usage(fault.to_string());
        match argument {
            Arg::Long("suite") => recipe.suite = option_value(&mut parser)?,
            Arg::Long("mirror") => recipe.mirror = Some(option_value(&mut parser)?),
            Arg::Long("kernel") => {
                recipe.kernel = option_value(&mut parser)?.parse().map_err(usage)?;
            }
            Arg::Long("packages") => recipe.packages.extend(
                option_value(&mut parser)?
                    .split([',', ' '])
                    .filter(|name| !name.is_empty())
                    .map(str::to_string),
            ),
            Arg::Long("size") => {
                recipe.bytes = parse_size(&option_value(&mut parser)?).map_err(usage)?;
            }
            Arg::Long("format") => {
                recipe.format = option_value(&mut parser)?.parse().map_err(usage)?;
            }
            Arg::Long("hostname") => recipe.hostname = option_value(&mut parser)?,
            Arg::Long("no-autologin") => recipe.autologin = false,
            Arg::Long("ssh-key") => recipe.ssh_keys.push(option_value(&mut parser)?.into()),
            Arg::Long("root-password-file") => {
                recipe.password_file = Some(option_value(&mut parser)?.into());
            }
            Arg::Long("cloud-init") => recipe.cloud_init = true,
            Arg::Long("user-data") => recipe.user_data = Some(option_value(&mut parser)?.into()),
            Arg::Long("run") => recipe.run = Some(option_value(&mut parser)?.into()),
            Arg::Long("docs") => recipe.docs = true,
            Arg::Long("memory") => recipe.memory_mb = number("--memory", &mut parser)?,
            Arg::Long("vcpus") => recipe.vcpus = number("--vcpus", &mut parser)?,
            Arg::Short('f') | Arg::Long("force") => recipe.force = true,
            Arg::Value(value) if output.is_none() => output = Some(text(value)?),
            argument => return Err(unexpected(argument)),
        }
    }
    recipe.output = output
        .ok_or_else(|| Failure::Usage("the name of the image is missing".into()))?
        .into();
    Ok(recipe)
}

fn number(option: &str, parser: &mut Parser) -> Result<u32, Failure> {
    match option_value(parser)?.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(Failure::Usage(format!("{option} wants a number above 0"))),
    }
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
            eprint!("\r\x1b[K");
        }
    }

    fn show(&mut self, progress: Progress<'_>) {
        match progress {
            Progress::Step(step) => {
                self.clear();
                eprintln!("[{:>3} s] {step}", self.began.elapsed().as_secs());
            }
            Progress::Detail(line) if self.terminal => {
                let line: String = line
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(DETAIL_COLUMNS)
                    .collect();
                eprint!("\r\x1b[K{line}");
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
        recipe(Parser::from_args(arguments)).map_err(|failure| match failure {
            Failure::Usage(sentence) => sentence,
            Failure::Failed(fault) => format!("failed: {fault}"),
        })
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
    fn recipe_wrong_arguments_are_sentences() {
        assert!(parsed(&[]).unwrap_err().contains("name of the image"));
        assert!(parsed(&["a.img", "b.img"]).unwrap_err().contains("b.img"));
        assert!(
            parsed(&["--size", "big", "a.img"])
                .unwrap_err()
                .contains("no size")
        );
        assert!(
            parsed(&["--vcpus", "0", "a.img"])
                .unwrap_err()
                .contains("--vcpus")
        );
        assert!(
            parsed(&["--nonsense", "a.img"])
                .unwrap_err()
                .contains("--nonsense")
        );
    }
}
