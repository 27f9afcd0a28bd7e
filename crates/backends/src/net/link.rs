//! The host's end of the wire: frames to and from a descriptor, without a copy where the descriptor takes frames.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::headers;
use super::vnet::{self, VnetHeader};

/// Spans of one frame; each is a page of the guest at most.
pub const SPANS_MAX: usize = 20;
/// Bytes of the length before each frame of a stream.
const LENGTH_BYTES: usize = 4;
/// More frames than wait on a tap (`tx_queue_len`, 1000 where nobody has changed it).
const WAITING_MAX: usize = 1024;
/// The largest frame: what the length field of IP allows, behind Ethernet's header.
const FRAME_MAX: usize = 65535 + headers::ETHERNET_BYTES;

/// How frames look on a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// One frame a call, after a [`VnetHeader`]: a tap.
    Frames,
    /// A stream, each frame after its length in 4 bytes, most significant first: passt.
    Stream,
}

/// What the guest does in the host's place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Takes packets whose checksums are blank; without it the others are not used.
    pub checksum: bool,
    pub tcpv4: bool,
    pub tcpv6: bool,
}

/// A piece of guest memory. The guest may change it at any time.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    host: *mut u8,
    len: usize,
}

// SAFETY: a span is an address; who makes one vouches for the memory in every thread.
unsafe impl Send for Span {}

impl Span {
    /// # Safety
    /// `len` bytes from `host` are readable and writable memory for as long as the span is used, and nothing in this process has references to it.
    pub unsafe fn new(host: *mut u8, len: usize) -> Span {
        Span { host, len }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The part from `offset` on, at most `len` bytes.
    pub fn part(&self, offset: usize, len: usize) -> Span {
        let offset = offset.min(self.len);
        Span {
            // SAFETY: the offset was just limited to the span.
            host: unsafe { self.host.add(offset) },
            len: len.min(self.len - offset),
        }
    }

    /// Copies the span's first bytes out.
    pub fn read(&self, buf: &mut [u8]) -> usize {
        let count = buf.len().min(self.len);
        // SAFETY: the span is readable memory by its promise, `buf` is ours, and neither is longer than `count`.
        unsafe { std::ptr::copy_nonoverlapping(self.host, buf.as_mut_ptr(), count) };
        count
    }

    /// Copies bytes to the span's beginning.
    pub fn write(&self, buf: &[u8]) -> usize {
        let count = buf.len().min(self.len);
        // SAFETY: as in `read`, and the span is writable.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), self.host, count) };
        count
    }

    /// Copies another span, which may be the same memory, to this one's beginning.
    pub fn copy_from(&self, other: &Span) {
        let count = other.len.min(self.len);
        // SAFETY: both are readable and writable memory of at least `count` bytes.
        unsafe { std::ptr::copy(other.host, self.host, count) };
    }
}

/// One queue's end of the wire.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
    stream: Option<Box<Stream>>,
}

/// What of a stream is under way.
#[derive(Debug, Default)]
struct Stream {
    /// Frames that the socket has not taken yet.
    out: Vec<u8>,
    sent: usize,
    /// Bytes received, of which the first `taken` are done with.
    input: Vec<u8>,
    taken: usize,
    /// Nothing comes or goes any more: the other end is gone, or lost step.
    broken: bool,
}

impl Link {
    /// The descriptor must not block.
    pub fn new(fd: OwnedFd, wire: Wire) -> Link {
        Link {
            fd,
            stream: (wire == Wire::Stream).then(Box::default),
        }
    }

    /// Readable when frames wait.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Sends the frame that consists of `head` and `rest`. `WouldBlock`: nothing was sent, and the same frame is to be tried again later. Other errors are
    /// the frame's, or the wire's.
    pub fn send(&mut self, header: &VnetHeader, head: &[u8], rest: &[Span]) -> io::Result<()> {
        match &mut self.stream {
            Some(stream) => stream.send(&self.fd, header, head, rest),
            None => {
                let mut header = *header;
                let iov = vectors(&raw mut header, head, rest);
                // SAFETY: every vector is memory that is readable for the call: our own, or a span by its promise.
                let done = unsafe {
                    libc::writev(self.fd.as_raw_fd(), iov.0.as_ptr(), iov.1 as libc::c_int)
                };
                result(done).map(drop)
            }
        }
    }

    /// Receives a frame into `into`; its length, which is that of `into` where it was longer, or `None` where none waits.
    pub fn receive(&mut self, header: &mut VnetHeader, into: &[Span]) -> io::Result<Option<usize>> {
        if let Some(stream) = &mut self.stream {
            *header = VnetHeader {
                flags: vnet::DATA_VALID,
                ..VnetHeader::default()
            };
            return stream.receive(&self.fd, into);
        }
        let iov = vectors(header, &[], into);
        // SAFETY: every vector is memory that is writable for the call: the header, which is borrowed exclusively, or a span by its promise.
        let done =
            unsafe { libc::readv(self.fd.as_raw_fd(), iov.0.as_ptr(), iov.1 as libc::c_int) };
        match result(done) {
            Ok(count) if count >= vnet::BYTES => Ok(Some(count - vnet::BYTES)),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends what is left of the last frame, as far as the other end takes it. A wire that breaks has nothing left; [`Link::receive`] says why.
    pub fn flush(&mut self) {
        if let Some(stream) = &mut self.stream {
            let _ = stream.flush(&self.fd);
        }
    }

    /// Whether a part of the last frame still has to go out: [`Link::flush`] sends it.
    pub fn is_sending(&self) -> bool {
        self.stream
            .as_ref()
            .is_some_and(|stream| !stream.broken && stream.sent < stream.out.len())
    }

    /// Sets what the host may leave to the guest; nothing on a stream, where nothing can be left.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if self.stream.is_some() {
            return Ok(());
        }
        let mut flags = 0;
        for (wanted, flag) in [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.checksum && offloads.tcpv4, libc::TUN_F_TSO4),
            (offloads.checksum && offloads.tcpv6, libc::TUN_F_TSO6),
        ] {
            if wanted {
                flags |= flag;
            }
        }
        // SAFETY: the call takes a number and touches no memory of ours.
        let done = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        };
        result(done as isize).map(drop)
    }

    /// Has the kernel give frames to this queue of a tap or not.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        if self.stream.is_some() {
            return Ok(());
        }
        // SAFETY: all zeros is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: the kernel reads an `ifreq`.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETQUEUE, &request) };
        match result(done as isize) {
            // It is what it was to become.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            done => done.map(drop),
        }
    }

    /// Throws away what waits on a tap: it was for the guest before this one. A stream is left alone, as it would lose step. It ends however fast more comes.
    pub fn drain(&mut self) {
        if self.stream.is_some() {
            return;
        }
        let mut scratch = vec![0u8; vnet::BYTES + FRAME_MAX];
        for _ in 0..WAITING_MAX {
            if !rustix::io::read(&self.fd, &mut scratch[..]).is_ok_and(|count| count > 0) {
                break;
            }
        }
    }
}

impl Stream {
    fn send(
        &mut self,
        fd: &OwnedFd,
        header: &VnetHeader,
        head: &[u8],
        rest: &[Span],
    ) -> io::Result<()> {
        self.flush(fd)?;
        let len = head.len() + rest.iter().map(Span::len).sum::<usize>();
        if len > FRAME_MAX || header.gso_type != vnet::GSO_NONE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.out.clear();
        self.sent = 0;
        self.out.extend((len as u32).to_be_bytes());
        self.out.extend(head);
        for span in rest {
            let at = self.out.len();
            self.out.resize(at + span.len, 0);
            span.read(&mut self.out[at..]);
        }
        if header.flags & vnet::NEEDS_CSUM != 0
            && !headers::fill_checksum(&mut self.out[LENGTH_BYTES..])
        {
            self.out.clear();
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match self.flush(fd) {
            // The frame is ours now; what is left goes first next time.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    /// Sends what is left.
    fn flush(&mut self, fd: &OwnedFd) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        while self.sent < self.out.len() {
            let flags = rustix::net::SendFlags::NOSIGNAL;
            match rustix::net::send(fd, &self.out[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.broken = error != Errno::AGAIN;
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    fn receive(&mut self, fd: &OwnedFd, into: &[Span]) -> io::Result<Option<usize>> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let result = self.read_frame(fd, into);
        self.broken = result
            .as_ref()
            .is_err_and(|error| error.kind() != io::ErrorKind::Interrupted);
        result
    }

    fn read_frame(&mut self, fd: &OwnedFd, into: &[Span]) -> io::Result<Option<usize>> {
        loop {
            if let Some(frame) = self.next_frame()? {
                let mut rest = frame.as_slice();
                for span in into {
                    rest = &rest[span.write(rest)..];
                }
                return Ok(Some(frame.len() - rest.len()));
            }
            let kept = self.input.len() - self.taken;
            self.input.copy_within(self.taken.., 0);
            self.taken = 0;
            self.input
                .resize(kept.max(64 << 10) + FRAME_MAX + LENGTH_BYTES, 0);
            let read = rustix::io::read(fd, &mut self.input[kept..]);
            self.input.truncate(kept + read.unwrap_or(0));
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next whole frame that was received.
    fn next_frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        let waiting = &self.input[self.taken..];
        let Some((length, rest)) = waiting.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*length) as usize;
        if len > FRAME_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let Some(frame) = rest.get(..len) else {
            return Ok(None);
        };
        let frame = frame.to_vec();
        self.taken += LENGTH_BYTES + len;
        Ok(Some(frame))
    }
}

fn result(done: isize) -> io::Result<usize> {
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// The vectors of header, head and spans, and their number; spans beyond [`SPANS_MAX`] are left out.
fn vectors(
    header: *mut VnetHeader,
    head: &[u8],
    spans: &[Span],
) -> ([libc::iovec; SPANS_MAX + 2], usize) {
    let empty = libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    };
    let mut all = [empty; SPANS_MAX + 2];
    all[0] = libc::iovec {
        iov_base: header.cast(),
        iov_len: vnet::BYTES,
    };
    let mut count = 1;
    if !head.is_empty() {
        all[1] = libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        };
        count = 2;
    }
    for (to, span) in all[count..].iter_mut().zip(spans) {
        *to = libc::iovec {
            iov_base: span.host.cast(),
            iov_len: span.len,
        };
        count += 1;
    }
    (all, count)
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    use super::super::headers::samples;
    use super::*;

    fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap()
    }

    fn span(bytes: &mut [u8]) -> Span {
        // SAFETY: tests use the span only while the bytes live, and do not look at them meanwhile.
        unsafe { Span::new(bytes.as_mut_ptr(), bytes.len()) }
    }

    #[test]
    fn drain_ends_however_much_comes() {
        let zero = std::fs::File::open("/dev/zero").unwrap();
        Link::new(zero.into(), Wire::Frames).drain();
    }

    #[test]
    fn stream_fills_checksums_and_splits_frames() {
        let (ours, theirs) = pair(SocketType::STREAM);
        let mut link = Link::new(ours, Wire::Stream);
        let mut frame = samples::ipv4([2; 6], headers::PROTOCOL_UDP, b"hello");
        let header = VnetHeader {
            flags: vnet::NEEDS_CSUM,
            ..VnetHeader::default()
        };
        let (head, tail) = frame.split_at_mut(40);
        link.send(&header, head, &[span(tail)]).unwrap();
        assert!(headers::fill_checksum(&mut frame));
        let mut got = [0; 200];
        let count = rustix::io::read(&theirs, &mut got).unwrap();
        assert_eq!(&got[..4], (frame.len() as u32).to_be_bytes());
        assert_eq!(&got[4..count], frame);

        // Two frames in three pieces.
        let mut bytes = vec![0, 0, 0, 3, 1, 2, 3, 0, 0, 0, 2, 4];
        let mut header = VnetHeader::default();
        let (mut a, mut b) = ([0; 2], [0; 9]);
        let into = [span(&mut a), span(&mut b)];
        rustix::io::write(&theirs, &bytes).unwrap();
        assert_eq!(link.receive(&mut header, &into).unwrap(), Some(3));
        assert_eq!(link.receive(&mut header, &into).unwrap(), None);
        bytes = vec![5];
        rustix::io::write(&theirs, &bytes).unwrap();
        assert_eq!(link.receive(&mut header, &into).unwrap(), Some(2));
        assert_eq!((a, b[0]), ([4, 5], 3));
        rustix::io::write(&theirs, &[0xff; 4]).unwrap();
        assert!(link.receive(&mut header, &into).is_err());
    }

    #[test]
    fn stream_that_is_full_takes_a_frame_whole_or_not_at_all() {
        let (ours, theirs) = pair(SocketType::STREAM);
        let mut link = Link::new(ours, Wire::Stream);
        let frame = vec![7; 60_000];
        let mut taken = 0;
        while link.send(&VnetHeader::default(), &frame, &[]).is_ok() {
            taken += 1;
        }
        let mut all: Vec<u8> = Vec::new();
        let mut buffer = vec![0; 1 << 20];
        while let Ok(count) = rustix::io::read(&theirs, &mut buffer[..]) {
            all.extend(&buffer[..count]);
            link.flush();
        }
        assert!(!link.is_sending());
        assert_eq!(all.len(), taken * (LENGTH_BYTES + frame.len()));
    }

    #[test]
    fn stream_that_breaks_has_nothing_left_to_send() {
        let mut header = VnetHeader::default();
        for how in ["noticed by sending", "noticed by receiving", "lost step"] {
            let (ours, theirs) = pair(SocketType::STREAM);
            let mut link = Link::new(ours, Wire::Stream);
            while link.send(&header, &[7; 60_000], &[]).is_ok() {}
            link.flush();
            assert!(link.is_sending());
            assert_eq!(link.receive(&mut header, &[]).unwrap(), None);
            if how == "lost step" {
                rustix::io::write(&theirs, &[0xff; 4]).unwrap();
            } else {
                drop(theirs);
            }
            if how == "noticed by sending" {
                link.flush();
            } else {
                assert!(link.receive(&mut header, &[]).is_err());
            }
            assert!(!link.is_sending(), "{how}");
            assert!(link.receive(&mut header, &[]).is_err());
            let error = link.send(&header, &[7; 60], &[]).unwrap_err();
            assert_ne!(error.kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn frames_carry_their_header() {
        let (ours, theirs) = pair(SocketType::SEQPACKET);
        let mut link = Link::new(ours, Wire::Frames);
        let sent = VnetHeader {
            csum_start: 34,
            ..VnetHeader::default()
        };
        link.send(&sent, b"head", &[]).unwrap();
        let mut got = [0; 20];
        assert_eq!(rustix::io::read(&theirs, &mut got).unwrap(), 14);
        rustix::io::write(&theirs, &got[..14]).unwrap();
        let (mut header, mut buffer) = (VnetHeader::default(), [0; 3]);
        let into = [span(&mut buffer)];
        assert_eq!(link.receive(&mut header, &into).unwrap(), Some(3));
        assert_eq!((header, buffer), (sent, *b"hea"));
        assert_eq!(link.receive(&mut header, &into).unwrap(), None);
    }
}
