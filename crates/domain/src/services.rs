//! The threads that serve the guest's console and its connection to the store.

use hospes_store::GuestLink;
use hospes_xen::{ConsoleRing, ProtocolError, StoreConnection, StoreRing};

use crate::run::Run;
use crate::signal::Signal;

/// Serves the console until the domain has ended and its ring is empty.
pub fn serve_console(ring: &ConsoleRing, run: &Run) {
    let console = run.console();
    let mut output = Vec::new();
    loop {
        // Asked before the ring is read: nothing comes after that.
        let closing = console.is_closing();
        let closed = run.rings().close();
        let more = ring.drain(&mut output) > 0;
        drop(closed);
        console.output(&output);
        output.clear();
        let closed = run.rings().close();
        console.feed(|bytes| ring.push(bytes));
        drop(closed);
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

/// The guest's connection to the store.
pub struct GuestConnection(pub Box<dyn GuestLink>);

impl StoreConnection for GuestConnection {
    fn input(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        self.0.input(bytes).map_err(|_| ProtocolError)
    }

    fn output(&mut self, buf: &mut [u8]) -> usize {
        self.0.output(buf)
    }

    fn accepts_input(&mut self) -> bool {
        self.0.accepts_input()
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Serves the store's ring until the domain has ended.
pub fn serve_store(ring: &mut StoreRing, guest: &mut GuestConnection, signal: &Signal, run: &Run) {
    while !run.has_ended() {
        let closed = run.rings().close();
        let worked = ring.step(guest);
        drop(closed);
        if !worked {
            signal.wait();
        }
    }
}
