//! Carries requests out by io_uring: one system call for a batch, none for its completions, no thread.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering::SeqCst, fence};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::error::{IoError, is_full};
use crate::hold::{Hold, RETRY_AFTER};
use crate::host::{HostFile, discarded, fits};
use crate::storage::{Aligned, Storage, copy_from, copy_to, part};
use crate::threads::Event;
use crate::types::{Buffer, Completion, Op, Queue, Request};

/// Requests in the ring at once; the others wait in front of it.
const ENTRIES: u32 = 256;
/// `readv` takes no more buffers at once (`IOV_MAX`); what is left is a short transfer.
const BUFFERS_MAX: usize = 1024;
/// Mark of the timer among the completions; all others are slots.
const TIMER: u64 = u64::MAX;

/// Chooses how requests reach the host: `threads`, else io_uring where the host allows it.
pub(crate) const ENGINE_VARIABLE: &str = "HOSPES_IO";

/// What lies past the end of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Zeros, where there never was anything; a write makes the file grow.
    Zeros,
    /// What the host has cut off: requests for it fail.
    Cut,
}

/// A ring on the file behind `storage`; `None` if there is no such file, or the host or the user wants no ring.
pub(crate) fn start(
    storage: &Arc<dyn Storage>,
    hold: &Arc<Hold>,
    event: &Event,
    end: End,
) -> Option<Ring> {
    if std::env::var_os(ENGINE_VARIABLE).is_some_and(|engine| engine == "threads") {
        return None;
    }
    let file = storage.clone().host_file()?;
    Ring::new(file, hold.clone(), event.clone(), end).ok()
}

/// A request and the memory that the kernel uses meanwhile.
struct Flight {
    request: Request,
    /// Aligned copy, where direct I/O cannot use the request's memory.
    copy: Option<Aligned>,
    /// What the kernel gets; stays where it is while the request is in the ring.
    vector: Vec<Buffer>,
    held: bool,
}

/// A queue served by a ring. Requests must be in range: it does not check them.
pub(crate) struct Ring {
    ring: IoUring,
    file: Arc<HostFile>,
    end: End,
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
    waiting: VecDeque<Flight>,
    held: Vec<Flight>,
    done: Vec<Completion>,
    timer: Box<types::Timespec>,
    timer_armed: bool,
    event: Event,
    hold: Arc<Hold>,
}

// SAFETY: the ring's memory is its own and is reached only by `&mut self`; the pointers in flights are to memory they own, or that who made
// the request vouches for from any thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Fails where the host has no io_uring or does not allow it.
    pub(crate) fn new(
        file: Arc<HostFile>,
        hold: Arc<Hold>,
        event: Event,
        end: End,
    ) -> std::io::Result<Ring> {
        let ring = IoUring::new(ENTRIES)?;
        ring.submitter()
            .register_eventfd(event.as_fd().as_raw_fd())?;
        let seconds = types::Timespec::new().sec(RETRY_AFTER.as_secs());
        Ok(Ring {
            ring,
            file,
            end,
            slots: (0..ENTRIES).map(|_| None).collect(),
            free: (0..ENTRIES as usize).collect(),
            waiting: VecDeque::new(),
            held: Vec::new(),
            done: Vec::new(),
            timer: Box::new(seconds.nsec(RETRY_AFTER.subsec_nanos())),
            timer_armed: false,
            event,
            hold,
        })
    }

    /// Whether a flush has to go another way; see [`HostFile::is_cached`].
    pub(crate) fn is_cached(&self) -> bool {
        self.file.is_cached()
    }

    /// Completes a request that never went to the host.
    pub(crate) fn complete(&mut self, id: u64, result: Result<(), IoError>) {
        self.done.push(Completion { id, result });
        self.event.signal();
    }

    fn prepare(&self, request: Request) -> Flight {
        let mut flight = Flight {
            vector: Vec::new(),
            copy: None,
            held: false,
            request,
        };
        if matches!(flight.request.op, Op::Read | Op::Write) {
            let (_, alignment) = self.file.data_fd();
            if alignment.is_some_and(|alignment| !fits(&flight.request.buffers, alignment)) {
                let mut copy = Aligned::new(flight.request.bytes as usize);
                if flight.request.op == Op::Write {
                    copy_from(&flight.request.buffers, &mut copy);
                }
                flight.vector = vec![Buffer::of(&mut copy)];
                flight.copy = Some(copy);
            } else {
                flight.vector.clone_from(&flight.request.buffers);
            }
        }
        flight
    }

    /// Moves waiting requests into the ring as far as it has room. A write past the present end of a file that was cut fails: it would make the file
    /// grow, with a hole where data were.
    fn fill(&mut self) {
        let mut end = None;
        while !self.waiting.is_empty() && !self.free.is_empty() {
            if self.ring.submission().is_full() && !self.enter(0) {
                return;
            }
            let (Some(flight), Some(slot)) = (self.waiting.pop_front(), self.free.pop()) else {
                return;
            };
            if self.end == End::Cut
                && flight.request.op == Op::Write
                && let Err(fault) = self.check_end(&flight.request, &mut end)
            {
                self.free.push(slot);
                self.complete(flight.request.id, Err(fault));
                if flight.held {
                    self.hold.leave();
                }
                continue;
            }
            let flight = self.slots[slot].insert(flight);
            let entry = entry(&self.file, flight).user_data(slot as u64);
            // SAFETY: buffers, vector and copy stay in their slot until the completion; see `Flight` and `drop`.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_err() {
                let flight = self.slots[slot].take();
                self.waiting.extend(flight);
                self.free.push(slot);
                return;
            }
        }
    }

    /// [`Storage::check_end`], asking the host once where `end` goes from one to the next.
    fn check_end(&self, request: &Request, end: &mut Option<u64>) -> Result<(), IoError> {
        let bytes = match *end {
            Some(bytes) => bytes,
            None => *end.insert(self.file.len()?),
        };
        if request.offset + request.bytes > bytes {
            return Err(IoError::Cut { bytes });
        }
        Ok(())
    }

    /// Calls the kernel with what is in the ring; false if it has to be tried again later.
    fn enter(&mut self, wait_for: usize) -> bool {
        loop {
            match self.ring.submit_and_wait(wait_for) {
                Ok(_) => return true,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // The completion queue is full, or the host lacks memory now: after the next look at the completions.
                    self.event.signal();
                    return false;
                }
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes in one answer of the kernel.
    fn answer(&mut self, slot: u64, result: i32) {
        if slot == TIMER {
            self.timer_armed = false;
            self.waiting.extend(self.held.drain(..));
            return;
        }
        let Some(mut flight) = self.slots.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        self.free.push(slot as usize);
        let answer = answer_of(result);
        let result = match flight.request.op {
            Op::Flush => self.synced(answer).map_err(IoError::Host),
            Op::Discard => discarded(answer.map(drop)).map_err(IoError::Host),
            Op::Read | Op::Write => answer
                .map_err(IoError::Host)
                .and_then(|done| self.finish(&flight, done)),
        };
        match result {
            Err(IoError::Host(error)) if is_for_later(&error) => self.waiting.push_back(flight),
            Err(IoError::Host(error)) if is_full(&error) => {
                if !flight.held {
                    flight.held = true;
                    self.hold.enter();
                }
                self.held.push(flight);
            }
            result => {
                if flight.held {
                    self.hold.leave();
                }
                if let (Ok(()), Op::Write) = (&result, flight.request.op) {
                    self.file
                        .reached(flight.request.offset + flight.request.bytes);
                }
                if let (Ok(()), Op::Read, Some(copy)) = (&result, flight.request.op, &flight.copy) {
                    copy_to(&flight.request.buffers, copy);
                }
                self.done.push(Completion {
                    id: flight.request.id,
                    result,
                });
            }
        }
    }

    /// The end of a sync. One that was not even tried has not failed.
    fn synced(&self, answer: std::io::Result<u64>) -> std::io::Result<()> {
        match answer {
            Err(error) if is_for_later(&error) => Err(error),
            answer => self.file.note_sync(answer.map(drop)),
        }
    }

    /// Where the host did a part only, which is rare: the rest by calls that block.
    fn finish(&self, flight: &Flight, done: u64) -> Result<(), IoError> {
        let (op, bytes) = (flight.request.op, flight.request.bytes);
        if !matches!(op, Op::Read | Op::Write) || done >= bytes {
            return Ok(());
        }
        let rest = part(&flight.vector, done, bytes - done);
        let offset = flight.request.offset + done;
        match (op, self.end) {
            (Op::Read, End::Cut) => self.file.read_whole(&rest, offset)?,
            (Op::Read, End::Zeros) => self.file.read_uncut(&rest, offset)?,
            _ => self.file.write(&rest, offset)?,
        }
        Ok(())
    }

    /// [`Queue::completions`] without clearing the event.
    pub(crate) fn collect(&mut self, out: &mut Vec<Completion>) {
        loop {
            let answers: Vec<(u64, i32)> = self
                .ring
                .completion()
                .map(|entry: cqueue::Entry| (entry.user_data(), entry.result()))
                .collect();
            if answers.is_empty() {
                break;
            }
            for (slot, result) in answers {
                self.answer(slot, result);
            }
        }
        self.arm_timer();
        self.flush_submissions();
        out.append(&mut self.done);
    }

    fn arm_timer(&mut self) {
        if self.held.is_empty() || self.timer_armed {
            return;
        }
        let entry = opcode::Timeout::new(&raw const *self.timer)
            .build()
            .user_data(TIMER);
        // SAFETY: the time lives as long as the ring.
        self.timer_armed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        if !self.timer_armed {
            self.event.signal();
        }
    }
}

/// What the kernel says of a request.
fn answer_of(result: i32) -> std::io::Result<u64> {
    u64::try_from(result).map_err(|_| std::io::Error::from_raw_os_error(-result))
}

fn is_for_later(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock
    )
}

/// The file is named by its descriptor and not registered: so each request under way holds it open, and with it the lock of a process that was killed, and nothing else does.
fn entry(file: &HostFile, flight: &Flight) -> squeue::Entry {
    let descriptor = types::Fd(file.data_fd().0.as_raw_fd());
    let request = &flight.request;
    let vector = flight.vector.as_ptr().cast::<libc::iovec>();
    let count = flight.vector.len().min(BUFFERS_MAX) as u32;
    match request.op {
        Op::Read => opcode::Readv::new(descriptor, vector, count)
            .offset(request.offset)
            .build(),
        Op::Write => opcode::Writev::new(descriptor, vector, count)
            .offset(request.offset)
            .build(),
        Op::Flush => opcode::Fsync::new(descriptor)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Op::Discard => opcode::Fallocate::new(descriptor, request.bytes)
            .offset(request.offset)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build(),
    }
}

impl Queue for Ring {
    fn submit(&mut self, request: Request) {
        let flight = self.prepare(request);
        self.waiting.push_back(flight);
    }

    fn flush_submissions(&mut self) {
        self.fill();
        if !self.ring.submission().is_empty() {
            self.enter(0);
        }
    }

    fn completions(&mut self, out: &mut Vec<Completion>) {
        self.event.clear();
        self.collect(out);
    }

    fn peek(&mut self) -> Option<bool> {
        Some(!self.done.is_empty() || !self.ring.completion().is_empty())
    }

    fn silence(&mut self, silent: bool) {
        let completions = self.ring.completion();
        if silent {
            completions.disable_eventfd();
        } else {
            completions.enable_eventfd();
            drop(completions);
            // A completion from here on sets the event, or who looks now sees it. The kernel has no barrier on its side, so that one at this very moment
            // may do neither: see `Queue::silence`.
            fence(SeqCst);
        }
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for flight in self.waiting.drain(..).chain(self.held.drain(..)) {
            if flight.held {
                self.hold.leave();
            }
        }
        while self.in_flight() > 0 {
            if !self.enter(1) {
                std::thread::yield_now();
            }
            let answers: Vec<(u64, i32)> = self
                .ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result()))
                .collect();
            for (slot, result) in answers {
                if slot == TIMER {
                    continue;
                }
                if let Some(flight) = self.slots.get_mut(slot as usize).and_then(Option::take) {
                    self.free.push(slot as usize);
                    if flight.request.op == Op::Flush {
                        // Nobody waits for it, but the host tells of what is lost only once.
                        let _ = self.synced(answer_of(result));
                    }
                    if flight.held {
                        self.hold.leave();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Directory, full_host, pattern, raw, wait};
    use crate::threads::{Event, Threads};
    use crate::{Buffer, Completion, Op, Queue, Request, Status};
    use std::path::Path;
    use std::sync::Arc;

    use super::{Aligned, End, start};
    use crate::files::Access;
    use crate::hold::Hold;
    use crate::host::HostFile;
    use crate::raw::{Raw, RawOptions};
    use crate::storage::Storage;

    fn storage(path: &Path) -> Arc<dyn Storage> {
        let access = Access {
            read_only: false,
            direct: true,
            unit: Some(512),
        };
        Arc::new(HostFile::open(path, access, Some("the test")).unwrap())
    }

    /// A queue of each engine on the file.
    fn queues(path: &Path) -> Vec<Box<dyn Queue>> {
        let storage = storage(path);
        let options = RawOptions {
            sector_bytes: 512,
            physical_sector_bytes: 512,
            read_only: false,
            discard: Some(4096),
        };
        let raw = Raw::new(path, storage.clone(), options).unwrap();
        let hold = Arc::new(Hold::new(path.to_owned()));
        let ring = start(&storage, &hold, &Event::new().unwrap(), End::Cut)
            .expect("the host has io_uring");
        let threads = Threads::new(raw.work(), hold, Event::new().unwrap());
        vec![Box::new(ring), Box::new(threads)]
    }

    fn submit_all(queue: &mut dyn Queue, op: Op, buffers: &[Vec<Buffer>]) -> Vec<Completion> {
        let mut offset = 0;
        for (id, buffers) in buffers.iter().enumerate() {
            let bytes = buffers.iter().map(|b| b.len as u64).sum();
            queue.submit(Request {
                id: id as u64,
                op,
                offset,
                bytes,
                buffers: buffers.clone(),
            });
            offset += bytes;
        }
        queue.flush_submissions();
        let mut out = Vec::new();
        while out.len() < buffers.len() {
            wait(queue, &mut out);
        }
        out
    }

    #[test]
    fn submit_of_more_requests_than_entries_completes_all() {
        let directory = Directory::new();
        let path = directory.file("a.img", 4 << 20);
        for (seed, mut queue) in queues(&path).into_iter().enumerate() {
            let data = pattern(seed as u64 + 5, 1000 * 4096);
            let mut memory = Aligned::new(data.len());
            memory.copy_from_slice(&data);
            let pieces: Vec<_> = memory
                .chunks_mut(4096)
                .map(|piece| vec![Buffer::of(piece)])
                .collect();
            let mut ids: Vec<_> = submit_all(&mut *queue, Op::Write, &pieces)
                .iter()
                .map(|completion| {
                    assert!(completion.result.is_ok());
                    completion.id
                })
                .collect();
            ids.sort_unstable();
            assert!(ids.into_iter().eq(0..1000));
            memory.fill(0);
            let pieces: Vec<_> = memory
                .chunks_mut(4096)
                .map(|piece| vec![Buffer::of(piece)])
                .collect();
            submit_all(&mut *queue, Op::Read, &pieces);
            assert!(memory[..] == data[..]);
        }
    }

    #[test]
    fn requests_with_unaligned_memory_and_many_buffers_are_carried_out() {
        let directory = Directory::new();
        let path = directory.file("a.img", 4 << 20);
        for (seed, mut queue) in queues(&path).into_iter().enumerate() {
            let data = pattern(seed as u64 + 9, 1500 * 512);
            let mut memory = Aligned::new(data.len() + 1);
            memory[1..].copy_from_slice(&data);
            let pieces = |memory: &mut Aligned| {
                vec![
                    memory[1..]
                        .chunks_mut(512)
                        .map(Buffer::of)
                        .collect::<Vec<_>>(),
                ]
            };
            let written = submit_all(&mut *queue, Op::Write, &pieces(&mut memory));
            assert!(written[0].result.is_ok());
            memory.fill(0);
            submit_all(&mut *queue, Op::Read, &pieces(&mut memory));
            assert!(memory[1..] == data[..]);
            // Aligned pieces, more than one call takes.
            let mut memory = Aligned::new(data.len());
            let pieces = vec![memory.chunks_mut(512).map(Buffer::of).collect::<Vec<_>>()];
            submit_all(&mut *queue, Op::Read, &pieces);
            assert!(memory[..] == data[..]);
        }
    }

    #[test]
    fn write_to_a_full_host_waits_until_there_is_room() {
        full_host(
            "uring::tests::write_to_a_full_host_waits_until_there_is_room",
            |directory| {
                let path = directory.join("a.img");
                std::fs::File::create(&path)
                    .unwrap()
                    .set_len(512 << 10)
                    .unwrap();
                let filler = directory.join("filler");
                let full = std::fs::write(&filler, vec![1; 4 << 20]);
                assert_eq!(full.unwrap_err().kind(), std::io::ErrorKind::StorageFull);

                let image = raw(&path);
                let mut queue = image.queue().unwrap();
                let mut memory = Aligned::new(64 << 10);
                memory.fill(7);
                queue.submit(Request {
                    id: 1,
                    op: Op::Write,
                    offset: 0,
                    bytes: 64 << 10,
                    buffers: vec![Buffer::of(&mut memory)],
                });
                queue.flush_submissions();
                let mut out = Vec::new();
                while image.status() == Status::Good {
                    queue.completions(&mut out);
                    std::thread::yield_now();
                }
                assert!(out.is_empty());
                let Status::Held(sentence) = image.status() else {
                    panic!("it was held");
                };
                assert!(sentence.contains("is full: 1 write of the guest waits"));
                std::fs::remove_file(&filler).unwrap();
                wait(&mut *queue, &mut out);
                assert!(out[0].result.is_ok());
                assert_eq!(image.status(), Status::Good);
                assert_eq!(std::fs::read(&path).unwrap()[..64 << 10], memory[..]);
            },
        );
    }
}
