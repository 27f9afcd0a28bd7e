//! Requests of random bytes, alone and through a running disk.

use hospes_store::StoreAccess;
use hospes_xen_abi::blkif;
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::*;
use crate::block::fuzz_request;

/// Bytes that look like a request more often than chance has it.
fn nearly_a_request() -> impl Strategy<Value = Vec<u8>> {
    let small = prop_oneof![0u64..4, Just(2047), Just(2048), any::<u64>()];
    (
        proptest::collection::vec(any::<u8>(), 112),
        0u8..8,
        prop_oneof![0u8..12, any::<u8>()],
        small,
        proptest::collection::vec((0u32..24, 0u8..9, 0u8..9), 11),
        any::<bool>(),
    )
        .prop_map(|(mut bytes, op, segments, sector, list, keep)| {
            bytes[0] = op;
            bytes[1] = segments;
            bytes[2] = segments;
            bytes[3] = 0;
            bytes[16..24].copy_from_slice(&sector.to_le_bytes());
            for (i, (gref, first, last)) in list.into_iter().enumerate() {
                let at = 24 + i * 8;
                if !keep {
                    bytes[at..at + 4].copy_from_slice(&gref.to_le_bytes());
                    bytes[at + 4] = first;
                    bytes[at + 5] = last;
                }
            }
            bytes
        })
}

proptest! {
    #[test]
    fn any_request_stays_on_the_disk_and_in_memory(data in proptest::collection::vec(any::<u8>(), 0..600)) {
        fuzz_request(&data);
    }

    #[test]
    fn any_plausible_request_stays_on_the_disk_and_in_memory(
        mut data in nearly_a_request(),
        pages in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        data.extend(pages);
        fuzz_request(&data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// Whatever the guest writes into its directory and whenever, the device goes when it is told to, and a new one works.
    #[test]
    fn any_nodes_and_states_leave_a_device_that_can_go(
        steps in proptest::collection::vec((0usize..6, 0u32..9, any::<bool>()), 1..40),
    ) {
        let mut m = Machine::new(MemoryImage::new(1 << 20));
        m.offer(1, 0);
        for (node, value, wait) in steps {
            match node {
                0 => m.guest.write(ID, "ring-ref", value),
                1 => m.guest.write(ID, "event-channel", value),
                2 => m.guest.write(ID, "multi-queue-num-queues", value),
                3 => drop(m.guest.store.remove(&Guest::front(ID))),
                _ => m.guest.write(ID, "state", value),
            }
            if wait {
                std::thread::yield_now();
            }
        }
        m.bus.detach(ID, true).unwrap();
        prop_assert_eq!(Arc::strong_count(&m.image), 1);
        // Log lines grow with the logarithm of what went wrong.
        prop_assert!(m.guest.lines().len() < 8, "{:?}", m.guest.lines());
        let _ = m.guest.store.remove(&Guest::front(ID));
        m.attach();
        m.connect(1, 0);
        let (_, gref) = m.page(1);
        let good = m.ask(request(blkif::OP_WRITE, 0, &[segment(gref, 0, 7)]));
        prop_assert_eq!(good.status, blkif::STATUS_OKAY);
    }

    /// Whatever the guest sends, each request gets one answer, and a good one behind it works.
    #[test]
    fn any_requests_are_answered_once(list in proptest::collection::vec(nearly_a_request(), 1..30)) {
        let mut m = Machine::connected(MemoryImage::new(1 << 20));
        let mut open: Vec<u64> = Vec::new();
        let requests: Vec<_> = list
            .iter()
            .map(|bytes| {
                let request = blkif::Request::read_from_bytes(bytes).unwrap();
                open.push(request.id);
                request
            })
            .collect();
        m.send(0, &requests);
        for _ in 0..requests.len() {
            let id = m.receive(0).id;
            let at = open.iter().position(|o| *o == id);
            prop_assert!(at.is_some());
            open.swap_remove(at.unwrap());
        }
        let (_, gref) = m.page(1);
        let good = m.ask(request(blkif::OP_WRITE, 0, &[segment(gref, 0, 7)]));
        prop_assert_eq!(good.status, blkif::STATUS_OKAY);
    }
}
