//! Guest code: decoding, classification and emission, with the rules that all host code must keep.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_translate::fuzz_translate(data));
