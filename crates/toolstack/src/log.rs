//! The log of a process without a terminal, which its standard error is.

use std::fmt;
use std::io::{self, Write};

use crate::clock::Utc;

/// Writes a line. Where it cannot be written, on a full disk for one, it is lost: no guest may end for that.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    // At once, so that lines of several threads do not mix.
    let line = format!("{} {text}\n", Utc::now());
    let _ = io::stderr().write_all(line.as_bytes());
}

/// A line in the log, with the arguments of [`format!`].
macro_rules! log {
    ($($text:tt)*) => {
        $crate::log::line(format_args!($($text)*))
    };
}
pub(crate) use log;
