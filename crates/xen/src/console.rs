//! The console ring: the guest's first console, from the monitor's side.
//!
//! Indices are the guest's as much as ours: each is read once, and a pair that claims more bytes than the ring holds is answered by starting over
//! (output) or waiting (input). Protocol: `public/io/console.h`.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use hospes_memory::Page;
use hospes_xen_abi::ring;

use crate::hostport::HostPort;

/// The ring page and its event channel.
#[derive(Debug)]
pub struct ConsoleRing {
    page: Page,
    port: HostPort,
}

impl ConsoleRing {
    pub fn new(page: Page, port: HostPort) -> ConsoleRing {
        ConsoleRing { page, port }
    }

    /// Appends what the guest has written to `out`, tells the guest that there is room again, and returns the number of bytes: at most a few
    /// rings full, so that a guest that never stops writing does not keep the caller here.
    pub fn drain(&self, out: &mut Vec<u8>) -> usize {
        let before = out.len();
        for _ in 0..4 {
            let cons = self.page.u32(ring::CONSOLE_OUT_CONS).load(Relaxed);
            let prod = self.page.u32(ring::CONSOLE_OUT_PROD).load(Acquire);
            let queued = prod.wrapping_sub(cons) as usize;
            if queued == 0 {
                break;
            }
            if queued <= ring::CONSOLE_OUT_BYTES {
                self.copy_out(cons, queued, out);
            }
            self.page.u32(ring::CONSOLE_OUT_CONS).store(prod, Release);
            // The guest may have written more before it saw the new index, and then sends no event.
            fence(SeqCst);
            self.port.notify();
        }
        out.len() - before
    }

    fn copy_out(&self, cons: u32, count: usize, out: &mut Vec<u8>) {
        let at = cons as usize % ring::CONSOLE_OUT_BYTES;
        let first = count.min(ring::CONSOLE_OUT_BYTES - at);
        let start = out.len();
        out.resize(start + count, 0);
        let (a, b) = out[start..].split_at_mut(first);
        self.page.read(ring::CONSOLE_OUT + at, a);
        self.page.read(ring::CONSOLE_OUT, b);
    }

    /// Gives input to the guest, as much as fits; returns how much that was.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let cons = self.page.u32(ring::CONSOLE_IN_CONS).load(Acquire);
        let prod = self.page.u32(ring::CONSOLE_IN_PROD).load(Relaxed);
        let queued = prod.wrapping_sub(cons) as usize;
        let count = ring::CONSOLE_IN_BYTES
            .saturating_sub(queued)
            .min(bytes.len());
        if count == 0 {
            return 0;
        }
        let at = prod as usize % ring::CONSOLE_IN_BYTES;
        let first = count.min(ring::CONSOLE_IN_BYTES - at);
        self.page.write(ring::CONSOLE_IN + at, &bytes[..first]);
        self.page.write(ring::CONSOLE_IN, &bytes[first..count]);
        self.page
            .u32(ring::CONSOLE_IN_PROD)
            .store(prod.wrapping_add(count as u32), Release);
        fence(SeqCst);
        self.port.notify();
        count
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hospes_units::Gfn;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Machine;

    fn ring(machine: &Machine) -> (ConsoleRing, Page) {
        let page = Page::of_frame(machine.xen.memory(), Gfn(9)).unwrap();
        let port = machine.xen.allocate_port(Arc::new(|| {})).unwrap();
        (ConsoleRing::new(page.clone(), port), page)
    }

    /// What a guest does to write.
    fn guest_write(page: &Page, bytes: &[u8]) {
        let prod = page.u32(ring::CONSOLE_OUT_PROD).load(Relaxed);
        for (i, b) in bytes.iter().enumerate() {
            let at = (prod as usize + i) % ring::CONSOLE_OUT_BYTES;
            page.write(ring::CONSOLE_OUT + at, &[*b]);
        }
        page.u32(ring::CONSOLE_OUT_PROD)
            .store(prod.wrapping_add(bytes.len() as u32), Relaxed);
    }

    proptest! {
        #[test]
        fn drain_gives_what_the_guest_wrote(start: u32, writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2049), 1..6)) {
            let machine = Machine::new(1);
            let (ring, page) = ring(&machine);
            page.u32(ring::CONSOLE_OUT_CONS).store(start, Relaxed);
            page.u32(ring::CONSOLE_OUT_PROD).store(start, Relaxed);
            let mut got = Vec::new();
            for w in &writes {
                guest_write(&page, w);
                prop_assert_eq!(ring.drain(&mut got), w.len());
            }
            prop_assert_eq!(got, writes.concat());
        }

        #[test]
        fn drain_and_push_survive_any_indices(indices: [u32; 4], input in prop::collection::vec(any::<u8>(), 0..2000)) {
            let machine = Machine::new(1);
            let (ring, page) = ring(&machine);
            for (i, v) in indices.iter().enumerate() {
                page.u32(ring::CONSOLE_IN_CONS + 4 * i).store(*v, Relaxed);
            }
            let mut got = Vec::new();
            prop_assert!(ring.drain(&mut got) <= ring::CONSOLE_OUT_BYTES);
            prop_assert_eq!(page.u32(ring::CONSOLE_OUT_CONS).load(Relaxed), indices[3]);
            prop_assert!(ring.push(&input) <= ring::CONSOLE_IN_BYTES);
        }
    }

    #[test]
    fn push_into_a_full_ring_takes_nothing() {
        let machine = Machine::new(1);
        let (ring, page) = ring(&machine);
        assert_eq!(ring.push(&[b'x'; 1500]), 1024);
        assert_eq!(ring.push(b"y"), 0);
        page.u32(ring::CONSOLE_IN_CONS).store(10, Relaxed);
        assert_eq!(ring.push(&[b'y'; 100]), 10);
        let mut b = [0; 11];
        page.read(0, &mut b);
        assert_eq!(&b, b"yyyyyyyyyyx");
    }
}
