//! Paths: what may be one, and relative ones.

use hospes_units::DomId;

use crate::tree::Error;

const ABSOLUTE_MAX: usize = 3072;
const RELATIVE_MAX: usize = 2048;

/// A domain has come.
pub const INTRODUCE_DOMAIN: &str = "@introduceDomain";
/// A domain has shut down or is gone.
pub const RELEASE_DOMAIN: &str = "@releaseDomain";

/// The paths that are no nodes but may be watched, and have permissions.
pub const SPECIALS: [&str; 2] = [INTRODUCE_DOMAIN, RELEASE_DOMAIN];

/// What relative paths of a domain are relative to, with the slash.
pub fn home(domid: DomId) -> String {
    format!("/local/domain/{domid}/")
}

/// Checks a path of a node and makes it absolute.
pub fn absolute(path: &str, domid: DomId) -> Result<String, Error> {
    let is_absolute = path.starts_with('/');
    let limit = if is_absolute {
        ABSOLUTE_MAX
    } else {
        RELATIVE_MAX
    };
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'/' | b'_' | b'@');
    if path.is_empty()
        || path.len() > limit
        || !path.bytes().all(legal)
        || path.contains("//")
        || (path.len() > 1 && path.ends_with('/'))
        || path.starts_with('@')
    {
        return Err(Error::Invalid);
    }
    if is_absolute {
        Ok(path.to_owned())
    } else {
        Ok(home(domid) + path)
    }
}

/// Checks a path to watch and makes it absolute.
pub fn watchable(path: &str, domid: DomId) -> Result<String, Error> {
    if SPECIALS.contains(&path) {
        return Ok(path.to_owned());
    }
    absolute(path, domid)
}

/// The parent of an absolute path and the name below it; `None` for the root.
pub fn split(path: &str) -> Option<(&str, &str)> {
    let (parent, name) = path.rsplit_once('/')?;
    if name.is_empty() {
        return None;
    }
    Some((if parent.is_empty() { "/" } else { parent }, name))
}

/// The child `name` of an absolute path.
pub fn join(parent: &str, name: &str) -> String {
    if parent == "/" {
        format!("/{name}")
    } else {
        format!("{parent}/{name}")
    }
}

/// Whether `path` is `ancestor` or lies below it.
pub fn is_within(path: &str, ancestor: &str) -> bool {
    match path.strip_prefix(ancestor) {
        Some(rest) => {
            rest.is_empty() || rest.starts_with('/') || (ancestor == "/" && path.starts_with('/'))
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_checks_and_completes() {
        let d = DomId(3);
        assert_eq!(absolute("/a/b-_@9", d).unwrap(), "/a/b-_@9");
        assert_eq!(absolute("a", d).unwrap(), "/local/domain/3/a");
        assert_eq!(absolute("/", d).unwrap(), "/");
        for bad in ["", "//", "/a/", "a/", "/a//b", "/a b", "/ä", "@x", "/a\0"] {
            assert_eq!(absolute(bad, d), Err(Error::Invalid), "{bad}");
        }
        assert!(absolute(&"a".repeat(2048), d).is_ok());
        assert!(absolute(&"a".repeat(2049), d).is_err());
        assert!(absolute(&format!("/{}", "a".repeat(3071)), d).is_ok());
        assert!(absolute(&format!("/{}", "a".repeat(3072)), d).is_err());
    }

    #[test]
    fn is_within_respects_names() {
        assert!(is_within("/a/b", "/a"));
        assert!(is_within("/a", "/a"));
        assert!(is_within("/a", "/"));
        assert!(!is_within("/ab", "/a"));
        assert!(!is_within("@releaseDomain", "/"));
        assert_eq!(split("/a/b"), Some(("/a", "b")));
        assert_eq!(split("/a"), Some(("/", "a")));
        assert_eq!(split("/"), None);
    }
}
