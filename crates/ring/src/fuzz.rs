//! Any sequence of steps of a front end that breaks the rules, for the fuzzer and for property tests.

use std::sync::atomic::Ordering::SeqCst;

use crate::{BackRing, LocalMemory, SharedMemory, at};

type Ring = BackRing<LocalMemory, [u64; 4], [u32; 5]>;

/// Bytes of the ring's page.
const PAGE: usize = 4096;
/// Bytes of a step: what is done, and with which number.
const STEP: usize = 5;

/// Takes each 5 bytes of `data` as something that the front end writes or the back end does. Panics where an invariant does not hold.
pub fn fuzz_ring(data: &[u8]) {
    let memory = LocalMemory::new(PAGE);
    let Some(mut ring) = Ring::attach(memory.clone()) else {
        return;
    };
    for step in data.chunks_exact(STEP) {
        let number = u32::from_le_bytes([step[1], step[2], step[3], step[4]]);
        let write = |offset: usize| memory.word(offset).store(number, SeqCst);
        match step[0] % 10 {
            0 => write(at::REQ_PROD),
            1 => write(at::REQ_EVENT),
            2 => write(at::RSP_PROD),
            3 => write(at::RSP_EVENT),
            4 => {
                // As a front end that behaves, for a few requests.
                let next = memory.word(at::REQ_PROD).load(SeqCst);
                let next = next.wrapping_add(number % 8);
                memory.word(at::REQ_PROD).store(next, SeqCst);
            }
            5 => {
                let open = ring.open();
                // A broken ring is given up.
                let Ok(taken) = ring.take() else {
                    return;
                };
                assert_eq!(ring.open(), open + u32::from(taken.is_some()));
            }
            6 => {
                if ring.open() > 0 {
                    ring.answer(&[number; 5]);
                }
            }
            7 => {
                let unpublished = ring.unpublished();
                let notify = ring.publish();
                assert!(unpublished > 0 || !notify, "an event for nothing");
            }
            8 => {
                let Ok(waits) = ring.wait_for(number % 64) else {
                    return;
                };
                // Nobody else runs here, so the answer still holds.
                assert!(!waits || ring.waiting().is_ok_and(|waiting| waiting > 0));
            }
            _ => {
                let Some(again) = Ring::attach(memory.clone()) else {
                    return;
                };
                ring = again;
            }
        }
        assert!(ring.open() <= ring.slots(), "more requests than slots");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ring_of_any_front_end_keeps_the_invariants(data in prop::collection::vec(any::<u8>(), 0..500)) {
            super::fuzz_ring(&data);
        }
    }
}
