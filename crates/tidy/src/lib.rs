//! Rules of this repository that a compiler does not check, so that nobody has to remember them.
//!
//! Each rule is a pure function from a file's path and text to findings; `tests/tidy.rs` applies all of them to the tree.
//! The rules: no file of more than [`LINES_MAX`] lines, a reason for a Rust file of more than [`LINES_WITHOUT_REASON`],
//! no unfinished code, no path of a developer's machine, and a header that says what a crate is for.
//! It refuses to judge style that `rustfmt` or `clippy` judge, and it reads no file that is not text of this project.

use std::collections::BTreeMap;

/// A source file with more lines fails.
pub const LINES_MAX: usize = 1000;
/// A Rust file with more lines needs an entry with a reason in `long-files.txt`.
pub const LINES_WITHOUT_REASON: usize = 600;

/// Endings of the files that the rules read.
const ENDINGS: &[&str] = &[
    ".rs", ".py", ".sh", ".c", ".h", ".md", ".toml", ".txt", "Makefile",
];

/// Whether the rules look at the file at `path` (relative to the repository).
#[must_use]
pub fn concerns(path: &str) -> bool {
    ENDINGS.iter().any(|ending| path.ends_with(ending))
}

/// The entries of `long-files.txt`: path to reason.
///
/// # Errors
/// The sentence names the line that has no reason.
pub fn parse_long_files(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut entries = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        match line.split_once("  # ") {
            Some((path, reason)) if !reason.trim().is_empty() => {
                entries.insert(path.trim().to_owned(), reason.trim().to_owned());
            }
            _ => {
                return Err(format!(
                    "long-files.txt:{}: give the path, two spaces, '# ' and the reason",
                    index + 1
                ));
            }
        }
    }
    Ok(entries)
}

/// Findings on the number of lines.
#[must_use]
pub fn check_length(path: &str, text: &str, reasons: &BTreeMap<String, String>) -> Vec<String> {
    let source = [".rs", ".py", ".sh", ".c", ".h"]
        .iter()
        .any(|ending| path.ends_with(ending));
    let lines = text.lines().count();
    if source && lines > LINES_MAX {
        return vec![format!(
            "{path}: {lines} lines; the limit is {LINES_MAX}: split it"
        )];
    }
    if path.ends_with(".rs") && lines > LINES_WITHOUT_REASON && !reasons.contains_key(path) {
        return vec![format!(
            "{path}: {lines} lines; over {LINES_WITHOUT_REASON} it needs a reason in crates/tidy/long-files.txt"
        )];
    }
    Vec::new()
}

/// Findings on marks of unfinished or debugging code.
#[must_use]
pub fn check_unfinished(path: &str, text: &str) -> Vec<String> {
    if !path.ends_with(".rs") {
        return Vec::new();
    }
    // Put together here, so that this file does not find itself.
    let marks = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!("));
    let words = [["TO", "DO"].concat(), ["FIX", "ME"].concat()];
    findings(path, text, |line| {
        marks
            .iter()
            .find(|mark| line.contains(mark.as_str()))
            .map(|mark| format!("`{mark})` must not stay in the tree"))
            .or_else(|| {
                words
                    .iter()
                    .find(|word| has_word(line, word))
                    .map(|word| format!("{word}: do it or leave it out"))
            })
    })
}

/// Findings on paths that exist on one developer's machine only.
#[must_use]
pub fn check_machine_paths(path: &str, text: &str) -> Vec<String> {
    let prefixes = ["work", "home", "Users"].map(|directory| format!("/{directory}/"));
    findings(path, text, |line| {
        prefixes
            .iter()
            .find(|prefix| {
                line.match_indices(prefix.as_str())
                    .any(|(at, _)| starts_path(line, at))
            })
            .map(|prefix| format!("a path of one machine ({prefix}...): make it relative"))
    })
}

/// Findings on a crate's root file: it has to open with a `//!` header.
#[must_use]
pub fn check_header(path: &str, text: &str) -> Vec<String> {
    let first = text.lines().find(|line| !line.trim().is_empty());
    match first {
        Some(line) if line.starts_with("//! ") => Vec::new(),
        _ => vec![format!(
            "{path}: a crate opens with a //! header: what it is for, what it refuses to do, its limits"
        )],
    }
}

/// Applies `rule` to each line and puts path and line number before what it finds.
fn findings(path: &str, text: &str, rule: impl Fn(&str) -> Option<String>) -> Vec<String> {
    text.lines()
        .enumerate()
        .filter_map(|(index, line)| {
            rule(line).map(|found| format!("{path}:{}: {found}", index + 1))
        })
        .collect()
}

/// Whether `word` stands in `line` with no letter, digit or underscore at either side.
fn has_word(line: &str, word: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].ends_with(inside) && !line[at + word.len()..].starts_with(inside)
    })
}

/// Whether an absolute path starts at byte `at` of `line`, and not the middle of a relative path or an address.
fn starts_path(line: &str, at: usize) -> bool {
    !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}/)$*".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_reasons() -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    #[test]
    fn check_length_over_the_limit_is_found() {
        let text = "x\n".repeat(LINES_MAX + 1);
        assert_eq!(check_length("a.rs", &text, &no_reasons()).len(), 1);
        assert_eq!(check_length("a.py", &text, &no_reasons()).len(), 1);
        assert!(check_length("a.md", &text, &no_reasons()).is_empty());
    }

    #[test]
    fn check_length_over_600_asks_for_a_reason() {
        let text = "x\n".repeat(LINES_WITHOUT_REASON + 1);
        assert_eq!(check_length("a.rs", &text, &no_reasons()).len(), 1);
        let reasons = parse_long_files("# comment\n\na.rs  # one table\n").unwrap();
        assert!(check_length("a.rs", &text, &reasons).is_empty());
        let shorter = "x\n".repeat(LINES_WITHOUT_REASON);
        assert!(check_length("a.rs", &shorter, &no_reasons()).is_empty());
    }

    #[test]
    fn parse_long_files_without_reason_is_refused() {
        assert!(
            parse_long_files("a.rs")
                .unwrap_err()
                .contains("long-files.txt:1")
        );
        assert!(parse_long_files("a.rs  # ").is_err());
    }

    #[test]
    fn check_unfinished_finds_each_mark() {
        for name in ["todo", "unimplemented", "dbg"] {
            let text = format!("fn f() {{ {name}!() }}\n");
            assert_eq!(check_unfinished("a.rs", &text).len(), 1, "{name}");
        }
        let word = ["TO", "DO"].concat();
        assert_eq!(
            check_unfinished("a.rs", &format!("// {word}: later")).len(),
            1
        );
        assert!(check_unfinished("a.rs", &format!("let {word}_LIST = 1;")).is_empty());
    }

    #[test]
    fn check_machine_paths_finds_absolute_paths_only() {
        let place = ["/wo", "rk/x"].concat();
        assert_eq!(
            check_machine_paths("a.md", &format!("see {place}")),
            [format!(
                "a.md:1: a path of one machine ({}...): make it relative",
                &place[..6]
            )]
        );
        assert!(check_machine_paths("a.md", &format!("see target{place}")).is_empty());
        assert!(check_machine_paths("a.md", &format!("$dir{place}")).is_empty());
    }

    #[test]
    fn check_header_missing_is_found() {
        assert!(check_header("lib.rs", "\n//! What it is for.\n").is_empty());
        assert_eq!(check_header("lib.rs", "use std::fmt;\n").len(), 1);
        assert_eq!(check_header("lib.rs", "").len(), 1);
    }
}
