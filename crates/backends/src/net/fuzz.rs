//! Any bytes as a guest's packets, for the fuzzer and for property tests.

use std::net::Ipv6Addr;

use hospes_ring::{BackRing, FrontRing, LocalMemory};
use hospes_xen_abi::netif::{STATUS_OKAY, TxRequest, TxResponse};
use zerocopy::FromBytes;

use super::guard::Guard;
use super::headers;
use super::memory::PAGE;
use super::packet::Packet;

/// Bytes of a slot.
const SLOT: usize = size_of::<TxRequest>();
/// Slots that are taken from the data; the rest is the packets' first bytes.
const SLOTS: usize = 24;

/// Puts the first bytes of `data` into a ring as slots and takes the rest for the first bytes of each packet that comes of them. Panics where an
/// invariant does not hold.
pub fn fuzz_packets(data: &[u8]) {
    let memory = LocalMemory::new(PAGE);
    let (Some(mut front), Some(mut ring)) = (
        FrontRing::<_, TxRequest, TxResponse>::new(memory.clone()),
        BackRing::attach(memory),
    ) else {
        return;
    };
    let (slots, frame) = data.split_at(data.len().min(SLOTS * SLOT));
    for slot in slots.chunks_exact(SLOT) {
        if let Ok(request) = TxRequest::read_from_bytes(slot) {
            front.put(&request);
        }
    }
    let _ = front.publish();
    let guard = Guard {
        mac: [0; 6],
        ip: Some(vec![([10, 0, 0, 0].into(), 8), ([0; 16].into(), 1)]),
        host_v6: vec![Ipv6Addr::LOCALHOST],
    };
    while let Ok(Some(packet)) = Packet::take(&mut ring) {
        if packet.error.is_none() {
            let mut head = frame[..frame.len().min(packet.len)].to_vec();
            if let Some(layers) = headers::parse(&head) {
                guard.permits(&head, &layers);
                if let Ok(header) = packet.vnet_header(&mut head, &layers) {
                    let checksum_end =
                        usize::from(header.csum_start) + usize::from(header.csum_offset);
                    assert!(
                        checksum_end <= packet.len,
                        "a checksum lies outside of its packet"
                    );
                    assert!(
                        usize::from(header.hdr_len) <= packet.len,
                        "headers are longer than their packet"
                    );
                }
                headers::fill_checksum(&mut head);
            }
        }
        packet.answer(&mut ring, STATUS_OKAY);
        assert_eq!(ring.open(), 0, "a slot of a packet was not answered");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packets_of_any_bytes_keep_the_invariants(data in prop::collection::vec(any::<u8>(), 0..700)) {
            super::fuzz_packets(&data);
        }
    }
}
