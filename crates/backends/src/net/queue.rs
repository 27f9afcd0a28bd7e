//! The thread of one queue: both directions take turns, and it sleeps when neither has anything to do.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hospes_ring::SharedMemory;
use hospes_xen::HostPort;

use super::link::Link;
use super::memory::GuestPages;
use super::mend::Mend;
use super::receive::{self, Receive};
use super::transmit::{self, Transmit};
use crate::frame::{Alarm, ConnectError, Wake};

/// How long a packet waits before a full wire is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// A running queue. Dropping it stops it.
pub struct QueueThread {
    wake: Arc<Wake>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Link>>,
}

impl QueueThread {
    pub fn start<M, P>(name: String, serve: Serve<M, P>) -> Result<QueueThread, ConnectError>
    where
        M: SharedMemory + Send + 'static,
        P: GuestPages + 'static,
    {
        let wake = Arc::clone(&serve.wake);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || serve.run(&stopped))
            .map_err(|fault| ConnectError::Host(fault.to_string()))?;
        Ok(QueueThread {
            wake,
            stop,
            thread: Some(thread),
        })
    }

    /// Has the thread end, without waiting for it.
    pub fn stop(&self) {
        self.stop.store(true, SeqCst);
        self.wake.call();
    }

    /// Stops the queue and gives the wire back; `None` where its thread panicked.
    pub fn join(mut self) -> Option<Link> {
        self.stop();
        self.thread.take()?.join().ok()
    }
}

impl Drop for QueueThread {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One queue.
pub struct Serve<M, P> {
    pub transmit: Transmit<M, P>,
    pub receive: Receive<M, P>,
    pub link: Link,
    pub wake: Arc<Wake>,
    /// `None` in tests without a guest.
    pub transmit_port: Option<HostPort>,
    /// `None` where both directions have one event channel.
    pub receive_port: Option<HostPort>,
    pub alarm: Alarm,
    pub mend: Mend,
}

impl<M: SharedMemory, P: GuestPages> Serve<M, P> {
    fn run(mut self, stop: &AtomicBool) -> Link {
        self.link.drain();
        if let Err(reason) = self.serve(stop) {
            (self.alarm)(reason);
        }
        self.publish();
        self.link
    }

    fn serve(&mut self, stop: &AtomicBool) -> Result<(), String> {
        while !stop.load(SeqCst) {
            // Whatever the guest sends or has room for: what is left goes out.
            self.link.flush();
            let sent = self
                .transmit
                .turn(&mut self.link)
                .map_err(|e| e.to_string())?;
            let received = self
                .receive
                .turn(&mut self.link)
                .map_err(|e| e.to_string())?;
            self.publish();
            if sent == transmit::Turn::Busy || received == receive::Turn::Busy {
                continue;
            }
            if self.receive.is_broken()
                && let Some(link) = self.mend.renew(self.receive.wire_error())
            {
                self.link = link;
                self.receive.mend();
                continue;
            }
            self.rest(sent, received).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Shows the answers to the guest, and tells it where it asked to be told.
    pub fn publish(&mut self) {
        let sent = self.transmit.ring.publish();
        let received = self.receive.ring.publish();
        let (mut here, mut there) = (sent, received);
        if self.receive_port.is_none() {
            (here, there) = (sent || received, false);
        }
        if let (true, Some(port)) = (here, &self.transmit_port) {
            port.notify();
        }
        if let (true, Some(port)) = (there, &self.receive_port) {
            port.notify();
        }
    }

    /// Sleeps until there is something to do.
    fn rest(
        &mut self,
        sent: transmit::Turn,
        received: receive::Turn,
    ) -> Result<(), hospes_ring::Broken> {
        let most = match sent {
            transmit::Turn::Until(next) => Some(next.saturating_duration_since(Instant::now())),
            transmit::Turn::Full => Some(RETRY),
            transmit::Turn::Idle | transmit::Turn::Busy => {
                if self.transmit.ring.wait_for(1)? {
                    return Ok(());
                }
                None
            }
        };
        let most = match self.link.is_sending() {
            true => Some(most.unwrap_or(RETRY).min(RETRY)),
            false => most,
        };
        let most = match self.mend.pause() {
            Some(pause) if self.receive.is_broken() => Some(most.unwrap_or(pause).min(pause)),
            _ => most,
        };
        if received == receive::Turn::Starved {
            if self.receive.ring.wait_for(1)? && !self.receive.is_broken() {
                return Ok(());
            }
            self.wake.sleep(&[], most);
        } else {
            self.wake.sleep(&[self.link.fd()], most);
        }
        Ok(())
    }
}
