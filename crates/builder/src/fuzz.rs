//! Entry point of the fuzzers: a kernel file is the least trusted thing this crate reads.

use std::sync::OnceLock;

use hospes_memory::GuestMemory;

use crate::layout::{Layout, memory_layout};
use crate::load;

const MEMORY_BYTES: u64 = 32 << 20;

/// Loads `data` as a kernel into a small domain. Panics only where an invariant of the loader is broken.
pub fn fuzz_kernel(data: &[u8]) {
    static DOMAIN: OnceLock<(GuestMemory, Layout)> = OnceLock::new();
    let (memory, layout) = DOMAIN.get_or_init(|| {
        let layout = memory_layout(MEMORY_BYTES).expect("a valid size");
        let memory = GuestMemory::new(&layout.backed).expect("the host has 32 MiB");
        (memory, layout)
    });
    if let Ok(kernel) = load::load(data, memory, layout) {
        let entry = u64::from(kernel.entry);
        assert!(kernel.start <= entry && entry < kernel.end);
        assert!(layout.is_ram(kernel.start, kernel.end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ElfSpec, bzimage};
    use crate::unpack::Codec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fuzz_kernel_of_arbitrary_bytes_does_not_panic(data: Vec<u8>) {
            fuzz_kernel(&data);
        }

        #[test]
        fn fuzz_kernel_of_changed_elf_does_not_panic(
            wide: bool,
            changes in proptest::collection::vec((0usize..600, any::<u8>()), 1..6),
        ) {
            let mut file = ElfSpec { wide, ..ElfSpec::default() }.build();
            for (at, value) in changes {
                file[at] = value;
            }
            fuzz_kernel(&file);
        }

        #[test]
        fn fuzz_kernel_of_changed_bzimage_does_not_panic(
            codec in prop::sample::select(vec![Codec::Lz4, Codec::Lzo, Codec::Gzip, Codec::Lzma]),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut file = bzimage(codec, &ElfSpec::default().build());
            for (at, value) in changes {
                let at = at.index(file.len());
                file[at] = value;
            }
            fuzz_kernel(&file);
            fuzz_kernel(&file[..cut.index(file.len())]);
        }
    }
}
