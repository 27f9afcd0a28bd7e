//! Any bytes in the pages of the console's and the xenstore's rings, for the fuzzer and for property tests.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, OnceLock};

use hospes_memory::{GuestMemory, Page, Range};
use hospes_units::{Gfn, PAGE_SIZE};
use hospes_xen_abi::ring;

use crate::console::ConsoleRing;
use crate::hostport::HostPort;
use crate::xenstore::{ProtocolError, StoreConnection, StoreRing};

/// Bytes of a step: what is done, where, and with which word.
const STEP: usize = 7;
/// Most bytes that wait in [`Echo`].
const ECHO_MAX: usize = 64 << 10;

/// Sends back what it gets, takes nothing more while much waits, and refuses a byte 0xff.
#[derive(Default)]
struct Echo {
    waiting: VecDeque<u8>,
}

impl StoreConnection for Echo {
    fn input(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        assert!(
            (1..=ring::XS_RING_BYTES).contains(&bytes.len()),
            "{} bytes came from a ring",
            bytes.len()
        );
        self.waiting.extend(bytes);
        match bytes.contains(&0xff) {
            true => Err(ProtocolError),
            false => Ok(()),
        }
    }

    fn output(&mut self, buf: &mut [u8]) -> usize {
        let count = buf.len().min(self.waiting.len());
        for (to, from) in buf.iter_mut().zip(self.waiting.drain(..count)) {
            *to = from;
        }
        count
    }

    fn accepts_input(&mut self) -> bool {
        self.waiting.len() < ECHO_MAX
    }

    fn reset(&mut self) {
        self.waiting.clear();
    }
}

/// A page of guest memory; there is one for a process, which each run finds as the one before has left it, so it is overwritten first.
fn page() -> Option<Page> {
    static MEMORY: OnceLock<Option<Arc<GuestMemory>>> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| {
        let range = Range {
            start: 0,
            end: PAGE_SIZE,
        };
        GuestMemory::new(&[range]).ok().map(Arc::new)
    });
    Page::of_frame(memory.as_ref()?, Gfn(0)).ok()
}

/// Takes each 7 bytes of `data` as something that the guest writes into a page that is both rings at once, or as the monitor's turn. Panics where an
/// invariant does not hold. Not to be called from two threads at a time.
pub fn fuzz_rings(data: &[u8]) {
    let Some(page) = page() else {
        return;
    };
    page.write(0, &[0; PAGE_SIZE as usize]);
    let console = ConsoleRing::new(page.clone(), HostPort::nowhere());
    let mut store = StoreRing::new(page.clone(), HostPort::nowhere());
    let mut connection = Echo::default();
    let mut out = Vec::new();
    for step in data.chunks_exact(STEP) {
        let place = usize::from(u16::from_le_bytes([step[1], step[2]]));
        let word = u32::from_le_bytes([step[3], step[4], step[5], step[6]]);
        match step[0] % 6 {
            // Indices and flags of the store's ring, then those of the console's.
            0 => {
                let at = ring::XS_REQ_CONS + place % 8 * 4;
                page.u32(at).store(word, SeqCst);
            }
            1 => {
                let at = ring::CONSOLE_IN_CONS + place % 4 * 4;
                page.u32(at).store(word, SeqCst);
            }
            2 => page.write(place % 4092, &word.to_le_bytes()),
            3 => {
                store.step(&mut connection);
            }
            4 => {
                out.clear();
                let count = console.drain(&mut out);
                assert_eq!(count, out.len());
                assert!(count <= 4 * ring::CONSOLE_OUT_BYTES);
            }
            _ => {
                let input = vec![step[3]; place % 3000];
                let count = console.push(&input);
                assert!(count <= input.len().min(ring::CONSOLE_IN_BYTES));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rings_of_any_guest_keep_the_invariants(data in prop::collection::vec(any::<u8>(), 0..700)) {
            super::fuzz_rings(&data);
        }
    }
}
