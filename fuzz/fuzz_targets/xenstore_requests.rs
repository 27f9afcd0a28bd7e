//! A guest's requests to the store: wire format, paths, permissions, transactions, watches.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_store::fuzz_requests(data));
