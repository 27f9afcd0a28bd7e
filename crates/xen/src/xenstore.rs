//! The xenstore ring: a guest's connection to the store as a byte stream over one page.
//!
//! What the bytes mean is the business of a [`StoreConnection`]. Indices that cannot be, and messages that the connection refuses, end the
//! connection; the guest learns why from the page, and may ask for a new one. Protocol: `docs/misc/xenstore-ring.txt` of Xen.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use hospes_memory::Page;
use hospes_xen_abi::ring;

use crate::hostport::HostPort;

/// The guest sent something that is no message; nothing after it can be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest broke the xenstore protocol")]
pub struct ProtocolError;

/// One connection to a store.
pub trait StoreConnection {
    /// Takes bytes of requests, split anywhere.
    fn input(&mut self, bytes: &[u8]) -> Result<(), ProtocolError>;

    /// Moves waiting bytes of replies and events into `buf`; returns how many.
    fn output(&mut self, buf: &mut [u8]) -> usize;

    /// Whether requests may come: false while too many replies wait to be fetched.
    fn accepts_input(&mut self) -> bool;

    /// The guest starts over: watches, transactions and half-sent messages are forgotten.
    fn reset(&mut self);
}

/// The ring page and its event channel.
#[derive(Debug)]
pub struct StoreRing {
    page: Page,
    port: HostPort,
    /// The connection has ended; nothing is read or written until the guest reconnects.
    broken: bool,
}

/// Rounds of one [`StoreRing::step`], so that a guest that never stops does not keep the caller.
const ROUNDS: u32 = 16;

impl StoreRing {
    /// Takes over the page; its indices stay, as a saved guest continues with them.
    pub fn new(page: Page, port: HostPort) -> StoreRing {
        page.u32(ring::XS_SERVER_FEATURES).store(
            ring::XS_FEATURE_RECONNECTION | ring::XS_FEATURE_ERROR,
            Relaxed,
        );
        page.u32(ring::XS_CONNECTION)
            .store(ring::XS_CONNECTED, Release);
        StoreRing {
            page,
            port,
            broken: false,
        }
    }

    /// Moves what can be moved in both directions. Called after each event of the guest and whenever the connection has new output. True
    /// where there may be more to do at once.
    pub fn step(&mut self, connection: &mut dyn StoreConnection) -> bool {
        for _ in 0..ROUNDS {
            let reconnect = self.page.u32(ring::XS_CONNECTION).load(Acquire) == ring::XS_RECONNECT;
            if reconnect {
                self.reconnect(connection);
            }
            if self.broken {
                return false;
            }
            let moved = self
                .send(connection)
                .and_then(|sent| Ok(self.receive(connection)? | sent));
            match moved {
                Ok(true) => {
                    fence(SeqCst);
                    self.port.notify();
                }
                Ok(false) if reconnect => {}
                Ok(false) => return false,
                Err(code) => {
                    self.fail(code);
                    return false;
                }
            }
        }
        true
    }

    fn reconnect(&mut self, connection: &mut dyn StoreConnection) {
        connection.reset();
        self.broken = false;
        for index in [
            ring::XS_REQ_CONS,
            ring::XS_REQ_PROD,
            ring::XS_RSP_CONS,
            ring::XS_RSP_PROD,
            ring::XS_ERROR,
        ] {
            self.page.u32(index).store(0, Relaxed);
        }
        self.page
            .u32(ring::XS_CONNECTION)
            .store(ring::XS_CONNECTED, SeqCst);
        self.port.notify();
    }

    fn fail(&mut self, code: u32) {
        self.broken = true;
        self.page.u32(ring::XS_ERROR).store(code, SeqCst);
        self.port.notify();
    }

    /// Replies to the guest; whether there were any.
    fn send(&self, connection: &mut dyn StoreConnection) -> Result<bool, u32> {
        let prod = self.page.u32(ring::XS_RSP_PROD).load(Relaxed);
        let cons = self.page.u32(ring::XS_RSP_CONS).load(Acquire);
        let queued = prod.wrapping_sub(cons) as usize;
        if queued > ring::XS_RING_BYTES {
            return Err(ring::XS_ERROR_RINGIDX);
        }
        let mut buf = [0; ring::XS_RING_BYTES];
        let count = connection.output(&mut buf[..ring::XS_RING_BYTES - queued]);
        if count == 0 {
            return Ok(false);
        }
        let at = prod as usize % ring::XS_RING_BYTES;
        let first = count.min(ring::XS_RING_BYTES - at);
        self.page.write(ring::XS_RSP + at, &buf[..first]);
        self.page.write(ring::XS_RSP, &buf[first..count]);
        self.page
            .u32(ring::XS_RSP_PROD)
            .store(prod.wrapping_add(count as u32), Release);
        Ok(true)
    }

    /// Requests from the guest; whether there were any.
    fn receive(&self, connection: &mut dyn StoreConnection) -> Result<bool, u32> {
        if !connection.accepts_input() {
            return Ok(false);
        }
        let cons = self.page.u32(ring::XS_REQ_CONS).load(Relaxed);
        let prod = self.page.u32(ring::XS_REQ_PROD).load(Acquire);
        let count = prod.wrapping_sub(cons) as usize;
        if count == 0 {
            return Ok(false);
        }
        if count > ring::XS_RING_BYTES {
            return Err(ring::XS_ERROR_RINGIDX);
        }
        let mut buf = [0; ring::XS_RING_BYTES];
        let at = cons as usize % ring::XS_RING_BYTES;
        let first = count.min(ring::XS_RING_BYTES - at);
        let (a, b) = buf[..count].split_at_mut(first);
        self.page.read(ring::XS_REQ + at, a);
        self.page.read(ring::XS_REQ, b);
        self.page.u32(ring::XS_REQ_CONS).store(prod, Release);
        connection
            .input(&buf[..count])
            .map_err(|ProtocolError| ring::XS_ERROR_PROTO)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;

    use hospes_units::Gfn;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Machine;

    /// Sends back what it gets; refuses a byte 0xff.
    #[derive(Default)]
    struct Echo {
        waiting: VecDeque<u8>,
        resets: u32,
    }

    impl StoreConnection for Echo {
        fn input(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
            if bytes.contains(&0xff) {
                return Err(ProtocolError);
            }
            self.waiting.extend(bytes);
            Ok(())
        }

        fn output(&mut self, buf: &mut [u8]) -> usize {
            let count = buf.len().min(self.waiting.len());
            for b in &mut buf[..count] {
                *b = self.waiting.pop_front().unwrap();
            }
            count
        }

        fn accepts_input(&mut self) -> bool {
            self.waiting.len() < 2000
        }

        fn reset(&mut self) {
            self.resets += 1;
            self.waiting.clear();
        }
    }

    fn ring(machine: &Machine) -> (StoreRing, Page) {
        let page = Page::of_frame(machine.xen.memory(), Gfn(9)).unwrap();
        let port = machine.xen.allocate_port(Arc::new(|| {})).unwrap();
        (StoreRing::new(page.clone(), port), page)
    }

    fn guest_send(page: &Page, bytes: &[u8]) -> usize {
        let prod = page.u32(ring::XS_REQ_PROD).load(Relaxed);
        let cons = page.u32(ring::XS_REQ_CONS).load(Relaxed);
        let count = bytes.len().min(1024 - prod.wrapping_sub(cons) as usize);
        for (i, b) in bytes[..count].iter().enumerate() {
            page.write((prod as usize + i) % 1024, &[*b]);
        }
        page.u32(ring::XS_REQ_PROD)
            .store(prod.wrapping_add(count as u32), Relaxed);
        count
    }

    fn guest_receive(page: &Page) -> Vec<u8> {
        let prod = page.u32(ring::XS_RSP_PROD).load(Relaxed);
        let mut cons = page.u32(ring::XS_RSP_CONS).load(Relaxed);
        let mut got = Vec::new();
        while cons != prod {
            let mut b = [0];
            page.read(ring::XS_RSP + cons as usize % 1024, &mut b);
            got.push(b[0]);
            cons = cons.wrapping_add(1);
        }
        page.u32(ring::XS_RSP_CONS).store(cons, Relaxed);
        got
    }

    proptest! {
        #[test]
        fn step_carries_every_byte_in_order(start: u32, sent in prop::collection::vec(0u8..255, 0..5000)) {
            let machine = Machine::new(1);
            let (mut ring, page) = ring(&machine);
            for index in [ring::XS_REQ_CONS, ring::XS_REQ_PROD, ring::XS_RSP_CONS, ring::XS_RSP_PROD] {
                page.u32(index).store(start, Relaxed);
            }
            let mut echo = Echo::default();
            let (mut rest, mut got) = (&sent[..], Vec::new());
            while got.len() < sent.len() {
                rest = &rest[guest_send(&page, rest)..];
                while ring.step(&mut echo) {}
                got.extend(guest_receive(&page));
            }
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn step_survives_any_indices(indices: [u32; 4], connection: u32) {
            let machine = Machine::new(1);
            let (mut ring, page) = ring(&machine);
            for (i, v) in indices.iter().enumerate() {
                page.u32(ring::XS_REQ_CONS + 4 * i).store(*v, Relaxed);
            }
            page.u32(ring::XS_CONNECTION).store(connection, Relaxed);
            let mut echo = Echo::default();
            ring.step(&mut echo);
            let impossible = indices[1].wrapping_sub(indices[0]) > 1024 || indices[3].wrapping_sub(indices[2]) > 1024;
            prop_assert_eq!(page.u32(ring::XS_ERROR).load(Relaxed) != 0, impossible && connection != 1);
        }
    }

    #[test]
    fn reconnect_after_a_broken_message_starts_over() {
        let machine = Machine::new(1);
        let (mut ring, page) = ring(&machine);
        let mut echo = Echo::default();
        guest_send(&page, b"\xff");
        ring.step(&mut echo);
        assert_eq!(page.u32(ring::XS_ERROR).load(Relaxed), ring::XS_ERROR_PROTO);
        guest_send(&page, b"more");
        ring.step(&mut echo);
        assert!(guest_receive(&page).is_empty());
        page.u32(ring::XS_CONNECTION).store(1, Relaxed);
        ring.step(&mut echo);
        assert_eq!(echo.resets, 1);
        assert_eq!(page.u32(ring::XS_CONNECTION).load(Relaxed), 0);
        guest_send(&page, b"hello");
        ring.step(&mut echo);
        assert_eq!(guest_receive(&page), b"hello");
    }
}
