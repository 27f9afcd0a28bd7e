//! Grammar: settings `NAME = VALUE` and `NAME += VALUE`, separated by newlines or semicolons; a value is a string, a
//! number or a list, in which newlines and a last comma are allowed.

use std::fmt;
use std::sync::Arc;

use crate::diagnostic::{Diagnostic, Location, Severity};
use crate::lex::{Lexer, Spanned, Token};
use crate::{MAX_SOURCE_BYTES, Source};

/// How deep lists may be nested.
pub const MAX_DEPTH: usize = 16;
/// After so many errors in one source the rest is not read.
const MAX_ERRORS: usize = 20;

/// A string or a number. xl makes no difference when reading: `memory="128"` is `memory=128`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Atom {
    pub text: String,
    /// True where it was written in quotes.
    pub quoted: bool,
}

/// What a value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueKind {
    Atom(Atom),
    List(Vec<Value>),
}

/// A value and where it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub kind: ValueKind,
    pub location: Location,
}

impl Value {
    fn same(&self, other: &Value) -> bool {
        match (&self.kind, &other.kind) {
            (ValueKind::Atom(a), ValueKind::Atom(b)) => a == b,
            (ValueKind::List(a), ValueKind::List(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same(b))
            }
            _ => false,
        }
    }
}

/// The value of a key, with all `+=` applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub name: String,
    pub value: Value,
    /// Where its name stands (of the last assignment).
    pub location: Location,
    /// True where `+=` was used.
    pub appended: bool,
}

/// The settings of all sources read so far, in the order of their first appearance; each name once.
#[derive(Clone, Debug, Default)]
pub struct Document {
    settings: Vec<Setting>,
    sources: Vec<Arc<str>>,
}

impl Document {
    /// The value of a key.
    pub fn get(&self, name: &str) -> Option<&Setting> {
        self.settings.iter().find(|setting| setting.name == name)
    }

    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// The first source as a whole: where a missing key is missing.
    pub fn whole(&self) -> Location {
        Location {
            source: self
                .sources
                .first()
                .cloned()
                .unwrap_or_else(|| "configuration".into()),
            line: 0,
            column: 0,
        }
    }

    /// True where both have the same keys with the same values, wherever they stand.
    pub fn same_settings(&self, other: &Document) -> bool {
        self.settings.len() == other.settings.len()
            && self
                .settings
                .iter()
                .zip(&other.settings)
                .all(|(a, b)| a.name == b.name && a.value.same(&b.value))
    }

    /// Adds the settings of a source. Every fault becomes an error in `diagnostics`; the setting it is in is left out.
    pub fn read(&mut self, source: Source<'_>, diagnostics: &mut Vec<Diagnostic>) {
        let name: Arc<str> = source.name.into();
        self.sources.push(name.clone());
        if source.text.len() > MAX_SOURCE_BYTES {
            diagnostics.push(Diagnostic {
                severity: Severity::Error,
                location: Location {
                    source: name,
                    line: 0,
                    column: 0,
                },
                message: format!(
                    "the configuration has {} bytes, at most {MAX_SOURCE_BYTES} are read; is it the right file?",
                    source.text.len()
                ),
            });
            return;
        }
        let mut parser = Parser {
            lexer: Lexer::new(source.text),
            source: name,
            current: Spanned {
                token: Token::Newline,
                line: 1,
                column: 1,
            },
            lex_failed: false,
        };
        let mut errors = 0;
        if let Err(fault) = parser.advance() {
            diagnostics.push(fault);
            parser.recover();
            errors += 1;
        }
        while parser.current.token != Token::End && errors < MAX_ERRORS {
            if let Err(fault) = parser.statement(self) {
                diagnostics.push(fault);
                parser.recover();
                errors += 1;
            }
        }
    }

    fn assign(&mut self, setting: Setting) -> Result<(), Diagnostic> {
        let Some(old) = self
            .settings
            .iter_mut()
            .find(|old| old.name == setting.name)
        else {
            self.settings.push(setting);
            return Ok(());
        };
        if !setting.appended {
            *old = setting;
            return Ok(());
        }
        match (&mut old.value.kind, setting.value.kind) {
            (ValueKind::Atom(old), ValueKind::Atom(more)) => {
                old.text.push_str(&more.text);
                old.quoted = true;
            }
            (ValueKind::List(old), ValueKind::List(more)) => old.extend(more),
            _ => {
                return Err(error(
                    setting.location,
                    format!(
                        "`{}' cannot be extended: one value is a list, the other is not (first set at {})",
                        setting.name, old.location
                    ),
                ));
            }
        }
        old.location = setting.location;
        old.appended = true;
        Ok(())
    }
}

fn error(location: Location, message: String) -> Diagnostic {
    Diagnostic {
        severity: Severity::Error,
        location,
        message,
    }
}

struct Parser<'a> {
    lexer: Lexer<'a>,
    source: Arc<str>,
    current: Spanned,
    /// True while the last fault was one of the characters: `current` is then older than the fault.
    lex_failed: bool,
}

impl Parser<'_> {
    fn here(&self) -> Location {
        Location {
            source: self.source.clone(),
            line: self.current.line,
            column: self.current.column,
        }
    }

    /// Reads the next token into `current` and returns the one that was there.
    fn advance(&mut self) -> Result<Token, Diagnostic> {
        match self.lexer.next() {
            Ok(next) => Ok(std::mem::replace(&mut self.current, next).token),
            Err(fault) => {
                self.lex_failed = true;
                let location = Location {
                    source: self.source.clone(),
                    line: fault.line,
                    column: fault.column,
                };
                Err(error(location, fault.message))
            }
        }
    }

    /// Goes on at the end of the line the fault is on.
    fn recover(&mut self) {
        let at_end = matches!(self.current.token, Token::Newline | Token::End);
        if !self.lex_failed && at_end {
            return;
        }
        self.lex_failed = false;
        self.lexer.skip_line();
        // What follows a skipped line is its end or that of the text, so this does not fail.
        if let Ok(next) = self.lexer.next() {
            self.current = next;
        }
    }

    fn unexpected(&self, wanted: &str) -> Diagnostic {
        error(
            self.here(),
            format!("{wanted} expected, found {}", self.current.token.describe()),
        )
    }

    fn statement(&mut self, document: &mut Document) -> Result<(), Diagnostic> {
        if matches!(self.current.token, Token::Newline | Token::Semicolon) {
            self.advance()?;
            return Ok(());
        }
        let location = self.here();
        let Token::Ident(name) = self.current.token.clone() else {
            return Err(self.unexpected("NAME=VALUE"));
        };
        self.advance()?;
        let appended = match self.current.token {
            Token::Assign => false,
            Token::Add => true,
            _ => return Err(self.unexpected(&format!("`=' behind `{name}'"))),
        };
        self.advance()?;
        let value = self.value(0)?;
        if !matches!(
            self.current.token,
            Token::Newline | Token::Semicolon | Token::End
        ) {
            return Err(
                self.unexpected(&format!("end of line or `;' behind the value of `{name}'"))
            );
        }
        document.assign(Setting {
            name,
            value,
            location,
            appended,
        })
    }

    fn value(&mut self, depth: usize) -> Result<Value, Diagnostic> {
        let location = self.here();
        let kind = match self.current.token.clone() {
            Token::String(text) => {
                self.advance()?;
                ValueKind::Atom(Atom { text, quoted: true })
            }
            Token::Number(text) => {
                self.advance()?;
                ValueKind::Atom(Atom {
                    text,
                    quoted: false,
                })
            }
            Token::Open if depth == MAX_DEPTH => {
                return Err(error(
                    location,
                    format!("lists are nested more than {MAX_DEPTH} deep"),
                ));
            }
            Token::Open => {
                self.advance()?;
                ValueKind::List(self.list(depth + 1)?)
            }
            _ => return Err(self.unexpected("string, number or list")),
        };
        Ok(Value { kind, location })
    }

    /// The inside of a list and its `]`.
    fn list(&mut self, depth: usize) -> Result<Vec<Value>, Diagnostic> {
        let mut values = Vec::new();
        loop {
            self.newlines()?;
            if self.current.token == Token::Close {
                break;
            }
            values.push(self.value(depth)?);
            self.newlines()?;
            match self.current.token {
                Token::Comma => self.advance()?,
                Token::Close => break,
                _ => return Err(self.unexpected("`,' or `]'")),
            };
        }
        self.advance()?;
        Ok(values)
    }

    fn newlines(&mut self) -> Result<(), Diagnostic> {
        while self.current.token == Token::Newline {
            self.advance()?;
        }
        Ok(())
    }
}

impl fmt::Display for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.quoted {
            return f.write_str(&self.text);
        }
        f.write_str("\"")?;
        for c in self.text.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\t' => f.write_str("\\t")?,
                c if c.is_ascii_control() => write!(f, "\\x{:02x}", u32::from(c))?,
                c => write!(f, "{c}")?,
            }
        }
        f.write_str("\"")
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            ValueKind::Atom(atom) => atom.fmt(f),
            ValueKind::List(values) => {
                f.write_str("[")?;
                for (index, value) in values.iter().enumerate() {
                    if index > 0 {
                        f.write_str(", ")?;
                    }
                    value.fmt(f)?;
                }
                f.write_str("]")
            }
        }
    }
}

/// The settings as a configuration file that reads back to the same settings.
impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for setting in &self.settings {
            writeln!(f, "{} = {}", setting.name, setting.value)?;
        }
        Ok(())
    }
}
