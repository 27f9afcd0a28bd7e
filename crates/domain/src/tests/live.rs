//! Memory that is sent while its guest writes it.

use hospes_migration::LiveRound;
use std::io::ErrorKind;
use std::sync::atomic::AtomicBool;

use hospes_migration::Writer;
use hospes_units::{Gfn, PAGE_SIZE};

use super::memory::give_back;
use super::saving::{MEMORY, restored, suspend};
use super::*;

/// Frames that the guest writes all the time, and one that it fills at first and gives back later.
const FIRST: u64 = (32 << 20) / PAGE_SIZE;
const FRAMES: u64 = 4096;
const GIVEN: u64 = FIRST + FRAMES;

/// What a guest is told.
#[derive(Default)]
struct Told {
    give_back: AtomicBool,
    suspend: AtomicBool,
}

/// A guest that fills pages and empties them again for as long as it runs.
fn writing(told: Arc<Told>) -> Domain {
    let d = try_domain(2, MEMORY, Sink::default(), move |c| {
        if c.id > 0 {
            return Ok(Exit::Yield);
        }
        if c.step == 0 {
            c.memory.write_obj(Gfn(GIVEN).gpa(), &1u64).unwrap();
        }
        let step = u64::from(c.step);
        for n in 0..4 {
            let page = Gfn(FIRST + (step / 400 * 37 + n * 1001) % FRAMES).gpa();
            if (step / 100 + n).is_multiple_of(5) {
                c.memory.zero(page, PAGE_SIZE).unwrap();
            } else {
                let word = Gpa(page.0 + step % 512 * 8);
                c.memory.write_obj(word, &(step + 1)).unwrap();
            }
        }
        Ok(if told.give_back.swap(false, SeqCst) {
            give_back(c, GIVEN)
        } else if told.suspend.swap(false, SeqCst) {
            c.shutdown(sched::SHUTDOWN_SUSPEND)
        } else {
            Exit::Yield
        })
    })
    .unwrap();
    d.unpause();
    while read(&d, GIVEN) == vec![0; PAGE_SIZE as usize] {
        std::thread::yield_now();
    }
    d
}

fn read(d: &Domain, gfn: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE_SIZE as usize];
    let memory = d.xen().memory();
    memory.read_ram(Gfn(gfn).gpa(), &mut page).unwrap();
    page
}

fn is_logged(d: &Domain) -> bool {
    d.xen().memory().log().must_note(Gfn(0))
}

/// Goes on for some rounds, however little is left.
const LONG: LivePolicy = LivePolicy {
    pause: Duration::ZERO,
    rounds_max: 6,
};

#[test]
fn what_was_sent_in_rounds_is_what_the_guest_has() {
    let told = Arc::new(Told::default());
    let d = writing(Arc::clone(&told));
    let mut bytes = Vec::new();
    let to: &mut dyn Write = &mut bytes;
    let mut stream = Writer::new(to, b"configuration").unwrap();
    let mut rounds = Vec::new();
    let mut progress = |round: LiveRound| {
        rounds.push(round);
        told.give_back.store(true, SeqCst);
        std::thread::sleep(Duration::from_millis(5));
    };
    let live = d.send_live(&mut stream, LONG, &mut progress, &|| false);
    let live = live.unwrap();
    assert!(is_logged(&d));
    assert!(rounds.len() >= 2, "{rounds:?}");
    assert!(rounds.iter().all(|r| r.pages > 0 && r.bytes_per_s > 0));
    // Nobody else may begin rounds meanwhile.
    let mut other = Vec::new();
    let other: &mut dyn Write = &mut other;
    let mut other = Writer::new(other, b"").unwrap();
    let busy = d.send_live(&mut other, LONG, &mut |_| (), &|| false);
    assert!(matches!(busy, Err(SaveError::Sending)));
    suspend(&d, &told.suspend);
    d.save(&mut stream, Some(live)).unwrap();
    assert!(!is_logged(&d));
    stream.end().unwrap();
    let new = restored(2, MEMORY, bytes).unwrap();
    let rings = d.xen().ring_frames();
    for ram in d.xen().memory().ram() {
        for gfn in ram.start / PAGE_SIZE..ram.end / PAGE_SIZE {
            if !rings.contains(&Gfn(gfn)) {
                assert!(read(&d, gfn) == read(&new, gfn), "frame {gfn:#x}");
            }
        }
    }
    assert_eq!(read(&d, GIVEN), [0; PAGE_SIZE as usize]);
    assert_eq!(new.xen().balloon().given_back, [(GIVEN, 1)]);
    // What was emptied in the end takes nothing there.
    let used = |d: &Domain| d.xen().memory().used_bytes();
    assert!(used(&new) <= used(&d), "{} {}", used(&new), used(&d));
}

#[test]
fn guest_goes_on_unlogged_when_it_is_not_sent() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = (self.0.checked_sub(bytes.len())).ok_or(ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let told = Arc::new(Told::default());
    let d = writing(Arc::clone(&told));
    let send = |room: usize, rounds: u32| {
        let mut full = Full(room);
        let to: &mut dyn Write = &mut full;
        let mut stream = Writer::new(to, b"").unwrap();
        let passed = AtomicU32::new(0);
        let mut progress = |_| {
            passed.fetch_add(1, SeqCst);
        };
        let given_up = || passed.load(SeqCst) >= rounds;
        d.send_live(&mut stream, LONG, &mut progress, &given_up)
    };
    assert!(matches!(send(1 << 14, 9), Err(SaveError::Write(_))));
    assert!(!is_logged(&d));
    for rounds in [0, 1] {
        let end = send(usize::MAX, rounds);
        let taken_back = SaveError::Request(RequestError::TakenBack).to_string();
        assert_eq!(end.expect_err("given up").to_string(), taken_back);
        assert!(!is_logged(&d));
    }
    d.pause();
    let paused = SaveError::Request(RequestError::Paused).to_string();
    let end = send(usize::MAX, 9);
    assert_eq!(end.expect_err("paused").to_string(), paused);
    assert!(!is_logged(&d));
    d.unpause();
    let live = send(usize::MAX, 9).unwrap();
    assert!(is_logged(&d));
    drop(live);
    assert!(!is_logged(&d));
    assert_eq!(d.end_reason(), None);
    d.destroy();
    let ended = send(usize::MAX, 9);
    let reason = RequestError::Ended(EndReason::Destroyed).to_string();
    assert_eq!(ended.expect_err("ended").to_string(), reason);
}
