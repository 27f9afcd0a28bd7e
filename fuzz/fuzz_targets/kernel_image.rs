//! Kernel files: bzImage and ELF parsing, every decompressor, placement in guest memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hospes_builder::fuzz_kernel(data));
