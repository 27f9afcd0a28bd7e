//! The domain configuration file of xl.cfg(5), Xen 4.17: grammar, checks, typed result.
//!
//! Text comes in as `&str` with the name of its source; nothing here opens a file, asks for the time or draws random
//! numbers. The way through is [`load`]: every source is parsed into one [`Document`] (a later setting of the same key
//! replaces an earlier one, as in xl), which [`DomainConfig::interpret`] turns into a [`DomainConfig`].
//!
//! What it refuses: Python code (as xl does), strings with a NUL or with escapes above `\x7f`, lists nested deeper than
//! [`MAX_DEPTH`], sources longer than [`MAX_SOURCE_BYTES`].
//!
//! Invariant: a [`DomainConfig`] is handed out only where no [`Diagnostic`] of severity [`Severity::Error`] was made.
#![forbid(unsafe_code)]

mod cpuid;
mod cpulist;
mod devices;
mod diagnostic;
mod disk;
mod domain;
mod json;
mod keys;
mod lex;
mod number;
mod parse;
mod scheduling;
mod spec;
mod uuid;
mod vdev;
mod vif;

pub use cpuid::FeatureWish;
pub use cpulist::{CpuList, CpuListError, HostCpus, Pinning};
pub use diagnostic::{Diagnostic, Location, Severity};
pub use disk::{DiskConfig, DiskFormat};
pub use domain::{
    DomainConfig, EventAction, EventActions, GuestType, NameError, check_name, limits,
};
pub use json::mac_text;
pub use keys::{Key, Shape, Support, known_keys};
pub use number::{NumberError, parse_number};
pub use parse::{Atom, Document, MAX_DEPTH, Setting, Value, ValueKind};
pub use scheduling::{CpuLevel, Scheduling};
pub use spec::{INTERFACE_NAME_MAX, SpecError};
pub use uuid::{Uuid, UuidError};
pub use vdev::{Vdev, VdevError};
pub use vif::{Rate, VifConfig, VifKind};

/// Longest source that is read, in bytes.
pub const MAX_SOURCE_BYTES: usize = 1 << 20;

/// One text with settings: a file, or one assignment of a command line.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// What messages call it, such as the file's name.
    pub name: &'a str,
    pub text: &'a str,
}

/// Parses and checks the sources in order. The configuration is `None` where a diagnostic is an error.
pub fn load(sources: &[Source<'_>]) -> (Option<DomainConfig>, Vec<Diagnostic>) {
    let mut diagnostics = Vec::new();
    let mut document = Document::default();
    for source in sources {
        document.read(*source, &mut diagnostics);
    }
    if diagnostics.iter().any(Diagnostic::is_error) {
        return (None, diagnostics);
    }
    let config = DomainConfig::interpret(&document, &mut diagnostics);
    (config, diagnostics)
}

/// Entry of the fuzzer: any bytes; panics where an invariant of the crate is broken.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let source = Source {
        name: "fuzz.cfg",
        text,
    };
    let (config, diagnostics) = load(&[source]);
    assert_eq!(
        config.is_none(),
        diagnostics.iter().any(Diagnostic::is_error)
    );

    if let Ok(disk) = DiskConfig::parse(text) {
        assert!(disk.target.is_some() || disk.cdrom, "{text:?}");
    }
    if let Ok(vif) = VifConfig::parse(text) {
        let sends = |rate: Rate| rate.bytes_per_interval() > 0;
        assert!(vif.rate.is_none_or(sends), "{text:?}");
    }

    let mut complaints = Vec::new();
    let mut document = Document::default();
    document.read(source, &mut complaints);
    let printed = document.to_string();
    if complaints.is_empty() && printed.len() <= MAX_SOURCE_BYTES {
        let mut again = Document::default();
        again.read(
            Source {
                name: "fuzz.cfg",
                text: &printed,
            },
            &mut complaints,
        );
        assert!(complaints.is_empty(), "{complaints:?} in {printed:?}");
        assert!(again.same_settings(&document), "{printed:?}");
    }
}
