//! Commands about the program itself.

use crate::commands::failed;
use crate::output::print;
use crate::table::{self, COMMANDS, Call};
use crate::{Failure, Outcome, completions as scripts, help as pages, manual as man};

pub(crate) fn help(call: &Call) -> Outcome {
    let program = call.program.as_str();
    let text = match call.args.values.first() {
        Some(name) => match table::find(name) {
            Some(command) => pages::page(program, command),
            None => return failed(&format!("command \"{name}\" not implemented")),
        },
        None if call.args.has("long") => {
            let all: Vec<String> = COMMANDS
                .iter()
                .map(|command| pages::page(program, command))
                .collect();
            format!("{}\n{}", pages::overview(program), all.join("\n"))
        }
        None => pages::overview(program),
    };
    Ok(print(format_args!("{text}"))?)
}

pub(crate) fn completions(call: &Call) -> Outcome {
    let script = match call.args.at(0) {
        "bash" => scripts::bash(),
        "zsh" => scripts::zsh(),
        "fish" => scripts::fish(),
        other => {
            return Err(Failure::Usage(format!(
                "there are no completions for `{other}': say bash, zsh or fish"
            )));
        }
    };
    Ok(print(format_args!("{script}"))?)
}

pub(crate) fn manual(call: &Call) -> Outcome {
    let page = match call.args.at(0) {
        "hospes.1" => man::hospes_1(),
        "hospes.cfg.5" => man::hospes_cfg_5(),
        other => {
            return Err(Failure::Usage(format!(
                "there is no manual page `{other}': say hospes.1 or hospes.cfg.5"
            )));
        }
    };
    Ok(print(format_args!("{page}"))?)
}
