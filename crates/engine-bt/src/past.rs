//! What was there in generations before the present one, for a vCPU that was made to leave its code and still has to learn where the guest was.

use std::collections::VecDeque;

/// Of something that is replaced by and by, all that was there and may still be asked for.
#[derive(Debug)]
pub(crate) struct Past<T> {
    /// The generation since when there is what is there now.
    since: u64,
    /// What was there before, each with the generation since when; the latest first.
    old: VecDeque<(u64, T)>,
}

impl<T> Default for Past<T> {
    fn default() -> Self {
        Past {
            since: 0,
            old: VecDeque::new(),
        }
    }
}

impl<T> Past<T> {
    /// What was there in a generation; `present` is there now.
    pub fn of<'a>(&'a self, present: &'a T, generation: u64) -> Option<&'a T> {
        if self.since <= generation {
            return Some(present);
        }
        let mut old = self.old.iter();
        old.find(|(since, _)| *since <= generation).map(|(_, t)| t)
    }

    /// Keeps what was there until the generation `now` began.
    pub fn add(&mut self, gone: T, now: u64) {
        self.old.push_front((self.since, gone));
        self.since = now;
    }

    /// Drops what nobody asks for who asks for the generation `oldest` and later ones.
    pub fn keep_since(&mut self, oldest: u64) {
        let mut until = self.since;
        let needed = self.old.iter().take_while(|(since, _)| {
            let end = std::mem::replace(&mut until, *since);
            oldest < end
        });
        let count = needed.count();
        self.old.truncate(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn past_is_kept_for_as_long_as_it_is_asked_for() {
        let mut past = Past::default();
        past.add("first", 3);
        past.add("second", 5);
        let of = |past: &Past<&'static str>, n| past.of(&"present", n).copied();
        assert_eq!(of(&past, 0), Some("first"));
        assert_eq!(of(&past, 4), Some("second"));
        assert_eq!(of(&past, 5), Some("present"));
        past.keep_since(2);
        assert_eq!(of(&past, 2), Some("first"));
        past.keep_since(3);
        assert_eq!((of(&past, 2), of(&past, 3)), (None, Some("second")));
        past.keep_since(5);
        assert_eq!((of(&past, 4), of(&past, 5)), (None, Some("present")));
    }
}
