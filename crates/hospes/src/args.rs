//! Arguments of a command, read as its entry in the table says.

use std::ffi::OsString;

use lexopt::{Arg, Parser};

use crate::Failure;
use crate::table::Command;

/// An option of a command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opt {
    pub short: Option<char>,
    pub long: Option<&'static str>,
    /// What its value is called, where it has one.
    pub value: Option<&'static str>,
    pub help: &'static str,
}

impl Opt {
    pub(crate) const fn short(short: char, help: &'static str) -> Opt {
        Opt {
            short: Some(short),
            long: None,
            value: None,
            help,
        }
    }

    pub(crate) const fn long(long: &'static str, help: &'static str) -> Opt {
        Opt {
            short: None,
            long: Some(long),
            value: None,
            help,
        }
    }

    pub(crate) const fn both(short: char, long: &'static str, help: &'static str) -> Opt {
        Opt {
            short: Some(short),
            long: Some(long),
            value: None,
            help,
        }
    }

    pub(crate) const fn with(self, value: &'static str) -> Opt {
        Opt {
            value: Some(value),
            ..self
        }
    }

    /// As help pages show it: `-f FILE, --defconfig=FILE`.
    pub(crate) fn usage(&self) -> String {
        let short = self.short.map(|short| match self.value {
            Some(value) => format!("-{short} {value}"),
            None => format!("-{short}"),
        });
        let long = self.long.map(|long| match self.value {
            Some(value) => format!("--{long}={value}"),
            None => format!("--{long}"),
        });
        [short, long]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(", ")
    }

    fn is(&self, argument: &Arg<'_>) -> bool {
        match argument {
            Arg::Short(letter) => self.short == Some(*letter),
            Arg::Long(word) => self.long == Some(*word),
            Arg::Value(_) => false,
        }
    }

    fn is_called(&self, name: &str) -> bool {
        self.long == Some(name) || self.short.is_some_and(|short| name.chars().eq([short]))
    }
}

/// What was given: every option is one of the table.
#[derive(Debug, Default)]
pub(crate) struct Args {
    options: Vec<(&'static Opt, String)>,
    /// Everything that is no option.
    pub values: Vec<String>,
}

impl Args {
    /// Reads the rest of the arguments.
    pub(crate) fn read(command: &'static Command, mut parser: Parser) -> Result<Args, Failure> {
        let mut args = Args::default();
        while let Some(argument) = parser.next().map_err(usage)? {
            if let Arg::Value(value) = argument {
                args.values.push(text(value)?);
                continue;
            }
            let Some(option) = find(command.options, &argument) else {
                let name = match argument {
                    Arg::Long(word) => format!("--{word}"),
                    Arg::Short(letter) => letter.to_string(),
                    Arg::Value(_) => String::new(),
                };
                return Err(Failure::Usage(format!("option `{name}' not supported.")));
            };
            let value = match option.value {
                Some(_) => text(parser.value().map_err(usage)?)?,
                None => String::new(),
            };
            args.options.push((option, value));
        }
        if args.values.len() < command.min {
            return Err(Failure::TooFew);
        }
        if let Some(value) = args.values.get(command.max) {
            return Err(Failure::Usage(format!("unexpected argument \"{value}\"")));
        }
        Ok(args)
    }

    /// Whether the option of this letter or word was given.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.count(name) > 0
    }

    pub(crate) fn count(&self, name: &str) -> usize {
        self.options
            .iter()
            .filter(|(option, _)| option.is_called(name))
            .count()
    }

    /// The value of an option; the last counts.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.options
            .iter()
            .rfind(|(option, _)| option.is_called(name))
            .map(|(_, value)| value.as_str())
    }

    /// All values of an option that may be repeated.
    pub(crate) fn values_of(&self, name: &str) -> impl Iterator<Item = &str> {
        self.options
            .iter()
            .filter(move |(option, _)| option.is_called(name))
            .map(|(_, value)| value.as_str())
    }

    /// A value that the table says is there.
    pub(crate) fn at(&self, index: usize) -> &str {
        self.values.get(index).map_or("", String::as_str)
    }
}

/// The option that was meant. As with getopt, the beginning of a word will do where no other option begins so.
fn find(options: &'static [Opt], argument: &Arg<'_>) -> Option<&'static Opt> {
    if let Some(option) = options.iter().find(|option| option.is(argument)) {
        return Some(option);
    }
    let Arg::Long(word) = argument else {
        return None;
    };
    let begins = |option: &&Opt| option.long.is_some_and(|long| long.starts_with(word));
    let mut candidates = options.iter().filter(begins);
    match (candidates.next(), candidates.next()) {
        (Some(option), None) => Some(option),
        _ => None,
    }
}

fn usage(fault: lexopt::Error) -> Failure {
    Failure::Usage(fault.to_string())
}

fn text(value: OsString) -> Result<String, Failure> {
    value
        .into_string()
        .map_err(|value| Failure::Usage(format!("{value:?} is not valid UTF-8")))
}
