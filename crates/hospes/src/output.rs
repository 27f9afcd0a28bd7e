//! Standard output.

use std::fmt;
use std::io::{self, Write, stdout};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{PrettyFormatter, Serializer};

/// Writes to standard output. Unlike `print!` it returns an error where nobody reads.
pub(crate) fn print(text: fmt::Arguments<'_>) -> io::Result<()> {
    let mut out = stdout().lock();
    out.write_fmt(text)?;
    out.flush()
}

/// JSON in the lines of xl's: scripts look for them.
pub(crate) fn json(value: &Value) -> String {
    let mut text = Vec::new();
    let mut form = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"    "));
    // Into memory nothing fails, and a value has no keys but texts.
    let _ = value.serialize(&mut form);
    String::from_utf8_lossy(&text).into_owned()
}
