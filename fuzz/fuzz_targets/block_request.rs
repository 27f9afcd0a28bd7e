//! A guest's request to a disk, with what its indirect pages hold.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_backends::block::fuzz_request(data));
