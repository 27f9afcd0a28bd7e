//! One connection: half a request, replies to fetch, watches and transactions.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};

use hospes_units::DomId;

use crate::Waker;
use crate::transaction::Transaction;
use crate::watch::{Watch, WatchEvent};
use crate::wire::{self, HEADER_BYTES, ProtocolError, Request, kind};

pub struct Connection {
    pub domid: DomId,
    waker: Waker,
    input: Vec<u8>,
    output: VecDeque<Message>,
    /// Bytes of the first message that were fetched already.
    fetched: usize,
    replies: usize,
    pub watches: Vec<Watch>,
    pub transactions: BTreeMap<u32, Transaction>,
    next_transaction: u32,
}

struct Message {
    bytes: Vec<u8>,
    is_event: bool,
}

impl Connection {
    pub fn new(domid: DomId, waker: Waker) -> Connection {
        Connection {
            domid,
            waker,
            input: Vec::new(),
            output: VecDeque::new(),
            fetched: 0,
            replies: 0,
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

    fn push(&mut self, bytes: Vec<u8>, is_event: bool) {
        self.output.push_back(Message { bytes, is_event });
        (self.waker)();
    }

    pub fn reply(&mut self, request: &Request, kind: u32, payload: &[u8]) {
        self.replies += 1;
        let bytes = wire::encode(kind, request.id, request.transaction, payload);
        self.push(bytes, false);
    }

    /// Queues an event, unless the same one waits already or `limit` do.
    pub fn event(&mut self, path: &str, token: &str, limit: Option<usize>) {
        let bytes = wire::encode(kind::WATCH_EVENT, 0, 0, &wire::join([path, token]));
        // The first message may be half fetched: the guest may have acted on it before this change.
        let skip = usize::from(self.fetched > 0);
        let waiting = || self.output.iter().skip(skip).filter(|m| m.is_event);
        if waiting().any(|m| m.bytes == bytes) || limit.is_some_and(|max| waiting().count() >= max)
        {
            return;
        }
        self.push(bytes, true);
    }

    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    pub fn unfetched_replies(&self) -> usize {
        self.replies
    }

    pub fn fetch(&mut self, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(message) = self.output.front() {
            let rest = &message.bytes[self.fetched..];
            let count = rest.len().min(buf.len() - done);
            buf[done..done + count].copy_from_slice(&rest[..count]);
            done += count;
            if count < rest.len() {
                self.fetched += count;
                break;
            }
            self.replies -= usize::from(!message.is_event);
            self.output.pop_front();
            self.fetched = 0;
        }
        done
    }

    pub fn next_event(&mut self) -> Option<WatchEvent> {
        let at = self.output.iter().position(|m| m.is_event)?;
        let message = self.output.remove(at)?;
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
        *self = Connection::new(domid, waker);
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
