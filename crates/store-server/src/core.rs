//! What messages do: to the store, to guests' sessions, and what of it has to be written down. No I/O.
//!
//! Each call that may change something leaves the entries of its step in [`Core::take_step`]: they have to be in the journal before
//! anything that the call made ready to be sent is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use hospes_store::wire::{self, kind};
use hospes_store::{ConnId, Error, HEADER_BYTES, Quota, Request, Store, host_nodes};
use hospes_units::DomId;

use crate::entry::Entry;
use crate::events::EventQueue;
use crate::protocol::{self, Ended, GUEST_KIND_MAX, Hello, OK, RESET};

/// A guest's connection as it outlives sockets and processes.
struct Session {
    domid: DomId,
    conn: ConnId,
    events: EventQueue,
    /// The last request and its answer.
    last: Option<(u32, Vec<u8>)>,
    /// The answer that has to be sent.
    reply: Option<Vec<u8>>,
}

/// Of whoever has a domain taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Domain 0's.
    All,
    /// Those for this domain.
    Restricted,
}

pub struct Core {
    store: Store,
    sessions: BTreeMap<u64, Session>,
    /// Sessions that the store has something for.
    touched: Arc<Mutex<BTreeSet<u64>>>,
    step: Vec<Entry>,
    events_max: usize,
}

impl Core {
    /// An empty store.
    pub fn new() -> Core {
        let quota = Quota::default();
        Core {
            store: Store::new(quota),
            sessions: BTreeMap::new(),
            touched: Arc::default(),
            step: Vec::new(),
            events_max: quota.events,
        }
    }

    /// Begins the work, after everything was restored: from here on steps are kept.
    pub fn begin(&mut self) {
        // What is not there yet is not readable by guests either.
        if self.store.read("/tool/xenstored").is_err() {
            // An empty store takes them.
            let _ = self.store.write_all(&host_nodes());
        }
        self.store.start_recording();
    }

    /// Repeats a step of the journal. False where some of it cannot follow on what was before it; the rest is repeated all the same, as other
    /// domains depend on it.
    pub fn restore(&mut self, step: &[Entry]) -> bool {
        let mut fits = true;
        for entry in step {
            fits &= self.restore_entry(entry);
        }
        fits
    }

    fn restore_entry(&mut self, entry: &Entry) -> bool {
        let session = match entry {
            Entry::Store(record) => return self.store.restore(record),
            Entry::Session {
                session,
                domid,
                next_event,
            } => {
                self.open(*session, *domid, *next_event);
                return true;
            }
            Entry::NoSession { session } => {
                if let Some(s) = self.sessions.remove(session) {
                    self.store.disconnect(s.conn);
                }
                return true;
            }
            Entry::Watch { session, .. }
            | Entry::NoWatch { session, .. }
            | Entry::NoWatches { session }
            | Entry::Event { session, .. }
            | Entry::NoEvents { session }
            | Entry::Done { session, .. } => session,
        };
        let Some(s) = self.sessions.get_mut(session) else {
            return false;
        };
        match entry {
            Entry::Watch { path, token, .. } => {
                self.store.restore_watch(s.conn, path, token).is_ok()
            }
            Entry::NoWatch { path, token, .. } => self.store.unwatch(s.conn, path, token).is_ok(),
            Entry::NoWatches { .. } => {
                self.store.reset(s.conn);
                true
            }
            Entry::Event {
                number, payload, ..
            } => {
                s.events.restore(*number, payload);
                true
            }
            Entry::NoEvents { .. } => {
                s.events.clear();
                true
            }
            Entry::Done { request, reply, .. } => {
                s.last = Some((*request, reply.clone()));
                true
            }
            _ => true,
        }
    }

    /// Steps, as one, that lead from an empty core to this one.
    pub fn snapshot(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = self
            .store
            .snapshot()
            .into_iter()
            .map(Entry::Store)
            .collect();
        for (&session, s) in &self.sessions {
            let first = s.events.iter().next().map(|(number, _)| number);
            entries.push(Entry::Session {
                session,
                domid: s.domid,
                next_event: first.unwrap_or(s.events.next_number()),
            });
            let watches = self.store.watches(s.conn).into_iter();
            entries.extend(watches.map(|(path, token)| Entry::Watch {
                session,
                path,
                token,
            }));
            entries.extend(s.events.iter().map(|(number, payload)| Entry::Event {
                session,
                number,
                payload: payload.to_vec(),
            }));
            entries.extend(s.last.iter().map(|(request, reply)| Entry::Done {
                session,
                request: *request,
                reply: reply.clone(),
            }));
        }
        entries
    }

    /// Takes the entries of the last step.
    pub fn take_step(&mut self) -> Vec<Entry> {
        std::mem::take(&mut self.step)
    }

    /// Takes what administrators asked to have logged.
    pub fn take_notices(&mut self) -> Vec<String> {
        self.store.take_notices()
    }

    // --- domain 0

    /// A connection of domain 0.
    pub fn connect_host(&mut self) -> ConnId {
        self.store.connect(DomId::HOST, Arc::new(|| {}))
    }

    /// A connection of domain 0 for what belongs to one domain.
    pub fn connect_restricted(
        &mut self,
        domid: DomId,
        uuid: &str,
        name: &str,
    ) -> Result<ConnId, Error> {
        let waker = Arc::new(|| {});
        self.store.connect_restricted(domid, uuid, name, waker)
    }

    /// The domain that a connection is restricted to, if it is.
    pub fn restricted_to(&self, conn: ConnId) -> Result<Option<DomId>, Error> {
        self.store.restricted_to(conn)
    }

    /// Has a domain known by another UUID.
    pub fn change_uuid(&mut self, domid: DomId, uuid: &str) -> Result<(), Error> {
        let result = self.store.change_uuid(domid, uuid);
        self.settle(None);
        result
    }

    /// Tells that a domain has shut down.
    pub fn shut_down(&mut self, domid: DomId) {
        self.store.shut_down(domid);
        self.settle(None);
    }

    pub fn disconnect_host(&mut self, conn: ConnId) {
        self.store.disconnect(conn);
    }

    pub fn host_request(&mut self, conn: ConnId, request: Request) {
        self.store.request(conn, request);
        self.settle(None);
    }

    pub fn host_output(&mut self, conn: ConnId, buf: &mut [u8]) -> usize {
        self.store.output(conn, buf)
    }

    /// Whether the connection may make requests, and whether it has something to fetch.
    pub fn host_state(&self, conn: ConnId) -> (bool, bool) {
        (self.store.accepts_input(conn), self.store.has_output(conn))
    }

    /// Whether it has stopped reading for good.
    pub fn is_overrun(&self, conn: ConnId) -> bool {
        self.store.is_overrun(conn)
    }

    // --- guests

    /// The sessions and their domains.
    pub fn sessions(&self) -> impl Iterator<Item = (u64, DomId)> + '_ {
        self.sessions.iter().map(|(session, s)| (*session, s.domid))
    }

    fn open(&mut self, session: u64, domid: DomId, next_event: u32) {
        let touched = Arc::clone(&self.touched);
        let waker = move || {
            touched
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(session);
        };
        let conn = self.store.connect(domid, Arc::new(waker));
        let new = Session {
            domid,
            conn,
            events: EventQueue::starting_at(next_event),
            last: None,
            reply: None,
        };
        if let Some(old) = self.sessions.insert(session, new) {
            self.store.disconnect(old.conn);
        }
    }

    /// Opens a session, or takes it up where it stands.
    pub fn hello(&mut self, hello: &Hello) -> Result<(), Error> {
        self.hello_by(Rights::All, hello)
    }

    fn hello_by(&mut self, rights: Rights, hello: &Hello) -> Result<(), Error> {
        if hello.domid == DomId::HOST {
            return Err(Error::Invalid);
        }
        if !self.sessions.contains_key(&hello.session) {
            // The domain of that number before has ended: its process let go of the number.
            let old = self.sessions().find(|(_, domid)| *domid == hello.domid);
            if let Some((session, domid)) = old {
                self.take_out(rights, domid, session);
            }
            let (domid, uuid, name) = (hello.domid, &hello.uuid, &hello.name);
            let added = self.store.add_domain(domid, uuid, name);
            self.settle(None);
            added?;
            self.open(hello.session, domid, 1);
            self.step.push(Entry::Session {
                session: hello.session,
                domid,
                next_event: 1,
            });
        }
        let Some(s) = self.sessions.get_mut(&hello.session) else {
            return Err(Error::NoEntry);
        };
        if s.domid != hello.domid {
            return Err(Error::Access);
        }
        if let Some(number) = hello.seen {
            s.events.acknowledge(number);
        }
        s.events.rewind();
        s.reply = None;
        for id in &hello.transactions {
            self.store.reopen_transaction(s.conn, *id);
        }
        Ok(())
    }

    /// The same from a restricted connection, which becomes the session's: the domain is entered with the UUID and name of the restriction, whatever is
    /// asked for.
    pub fn hello_restricted(&mut self, conn: ConnId, hello: &Hello) -> Result<(), Error> {
        if self.store.restricted_to(conn)? != Some(hello.domid) {
            return Err(Error::Access);
        }
        let mut hello = hello.clone();
        if !self.sessions.contains_key(&hello.session) {
            (hello.uuid, hello.name) = self.store.may_enter(conn, hello.domid)?;
        }
        self.hello_by(Rights::Restricted, &hello)?;
        self.store.disconnect(conn);
        Ok(())
    }

    /// Ends a session and removes its domain, and with it what connections restricted to it may do. Does nothing where it has ended; whether it did.
    pub fn remove(&mut self, rights: Rights, domid: DomId, session: u64) -> bool {
        if self.sessions.get(&session).is_none_or(|s| s.domid != domid) {
            return false;
        }
        self.take_out(rights, domid, session);
        self.store.end_restricted(domid);
        true
    }

    fn take_out(&mut self, rights: Rights, domid: DomId, session: u64) {
        if let Some(s) = self.sessions.remove(&session) {
            self.store.disconnect(s.conn);
        }
        self.step.push(Entry::NoSession { session });
        match rights {
            Rights::All => self.store.remove_domain(domid),
            Rights::Restricted => self.store.remove_domain_restricted(domid),
        }
        self.settle(None);
    }

    /// Events up to this number were delivered.
    pub fn seen(&mut self, session: u64, number: u32) {
        if let Some(s) = self.sessions.get_mut(&session) {
            s.events.acknowledge(number);
        }
    }

    /// A request of a guest, or one that was answered before and is repeated.
    pub fn guest_request(&mut self, session: u64, request: Request) {
        let Some(s) = self.sessions.get_mut(&session) else {
            return;
        };
        if let Some((number, reply)) = &s.last
            && *number == request.id
        {
            // What it had ended was opened again with the session, as the guest's end had no answer.
            match protocol::ended(&request, is_error(reply), &reply[HEADER_BYTES..]) {
                Ended::Nothing => {}
                Ended::Transaction(id) => self.store.close_transaction(s.conn, id),
                Ended::Transactions => self.store.close_transactions(s.conn),
            }
            s.reply = Some(reply.clone());
            return;
        }
        let id = request.id;
        match request.kind {
            RESET => {
                s.events.clear();
                self.store.reset(s.conn);
                self.step.push(Entry::NoWatches { session });
                self.step.push(Entry::NoEvents { session });
                s.reply = Some(protocol::answer(&request, Ok(OK)));
            }
            0..=GUEST_KIND_MAX => {
                let conn = s.conn;
                let watch = watch_change(session, &request);
                self.store.request(conn, request);
                self.settle(Some((session, watch)));
            }
            _ => s.reply = Some(protocol::answer(&request, Err(Error::NotImplemented))),
        }
        let Some(s) = self.sessions.get_mut(&session) else {
            return;
        };
        if let Some(reply) = s.reply.clone() {
            // What changed nothing can be done again.
            if !self.step.is_empty() {
                self.step.push(Entry::Done {
                    session,
                    request: id,
                    reply: reply.clone(),
                });
            }
            s.last = Some((id, reply));
        }
    }

    /// The next message for a guest: the answer to its request, then events.
    pub fn guest_output(&mut self, session: u64) -> Option<Vec<u8>> {
        let s = self.sessions.get_mut(&session)?;
        if let Some(reply) = s.reply.take() {
            return Some(reply);
        }
        let (number, payload) = s.events.send()?;
        Some(wire::encode(kind::WATCH_EVENT, number, 0, &payload))
    }

    /// Takes what the last operation left in the store for sessions and for the journal.
    fn settle(&mut self, asking: Option<(u64, Option<Entry>)>) {
        self.step
            .extend(self.store.take_records().into_iter().map(Entry::Store));
        let touched =
            std::mem::take(&mut *self.touched.lock().unwrap_or_else(PoisonError::into_inner));
        let (asker, mut watch) = asking.unzip();
        for session in touched {
            let Some(s) = self.sessions.get_mut(&session) else {
                continue;
            };
            while let Some(message) = self.store.next_message(s.conn) {
                let bytes = &message.bytes;
                if message.is_event {
                    let payload = &bytes[HEADER_BYTES..];
                    if let Some(number) = s.events.push(payload, self.events_max) {
                        self.step.push(Entry::Event {
                            session,
                            number,
                            payload: payload.to_vec(),
                        });
                    }
                } else if asker == Some(session) {
                    if !is_error(bytes) {
                        self.step.extend(watch.take().flatten());
                    }
                    s.reply = Some(bytes.to_vec());
                }
            }
        }
    }
}

fn is_error(message: &[u8]) -> bool {
    message[..4] == kind::ERROR.to_le_bytes()
}

/// The change that a request makes to the watches of its session, if it succeeds.
fn watch_change(session: u64, request: &Request) -> Option<Entry> {
    if request.kind == kind::RESET_WATCHES {
        return Some(Entry::NoWatches { session });
    }
    let strings = wire::strings(&request.payload)?;
    let [path, token] = strings[..] else {
        return None;
    };
    let (path, token) = (path.to_owned(), token.to_owned());
    match request.kind {
        kind::WATCH => Some(Entry::Watch {
            session,
            path,
            token,
        }),
        kind::UNWATCH => Some(Entry::NoWatch {
            session,
            path,
            token,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
