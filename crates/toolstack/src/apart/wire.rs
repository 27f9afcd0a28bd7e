//! Messages with descriptors between a keeper and its machine process.
//!
//! A message is its length in bytes, 4 bytes and little-endian, and JSON; descriptors travel with its first byte. Behind some messages come bytes that they announce.
//! The machine process is a hostile peer: no length takes more memory than [`MESSAGE_MAX`].

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::instance::lock;

/// Longest message, in bytes.
const MESSAGE_MAX: usize = 4 << 20;
/// Most descriptors with one message.
pub(super) const DESCRIPTORS_MAX: usize = 16;
/// Longest message of a machine process, in bytes: a value of JSON takes up to 32 times as much memory.
const TOLD_MAX: usize = 256 << 10;
/// How long a message may take to find room on a line.
const ROOM_PATIENCE: Duration = Duration::from_secs(5);

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    /// Nothing is waited for after that.
    until: Option<Instant>,
    /// Longest message that may come, in bytes.
    most: usize,
}

/// A message that came, with its descriptors.
pub(super) type Received<T> = (T, Vec<OwnedFd>);

impl Wire {
    pub(super) fn new(stream: UnixStream) -> Wire {
        Wire {
            stream,
            until: None,
            most: MESSAGE_MAX,
        }
    }

    /// The same, where what comes has to come until then, however much it is.
    pub(super) fn until(self, deadline: Instant) -> Wire {
        Wire {
            until: Some(deadline),
            ..self
        }
    }

    /// Two connected ends.
    pub(super) fn pair() -> io::Result<(Wire, Wire)> {
        let (a, b) = UnixStream::pair()?;
        Ok((Wire::new(a), Wire::new(b)))
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        if text.len() > MESSAGE_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let head = (text.len() as u32).to_le_bytes();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let parts = [IoSlice::new(&head), IoSlice::new(&text)];
        let sent = loop {
            match sendmsg(&self.stream, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?,
            }
        };
        let (done, rest) = match sent.checked_sub(head.len()) {
            Some(done) => (done, &head[..0]),
            None => (0, &head[sent..]),
        };
        let rest = [rest, &text[done..]].into_iter();
        let mut rest = rest.map(|bytes| (&self.stream).write_all(bytes));
        // It has gone out in part, which nobody can use.
        rest.try_for_each(|written| written.map_err(|_| io::ErrorKind::WriteZero.into()))
    }

    /// The next message; `None` where the other side has closed its end.
    pub(super) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<Received<T>>> {
        let mut head = [0; 4];
        let mut descriptors = Vec::new();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            self.limit()?;
            let mut parts = [IoSliceMut::new(&mut head)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match recvmsg(&self.stream, &mut parts, &mut ancillary, flags) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?.bytes,
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = message {
                descriptors.extend(some);
            }
        }
        if got == 0 {
            return Ok(None);
        }
        self.read_exact(&mut head[got..])?;
        let length = u32::from_le_bytes(head) as usize;
        if length > self.most {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut text = vec![0; length];
        self.read_exact(&mut text)?;
        Ok(Some((serde_json::from_slice(&text)?, descriptors)))
    }

    /// Bytes that a message has announced.
    pub(super) fn read_exact(&self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.limit()?;
            match (&self.stream).read(bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => bytes = &mut bytes[got..],
                Err(fault) if fault.kind() == io::ErrorKind::Interrupted => {}
                Err(fault) => return Err(fault),
            }
        }
        Ok(())
    }

    /// What is waited for next may take what is left of the time.
    fn limit(&self) -> io::Result<()> {
        let Some(deadline) = self.until else {
            return Ok(());
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))
    }

    /// The next message, where there has to be one.
    pub(super) fn expect<T: DeserializeOwned>(&self) -> io::Result<Received<T>> {
        self.receive()?
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// Where calls to the other process begin: each is a connection of its own, whose other end goes over this line with the call.
#[derive(Debug)]
pub(super) struct Line {
    wire: Wire,
    /// Messages go out whole.
    sending: Mutex<()>,
}

impl Line {
    /// That of a keeper. A call fails where the other side leaves no room for it for a while, and what that says has not to be long.
    pub(super) fn keepers(stream: UnixStream) -> io::Result<Line> {
        stream.set_write_timeout(Some(ROOM_PATIENCE))?;
        let Line { wire, sending } = Line::new(stream);
        let wire = Wire {
            most: TOLD_MAX,
            ..wire
        };
        Ok(Line { wire, sending })
    }

    pub(super) fn new(stream: UnixStream) -> Line {
        Line {
            wire: Wire::new(stream),
            sending: Mutex::default(),
        }
    }

    /// Begins a call: what is to be done, and descriptors for it.
    pub(super) fn call(
        &self,
        what: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<Wire> {
        let (mut here, there) = Wire::pair()?;
        here.most = self.wire.most;
        let mut all = vec![there.stream.as_fd()];
        all.extend(descriptors);
        let _whole = lock(&self.sending);
        self.wire.send(what, &all).inspect_err(|fault| {
            // What may have gone out in part must not be the beginning of the next.
            if fault.kind() == io::ErrorKind::WriteZero {
                self.close();
            }
        })?;
        Ok(here)
    }

    /// The next call of the other side, with the connection for it; `None` where the other process is gone.
    pub(super) fn next<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Wire, Vec<OwnedFd>)>> {
        let (what, mut descriptors) = match self.wire.receive() {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(None),
            // One that was killed before it had read all that it was sent.
            Err(fault) if fault.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(fault) => return Err(fault),
        };
        if descriptors.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let wire = Wire::new(UnixStream::from(descriptors.remove(0)));
        Ok(Some((what, wire, descriptors)))
    }

    /// The other side reads the end.
    pub(super) fn close(&self) {
        // One that is closed already is what is wanted.
        let _ = self.wire.stream.shutdown(std::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn messages_keep_their_descriptors_and_their_bounds() {
        let (a, b) = Wire::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        a.send(&"first", &[]).unwrap();
        a.send(&"second", &[writer.as_fd()]).unwrap();
        a.send(&"third", &[]).unwrap();
        drop(writer);
        let got: Vec<(String, Vec<OwnedFd>)> = std::iter::repeat_with(|| b.expect().unwrap())
            .take(3)
            .collect();
        let counts: Vec<(&str, usize)> = got.iter().map(|(t, d)| (&t[..], d.len())).collect();
        assert_eq!(counts, [("first", 0), ("second", 1), ("third", 0)]);
        let passed = got.into_iter().nth(1).unwrap().1.remove(0);
        File::from(passed).write_all(b"x").unwrap();
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        drop(a);
        assert!(b.receive::<String>().unwrap().is_none());
    }

    #[test]
    fn long_messages_arrive_whole_and_too_long_ones_do_not() {
        let (a, b) = Wire::pair().unwrap();
        let long = "x".repeat(MESSAGE_MAX - 2);
        let sender = std::thread::spawn(move || {
            a.send(&long, &[]).unwrap();
            a.send(&"x".repeat(MESSAGE_MAX), &[]).unwrap_err();
            (&a.stream).write_all(&u32::MAX.to_le_bytes()).unwrap();
        });
        let (text, _) = b.expect::<String>().unwrap();
        assert_eq!(text.len(), MESSAGE_MAX - 2);
        let fault = b.expect::<String>().unwrap_err();
        assert_eq!(fault.kind(), io::ErrorKind::InvalidData);
        sender.join().unwrap();
    }

    #[test]
    fn a_keeper_takes_no_long_messages() {
        let (here, there) = UnixStream::pair().unwrap();
        let (line, peer) = (Line::keepers(here).unwrap(), Line::new(there));
        let answer = line.call(&1, &[]).unwrap();
        let (_, asked, _) = peer.next::<u32>().unwrap().unwrap();
        let asked = std::thread::spawn(move || {
            asked.send(&"x".repeat(TOLD_MAX - 2), &[]).unwrap();
            asked
        });
        answer.expect::<String>().unwrap();
        let asked = asked.join().unwrap();
        let lengths = [asked.stream(), &peer.wire.stream];
        for mut stream in lengths {
            stream
                .write_all(&(TOLD_MAX as u32 + 1).to_le_bytes())
                .unwrap();
        }
        let fault = answer.expect::<String>().unwrap_err();
        assert_eq!(fault.kind(), io::ErrorKind::InvalidData);
        let fault = line.next::<String>().unwrap_err();
        assert_eq!(fault.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn waiting_ends_in_time_however_slowly_something_comes() {
        let (a, b) = Wire::pair().unwrap();
        let b = b.until(Instant::now() + Duration::from_millis(200));
        let sender = std::thread::spawn(move || {
            (&a.stream).write_all(&1000u32.to_le_bytes()).unwrap();
            // Byte after byte until nobody listens, each in time for itself.
            while (&a.stream).write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let fault = b.expect::<String>().unwrap_err();
        let late = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        assert!(late.contains(&fault.kind()), "{fault}");
        drop(b);
        sender.join().unwrap();
    }

    #[test]
    fn calls_that_nobody_takes_fail() {
        let (here, _there) = UnixStream::pair().unwrap();
        here.set_write_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        let line = Line::new(here);
        let text = "x".repeat(1 << 10);
        while line.call(&text, &[]).is_ok() {}
        // What was sent in part would be taken for the beginning of the next.
        let long = "x".repeat(MESSAGE_MAX - 2);
        let (here, there) = UnixStream::pair().unwrap();
        here.set_write_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        let (line, peer) = (Line::new(here), Line::new(there));
        line.call(&long, &[]).unwrap_err();
        assert!(peer.next::<String>().is_err());
        assert!(line.call(&text, &[]).is_err());
    }

    #[test]
    fn a_line_ends_with_the_other_process_whatever_that_has_left_unread() {
        let (here, there) = UnixStream::pair().unwrap();
        let line = Line::new(here);
        let _call = line.call(&1, &[]).unwrap();
        drop(there);
        assert!(line.next::<u32>().unwrap().is_none());
    }

    #[test]
    fn calls_without_a_connection_are_refused() {
        let (here, there) = UnixStream::pair().unwrap();
        let (line, peer) = (Line::new(here), Wire::new(there));
        peer.send(&1, &[]).unwrap();
        let fault = line.next::<u32>().unwrap_err();
        assert_eq!(fault.kind(), io::ErrorKind::InvalidData);
    }
}
