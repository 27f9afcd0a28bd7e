use super::*;

const PERIOD: Duration = Duration::from_millis(4);
/// Visits in a period that leave just enough quiet.
const BARELY_QUIET: u32 = 60;
/// A page fault of the program.
const SHORT: Burst = Burst {
    native: Duration::from_micros(11),
    whole: Duration::from_micros(40),
    stops: 1,
};
const LONG: Burst = Burst {
    native: Duration::from_micros(1000),
    whole: Duration::from_micros(1020),
    stops: 1,
};
/// Much of it went into mapping what the program needs.
const WARM_UP: Burst = Burst {
    native: Duration::from_micros(300),
    whole: Duration::from_micros(4000),
    stops: 15,
};

/// A guest whose timer ticks, and so many visits to its kernel in each period.
struct Guest {
    policy: Policy,
    now: Instant,
    visits: u32,
}

impl Guest {
    fn new() -> Guest {
        Guest {
            policy: Policy::new(false),
            now: Instant::now(),
            visits: u32::MAX - 5,
        }
    }

    fn tick_of(&mut self, program: u64, root: u64, visits: u32) -> bool {
        self.now += PERIOD;
        self.visits = self.visits.wrapping_add(visits);
        let program = || Some(Gfn(program));
        self.policy.tick(root, self.now, self.visits, program)
    }

    /// Every address space has a program of its own.
    fn tick(&mut self, root: u64, visits: u32) -> bool {
        self.tick_of(root, root, visits)
    }

    /// Ticks until it becomes hot.
    fn heat_of(&mut self, program: u64, root: u64) -> u32 {
        1 + (0..1000)
            .take_while(|_| !self.tick_of(program, root, BARELY_QUIET))
            .count() as u32
    }

    fn heat(&mut self, root: u64) -> u32 {
        self.heat_of(root, root)
    }

    /// A burst that counts for itself alone.
    fn burst(&mut self, root: u64, burst: Burst) {
        self.policy.burst(root, burst);
        self.policy.contest = None;
    }

    /// Bursts of a kind until it cools.
    fn cool(&mut self, root: u64, burst: Burst) -> u32 {
        for n in 0..1000 {
            if !self.policy.is_hot(root) {
                return n;
            }
            self.burst(root, burst);
        }
        panic!("it stays hot");
    }
}

#[test]
fn tick_makes_hot_after_some() {
    let mut guest = Guest::new();
    assert!(!guest.tick(1, 0));
    assert!(guest.tick(1, 0));
    assert!(guest.policy.is_hot(1) && !guest.policy.is_hot(2));
}

#[test]
fn short_bursts_cool_and_are_tried_ever_more_rarely() {
    let mut guest = Guest::new();
    let mut attempts = Vec::new();
    for _ in 0..5 {
        attempts.push(guest.heat(1));
        guest.cool(1, SHORT);
    }
    assert_eq!(attempts, [2, 8, 32, 128, 128]);
}

#[test]
fn bursts_that_are_short_all_the_time_cool() {
    // What a server's system calls looked like: nearly all of it is the switches, and one in four found cold caches.
    let quick = Burst {
        native: Duration::from_micros(13),
        whole: Duration::from_micros(16),
        stops: 1,
    };
    let cold = Burst {
        native: Duration::from_micros(26),
        whole: Duration::from_micros(29),
        stops: 1,
    };
    let mut guest = Guest::new();
    guest.heat(1);
    let all = [quick, cold, quick, quick];
    assert!(
        all.iter().cycle().take(3000).any(|burst| {
            guest.burst(1, *burst);
            !guest.policy.is_hot(1)
        }),
        "it stays hot"
    );
    // Among longer ones the same are worth something: a compiler's page faults.
    guest.heat(2);
    let mixed = [quick, cold, LONG, cold];
    for burst in mixed.iter().cycle().take(3000) {
        guest.burst(2, *burst);
        assert!(guest.policy.is_hot(2));
    }
}

#[test]
fn attempts_that_paid_are_made_again_at_once() {
    let mut guest = Guest::new();
    for _ in 0..3 {
        guest.heat(1);
        guest.cool(1, SHORT);
    }
    assert_eq!(guest.heat(1), 128);
    for _ in 0..20 {
        guest.burst(1, LONG);
    }
    guest.cool(1, SHORT);
    let mut attempts = Vec::new();
    for _ in 0..6 {
        attempts.push(guest.heat(1));
        guest.cool(1, SHORT);
    }
    // As long as all of them together have paid.
    assert_eq!(attempts, [1, 2, 4, 8, 8, 8]);
}

#[test]
fn pages_that_are_needed_first_do_not_cool() {
    let mut guest = Guest::new();
    guest.heat(1);
    for _ in 0..5 {
        guest.burst(1, WARM_UP);
    }
    assert!(guest.policy.is_hot(1));
    // All the time is another matter.
    assert!(guest.cool(1, WARM_UP) < 50);
}

#[test]
fn programs_are_known_again() {
    let (mut guest, good, bad) = (Guest::new(), 100, 200);
    assert_eq!((guest.heat_of(good, 1), guest.heat_of(bad, 2)), (2, 2));
    guest.burst(1, LONG);
    // It ends before it has cooled.
    guest.policy.forget(1);
    guest.cool(2, SHORT);
    assert_eq!(guest.heat_of(good, 3), GOOD_TICKS);
    assert_eq!(guest.heat_of(bad, 4), 8);
    guest.burst(4, SHORT);
    guest.policy.forget(4);
    assert_eq!(guest.heat_of(bad, 5), MOST_INHERITED);
    guest.cool(5, SHORT);
    assert_eq!(guest.heat_of(bad, 6), MOST_INHERITED);
    for _ in 0..10 {
        guest.burst(6, LONG);
    }
    guest.cool(6, SHORT);
    assert_eq!(guest.heat_of(bad, 7), GOOD_TICKS);
}

#[test]
fn busy_kernels_do_not_count() {
    let mut guest = Guest::new();
    guest.tick(1, 0);
    for _ in 0..100 {
        assert!(!guest.tick(1, 80));
    }
    assert!(guest.tick(1, 40));
}

#[test]
fn longer_quiet_counts_more() {
    for (visits, ticks) in [(60, 128), (30, 64), (10, 22), (8, 16), (0, 16)] {
        let mut guest = Guest::new();
        for _ in 0..4 {
            guest.heat(1);
            guest.cool(1, SHORT);
        }
        let waited = 1 + (0..1000).take_while(|_| !guest.tick(1, visits)).count();
        assert_eq!(waited, ticks, "{visits} visits in a period");
    }
    let mut guest = Guest::new();
    assert!(!guest.tick(1, 0) && !guest.tick(2, 0) && guest.tick(1, 0));
}

#[test]
fn interrupts_in_quick_succession_count_once() {
    let mut guest = Guest::new();
    guest.tick(1, 0);
    for _ in 0..100 {
        assert!(!guest.policy.tick(1, guest.now, guest.visits, || None));
    }
    assert!(guest.tick(1, 0));
}

#[test]
fn another_program_begins_anew() {
    let mut guest = Guest::new();
    for _ in 0..3 {
        guest.heat(1);
        guest.cool(1, SHORT);
    }
    assert!(guest.policy.knows(1));
    guest.policy.forget(1);
    assert!(!guest.policy.knows(1));
    assert_eq!(guest.heat_of(2, 1), 2);
}

#[test]
fn code_that_stays_translated_cools() {
    let mut guest = Guest::new();
    guest.heat(1);
    for _ in 0..100 {
        guest.burst(1, LONG);
    }
    for _ in 0..5 {
        assert!(guest.policy.is_hot(1));
        guest.policy.stayed(1);
    }
    for _ in 0..5 {
        guest.policy.stayed(1);
    }
    assert!(!guest.policy.is_hot(1));
}

#[test]
fn phases_of_short_bursts_do_not_cool() {
    let mut guest = Guest::new();
    guest.heat(1);
    for _ in 0..10 {
        for _ in 0..3 {
            guest.burst(1, LONG);
        }
        for _ in 0..60 {
            guest.burst(1, SHORT);
        }
        assert!(guest.policy.is_hot(1));
    }
    // Whatever it has been worth before.
    assert!(guest.cool(1, SHORT) < 200);
}

/// A server's system calls as they look when the host is slow: much of what it takes for a stop counts as user code.
const DOUBTFUL: Burst = Burst {
    native: Duration::from_micros(30),
    whole: Duration::from_micros(35),
    stops: 1,
};

impl Guest {
    /// Bursts of an address space until it is in doubt.
    fn doubt(&mut self, root: u64) -> u32 {
        for n in 0..1_000_000 {
            if self.policy.counts() {
                return n;
            }
            self.policy.burst(root, DOUBTFUL);
        }
        panic!("it never is");
    }

    /// So many visits in a millisecond, natively and translated, until it is not in doubt any more; for how many of them it was native.
    fn contest(&mut self, root: u64, native: u32, translated: u32) -> (u32, u32) {
        let (mut ns, mut visits, mut times) = (7, u32::MAX - 5, (0, 0));
        self.policy.pass(root, ns, visits);
        while self.policy.counts() {
            let is_hot = self.policy.is_hot(root);
            let (time, made) = match is_hot {
                true => (&mut times.0, native),
                false => (&mut times.1, translated),
            };
            *time += 1;
            ns += 1_000_000;
            visits = visits.wrapping_add(made);
            self.policy.pass(root, ns, visits);
            let becomes = self.policy.turn();
            assert_eq!(becomes, !is_hot && self.policy.is_hot(root));
        }
        times
    }
}

#[test]
fn program_in_doubt_goes_on_as_is_faster() {
    let mut guest = Guest::new();
    guest.heat(1);
    assert_eq!(guest.doubt(1), BURSTS_IN_DOUBT);
    let (native, translated) = guest.contest(1, 100, 90);
    assert!(native > 20 && translated > 20, "{native} {translated}");
    assert!(guest.policy.is_hot(1));
    // Whatever its bursts look like, for a time that grows.
    let mut times = Vec::new();
    for _ in 0..6 {
        times.push(guest.doubt(1) / 1000);
        guest.contest(1, 100, 90);
    }
    assert_eq!(times, [14, 28, 57, 114, 228, 228]);
    guest.policy.burst(1, SHORT);
    assert!(guest.policy.is_hot(1));
    // Another time it is slower.
    guest.doubt(1);
    guest.contest(1, 100, 160);
    assert!(!guest.policy.is_hot(1));
    assert_eq!(guest.heat(1), 8);
    guest.doubt(1);
    guest.contest(1, 100, 160);
    assert_eq!(guest.heat(1), 32);
}

#[test]
fn time_in_other_address_spaces_does_not_count() {
    let mut guest = Guest::new();
    guest.heat(1);
    guest.doubt(1);
    let mut ns = 0;
    guest.policy.pass(1, ns, 0);
    assert!(!guest.policy.is_hot(1));
    for n in 0..20 {
        guest.policy.pass(2, ns, n);
        ns += 1_000_000;
        guest.policy.pass(1, ns, n);
        assert!(!guest.policy.turn());
    }
    // Its turn has not passed. Nobody waits for one that does not come back.
    assert!(guest.policy.counts());
    guest.policy.pass(2, ns, 20);
    guest.policy.pass(2, ns + MOST_ELSEWHERE + 1, 20);
    assert!(!guest.policy.counts() && guest.policy.is_hot(1));
}

#[test]
fn program_that_ends_is_not_in_doubt() {
    let mut guest = Guest::new();
    guest.heat(1);
    guest.doubt(1);
    guest.policy.forget(1);
    assert!(!guest.policy.counts());
}

#[test]
fn long_bursts_are_not_in_doubt() {
    let mut guest = Guest::new();
    guest.heat(1);
    for _ in 0..10_000 {
        guest.policy.burst(1, LONG);
    }
    assert!(!guest.policy.counts());
}
