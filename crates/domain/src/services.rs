//! The threads that serve the guest's console and its connection to the store.

use std::sync::{Arc, Mutex};

use hospes_store::{ConnId, Store};
use hospes_xen::{ConsoleRing, ProtocolError, StoreConnection, StoreRing};

use crate::lock;
use crate::run::Run;
use crate::signal::Signal;

/// Serves the console until the domain has ended and its ring is empty.
pub fn serve_console(ring: &ConsoleRing, run: &Run) {
    let console = run.console();
    let mut output = Vec::new();
    loop {
        // Asked before the ring is read: nothing comes after that.
        let closing = console.is_closing();
        let more = ring.drain(&mut output) > 0;
        console.output(&output);
        output.clear();
        console.feed(|bytes| ring.push(bytes));
        if more {
            continue;
        }
        if closing {
            break;
        }
        console.signal().wait();
    }
    console.closed();
    run.set_finished();
}

/// The guest's connection to the domain's store.
pub struct GuestConnection {
    pub store: Arc<Mutex<Store>>,
    pub conn: ConnId,
}

impl StoreConnection for GuestConnection {
    fn input(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        lock(&self.store)
            .input(self.conn, bytes)
            .map_err(|_| ProtocolError)
    }

    fn output(&mut self, buf: &mut [u8]) -> usize {
        lock(&self.store).output(self.conn, buf)
    }

    fn accepts_input(&mut self) -> bool {
        lock(&self.store).accepts_input(self.conn)
    }

    fn reset(&mut self) {
        lock(&self.store).reset(self.conn);
    }
}

/// Serves the store's ring until the domain has ended.
pub fn serve_store(ring: &mut StoreRing, guest: &mut GuestConnection, signal: &Signal, run: &Run) {
    while !run.has_ended() {
        if !ring.step(guest) {
            signal.wait();
        }
    }
}
