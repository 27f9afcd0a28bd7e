//! What disk and network specifications share: errors, and small checks of their values.

/// Why a disk or network specification cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("`{key}' is no parameter of a {kind}; known are {known}")]
    UnknownKey {
        kind: &'static str,
        key: String,
        known: String,
    },
    #[error("`{key}' cannot be \"{value}\": it is {allowed}")]
    Value {
        key: &'static str,
        value: String,
        /// Ends the sentence "it is ...".
        allowed: String,
    },
    #[error("`{key}' takes no value: write {instead}, alone")]
    Flag {
        key: String,
        /// The words there are.
        instead: &'static str,
    },
    #[error("`{key}' is given twice: remove one")]
    Repeated { key: &'static str },
    #[error("`{key}' is missing: {hint}")]
    Missing {
        key: &'static str,
        hint: &'static str,
    },
    #[error(
        "\"{text}\" is one value too many: behind the access mode only KEY=VALUE and flags follow"
    )]
    TooMany { text: String },
    #[error("\"{text}\" is not understood: write KEY=VALUE, separated by commas")]
    Syntax { text: String },
    #[error("`{key}' is not supported: {hint}")]
    Unsupported { key: String, hint: &'static str },
}

impl SpecError {
    pub(crate) fn value(key: &'static str, value: &str, allowed: impl Into<String>) -> SpecError {
        SpecError::Value {
            key,
            value: value.escape_debug().to_string(),
            allowed: allowed.into(),
        }
    }
}

/// What the front end is told about the back end.
pub(crate) const TRUST: &str = "`trusted' (as without either) or `untrusted'";

/// A word that stands alone, with a value.
pub(crate) fn flag<T>(key: &str, instead: &'static str) -> Result<T, SpecError> {
    Err(SpecError::Flag {
        key: key.to_string(),
        instead,
    })
}

/// Longest name of a network interface, in bytes: Linux's IFNAMSIZ without the closing NUL.
pub const INTERFACE_NAME_MAX: usize = 15;

/// A name that Linux takes for a network interface.
pub(crate) fn interface_name(key: &'static str, text: &str) -> Result<String, SpecError> {
    let usable = !text.is_empty()
        && text.len() <= INTERFACE_NAME_MAX
        && text != "."
        && text != ".."
        && !text
            .chars()
            .any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if usable {
        Ok(text.to_string())
    } else {
        Err(SpecError::value(
            key,
            text,
            format!(
                "the name of a network interface, 1 to {INTERFACE_NAME_MAX} bytes without blanks, `/' and `:'"
            ),
        ))
    }
}

/// Stores a value that may be given once; an empty one counts as not given.
pub(crate) fn once(
    slot: &mut Option<String>,
    key: &'static str,
    value: &str,
) -> Result<(), SpecError> {
    match slot {
        Some(old) if !old.is_empty() => Err(SpecError::Repeated { key }),
        _ => {
            *slot = Some(value.to_string());
            Ok(())
        }
    }
}
