//! One queue: takes requests, has the image carry them out, answers.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hospes_image::{Completion, Geometry, Image, IoError, Op, Queue, Request, Status};
use hospes_ring::{BackRing, Broken};
use hospes_units::Gpa;
use hospes_xen::{HostPort, Xen};
use hospes_xen_abi::blkif;

use super::parse::{Refusal, Work, answered_operation, parse};
use super::stats::Stats;
use crate::frame::{Alarm, Log, RingPages};

/// How often a queue that waits for the image looks whether the image makes progress at all.
pub const LOOK_AT_STATUS: Duration = Duration::from_secs(2);
/// When a guest has sent nothing for so long, it has sent all to a disk that it lets go of.
const LAST_REQUEST: Duration = Duration::from_millis(50);
/// Whatever it sends, it is left alone after that.
const LAST_REQUESTS: Duration = Duration::from_secs(5);
/// Time between two looks for such requests.
const LOOK_FOR_LAST: Duration = Duration::from_millis(2);

/// How soon it looks again after a silence: a completion of that time may show a moment after the silence ended, and had no event.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// How long responses wait for others while the guest works: an interrupt costs it more than the data of a small request.
const GATHER: Duration = Duration::from_micros(50);
/// How often it is asked meanwhile whether it still does.
const GATHER_LOOK: Duration = Duration::from_micros(15);

/// A disk whose requests take no longer than this answers promptly: a vCPU may stay awake for it.
const PROMPT: Duration = Duration::from_micros(400);

/// So many prompt answers in a row have to find the guest at work before its requests are left to the queue's own thread: one that waits for each may still be
/// on its way there when a fast disk has answered.
pub const WORKS: u32 = 4;

/// What a slow answer counts for among these: a fast disk has one now and then, but hardly two that follow each other.
const SLOW: u32 = 2;

/// Where the image works on more than this, the queue's own thread does better beside the guest.
const FEW: usize = 2;

type Ring = BackRing<RingPages, blkif::Request, blkif::Response>;

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
    since: Instant,
}

/// One queue.
pub struct Serve {
    ring: Ring,
    port: HostPort,
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
    completions: Vec<Completion>,
    /// The event is to be cleared: it may be what ended a sleep.
    woken: bool,
    /// The image sets no event, as a vCPU looks.
    silent: bool,
    /// The image worked on something when a silence ended, and the queue's own thread has not slept since: one more look is due.
    doubtful: bool,
    /// Above 0 where reads and writes are answered promptly, and the guest does one after the other: [`WORKS`] where it had nothing to do meanwhile, one
    /// less each time it worked, [`SLOW`] less for an answer that took long.
    prompt: u32,
    /// Reads and writes among the requests that the image works on.
    transfers: usize,
    /// A vCPU has stayed awake for one of them for as long as any does.
    in_vain: bool,
    /// What was found where only a vCPU's thread could hear of it.
    broken: Option<Broken>,
}

impl Serve {
    #[expect(
        clippy::too_many_arguments,
        reason = "a queue is where all of these meet, once"
    )]
    pub fn new(
        ring: Ring,
        port: HostPort,
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
            completions: Vec::new(),
            woken: true,
            silent: false,
            doubtful: false,
            prompt: 0,
            transfers: 0,
            in_vain: false,
            broken: None,
        }
    }

    /// A descriptor of its own for the image's event.
    pub fn event(&self) -> std::io::Result<OwnedFd> {
        self.queue.event_fd().try_clone_to_owned()
    }

    pub fn xen(&self) -> &Arc<Xen> {
        &self.xen
    }

    /// Does once what there is to do; false where there is nothing, and the guest sends an event for its next request.
    pub fn turn(&mut self) -> Result<bool, Broken> {
        let taken = self.take_requests()?;
        self.queue.flush_submissions();
        let completed = self.complete();
        if self.publish_is_due() {
            self.publish();
        }
        if taken || completed {
            return Ok(true);
        }
        Ok(!self.blocked() && self.ring.wait_for(1)?)
    }

    /// A turn where the image has completed something.
    pub fn look(&mut self) -> Result<(), Broken> {
        if self.queue.peek() == Some(true) || self.gathering.is_some() {
            self.turn()?;
        }
        Ok(())
    }

    /// Whether the last read or write was answered promptly, to a guest that waited.
    pub fn is_prompt(&self) -> bool {
        self.prompt > 0
    }

    /// Whether a request is done soonest by who sends it: the image answers promptly, and shows it without a call of the host.
    pub fn takes_one_at_a_time(&mut self) -> bool {
        self.is_prompt() && self.in_flight() == 0 && self.queue.peek().is_some()
    }

    /// Whether it pays to stay awake for the next answer.
    pub fn is_expected(&mut self) -> bool {
        let few = (1..=FEW).contains(&self.transfers);
        self.is_prompt() && few && !self.in_vain && self.queue.peek().is_some()
    }

    /// Has the image tell of completions by its event, or not. Whoever ends the silence takes a turn after that, and calls the queue's own thread
    /// where [`Serve::is_doubtful`] says so then.
    pub fn silence(&mut self, silent: bool) {
        if std::mem::replace(&mut self.silent, silent) != silent {
            self.queue.silence(silent);
            self.doubtful = !silent && self.in_flight() > 0;
        }
    }

    pub fn is_silent(&self) -> bool {
        self.silent
    }

    /// Whether something may have been completed during a silence that neither showed when it ended nor set the event.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful && self.in_flight() > 0
    }

    /// Whether answers wait for others.
    pub fn is_gathering(&self) -> bool {
        self.gathering.is_some()
    }

    /// A vCPU stayed awake for the image; if `in_vain`, nobody does again before it has completed what it works on.
    pub fn waited(&mut self, in_vain: bool) {
        self.in_vain |= in_vain;
    }

    /// Keeps for the queue's own thread that the guest broke the ring.
    pub fn breaks(&mut self, broken: Broken) {
        self.broken = Some(broken);
    }

    /// Begins a turn of the queue's own thread after it slept.
    pub fn wakes_up(&mut self) -> Result<(), Broken> {
        self.silence(false);
        self.woken = true;
        if self.in_flight() > 0 {
            self.look_at_status();
        }
        self.broken.take().map_or(Ok(()), Err)
    }

    /// How long the queue's own thread may sleep without an event.
    pub fn sleep_most(&mut self) -> Option<Duration> {
        if let Some(since) = self.gathering {
            return Some(GATHER.saturating_sub(since.elapsed()).min(GATHER_LOOK));
        }
        let doubtful = std::mem::take(&mut self.doubtful);
        (self.in_flight() > 0).then_some(if doubtful { LOOK_AGAIN } else { LOOK_AT_STATUS })
    }

    /// Ends what is in flight, without new requests; whether there is more that will end.
    pub fn winds_up(&mut self) -> bool {
        self.silence(false);
        self.woken = true;
        self.complete();
        self.queue.flush_submissions();
        self.in_flight() > 0 && self.image.status() == Status::Good
    }

    /// Ends all that is left with errors, whatever the image has made of it by then, until the guest sends nothing more: what found no place in the ring comes when
    /// the first of them are answered. `sleep` is for the time between two looks.
    pub fn gives_up(self, sleep: impl Fn(Duration)) {
        let Serve {
            mut ring,
            port,
            queue,
            xen,
            stats,
            open,
            parked,
            ..
        } = self;
        // From here on the image touches neither the guest's memory nor what it was to write.
        drop(queue);
        for (gpa, len) in open.iter().flatten().flat_map(|open| &open.written) {
            xen.mark_written(*gpa, *len);
        }
        let open = open.iter().flatten().map(|open| (open.id, open.operation));
        let parked = parked.map(|(id, operation, _)| (id, operation));
        let mut left: Vec<_> = open.chain(parked).collect();
        let begun = Instant::now();
        let mut answered = begun;
        while answered.elapsed() < LAST_REQUEST && begun.elapsed() < LAST_REQUESTS {
            left.extend((0..ring.slots()).map_while(|_| {
                let request = ring.take().ok()??;
                Some((request.id, answered_operation(&request)))
            }));
            if !left.is_empty() {
                answered = Instant::now();
            }
            for (id, operation) in left.drain(..) {
                ring.answer(&response(id, operation, blkif::STATUS_ERROR));
            }
            if ring.publish() {
                stats.event();
                port.notify();
            }
            sleep(LOOK_FOR_LAST);
        }
    }

    /// Has the device closed.
    pub fn alarm(&self, broken: &Broken) {
        (self.alarm)(broken.to_string());
    }

    /// Whether all requests are answered, and the guest sees that.
    pub fn is_idle(&self) -> bool {
        let answered = self.in_flight() == 0 && self.parked.is_none();
        // A broken ring has no more requests that are carried out.
        answered && self.ring.unpublished() == 0 && self.ring.waiting().unwrap_or(0) == 0
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
        // A guest may put more where answers stand that it has not been told of: others have their turn all the same.
        for _ in 0..self.ring.slots() {
            if self.blocked() {
                break;
            }
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
        self.failed(&format!("the guest's request is wrong: {refusal}"), false);
        self.answer(id, operation, refusal.status());
    }

    /// Counts an error; a guest that makes many of them does not fill the log, and `told` is in it in any case.
    fn failed(&self, why: &str, told: bool) {
        let count = self.stats.failed();
        if told || count.is_power_of_two() {
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
            since: Instant::now(),
        });
        self.transfers += usize::from(is_transfer(op));
        self.queue.submit(Request {
            id: slot as u64,
            ..first
        });
    }

    /// Answers what the image has finished; says whether there was anything.
    fn complete(&mut self) -> bool {
        let woken = std::mem::take(&mut self.woken);
        // After a sleep the event has to be cleared even where somebody else has seen the last completion.
        if !woken && (self.in_flight() == 0 || self.queue.peek() == Some(false)) {
            return false;
        }
        let mut completions = std::mem::take(&mut self.completions);
        self.queue.completions(&mut completions);
        let any = !completions.is_empty();
        for completion in completions.drain(..) {
            self.completed(completion);
        }
        self.completions = completions;
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
        if is_transfer(open.op) {
            self.transfers -= 1;
            self.in_vain = false;
            // With more open in the guest it works on while the image does.
            let alone = self.in_flight() == 0 && self.ring.unpublished() == 0;
            self.prompt = match alone && open.since.elapsed() < PROMPT {
                true if self.port.target_is_idle() => WORKS,
                true => self.prompt.saturating_sub(1),
                false => self.prompt.saturating_sub(SLOW),
            };
        }
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
                let heard_first = matches!(fault, IoError::Cut { .. }) && self.stats.cut();
                self.failed(&fault.to_string(), heard_first);
                self.answer(open.id, open.operation, blkif::STATUS_ERROR);
            }
        }
    }

    fn answer(&mut self, id: u64, operation: u8, status: i16) {
        self.ring.answer(&response(id, operation, status));
    }

    /// Shows the guest the responses written so far.
    pub fn publish(&mut self) {
        self.gathering = None;
        if self.ring.publish() {
            self.stats.event();
            self.port.notify();
        }
    }
}

fn response(id: u64, operation: u8, status: i16) -> blkif::Response {
    blkif::Response {
        id,
        operation,
        status,
        ..Default::default()
    }
}

fn is_transfer(op: Op) -> bool {
    matches!(op, Op::Read | Op::Write)
}
