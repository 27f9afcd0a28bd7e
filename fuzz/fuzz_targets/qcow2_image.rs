//! An image that somebody else made: header, tables, and what a guest does with them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_image::fuzz_qcow2(data));
