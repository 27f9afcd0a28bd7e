//! A guest's packets: their slots in the ring, and their first bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_backends::net::fuzz_packets(data));
