//! One connection: half a request, messages to fetch, watches and transactions.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use hospes_units::DomId;

use crate::Waker;
use crate::outbox::{Message, Outbox};
use crate::restriction::{self, Restriction};
use crate::transaction::Transaction;
use crate::watch::{Watch, WatchEvent};
use crate::wire::{self, HEADER_BYTES, ProtocolError, Request, kind};

/// Events that wait for a connection of domain 0; one that leaves more unfetched has stopped reading for good.
const HOST_EVENTS_MAX: usize = 16384;

pub struct Connection {
    pub domid: DomId,
    /// `None` where it has all rights of its domain.
    pub restriction: Option<Arc<Restriction>>,
    waker: Waker,
    input: Vec<u8>,
    output: Outbox,
    /// Events were lost.
    overrun: bool,
    pub watches: Vec<Watch>,
    pub transactions: BTreeMap<u32, Transaction>,
    next_transaction: u32,
}

impl Connection {
    pub fn new(domid: DomId, waker: Waker) -> Connection {
        Connection {
            domid,
            restriction: None,
            waker,
            input: Vec::new(),
            output: Outbox::default(),
            overrun: false,
            watches: Vec::new(),
            transactions: BTreeMap::new(),
            next_transaction: 1,
        }
    }

    pub fn receive(&mut self, bytes: &[u8]) {
        self.input.extend(bytes);
    }

    pub fn next_request(&mut self) -> Result<Option<Request>, ProtocolError> {
        wire::decode(&mut self.input)
    }

    pub fn reply(&mut self, request: &Request, kind: u32, payload: &[u8]) {
        let bytes = wire::encode(kind, request.id, request.transaction, payload);
        self.output.reply(bytes);
        (self.waker)();
    }

    /// Queues an event, unless the same one waits already or `limit` do. One that is longer than a message may be is left out, as xenstored does: nobody could take it.
    pub fn event(&mut self, path: &str, token: &str, limit: Option<usize>) {
        if path.len() + token.len() + 2 > wire::PAYLOAD_MAX {
            return;
        }
        let most = match self.restriction {
            Some(_) => restriction::QUOTA.events,
            None => HOST_EVENTS_MAX,
        };
        if self.output.events() >= limit.unwrap_or(most) {
            self.overrun |= limit.is_none();
            return;
        }
        let bytes = wire::encode(kind::WATCH_EVENT, 0, 0, &wire::join([path, token]));
        if self.output.event(bytes) {
            (self.waker)();
        }
    }

    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    pub fn is_overrun(&self) -> bool {
        self.overrun
    }

    pub fn unfetched_replies(&self) -> usize {
        self.output.replies()
    }

    pub fn fetch(&mut self, buf: &mut [u8]) -> usize {
        self.output.fetch(buf).0
    }

    pub fn next_message(&mut self) -> Option<Message> {
        self.output.pop()
    }

    pub fn next_event(&mut self) -> Option<WatchEvent> {
        let message = self.output.pop_event()?;
        let strings = wire::strings(&message.bytes[HEADER_BYTES..])?;
        match strings[..] {
            [path, token] => Some(WatchEvent {
                path: path.to_owned(),
                token: token.to_owned(),
            }),
            _ => None,
        }
    }

    pub fn reset(&mut self) {
        let (domid, waker) = (self.domid, self.waker.clone());
        let restriction = self.restriction.take();
        *self = Connection::new(domid, waker);
        self.restriction = restriction;
    }

    pub fn restrict(&mut self, restriction: Restriction) {
        self.restriction = Some(Arc::new(restriction));
    }

    /// Its restriction, if it is one to this domain.
    pub fn restriction_to(&self, domid: DomId) -> Option<Arc<Restriction>> {
        self.restriction.clone().filter(|r| r.domid == domid)
    }

    pub fn start_transaction(&mut self) -> u32 {
        loop {
            let id = self.next_transaction;
            // 0 is no transaction; numbers of old ones may still be open after the counter has gone round.
            self.next_transaction = id.checked_add(1).unwrap_or(1);
            if let Entry::Vacant(free) = self.transactions.entry(id) {
                free.insert(Transaction::default());
                return id;
            }
        }
    }
}
