//! The limit of what a guest may send: credit in bytes that is renewed at fixed intervals, as Xen's back end does (`rate` in
//! xl-network-configuration(5)).
//!
//! A device has one [`Limit`], which its queues share. A packet may go while any credit is left; what it costs beyond that is owed, so that
//! neither a large packet nor the rest that is too small for one loses credit. Over any time no more goes than the intervals give, the burst and
//! one packet.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::MAX_QUEUES;
use crate::lock;

/// Credit that may come together whatever an interval gives: two of the largest packets, as in Linux.
const BURST_MIN: u64 = 128 << 10;

/// Credit for each interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub bytes: u64,
    /// Not zero.
    pub interval: Duration,
}

/// The limit of a device.
#[derive(Debug)]
pub struct Limit {
    rate: Rate,
    account: Mutex<Account>,
}

#[derive(Debug)]
struct Account {
    /// Below zero where the last packet was larger than what was left.
    left: i64,
    /// When the interval began.
    window: Instant,
    /// When its credit was added.
    renewed: Instant,
    queues: [Use; MAX_QUEUES as usize],
}

/// What a queue has made of the limit.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    /// It was refused in this interval: it holds a packet and comes back.
    refused: bool,
    /// It was refused in the interval before.
    waiting: bool,
    /// Bytes since it began to wait, less those of the waiting queue that had the fewest.
    spent: u64,
}

/// A queue's access to the limit of its device.
#[derive(Debug)]
pub struct Credit {
    limit: Arc<Limit>,
    queue: usize,
}

impl Limit {
    pub fn new(rate: Rate, now: Instant) -> Arc<Limit> {
        let account = Account {
            left: signed(rate.bytes),
            window: now,
            renewed: now,
            queues: [Use::default(); MAX_QUEUES as usize],
        };
        Arc::new(Limit {
            rate,
            account: Mutex::new(account),
        })
    }

    /// Access for queue `queue`, below [`MAX_QUEUES`].
    pub fn credit(self: &Arc<Self>, queue: usize) -> Credit {
        Credit {
            limit: Arc::clone(self),
            queue,
        }
    }

    fn burst(&self) -> i64 {
        signed(self.rate.bytes.max(BURST_MIN))
    }

    /// Adds what the intervals since the last time give.
    fn renew(&self, account: &mut Account, now: Instant) {
        let since = now.saturating_duration_since(account.window).as_nanos();
        let interval = self.rate.interval.as_nanos();
        let intervals = since / interval;
        if intervals == 0 {
            return;
        }
        // Intervals follow each other without a gap, however late anybody asks.
        account.window = now - Duration::from_nanos((since % interval) as u64);
        account.renewed = now;
        let gained =
            signed(self.rate.bytes).saturating_mul(i64::try_from(intervals).unwrap_or(i64::MAX));
        account.left = account.left.saturating_add(gained).min(self.burst());
        let refused = account.queues.iter().filter(|queue| queue.refused);
        let fewest = refused.map(|queue| queue.spent).min().unwrap_or(0);
        for queue in &mut account.queues {
            queue.waiting = std::mem::take(&mut queue.refused);
            queue.spent = match queue.waiting {
                true => queue.spent - fewest,
                false => 0,
            };
        }
    }
}

impl Account {
    /// Whether `queue` is more than its part of an interval's `bytes` ahead of another one that waits.
    fn is_ahead(&self, queue: usize, bytes: u64) -> bool {
        let others = || {
            let others = self.queues.iter().enumerate();
            others.filter(|(number, other)| *number != queue && other.waiting)
        };
        let share = bytes / (others().count() as u64 + 1);
        others()
            .any(|(_, other)| self.queues[queue].spent >= other.spent.saturating_add(share.max(1)))
    }
}

impl Credit {
    /// Pays for a packet of `bytes`, or says when to try again.
    pub fn pay(&self, bytes: u64, now: Instant) -> Result<(), Instant> {
        let rate = self.limit.rate;
        let mut account = lock(&self.limit.account);
        self.limit.renew(&mut account, now);
        // New credit is for all that wait, each with its part; what they leave for half an interval is anybody's.
        let anybodys = account.renewed + rate.interval / 2;
        let retry = if account.left <= 0 {
            account.window + rate.interval
        } else if now < anybodys && account.is_ahead(self.queue, rate.bytes) {
            anybodys
        } else {
            account.left = account.left.saturating_sub(signed(bytes));
            let spent = &mut account.queues[self.queue].spent;
            *spent = spent.saturating_add(bytes);
            return Ok(());
        };
        account.queues[self.queue].refused = true;
        Err(retry)
    }

    /// Gives back what was paid for a packet that could not be sent.
    pub fn refund(&self, bytes: u64) {
        let mut account = lock(&self.limit.account);
        let left = account.left.saturating_add(signed(bytes));
        account.left = left.min(self.limit.burst());
        let spent = &mut account.queues[self.queue].spent;
        *spent = spent.saturating_sub(bytes);
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INTERVAL: Duration = Duration::from_millis(50);
    const TIME: Duration = Duration::from_secs(10);
    const PACKET_MAX: u64 = 65536;

    /// What each queue of a device sends in [`TIME`] that always has a packet of its size, the first ones always being first.
    fn sent(bytes: u64, packets: &[u64], late: Duration) -> Vec<u64> {
        let start = Instant::now();
        let limit = Limit::new(
            Rate {
                bytes,
                interval: INTERVAL,
            },
            start,
        );
        let credits: Vec<Credit> = (0..packets.len()).map(|n| limit.credit(n)).collect();
        let mut next = vec![start; packets.len()];
        let mut sent = vec![0; packets.len()];
        loop {
            let (queue, now) = next
                .iter()
                .copied()
                .enumerate()
                .min_by_key(|(_, at)| *at)
                .unwrap();
            if now >= start + TIME {
                return sent;
            }
            loop {
                match credits[queue].pay(packets[queue], now) {
                    Ok(()) => sent[queue] += packets[queue],
                    Err(at) => {
                        assert!(at > now);
                        next[queue] = at + late;
                        break;
                    }
                }
            }
        }
    }

    #[test]
    fn queues_together_get_the_rate_and_each_its_part() {
        let sizes: [&[u64]; 8] = [
            &[1500],
            &[PACKET_MAX],
            &[1500; 2],
            &[PACKET_MAX; 2],
            &[1500; 4],
            &[PACKET_MAX; 4],
            &[1500, PACKET_MAX],
            &[PACKET_MAX, 1500, 1500, PACKET_MAX],
        ];
        for megabits in [5, 10, 20, 33, 100, 1000] {
            let second = megabits * 1_000_000 / 8;
            let (bytes, all) = (second / 20, second * TIME.as_secs());
            for packets in sizes {
                for late in [0, 3, 30].map(Duration::from_millis) {
                    let sent = sent(bytes, packets, late);
                    let what = format!("{megabits} Mb/s, {packets:?}, {late:?}: {sent:?}");
                    let total = sent.iter().sum::<u64>();
                    let part = total / packets.len() as u64;
                    // Threads that wake far too late leave credit and lose their place at times.
                    let (least, near) = match late < INTERVAL / 2 {
                        true => (all * 99 / 100, part / 10 + PACKET_MAX),
                        false => (all * 95 / 100, part / 2),
                    };
                    // The last interval may be slept through.
                    assert!(total + bytes >= least, "{what}");
                    assert!(total <= all + bytes.max(BURST_MIN) + PACKET_MAX, "{what}");
                    assert!(sent.iter().all(|one| one.abs_diff(part) <= near), "{what}");
                }
            }
        }
    }

    #[test]
    fn queue_that_seldom_sends_takes_nothing_from_the_others_and_does_not_wait_long() {
        let start = Instant::now();
        let rate = Rate {
            bytes: 625_000,
            interval: INTERVAL,
        };
        let limit = Limit::new(rate, start);
        let (busy, seldom) = (limit.credit(0), limit.credit(1));
        let (mut sent, mut seldom_next) = (0, start);
        for tick in 0..TIME.as_millis() as u64 {
            let now = start + Duration::from_millis(tick);
            while busy.pay(1500, now).is_ok() {
                sent += 1500;
            }
            if now >= seldom_next {
                seldom_next = match seldom.pay(100, now) {
                    Ok(()) => now + Duration::from_millis(60),
                    Err(retry) => retry,
                };
                assert!(seldom_next <= now + Duration::from_millis(60));
            }
        }
        let all = rate.bytes * 20 * TIME.as_secs();
        assert!(sent >= all * 98 / 100, "{sent} of {all}");
    }

    #[test]
    fn pay_waits_for_the_next_interval() {
        let start = Instant::now();
        let rate = Rate {
            bytes: 1000,
            interval: INTERVAL,
        };
        let credit = Limit::new(rate, start).credit(0);
        assert_eq!(credit.pay(1000, start), Ok(()));
        assert_eq!(credit.pay(1, start), Err(start + INTERVAL));
        // Who comes late finds the next interval where it was; what is owed is paid first.
        let late = start + INTERVAL * 3 / 2;
        assert_eq!(credit.pay(3000, late), Ok(()));
        assert_eq!(credit.pay(1, late), Err(start + INTERVAL * 2));
        assert_eq!(
            credit.pay(1, start + INTERVAL * 3),
            Err(start + INTERVAL * 4)
        );
        assert_eq!(credit.pay(1, start + INTERVAL * 4), Ok(()));
        credit.refund(1);
        assert_eq!(credit.pay(1000, start + INTERVAL * 4), Ok(()));
    }

    #[test]
    fn idle_guest_gathers_one_burst() {
        let start = Instant::now();
        let later = start + TIME;
        for (bytes, burst) in [
            (1000, BURST_MIN),
            (1_000_000, 1_000_000),
            (u64::MAX, 1 << 40),
        ] {
            let rate = Rate {
                bytes,
                interval: INTERVAL,
            };
            let credit = Limit::new(rate, start).credit(0);
            assert_eq!(credit.pay(burst, later), Ok(()));
            let more = credit.pay(1, later);
            assert_eq!(more.is_ok(), bytes == u64::MAX);
        }
    }

    proptest! {
        #[test]
        fn pay_never_gives_more_than_the_rate(
            bytes in 1u64..100_000,
            packets in prop::collection::vec((0usize..4, 1u64..=PACKET_MAX, 0u64..20), 1..100),
        ) {
            let start = Instant::now();
            let interval = Duration::from_millis(10);
            let limit = Limit::new(Rate { bytes, interval }, start);
            let credits: Vec<Credit> = (0..4).map(|n| limit.credit(n)).collect();
            let (mut now, mut paid) = (start, 0);
            for (queue, packet, pause) in packets {
                now += Duration::from_millis(pause);
                while let Err(next) = credits[queue].pay(packet, now) {
                    prop_assert!(next > now && next <= now + interval);
                    now = next;
                }
                paid += packet;
            }
            let intervals = (now - start).as_millis() as u64 / 10 + 1;
            prop_assert!(paid <= intervals * bytes + PACKET_MAX);
        }
    }
}
