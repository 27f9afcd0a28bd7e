//! The pages of the console's and the xenstore's rings, written by a guest that breaks the rules.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_xen::fuzz_rings(data));
