//! Messages that wait to be fetched by the other end of a connection.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use crate::wire::HEADER_BYTES;

/// A queue of whole messages that is fetched as bytes.
#[derive(Debug, Default)]
pub struct Outbox {
    messages: VecDeque<Message>,
    /// Bytes of the first message that were fetched already.
    fetched: usize,
    replies: usize,
    /// Payloads of the events that wait untouched: each is there once.
    waiting: HashSet<Arc<[u8]>>,
}

/// A message of the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub bytes: Arc<[u8]>,
    pub is_event: bool,
}

impl Outbox {
    /// Queues a reply.
    pub fn reply(&mut self, bytes: Vec<u8>) {
        self.replies += 1;
        self.messages.push_back(Message {
            bytes: bytes.into(),
            is_event: false,
        });
    }

    /// Queues an event unless one with the same payload waits; false where it did not.
    pub fn event(&mut self, bytes: Vec<u8>) -> bool {
        let payload: Arc<[u8]> = bytes[HEADER_BYTES..].into();
        if !self.waiting.insert(payload) {
            return false;
        }
        self.messages.push_back(Message {
            bytes: bytes.into(),
            is_event: true,
        });
        true
    }

    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Replies that were not fetched to their end.
    pub fn replies(&self) -> usize {
        self.replies
    }

    /// Events of which nothing was fetched.
    pub fn events(&self) -> usize {
        self.waiting.len()
    }

    fn forget(&mut self, event: &[u8]) {
        self.waiting.remove(&event[HEADER_BYTES..]);
    }

    /// Moves bytes into `buf`; returns how many, and how many messages ended with them that were events.
    pub fn fetch(&mut self, buf: &mut [u8]) -> (usize, usize) {
        let (mut done, mut events) = (0, 0);
        while let Some(message) = self.messages.front().cloned() {
            let rest = &message.bytes[self.fetched..];
            let count = rest.len().min(buf.len() - done);
            if count == 0 {
                break;
            }
            if self.fetched == 0 && message.is_event {
                // The other end may act on it from now on: what changes later is another event.
                self.forget(&message.bytes);
            }
            buf[done..done + count].copy_from_slice(&rest[..count]);
            done += count;
            if count < rest.len() {
                self.fetched += count;
                break;
            }
            self.replies -= usize::from(!message.is_event);
            events += usize::from(message.is_event);
            self.messages.pop_front();
            self.fetched = 0;
        }
        (done, events)
    }

    /// Takes the first whole message.
    pub fn pop(&mut self) -> Option<Message> {
        let message = self.messages.pop_front()?;
        self.fetched = 0;
        match message.is_event {
            true => self.forget(&message.bytes),
            false => self.replies -= 1,
        }
        Some(message)
    }

    /// Takes the first event, past any replies.
    pub fn pop_event(&mut self) -> Option<Message> {
        let at = self.messages.iter().position(|m| m.is_event)?;
        let message = self.messages.remove(at)?;
        self.forget(&message.bytes);
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{self, kind};

    fn event(text: &str) -> Vec<u8> {
        wire::encode(kind::WATCH_EVENT, 0, 0, text.as_bytes())
    }

    #[test]
    fn event_that_waits_is_not_queued_twice() {
        let mut out = Outbox::default();
        assert!(out.event(event("a")));
        assert!(!out.event(event("a")));
        assert!(out.event(event("b")));
        let mut buf = [0; 1];
        assert_eq!(out.fetch(&mut buf), (1, 0));
        // The first is on its way.
        assert!(out.event(event("a")));
        assert_eq!(out.events(), 2);
        let mut rest = [0; 100];
        assert_eq!(out.fetch(&mut rest), (2 * 17 + 16, 3));
        assert!(out.is_empty() && out.event(event("b")));
    }

    #[test]
    fn pop_event_leaves_replies() {
        let mut out = Outbox::default();
        out.reply(wire::encode(kind::READ, 1, 0, b"x"));
        out.event(event("a"));
        assert!(out.pop_event().is_some_and(|m| m.is_event));
        assert_eq!((out.replies(), out.events()), (1, 0));
        assert!(out.pop().is_some_and(|m| !m.is_event));
        assert_eq!(out.pop(), None);
    }
}
