//! The console from the user's side: history, listeners, input.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};

use crate::lock;
use crate::signal::Signal;

/// Bytes of output kept for those who come later.
pub const HISTORY_BYTES: usize = 64 << 10;
/// Bytes of input that may wait for the guest to read them.
pub const INPUT_BYTES: usize = 64 << 10;
/// Pieces of output that may wait for a listener.
const BACKLOG: usize = 1024;

/// What a new listener gets.
#[derive(Debug)]
pub struct Subscription {
    /// The last output before the subscription, at most [`HISTORY_BYTES`].
    pub history: Vec<u8>,
    /// Output from then on. Ends when the domain's console closes, or when the listener falls too far behind: the guest never waits for it.
    pub output: Receiver<Arc<[u8]>>,
}

/// The console of one domain.
pub struct Console {
    inner: Mutex<Inner>,
    input: Mutex<VecDeque<u8>>,
    /// Wakes the thread that serves the guest's ring.
    signal: Arc<Signal>,
    closing: AtomicBool,
}

struct Inner {
    history: VecDeque<u8>,
    sink: Box<dyn Write + Send>,
    listeners: Vec<SyncSender<Arc<[u8]>>>,
    closed: bool,
}

impl Console {
    pub(crate) fn new(sink: Box<dyn Write + Send>) -> Console {
        Console {
            inner: Mutex::new(Inner {
                history: VecDeque::new(),
                sink,
                listeners: Vec::new(),
                closed: false,
            }),
            input: Mutex::new(VecDeque::new()),
            signal: Arc::new(Signal::default()),
            closing: AtomicBool::new(false),
        }
    }

    /// Listens from now on.
    pub fn subscribe(&self) -> Subscription {
        let (sender, output) = sync_channel(BACKLOG);
        let mut inner = lock(&self.inner);
        if !inner.closed {
            inner.listeners.push(sender);
        }
        Subscription {
            history: inner.history.iter().copied().collect(),
            output,
        }
    }

    /// Gives input to the guest; returns how many bytes were taken: less than all where the guest does not read.
    pub fn write_input(&self, bytes: &[u8]) -> usize {
        let mut input = lock(&self.input);
        let count = bytes.len().min(INPUT_BYTES - input.len());
        input.extend(&bytes[..count]);
        drop(input);
        if count > 0 {
            self.signal.set();
        }
        count
    }

    /// Output of the guest.
    pub(crate) fn output(&self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut inner = lock(&self.inner);
        let keep = bytes.len().min(HISTORY_BYTES);
        let excess = (inner.history.len() + keep).saturating_sub(HISTORY_BYTES);
        inner.history.drain(..excess);
        inner.history.extend(&bytes[bytes.len() - keep..]);
        // A log that cannot be written must not stop the guest.
        let _ = inner
            .sink
            .write_all(bytes)
            .and_then(|()| inner.sink.flush());
        if !inner.listeners.is_empty() {
            let piece: Arc<[u8]> = bytes.into();
            inner.listeners.retain(|l| {
                !matches!(
                    l.try_send(piece.clone()),
                    Err(TrySendError::Full(_) | TrySendError::Disconnected(_))
                )
            });
        }
    }

    pub(crate) fn signal(&self) -> &Arc<Signal> {
        &self.signal
    }

    /// Gives waiting input to `take`, which returns how many bytes it took.
    pub(crate) fn feed(&self, take: impl FnOnce(&[u8]) -> usize) {
        let mut input = lock(&self.input);
        if !input.is_empty() {
            let count = take(input.make_contiguous());
            input.drain(..count);
        }
    }

    /// No vCPU runs any more: what is in the ring now is the last.
    pub(crate) fn close(&self) {
        self.closing.store(true, SeqCst);
        self.signal.set();
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(SeqCst)
    }

    /// Ends all subscriptions.
    pub(crate) fn closed(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        inner.listeners.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> Console {
        Console::new(Box::new(std::io::sink()))
    }

    #[test]
    fn subscribe_gives_the_last_64_kib_and_what_follows() {
        let c = console();
        c.output(&vec![b'a'; HISTORY_BYTES]);
        c.output(b"end");
        let s = c.subscribe();
        assert_eq!(s.history.len(), HISTORY_BYTES);
        assert!(s.history.ends_with(b"aend"));
        c.output(b"more");
        assert_eq!(&*s.output.recv().unwrap(), b"more");
        c.closed();
        assert!(s.output.recv().is_err());
        assert!(c.subscribe().output.recv().is_err());
        c.output(&vec![b'b'; HISTORY_BYTES + 5]);
        assert_eq!(c.subscribe().history, vec![b'b'; HISTORY_BYTES]);
    }

    #[test]
    fn listener_that_does_not_listen_is_dropped() {
        let c = console();
        let s = c.subscribe();
        for _ in 0..=BACKLOG {
            c.output(b"x");
        }
        assert_eq!(s.output.iter().count(), BACKLOG);
    }

    #[test]
    fn input_beyond_the_queue_is_refused() {
        let c = console();
        assert_eq!(c.write_input(&vec![1; INPUT_BYTES - 2]), INPUT_BYTES - 2);
        assert_eq!(c.write_input(&[2; 5]), 2);
        let mut seen = 0;
        c.feed(|bytes| {
            seen = bytes.len();
            10
        });
        assert_eq!(seen, INPUT_BYTES);
        assert_eq!(c.write_input(&[3; 100]), 10);
    }
}
