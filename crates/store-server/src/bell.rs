//! What wakes a thread that waits for a socket, and the ways to wait.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::place::Place;

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
pub fn connect(place: &Place, is_wanted: impl Fn() -> bool) -> Option<UnixStream> {
    let mut pause = RETRY_MIN;
    while is_wanted() {
        if let Ok(stream) = place.connect() {
            return Some(stream);
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(RETRY_MAX);
    }
    None
}
