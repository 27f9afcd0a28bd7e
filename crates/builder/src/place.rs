//! First-fit placement of the ramdisk and the start information around the kernel.

use hospes_memory::Range;

/// Finds the lowest `align`-aligned address from `from` on where `size` bytes end at or below `end` and meet none of `used`.
pub(crate) fn first_fit(used: &[Range], from: u64, end: u64, size: u64, align: u64) -> Option<u64> {
    let mut at = from.checked_next_multiple_of(align)?;
    loop {
        let stop = at.checked_add(size)?;
        if stop > end {
            return None;
        }
        match used.iter().find(|u| u.start < stop && at < u.end) {
            None => return Some(at),
            Some(u) => at = u.end.checked_next_multiple_of(align)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USED: [Range; 2] = [
        Range {
            start: 0x5000,
            end: 0x6000,
        },
        Range {
            start: 0x2000,
            end: 0x3001,
        },
    ];

    #[test]
    fn first_fit_takes_the_lowest_gap_that_is_large_enough() {
        assert_eq!(first_fit(&USED, 0, 0x10000, 0x2000, 0x1000), Some(0));
        assert_eq!(
            first_fit(&USED, 0x1000, 0x10000, 0x1000, 0x1000),
            Some(0x1000)
        );
        assert_eq!(
            first_fit(&USED, 0x2000, 0x10000, 0x1000, 0x1000),
            Some(0x4000)
        );
        assert_eq!(first_fit(&USED, 1, 0x10000, 0x2000, 0x1000), Some(0x6000));
    }

    #[test]
    fn first_fit_ends_at_the_end() {
        assert_eq!(
            first_fit(&USED, 0x5000, 0x7000, 0x1000, 0x1000),
            Some(0x6000)
        );
        assert_eq!(first_fit(&USED, 0x5000, 0x6fff, 0x1000, 0x1000), None);
        assert_eq!(first_fit(&[], u64::MAX - 10, u64::MAX, 4, 0x1000), None);
        assert_eq!(first_fit(&[], 0, u64::MAX, u64::MAX, 1), Some(0));
    }

    proptest::proptest! {
        #[test]
        fn first_fit_never_overlaps(
            ranges in proptest::collection::vec((0u64..1000, 1u64..100), 0..8),
            from in 0u64..500,
            size in 1u64..300,
            shift in 0u32..6,
        ) {
            let used: Vec<Range> =
                ranges.iter().map(|&(start, n)| Range { start, end: start + n }).collect();
            if let Some(at) = first_fit(&used, from, 1000, size, 1 << shift) {
                proptest::prop_assert!(at >= from && at % (1 << shift) == 0 && at + size <= 1000);
                proptest::prop_assert!(used.iter().all(|u| u.end <= at || at + size <= u.start));
            }
        }
    }
}
