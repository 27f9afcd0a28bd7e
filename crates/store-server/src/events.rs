//! Watch events of a guest that wait to be delivered, each with a number by which its delivery is acknowledged.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use hospes_store::PAYLOAD_MAX;

/// Events that are sent and not acknowledged; further ones wait here, where equal ones are merged.
const UNDER_WAY_MAX: usize = 64;

/// Events in order: first those that were sent, then those that were not.
#[derive(Debug, Default)]
pub struct EventQueue {
    events: VecDeque<(u32, Arc<[u8]>)>,
    sent: usize,
    next: u32,
    /// Payloads of those that were not sent: each is there once.
    waiting: HashSet<Arc<[u8]>>,
}

impl EventQueue {
    /// A queue whose next event gets this number.
    pub fn starting_at(next: u32) -> EventQueue {
        EventQueue {
            next,
            ..EventQueue::default()
        }
    }

    /// The number that the next event will get.
    pub fn next_number(&self) -> u32 {
        self.next
    }

    /// Adds an event and returns its number, unless an equal one waits or `limit` do.
    pub fn push(&mut self, payload: &[u8], limit: usize) -> Option<u32> {
        if self.waiting.len() >= limit || self.waiting.contains(payload) {
            return None;
        }
        let number = self.next;
        let payload: Arc<[u8]> = payload.into();
        self.waiting.insert(Arc::clone(&payload));
        self.events.push_back((number, payload));
        self.next = number.wrapping_add(1);
        Some(number)
    }

    /// Adds an event that was written down with its number, before any that is pushed. It may have been delivered: until the other end has
    /// said so it counts as sent, and no new event is merged with it.
    pub fn restore(&mut self, number: u32, payload: &[u8]) {
        self.next = number.wrapping_add(1);
        // An old journal may have one that is longer than a message: nobody can take it.
        if payload.len() > PAYLOAD_MAX {
            return;
        }
        self.events.push_back((number, payload.into()));
        self.sent = self.events.len();
    }

    /// The next event to be sent, unless enough are under way.
    pub fn send(&mut self) -> Option<(u32, Arc<[u8]>)> {
        if self.sent >= UNDER_WAY_MAX {
            return None;
        }
        let event = self.events.get(self.sent)?.clone();
        self.sent += 1;
        self.waiting.remove(&event.1);
        Some(event)
    }

    /// Those up to this number were delivered.
    pub fn acknowledge(&mut self, number: u32) {
        while let Some((first, payload)) = self.events.front() {
            // Numbers go round; less than half of them wait.
            if number.wrapping_sub(*first) > u32::MAX / 2 {
                return;
            }
            if self.sent == 0 {
                self.waiting.remove(payload);
            }
            self.sent = self.sent.saturating_sub(1);
            self.events.pop_front();
        }
    }

    /// All that were not acknowledged have to be sent again.
    pub fn rewind(&mut self) {
        self.waiting.clear();
        self.waiting
            .extend(self.events.iter().map(|(_, payload)| Arc::clone(payload)));
        self.sent = 0;
    }

    pub fn clear(&mut self) {
        *self = EventQueue::starting_at(self.next);
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u8])> {
        self.events
            .iter()
            .map(|(number, payload)| (*number, &payload[..]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(queue: &mut EventQueue) -> Vec<(u32, Vec<u8>)> {
        std::iter::from_fn(|| queue.send())
            .map(|(number, payload)| (number, payload.to_vec()))
            .collect()
    }

    #[test]
    fn unacknowledged_events_are_sent_again() {
        let mut q = EventQueue::starting_at(u32::MAX);
        assert_eq!(q.push(b"a", 9), Some(u32::MAX));
        assert_eq!(q.push(b"a", 9), None);
        assert_eq!(q.push(b"b", 9), Some(0));
        assert_eq!(
            sent(&mut q),
            [(u32::MAX, b"a".to_vec()), (0, b"b".to_vec())]
        );
        // One that is under way may have been seen: the next is another.
        assert_eq!(q.push(b"a", 9), Some(1));
        q.acknowledge(u32::MAX);
        q.rewind();
        assert_eq!(sent(&mut q), [(0, b"b".to_vec()), (1, b"a".to_vec())]);
        q.acknowledge(1);
        assert!(sent(&mut q).is_empty());
        assert_eq!((q.next_number(), q.iter().count()), (2, 0));
    }

    #[test]
    fn restored_events_that_are_too_long_are_left_out() {
        let mut q = EventQueue::starting_at(5);
        q.restore(5, &[b'x'; PAYLOAD_MAX + 1]);
        q.restore(6, b"a");
        q.rewind();
        assert_eq!(sent(&mut q), [(6, b"a".to_vec())]);
        q.acknowledge(6);
        assert_eq!(q.iter().count(), 0);
    }

    #[test]
    fn restored_events_swallow_no_new_ones() {
        let mut q = EventQueue::starting_at(5);
        q.restore(5, b"a");
        assert_eq!(q.push(b"a", 9), Some(6));
        assert_eq!(sent(&mut q), [(6, b"a".to_vec())]);
        // The first had been delivered before it was written down that it was.
        q.acknowledge(5);
        q.rewind();
        assert_eq!(sent(&mut q), [(6, b"a".to_vec())]);
    }

    #[test]
    fn events_under_way_and_waiting_are_bounded() {
        let mut q = EventQueue::default();
        for i in 0..100u32 {
            q.push(&i.to_le_bytes(), 1000);
        }
        assert_eq!(sent(&mut q).len(), 64);
        q.acknowledge(9);
        assert_eq!(sent(&mut q).len(), 10);
        for i in 100..1000u32 {
            q.push(&i.to_le_bytes(), 50);
        }
        assert_eq!(q.iter().count(), 64 + 50);
        q.clear();
        assert_eq!(q.next_number(), 124);
    }
}
