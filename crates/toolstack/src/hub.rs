//! The console between one guest and any number of watchers.
//!
//! Output goes to a log, to a history of the last [`HISTORY_BYTES`] and to every watcher's queue. The guest is never made
//! to wait: a watcher that does not read loses the oldest bytes of its queue and is told how many. The hub outlives a
//! reboot of the domain, and so do its watchers.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::log::log;
use crate::logfile::LogFile;
use crate::machine::Machine;

/// What a new watcher sees of the past, in bytes.
pub(crate) const HISTORY_BYTES: usize = 64 << 10;
/// What is kept for a watcher that does not read, in bytes.
pub(crate) const QUEUE_BYTES: usize = 1 << 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct State {
    history: VecDeque<u8>,
    log: Option<LogFile>,
    watchers: Vec<Arc<Watcher>>,
    closed: bool,
}

pub(crate) struct ConsoleHub {
    state: Mutex<State>,
    machine: Mutex<Option<Arc<dyn Machine>>>,
}

impl ConsoleHub {
    pub(crate) fn new(log: Option<LogFile>) -> Arc<ConsoleHub> {
        Arc::new(ConsoleHub {
            state: Mutex::new(State {
                history: VecDeque::new(),
                log,
                watchers: Vec::new(),
                closed: false,
            }),
            machine: Mutex::new(None),
        })
    }

    /// The sink for what the guest prints.
    pub(crate) fn writer(self: &Arc<Self>) -> Box<dyn Write + Send> {
        Box::new(HubWriter(self.clone()))
    }

    /// Where input goes from now on.
    pub(crate) fn connect(&self, machine: Option<Arc<dyn Machine>>) {
        *lock(&self.machine) = machine;
    }

    /// Input for the guest; returns how many bytes were taken. Without a machine it is dropped, as by an unplugged line.
    pub(crate) fn input(&self, bytes: &[u8]) -> usize {
        let machine = lock(&self.machine).clone();
        machine.map_or(bytes.len(), |machine| machine.console_input(bytes))
    }

    fn output(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        push_bounded(&mut state.history, bytes, HISTORY_BYTES);
        if let Some(log) = &mut state.log
            && let Err(fault) = log.append(bytes)
        {
            log!("the console log cannot be written ({fault}): it ends here");
            state.log = None;
        }
        state.watchers.retain(|watcher| watcher.push(bytes));
    }

    /// Gives the log another name, where it has this one: that of a domain kept by `rename-restart` belongs to the domain behind it.
    pub(crate) fn move_log(&self, from: &Path, to: &Path) -> io::Result<()> {
        match &mut lock(&self.state).log {
            Some(log) if log.path() == from => log.move_to(to),
            _ => Ok(()),
        }
    }

    /// A new watcher, beginning with the history.
    pub(crate) fn attach(&self) -> Arc<Watcher> {
        let mut state = lock(&self.state);
        let watcher = Arc::new(Watcher {
            queue: Mutex::new(Queue {
                bytes: state.history.clone(),
                dropped: 0,
                closed: state.closed,
                drained: false,
            }),
            changed: Condvar::new(),
        });
        state.watchers.push(watcher.clone());
        watcher
    }

    /// Ends all watchers, each behind the output it has still to read; waits for that at most so long.
    pub(crate) fn close(&self, patience: Duration) {
        let watchers = {
            let mut state = lock(&self.state);
            state.closed = true;
            std::mem::take(&mut state.watchers)
        };
        for watcher in &watchers {
            watcher.close();
        }
        let deadline = Instant::now() + patience;
        for watcher in &watchers {
            watcher.wait_drained(deadline);
        }
    }
}

struct HubWriter(Arc<ConsoleHub>);

impl Write for HubWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.output(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Appends and drops from the front what is too much; returns how many bytes were dropped.
fn push_bounded(queue: &mut VecDeque<u8>, bytes: &[u8], max: usize) -> usize {
    queue.extend(bytes);
    let surplus = queue.len().saturating_sub(max);
    queue.drain(..surplus);
    surplus
}

struct Queue {
    bytes: VecDeque<u8>,
    dropped: usize,
    closed: bool,
    /// The watcher has seen the end.
    drained: bool,
}

/// One reader of the console.
pub(crate) struct Watcher {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Watcher {
    /// False where the watcher has left.
    fn push(&self, bytes: &[u8]) -> bool {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return false;
        }
        let dropped = push_bounded(&mut queue.bytes, bytes, QUEUE_BYTES);
        queue.dropped += dropped;
        self.changed.notify_all();
        true
    }

    /// The next output; blocks. `None` at the end.
    pub(crate) fn next(&self) -> Option<Vec<u8>> {
        let mut queue = lock(&self.queue);
        while queue.bytes.is_empty() && !queue.closed {
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if queue.bytes.is_empty() {
            return None;
        }
        let mut chunk = Vec::new();
        let dropped = std::mem::take(&mut queue.dropped);
        if dropped > 0 {
            chunk.extend(
                format!("\r\n[hospes: {dropped} bytes of output are missing here]\r\n").bytes(),
            );
        }
        chunk.extend(queue.bytes.drain(..));
        Some(chunk)
    }

    /// No more output is taken; what is there can still be read.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }

    /// The reader is done, whether it has read everything or not.
    pub(crate) fn finish(&self) {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.drained = true;
        self.changed.notify_all();
    }

    fn wait_drained(&self, deadline: Instant) {
        let mut queue = lock(&self.queue);
        while !queue.drained {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = self
                .changed
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attach_late_begins_with_the_history() {
        let hub = ConsoleHub::new(None);
        hub.output(b"boot");
        let watcher = hub.attach();
        hub.output(b"ed");
        assert_eq!(watcher.next().as_deref(), Some(&b"booted"[..]));
        watcher.close();
        assert_eq!(watcher.next(), None);
    }

    #[test]
    fn output_without_a_reader_keeps_the_newest_and_says_so() {
        let hub = ConsoleHub::new(None);
        let watcher = hub.attach();
        for _ in 0..QUEUE_BYTES / 1000 + 1 {
            hub.output(&[b'a'; 1000]);
        }
        hub.output(b"end");
        let chunk = watcher.next().expect("output");
        assert!(chunk.starts_with(b"\r\n[hospes: "));
        assert!(chunk.ends_with(b"aend"));
        assert!(chunk.len() < QUEUE_BYTES + 100);
        assert_eq!(hub.attach().next().expect("history").len(), HISTORY_BYTES);
    }

    #[test]
    fn close_lets_a_watcher_read_the_rest() {
        let hub = ConsoleHub::new(None);
        let watcher = hub.attach();
        hub.output(b"last words");
        hub.close(Duration::ZERO);
        assert_eq!(watcher.next().as_deref(), Some(&b"last words"[..]));
        assert_eq!(watcher.next(), None);
        hub.output(b"from beyond");
        assert_eq!(watcher.next(), None);
    }

    #[test]
    fn output_goes_to_a_log_of_bounded_size() {
        let directory = std::env::temp_dir().join(format!("hospes-hub-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("temporary directory");
        let path = directory.join("d.console.log");
        let hub = ConsoleHub::new(Some(LogFile::open(&path, 1000).expect("log")));
        for number in 0..100 {
            hub.output(format!("line {number:013}\n").as_bytes());
        }
        let new = std::fs::read_to_string(&path).expect("log");
        let old = std::fs::read_to_string(directory.join("d.console.log.1")).expect("old log");
        assert!(new.len() <= 1000 && old.len() <= 1000);
        assert!(new.ends_with("line 0000000000099\n"));
        std::fs::remove_dir_all(&directory).expect("clean up");
    }
}
