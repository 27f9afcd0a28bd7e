//! What wakes a thread that waits for a socket, the ways to wait, and the use of a connection by such a thread.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hospes_store::{Error, wire};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::place::Connector;

/// How long an answer may take, with all attempts to start a store process.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How often one who waits looks why.
const LOOK_FOR_TROUBLE: Duration = Duration::from_secs(1);
const RETRY_MIN: Duration = Duration::from_millis(5);
const RETRY_MAX: Duration = Duration::from_millis(250);

/// A flag that can be waited for together with a socket.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    pub fn new() -> io::Result<Bell> {
        Ok(Bell(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    pub fn ring(&self) {
        // It can only be full, and then it rings already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn silence(&self) {
        // It may not have rung.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Waits for the bell, and for something to read where a socket is given; whether there is.
    pub fn wait(&self, stream: Option<&UnixStream>) -> bool {
        let mut fds = vec![PollFd::new(&self.0, PollFlags::IN)];
        fds.extend(stream.map(|s| PollFd::new(s, PollFlags::IN)));
        // Only a signal interrupts it: then nothing is there, and the caller comes back.
        let _ = poll(&mut fds, None);
        let (rung, readable) = (
            !fds[0].revents().is_empty(),
            fds.get(1).is_some_and(|fd| !fd.revents().is_empty()),
        );
        if rung {
            self.silence();
        }
        readable
    }
}

/// A connection to the store process, however long it takes; `None` when it is not wanted any more.
pub fn connect(connector: &dyn Connector, is_wanted: impl Fn() -> bool) -> Option<UnixStream> {
    let mut pause = RETRY_MIN;
    while is_wanted() {
        if let Ok(stream) = connector.connect() {
            return Some(stream);
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(RETRY_MAX);
    }
    None
}

/// Waits until a state has what is looked for, for as long as an answer may take; not where there is trouble with the store process that `gives_up` does not want to wait out.
pub fn wait_for<S, T>(
    state: &Mutex<S>,
    changed: &Condvar,
    connector: &dyn Connector,
    gives_up: impl Fn(Error) -> bool,
    mut find: impl FnMut(&S) -> Option<T>,
) -> Result<T, Error> {
    let deadline = Instant::now() + PATIENCE;
    let mut held = state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(found) = find(&held) {
            return Ok(found);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Unreachable);
        }
        let waited = changed.wait_timeout(held, left.min(LOOK_FOR_TROUBLE));
        let (now, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        held = now;
        if timeout.timed_out() {
            drop(held);
            if let Some(trouble) = connector.trouble().filter(|t| gives_up(*t)) {
                return Err(trouble);
            }
            held = state.lock().unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Uses a connection: sends what `next` gives, whenever the bell rings, and has `take` see the messages that have come. Ends when the connection breaks or carries what is
/// no message, and when `next` gives nothing.
pub fn use_stream(
    bell: &Bell,
    mut stream: &UnixStream,
    mut next: impl FnMut() -> Option<Vec<u8>>,
    mut take: impl FnMut(Vec<wire::Request>),
) {
    let mut input = Vec::new();
    let mut buf = [0; 16 << 10];
    while let Some(bytes) = next() {
        if stream.write_all(&bytes).is_err() {
            return;
        }
        if !bell.wait(Some(stream)) {
            continue;
        }
        match stream.read(&mut buf) {
            Ok(0) => return,
            Ok(count) => input.extend(&buf[..count]),
            Err(fault) if fault.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        }
        let mut messages = Vec::new();
        let end = loop {
            match wire::decode(&mut input) {
                Ok(Some(message)) => messages.push(message),
                end => break end,
            }
        };
        take(messages);
        if end.is_err() {
            return;
        }
    }
}
