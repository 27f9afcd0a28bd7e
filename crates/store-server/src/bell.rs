//! What wakes a thread that waits for a socket, the ways to wait, and the use of a connection by such a thread.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hospes_store::wire;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::place::Connector;

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
