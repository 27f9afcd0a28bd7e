//! Carries requests out on threads that block: for hosts without io_uring, and for what a ring cannot do.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;

use crate::error::{IoError, is_full};
use crate::hold::{Hold, RETRY_AFTER};
use crate::types::{Completion, Queue, Request};

/// Threads of one queue at most.
const WORKERS_MAX: usize = 8;
/// A thread without work ends after this time.
const IDLE: Duration = Duration::from_secs(10);

/// What the threads do with a request.
pub(crate) trait Work: Send + Sync + 'static {
    /// Carries one request out. May be called again with the same request if it fails for want of room.
    fn work(&self, request: &Request) -> Result<(), IoError>;
}

/// A descriptor that is readable after [`Event::signal`].
#[derive(Clone)]
pub(crate) struct Event(Arc<OwnedFd>);

impl Event {
    pub(crate) fn new() -> std::io::Result<Event> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Event(Arc::new(fd)))
    }

    pub(crate) fn signal(&self) {
        // Fails only when the counter is full: then it is readable.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn clear(&self) {
        // Fails only when it is not set.
        let _ = rustix::io::read(&*self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

struct Job {
    request: Request,
    held: bool,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Jobs that wait for room, and until when.
    held: VecDeque<(Instant, Job)>,
    done: Vec<Completion>,
    workers: usize,
    idle: usize,
    closing: bool,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    event: Event,
    hold: Arc<Hold>,
    work: Arc<dyn Work>,
}

/// A queue served by threads, which are started when there is work.
pub(crate) struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Threads {
    /// A queue that tells of its completions by `event`.
    pub(crate) fn new(work: Arc<dyn Work>, hold: Arc<Hold>, event: Event) -> Threads {
        Threads {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                wake: Condvar::new(),
                event,
                hold,
                work,
            }),
            workers: Vec::new(),
        }
    }

    /// [`Queue::completions`] without clearing the event.
    pub(crate) fn collect(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.shared.lock().done);
    }
}

impl Queue for Threads {
    fn submit(&mut self, request: Request) {
        let mut state = self.shared.lock();
        state.jobs.push_back(Job {
            request,
            held: false,
        });
        if state.idle >= state.jobs.len() {
            self.shared.wake.notify_one();
            return;
        }
        if state.workers < WORKERS_MAX {
            state.workers += 1;
            drop(state);
            let shared = self.shared.clone();
            let started = thread::Builder::new()
                .name("disk".to_owned())
                .spawn(move || shared.run());
            self.workers.retain(|worker| !worker.is_finished());
            match started {
                Ok(worker) => self.workers.push(worker),
                Err(error) => self.shared.not_started(error),
            }
        }
    }

    fn flush_submissions(&mut self) {}

    fn completions(&mut self, out: &mut Vec<Completion>) {
        self.shared.event.clear();
        self.collect(out);
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        state.jobs.clear();
        self.shared.wake.notify_all();
        drop(state);
        // To their very end, so that none of them is the last to hold the image.
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
        let mut state = self.shared.lock();
        for (_, job) in state.held.drain(..) {
            if job.held {
                self.shared.hold.leave();
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with it")
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        let waited = self.wake.wait_timeout(state, time);
        waited.expect("no thread panics with it").0
    }

    /// The host gave no thread: if none is there to do the work later, it fails now.
    fn not_started(&self, error: std::io::Error) {
        let mut state = self.lock();
        state.workers -= 1;
        if state.workers > 0 {
            return;
        }
        let code = error.raw_os_error().unwrap_or(libc::EAGAIN);
        while let Some(job) = state.jobs.pop_front() {
            state.done.push(Completion {
                id: job.request.id,
                result: Err(IoError::Host(std::io::Error::from_raw_os_error(code))),
            });
        }
        self.event.signal();
    }

    /// Body of a thread.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let due = state.held.front().map(|(when, _)| *when);
            if state.closing {
                break;
            }
            let job = if due.is_some_and(|when| when <= now) {
                state.held.pop_front().map(|(_, job)| job)
            } else {
                state.jobs.pop_front()
            };
            let Some(mut job) = job else {
                let timeout = due.map_or(IDLE, |when| when - now);
                state.idle += 1;
                state = self.wait(state, timeout);
                state.idle -= 1;
                let rested = now.elapsed() >= IDLE;
                if rested && state.jobs.is_empty() && state.held.is_empty() {
                    break;
                }
                continue;
            };
            drop(state);
            let result = self.work.work(&job.request);
            state = self.lock();
            match result {
                Err(IoError::Host(error)) if is_full(&error) => {
                    if !job.held {
                        job.held = true;
                        self.hold.enter();
                    }
                    state.held.push_back((Instant::now() + RETRY_AFTER, job));
                }
                result => {
                    if job.held {
                        self.hold.leave();
                    }
                    let id = job.request.id;
                    state.done.push(Completion { id, result });
                    self.event.signal();
                }
            }
        }
        state.workers -= 1;
    }
}
