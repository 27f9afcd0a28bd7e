//! The limit of what a guest may send: credit in bytes that is filled up at fixed intervals, as Xen's back end does (`rate` in
//! xl-network-configuration(5)).

use std::time::{Duration, Instant};

/// The most credit that the largest packet makes necessary.
const PACKET_MAX: u64 = 128 << 10;

/// Credit for each interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub bytes: u64,
    pub interval: Duration,
}

/// The credit that is left.
#[derive(Clone, Copy, Debug)]
pub struct Credit {
    rate: Rate,
    left: u64,
    window: Instant,
}

impl Credit {
    pub fn new(rate: Rate, now: Instant) -> Credit {
        Credit {
            rate,
            left: rate.bytes,
            window: now,
        }
    }

    /// Pays for a packet of `bytes`, or says when to try again.
    pub fn pay(&mut self, bytes: u64, now: Instant) -> Result<(), Instant> {
        let end = self.window + self.rate.interval;
        if self.left < bytes && now >= end {
            // A packet larger than an interval's credit waits until enough has come together.
            let burst = self.rate.bytes.max(bytes.min(PACKET_MAX));
            self.left = (self.left + self.rate.bytes).min(burst);
            self.window = now;
        }
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(self.window + self.rate.interval),
        }
    }

    /// Gives back what was paid for a packet that could not be sent.
    pub fn refund(&mut self, bytes: u64) {
        self.left += bytes;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pay_waits_for_the_next_interval() {
        let start = Instant::now();
        let interval = Duration::from_millis(50);
        let mut credit = Credit::new(
            Rate {
                bytes: 1000,
                interval,
            },
            start,
        );
        assert_eq!(credit.pay(900, start), Ok(()));
        assert_eq!(credit.pay(900, start), Err(start + interval));
        assert_eq!(credit.pay(900, start + interval), Ok(()));
        // 3000 bytes need what three intervals give.
        let mut now = start + interval;
        let mut waits = 0;
        while let Err(next) = credit.pay(3000, now) {
            assert!(next > now);
            now = next;
            waits += 1;
        }
        assert_eq!(waits, 3);
    }

    proptest! {
        #[test]
        fn pay_never_gives_more_than_the_rate(bytes in 1u64..100_000, packets in prop::collection::vec(1u64..70_000, 1..100)) {
            let start = Instant::now();
            let interval = Duration::from_millis(10);
            let mut credit = Credit::new(Rate { bytes, interval }, start);
            let (mut now, mut paid) = (start, 0);
            for packet in packets {
                while let Err(next) = credit.pay(packet, now) {
                    prop_assert!(next > now);
                    now = next;
                }
                paid += packet;
            }
            let intervals = (now - start).as_millis() as u64 / 10 + 1;
            prop_assert!(paid <= intervals * bytes + PACKET_MAX.min(70_000));
        }
    }
}
