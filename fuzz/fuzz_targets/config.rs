//! Any bytes as a configuration file, and as the specification of a disk and of a network interface.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_config::fuzz(data));
