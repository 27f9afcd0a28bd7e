//! The thread of one queue: takes requests, has the image carry them out, answers.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hospes_image::{Completion, Geometry, Image, Op, Queue, Request, Status};
use hospes_ring::{BackRing, Broken};
use hospes_units::Gpa;
use hospes_xen::{HostPort, Xen};
use hospes_xen_abi::blkif;

use super::parse::{Refusal, Work, answered_operation, parse};
use super::stats::Stats;
use crate::frame::{Alarm, ConnectError, Log, RingPages, Wake};

/// How often a queue that waits for the image looks whether the image makes progress at all.
const LOOK_AT_STATUS: Duration = Duration::from_secs(2);

/// How long responses wait for others while the guest works: an interrupt costs it more than the data of a small request.
const GATHER: Duration = Duration::from_micros(50);
/// How often it is asked meanwhile whether it still does.
const GATHER_LOOK: Duration = Duration::from_micros(15);

type Ring = BackRing<RingPages, blkif::Request, blkif::Response>;

/// A running queue. Dropping it stops it.
pub struct QueueThread {
    wake: Arc<Wake>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl QueueThread {
    pub fn start(number: usize, mut serve: Serve) -> Result<QueueThread, ConnectError> {
        let (wake, stop) = (Arc::clone(&serve.wake), Arc::clone(&serve.stop));
        let thread = std::thread::Builder::new()
            .name(format!("disk-queue-{number}"))
            .spawn(move || serve.run())
            .map_err(|fault| ConnectError::Host(fault.to_string()))?;
        Ok(QueueThread {
            wake,
            stop,
            thread: Some(thread),
        })
    }

    /// Has the queue take no more requests.
    pub fn stop(&self) {
        self.stop.store(true, SeqCst);
        self.wake.call();
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

/// A request of the guest that the image works on.
struct Open {
    id: u64,
    operation: u8,
    op: Op,
    bytes: u64,
    /// Steps still to do, the next one last.
    rest: Vec<Request>,
    written: Vec<(Gpa, u64)>,
    barrier: bool,
}

/// One queue.
pub struct Serve {
    ring: Ring,
    port: HostPort,
    wake: Arc<Wake>,
    stop: Arc<AtomicBool>,
    queue: Box<dyn Queue>,
    image: Arc<dyn Image>,
    xen: Arc<Xen>,
    stats: Arc<Stats>,
    alarm: Alarm,
    log: Log,
    /// By the id of the image's requests.
    open: Vec<Option<Open>>,
    free: Vec<usize>,
    /// A barrier that waits for everything before it.
    parked: Option<(u64, u8, Work)>,
    /// A barrier is being carried out: nothing behind it starts.
    fenced: bool,
    held: bool,
    /// Since when responses wait for others.
    gathering: Option<Instant>,
}

impl Serve {
    #[expect(
        clippy::too_many_arguments,
        reason = "a queue is where all of these meet, once"
    )]
    pub fn new(
        ring: Ring,
        port: HostPort,
        wake: Arc<Wake>,
        queue: Box<dyn Queue>,
        image: Arc<dyn Image>,
        xen: Arc<Xen>,
        stats: Arc<Stats>,
        alarm: Alarm,
        log: Log,
    ) -> Serve {
        let slots = ring.slots() as usize;
        Serve {
            ring,
            port,
            wake,
            stop: Arc::new(AtomicBool::new(false)),
            queue,
            image,
            xen,
            stats,
            alarm,
            log,
            open: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
            parked: None,
            fenced: false,
            held: false,
            gathering: None,
        }
    }

    /// Serves the queue until it is stopped and nothing is in flight, or the guest breaks the ring.
    fn run(&mut self) {
        // Sleeps would else last up to 50 us longer than asked for.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1000));
        let broken = self.serve();
        // Requests that the image cannot carry out now are given up with its queue.
        while self.in_flight() > 0 && self.image.status() == Status::Good {
            self.complete();
            self.queue.flush_submissions();
            if self.in_flight() > 0 {
                self.wake
                    .sleep(&[self.queue.event_fd()], Some(LOOK_AT_STATUS));
            }
        }
        match broken {
            Ok(()) => self.publish(),
            Err(broken) => (self.alarm)(broken.to_string()),
        }
    }

    fn serve(&mut self) -> Result<(), Broken> {
        let mut completions = Vec::new();
        loop {
            if self.stop.load(SeqCst) {
                return Ok(());
            }
            let taken = self.take_requests()?;
            self.queue.flush_submissions();
            let completed = self.complete_with(&mut completions);
            if self.publish_is_due() {
                self.publish();
            }
            if taken || completed {
                continue;
            }
            let more = !self.blocked() && self.ring.wait_for(1)?;
            if !more {
                self.sleep();
            }
        }
    }

    /// Requests the image works on.
    fn in_flight(&self) -> usize {
        self.open.len() - self.free.len()
    }

    /// Whether the guest is to see the responses written so far. While it works they wait for others; one that has nothing else to do gets
    /// them as soon as they are a quarter of what it has open, so at once where it waits for each. None waits longer than [`GATHER`].
    fn publish_is_due(&mut self) -> bool {
        let ready = self.ring.unpublished();
        if ready == 0 || ready * 2 >= self.ring.slots() {
            return ready > 0;
        }
        let quarter = ready * 4 >= self.ring.open() + ready;
        quarter && self.port.target_is_idle()
            || self.gathering.get_or_insert_with(Instant::now).elapsed() >= GATHER
    }

    /// A barrier keeps requests in the ring.
    fn blocked(&self) -> bool {
        self.fenced || self.parked.is_some()
    }

    fn sleep(&mut self) {
        let waiting = self.in_flight() > 0;
        let most = match self.gathering {
            Some(since) => Some(GATHER.saturating_sub(since.elapsed()).min(GATHER_LOOK)),
            None => waiting.then_some(LOOK_AT_STATUS),
        };
        self.wake.sleep(&[self.queue.event_fd()], most);
        if waiting {
            self.look_at_status();
        }
    }

    /// Says once when requests start to wait for the host, and once when they go on.
    fn look_at_status(&mut self) {
        match self.image.status() {
            Status::Held(why) if !self.held => {
                self.held = true;
                (self.log)(&format!("Disk requests wait: {why}"));
            }
            Status::Good if self.held => {
                self.held = false;
                (self.log)("Disk requests go on");
            }
            _ => {}
        }
    }

    fn take_requests(&mut self) -> Result<bool, Broken> {
        let mut any = false;
        let mut geometry = None;
        while !self.blocked() {
            let Some(request) = self.ring.take()? else {
                break;
            };
            any = true;
            let geometry = geometry.get_or_insert_with(|| self.image.geometry());
            self.start(&request, geometry);
        }
        Ok(any)
    }

    fn start(&mut self, request: &blkif::Request, geometry: &Geometry) {
        let (id, operation) = (request.id, answered_operation(request));
        match parse(request, geometry, &*self.xen) {
            Ok(work) if work.barrier && self.in_flight() > 0 => {
                self.parked = Some((id, operation, work));
            }
            Ok(work) => self.submit(id, operation, work),
            Err(refusal) => self.refuse(id, operation, refusal),
        }
    }

    fn refuse(&mut self, id: u64, operation: u8, refusal: Refusal) {
        self.failed(&format!("the guest's request is wrong: {refusal}"));
        self.answer(id, operation, refusal.status());
    }

    /// Counts an error; a guest that makes many of them does not fill the log.
    fn failed(&self, why: &str) {
        let count = self.stats.failed();
        if count.is_power_of_two() {
            (self.log)(&format!(
                "Disk requests answered with an error so far: {count}; the last because {why}"
            ));
        }
    }

    fn submit(&mut self, id: u64, operation: u8, work: Work) {
        let mut rest = work.steps;
        rest.reverse();
        let transfer = rest.iter().find(|step| step.op != Op::Flush);
        let (op, bytes) = transfer.map_or((Op::Flush, 0), |step| (step.op, step.bytes));
        let (Some(slot), Some(first)) = (self.free.pop(), rest.pop()) else {
            // The ring hands out no more requests than there are slots, and no work is empty.
            self.answer(id, operation, blkif::STATUS_ERROR);
            return;
        };
        self.fenced = work.barrier;
        self.open[slot] = Some(Open {
            id,
            operation,
            op,
            bytes,
            rest,
            written: work.written,
            barrier: work.barrier,
        });
        self.queue.submit(Request {
            id: slot as u64,
            ..first
        });
    }

    fn complete(&mut self) {
        self.complete_with(&mut Vec::new());
    }

    /// Answers what the image has finished; says whether there was anything.
    fn complete_with(&mut self, completions: &mut Vec<Completion>) -> bool {
        if self.in_flight() == 0 {
            return false;
        }
        self.queue.completions(completions);
        let any = !completions.is_empty();
        for completion in completions.drain(..) {
            self.completed(completion);
        }
        if self.in_flight() == 0
            && let Some((id, operation, work)) = self.parked.take()
        {
            self.submit(id, operation, work);
            self.queue.flush_submissions();
        }
        any
    }

    fn completed(&mut self, completion: Completion) {
        let slot = completion.id as usize;
        let Some(mut open) = self.open.get_mut(slot).and_then(Option::take) else {
            return;
        };
        if completion.result.is_ok()
            && let Some(next) = open.rest.pop()
        {
            self.open[slot] = Some(open);
            self.queue.submit(Request {
                id: slot as u64,
                ..next
            });
            self.queue.flush_submissions();
            return;
        }
        self.free.push(slot);
        if open.barrier {
            self.fenced = false;
        }
        // Even a read that failed may have written a part.
        for (gpa, len) in &open.written {
            self.xen.mark_written(*gpa, *len);
        }
        match completion.result {
            Ok(()) => {
                self.stats.done(open.op, open.bytes);
                self.answer(open.id, open.operation, blkif::STATUS_OKAY);
            }
            Err(fault) => {
                self.failed(&fault.to_string());
                self.answer(open.id, open.operation, blkif::STATUS_ERROR);
            }
        }
    }

    fn answer(&mut self, id: u64, operation: u8, status: i16) {
        self.ring.answer(&blkif::Response {
            id,
            operation,
            status,
            ..Default::default()
        });
    }

    fn publish(&mut self) {
        self.gathering = None;
        if self.ring.publish() {
            self.stats.event();
            self.port.notify();
        }
    }
}
