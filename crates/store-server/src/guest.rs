//! A guest's connection to the store process, as the guest's ring uses it.
//!
//! The guest's requests are taken apart and passed on one at a time, under numbers of their own: when the connection breaks, the one that
//! was not answered is repeated with its number, by which the store process knows whether it was carried out. Everything the guest has
//! sent waits meanwhile, and the guest notices nothing.

use std::collections::{BTreeSet, VecDeque};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use hospes_store::wire::{self, kind};
use hospes_store::{DomainEntry, Error, GuestLink, Outbox, ProtocolError, Quota, Request, Waker};
use hospes_units::DomId;

use crate::bell::{Bell, connect, use_stream, wait_for};
use crate::place::Connector;
use crate::protocol::{self, Ended, GUEST_KIND_MAX, HELLO, Hello, RESET, SEEN};

/// The guest's end.
pub struct Guest {
    shared: Arc<Shared>,
}

struct Shared {
    connector: Arc<dyn Connector>,
    session: u64,
    domid: DomId,
    uuid: String,
    name: String,
    waker: Waker,
    bell: Bell,
    state: Mutex<State>,
    /// The first connection stands, or cannot be made.
    opened: Condvar,
}

#[derive(Default)]
struct State {
    opened: Option<Result<(), Error>>,
    ended: bool,
    /// Half a request.
    input: Vec<u8>,
    /// Requests that were not passed on yet.
    queue: VecDeque<Request>,
    under_way: Option<UnderWay>,
    next_request: u32,
    outbox: Outbox,
    /// Numbers of the events in the outbox.
    event_numbers: VecDeque<u32>,
    received: Option<u32>,
    delivered: Option<u32>,
    /// The guest's open transactions.
    transactions: BTreeSet<u32>,
    /// Requests for a reset that are queued or under way: until they are answered whatever comes is for the guest's former life.
    resets: usize,
}

struct UnderWay {
    number: u32,
    /// As the guest sent it.
    request: Request,
    sent: bool,
    /// The guest has forgotten it.
    is_stale: bool,
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    /// Makes a domain known to the store process and opens its guest's connection.
    pub fn open(
        connector: &Arc<dyn Connector>,
        entry: &DomainEntry,
        waker: Waker,
    ) -> Result<Guest, Error> {
        let mut session = [0; 8];
        rustix::rand::getrandom(&mut session, rustix::rand::GetRandomFlags::empty())
            .map_err(|_| Error::Unreachable)?;
        let shared = Arc::new(Shared {
            connector: Arc::clone(connector),
            session: u64::from_ne_bytes(session),
            domid: entry.domid,
            uuid: entry.uuid.clone(),
            name: entry.name.clone(),
            waker,
            bell: Bell::new().map_err(|_| Error::Unreachable)?,
            state: Mutex::default(),
            opened: Condvar::new(),
        });
        let guest = Guest {
            shared: Arc::clone(&shared),
        };
        std::thread::Builder::new()
            .name("store-guest".to_owned())
            .spawn(move || converse(&shared))
            .map_err(|_| Error::Unreachable)?;
        guest.wait_opened()?;
        Ok(guest)
    }

    pub fn session(&self) -> u64 {
        self.shared.session
    }

    /// What ends the connection for good.
    pub fn ender(&self) -> impl FnOnce() + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.end()
    }

    fn wait_opened(&self) -> Result<(), Error> {
        let shared = &*self.shared;
        let is_hopeless = |trouble| trouble == Error::OtherVersion;
        wait_for(
            &shared.state,
            &shared.opened,
            &*shared.connector,
            is_hopeless,
            |state| state.opened,
        )?
    }
}

impl GuestLink for Guest {
    fn input(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        let mut state = lock(&self.shared);
        state.input.extend(bytes);
        let mut any = false;
        loop {
            match wire::decode(&mut state.input) {
                Ok(Some(mut request)) => {
                    // Messages beyond Xen's are not the guest's to send.
                    request.kind = request.kind.min(GUEST_KIND_MAX);
                    state.queue.push_back(request);
                }
                Ok(None) => break,
                Err(error) => return Err(error),
            }
            any = true;
        }
        drop(state);
        if any {
            self.shared.bell.ring();
        }
        Ok(())
    }

    fn output(&mut self, buf: &mut [u8]) -> usize {
        let mut state = lock(&self.shared);
        let (count, events) = state.outbox.fetch(buf);
        if events > 0 {
            let delivered = state.event_numbers.drain(..events).next_back();
            state.delivered = delivered.or(state.delivered);
            drop(state);
            self.shared.bell.ring();
        }
        count
    }

    fn accepts_input(&mut self) -> bool {
        let state = lock(&self.shared);
        let waiting = state.queue.len() + usize::from(state.under_way.is_some());
        waiting + state.outbox.replies() < Quota::default().outstanding
    }

    fn reset(&mut self) {
        let mut state = lock(&self.shared);
        state.input.clear();
        state.queue.clear();
        state.outbox = Outbox::default();
        let unread = state.event_numbers.pop_back();
        state.event_numbers.clear();
        state.delivered = unread.or(state.delivered);
        state.transactions.clear();
        if let Some(under_way) = &mut state.under_way {
            under_way.is_stale = true;
        }
        // One that waits in the queue has just been dropped.
        state.resets = usize::from(state.is_resetting()) + 1;
        state.queue.push_back(Request {
            kind: RESET,
            id: 0,
            transaction: 0,
            payload: b"\0".to_vec(),
        });
        drop(state);
        self.shared.bell.ring();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Shared {
    fn end(&self) {
        lock(self).ended = true;
        self.bell.ring();
    }
}

impl State {
    fn is_resetting(&self) -> bool {
        self.under_way
            .as_ref()
            .is_some_and(|u| u.request.kind == RESET)
    }

    fn hello(&mut self, shared: &Shared) -> Vec<u8> {
        if let Some(under_way) = &mut self.under_way {
            under_way.sent = false;
        }
        Hello {
            session: shared.session,
            domid: shared.domid,
            uuid: shared.uuid.clone(),
            name: shared.name.clone(),
            seen: self.received,
            transactions: self.transactions.iter().copied().collect(),
        }
        .encode()
    }

    /// What is to be sent now. `acknowledged` is the last event that the store process was told of.
    fn sendable(&mut self, acknowledged: &mut Option<u32>) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.delivered != *acknowledged
            && let Some(number) = self.delivered
        {
            bytes = wire::encode(SEEN, number, 0, &[]);
            *acknowledged = self.delivered;
        }
        if self.under_way.is_none()
            && let Some(request) = self.queue.pop_front()
        {
            self.next_request = self.next_request.wrapping_add(1);
            self.under_way = Some(UnderWay {
                number: self.next_request,
                request,
                sent: false,
                is_stale: false,
            });
        }
        if let Some(u) = &mut self.under_way
            && !std::mem::replace(&mut u.sent, true)
        {
            let (transaction, payload) = (u.request.transaction, &u.request.payload);
            bytes.extend(wire::encode(u.request.kind, u.number, transaction, payload));
        }
        bytes
    }

    /// Takes a message of the store process; whether the guest has something to fetch now.
    fn take(&mut self, message: wire::Request) -> bool {
        if message.kind == kind::WATCH_EVENT {
            return self.take_event(message);
        }
        let under_way = self.under_way.take_if(|u| u.number == message.id);
        let Some(u) = under_way else {
            return false;
        };
        if u.request.kind == RESET {
            self.resets = self.resets.saturating_sub(1);
            return false;
        }
        if u.is_stale {
            return false;
        }
        self.note_transaction(&u.request, &message);
        let transaction = message.transaction;
        let bytes = wire::encode(message.kind, u.request.id, transaction, &message.payload);
        self.outbox.reply(bytes);
        true
    }

    fn take_event(&mut self, message: wire::Request) -> bool {
        self.received = Some(message.id);
        if self.resets > 0 {
            self.delivered = self.received;
            return false;
        }
        let bytes = wire::encode(kind::WATCH_EVENT, 0, 0, &message.payload);
        let queued = self.outbox.event(bytes);
        match self.event_numbers.back_mut() {
            // It will have been delivered when those before it have.
            Some(last) if !queued => *last = message.id,
            _ => self.event_numbers.push_back(message.id),
        }
        queued
    }

    fn note_transaction(&mut self, request: &Request, answer: &wire::Request) {
        let failed = answer.kind == kind::ERROR;
        if request.kind == kind::TRANSACTION_START && !failed {
            let strings = wire::strings(&answer.payload);
            let id: Option<u32> = strings.and_then(|s| s.first()?.parse().ok());
            self.transactions.extend(id);
        }
        match protocol::ended(request, failed, &answer.payload) {
            Ended::Nothing => {}
            Ended::Transaction(id) => {
                self.transactions.remove(&id);
            }
            Ended::Transactions => self.transactions.clear(),
        }
    }
}

/// The thread.
fn converse(shared: &Shared) {
    while let Some(stream) = connect(&*shared.connector, || !lock(shared).ended) {
        match open(shared, &stream) {
            Some(Ok(())) => use_connection(shared, &stream),
            Some(Err(error)) => {
                let mut state = lock(shared);
                state.opened.get_or_insert(Err(error));
                state.ended = true;
                shared.opened.notify_all();
                return;
            }
            None => {}
        }
    }
}

/// Opens or resumes the session; `None` where the connection broke.
fn open(shared: &Shared, mut stream: &UnixStream) -> Option<Result<(), Error>> {
    let hello = lock(shared).hello(shared);
    stream.write_all(&hello).ok()?;
    let answer = protocol::read_answer(stream).ok()?;
    if answer.kind != HELLO {
        return Some(Err(protocol::error_of(&answer)));
    }
    lock(shared).opened.get_or_insert(Ok(()));
    shared.opened.notify_all();
    Some(Ok(()))
}

/// Until it breaks or the guest is gone.
fn use_connection(shared: &Shared, stream: &UnixStream) {
    let mut acknowledged = None;
    let next = || {
        let mut state = lock(shared);
        (!state.ended).then(|| state.sendable(&mut acknowledged))
    };
    use_stream(&shared.bell, stream, next, |messages| {
        let mut any = false;
        for message in messages {
            any |= lock(shared).take(message);
        }
        if any {
            (shared.waker)();
        }
    });
}
