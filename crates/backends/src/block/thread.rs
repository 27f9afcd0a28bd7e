//! Who serves a queue: its own thread, or that of a vCPU.
//!
//! A guest that does one request after the other waits for each. Its vCPU then hands the request to the image itself, and looks for the answer
//! itself while it waits; no other thread wakes up for it. The queue's own thread serves all else: many requests at once, answers that come
//! while the guest works, slow disks.

use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use hospes_ring::Broken;
use hospes_xen::{Attended, Listener};

use super::queue::Serve;
use crate::frame::{ConnectError, Wake};
use crate::lock;

/// Turns that the thread of a vCPU serves a queue for one event: a guest that sends on and on from another vCPU keeps the queue's own thread busy.
const TURNS_MAX: u32 = 4;

/// A running queue. Dropping it stops it.
pub struct QueueThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A queue, for whoever serves it. It is empty before the start and after the end.
pub struct Shared {
    serve: Mutex<Option<Serve>>,
    /// Whether the disk was prompt when the queue was last let go: vCPUs that wait look at this first, and leave the lock to the queue's own thread
    /// where they would not serve the queue.
    prompt: AtomicBool,
    wake: Wake,
    stop: AtomicBool,
    /// What is left at the end is answered with an error: nobody asks for it again.
    abandoned: AtomicBool,
}

impl Shared {
    pub fn new() -> Result<Arc<Shared>, ConnectError> {
        let wake = Wake::new().map_err(|fault| ConnectError::Host(fault.to_string()))?;
        Ok(Arc::new(Shared {
            serve: Mutex::new(None),
            prompt: AtomicBool::new(false),
            wake,
            stop: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        }))
    }

    /// What the guest's events call. Does not keep the queue.
    pub fn listener(self: &Arc<Self>) -> Listener {
        let shared = Arc::downgrade(self);
        Arc::new(move || {
            if let Some(shared) = Weak::upgrade(&shared) {
                shared.event();
            }
        })
    }

    /// The guest sent an event.
    fn event(&self) {
        // Whoever has the lock may have looked at the ring for the last time: the thread looks again.
        let served = self.prompt.load(Relaxed)
            && self.help(|serve| {
                let served = serve.takes_one_at_a_time() && self.turns(serve);
                if served {
                    serve.publish();
                }
                served
            });
        if !served {
            self.wake.call();
        }
    }

    /// Has a vCPU's thread serve the queue where nobody does; false where somebody else has to.
    fn help(&self, work: impl FnOnce(&mut Serve) -> bool) -> bool {
        let Ok(mut serve) = self.serve.try_lock() else {
            return false;
        };
        match serve.as_mut() {
            Some(serve) if !self.stop.load(SeqCst) => {
                let done = work(serve);
                self.prompt.store(serve.is_prompt(), Relaxed);
                done
            }
            _ => false,
        }
    }

    /// Serves the queue for a few turns; false where there is more.
    fn turns(&self, serve: &mut Serve) -> bool {
        serve.silence(false);
        for _ in 0..TURNS_MAX {
            match serve.turn() {
                Ok(true) => {}
                Ok(false) => return true,
                Err(broken) => {
                    serve.breaks(broken);
                    return false;
                }
            }
        }
        false
    }

    /// Has the image tell the queue's own thread of completions again.
    fn end_silence(&self, serve: &mut Serve) {
        if !serve.is_silent() {
            return;
        }
        // Answers that wait for others are shown by the thread, which also looks after what may have been completed unseen: it may be asleep without a limit.
        if !self.turns(serve) || serve.is_gathering() || serve.is_doubtful() {
            self.wake.call();
        }
    }

    /// Body of the queue's thread: serves the queue until it is stopped and nothing is in flight, or the guest breaks the ring.
    fn run(&self, event: &OwnedFd) {
        // Sleeps would else last up to 50 us longer than asked for.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1000));
        let broken = self.serve(event);
        self.stop.store(true, SeqCst);
        // Requests that the image cannot carry out now are given up with its queue.
        while lock(&self.serve).as_mut().is_some_and(Serve::winds_up) {
            self.wake
                .sleep(&[event.as_fd()], Some(super::queue::LOOK_AT_STATUS));
        }
        // From here on no vCPU has it.
        let Some(mut serve) = lock(&self.serve).take() else {
            return;
        };
        match broken {
            Ok(()) if self.abandoned.load(SeqCst) => {
                serve.gives_up(|time| self.wake.sleep(&[], Some(time)))
            }
            Ok(()) => serve.publish(),
            Err(broken) => serve.alarm(&broken),
        }
    }

    fn serve(&self, event: &OwnedFd) -> Result<(), Broken> {
        loop {
            let most = {
                let mut serve = lock(&self.serve);
                let Some(serve) = serve.as_mut() else {
                    return Ok(());
                };
                serve.wakes_up()?;
                let mut busy = true;
                while busy && !self.stop.load(SeqCst) {
                    busy = serve.turn()?;
                }
                self.prompt.store(serve.is_prompt(), Relaxed);
                serve.sleep_most()
            };
            if self.stop.load(SeqCst) {
                return Ok(());
            }
            self.wake.sleep(&[event.as_fd()], most);
        }
    }
}

impl Attended for Shared {
    fn attend(&self) -> bool {
        // Whoever serves it right now may do so for long; staying awake for that would take the CPU from them.
        self.prompt.load(Relaxed)
            && self.help(|serve| {
                let awaited = serve.is_expected();
                if awaited {
                    serve.silence(true);
                }
                // Answers that waited for others while the vCPU worked need not wait any longer.
                if (awaited || serve.is_gathering())
                    && let Err(broken) = serve.look()
                {
                    serve.breaks(broken);
                    self.wake.call();
                }
                let expected = serve.is_expected();
                if !expected {
                    self.end_silence(serve);
                }
                expected
            })
    }

    fn leave(&self, in_vain: bool) {
        // Whoever serves it right now ends the silence: the queue's own thread and events do, and vCPUs that look when they leave.
        self.help(|serve| {
            if serve.is_silent() {
                serve.waited(in_vain);
                self.end_silence(serve);
            }
            true
        });
    }
}

impl QueueThread {
    /// Starts a queue whose events `shared` hears of.
    pub fn start(
        number: usize,
        shared: Arc<Shared>,
        serve: Serve,
    ) -> Result<QueueThread, ConnectError> {
        let host = |fault: std::io::Error| ConnectError::Host(fault.to_string());
        let event = serve.event().map_err(host)?;
        serve
            .xen()
            .add_attended(Arc::downgrade(&shared) as Weak<dyn Attended>);
        *lock(&shared.serve) = Some(serve);
        let body = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("disk-queue-{number}"))
            .spawn(move || body.run(&event));
        match thread {
            Ok(thread) => Ok(QueueThread {
                shared,
                thread: Some(thread),
            }),
            Err(fault) => {
                lock(&shared.serve).take();
                Err(host(fault))
            }
        }
    }

    /// Has the queue answer what is left when it stops: the guest does not come back for it.
    pub fn abandon(&self) {
        self.shared.abandoned.store(true, SeqCst);
    }

    /// Whether there is nothing to do. So it stays where the guest sends nothing.
    pub fn is_idle(&self) -> bool {
        lock(&self.shared.serve).as_ref().is_none_or(Serve::is_idle)
    }

    /// Has the queue take no more requests.
    pub fn stop(&self) {
        self.shared.stop.store(true, SeqCst);
        self.shared.wake.call();
    }
}

impl Drop for QueueThread {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
