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
use crate::protocol::{self, GUEST_KIND_MAX, Hello, OK, RESET};

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
        if hello.domid == DomId::HOST {
            return Err(Error::Invalid);
        }
        if !self.sessions.contains_key(&hello.session) {
            // The domain of that number before has ended: its process let go of the number.
            let old = self.sessions().find(|(_, domid)| *domid == hello.domid);
            if let Some((session, domid)) = old {
                self.remove(domid, session);
            }
            self.open(hello.session, hello.domid, 1);
            self.step.push(Entry::Session {
                session: hello.session,
                domid: hello.domid,
                next_event: 1,
            });
            self.store.add_domain(hello.domid, &hello.uuid);
            self.settle(None);
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

    /// Ends a session and removes its domain. Does nothing where it has ended.
    pub fn remove(&mut self, domid: DomId, session: u64) {
        if self.sessions.get(&session).is_none_or(|s| s.domid != domid) {
            return;
        }
        if let Some(s) = self.sessions.remove(&session) {
            self.store.disconnect(s.conn);
        }
        self.step.push(Entry::NoSession { session });
        self.store.remove_domain(domid);
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
                    let failed = bytes[..4] == kind::ERROR.to_le_bytes();
                    if !failed {
                        self.step.extend(watch.take().flatten());
                    }
                    s.reply = Some(bytes.to_vec());
                }
            }
        }
    }
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::entry::tests::entry;

    fn hello(session: u64, domid: u16) -> Hello {
        Hello {
            session,
            domid: DomId(domid),
            uuid: format!("uuid-{domid}"),
            seen: None,
            transactions: Vec::new(),
        }
    }

    fn request(kind: u32, id: u32, transaction: u32, payload: &str) -> Request {
        Request {
            kind,
            id,
            transaction,
            payload: payload.as_bytes().to_vec(),
        }
    }

    /// All that a core has, but for answers: those to requests that changed nothing are not written down.
    fn contents(core: &Core) -> Vec<Entry> {
        let mut entries = core.snapshot();
        entries.retain(|e| !matches!(e, Entry::Done { .. }));
        entries
    }

    fn restored(journal: &[Vec<Entry>]) -> Core {
        let mut core = Core::new();
        for step in journal {
            assert!(core.restore(step), "{step:?}");
        }
        core.begin();
        core
    }

    /// A guest with one node and a watch on it, and the journal so far.
    fn guest() -> (Core, Vec<Vec<Entry>>) {
        let mut core = restored(&[]);
        let mut journal = vec![core.snapshot()];
        core.hello(&hello(1, 5)).expect("a session");
        let host = core.connect_host();
        let mut steps = vec![core.take_step()];
        let data = "/local/domain/5/data\0";
        core.host_request(host, request(kind::WRITE, 0, 0, &format!("{data}v")));
        steps.push(core.take_step());
        core.host_request(host, request(kind::SET_PERMS, 0, 0, &format!("{data}n5\0")));
        steps.push(core.take_step());
        core.guest_request(1, request(kind::WATCH, 1, 0, "data\0t\0"));
        steps.push(core.take_step());
        journal.extend(steps);
        (core, journal)
    }

    #[test]
    fn repeated_request_is_answered_and_not_done_again() {
        let (mut core, mut journal) = guest();
        assert!(core.guest_output(1).is_some());
        let watch = request(kind::WATCH, 2, 0, "data/x\0u\0");
        core.guest_request(1, watch.clone());
        journal.push(core.take_step());
        let first = core.guest_output(1);
        // In the same process, and in the next.
        core.guest_request(1, watch.clone());
        assert_eq!(
            (core.guest_output(1), core.take_step()),
            (first.clone(), vec![])
        );
        let mut next = restored(&journal);
        next.hello(&hello(1, 5)).expect("the session");
        next.guest_request(1, watch);
        assert_eq!((next.guest_output(1), next.take_step()), (first, vec![]));
    }

    #[test]
    fn watches_beyond_the_default_limit_are_restored() {
        let (mut core, _) = guest();
        core.hello(&hello(2, 6)).expect("a session");
        let host = core.connect_host();
        let raise = "quota\0set\0watches\x00300\0";
        core.host_request(host, request(kind::CONTROL, 0, 0, raise));
        for number in 0..200 {
            let payload = format!("data\0{number}\0");
            core.guest_request(1, request(kind::WATCH, 2 + number, 0, &payload));
        }
        core.guest_request(2, request(kind::WATCH, 1, 0, "data\0t\0"));
        let watches = |core: &Core| {
            let entries = contents(core).into_iter();
            entries.filter(|e| matches!(e, Entry::Watch { .. })).count()
        };
        assert_eq!(watches(&core), 202);
        let next = restored(&[core.snapshot()]);
        assert_eq!(contents(&next), contents(&core));
    }

    #[test]
    fn entry_that_does_not_fit_takes_nothing_else_with_it() {
        let (mut core, _) = guest();
        core.hello(&hello(2, 6)).expect("a session");
        core.guest_request(2, request(kind::WATCH, 1, 0, "data\0t\0"));
        let mut step = core.snapshot();
        let first = |e: &Entry| matches!(e, Entry::Session { .. });
        let at = step.iter().position(first).expect("a session");
        step.insert(at, Entry::NoWatches { session: 9 });
        let mut next = Core::new();
        assert!(!next.restore(&step));
        assert_eq!(contents(&next), contents(&core));
    }

    #[test]
    fn event_that_comes_before_the_guest_is_back_is_not_merged_away() {
        let (mut core, mut journal) = guest();
        journal.push(core.take_step());
        let mut next = restored(&journal);
        let host = next.connect_host();
        let write = request(kind::WRITE, 0, 0, "/local/domain/5/data\0w");
        next.host_request(host, write);
        // The watch's first event, number 1, had arrived.
        let mut hello = hello(1, 5);
        hello.seen = Some(1);
        next.hello(&hello).expect("the session");
        let event = next.guest_output(1).expect("an event");
        assert_eq!(&event[HEADER_BYTES..], b"data\0t\0");
        assert_eq!(next.guest_output(1), None);
    }

    #[test]
    fn hello_of_another_session_takes_the_domain_over_empty() {
        let (mut core, _) = guest();
        core.hello(&hello(2, 5)).expect("a session");
        assert_eq!(core.sessions().collect::<Vec<_>>(), [(2, DomId(5))]);
        assert!(core.store.read("/local/domain/5/data").is_err());
        assert_eq!(core.hello(&hello(2, 6)), Err(Error::Access));
        assert_eq!(core.hello(&hello(3, 0)), Err(Error::Invalid));
        core.remove(DomId(6), 2);
        assert_eq!(core.sessions().count(), 1);
        core.remove(DomId(5), 2);
        assert_eq!(core.sessions().count(), 0);
    }

    type Operation = (u8, u8, u32, String, u8);

    fn operations() -> impl Strategy<Value = Vec<Operation>> {
        prop::collection::vec(
            (0u8..3, 0u8..9, 0u32..3, "[a-c](/[a-c])?", any::<u8>()),
            0..60,
        )
    }

    proptest! {
        /// Whatever was done, the journal leads to the same store, sessions, watches and events.
        #[test]
        fn journal_leads_to_the_same_contents(operations in operations()) {
            let (mut core, mut journal) = guest();
            core.hello(&hello(2, 6)).expect("a session");
            journal.push(core.take_step());
            let host = core.connect_host();
            for (number, (who, op, tx, name, value)) in operations.into_iter().enumerate() {
                let path = format!("/local/domain/5/data/{name}");
                let (kind, payload) = match op {
                    0 | 1 => (kind::WRITE, format!("{path}\0{value}")),
                    2 => (kind::RM, format!("{path}\0")),
                    3 => (kind::WATCH, format!("{path}\0{}\0", value % 4)),
                    4 => (kind::UNWATCH, format!("{path}\0{}\0", value % 4)),
                    5 => (kind::TRANSACTION_START, "\0".to_owned()),
                    6 => (kind::TRANSACTION_END, "T\0".to_owned()),
                    7 if value < 60 => (RESET, "\0".to_owned()),
                    7 => (kind::READ, format!("{path}\0")),
                    _ => (kind::RESET_WATCHES, "\0".to_owned()),
                };
                let r = request(kind, number as u32 + 10, tx, &payload);
                match who {
                    0 if kind != RESET => core.host_request(host, r),
                    0 => core.remove(DomId(6), 2),
                    who => core.guest_request(u64::from(who), r),
                }
                journal.push(core.take_step());
                while core.host_output(host, &mut [0; 4096]) > 0 {}
            }
            prop_assert_eq!(contents(&restored(&journal)), contents(&core));
            prop_assert_eq!(contents(&restored(&[core.snapshot()])), contents(&core));
        }

        #[test]
        fn any_step_is_survived(steps in prop::collection::vec(entry(), 0..20)) {
            let mut bytes = Vec::new();
            for e in &steps {
                crate::entry::encode(e, &mut bytes);
            }
            crate::fuzz_journal(&bytes);
        }
    }
}
