//! An image in memory that records what it is asked, and can be told to fail or to wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::ThreadId;

use hospes_image::{Completion, Geometry, Image, ImageError, IoError, Op, Queue, Request, Status};
use rustix::event::{EventfdFlags, eventfd};

use crate::lock;

pub struct MemoryImage {
    pub geometry: Mutex<Geometry>,
    state: Arc<Mutex<State>>,
    gate: Arc<Mutex<()>>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Operations in the order they were carried out, with their offsets.
    done: Vec<(Op, u64)>,
    /// Requests are kept until this is over.
    holding: bool,
    failing: bool,
    /// Completions can be seen without the event.
    prompt: bool,
    /// A queue sets no event.
    silent: bool,
    /// How many more looks do not see a completion yet.
    unseen: u32,
    /// Who carried out the last request.
    served_by: Option<ThreadId>,
    /// How often somebody asked for completions, as the queue's thread does after each sleep.
    looks: u64,
    /// How often somebody began to ask for them.
    entries: u64,
    events: Vec<Arc<OwnedFd>>,
}

impl MemoryImage {
    pub fn new(bytes: usize) -> MemoryImage {
        let state = State {
            bytes: vec![0; bytes],
            ..State::default()
        };
        MemoryImage {
            geometry: Mutex::new(Geometry {
                bytes: bytes as u64,
                sector_bytes: 512,
                physical_sector_bytes: 4096,
                read_only: false,
                discard: Some(4096),
            }),
            state: Arc::new(Mutex::new(state)),
            gate: Arc::default(),
        }
    }

    pub fn with(self, change: impl FnOnce(&mut Geometry)) -> MemoryImage {
        change(&mut lock(&self.geometry));
        self
    }

    pub fn done(&self) -> Vec<(Op, u64)> {
        std::mem::take(&mut lock(&self.state).done)
    }

    pub fn fill(&self, offset: usize, bytes: &[u8]) {
        lock(&self.state).bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        lock(&self.state).bytes[offset..offset + len].to_vec()
    }

    pub fn hold(&self, holding: bool) {
        let mut state = lock(&self.state);
        state.holding = holding;
        if !state.silent {
            for event in &state.events {
                rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
            }
        }
    }

    /// Shows completions as io_uring does.
    pub fn promptly(self) -> MemoryImage {
        lock(&self.state).prompt = true;
        self
    }

    /// Completes what was held without an event, and so late that this many looks miss it: what a queue may see at the end of a silence.
    pub fn complete_unseen(&self, looks: u32) {
        let mut state = lock(&self.state);
        (state.holding, state.unseen) = (false, looks);
    }

    /// Whoever asks for completions waits until this is dropped.
    pub fn close_gate(&self) -> MutexGuard<'_, ()> {
        lock(&self.gate)
    }

    /// How often somebody began to ask for completions.
    pub fn entries(&self) -> u64 {
        lock(&self.state).entries
    }

    /// Whether a queue may complete something without an event.
    pub fn is_silent(&self) -> bool {
        lock(&self.state).silent
    }

    /// Whether this thread carried out the last request.
    pub fn is_served_here(&self) -> bool {
        lock(&self.state).served_by == Some(std::thread::current().id())
    }

    /// How often completions were asked for so far.
    pub fn looks(&self) -> u64 {
        lock(&self.state).looks
    }

    /// The host makes the image shorter than the disk.
    pub fn cut(&self, bytes: usize) {
        lock(&self.state).bytes.truncate(bytes);
    }

    pub fn fail(&self, failing: bool) {
        lock(&self.state).failing = failing;
    }
}

impl Image for MemoryImage {
    fn geometry(&self) -> Geometry {
        *lock(&self.geometry)
    }

    fn queue(&self) -> Result<Box<dyn Queue>, ImageError> {
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let event = Arc::new(event);
        lock(&self.state).events.push(event.clone());
        Ok(Box::new(MemoryQueue {
            state: self.state.clone(),
            gate: self.gate.clone(),
            event,
            waiting: Vec::new(),
        }))
    }

    fn resize(&self, bytes: u64) -> Result<(), ImageError> {
        lock(&self.state).bytes.resize(bytes as usize, 0);
        lock(&self.geometry).bytes = bytes;
        Ok(())
    }

    fn status(&self) -> Status {
        match lock(&self.state).holding {
            true => Status::Held("the host has no room".to_owned()),
            false => Status::Good,
        }
    }
}

struct MemoryQueue {
    state: Arc<Mutex<State>>,
    gate: Arc<Mutex<()>>,
    event: Arc<OwnedFd>,
    waiting: Vec<Request>,
}

impl Queue for MemoryQueue {
    fn submit(&mut self, request: Request) {
        self.waiting.push(request);
    }

    fn flush_submissions(&mut self) {
        let state = lock(&self.state);
        if !self.waiting.is_empty() && !state.silent && !state.holding {
            rustix::io::write(&self.event, &1u64.to_ne_bytes()).unwrap();
        }
    }

    fn completions(&mut self, out: &mut Vec<Completion>) {
        lock(&self.state).entries += 1;
        drop(lock(&self.gate));
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        let mut state = lock(&self.state);
        state.looks += 1;
        if !self.waiting.is_empty() && !state.shows() {
            return;
        }
        // The newest first: answers need not come in the order of the requests.
        while let Some(request) = self.waiting.pop() {
            let result = match state.failing {
                true => Err(IoError::Damaged("the test says so".to_owned())),
                false => state.carry_out(&request),
            };
            out.push(Completion {
                id: request.id,
                result,
            });
        }
    }

    fn peek(&mut self) -> Option<bool> {
        let mut state = lock(&self.state);
        let ready = !self.waiting.is_empty() && state.shows();
        state.prompt.then_some(ready)
    }

    fn silence(&mut self, silent: bool) {
        lock(&self.state).silent = silent;
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl State {
    /// Whether a look sees that requests are done.
    fn shows(&mut self) -> bool {
        if self.holding {
            return false;
        }
        let shows = self.unseen == 0;
        self.unseen = self.unseen.saturating_sub(1);
        shows
    }

    fn carry_out(&mut self, request: &Request) -> Result<(), IoError> {
        let bytes = self.bytes.len() as u64;
        if request.offset + request.bytes > bytes {
            return Err(IoError::Cut { bytes });
        }
        self.served_by = Some(std::thread::current().id());
        self.done.push((request.op, request.offset));
        let mut at = request.offset as usize;
        if request.op == Op::Discard {
            self.bytes[at..at + request.bytes as usize].fill(0);
        }
        for buffer in &request.buffers {
            let part = &mut self.bytes[at..at + buffer.len];
            // SAFETY: the back end vouches for the buffer, which lies in memory of the guest that lives as long as the test.
            unsafe {
                match request.op {
                    Op::Read => buffer.host.copy_from(part.as_ptr(), buffer.len),
                    _ => part.as_mut_ptr().copy_from(buffer.host, buffer.len),
                }
            }
            at += buffer.len;
        }
        Ok(())
    }
}
