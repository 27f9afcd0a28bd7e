//! Completion scripts for shells, made of the table.

use std::fmt::Write;

use crate::table::{COMMANDS, Command, GLOBAL_OPTIONS};

/// What the arguments of a command may be.
struct Expected {
    domains: bool,
    files: bool,
    words: Vec<&'static str>,
}

/// Reads it off the usage: DOMAIN, FILE, and alternatives such as start|stop.
fn expected(command: &Command) -> Expected {
    let usage = command.arguments;
    let words = usage
        .split_whitespace()
        .filter(|word| word.contains('|'))
        .flat_map(|word| word.split('|'))
        .filter(|word| {
            !word.is_empty()
                && word
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.')
        })
        .collect();
    Expected {
        domains: usage.contains("DOMAIN"),
        files: usage.contains("FILE") || usage.contains("DISKSPEC"),
        words,
    }
}

/// All spellings of a command's options.
fn options(command: &Command) -> Vec<String> {
    let mut words = Vec::new();
    for option in command.options {
        words.extend(option.short.map(|short| format!("-{short}")));
        words.extend(option.long.map(|long| format!("--{long}")));
    }
    words.push("--help".into());
    words
}

fn names() -> String {
    let names: Vec<&str> = COMMANDS.iter().map(|command| command.name).collect();
    names.join(" ")
}

const BASH_HEAD: &str = r#"# Completions of hospes and xl for bash.
_hospes() {
    local cur=${COMP_WORDS[COMP_CWORD]} program=${COMP_WORDS[0]} command= index=1 words= domains= files=
    local name quoted found
    while [ $index -lt "$COMP_CWORD" ]; do
        case ${COMP_WORDS[index]} in
            -*) ;;
            *) command=${COMP_WORDS[index]}; break ;;
        esac
        index=$((index + 1))
    done
    case $command in
"#;

const BASH_TAIL: &str = r#"    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    if [ -n "$domains" ]; then
        # A name may hold what the shell would expand. Beside files readline quotes it.
        while read -r _ _ name; do
            printf -v quoted %q "$name"
            if [[ $name == "$cur"* || $quoted == "$cur"* ]]; then
                [ -n "$files" ] || name=$quoted
                COMPREPLY+=("$name")
            fi
        done < <("$program" vm-list 2>/dev/null | tail -n +2)
    fi
    if [ -n "$files" ]; then
        compopt -o filenames 2>/dev/null
        mapfile -t found < <(compgen -f -- "$cur")
        COMPREPLY+=("${found[@]}")
    fi
}
complete -F _hospes hospes
complete -F _hospes xl
"#;

pub(crate) fn bash() -> String {
    let mut script = String::from(BASH_HEAD);
    let globals: Vec<String> = GLOBAL_OPTIONS
        .iter()
        .filter_map(|option| option.short)
        .map(|short| format!("-{short}"))
        .collect();
    // Writing to a string does not fail.
    let _ = writeln!(
        script,
        "        '') words=\"{} {}\" ;;",
        names(),
        globals.join(" ")
    );
    for command in COMMANDS {
        let expected = expected(command);
        let mut words = options(command);
        words.extend(expected.words.iter().map(|word| word.to_string()));
        if command.name == "help" {
            words.push(names());
        }
        let domains = if expected.domains { " domains=1" } else { "" };
        let files = if expected.files { " files=1" } else { "" };
        let _ = writeln!(
            script,
            "        {}) words=\"{}\"{domains}{files} ;;",
            command.name,
            words.join(" ")
        );
    }
    script.push_str(BASH_TAIL);
    script
}

const ZSH_TAIL: &str = r#"_hospes "$@"
"#;

/// A text between single quotes, which must not contain brackets or colons that zsh would read.
fn zsh_text(text: &str) -> String {
    text.replace('\'', "'\\''")
        .replace('[', "\\[")
        .replace(']', "\\]")
        .replace(':', "\\:")
}

/// Leaves the names of what `vm-list` prints, with the spaces in them.
const NAMES_ALONE: &str = r"sed -n '2,$s/^[^ ]* *[^ ]* *\(.*[^ ]\) *$/\1/p'";

pub(crate) fn zsh() -> String {
    let mut script = format!(
        "#compdef hospes xl\n# Completions of hospes and xl for zsh.\n\
         _hospes_domains() {{\n    local -a names\n    names=(${{(f)\"$($words[1] vm-list 2>/dev/null | {NAMES_ALONE})\"}})\n    \
         compadd -a names\n}}\n\n_hospes() {{\n    local program=$words[1] context state line\n    local -a commands\n    commands=(\n",
    );
    for command in COMMANDS {
        let _ = writeln!(
            script,
            "        '{}:{}'",
            command.name,
            zsh_text(command.summary)
        );
    }
    script.push_str("    )\n    _arguments -C \\\n");
    for option in GLOBAL_OPTIONS {
        if let Some(short) = option.short {
            let _ = writeln!(script, "        '-{short}[{}]' \\", zsh_text(option.help));
        }
    }
    script.push_str(
        "        '1:command:->command' \\\n        '*::argument:->argument'\n    case $state in\n    \
         command) _describe command commands ;;\n    argument)\n        local called=$words[1]\n        words[1]=$program\n        case $called in\n",
    );
    for command in COMMANDS {
        let _ = write!(script, "        {}) _arguments", command.name);
        for option in command.options {
            let help = zsh_text(option.help);
            let value = option.value.map_or(String::new(), |value| {
                let action = if matches!(value, "FILE" | "DIR") {
                    "_files"
                } else {
                    ""
                };
                format!(":{}:{action}", zsh_text(value))
            });
            if let Some(short) = option.short {
                let _ = write!(script, " '-{short}[{help}]{value}'");
            }
            if let Some(long) = option.long {
                let equals = if option.value.is_some() { "=" } else { "" };
                let _ = write!(script, " '--{long}{equals}[{help}]{value}'");
            }
        }
        let expected = expected(command);
        let mut actions = Vec::new();
        if !expected.words.is_empty() {
            actions.push(format!("*:word:({})", expected.words.join(" ")));
        } else if command.name == "help" {
            actions.push(format!("*:command:({})", names()));
        } else if expected.domains && expected.files {
            actions.push("1:domain:_hospes_domains".into());
            actions.push("*:file:_files".into());
        } else if expected.domains {
            actions.push("*:domain:_hospes_domains".into());
        } else if expected.files {
            actions.push("*:file:_files".into());
        }
        for action in actions {
            let _ = write!(script, " '{action}'");
        }
        script.push_str(" ;;\n");
    }
    script.push_str("        esac ;;\n    esac\n}\n\n");
    script.push_str(ZSH_TAIL);
    script
}

fn fish_text(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\'', "\\'")
}

pub(crate) fn fish() -> String {
    let mut script = format!(
        "# Completions of hospes and xl for fish.\nfunction __hospes_domains\n    set -l words (commandline -opc)\n    \
         $words[1] vm-list 2>/dev/null | {NAMES_ALONE}\nend\n\n",
    );
    for program in ["hospes", "xl"] {
        let _ = writeln!(script, "complete -c {program} -f");
        for option in GLOBAL_OPTIONS {
            if let Some(short) = option.short {
                let _ = writeln!(
                    script,
                    "complete -c {program} -n __fish_use_subcommand -s {short} -d '{}'",
                    fish_text(option.help)
                );
            }
        }
        for command in COMMANDS {
            let _ = writeln!(
                script,
                "complete -c {program} -n __fish_use_subcommand -a {} -d '{}'",
                command.name,
                fish_text(command.summary)
            );
            let seen = format!("'__fish_seen_subcommand_from {}'", command.name);
            for option in command.options {
                let short = option
                    .short
                    .map_or(String::new(), |short| format!(" -s {short}"));
                let long = option
                    .long
                    .map_or(String::new(), |long| format!(" -l {long}"));
                let value = match option.value {
                    Some("FILE" | "DIR") => " -r -F",
                    Some(_) => " -x",
                    None => "",
                };
                let _ = writeln!(
                    script,
                    "complete -c {program} -n {seen}{short}{long}{value} -d '{}'",
                    fish_text(option.help)
                );
            }
            let expected = expected(command);
            if expected.domains {
                let _ = writeln!(
                    script,
                    "complete -c {program} -n {seen} -a '(__hospes_domains)'"
                );
            }
            if expected.files {
                let _ = writeln!(script, "complete -c {program} -n {seen} -F");
            }
            if !expected.words.is_empty() {
                let _ = writeln!(
                    script,
                    "complete -c {program} -n {seen} -a '{}'",
                    expected.words.join(" ")
                );
            }
            if command.name == "help" {
                let _ = writeln!(script, "complete -c {program} -n {seen} -a '{}'", names());
            }
        }
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::find;

    #[test]
    fn expected_is_read_off_the_usage() {
        let of = |name: &str| expected(find(name).expect("a command"));
        assert!(of("pause").domains && !of("pause").files);
        assert!(of("create").files && !of("create").domains);
        assert_eq!(of("domains").words, ["start", "stop"]);
        assert_eq!(of("completions").words, ["bash", "zsh", "fish"]);
        assert_eq!(
            of("trigger").words,
            ["nmi", "reset", "init", "power", "sleep", "s3resume"]
        );
    }

    #[test]
    fn scripts_know_every_command() {
        for script in [bash(), zsh(), fish()] {
            for command in COMMANDS {
                assert!(script.contains(command.name), "{}", command.name);
            }
        }
    }
}
