//! A step of the store's journal as the next store process reads it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_store_server::fuzz_journal(data));
