//! An image in memory that records what it is asked, and can be told to fail or to wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use hospes_image::{Completion, Geometry, Image, ImageError, IoError, Op, Queue, Request, Status};
use rustix::event::{EventfdFlags, eventfd};

use crate::lock;

pub struct MemoryImage {
    pub geometry: Mutex<Geometry>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Operations in the order they were carried out, with their offsets.
    done: Vec<(Op, u64)>,
    /// Requests are kept until this is over.
    holding: bool,
    failing: bool,
    /// How often somebody was about to sleep until its event.
    sleeps: AtomicU64,
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
        for event in &state.events {
            rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// How often queues went to sleep so far.
    pub fn sleeps(&self) -> u64 {
        lock(&self.state).sleeps.load(SeqCst)
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
    event: Arc<OwnedFd>,
    waiting: Vec<Request>,
}

impl Queue for MemoryQueue {
    fn submit(&mut self, request: Request) {
        self.waiting.push(request);
    }

    fn flush_submissions(&mut self) {
        if !self.waiting.is_empty() {
            rustix::io::write(&self.event, &1u64.to_ne_bytes()).unwrap();
        }
    }

    fn completions(&mut self, out: &mut Vec<Completion>) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        let mut state = lock(&self.state);
        if state.holding {
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

    fn event_fd(&self) -> BorrowedFd<'_> {
        lock(&self.state).sleeps.fetch_add(1, SeqCst);
        self.event.as_fd()
    }
}

impl State {
    fn carry_out(&mut self, request: &Request) -> Result<(), IoError> {
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
