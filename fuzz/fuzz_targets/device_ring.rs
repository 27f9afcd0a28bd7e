//! The indices of a device's ring, written by a front end that breaks the rules.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_ring::fuzz_ring(data));
