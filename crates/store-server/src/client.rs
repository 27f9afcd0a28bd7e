//! The store with the rights of domain 0, in its own process.
//!
//! A thread holds the connection; callers queue requests and wait for their answers. When the connection breaks, the thread connects again
//! and repeats what was not answered. That does no harm: each request says how things are to be, and a transaction is begun anew.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use hospes_store::wire::{self, PAYLOAD_MAX, kind};
use hospes_store::{
    DomainEntry, DomainStore, Error, GuestLink, Membership, NewNode, Perms, StoreAccess, Waker,
    Watch, WatchListener, identity_nodes,
};
use hospes_units::DomId;

use crate::bell::{Bell, connect, use_stream, wait_for};
use crate::guest::Guest;
use crate::place::Connector;
use crate::protocol::{self, IDENTIFY, REMOVE, SHUT_DOWN};

/// Requests that are sent and not answered; all of them and their answers fit into the sockets' buffers.
const UNDER_WAY_MAX: usize = 32;
/// How often a transaction is tried that others come in between.
const TRANSACTION_TRIES: usize = 100;

/// A client of the store process. Copies share one connection, which is made when it is first needed.
#[derive(Clone)]
pub struct StoreClient {
    shared: Arc<Shared>,
    /// Gives up where the store process waits for room on the file system.
    hasty: bool,
    thread: Arc<Thread>,
}

/// The thread, which is started with the first request and ended when this is dropped.
struct Thread {
    shared: Arc<Shared>,
    started: Mutex<bool>,
}

impl Thread {
    fn start(&self) -> std::io::Result<()> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if !*started {
            let shared = Arc::clone(&self.shared);
            std::thread::Builder::new()
                .name("store-client".to_owned())
                .spawn(move || converse(&shared))?;
            *started = true;
        }
        Ok(())
    }
}

struct Shared {
    connector: Arc<dyn Connector>,
    state: Mutex<State>,
    answered: Condvar,
    bell: Bell,
}

#[derive(Default)]
struct State {
    ended: bool,
    /// Counts connections.
    epoch: u64,
    next: u32,
    calls: BTreeMap<u32, Call>,
    under_way: usize,
    next_token: u64,
    listeners: BTreeMap<String, Listener>,
}

struct Call {
    bytes: Vec<u8>,
    /// Belongs to a transaction of the connection with this number.
    epoch: Option<u64>,
    sent: bool,
    /// Somebody waits for the answer.
    is_awaited: bool,
    /// The watch that the call sets.
    token: Option<String>,
    answer: Option<Result<Vec<u8>, Error>>,
    /// The connection that answered.
    answered_in: u64,
}

struct Listener {
    path: String,
    call: WatchListener,
    /// The store process has the watch.
    stands: bool,
}

/// A transaction, and the connection that it belongs to.
#[derive(Clone, Copy)]
struct Transaction {
    id: u32,
    epoch: u64,
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn queue(
        &mut self,
        kind: u32,
        transaction: Option<Transaction>,
        payload: &[u8],
        token: Option<String>,
        is_awaited: bool,
    ) -> u32 {
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        let id = transaction.map_or(0, |t| t.id);
        let call = Call {
            bytes: wire::encode(kind, number, id, payload),
            epoch: transaction.map(|t| t.epoch),
            sent: false,
            is_awaited,
            token,
            answer: None,
            answered_in: 0,
        };
        self.calls.insert(number, call);
        number
    }

    /// A new connection: everything has to be said again.
    fn begin_connection(&mut self) {
        self.epoch += 1;
        self.under_way = 0;
        for call in self.calls.values_mut().filter(|c| c.answer.is_none()) {
            call.sent = false;
        }
        let mut watches = Vec::new();
        for (token, listener) in &mut self.listeners {
            if std::mem::take(&mut listener.stands) {
                watches.push((token.clone(), listener.path.clone()));
            }
        }
        for (token, path) in watches {
            let payload = wire::join([&path, &token]);
            self.queue(kind::WATCH, None, &payload, Some(token), false);
        }
    }

    /// The next requests to be sent.
    fn sendable(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let epoch = self.epoch;
        for call in self.calls.values_mut() {
            if self.under_way >= UNDER_WAY_MAX {
                break;
            }
            if call.sent || call.answer.is_some() {
                continue;
            }
            if call.epoch.is_some_and(|e| e != epoch) {
                // Its transaction went with the connection.
                call.answer = Some(Err(Error::Again));
                continue;
            }
            call.sent = true;
            self.under_way += 1;
            bytes.extend(&call.bytes);
        }
        bytes
    }

    fn is_needed(&self) -> bool {
        !self.listeners.is_empty() || self.calls.values().any(|c| c.answer.is_none())
    }
}

impl StoreClient {
    /// A client of the store process that a connector leads to: it connects, by a thread of its own, when there is something to ask. A [`Place`](crate::Place) is the
    /// ordinary connector.
    pub fn new(connector: impl Connector + 'static) -> std::io::Result<StoreClient> {
        let shared = Arc::new(Shared {
            connector: Arc::new(connector),
            state: Mutex::default(),
            answered: Condvar::new(),
            bell: Bell::new()?,
        });
        let thread = Arc::new(Thread {
            shared: Arc::clone(&shared),
            started: Mutex::new(false),
        });
        Ok(StoreClient {
            shared,
            hasty: false,
            thread,
        })
    }

    /// One for a command, whose user hears at once that there is no room for the store to go on.
    pub fn hasty(self) -> StoreClient {
        StoreClient {
            hasty: true,
            ..self
        }
    }

    /// Gives a domain another name and UUID: what connections restricted to the domain may reach goes with them, and what was kept by the old UUID is
    /// removed. Not for a client whose own connections are restricted.
    pub fn change_identity(&self, domid: DomId, uuid: &str, name: &str) -> Result<(), Error> {
        self.call(IDENTIFY, &protocol::identity(domid, uuid))?;
        self.write_all(&identity_nodes(domid, uuid, name))
    }

    /// Tells those who watch for domains that one has shut down, without waiting until it is told.
    pub fn shut_down(&self, domid: DomId) {
        self.tell(SHUT_DOWN, domid);
    }

    /// Tells, without waiting, that a domain goes on that had shut down.
    pub fn resume(&self, domid: DomId) {
        self.tell(kind::RESUME, domid);
    }

    /// Where nobody can be told, nobody watches.
    fn tell(&self, kind: u32, domid: DomId) {
        if self.thread.start().is_ok() {
            let payload = wire::join([domid.to_string()]);
            lock(&self.shared).queue(kind, None, &payload, None, false);
            self.shared.bell.ring();
        }
    }

    fn call(&self, kind: u32, payload: &[u8]) -> Result<Vec<u8>, Error> {
        self.call_in(None, kind, payload).map(|(answer, _)| answer)
    }

    fn call_in(
        &self,
        transaction: Option<Transaction>,
        kind: u32,
        payload: &[u8],
    ) -> Result<(Vec<u8>, u64), Error> {
        let number = self.start(transaction, kind, payload, None)?;
        self.finish(number)
    }

    /// Queues a request.
    fn start(
        &self,
        transaction: Option<Transaction>,
        kind: u32,
        payload: &[u8],
        token: Option<String>,
    ) -> Result<u32, Error> {
        if payload.len() > PAYLOAD_MAX {
            return Err(Error::TooBig);
        }
        self.thread.start().map_err(|_| Error::Unreachable)?;
        let number = lock(&self.shared).queue(kind, transaction, payload, token, true);
        self.shared.bell.ring();
        Ok(number)
    }

    /// Waits for an answer; with the connection that it came by.
    fn finish(&self, number: u32) -> Result<(Vec<u8>, u64), Error> {
        let shared = &*self.shared;
        let answered = wait_for(
            &shared.state,
            &shared.answered,
            &*shared.connector,
            |trouble| self.hasty || trouble != Error::Full,
            |state| {
                let call = state.calls.get(&number);
                call.is_none_or(|c| c.answer.is_some()).then_some(())
            },
        );
        let mut state = lock(shared);
        let Some(mut call) = state.calls.remove(&number) else {
            return Err(Error::Unreachable);
        };
        match call.answer.take() {
            Some(answer) => answer.map(|payload| (payload, call.answered_in)),
            None => {
                if call.sent {
                    state.under_way = state.under_way.saturating_sub(1);
                }
                Err(answered.err().unwrap_or(Error::Unreachable))
            }
        }
    }

    fn simple(&self, kind: u32, path: &str) -> Result<Vec<u8>, Error> {
        self.call(kind, &wire::join([path]))
    }

    /// All that is done in one transaction, once.
    fn try_write_all(&self, nodes: &[NewNode]) -> Result<(), Error> {
        let (answer, epoch) = self.call_in(None, kind::TRANSACTION_START, b"\0")?;
        let id = wire::strings(&answer)
            .and_then(|s| s.first()?.parse().ok())
            .ok_or(Error::Invalid)?;
        let transaction = Some(Transaction { id, epoch });
        let mut numbers = Vec::new();
        let mut result = Ok(());
        for node in nodes {
            let write = self.start(transaction, kind::WRITE, &write_payload(node), None);
            let perms = node.perms.as_ref().map(|perms| {
                let payload = perms_payload(&node.path, perms);
                self.start(transaction, kind::SET_PERMS, &payload, None)
            });
            for number in [Some(write), perms].into_iter().flatten() {
                match number {
                    Ok(number) => numbers.push(number),
                    Err(error) => result = Err(error),
                }
            }
        }
        for number in numbers {
            result = result.and(self.finish(number).map(drop));
        }
        let end = if result.is_ok() { b"T\0" } else { b"F\0" };
        let ended = self.call_in(transaction, kind::TRANSACTION_END, end);
        result.and(ended.map(drop))
    }

    /// A directory too large for one message.
    fn list_in_parts(&self, path: &str) -> Result<Vec<String>, Error> {
        'again: loop {
            let mut generation = None;
            let mut names = Vec::new();
            loop {
                let offset = names.len().to_string();
                let payload = wire::join([path, &offset]);
                let part = self.call(kind::DIRECTORY_PART, &payload)?;
                let end = part.iter().position(|b| *b == 0).ok_or(Error::Invalid)?;
                let (number, rest) = part.split_at(end);
                if generation.get_or_insert(number.to_vec()) != number {
                    continue 'again;
                }
                names.extend(&rest[1..]);
                // The last part ends with an empty name.
                if names.ends_with(b"\0\0") || rest.len() <= 2 {
                    names.pop();
                    return names_of(&names);
                }
            }
        }
    }
}

fn write_payload(node: &NewNode) -> Vec<u8> {
    let mut payload = wire::join([&node.path]);
    payload.extend(&node.value);
    payload
}

fn perms_payload(path: &str, perms: &Perms) -> Vec<u8> {
    let mut payload = wire::join([path]);
    payload.extend(wire::join(perms.entries().map(|p| p.to_string())));
    payload
}

fn names_of(payload: &[u8]) -> Result<Vec<String>, Error> {
    if payload.is_empty() {
        return Ok(Vec::new());
    }
    let names = wire::strings(payload).ok_or(Error::Invalid)?;
    Ok(names.into_iter().map(str::to_owned).collect())
}

impl StoreAccess for StoreClient {
    fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        self.simple(kind::READ, path)
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<(), Error> {
        let mut payload = wire::join([path]);
        payload.extend(value);
        self.call(kind::WRITE, &payload).map(drop)
    }

    fn mkdir(&self, path: &str) -> Result<(), Error> {
        self.simple(kind::MKDIR, path).map(drop)
    }

    fn remove(&self, path: &str) -> Result<(), Error> {
        self.simple(kind::RM, path).map(drop)
    }

    fn list(&self, path: &str) -> Result<Vec<String>, Error> {
        match self.simple(kind::DIRECTORY, path) {
            Ok(payload) => names_of(&payload),
            Err(Error::TooBig) => self.list_in_parts(path),
            Err(error) => Err(error),
        }
    }

    fn set_perms(&self, path: &str, perms: &Perms) -> Result<(), Error> {
        let payload = perms_payload(path, perms);
        self.call(kind::SET_PERMS, &payload).map(drop)
    }

    fn write_all(&self, nodes: &[NewNode]) -> Result<(), Error> {
        let mut result = Err(Error::Again);
        for _ in 0..TRANSACTION_TRIES {
            result = self.try_write_all(nodes);
            if result != Err(Error::Again) {
                break;
            }
        }
        result
    }

    fn watch(&self, path: &str, listener: WatchListener) -> Result<Watch, Error> {
        let token = {
            let mut state = lock(&self.shared);
            state.next_token += 1;
            let token = state.next_token.to_string();
            let listener = Listener {
                path: path.to_owned(),
                call: listener,
                stands: false,
            };
            state.listeners.insert(token.clone(), listener);
            token
        };
        let payload = wire::join([path, &token]);
        let result = self
            .start(None, kind::WATCH, &payload, Some(token.clone()))
            .and_then(|number| self.finish(number));
        if let Err(error) = result {
            let _removed = lock(&self.shared).listeners.remove(&token);
            return Err(error);
        }
        let shared = Arc::clone(&self.shared);
        Ok(Watch::new(move || {
            let mut state = lock(&shared);
            // What the listener holds may want the lock when it goes.
            let _removed = state.listeners.remove(&token);
            // One that went with its connection is not there any more, which is as well.
            state.queue(kind::UNWATCH, None, &payload, None, false);
            drop(state);
            shared.bell.ring();
        }))
    }
}

impl DomainStore for StoreClient {
    fn access(&self) -> Arc<dyn StoreAccess> {
        Arc::new(self.clone())
    }

    fn add_domain(
        &self,
        entry: &DomainEntry,
        waker: Waker,
    ) -> Result<(Box<dyn GuestLink>, Membership), Error> {
        let domid = entry.domid;
        let guest = Guest::open(&self.shared.connector, entry, waker)?;
        let (session, end) = (guest.session(), guest.ender());
        let client = self.clone();
        let membership = Membership::new(move || {
            // Else its connection would be opened again after the next start of a store process.
            end();
            // Where it fails the store process finds out itself that the domain is gone.
            let _ = client.call(REMOVE, &protocol::removal(domid, session));
        });
        self.write_all(&entry.nodes())?;
        let introduction = wire::join([
            domid.to_string(),
            entry.store_ring.to_string(),
            entry.store_port.to_string(),
        ]);
        self.call(kind::INTRODUCE, &introduction)?;
        Ok((Box::new(guest), membership))
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        lock(&self.shared).ended = true;
        self.shared.bell.ring();
    }
}

impl fmt::Debug for StoreClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreClient({:?})", self.shared.connector)
    }
}

/// The thread.
fn converse(shared: &Shared) {
    loop {
        loop {
            let state = lock(shared);
            if state.ended {
                return;
            }
            if state.is_needed() {
                break;
            }
            drop(state);
            shared.bell.wait(None);
        }
        let Some(stream) = connect(&*shared.connector, || !lock(shared).ended) else {
            return;
        };
        lock(shared).begin_connection();
        use_connection(shared, &stream);
    }
}

/// Until it breaks or is not needed any more.
fn use_connection(shared: &Shared, stream: &UnixStream) {
    let next = || {
        let mut state = lock(shared);
        if state.ended {
            return None;
        }
        let requests = state.sendable();
        // Some may have been answered without being sent.
        shared.answered.notify_all();
        Some(requests)
    };
    use_stream(&shared.bell, stream, next, |messages| {
        for message in messages {
            match message.kind {
                kind::WATCH_EVENT => tell(shared, &message),
                _ => take_answer(shared, message),
            }
        }
    });
}

fn tell(shared: &Shared, message: &wire::Request) {
    let Some(strings) = wire::strings(&message.payload) else {
        return;
    };
    let [path, token] = strings[..] else { return };
    let listener = lock(shared).listeners.get(token).map(|l| l.call.clone());
    if let Some(listener) = listener {
        listener(path);
    }
}

fn take_answer(shared: &Shared, message: wire::Request) {
    let mut state = lock(shared);
    let epoch = state.epoch;
    let Some(call) = state.calls.get_mut(&message.id) else {
        return;
    };
    let answer = match message.kind {
        kind::ERROR => Err(protocol::error_of(&message)),
        _ => Ok(message.payload),
    };
    let token = call.token.clone().filter(|_| answer.is_ok());
    call.answer = Some(answer);
    call.answered_in = epoch;
    if !call.is_awaited {
        state.calls.remove(&message.id);
    }
    state.under_way = state.under_way.saturating_sub(1);
    if let Some(listener) = token.and_then(|token| state.listeners.get_mut(&token)) {
        listener.stands = true;
    }
    drop(state);
    shared.answered.notify_all();
}
