//! What the commands say about themselves.

use std::fmt::Write;

use crate::XENTOP;
use crate::args::Opt;
use crate::table::{COMMANDS, Command, GLOBAL_OPTIONS};

/// Columns of a help page.
const WIDTH: usize = 100;

/// How the command is called.
pub(crate) fn called(program: &str, command: &Command) -> String {
    match program {
        XENTOP => program.to_string(),
        _ => format!("{program} {}", command.name),
    }
}

/// Called as xentop the program says so; as xl it has the version of another program.
pub(crate) fn version(program: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match program {
        XENTOP => format!("{program} (hospes {version})"),
        _ => format!("hospes {version}"),
    }
}

pub(crate) fn usage(program: &str, command: &Command) -> String {
    if program == XENTOP {
        return format!("Usage: {program} {}", command.arguments);
    }
    let dry_run = if command.dry_run { "N" } else { "" };
    format!(
        "Usage: {program} [-vf{dry_run}] {} {}",
        command.name, command.arguments
    )
    .trim_end()
    .to_string()
}

/// Everything about a command.
pub(crate) fn page(program: &str, command: &Command) -> String {
    let mut page = format!(
        "{}\n\n{}.\n\nOptions:\n",
        usage(program, command),
        command.summary
    );
    for option in command.options {
        page.push_str(&option_line(option));
    }
    page.push_str(&option_line(&Opt::both('h', "help", "print this")));
    if !command.details.is_empty() {
        for paragraph in command.details.split("\n\n") {
            let _ = write!(page, "\n{}", wrap(paragraph, WIDTH));
        }
    }
    page
}

fn option_line(option: &Opt) -> String {
    format!("  {:<26} {}\n", option.usage(), option.help)
}

/// Lines of at most so many characters, each ended.
fn wrap(text: &str, width: usize) -> String {
    let mut out = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > width {
            out.push('\n');
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += length;
    }
    out.push('\n');
    out
}

/// The list of commands. As in xl, they alone stand one blank from the edge, behind four lines: completions for xl read them so.
pub(crate) fn overview(program: &str) -> String {
    let mut text = format!("Usage: {program} [-vfN] COMMAND [ARGUMENTS]\n\nCommands:\n\n");
    for command in COMMANDS {
        // Writing to a string does not fail.
        let _ = writeln!(text, " {:<20} {}.", command.name, command.summary);
    }
    text.push_str("\nOptions:\n");
    for option in GLOBAL_OPTIONS {
        let _ = writeln!(text, "  {:<19} {}", option.usage(), option.help);
    }
    let _ = writeln!(text, "\n`{program} COMMAND --help' tells more.");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overview_is_read_by_completions_of_xl() {
        let text = overview("xl");
        // sed '1,4d' | awk '/^ [^ ]/ {print $1}'
        let names = text.lines().skip(4).filter_map(|line| {
            let rest = line.strip_prefix(' ')?;
            let name = rest.split_whitespace().next();
            name.filter(|_| !rest.starts_with(' '))
        });
        let commands = COMMANDS.iter().map(|command| command.name);
        assert!(names.eq(commands), "{text}");
    }

    #[test]
    fn wrap_keeps_words_and_width() {
        assert_eq!(wrap("one two three", 7), "one two\nthree\n");
        assert_eq!(wrap("incomprehensible", 7), "incomprehensible\n");
        assert_eq!(wrap("", 7), "\n");
    }
}
