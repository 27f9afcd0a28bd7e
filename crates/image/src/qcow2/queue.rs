//! Queues of a qcow2 image: what has its place goes straight to the file, the rest to threads.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::TryLockError;

use super::Qcow2;
use super::meta::Token;
use crate::error::ImageError;
use crate::threads::{Event, Threads};
use crate::types::{Completion, Geometry, Image, Op, Queue, Request, Status};
use crate::uring::{self, End, Ring};

/// An open image with its queues.
pub(crate) struct Qcow2Image(pub(crate) Arc<Qcow2>);

/// A request in the ring.
struct Direct {
    id: u64,
    token: Option<Token>,
}

struct Qcow2Queue {
    image: Arc<Qcow2>,
    /// Gone while the queue is dropped.
    ring: Option<Ring>,
    /// By the id that the ring knows.
    direct: Vec<Option<Direct>>,
    free: Vec<usize>,
    side: Threads,
    event: Event,
    answers: Vec<Completion>,
}

impl Qcow2Queue {
    /// The request for the ring, if all of it has its place in the file.
    fn direct(&mut self, request: &Request) -> Option<(u64, Option<Token>)> {
        let cached = self.ring.as_ref()?.is_cached();
        // Threads say why.
        if request.op == Op::Write && self.image.storage.check_uncut().is_err() {
            return None;
        }
        let mut meta = match self.image.meta.try_lock() {
            Ok(meta) => meta,
            Err(TryLockError::WouldBlock | TryLockError::Poisoned(_)) => return None,
        };
        match request.op {
            Op::Flush if !cached && !self.image.options.read_only && Qcow2::is_clean(&mut meta) => {
                Some((0, None))
            }
            Op::Read | Op::Write => {
                let write = request.op == Op::Write;
                let (host, token) = meta.plan_direct(write, request.offset, request.bytes)?;
                Some((host, Some(token)))
            }
            Op::Flush | Op::Discard => None,
        }
    }
}

impl Queue for Qcow2Queue {
    fn submit(&mut self, mut request: Request) {
        let valid = request.check(&self.image.geometry()).is_ok();
        let place = if valid { self.direct(&request) } else { None };
        let (Some((host, token)), Some(ring)) = (place, self.ring.as_mut()) else {
            // Threads also say what is wrong with a request.
            self.side.submit(request);
            return;
        };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.direct.push(None);
            self.direct.len() - 1
        });
        self.direct[slot] = Some(Direct {
            id: request.id,
            token,
        });
        request.id = slot as u64;
        request.offset = host;
        ring.submit(request);
    }

    fn flush_submissions(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.flush_submissions();
        }
    }

    fn completions(&mut self, out: &mut Vec<Completion>) {
        self.event.clear();
        self.side.collect(out);
        if let Some(ring) = &mut self.ring {
            ring.collect(&mut self.answers);
        }
        if self.answers.is_empty() {
            return;
        }
        let mut meta = self.image.meta();
        for answer in self.answers.drain(..) {
            let slot = answer.id as usize;
            let Some(direct) = self.direct.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            if let Some(token) = direct.token {
                meta.end_io(token);
            }
            out.push(Completion {
                id: direct.id,
                result: answer.result,
            });
        }
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for Qcow2Queue {
    fn drop(&mut self) {
        // It waits for what is under way.
        drop(self.ring.take());
        let mut meta = self.image.meta();
        for direct in self.direct.drain(..).flatten() {
            if let Some(token) = direct.token {
                meta.end_io(token);
            }
        }
    }
}

impl Image for Qcow2Image {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn queue(&self) -> Result<Box<dyn Queue>, ImageError> {
        let image = self.0.clone();
        let event = Event::new().map_err(ImageError::host(&image.path, "make an event for it"))?;
        let hold = image.hold.clone();
        Ok(Box::new(Qcow2Queue {
            ring: uring::start(&image.storage, &hold, &event, End::Zeros),
            side: Threads::new(image.clone(), hold, event.clone()),
            direct: Vec::new(),
            free: Vec::new(),
            answers: Vec::new(),
            event,
            image,
        }))
    }

    fn resize(&self, bytes: u64) -> Result<(), ImageError> {
        self.0.resize(bytes)
    }

    fn status(&self) -> Status {
        self.0.hold.status()
    }
}
