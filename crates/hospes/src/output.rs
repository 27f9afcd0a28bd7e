//! Standard output and standard error.

use std::fmt;
use std::io::{self, IsTerminal, Write, stderr, stdout};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{PrettyFormatter, Serializer};

const PAGE_BYTES: u64 = 4096;
/// How often a line of progress is written anew.
const INTERVAL: Duration = Duration::from_millis(200);

/// Writes to standard output. Unlike `print!` it returns an error where nobody reads.
pub(crate) fn print(text: fmt::Arguments<'_>) -> io::Result<()> {
    let mut out = stdout().lock();
    let written = out.write_fmt(text).and_then(|()| out.flush());
    // Of the same kind: nobody is told of a reader that has left.
    written.map_err(|fault| {
        io::Error::new(
            fault.kind(),
            format!("cannot write to standard output: {fault}"),
        )
    })
}

/// Writes to standard error. Where that fails, on a full disk for one, the command goes on all the same: what it does matters more than what it says.
pub(crate) fn say(text: fmt::Arguments<'_>) {
    // At once, so that lines of several commands with one log do not mix.
    let _ = stderr().write_all(text.to_string().as_bytes());
}

/// A line on standard error, with the arguments of [`format!`].
macro_rules! tell {
    ($($text:tt)*) => {
        $crate::output::say(format_args!("{}\n", format_args!($($text)*)))
    };
}
pub(crate) use tell;

/// An error and its causes, but for those that it has told already.
pub(crate) fn causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// JSON in the lines of xl's: scripts look for them.
pub(crate) fn json(value: &Value) -> String {
    let mut text = Vec::new();
    let mut form = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"    "));
    // Into memory nothing fails, and a value has no keys but texts.
    let _ = value.serialize(&mut form);
    String::from_utf8_lossy(&text).into_owned()
}

/// How far something has come that takes long: on a terminal a line that is written over, elsewhere one at the end.
pub(crate) struct Line {
    done: &'static str,
    bytes: u64,
    terminal: bool,
    shown: Option<Instant>,
}

impl Line {
    pub(crate) fn new(done: &'static str) -> Line {
        Line {
            done,
            bytes: 0,
            terminal: stderr().is_terminal(),
            shown: None,
        }
    }

    pub(crate) fn show(&mut self, pages: u64) {
        self.show_bytes(pages * PAGE_BYTES);
    }

    pub(crate) fn show_bytes(&mut self, bytes: u64) {
        self.bytes = bytes;
        if self.terminal && self.shown.is_none_or(|shown| shown.elapsed() >= INTERVAL) {
            self.shown = Some(Instant::now());
            say(format_args!("\r{} MiB", bytes >> 20));
        }
    }

    pub(crate) fn end(&self) {
        let start = if self.terminal { "\r" } else { "" };
        let mib = self.bytes >> 20;
        say(format_args!("{start}{} {mib} MiB\n", self.done));
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use hospes_toolstack::Error;

    use super::*;

    #[test]
    fn causes_are_told_once() {
        let source = || io::Error::from_raw_os_error(2);
        let told = Error::File {
            what: "cannot open",
            path: "x".into(),
            source: source(),
        };
        let fault = "No such file or directory (os error 2)";
        assert_eq!(causes(&told.into()), format!("cannot open x: {fault}"));
        let untold = Err::<(), _>(source()).context("cannot read y");
        assert_eq!(
            causes(&untold.expect_err("an error")),
            format!("cannot read y: {fault}")
        );
        let advised =
            anyhow::Error::from(source()).context(format!("cannot write: {fault}: see there"));
        assert_eq!(
            causes(&advised),
            format!("cannot write: {fault}: see there")
        );
    }
}
