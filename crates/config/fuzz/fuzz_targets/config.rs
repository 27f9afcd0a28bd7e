//! Any bytes as a configuration file: `cargo +nightly fuzz run config` in crates/config.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_config::fuzz(data));
