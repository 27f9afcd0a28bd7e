//! The user's side of a console.

use std::io::{self, Read, Write, stdin, stdout};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use hospes_sys::terminal::Raw;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Leaves the console: Ctrl-], as in xenconsole.
const ESCAPE: u8 = 0x1d;

/// Why a console was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// It ended.
    Ended,
    /// The user left it.
    ByUser,
}

/// Connects standard input and output with a console until it ends or the user leaves. The end of the input alone is
/// no reason to leave: the output may still be wanted.
pub(crate) fn attach(stream: &UnixStream) -> io::Result<Left> {
    let _raw = Raw::enter()?;
    stdout().flush()?;
    // A guest that does not read must keep neither its output nor the escape key from the user.
    stream.set_nonblocking(true)?;
    let mut session = Session {
        stream,
        input_open: true,
        pending: Vec::new(),
    };
    loop {
        if let Some(left) = session.step()? {
            return Ok(left);
        }
    }
}

/// Input is read while less than so much of it waits for the guest, in bytes.
const PENDING_MAX: usize = 4096;

struct Session<'a> {
    stream: &'a UnixStream,
    input_open: bool,
    /// Input the console has not taken yet.
    pending: Vec<u8>,
}

/// What happened to a non-blocking or interrupted call that did nothing.
fn is_nothing(fault: &io::Error) -> bool {
    matches!(
        fault.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

/// The domain process is gone.
fn is_end(fault: &io::Error) -> bool {
    matches!(
        fault.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// Writes to standard output, which another program may have made non-blocking.
fn show(mut bytes: &[u8]) -> io::Result<()> {
    let out = stdout();
    while !bytes.is_empty() {
        match rustix::io::write(&out, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let ready = poll(&mut [PollFd::new(&out, PollFlags::OUT)], None);
                if let Err(fault) = ready
                    && fault != Errno::INTR
                {
                    return Err(fault.into());
                }
            }
            Err(fault) => return Err(fault.into()),
        }
    }
    Ok(())
}

impl Session<'_> {
    /// One round; tells when the session is over.
    fn step(&mut self) -> io::Result<Option<Left>> {
        let input = stdin();
        let input = input.as_fd();
        let mut wanted = PollFlags::IN;
        if !self.pending.is_empty() {
            wanted |= PollFlags::OUT;
        }
        let mut descriptors = vec![PollFd::new(self.stream, wanted)];
        if self.input_open && self.pending.len() < PENDING_MAX {
            descriptors.push(PollFd::new(&input, PollFlags::IN));
        }
        match poll(&mut descriptors, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(None),
            Err(fault) => return Err(fault.into()),
        }
        let stream_events = descriptors[0].revents();
        let input_ready = descriptors
            .get(1)
            .is_some_and(|descriptor| !descriptor.revents().is_empty());
        if stream_events.intersects(!PollFlags::OUT) && !self.pass_output()? {
            return Ok(Some(Left::Ended));
        }
        if stream_events.contains(PollFlags::OUT) {
            self.send()?;
        }
        if input_ready && !self.pass_input()? {
            return Ok(Some(Left::ByUser));
        }
        Ok(None)
    }

    /// False where the console has ended.
    fn pass_output(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 16 << 10];
        let length = match self.stream.read(&mut buffer) {
            Ok(length) => length,
            Err(fault) if is_nothing(&fault) => return Ok(true),
            Err(fault) if is_end(&fault) => 0,
            Err(fault) => return Err(fault),
        };
        show(&buffer[..length])?;
        Ok(length > 0)
    }

    fn send(&mut self) -> io::Result<()> {
        match self.stream.write(&self.pending) {
            Ok(length) => {
                self.pending.drain(..length);
            }
            Err(fault) if is_nothing(&fault) => {}
            // The last output is still to be read.
            Err(fault) if is_end(&fault) => {
                self.pending.clear();
                self.input_open = false;
            }
            Err(fault) => return Err(fault),
        }
        Ok(())
    }

    /// False where the user leaves.
    fn pass_input(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 1024];
        // Not through the buffer of `Stdin`: what it holds back would never become readable again.
        let length = match rustix::io::read(stdin(), &mut buffer) {
            Ok(length) => length,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(true),
            // The terminal is gone.
            Err(Errno::IO) => 0,
            Err(fault) => return Err(fault.into()),
        };
        if length == 0 {
            self.input_open = false;
            return Ok(true);
        }
        let typed = &buffer[..length];
        let escape = typed.iter().position(|byte| *byte == ESCAPE);
        self.pending.extend(&typed[..escape.unwrap_or(length)]);
        self.send()?;
        Ok(escape.is_none())
    }
}
