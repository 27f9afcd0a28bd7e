//! Standard output.

use std::fmt;
use std::io::{self, Write, stdout};

/// Writes to standard output. Unlike `print!` it returns an error where nobody reads.
pub(crate) fn print(text: fmt::Arguments<'_>) -> io::Result<()> {
    let mut out = stdout().lock();
    out.write_fmt(text)?;
    out.flush()
}
