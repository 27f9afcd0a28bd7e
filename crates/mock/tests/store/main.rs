//! The store process: with Debian's tools, with guests that are not to be trusted, and killed again and again.

mod common;
mod debian_tools;
mod guests;
mod killed;
mod restricted;
mod version;
